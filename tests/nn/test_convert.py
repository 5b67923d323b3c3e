"""`quantize_model`: which modules are swapped, where they may be held, and the registry."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from resident import measure

import fp8x
from fp8x.errors import RecipeError, RuleError, ShapeError
from fp8x.nn import registry
from fp8x.nn.walk import get_module, named_layers, named_modules, set_module

CODE = "mxfp8_bf16"


def linear(k=32, n=32):
    return nnx.Linear(k, n, rngs=nnx.Rngs(0))


class Block(nnx.Module):
    def __init__(self):
        self.up, self.gate, self.norm = linear(), linear(), nnx.LayerNorm(32, rngs=nnx.Rngs(0))
        self.moe = fp8x.nn.MoE(32, 64, 2, 1, shared_intermediate=32, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.moe(self.norm(self.up(x) * self.gate(x)))


class Net(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(8, 32, rngs=nnx.Rngs(0))
        self.layers = nnx.List([Block(), Block()])
        self.head = nnx.Sequential(linear(), nnx.relu, linear(32, 8))
        self.lm_head = linear(32, 8)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.head(x) @ jnp.ones((8, 32)))


# The gate beside `up` is of a gated MLP.
BLOCK = {"up", "gate", "moe.w13", "moe.w2", "moe.shared.gate_proj", "moe.shared.up_proj", "moe.shared.down_proj"}
QUANTIZED = {f"layers.{i}.{path}" for i in range(2) for path in BLOCK}


def test_swaps_in_place_all_but_embeddings_heads_and_routers():
    net = Net()
    assert fp8x.quantize_model(net, CODE) is net
    assert set(named_layers(net)) == QUANTIZED
    assert all(layer.recipe == fp8x.recipe(CODE) for layer in named_layers(net).values())
    kinds = {path: type(module) for path, module in named_modules(net)}
    assert kinds["lm_head"] is kinds["head.layers.2"] is kinds["layers.0.moe.router"] is nnx.Linear
    assert kinds["layers.1.gate"] is fp8x.nn.Linear and kinds["layers.0.moe.w2"] is fp8x.nn.GroupedLinear
    assert nnx.jit(lambda net, ids: net(ids))(net, jnp.arange(3)).shape == (3, 8)


def test_rules():
    rules = {r"layers\.0\..*": None, ".*gate": "e4m3_bf16", r".*w\d+": fp8x.recipe("e4m3_bf16")}
    layers = named_layers(fp8x.quantize_model(Net(), CODE, rules))
    assert not any(path.startswith("layers.0") for path in layers)
    assert layers["layers.1.gate"].recipe == layers["layers.1.moe.w2"].recipe == fp8x.recipe("e4m3_bf16")
    assert layers["layers.1.up"].recipe == fp8x.recipe(CODE)
    only = named_layers(fp8x.quantize_model(Net(), None, {"lm_head": CODE}))
    assert set(only) == {"lm_head"}


def test_modules_are_in_the_order_of_the_model():
    paths = [path for path, _ in named_modules(nnx.List([linear() for _ in range(12)]))]
    assert paths == ["", *map(str, range(12))]


class Containers(nnx.Module):
    def __init__(self):
        self.plain = nnx.data({"a": linear(), "b": [linear(), nnx.Dict(c=linear())]})
        self.nested = nnx.List([nnx.List([linear()])])


def test_modules_in_any_container():
    model = fp8x.quantize_model(Containers(), CODE)
    assert list(named_layers(model)) == ["plain.a", "plain.b.0", "plain.b.1.c", "nested.0.0"]
    assert isinstance(model.plain["b"][1].c, fp8x.nn.Linear) and isinstance(model.nested[0][0], fp8x.nn.Linear)
    for path in named_layers(model):
        set_module(model, path, linear())
        assert type(get_module(model, path)) is nnx.Linear


def test_a_tuple_is_refused():
    model = nnx.Dict(pair=nnx.data((linear(), linear())))
    with pytest.raises(RecipeError, match=r"model: pair\.0 is held in a tuple; .* nnx\.List"):
        fp8x.quantize_model(model, CODE)


class Child(nnx.Module):
    def __init__(self, parent):
        self.parent, self.linear = parent, linear()


class Parent(nnx.Module):
    def __init__(self):
        self.child = Child(self)


def test_a_module_that_knows_its_parent():
    model = fp8x.quantize_model(Parent(), CODE)
    assert list(named_layers(model)) == ["child.linear"]
    assert model.child.parent is model


def test_a_module_that_is_held_twice_stays_one():
    shared = linear()
    model = fp8x.quantize_model(nnx.Dict(one=shared, other=shared), CODE)
    assert model.one is model.other and isinstance(model.one, fp8x.nn.Linear)


def test_a_model_that_is_a_layer():
    layer = fp8x.quantize_model(linear(), CODE)
    assert isinstance(layer, fp8x.nn.Linear)


class Scaled(nnx.Module):
    """A user's own type: a kernel `[K, N]` and a factor."""

    def __init__(self, k, n):
        self.kernel, self.factor = nnx.Param(jnp.ones((k, n))), 2.0


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_CONVERTERS", dict(registry._CONVERTERS))


