"""What XLA makes of a whole program for an H200, where there is none: the kernels that it launches, in order.

    for launch in launches(fn, *arguments):      # arrays or jax.ShapeDtypeStruct, in any pytree
        print(launch)

XLA compiles for a device that is only described (`jax.experimental.topologies`). What it would find by timing, such as
the tiles of a GEMM, is chosen by rule; which operations become one kernel is not. Mosaic kernels are opaque to it: they
are compiled by `fp8x.pallas.aot`. Needs what that needs (`fp8x.pallas.aot.missing`).
"""

import dataclasses
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from jax._src.interpreters import mlir

from fp8x.pallas.aot import CompileError, missing, wheel_file

# As `topologies.get_topology_desc` takes it. Of the device's own datasheet and CUDA's query; XLA's cost model reads it.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""

_COMPILE = """
import sys
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies
topology = topologies.get_topology_desc("1x1x1", platform="cuda", topology="1x1x1", target_config=sys.argv[1])
devices = xla_client.DeviceList(tuple(topology.devices))
options = compiler.get_compile_options(num_replicas=1, num_partitions=1, device_assignment=np.zeros((1, 1), int))
with mlir.make_ir_context():
    module = ir.Module.parse(open("program", "rb").read())
    compiled = topology.devices[0].client.compile(module, executable_devices=devices, compile_options=options)
open("optimized", "w").write(compiled.hlo_modules()[0].to_string())
"""

# Instructions of an entry computation that launch nothing.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", re.M)


@dataclasses.dataclass(frozen=True)
class Launch:
    """An instruction of the optimized program's entry: one kernel, but for a `while`, which is many.

    Attributes:
        kind: its HLO opcode, such as `"fusion"`; of a custom call, its target.
        name: its name there, which says what was fused.
        shape: of what it writes, in XLA's notation.
        bytes: of what it writes.
    """

    kind: str
    name: str
    shape: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.shape}"


def launches(fn: Callable, *arguments) -> list[Launch]:
    """The launches of `fn(*arguments)`, compiled for an H200.

    Raises:
        CompileError: a tool is missing (the message says which), or XLA refused the program.
        What jax raises while it traces and lowers `fn`.
    """
    text = optimized(fn, *arguments)
    entry = text[text.index("\nENTRY ") :]
    found = []
    for name, shape, kind in _INSTRUCTION.findall(entry[: entry.index("\n}")]):
        if kind in _FREE:
            continue
        shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)
        if target := kind == "custom-call" and re.search(
            rf'%{re.escape(name)} = .*custom_call_target="([^"]*)"', entry
        ):
            kind = target[1]
        found.append(Launch(kind, name, shape, _bytes(shape)))
    return found


def thunks(fn: Callable, *arguments) -> list[str]:
    """What XLA's runtime does for `fn(*arguments)`, in order; errors as in `launches`.

    A "kCommandBuffer" is a CUDA graph of everything in it; others are launched by the host, one by one.
    """
    return re.findall(r"^\d+: (\w+)", _compile(fn, *arguments)[1], re.M)


def optimized(fn: Callable, *arguments) -> str:
    """The optimized HLO of `fn(*arguments)` for an H200; errors as in `launches`."""
    return _compile(fn, *arguments)[0]


def _compile(fn: Callable, *arguments) -> tuple[str, str]:
    """The optimized HLO, and the sequence of thunks that it becomes."""
    if reason := missing():
        raise CompileError(reason)
    # A function of its own: one that was traced for a CPU already would be found again.
    lowered = jax.jit(lambda *arguments: fn(*arguments)).trace(*arguments).lower(lowering_platforms=("cuda",))
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        (work / "program").write_bytes(mlir.module_to_bytecode(lowered.compiler_ir("stablehlo")))
        flags = "--xla_dump_to=dump --xla_dump_hlo_as_text"
        child = subprocess.run(
            [sys.executable, "-c", _COMPILE, _H200], cwd=work, env=environment(flags), capture_output=True, text=True
        )
        if child.returncode:
            raise CompileError(f"exit status {child.returncode}\n{child.stdout}{child.stderr}")
        # What passes made of it, if they made anything, comes last.
        *_, sequence = sorted((work / "dump").glob("*.thunk_sequence*.txt"))
        return (work / "optimized").read_text(), sequence.read_text()


def environment(flags: str = "") -> dict[str, str]:
    """Of a process that compiles for GPUs which are only described; `flags` are XLA's."""
    path = [str(Path(sys.prefix) / "cuda-compiler"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "MOSAIC_GPU_RUNTIME_LIB_PATH": str(wheel_file("jax-cuda13-plugin", "libmosaic_gpu_runtime.so")),
        "XLA_FLAGS": f"--xla_gpu_autotune_level=0 {flags}",  # there is nothing to time on
    }


def _bytes(shape: str) -> int:
    """Of an array or a tuple of them: `f32[8,128]`."""
    sizes = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        bits = sizes.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total
