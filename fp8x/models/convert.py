"""`convert`: from one checkpoint to another, of any model."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fp8x.calibrate.sidecar import Sidecar
from fp8x.checkpoint import Reader, format_of
from fp8x.checkpoint.convert import Conversion, run
from fp8x.checkpoint.destination import DEFAULT_SHARD_BYTES
from fp8x.checkpoint.plan import Plan
from fp8x.checkpoint.requantize import Requantization, Requantize, choose
from fp8x.errors import RecipeError
from fp8x.models.matrices import modules_of, stored_by_prefix
from fp8x.models.plan import plan
from fp8x.recipe import Recipe


def convert(
    src: str | Path | Plan,
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
    what `fp8x.load(src, recipe)` makes of them, byte by byte. From 8 bits to other 8 bits they go through float32; a
    block from scales that are powers of two, as MX has them, which another keeps exactly, gets that
    (`fp8x.numerics.requantize`).
    `fp8x.checkpoint.inspect.inspect(dst, reference=src).exactness` counts exact blocks, and measures what the others
    lost.

    After a conversion was killed the same call goes on with the tensors that are not on disk, within a file too, and
    ends with the same bytes.

    Arguments:
        src: a directory with config.json and safetensors files, quantized or not; or what `fp8x.plan` has made of one,
            which says all the rest, too.
        dst: the directory to make; it must not exist, or be empty, and neither it nor `src` lie in the other.
        recipe: a `Recipe` or its code; or "bf16", "f16", "f32", which dequantize what is in 8 bits to that type. None
            keeps every matrix as it is stored: for another format alone.
        format: "compressed-tensors", "fp8" or "modelopt"; by default the first that can hold the result. Or, of what
            was in 4 bits, "mxfp4" (gpt-oss) or "mxfp4-pack-quantized" (compressed-tensors' form).
        rules: exceptions to `recipe`, by module, as `fp8x.quantize_model` takes them. Modules go by their names in the
            checkpoint, and where `fp8x.load` knows the model by the paths that it gives them.
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
    if isinstance(src, Plan):
        given = {
            "recipe": recipe,
            "format": format,
            "rules": rules,
            "requantize": requantize,
            "calibration": calibration,
        }
        if named := [name for name, value in given.items() if value is not None]:
            raise RecipeError(f"{named[0]}: stands beside a plan, which says it already; give it to fp8x.plan")
        planned = src
    else:
        planned = plan(
            *(src, recipe, format),
            rules=rules,
            requantize=requantize,
            calibration=calibration,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    with contextlib.closing(planned.reader):
        return run(planned, dst, max_shard_bytes=max_shard_bytes, beside=beside, progress=progress)


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
    modules = modules_of(reader)
    stored = stored_by_prefix(reader, modules, source_format)
    return choose(
        reader, modules, stored, requantize, source_format, allow_nonfinite=allow_nonfinite, progress=progress
    )
