"""torchao's tensors, which it takes apart for safetensors, under the names that all others use.

    on disk                                what                    here
    X._weight_qdata                        8 bits, [N, K]          X.weight
    X._weight_scale                        its scales              X.weight_scale
    experts._gate_up_proj_qdata            8 bits, [E, 2I, K]      experts.gate_up_proj
    experts._gate_up_proj_scale            its scales              experts.gate_up_proj_weight_scale

The file's `__metadata__` describes each in JSON, under the name before it was taken apart (X.weight): the class, the
names of the parts, and what the class knows besides. Source: torchao `prototype/safetensors/safetensors_support.py`.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8x.checkpoint.header import parse_object
from fp8x.checkpoint.noted import Noted
from fp8x.errors import CheckpointError

if TYPE_CHECKING:
    from fp8x.checkpoint.header import Stored

METHOD = "torchao"

_NAMES, _TYPE = "tensor_names", '{"_type": "'
_DATA = re.compile(r"(?P<module>(?:.*\.)?)_(?P<parameter>\w+)_qdata")


def is_flattened(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that torchao has quantized the checkpoint."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def unflattened(tensors: Mapping[str, "Stored"], metadata: Mapping[Path, Any]) -> dict[str, "Stored"]:
    """The tensors of a checkpoint with torchao's under the names of others, 8 bits with their description.

    Arguments:
        metadata: the `__metadata__` of every file.

    Raises:
        CheckpointError: a tensor in other parts than these, without a description, or there twice.
    """
    # transformers takes them together, too: a parameter's parts may lie in several files.
    texts = {name: text for found in metadata.values() if isinstance(found, Mapping) for name, text in found.items()}
    matches = [match for match in map(_DATA.fullmatch, tensors) if match]
    renamed: dict[str, str] = {}
    descriptions: dict[str, Mapping[str, Any]] = {}
    for match in matches:
        name, data = f"{match['module']}{match['parameter']}", match.string
        scale = f"{data.removesuffix('_qdata')}_scale"
        described = _description(name, tensors[data].file, texts.get(name))
        parts = described.get("_tensor_data_names")
        if parts != ["qdata", "scale"] or scale not in tensors:
            raise CheckpointError(
                f"{name} in {tensors[data].file}: torchao's {described.get('_type')!r:.200} has the parts "
                f"{parts!r:.200}; fp8x reads those with qdata and scale alone, and needs both"
            )
        renamed[data], descriptions[data] = name, described
        renamed[scale] = f"{name}_scale" if name.endswith("weight") else f"{name}_weight_scale"
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        new = renamed.get(name, name)
        if new in result:
            raise CheckpointError(f"{new}: {tensor.file} holds it twice, by itself and in parts")
        result[new] = dataclasses.replace(tensor, description=descriptions.get(name))
    return result


def undescribed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file's `__metadata__` torchao has not written: it describes every tensor, and lists the names."""
    return {
        key: value
        for key, value in metadata.items()
        if key != _NAMES and not (isinstance(value, str) and value.startswith(_TYPE))
    }


def _description(name: str, file: Path, text: Any) -> Mapping[str, Any]:
    if not isinstance(text, str):
        raise CheckpointError(f"{name} in {file}: no file's __metadata__ has a description of it, which torchao writes")
    return Noted(parse_object(text.encode(errors="replace"), f"{file}: __metadata__ of {name}"))
