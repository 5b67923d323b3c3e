"""Quantizing activations: XLA's launches beside the kernel's, against what a copy of the same bytes takes.

python benchmarks/quantize.py --json out.json [--quick]       # on a machine with a Hopper GPU
python benchmarks/quantize.py --table out.json
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8x.benchmark.hardware import Floor, copy_bandwidth, facts
from fp8x.benchmark.results import Results
from fp8x.benchmark.timing import sets_needed, time_calls
from fp8x.ops.quantize import QuantizeCall, by_kernel, by_xla, unsupported
from fp8x.scheme import Scheme, mx, per_row

SCHEMES = {"1×128": Scheme("e4m3", block=(1, 128)), "MX": mx(), "per token": per_row()}
# Rows and K without a gate; then rows and I with one. Hidden sizes of DeepSeek-V3, Qwen3-30B-A3B, Mixtral 8×7B.
PLAIN = ((16384, 7168), (16384, 2048), (64, 7168), (8192, 14336))
GATED = ((32768, 768), (32768, 2048), (16, 14336), (8192, 14336), (64, 768))
BACKENDS = {"kernel": by_kernel, "xla": by_xla}


@dataclasses.dataclass(frozen=True)
class Case:
    m: int
    k: int
    scheme: str
    gate: str | None

    @property
    def name(self) -> str:
        return f"{self.m} × {self.k}, {self.scheme}{', gate' if self.gate else ''}"

    @property
    def floor(self) -> Floor:
        """bfloat16 read once, codes and scales written once."""
        scheme, elements = SCHEMES[self.scheme], self.m * self.k
        scales = int(np.prod(scheme.scale_shape((self.m, self.k)))) * np.dtype(scheme.scale_dtype).itemsize
        return Floor(elements * (5 if self.gate else 3) + scales, 0)


def cases(*, quick: bool, tiny: bool) -> list[Case]:
    shapes = [(*shape, None) for shape in PLAIN] + [(*shape, "silu") for shape in GATED]
    shapes = [(16, 256, gate) for *_, gate in (shapes[0], shapes[-1])] if tiny else shapes
    schemes = list(SCHEMES)[: 1 if quick else None]
    return [Case(m, k, scheme, gate) for m, k, gate in shapes for scheme in schemes]


def measure(case: Case, who: str) -> dict[str, Any]:
    scheme, shape = SCHEMES[case.scheme], (case.m, 2, case.k) if case.gate else (case.m, case.k)
    call = QuantizeCall(case.m, case.k, np.dtype(jnp.bfloat16), scheme, has_scale=False, gate=case.gate)
    if who == "kernel" and (reason := unsupported(call)):
        return {"failure": reason}
    inputs = [
        (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16),) for i in range(sets_needed(case.floor.bytes))
    ]
    timing, results = time_calls(lambda x: BACKENDS[who](x, scheme, None, None, case.gate), inputs)
    expected = jax.jit(lambda x: by_xla(x, scheme, None, None, case.gate))(*inputs[0])
    different = [
        int(jnp.sum(a.view(jnp.uint8) != b.view(jnp.uint8)))
        for a, b in ((results[0].data, expected.data), (results[0].scale, expected.scale))
    ]
    # Kernel and XLA give the same bits; behind a gate h may round to its neighbor.
    return dataclasses.asdict(timing) | {
        "bytes": case.floor.bytes,
        "floor_seconds": case.floor.seconds,
        "bytes_that_differ": sum(different),
    }


def table(document: dict[str, Any]) -> str:
    copy = document["facts"]["copy_bandwidth"]
    lines = ["| | by | time | of a copy | GB/s | bytes that differ |", "|---|---|--:|--:|--:|--:|"]
    for result in document["results"]:
        if "failure" in result:
            lines.append(f"| {result['case']} | {result['who']} | {result['failure']} | | | |")
            continue
        bandwidth = result["bytes"] / result["seconds"]
        lines.append(
            f"| {result['case']} | {result['who']} | {result['seconds'] * 1e6:.1f} µs | {bandwidth / copy:.0%} | "
            f"{bandwidth / 1e9:.0f} | {result['bytes_that_differ']} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here, and go on where they are")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print results as Markdown, and measure nothing")
    parser.add_argument("--who", choices=BACKENDS, nargs="+", default=list(BACKENDS))
    parser.add_argument("--quick", action="store_true", help="only 1×128")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this script")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    options = parser.parse_args(arguments)
    if options.table:
        return print(table(json.loads(options.table.read_text())))
    if not options.json:
        parser.error("--json or --table is needed")
    end = time.monotonic() + options.seconds
    nbytes = 2**20 if options.tiny else 2**31
    results = Results(options.json, lambda: facts() | {"copy_bandwidth": copy_bandwidth(nbytes)})
    for case in cases(quick=options.quick, tiny=options.tiny):
        for who in options.who:
            if time.monotonic() < end:
                results.attempt({"case": case.name, "who": who}, lambda case=case, who=who: measure(case, who))


if __name__ == "__main__":
    main()
