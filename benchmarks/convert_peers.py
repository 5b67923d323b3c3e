"""What compressed-tensors and torchao take for the work of benchmarks/convert.py, which runs this in their own Python.

Each library's own function quantizes every expert and attention matrix, tensor by tensor; safetensors reads and writes.
All of them, or those that are named. Prints one line of JSON.
"""

import json
import multiprocessing
import re
import shutil
import sys
import time
from pathlib import Path


def compressed_tensors(strategy: str):
    """compressed-tensors' `quantize`, with scales from its own observer's rule, amax / 448."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    block = [128, 128] if strategy == "block" else None
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, block_structure=block)

    def work(weight):
        if strategy == "block":
            n, k = weight.shape
            blocks = weight.reshape(n // 128, 128, k // 128, 128)
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        else:
            dims = {"channel": 1, "tensor": (0, 1)}[strategy]
            low, high = weight.amin(dims, keepdim=True), weight.amax(dims, keepdim=True)
        scale, zero = calculate_qparams(low, high, args)
        return quantize(weight, scale, zero, args, dtype=torch.float8_e4m3fn), scale

    return work


def torchao_mx():
    """torchao's `to_mx`."""
    import torch
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    def work(weight):
        scale, data = to_mx(weight, torch.float8_e4m3fn, 32)
        return data, scale.view(torch.uint8)

    return work


PEERS = {
    "compressed-tensors per channel": lambda: compressed_tensors("channel"),
    "compressed-tensors 128×128": lambda: compressed_tensors("block"),
    "torchao MXFP8": torchao_mx,
}


def measure(name: str, source: Path, out: Path, queue) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    work, start, size = PEERS[name](), time.perf_counter(), 0
    out.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (no mapping)
                value = stored.get_tensor(key)
                size += value.nbytes
                if "experts" in key or "_proj" in key:
                    with torch.no_grad():
                        tensors[key], tensors[f"{key}_scale"] = work(value)
                else:
                    tensors[key] = value
        save_file(tensors, out / file.name)
    seconds = time.perf_counter() - start
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    queue.put({"rate": size / seconds, "peak_bytes": peak})


def main() -> None:
    source, out = map(Path, sys.argv[1:3])
    found = {}
    context = multiprocessing.get_context("spawn")
    for name in sys.argv[3:] or PEERS:
        queue = context.SimpleQueue()
        process = context.Process(target=measure, args=(name, source, out, queue))
        process.start()
        process.join()
        if process.exitcode == 0:
            found[name] = queue.get()
        shutil.rmtree(out, ignore_errors=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
