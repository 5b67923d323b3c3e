"""Experts in one tensor, as transformers 5 holds and writes them, seen as a matrix for each expert.

    on disk                                          of expert e
    ….experts.gate_up_proj        [E, 2I, K]         ….experts.e.gate_proj.weight, ….experts.e.up_proj.weight   [I, K]
    ….experts.down_proj           [E, N, I]          ….experts.e.down_proj.weight                               [N, I]
    ….gate_up_proj_scale_inv      [E, R, C]          ….gate_proj.weight_scale_inv, ….up_proj.weight_scale_inv   [R/2, C]
    ….gate_up_proj_activation_scale [E]              ….gate_proj.activation_scale, ….up_proj.activation_scale   []

All are slices of contiguous bytes. Weights may be fused and scales not, or the other way: transformers 5.23 saves FP8
experts one by one with their scales together. Mixtral's matrices keep the names of its published checkpoints
(`block_sparse_moe`, `w1`, `w3`, `w2`); transformers 5 calls the block `mlp` in memory, and so where it saves that.

A scale grid with one row (R = 1) belongs to gate and up alike; one with an even number holds gate's rows, then up's,
each rounded up, as transformers joins them. In one with an odd number a block begins in gate and ends in up:
transformers writes that where I is no multiple of the block and 2I is. Up is no matrix in blocks then: it is refused.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fp8x.errors import CheckpointError

if TYPE_CHECKING:
    from fp8x.checkpoint.reader import Stored

MAX_EXPERTS = 2**16  # a damaged shape must not make millions of matrices

_SUFFIXES = {
    "": ".weight",
    "_scale_inv": ".weight_scale_inv",
    "_activation_scale": ".activation_scale",
    "_weight_scale": ".weight_scale",
    "_input_scale": ".input_scale",
}
_FUSED = re.compile(rf"(.*\.experts)\.(gate_up_proj|down_proj)({'|'.join(_SUFFIXES)})")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Whose experts lie the other way, `gate_up_proj` [E, K, 2I]: their matrices are no contiguous bytes.
_TRANSPOSED = ("llama4", "llama4_text", "gpt_oss", "aria", "aria_text")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def unfused(tensors: Mapping[str, "Stored"], model_type: str | None) -> dict[str, "Stored"]:
    """The tensors of a checkpoint with its fused experts as one matrix each; others as they are.

    Raises:
        CheckpointError: a fused tensor that can't be taken apart, or whose parts are there beside it.
    """
    is_mixtral = model_type == "mixtral"
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match and tensor.shape:
            if model_type in _TRANSPOSED:
                raise CheckpointError(
                    f"{name} in {tensor.file}: the experts of {model_type} lie with K before N, as [E, K, N]; fp8x "
                    "reads [E, N, K] alone"
                )
            parts = _split(name, tensor, match, is_mixtral)
        else:
            parts = [(_mixtral_name(name) if is_mixtral else name, tensor)]
        for part, stored in parts:
            if part in result:
                raise CheckpointError(f"{part}: {tensor.file} holds it twice, by itself and fused with others")
            result[part] = stored
    return result


def _split(name: str, tensor: "Stored", match: re.Match, is_mixtral: bool) -> Iterator[tuple[str, "Stored"]]:
    experts, fused, suffix = match.groups()
    parts = _PARTS[fused]
    count, *rest = tensor.shape
    if count > MAX_EXPERTS:
        raise CheckpointError(f"{name} in {tensor.file}: {count} experts are over {MAX_EXPERTS}")
    rows = rest[0] if rest else 1
    # One row of scales, or one scale, is everyone's.
    is_shared = suffix != "" and rows == 1
    if not is_shared and rows % len(parts):
        raise CheckpointError(
            f"{name} in {tensor.file}: {rows} rows do not divide into gate and up"
            + ("; a block of scales straddles both, and fp8x has no such matrix" if suffix else "")
        )
    pieces = 1 if is_shared else len(parts)
    shape = (rows // pieces, *rest[1:]) if rest else ()
    for expert in range(count):
        size = (tensor.stop - tensor.start) // (count * pieces)
        for index, part in enumerate(parts):
            start = tensor.start + size * (expert * pieces + min(index, pieces - 1))
            short = _MIXTRAL[part] if is_mixtral else part
            block = _mixtral_name(experts) if is_mixtral else experts
            piece = dataclasses.replace(tensor, shape=shape, start=start, stop=start + size)
            yield f"{block}.{expert}.{short}{_SUFFIXES[suffix]}", piece


def _mixtral_name(name: str) -> str:
    """With the block's name in published checkpoints."""
    return re.sub(r"(\.layers\.\d+)\.mlp(\.|$)", r"\1.block_sparse_moe\2", name)
