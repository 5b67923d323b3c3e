"""Quantization-aware training: bits forward, the gradient backward, and what begins and ends it."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from metric import as_bits

import fp8x
from fp8x.errors import RecipeError, ShapeError
from fp8x.nn import registry
from fp8x.nn.training import layers_in_training
from fp8x.nn.walk import named_layers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 64)).astype(np.float32)
SLOW = [pytest.param(code, marks=pytest.mark.slow) for code in ("e4m3_e4m3_f16_dynamic", "fp8_e4m3fn_bf16_block_scale")]


def in_training(code: str) -> fp8x.Recipe:
    return dataclasses.replace(fp8x.recipe(code), master_weights=True)


def grouped(n=48) -> fp8x.nn.UnquantizedGroupedLinear:
    return fp8x.nn.UnquantizedGroupedLinear(3, 64, n, use_bias=True, rngs=nnx.Rngs(0))


def with_bias(module: nnx.Module) -> nnx.Module:
    module.bias[...] = jnp.linspace(-1, 1, module.bias[...].size).reshape(module.bias.shape)
    return module


@dataclasses.dataclass(frozen=True)
class Case:
    """A module, what it is called with, and its matrix as `[..., N, K]` and back."""

    make: object
    args: tuple
    kwargs: dict = dataclasses.field(default_factory=dict)
    matrix: str = "kernel"
    to_weight: object = lambda kernel: kernel
    from_weight: object = lambda weight, shape: weight
    method: str = "__call__"

    def call(self, module, *args):
        return getattr(module, self.method)(*(args or self.args), **self.kwargs)


def _lora():
    layer = nnx.LoRALinear(64, 32, lora_rank=4, rngs=nnx.Rngs(0))
    layer.lora.lora_b[...] = jnp.ones((4, 32)) / 8
    return layer


SIZES = np.array([3, 0, 2], np.int32)
ROWS = X.reshape(6, 64)
TRANSPOSED = dict(to_weight=lambda kernel: kernel.T, from_weight=lambda weight, shape: weight.T)
FEATURES_LAST = dict(
    to_weight=lambda kernel: kernel.reshape(64, -1).T, from_weight=lambda weight, shape: weight.T.reshape(shape)
)
CASES = {
    "Linear": Case(lambda: with_bias(nnx.Linear(64, 32, rngs=nnx.Rngs(0))), (X,), **TRANSPOSED),
    "LoRALinear": Case(_lora, (X,), **TRANSPOSED),
    "LinearGeneral": Case(lambda: with_bias(nnx.LinearGeneral(64, (4, 8), rngs=nnx.Rngs(0))), (X,), **FEATURES_LAST),
    "LinearGeneral of two axes": Case(
        lambda: nnx.LinearGeneral((4, 32), 16, axis=(-2, -1), rngs=nnx.Rngs(0)),
        (np.concatenate([X, X], -1).reshape(2, 3, 4, 32),),
        to_weight=lambda kernel: kernel.reshape(128, 16).T,
        from_weight=lambda weight, shape: weight.T.reshape(shape),
    ),
    "Einsum": Case(lambda: nnx.Einsum("btd,dnh->bnth", (64, 4, 8), rngs=nnx.Rngs(0)), (X,), **FEATURES_LAST),
    "Einsum of a batch": Case(
        lambda: nnx.Einsum("btd,tdh->bth", (3, 64, 16), (3, 16), rngs=nnx.Rngs(0)),
        (X,),
        to_weight=lambda kernel: kernel.mT,
        from_weight=lambda weight, shape: weight.mT,
    ),
    "Embed": Case(lambda: nnx.Embed(24, 64, rngs=nnx.Rngs(0)), (np.array([[3, 0, 3], [5, -1, 23]]),), {}, "embedding"),
    "Embed.attend": Case(lambda: nnx.Embed(24, 64, rngs=nnx.Rngs(0)), (X,), {}, "embedding", method="attend"),
    "grouped": Case(lambda: with_bias(grouped()), (ROWS, SIZES), {}, "weight"),
    "grouped rows": Case(grouped, (ROWS, SIZES), {"rows": np.array([5, 1, 1, 0, 2])}, "weight"),
    "grouped gate": Case(grouped, (np.stack([ROWS, ROWS[::-1]], 1), SIZES), {"gate": "silu"}, "weight"),
    "grouped parts": Case(lambda: grouped((2, 32)), (ROWS, SIZES), {}, "weight"),
}


def begin(module: nnx.Module, code: str) -> fp8x.nn.QuantizationAware:
    return fp8x.quantize_model(module, None, {"": in_training(code)})


@pytest.mark.sample
@pytest.mark.parametrize("code", ["mxfp8_mxfp8_bf16", pytest.param("e4m3_bf16", marks=pytest.mark.slow), *SLOW])
@pytest.mark.parametrize("name", CASES)
def test_forward_has_the_bits_of_the_quantized_layer(name, code):
    case = CASES[name]
    expected = case.call(fp8x.quantize_model(case.make(), None, {"": code}))
    layer = begin(case.make(), code)
    for actual in (case.call(layer), nnx.jit(lambda layer, *args: case.call(layer, *args))(layer, *case.args)):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(as_bits(actual), as_bits(expected))
    np.testing.assert_array_equal(as_bits(case.call(fp8x.nn.finish_training(layer))), as_bits(expected))


@pytest.mark.sample
@pytest.mark.parametrize("code", ["e4m3_bf16", pytest.param("mxfp8_mxfp8_bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_module_with_the_dequantized_matrix(name, code):
    case, recipe = CASES[name], fp8x.recipe(code)
    layer, plain = begin(case.make(), code), case.make()
    matrix = getattr(plain, case.matrix)
    quantized = fp8x.quantize(case.to_weight(matrix[...]), recipe.weight).dequantize()
    matrix[...] = case.from_weight(quantized, matrix.shape)
    first, *rest = case.args
    weights = jax.random.normal(jax.random.key(1), case.call(plain).shape)

    def loss(module, first):
        y = case.call(module, first, *rest).astype(recipe.out_dtype)
        return jnp.sum(y.astype(jnp.float32) * weights)

    argnums = (0, 1) if jnp.issubdtype(first.dtype, jnp.floating) else 0
    expected = jax.tree.leaves(nnx.grad(loss, argnums=argnums)(plain, first))
    for grad in (nnx.grad(loss, argnums=argnums), nnx.jit(nnx.grad(loss, argnums=argnums))):
        actual = jax.tree.leaves(grad(layer, first))
        assert len(actual) == len(expected) and any(leaf.any() for leaf in actual)
        for one, other in zip(actual, expected):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_nothing_is_copied():
    linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    kernel = linear.kernel
    layer = begin(linear, "mxfp8_bf16")
    assert isinstance(layer, fp8x.nn.QuantizationAware)
    assert layer.source is linear and layer.source.kernel is kernel and kernel.dtype == jnp.float32


class Net(nnx.Module):
    """Two linears around a nonlinearity, and a head that rules skip."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(64, 96, rngs=rngs), nnx.Linear(96, 64, rngs=rngs)
        self.lm_head = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return self.lm_head(self.down(nnx.relu(self.up(x))))


