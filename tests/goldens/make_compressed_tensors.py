"""Writes a tiny checkpoint that compressed-tensors itself has quantized, with what it dequantizes the weights to.

The environment (CPU): `pip install torch transformers compressed-tensors accelerate`; the committed files were made
with torch 2.13.0, transformers 5.23.0 and compressed-tensors 0.20.0. Run
`python tests/goldens/make_compressed_tensors.py`; it replaces `compressed_tensors/` beside this file.

One model, four presets in four config groups: projections FP8 (per tensor, static), FP8_DYNAMIC (per channel) and
FP8_BLOCK (ragged blocks), the dense layer's MLP MXFP8; the second layer, a mixture of experts, stays in bfloat16.
`golden.safetensors` holds the first and last rows of every matrix, dequantized, in float32.
"""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

PATH = Path(__file__).parent / "compressed_tensors"
ROWS = 2
INPUT_SCALE = 0.37109375
GROUPS = {
    "FP8": [r"re:.*layers\.0\.self_attn\.q_proj$"],
    "FP8_DYNAMIC": [r"re:.*layers\.0\.self_attn\.[kv]_proj$"],
    "FP8_BLOCK": ["model.layers.0.self_attn.o_proj"],
    "MXFP8": ["Linear"],
}
IGNORE = ["lm_head", r"re:.*layers\.1\..*"]


def weight_scale(weight: torch.Tensor, args) -> torch.Tensor:
    """The scales that the library derives from a weight's blocks, in its shape for them."""
    if args.strategy == "tensor":
        blocks = weight.reshape(1, -1)
    elif args.strategy == "channel":
        blocks = weight[:, None]
    elif args.strategy == "group":
        blocks = weight.unflatten(-1, (-1, args.group_size))
    else:
        rows, columns = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (rows, columns))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns)).transpose(1, 2).flatten(-2)
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    return scale


def main() -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=64, num_experts=2, num_experts_per_tok=1,
        max_position_embeddings=64, mlp_only_layers=[0], dtype="bfloat16",
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    groups = {f"group_{i}": preset_name_to_scheme(name, targets) for i, (name, targets) in enumerate(GROUPS.items())}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=IGNORE))
    names = []
    for name, module in model.named_modules():
        if scheme := getattr(module, "quantization_scheme", None):
            names.append(name)
            module.weight_scale.data = weight_scale(module.weight.data.float(), scheme.weights)
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(INPUT_SCALE)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    golden = {}
    for name in names:
        module = model.get_submodule(name)
        state = {"weight": module.weight.data, "weight_scale": module.weight_scale.data}
        scheme = module.quantization_scheme
        weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"].float()
        golden[f"{name}.weight"] = torch.cat([weight[:ROWS], weight[-ROWS:]])
    shutil.rmtree(PATH, ignore_errors=True)
    model.save_pretrained(PATH)
    compressor.update_config(PATH)
    (PATH / "generation_config.json").unlink(missing_ok=True)
    save_file(golden, PATH / "golden.safetensors")
    print(json.dumps(json.loads((PATH / "config.json").read_text())["quantization_config"], indent=1))


if __name__ == "__main__":
    main()
