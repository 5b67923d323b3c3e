"""`convert`: from one checkpoint to another, of any model."""

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fp8x.calibrate import sidecar
from fp8x.calibrate.sidecar import Sidecar
from fp8x.checkpoint import FORMATS, Format, Reader, choose_format, format_of
from fp8x.checkpoint.convert import Conversion, Target, convert_tensors
from fp8x.checkpoint.destination import DEFAULT_SHARD_BYTES
from fp8x.checkpoint.format import stored_recipes
from fp8x.checkpoint.header import FLOAT8, UNQUANTIZED
from fp8x.checkpoint.kv_cache import QUERIES, KVScales, kv_tensors, read_kv_scales
from fp8x.checkpoint.requantize import Requantization, Requantize, check_alone, choose, parse
from fp8x.errors import CheckpointError, ConfigError, RuleError, some
from fp8x.models.config import DecoderConfig
from fp8x.models.families import FAMILIES
from fp8x.models.hf_names import flat, linear_names, param_names, skipped
from fp8x.recipe import OUT_DTYPES, Recipe, Rules, as_recipe, check_stored

SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")

# Matrices of other models that are no linear layers, by the last part of their name.
LOOKUPS = re.compile(r"(.*\.)?([^.]*embed[^.]*|wte|wpe|shared|relative_attention_bias|[^.]*norm)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion would do.

    Attributes:
        modules: the prefixes (tensor names without `.weight`) of every module that holds matrices, by path: as
            `fp8x.load` has it where it knows the model, else the prefix itself.
        stored, recipes: of every prefix in the source and in the destination; None for 16 or 32 bits.
        stored_kv, kv_cache: the scales of a KV cache in 8 bits, in the source and in the destination; None without any.
        source_format, format: None where nothing is quantized.
        out_dtype: in which the model computes.
        requantization: the recipes that `requantize` has chosen; None without it.
    """

    modules: Mapping[str, list[str]]
    stored: Mapping[str, Recipe | None]
    recipes: Mapping[str, Recipe | None]
    stored_kv: KVScales | None
    kv_cache: KVScales | None
    source_format: Format | None
    format: Format | None
    out_dtype: np.dtype
    requantization: Requantization | None = None


def plan(
    reader: Reader,
    recipe: Recipe | str | None = None,
    format: str | None = None,
    rules: Mapping[str, Recipe | str | None] | None = None,
    kv_cache: KVScales | None = None,
    requantize: Requantize | None = None,
    *,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """What `convert` would do; arguments and errors as there. With `requantize` it reads matrices to choose.

    Arguments:
        kv_cache: scales that take the place of the source's.
    """
    if requantize is not None:
        check_alone(recipe, rules)
    source_format, out_dtype = format_of(reader.config), _dtype(reader.config)
    modules = _modules(reader)
    known = {prefix for prefixes in modules.values() for prefix in prefixes}
    for name in reader if source_format is not None else ():
        prefix, _, kind = name.rpartition(".")
        if kind in SCALES and f"{prefix}.weight" not in reader:
            raise CheckpointError(f"{name} in {reader.stored(name).file}: the matrix that it scales is missing")
        if kind in SCALES and prefix not in known:
            raise CheckpointError(
                f"{prefix}.weight in {reader.stored(name).file}: is quantized, but fp8x reads quantized matrices of "
                "linear layers alone"
            )
    stored = _stored(reader, modules, source_format)
    requantization = None
    if recipe is None and rules:
        raise RuleError("rules: are exceptions to a recipe, but none was given; give a recipe too")
    if requantize is not None:
        if format is not None and not isinstance(requantize, Requantization):
            for each in parse(requantize):
                choose_format([each], format)  # raises before anything is measured
        requantization = choose(
            reader,
            modules,
            stored,
            requantize,
            source_format,
            together=format is not None and not FORMATS[format].holds_several,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        recipes = requantization.by_prefix(modules, stored)
    elif recipe is None:
        recipes = stored
    else:
        is_dtype = isinstance(recipe, str) and recipe in OUT_DTYPES
        out_dtype = OUT_DTYPES[recipe] if is_dtype else out_dtype
        by_module = Rules(None if is_dtype else as_recipe(recipe), rules or {}).resolve(modules)
        check_stored(by_module.values())
        recipes = {prefix: by_module[path] for path, names in modules.items() for prefix in names}
    used = [choice for choice in recipes.values() if choice is not None]
    stored_kv = read_kv_scales(reader, source_format)
    # Where nothing else is quantized, no format declares the source's unasked.
    if kv_cache is None and stored_kv is not None and stored_kv.scheme is not None and (used or format is not None):
        kv_cache = stored_kv
    if format is not None and not used and kv_cache is None:
        raise CheckpointError(f"format: {format!r} does not fit: nothing is quantized; leave the format out")
    chosen = choose_format(used, format, kv_cache and kv_cache.scheme) if used or kv_cache else None
    return Plan(modules, stored, recipes, stored_kv, kv_cache, source_format, chosen, out_dtype, requantization)


def choose_recipes(
    path: str | Path,
    requantize: Requantize = "hopper",
    *,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Requantization:
    """What `requantize` would make of a checkpoint in 8 bits, and what each recipe would cost, module by module.

    `convert` and `fp8x.load` take the result in the place of the recipes, and measure nothing again.

    Arguments:
        path, requantize, allow_nonfinite: as `convert` takes them.
        progress: is called with the bytes read and the bytes in all, from several threads but one at a time.

    Raises:
        CheckpointError, CalibrationError, RecipeError, ShapeError: as `convert`, of the source.
    """
    reader = Reader(path)
    source_format = format_of(reader.config)
    modules = _modules(reader)
    stored = _stored(reader, modules, source_format)
    return choose(
        reader, modules, stored, requantize, source_format, allow_nonfinite=allow_nonfinite, progress=progress
    )


def convert(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe | str | None = None,
    format: str | None = None,
    *,
    rules: Mapping[str, Recipe | str | None] | None = None,
    requantize: Requantize | None = None,
    calibration: str | Path | Sidecar | None = None,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes a Hugging Face checkpoint anew: quantized, in another scheme or format, or dequantized.

    No model is built, so any architecture will do, and memory does not grow with the model. Quantized matrices become
    what `fp8x.load(src, recipe)` makes of them, byte by byte. From 8 bits to other 8 bits they go through float32;
    `fp8x.checkpoint.inspect.inspect(dst, reference=src)` measures what that adds.

    A conversion that is killed goes on where it was when the same call is made again, and ends with the same bytes.

    Arguments:
        src: a directory with config.json and safetensors files, quantized or not.
        dst: the directory to make; it must not exist, or be empty, and neither it nor `src` lie in the other.
        recipe: a `Recipe` or its code; or "bf16", "f16", "f32", which dequantize what is in 8 bits to that type. None
            keeps every matrix as it is stored: for another format alone.
        format: "compressed-tensors", "fp8" or "modelopt"; by default the first that can hold the result.
        rules: exceptions to `recipe`, by module, as `fp8x.quantize_model` takes them. Modules have the paths that
            `fp8x.load` gives them where it knows the model, else their names in the checkpoint.
        requantize: in the place of `recipe`, for a source in 8 bits: a recipe or several, or "hopper" for the two that
            Hopper's tensor cores multiply (`fp8x.HOPPER`). Every module in 8 bits gets the one that adds the least
            error to its weights, of equals the first, with scales by the better rule; what is in 16 bits stays so.
            A `format` that holds one recipe a model gets the best for all modules together. Or what
            `fp8x.choose_recipes` has chosen. `fp8x/checkpoint/requantize.py` says how it is measured.
        calibration: static activation scales, for recipes that have them: what `fp8x calibrate` wrote, or a `Sidecar`.
            Without it the scales are those of `src`, where it has them.
        allow_nonfinite: accept tensors that hold NaN or Inf instead of raising, those too that are only copied.
        max_shard_bytes: several files with an index, where one would be larger.
        beside: further JSON files, by name.
        progress: is called with the bytes read and the bytes in all, from several threads but one at a time. Where
            `requantize` measures, it counts twice from the start: through the source, and through the conversion.

    Raises:
        CheckpointError: `src` is missing or damaged, holds NaN or Inf, no format can hold the result, or `dst` can't be
            written; the message says which file and tensor, and `dst` is as it was.
        CalibrationError: static activation scales that neither `calibration` nor `src` gives, or that do not fit.
        RecipeError, RuleError, ShapeError: an unknown recipe, a rule that matches nothing, a matrix it does not fit.
    """
    with contextlib.closing(Reader(src)) as reader:
        if calibration is not None and not isinstance(calibration, Sidecar):
            calibration = sidecar.read(calibration)
        kv_cache = None if calibration is None or calibration.kv_cache is None else _calibrated_kv(calibration, reader)
        planned = plan(
            reader, recipe, format, rules, kv_cache, requantize, allow_nonfinite=allow_nonfinite, progress=progress
        )
        scales = {} if calibration is None else _scales(calibration, planned, reader)
        config = _config(reader.config, planned)
        further = {} if planned.format is None else planned.format.beside(config["quantization_config"])
        dropped = () if planned.stored_kv is None else planned.stored_kv.names
        if planned.format is None and planned.stored_kv is not None:
            dropped += tuple(name for name in reader if QUERIES.fullmatch(name))
            warnings.warn(
                f"{reader.path}: the scales of its KV cache are left out: a checkpoint in {planned.out_dtype} declares "
                "none; format='compressed-tensors' keeps them",
                stacklevel=2,
            )
        elif kv_cache is None and planned.stored_kv is not None:
            planned.stored_kv.warn_of_missing(reader)
        done = convert_tensors(
            reader,
            dst,
            {
                prefix: Target(planned.stored[prefix], planned.recipes[prefix], scales.get(prefix))
                for prefix in planned.stored
            },
            config,
            source_format=planned.source_format,
            format=planned.format,
            out_dtype=planned.out_dtype,
            dropped=dropped,
            added={} if planned.kv_cache is None else kv_tensors(planned.kv_cache, planned.format),
            allow_nonfinite=allow_nonfinite,
            max_shard_bytes=max_shard_bytes,
            beside={**further, **(beside or {})},
            progress=progress,
        )
        return dataclasses.replace(done, requantization=planned.requantization)


def _stored(reader: Reader, modules: Mapping[str, list[str]], source_format: Format | None) -> dict[str, Recipe | None]:
    """The recipe of every prefix in the source."""
    prefixes = [prefix for names in modules.values() for prefix in names]
    if source_format is None:
        return dict.fromkeys(prefixes)
    return stored_recipes(source_format, reader, prefixes, _dtype(reader.config))


def _modules(reader: Reader) -> dict[str, list[str]]:
    """The prefixes of every module that holds matrices."""
    if reader.config.get("model_type") not in FAMILIES:
        return {prefix: [prefix] for prefix in _matrices(reader)}
    try:
        config = DecoderConfig.from_hf(reader.config)
    except ConfigError as error:
        warnings.warn(
            f"{reader.path}: fp8x.load could not build this model ({error}); its matrices go by their own names",
            stacklevel=4,
        )
        return {prefix: [prefix] for prefix in _matrices(reader)}
    modules = {path: [prefix for _, prefix in flat(names)] for path, names in linear_names(config).items()}
    needed = [*param_names(config).values(), *(f"{prefix}.weight" for names in modules.values() for prefix in names)]
    if missing := [name for name in needed if name not in reader]:
        raise CheckpointError(f"{reader.path}: {some(missing)} missing, which config.json calls for")
    return modules | {prefix: [prefix] for prefix in _matrices(reader) if skipped(config, prefix)}


def _matrices(reader: Reader) -> list[str]:
    """The prefixes of what is a linear layer's matrix, to all appearance."""
    names = [name.removesuffix(".weight") for name in reader if name.endswith(".weight")]
    return [
        name
        for name, tensor in ((name, reader.stored(f"{name}.weight")) for name in names)
        if len(tensor.shape) == 2 and tensor.dtype in UNQUANTIZED + FLOAT8 and not LOOKUPS.fullmatch(name)
    ]


def _dtype(config: Mapping[str, Any]) -> np.dtype:
    """The type in which a model computes, as its config says; bfloat16 without a word."""
    named = config.get("dtype") or config.get("torch_dtype")
    return {str(dtype): dtype for dtype in OUT_DTYPES.values()}.get(str(named), np.dtype(ml_dtypes.bfloat16))


def _scales(found: Sidecar, plan: Plan, reader: Reader) -> dict[str, np.ndarray]:
    """Static activation scales by prefix."""
    layers = {}
    for path, (prefix, *_) in plan.modules.items():
        recipe = plan.recipes[prefix]
        if recipe is not None and recipe.is_static:
            layers[path] = (recipe.activation, reader.stored(f"{prefix}.weight").shape[-1])
    found.check(layers)
    return {prefix: scale for path, scale in found.scales.items() for prefix in plan.modules[path]}


def _calibrated_kv(found: Sidecar, reader: Reader) -> KVScales:
    """The scales of keys and values in a sidecar.

    Raises:
        CalibrationError: they are another model's.
    """
    from fp8x.models.kv_quantizer import make_quantizers  # imported late: nothing else here needs Flax

    config = DecoderConfig.from_hf(reader.config)
    found.give_kv_cache(config.num_hidden_layers, functools.partial(make_quantizers, config))  # looks whether they fit
    return KVScales(found.kv_cache, {f"model.{path}": pair for path, pair in found.kv_scales.items()})


def _config(source: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    config = {key: value for key, value in source.items() if key != "quantization_config"}
    named = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if named in config and _dtype(config) != plan.out_dtype:
        config[named] = str(plan.out_dtype)
    if plan.format is not None:
        # An `lm_head` that is tied is still a matrix to others, which must not look for its scales.
        config["quantization_config"] = plan.format.to_config({"lm_head": None, **plan.recipes}, plan.out_dtype)
        if plan.kv_cache is not None:
            config["quantization_config"] |= _kv_fields(source, plan)
    return config


def _kv_fields(source: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """How the destination declares its KV cache: in the source's own words, where they are of the same format."""
    scheme, stated = plan.kv_cache.scheme, source.get("quantization_config")
    fields = plan.format.kv_fields(scheme)
    if plan.source_format is not plan.format:
        return fields
    own = {name: stated.get(name, value) for name, value in fields.items()}
    return own if plan.format.kv_scheme(own) == scheme else fields
