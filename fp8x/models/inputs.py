"""What a decoder is called with, checked before anything is computed."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Int32

from fp8x.errors import DataError
from fp8x.models.kv_cache import Cache
from fp8x.ops.groups import concrete

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_ids(name: str, ids: ArrayLike | Sequence, vocab_size: int) -> Int32[np.ndarray, "..."]:
    """Token ids of any shape, as numpy has them.

    Raises:
        DataError: they are no integers, or one is outside the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError:
        raise DataError(f"{name}: is no list of token ids") from None
    if array.size:  # an empty list is float64
        _check_type(name, array)
    _check_range(name, array, vocab_size)
    return array.astype(np.int32)


def check_ids(name: str, ids: Int[Array, "b t"], vocab_size: int) -> None:
    """Raises DataError unless `ids` are integers `[B, T]` and, where their values are known, in the vocabulary."""
    if not isinstance(ids, np.ndarray | jax.Array):
        raise DataError(f"{name}: is of type {type(ids).__name__}; give an array [B, T], such as np.array([[1, 2, 3]])")
    if ids.ndim != 2:
        one = ", for one text ids[None]" if ids.ndim == 1 else ""
        raise DataError(f"{name}: shape is {list(ids.shape)}; give [B, T]{one}")
    _check_type(name, ids)
    if (values := concrete(ids)) is not None:
        _check_range(name, values, vocab_size)


def _check_type(name: str, ids: Array | np.ndarray) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{name}: dtype is {ids.dtype}; token ids are integers")


def _check_range(name: str, ids: np.ndarray, vocab_size: int) -> None:
    if not ids.size or (ids.min() >= 0 and ids.max() < vocab_size):
        return
    place = np.argwhere((ids < 0) | (ids >= vocab_size))[0].tolist()
    raise DataError(
        f"{name}{place or ''}: {ids[tuple(place)]} is outside the model's vocabulary of {vocab_size}; use 0 to "
        f"{vocab_size - 1}"
    )


def check_tokens(source: str, ids: Iterable[int], tokenizer: "Tokenizer", vocab_size: int) -> None:
    """Raises DataError where `source` gives tokens that the model does not have, such as added ones."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        token = tokenizer.id_to_token(int(largest))
        raise DataError(
            f"{source}: gives token id {largest}{f' ({token!r})' if token else ''}, beyond the model's vocab_size "
            f"{vocab_size}; use the tokenizer of this model, without tokens that were added to it"
        )


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
    lengths = concrete(cache.length)
    taken = 0 if lengths is None else int(np.max(lengths, initial=0))
    if taken + ids.shape[1] > capacity:
        raise DataError(
            f"cache: it has room for {capacity} tokens, of which {taken} are taken, and ids are {ids.shape[1]} more; "
            f"make one with init_cache({batch}, {taken + ids.shape[1]})"
        )
