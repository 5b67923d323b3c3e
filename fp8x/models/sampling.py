"""The choice of the next token: the likeliest, or drawn from what temperature, top-k, top-p and min-p leave."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int32, UInt32


class Sampling(NamedTuple):
    """How tokens are drawn. All of it may change without compiling anew, but for what is None.

    Attributes:
        temperature: what logits are divided by; None takes the likeliest token, and nothing is drawn.
        top_p, min_p: as `warp` takes them.
        seed: of each text.
        stream: of each text, its number among those that share its seed.
    """

    temperature: Float32[Array, ""] | None
    top_p: Float32[Array, ""] | None
    min_p: Float32[Array, ""] | None
    seed: UInt32[Array, " b"]
    stream: UInt32[Array, " b"]


def choose(
    logits: Float32[Array, "b vocab"], sampling: Sampling, top_k: int | None, step: Int[Array, ""]
) -> Int32[Array, " b"]:
    """The next token of each text. A draw depends on the text's seed and stream and on `step`, not on other texts."""
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(seed, stream, logits):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)
        return jax.random.categorical(key, logits)

    logits = warp(logits, sampling.temperature, top_k, sampling.top_p, sampling.min_p)
    return jax.vmap(draw)(sampling.seed, sampling.stream, logits).astype(jnp.int32)


def warp(
    logits: Float32[Array, "b vocab"],
    temperature: Float32[Array, ""],
    top_k: int | None,
    top_p: Float32[Array, ""] | None,
    min_p: Float32[Array, ""] | None,
) -> Float32[Array, "b vocab"]:
    """Logits to draw from, -inf for tokens that are left out, in the order and meaning of transformers' warpers.

    Arguments:
        temperature: what logits are divided by.
        top_k: keeps the k likeliest tokens, and those as likely as the last of them.
        top_p: keeps the smallest set of likeliest tokens whose probabilities add up to it; one token at least.
        min_p: keeps tokens that are at least this many times as likely as the likeliest.
    """
    # From the likeliest down: a low temperature takes none to infinity.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        # Summed from the least likely on, as transformers does: the sum is small where it is compared.
        order = jnp.argsort(logits, axis=-1)
        ascending = jnp.take_along_axis(logits, order, axis=-1)
        is_left_out = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
        ascending = jnp.where(is_left_out.at[:, -1].set(False), -jnp.inf, ascending)
        logits = jnp.put_along_axis(logits, order, ascending, axis=-1, inplace=False)
    if min_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(probabilities < min_p * probabilities.max(axis=-1, keepdims=True), -jnp.inf, logits)
    return logits
