"""Gated experts as gpt-oss has them: widths that are no multiple of 128, biases in both products, the clamped gate.

In the interpreter with race detection, scaled down, beside XLA; and compiled for sm_90a in its own sizes.
"""

import functools

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from shapes import Shape, operands, quantize

import fp8x
from fp8x import ops
from fp8x.array import ScaledArray
from fp8x.ops import mosaic_swapped
from fp8x.ops.gated import multiply_parts
from fp8x.pallas import aot

CODES = ("mxfp8_bf16", "e4m3_bf16", "fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16_dynamic")
CLAMPED = ops.ClampedSwiGLU(limit=1.5)
needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
of = jax.ShapeDtypeStruct


def first(x, w13, of_rows, rows, bias, *, recipe: fp8x.Recipe, gate, by_expert: bool):
    """As in `fp8x.nn.MoE`: gate and up, or what becomes of them in 8 bits; one token's rows by the expert of each."""
    activation = recipe.activation
    if activation is not None and not by_expert:
        options = dict(gate=gate, out_activation=activation, activation=activation, out_dtype=recipe.out_dtype)
        return ops.gated_matmul(x, w13, of_rows, rows=rows, bias=bias, **options)
    op = functools.partial(ops.expert_matmul if by_expert else ops.grouped_matmul, activation=activation)
    return multiply_parts(lambda x, w, bias: op(x, w, of_rows, rows=rows, bias=bias), x, w13, bias)


def second(h, w2, of_rows, bias, *, recipe: fp8x.Recipe, gate, by_expert: bool):
    options = dict(bias=bias, out_dtype=recipe.out_dtype)
    if not isinstance(h, ScaledArray):
        options |= dict(gate=gate, activation=recipe.activation)
    return (ops.expert_matmul if by_expert else ops.grouped_matmul)(h, w2, of_rows, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "rows", "kernels"),
    [
        ("mxfp8_bf16", "few", "sm90_mx"),
        ("mxfp8_bf16", "many", "sm90_mx"),
        ("mxfp8_bf16", "one", "sm90_mx"),
        ("e4m3_bf16", "few", "sm90_w8a16"),
        ("fp8_e4m3fn_bf16_block_scale", "one", "sm90_fp8_decode"),
        ("fp8_e4m3fn_bf16_block_scale", "few", "in_two_steps sm90_fp8_decode"),
        ("fp8_e4m3fn_bf16_block_scale", "many", "sm90_fp8_block_gated sm90_fp8_block"),
        ("e4m3_e4m3_bf16_dynamic", "few", "in_two_steps sm90_fp8_decode"),
        ("e4m3_e4m3_bf16_dynamic", "many", "in_two_steps sm90_fp8"),
    ],
)
def test_is_what_xla_makes(interpreted, monkeypatch, code, rows, kernels):
    monkeypatch.setattr(mosaic_swapped, "FEW_ROWS", 0 if rows == "many" else 32)
    recipe, k, i = fp8x.recipe(code), 288, 160
    sizes = {"one": (1, 0, 1), "few": (3, 0, 5), "many": (70, 0, 29)}[rows]
    tokens = 1 if rows == "one" else sum(sizes) // 2
    rng = np.random.default_rng(3)
    w13 = quantize(jnp.asarray(rng.normal(size=(3, 2, i, k)) * k**-0.5, jnp.float32), recipe.weight)
    given = operands(Shape((tokens, 0, 0), k, i), recipe.weight)  # w2 and its bias
    x = jnp.asarray(rng.normal(size=(tokens, k)), jnp.bfloat16)
    bias13 = jnp.asarray(rng.normal(size=(3, 2, i)), jnp.bfloat16)
    source = jnp.asarray(rng.integers(0, tokens, sum(sizes)), jnp.int32)
    of_rows = jnp.asarray([2, 0] if rows == "one" else sizes, jnp.int32)
    options = dict(recipe=recipe, gate=CLAMPED, by_expert=rows == "one")
    up, down = functools.partial(first, **options), functools.partial(second, **options)
    with interpreted():
        h = jax.block_until_ready(up(x, w13, of_rows, source, bias13))
        choices = ops.explain(up, x, w13, of_rows, source, bias13) + ops.explain(down, h, given.w, of_rows, given.bias)
    with interpreted():
        y = np.asarray(down(h, given.w, of_rows, given.bias))
    assert {choice.kernel for choice in choices if "quantize" not in choice.kernel} == set(kernels.split())
    # What rounds another way on the way moves 16-bit numbers, and 8-bit codes, to their neighbors.
    expected = down(up(x, w13, of_rows, source, bias13), given.w, of_rows, given.bias)
    metric.assert_close(y, metric.float64(expected), tolerance=2e-2 if recipe.activation else 4e-3)


def stored(recipe: fp8x.Recipe, *shape: int) -> ScaledArray:
    scheme = recipe.weight
    return ScaledArray(of(shape, scheme.dtype), of(scheme.scale_shape(shape), scheme.scale_dtype), scheme)


@needs_compiler
@pytest.mark.parametrize("rows", [8, *(slow(rows) for rows in (1, 64, 4096))])
@pytest.mark.parametrize("code", [CODES[0], *map(slow, CODES[1:])])
def test_experts_of_gpt_oss_compile(code, rows):
    recipe, width, visits = fp8x.recipe(code), 2880, 4 * rows
    options = dict(recipe=recipe, gate=ops.ClampedSwiGLU(), by_expert=rows == 1)

    def run(x, w13, w2, of_rows, source, bias13, bias2):
        return second(first(x, w13, of_rows, source, bias13, **options), w2, of_rows, bias2, **options)

    w13, w2 = stored(recipe, 32, 2, width, width), stored(recipe, 32, width, width)
    biases = of((32, 2, width), jnp.bfloat16), of((32, width), jnp.bfloat16)
    of_rows, source = of((visits if rows == 1 else 32,), jnp.int32), of((visits,), jnp.int32)
    with pytest.MonkeyPatch.context() as patch, fp8x.backend("mosaic_gpu"):
        patch.setattr(mosaic_swapped, "FEW_ROWS", 32)
        reports = aot.compile_sm90(run, of((rows, width), jnp.bfloat16), w13, w2, of_rows, source, *biases)
    assert [report.faults for report in reports] == [[]] * len(reports)
    assert sum(bool(report.instructions["UTMALDG"]) for report in reports) == 2, "w13 is one product, w2 the other"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("rows", [1, 8, 64, 4096])
@pytest.mark.parametrize("code", CODES)
def test_attention_of_gpt_oss_compiles(code, rows):
    recipe = fp8x.recipe(code)
    for n, k in ((4096, 2880), (512, 2880), (2880, 4096)):
        with pytest.MonkeyPatch.context() as patch, fp8x.backend("mosaic_gpu"):
            patch.setattr(mosaic_swapped, "FEW_ROWS", 32)
            reports = aot.compile_sm90(
                lambda x, w, bias: ops.matmul(x, w, activation=recipe.activation, bias=bias),
                of((rows, k), jnp.bfloat16),
                stored(recipe, n, k),
                of((n,), jnp.bfloat16),
            )
        assert [report.faults for report in reports] == [[]] * len(reports)
