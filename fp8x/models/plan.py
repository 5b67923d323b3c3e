"""`plan`: what `convert` will do with a checkpoint, known from headers and config alone. Imports no JAX to say so."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from fp8x.calibrate import sidecar
from fp8x.calibrate.sidecar import Sidecar
from fp8x.checkpoint import FORMATS, Format, Reader, choose_format, format_of
from fp8x.checkpoint.companions import Companions, find_companions
from fp8x.checkpoint.format import stored_recipes
from fp8x.checkpoint.header import FLOAT8, UNQUANTIZED
from fp8x.checkpoint.kept import LOOKUPS, why_kept
from fp8x.checkpoint.kv_cache import QUERIES, KVScales, kv_tensors, read_kv_scales
from fp8x.checkpoint.plan import Plan, Target, matrix_shape
from fp8x.checkpoint.reader import INDEX, LEGACY
from fp8x.errors import CheckpointError, ConfigError, RuleError, some
from fp8x.models.config import DecoderConfig
from fp8x.models.families import FAMILIES
from fp8x.models.hf_names import flat, linear_names, param_names, skipped
from fp8x.recipe import OUT_DTYPES, Recipe, Rules, as_recipe, check_stored

if TYPE_CHECKING:
    from fp8x.checkpoint.requantize import Requantization, Requantize

_STAYED = "in 16 or 32 bits in the source"
SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")
KV_FIELDS = ("kv_cache_scheme", "kv_cache_quant_algo")  # mean nothing where the scales do not come along


def plan(
    src: str | Path,
    recipe: Recipe | str | None = None,
    format: str | None = None,
    *,
    rules: Mapping[str, Recipe | str | None] | None = None,
    requantize: "Requantize | None" = None,
    calibration: str | Path | Sidecar | None = None,
    kv_cache: KVScales | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """What `fp8x.convert` would do with a checkpoint; `fp8x.convert(plan, dst)` does it.

    Reads headers and config.json alone (and all matrices where `requantize` has to choose): a matter of a second, or of
    ten for a terabyte in 50,000 matrices.
    Print it, or look at `groups`: a row for all tensors that differ in numbers alone, with their types and bytes before
    and after, and the reason where they stay in 16 bits. Static activation scales may still be missing in a plan.

    Arguments:
        src, recipe, format, rules, requantize, calibration, allow_nonfinite: as `fp8x.convert` takes them.
        kv_cache: how keys and values will be stored, with scales or before there are any.
        progress: where `requantize` chooses, is called with the bytes read and the bytes in all.

    Raises:
        CheckpointError, CalibrationError, RecipeError, RuleError, ShapeError: as `fp8x.convert`.
    """
    reader = Reader(src)
    source_format = format_of(reader.config)
    modules = modules_of(reader)
    stored = stored_by_prefix(reader, modules, source_format)
    _check_scales(reader, stored, source_format)
    if calibration is not None and not isinstance(calibration, Sidecar):
        calibration = sidecar.read(calibration)
    if calibration is not None and calibration.kv_cache is not None:
        kv_cache = _calibrated_kv(calibration, reader)
    requantization = None
    if requantize is not None:
        requantization = _requantization(
            reader, modules, stored, source_format, recipe, format, rules, requantize, allow_nonfinite, progress
        )
        recipes, reasons = requantization.by_prefix(modules, stored), _stayed(stored)
    else:
        recipes, reasons = _recipes(reader, modules, stored, recipe, rules)
    out_dtype = OUT_DTYPES[recipe] if isinstance(recipe, str) and recipe in OUT_DTYPES else dtype_of(reader.config)
    is_changed = recipe is not None or requantize is not None
    chosen, kept_kv, dropped = _keys_and_values(reader, source_format, format, recipes, kv_cache, out_dtype, is_changed)
    scales = {} if calibration is None else _static_scales(calibration, modules, recipes, reader)
    targets = {
        prefix: Target(stored[prefix], recipes[prefix], scales.get(prefix), reasons.get(prefix)) for prefix in stored
    }
    dropped |= _unread_parts(reader, source_format, targets)
    config, left_fields = _config(reader, source_format, chosen, recipes, out_dtype, kept_kv)
    beside = {} if chosen is None else chosen.beside(config["quantization_config"])
    companions, fields = _beside(reader, beside)
    found = Plan(
        reader=reader,
        modules=modules,
        targets=targets,
        source_format=source_format,
        format=chosen,
        out_dtype=out_dtype,
        config=config,
        beside=beside,
        dropped=dropped,
        added={} if kept_kv is None else kv_tensors(kept_kv, chosen),
        whole=tuple(_whole(reader, targets)),
        left_fields=left_fields | fields,
        companions=companions,
        requantization=requantization,
        allow_nonfinite=allow_nonfinite,
    )
    _check(found, recipe, is_changed)
    return found


def stored_by_prefix(
    reader: Reader, modules: Mapping[str, list[str]], source_format: Format | None
) -> dict[str, Recipe | None]:
    """The recipe of every prefix in the source."""
    prefixes = [prefix for names in modules.values() for prefix in names]
    if source_format is None:
        return dict.fromkeys(prefixes)
    return stored_recipes(source_format, reader, prefixes, dtype_of(reader.config))


def dtype_of(config: Mapping[str, Any]) -> np.dtype:
    """The type in which a model computes, as its config says; bfloat16 without a word."""
    named = config.get("dtype") or config.get("torch_dtype")
    return {str(dtype): dtype for dtype in OUT_DTYPES.values()}.get(str(named), np.dtype(ml_dtypes.bfloat16))


def _check_scales(reader: Reader, stored: Mapping[str, Recipe | None], source_format: Format | None) -> None:
    """Raises for scales that belong to no matrix."""
    for name in reader if source_format is not None else ():
        prefix, _, kind = name.rpartition(".")
        if kind in SCALES and f"{prefix}.weight" not in reader:
            raise CheckpointError(f"{name} in {reader.stored(name).file}: the matrix that it scales is missing")
        if kind in SCALES and prefix not in stored:
            raise CheckpointError(
                f"{prefix}.weight in {reader.stored(name).file}: is quantized, but fp8x reads quantized matrices of "
                "linear layers alone"
            )


def _recipes(
    reader: Reader,
    modules: Mapping[str, list[str]],
    stored: Mapping[str, Recipe | None],
    recipe: Recipe | str | None,
    rules: Mapping[str, Recipe | str | None] | None,
) -> tuple[dict[str, Recipe | None], dict[str, str]]:
    """The recipe of every prefix in the destination, and why those without one are in 16 bits."""
    if recipe is None and rules:
        raise RuleError("rules: are exceptions to a recipe, but none was given; give a recipe too")
    if recipe is None:
        return dict(stored), _stayed(stored)
    is_dtype = isinstance(recipe, str) and recipe in OUT_DTYPES
    decisions = Rules(None if is_dtype else as_recipe(recipe), rules or {}).decide(modules)
    check_stored(decision.recipe for decision in decisions.values())
    kept = why_kept({prefix: reader.stored(f"{prefix}.weight").shape for prefix in stored})
    stayed = _stayed(stored)
    recipes, reasons = {}, {}
    for path, prefixes in modules.items():
        decision = decisions[path]
        for prefix in prefixes:
            reason = None
            if decision.pattern is not None:
                reason = f"rule {decision.pattern!r}" if decision.recipe is None else None
            elif prefix in stayed:
                reason = stayed[prefix]
            elif decision.is_skip:
                reason = kept.get(prefix, "an embedding")
            elif path == prefix:  # where fp8x knows the module it knows that it is none of these
                reason = kept.get(prefix)
            recipes[prefix] = None if reason else decision.recipe
            if reason and not (is_dtype and stored[prefix] is not None):
                reasons[prefix] = reason
    return recipes, reasons


def _stayed(stored: Mapping[str, Recipe | None]) -> dict[str, str]:
    """The reason of what the maker of a checkpoint in 8 bits left in 16: they knew why."""
    if all(recipe is None for recipe in stored.values()):
        return {}
    return {prefix: _STAYED for prefix, recipe in stored.items() if recipe is None}


def _requantization(
    reader: Reader,
    modules: Mapping[str, list[str]],
    stored: Mapping[str, Recipe | None],
    source_format: Format | None,
    recipe: object,
    format: str | None,
    rules: object,
    requantize: "Requantize",
    allow_nonfinite: bool,
    progress: Callable[[int, int], None] | None,
) -> "Requantization":
    # Imported late: it computes, with JAX.
    from fp8x.checkpoint.requantize import Requantization, check_alone, choose, parse

    check_alone(recipe, rules)
    if format is not None and not isinstance(requantize, Requantization):
        for each in parse(requantize):
            choose_format([each], format)  # raises before anything is measured
    together = format is not None and not FORMATS[format].holds_several
    return choose(
        reader,
        modules,
        stored,
        requantize,
        source_format,
        together=together,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )


def _keys_and_values(
    reader: Reader,
    source_format: Format | None,
    format: str | None,
    recipes: Mapping[str, Recipe | None],
    kv_cache: KVScales | None,
    out_dtype: np.dtype,
    is_changed: bool,
) -> tuple[Format | None, KVScales | None, dict[str, str]]:
    """The destination's format, the scales of a KV cache that it holds, and the tensors that are left out for these."""
    used = [recipe for recipe in recipes.values() if recipe is not None]
    stored, is_new = read_kv_scales(reader, source_format), kv_cache is not None
    # Where nothing else is quantized, no format declares them unasked that the source has not.
    is_declared = not is_changed and source_format is not None and source_format.holds_kv_alone
    if not is_new and stored is not None and stored.scheme is not None and (used or format or is_declared):
        kv_cache = stored
    if format is not None and not used and kv_cache is None:
        raise CheckpointError(f"format: {format!r} does not fit: nothing is quantized; leave the format out")
    chosen = choose_format(used, format, kv_cache and kv_cache.scheme) if used or kv_cache else None
    if stored is None:
        return chosen, kv_cache, {}
    if chosen is None:
        warnings.warn(
            f"{reader.path}: the scales of its KV cache are left out: a checkpoint in {out_dtype} declares "
            "none; format='compressed-tensors' keeps them",
            stacklevel=4,
        )
        names = (*stored.names, *(name for name in reader if QUERIES.fullmatch(name)))
        return chosen, kv_cache, dict.fromkeys(names, f"no KV cache in 8 bits is declared in {out_dtype}")
    if not is_new:
        stored.warn_of_missing(reader)
    reason = "calibrated anew" if is_new else f"written in the words of {chosen.name}"
    if not is_new and stored.scheme is None:
        reason = "of a KV cache that fp8x does not know"
    return chosen, kv_cache, dict.fromkeys(stored.names, reason)


