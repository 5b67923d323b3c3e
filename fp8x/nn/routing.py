"""Routing: which experts a token visits with which weights, and its rows sorted by expert. Pure functions.

Every shape is static and nothing waits for the host, so that a decoding step can be one CUDA graph.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fp8x.errors import ShapeError

Scores = Literal["softmax", "sigmoid"]

SCORES = {"softmax": lambda logits: jax.nn.softmax(logits, axis=-1), "sigmoid": jax.nn.sigmoid}


def check_scores(scores: str) -> Scores:
    """The name of a score function, as it came.

    Raises:
        ShapeError: an unknown one.
    """
    if scores not in SCORES:
        raise ShapeError(f"scores: {scores!r} is unknown; use one of {', '.join(map(repr, SCORES))}")
    return scores


def choose_experts(
    logits: Float[Array, "t e"],
    top_k: int,
    *,
    scores: Scores = "softmax",
    bias: Float[Array, " e"] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_best: int = 1,
) -> tuple[Float[Array, "t k"], Int[Array, "t k"]]:
    """Weights and experts of every token, in float32: the `top_k` highest scores, of equal ones the first.

    Arguments:
        logits: the router's.
        scores: softmax over the experts (Mixtral, Qwen3-MoE), or a sigmoid each (DeepSeek-V3). Softmax over the chosen
            experts alone (gpt-oss) is that over all with `normalize`.
        bias: is added to the scores to choose by, and enters no weight: DeepSeek-V3's `e_score_correction_bias`
            (arXiv:2412.19437, section 2.1.2).
        normalize: whether a token's weights are scaled to sum to one; all zero stay zero.
        scale: a factor on them after that: DeepSeek-V3's `routed_scaling_factor`.
        groups: how many groups of equal size the experts are in, one after another.
        top_groups: a token's experts are of so many of them, those with the highest sum of their `group_best` highest
            scores (DeepSeek-V2 takes the highest score, V3 the sum of two with the bias added).
    """
    values = SCORES[scores](logits.astype(jnp.float32))
    if bias is None and top_groups == groups:
        weights, experts = jax.lax.top_k(values, top_k)
    else:
        biased = values if bias is None else values + bias.astype(jnp.float32)
        _, experts = jax.lax.top_k(_limited(biased, groups, top_groups, group_best), top_k)
        weights = jnp.take_along_axis(values, experts, axis=-1)
    if normalize:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + np.float32(1e-20)
    return (weights if scale == 1.0 else weights * scale), experts


def _limited(values: Float[Array, "t e"], groups: int, top_groups: int, best: int) -> Float[Array, "t e"]:
    """The scores, minus infinity outside of a token's best groups."""
    if top_groups == groups:
        return values
    grouped = values.reshape(*values.shape[:-1], groups, values.shape[-1] // groups)
    _, chosen = jax.lax.top_k(jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1), top_groups)
    is_chosen = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(values.shape)


class Order(NamedTuple):
    """Rows sorted by expert, and in their own order within one.

    Attributes:
        source: of every sorted row, the row that it was.
        row: of every row, where it went: the inverse permutation.
        group_sizes: the rows of each expert.
    """

    source: Int[Array, " r"]
    row: Int[Array, " r"]
    group_sizes: Int[Array, " e"]


# Up to so many rows are sorted by comparing all with all: 64 tokens of 8 experts. For a GPU that is 2 kernels, where
# sorting and scattering are 7, and a decoding step consists of little else. On CPU it costs 0.1 ms more at the bound.
MAX_COMPARED = 512


def sort_by_expert(experts: Int[Array, " r"], num_experts: int) -> Order:
    """A stable sort of rows by their experts. Rows of `num_experts` come last, and no group has them."""
    if experts.shape[0] <= MAX_COMPARED:
        return _sort_by_comparing(experts, num_experts)
    source = jnp.argsort(experts, stable=True).astype(jnp.int32)
    index = jnp.arange(experts.shape[0], dtype=jnp.int32)
    row = jnp.zeros_like(index).at[source].set(index, unique_indices=True)
    group_sizes = jnp.zeros(num_experts, jnp.int32).at[experts].add(1, mode="drop")
    return Order(source, row, group_sizes)


def _sort_by_comparing(experts: Int[Array, " r"], num_experts: int) -> Order:
    index = jnp.arange(experts.shape[0], dtype=jnp.int32)
    key = experts * experts.shape[0] + index
    row = jnp.sum(key < key[:, None], axis=1, dtype=jnp.int32)
    source = jnp.sum(jnp.where(row == index[:, None], index, 0), axis=1, dtype=jnp.int32)
    group_sizes = jnp.sum(experts == jnp.arange(num_experts)[:, None], axis=1, dtype=jnp.int32)
    return Order(source, row, group_sizes)
