"""What `quantize_model` says of what it leaves, what `report` lists, and that an error leaves a model as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from metric import as_bits

import fp8x
from fp8x.errors import RecipeError, RuleError, ShapeError
from fp8x.nn import registry
from fp8x.nn.walk import named_layers

CODE = "mxfp8_bf16"


def linear(k=32, n=32, **options):
    return nnx.Linear(k, n, rngs=nnx.Rngs(0), **options)


class Renamed(nnx.Linear):
    """Overrides nothing but how it is made."""

    def __init__(self, n, rngs):
        super().__init__(n, n, rngs=rngs)


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Scaled(nnx.Linear):
    def __init__(self, k, n, *, rngs):
        super().__init__(k, n, rngs=rngs)
        self.factor = nnx.Param(jnp.ones(n))


class Experts(nnx.Module):
    """Three matrices of its own, as many Flax models have their experts."""

    def __init__(self):
        self.up, self.down = nnx.Param(jnp.ones((2, 32, 64))), nnx.data([nnx.Param(jnp.ones((2, 64, 32)))])
        self.scale = nnx.Param(jnp.ones(32))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.wte = nnx.Embed(16, 32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, rngs=rngs)
        self.renamed, self.doubled, self.scaled = (
            Renamed(32, rngs),
            Doubled(32, 32, rngs=rngs),
            Scaled(32, 32, rngs=rngs),
        )
        self.conv = nnx.Conv(32, 32, (3,), rngs=rngs)
        self.normed = nnx.WeightNorm(linear(), rngs=rngs)
        self.own_dot = linear(dot_general=lambda *args, **options: jax.lax.dot_general(*args, **options))
        self.at_call = nnx.Einsum("ab,bc->ac", (32, 32), rngs=rngs)
        self.at_call.einsum_str = None
        self.vectors = nnx.Einsum("btd,dn->bdn", (32, 2), rngs=rngs)
        self.experts = nnx.data(Experts())
        self.lora = nnx.LoRALinear(32, 32, lora_rank=2, rngs=rngs)
        self.adapter = nnx.LoRA(32, 2, 32, base_module=linear(), rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.LayerNorm(32, rngs=rngs)))(rngs)
        self.lm_head = linear(32, 16)


LEFT = {
    "doubled": "Linear with __call__ of its own",
    "scaled": "Linear that holds factor as well",
    "conv": "nnx.Conv is no type that fp8x can quantize",
    "normed.layer_instance": "nnx.WeightNorm rewrites it at every call",
    "own_dot": "it has a dot_general of its own",
    "at_call": "its equation is given at the call",
    "vectors": "its equation 'btd,dn->bdn' sums the input over 't' alone",
    "experts": "Experts is no type that fp8x can quantize; see fp8x.nn.register",
}
QUANTIZED = {
    *(f"attention.{name}" for name in ("query", "key", "value", "out")),
    "renamed",
    "lora",
    "adapter.base_module",
}


def test_warns_once_of_what_it_can_not_quantize():
    net = Net()
    with pytest.warns(UserWarning) as caught:
        fp8x.quantize_model(net, CODE)
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(
        "fp8x can't quantize 9 matrices of the model: doubled (it is a Linear with __call__ of its own"
    )
    assert "and 4 more" in text and warning.filename == __file__
    assert set(named_layers(net)) == QUANTIZED


def test_report_lists_every_matrix_with_its_recipe_or_the_reason():
    net = fp8x.quantize_model(Net(), CODE, unsupported="ignore")
    report = fp8x.report(net)
    rows = {row.path: row for row in report.rows}
    variables = {".".join(map(str, path)): each for path, each in nnx.to_flat_state(nnx.state(net))}
    scales = {name for name in variables if name.endswith("weight_scale")}
    assert set(rows) == {name for name, each in variables.items() if each.ndim >= 2} - scales
    for path in QUANTIZED:
        row, layer = rows[f"{path}.weight"], named_layers(net)[path]
        assert row.code == CODE and row.reason == "" and row.shape == layer.weight.shape
        assert row.nbytes == layer.quantized_weight.nbytes
    for path, reason in LEFT.items():
        found = [row for name, row in rows.items() if name.startswith(f"{path}.") and row.shape != (2, 32)]
        assert found and all(reason in row.reason and row.recipe is None for row in found), path
    assert rows["lora.lora.lora_a"].reason == "an adapter, which is trained"
    assert rows["stack.scale"].reason == "scale or bias of a norm"
    assert rows["lm_head.kernel"].reason == "a head; a rule quantizes it"
    assert rows["wte.embedding"].reason == "an embedding; a rule quantizes it"
    text = str(report)
    assert all(row.path in text for row in report.rows)
    assert text.splitlines()[-1].startswith(f"{len(QUANTIZED)} of {len(rows)} in 8 bits, ")
    assert len(report.quantized) + len(report.kept) == len(rows)


def test_reasons_name_the_rule():
    model = nnx.Dict(one=linear(), other=linear(), last=linear())
    fp8x.quantize_model(model, None, {"one": None, "other": CODE})
    reasons = {row.path: row.reason for row in fp8x.report(model).rows}
    assert reasons["one.kernel"] == "the rule 'one' says so"
    assert reasons["last.kernel"] == "no rule names it, and the model had no recipe"
    copied = {row.path: row.reason for row in fp8x.report(nnx.clone(model)).rows}
    assert copied["last.kernel"] == "no rule or recipe has taken it"


def test_report_before_quantizing():
    rows = {row.path: row.reason for row in fp8x.report(nnx.Dict(a=linear(), conv=Net().conv, lm_head=linear())).rows}
    assert rows["a.kernel"] == "no rule or recipe has taken it"
    assert "nnx.Conv" in rows["conv.kernel"] and rows["lm_head.kernel"] == "a head; a rule quantizes it"


class Mixture(nnx.Module):
    """What chooses experts, whose matrices are one parameter."""

    def __init__(self, outputs):
        self.choose = nnx.Linear(64, outputs, rngs=nnx.Rngs(0))
        self.up = nnx.Einsum("ecd,edf->ecf", (8, 64, 128), rngs=nnx.Rngs(0))


class Tied(nnx.Module):
    """A language model whose head has a name of its own, and is padded."""

    def __init__(self, outputs=8):
        self.tok = nnx.Embed(1000, 64, rngs=nnx.Rngs(0))
        self.layers = nnx.List([Mixture(outputs), Mixture(outputs)])
        self.final = nnx.LinearGeneral(64, (2, 512), rngs=nnx.Rngs(0))


def test_heads_and_routers_are_told_by_their_shapes():
    model = fp8x.quantize_model(Tied(), CODE)
    assert set(named_layers(model)) == {"layers.0.up", "layers.1.up"}
    for again in (model, nnx.clone(model)):  # a copy has no memory of what quantize_model said
        rows = {row.path: row.reason for row in fp8x.report(again).rows}
        head = "taken for a head: its 1024 outputs are the vocabulary of tok; a rule quantizes it"
        assert rows["final.kernel"] == head
        assert rows["layers.1.choose.kernel"] == "a router: a row for each of 8 experts; a rule quantizes it"
    layers = named_layers(fp8x.quantize_model(Tied(), CODE, {"final": CODE, r".*\.choose": CODE}))
    assert {"final", "layers.0.choose"} <= set(layers)


def test_what_may_be_a_router_is_named():
    with pytest.warns(
        UserWarning, match=r"router .* not known .*layers\.0\.choose \(may be a router or a head: 9 outputs"
    ):
        model = fp8x.quantize_model(Tied(9), CODE)
    (row,) = (row for row in fp8x.report(model).rows if row.path == "layers.1.choose.weight")
    assert row.doubt == "may be a router or a head: 9 outputs of 64 inputs; if it is, a rule with None keeps it"
    assert f"{CODE}; {row.doubt}" in str(fp8x.report(model))
    for rule in (CODE, None):  # who says what it is to be is told nothing
        fp8x.quantize_model(Tied(9), CODE, {r".*\.choose": rule})


def test_a_variable_that_is_held_twice_is_listed_once():
    shared = linear()
    model = fp8x.quantize_model(nnx.Dict(one=shared, other=shared), CODE)
    assert [row.path for row in fp8x.report(model).rows] == ["one.weight"]


class Half(nnx.Module):
    """A stack, experts, and a layer that no call reaches."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stack = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(32, 32, rngs=rngs)))(rngs)
        self.moe, self.idle = fp8x.nn.MoE(32, 32, 2, 1, rngs=rngs), linear()
        self.again = self.moe
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: layer(x).astype(x.dtype), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.moe(self.dropout(run(x, self.stack)))


