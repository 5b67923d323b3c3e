"""Heads and routers by names and shapes: what a reader of a model's code would say of them."""

import pytest

from fp8x import roles
from fp8x.roles import Product

HEADS = ["lm_head", "head", "output", "unembed", "decoder.to_logits", "logits_dense", "LMHead_0", "model.value_head"]
HEADS += ["classifier.dense", "output_layer", "head.layers.2", "heads.1", "score"]
ROUTERS = ["moe.gating", "moe.router_proj", "moe.moe_gate", "layers.3.expert_gate", "switch_router", "topKRouter"]
ROUTERS += ["layers.0.mlp.gate", "moe.Router_0.Dense_0", "moe.gate.proj", "mlp.gate.wg", "shared_expert_gate"]
EMBEDDINGS = ["embed_tokens", "model.token_embedding", "patch_embed"]
OTHERS = ["gate_proj", "gate_up_proj", "wi_gate", "attention.out", "MultiHeadDotProductAttention_0.query", "delegate"]
OTHERS += ["layers.0.attention.output", "mlp.output", "header", "router.experts.0.up", "layers.0.attn_gate", "ahead"]


@pytest.mark.parametrize(
    ("paths", "role"), [(HEADS, "a head"), (ROUTERS, "a router"), (EMBEDDINGS, "an embedding"), (OTHERS, None)]
)
def test_names_are_read_word_by_word(paths, role):
    assert {path: roles.by_name(path) for path in paths} == dict.fromkeys(paths, role)


def find(tables=None, **products):
    """Roles of products given as `(n, k)` or `(n, k, lead)`, with `__` for dots."""
    given = {name.replace("__", "."): Product(*shape) for name, shape in products.items()}
    return roles.find(given, tables or {"tok": (1000, 64)})


VOCABULARY = "taken for a head: its 1000 outputs are the vocabulary of tok"


@pytest.mark.parametrize(
    ("products", "kept"),
    [
        # The head of a model with layers; one of them as wide as the vocabulary; and a model of one layer alone.
        (dict(layers__0__up=(1000, 64), layers__0__down=(64, 1000), final=(1000, 64)), {"final": VOCABULARY}),
        (dict(block__up=(1000, 64), block__down=(64, 1000), final=(1000, 64)), {"final": VOCABULARY}),
        (dict(Block_0__up=(1000, 64), Block_1__up=(1000, 64), final=(1000, 64)), {"final": VOCABULARY}),
        (dict(blocks__up=(1000, 64, (3,)), final=(1000, 64)), {"final": VOCABULARY}),
        # Of a factorized embedding, where nothing else is so wide.
        (dict(widen=(256, 64), layers__0__up=(512, 256), final=(1000, 256)), {"final": VOCABULARY}),
        (dict(layers__0__up=(1000, 256), layers__0__down=(256, 1000), final=(1000, 256)), {}),
        # A name says which it is.
        (dict(adapter=(1000, 64), lm_head=(1000, 64)), {"lm_head": "a head"}),
        (dict(query=(1000, 64), key=(1000, 64), out=(64, 1000)), {}),
    ],
)
def test_a_head_by_the_vocabulary(products, kept):
    assert find(**products).kept == kept


@pytest.mark.parametrize(
    ("outputs", "vocabulary", "is_head"),
    [
        (50304, 50257, True),
        (50257, 50304, True),
        (1024, 1000, True),
        (128, 97, True),
        (1003, 1000, False),
        (2048, 1000, False),
        (51200, 50257, False),
        (128, 1000, False),
    ],
)
def test_padded_vocabularies(outputs, vocabulary, is_head):
    found = find({"tok": (vocabulary, 32)}, layers__0__up=(96, 32), final=(outputs, 32))
    assert ("final" in found.kept) == is_head


def test_where_shapes_do_not_tell_there_is_a_doubt():
    # An MLP as wide as the vocabulary beside the head; a vocabulary as large as its features; positions.
    flat = find(up=(1000, 64), down=(64, 1000), final=(1000, 64))
    assert not flat.kept and set(flat.doubts) == {"up", "final"}
    square = find({"tok": (64, 64)}, mix=(64, 64))
    assert not square.kept and square.doubts == {
        "mix": "may be a head: its 64 outputs are the vocabulary of tok in number"
    }
    assert find({"pos_embed": (1000, 64)}, final=(1000, 64)).kept == {}


def test_a_router_by_the_experts_beside_it():
    lists = {
        f"moe__ffns__{e}__{name}": shape for e in range(8) for name, shape in dict(a=(128, 64), b=(64, 128)).items()
    }
    reason = "a router: a row for each of 8 experts"
    assert find(moe__pick=(8, 64), **lists).kept == {"moe.pick": reason}
    assert find(moe__pick=(8, 64), moe__up=(128, 64, (8,))).kept == {"moe.pick": reason}
    # A stack of layers with a stack of experts in each, and in a module of their own.
    assert find(moe__pick=(8, 64, (3,)), moe__experts__up=(128, 64, (3, 8))).kept == {"moe.pick": reason}
    # As many outputs as the model has layers, or as a stack that reads something else.
    layers = {f"layers__{i}__up": (128, 64) for i in range(8)}
    assert find(pick=(8, 64), **layers).kept == find(pick=(8, 64), up=(128, 32, (8,))).kept == {}


def test_gates_of_a_gated_mlp_are_no_routers():
    assert find(mlp__gate=(256, 64), mlp__up=(256, 64), mlp__down=(64, 256)).kept == {}
    assert find(mlp__gate=(256, 64), mlp__out=(64, 256)).kept == {}
    assert find(mlp__gate__proj=(256, 64), mlp__up__proj=(256, 64)).kept == {}
    assert find(attention__gate=(4096, 4096)).kept == {}
    assert find(moe__gate=(256, 4096), moe__shared=(2048, 4096)).kept == {"moe.gate": "a router"}
    assert find(moe__gate__proj=(256, 4096)).kept == {"moe.gate.proj": "a router"}


def test_narrow_products_are_doubtful():
    found = find(moe__choose=(9, 64), moe__up=(128, 64, (8,)), attention__k=(16, 64), attention__v=(16, 64))
    assert found.doubts == {"moe.choose": "may be a router or a head: 9 outputs of 64 inputs"}
    assert found.missed == ("moe.choose",)
    # Where the router is known, and where there are no experts, nobody has to be told at once.
    known = find(moe__choose=(9, 64), moe__router=(8, 64), moe__up=(128, 64, (8,)))
    assert set(known.doubts) == {"moe.choose"} and not known.missed
    assert not find(choose=(9, 64)).missed


def test_a_parameter_of_one_matrix_is_no_experts():
    # The class token and the positions of a vision transformer, [1, 1, D] and [1, T, D].
    assert not find(cls=(64, 1, (1,)), pos=(64, 65, (1,)), fc=(10, 64)).missed
