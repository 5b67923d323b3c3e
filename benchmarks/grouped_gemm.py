"""Grouped and dense products on a GPU, beside their floors and other libraries.

    python benchmarks/grouped_gemm.py --json grouped.json            # every shape in every form; goes on where it was
    python benchmarks/grouped_gemm.py --json grouped.json --quick    # the shapes with published figures, and a few more
    FP8X_GPU_LOCK=lock python benchmarks/grouped_gemm.py --json …    # several at once: one of them measures
    python benchmarks/grouped_gemm.py --table grouped.json           # the table in Markdown

Each product is checked against float64 first, on fresh random operands; a wrong one is not timed. A time has all that a
call launches: quantizing x, laying out its scales, the table of tiles, the kernel; or, where x came quantized, all but
the first. The kernel alone is from CUPTI. How times are taken: fp8x/benchmark/timing.py.
"""

import argparse
import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peers import Run, floor_in_16_bits, peers, peers_in_16_bits

import fp8x
from fp8x import Recipe, Scheme
from fp8x.benchmark import Floor, Results, copy_bandwidth, facts
from fp8x.benchmark.grouped import Shape, floor, gemm_seconds, inputs, measure, sizes_of_sets
from fp8x.benchmark.timing import alone
from fp8x.ops.dispatch import BACKENDS
from fp8x.scheme import mx, per_row, per_tensor

GROUP, BLOCK = Scheme("e4m3", block=(1, 128)), Scheme("e4m3", block=(128, 128))
FORMS = {
    "per tensor": Recipe(per_tensor(), per_tensor(), "static"),
    "per token · channel": Recipe(per_row(), per_row(), "dynamic"),
    "1×128 · 128×128": Recipe(BLOCK, GROUP, "dynamic"),
    "1×128 · 1×128": Recipe(GROUP, GROUP, "dynamic"),
    "W8A16, per channel": Recipe(per_row()),
    "W8A16, 128×128": Recipe(BLOCK),
    "MXFP8 weights": Recipe(mx()),
    "MXFP8 · MXFP8": Recipe(mx(), mx(), "dynamic"),
}
IN_16_BITS = "W8A16, per channel"  # the form whose operands bf16 peers multiply

# `[tokens · top-k, K] x [E, N, K]`. The first three are what DeepGEMM publishes; w13 is gate and up in one.
PREFILL = {
    "8 × 4096, N 4096, K 7168": Shape(8 * 4096, 4096, 7168, 8),
    "8 × 4096, N 7168, K 2048": Shape(8 * 4096, 7168, 2048, 8),
    "dense 4096 × 7168 × 16384": Shape(4096, 7168, 16384),
    "Mixtral 8x7B w13, 4096 tokens": Shape(4096, 2 * 14336, 4096, 8, 2),
    "Mixtral 8x7B w2, 4096 tokens": Shape(4096, 4096, 14336, 8, 2),
    "Qwen3-30B-A3B w13, 4096 tokens": Shape(4096, 2 * 768, 2048, 128, 8),
    "Qwen3-30B-A3B w2, 4096 tokens": Shape(4096, 2048, 768, 128, 8),
}
LAYERS = {
    "Mixtral 8x7B w13": Shape(1, 2 * 14336, 4096, 8, 2),
    "Mixtral 8x7B w2": Shape(1, 4096, 14336, 8, 2),
    "Qwen3-30B-A3B w13": Shape(1, 2 * 768, 2048, 128, 8),
    "Qwen3-30B-A3B w2": Shape(1, 2048, 768, 128, 8),
}
DECODE = {
    f"{name}, {tokens} token{'s' * (tokens > 1)}": dataclasses.replace(shape, tokens=tokens)
    for tokens in (1, 8, 64, 16, 4, 32, 2)
    for name, shape in LAYERS.items()
}
SHAPES = PREFILL | DECODE
QUICK_FORMS = ("per tensor", "per token · channel", "1×128 · 128×128", "W8A16, per channel", "MXFP8 weights")
QUICK = [*list(PREFILL)[:3], *(name for name in DECODE if name.endswith((" 1 token", " 64 tokens")))]


def tiny(shape: Shape) -> Shape:
    """A shape that a CPU multiplies at once, of the same kind."""
    experts, top_k = min(shape.experts, 4), shape.top_k and min(shape.top_k, 2)
    return Shape(min(shape.tokens, 24), 96, 128, experts, top_k)


@dataclasses.dataclass(frozen=True)
class Case:
    """Somebody's product of a shape in a form.

    Attributes:
        who: `"fp8x"` or a peer.
        quantized: whether x comes quantized, as peers want it.
        run: gives fields of the result.
        floor: of the group sizes.
    """

    who: str
    quantized: bool
    run: Callable[[], dict[str, Any]]
    floor: Callable[[Any], Floor]


