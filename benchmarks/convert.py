"""How fast `fp8x.convert` is, beside the machine's own limits and other libraries.

    python benchmarks/convert.py --json convert.json [--peer-python /path/to/python/with/torch]

Makes a bf16 Mixtral checkpoint of 2.5 GB, converts it to every scheme, each in a process of its own (so that compiling
is in the time, and memory is that run's) and once more in the same process, and prints GB of bf16 input a second.
The page cache is warm. Peers quantize the same matrices with their own functions and save them with safetensors.
"""

import argparse
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RECIPES = {
    "per tensor": "e5m2_e5m2_bf16",
    "per tensor, calibrated": "e4m3_e4m3_bf16",
    "per channel": "e4m3_bf16",
    "128×128": "fp8_e4m3fn_bf16_block_scale",
    "MXFP8": "mxfp8_bf16",
}
PEERS = Path(__file__).with_name("convert_peers.py")

RUN = r"""
import json, re, shutil, sys, time
from pathlib import Path
import fp8x
from fp8x import Recipe, Scheme
source, out, code = sys.argv[1:]
# Calibrated scales say nothing about the time that weights take.
recipe = Recipe(Scheme("e4m3", block=(None, None))) if code == "e4m3_e4m3_bf16" else code
found = []
for _ in range(3):
    shutil.rmtree(out, ignore_errors=True)
    for file in Path(source).iterdir():  # into the page cache, which virtual machines give back when it is idle
        with file.open("rb", buffering=0) as f:
            while f.read(1 << 24):
                pass
    start = time.perf_counter()
    done = fp8x.convert(source, out, recipe)
    peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
    found.append((done.bytes_read / (time.perf_counter() - start), peak))
print(json.dumps(found))
"""


def make(path: Path) -> None:
    """Mixtral's layers, hidden 2048, intermediate 5632, 8 experts, 4 layers."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from synthetic import write_mixtral

    write_mixtral(path, 2048, 5632, layers=4, experts=8, heads=16, vocab=32000)


def limits(directory: Path) -> dict[str, float]:
    """Bytes a second of one thread: reading what is cached, copying, and writing to the disk past the cache."""
    import numpy as np

    from fp8x.checkpoint import estimate

    size, block = 1 << 29, 1 << 21
    buffer = np.frombuffer(mmap.mmap(-1, block), np.uint8)
    buffer[:] = 1
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    file = directory / "limits"

    def rate(work) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        return size / best

    def write(flags: int) -> None:
        descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | flags)
        for offset in range(0, size, block):
            os.pwrite(descriptor, buffer, offset)
        os.fsync(descriptor)
        os.close(descriptor)

    def read() -> None:
        descriptor = os.open(file, os.O_RDONLY)
        for offset in range(0, size, block):
            os.preadv(descriptor, [buffer], offset)
        os.close(descriptor)

    found = {"copy": rate(lambda: np.copyto(target, source)), "write to disk": rate(lambda: write(os.O_DIRECT))}
    write(0)
    found["read from page cache"] = rate(read)
    found["widen bf16 in numpy"] = estimate.widening()
    file.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to work; 6 GB are needed (default: a temporary one)")
    parser.add_argument("--peer-python", help="a Python with compressed-tensors or torchao, to measure them too")
    parser.add_argument("--json", type=Path, help="writes the numbers to a file")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        source = directory / "model"
        make(source)
        result = {
            "machine": {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))},
            "versions": {name: version(name) for name in ("fp8x", "jax", "safetensors")} | {"python": sys.version[:6]},
            "limits": limits(directory),
            "fp8x": {},
        }
        for name, limit in result["limits"].items():
            print(f"{name:28} {limit / 1e9:6.2f} GB/s, one thread", flush=True)
        for name, code in RECIPES.items():
            command = [sys.executable, "-c", RUN, str(source), str(directory / "out"), code]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            shutil.rmtree(directory / "out")
            first, again = found[0], sorted(found[1:])[-1]
            result["fp8x"][name] = {"first": first[0], "again": again[0], "peak_bytes": first[1]}
            print(
                f"fp8x {name:23} {first[0] / 1e9:6.2f} GB/s, again {again[0] / 1e9:.2f}, peak {first[1] / 1e6:.0f} MB",
                flush=True,
            )
        if arguments.peer_python:
            command = [arguments.peer_python, str(PEERS), str(source), str(directory / "out")]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result["peers"] = json.loads(output.splitlines()[-1])
            for name, found in result["peers"].items():
                print(f"{name:28} {found['rate'] / 1e9:6.2f} GB/s, peak {found['peak_bytes'] / 1e6:4.0f} MB")
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