def mse(model, x):
    return jnp.mean((model(x).astype(jnp.float32) - jnp.roll(x, 1, -1)) ** 2)


@pytest.mark.sample
@pytest.mark.parametrize("code", ["e4m3_e4m3_bf16_dynamic", "mxfp8_bf16"])
def test_an_optimizer_trains_it_and_finishing_keeps_every_bit(code):
    model = fp8x.quantize_model(Net(), in_training(code))
    before = np.asarray(model.up.source.kernel[...])
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, x):
        loss, gradients = nnx.value_and_grad(mse)(model, x)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, X)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert (np.asarray(model.up.source.kernel[...]) != before).mean() > 0.9
    forward = nnx.jit(lambda model, x: model(x))
    last = forward(model, X)
    assert fp8x.nn.finish_training(model) is model
    assert set(named_layers(model)) == {"up", "down"} and not layers_in_training(model)
    assert model.up.recipe == fp8x.recipe(code)
    np.testing.assert_array_equal(as_bits(forward(model, X)), as_bits(last))


@pytest.mark.slow
def test_remat_changes_no_gradient():
    model = fp8x.quantize_model(Net(), in_training("mxfp8_mxfp8_bf16"))
    expected = nnx.jit(nnx.grad(mse))(model, X)
    graphdef, state = nnx.split(model)
    checkpointed = jax.jit(jax.grad(jax.checkpoint(lambda state, x: mse(nnx.merge(graphdef, state), x))))

    def mse_by_remat(model, x):
        y = nnx.remat(lambda model, x: model(x))(model, x)
        return jnp.mean((y.astype(jnp.float32) - jnp.roll(x, 1, -1)) ** 2)

    for actual in (nnx.jit(nnx.grad(mse_by_remat))(model, X), checkpointed(state, X)):
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class Stack(nnx.Module):
    """Three layers, made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self):
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(key):
            return nnx.Linear(64, 64, rngs=nnx.Rngs(key))

        self.layers = layers(jax.random.split(jax.random.key(0), 3))

    def __call__(self, x):
        return nnx.scan(
            lambda x, layer: nnx.relu(layer(x)).astype(x.dtype), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )(x, self.layers)


@pytest.mark.slow
@pytest.mark.parametrize("code", ["mxfp8_mxfp8_bf16", "e4m3_bf16"])
def test_a_stack_under_scan_is_its_layers_one_by_one(code):
    model = fp8x.quantize_model(Stack(), in_training(code))

    def one_by_one(model, x):
        graphdef, state = nnx.split(model.layers)
        for index in range(3):
            layer = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(index), state))
            x = nnx.relu(layer(x)).astype(x.dtype)
        return x

    y = model(X)
    np.testing.assert_array_equal(as_bits(y), as_bits(one_by_one(model, X)))

    def loss(call, model, x):
        return jnp.sum(call(model, x) ** 2)

    actual = nnx.jit(nnx.grad(functools.partial(loss, lambda model, x: model(x))))(model, X)
    expected = nnx.jit(nnx.grad(functools.partial(loss, one_by_one)))(model, X)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape[0] == 3 and one.any((*range(1, one.ndim),)).all()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ShapeError, match=r"it is a stack of \[3\] layers"):
        model.layers(X)
    np.testing.assert_array_equal(as_bits(fp8x.nn.finish_training(model)(X)), as_bits(y))


@pytest.mark.slow
def test_attention():
    make = functools.partial(nnx.MultiHeadAttention, 4, 64, decode=False, rngs=nnx.Rngs(0))
    model = fp8x.quantize_model(make(), in_training("e4m3_bf16"))
    assert set(layers_in_training(model)) == {"query", "key", "value", "out"}
    y = nnx.jit(lambda model, x: model(x))(model, X)
    gradients = nnx.jit(nnx.grad(lambda model: jnp.sum(model(X).astype(jnp.float32) ** 2)))(model)
    assert all(leaf.any() for path, leaf in nnx.to_flat_state(nnx.as_pure(gradients)) if path[-1] == "kernel")
    np.testing.assert_array_equal(as_bits(nnx.jit(lambda m, x: m(x))(fp8x.nn.finish_training(model), X)), as_bits(y))


@pytest.mark.slow
@pytest.mark.parametrize("code", ["mxfp8_mxfp8_bf16", "e4m3_bf16"])
def test_mixture_of_experts(code):
    moe = fp8x.nn.MoE(64, 96, 4, 2, shared_intermediate=32, use_bias=True, rngs=nnx.Rngs(0))
    fp8x.quantize_model(moe, in_training(code))
    forward = nnx.jit(lambda moe, x: moe(x))
    y, alone = forward(moe, ROWS), forward(moe, ROWS[:1])
    gradients = nnx.jit(nnx.grad(lambda moe: jnp.sum(moe(ROWS) ** 2)))(moe)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradients))
    fp8x.nn.finish_training(moe)
    np.testing.assert_array_equal(as_bits(forward(moe, ROWS)), as_bits(y))
    np.testing.assert_allclose(forward(moe, ROWS[:1]), alone, rtol=0.01, atol=0.01)  # one token goes by another op


@pytest.mark.slow
def test_a_batch_over_two_devices():
    mesh = mesh_of(data=2)
    model = fp8x.quantize_model(Net(), in_training("mxfp8_mxfp8_bf16"))
    expected = nnx.jit(nnx.grad(mse))(model, X)
    graphdef, state = nnx.split(model)
    state, x = jax.device_put((state, X), (NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))))
    actual = jax.jit(jax.grad(lambda state, x: mse(nnx.merge(graphdef, state), x)))(state, x)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_module_that_is_held_twice_stays_one():
    shared = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    model = fp8x.quantize_model(nnx.Dict(one=shared, other=shared), in_training("mxfp8_bf16"))
    assert model.one is model.other and model.one.source is shared
    fp8x.nn.finish_training(model)
    assert model.one is model.other and isinstance(model.one, fp8x.nn.Linear)


def test_what_kinds_of_layers_may_mix():
    model = fp8x.quantize_model(Net(), in_training("mxfp8_bf16"), {"down": "e4m3_bf16"})
    assert list(layers_in_training(model)) == ["up"] and list(named_layers(model)) == ["down"]
    assert nnx.jit(lambda model, x: model(x))(model, X).shape == X.shape


def test_finishing_by_a_static_recipe_and_calibrating():
    plain = fp8x.quantize_model(Net(), "e4m3_e4m3_bf16")
    model = fp8x.nn.finish_training(fp8x.quantize_model(Net(), in_training("e4m3_e4m3_bf16_dynamic")), "e4m3_e4m3_bf16")
    for each in (plain, model):
        fp8x.calibrate(each, [X])
    np.testing.assert_array_equal(as_bits(model(X)), as_bits(plain(X)))


def test_report_says_that_weights_are_quantized_at_every_call():
    recipe = in_training("mxfp8_bf16")
    model = fp8x.quantize_model(Net(), recipe)
    report = fp8x.report(model)
    assert [(row.path, row.dtype, row.shape, row.nbytes, row.recipe) for row in report.in_training] == [
        ("up.source.kernel", np.float32, (64, 96), 4 * 64 * 96, recipe),
        ("down.source.kernel", np.float32, (96, 64), 4 * 64 * 96, recipe),
    ]
    assert not report.quantized and [row.path for row in report.kept] == ["lm_head.kernel"]
    assert "mxfp8_bf16, at every call (in training)" in str(report)
    assert str(report).endswith("0 of 3 in 8 bits, 0 of 65,536 bytes; 2 quantized at every call")
    fp8x.nn.finish_training(model)
    assert [row.path for row in fp8x.report(model).quantized] == ["up.weight", "down.weight"]


@pytest.mark.slow
def test_a_decoder_is_trained_finished_and_saved(tiny_checkpoint, tmp_path):
    decoder = fp8x.quantize_model(fp8x.load(tiny_checkpoint), in_training("mxfp8_bf16"))
    ids = np.arange(12).reshape(2, 6)
    forward = nnx.jit(lambda decoder, ids: decoder(ids))
    y = forward(decoder, ids)
    with pytest.raises(RecipeError, match=r"model: layers\.0\..* in training; end it with fp8x\.nn\.finish_training"):
        fp8x.save(decoder, tmp_path / "early")
    assert not (tmp_path / "early").exists()
    fp8x.save(fp8x.nn.finish_training(decoder), tmp_path / "saved")
    np.testing.assert_array_equal(forward(fp8x.load(tmp_path / "saved"), ids), y)


class Scaled(nnx.Module):
    """A user's own type."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((64, 32)))


