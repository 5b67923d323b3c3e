"""What a GPU would be given: a kernel's PTX, and how the host's code launches it.

The host's code of a Mosaic kernel encodes tensor maps and launches through libcuda. Here it runs, in the process that
compiled it, against `fp8x.pallas.aot`'s stub of libcuda with two functions more. One puts a tensor map's description
into its 128 bytes as it is (a driver's own encoding is a secret), the other writes down grid and parameters.
"""

import dataclasses
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from fp8x.pallas import aot

# cuda.h: CUlaunchConfig begins with grid, block and dynamic shared memory; launch attribute 4 is the cluster's size.
_DRIVER = (
    aot.DRIVER
    + r"""
#include <stdint.h>
#include <string.h>
struct map { uint64_t base; uint32_t type, rank; uint64_t sizes[5], strides[4]; uint32_t box[5], swizzle; };
int cuTensorMapEncodeTiled(struct map *map, uint32_t type, uint32_t rank, uint64_t base, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *step, uint32_t interleave,
                           uint32_t swizzle) {
  map->base = base, map->type = type, map->rank = rank, map->swizzle = swizzle;
  memcpy(map->sizes, sizes, rank * 8);
  memcpy(map->strides, strides, (rank - 1) * 8);
  memcpy(map->box, box, rank * 4);
  return 0;
}
struct attribute { uint32_t id, pad, cluster[16]; };
struct config { uint32_t grid[3], block[3], shared; void *stream; struct attribute *attributes; uint32_t count; };
int cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) {
  uint32_t cluster = 1, size;
  for (uint32_t i = 0; i < config->count; i++)
    if (config->attributes[i].id == 4) cluster = config->attributes[i].cluster[0];
  FILE *sizes = fopen("sizes", "r"), *file = fopen("launch", "wb");
  if (!sizes || !file) return 1;
  fwrite(config, 4, 7, file);
  fwrite(&cluster, 4, 1, file);
  for (int i = 0; fscanf(sizes, "%u", &size) == 1; i++) fwrite(parameters[i], 1, size, file);
  fclose(sizes);
  return fclose(file);
}
"""
)

_SCRIPT = """
import ctypes, os, re, sys
ctypes.CDLL("./libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
compile = ctypes.CDLL(sys.argv[1]).MosaicGpuCompile
compile.argtypes, compile.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.POINTER(ctypes.c_void_p)
module = open("module", "rb").read()
compiled = compile(module, len(module))
ctypes.CDLL(None).fflush(None)
if compiled:
    entry = open("log").read().split(".entry")[1].split("{")[0]
    sizes = re.findall(r"\\.param (?:\\.align \\d+ \\.b8 \\w+\\[(\\d+)\\]|\\.u64)", entry)
    open("sizes", "w").write(" ".join(size or "8" for size in sizes))
    launch = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(compiled[1])
    launch(compiled[0], None, (ctypes.c_uint64 * 64)(*((i + 1) << 40 for i in range(64))))
os._exit(not compiled)
"""


def argument_address(i: int) -> int:
    """Where the script says that the kernel's i-th array is, inputs first."""
    return (i + 1) << 40


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel's launch.

    Attributes:
        ptx: the module, as the compiler gave it to ptxas.
        blocks, cluster, threads: sizes of the grid, of a cluster (in blocks) and of a block.
        shared_memory: dynamic, in bytes.
        registers: a thread's, when a block begins.
        parameters: the bytes of the kernel's parameters, back to back in the order of the entry.
    """

    ptx: str
    blocks: int
    cluster: int
    threads: int
    shared_memory: int
    registers: int
    parameters: bytes


def launches_sm90(fn: Callable, *arguments) -> list[Launch]:
    """Each Mosaic GPU kernel in `fn(*arguments)`; raises what `fp8x.pallas.aot.compile_sm90` raises."""
    return [_launch(module) for module in aot.mosaic_modules(fn, *arguments)]


def _launch(module: bytes) -> Launch:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        log = aot.run_compiler(module, work, script=_SCRIPT, driver=_DRIVER, dump=("PTX", "PTXAS"))
        content = (work / "launch").read_bytes()
    grid, block, (shared_memory, cluster) = (
        struct.unpack_from(f"{n}I", content, at) for n, at in ((3, 0), (3, 12), (2, 24))
    )
    assert grid[1:] == block[1:] == (1, 1), f"one dimension only, not {grid} blocks of {block}"
    return Launch(
        ptx=log[log.index(".version") : log.index("ptxas info")],
        blocks=grid[0],
        cluster=cluster,
        threads=block[0],
        shared_memory=shared_memory,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        parameters=content[32:],
    )
