"""What `fp8x.calibrate` takes for batches, looked at before a model fails on something else in words of its own."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from fp8x.errors import DataError

_FITS = "give an iterable of what the model is called with, such as [ids] for one array of token ids [rows, length]"


def check_batches(batches: Any) -> None:
    """
    Raises:
        DataError: one batch, or no batches at all.
    """
    if hasattr(batches, "shape"):
        raise DataError(f"batches: an array of shape {list(batches.shape)} is one batch; {_FITS}")
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise DataError(f"batches: {_kind(batches)} does not fit; {_FITS}; fp8x.calibrate.data reads files of texts")


def arguments_of(batch: Any, number: int, vocab_size: int | None) -> tuple[Any, ...]:
    """What the model is called with: a tuple is several arguments.

    Arguments:
        number: of the batch, from 1, for messages.
        vocab_size: of a decoder, whose batches are token ids; None for other models.

    Raises:
        DataError: no arrays, or no token ids of the decoder's.
    """
    arguments = batch if isinstance(batch, tuple) else (batch,)
    leaves = jax.tree.leaves(arguments)
    scalars = (bool, int, float, complex) if isinstance(batch, tuple) else ()
    wrong = [leaf for leaf in leaves if not (_is_array(leaf) or isinstance(leaf, scalars))]
    if wrong or not leaves:
        what = f"holds {_kind(wrong[0])}" if wrong and wrong[0] is not batch else f"is {_kind(batch)}"
        raise DataError(f"batches: number {number} {what}, not an array of NumPy or JAX; {_FITS}")
    if vocab_size is not None:
        _check_ids(arguments, number, vocab_size)
    return arguments


def _check_ids(arguments: tuple[Any, ...], number: int, vocab_size: int) -> None:
    ids = arguments[0]
    if len(arguments) > 1 or not hasattr(ids, "shape"):
        what = f"{len(arguments)} arguments" if len(arguments) > 1 else _kind(ids)
        raise DataError(f"batches: number {number} is {what}, but a decoder takes token ids [rows, length] alone")
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            f"batches: number {number} is {list(ids.shape)} of {ids.dtype}, but a decoder takes token ids "
            "[rows, length] of integers"
        )
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return  # other processes have some
    values = np.asarray(ids)
    if values.size and not 0 <= values.min() <= values.max() < vocab_size:
        wrong = values.min() if values.min() < 0 else values.max()
        raise DataError(
            f"batches: number {number} holds token id {wrong}, but the model's are 0 to {vocab_size - 1}; are the ids, "
            "or the tokenizer, another model's?"
        )


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array) or hasattr(leaf, "__jax_array__")


def _kind(value: Any) -> str:
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}" + (f" of {value.dtype}" if isinstance(value, np.ndarray) else "")