class TestErrors:
    def test_types_of_the_user_s(self, monkeypatch):
        monkeypatch.setattr(registry, "_CONVERTERS", dict(registry._CONVERTERS))
        fp8x.nn.register(Scaled, lambda module, recipe, *, name, allow_nonfinite: module)
        model = nnx.Dict(first=nnx.Linear(64, 64, rngs=nnx.Rngs(0)), own=Scaled())
        with pytest.raises(RecipeError, match=r"own: Scaled can't be trained in 8 bits.* skip it by a rule with None"):
            fp8x.quantize_model(model, in_training("mxfp8_bf16"))
        assert type(model.first) is nnx.Linear
        fp8x.quantize_model(model, in_training("mxfp8_bf16"), {"own": None})
        assert list(layers_in_training(model)) == ["first"]

    def test_types_that_cannot_be_quantized(self):
        with pytest.raises(RecipeError, match=r"source: nnx\.LayerNorm can't be trained in 8 bits"):
            fp8x.nn.QuantizationAware(nnx.LayerNorm(64, rngs=nnx.Rngs(0)), "mxfp8_bf16")
        own = nnx.Linear(64, 64, dot_general=lambda *args, **kwargs: None, rngs=nnx.Rngs(0))
        with pytest.raises(RecipeError, match="source: it can't be quantized: it has a dot_general of its own"):
            fp8x.nn.QuantizationAware(own, "mxfp8_bf16")

    def test_static_activation_scales(self):
        with pytest.raises(RecipeError, match=r"master_weights: a static activation scale .* train with a dynamic one"):
            in_training("e4m3_e4m3_bf16")
        with pytest.raises(RecipeError, match="master_weights: a static activation scale"):
            fp8x.nn.QuantizationAware(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), "e4m3_e4m3_bf16")

    def test_a_weight_that_the_recipe_does_not_fit(self):
        model = nnx.Dict(a=nnx.Linear(64, 64, rngs=nnx.Rngs(0)), b=nnx.Linear(40, 64, rngs=nnx.Rngs(0)))
        with pytest.raises(ShapeError, match=r"b: dim 1 of shape \(64, 40\) is 40, which 32 does not divide"):
            fp8x.quantize_model(model, in_training("mxfp8_bf16"))
        assert not layers_in_training(model)

    def test_training_twice_or_not_at_all(self):
        model = fp8x.quantize_model(Net(), in_training("mxfp8_bf16"))
        with pytest.raises(RecipeError, match=r"model: up, down are in training; end it with fp8x\.nn\.finish_train"):
            fp8x.quantize_model(model, "mxfp8_bf16")
        with pytest.raises(RecipeError, match=r"model: up, down are in training"):
            fp8x.calibrate(model, [X])
        fp8x.nn.finish_training(model)
        with pytest.raises(RecipeError, match=r"model: nothing is in training; fp8x\.quantize_model begins it"):
            fp8x.nn.finish_training(model)

    def test_nan_is_named_when_training_ends(self):
        model = fp8x.quantize_model(Net(), in_training("mxfp8_bf16"))
        kernel = model.down.source.kernel
        kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
        assert np.isnan(model(X)).any()
        with pytest.raises(ShapeError, match="down: holds 1 NaN or Inf of 6144 values"):
            fp8x.nn.finish_training(model)
        assert set(layers_in_training(model)) == {"up", "down"}
        fp8x.nn.finish_training(model, allow_nonfinite=True)

    def test_calls(self):
        layer = begin(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), "mxfp8_bf16")
        with pytest.raises(ShapeError, match=r"x: shape is \(2, 32\), but the layer takes \[\.\.\., 64\]"):
            layer(X[0, :2, :32])
        with pytest.raises(RecipeError, match=r"attend: an nnx\.Embed has it, but this is nnx\.Linear in training"):
            layer.attend(X)

    def test_layers_that_store_8_bits(self, tiny_checkpoint, tmp_path):
        recipe, match = (
            in_training("mxfp8_bf16"),
            r"recipe: master_weights keeps the weights of a module .*fp8x.quantize_model with this one",
        )
        for make in (
            lambda: fp8x.nn.Linear(64, 32, recipe=recipe, rngs=nnx.Rngs(0)),
            lambda: fp8x.nn.Embed(24, 64, recipe=recipe, rngs=nnx.Rngs(0)),
            lambda: fp8x.nn.MoE(64, 32, 2, 1, recipe=recipe, rngs=nnx.Rngs(0)),
            lambda: fp8x.load(tiny_checkpoint, recipe),
            lambda: fp8x.convert(tiny_checkpoint, tmp_path / "converted", recipe),
        ):
            with pytest.raises(RecipeError, match=match):
                make()
        assert not (tmp_path / "converted").exists()