def _whole(reader: Reader, targets: Mapping[str, Target]) -> Iterator[str]:
    """Tensors of several experts that lie otherwise than their matrices, and of which none is quantized: they stay."""
    for name, parts in reader.fused.items():
        lies_otherwise = name.endswith("_linear.weight") or any(
            reader.stored(part).columns is not None for part in parts
        )
        prefixes = [part.removesuffix(".weight") for part in parts]
        if lies_otherwise and all(prefix in targets and targets[prefix].is_copied for prefix in prefixes):
            yield name


def _check(found: Plan, recipe: Recipe | str | None, is_changed: bool) -> None:
    """Warns of a recipe that quantizes nothing.

    Raises:
        CheckpointError: something in 8 bits would be copied into a checkpoint that says nothing of it.
        ShapeError: a matrix that its recipe does not fit.
    """
    found.check_shapes()
    found.check_names()
    if found.format is None and isinstance(recipe, Recipe | str) and recipe not in OUT_DTYPES:
        why = "; ".join(dict.fromkeys(row.reason for row in found.groups if row.reason)) or "it holds no matrix"
        warnings.warn(f"{found.path}: nothing in it becomes 8 bits ({why}); rules override defaults", stacklevel=3)
    if found.source_format is found.format and not is_changed:
        return
    for name in (f"{prefix}.weight" for prefix in found.targets) if found.source_format is None else ():
        tensor = found.reader.stored(name)
        if tensor.dtype in FLOAT8:
            raise CheckpointError(
                f"{name} in {tensor.file}: is {tensor.dtype}, but config.json has no quantization_config, which says "
                "how it is scaled; is it lost?"
            )
    matrices = [f"{prefix}.weight" for prefix, target in found.targets.items() if target.is_copied]
    for name in (*found.copied, *matrices):
        tensor = found.reader.stored(name)
        if tensor.dtype in FLOAT8 and len(tensor.shape) > 1:
            why = found.reader.whole.get(name, "it is no matrix of a linear layer that config.json calls quantized")
            alike = "without a recipe" + (f" and as {found.source_format.name!r}" if found.source_format else "")
            raise CheckpointError(
                f"{name} in {tensor.file}: is in 8 bits, and fp8x does not know its scales ({why}); {alike} it is "
                "copied as it is"
            )


