"""What a plan writes beside the tensors: config.json and its like; and what of the source is not in there."""

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint import Format, Reader, format_of
from fp8x.checkpoint.companions import Companions, find_companions
from fp8x.checkpoint.kv_cache import KVScales
from fp8x.checkpoint.origin import ORIGIN, Origin, origin_of
from fp8x.checkpoint.plan import Target, matrix_shape
from fp8x.checkpoint.reader import INDEX, LEGACY
from fp8x.errors import Fp8xError
from fp8x.models.matrices import dtype_of, names_dtype, parameter_types, with_dtype
from fp8x.recipe import Recipe

EXPERT_DTYPE = "expert_dtype"  # of DeepSeek-V4, beside the quantization_config or in it
KV_FIELDS = ("kv_cache_scheme", "kv_cache_quant_algo")  # mean nothing where the scales do not come along


def config_of(
    reader: Reader,
    source_format: Format | None,
    format: Format | None,
    recipes: Mapping[str, Recipe | None],
    out_dtype: np.dtype,
    kv_cache: KVScales | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The destination's config.json, and the fields of the source's that it lacks, with the reason."""
    source = reader.config
    config = {key: value for key, value in source.items() if key != "quantization_config"}
    is_in_4_bits = config.get(EXPERT_DTYPE) == "fp4" and any(reader.stored(name).is_packed for name in reader)
    if is_in_4_bits:
        del config[EXPERT_DTYPE]
    # Without a word a reader takes the type of what lies there.
    is_mixed = format is None and not names_dtype(config) and bool(parameter_types(reader) - {out_dtype})
    if dtype_of(config) != out_dtype or (is_mixed and source_format is not None):
        config = with_dtype(config, out_dtype)
    unread = {} if source_format is None else dict(source["quantization_config"].unread())
    if format is not None:
        # An `lm_head` that is tied is still a matrix to others, which must not look for its scales.
        written = format.to_config({"lm_head": None, **_whole_experts(reader, recipes), **recipes}, out_dtype)
        if kv_cache is not None:
            written |= _kv_fields(source, source_format, format, kv_cache)
        if format is source_format:
            # What fp8x does not know there stays as it is, as far as it stands by itself.
            own = [key for key in unread if key not in written and key not in KV_FIELDS and "." not in key]
            written = {key: unread.pop(key) for key in own} | written
        config["quantization_config"] = written
    reason = "the result is not quantized" if format is None else f"fp8x does not know it, to write it as {format.name}"
    paths = [*(f"quantization_config.{path}" for path in unread), *_undescribed(reader)]
    left = {EXPERT_DTYPE: "experts are not in 4 bits any more, and vLLM would take them so"} if is_in_4_bits else {}
    return config, left | dict.fromkeys(paths, reason) | {
        f"__metadata__.{key}": "files are headed anew" for key in reader.metadata
    }


def origin_for(
    reader: Reader, format: Format | None, targets: Mapping[str, Target], kv_cache: KVScales | None
) -> Origin | None:
    """What a source in 4 bits was like, where the destination has the same values, in MX blocks.

    For a destination in 4 bits only where it is in the words of that format, and says the same of every matrix and of
    the KV cache.
    """
    in_8_bits = [target for target in targets.values() if target.stored is not None]
    if format is None or not in_8_bits or not all(target.is_kept for target in targets.values()):
        return None
    if not all(target.recipe.weight.is_mx for target in in_8_bits):
        return None
    origin = origin_of(reader)
    if origin is None or not format.packs:
        return origin
    return origin if _says_the_same(origin, reader, format, targets, kv_cache) else None


def _says_the_same(
    origin: Origin, reader: Reader, format: Format, targets: Mapping[str, Target], kv_cache: KVScales | None
) -> bool:
    """Whether an origin's words are of a format in 4 bits, and describe what is to be written."""
    stated = origin.quantization_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they have been given, of the source
        try:
            if format_of({"quantization_config": stated}).quant_method != format.quant_method:
                return False
            # compressed-tensors names the way of packing, or "mixed-precision".
            if stated.get("format", format.name) != format.name:
                return False
            said = format.from_config(stated, targets, dtype_of(reader.config))
            if format.kv_scheme(stated) != (kv_cache and kv_cache.scheme):
                return False
        except Fp8xError:
            return False
    # gpt-oss's config need not name what is in 16 bits.
    asked = {p: t.recipe for p, t in targets.items() if t.recipe is not None or format.name != "mxfp4"}
    return all(said[prefix] == recipe for prefix, recipe in asked.items())


def _undescribed(reader: Reader) -> list[str]:
    """Fields of torchao's descriptions that say something of a tensor and that nobody reads."""
    described = (reader.stored(name).description for name in reader)
    return list(
        dict.fromkeys(
            f"__metadata__.*.{path}"
            for each in described
            if each
            for path, _ in each.unread()
            if not path.endswith("._type")
        )
    )


def _whole_experts(reader: Reader, recipes: Mapping[str, Recipe | None]) -> dict[str, None]:
    """What others call the modules of experts that stay in one tensor, in which they must not look for scales.

    vLLM asks for `….experts`, and for the matrices of its first expert.
    """
    matches = ((re.match(r"(.*?\.experts)\.", name), name) for name in reader)
    is_whole = {
        match[1]: None
        for match, name in matches
        if match and len(reader.stored(name).shape) > 1 and name.removesuffix(".weight") not in recipes
    }
    quantized = {
        match[1] for name, recipe in recipes.items() if recipe and (match := re.match(r"(.*?\.experts)\.", name))
    }
    parts = ("", *(f".0.{part}" for part in ("gate_proj", "up_proj", "down_proj")))
    return {f"{module}{part}": None for module in is_whole if module not in quantized for part in parts}


def _kv_fields(
    source: Mapping[str, Any], source_format: Format | None, format: Format, kv_cache: KVScales
) -> dict[str, Any]:
    """How the destination declares its KV cache: in the source's own words, where they are of the same format."""
    scheme, stated = kv_cache.scheme, source.get("quantization_config")
    fields = format.kv_fields(scheme)
    if source_format is not format:
        return fields
    own = {name: stated.get(name, value) for name, value in fields.items()}
    return own if format.kv_scheme(own) == scheme else fields


def unread_parts_of(reader: Reader, source_format: Format | None, targets: Mapping[str, Target]) -> dict[str, str]:
    """Tensors of matrices in 8 bits that the destination does not hold, with the reason."""
    found: dict[str, str] = {}
    for prefix, target in targets.items():
        if target.stored is None:
            continue
        shape = matrix_shape(reader, f"{prefix}.weight")
        found |= source_format.unread(prefix, target.stored, shape, reader)
        if target.stored.is_static and (target.recipe is None or not target.recipe.is_static):
            is_dynamic = target.recipe is not None and target.recipe.activation is not None
            reason = "activations become dynamic" if is_dynamic else "activations are not quantized any more"
            *_, name = source_format.names(prefix, target.stored, shape, reader)
            found[name] = reason
    return found


def beside_of(reader: Reader, used: Collection[str]) -> tuple[Companions, dict[str, str]]:
    """The files beside the weights, and fields in those that are written anew which come along with neither."""
    found, unread = find_companions(reader.path, reader.files), dict(reader.unread)
    left = {name: unread.pop(name) for name in (LEGACY, INDEX) if name in unread}
    if ORIGIN not in used and (reader.path / ORIGIN).is_file():
        left[ORIGIN] = "what the checkpoint in 4 bits was like that the source was made of"
    if LEGACY not in left and LEGACY not in used and (reader.path / LEGACY).is_file():
        left[LEGACY] = "read as quantization_config of config.json"
    return dataclasses.replace(found, left={**found.left, **left}), unread
