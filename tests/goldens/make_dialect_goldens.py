"""Writes tiny FP8 checkpoints as FBGEMM, Quark and torchao have them, with the logits of their dequantized weights.

The environment (Python 3.12, CPU): `pip install torch transformers torchao amd-quark`; the committed files were made
with torch 2.14.1, transformers 5.24.0, torchao 0.18.0 and amd-quark 0.13. Run `python
tests/goldens/make_dialect_goldens.py`; it replaces the folders of its cases in `fp8/` beside this file, which hold what
`make_fp8_goldens.py` says.

Who writes what:

- `torchao_…`: transformers quantizes with torchao and `save_pretrained` writes; torchao's check for a GPU is left out.
  Its tensors' own `dequantize` gives the float32 weights.
- `quark_fp8_kv`, `quark_per_channel`: Quark quantizes and `export_safetensors` writes; its own kernel dequantizes.
- `quark_mxfp8`, which Quark 0.13 configures but can't export in 8 bits: Quark's configuration, and torch code that
  writes tensors as vLLM reads them (`quark/schemes/quark_w8a8_mxfp8.py`).
- `fbgemm_fp8`, which needs a GPU: torch code that follows transformers' `FbgemmFp8Quantize`.
"""

import json
import tempfile
from pathlib import Path

import quark.torch.kernel
import torch
import torchao.quantization.quant_api
from fp8_cases import COMMON, LLAMA, State, by_hand, cast, original, write
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.quantization.config.config import (
    FP8E4M3PerChannelSpec,
    FP8E4M3PerTensorSpec,
    OCP_MXFP8E4M3Spec,
    QConfig,
    QLayerConfig,
    QTensorConfig,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    PerRow,
    PerTensor,
)
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, TorchAoConfig


def by_torchao(name: str, quantization, kept: list[str] | None = None) -> None:
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as target:
        original(LLAMA, Path(source))
        config = TorchAoConfig(quantization, modules_to_not_convert=kept)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
        model.save_pretrained(target)
        file = Path(target, "model.safetensors")
        state, whole = load_file(file), json.loads(Path(target, "config.json").read_text())
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        dequantized = {
            key: tensor.dequantize(torch.float32) if isinstance(tensor, TorchAOBaseTensor) else tensor
            for key, tensor in model.state_dict().items()
        }
    write(name, whole, state, dequantized, metadata=metadata)


def by_quark(name: str, quantization: QConfig) -> None:
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as target:
        original(LLAMA, Path(source))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        ids = torch.randint(0, COMMON["vocab_size"], (8, 16), generator=torch.Generator().manual_seed(2))
        quantizer = ModelQuantizer(quantization)
        with torch.no_grad():
            model = quantizer.freeze(quantizer.quantize_model(model, [ids]))
            export_safetensors(model, target)
        state = load_file(Path(target, "model.safetensors"))
        whole = json.loads(Path(target, "config.json").read_text())
    dequantized: State = {key: tensor for key, tensor in state.items() if not key.endswith("_scale")}
    for key, tensor in dequantized.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = state[f"{key}_scale"].float()
            kind = "per_channel" if scale.ndim else "per_tensor"
            dequantized[key] = quark.torch.kernel.dequantize("fp8_e4m3", tensor, scale, None, 0, None, kind)
    write(name, whole, state, dequantized)


def fbgemm(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """`quantize_fp8_per_row`: the largest magnitude of a row, over 448."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    data = cast(weight, scale)
    return {".weight": data, ".weight_scale": scale}, data.float() * scale


def mxfp8(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Bytes b for 2^(b-127), of the largest magnitude's power of two over 2^8, Quark's "floor"."""
    amax = weight.float().unflatten(1, (-1, 32)).abs().amax(-1)
    byte = (torch.frexp(amax).exponent - 1 - 8 + 127).to(torch.uint8)
    wide = torch.exp2(byte.float() - 127).repeat_interleave(32, 1)
    data = cast(weight, wide)
    return {".weight": data, ".weight_scale": byte}, data.float() * wide


def tensor() -> QTensorConfig:
    return FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False).to_quantization_spec()


def channel(axis: int, is_dynamic: bool) -> QTensorConfig:
    return FP8E4M3PerChannelSpec(is_dynamic=is_dynamic, ch_axis=axis).to_quantization_spec()


def mx(is_dynamic: bool) -> QTensorConfig:
    spec = OCP_MXFP8E4M3Spec(is_dynamic=is_dynamic, ch_axis=-1, scale_calculation_mode="floor")
    return spec.to_quantization_spec()


def main() -> None:
    torchao.quantization.quant_api._check_hardware_support = lambda granularity: None
    row = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    whole = Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())
    by_torchao("torchao_row", row, kept=["lm_head", "model.layers.0.self_attn.o_proj"])
    # In the order of the alphabet, in which config.json has them, the first pattern takes all.
    patterns = {
        r"re:.*self_attn\.[qkv]_proj": whole,
        r"re:.*mlp.*": Float8WeightOnlyConfig(),
        r"re:.*\.layers\..*proj": row,
    }
    by_torchao("torchao_mixed", FqnToConfig(patterns))
    by_torchao("torchao_mxfp8", MXDynamicActivationMXWeightConfig())
    static = QLayerConfig(weight=tensor(), input_tensors=tensor())
    cache = QLayerConfig(weight=tensor(), input_tensors=tensor(), output_tensors=tensor())
    caches = {"*k_proj": cache, "*v_proj": cache}
    by_quark(
        "quark_fp8_kv",
        QConfig(
            static,
            exclude=["lm_head", "*.layers.0.mlp.down_proj"],
            layer_quant_config=caches,
            kv_cache_quant_config=caches,
            kv_cache_group=list(caches),
        ),
    )
    per_channel = QLayerConfig(weight=channel(0, is_dynamic=False), input_tensors=channel(1, is_dynamic=True))
    by_quark(
        "quark_per_channel",
        QConfig(
            per_channel,
            exclude=["lm_head"],
            layer_quant_config={"*.mlp.down_proj": QLayerConfig(weight=channel(0, False))},
        ),
    )
    export = {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"}
    config = QConfig(QLayerConfig(weight=mx(False), input_tensors=mx(True)), exclude=["lm_head"])
    by_hand("quark_mxfp8", LLAMA, mxfp8, config.to_dict() | {"export": export})
    kept = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    by_hand(
        "fbgemm_fp8",
        LLAMA,
        fbgemm,
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": kept},
        keep=lambda key: key.removesuffix(".weight") in kept,
    )


if __name__ == "__main__":
    main()
