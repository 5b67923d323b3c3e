"""What the scripts that write tiny FP8 checkpoints share: models, their original, and the logits beside it."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from make_hf_goldens import randomize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent / "fp8"
State = dict[str, torch.Tensor]

COMMON = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MIXTRAL = COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 32,
    "rope_theta": 1e4,
}
QWEN = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}
LLAMA = {key: value for key, value in COMMON.items() if "experts" not in key} | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}
ROUTERS = ("block_sparse_moe.gate.weight", "mlp.gate.weight")


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", *ROUTERS))


def original(config: dict, folder: Path) -> State:
    """A random bf16 checkpoint with the tensor names of the published models; the same for every case of a model."""
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomize(model, seed=5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def logits(config: dict, state: State, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes in float32."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(
            {name: t.float().contiguous() for name, t in state.items()},
            Path(folder, "model.safetensors"),
            {"format": "pt"},
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(ids).logits


def write(
    name: str,
    config: dict,
    state: State,
    dequantized: State,
    files: dict[str, dict] | None = None,
    metadata: dict[str, str] | None = None,
    most: float = 0.04,
) -> None:
    """Writes a case; no matrix may be off by more than `most`, relatively."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, value in ({"config.json": config} | (files or {})).items():
        (folder / file).write_text(json.dumps(value, indent=2) + "\n")
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "model.safetensors", metadata or {"format": "pt"})
    ids = torch.randint(0, COMMON["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    with tempfile.TemporaryDirectory() as source:
        for key, tensor in original(plain, Path(source)).items():
            if key in dequantized:
                error = (dequantized[key].float() - tensor.float()).norm() / tensor.float().norm()
                assert error < most, f"{name}: {key} is off by {error:.3f}"
    save_file({"ids": ids.int(), "logits": logits(plain, dequantized, ids)}, folder / "golden.safetensors")
    print(f"{name:32} {sum(file.stat().st_size for file in folder.iterdir()) / 1024:4.0f} KiB")


def cast(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def by_hand(
    name: str,
    config: dict,
    quantize: Callable[[str, torch.Tensor], tuple[State, torch.Tensor]],
    quantization: dict,
    *,
    field: str = "quantization_config",
    keep: Callable[[str], bool] = lambda name: False,
    most: float = 0.04,
) -> None:
    state, dequantized = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        source = original(config, Path(folder))
    for key, tensor in source.items():
        if not is_linear(key, tensor) or keep(key):
            state[key] = dequantized[key] = tensor
            continue
        prefix = key.removesuffix(".weight")
        tensors, dequantized[key] = quantize(prefix, tensor)
        state |= {prefix + suffix: value for suffix, value in tensors.items()}
    write(name, config | {field: quantization}, state, dequantized, most=most)
