"""How long converting a checkpoint takes as a whole process, from the shell's prompt to the next.

    python benchmarks/convert_process.py --json process.json [--peer-python /path/to/python/with/torch]

Makes a bf16 Mixtral checkpoint of 1.5 GB and measures, one after the other and several times over: `import jax` alone;
`fp8x quantize`, with the programs of an earlier run and without (FP8X_PROGRAMS); a plain loop that loads each tensor,
quantizes it in a jitted function, and saves a file; and peers, which quantize with their own functions. The page cache
is warm. Medians, in seconds and in times of `import jax`; and the rate at which the loop goes once it is warm.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from convert import PEERS

RECIPES = {"per channel": "e4m3_bf16", "128×128": "fp8_e4m3fn_bf16_block_scale", "MXFP8": "mxfp8_bf16"}

PEER_NAMES = ("compressed-tensors per channel", "compressed-tensors 128×128", "torchao MXFP8")

# What a user of JAX writes: per channel, one tensor after another. Runs twice, to be timed when all is compiled.
LOOP = r"""
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from safetensors.flax import load_file, save_file

@jax.jit
def quantize(w):
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=1, keepdims=True) / 448
    return (jnp.clip(w / scale, -448, 448).astype(jnp.float8_e4m3fn).view(jnp.uint8), scale)

def run(source, out):
    size = 0
    for file in sorted(Path(source).glob("*.safetensors")):
        tensors = {}
        for name, value in load_file(file).items():
            size += value.nbytes
            if "experts" in name or "_proj" in name:
                tensors[name], tensors[f"{name}_scale"] = quantize(value)
            else:
                tensors[name] = value
        save_file(tensors, Path(out) / file.name)
    return size

source, out, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
out.mkdir()
for _ in range(times):
    start = time.perf_counter()
    size = run(source, out)
    rate = size / (time.perf_counter() - start)
print(rate)
"""


def seconds(command: list[str], out: Path, environment: Mapping[str, str] | None = None) -> float:
    """Of a process; `out` is removed after it."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | (environment or {}))
    taken = time.perf_counter() - start
    shutil.rmtree(out, ignore_errors=True)
    return taken


def warm(source: Path) -> int:
    """Brings a directory into the page cache, which virtual machines give back when it is idle; returns its bytes."""
    size = 0
    for file in source.iterdir():
        with file.open("rb", buffering=0) as opened:
            while part := opened.read(1 << 24):
                size += len(part)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to work; 4 GB are needed (default: a temporary one)")
    parser.add_argument("--peer-python", help="a Python with compressed-tensors or torchao, to measure them too")
    parser.add_argument("--times", type=int, default=5, help="how often each is measured")
    parser.add_argument("--json", type=Path, help="writes the numbers to a file")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=arguments.directory))
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from synthetic import write_mixtral

    source, out = directory / "model", directory / "out"
    try:
        write_mixtral(source, 2048, 5632, layers=2, experts=10, heads=16, vocab=16000)
        size = warm(source)
        commands = {"import jax": ([sys.executable, "-c", "import jax"], {})}
        for name, code in RECIPES.items():
            command = [sys.executable, "-m", "fp8x", "quantize", str(source), str(out), "--recipe", code]
            commands[f"fp8x {name}, compiling"] = (command, {"FP8X_PROGRAMS": ""})
            commands[f"fp8x {name}"] = (command, {"FP8X_PROGRAMS": str(directory / "programs")})
        loop = [sys.executable, "-c", LOOP, str(source), str(out)]
        commands["plain jitted loop"] = ([*loop, "1"], {})
        if arguments.peer_python:
            for name in PEER_NAMES:
                commands[name] = ([arguments.peer_python, str(PEERS), str(source), str(out), name], {})
        found: dict[str, list[float]] = {name: [] for name in commands}
        rates = []
        for _ in range(arguments.times):
            for name, (command, environment) in commands.items():
                warm(source)
                found[name].append(seconds(command, out, environment))
            done = subprocess.run([*loop, "2"], check=True, capture_output=True, text=True)
            rates.append(float(done.stdout))
            shutil.rmtree(out)
        medians = {name: statistics.median(values) for name, values in found.items()}
        rate = statistics.median(rates)
        bare = medians["import jax"]
        print(f"{size / 1e9:.2f} GB; the plain loop goes at {rate / 1e9:.3f} GB/s when it is warm")
        allowed = 1.25 * bare + size / (3 * rate)
        print(f"1.25 × `import jax`, and the bytes at 3 × that rate: {allowed:.1f} s")
        for name, value in medians.items():
            print(f"{name:28} {value:6.1f} s  {value / bare:5.2f} × import jax")
        if arguments.json:
            result = {
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "cores": len(os.sched_getaffinity(0)),
                },
                "versions": {name: version(name) for name in ("fp8x", "jax", "safetensors")}
                | {"python": sys.version[:6]},
                "bytes": size,
                "loop_bytes_per_second": rates,
                "seconds": found,
            }
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
