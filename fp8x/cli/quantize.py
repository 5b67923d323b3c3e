"""`fp8x quantize`."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8x import interrupt
from fp8x.cli import calibrate, options, plans, terminal
from fp8x.cli.loading import load, set_context

if TYPE_CHECKING:
    from fp8x.calibrate import Sidecar
    from fp8x.checkpoint.convert import Conversion
    from fp8x.checkpoint.inspect import TensorRow
    from fp8x.checkpoint.kv_cache import KVScales
    from fp8x.checkpoint.plan import Plan

SIDECAR = "calibration.json"
UNQUANTIZED = ("bf16", "f16", "f32")


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face directory, quantized or not.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="CODE",
            help="A recipe (`fp8x recipes` lists them); or bf16, f16, f32 to dequantize. Without one every matrix "
            "stays as it is stored, in another --format.",
        ),
    ] = None,
    requantize: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE",
            help="Instead, where SRC is in 8 bits: every module gets the one of these recipes that adds the least "
            "error. Repeatable; `hopper` for the two that Hopper's tensor cores multiply.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--calibrate", "-c", metavar="DATA", help=f"For static recipes: {options.DATA_HELP}"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For static recipes, instead: scales that `fp8x calibrate` wrote."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            metavar="NAME",
            help="compressed-tensors (the default), fp8, modelopt, mxfp4 or mxfp4-pack-quantized.",
        ),
    ] = None,
    rule: options.Rule = None,
    kv_cache: options.KVCache = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result back and measure its error, tensor by tensor.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would become of every tensor, field and file, and why.")
    ] = False,
    num_samples: options.NumSamples = options.NUM_SAMPLES,
    max_length: options.MaxLength = None,
    context: options.Context = None,
    document_rows: options.DocumentRows = options.DOCUMENT_ROWS,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    seed: options.Seed = 0,
    min_tokens: options.MinTokens = options.MIN_TOKENS,
    list_malformed: options.ListMalformed = False,
    allow_nonfinite: options.AllowNonfinite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a checkpoint anew: quantized, in another scheme or format, or dequantized.

    $ fp8x quantize MODEL MODEL-fp8 --recipe e4m3_e4m3_bf16_dynamic --dry-run\n
    $ fp8x quantize MODEL MODEL-mx --recipe mxfp8_mxfp8_bf16 --rule 'layers\\.0\\..*=none'\n
    $ fp8x quantize MODEL MODEL-fp8 --recipe e4m3_e4m3_bf16 --calibrate texts.jsonl --kv-cache tensor\n
    $ fp8x quantize MODEL-fp8 MODEL-bf16 --recipe bf16\n
    $ fp8x quantize MODEL-fp8 MODEL-ct --format compressed-tensors\n
    $ fp8x quantize MODEL-mxfp8 MODEL-hopper --requantize hopper

    Towers, projectors, heads, routers and embeddings stay in 16 bits, and so does, where SRC is in 8 bits, what it has
    in 16; --rule overrides that. No model is built, except to calibrate it: memory stays below half a gigabyte. Where
    something fails nothing is left of DST, and a DST that holds anything is left alone. If it is killed as it writes,
    the same command goes on with the tensors that are not on disk.

    From 8 bits to others, or to another format, the result is read back and compared: which blocks are exact, and the
    error of the others. Scales from --calibrate are in DST/calibration.json too; if it is killed or fails after it has
    found them, the same command does not calibrate again.
    """
    from fp8x.calibrate import Sidecar, sidecar
    from fp8x.checkpoint.destination import check_free, check_source, check_writable, real
    from fp8x.checkpoint.leftovers import partial
    from fp8x.checkpoint.resumable import finished_plan
    from fp8x.cli import resume

    start = time.monotonic()
    chosen = recipe if recipe is None or recipe in UNQUANTIZED else options.parse_recipe(recipe)
    rules = options.parse_rules(rule)
    check_source(source, destination)
    if finished_plan(destination) is None:  # else `convert` finds out whether this command has finished it
        check_free(real(destination))
        check_writable(real(destination))
    given = None if calibration is None else sidecar.read(calibration)
    kv_scales = _kv_scales(kv_cache, data, given)

    def plan(calibration: "Sidecar | None", requantize: Any) -> "Plan":
        from fp8x.models.plan import plan

        with terminal.progress("comparing recipes", unit="bytes") as update:
            return plan(
                *(source, chosen, format),
                rules=rules,
                requantize=requantize,
                calibration=calibration,
                kv_cache=kv_scales,
                allow_nonfinite=allow_nonfinite,
                progress=update,
            )

    # Scales of a file are looked at once it is sure that they are of use.
    planned = plan(None, requantize or None)
    _check(planned, recipe, data, given, kv_scales is not None)
    if dry_run:
        return plans.show(planned, source, destination, as_json)
    found = before = file = malformed = None
    if data is not None and (kv_cache or _needs_calibration(planned)):
        # Scales that the source has are kept, unless a recipe asks for others.
        only = chosen is None
        arguments = options.Calibration(
            *(data, num_samples, max_length, batch_size, seed),
            kv_cache=kv_cache,
            kv_cache_only=only,
            context=context,
            document_rows=document_rows,
            list_malformed=list_malformed,
        )
        samples, malformed = calibrate.read_rows(source, arguments)
        dataset = calibrate.dataset(arguments, samples)
        file = resume.scales_file(source, destination, chosen, rules, dataset, batch_size, kv_cache)
        found = before = resume.read(file)
        if found is None:
            model = load(source, chosen, rules, allow_nonfinite)
            set_context(model, source, context)
            report = calibrate.run(model, samples, arguments)
            found = Sidecar(recipe or "none", report, dataset)
            del model
        calibrate.warn_undersampled(found.report, min_tokens)
    kept = "what is on disk for sure is kept, and the same command goes on from there"
    advice = f"{kept}. If it is not to, remove {partial(real(destination))}"
    with interrupt.advice(advice), _kept(found, file):
        if found or given:
            planned = plan(found or given, planned.requantization)
        done = _convert(planned, destination, None if found is None else {SIDECAR: found.to_json()})
    rows, exactness = [], None
    if verify or planned.source_format is not None:
        from fp8x.checkpoint.inspect import inspect

        advice = f"{destination} is complete"
        with interrupt.advice(advice), terminal.progress("reading back", unit="bytes") as update:
            inspection = inspect(destination, reference=source, progress=update)
        rows, exactness = inspection.rows, inspection.exactness
    summary = {
        "recipe": recipe,
        "requantized": planned.requantization and planned.requantization.to_json(),
        "format": done.format,
        "bytes_before": planned.bytes_before,
        "bytes_after": done.bytes_written,
        "bytes_resumed": done.bytes_resumed,
        "conversion_seconds": round(done.seconds, 2),
        "bytes_per_second": round(done.bytes_read / max(done.seconds, 1e-9)),
        "schemes": _schemes(planned, rows),
        "exactness": exactness and exactness.to_json(),
        "snr_db": {row.name: row.snr for row in rows if row.snr is not None},
        "calibration_resumed": before is not None,
        "malformed": malformed,
        "calibration": found and {key: value for key, value in found.to_json().items() if key != "layers"},
        "plan": planned.to_json(),
        "seconds": round(time.monotonic() - start, 1),
    }
    if as_json:
        return terminal.show_json(summary)
    lines = [str(exactness)] if exactness is not None and planned.source_format is not None else []
    _show(summary, lines, source, destination)
    plans.show_exceptions(planned)


