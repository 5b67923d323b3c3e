"""From statistics to scales: `max`, `percentile` and `mse`. docs/calibration.md says when each pays."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int64

from fp8x import numerics
from fp8x.calibrate.report import Method
from fp8x.errors import CalibrationError
from fp8x.nn.observer import bin_magnitudes
from fp8x.scheme import Scheme

METHODS: tuple[Method, ...] = ("max", "percentile", "mse")
DEFAULT_PERCENTILE = 99.99

# Multiples of the amax that `mse` tries: a sixteenth of an octave apart, from half an octave above to six below.
CANDIDATES = 2.0 ** (-np.arange(-8, 97) / 16)


def check_method(method: str, percentile: float) -> None:
    """
    Raises:
        CalibrationError: an unknown method, or a percentile that is not in (1, 100].
    """
    if method not in METHODS:
        raise CalibrationError(f"method: {method!r} is unknown; use one of {', '.join(map(repr, METHODS))}")
    if not 1 < percentile <= 100:  # a fraction, which would clip nearly all, is more likely a mistake
        raise CalibrationError(f"percentile: {percentile} does not fit; of a hundred, use one up to 100, like 99.99")


def find_scale(
    method: Method,
    percentile: float,
    amax: Float32[np.ndarray, "1 groups"],
    counts: Int64[np.ndarray, "groups bins"] | None,
    scheme: Scheme,
) -> Float32[np.ndarray, "1 groups"]:
    """The static scale of each group of K; `counts` is its histogram (None for `max`)."""
    if method == "percentile":
        amax = percentile_amax(percentile, amax, counts)
    elif method == "mse":
        amax = mse_amax(amax, counts, scheme)
    return np.asarray(numerics.compute_scale(jnp.asarray(amax), scheme))


def percentile_amax(
    percentile: float, amax: Float32[np.ndarray, "1 groups"], counts: Int64[np.ndarray, "groups bins"]
) -> Float32[np.ndarray, "1 groups"]:
    """The smallest magnitude that `percentile` of a hundred values do not exceed (numpy's `inverted_cdf`), by group.

    Values are counted as bfloat16, zeros too. Where the answer is zero, as in an input that is mostly zeros, the amax
    stays: a scale of nothing would clip all the rest.
    """
    found = amax.copy()
    for group, (limit, row) in enumerate(zip(amax[0], counts)):
        total = int(row.sum())
        # Exact: 99.9 % of 1000 is the 999th, not what binary fractions make of it.
        rank = math.ceil(Fraction(str(percentile)) * total / 100)
        if 0 < rank < total:
            value = bin_magnitudes()[np.searchsorted(np.cumsum(row), rank)]
            found[0, group] = min(value, limit) or limit
    return found


def mse_amax(
    amax: Float32[np.ndarray, "1 groups"], counts: Int64[np.ndarray, "groups bins"], scheme: Scheme
) -> Float32[np.ndarray, "1 groups"]:
    """The amax, among `CANDIDATES` times what was seen, whose scale makes the mean squared error smallest, by group.

    The error is that of `numerics.quantize` on the values as counted: of rounding, of what falls to zero, and of what
    is clipped. The first of equals wins, so that a scale which clips has to be better.
    """
    magnitudes = bin_magnitudes().astype(np.float32)
    best, least = amax.copy(), np.full(amax.shape[1], np.inf)
    order = np.argsort(np.abs(np.log2(CANDIDATES)), kind="stable")
    for factor in CANDIDATES[order]:
        tried = (amax * np.float32(factor)).astype(np.float32)
        restored = np.asarray(_restored(magnitudes, tried[0], scheme), np.float64)
        errors = (counts * (restored - magnitudes) ** 2).sum(axis=1)
        is_better = errors < least
        best[0, is_better], least[is_better] = tried[0, is_better], errors[is_better]
    return best


def _restored(
    magnitudes: Float[np.ndarray, " bins"], amax: Float[np.ndarray, " groups"], scheme: Scheme
) -> Float[np.ndarray, "groups bins"]:
    """The magnitudes, quantized with each group's scale and dequantized."""
    rows = Scheme(scheme.element, block=(1, None), scale_rule=scheme.scale_rule)
    return _round_trip(jnp.broadcast_to(magnitudes, (len(amax), len(magnitudes))), jnp.asarray(amax)[:, None], rows)


@jax.jit(static_argnums=2)
def _round_trip(x, amax, scheme):
    return numerics.quantize_with_scale(x, numerics.compute_scale(amax, scheme), scheme).dequantize()
