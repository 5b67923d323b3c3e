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

SHARED_MEMORY = 227 * 1024  # what a block on sm_90 may have

# Attributes 75 and 76 are the compute capability; function attribute 8 is the size of dynamic shared memory.
_STUB = r"""
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


class CompileError(RuntimeError):
    """MLIR, LLVM or ptxas refused a kernel; the message is what they wrote."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one kernel.

    Attributes:
        registers: a thread's at launch; warpgroups change theirs as they run.
        spill_bytes: stores to and loads from local memory for lack of registers.
        shared_memory: bytes a block, static and dynamic.
        instructions: how often each SASS opcode (without modifiers) stands in the code.
        sass: the code.
    """

    registers: int
    spill_bytes: int
    shared_memory: int
    instructions: collections.Counter
    sass: str

    def __str__(self) -> str:
        shown = ("QGMMA", "HGMMA", "UTMALDG", "UTMASTG", "FADD", "FFMA", "LDL", "STL")
        counts = ", ".join(f"{op} {self.instructions[op]}" for op in shown)
        return (
            f"{self.registers} registers, {self.spill_bytes} bytes spilled, {self.shared_memory} bytes of shared "
            f"memory; {counts}"
        )


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
    if reason := missing():
        raise CompileError(reason)
    # jax asks ptxas in PATH, while it lowers, which instructions there are.
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{_toolkit() / 'bin'}:{path}"
    try:
        lowered = jax.jit(lambda *arguments: fn(*arguments)).trace(*arguments).lower(lowering_platforms=("cuda",))
        modules = _mosaic_modules(lowered)
        if not modules:
            raise CompileError("no Mosaic GPU kernel in the function")
        return [_compile(module) for module in modules]
    finally:
        os.environ["PATH"] = path


def _mosaic_modules(lowered) -> list[bytes]:
    modules: dict[bytes, None] = {}

    def visit(op):
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(op.attributes["call_target_name"]):
            modules[ir.StringAttr(op.attributes["mhlo.backend_config"]["module"]).value_bytes] = None
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return list(modules)


def _compile(module: bytes) -> Report:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        shutil.copy(_stub(), work / "libcuda.so.1")
        (work / "module").write_bytes(module)
        (work / "cuda_sdk_lib").symlink_to(_toolkit())  # where the plugin looks for libdevice
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MOSAIC_GPU_")}
        environment["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(wheel_file("jax-cuda13-plugin", "libmosaic_gpu_runtime.so"))
        environment["MOSAIC_GPU_DUMP_PTXAS"] = "1"
        plugin = wheel_file("jax-cuda13-pjrt", "xla_cuda_plugin.so")
        child = subprocess.run(
            [sys.executable, "-c", _COMPILE, plugin], cwd=work, env=environment, capture_output=True, text=True
        )
        cubin = work / "kernel.cubin"
        if child.returncode or not cubin.exists():
            raise CompileError(f"exit status {child.returncode}\n{child.stdout}{child.stderr}")
        sass = subprocess.run(
            [_toolkit() / "bin" / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
        dynamic = int((work / "shared_memory").read_text()) if (work / "shared_memory").exists() else 0
    log = child.stdout + child.stderr
    return Report(
        registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        shared_memory=_number(r"(\d+) bytes smem", log, absent=0) + dynamic,
        instructions=collections.Counter(re.findall(r"^\s+/\*\w{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.M)),
        sass=sass,
    )


def _number(pattern: str, log: str, absent: int | None = None) -> int:
    if found := re.search(pattern, log):
        return int(found[1])
    if absent is None:
        raise CompileError(f"ptxas did not write {pattern!r}:\n{log}")
    return absent


@functools.cache
def _stub() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="fp8x-aot-"))
    (directory / "stub.c").write_text(_STUB)
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
