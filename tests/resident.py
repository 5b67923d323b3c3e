"""By how much the peak of resident memory grows while something is done."""

import subprocess
import sys

PROGRAM = """
import re, sys, jax, fp8x
from flax import nnx
from pathlib import Path

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

big, small = map(Path, sys.argv[1:])
path = small
{work}
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
path = big
{work}
print(size, status("VmHWM") - before)
"""


def measure(work: str, big, small) -> tuple[int, int]:
    """What `work` sets `size` to for `path = big`, and the growth, after it was done once for `path = small`.

    In a process of its own, since the peak is the process's.
    """
    command = [sys.executable, "-c", PROGRAM.format(work=work), big, small]
    size, growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(size), int(growth)
