"""Writes tiny FP8 checkpoints in the dialects of others, with the logits of their dequantized weights in float32.

The environment (Python 3.11, CPU): `pip install torch transformers accelerate compressed-tensors nvidia-modelopt`; the
committed files were made with torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, compressed-tensors 0.20.0 and
nvidia-modelopt 0.47.0. Run
`python tests/goldens/make_fp8_goldens.py`; it replaces the folders of its cases in `fp8/` beside this file. Each holds
a checkpoint and `golden.safetensors`: ids int32 [2, 12], and what transformers computes in float32 from the dequantized
weights (activations are not quantized), logits float32 [2, 12, vocab].

Who writes what:

- `hf_…`: transformers' own `FineGrainedFP8Config` quantizes and `save_pretrained` writes; its check for a GPU is left
  out. `Fp8Dequantize` gives the float32 weights.
- `compressed_tensors_…`: the library's compressors, matrix by matrix (experts are no Linear to transformers 5).
- `modelopt_…`: ModelOpt quantizes and `export_hf_checkpoint` writes.
- the others, which no library writes on a CPU: torch code that follows vLLM's loaders (`quantization/fp8.py`,
  `utils/mxfp8_utils.py`), with the names and configs of published checkpoints.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from fp8_cases import COMMON, MIXTRAL, QWEN, State, by_hand, cast, original, write
from modelopt.torch import quantization as modelopt
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer


def by_transformers(name: str, config: dict, quantization: FineGrainedFP8Config, fused: bool) -> None:
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as target:
        original(config, Path(source))
        if quantization is None:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization)
        # Static scales are left to be trained: give each one its own.
        scales = [parameter for key, parameter in model.named_parameters() if key.endswith("activation_scale")]
        for index, scale in enumerate(scales):
            scale.data = torch.linspace(0.01, 0.05, scale.numel()).reshape(scale.shape) * (index + 1)
        model.save_pretrained(target, save_original_format=not fused)
        state, config = (
            load_file(Path(target, "model.safetensors")),
            json.loads(Path(target, "config.json").read_text()),
        )
    write(name, config, state, dequantized_by_transformers(state))


def dequantized_by_transformers(state: State) -> State:
    """Every matrix, of an expert or of all of them, with its scale: `Fp8Dequantize`, in float32."""
    experts = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("down_proj", "w2")}
    result: State = {}
    for name, tensor in state.items():
        if name.endswith(("scale_inv", "activation_scale")):
            continue
        scale = state.get(f"{name}_scale_inv")
        before, dot, expert = name.partition(".experts.")
        if scale is None and dot and tensor.dtype == torch.float8_e4m3fn:
            # Saved by itself, its scale with those of the others: gate's rows come first.
            index, part, _ = expert.split(".")
            fused = next(fused for fused, parts in experts.items() if part in parts)
            scale = state[f"{before}.experts.{fused}_scale_inv"][int(index)]
            if fused == "gate_up_proj":
                scale = scale.chunk(2)[part in ("up_proj", "w3")]
        dequantize = Fp8Dequantize(None)._dequantize_one
        result[name] = tensor if scale is None else dequantize(tensor, scale, torch.float32)
    return result


def block_scale(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """amax / 448 of every block; those at the edges are smaller."""
    return torch.stack(
        [torch.stack([b.abs().amax() / 448 for b in r.split(columns, 1)]) for r in weight.float().split(rows, 0)]
    )


def expanded(scale: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    return scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def per_tensor(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """vLLM's `PerTensorScaleParameter`s: float32 scalars."""
    scale = weight.float().abs().amax() / 448
    data = cast(weight, scale)
    size = sum(map(ord, name)) % 7 + 1
    return {".weight": data, ".weight_scale": scale, ".input_scale": torch.tensor(size / 64)}, data.float() * scale