def modules_of(reader: Reader) -> dict[str, list[str]]:
    """The prefixes of every module that holds matrices, by path: as `fp8x.load` has it where it knows the model."""
    by_name = {prefix: [prefix] for prefix in _matrices(reader)}
    # A classifier or a reward model of a family has its own head, and no `lm_head`.
    stated = reader.config.get("architectures")
    architecture = stated[0] if isinstance(stated, list) and stated else "ForCausalLM"
    family = str(reader.config.get("model_type"))
    if family not in FAMILIES or not str(architecture).endswith("ForCausalLM"):
        return by_name
    try:
        config = DecoderConfig.from_hf(reader.config)
    except ConfigError as error:
        warnings.warn(
            f"{reader.path}: fp8x.load could not build this model ({error}); its matrices go by their own names",
            stacklevel=4,
        )
        return by_name
    modules = {path: [prefix for _, prefix in flat(names)] for path, names in linear_names(config).items()}
    needed = [*param_names(config).values(), *(f"{prefix}.weight" for names in modules.values() for prefix in names)]
    missing = [name for name in needed if name not in reader]
    if len(missing) == len(needed):
        warnings.warn(
            f"{reader.path}: fp8x.load could not build this model ({needed[0]} and all others that config.json calls "
            "for are missing); its matrices go by their own names",
            stacklevel=4,
        )
        return by_name
    if missing:
        raise CheckpointError(f"{reader.path}: {some(missing)} missing, which config.json calls for")
    return modules | {prefix: names for prefix, names in by_name.items() if skipped(config, prefix)}