def _convert(plan: "Plan", destination: Path, beside: dict[str, Any] | None) -> "Conversion":
    import fp8x
    from fp8x.checkpoint.destination import real

    with terminal.progress(f"writing {real(destination).name}", unit="bytes") as update:
        return fp8x.convert(plan, destination, beside=beside, progress=update)


@contextlib.contextmanager
def _kept(found: "Sidecar | None", file: Path | None) -> Iterator[None]:
    """Keeps scales in a file while they are written, and after an error."""
    from fp8x.cli import resume
    from fp8x.errors import Fp8xError

    if found is None:
        yield
        return
    resume.keep(found, file)
    try:
        yield
    except Fp8xError:  # which leaves nothing of the destination
        with contextlib.suppress(Fp8xError):
            resume.keep(found, file)
        if file.exists():
            terminal.warn(f"what was calibrated is kept in {file.parent}; the same command goes on with it")
        raise


def _kv_scales(kind: str | None, data: Path | None, given: "Sidecar | None") -> "KVScales | None":
    """How the destination's keys and values are to be stored: as asked, or as a calibration file has it."""
    from fp8x.checkpoint.kv_cache import KVScales
    from fp8x.errors import CalibrationError
    from fp8x.scheme import KV_SCHEMES

    options.check_kv_cache(kind)
    if kind is not None and data is None:
        raise CalibrationError(f"--kv-cache {kind}: its scales are calibrated: pass --calibrate DATA.jsonl")
    scheme = KV_SCHEMES.get(kind, None if given is None else given.kv_cache)
    return None if scheme is None else KVScales(scheme, {})


