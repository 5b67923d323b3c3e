"""`fp8x bench`: how fast this device multiplies, and which tiling it should take for that."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8x import interrupt
from fp8x.cli import options, terminal

if TYPE_CHECKING:
    from fp8x.benchmark.grouped import Shape
    from fp8x.recipe import Recipe

Cases = list[tuple[str, "Recipe", "Shape"]]


def grouped(
    recipe: Annotated[
        list[str],
        typer.Option("--recipe", "-r", metavar="CODE", help="A recipe; `fp8x recipes` lists them. Repeatable."),
    ],
    n: Annotated[int, typer.Option("-n", "--n", min=1, metavar="N", help="Output features.")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, metavar="K", help="Input features.")],
    tokens: Annotated[list[int], typer.Option("--tokens", "-t", min=1, metavar="M", help="Rows. Repeatable.")],
    experts: Annotated[int, typer.Option(min=1, metavar="E", help="Matrices; 1 is a dense product.")] = 1,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Experts that each token draws; else all get as many rows.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="xla or mosaic_gpu; by default what ops would take.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what kernels estimate of their tilings; run nothing.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try tilings of the mosaic_gpu kernels; write down the fastest.")
    ] = False,
    most: Annotated[
        int, typer.Option(min=1, metavar="N", help="For --tune: try so many, those with the best estimates.")
    ] = 12,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For --tune: the table; by default this package's own.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure a dense or grouped product: checked against float64, then timed, beside its floor on an H200.

    $ fp8x bench grouped --tokens 4096 -n 4096 -k 7168 --experts 8 --top-k 2 --recipe fp8_e4m3fn_bf16_block_scale\n
    $ fp8x bench grouped --tokens 1 --tokens 64 -n 4096 -k 14336 --recipe mxfp8_bf16 --backend mosaic_gpu --tune

    The time has all that the op launches, from 16-bit activations. A table elsewhere than in this package is read where
    the environment variable FP8X_TUNING names it.
    """
    import fp8x
    from fp8x.benchmark.grouped import Shape
    from fp8x.errors import ShapeError

    if top_k is not None and top_k > experts:
        raise ShapeError(f"--top-k: {top_k} is more than the {experts} of --experts")
    if table is not None:
        terminal.check_file("--table", table)
    recipes = {code: options.parse_recipe(code) for code in recipe}
    cases = [(code, r, Shape(m, n, k, experts, top_k)) for code, r in recipes.items() for m in tokens]
    backend = "mosaic_gpu" if tune else backend
    with fp8x.backend(backend) if backend else contextlib.nullcontext():
        if explain:
            return _explain(cases, as_json)
        if tune:
            return _tune(cases, most, table, as_json)
        return _measure(cases, as_json)


def _measure(cases: Cases, as_json: bool) -> None:
    from fp8x.benchmark import facts
    from fp8x.benchmark.grouped import floor, measure

    results = []
    with terminal.progress("measuring") as update:
        for code, recipe, shape in cases:
            least = floor(shape, recipe, shape.group_sizes(0))
            found = {"bytes": least.bytes, "flops": least.flops, "floor_seconds": least.seconds}
            results.append({"recipe": code, **dataclasses.asdict(shape)} | found | measure(shape, recipe))
            update(len(results), len(cases))
    header = facts()
    if as_json:
        return terminal.show_json({"facts": header, "results": results})
    words = ("kernel", "tiling")
    lines = terminal.table("recipe", "tokens", *words, "time", "floor", "TFLOP/s", "GB/s", "error", left=words)
    for result in results:
        seconds, error = result.get("seconds"), f"{result['relative_error']:.1e}"
        rates = [result["flops"] / seconds / 1e12, result["bytes"] / seconds / 1e9] if seconds else []
        rates = [f"{rate:.3g}" for rate in rates] or ["wrong", ""]
        cells = [_microseconds(seconds), _microseconds(result["floor_seconds"]), *rates, error]
        lines.add_row(result["recipe"], f"{result['tokens']:,}", result["kernel"], _words(result.get("tiling")), *cells)
    terminal.show(_title(cases, header["device"]), lines)


def _explain(cases: Cases, as_json: bool) -> None:
    from fp8x.benchmark.grouped import candidates

    choices = [(code, shape, candidates(shape, recipe)) for code, recipe, shape in cases]
    if as_json:
        return terminal.show_json([_explained(*choice) for choice in choices])
    for code, shape, choice in choices:
        if choice is None:
            terminal.show(f"{code}, {shape.tokens:,} tokens: a kernel without tilings")
            continue
        lines = terminal.table("tiling", "estimate", "")
        for tiling, seconds in choice.estimates.items():
            how = "estimated" if choice.seconds is None else f"measured: {_microseconds(choice.seconds)}"
            taken = f"taken, {how}" if tiling == choice.tiling else ""
            lines.add_row(_words(dataclasses.asdict(tiling)), _microseconds(seconds), taken)
        terminal.show(f"{code}, {shape.tokens:,} tokens: {choice.problem.kernel}", lines)


def _explained(code: str, shape: "Shape", choice: Any) -> dict[str, Any]:
    found = {"recipe": code, **dataclasses.asdict(shape), "kernel": None}
    if choice is None:
        return found
    estimates = [{"tiling": dataclasses.asdict(t), "seconds": seconds} for t, seconds in choice.estimates.items()]
    taken = {"tiling": dataclasses.asdict(choice.tiling), "measured_seconds": choice.seconds, "estimates": estimates}
    return found | {"kernel": choice.problem.kernel} | taken


def _tune(cases: Cases, most: int, path: Path | None, as_json: bool) -> None:
    import jax

    from fp8x.benchmark.tune import entry, ranked, tune
    from fp8x.pallas import tuning

    kind = jax.devices()[0].device_kind
    path = path or tuning.table_path(kind)
    results = []
    for code, recipe, shape in cases:
        trials = []
        with terminal.progress(f"{code}, {shape.tokens} tokens") as update:
            for trial in tune(shape, recipe, most):
                trials = ranked([*trials, trial])
                update(len(trials), None)
                if trials[0].seconds is not None:  # at once: the next one may hang
                    with interrupt.shielded():
                        tuning.write(path, kind, [entry(shape, recipe, trials[0])])
        results.append({"recipe": code, **dataclasses.asdict(shape), "trials": list(map(dataclasses.asdict, trials))})
    if as_json:
        return terminal.show_json({"device": kind, "table": path, "results": results})
    for result in results:
        lines = terminal.table("tiling", "time", "estimate", "", left=("",))
        for trial in result["trials"]:
            seconds, failure = trial["seconds"], (trial["failure"] or "").splitlines()[:1]
            lines.add_row(
                _words(trial["tiling"]), _microseconds(seconds), _microseconds(trial["estimate"]), *(failure or [""])
            )
        terminal.show(f"{result['recipe']}, {result['tokens']:,} tokens", lines)
    terminal.show(f"wrote {path}")


def _title(cases: Cases, device: str) -> str:
    shape = cases[0][2]
    experts = f" x {shape.experts} experts" if shape.experts > 1 else ""
    routed = f", top {shape.top_k}" if shape.top_k else ""
    return f"[tokens, {shape.k}] x [{shape.n}, {shape.k}]{experts}{routed} on {device}; floors are an H200's"


def _microseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.1f} µs"


def _words(tiling: dict[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (tiling or {}).items())
