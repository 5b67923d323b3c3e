"""Stacks of layers as `nnx.vmap` makes them: what their layers give one by one, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from metric import as_bits

import fp8x
from fp8x.errors import CalibrationError, ShapeError
from fp8x.nn.walk import named_layers

CODES = [code for code, recipe in fp8x.RECIPES.items() if recipe.observer is None and "bf16" in code]
LAYERS, FEATURES = 3, 32


class Block(nnx.Module):
    """One layer of each kind."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(FEATURES, 64, rngs=rngs), nnx.Einsum("btf,fd->btd", (64, FEATURES), rngs=rngs)
        self.heads = nnx.LinearGeneral(FEATURES, (4, 8), rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)

    def __call__(self, x):
        h = self.down(nnx.gelu(self.up(self.norm(x)))) + self.heads(x).reshape(x.shape)
        return (x + h).astype(x.dtype)


class Mixture(nnx.Module):
    def __init__(self, rngs):
        self.moe = fp8x.nn.MoE(FEATURES, 32, 4, 2, rngs=rngs)

    def __call__(self, x):
        return x + self.moe(x)


def make(*counts, kind=Block, rngs=None):
    """So many blocks as one, each with other weights; a stack of stacks for several counts."""
    rngs = rngs or nnx.Rngs(0)
    if not counts:
        return kind(rngs)
    count, *inner = counts
    build = nnx.vmap(lambda rngs: make(*inner, kind=kind, rngs=rngs), in_axes=(0,), out_axes=0)
    return nnx.split_rngs(splits=count)(build)(rngs)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def run(x, block):
    return block(x)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def run_rematerialized(x, block):
    return nnx.remat(lambda block, x: block(x))(block, x)


class Model(nnx.Module):
    def __init__(self, kind=Block):
        self.blocks = make(LAYERS, kind=kind)

    def __call__(self, x):
        return run(x, self.blocks)


def one_by_one(blocks) -> list[Block]:
    graphdef, state = nnx.split(blocks)
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(LAYERS)]


def inputs(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 5, FEATURES), jnp.bfloat16)


@pytest.mark.sample
@pytest.mark.parametrize(
    ("code", "kind"),
    [*((code, Block) for code in CODES), ("mxfp8_bf16", Mixture), ("e4m3_e4m3_bf16", Mixture)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_stack_gives_what_its_layers_give_one_by_one(code, kind):
    model, y = Model(kind), inputs()
    blocks = one_by_one(model.blocks)
    fp8x.quantize_model(model, code)
    assert {layer.stack for layer in named_layers(model).values()} == {(LAYERS,)}
    if fp8x.recipe(code).needs_calibration:
        fp8x.calibrate(model, [inputs(1), inputs(2)])
    for block, layers in zip(blocks, one_by_one(model.blocks)):
        fp8x.quantize_model(block, code)
        for path, layer in named_layers(block).items():
            stacked = named_layers(layers)[path]
            np.testing.assert_array_equal(as_bits(layer.weight[...]), as_bits(stacked.weight[...]))
            np.testing.assert_array_equal(as_bits(layer.weight_scale[...]), as_bits(stacked.weight_scale[...]))
            if layer.input_scale is not None:
                layer.input_scale[...] = stacked.input_scale[...]
        y = nnx.jit(lambda block, x: block(x))(block, y)
    np.testing.assert_array_equal(nnx.jit(lambda model, x: model(x))(model, inputs()), y)


class Ensemble(nnx.Module):
    """A stack whose layers all see the same."""

    def __init__(self):
        self.blocks = make(LAYERS)

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block.heads(x), in_axes=(0, None))(self.blocks, x)


@pytest.mark.sample
@pytest.mark.parametrize("method", ["max", "mse"])
def test_every_layer_of_a_stack_is_calibrated_by_what_it_sees(method):
    code, rules = "fp8_e4m3fn_bf16_block_scale_static_activation", {r".*(up|down)": None}
    model = Model()
    report = fp8x.calibrate(fp8x.quantize_model(model, code), [inputs()], method=method)
    assert report.layers["blocks.up"].amax.shape == (LAYERS, 1, 1)
    assert len(set(report.layers["blocks.up"].amax.flat)) == LAYERS
    assert "blocks.up layer 2" in report.undersampled(100)

    ensemble = fp8x.quantize_model(Ensemble(), code, rules)
    found = fp8x.calibrate(ensemble, [inputs()], method=method).layers["blocks.heads"]
    alone = fp8x.quantize_model(make(), code, rules).heads
    expected = fp8x.calibrate(alone, [inputs()], method=method).layers[""]
    for name in ("amax", "scale", "tokens"):
        np.testing.assert_array_equal(getattr(found, name), np.stack([getattr(expected, name)] * LAYERS))


@pytest.mark.slow
def test_experts_of_a_stack_that_saw_little_are_named():
    model = fp8x.quantize_model(Model(Mixture), "e4m3_e4m3_bf16")
    report = fp8x.calibrate(model, [inputs()])
    assert report.layers["blocks.moe.w13"].tokens.sum() == LAYERS * 10 * 2
    assert report.undersampled(100)[:2] == ["blocks.moe.w13 layer 0 expert 0", "blocks.moe.w13 layer 0 expert 1"]


@pytest.mark.slow
@pytest.mark.parametrize("code", ["mxfp8_bf16", "e4m3_e4m3_bf16_dynamic"])
def test_gradients_also_where_layers_are_run_again(code):
    blocks = fp8x.quantize_model(nnx.Dict(blocks=make(LAYERS)), code).blocks

    def by_hand(x, blocks):
        graphdef, state = nnx.split(blocks)
        for index in range(LAYERS):
            x = nnx.merge(graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], state))(x)
        return x

    def gradient(run):
        grad = nnx.grad(lambda blocks, x: jnp.sum(run(x, blocks).astype(jnp.float32) ** 2), argnums=(0, 1))
        return jax.tree.leaves(nnx.jit(grad)(blocks, inputs()))

    expected = gradient(by_hand)
    for found in (gradient(run), gradient(run_rematerialized)):
        for one, other in zip(found, expected, strict=True):
            one, other = (np.asarray(each, np.float32) for each in (one, other))
            assert np.linalg.norm(one - other) <= 2.0**-5 * np.linalg.norm(other)


