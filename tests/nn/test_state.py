"""Layers as state: optimizers, nnx.split and merge, eval_shape, orbax, copies."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from metric import as_bits

import fp8x
from fp8x.nn import Float8Weight, InputScale, WeightScale

X = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)


def moe_of(code, seed=0) -> fp8x.nn.MoE:
    return fp8x.nn.MoE(64, 96, 4, 2, recipe=code, use_bias=True, rngs=nnx.Rngs(seed))


def assert_same_state(actual, expected):
    actual, expected = (nnx.to_flat_state(nnx.state(module)) for module in (actual, expected))
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, one), (_, other) in zip(actual, expected):
        assert type(one) is type(other) and one.dtype == other.dtype, path
        np.testing.assert_array_equal(as_bits(one[...]), as_bits(other[...]), err_msg=str(path))


def names(module, kind) -> set[str]:
    return {".".join(path) for path, _ in nnx.to_flat_state(nnx.state(module, kind))}


def test_variables_have_types_of_their_own():
    moe = moe_of("e4m3_e4m3_bf16")
    assert names(moe, nnx.Param) == {"router.kernel", "w13.bias", "w2.bias"}
    assert names(moe, Float8Weight) == {"w13.weight", "w2.weight"}
    assert names(moe, WeightScale) == {"w13.weight_scale", "w2.weight_scale"}
    assert names(moe, InputScale) == {"w13.input_scale", "w2.input_scale"}


@pytest.mark.sample
@pytest.mark.parametrize("code", ["mxfp8_mxfp8_bf16", "e5m2_e5m2_bf16"])
def test_optimizers_pass_by_what_is_quantized(code):
    moe = moe_of(code)
    before = nnx.clone(moe)
    optimizer = nnx.Optimizer(moe, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(moe, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda moe: jnp.mean((moe(x) - 1) ** 2))(moe)
        optimizer.update(moe, grads)
        return loss

    losses = [step(moe, optimizer, X) for _ in range(3)]
    assert losses[-1] < losses[0]
    for name in ("w13", "w2"):
        layer, old = getattr(moe, name), getattr(before, name)
        np.testing.assert_array_equal(as_bits(layer.weight[...]), as_bits(old.weight[...]))
        np.testing.assert_array_equal(as_bits(layer.weight_scale[...]), as_bits(old.weight_scale[...]))
        assert (layer.bias[...] != old.bias[...]).any()
    assert (moe.router.kernel[...] != before.router.kernel[...]).any()


@pytest.mark.sample
@pytest.mark.parametrize("code", ["fp8_e4m3fn_bf16_block_scale_static_activation_max_calibrate", "mxfp8_bf16"])
def test_split_and_merge(code):
    moe = moe_of(code)
    graphdef, state = nnx.split(moe)
    merged = nnx.merge(graphdef, state)
    assert_same_state(merged, moe)
    assert hash(graphdef) == hash(nnx.split(merged)[0]) and graphdef == nnx.split(merged)[0]
    np.testing.assert_array_equal(merged(X), moe(X))


def test_one_compilation_for_layers_of_one_kind():
    traces = []

    @nnx.jit
    def forward(moe, x):
        traces.append(x.shape)
        return moe(x)

    for seed in range(3):
        forward(moe_of("mxfp8_mxfp8_bf16", seed), X)
    assert len(traces) == 1


@pytest.mark.parametrize("code", ["mxfp8_bf16", "e4m3_e4m3_bf16_max_calibrate"])
def test_eval_shape(code):
    abstract = nnx.eval_shape(lambda: moe_of(code))
    real = moe_of(code)
    for (path, one), (_, other) in zip(*(nnx.to_flat_state(nnx.state(module)) for module in (abstract, real))):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), path
    graphdef, state = nnx.split(real)
    y = jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, X)
    assert y.shape == X.shape and y.dtype == X.dtype


@pytest.mark.parametrize(
    ("code", "dtypes"),
    [
        ("e4m3_e4m3_bf16", {"float8_e4m3fn", "float32", "bfloat16"}),
        ("e5m2_e5m2_f16_max_calibrate", {"float8_e5m2", "float32", "float16", "int32"}),
        ("mxfp8_bf16", {"float8_e4m3fn", "float8_e8m0fnu", "float32", "bfloat16"}),
    ],
)
def test_orbax_restores_every_type_bit_for_bit(code, dtypes, tmp_path):
    moe = moe_of(code)
    _, state = nnx.split(moe)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == dtypes
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: moe_of(code, seed=1)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "state", abstract))
    assert_same_state(restored, moe)


def test_copies():
    moe = moe_of("mxfp8_bf16")
    for twin in (copy.deepcopy(moe), nnx.clone(moe), pickle.loads(pickle.dumps(moe))):
        assert_same_state(twin, moe)
        twin.w13.bias[...] += 1
        assert not moe.w13.bias[...].any()


def test_inference_changes_nothing():
    moe = moe_of("e5m2_e5m2_bf16")
    before = nnx.clone(moe)
    moe(X)
    assert_same_state(moe, before)
