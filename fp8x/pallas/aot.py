"""Compiles Mosaic GPU kernels for Hopper where there is no GPU, and counts what came out.

    for report in compile_sm90(fn, *arguments):      # arrays or jax.ShapeDtypeStruct
        print(report)

`fn` is lowered for CUDA; each Mosaic kernel in it is handed to `MosaicGpuCompile` of JAX's CUDA plugin, the code that
a GPU machine runs. That function asks libcuda for the compute capability and gives it the cubin to load: a stub in its
place, built from the C below, answers 9.0 and writes the cubin to a file. It has no other use of a driver.

Needs, of jax's own version, `jax-cuda13-plugin` and `jax-cuda13-pjrt` (`pip install --no-deps`); `nvidia-cuda-nvcc`,
`nvidia-nvvm` and `nvidia-cuda-nvdisasm` for ptxas, libdevice and SASS; and a C compiler. `./setup.sh compile` puts the
wheels into a directory that Python does not import from: where there is no GPU, jax meets its plugin with a traceback.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from jax._src.lib.mlir import ir

from fp8x.pallas.sm90 import SHARED_MEMORY

# Attributes 75 and 76 are the compute capability; function attribute 8 is the size of dynamic shared memory.
DRIVER = r"""
#include <elf.h>
#include <stdio.h>
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuModuleLoadData(void **module, const void *image) {
  const Elf64_Ehdr *header = *module = (void *)image;
  FILE *file = fopen("kernel.cubin", "wb");
  if (!file) return 1;
  /* Nobody says how long it is; it ends with its program headers. */
  fwrite(image, 1, header->e_phoff + (size_t)header->e_phnum * header->e_phentsize, file);
  return fclose(file);
}
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) {
  FILE *file = attribute == 8 ? fopen("shared_memory", "w") : NULL;
  if (file) { fprintf(file, "%d", value); fclose(file); }
  return 0;
}
"""

_COMPILE = """
import ctypes, os, sys
ctypes.CDLL("./libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # the plugin's dlopen finds it loaded
compile = ctypes.CDLL(sys.argv[1]).MosaicGpuCompile
compile.argtypes, compile.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
module = open("module", "rb").read()
done = compile(module, len(module))
ctypes.CDLL(None).fflush(None)
os._exit(not done)  # no destructors: there is no driver for them
"""


# Between two sums a register of theirs may hold something else, which then moves: seen once a loop, never more.
STRAY_MOVES = 1


class CompileError(RuntimeError):
    """MLIR, LLVM or ptxas refused a kernel; the message is what they wrote."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one kernel.

    Attributes:
        registers: a thread's at launch; warpgroups change theirs as they run.
        spill_bytes: stores to and loads from local memory for lack of registers.
        shared_memory: bytes a block, static and dynamic.
        messages: ptxas' advice on wgmma (C7510 and up): that it runs them one by one, and why.
        moves: accumulators that are copied, or set to zero, in the loops that multiply (`moves_of_accumulators`).
        instructions: how often each SASS opcode (without modifiers) stands in the code.
        sass: the code.
    """

    registers: int
    spill_bytes: int
    shared_memory: int
    messages: tuple[str, ...]
    moves: int
    instructions: collections.Counter
    sass: str

    def __str__(self) -> str:
        shown = ("QGMMA", "HGMMA", "UTMALDG", "UTMASTG", "FADD", "FFMA", "LDL", "STL")
        counts = ", ".join(f"{op} {self.instructions[op]}" for op in shown)
        return "; ".join(
            [
                f"{self.registers} registers, {self.spill_bytes} bytes spilled, {self.shared_memory} bytes of shared "
                f"memory, {self.moves} moves of accumulators",
                counts,
                *self.messages,
            ]
        )

    @property
    def faults(self) -> list[str]:
        """What a kernel may not have that is called compiled; empty if it has none of it."""
        spilled = self.spill_bytes or self.instructions["LDL"] or self.instructions["STL"]
        faults = [f"{self.spill_bytes} bytes spilled"] if spilled else []
        faults += [f"{self.moves} moves of accumulators"] if self.moves > STRAY_MOVES else []
        faults += [f"{self.shared_memory} bytes of shared memory"] if self.shared_memory > SHARED_MEMORY else []
        return [*faults, *self.messages]


def missing() -> str | None:
    """What has to be installed before `compile_sm90` works; None if nothing."""
    absent = [name for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt") if not _is_installed(name, jax.__version__)]
    absent += [name for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-nvdisasm") if not _is_installed(name)]
    absent += [] if shutil.which("cc") else ["a C compiler"]
    return f"not installed: {', '.join(absent)}" if absent else None


def compile_sm90(fn: Callable, *arguments) -> list[Report]:
    """A report for each Mosaic GPU kernel in `fn(*arguments)`, compiled for sm_90a.

    Raises:
        CompileError: a tool is missing, or the compiler refused a kernel.
        What jax raises while it traces and lowers `fn`.
    """
    return [_report(module) for module in mosaic_modules(fn, *arguments)]


def mosaic_modules(fn: Callable, *arguments) -> list[bytes]:
    """Each Mosaic GPU kernel in `fn(*arguments)`, lowered for sm_90a, as `run_compiler` takes it.

    Raises:
        CompileError: a tool is missing, or there is no kernel.
        What jax raises while it traces and lowers `fn`.
    """
    if reason := missing():
        raise CompileError(reason)
    # jax asks ptxas in PATH, while it lowers, which instructions there are.
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{_toolkit() / 'bin'}:{path}"
    try:
        lowered = jax.jit(lambda *arguments: fn(*arguments)).trace(*arguments).lower(lowering_platforms=("cuda",))
    finally:
        os.environ["PATH"] = path
    modules: dict[bytes, None] = {}

    def visit(op):
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(op.attributes["call_target_name"]):
            modules[ir.StringAttr(op.attributes["mhlo.backend_config"]["module"]).value_bytes] = None
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    if not modules:
        raise CompileError("no Mosaic GPU kernel in the function")
    return list(modules)


def run_compiler(
    module: bytes, work: Path, *, script: str = _COMPILE, driver: str = DRIVER, dump: tuple[str, ...] = ("PTXAS",)
) -> str:
    """Compiles a kernel in a process of its own; returns what it wrote.

    Args:
        module: from `mosaic_modules`.
        work: an empty directory; the cubin and its size of shared memory will be in it.
        script: what the process runs: compiles the file "module", and more.
        driver: the C source of its libcuda.
        dump: what Mosaic is asked to write (MOSAIC_GPU_DUMP_…).
    Raises:
        CompileError: the compiler refused the kernel.
    """
    shutil.copy(_library(driver), work / "libcuda.so.1")
    (work / "module").write_bytes(module)
    (work / "cuda_sdk_lib").symlink_to(_toolkit())  # where the plugin looks for libdevice
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MOSAIC_GPU_")}
    environment["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(wheel_file("jax-cuda13-plugin", "libmosaic_gpu_runtime.so"))
    environment |= {f"MOSAIC_GPU_DUMP_{kind}": "1" for kind in dump}
    plugin = wheel_file("jax-cuda13-pjrt", "xla_cuda_plugin.so")
    with open(work / "log", "w") as file:
        child = subprocess.run(
            [sys.executable, "-c", script, plugin], cwd=work, env=environment, stdout=file, stderr=file
        )
    log = (work / "log").read_text()
    if child.returncode or not (work / "kernel.cubin").exists():
        raise CompileError(f"exit status {child.returncode}\n{log}")
    return log


def _report(module: bytes) -> Report:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        log = run_compiler(module, work)
        cubin = work / "kernel.cubin"
        sass = subprocess.run(
            [_toolkit() / "bin" / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
        dynamic = int((work / "shared_memory").read_text()) if (work / "shared_memory").exists() else 0
    return Report(
        registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        shared_memory=_number(r"(\d+) bytes smem", log, absent=0) + dynamic,
        messages=tuple(re.findall(r"\(C75\d\d\).*", log)),
        moves=moves_of_accumulators(sass),
        instructions=collections.Counter(re.findall(r"^\s+/\*\w{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.M)),
        sass=sass,
    )


def moves_of_accumulators(sass: str) -> int:
    """How many instructions in the loops around wgmmas do nothing but copy or zero what these add up.

    That is registers of their sums, and those which the sums are promoted to. While they are moved, no tensor core of
    the warpgroup has work, and nothing in PTX tells of it: ptxas makes them.
    """
    lines = [line.strip() for line in sass.splitlines() if re.match(r"\.L_x_\d+:|\s+/\*[0-9a-f]{4,}\*/", line)]
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith(".L_x")}
    jumps = [(labels[to[1]], at) for at, line in enumerate(lines) if (to := re.search(r"BRA `\((\.L_x_\d+)\)", line))]
    wgmmas = [(at, found) for at, line in enumerate(lines) if (found := _WGMMA.search(line))]
    parts = {register for _, found in wgmmas for register in _span(found)}
    loop: set[int] = set()
    for at, _ in wgmmas:
        around = [(end - start, start, end) for start, end in jumps if start <= at < end]
        loop |= set(range(*min(around)[1:])) if around else set()
    totals = set()
    for at in loop:
        if added := re.search(r"\s(?:FADD|FFMA)\S* R(\d+), (.*);", lines[at]):
            sources = _registers(added[2])
            totals |= {int(added[1])} if int(added[1]) in sources and sources & parts else set()
    # Of a uniform register or a number other than zero: an address, in a register that is free just then.
    move = r"\s(?:MOV|IMAD\.MOV(?:\.U32)?|CS2R(?:\.32)?) +R\d+, (?:RZ, RZ, )?(?:S?RZ|R\d+)(?:\.reuse)? ;"
    return sum(bool(_registers(lines[at]) & (parts | totals)) for at in loop if re.search(move, lines[at]))


_WGMMA = re.compile(r"[HQ]GMMA\.64x(\d+)x\S+ R(\d+),")


def _span(wgmma: re.Match) -> range:
    """Registers of its sums: 64 rows of them, four bytes each, on 128 threads."""
    return range(int(wgmma[2]), int(wgmma[2]) + int(wgmma[1]) // 2)


def _registers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"(?<!\w)R(\d+)", text)}


def _number(pattern: str, log: str, absent: int | None = None) -> int:
    if found := re.search(pattern, log):
        return int(found[1])
    if absent is None:
        raise CompileError(f"ptxas did not write {pattern!r}:\n{log}")
    return absent


@functools.cache
def _library(source: str) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="fp8x-aot-"))
    (directory / "stub.c").write_text(source)
    library = directory / "libcuda.so.1"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, directory / "stub.c"], check=True
    )
    return library


@functools.cache
def _toolkit() -> Path:
    """The directory with bin/ptxas, bin/nvdisasm and nvvm/, which several wheels share."""
    return wheel_file("nvidia-cuda-nvcc", "bin/ptxas").parents[1]


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    path = [*sys.path, str(Path(sys.prefix) / "cuda-compiler")]
    return next(iter(importlib.metadata.distributions(name=name, path=path)), None)


def _is_installed(name: str, version: str | None = None) -> bool:
    found = _distribution(name)
    return found is not None and version in (None, found.version)


def wheel_file(distribution: str, suffix: str) -> Path:
    """The file of an installed wheel whose path ends so."""
    files = _distribution(distribution).files or ()
    return next(Path(file.locate()).resolve() for file in files if str(file).endswith(suffix))
