"""`ScaledArray`: its invariants, and that it is a pytree like any other."""

import copy
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fp8x
from fp8x.array import ScaledArray
from fp8x.errors import ShapeError
from fp8x.numerics import quantize
from fp8x.scheme import E8M0, Scheme, mx, per_row, per_tensor


def zeros(shape, scheme) -> ScaledArray:
    return ScaledArray(np.zeros(shape, scheme.dtype), np.zeros(scheme.scale_shape(shape), scheme.scale_dtype), scheme)


SCHEMES = st.builds(
    Scheme,
    st.sampled_from(["e4m3", "e5m2"]),
    block=st.tuples(st.none() | st.integers(1, 200), st.none() | st.integers(1, 200)),
) | st.builds(
    Scheme,
    st.sampled_from(["e4m3", "e5m2"]),
    block=st.tuples(st.just(1), st.sampled_from([8, 16, 32])),
    scale_dtype=st.just(E8M0),
    scale_rule=st.sampled_from([None, "rceil", "floor", "ceil", "even"]),
)
SHAPES = st.lists(st.integers(0, 3), max_size=2).flatmap(
    lambda lead: st.tuples(*map(st.just, lead), st.integers(0, 300), st.integers(0, 9).map(lambda n: 32 * n))
)


@settings(deadline=None)
@given(scheme=SCHEMES, shape=SHAPES)
def test_invariants(scheme, shape):
    q = zeros(shape, scheme)
    assert q.shape == shape and q.ndim == len(shape)
    assert q.nbytes == q.data.nbytes + q.scale.nbytes
    leaves, treedef = jax.tree.flatten(q)
    assert leaves[0] is q.data and leaves[1] is q.scale
    again = jax.tree.unflatten(treedef, leaves)
    assert again.scheme == scheme and again.data is q.data and again.scale is q.scale
    # Anything but the right shapes and types is refused.
    for axis in range(q.ndim):
        grown = list(q.scale.shape)
        grown[axis] += 1
        with pytest.raises(ShapeError, match="scale: shape is"):
            ScaledArray(q.data, np.zeros(grown, scheme.scale_dtype), scheme)
    with pytest.raises(ShapeError, match="data: dtype is float16"):
        ScaledArray(np.zeros(shape, np.float16), q.scale, scheme)
    with pytest.raises(ShapeError, match="scale: dtype is float16"):
        ScaledArray(q.data, np.zeros(q.scale.shape, np.float16), scheme)


def test_error_texts():
    data, scale = jnp.zeros((256, 512), jnp.float8_e4m3fn), jnp.ones((2, 4), jnp.float32)
    block = Scheme("e4m3", block=(128, 128))
    ScaledArray(data, scale, block)
    with pytest.raises(ShapeError, match=r"scale: shape is \(2, 4\), but data \(256, 512\) in e4m3 1×· .* \(256, 1\)"):
        ScaledArray(data, scale, per_row())
    with pytest.raises(ShapeError, match=r"dtype is float8_e4m3fn, but scheme e5m2 .* stores float8_e5m2"):
        ScaledArray(data, scale, Scheme("e5m2", block=(128, 128)))
    with pytest.raises(ShapeError, match=r"dtype is bfloat16, but scheme e4m3 128×128 f32 has float32 scales"):
        ScaledArray(data, scale.astype(jnp.bfloat16), block)
    with pytest.raises(ShapeError, match=r"shape is \(4, 2\)"):
        ScaledArray(data, scale.T, block)
    with pytest.raises(ShapeError, match=r"data: dim 1 .* is 40, which 32 does not divide"):
        ScaledArray(data[:, :40], jnp.zeros((256, 2), E8M0), mx())
    with pytest.raises(ShapeError, match="has 1 dims"):
        ScaledArray(data[0], scale, block)


def test_dequantize_is_data_times_scale():
    q = ScaledArray(jnp.float8_e4m3fn([[1, -2, 448]]), jnp.full((1, 1), 0.5), per_tensor())
    assert q.dequantize().dtype == jnp.float32 and q.dequantize().tolist() == [[0.5, -1.0, 224.0]]
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    assert fp8x.ScaledArray is ScaledArray


def test_numpy_arrays_hold_as_well():
    q = quantize(jnp.linspace(-3, 3, 128).reshape(2, 64), mx())
    on_host = jax.device_get(q)
    assert isinstance(on_host, ScaledArray) and isinstance(on_host.data, np.ndarray)
    assert on_host.data.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(on_host.dequantize(), q.dequantize())


def test_is_immutable():
    with pytest.raises(AttributeError):
        zeros((2, 2), per_tensor()).scale = 1


class TestPytree:
    q = zeros((4, 64), mx())

    def test_paths(self):
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path({"w": self.q})]
        assert paths == ["['w'].data", "['w'].scale"]

    def test_through_jit(self):
        same = jax.jit(lambda q: q)(self.q)
        assert isinstance(same, ScaledArray) and same.scheme == self.q.scheme and same.shape == (4, 64)

    def test_another_scheme_is_another_trace(self):
        traces = []

        @jax.jit
        def f(q):
            traces.append(q.scheme)
            return q.dequantize()

        f(zeros((4, 64), per_tensor())), f(zeros((4, 64), per_tensor())), f(zeros((4, 64), mx()))
        assert traces == [per_tensor(), mx()]

    def test_eval_shape(self):
        q = jax.eval_shape(lambda x: quantize(x, mx()), jax.ShapeDtypeStruct((4, 64), jnp.bfloat16))
        assert q.shape == (4, 64) and q.scale.shape == (4, 2) and q.scale.dtype == E8M0

    def test_map_to_what_is_no_array(self):
        specs = jax.tree.map(lambda leaf: jax.sharding.PartitionSpec("x"), self.q)
        assert isinstance(specs, ScaledArray) and specs.data == specs.scale == jax.sharding.PartitionSpec("x")
        assert jax.tree.map(lambda _: None, self.q).scale is None

    def test_vmap_and_scan_take_the_leading_dim_off(self):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 64)), jnp.float32)
        q = quantize(x, Scheme("e4m3", block=(4, 32)))
        np.testing.assert_array_equal(jax.vmap(lambda e: e.dequantize())(q), q.dequantize())
        _, y = jax.lax.scan(lambda carry, e: (carry, e.dequantize()), None, q)
        np.testing.assert_array_equal(y, q.dequantize())
        expert = jax.tree.map(lambda leaf: leaf[1], q)
        np.testing.assert_array_equal(expert.dequantize(), q.dequantize()[1])

    def test_copies_and_pickles(self):
        for q in (copy.deepcopy(self.q), pickle.loads(pickle.dumps(self.q))):
            assert q.scheme == self.q.scheme
            np.testing.assert_array_equal(q.data.view(np.uint8), self.q.data.view(np.uint8))
