"""The quantizing kernel on a Hopper GPU, bit for bit as numerics on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metric import as_bits

from fp8x.ops.gate import ClampedSwiGLU
from fp8x.ops.quantize import by_kernel, by_xla
from fp8x.scheme import Scheme, mx, per_row, per_tensor

GROUP = Scheme("e4m3", block=(1, 128))
pytestmark = [
    pytest.mark.gpu,  # the condition is text, since collecting tests starts no backend
    pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="there is no GPU"),
]
kernel = jax.jit(by_kernel, static_argnames=("scheme", "gate"))


@functools.partial(jax.jit, static_argnames=("scheme", "gate"))
def reference(x, scheme, scale=None, used=None, gate=None):
    return by_xla(x, scheme, scale, used, gate)


def on_cpu(*arguments, **options):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(reference(*arguments, **options))


def assert_same(actual, expected):
    np.testing.assert_array_equal(as_bits(actual.scale), as_bits(expected.scale))
    data = [np.asarray(q.data) for q in (actual, expected)]
    np.testing.assert_array_equal(*(np.where(np.isnan(q.astype(np.float32)), 0x7F, q.view(np.uint8)) for q in data))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("scheme", [GROUP, mx(), mx("e5m2"), per_row(), Scheme("e5m2", block=(1, 256))], ids=str)
def test_every_number_of_16_bits(scheme, dtype):
    """Subnormals too, which Pallas' interpreter takes for zero."""
    x = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(-1, 256)
    assert_same(kernel(x, scheme, None, None), on_cpu(x, scheme))


@pytest.mark.parametrize("scheme", [GROUP, mx(), per_row("e5m2")], ids=str)
def test_float32_of_any_exponent(scheme):
    x = np.random.default_rng(0).integers(0, 2**32, (65, 2048), dtype=np.uint32).view(np.float32)
    x[:32] = np.exp2(np.arange(-150, -118, dtype=np.float64))[:, None] * x.view(np.int32)[:32] / 2.0**31
    assert_same(kernel(x, scheme, None, None), on_cpu(x, scheme))


@pytest.mark.parametrize("k", [2048, 2888, 7168, 16384])
@pytest.mark.parametrize("m", [1, 3, 65, 1000])
def test_ragged_rows_of_which_some_count(m, k):
    x = np.random.default_rng(1).normal(size=(m, k)).astype(jnp.bfloat16)
    x[m // 2 :] = np.nan
    for scheme, scale in ((per_row(), None), (per_tensor(), np.full((1, 1), 0.01, np.float32))):
        used = np.int32(m // 2)
        assert_same(kernel(x, scheme, scale, used), on_cpu(x, scheme, scale, used))


@pytest.mark.parametrize("gate", ["silu", "gelu_pytorch_tanh", ClampedSwiGLU(limit=1.5)], ids=str)
@pytest.mark.parametrize("scheme", [GROUP, per_row(), mx()], ids=str)
@pytest.mark.parametrize("shape", [(500, 2, 768), (16, 2, 14336)], ids=str)
def test_gate(shape, scheme, gate):
    """h may round to its neighbor, and with it a code, or all codes where it is the amax: rarely."""
    x = np.random.default_rng(2).normal(size=shape).astype(jnp.bfloat16)
    actual, expected = kernel(x, scheme, None, None, gate), on_cpu(x, scheme, gate=gate)
    different = as_bits(actual.data) != as_bits(expected.data)
    assert np.mean(different) < 1e-2
    actual, expected = (np.asarray(q.dequantize(), np.float64) for q in (actual, expected))
    assert np.linalg.norm(actual - expected) < 2.0**-8 * np.linalg.norm(expected)
