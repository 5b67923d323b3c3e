"""`fp8x eval`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8x.cli import calibrate, options, terminal
from fp8x.cli.loading import load, load_tokenizer, read_config, read_texts, set_context

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fp8x.recipe import Recipe

ALL, TOKEN = "all", "token"


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
    kv_cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Also the first with keys and values in e4m3: a scale a `token` and head, a `tensor` or a `head`.",
        ),
    ] = None,
    calibration_data: Annotated[
        Path | None, typer.Option("--calibrate", "-c", metavar="DATA", help="Texts to calibrate static recipes on.")
    ] = None,
    method: options.MethodName = options.METHOD,
    percentile: options.Percentile = options.PERCENTILE,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens in a window, and that the models may read; by default what all were made for, 2048 at most.",
        ),
    ] = None,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    seed: options.Seed = 0,
    mesh: options.MeshText = None,
    allow_nonfinite: options.AllowNonfinite = False,
    list_malformed: options.ListMalformed = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Bits per byte and perplexity on held-out text, side by side.

    $ fp8x eval MODEL MODEL-fp8 --data heldout.jsonl\n
    $ fp8x eval MODEL --data heldout.jsonl --recipe all --calibrate texts.jsonl --markdown\n
    $ fp8x eval MODEL --data heldout.jsonl --kv-cache token --kv-cache tensor --calibrate texts.jsonl

    Each document stands alone, after the model's first token, in windows of --context tokens without overlap; every
    token is predicted once. Bits per byte counts the bytes of the text in UTF-8.
    """
    import jax
    from flax import nnx

    from fp8x.calibrate.methods import check_method
    from fp8x.models import evaluate as rule
    from fp8x.programs import kept_programs

    recipes, devices = _recipes(recipe or [], calibration_data), options.parse_mesh(mesh)
    kinds = _kv_caches(kv_cache or [], calibration_data)
    texts, malformed = read_texts(data, list_malformed)
    tokenizers = _check_checkpoints(checkpoints, recipes)
    # All read the same windows.
    window = context or min(rule.default_context(read_config(path)) for path in checkpoints)
    calibration = rows = calibration_malformed = None
    if any(map(options.needs_calibration, recipes.values())) or set(kinds) - {TOKEN}:
        check_method(method, percentile)
        calibration = options.Calibration(
            *(calibration_data, options.NUM_SAMPLES, None, batch_size, seed, method, percentile),
            list_malformed=list_malformed,
        )
        rows, calibration_malformed = calibrate.read_rows(checkpoints[0], calibration)
    elif calibration_data is not None:
        terminal.warn("--calibrate is not used: no --recipe has a calibrated scale, nor has a --kv-cache")

    def measure(path: Path, code: str | None, kind: str | None) -> dict[str, Any]:
        model = load(path, recipes.get(code), allow_nonfinite=allow_nonfinite, mesh=devices)
        if options.needs_calibration(recipes.get(code)):
            calibrate.run(model, rows, calibration)
        if kind == TOKEN:
            model.set_kv_cache("e4m3")
        elif kind is not None:
            calibrate.run(model, rows, dataclasses.replace(calibration, kv_cache=kind, kv_cache_only=True))
        set_context(model, path, context)
        with terminal.progress(f"evaluating {code or path.name}") as update:
            found = rule.evaluate(
                model, tokenizers[path], texts, context=window, batch_size=batch_size, progress=update
            )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        texts_at_once = 1 if devices is None else devices.shape.get("data", 1)
        cache = jax.eval_shape(lambda: model.init_cache(texts_at_once, window).layers)
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        per_token = nbytes / window / texts_at_once
        row = {"checkpoint": str(path), "recipe": code, "kv_cache": kind, **dataclasses.asdict(found)}
        return row | {"model_bytes": size, "cache_bytes_per_token": per_token}

    results = []
    cases = [(path, None, None) for path in checkpoints]
    cases += [(checkpoints[0], code, None) for code in recipes]
    cases += [(checkpoints[0], None, kind) for kind in kinds]
    for case in cases:
        with kept_programs():
            result = measure(*case)
        baseline = results[0] if results else result
        result["delta_percent"] = 100 * (result["bits_per_byte"] / baseline["bits_per_byte"] - 1)
        results.append(result)
    if as_json:
        counts = {"malformed": malformed, "calibration_malformed": calibration_malformed}
        return terminal.show_json({"data": data.name, **counts, "context": window, "results": results})
    _show(results, data, markdown)


def _check_checkpoints(checkpoints: list[Path], recipes: "dict[str, Recipe]") -> "dict[Path, Tokenizer]":
    """The tokenizer of each. Raises for what would fail later, after work."""
    from fp8x.checkpoint import Reader, format_of
    from fp8x.errors import CheckpointError

    formats = [format_of(Reader(path).config) for path in checkpoints]
    if recipes and formats[0] is not None:
        raise CheckpointError(
            f"--recipe: {checkpoints[0]} is quantized already ({formats[0].name}); give the unquantized one first"
        )
    return {path: load_tokenizer(path) for path in checkpoints}


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


def _kv_caches(kinds: list[str], calibration_data: Path | None) -> list[str]:
    from fp8x.errors import CalibrationError

    for kind in kinds:
        options.check_kv_cache(kind, TOKEN)
    if set(kinds) - {TOKEN} and calibration_data is None:
        raise CalibrationError(f"--kv-cache {', '.join(kinds)}: calibrated; pass --calibrate DATA.jsonl too")
    return kinds


def _show(results: list[dict[str, Any]], data: Path, markdown: bool) -> None:
    header = ("model", "bits per byte", "Δ", "perplexity", "size", "cache a token")
    lines = [
        (
            _name(result),
            f"{result['bits_per_byte']:.4f}",
            f"{result['delta_percent']:+.2f} %" if index else "–",
            f"{result['perplexity']:.3f}",
            terminal.size(result["model_bytes"]),
            terminal.size(round(result["cache_bytes_per_token"])),
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


def _name(result: dict[str, Any]) -> str:
    if result["kv_cache"] is not None:
        return f"keys and values in e4m3, a scale a {result['kv_cache']}"
    return result["recipe"] or Path(result["checkpoint"]).absolute().name
