"""The swapped kernel's code for sm_90a: the instructions it is for, no register spilled, resources within bounds."""

import re

import jax
import jax.numpy as jnp
import pytest

from fp8x.pallas import aot
from fp8x.pallas.sm90 import SHARED_MEMORY
from fp8x.pallas.sm90_grouped_swapped import grouped_swapped
from fp8x.pallas.swapped_tiling import Tiling, estimates

E4M3, E5M2, E8M0, BF16, F16, F32 = (
    jnp.float8_e4m3fn,
    jnp.float8_e5m2,
    jnp.float8_e8m0fnu,
    jnp.bfloat16,
    jnp.float16,
    jnp.float32,
)
needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
NAMES = {E4M3: "E4M3", E5M2: "E5M2", BF16: "BF16", F16: "F16"}
# Of each form: the type of x, how the scales of w lie, and the most tokens.
FORMS = {
    "w8a16": (BF16, "rows", 128),
    "w8a16 f16": (F16, "rows", 128),
    "w8a16 blocks": (BF16, "blocks", 120),
    "w8a16 blocks f16": (F16, "blocks", 120),
    "w8a16 1×128": (BF16, "groups", 64),
    "mx": (BF16, "mx", 128),
    "mx f16": (F16, "mx", 64),
    "fp8": (E4M3, "rows", 64),
    "fp8 blocks": (E5M2, "blocks", 64),
    "fp8 1×128": (E4M3, "groups", 64),
}


def compile_swapped(
    form, tiling, *, out=BF16, w_type=E4M3, bias=False, groups=8, by_expert=False, m=4096, n=4096, k=7168
) -> aot.Report:
    of = jax.ShapeDtypeStruct
    x_type, scales, _ = FORMS[form]
    w_scale = {"rows": (n,), "blocks": (n // 128, k // 128), "groups": (n, k // 128), "mx": (n, k // 32)}[scales]
    x_scale = None
    if jnp.dtype(x_type).itemsize == 1:
        x_scale = of((m,) if scales == "rows" else (k // 128, m), F32)

    def run(x, w, x_scale, w_scale, bias, rows):
        of_rows = dict(group_sizes=None, experts=rows) if by_expert else dict(group_sizes=rows)
        return grouped_swapped(x, w, x_scale, w_scale, bias, **of_rows, out_dtype=out, tiling=tiling)

    (report,) = aot.compile_sm90(
        run,
        of((m, k), x_type),
        of((groups, n, k), w_type),
        x_scale,
        of((groups, *w_scale), E8M0 if scales == "mx" else F32),
        of((groups, n), F32) if bias else None,
        of((m if by_expert else groups,), jnp.int32) if groups > 1 else None,
    )
    return report


def check(report, form, tiling, w_type=E4M3):
    assert report.spill_bytes == 0 and not report.instructions["LDL"] and not report.instructions["STL"]
    assert report.shared_memory <= SHARED_MEMORY
    # What its warpgroups ask for: with more than the block was launched with, the last one to ask would wait for ever.
    memory, compute = (int(n, 16) for n in re.findall(r"USETMAXREG.*?(0x\w+)", report.sass))
    assert memory + 2 * compute <= 3 * report.registers
    assert report.instructions["UTMALDG"]
    x_type, *_ = FORMS[form]
    waves = tiling.rows // 128
    if jnp.dtype(x_type).itemsize == 1:
        assert report.instructions["QGMMA"] == 4 * waves and not report.instructions["HGMMA"]
        assert f"QGMMA.64x{tiling.tokens}x32.F32.{NAMES[w_type]}.{NAMES[x_type]}" in report.sass
    else:
        steps = 4 if form == "mx f16" else 8  # of 16; a slot has 64 of K there
        assert report.instructions["HGMMA"] == steps * waves and not report.instructions["QGMMA"]
        of_type = ".BF16" if x_type == BF16 else ""
        assert f"HGMMA.64x{tiling.tokens}x16.F32{of_type} R" in report.sass
        assert f"F2FP.F16.{NAMES[w_type]}.UNPACK_B" in report.sass


@needs_compiler
@pytest.mark.parametrize(
    ("form", "tokens", "rows"),
    [
        pytest.param(
            form,
            tokens,
            rows,
            marks=[]
            if (form, tokens) in {("w8a16", 128), ("mx", 128), ("mx", 8), ("w8a16 blocks", 120)}
            and (rows == 256) == (tokens > 64)
            else pytest.mark.slow,
        )
        for form, (_, _, widest) in FORMS.items()
        for tokens in sorted({8, 16, 32, 64, widest})
        for rows in (128, 256)
    ],
)
def test_forms(form, tokens, rows):
    tiling = Tiling(tokens, rows)
    check(compile_swapped(form, tiling), form, tiling)


@needs_compiler
@pytest.mark.parametrize(
    ("form", "tiling", "options"),
    [
        ("fp8 blocks", Tiling(64, 128, splits=4), dict(bias=True, m=64, groups=1)),
        ("mx", Tiling(8, 128), dict(by_expert=True, m=8, groups=128, bias=True, out=F16)),
        pytest.param("fp8", Tiling(8, 128), dict(by_expert=True, m=8, groups=128), marks=pytest.mark.slow),
        pytest.param("w8a16", Tiling(128, 256), dict(out=F32, bias=True, w_type=E5M2), marks=pytest.mark.slow),
        pytest.param("w8a16 blocks", Tiling(120, 256), dict(out=F32, bias=True, w_type=E5M2), marks=pytest.mark.slow),
        pytest.param("mx", Tiling(128, 256), dict(out=F32, bias=True, groups=1), marks=pytest.mark.slow),
        pytest.param("mx f16", Tiling(64, 256), dict(out=F32, bias=True, w_type=E5M2), marks=pytest.mark.slow),
        pytest.param("fp8 1×128", Tiling(64, 256, splits=2), dict(out=F16, bias=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_ends(form, tiling, options):
    """Splits of K, rows by expert, bias, other types."""
    check(compile_swapped(form, tiling, **options), form, tiling, options.get("w_type", E4M3))


@pytest.mark.parametrize("form", FORMS)
def test_all_tilings_that_are_estimated_are_compiled_above(form):
    x_type, _, widest = FORMS[form]
    tilings = estimates(4096, 4096, 7168, 8, x_bytes=jnp.dtype(x_type).itemsize, widest=widest)
    assert {(t.tokens, t.rows) for t in tilings} == {(t, r) for t in {8, 16, 32, 64, widest} for r in (128, 256)}