def test_register(own_registry):
    seen = []

    @fp8x.nn.register(Scaled)
    def quantize_scaled(module, recipe, *, name, allow_nonfinite):
        seen.append((name, allow_nonfinite))
        return fp8x.nn.Linear.from_arrays(fp8x.quantize(module.factor * module.kernel[...].T, recipe.weight), recipe)

    class Renamed(Scaled):
        pass

    model = nnx.Dict(own=Scaled(32, 8), renamed=Renamed(32, 8), router=Scaled(32, 8))
    fp8x.quantize_model(model, CODE, allow_nonfinite=True)
    assert seen == [("own", True), ("renamed", True)]
    np.testing.assert_array_equal(model.own(jnp.ones((1, 32))), np.full((1, 8), 64))
    assert type(model.router) is Scaled


def test_the_last_registration_counts(own_registry):
    fp8x.nn.register(nnx.Linear, lambda module, recipe, *, name, allow_nonfinite: Scaled(1, 1))
    assert isinstance(fp8x.quantize_model(linear(), CODE), Scaled)


@pytest.mark.own_process
def test_peak_memory_is_the_model_and_one_layer(own_registry):
    """Every source module is gone before the one after it is converted."""
    alive = []

    @fp8x.nn.register(nnx.Linear)
    def watch(module, recipe, *, name, allow_nonfinite):
        gc.collect()
        alive.append(sum(ref() is not None for ref in sources))
        return fp8x.nn.Linear.from_linear(module, recipe, name=name)

    model = nnx.List([linear() for _ in range(4)])
    sources = [weakref.ref(module) for module in model]
    fp8x.quantize_model(model, CODE)
    assert alive == [4, 3, 2, 1]


@pytest.mark.slow
@pytest.mark.own_process
def test_peak_memory_is_measured_to_be_that(tmp_path):
    """Eight layers of 16 MB in float32: quantizing them all grows the process by less than four of them."""
    work = """
n, count = 2048, 1 if path.name == "small" else 8  # the first compiles what the others run
model = nnx.List([nnx.LinearGeneral(n, (2, n // 2), rngs=nnx.Rngs(i)) for i in range(count)])
jax.block_until_ready(nnx.state(model))
if path.name == "big":
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
size = 4 * n * n
jax.block_until_ready(nnx.state(fp8x.quantize_model(model, "fp8_e4m3fn_bf16_block_scale")))
"""
    layer, growth = measure(work, tmp_path / "big", tmp_path / "small")
    assert growth < 4 * layer


class TestErrors:
    def test_quantized_already(self):
        net = fp8x.quantize_model(Net(), CODE)
        with pytest.raises(RecipeError, match=r"model: layers\.0\.up is quantized already; start from the unquantized"):
            fp8x.quantize_model(net, CODE)

    def test_nothing_to_quantize(self):
        with pytest.raises(RecipeError, match=r"LayerNorm holds no module to quantize .*see fp8x\.nn\.register"):
            fp8x.quantize_model(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), CODE)

    def test_what_is_no_model(self):
        for model, match in (
            (Net, "model: the class Net came; give an instance of it"),
            (linen.Dense(4), r"model: Dense is a Linen module; fp8x\.linen\.quantize takes it"),
            (None, "model: a NoneType came"),
        ):
            with pytest.raises(RecipeError, match=match):
                fp8x.quantize_model(model, CODE)

    def test_rules_that_skip_everything(self):
        with pytest.raises(RuleError, match="rules: they skip every module"):
            fp8x.quantize_model(Net(), CODE, {".*": None})

    def test_a_rule_without_a_match_names_near_paths(self):
        net = Net()
        with pytest.raises(RuleError, match=r"rules: 'layers\.0\.upp' matches no module .*near it: layers\.0\.up"):
            fp8x.quantize_model(net, CODE, {"layers.0.upp": None})
        assert not named_layers(net)

    def test_unknown_recipe(self):
        with pytest.raises(RecipeError, match="recipe: 'mxfp8' is unknown; near it: mxfp8_"):
            fp8x.quantize_model(Net(), "mxfp8")

    def test_a_weight_that_does_not_fit_is_named_by_path(self):
        with pytest.raises(ShapeError, match=r"1: dim 1 of shape \(8, 40\) is 40, which 32 does not divide"):
            fp8x.quantize_model(nnx.List([linear(), linear(40, 8)]), CODE)

    def test_nan_is_named_by_path_and_counted(self):
        net = Net()
        weight = net.layers[1].moe.w13.weight
        weight[...] = weight[...].at[0, 1, 2, 3:5].set(jnp.nan)
        with pytest.raises(ShapeError, match=r"layers\.1\.moe\.w13: holds 2 NaN or Inf of 8192 values"):
            fp8x.quantize_model(net, CODE)
        net = Net()
        net.lm_head.kernel[...] *= jnp.nan  # not quantized, not looked at
        fp8x.quantize_model(net, CODE)

    def test_a_scale_across_experts_fits_no_linear(self):
        recipe = fp8x.Recipe(fp8x.Scheme("e4m3", block=(None, None, None)))
        with pytest.raises(ShapeError, match=r"layers\.0\.up: shape \(32, 32\) has 2 dims, but block .* names 3"):
            fp8x.quantize_model(Net(), recipe)
        experts = fp8x.quantize_model(Net(), None, {r".*\.w\d+": recipe})
        assert set(named_layers(experts)) == {f"layers.{i}.moe.{name}" for i in range(2) for name in ("w13", "w2")}
