"""The numbers of docs/calibration.md: what calibration costs, what it moves, and what its methods make of tails.

JAX_NUM_CPU_DEVICES=8 python benchmarks/calibration.py cost|collectives|tails [CHECKPOINT]
"""

import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fp8x
from fp8x.calibrate import driver, sharded, start
from fp8x.calibrate.methods import find_scale
from fp8x.nn.observer import count_bins, total_counts
from fp8x.numerics import quantize_with_scale
from fp8x.scheme import per_tensor

CODES = ("e4m3_e4m3_bf16", "fp8_e4m3fn_bf16_block_scale_static_activation")
REPEATS = 7


def cost(checkpoint: str) -> None:
    """CPU seconds of a step over those of the plain forward pass, 8 rows of 256 tokens; the least of several.

    CPU seconds and not seconds, because other work shares the cores; runs take turns, so that all meet the same noise.
    """
    ids = np.random.default_rng(0).integers(0, 256, (8, 256)).astype(np.int32)
    forward = nnx.jit(lambda model, ids: model(ids))
    print("| recipe | forward, bf16 | forward, calibrated | step, max | step, histogram |\n|---|---:|---:|---:|---:|")
    plain = fp8x.load(checkpoint)
    for code in CODES:
        model = fp8x.load(checkpoint, code)
        fp8x.calibrate(model, [ids])
        runs = [lambda: forward(plain, ids), lambda model=model: forward(model, ids)]
        for histogram in (False, True):
            observer = driver._Observer(*start(fp8x.load(checkpoint, code), histogram=histogram))
            runs.append(lambda observer=observer: (observer.add((ids,)), observer.result())[1])
        least = [np.inf] * len(runs)
        for _ in range(REPEATS + 1):  # the first compiles
            for index, run in enumerate(runs):
                before = time.process_time()
                jax.block_until_ready(run())
                least[index] = min(least[index], time.process_time() - before)
        print(f"| `{code}` | " + " | ".join(f"{seconds:.3f}" for seconds in least) + " |")


def collectives(checkpoint: str) -> None:
    """What the compiled programs move: the step, and the one reduction at the end."""
    ids = np.zeros((8, 64), np.int32)
    print("| devices | recipe | step | at the end, max | at the end, histograms |\n|---:|---|---|---|---|")
    for devices in (1, 2, 4, 8):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        for code in CODES:
            found = []
            for histogram in (False, True):
                observer = sharded.ShardedObserver(*start(fp8x.load(checkpoint, code), histogram=histogram), mesh)
                if not histogram:
                    arguments = (observer.statistics, observer.rest, (ids,), np.ones(devices, bool))
                    step = sharded._step.lower(observer.graphdef, observer.local, *arguments)
                    found.append(_moved(step.compile().as_text()))
                found.append(_moved(sharded._reduce.lower(observer.mesh, observer.statistics).compile().as_text()))
            print(f"| {devices} | `{code}` | " + " | ".join(found) + " |")


def _moved(text: str) -> str:
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\][^=\n]*? ({kinds})(?:-start)?\(", text)
    return ", ".join(f"{kind} {4 * int(shape or 1):,} B" for shape, kind in found) or "nothing"


def tails(_: str) -> None:
    """The signal-to-noise ratio (dB) of e4m3 activations, one scale a tensor, and that scale over the one of max."""
    rng, shape = np.random.default_rng(0), (4096, 1024)
    normal = rng.standard_normal(shape)
    channel, spikes = np.ones(shape[1]), np.where(rng.random(shape) < 1e-5, 1e4, 1.0)
    channel[7] = 100.0
    inputs = {
        "normal": normal,
        "Laplace": rng.laplace(size=shape),
        "Student t, 3": rng.standard_t(3, shape),
        "Student t, 1.5": rng.standard_t(1.5, shape),
        "normal, one channel × 100": normal * channel,
        "normal, 1 value in 100,000 × 10,000": normal * spikes,
    }
    methods = [("max", 0), ("percentile", 99.9), ("percentile", 99.99), ("percentile", 99.999), ("mse", 0)]
    scheme = per_tensor()
    count = jax.jit(count_bins, static_argnums=1)
    print("| input | amax / rms | " + " | ".join(f"{m} {p or ''}".strip() for m, p in methods) + " |")
    print("|---|---:|" + "---:|" * len(methods))
    for name, x in inputs.items():
        x = jnp.asarray(x, jnp.bfloat16)
        exact = np.asarray(x, np.float64)
        amax = np.abs(exact).max(keepdims=True).astype(np.float32)
        counts, cells, first = total_counts(np.asarray(count(x, scheme, None))), [], None
        for method, percentile in methods:
            scale = find_scale(method, percentile, amax, counts, scheme)
            first = scale if first is None else first
            restored = np.asarray(quantize_with_scale(x, jnp.asarray(scale), scheme).dequantize(), np.float64)
            ratio = 10 * np.log10((exact**2).sum() / ((restored - exact) ** 2).sum())
            typical = np.abs(exact) < np.percentile(np.abs(exact), 99)
            rest = 10 * np.log10((exact[typical] ** 2).sum() / ((restored - exact)[typical] ** 2).sum())
            cells.append(f"{ratio:.1f} / {rest:.1f} (× {float(scale[0, 0] / first[0, 0]):.3g})")
        print(f"| {name} | {float(amax[0, 0]) / np.sqrt((exact**2).mean()):.0f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    what, *checkpoint = sys.argv[1:] or ["?"]
    {"cost": cost, "collectives": collectives, "tails": tails}[what](*(checkpoint or ["examples/tiny_mixtral"]))
