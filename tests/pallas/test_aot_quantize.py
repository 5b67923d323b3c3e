"""The quantizing kernel's code for sm_90a: wide loads, few instructions an element, no register spilled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8x.ops.gate import ClampedSwiGLU
from fp8x.ops.quantize import QuantizeCall, by_kernel, unsupported, view
from fp8x.pallas import aot
from fp8x.pallas.quantize_tiles import THREADS, choose_tile
from fp8x.scheme import Scheme, mx, per_row, per_tensor

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
GROUP, TOKEN, STATIC_GROUP = Scheme("e4m3", block=(1, 128)), per_row(), Scheme("e4m3", block=(None, 128))
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@needs_compiler
@pytest.mark.parametrize(
    ("scheme", "k", "dtype", "used", "gate", "limit"),
    [
        # The last column: instructions an element, on all paths together, of which `used` has two.
        (GROUP, 7168, BF16, False, None, 9.0),
        (TOKEN, 7168, BF16, False, None, 8.3),
        (mx(), 2048, BF16, False, "silu", 20.6),
        (mx(), 2048, BF16, False, ClampedSwiGLU(), 25.5),
        slow(mx("e5m2"), 7168, BF16, False, None, 9.3),
        slow(GROUP, 7168, BF16, True, None, 11.7),
        slow(GROUP, 7168, F16, False, None, 8.5),
        slow(GROUP, 7168, F32, False, None, 8.9),
        slow(Scheme("e4m3", block=(1, 128), scale_rule="pow2"), 7168, BF16, False, None, 8.9),
        slow(TOKEN, 2048, BF16, False, None, 8.0),
        slow(TOKEN, 16384, F32, False, None, 7.3),
        slow(TOKEN, 32768, BF16, True, None, 7.8),
        slow(per_tensor("e5m2"), 7168, BF16, False, None, 7.0),
        slow(STATIC_GROUP, 7168, BF16, False, None, 8.5),
        slow(GROUP, 2048, BF16, True, "silu", 24.0),
        slow(TOKEN, 16384, BF16, False, "silu", 19.5),
        slow(GROUP, 2048, BF16, True, ClampedSwiGLU(), 28.7),
        slow(TOKEN, 768, F16, False, "gelu_pytorch_tanh", 25.0),
        slow(STATIC_GROUP, 2048, BF16, False, "silu", 20.0),
    ],
    ids=str,
)
def test_code(scheme, k, dtype, used, gate, limit):
    m, of = 16384, jax.ShapeDtypeStruct
    call = QuantizeCall(m, k, np.dtype(dtype), scheme, scheme.block[0] is None, gate)
    assert unsupported(call) is None
    arguments = [of((m, k) if gate is None else (m, 2, k), dtype)]
    scale = of(scheme.scale_shape((m, k)), F32) if call.has_scale else None
    (report,) = aot.compile_sm90(
        lambda x, scale, used: by_kernel(x, scheme, scale, used, gate),
        *arguments,
        scale,
        of((), jnp.int32) if used else None,
    )
    assert report.faults == []

    rows, blocks, width = view(call)
    parts = 1 if gate is None else 2
    tile = choose_tile(rows, blocks, width, call.x.itemsize, parts)
    elements = tile.rows * tile.blocks * width // THREADS
    # Everything is loaded at once, 16 bytes each, before anything is used.
    assert report.sass.count("LD.E.128") == elements * parts * call.x.itemsize // 16
    assert report.sass.count(f"ST.E{'.64' if call.x.itemsize == 2 else ''} ") >= elements * call.x.itemsize // 16
    assert f"F2FP.SATFINITE.{scheme.element.upper()}.F32.PACK_AB" in report.sass
    assert "FMUL.FTZ" not in report.sass, "subnormals count"
    assert report.sass.count("FMNMX") == report.sass.count("FMNMX.NAN"), "NaN stays"
    if gate is not None:
        assert f"F2FP.{'BF16' if dtype == BF16 else 'F16'}.F32.PACK_AB" in report.sass
    assert (report.instructions.total() - report.instructions["NOP"]) / elements <= limit
