"""Experts in one tensor, as transformers holds and writes them, seen as a matrix `[N, K]` for each expert.

    on disk                                          of expert e
    ….experts.gate_up_proj        [E, 2I, K]         ….experts.e.gate_proj.weight, ….experts.e.up_proj.weight   [I, K]
                               or [E, K, 2I]         (Llama 4, Qwen3-VL-MoE: transposed)
    ….experts.down_proj           [E, N, I]          ….experts.e.down_proj.weight                               [N, I]
                               or [E, I, N]
    ….input_linear.weight         [E, 2I, K]         ….experts.e.w1.weight, ….experts.e.w3.weight               [I, K]
    ….output_linear.weight        [E, N, I]          ….experts.e.w2.weight                                      [N, I]
    ….gate_up_proj_scale_inv      [E, R, C]          ….gate_proj.weight_scale_inv, ….up_proj.weight_scale_inv   [R/2, C]
    ….gate_up_proj_scale          [E, 2I, 1]         ….gate_proj.weight_scale, ….up_proj.weight_scale           [I, 1]
    ….gate_up_proj_activation_scale [E]              ….gate_proj.activation_scale, ….up_proj.activation_scale   []
    ….gate_up_proj_blocks         [E, 2I, K/32, 16]  ….gate_proj.weight, ….up_proj.weight, in 4 bits           [I, K]
    ….gate_up_proj_scales         [E, 2I, K/32]      ….gate_proj.weight_scale, ….up_proj.weight_scale          [I, K/32]
    ….gate_up_proj_bias           [E, 2I]            ….gate_proj.bias, ….up_proj.bias                           [I]

Which of both layouts a checkpoint has follows from the shapes of the pair: gate_up's K is down's N, and its 2I twice
down's I, in one of them alone. Where neither fits, tensors stay whole, under their own names.

In gpt-oss, which the last three are of, gate and up alternate: row by row, or column by column in 16 bits. Other models
with biases may do so too, or not: their experts stay whole.

Weights may be fused and scales not, or the other way: transformers 5.23 saves FP8 experts one by one with their scales
together. Mixtral's matrices keep the names of its published checkpoints (`block_sparse_moe`, `w1`, `w3`, `w2`);
transformers 5 calls the block `mlp` in memory, and so where it saves that. `input_linear` is IBM's (Granite, JetMoE);
its matrices get the names that vLLM's loader gives them.

A scale grid with one row (R = 1) belongs to gate and up alike; one with an even number holds gate's rows, then up's,
each rounded up, as transformers joins them. In one with an odd number a block begins in gate and ends in up:
transformers writes that where I is no multiple of the block and 2I is. Up is no matrix in blocks then: it is refused.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fp8x.checkpoint.header import View
from fp8x.errors import CheckpointError

if TYPE_CHECKING:
    from fp8x.checkpoint.header import Stored

MAX_EXPERTS = 2**16  # a damaged shape must not make millions of matrices

_SUFFIXES = {
    "": ".weight",
    "_scale_inv": ".weight_scale_inv",
    "_activation_scale": ".activation_scale",
    "_weight_scale": ".weight_scale",
    "_scale": ".weight_scale",
    "_input_scale": ".input_scale",
    "_blocks": ".weight",
    "_scales": ".weight_scale",
    "_bias": ".bias",
}
_GPT_OSS = ("_blocks", "_scales")
_SHARED = tuple(suffix for suffix in _SUFFIXES if suffix.endswith(("_scale", "_scale_inv")))  # one may be everyone's
_FUSED = re.compile(rf"(.*\.experts)\.(gate_up_proj|down_proj)({'|'.join(_SUFFIXES)})")
_LINEAR = re.compile(r"(.*)\.(input_linear|output_linear)\.weight()")
_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "input_linear": ("w1", "w3"),
    "output_linear": ("w2",),
}
_PARTNERS = {
    "gate_up_proj": "down_proj",
    "down_proj": "gate_up_proj",
    "input_linear": "output_linear",
    "output_linear": "input_linear",
}
# Whose experts are [E, K, N], also where their other half is not there to show it.
_TRANSPOSED = ("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "gpt_oss", "aria", "aria_text")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclasses.dataclass(frozen=True)
class Unfused:
    """The tensors of a checkpoint with its fused experts as one matrix each.

    Attributes:
        tensors: these, and all others as they are.
        parts: of every tensor that was taken apart, the names of its matrices.
        whole: experts' tensors that were not, with the reason.
    """

    tensors: Mapping[str, "Stored"]
    parts: Mapping[str, list[str]]
    whole: Mapping[str, str]


def unfused(tensors: Mapping[str, "Stored"], model_type: str | None) -> Unfused:
    """
    Arguments:
        model_type: of the language model.

    Raises:
        CheckpointError: a fused tensor that can't be taken apart, or whose parts are there beside it.
    """
    is_mixtral = model_type == "mixtral"
    result: dict[str, Stored] = {}
    found = Unfused(result, {}, {})
    for name, tensor in tensors.items():
        match = _match(name, tensor)
        if match and match[3] not in ("", "_bias") and _is_transposed(match, tensors):
            raise CheckpointError(
                f"{name} in {tensor.file}: scales of experts that lie as [E, K, N]; fp8x reads those of [E, N, K] alone"
            )
        reason = match and _why_whole(match, tensor, tensors, model_type)
        if match and not reason:
            is_gpt_oss = _is_gpt_oss(match[1], tensors, model_type)
            is_transposed = match[3] == "" and (is_gpt_oss or _is_transposed(match, tensors))
            if is_transposed and tensor.is_packed:
                raise CheckpointError(
                    f"{name} in {tensor.file}: experts in 4 bits that lie as [E, K, N]; fp8x reads those of [E, N, K] "
                    "alone"
                )
            lines = _Lines(is_transposed, is_gpt_oss or match[3] in _GPT_OSS)
            pieces = list(_split(name, tensor, match, lines, is_mixtral))
            found.parts[name] = [piece for piece, _ in pieces]
        else:
            pieces = [(_mixtral_name(name) if is_mixtral else name, tensor)]
            if reason:
                found.whole[name] = reason
        for piece, stored in pieces:
            if piece in result:
                raise CheckpointError(f"{piece}: {tensor.file} holds it twice, by itself and fused with others")
            result[piece] = stored
    return found


def _match(name: str, tensor: "Stored") -> re.Match | None:
    if match := _FUSED.fullmatch(name):
        return match if tensor.shape else None
    return _LINEAR.fullmatch(name) if len(tensor.shape) == 3 else None


def _why_whole(
    match: re.Match, tensor: "Stored", tensors: Mapping[str, "Stored"], model_type: str | None
) -> str | None:
    """Why a fused tensor is not taken apart; None if it is."""
    block, fused, suffix = match.groups()
    is_gpt_oss = _is_gpt_oss(block, tensors, model_type)
    if not suffix and len(tensor.shape) != 3:
        return f"experts in one tensor of {len(tensor.shape)} dims"
    if is_gpt_oss and (suffix or _partner(match, tensors) is None):
        return None
    has_bias = any(f"{block}.{name}_bias" in tensors for name in (fused, _PARTNERS[fused]))
    if has_bias and not is_gpt_oss:
        return "experts in one tensor, with biases; gate and up may alternate row by row"
    if suffix:
        return None
    partner = _partner(match, tensors)
    if partner is None:
        is_known = fused.endswith("_proj") and model_type not in _TRANSPOSED
        return None if is_known else f"experts in one tensor, without {_PARTNERS[fused]} beside it to tell its layout"
    layouts = _layouts(match, tensor, partner)
    if layouts == (False, False) or (is_gpt_oss and layouts != (False, True)):
        shapes = f"{list(tensor.shape)} beside {list(partner.shape)}"
        return f"experts in one tensor, of which fp8x can't tell rows from columns ({shapes})"
    return None


def _is_gpt_oss(block: str, tensors: Mapping[str, "Stored"], model_type: str | None) -> bool:
    return model_type == "gpt_oss" or any(f"{block}.{name}_blocks" in tensors for name in ("gate_up_proj", "down_proj"))


def _is_transposed(match: re.Match, tensors: Mapping[str, "Stored"]) -> bool:
    """Whether the weights of this block are `[E, K, N]`; those without a partner are as transformers 5 has them."""
    partner, tensor = _partner(match, tensors), tensors.get(match[0].removesuffix(match[3]) if match[3] else match[0])
    is_pair = partner is not None and tensor is not None and len(tensor.shape) == 3
    return is_pair and _layouts(match, tensor, partner) == (False, True)


def _partner(match: re.Match, tensors: Mapping[str, "Stored"]) -> "Stored | None":
    """The weights of down beside those of gate and up, or the other way."""
    block, fused, _ = match.groups()
    found = tensors.get(f"{block}.{_PARTNERS[fused]}{'' if fused.endswith('proj') else '.weight'}")
    return found if found is not None and len(found.shape) == 3 else None


def _layouts(match: re.Match, tensor: "Stored", partner: "Stored") -> tuple[bool, bool]:
    """Whether shapes fit `[E, N, K]`, and `[E, K, N]`."""
    first, second = (tensor, partner) if match[2] in ("gate_up_proj", "input_linear") else (partner, tensor)
    (count, a, b), (other, c, d) = first.shape, second.shape
    return count == other and (b, a) == (c, 2 * d), count == other and (a, b) == (d, 2 * c)


@dataclasses.dataclass(frozen=True)
class _Lines:
    """How an expert lies: as `[K, N]` if `is_transposed`; whether gate and up alternate, line by line."""

    is_transposed: bool
    alternates: bool


def _split(
    name: str, tensor: "Stored", match: re.Match, lines: _Lines, is_mixtral: bool
) -> Iterator[tuple[str, "Stored"]]:
    block, fused, suffix = match.groups()
    parts = _PARTS[fused]
    count, *rest = tensor.shape
    if count > MAX_EXPERTS:
        raise CheckpointError(f"{name} in {tensor.file}: {count} experts are over {MAX_EXPERTS}")
    if lines.is_transposed:
        rest = rest[::-1]
    rows = rest[0] if rest else 1
    is_shared = suffix in _SHARED and rows == 1
    if not is_shared and rows % len(parts):
        raise CheckpointError(
            f"{name} in {tensor.file}: {rows} rows do not divide into gate and up"
            + ("; a block of scales straddles both, and fp8x has no such matrix" if suffix in _SHARED else "")
        )
    pieces = 1 if is_shared else len(parts)
    shape = (rows // pieces, *rest[1:]) if rest else ()
    for expert in range(count):
        size = (tensor.stop - tensor.start) // count
        whole = dataclasses.replace(
            tensor, shape=shape, start=tensor.start + size * expert, stop=tensor.start + size * (expert + 1)
        )
        for index, part in enumerate(parts):
            piece = _piece(whole, index, pieces, rows, lines)
            yield f"{_experts(block, fused, is_mixtral)}.{expert}.{_short(part, is_mixtral)}{_SUFFIXES[suffix]}", piece


def _piece(whole: "Stored", index: int, pieces: int, rows: int, lines: _Lines) -> "Stored":
    """Gate or up of an expert, whose `rows` are those of `pieces`; the whole where it is both's."""
    index = min(index, pieces - 1)
    if lines.alternates and pieces > 1:
        view = View(rows, index, pieces, lines.is_transposed, whole.is_packed)
    elif lines.is_transposed:
        view = View(rows, index * whole.shape[0], is_transposed=True)
    else:
        size = (whole.stop - whole.start) // pieces
        start = whole.start + size * index
        view = View(rows // pieces, is_packed=True) if whole.is_packed else None
        return dataclasses.replace(whole, start=start, stop=start + size, view=view)
    return dataclasses.replace(whole, view=view)


def _experts(block: str, fused: str, is_mixtral: bool) -> str:
    if fused in ("input_linear", "output_linear"):
        return f"{block}.experts"
    return _mixtral_name(block) if is_mixtral else block


def _short(part: str, is_mixtral: bool) -> str:
    return _MIXTRAL[part] if is_mixtral else part


def _mixtral_name(name: str) -> str:
    """With the block's name in published checkpoints."""
    return re.sub(r"(\.layers\.\d+)\.mlp(\.|$)", r"\1.block_sparse_moe\2", name)