@pytest.mark.slow
def test_layers_that_inputs_never_reach():
    model = fp8x.quantize_model(Half(), CODE)
    before = nnx.split(model)
    called = {row.path: row.is_called for row in fp8x.report(model, jax.ShapeDtypeStruct((4, 32), jnp.float32)).rows}
    assert called == {
        "stack.weight": True,
        "stack.bias": True,
        "moe.w13.weight": True,
        "moe.w2.weight": True,
        "moe.router.kernel": None,
        "idle.weight": False,
    }
    after = nnx.split(model)
    assert before[0] == after[0]
    assert all(a is b for a, b in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True))
    assert "idle.weight" in str(fp8x.report(model, jnp.ones((1, 32)))) and "never called" not in str(fp8x.report(model))


def test_rules_with_none_keep_it_quiet():
    net = fp8x.quantize_model(Net(), CODE, {path.replace(".", r"\."): None for path in LEFT})
    assert set(named_layers(net)) == QUANTIZED


def test_a_rule_can_ask_for_an_embedding():
    model = nnx.Dict(wte=nnx.Embed(300, 64, rngs=nnx.Rngs(0)), up=linear(64, 32))
    assert set(named_layers(fp8x.quantize_model(model, "fp8_e4m3fn_bf16_block_scale", {"wte": "mxfp8_bf16"}))) == {
        "wte",
        "up",
    }


