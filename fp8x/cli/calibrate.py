"""`fp8x calibrate`, and the calibration that `quantize` and `eval` do with it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8x.cli import options, terminal
from fp8x.cli.loading import load, load_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from fp8x.calibrate import CalibrationReport
    from fp8x.models import Decoder


def calibrate(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The bf16 checkpoint.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help=options.DATA_HELP)],
    recipe: options.RecipeCode,
    rule: options.Rule = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the scales to this JSON file.")] = None,
    num_samples: options.NumSamples = options.NUM_SAMPLES,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    seed: options.Seed = 0,
    min_tokens: options.MinTokens = options.MIN_TOKENS,
    as_json: options.AsJson = False,
) -> None:
    """Show the static activation scales that data gives, layer by layer; the model is not written.

    $ fp8x calibrate examples/tiny_mixtral examples/calibration.jsonl --recipe e4m3_e4m3_bf16 -o scales.json
    """
    from fp8x.errors import CalibrationError

    chosen, rules = options.parse_recipe(recipe), options.parse_rules(rule)
    if not any(map(options.needs_calibration, (chosen, *rules.values()))):
        raise CalibrationError(f"--recipe {recipe}: has no calibrated scale; take a static one, like e4m3_e4m3_bf16")
    if output is not None:
        terminal.check_file("--output", output)
    calibration = options.Calibration(data, num_samples, max_length, batch_size, seed)
    rows = read_rows(source, calibration)
    model = load(source, chosen, rules)
    report = run(model, rows, calibration)
    result = sidecar(report, recipe, calibration, rows)
    if output is not None:
        terminal.write_atomically(output, terminal.to_json(result) + "\n")
    warn_undersampled(report, min_tokens)
    if as_json:
        return terminal.show_json(result)
    table = terminal.table("layer", "amax", "scale", "tokens")
    for path, layer in report.layers.items():
        table.add_row(path, _span(layer.amax), _span(layer.scale), _span(layer.tokens))
    terminal.show(
        f"{recipe} on {data.name}", table, f"{result['samples']} samples, {result['tokens']:,} tokens, seed {seed}"
    )
    if output is not None:
        terminal.show(f"wrote {output}")


def read_rows(source: Path, calibration: options.Calibration) -> "np.ndarray":
    """The rows of tokens to calibrate on; done before the model is loaded, so that bad data costs no time."""
    from fp8x.calibrate.data import pack, read_texts
    from fp8x.checkpoint import Reader
    from fp8x.errors import DataError
    from fp8x.models import DecoderConfig
    from fp8x.models.evaluate import default_context, first_token

    config = DecoderConfig.from_hf(Reader(source).config)
    limit = config.hf.get("max_position_embeddings")
    if isinstance(limit, int) and (calibration.max_length or 0) > limit:
        raise DataError(f"--max-length: {calibration.max_length} is over the model's {limit} positions")
    texts = read_texts(calibration.data, report=terminal.warn)
    rows = pack(
        texts,
        load_tokenizer(source),
        calibration.max_length or default_context(config),
        calibration.num_samples,
        calibration.seed,
        bos_id=first_token(config),
    )
    if rows.max() >= config.vocab_size:
        raise DataError(
            f"{calibration.data}: gives token id {rows.max()}, beyond the model's vocab_size {config.vocab_size}; "
            "are the ids, or the tokenizer, another model's?"
        )
    return rows


def run(model: "Decoder", rows: "np.ndarray", calibration: options.Calibration) -> "CalibrationReport":
    """`fp8x.calibrate` with a progress bar."""
    import fp8x
    from fp8x.calibrate.data import batches

    with terminal.progress("calibrating") as update:

        def watched() -> Iterator["np.ndarray"]:
            for done, batch in enumerate(batches(rows, min(calibration.batch_size, len(rows)))):
                update(done * calibration.batch_size, len(rows))
                yield batch

        return fp8x.calibrate(model, watched())


def sidecar(
    report: "CalibrationReport", recipe: str, calibration: options.Calibration, rows: "np.ndarray"
) -> dict[str, Any]:
    """What scales were found, and on what: enough to find them again."""
    with calibration.data.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "recipe": recipe,
        "dataset": {"file": calibration.data.name, "sha256": digest},
        "seed": calibration.seed,
        "samples": len(rows),
        "length": rows.shape[1],
        "tokens": rows.size,
        "layers": {
            path: {"amax": layer.amax, "scale": layer.scale, "tokens": layer.tokens}
            for path, layer in report.layers.items()
        },
    }


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