def cases(shape: Shape, form: str) -> Iterator[Case]:
    recipe = FORMS[form]
    for quantized in (False, True) if recipe.activation else (False,):
        floor_of = functools.partial(floor, shape, recipe, quantized=quantized)
        yield Case("fp8x", quantized, functools.partial(measure, shape, recipe, quantized=quantized), floor_of)

    def of_peer(run: Run, quantized: bool) -> dict[str, Any]:
        with alone():
            return run(inputs(shape, recipe, quantized=quantized))

    for name, run in peers(shape, recipe):
        yield Case(name, True, functools.partial(of_peer, run, True), floor_of)
    if form == IN_16_BITS:
        for name, run in peers_in_16_bits(shape, recipe):
            yield Case(name, False, functools.partial(of_peer, run, False), functools.partial(floor_in_16_bits, shape))


def run(results: Results, shapes: dict[str, Shape], forms: list[str], *, ours: bool, quick: bool, end: float) -> None:
    """Adds the results of our cases, or of the others, that are not there yet, until the time `end`.

    In a `quick` run x comes quantized where it can.
    """
    for name, shape in shapes.items():
        for form in forms:

            def attempt(case: Case, shape=shape, form=form) -> dict[str, Any]:
                sizes = sizes_of_sets(shape, FORMS[form], quantized=case.quantized)
                floors = [case.floor(of_set) for of_set in sizes]
                mean = dataclasses.replace(floors[0], bytes=sum(least.bytes for least in floors) // len(floors))
                least = {"bytes": mean.bytes, "flops": mean.flops, "floor_seconds": mean.seconds}
                return dataclasses.asdict(shape) | least | case.run()

            for case in cases(shape, form):
                if (case.who == "fp8x") != ours or (quick and ours and case.quantized != bool(FORMS[form].activation)):
                    continue
                if time.monotonic() > end:
                    return
                key = {"shape": name, "form": form, "who": case.who, "quantized": case.quantized}
                results.attempt(key, functools.partial(attempt, case))


COLUMNS = ("form", "who", "x", "time", "GEMM alone", "floor", "floor / time", "TFLOP/s", "GB/s", "of a copy", "error")


def table(document: dict[str, Any]) -> str:
    """Markdown: what it was measured on, and a table for each shape."""
    facts, results = document["facts"], document["results"]
    lines = [", ".join(f"{name} {value}" for name, value in facts.items() if name != "copy_bandwidth")]
    lines += [f"A copy: {facts['copy_bandwidth'] / 1e9:.0f} GB/s."]
    for shape in dict.fromkeys(result["shape"] for result in results):
        lines += ["", f"### {shape}", "", f"| {' | '.join(COLUMNS)} |", "|---|---|---|" + "--:|" * (len(COLUMNS) - 3)]
        lines += [_row(result, facts["copy_bandwidth"]) for result in results if result["shape"] == shape]
    return "\n".join(lines)


def _row(result: dict[str, Any], copy: float) -> str:
    cells = [result["form"], result["who"], "8 bits" if result["quantized"] else "16 bits"]
    if "failure" in result:
        cells += [result["failure"].splitlines()[0][:160]] + [""] * (len(COLUMNS) - 4)
    else:
        seconds, alone = result["seconds"], gemm_seconds(result)
        rate = result["bytes"] / seconds
        cells += [f"{seconds * 1e6:.1f} µs{' (host)' if result['host_seconds'] > 0.8 * seconds else ''}"]
        cells += ["" if alone is None else f"{alone * 1e6:.1f} µs", f"{result['floor_seconds'] * 1e6:.1f} µs"]
        cells += [f"{result['floor_seconds'] / seconds:.0%}", f"{result['flops'] / seconds / 1e12:.0f}"]
        cells += [f"{rate / 1e9:.0f}", f"{rate / copy:.0%}", f"{result['relative_error']:.1e}"]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here, and go on where they are")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print results as Markdown, and do nothing else")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK_FORMS)} of {', '.join(QUICK)}")
    parser.add_argument("--shapes", default="", metavar="REGEX", help="only those in whose name it is found")
    parser.add_argument("--forms", default="", metavar="REGEX", help="likewise")
    parser.add_argument("--backend", choices=BACKENDS, default="mosaic_gpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes under the same names, to try this script")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    options = parser.parse_args(arguments)
    if options.table:
        return print(table(json.loads(options.table.read_text())))
    if not options.json:
        parser.error("--json or --table is needed")
    end = time.monotonic() + options.seconds
    shapes = {name: tiny(shape) if options.tiny else shape for name, shape in SHAPES.items()}
    shapes = {
        name: shape
        for name, shape in shapes.items()
        if re.search(options.shapes, name) and (name in QUICK or not options.quick)
    }
    forms = [form for form in (QUICK_FORMS if options.quick else FORMS) if re.search(options.forms, form)]
    nbytes = 2**20 if options.tiny else 2**31
    header = lambda: facts() | {"backend": options.backend, "copy_bandwidth": copy_bandwidth(nbytes)}  # noqa: E731
    results = Results(options.json, header)
    with fp8x.backend(options.backend):
        for kind in (PREFILL, DECODE):
            some = {name: shape for name, shape in shapes.items() if name in kind}
            for ours in (True, False):
                run(results, some, forms, ours=ours, quick=options.quick, end=end)


if __name__ == "__main__":
    main()
