"""MXFP4: matrices whose elements are e2m1, as MXFP8 with the same values.

e2m1, the 4-bit floats of MXFP4 (OCP Microscaling Formats v1.0, section 5.3.3), in and out of e4m3, which has them all.

    code          0   1    2   3    4   5   6   7       8 … 15
    value         0   0.5  1   1.5  2   3   4   6       the same, negative
    e4m3's byte   00  30   38  3C   40  44  48  4C      80, B0 … CC

Two codes are in a byte, the first in its low half. Tables are indexed by two bytes: 5 GB/s of e4m3 on a core.

A block of MXFP4 has the 32 elements and the e8m0 scale of one of MXFP8. It is stored as

    tensors                                             by
    X_blocks   U8 [E, N, K/32, 16]  X_scales      U8 [E, N, K/32]            gpt-oss (experts.gate_up_proj, …)
    X.weight_packed   U8 [N, K/2]   X.weight_scale       U8 [N, K/32]        compressed-tensors
    X.weight   I8, U8 [N, K/2], F4  X.scale, X.weight_scale(_inv)  F8_E8M0, U8 [N, K/32]   DeepSeek-V4, Quark

and appears as X_blocks `[E, N, K]`, and X.weight `[N, K]`, in F8_E4M3. Experts of the last kind may be in one tensor.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8, UInt16

from fp8x.checkpoint.header import View
from fp8x.errors import CheckpointError

if TYPE_CHECKING:
    from fp8x.checkpoint.header import Stored

MXFP4 = "mxfp4"  # in tables
BLOCK = 32
PIECE = 1 << 16  # indices at a time, which numpy widens to 8 bytes each
E8M0 = ("U8", "F8_E8M0")

E4M3_OF_E2M1 = np.array([0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C], np.uint8)
E4M3_OF_E2M1 = np.concatenate([E4M3_OF_E2M1, E4M3_OF_E2M1 | 0x80])

_PAIRS = E4M3_OF_E2M1[np.arange(256) & 15].astype(np.uint16) | E4M3_OF_E2M1[np.arange(256) >> 4].astype(np.uint16) << 8
_QUADS = _PAIRS[np.arange(2**16) & 255].astype(np.uint32) | _PAIRS[np.arange(2**16) >> 8].astype(np.uint32) << 16


def unpack(packed: UInt8[np.ndarray, "n k/2"], out: UInt8[np.ndarray, "n k"]) -> None:
    """The bytes of e4m3 with the values of e2m1 codes, two a byte; `out` is contiguous."""
    packed, out = np.ascontiguousarray(packed).reshape(-1), out.reshape(-1)
    if packed.size % 2:
        np.take(_PAIRS, packed, out=out.view(np.uint16), mode="clip")
        return
    index, out = packed.view(np.uint16), out.view(np.uint32)
    for part in (slice(start, start + PIECE) for start in range(0, index.size, PIECE)):
        np.take(_QUADS, index[part], out=out[part], mode="clip")


def warn_of_activations(stated: str) -> None:
    """Warns of activations in MXFP4, which fp8x has not; `stated` says where it stands."""
    warnings.warn(
        f"{stated}: activations in 4 bits there; fp8x quantizes them in MXFP8, which loses less", stacklevel=7
    )


def _packing() -> UInt16[np.ndarray, " 65536"]:
    """By two bytes of e4m3: the byte of e2m1, and 256 times how many of the two e2m1 has not."""
    code, is_missing = np.zeros(256, np.uint16), np.ones(256, np.uint16)
    code[E4M3_OF_E2M1], is_missing[E4M3_OF_E2M1] = np.arange(16), 0
    first, second = np.arange(2**16) & 255, np.arange(2**16) >> 8
    return code[first] | code[second] << 4 | (is_missing[first] + is_missing[second]) << 8


_PACKING = _packing()


def pack(codes: np.ndarray) -> tuple[UInt8[np.ndarray, "n k/2"], int]:
    """e4m3 `[N, K]` as e2m1, two codes a byte, and how many of the numbers e2m1 has not."""
    pairs = np.ascontiguousarray(codes).view(np.uint16)
    out, index, missing = np.empty(pairs.shape, np.uint8), pairs.reshape(-1), 0
    flat, found = out.reshape(-1), np.empty(min(PIECE, index.size), np.uint16)
    for part in (slice(start, start + PIECE) for start in range(0, index.size, PIECE)):
        piece = np.take(_PACKING, index[part], out=found[: index[part].size], mode="clip")
        flat[part] = piece
        missing += int((piece >> 8).sum()) if piece.max() > 255 else 0
    return out, missing


def packed(codes: np.ndarray, name: str) -> UInt8[np.ndarray, "n k/2"]:
    """`pack` of a whole matrix.

    Raises:
        CheckpointError: it holds numbers that e2m1 has not; with their count.
    """
    found, missing = pack(codes)
    if missing:
        raise e2m1_error(name, missing, codes.size)
    return found


def e2m1_error(name: str, count: int, size: int) -> CheckpointError:
    return CheckpointError(
        f"{name}: {count} of {size} codes are none of e2m1's (0, 0.5, 1, 1.5, 2, 3, 4, 6), so MXFP4 can't hold it; "
        "write it as MXFP8 (format='compressed-tensors')"
    )


def unpacked(tensors: Mapping[str, "Stored"]) -> dict[str, "Stored"]:
    """The tensors of a checkpoint with those in MXFP4 as e4m3; of compressed-tensors under the names of others.

    Raises:
        CheckpointError: a matrix in MXFP4 whose scales are missing or do not fit, or which is there twice.
    """
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        new, found = name, tensor
        if (scale := _scale_of(name, tensor, tensors)) is not None:
            new = f"{name.removesuffix('_packed')}"
            found = _as_e4m3(name, tensor, scale, tensors)
        if new in result or (new != name and new in tensors):
            raise CheckpointError(f"{new}: {tensor.file} holds it twice, in 4 bits and otherwise")
        result[new] = found
    return result


_BARE = re.compile(r"(.*\.)(weight|gate_up_proj|down_proj)")
_BLOCKS = re.compile(r".*\.experts\.(gate_up_proj|down_proj)_blocks")


def _scale_of(name: str, tensor: "Stored", tensors: Mapping[str, "Stored"]) -> str | None:
    """The scales of a tensor in MXFP4; None for any other tensor."""
    if _BLOCKS.fullmatch(name) and tensor.dtype in ("U8", "I8"):
        return f"{name.removesuffix('_blocks')}_scales"
    if name.endswith(".weight_packed"):
        scale = f"{name.removesuffix('_packed')}_scale"
        # Beside scales of other types it is another kind: NVFP4 has those in e4m3.
        is_mx = tensor.dtype == "U8" and (scale not in tensors or tensors[scale].dtype in E8M0)
        return scale if is_mx else None
    if tensor.dtype not in ("U8", "I8", "F4") or not tensor.shape or (match := _BARE.fullmatch(name)) is None:
        return None
    of_module = (f"{match[1]}scale",) if match[2] == "weight" else ()
    for scale in (f"{name}_scale_inv", f"{name}_scale", *of_module):
        # A byte may be a scale of many kinds, float8_e8m0fnu only one of a block's.
        if scale in tensors and tensors[scale].dtype in E8M0:
            fits = tensors[scale].shape == (*tensor.shape[:-1], _width(tensor) // BLOCK)
            return scale if fits or tensors[scale].dtype == "F8_E8M0" else None
    return None


def _width(tensor: "Stored") -> int:
    """Elements in a row."""
    return tensor.shape[-1] if tensor.dtype == "F4" else 2 * tensor.shape[-1]


def _as_e4m3(name: str, tensor: "Stored", scale: str, tensors: Mapping[str, "Stored"]) -> "Stored":
    where, is_gpt_oss = f"{name} in {tensor.file}", name.endswith("_blocks")
    if is_gpt_oss and (len(tensor.shape) != 4 or tensor.shape[-1] != BLOCK // 2):
        raise CheckpointError(f"{where}: shape is {list(tensor.shape)}, expected [E, N, K/32, 16], two codes a byte")
    if len(tensor.shape) < 2:
        raise CheckpointError(f"{where}: shape is {list(tensor.shape)}, expected [N, K/2], two codes a byte")
    shape = (*tensor.shape[:-1], _width(tensor))
    if is_gpt_oss:
        shape = (*shape[:-2], shape[-2] * BLOCK)
    if scale not in tensors:
        raise CheckpointError(f"{where}: its scales {scale} are missing")
    if shape[-1] % BLOCK:
        raise CheckpointError(
            f"{where}: shape is {list(tensor.shape)}, so K is {shape[-1]}; MXFP4 has blocks of {BLOCK}, which must "
            "divide K"
        )
    found, expected = tensors[scale], (*shape[:-1], shape[-1] // BLOCK)
    if found.dtype not in E8M0 or found.shape != expected:
        raise CheckpointError(
            f"{scale} in {found.file}: is {found.dtype} {list(found.shape)}, expected {' or '.join(E8M0)} "
            f"{list(expected)} beside {name} {list(tensor.shape)}"
        )
    lines = math.prod(shape[:-1])
    return dataclasses.replace(tensor, dtype="F8_E4M3", shape=shape, view=View(lines, is_packed=True))
