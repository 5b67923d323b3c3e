"""What `fp8x.calibrate` takes for batches, looked at before a model fails on something else in words of its own."""

import math
from collections.abc import Callable, Iterable, Mapping
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


def arguments_of(batch: Any, name: str, check: Callable[[Any, str], None] | None) -> tuple[Any, ...]:
    """What the model is called with: a tuple is several arguments.

    Arguments:
        name: of the batch, for messages.
        check: `Decoder.check_ids`, where the model is a decoder: a compiled step can't look at what it reads.

    Raises:
        DataError: no arrays, or not what a decoder reads.
    """
    arguments = batch if isinstance(batch, tuple) else (batch,)
    leaves = jax.tree.leaves(arguments)
    scalars = (bool, int, float, complex) if isinstance(batch, tuple) else ()
    wrong = [leaf for leaf in leaves if not (_is_array(leaf) or isinstance(leaf, scalars))]
    if wrong or not leaves:
        what = f"holds {_kind(wrong[0])}" if wrong and wrong[0] is not batch else f"is {_kind(batch)}"
        raise DataError(f"{name}: {what}, not an array of NumPy or JAX; {_FITS}")
    arrays = [leaf for leaf in leaves if hasattr(leaf, "shape")]
    if arrays and not any(math.prod(leaf.shape) for leaf in arrays):
        raise DataError(f"{name}: shape is {list(arrays[0].shape)}, which holds nothing; leave empty batches out")
    if check is not None:
        if len(arguments) > 1:
            raise DataError(
                f"{name}: is {len(arguments)} arguments, but a decoder takes token ids [rows, length] alone"
            )
        check(arguments[0], name)
    return arguments


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array) or hasattr(leaf, "__jax_array__")


def _kind(value: Any) -> str:
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}" + (f" of {value.dtype}" if isinstance(value, np.ndarray) else "")