def _matrices(reader: Reader) -> list[str]:
    """The prefixes of what is a linear layer's matrix, to all appearance."""
    names = [name.removesuffix(".weight") for name in reader if name.endswith(".weight")]
    return [
        name
        for name, tensor in ((name, reader.stored(f"{name}.weight")) for name in names)
        if len(tensor.shape) == 2 and tensor.dtype in (*UNQUANTIZED, *FLOAT8) and not LOOKUPS.fullmatch(name)
    ]


def _static_scales(
    found: Sidecar, modules: Mapping[str, list[str]], recipes: Mapping[str, Recipe | None], reader: Reader
) -> dict[str, np.ndarray]:
    """Static activation scales by prefix."""
    layers = {}
    for path, (prefix, *_) in modules.items():
        recipe = recipes[prefix]
        if recipe is not None and recipe.is_static:
            layers[path] = (recipe.activation, reader.stored(f"{prefix}.weight").shape[-1])
    found.check(layers)
    return {prefix: scale for path, scale in found.scales.items() for prefix in modules[path]}


def _calibrated_kv(found: Sidecar, reader: Reader) -> KVScales:
    """The scales of keys and values in a sidecar.

    Raises:
        CalibrationError: they are another model's.
    """
    from fp8x.models.kv_quantizer import make_quantizers  # imported late: nothing else here needs Flax

    config = DecoderConfig.from_hf(reader.config)
    found.give_kv_cache(config.num_hidden_layers, functools.partial(make_quantizers, config))  # looks whether they fit
    return KVScales(found.kv_cache, {f"model.{path}": pair for path, pair in found.kv_scales.items()})


def _unread_parts(reader: Reader, source_format: Format | None, targets: Mapping[str, Target]) -> dict[str, str]:
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


def _beside(reader: Reader, beside: Mapping[str, object]) -> tuple[Companions, dict[str, str]]:
    """The files beside the weights, and fields in those that are written anew which come along with neither."""
    found, unread = find_companions(reader.path, reader.files), dict(reader.unread)
    left = {name: unread.pop(name) for name in (LEGACY, INDEX) if name in unread}
    if LEGACY not in left and LEGACY not in beside and (reader.path / LEGACY).is_file():
        left[LEGACY] = "read as quantization_config of config.json"
    return dataclasses.replace(found, left={**found.left, **left}), unread


def _config(
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
    if dtype_of(config) != out_dtype:
        config |= dict.fromkeys(
            [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"], str(out_dtype)
        )
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
    return config, dict.fromkeys(paths, reason) | {
        f"__metadata__.{key}": "files are headed anew" for key in reader.metadata
    }


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