def _check(plan: "Plan", code: str | None, data: Path | None, calibration: "Sidecar | None", finds_kv: bool) -> None:
    """Raises for what would fail later, after work, or do nothing."""
    from fp8x.errors import CalibrationError, RecipeError, RuleError

    if code is None and plan.source_format is None and not finds_kv:
        raise RecipeError("--recipe: missing; the source is not quantized, so there is nothing to do without a recipe")
    if code not in (None, *UNQUANTIZED) and plan.format is None:
        raise RuleError("--rule: the rules skip every module; nothing would be quantized")
    if data is not None and calibration is not None:
        raise CalibrationError("--calibration: stands beside --calibrate; give the data or the scales, not both")
    if (data or calibration) is not None and not finds_kv and not _needs_calibration(plan):
        option = "calibrate" if data else "calibration"
        terminal.warn(
            f"--{option} is not used: {f'recipe {code}' if code else 'what is written'} has no calibrated scale"
        )
    # Where the source is quantized, its own scales may do; `convert` knows.
    elif plan.source_format is None and data is calibration is None and _needs_calibration(plan):
        raise CalibrationError(
            f"{_static(plan)}: its activation scales are calibrated: pass --calibrate DATA.jsonl with texts like those "
            "the model will see, or take a dynamic recipe, like e4m3_e4m3_bf16_dynamic"
        )


def _static(plan: "Plan") -> str:
    """The first calibrated recipe of a plan, be it of --recipe or of a --rule."""
    from fp8x.recipe import describe

    static = next(t.recipe for t in plan.targets.values() if options.needs_calibration(t.recipe))
    return f"recipe {describe(static)}"


def _needs_calibration(plan: "Plan") -> bool:
    return any(options.needs_calibration(target.recipe) for target in plan.targets.values())


def _schemes(plan: "Plan", rows: "list[TensorRow]") -> dict[str, Any]:
    """How many tensors are in each scheme or type, and their bytes; with the mean SNR where it was measured."""
    from fp8x.checkpoint.rows import mean_decibels

    snrs = {row.name: row.snr for row in rows}
    found: dict[str, dict[str, Any]] = {}
    for row in plan.rows:
        if row.after is None:
            continue
        entry = found.setdefault(str(row.after), {"tensors": 0, "bytes_before": 0, "bytes_after": 0, "snr_db": []})
        entry["tensors"] += 1
        entry["bytes_before"] += row.bytes_before
        entry["bytes_after"] += row.bytes_after
        if (snr := snrs.get(row.name)) is not None:
            entry["snr_db"].append(snr)
    for entry in found.values():
        entry["snr_db"] = mean_decibels(entry["snr_db"])
    return found


def _show(summary: dict[str, Any], lines: list[str], source: Path, destination: Path) -> None:
    table = terminal.table("scheme", "tensors", "bytes before", "bytes after", "mean SNR")
    schemes = summary["schemes"]
    for scheme, found in schemes.items():
        sizes = terminal.size(found["bytes_before"]), terminal.size(found["bytes_after"])
        table.add_row(scheme, str(found["tensors"]), *sizes, terminal.decibels(found["snr_db"]))
    table.add_section()
    sizes = terminal.size(summary["bytes_before"]), terminal.size(summary["bytes_after"])
    table.add_row("all", str(sum(found["tensors"] for found in schemes.values())), *sizes, "")
    rate = f"{terminal.size(summary['bytes_per_second'])}/s"
    recipe = "chosen by module" if summary["requantized"] else summary["recipe"] or "as it was"
    format = summary["format"] or "unquantized"
    line = f"recipe {recipe}, format {format}, {summary['seconds']} s, converted at {rate}"
    if summary["bytes_resumed"]:
        line += f", {terminal.size(summary['bytes_resumed'])} were there from a run that was stopped"
    if summary["calibration"]:
        line += f", calibrated on {summary['calibration']['tokens']:,} tokens ({destination / SIDECAR})"
        line += " by a run that was stopped" if summary["calibration_resumed"] else ""
    choices = [plans.choices(summary["requantized"])] if summary["requantized"] else []
    terminal.show(f"{source} → {destination}", *choices, table, *lines, line)
