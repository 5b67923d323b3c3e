"""NaN and Inf in a tensor's bytes, by comparing bits.

XLA's `isfinite` takes 0.25 GB/s of float8 on a core, numpy's two maxima 25 GB/s of what lies in cache. Magnitudes
compare like their bits, so a tensor is finite if its largest positive and its largest negative number are.
"""

from pathlib import Path

import numpy as np

from fp8x.checkpoint.header import DTYPES
from fp8x.errors import CheckpointError

CHUNK_BYTES = 1 << 20  # stays in cache between the two maxima

# By safetensors' names: bytes of a number, and the bits of Inf, or of NaN where the type has no Inf.
_FNUZ = ("F8_E4M3FNUZ", "F8_E5M2FNUZ")  # whose one NaN is where others have -0
_FIRST_NONFINITE = {
    "F64": (8, 0x7FF0 << 48),
    "F32": (4, 0x7F80 << 16),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
    "F8_E8M0": (1, 0xFF),  # has no sign
}


def is_finite(data: np.ndarray, dtype: str) -> bool:
    """Whether a tensor's values, or their bytes, are without NaN and Inf, as are all types that are no floats.

    Arguments:
        data: of any shape, in the type `dtype` or in uint8.
        dtype: by safetensors' name.
    """
    if dtype in _FNUZ:
        return not count_nonfinite(data, dtype)
    if dtype not in _FIRST_NONFINITE:
        return True
    size, first = _FIRST_NONFINITE[dtype]
    if not data.flags.c_contiguous:
        return not count_nonfinite(data, dtype)
    bits, sign, step = data.reshape(-1).view(f"u{size}"), 1 << (8 * size - 1), CHUNK_BYTES // size
    for start in range(0, bits.size, step):
        part = bits[start : start + step]
        # Of unsigned numbers those with the sign bit are the largest, of signed ones those without it.
        if part.max() >= first | sign or (first < sign and part.view(f"i{size}").max() >= first):
            return False
    return True


def extent(data: np.ndarray, dtype: str) -> tuple[float, int]:
    """The largest finite magnitude, and how many NaN and Inf there are, of a type that `is_finite` knows."""
    size, first = _FIRST_NONFINITE[dtype]
    bits = data.reshape(-1).view(f"u{size}")
    # Of negative and of positive numbers, as in `is_finite`.
    largest = max(int(bits.max(initial=0)) - (1 << (8 * size - 1)), int(bits.view(f"i{size}").max(initial=0)), 0)
    count = 0
    if largest >= first:
        magnitudes = bits & bits.dtype.type(2 ** (8 * size - 1) - 1)
        is_finite = magnitudes < first
        count, largest = int((~is_finite).sum()), int(magnitudes.max(initial=0, where=is_finite))
    return float(np.array(largest, bits.dtype).view(DTYPES[dtype])), count


def count_nonfinite(data: np.ndarray, dtype: str) -> int:
    """How many NaN and Inf there are; arguments as of `is_finite`."""
    if dtype in _FNUZ:
        return int((data.view(np.uint8) == 0x80).sum())
    if dtype not in _FIRST_NONFINITE:
        return 0
    size, first = _FIRST_NONFINITE[dtype]
    bits = data.view(f"u{size}")
    is_signed = first < 1 << (8 * size - 1)
    return int(((bits & (2 ** (8 * size - is_signed) - 1)) >= first).sum())


def check_overflow(name: str, file: Path, data: np.ndarray, dtype: str) -> None:
    """Raises for what has become Inf, or NaN, in a type: finite values beyond its largest number."""
    if not is_finite(data, dtype):
        raise CheckpointError(
            f"{name} in {file}: {count_nonfinite(data, dtype)} values or more are beyond the largest number of "
            f"{dtype}; leave it in 8 bits, or pass allow_nonfinite=True (--allow-nonfinite)"
        )


def nonfinite_error(name: str, file: Path, count: int, size: int) -> CheckpointError:
    return CheckpointError(
        f"{name} in {file}: holds {count} NaN or Inf of {size} values; "
        "mend the checkpoint, or pass allow_nonfinite=True (--allow-nonfinite)"
    )
