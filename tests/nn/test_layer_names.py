"""Errors of a layer in 8 bits say whose they are: by its path, or by its type and sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fp8x
from fp8x.errors import CalibrationError, ShapeError

CODE, STATIC = "e4m3_bf16", "e4m3_e4m3_bf16"


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.split = nnx.LinearGeneral(64, (2, 16), rngs=rngs)
        self.moe = fp8x.nn.MoE(32, 64, 2, 1, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.tok = nnx.Embed(50, 32, rngs=rngs)
        self.layers = nnx.List([Block(rngs), Block(rngs)])


def model(code=CODE, rules=None):
    return fp8x.quantize_model(Model(nnx.Rngs(0)), code, rules or {"tok": CODE, ".*": code})


CALLS = {
    "layers.1.up (Linear 32 -> 64): x: shape is (3, 20)": lambda net: net.layers[1].up(jnp.ones((3, 20))),
    "layers.1.split (LinearGeneral 64 -> 32): x: shape (3, 20)": lambda net: net.layers[1].split(jnp.ones((3, 20))),
    "layers.0.moe.w13 (GroupedLinear 32 -> 64): x: shape is (3, 20)": lambda net: net.layers[0].moe.w13(
        jnp.ones((3, 20)), jnp.array([2, 1])
    ),
    "layers.0.moe.w2 (GroupedLinear 64 -> 32): group_sizes": lambda net: net.layers[0].moe.w2(
        jnp.ones((3, 64)), jnp.array([2, 1, 0, 0, 0])
    ),
    "tok (Embed 32 -> 50): ids": lambda net: net.tok(jnp.ones(3)),
}


@pytest.mark.sample
@pytest.mark.parametrize("text", CALLS)
def test_the_path_of_the_layer(text):
    with pytest.raises(ShapeError) as caught:
        CALLS[text](model())
    assert str(caught.value).startswith(text)


def test_a_layer_that_is_not_calibrated():
    net = model(STATIC, {"tok": CODE})
    with pytest.raises(CalibrationError, match=r"^layers\.1\.up \(Linear 32 -> 64\): input_scale: .* not calibrated"):
        net.layers[1].up(jnp.ones((3, 32)))
    with pytest.raises(CalibrationError, match=r"^layers\.1\.moe\.w13 \(GroupedLinear 32 -> 64\): input_scale"):
        net.layers[1].moe(jnp.ones((3, 32)))


def test_a_layer_that_belongs_to_no_model_has_a_type_and_sizes():
    layer = fp8x.nn.Linear(32, 64, recipe=CODE, rngs=nnx.Rngs(0))
    for of_no_model in (layer, nnx.clone(model().layers[0].up)):
        with pytest.raises(ShapeError, match=r"^Linear 32 -> 64: x: shape is"):
            of_no_model(jnp.ones((3, 20)))


def test_what_is_loaded_and_what_was_trained(tmp_path):
    fp8x.save(model(), tmp_path / "a")
    loaded = fp8x.load_into(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), tmp_path / "a")
    recipe = dataclasses.replace(fp8x.recipe(CODE), master_weights=True)
    trained = fp8x.nn.finish_training(model(recipe, {".*up": recipe, ".*": None}))
    for net in (loaded, trained):
        with pytest.raises(ShapeError, match=r"^layers\.0\.up \(Linear"):
            net.layers[0].up(jnp.ones((3, 20)))


def test_a_decoder_that_is_loaded(tiny_checkpoint):
    decoder = fp8x.load(tiny_checkpoint, rules={"model.layers.0.self_attn.q_proj": CODE})
    with pytest.raises(ShapeError, match=r"^layers\.0\.self_attn\.q_proj \(Linear"):
        decoder.layers[0].self_attn.q_proj(jnp.ones((3, 20)))


def test_layers_that_are_alike_are_compiled_once():
    """Nothing that differs between two layers is static."""
    net, traces = model(), []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    for block in net.layers:
        run(block.up, jnp.ones((3, 32)))
    assert len(traces) == 1
    assert nnx.graphdef(net.layers[0]) == nnx.graphdef(net.layers[1])
    assert jax.tree.structure(nnx.state(net.layers[0])) == jax.tree.structure(nnx.state(net.layers[1]))