def ragged_block(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Blocks of 48×40, the last of them cut, with scales in bfloat16."""
    scale = block_scale(weight, 48, 40).bfloat16()
    wide = expanded(scale, 48, 40, weight.shape)
    data = cast(weight, wide)
    return {".weight": data, ".weight_scale_inv": scale}, data.float() * wide


def mx(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Bytes b for 2^(b-127), rounded up as by ModelOpt's MXFP8QTensor."""
    amax = weight.float().unflatten(1, (-1, 32)).abs().amax(-1)
    byte = (torch.ceil(torch.log2(amax / 448)) + 127).to(torch.uint8)
    wide = torch.exp2(byte.float() - 127).repeat_interleave(32, 1)
    data = cast(weight, wide)
    return {".weight": data, ".weight_scale": byte}, data.float() * wide


def bare_mx(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    tensors, dequantized = mx(name, weight)
    return {".weight": tensors[".weight"], ".weight_scale_inv": tensors[".weight_scale"]}, dequantized


def by_compressed_tensors(preset: str) -> Callable[[str, torch.Tensor], tuple[State, torch.Tensor]]:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("mxfp8-quantized" if "MX" in preset else "float-quantized")

    def quantize(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        blocks = weight.float().unflatten(1, (-1, scheme.weights.group_size or weight.shape[1]))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
        compressed = compressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
        tensors = {key: compressed[key] for key in ("weight", "weight_scale")}
        dequantized = compressor.decompress(dict(tensors), scheme)["weight"]
        return {f".{key}": value for key, value in tensors.items()}, dequantized

    return quantize


def modelopt_config(algorithm: str) -> dict:
    return copy.deepcopy(getattr(modelopt, f"{algorithm}_DEFAULT_CFG", None) or getattr(modelopt, f"{algorithm}_CFG"))


def modelopt_fp8_kv() -> dict:
    """With a KV cache in FP8, whose scales come along."""
    return modelopt.utils.update_quant_cfg_with_kv_cache_quant(modelopt_config("FP8"), modelopt.FP8_KV_CFG["quant_cfg"])


def part(config: dict, modules: str) -> list[dict]:
    """What a config switches on, for some modules alone."""
    return [
        entry | {"quantizer_name": modules + entry["quantizer_name"].lstrip("*")}
        for entry in config["quant_cfg"]
        if "cfg" in entry
    ]


def off_by_default(config: dict) -> list[dict]:
    return [entry for entry in config["quant_cfg"] if "cfg" not in entry]


def by_modelopt(name: str, config: dict, quantization: dict, is_old: bool = False) -> None:
    """`is_old`: without the quantization_config in config.json, as before 0.31."""
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as target:
        original(config, Path(source))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        ids = torch.randint(0, COMMON["vocab_size"], (8, 16), generator=torch.Generator().manual_seed(2))
        modelopt.quantize(model, quantization, forward_loop=lambda model: model(ids))
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=target)
        state = load_file(Path(target, "model.safetensors"))
        files = ("config.json", "hf_quant_config.json")
        whole, legacy = (json.loads(Path(target, file).read_text()) for file in files)
    if is_old:
        del whole["quantization_config"]
    dequantized = {key: tensor for key, tensor in state.items() if not key.endswith("_scale")}
    for key, tensor in dequantized.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = state[f"{key}_scale"]
            if scale.dtype == torch.uint8:
                scale = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
            dequantized[key] = tensor.float() * (scale[:, None] if scale.ndim == 1 else scale)
    write(name, whole, state, dequantized, {"hf_quant_config.json": legacy})


def main() -> None:
    FineGrainedFP8HfQuantizer.validate_environment = lambda *args, **kwargs: None
    blocks = {"weight_block_size": (32, 32)}
    by_transformers("hf_bf16_fused", MIXTRAL, None, fused=True)
    by_transformers("hf_block", MIXTRAL, FineGrainedFP8Config(**blocks), fused=False)
    by_transformers("hf_block_fused_ue8m0", QWEN, FineGrainedFP8Config(scale_fmt="ue8m0", **blocks), fused=True)
    static = {"activation_scheme": "static"}
    by_transformers("hf_block_static", QWEN, FineGrainedFP8Config(**static, **blocks), fused=False)
    by_transformers("hf_tensor_fused_static", QWEN, FineGrainedFP8Config(weight_block_size=None, **static), fused=True)
    by_hand(
        "fp8_tensor",
        MIXTRAL,
        per_tensor,
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    )
    by_hand(
        "fp8_block_ragged",
        QWEN,
        ragged_block,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [48, 40],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn"],
        },
        keep=lambda key: key.startswith("model.layers.0.self_attn"),
    )
    by_hand(
        "mxfp8",
        QWEN,
        bare_mx,
        {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, 32],
            "scale_fmt": "ue8m0",
            "modules_to_not_convert": ["lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"],
        },
    )
    by_modelopt("modelopt_fp8", MIXTRAL, modelopt_fp8_kv(), is_old=True)
    # Each part of a model has its own algorithm; what is switched off, a wildcard in `exclude_modules`.
    mxfp8, channel = modelopt_config("MXFP8"), modelopt_config("FP8_PER_CHANNEL_PER_TOKEN")
    off = {"quantizer_name": "*layers.0.self_attn*", "enable": False}
    by_modelopt("modelopt_mxfp8", QWEN, mxfp8 | {"quant_cfg": [*mxfp8["quant_cfg"], off]})
    mixed = [*off_by_default(channel), *part(mxfp8, "*experts*"), *part(channel, "*self_attn*")]
    by_modelopt("modelopt_mixed", MIXTRAL, channel | {"quant_cfg": mixed})
    for name, preset, field in (
        ("compressed_tensors_mxfp8", "MXFP8A16", "quantization_config"),
        ("compressed_tensors_channel", "FP8_DYNAMIC", "compression_config"),
    ):
        by_hand(
            name,
            MIXTRAL,
            by_compressed_tensors(preset),
            {
                "quant_method": "compressed-tensors",
                "format": "mxfp8-quantized" if "mxfp8" in name else "float-quantized",
                "quantization_status": "compressed",
                "config_groups": {preset: ["Linear"]},
                "ignore": ["lm_head", "re:.*block_sparse_moe.gate"],
            },
            field=field,
        )


if __name__ == "__main__":
    main()