@pytest.mark.slow
def test_an_ensemble_by_vmap():
    blocks = fp8x.quantize_model(nnx.Dict(blocks=make(LAYERS)), "mxfp8_bf16").blocks
    y = nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(blocks, inputs())
    for index, block in enumerate(one_by_one(blocks)):
        error = np.linalg.norm(np.asarray(y[index], np.float32) - np.asarray(block(inputs()), np.float32))
        assert error < 2.0**-6 * np.linalg.norm(np.asarray(y[index], np.float32))


@pytest.mark.slow
def test_a_stack_of_stacks():
    outer = nnx.Dict(blocks=make(2, LAYERS))
    fp8x.quantize_model(outer, "fp8_e4m3fn_bf16_block_scale")
    assert outer.blocks.up.stack == (2, LAYERS)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run_outer(x, blocks):
        return run(x, blocks)

    y = nnx.jit(run_outer)(inputs(), outer.blocks)
    graphdef, state = nnx.split(outer.blocks)
    x = inputs()
    for i in range(2):
        x = nnx.jit(run)(x, nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state)))
    np.testing.assert_array_equal(y, x)


class TestErrors:
    @pytest.mark.parametrize("name", ["up", "down", "heads"])
    def test_a_stack_called_like_one_layer(self, name):
        layer = getattr(fp8x.quantize_model(Model(), "mxfp8_bf16").blocks, name)
        with pytest.raises(ShapeError, match=r"it is a stack of \[3\] layers, made by nnx.vmap; run it by nnx.scan"):
            layer(jnp.zeros((2, 5, layer.weight.shape[-1])))

    def test_experts_called_like_one_layer(self):
        layer = fp8x.quantize_model(Model(Mixture), "mxfp8_bf16").blocks.moe.w13
        with pytest.raises(ShapeError, match="it is a stack"):
            layer(jnp.zeros((4, FEATURES)), jnp.ones(4, jnp.int32))

    def test_axes_that_do_not_lead(self):
        stack = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,), out_axes=1))(nnx.Rngs(0))
        with pytest.raises(ShapeError, match=r"blocks.down: shape is \(64, 3, 32\); use \(64, 32\), or a stack"):
            fp8x.quantize_model(nnx.Dict(blocks=stack), "mxfp8_bf16")

    def test_a_layer_of_the_stack_that_saw_nothing(self):
        model = Model()
        model.blocks.norm.scale[...] = model.blocks.norm.scale[...].at[1].set(0)
        with pytest.raises(CalibrationError, match=r"blocks\.down, blocks\.up are fed nothing but zeros"):
            fp8x.calibrate(fp8x.quantize_model(model, "e4m3_e4m3_bf16"), [inputs()])

    def test_a_layer_that_never_ran(self):
        model = nnx.Dict(one=nnx.Linear(64, 64, rngs=nnx.Rngs(0)), other=nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        model = fp8x.quantize_model(First(model), "e4m3_e4m3_bf16")
        with pytest.raises(CalibrationError, match=r"model: both.other is never called; give batches that reach every"):
            fp8x.calibrate(model, [jnp.ones((2, 64))])


class First(nnx.Module):
    def __init__(self, both):
        self.both = both

    def __call__(self, x):
        return self.both.one(x)
