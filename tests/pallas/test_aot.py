"""The kernels' code for sm_90a: the instructions it is for, and none that a kernel may not have (`Report.faults`)."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from test_aot_swapped import compile_swapped

from fp8x.ops.gate import ClampedSwiGLU, kernel_gate
from fp8x.pallas import aot
from fp8x.pallas.epilogue import Gated
from fp8x.pallas.sm90_grouped_fp8 import Tiling, estimates, gated_fp8, grouped_fp8
from fp8x.pallas.swapped_tiling import Tiling as SwappedTiling
from fp8x.scheme import Scheme, per_tensor

E4M3, E5M2, BF16, F16, F32 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16, jnp.float32
needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def compile_fp8(
    tiling, *, scales, groups=8, out=BF16, types=(E4M3, E4M3), bias=False, m=4096, n=4096, k=7168
) -> aot.Report:
    of = jax.ShapeDtypeStruct
    x_scale, w_scale = {
        "one": ((1,), (1,)),
        "factors": ((m,), (n,)),
        "blocks": ((k // 128, m), (n // 128, k // 128)),
        "columns": ((k // 128, m), (k // 128, n)),
    }[scales]
    (report,) = aot.compile_sm90(
        functools.partial(grouped_fp8, out_dtype=out, tiling=tiling),
        of((m, k), types[0]),
        of((groups, n, k), types[1]),
        of(x_scale, F32),
        of((groups, *w_scale), F32),
        of((groups, n), F32) if bias else None,
        of((groups,), jnp.int32) if groups > 1 else None,
    )
    return report


@pytest.mark.sample
@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        pytest.param(dict(out=F32, bias=True), marks=pytest.mark.slow),
        dict(groups=1),
        pytest.param(dict(groups=1, bias=True, out=F16), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("scales", "tiling"),
    [
        pytest.param(
            scales,
            t,
            id=f"{scales}-{t.block_m}x{t.block_n}x{t.cluster}",
            marks=[] if t.cluster == 2 and t.block_n == 256 and scales != "one" else pytest.mark.slow,
        )
        for scales in ("one", "factors", "blocks", "columns")
        for t in estimates(4096, 4096, 7168, 8, by_column=scales == "columns")
    ],
)
def test_fp8(tiling, scales, options):
    report = compile_fp8(tiling, scales=scales, **options)
    assert report.faults == []
    waves = tiling.block_m // 64
    assert report.instructions["QGMMA"] == 4 * waves  # 32 of K each: one step of 128 in the loop, and no other copy
    assert f"QGMMA.64x{tiling.block_n // 2}x32.F32.E4M3.E4M3" in report.sass
    assert report.instructions["UTMALDG"] and report.instructions["UTMASTG"]
    assert ("MULTICAST" in report.sass) == (tiling.cluster == 2)
    # Promotion, one instruction for each of a thread's elements of `total`.
    elements = waves * 64 * (tiling.block_n // 2) // 128
    assert report.instructions["FADD" if scales in ("one", "factors") else "FFMA"] >= elements


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("types", [(E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)], ids=str)
def test_fp8_types(types):
    report = compile_fp8(Tiling(128, 256, cluster=2), scales="one", types=types, m=512, n=512, k=512)
    names = {E4M3: "E4M3", E5M2: "E5M2"}
    assert f"QGMMA.64x128x32.F32.{names[types[0]]}.{names[types[1]]}" in report.sass
    assert report.faults == []


@pytest.mark.sample
@needs_compiler
@pytest.mark.parametrize(("k", "is_copied"), [(96, False), (192, False), (200, True)])
def test_weights_of_ragged_k(k, is_copied):
    """With narrower swizzles a box is whole tiles of 32 or 64, which end where K does."""
    of = jax.ShapeDtypeStruct
    operands = of((512, k), E4M3), of((8, 768, k), E4M3), of((512,), F32), of((8, 768), F32), None, of((8,), jnp.int32)
    product = functools.partial(grouped_fp8, out_dtype=BF16)
    (report,) = aot.compile_sm90(product, *operands)
    assert report.faults == [] and report.instructions["QGMMA"]
    text = jax.jit(product).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert bool(re.search(rf"stablehlo.pad.*8x768x{k}xf8", text)) == is_copied


@pytest.mark.sample
@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        dict(scales="blocks"),
        dict(scales="factors", is_static=True, bias=True, out=F16),
        dict(scales="blocks", gate=ClampedSwiGLU(), bias=True),
        pytest.param(dict(scales="factors", gate=ClampedSwiGLU(), bias=True, is_static=True), marks=pytest.mark.slow),
        pytest.param(dict(scales="blocks", gate="gelu_pytorch_tanh", bias=True), marks=pytest.mark.slow),
        pytest.param(dict(scales="factors", bias=True, cluster=1, element="e5m2", out=F32), marks=pytest.mark.slow),
        pytest.param(dict(scales="blocks", is_static=True, groups=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gated(options):
    report = compile_gated(**options)
    assert report.faults == []
    assert report.instructions["QGMMA"] == 8
    assert re.search(r"F2FP\.SATFINITE\.E[45]M[23]", report.sass), "quantized in registers"
    assert report.sass.count("FMNMX") == report.sass.count("FMNMX.NAN"), "NaN stays"
    assert report.instructions["MUFU"] >= 128  # 2^x and 1/√x of each element of h: 64 × 128 on 128 threads


def compile_gated(
    *, scales, gate="silu", is_static=False, bias=False, groups=8, cluster=2, element="e4m3", out=BF16
) -> aot.Report:
    m, i, k, of = 4096, 2048, 7168, jax.ShapeDtypeStruct
    scheme = per_tensor(element) if is_static else Scheme(element, block=(1, 128))
    end = Gated(kernel_gate(gate), jnp.dtype(out), scheme, is_static)
    (report,) = aot.compile_sm90(
        functools.partial(gated_fp8, end=end, tiling=Tiling(128, 256, cluster=cluster)),
        of((m, k), E4M3),
        of((groups, 2, i, k), E4M3),
        of((m,) if scales == "factors" else (k // 128, m), F32),
        of((groups, 2, i) if scales == "factors" else (groups, 2, i // 128, k // 128), F32),
        of((groups, 2, i), F32) if bias else None,
        of((groups,), jnp.int32) if groups > 1 else None,
        of((1,), F32) if is_static else None,
    )
    return report


LOOP = """
        /*0000*/                   CS2R R40, SRZ ;
