"""Writes tiny checkpoints in MXFP4 as others have them, with the logits of their dequantized weights in float32.

The environment (Python 3.12, CPU): `pip install torch transformers compressed-tensors accelerate`; the committed files
were made with torch 2.14.0, transformers 5.24.0 and compressed-tensors 0.20.0. Run `python
tests/goldens/make_mxfp4_goldens.py`; it replaces the folders of its cases in `fp8/` beside this file, which hold what
`make_fp8_goldens.py` says. gpt-oss is in `make_hf_goldens.py`.

Who writes what:

- `compressed_tensors_mxfp4…`: the library's compressor, matrix by matrix, and its own arguments.
- `fp8_fp4_experts`: DeepSeek-V4's form, which no library writes on a CPU; what transformers' `Fp8Dequantize` reads,
  which gives the float32 weights.
- `quark_mxfp4`: the configuration of `quark_mxfp8` in 4 bits, and tensors as vLLM reads them
  (`quark/schemes/quark_ocp_mx.py`).
"""

import json

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from fp8_cases import HERE, LLAMA, MIXTRAL, QWEN, State, by_hand, cast
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MOST = 0.2  # 4 bits


def by_compressed_tensors(preset: str):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")

    def quantize(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        blocks = weight.float().unflatten(1, (-1, scheme.weights.group_size))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
        compressed = compressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
        tensors = {key: compressed[key] for key in ("weight_packed", "weight_scale")}
        dequantized = compressor.decompress(dict(tensors), scheme)["weight"]
        return {f".{key}": value for key, value in tensors.items()}, dequantized

    return quantize


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two a byte, the first in its low half, and bytes b for 2^(b-127): amax's exponent less 2 (OCP MX v1.0)."""
    blocks = weight.float().unflatten(1, (-1, 32))
    byte = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2 + 127
    scaled = blocks / torch.exp2(byte - 127)[..., None]
    codes = (scaled.abs()[..., None] - VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    codes = codes.flatten(1).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, byte.to(torch.uint8)


def deepseek_v4(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Experts in MXFP4, all else in blocks of 32×32, with scales that are bytes; all called `.scale`."""
    dequantize = Fp8Dequantize(None)._dequantize_one
    if ".experts." in name:
        packed, byte = mxfp4(weight)
        data, scale = packed.view(torch.int8), byte.view(torch.float8_e8m0fnu)
    else:
        amax = weight.float().unflatten(0, (-1, 32)).unflatten(-1, (-1, 32)).abs().amax((1, 3))
        exponent = torch.ceil(torch.log2(amax / 448))
        scale = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        data = cast(weight, torch.exp2(exponent).repeat_interleave(32, 0).repeat_interleave(32, 1))
    return {".weight": data, ".scale": scale}, dequantize(data, scale, torch.float32)


def quark(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    packed, byte = mxfp4(weight)
    dequantized = Fp8Dequantize(None)._dequantize_one(packed.view(torch.int8), byte, torch.float32)
    return {".weight": packed, ".weight_scale": byte}, dequantized


def main() -> None:
    for name, config, preset, ignore in (
        ("compressed_tensors_mxfp4", MIXTRAL, "MXFP4A16", ["lm_head", "re:.*block_sparse_moe.gate"]),
        ("compressed_tensors_mxfp4_w4a4", LLAMA, "MXFP4", ["lm_head"]),
    ):
        groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
        quantization = QuantizationConfig(
            config_groups=groups, ignore=ignore, format="mxfp4-pack-quantized", quantization_status="compressed"
        )
        quantization = json.loads(quantization.model_dump_json())
        by_hand(name, config, by_compressed_tensors(preset), quantization, most=MOST)
    by_hand(
        "fp8_fp4_experts",
        QWEN,
        deepseek_v4,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
            "scale_fmt": "ue8m0",
            "expert_dtype": "fp4",
        },
        most=MOST,
    )
    text = json.loads((HERE / "quark_mxfp8" / "config.json").read_text())["quantization_config"]
    by_hand("quark_mxfp4", LLAMA, quark, json.loads(json.dumps(text).replace("fp8_e4m3", "fp4")), most=MOST)


if __name__ == "__main__":
    main()
