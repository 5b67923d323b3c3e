"""What waits for a Hopper GPU, in commands of at most 150 seconds each on 16 cores.

    OUT=out python benchmarks/on_gpu.py tests       # in the repository's root; python has jax with CUDA and pytest
    OUT=out python benchmarks/on_gpu.py products    # beside PyTorch and, where benchmarks/deepgemm.py was run, DeepGEMM
    OUT=out python benchmarks/on_gpu.py models

`tests` runs the kernels against float64, and the tests of ops, numerics, layers, calibration and models on XLA's GPU
backend. `products` compiles in several processes, of which one at a time has the GPU: products, then blocks. `models`
times decoders, which need much memory, one after the other, and then evaluates a model's bits per byte. What hangs,
crashes or loses the GPU costs its own process: that is killed and noted, and the rest goes on in a new one. Results are
written as they come, and a second run into the same directory goes on.

    tests.json      what came of each test
    grouped.json, quantize.json, moe.json, decode.json
                    times; the scripts in benchmarks make tables of them: --table out/moe.json
    clocks.csv      the SM's clock and the board's power, four times a second
    log.txt         what everything printed, and what came of each step
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from supervise import ROOT, news_of, run, run_again

SECONDS = 145  # of a call
TEST_PROCESSES, PRODUCT_PROCESSES, BLOCK_PROCESSES = 15, 11, 6  # of 16 cores: most of it is compiling
PROCESS_MIB = 13_000  # of the GPU's memory, that products beside PyTorch's keep
# What has been seen least comes first: what time does not reach has passed before.
TESTS = ["tests/ops", "tests/nn", "tests/calibrate", "tests/models", "tests/gpu", "tests/test_numerics.py"]
# What one process compiled no other compiles again. Not in $OUT, which comes back from a lent machine.
SHARED = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "fp8x-compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
RECIPES = ("e4m3_bf16", "fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16_dynamic", "mxfp8_bf16")


def tests(out: Path, log: Path, end: float, tiny: bool) -> None:
    outcomes, seconds = out / "tests.json", max(0.0, end - time.monotonic() - 5)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:xdist",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
        "-s",
    ]
    command += ["-o", "filterwarnings="]  # a GPU's libraries have some of their own
    command += ["-p", "forked_tests", "--results", outcomes, "--processes", 2 if tiny else TEST_PROCESSES]
    command += ["--seconds", seconds, "-m", "not slow", "--one-in", 3]
    command += ["tests/ops/test_groups.py"] if tiny else TESTS
    # What XLA's autotuner would choose by time is no concern of a test.
    ended = run(command, log, end, lambda: news_of(outcomes), XLA_FLAGS="--xla_gpu_autotune_level=0", **SHARED)
    found = json.loads(outcomes.read_text()) if outcomes.exists() else {}
    print(ended, dict(Counter(test["outcome"] for test in found.values())))
    for name, test in found.items():
        if test["outcome"] not in ("passed", "skipped"):
            print(test["outcome"], name, *test.get("text", "").strip().splitlines()[-1:])


class Steps:
    """Benchmarks one after the other, each with a share of the time that is left to it and those behind it."""

    def __init__(self, out: Path, log: Path, end: float, tiny: bool):
        self.out, self.log, self.end, self.tiny = out, log, end, tiny

    def benchmark(self, name: str, share: float, *arguments: str, processes: int = 1) -> None:
        start = time.monotonic()
        until, results = start + share * (self.end - start), self.out / f"{name.removesuffix('_gemm')}.json"
        command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--quick", "--json", results, *arguments]
        command += ["--tiny"] if self.tiny else []
        options = SHARED | {"FP8X_GPU_LOCK": str(self.out / "gpu.lock")}
        ended = in_parallel(processes, lambda log: run_again(command, results, log, until, **options), self.log)
        print(f"{name}, {time.monotonic() - start:.0f} s: {ended}", flush=True)


def products(out: Path, log: Path, end: float, tiny: bool) -> None:
    steps = Steps(out, log, end, tiny)
    kernels = ["--backend", "xla"] if tiny else ["--backend", "mosaic_gpu"]
    steps.benchmark("grouped_gemm", 0.5, *kernels, processes=2 if tiny else min(PRODUCT_PROCESSES, processes_on_gpu()))
    steps.benchmark("quantize", 0.15)
    steps.benchmark("moe", 0.95, processes=2 if tiny else BLOCK_PROCESSES)
    table = [sys.executable, ROOT / "benchmarks" / "grouped_gemm.py", "--table", out / "grouped.json"]
    subprocess.run(table, env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})


def processes_on_gpu() -> int:
    memory = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True
    )
    return int(memory.stdout.split()[0]) // PROCESS_MIB


def models(out: Path, log: Path, end: float, tiny: bool) -> None:
    Steps(out, log, end, tiny).benchmark("decode", 0.6)  # four programs a case: in 22 s there was none
    evaluate = [sys.executable, "-m", "fp8x", "eval", "examples/tiny_mixtral", "--data", "examples/heldout.jsonl"]
    evaluate += [word for recipe in RECIPES[: 1 if tiny else None] for word in ("--recipe", recipe)]
    print("bits per byte, in the log:", run(evaluate, log, end, lambda: None, stall=SECONDS, **SHARED))


def in_parallel(processes: int, work: Callable[[Path], str], log: Path) -> list[str]:
    """What `work` gave in each of so many threads; it gets a log of its own, which goes to the end of `log`."""
    logs, ended = [log.with_suffix(f".{index}") for index in range(processes)], [""] * processes

    def keep(index: int) -> None:
        ended[index] = work(logs[index])

    threads = [threading.Thread(target=keep, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with log.open("a") as whole:
        for part in logs:
            whole.write(part.read_text())
            part.unlink()
    return ended


@contextlib.contextmanager
def clocks(path: Path) -> Iterator[None]:
    """What the GPU's clock and power are meanwhile, and what holds them down."""
    query = "timestamp,clocks.sm,power.draw,clocks_event_reasons.active"
    try:
        with path.open("a") as file:
            child = subprocess.Popen(["nvidia-smi", f"--query-gpu={query}", "--format=csv", "-lms", "250"], stdout=file)
    except FileNotFoundError:
        yield
        return
    try:
        yield
    finally:
        child.terminate()
        child.wait()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=("tests", "products", "models"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--tiny", action="store_true", help="a few tests and small shapes on XLA, to try this script")
    options = parser.parse_args(arguments)
    out = Path(os.environ.get("OUT", "out")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    call = {"tests": tests, "products": products, "models": models}[options.call]
    with clocks(out / "clocks.csv"):
        call(out, out / "log.txt", time.monotonic() + options.seconds, options.tiny)
    # A lent machine gives back few files: these, which only processes of the call need, took the place of results.
    for path in (*out.glob("*.lock"), *out.glob("*.running")):
        path.unlink()


if __name__ == "__main__":
    main()
