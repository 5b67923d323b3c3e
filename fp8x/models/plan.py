"""`plan`: what `convert` will do with a checkpoint, known from headers and config alone. Imports no JAX to say so."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fp8x.calibrate import sidecar
from fp8x.calibrate.sidecar import Sidecar
from fp8x.checkpoint import FORMATS, Format, Reader, choose_format, format_of
from fp8x.checkpoint.fusing import FusedExperts, fused_experts
from fp8x.checkpoint.header import FLOAT8
from fp8x.checkpoint.kept import why_kept
from fp8x.checkpoint.kv_cache import QUERIES, KVScales, kv_tensors, read_kv_scales
from fp8x.checkpoint.origin import ORIGIN
from fp8x.checkpoint.plan import Plan, Target, why_no_matrix
from fp8x.errors import CheckpointError, RuleError, some
from fp8x.models.config import DecoderConfig
from fp8x.models.hf_names import rule_names
from fp8x.models.matrices import check_scales, dtype_of, modules_of, stored_by_prefix, tables_of
from fp8x.models.plan_config import beside_of, config_of, origin_for, unread_parts_of
from fp8x.recipe import OUT_DTYPES, Recipe, Rules, as_recipe, check_stored
from fp8x.roles import by_name

if TYPE_CHECKING:
    from fp8x.checkpoint.requantize import Requantization, Requantize

_STAYED = "in 16 or 32 bits in the source"


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
    check_scales(reader, stored, source_format)
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
    dropped |= unread_parts_of(reader, source_format, targets)
    config, left_fields = config_of(reader, source_format, chosen, recipes, out_dtype, kept_kv)
    beside = {} if chosen is None else chosen.beside(config["quantization_config"])
    origin = origin_for(reader, chosen, targets, kept_kv)
    if origin is not None and chosen.packs:
        config["quantization_config"] = dict(origin.quantization_config)
    elif origin is not None:
        beside[ORIGIN], origin = origin.to_json(), None
    companions, fields = beside_of(reader, [*beside, *([] if origin is None else [ORIGIN])])
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
        fused=tuple(_fused(reader, chosen, targets)),
        left_fields=left_fields | fields,
        companions=companions,
        requantization=requantization,
        origin=origin,
        allow_nonfinite=allow_nonfinite,
    )
    _check(found, recipe, is_changed)
    return found


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
    kept = _kept(reader, modules, stored)
    names = rule_names(modules, reader.fused)
    others = {name.removesuffix(".weight"): why_no_matrix(reader, name) for name in reader}
    chosen = Rules(None if is_dtype else as_recipe(recipe), rules or {})
    decisions = chosen.decide(modules, kept=kept, names=names, others=others)
    check_stored(decision.recipe for decision in decisions.values())
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
            else:
                reason = decision.kept
            recipes[prefix] = None if reason else decision.recipe
            if reason and not (is_dtype and stored[prefix] is not None):
                reasons[prefix] = reason
    return recipes, reasons


def _kept(reader: Reader, modules: Mapping[str, list[str]], stored: Iterable[str]) -> dict[str, str]:
    """What modules are that stay unless a rule names them, by path."""
    by_prefix = why_kept({prefix: reader.stored(f"{prefix}.weight").shape for prefix in stored}, tables_of(reader))
    # Where fp8x knows a module it knows, too, that it is no tower and no projector.
    reasons = {path: by_prefix.get(path) if [path] == prefixes else by_name(path) for path, prefixes in modules.items()}
    return {path: reason for path, reason in reasons.items() if reason is not None}


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
        lies_otherwise = name.endswith(("_linear.weight", "_bias")) or any(
            reader.stored(part).view is not None for part in parts
        )
        prefixes = [part.rpartition(".")[0] for part in parts]
        if lies_otherwise and all(prefix in targets and targets[prefix].is_copied for prefix in prefixes):
            yield name


def _fused(reader: Reader, format: Format | None, targets: Mapping[str, Target]) -> list[FusedExperts]:
    """Matrices of experts that go into one tensor.

    Raises:
        CheckpointError: a format in 4 bits, and what is not in MX blocks before.
    """
    quantized = [prefix for prefix, target in targets.items() if target.recipe is not None]
    if format is not None and format.packs and (made := [each for each in quantized if not targets[each].is_kept]):
        raise CheckpointError(
            f"format: {format.name!r} holds what is in MX blocks before, with codes that e2m1 has; {some(made)} "
            "not, and fp8x quantizes nothing to 4 bits"
        )
    dequantized = [p for p, target in targets.items() if target.recipe is None and target.stored is not None]
    return fused_experts(reader, format, quantized, dequantized)


def _check(found: Plan, recipe: Recipe | str | None, is_changed: bool) -> None:
    """Warns of a recipe that quantizes nothing.

    Raises:
        CheckpointError: something in 8 bits would be copied into a checkpoint that says nothing of it; something in 4
            bits that config.json says nothing of.
        ShapeError: a matrix that its recipe does not fit.
    """
    found.check_shapes()
    found.check_names()
    if found.format is None and isinstance(recipe, Recipe | str) and recipe not in OUT_DTYPES:
        why = "; ".join(dict.fromkeys(row.reason for row in found.groups if row.reason)) or "it holds no matrix"
        warnings.warn(f"{found.path}: nothing in it becomes 8 bits ({why}); rules override defaults", stacklevel=3)
    copied = [*found.copied, *(f"{prefix}.weight" for prefix, target in found.targets.items() if target.is_copied)]
    _check_packed(found, copied)
    if found.source_format is found.format and not is_changed:
        return
    for name in (f"{prefix}.weight" for prefix in found.targets) if found.source_format is None else ():
        tensor = found.reader.stored(name)
        if tensor.dtype in FLOAT8:
            raise CheckpointError(
                f"{name} in {tensor.file}: is {tensor.dtype}, but config.json has no quantization_config, which says "
                "how it is scaled; is it lost?"
            )
    for name in copied:
        tensor = found.reader.stored(name)
        if tensor.dtype in FLOAT8 and len(tensor.shape) > 1:
            why = found.reader.whole.get(name, "it is no matrix of a linear layer that config.json calls quantized")
            alike = "without a recipe" + (f" and as {found.source_format.name!r}" if found.source_format else "")
            raise CheckpointError(
                f"{name} in {tensor.file}: is in 8 bits, and fp8x does not know its scales ({why}); {alike} it is "
                "copied as it is"
            )


def _check_packed(found: Plan, copied: Iterable[str]) -> None:
    """Raises for what is in 4 bits and no matrix of the plan: copied, it would be in 8, without its scales."""
    for name in copied:
        tensor = found.reader.stored(name)
        if tensor.is_packed:
            why = found.reader.whole.get(name, "it is no matrix of a linear layer that config.json calls quantized")
            why = why if found.source_format else "config.json has no quantization_config; is it lost?"
            raise CheckpointError(f"{name} in {tensor.file}: is in MXFP4, and fp8x does not know its scales ({why})")


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
