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
LAYERS, FEATURES = 3, 64


class Block(nnx.Module):
    """One layer of each kind."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(FEATURES, 96, rngs=rngs), nnx.Einsum("btf,fd->btd", (96, FEATURES), rngs=rngs)
        self.heads = nnx.LinearGeneral(FEATURES, (4, 16), rngs=rngs)
        self.moe = fp8x.nn.MoE(FEATURES, 32, 4, 2, rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)

    def __call__(self, x):
        h = self.down(nnx.gelu(self.up(self.norm(x)))) + self.heads(x).reshape(x.shape)
        return (x + h + self.moe(x)).astype(x.dtype)


def make(rngs, *counts):
    """So many blocks as one, each with other weights; a stack of stacks for several counts."""
    if not counts:
        return Block(rngs)
    count, *inner = counts
    return nnx.split_rngs(splits=count)(nnx.vmap(lambda rngs: make(rngs, *inner), in_axes=(0,), out_axes=0))(rngs)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def run(x, block):
    return block(x)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def run_rematerialized(x, block):
    return nnx.remat(lambda block, x: block(x))(block, x)


class Model(nnx.Module):
    def __init__(self):
        self.blocks = make(nnx.Rngs(0), LAYERS)

    def __call__(self, x):
        return run(x, self.blocks)


def one_by_one(blocks) -> list[Block]:
    graphdef, state = nnx.split(blocks)
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(LAYERS)]


def inputs(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 5, FEATURES), jnp.bfloat16)


@pytest.mark.parametrize("code", CODES)
def test_a_stack_gives_what_its_layers_give_one_by_one(code):
    model, y = Model(), inputs()
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


@pytest.mark.parametrize("method", ["max", "mse"])
def test_every_layer_of_a_stack_is_calibrated_by_what_it_sees(method):
    code = "fp8_e4m3fn_bf16_block_scale_static_activation"
    model = Model()
    blocks = one_by_one(model.blocks)
    report = fp8x.calibrate(fp8x.quantize_model(model, code), [inputs()], method=method)
    x = inputs()
    for index, block in enumerate(blocks):
        alone = fp8x.calibrate(fp8x.quantize_model(block, code), [x], method=method)
        for path, layer in alone.layers.items():
            found = report.layers[f"blocks.{path}"]
            np.testing.assert_allclose(found.amax[index], layer.amax, rtol=2.0**-7)
            np.testing.assert_array_equal(found.tokens[index], layer.tokens)
            np.testing.assert_allclose(found.scale[index], layer.scale, rtol=0.02 if method == "max" else 0.3)
        x = nnx.jit(lambda block, x: block(x))(one_by_one(Model().blocks)[index], x)
    assert "blocks.moe.w13 layer 0 expert 0" in report.undersampled(100)
    assert "blocks.up layer 2" in report.undersampled(100)


@pytest.mark.parametrize("code", ["mxfp8_bf16", "e4m3_e4m3_bf16_dynamic"])
def test_gradients_also_where_layers_are_run_again(code):
    blocks = fp8x.quantize_model(nnx.Dict(blocks=make(nnx.Rngs(0), LAYERS)), code).blocks

    def loss(run):
        return lambda x: jnp.sum(run(x, blocks).astype(jnp.float32) ** 2)

    of_scan, of_remat = (jax.jit(jax.grad(loss(each)))(inputs()) for each in (run, run_rematerialized))

    def by_hand(x):
        for block in one_by_one(blocks):
            x = block(x)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    expected = np.asarray(jax.jit(jax.grad(by_hand))(inputs()), np.float32)
    for found in (of_scan, of_remat):
        error = np.linalg.norm(np.asarray(found, np.float32) - expected)
        assert error < 2.0**-6 * np.linalg.norm(expected)


def test_an_ensemble_by_vmap():
    blocks = fp8x.quantize_model(nnx.Dict(blocks=make(nnx.Rngs(0), LAYERS)), "mxfp8_bf16", {r".*moe\..*": None}).blocks
    y = nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(blocks, inputs())
    for index, block in enumerate(one_by_one(blocks)):
        error = np.linalg.norm(np.asarray(y[index], np.float32) - np.asarray(block(inputs()), np.float32))
        assert error < 2.0**-6 * np.linalg.norm(np.asarray(y[index], np.float32))


def test_a_stack_of_stacks():
    outer = nnx.Dict(blocks=make(nnx.Rngs(0), 2, LAYERS))
    fp8x.quantize_model(outer, "fp8_e4m3fn_bf16_block_scale")
    assert outer.blocks.up.stack == (2, LAYERS) and outer.blocks.moe.w13.stack == (2, LAYERS)

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
        layer = fp8x.quantize_model(Model(), "mxfp8_bf16").blocks.moe.w13
        with pytest.raises(ShapeError, match="it is a stack"):
            layer(jnp.zeros((4, FEATURES)), jnp.ones(4, jnp.int32))

    def test_axes_that_do_not_lead(self):
        stack = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,), out_axes=1))(nnx.Rngs(0))
        with pytest.raises(
            ShapeError, match=r"blocks.up: shape is \(64, 3, 96\); use .* \(64, 96\), or a stack of these"
        ):
            fp8x.quantize_model(nnx.Dict(blocks=stack), "mxfp8_bf16")

    def test_a_layer_of_the_stack_that_saw_nothing(self):
        model = Model()
        model.blocks.norm.scale[...] = model.blocks.norm.scale[...].at[1].set(0)
        with pytest.raises(CalibrationError, match=r"blocks\.up, .* fed nothing but zeros"):
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
