"""`fp8x calibrate`, and the calibration that `quantize` and `eval` do with it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8x import interrupt
from fp8x.cli import options, terminal
from fp8x.cli.loading import load, load_tokenizer, read_config, read_texts, set_context

if TYPE_CHECKING:
    import numpy as np

    from fp8x.calibrate import CalibrationReport, Dataset
    from fp8x.models import Decoder


def calibrate(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The bf16 checkpoint.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help=options.DATA_HELP)],
    recipe: options.RecipeCode,
    rule: options.Rule = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the scales to this JSON file.")] = None,
    num_samples: options.NumSamples = options.NUM_SAMPLES,
    max_length: options.MaxLength = None,
    context: options.Context = None,
    document_rows: options.DocumentRows = options.DOCUMENT_ROWS,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    seed: options.Seed = 0,
    method: options.MethodName = options.METHOD,
    percentile: options.Percentile = options.PERCENTILE,
    kv_cache: options.KVCache = None,
    mesh: options.MeshText = None,
    min_tokens: options.MinTokens = options.MIN_TOKENS,
    allow_nonfinite: options.AllowNonfinite = False,
    list_malformed: options.ListMalformed = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the static activation scales that data gives, layer by layer; the model is not written.

    $ fp8x calibrate MODEL texts.jsonl --recipe e4m3_e4m3_bf16 --output calibration.json\n
    $ fp8x calibrate MODEL texts.jsonl --recipe e4m3_e4m3_bf16 --method mse --mesh data=8 --batch-size 64\n
    $ fp8x calibrate MODEL texts.jsonl --recipe mxfp8_mxfp8_bf16 --kv-cache tensor --output calibration.json

    `fp8x.load(MODEL, RECIPE, calibration="calibration.json")` takes what --output writes.
    """
    from fp8x.calibrate import Sidecar
    from fp8x.calibrate.methods import check_method
    from fp8x.errors import CalibrationError

    chosen, rules = options.parse_recipe(recipe), options.parse_rules(rule)
    options.check_kv_cache(kv_cache)
    if kv_cache is None and not any(map(options.needs_calibration, (chosen, *rules.values()))):
        raise CalibrationError(
            f"--recipe {recipe}: has no calibrated scale; take a static one, like e4m3_e4m3_bf16, or pass --kv-cache"
        )
    if output is not None:
        terminal.check_file("--output", output)
    check_method(method, percentile)
    devices = options.parse_mesh(mesh)
    calibration = options.Calibration(
        *(data, num_samples, max_length, batch_size, seed, method, percentile, devices, kv_cache),
        context=context,
        document_rows=document_rows,
        list_malformed=list_malformed,
    )
    rows, malformed = read_rows(source, calibration)
    is_split = devices is not None and any(devices.shape.get(axis, 1) > 1 for axis in ("tensor", "expert"))
    model = load(source, chosen, rules, allow_nonfinite, devices if is_split else None)
    set_context(model, source, context)
    report = run(model, rows, calibration)
    result = Sidecar(recipe, report, dataset(calibration, rows))
    if output is not None:
        with interrupt.shielded():
            result.write(output)
    warn_undersampled(report, min_tokens)
    if as_json:
        return terminal.show_json(result.to_json() | {"malformed": malformed})
    table = terminal.table("layer", "amax", "scale", "tokens")
    for path, layer in report.layers.items():
        table.add_row(path, _span(layer.amax), _span(layer.scale), _span(layer.tokens))
    terminal.show(f"{recipe} on {data.name}", table, f"{len(rows)} samples, {rows.size:,} tokens, seed {seed}")
    if output is not None:
        terminal.show(f"wrote {output}")


def read_rows(source: Path, calibration: options.Calibration) -> "tuple[np.ndarray, int]":
    """The rows of tokens to calibrate on, and how many records of the data are malformed.

    Done before the model is loaded, so that bad data costs no time.
    """
    from fp8x.calibrate.data import pack
    from fp8x.models.evaluate import default_context, first_token
    from fp8x.models.inputs import check_context, check_tokens

    config = read_config(source)
    if calibration.context is not None:
        config = dataclasses.replace(config, context=calibration.context)
    check_context("--max-length", calibration.max_length or 1, config.context)
    texts, malformed = read_texts(calibration.data, calibration.list_malformed)
    tokenizer = load_tokenizer(source)
    rows = pack(
        texts,
        tokenizer,
        calibration.max_length or default_context(config),
        calibration.num_samples,
        calibration.seed,
        bos_id=first_token(config),
        document_rows=calibration.document_rows,
        report=lambda message: terminal.warn(f"{calibration.data}: {message}"),
    )
    check_tokens(f"{calibration.data}", rows.flat, tokenizer, config.vocab_size)
    return rows, malformed


def run(model: "Decoder", rows: "np.ndarray", calibration: options.Calibration) -> "CalibrationReport":
    """`fp8x.calibrate` with a progress bar."""
    import fp8x
    from fp8x.calibrate.data import batches
    from fp8x.programs import kept_programs

    mesh = calibration.mesh
    share = 1 if mesh is None else mesh.shape.get("data", 1)
    size = min(calibration.batch_size, max(share, len(rows) // share * share))
    with terminal.progress("calibrating") as update, kept_programs():
        update(0, len(rows))  # before the first batch, which compiles for seconds
        return fp8x.calibrate(
            model,
            batches(rows, size),
            mesh,
            method=calibration.method,
            percentile=calibration.percentile,
            kv_cache=calibration.kv_cache or False,
            kv_cache_only=calibration.kv_cache_only,
            progress=lambda done: update(min(done * size, len(rows)), len(rows)),
        )


def dataset(calibration: options.Calibration, rows: "np.ndarray") -> "Dataset":
    """What rows were drawn from."""
    from fp8x.calibrate import Dataset

    return Dataset.of(calibration.data, rows, calibration.seed, calibration.document_rows)


def warn_undersampled(report: "CalibrationReport", min_tokens: int) -> None:
    """Names what saw few tokens, so that its scale rests on little."""
    if names := report.undersampled(min_tokens):
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        terminal.warn(f"fewer than {min_tokens} tokens in {', '.join(names[:5])}{rest}; give more or other data")


def _span(values: "np.ndarray") -> str:
    """One number, or the smallest and the largest of several."""
    low, high = values.min(), values.max()
    form = "{:,}" if values.dtype.kind == "i" else "{:.4g}"
    return form.format(high) if low == high else f"{form.format(low)} … {form.format(high)}"
