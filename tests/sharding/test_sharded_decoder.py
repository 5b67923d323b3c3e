"""Decoders on a mesh: what one device computes, and the collectives that the design calls for."""

import dataclasses
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import CODES, IDS, mesh_of, run, tiny
from metric import TOLERANCE, assert_close

import fp8x
from fp8x.errors import MeshError
from fp8x.models import generate, stream
from fp8x.nn import MoE
from fp8x.sharding import shard, specs

CODE_F32 = dataclasses.replace(fp8x.recipe("e4m3_e4m3_bf16_dynamic"), out_dtype=jnp.float32)
FLOAT32 = 2.0**-10  # float32 sums in another order, which may move a code


def collectives(function, *args) -> Counter:
    """How many of each kind a compiled function holds."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    text = nnx.jit(function).lower(*args).compile().as_text()
    return Counter(re.findall(rf"= [^=\n]*? ({kinds})(?:-start)?\(", text))


# The whole table is slow.
DIAGONAL = [
    ("e4m3_e4m3_bf16_dynamic", {"data": 2, "tensor": 4}),
    ("mxfp8_mxfp8_bf16", {"tensor": 2, "expert": 4}),
]


@pytest.mark.sample
@pytest.mark.parametrize(("code", "axes"), DIAGONAL, ids=str)
def test_logits_equal_one_device(code, axes):
    expected = run(tiny(code), IDS)
    assert_close(shard(tiny(code), mesh_of(**axes))(IDS), expected, tolerance=FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("code", [None, *CODES])
@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_every_recipe_on_every_mesh(tensor, expert, code):
    model = shard(tiny(code), mesh_of(tensor=tensor, expert=expert))
    assert_close(model(IDS), run(tiny(code), IDS), tolerance=FLOAT32)


@pytest.mark.slow
def test_every_recipe_on_sixteen_devices():
    script = """if True:
        import sys; sys.path.insert(0, "tests")
        import jax; jax.config.update("jax_num_cpu_devices", 16)
        from meshes import CODES, IDS, mesh_of, run, tiny
        from metric import assert_close
        from fp8x.sharding import shard
        for code in [None, *CODES]:
            model = shard(tiny(code), mesh_of(tensor=4, expert=4))
            assert_close(model(IDS), run(tiny(code), IDS), tolerance=2.0**-10)
    """
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.slow
def test_768_features_over_four_devices():
    code, config = "fp8_e4m3fn_bf16_block_scale", {"moe_intermediate_size": 768}
    model = shard(tiny(code, **config), mesh_of(data=2, tensor=4))
    mlp = model.layers[0].mlp
    assert mlp.w13.weight.shape == (4, 2, 1024, 64) and mlp.w2.weight_scale.shape == (4, 1, 8)
    assert mlp.w2.weight[...].addressable_shards[0].data.shape == (4, 64, 256)
    assert_close(model(IDS), run(tiny(code, **config), IDS), tolerance=FLOAT32)


@pytest.mark.slow
def test_dense_layers_biases_and_a_tied_embedding():
    config = {"mlp_only_layers": [0], "intermediate_size": 72, "attention_bias": True}
    config |= {"tie_word_embeddings": True, "num_key_value_heads": 1}
    model, other = tiny(None, **config), tiny(None, **config)
    for each in (model, other):
        for name in "qkvo":
            bias = getattr(each.layers[0].self_attn, f"{name}_proj").bias
            bias[...] = jnp.linspace(-1, 1, bias.size)
        fp8x.quantize_model(each, CODE_F32)
    assert_close(shard(model, mesh_of(expert=2, tensor=4))(IDS), run(other, IDS), tolerance=FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "fp8_e4m3fn_bf16_block_scale"], ids=str)
def test_a_mixture_is_within_the_tolerance_of_the_op(recipe):
    """In bfloat16; with a bias that every expert adds once."""

    def moe():
        layer = MoE(64, 96, 4, 2, recipe=recipe, use_bias=True, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        layer.w2.bias[...] = jnp.ones_like(layer.w2.bias[...])
        return layer

    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.bfloat16)
    mesh, layer = mesh_of(expert=2, tensor=2), shard(moe(), mesh_of(expert=2, tensor=2))
    graphdef, state = nnx.split(layer)
    step = jax.shard_map(
        lambda state, x: nnx.merge(graphdef, state)(x),
        mesh=mesh,
        in_specs=(specs(layer), P()),
        out_specs=P(),
        check_vma=False,
    )
    assert_close(jax.jit(step)(state, x), nnx.jit(lambda m, x: m(x))(moe(), x), tolerance=2 * TOLERANCE[x.dtype])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
def test_collectives(axis_type):
    mesh = mesh_of(axis_type, data=2, expert=2, tensor=2)
    model, ids = shard(tiny("fp8_e4m3fn_bf16_block_scale", num_hidden_layers=2), mesh), jnp.asarray(IDS)
    # Two of each layer and one of the embedding; the gather is of logits.
    assert collectives(lambda m, ids: m(ids), model, ids) == {"all-reduce": 5, "all-gather": 1}
    cache = model.init_cache(4, 8)
    assert collectives(lambda m, ids, c: m.extend(ids, c), model, ids[:, :1], cache) == {"all-reduce": 5}


@pytest.mark.slow
def test_collectives_of_dynamic_scales_and_of_data():
    """A scale a token over a K that is split: its amax meets before o_proj and w2. Rows of a batch never do."""
    model = shard(tiny("e4m3_e4m3_bf16_dynamic"), mesh_of(tensor=2))
    assert collectives(lambda m: m(IDS), model) == {"all-reduce": 5, "all-gather": 1}
    assert collectives(lambda m: m(IDS), shard(tiny(None), mesh_of(data=4))) == {}


@pytest.mark.slow
def test_dynamic_scales_over_all_rows():
    """One activation scale for all tokens, which lie on several devices."""
    recipe = fp8x.Recipe(fp8x.Scheme("e4m3", block=(None, None)), fp8x.Scheme("e4m3", block=(None, None)), "dynamic")

    def model():
        return fp8x.quantize_model(tiny(None), fp8x.Recipe(recipe.weight, recipe.activation, "dynamic", jnp.float32))

    assert_close(shard(model(), mesh_of(data=2, expert=2, tensor=2))(IDS), run(model(), IDS), tolerance=FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis_type", "options"),
    [
        (AxisType.Auto, {}),
        (
            AxisType.Explicit,
            {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3, "eos_id": 7}
            | {"lengths": [5, 2, 4, 1], "prefill_chunk": 3, "stop_strings": ["MH", "J;"]},
        ),
    ],
    ids=str,
)
def test_generates_what_one_device_does(axis_type, options, byte_tokenizer):
    options = {"max_new_tokens": 4, "tokenizer": byte_tokenizer} | options
    expected = generate(tiny("mxfp8_bf16"), IDS, **options)
    model = shard(tiny("mxfp8_bf16"), mesh_of(axis_type, data=2, expert=2))
    found = generate(model, IDS, **options)
    np.testing.assert_array_equal(found, expected)
    assert found.is_fully_replicated
    lengths, filler = options.get("lengths", [5] * 4), options.get("eos_id", 0)
    for new, text, length in zip(np.stack([*stream(model, IDS, **options)], axis=1), np.asarray(found), lengths):
        np.testing.assert_array_equal(np.pad(new, (0, 4 - new.size), constant_values=filler), text[length : length + 4])


@pytest.mark.slow
def test_a_cache_on_a_mesh_reads_on():
    model = shard(tiny(None), mesh_of(data=2, tensor=2))
    hidden, cache = model.extend(IDS[:, :3], model.init_cache(4, 5))
    hidden, cache = model.extend(IDS[:, 3:], cache)
    assert cache.layers[0].keys.sharding.spec == P("data", None, "tensor") and int(cache.length) == 5
    assert_close(model.logits(hidden), run(tiny(None), IDS)[:, 3:], tolerance=FLOAT32)


@pytest.mark.slow
def test_an_unknown_token_gives_nan():
    """Where a program can't see the ids while it is compiled."""
    model = shard(tiny(None), mesh_of(tensor=4))
    logits = nnx.jit(lambda model, ids: model(ids))(model, np.where(np.arange(4)[:, None] == 2, 61, IDS))
    assert np.isnan(logits[2]).all() and not np.isnan(logits[:2]).any()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 3}, "axis 'tensor' has 3 devices, which do not divide the model's 4 attention heads; use 1, 2, 4"),
        ({"expert": 3}, "axis 'expert' has 3 devices, which do not divide the model's 4 experts; use 1, 2, 4"),
        ({"model": 2}, "axis 'model' is unknown; use data, tensor, expert"),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(MeshError) as error:
        shard(tiny(None), mesh_of(**axes))
    assert message in str(error.value)


def test_what_can_not_be_done_on_a_mesh():
    mesh, model = mesh_of(data=2), tiny(None)
    shard(model, mesh)
    with pytest.raises(
        MeshError, match="the batch is 3, which the 2 devices along mesh axis 'data' do not divide; give 4"
    ):
        model(IDS[:3])
    with pytest.raises(MeshError, match="ids: the batch is 3"):
        generate(model, IDS[:3], max_new_tokens=1)
    with pytest.raises(MeshError, match="it is on a mesh already"):
        shard(model, mesh)
    with pytest.raises(MeshError, match="a Linear is neither a Decoder nor"):
        shard(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), mesh)
    with pytest.raises(MeshError, match="in calibration"):
        shard(fp8x.quantize_model(tiny(None), "e4m3_e4m3_bf16_max_calibrate"), mesh)
