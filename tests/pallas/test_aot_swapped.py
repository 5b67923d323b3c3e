"""The swapped kernel's code for sm_90a: the instructions it is for, and none that a kernel may not have."""

import re

import jax
import jax.numpy as jnp
import pytest

from fp8x.pallas import aot, tuning
from fp8x.pallas.sm90_grouped_swapped import grouped_swapped
from fp8x.pallas.swapped_tiling import Tiling

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
# Of each form: the type of x, and how the scales of w lie.
FORMS = {
    "w8a16": (BF16, "rows"),
    "w8a16 f16": (F16, "rows"),
    "w8a16 blocks": (BF16, "blocks"),
    "w8a16 blocks f16": (F16, "blocks"),
    "w8a16 1×128": (BF16, "groups"),
    "mx": (BF16, "mx"),
    "mx f16": (F16, "mx"),
    "fp8": (E4M3, "rows"),
    "fp8 blocks": (E5M2, "blocks"),
    "fp8 1×128": (E4M3, "groups"),
}


def call(form, tiling, *, out=BF16, w_type=E4M3, bias=False, groups=8, by_expert=False, m=4096, n=4096, k=7168):
    """A function of a form, and its arguments."""
    of = jax.ShapeDtypeStruct
    x_type, scales = FORMS[form]
    w_scale = {"rows": (n,), "blocks": (n // 128, k // 128), "groups": (n, k // 128), "mx": (n, k // 32)}[scales]
    x_scale = None
    if jnp.dtype(x_type).itemsize == 1:
        x_scale = of((m,) if scales == "rows" else (k // 128, m), F32)

    def run(x, w, x_scale, w_scale, bias, rows):
        of_rows = dict(group_sizes=None, experts=rows) if by_expert else dict(group_sizes=rows)
        return grouped_swapped(x, w, x_scale, w_scale, bias, **of_rows, out_dtype=out, tiling=tiling)

    return run, (
        of((m, k), x_type),
        of((groups, n, k), w_type),
        x_scale,
        of((groups, *w_scale), E8M0 if scales == "mx" else F32),
        of((groups, n), F32) if bias else None,
        of((m if by_expert else groups,), jnp.int32) if groups > 1 else None,
    )


def compile_swapped(form, tiling, **options) -> aot.Report:
    run, arguments = call(form, tiling, **options)
    (report,) = aot.compile_sm90(run, *arguments)
    return report


def offered(form, **options) -> set[Tiling]:
    """All that the kernel could choose."""
    run, arguments = call(form, None, **options)
    with tuning.recorded() as choices:
        jax.eval_shape(run, *arguments)
    return set(choices[0].estimates)


def check(report, form, tiling, w_type=E4M3):
    assert report.faults == []
    # What its warpgroups ask for: with more than the block was launched with, the last one to ask would wait for ever.
    memory, compute = (int(n, 16) for n in re.findall(r"USETMAXREG.*?(0x\w+)", report.sass))
    assert memory + 2 * compute <= 3 * report.registers
    assert report.instructions["UTMALDG"]
    x_type, _ = FORMS[form]
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


# One of each way that a step is done, of one wave and two.
QUICK = {
    ("w8a16", 192, 128, 8),
    ("mx", 192, 128, 8),
    ("mx", 8, 128, 8),
    ("mx f16", 64, 128, 1),
    ("w8a16 blocks", 120, 256, 1),
    ("fp8", 64, 256, 1),
}


@pytest.mark.sample
@needs_compiler
@pytest.mark.parametrize(
    ("form", "tokens", "rows", "groups"),
    [
        pytest.param(form, *shape, groups, marks=[] if (form, *shape, groups) in QUICK else pytest.mark.slow)
        for form in FORMS
        for groups in (8, 1)
        for shape in sorted({(tiling.tokens, tiling.rows) for tiling in offered(form, groups=groups)})
    ],
)
def test_all_tilings_that_are_offered(form, tokens, rows, groups):
    tiling = Tiling(tokens, rows)
    check(compile_swapped(form, tiling, groups=groups), form, tiling)


@needs_compiler
@pytest.mark.parametrize(
    ("form", "tiling", "options"),
    [
        ("fp8 blocks", Tiling(64, 128, splits=4), dict(bias=True, m=64, groups=1)),
        ("mx", Tiling(8, 128), dict(by_expert=True, m=8, groups=128, bias=True, out=F16)),
        *[
            pytest.param(form, Tiling(8, rows), dict(by_expert=True, m=8, groups=128), marks=pytest.mark.slow)
            for form in FORMS
            for rows in sorted({tiling.rows for tiling in offered(form, by_expert=True, m=8, groups=128)})
        ],
        pytest.param("w8a16", Tiling(192, 128), dict(out=F32, bias=True, w_type=E5M2), marks=pytest.mark.slow),
        pytest.param("w8a16 blocks", Tiling(120, 256), dict(out=F32, bias=True, w_type=E5M2), marks=pytest.mark.slow),
        pytest.param("mx", Tiling(192, 128), dict(out=F32, bias=True, groups=1), marks=pytest.mark.slow),
        pytest.param("w8a16 f16", Tiling(192, 128), dict(out=F16, bias=True, groups=1), marks=pytest.mark.slow),
        pytest.param("mx f16", Tiling(64, 256), dict(out=F32, bias=True, w_type=E5M2), marks=pytest.mark.slow),
        pytest.param("fp8 1×128", Tiling(64, 256, splits=2), dict(out=F16, bias=True), marks=pytest.mark.slow),
        pytest.param("fp8", Tiling(64, 256, splits=8), dict(bias=True, m=64, groups=1), marks=pytest.mark.slow),
        pytest.param("w8a16 1×128", Tiling(64, 256, splits=2), dict(m=64, groups=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_ends(form, tiling, options):
    """Splits of K, rows by expert, bias, other types."""
    check(compile_swapped(form, tiling, **options), form, tiling, options.get("w_type", E4M3))
