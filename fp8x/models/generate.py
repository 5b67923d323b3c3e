"""`generate`: continue prompts, greedily or by sampling, in one compiled function."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, Key

from fp8x.errors import DataError
from fp8x.models.decoder import Decoder
from fp8x.nn.convert import check_calibrated


def generate(
    model: Decoder,
    ids: Int[Array, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    seed: int = 0,
) -> Int32[Array, "b t_and_new"]:
    """Prompts with `max_new_tokens` more tokens each.

    Prefill and decoding are one compiled function with the keys and values of what was read in a cache. It is compiled
    once for each shape of prompt, `max_new_tokens` and `top_k`; `temperature`, `eos_id` and `seed` may change freely.

    Arguments:
        model: the decoder.
        ids: prompts of one length, `[B, T]`.
        max_new_tokens: tokens to add.
        temperature: 0 takes the most likely token; otherwise tokens are drawn from `softmax(logits / temperature)`.
        top_k: draw among the k most likely tokens only.
        eos_id: tokens that end a text, such as `model.config.eos_token_id`; what follows one is filled with the first
            of them. By default none does.
        seed: of the draws.

    Raises:
        DataError: an empty prompt, token ids outside the vocabulary, or an option out of range.
        CalibrationError: a layer's static activation scale is missing, or the layer is in calibration.
    """
    vocab_size = model.config.vocab_size
    prompt = _check_ids("ids", ids, vocab_size)
    if prompt.ndim != 2 or not prompt.size:
        raise DataError(f"ids: shape is {list(prompt.shape)}; give at least one prompt of at least one token as [B, T]")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens: {max_new_tokens} does not fit; use 1 or more")
    if not 0 <= temperature < float("inf"):
        raise DataError(f"temperature: {temperature} does not fit; use 0 for greedy decoding, or a positive number")
    if top_k is not None and top_k < 1:
        raise DataError(f"top_k: {top_k} does not fit; use 1 or more, or None for all tokens")
    ends = _check_ids("eos_id", () if eos_id is None else eos_id, vocab_size).reshape(-1)
    check_calibrated(model)
    graphdef, state = nnx.split(model)
    return _generate(
        graphdef,
        state,
        prompt,
        temperature=temperature or None,
        ends=ends,
        key=jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        top_k=None if top_k is None else min(top_k, vocab_size),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "top_k"))
def _generate(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    prompt: Int32[Array, "b t"],
    *,
    temperature: Float[Array, ""] | None,
    ends: Int32[Array, " n"],
    key: Key[Array, ""],
    max_new_tokens: int,
    top_k: int | None,
) -> Int32[Array, "b t_and_new"]:
    model = nnx.merge(graphdef, state)
    batch, length = prompt.shape
    capacity = length + max_new_tokens

    def choose(hidden: Float[Array, "b hidden"], step: Int[Array, ""]) -> Int32[Array, " b"]:
        return _choose(model.logits(hidden), temperature, top_k, jax.random.fold_in(key, step))

    def is_unfinished(carry) -> Array:
        step, _, _, done, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def decode(carry):
        step, texts, last, done, cache = carry
        hidden, cache = model.extend(last[:, None], cache)
        new = choose(hidden[:, 0], step)
        new = jnp.where(done, filler, new)
        texts = jax.lax.dynamic_update_slice_in_dim(texts, new[:, None], length + step, axis=1)
        return step + 1, texts, new, done | jnp.isin(new, ends), cache

    hidden, cache = model.extend(prompt, model.init_cache(batch, capacity))
    first = choose(hidden[:, -1], jnp.int32(0))
    filler = ends[0] if ends.size else jnp.int32(0)
    texts = jnp.full((batch, capacity), filler, jnp.int32)
    texts = texts.at[:, :length].set(prompt).at[:, length].set(first)
    carry = (jnp.int32(1), texts, first, jnp.isin(first, ends), cache)
    return jax.lax.while_loop(is_unfinished, decode, carry)[1]


def _choose(
    logits: Float32[Array, "b vocab"], temperature: Float[Array, ""] | None, top_k: int | None, key: Key[Array, ""]
) -> Int32[Array, " b"]:
    """The next token of each text: the most likely without a temperature, else drawn from the `top_k` most likely."""
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def _check_ids(name: str, ids, vocab_size: int) -> Int32[np.ndarray, "..."]:
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise DataError(f"{name}: rows have different lengths; give prompts of one length as [B, T]") from error
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name}: dtype is {array.dtype}; token ids are integers")
    if bad := array[(array < 0) | (array >= vocab_size)].tolist():
        raise DataError(f"{name}: {bad[0]} is outside the model's vocabulary; use 0 to {vocab_size - 1}")
    return array.astype(np.int32)
