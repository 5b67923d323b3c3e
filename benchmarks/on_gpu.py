"""Everything that waits for a Hopper GPU, in one command and within ten minutes.

    OUT=out python benchmarks/on_gpu.py                       # in the repository's root; python has jax with CUDA
    OUT=out python benchmarks/on_gpu.py --steps tests,tune    # or some of the steps

Steps: `tests`, the kernels against float64; `xla`, the tests of ops on XLA's GPU backend; `bench`, times beside other
libraries; `tune`, the tilings; `eval`, a model's bits per byte. What hangs, crashes or loses the GPU costs its own
process: that is killed, noted, and the rest goes on in a new one. Results are written as they come, and a second run
into the same directory goes on.

    tests.json      what came of each test
    quantize.json, grouped.json, moe.json, decode.json
                    times; the scripts in benchmarks make tables of them: --table out/moe.json
    tuning.json     the fastest tilings, as fp8x/pallas/tuning/nvidia_h200.json would hold them
    log.txt         what everything printed, and what came of each step
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervise import ROOT, TEST_STALL, Outcomes, news_of, run, run_again, run_tests

XLA_TESTS = ["-m", "not slow", "tests/ops/test_matmul.py", "tests/ops/test_grouped_matmul.py", "tests/test_numerics.py"]
# Rows, N, K and experts; those with published figures first.
TUNED = [(32768, 4096, 7168, 8), (32768, 7168, 2048, 8), (4096, 7168, 16384, 1), (64, 4096, 7168, 8)]
TUNED_RECIPES = ("fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16_dynamic", "mxfp8_bf16")


def bench(out: Path, log: Path, deadline: float) -> dict[str, str]:
    """Every benchmark for its share of the time that is left."""
    found = {}
    for name, share in {"quantize": 0.15, "grouped_gemm": 0.5, "moe": 0.5, "decode": 1.0}.items():
        now, results = time.monotonic(), out / f"{name.removesuffix('_gemm')}.json"
        command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--quick", "--json", results]
        end = now + share * (deadline - now)
        found[name] = run_again(command, results, log, end, FP8X_BACKEND="mosaic_gpu")
    return found


def evaluate(log: Path, deadline: float) -> dict[str, str]:
    """A model's bits per byte in several recipes, by the kernels and on XLA: read them in the log."""
    command = [sys.executable, "-m", "fp8x", "eval", "examples/tiny_mixtral", "--data", "examples/heldout.jsonl"]
    command += [word for recipe in ("e4m3_bf16", *TUNED_RECIPES) for word in ("--recipe", recipe)]
    return {name: run(command, log, deadline, lambda: None, FP8X_BACKEND=name) for name in ("mosaic_gpu", "xla")}


def tune(table: Path, log: Path, deadline: float) -> dict[str, str]:
    found = {}
    recipes = [word for recipe in TUNED_RECIPES for word in ("--recipe", recipe)]
    for m, n, k, experts in TUNED:
        shape = ["-t", m, "-n", n, "-k", k, "--experts", experts]
        command = [sys.executable, "-m", "fp8x", "bench", "grouped", *shape, *recipes, "--tune", "--table", table]
        found[f"{m} rows, N {n}, K {k}, {experts} experts"] = run(
            command, log, deadline, lambda: news_of(table), stall=TEST_STALL
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="tests,xla,bench,tune,eval", help="some of them")
    parser.add_argument("--seconds", type=float, default=570, help="for all steps together")
    options = parser.parse_args(arguments)
    out = Path(os.environ.get("OUT", "out")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    log, outcomes, start = out / "log.txt", Outcomes(out / "tests.json"), time.monotonic()

    def step(name: str, until: float, work: Callable[[float], Any]) -> None:
        """`until`: the share of the time after which the step is over."""
        if name not in options.steps.split(","):
            return
        before = time.monotonic()
        try:
            found = work(start + until * options.seconds)
        except Exception as error:  # of this script: the other steps still run
            found = f"{type(error).__name__}: {error}"
        line = f"{name}, {time.monotonic() - before:.0f} s: {json.dumps(found)}"
        print(line, flush=True)
        with log.open("a") as file:
            file.write(f"\n{line}\n")

    step("tests", 0.3, lambda end: run_tests(["-m", "gpu", "tests/gpu"], outcomes, log, end))
    step("xla", 0.36, lambda end: run_tests(XLA_TESTS, outcomes, log, end, FP8X_BACKEND="xla"))
    step("bench", 0.8, lambda end: bench(out, log, end))
    step("tune", 0.93, lambda end: tune(out / "tuning.json", log, end))
    step("eval", 1.0, lambda end: evaluate(log, end))
    for name, found in outcomes.of.items():
        if found["outcome"] not in ("passed", "skipped"):
            print(found["outcome"], name, *found.get("text", "").strip().splitlines()[-1:])
    if (out / "grouped.json").exists():
        script = ROOT / "benchmarks" / "grouped_gemm.py"
        paths = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, script, "--table", out / "grouped.json"], env=paths)


if __name__ == "__main__":
    main()
