"""From histograms to scales: percentile and mean squared error, against numpy on the values themselves."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.calibrate.methods import CANDIDATES, find_scale, mse_amax, percentile_amax
from fp8x.nn.observer import BINS, LOW_BITS, add_counts, bin_magnitudes, count_bins, total_counts
from fp8x.numerics import quantize_with_scale
from fp8x.scheme import Scheme, per_tensor

GROUPS = Scheme("e4m3", block=(None, 128))


def values(shape=(64, 300), seed=0, tail=2.0):
    """Heavy-tailed (Student's t), in bfloat16: what a histogram counts exactly."""
    return np.random.default_rng(seed).standard_t(tail, shape).astype(ml_dtypes.bfloat16)


def histogram_of(x, scheme=GROUPS, is_row=None):
    return total_counts(np.asarray(jax.jit(count_bins, static_argnums=1)(jnp.asarray(x), scheme, is_row)))


def groups_of(x, width=128):
    return [np.abs(np.asarray(x[:, start : start + width], np.float64)) for start in range(0, x.shape[1], width)]


def test_histogram_counts_every_bfloat16_magnitude():
    x = values()
    counts = histogram_of(x)
    assert counts.shape == (3, BINS)
    for row, group in zip(counts, groups_of(x)):
        magnitudes, expected = np.unique(group, return_counts=True)
        np.testing.assert_array_equal(bin_magnitudes()[row > 0], np.where(magnitudes < 2.0**-40, 0, magnitudes))
        np.testing.assert_array_equal(row[row > 0], expected)


def test_histogram_of_other_types_rounds_and_its_ends_take_the_rest():
    x = np.array([[1.001, -1.001, 0.0, 1e-30, 3e38, np.nan, np.inf, -np.inf]], np.float32)
    (row,) = histogram_of(x, per_tensor())
    assert row.sum() == 5 and row[0] == 2 and row[-1] == 1
    assert row[bin_magnitudes() == 1.0] == 2


def test_rows_past_the_groups_are_not_counted():
    x = values((8, 32))
    is_row = jnp.arange(8) < 5
    np.testing.assert_array_equal(histogram_of(x, is_row=is_row), histogram_of(x[:5]))


def test_counts_carry_beyond_32_bits():
    big = np.zeros((2, 1, BINS), np.uint32)
    big[0, 0, 7], big[1, 0, 7] = (1 << LOW_BITS) - 1, (1 << 20) - 1  # 2^40 - 1
    total = add_counts(jnp.asarray(big), jnp.asarray(big))
    assert total_counts(np.asarray(total))[0, 7] == 2 * (2**40 - 1)
    assert total_counts(np.stack([big] * 3).sum(0, dtype=np.uint32))[0, 7] == 3 * (2**40 - 1)


@pytest.mark.parametrize("percentile", [50, 90, 99.9, 99.99, 100])
def test_percentile_is_numpys(percentile):
    x = values()
    amax = np.array([[group.max() for group in groups_of(x)]], np.float32)
    found = percentile_amax(percentile, amax, histogram_of(x))
    expected = [np.percentile(group, percentile, method="inverted_cdf") for group in groups_of(x)]
    np.testing.assert_array_equal(found, [expected])


def test_percentile_of_an_input_that_is_mostly_zeros_is_the_amax():
    x = np.zeros((100, 1), np.float32)
    x[3] = 5.001
    amax = np.array([[5.001]], np.float32)
    np.testing.assert_array_equal(percentile_amax(90, amax, histogram_of(x)), amax)
    np.testing.assert_array_equal(percentile_amax(100, amax, histogram_of(x)), amax)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_mse_is_the_best_of_its_candidates_on_the_values_themselves(element):
    scheme = Scheme(element, block=(None, 128))
    x = values()
    amax = np.array([[group.max() for group in groups_of(x)]], np.float32)
    found = mse_amax(amax, histogram_of(x), scheme)
    for index, group in enumerate(groups_of(x)):
        errors = []
        for factor in CANDIDATES:
            # In numpy and ml_dtypes alone.
            scale = np.float32(np.float32(amax[0, index] * np.float32(factor)) * np.float32(1 / scheme.max))
            clipped = np.clip(group.astype(np.float32) * (np.float32(1) / scale), 0, np.float32(scheme.max))
            errors.append(np.mean((clipped.astype(scheme.dtype).astype(np.float64) * scale - group) ** 2))
        chosen = np.argmin(np.abs(amax[0, index] * CANDIDATES.astype(np.float32) - found[0, index]))
        assert errors[chosen] <= min(errors) * (1 + 1e-6)


def test_methods_lower_the_scale_of_heavy_tails_and_mse_the_error():
    layer = fp8x.nn.Linear(256, 32, recipe="e4m3_e4m3_bf16", rngs=nnx.Rngs(0))
    x = jnp.asarray(values((512, 256), tail=1.2))
    layers, errors = {}, {}
    for method in ("max", "percentile", "mse"):
        layers[method] = fp8x.calibrate(layer, [x[:256], x[256:]], method=method, percentile=99.9).layers[""]
        scale = jnp.asarray(layers[method].scale)
        restored = quantize_with_scale(x, scale, layer.recipe.activation).dequantize()
        errors[method] = float(jnp.mean((restored - x.astype(jnp.float32)) ** 2))
    assert layers["percentile"].scale < layers["max"].scale
    np.testing.assert_array_equal(layers["percentile"].amax, layers["max"].amax)
    assert errors["mse"] <= errors["max"] < errors["percentile"]


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
def test_a_bare_cast_stays_one(method):
    scheme = Scheme("e5m2", block=(None, None), scale_rule="unit")
    x = values((8, 32))
    amax = np.abs(x.astype(np.float32)).max(keepdims=True)
    assert find_scale(method, 99, amax, histogram_of(x, scheme), scheme).tolist() == [[1.0]]
