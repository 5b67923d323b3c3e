"""Models without their static scales: called in any way that Flax and JAX know, they raise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.errors import CalibrationError, ShapeError

STATIC = "e4m3_e4m3_bf16"
NOT_CALIBRATED = r"input_scale: the layer \[64 -> 48\].* is not calibrated; run fp8x\.calibrate"
X = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)


def linear() -> fp8x.nn.Linear:
    return fp8x.nn.Linear(64, 48, recipe=STATIC, rngs=nnx.Rngs(0))


def calibrated() -> fp8x.nn.Linear:
    layer = linear()
    fp8x.calibrate(layer, [X])
    return layer


def by_split_state(layer):
    graphdef, state = nnx.split(layer)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)


def by_leaves(layer):
    graphdef, state = nnx.split(layer)
    leaves, tree = jax.tree.flatten(state)
    return jax.jit(lambda leaves, x: nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(x))(leaves, X)


CALLS = {
    "eager": lambda layer: layer(X),
    "nnx.jit": lambda layer: nnx.jit(lambda layer, x: layer(x))(layer, X),
    "jax.jit over a closure": lambda layer: jax.jit(lambda x: layer(x))(X),
    "jax.jit of the state": by_split_state,
    "jax.jit of its leaves": by_leaves,
    "nnx.grad": lambda layer: nnx.value_and_grad(lambda layer: jnp.sum(layer(X).astype(jnp.float32)))(layer)[0],
    "nnx.vmap over rows": lambda layer: nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, X[:, None]),
    "nnx.remat": lambda layer: nnx.jit(nnx.remat(lambda layer, x: layer(x)))(layer, X),
    "jax.eval_shape": lambda layer: nnx.eval_shape(lambda layer: layer(X), layer),
}


@pytest.mark.parametrize("way", CALLS)
def test_every_call_raises_until_the_layer_is_calibrated(way):
    layer = linear()
    with pytest.raises(CalibrationError, match=NOT_CALIBRATED):
        CALLS[way](layer)
    fp8x.calibrate(layer, [X])
    result = CALLS[way](layer)
    assert isinstance(result, jax.ShapeDtypeStruct) or np.isfinite(np.float32(result)).all()


def test_a_stack_of_layers_run_by_scan():
    make = nnx.vmap(lambda rngs: nnx.Linear(64, 64, rngs=rngs), in_axes=0, out_axes=0)
    stack = fp8x.nn.Linear.from_linear(make(nnx.Rngs(0).split(3)), STATIC)
    run = nnx.scan(lambda x, layer: layer(x).astype(jnp.float32), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    with pytest.raises(CalibrationError, match="not calibrated"):
        run(X, stack)


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["grouped", "moe", "einsum"])
def test_every_kind_of_layer(kind):
    rngs = nnx.Rngs(0)
    layer, args = {
        "grouped": lambda: (fp8x.nn.GroupedLinear(2, 64, 48, recipe=STATIC, rngs=rngs), (X, np.int32([2, 3]))),
        "moe": lambda: (fp8x.nn.MoE(64, 96, 4, 2, recipe=STATIC, rngs=rngs), (X,)),
        "einsum": lambda: (fp8x.nn.Einsum.from_einsum(nnx.Einsum("bi,io->bo", (64, 48), rngs=rngs), STATIC), (X,)),
    }[kind]()
    with pytest.raises(CalibrationError, match="not calibrated"):
        nnx.jit(lambda layer, *args: layer(*args))(layer, *args)


class TestScalesThatComeAsState:
    """A layer that was made without scales infers once it holds some, however they got there."""

    def infers(self, layer):
        np.testing.assert_array_equal(CALLS["nnx.jit"](layer), CALLS["nnx.jit"](calibrated()))

    def test_by_update(self):
        layer = linear()
        nnx.update(layer, nnx.state(calibrated()))
        self.infers(layer)

    def test_by_update_with_pure_arrays(self):
        layer = linear()
        nnx.update(layer, nnx.to_pure_dict(nnx.state(calibrated())))
        self.infers(layer)

    def test_by_merge_into_the_graph_of_a_layer_without(self):
        self.infers(nnx.merge(nnx.graphdef(linear()), nnx.to_pure_dict(nnx.state(calibrated()))))

    def test_by_merge_into_an_abstract_one(self):
        graphdef, abstract = nnx.split(nnx.eval_shape(linear))
        leaves = jax.tree.leaves(nnx.state(calibrated()))
        self.infers(nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(abstract), leaves)))

    def test_by_hand(self):
        layer = linear()
        layer.input_scale[...] = calibrated().input_scale[...]
        self.infers(layer)

    def test_a_scale_that_is_taken_away_again(self):
        layer = calibrated()
        layer.input_scale[...] = jnp.full((1, 1), jnp.nan)
        with pytest.raises(CalibrationError, match=NOT_CALIBRATED):
            CALLS["nnx.jit"](layer)


def test_a_layer_that_is_made_inside_nnx_jit():
    layer = nnx.jit(linear)()
    with pytest.raises(CalibrationError, match=NOT_CALIBRATED):
        CALLS["nnx.jit"](layer)


def test_where_nothing_can_tell_the_result_is_nan_and_check_calibrated_finds_it():
    graphdef, _ = nnx.split(calibrated())
    leaves = jax.tree.leaves(nnx.state(linear()))
    call = jax.jit(lambda leaves, x: nnx.merge(graphdef, leaves)(x))
    assert np.isnan(np.float32(call(leaves, X))).all()
    with pytest.raises(CalibrationError, match="not calibrated"):
        fp8x.nn.check_calibrated(nnx.merge(graphdef, leaves))
    fp8x.nn.check_calibrated(calibrated())


def test_an_input_that_is_no_float_is_named_in_calibration_too():
    with pytest.raises(ShapeError, match="x: dtype is int32; use one of bfloat16, float16, float32"):
        fp8x.calibrate(linear(), [np.ones((4, 64), np.int32)])
