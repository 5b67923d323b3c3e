"""Hugging Face directories: reading and writing, and the quantized formats on disk. Knows nothing of models."""

from collections.abc import Iterable, Mapping
from typing import Any

from fp8x.checkpoint.compressed_tensors import CompressedTensors, PackedCompressedTensors
from fp8x.checkpoint.fbgemm_fp8 import FbgemmFp8
from fp8x.checkpoint.format import Format as Format
from fp8x.checkpoint.fp8 import Fp8
from fp8x.checkpoint.modelopt import ModelOpt
from fp8x.checkpoint.mxfp4 import Mxfp4
from fp8x.checkpoint.mxfp8 import Mxfp8
from fp8x.checkpoint.quark import Quark
from fp8x.checkpoint.reader import CONFIG as CONFIG
from fp8x.checkpoint.reader import DESCRIPTION as DESCRIPTION
from fp8x.checkpoint.reader import Reader as Reader
from fp8x.checkpoint.torchao import TorchAo
from fp8x.checkpoint.writer import Writer as Writer
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme

# In the order in which a model without a wish gets one; the last four are read only. compressed-tensors reads what its
# part in 4 bits has written, too, and comes first.
_ALL = (
    *(CompressedTensors(), Fp8(), ModelOpt(), Mxfp4(), PackedCompressedTensors()),
    *(Mxfp8(), FbgemmFp8(), Quark(), TorchAo()),
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The format that a config.json names; None for an unquantized checkpoint.

    Raises:
        CheckpointError: a `quant_method` that is not supported.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = _quant_method(quantization) if isinstance(quantization, Mapping) else quantization
    for format in FORMATS.values():
        if format.quant_method == method:
            return format
    known = ", ".join(dict.fromkeys(repr(format.quant_method) for format in FORMATS.values()))
    raise CheckpointError(f"config.json: quantization_config.quant_method is {method!r}; fp8x reads {known}")


def _quant_method(quantization: Mapping[str, Any]) -> Any:
    method = quantization.get("quant_method")
    if method is None and isinstance(producer := quantization.get("producer"), Mapping):
        return producer.get("name")  # ModelOpt before it wrote a quant_method
    return "compressed-tensors" if method == "compressed_tensors" else method


def choose_format(recipes: Iterable[Recipe], name: str | None = None, kv_cache: Scheme | None = None) -> Format:
    """The format of that name, or the first that can hold these recipes, and the scales of a KV cache in 8 bits.

    Raises:
        CheckpointError: an unknown name, or no format that can hold them; the message says why.
    """
    recipes = list(recipes)
    if name is not None and name not in FORMATS:
        raise CheckpointError(f"format: {name!r} is unknown; use one of {', '.join(map(repr, FORMATS))}")
    objections = {}
    for format in FORMATS.values() if name is None else [FORMATS[name]]:
        is_held = recipes or format.holds_kv_alone
        reason = format.objection(recipes) if is_held else "no KV cache in 8 bits without matrices in 8 bits"
        if reason is None and kv_cache is not None and format.kv_fields(kv_cache) is None:
            reason = f"no KV cache in {kv_cache}"
        if reason is None:
            return format
        objections[format.name] = reason
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in objections.items())
    raise CheckpointError(f"format: can't hold this model: {reasons}")
