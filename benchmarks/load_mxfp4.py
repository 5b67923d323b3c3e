"""Loading gpt-oss's MXFP4 beside a checkpoint in FP8 blocks of as many bytes in memory: seconds, and peak memory.

    python benchmarks/load_mxfp4.py [--json load.json]

Makes both (1.2 GB in 4 bits, 2.4 GB in 8), loads them in turn, each in a process of its own, from the page cache and
from the disk, and prints medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

RUN = r"""
import json, os, re, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import fp8x

def status(key):
    return 1024 * int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

path = Path(sys.argv[1])
for file in path.iterdir():
    with file.open("rb", buffering=0) as f:
        while f.read(1 << 24):  # into the page cache
            pass
        if sys.argv[3] == "disk":  # and out of it
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
jnp.zeros(8).block_until_ready()
fp8x.load(sys.argv[2])  # what is compiled for either
np.ones(2**32 - 2**30, np.uint8)  # memory that the machine has handed out: a virtual one's first touch is slow
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
start = time.perf_counter()
model = fp8x.load(path)
size = sum(array.nbytes for array in jax.block_until_ready(jax.tree.leaves(nnx.state(model))))
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": size, "peak": status("VmHWM") - before}))
"""


def make(folder: Path) -> dict[str, tuple[Path, int]]:
    """The two checkpoints, and their bytes on disk."""
    from synthetic import write_gpt_oss, write_mixtral

    import fp8x

    packed = write_gpt_oss(folder / "gpt-oss", 2880, 2880, layers=3, experts=32, heads=64)
    write_mixtral(folder / "bf16", 2816, 2816, layers=3, experts=33, heads=44)
    fp8x.convert(folder / "bf16", folder / "blocks", "fp8_e4m3fn_bf16_block_scale", "fp8")
    blocks = sum(file.stat().st_size for file in (folder / "blocks").glob("*.safetensors"))
    return {"MXFP4": (folder / "gpt-oss", packed), "FP8 blocks": (folder / "blocks", blocks)}


def load(path: Path, source: str) -> dict[str, float]:
    command = [sys.executable, "-c", RUN, path, ROOT / "tests" / "goldens" / "gpt_oss_mxfp4", source]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="on the disk to read from")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = make(Path(folder))
        for source in ("page cache", "disk"):
            runs = {name: [] for name in made}
            for _ in range(options.rounds):
                for name, (path, _) in made.items():
                    runs[name].append(load(path, source))
            found[source] = {name: summary(made[name][1], each) for name, each in runs.items()}
            for name, each in found[source].items():
                print(f"from the {source}, {name:10}  {describe(each)}")
            rates = [each["bytes"] / each["seconds"] for each in found[source].values()]
            print(f"the rate of MXFP4 is {rates[0] / rates[1]:.2f} of that of FP8 blocks")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def summary(stored: int, runs: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "bytes", "peak")}
    return medians | {"bytes_on_disk": stored, "runs": runs}


def describe(found: dict[str, Any]) -> str:
    size, seconds = found["bytes"], found["seconds"]
    return (
        f"{found['bytes_on_disk'] / 1e9:.2f} GB on disk, {size / 1e9:.2f} GB in memory: {seconds:.2f} s, "
        f"{size / seconds / 1e9:.2f} GB/s of what is loaded, peak {found['peak'] / size:.3f} of it"
    )


if __name__ == "__main__":
    main()
