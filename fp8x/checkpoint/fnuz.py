"""Matrices in e4m3fnuz, AMD's type on MI300, as e4m3fn: exactly wherever that is possible.

    byte         e4m3fnuz                       e4m3fn
    0x00..0x7E   half the value of e4m3fn       up to 448
    0x7F, 0xFF   240, -240                      NaN
    0x80         NaN                            -0

So a block of scales keeps its bytes and gets half its scale: what vLLM's `normalize_e4m3fn_to_e4m3fnuz` does, the other
way. A block that holds ±240 can't, nor can one whose half scale would be subnormal: there the values go into e4m3fn and
the scale stays. e4m3fn has them all but odd multiples of 2^-10 below 2^-6, which are rounded to nearest even with a
warning. Static activation scales stay too: e4m3fn holds whatever e4m3fnuz does, in the same steps from 2^-6 on.

Types: https://onnx.ai/onnx/technical/float8.html.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from fp8x.checkpoint.block_reduce import reduce_blocks
from fp8x.checkpoint.header import DTYPES
from fp8x.checkpoint.reader import Slices
from fp8x.scheme import MIN_SCALE, Scheme

E4M3FN, E4M3FNUZ = DTYPES["F8_E4M3"], DTYPES["F8_E4M3FNUZ"]
CHUNK_BYTES = 1 << 22

_BYTES = np.arange(256, dtype=np.uint8)
_VALUES = _BYTES.view(E4M3FNUZ).astype(np.float32)
# Of each byte: the byte with twice its value, and the byte with its own. NaN is NaN.
_DOUBLED = np.where(_BYTES == 0x80, 0x7F, _BYTES).astype(np.uint8)
_SAME = _VALUES.astype(E4M3FN).view(np.uint8)
_IS_ROUNDED = np.isfinite(_VALUES) & (_SAME.view(E4M3FN).astype(np.float32) != _VALUES)


@dataclasses.dataclass(frozen=True)
class Translation:
    """How the bytes of one matrix `[N, K]` become e4m3fn.

    Attributes:
        by_value: whether a block keeps its values rather than its bytes, `[R, C]` as the scales are.
        block: rows and columns of a block.
    """

    by_value: Bool[np.ndarray, "r c"]
    block: tuple[int, int]

    def rows(self, rows: slice, codes: np.ndarray) -> np.ndarray:
        """Some rows of the matrix in e4m3fn: a new array. `rows` are whole blocks, or end with the matrix or beyond."""
        codes = codes.view(np.uint8)
        doubled = np.take(_DOUBLED, codes)
        if self.by_value.any():
            wide = self._wide(rows.start // self.block[0], codes.shape)
            doubled = np.where(wide, np.take(_SAME, codes), doubled)
        return doubled.view(E4M3FN)

    def _wide(self, first: int, shape: tuple[int, int]) -> Bool[np.ndarray, "n k"]:
        """`by_value` for every element of some rows, from block `first` on."""
        (rows, columns), (n, k) = self.block, shape
        blocks = self.by_value[first : first + math.ceil(n / rows)]
        # Rows beyond the end hold zeros, which both ways are.
        blocks = np.pad(blocks, ((0, math.ceil(n / rows) - len(blocks)), (0, 0)))
        return blocks.repeat(rows, 0)[:n].repeat(columns, 1)[:, :k]


def translation(codes: Slices, scale: np.ndarray, scheme: Scheme, name: str) -> tuple[Translation, np.ndarray]:
    """How a matrix `[N, K]` in e4m3fnuz becomes e4m3fn, and the scales that it has there.

    Reads all of `codes`, at most twice, some rows at a time. Warns of elements that have to be rounded.

    Arguments:
        scale: of the scheme, `[R, C]`, float32 or float8_e8m0fnu.
        name: the matrix's, for the warning.
    """
    (n, k), rounded = codes.shape, 0
    result = Translation(~_can_be_halved(scale), scheme.block_of((n, k)))
    parts = list(_row_blocks(result.block[0], n, k)) if n * k else []
    for first, rows in parts:
        found = reduce_blocks(np.logical_or, (codes[rows, :].view(np.uint8) & 0x7F) == 0x7F, result.block)
        result.by_value[first : first + len(found)] |= found
    for first, rows in parts if result.by_value.any() else ():
        part = codes[rows, :].view(np.uint8)
        rounded += int((np.take(_IS_ROUNDED, part) & result._wide(first, part.shape)).sum())
    if rounded:
        warnings.warn(
            f"{name}: {rounded} of {n * k} values in e4m3fnuz lie between two of e4m3fn, in blocks whose largest "
            "value lets no scale be halved; they are rounded to nearest even",
            stacklevel=4,
        )
    return result, _halved(scale, ~result.by_value)


def _halved(scale: np.ndarray, where: Bool[np.ndarray, "r c"]) -> np.ndarray:
    """Half of some of the scales."""
    if scale.dtype == np.float32:
        return np.where(where, scale * np.float32(0.5), scale)
    return (scale.view(np.uint8) - where.astype(np.uint8)).view(scale.dtype)


def _can_be_halved(scale: np.ndarray) -> Bool[np.ndarray, "r c"]:
    if scale.dtype == np.float32:
        return (scale == 0) | (scale >= 2 * MIN_SCALE)
    return scale.view(np.uint8) > 0


def _row_blocks(block_rows: int, n: int, k: int) -> Iterator[tuple[int, slice]]:
    """Rows at a time, in whole blocks (or in part of one that holds all rows), and the first block among them."""
    step = max(1, CHUNK_BYTES // max(k, 1))
    step = step // block_rows * block_rows or (step if block_rows >= n else block_rows)
    return ((start // block_rows, slice(start, min(start + step, n))) for start in range(0, n, step))