@pytest.mark.slow
@pytest.mark.parametrize("code", ["mxfp8_mxfp8_bf16", "e4m3_bf16", "fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16"])
def test_embeddings_are_dequantized_after_the_look_up(code):
    source = nnx.Embed(300, 64, rngs=nnx.Rngs(0))
    table = fp8x.quantize(source.embedding[...], fp8x.recipe(code).weight)
    layer = fp8x.nn.Embed.from_embed(source, code)
    assert layer.recipe.activation is None
    for ids in (np.asarray([[0, 299, 128], [-1, -300, 127]]), np.asarray(5)):
        np.testing.assert_array_equal(as_bits(layer(jnp.asarray(ids))), as_bits(table.dequantize(jnp.bfloat16)[ids]))
    assert np.isnan(np.asarray(layer(jnp.asarray([300])), np.float32)).all()
    query = jax.random.normal(jax.random.key(0), (2, 3, 64), jnp.bfloat16)
    np.testing.assert_array_equal(layer.attend(query), fp8x.ops.matmul(query, table, out_dtype=jnp.bfloat16))
    with pytest.raises(ShapeError, match="ids: dtype is float32; use integers"):
        layer(jnp.ones(3))


@pytest.mark.slow
def test_lora_keeps_its_adapter_on_a_base_in_8_bits():
    source = nnx.LoRALinear(32, 24, lora_rank=2, b_initializer=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    lora, base = source.lora, fp8x.nn.Linear.from_linear(source, CODE)
    layer = fp8x.quantize_model(source, CODE)
    assert isinstance(layer, fp8x.nn.LoRALinear) and layer.lora is lora
    x = jax.random.normal(jax.random.key(0), (3, 32))
    assert layer(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer(x), (base(x) + lora(x)).astype(jnp.bfloat16))


class TestErrors:
    @pytest.mark.parametrize(
        ("rule", "text"),
        [
            (
                "norm",
                "'norm' matches norm alone, where nothing can be quantized: nnx.LayerNorm: its parameters are vectors",
            ),
            ("attention", "'attention' matches attention alone, .* it holds attention.query, attention.key"),
            ("attention.out.bias", "matches attention.out.bias alone, where nothing can be quantized: a bias"),
        ],
    )
    @pytest.mark.parametrize("recipe", [CODE, None])
    def test_a_rule_for_what_holds_no_matrix(self, rule, text, recipe):
        net = Net()
        with pytest.raises(RuleError, match=text):
            fp8x.quantize_model(net, CODE, {rule: recipe})
        assert not named_layers(net)

    def test_names_of_the_report_are_rules(self):
        net, code = Net(), "e4m3_bf16"
        rows = [row.path for row in fp8x.report(net).rows if row.path in ("wte.embedding", "lm_head.kernel")]
        fp8x.quantize_model(net, None, dict.fromkeys(rows, code))
        assert set(named_layers(net)) == {"wte", "lm_head"}

    """After each, the model is as it was."""

    @pytest.fixture(autouse=True)
    def unchanged(self, monkeypatch):
        self.net = Net()
        graphdef, state = nnx.split(self.net)
        monkeypatch.setattr(registry, "_CONVERTERS", dict(registry._CONVERTERS))
        yield
        after, values = nnx.split(self.net)
        assert after == graphdef
        assert jax.tree.leaves(values) == jax.tree.leaves(state) or all(
            a is b for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(state), strict=True)
        )

    def test_unsupported(self):
        with pytest.raises(
            RecipeError, match=r"model: fp8x can't quantize 9 matrices of the model: doubled .* and 4 more"
        ):
            fp8x.quantize_model(self.net, CODE, unsupported="error")
        with pytest.raises(RecipeError, match="unsupported: 'never' is unknown; use 'warn', 'error' or 'ignore'"):
            fp8x.quantize_model(self.net, CODE, unsupported="never")

    def test_a_rule_that_reaches_only_what_can_not_be_quantized(self):
        with pytest.raises(
            RecipeError, match=r"rules: 'conv' names what can't be quantized: conv \(nnx.Conv is no type"
        ):
            fp8x.quantize_model(self.net, CODE, {"conv": CODE})

    def test_a_rule_without_a_match(self):
        with pytest.raises(RuleError, match="rules: 'convolution' matches no module"):
            fp8x.quantize_model(self.net, CODE, {"convolution": None})

    def test_a_shape(self):
        self.net.last = linear(40, 32)
        with pytest.raises(ShapeError, match=r"last: dim 1 .* is 40, which 32 does not divide"):
            fp8x.quantize_model(self.net, CODE, unsupported="ignore")
        del self.net.last

    def test_a_value(self):
        kernel = self.net.adapter.base_module.kernel[...]
        self.net.adapter.base_module.kernel[...] = kernel.at[0].set(jnp.nan)
        with pytest.raises(ShapeError, match=r"adapter\.base_module: holds 32 NaN or Inf"):
            fp8x.quantize_model(self.net, CODE, unsupported="ignore")
        self.net.adapter.base_module.kernel[...] = kernel

    def test_a_tuple(self):
        self.net.pair = nnx.data((linear(), linear()))
        with pytest.raises(RecipeError, match=r"model: pair\.0 is held in a tuple"):
            fp8x.quantize_model(self.net, CODE, unsupported="ignore")
        del self.net.pair


def test_a_converter_of_the_users_own_that_fails_is_the_exception(monkeypatch):
    monkeypatch.setattr(registry, "_CONVERTERS", dict(registry._CONVERTERS))

    @fp8x.nn.register(Experts)
    def fails(module, recipe, *, name, allow_nonfinite):
        raise RuntimeError("no")

    model = nnx.Dict(first=linear(), second=linear(), third=nnx.data(Experts()))
    with pytest.raises(RuntimeError, match="no") as caught:
        fp8x.quantize_model(model, CODE)
    assert caught.value.__notes__ == ["fp8x.quantize_model: first, second are quantized already, third is not"]
