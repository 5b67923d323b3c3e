"""DeepGEMM's kernels as a peer, compiled where there is a network for a machine where there is none.

    python benchmarks/deepgemm.py DEEPGEMM_GIT CUTLASS_GIT    # two git directories; nvcc 13.0 and g++: twenty seconds

It leaves what it makes in `benchmarks/deepgemm/`, which git ignores: DeepGEMM as of 2025-05-15, plain Python that calls
cuda.bindings (later ones compile C++), and a cubin for each shape of grouped_gemm.py that DeepGEMM has figures for.
"""

import hashlib
import importlib
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "deepgemm"
SOURCES = {"816b390": ["deep_gemm"], "8bdbfca68": ["include/cutlass", "include/cute"]}  # the second is CUTLASS 4.0
# Kind, rows, N, K, groups.
KERNELS = [
    ("GroupedContiguous", 32768, 4096, 7168, 8),
    ("GroupedContiguous", 32768, 7168, 2048, 8),
    ("Normal", 4096, 7168, 16384, 1),
]
OPTIONS = "-std=c++20 -cubin -O3 --ptxas-options=--register-usage-level=10,--verbose --expt-relaxed-constexpr"
OPTIONS += " --expt-extended-lambda -gencode=arch=compute_90a,code=sm_90a --diag-suppress=39,161,174,177,940"


def is_there() -> bool:
    return (FOLDER / "cubins").exists()


def product(torch, given) -> Callable:
    """A call of its dense or grouped product of operands on the device; each gives the same tensor."""
    from peers import tensor

    gemm, grouped, utils = _modules()
    x, w, w_scale = (tensor(torch, leaf) for leaf in (given.x.data, given.w.data, given.w.scale))
    x_scale = utils.get_col_major_tma_aligned_tensor(tensor(torch, given.x.scale))
    y = torch.empty(x.shape[0], w.shape[-2], device="cuda", dtype=torch.bfloat16)
    experts = torch.arange(w.shape[0], device="cuda", dtype=torch.int32)

    def dense():
        gemm.gemm_fp8_fp8_bf16_nt((x, x_scale), (w, w_scale), y)
        return y

    def contiguous():
        grouped.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous((x, x_scale), (w, w_scale), y, of_row)
        return y

    if w.ndim == 2:
        return dense
    of_row = experts.repeat_interleave(tensor(torch, given.group_sizes).long())
    return contiguous


def _modules() -> tuple:
    """Its modules, whose kernels come from the folder instead of a compiler."""
    if "deep_gemm" not in sys.modules:
        _import_without_init()
    names = ("gemm", "m_grouped_gemm", "utils", "runtime")
    gemm, grouped, utils, runtime = (importlib.import_module(f"deep_gemm.jit_kernels.{name}") for name in names)
    driver = importlib.import_module("cuda.bindings.driver")
    loaded: dict[str, object] = {}

    def build(name: str, code: str, _) -> object:
        folder = _folder(code)
        if not folder.exists():
            raise RuntimeError(f"{name}: DeepGEMM was prepared for other shapes")
        if folder.name not in loaded:
            kernel, cubin = runtime.FP8GemmRuntime(str(folder)), folder / "kernel.cubin"
            failed, kernel.lib = driver.cuLibraryLoadFromFile(str(cubin).encode(), [], [], 0, [], [], 0)
            assert not failed, failed
            failed, kernel.kernel = driver.cuLibraryGetKernel(kernel.lib, (folder / "kernel.name").read_bytes())
            assert not failed, failed
            loaded[folder.name] = kernel
        return loaded[folder.name]

    gemm.build = grouped.build = build
    return gemm, grouped, utils


def _import_without_init() -> None:
    sys.modules["deep_gemm"] = package = types.ModuleType("deep_gemm")
    package.__path__ = [str(FOLDER / "deep_gemm")]


def _folder(code: str) -> Path:
    return FOLDER / "cubins" / hashlib.md5(code.encode()).hexdigest()[:12]


def prepare(*gits: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    for git, (commit, paths) in zip(gits, SOURCES.items()):
        archive = subprocess.run(["git", "-C", git, "archive", commit, *paths], stdout=subprocess.PIPE)
        subprocess.run(["tar", "x", "-C", FOLDER], input=archive.stdout)  # a file that a mirror lacks is no header
    _pretend_torch_and_cuda()
    _import_without_init()
    gemm = importlib.import_module("deep_gemm.jit_kernels.gemm")
    runtime = importlib.import_module("deep_gemm.jit_kernels.runtime").FP8GemmRuntime
    for kind, m, n, k, groups in KERNELS:
        is_grouped = kind == "GroupedContiguous"
        _, block_m, block_n, stages, (multicast, of_x), memory = gemm.get_best_configs(
            m, n, k, 1, 132, is_grouped_contiguous=is_grouped, is_grouped_masked=False
        )
        code = runtime.generate(
            N=n, K=k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=128, BLOCK_N_PADDING=memory[2],
            SWIZZLE_D_MODE=memory[1], NUM_GROUPS=groups, NUM_STAGES=stages, NUM_TMA_THREADS=128,
            NUM_MATH_THREADS_PER_GROUP=128, NUM_TMA_MULTICAST=multicast, IS_TMA_MULTICAST_ON_A=of_x, GEMM_TYPE=kind,
        )  # fmt: skip
        folder = _folder(code)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.cu").write_text(code)
        includes = [f"-I{FOLDER / path}" for path in ("deep_gemm/include", "include")]
        command = ["nvcc", folder / "kernel.cu", "-o", folder / "kernel.cubin", *OPTIONS.split(), *includes]
        done = subprocess.run(command, capture_output=True, text=True)
        print(kind, m, n, k, groups, "exit", done.returncode, done.stderr[-300:] if done.returncode else "")
        (folder / "kernel.name").write_text(re.search(r"entry function '(\S+)'", done.stdout + done.stderr)[1])


def _pretend_torch_and_cuda() -> None:
    """What DeepGEMM imports, and does not need to choose a kernel and write it."""

    class Anything(types.ModuleType):
        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(name)

        def __call__(self, *_, **__):
            return Anything("result")

    torch = ("torch", "torch.utils", "torch.utils.cpp_extension")
    for name in (*torch, "cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc"):
        sys.modules[name] = Anything(name)
    sys.modules["torch.utils.cpp_extension"].CUDA_HOME = "/usr/local/cuda"


if __name__ == "__main__":
    prepare(*sys.argv[1:])
