"""What the device is, what it can do at most, and the least time that some work takes it."""

import dataclasses
import datetime
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fp8x.benchmark.timing import time_calls


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The most that a device does, on paper: bytes a second, and FLOP a second with operands of 1 and 2 bytes."""

    bandwidth: float
    fp8: float
    bf16: float


H200 = Ceilings(bandwidth=4.8e12, fp8=1979e12, bf16=989e12)  # NVIDIA's datasheet, dense


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least work that a call can be, and the least seconds that it takes.

    Attributes:
        bytes: each input read once and each output written once.
        flops: 2 for a multiplication with its addition.
        peak: FLOP a second, as in `Ceilings`.
        bandwidth: bytes a second.
    """

    bytes: int
    flops: int
    peak: float = H200.fp8
    bandwidth: float = H200.bandwidth

    @property
    def seconds(self) -> float:
        return max(self.bytes / self.bandwidth, self.flops / self.peak)


def facts() -> dict[str, Any]:
    """What a result has to name: the device and its driver, versions, the commit and the time.

    The commit is $FP8X_COMMIT where it is set, since a copy of the files has no history.
    """
    device, root = jax.devices()[0], Path(__file__).parents[2]
    driver = _output("nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver, power limit, largest SM clock": driver,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "commit": os.environ.get("FP8X_COMMIT")
        or _output("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.splitlines() or [None])[0] if done.returncode == 0 else None


def copy_bandwidth(nbytes: int = 2**31) -> float:
    """Bytes a second that copying `nbytes` in device memory reads and writes."""
    inputs = [(jax.random.bits(jax.random.key(i), (nbytes // 4,), jnp.uint32),) for i in range(2)]
    timing, _ = time_calls(lambda x: x ^ 1, inputs)
    return 2 * nbytes / timing.seconds
