"""`fp8x eval`."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8x.cli import calibrate, options, terminal
from fp8x.cli.loading import load, load_tokenizer

if TYPE_CHECKING:
    from fp8x.models import Decoder
    from fp8x.recipe import Recipe

ALL = "all"


def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="The first is what the others are compared with.")
    ],
    data: Annotated[
        Path, typer.Option("--data", "-d", metavar="DATA", help="Held-out texts, a document a record (JSONL, JSON).")
    ],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe", "-r", metavar="CODE", help="Also the first in this recipe. Repeatable; `all` for each."
        ),
    ] = None,
    calibration_data: Annotated[
        Path | None, typer.Option("--calibrate", "-c", metavar="DATA", help="Texts to calibrate static recipes on.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens in a window; by default the model's context, 2048 at most."),
    ] = None,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    seed: options.Seed = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Bits per byte and perplexity on held-out text, side by side.

    $ fp8x eval MODEL MODEL-fp8 --data heldout.jsonl\n
    $ fp8x eval MODEL --data heldout.jsonl --recipe all --calibrate texts.jsonl --markdown

    Each document stands alone, after the model's first token, in windows of --context tokens without overlap; every
    token is predicted once. Bits per byte counts the bytes of the text in UTF-8.
    """
    from fp8x.calibrate.data import read_texts
    from fp8x.models import evaluate as rule

    recipes = _recipes(recipe or [], calibration_data)
    texts = read_texts(data, report=terminal.warn)
    calibration = rows = None
    if any(map(options.needs_calibration, recipes.values())):
        calibration = options.Calibration(calibration_data, options.NUM_SAMPLES, None, batch_size, seed)
        rows = calibrate.read_rows(checkpoints[0], calibration)

    def models() -> Iterator[tuple[Path, str | None, "Decoder"]]:
        for path in checkpoints:
            yield path, None, load(path)
        for code, chosen in recipes.items():
            model = load(checkpoints[0], chosen)
            if options.needs_calibration(chosen):
                calibrate.run(model, rows, calibration)
            yield checkpoints[0], code, model

    results = []
    for path, code, model in models():
        tokenizer = load_tokenizer(path)
        context = context or rule.default_context(model.config)  # of the first, for all
        with terminal.progress(f"evaluating {code or path.name}") as update:
            found = rule.evaluate(model, tokenizer, texts, context=context, batch_size=batch_size, progress=update)
        baseline = results[0]["bits_per_byte"] if results else found.bits_per_byte
        results.append(
            {
                "checkpoint": str(path),
                "recipe": code,
                **dataclasses.asdict(found),
                "delta_percent": 100 * (found.bits_per_byte / baseline - 1),
                "model_bytes": _model_bytes(model),
            }
        )
    if as_json:
        return terminal.show_json({"data": data.name, "context": context, "results": results})
    _show(results, data, markdown)


def _recipes(codes: list[str], calibration_data: Path | None) -> "dict[str, Recipe]":
    from fp8x.errors import CalibrationError
    from fp8x.recipe import RECIPES

    if ALL in codes:
        codes = [code for code, recipe in RECIPES.items() if recipe.observer is None]
    recipes = {code: options.parse_recipe(code) for code in codes}
    static = [code for code, recipe in recipes.items() if options.needs_calibration(recipe)]
    if static and calibration_data is None:
        raise CalibrationError(f"--recipe {', '.join(static)}: calibrated; pass --calibrate DATA.jsonl too")
    return recipes


def _model_bytes(model: "Decoder") -> int:
    """Of weights and scales, as a checkpoint has them."""
    import jax
    from flax import nnx

    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _show(results: list[dict[str, Any]], data: Path, markdown: bool) -> None:
    header = ("model", "bits per byte", "Δ", "perplexity", "size")
    lines = [
        (
            result["recipe"] or Path(result["checkpoint"]).absolute().name,
            f"{result['bits_per_byte']:.4f}",
            f"{result['delta_percent']:+.2f} %" if index else "–",
            f"{result['perplexity']:.3f}",
            terminal.size(result["model_bytes"]),
        )
        for index, result in enumerate(results)
    ]
    if markdown:
        rule = ("---", *["---:"] * (len(header) - 1))
        return terminal.show(*(f"| {' | '.join(line)} |" for line in (header, rule, *lines)))
    table = terminal.table(*header)
    for line in lines:
        table.add_row(*line)
    first = results[0]
    terminal.show(
        f"{data.name}: lower is better", table, f"{first['tokens']:,} tokens, {first['bytes']:,} bytes of text"
    )
