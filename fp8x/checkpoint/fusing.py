"""Experts that go into one tensor, where the destination has them so: gpt-oss. `fused.py` is the way back.

    in 4 bits    ….experts.gate_up_proj_blocks  U8 [E, 2I, K/32, 16]  ….gate_up_proj_scales  U8 [E, 2I, K/32]
    in 16 bits   ….experts.gate_up_proj         [E, K, 2I]
    both         ….experts.gate_up_proj_bias    [E, 2I]

and so for `down_proj`; gate and up alternate, line by line. transformers and vLLM read no others of gpt-oss.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable

from fp8x.checkpoint.format import Format
from fp8x.checkpoint.reader import Reader, model_type
from fp8x.errors import CheckpointError, some

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True)
class FusedExperts:
    """The matrices of a layer's experts that go into one tensor.

    Attributes:
        name: what its tensors are called, `….experts.gate_up_proj`.
        experts: the prefixes of each expert's matrices, alternating: gate's and up's, or down's.
    """

    name: str
    experts: tuple[tuple[str, ...], ...]

    @property
    def bias(self) -> str:
        """What the tensor of their biases is called."""
        return f"{self.name}_bias"

    @property
    def prefixes(self) -> list[str]:
        return [prefix for expert in self.experts for prefix in expert]


def fused_experts(
    reader: Reader, format: Format | None, quantized: Iterable[str], dequantized: Iterable[str]
) -> list[FusedExperts]:
    """What goes together in a destination.

    Arguments:
        format: of the destination.
        quantized, dequantized: the prefixes of matrices that are in 8 bits there, and only in the source.

    Raises:
        CheckpointError: matrices in 4 bits that are none of gpt-oss's experts.
    """
    found = _complete(reader, dequantized) if model_type(reader.config) == "gpt_oss" else []
    if format is not None and format.name == "mxfp4":
        prefixes = list(quantized)
        found += _complete(reader, prefixes)
        others = set(prefixes) - {prefix for fused in found for prefix in fused.prefixes}
        if others:
            raise CheckpointError(
                f"format: {format.name!r} holds the experts of gpt-oss alone, gate, up and down of all in a layer; "
                f"{some(sorted(others))} not; use 'mxfp4-pack-quantized'"
            )
    return found


def _complete(reader: Reader, prefixes: Iterable[str]) -> list[FusedExperts]:
    """The experts' matrices of which none is missing, and which are of one shape."""
    blocks: dict[str, dict[tuple[int, str], str]] = {}
    for prefix in prefixes:
        if match := _EXPERT.fullmatch(prefix):
            blocks.setdefault(match[1], {})[int(match[2]), match[3]] = prefix
    matches = (_EXPERT.fullmatch(name.removesuffix(".weight")) for name in reader if blocks)
    there = {(match[1], int(match[2])) for match in matches if match}
    counts = collections.Counter(block for block, _ in there)  # with those that stay as they are
    found = []
    for block, matrices in blocks.items():
        count = counts[block]
        for fused, parts in _PARTS.items():
            experts = tuple(tuple(matrices.get((e, part), "") for part in parts) for e in range(count))
            names = [f"{prefix}.weight" for expert in experts for prefix in expert]
            if all(name in reader for name in names) and len({reader.stored(name).shape for name in names}) == 1:
                found.append(FusedExperts(f"{block}.{fused}", experts))
    return found


def biases(reader: Reader, fused: FusedExperts) -> tuple[str, ...]:
    """The experts' biases that go together; none where they have none.

    Raises:
        CheckpointError: some are missing, or unlike the others.
    """
    names = tuple(f"{prefix}.bias" for prefix in fused.prefixes)
    missing = [name for name in names if name not in reader]
    if len(missing) == len(names):
        return ()
    if missing:
        raise CheckpointError(f"{some(missing)} missing from {reader.path}, which has biases of other experts")
    first = reader.stored(names[0])
    for name in names:
        reader.check(name, shapes=[first.shape], dtypes=[first.dtype])
    return names