.L_x_1:
        /*0010*/                   IMAD.MOV.U32 R90, RZ, RZ, R91 ;
        /*0020*/                   QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0030*/                   FADD R40, R24, R40 ;
        /*0040*/                   UMOV UR24, 0x18 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   MOV R24, R40 ;
"""


def test_moves_of_accumulators():
    assert aot.moves_of_accumulators(LOOP) == 0  # what is before a loop, behind it, or of others, costs no tensor core
    zeroed = LOOP.replace("IMAD.MOV.U32 R90, RZ, RZ, R91", "MOV R31, R90.reuse")
    assert aot.moves_of_accumulators(zeroed) == 1
    assert aot.moves_of_accumulators(zeroed.replace("R31", "R32")) == 0  # 64 × 16 sums are eight a thread
    assert aot.moves_of_accumulators(LOOP.replace("UMOV UR24, 0x18", "IMAD.MOV.U32 R7, RZ, RZ, R40")) == 1, "a total"
    assert aot.moves_of_accumulators(LOOP.replace("UMOV UR24, 0x18", "CS2R R26, SRZ")) == 1
    for address in ("MOV R26, UR8", "IMAD.MOV.U32 R26, RZ, RZ, 0x1"):
        assert aot.moves_of_accumulators(LOOP.replace("UMOV UR24, 0x18", address)) == 0
    assert aot.moves_of_accumulators("/*0010*/  MOV R1, R2 ;") == 0


@needs_compiler
def test_faults_of_kernels_that_are_not_offered():
    """C7513: wgmmas one by one; and accumulators that more tokens leave no registers for."""
    (message,) = compile_swapped("w8a16", SwappedTiling(64, 256)).faults
    assert message.startswith("(C7513) ") and "serialized" in message
    report = compile_swapped("w8a16 1×128", SwappedTiling(192, 128))
    assert report.faults == [f"{report.spill_bytes} bytes spilled"] and message not in str(report)


@needs_compiler
def test_what_the_compiler_refuses_is_an_error():
    with pytest.raises(aot.CompileError, match="no Mosaic GPU kernel"):
        aot.compile_sm90(lambda x: x + 1, jax.ShapeDtypeStruct((8,), F32))


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(aot, "_is_installed", lambda name, version=None: "nvidia" in name)
    assert aot.missing() == "not installed: jax-cuda13-plugin, jax-cuda13-pjrt"
    with pytest.raises(aot.CompileError, match="not installed: jax-cuda13-plugin"):
        aot.compile_sm90(lambda x: x, 1.0)


def test_wheels_beside_pythons_path(monkeypatch, tmp_path):
    wheel = tmp_path / "cuda-compiler" / "nvidia_nvvm-13.5.dist-info"
    wheel.mkdir(parents=True)
    (wheel / "METADATA").write_text("Name: nvidia-nvvm\nVersion: 13.5\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "prefix", str(tmp_path))
        patch.setattr(sys, "path", [])
        found = [aot._is_installed("nvidia-nvvm", version) for version in (None, "13.5", "13.6")]
    assert found == [True, True, False]
