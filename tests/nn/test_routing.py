"""Which experts a token visits, and its rows sorted by them: against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8x.nn import routing
from fp8x.nn.routing import choose_experts, sort_by_expert

LOGITS = np.random.default_rng(0).normal(size=(33, 16)).astype(np.float32)
BIAS = np.linspace(-1, 1, 16, dtype=np.float32)
sort = jax.jit(sort_by_expert, static_argnums=1)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(normalize=False, scale=2.5),
        dict(scores="sigmoid"),
        dict(scores="sigmoid", bias=BIAS, scale=2.5),
        dict(bias=BIAS, normalize=False),
    ],
    ids=str,
)
def test_chosen_experts_and_their_weights(options):
    weights, experts = choose_experts(jnp.asarray(LOGITS), 4, **options)
    logits = LOGITS.astype(np.float64)
    values = 1 / (1 + np.exp(-logits))
    if options.get("scores") != "sigmoid":
        values = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-(values + options.get("bias", 0.0)), axis=-1, kind="stable")[:, :4]
    np.testing.assert_array_equal(experts, chosen)
    expected = np.take_along_axis(values, chosen, -1)
    if options.get("normalize", True):
        expected /= expected.sum(-1, keepdims=True)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, expected * options.get("scale", 1.0), rtol=2e-6)


def test_of_equal_scores_the_first_and_no_weight_is_nan():
    weights, experts = choose_experts(jnp.full((2, 8), -1e4), 3, scores="sigmoid")
    assert experts.tolist() == [[0, 1, 2]] * 2 and not weights.any()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.sampled_from([1, 8, 96, 600]), experts=st.sampled_from([1, 5, 256]))
def test_a_stable_sort(data, rows, experts):
    """Any experts, among them those of rows that are on another device; by comparing, and by sorting."""
    assert rows == 600 or rows <= routing.MAX_COMPARED < 600
    seed, used = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(1, experts + 1))
    drawn = np.random.default_rng(seed).choice(experts + 1, used, replace=False)
    of_rows = np.random.default_rng(seed).choice(drawn, rows).astype(np.int32)
    source, row, group_sizes = sort(of_rows, experts)
    expected = np.argsort(of_rows, kind="stable")
    np.testing.assert_array_equal(source, expected)
    np.testing.assert_array_equal(row, np.argsort(expected))
    np.testing.assert_array_equal(group_sizes, np.bincount(of_rows, minlength=experts + 1)[:experts])


def test_no_rows():
    source, row, group_sizes = sort(np.zeros(0, np.int32), 4)
    assert source.shape == row.shape == (0,) and group_sizes.tolist() == [0] * 4
