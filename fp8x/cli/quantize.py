"""`fp8x quantize`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8x.cli import calibrate, options, terminal
from fp8x.cli.loading import load

if TYPE_CHECKING:
    from fp8x.checkpoint.inspect import Inspection
    from fp8x.recipe import Recipe

SIDECAR = "calibration.json"


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face directory in bf16, f16 or f32.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    recipe: options.RecipeCode,
    data: Annotated[
        Path | None,
        typer.Option("--calibrate", "-c", metavar="DATA", help=f"For static recipes: {options.DATA_HELP}"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", "-f", metavar="NAME", help="compressed-tensors (the default), fp8 or modelopt."),
    ] = None,
    rule: options.Rule = None,
    num_samples: options.NumSamples = options.NUM_SAMPLES,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    seed: options.Seed = 0,
    min_tokens: options.MinTokens = options.MIN_TOKENS,
    allow_nonfinite: options.AllowNonfinite = False,
    as_json: options.AsJson = False,
) -> None:
    """Quantize a checkpoint, calibrate it if its recipe is static, and write it.

    $ fp8x quantize MODEL MODEL-fp8 --recipe e4m3_e4m3_bf16 --calibrate texts.jsonl\n
    $ fp8x quantize MODEL MODEL-mx --recipe mxfp8_mxfp8_bf16 --rule 'layers\\.0\\..*=none'

    Where something fails nothing is left of DST, and a DST that is there already is left alone. The scales that
    calibration finds are written to DST/calibration.json too.
    """
    import fp8x
    from fp8x.checkpoint import Writer
    from fp8x.checkpoint.inspect import inspect

    start = time.monotonic()
    chosen, rules = options.parse_recipe(recipe), options.parse_rules(rule)
    Writer(destination)  # raises if something is there
    is_calibrated = _check_plan(source, recipe, chosen, rules, format, data)
    calibration = rows = result = None
    if is_calibrated:
        calibration = options.Calibration(data, num_samples, max_length, batch_size, seed)
        rows = calibrate.read_rows(source, calibration)
    model = load(source, chosen, rules, allow_nonfinite)
    if calibration is not None:
        report = calibrate.run(model, rows, calibration)
        calibrate.warn_undersampled(report, min_tokens)
        result = calibrate.sidecar(report, recipe, calibration, rows).to_json()
    beside = {} if result is None else {SIDECAR: result}
    with terminal.progress(f"writing {destination.name}", unit="bytes") as update:
        fp8x.save(model, destination, format, beside=beside, progress=update)
    with terminal.progress("reading back", unit="bytes") as update:
        before = inspect(source)
        after = inspect(destination, reference=source, progress=update)
    summary = _summary(before, after) | {
        "recipe": recipe,
        "calibration": result and {key: value for key, value in result.items() if key != "layers"},
        "seconds": round(time.monotonic() - start, 1),
    }
    if as_json:
        return terminal.show_json(summary)
    _show(summary, source, destination)


def _check_plan(
    source: Path, code: str, recipe: "Recipe", rules: "dict[str, Recipe | None]", format: str | None, data: Path | None
) -> bool:
    """Raises for what would fail later, after work. Whether there is something to calibrate."""
    from fp8x.checkpoint import Reader, choose_format
    from fp8x.errors import CalibrationError, RuleError
    from fp8x.models import DecoderConfig
    from fp8x.models.hf_names import linear_names
    from fp8x.recipe import Rules

    config = DecoderConfig.from_hf(Reader(source).config)
    used = [r for r in Rules(recipe, rules).resolve(linear_names(config)).values() if r is not None]
    if not used:
        raise RuleError("--rule: the rules skip every module; nothing would be quantized")
    choose_format(used, format)
    is_calibrated = any(map(options.needs_calibration, used))
    if is_calibrated and data is None:
        raise CalibrationError(
            f"--recipe {code}: its activation scales are calibrated: pass --calibrate DATA.jsonl with texts like those "
            "the model will see, or take a dynamic recipe, like e4m3_e4m3_bf16_dynamic"
        )
    if data is not None and not is_calibrated:
        terminal.warn(f"--calibrate is not used: recipe {code} has no calibrated scale")
    return is_calibrated


def _summary(before: "Inspection", after: "Inspection") -> dict[str, Any]:
    """Numbers by scheme, and of all."""
    sizes = {row.name: row.bytes for row in before.rows}
    schemes: dict[str, dict[str, Any]] = {}
    for row in after.rows:
        empty = {"tensors": 0, "bytes_before": 0, "bytes_after": 0, "snr_db": []}
        found = schemes.setdefault(str(row.scheme), empty)
        found["tensors"] += 1
        found["bytes_before"] += sizes[row.name]
        found["bytes_after"] += row.bytes
        if row.snr is not None:
            found["snr_db"].append(row.snr)
    for found in schemes.values():
        found["snr_db"] = sum(found["snr_db"]) / len(found["snr_db"]) if found["snr_db"] else None
    return {
        "format": after.format,
        "bytes_before": before.bytes,
        "bytes_after": after.bytes,
        "mean_snr_db": after.mean_snr,
        "schemes": schemes,
    }


def _show(summary: dict[str, Any], source: Path, destination: Path) -> None:
    table = terminal.table("scheme", "tensors", "bytes before", "bytes after", "mean SNR")
    for scheme, found in summary["schemes"].items():
        sizes = terminal.size(found["bytes_before"]), terminal.size(found["bytes_after"])
        table.add_row(scheme, str(found["tensors"]), *sizes, terminal.decibels(found["snr_db"]))
    table.add_section()
    tensors = sum(found["tensors"] for found in summary["schemes"].values())
    sizes = terminal.size(summary["bytes_before"]), terminal.size(summary["bytes_after"])
    table.add_row("all", str(tensors), *sizes, terminal.decibels(summary["mean_snr_db"]))
    line = f"recipe {summary['recipe']}, format {summary['format']}, {summary['seconds']} s"
    if summary["calibration"]:
        line += f", calibrated on {summary['calibration']['tokens']:,} tokens ({destination / SIDECAR})"
    terminal.show(f"{source} → {destination}", table, line)
