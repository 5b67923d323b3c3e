"""The products that are measured: their operands, floors and errors."""

import dataclasses

import jax.numpy as jnp
import metric
import numpy as np
import pytest

import fp8x
from fp8x import Recipe, Scheme
from fp8x.array import ScaledArray
from fp8x.benchmark import grouped
from fp8x.benchmark.grouped import Shape
from fp8x.pallas import tuning
from fp8x.scheme import mx

ROUTED = Shape(16, 48, 128, experts=4, top_k=2)
STATIC = fp8x.recipe("e4m3_e4m3_bf16")
BLOCK = fp8x.recipe("fp8_e4m3fn_bf16_block_scale")


def test_group_sizes():
    assert Shape(10, 1, 1, experts=4).group_sizes(0).tolist() == [2, 3, 2, 3]
    sizes = ROUTED.group_sizes(0)
    assert sizes.dtype == np.int32 and sizes.sum() == ROUTED.m == 32 and sizes.max() <= 16
    assert sizes.tolist() != ROUTED.group_sizes(1).tolist()
    assert sorted(Shape(1, 1, 1, experts=8, top_k=3).group_sizes(5).tolist()) == [0] * 5 + [1] * 3


@pytest.mark.sample
@pytest.mark.parametrize(
    ("shape", "recipe"),
    [
        (ROUTED, STATIC),
        (ROUTED, BLOCK),
        (Shape(3, 48, 128), Recipe(Scheme("e4m3", block=(1, 128)))),
        (ROUTED, Recipe(Scheme("e4m3", block=(2, None, 64)), mx("e5m2"), "dynamic")),
    ],
    ids=["grouped", "blocks", "dense", "experts that share scales"],
)
def test_measured_product(shape, recipe):
    quantized = recipe.activation is not None
    (given,) = grouped.inputs(shape, recipe, quantized=quantized)
    assert isinstance(given.x, ScaledArray) == quantized and given.w.shape[-2:] == (48, 128)
    found = grouped.measure(shape, recipe, quantized=quantized)
    assert found["seconds"] > 0 and found["kernel"] == ("xla_grouped_matmul" if shape.experts > 1 else "xla_matmul")
    y = grouped.product(shape, recipe, quantized=quantized)(*given.arguments)
    w = given.w if shape.experts > 1 else ScaledArray(given.w.data[None], given.w.scale[None], given.w.scheme)
    expected = metric.grouped_matmul(given.x, w, np.asarray(given.group_sizes))
    assert grouped.relative_error(y, given, recipe) == pytest.approx(metric.relative_error(y, expected), rel=1e-3)
    assert found["relative_error"] <= grouped.tolerance(y.dtype)


@pytest.mark.parametrize(
    "recipe", [STATIC, BLOCK, fp8x.recipe("e4m3_e4m3_bf16_dynamic")], ids=["static", "blocks", "rows"]
)
def test_activations_are_quantized_anew(recipe):
    """By the host, of samples; a product of what was never quantized is seen."""
    given = grouped.operands(ROUTED, recipe, 0)
    y = grouped.product(ROUTED, recipe)(*given.arguments)
    assert grouped.relative_error(y, given, recipe) < 2**-8
    exact = metric.grouped_matmul(given.x, given.w, np.asarray(given.group_sizes))
    assert grouped.relative_error(jnp.asarray(exact, jnp.float32), given, recipe) > 1e-2


def test_a_sample_of_a_large_product():
    shape = Shape(300, 200, 128, experts=3)
    given = grouped.operands(shape, BLOCK, 0, quantized=True)
    y = jnp.asarray(metric.grouped_matmul(given.x, given.w, np.asarray(given.group_sizes)), jnp.float32)
    assert grouped.relative_error(y, given, BLOCK) < 2**-22
    for wrong in (y.at[-1].set(0), y.at[:, 0].set(0), y.at[100:200].set(y[:100])):
        assert grouped.relative_error(wrong, given, BLOCK) > 0.05


def test_a_wrong_product_is_not_timed():
    given = grouped.operands(ROUTED, STATIC, 0)
    y = grouped.product(ROUTED, STATIC)(*given.arguments)
    assert grouped.relative_error(y, given, STATIC) < 2**-8
    for wrong in (y.at[31].set(y[30]), y.at[0, 0].set(np.nan)):
        found = grouped.checked([y, wrong], [given, given], STATIC, 2**-8, lambda: pytest.fail("timed"))
        assert found["failure"].startswith("wrong: relative error ")


def test_the_tolerance_is_that_of_the_ops():
    for dtype, limit in metric.TOLERANCE.items():
        assert grouped.tolerance(dtype) == limit


def test_floors_by_hand():
    shape, sizes = Shape(64, 256, 512, experts=4), [32, 0, 0, 32]
    found = grouped.floor(shape, BLOCK, sizes)
    assert found.bytes == 2 * 64 * 512 + 2 * (256 * 512 + 4 * 2 * 4) + 2 * 64 * 256
    assert found.flops == 2 * 64 * 256 * 512 and found.peak == 1979e12
    found = grouped.floor(shape, BLOCK, sizes, quantized=True)
    assert found.bytes == 64 * 512 + 4 * 64 * 4 + 2 * (256 * 512 + 4 * 2 * 4) + 2 * 64 * 256
    found = grouped.floor(shape, fp8x.recipe("mxfp8_mxfp8_bf16"), sizes)
    assert found.bytes == 2 * 64 * 512 + 2 * 256 * (512 + 16) + 2 * 64 * 256 and found.peak == 989e12
    assert grouped.floor(shape, fp8x.recipe("e4m3_bf16"), sizes).peak == 989e12


@dataclasses.dataclass(frozen=True)
class Rows:
    rows: int


def test_candidates(monkeypatch):
    problem, estimates = tuning.Problem("xla", 32, 48, 128, 4), {Rows(1): 1.0, Rows(2): 2.0}

    def product(x, w, group_sizes, scale):
        tuning.choose(problem, estimates)
        return jnp.zeros(())

    assert grouped.candidates(ROUTED, STATIC) is None
    monkeypatch.setattr(grouped, "product", lambda *_: product)
    assert grouped.candidates(ROUTED, STATIC) == tuning.Choice(problem, Rows(1), None, estimates)
