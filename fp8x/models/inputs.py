"""What a decoder is called with, checked before anything is computed."""

import jax
import numpy as np
from jaxtyping import Array, Int

from fp8x.errors import DataError
from fp8x.models.kv_cache import Cache


def check_context(name: str, tokens: int, context: int | None) -> None:
    """Raises DataError where `tokens` are more than a decoder reads: `DecoderConfig.context`, None for no limit."""
    if context is not None and tokens > context:
        raise DataError(f"{name}: {tokens} tokens, but {_limit(context)}; {_way_out(tokens)}")


def check_length(prompt: int, max_new_tokens: int, context: int | None) -> None:
    """`check_context` of a prompt's length and the tokens to come."""
    length = prompt + max_new_tokens
    if context is None or length <= context:
        return
    fits = f"use {context - prompt} at most" if prompt < context else "give a shorter prompt"
    raise DataError(
        f"max_new_tokens: {max_new_tokens} after a prompt of {prompt} tokens are {length}, but {_limit(context)}; "
        f"{fits}; {_way_out(length)}"
    )


def _limit(context: int) -> str:
    return f"the model's context is {context}, by its config.json or set_context"


def _way_out(tokens: int) -> str:
    return f"to go beyond it, say so with model.set_context({tokens}), or --context {tokens} of a command"


def check_room(ids: Int[Array, "b t"], cache: Cache) -> None:
    """Raises DataError where `cache` is of other texts than `ids`, or lacks room for them, as far as that is known."""
    batch, capacity = cache.layers[0].keys.shape[:2]
    if ids.shape[0] != batch:
        raise DataError(f"cache: it is of {batch} texts, but ids are of {ids.shape[0]}")
    taken = int(np.max(cache.length, initial=0)) if is_known(cache.length) else 0
    if taken + ids.shape[1] > capacity:
        raise DataError(
            f"cache: it has room for {capacity} tokens, of which {taken} are taken, and ids are {ids.shape[1]} more; "
            f"make one with init_cache({batch}, {taken + ids.shape[1]})"
        )


def is_known(x: Array | np.ndarray) -> bool:
    """Whether the values of `x` can be looked at: not while compiling, nor where other processes hold some."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
