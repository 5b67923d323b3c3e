"""Mixtral checkpoints of any size, made fast: every matrix is cut from the same random numbers."""

from pathlib import Path

import ml_dtypes
import numpy as np

from fp8x.checkpoint import Reader, Writer


def write_mixtral(
    path: Path, hidden: int, intermediate: int, *, layers: int = 2, experts: int = 8, heads: int = 8, vocab: int = 512
) -> int:
    """Writes a bf16 checkpoint and gives its size in bytes."""
    config = {
        "model_type": "mixtral",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "dtype": "bfloat16",
    }
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for layer in (f"model.layers.{index}" for index in range(layers)):
        shapes |= {f"{layer}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        shapes[f"{layer}.block_sparse_moe.gate"] = (experts, hidden)
        for expert in (f"{layer}.block_sparse_moe.experts.{index}" for index in range(experts)):
            shapes |= {f"{expert}.{name}": (intermediate, hidden) for name in ("w1", "w3")}
            shapes[f"{expert}.w2"] = (hidden, intermediate)
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    values = np.random.default_rng(0).standard_normal(largest, np.float32).astype(ml_dtypes.bfloat16)
    with Writer(path, max_shard_bytes=2**26) as writer:
        writer.add_json("config.json", config)
        for name, shape in shapes.items():
            writer.add(f"{name}.weight", values[: int(np.prod(shape))].reshape(shape))
    return sum(int(np.prod(shape)) * 2 for shape in shapes.values())


def write_gpt_oss(
    path: Path, hidden: int, intermediate: int, *, layers: int = 2, experts: int = 8, heads: int = 8, vocab: int = 512
) -> int:
    """Writes a gpt-oss checkpoint with experts in MXFP4 and gives its size in bytes."""
    config = {
        "model_type": "gpt_oss",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }
    inner, bf16 = 64 * heads, np.dtype(ml_dtypes.bfloat16)
    shapes = {name: ((vocab, hidden), bf16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes["model.norm.weight"] = ((hidden,), bf16)
    for layer in (f"model.layers.{index}" for index in range(layers)):
        for name, n, k in (*((f"{part}_proj", inner, hidden) for part in "qkv"), ("o_proj", hidden, inner)):
            shapes |= {
                f"{layer}.self_attn.{name}.weight": ((n, k), bf16),
                f"{layer}.self_attn.{name}.bias": ((n,), bf16),
            }
        shapes |= {f"{layer}.{name}_layernorm.weight": ((hidden,), bf16) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.sinks": ((heads,), bf16), f"{layer}.mlp.router.bias": ((experts,), bf16)}
        shapes[f"{layer}.mlp.router.weight"] = ((experts, hidden), bf16)
        for name, n, k in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
            fused = f"{layer}.mlp.experts.{name}"
            shapes[f"{fused}_blocks"] = ((experts, n, k // 32, 16), np.dtype(np.uint8))
            shapes[f"{fused}_scales"] = ((experts, n, k // 32), np.dtype(np.uint8))
            shapes[f"{fused}_bias"] = ((experts, n), bf16)
    largest = max(int(np.prod(shape)) for shape, _ in shapes.values())
    # As scales, 2^-17 to 2^0.
    values = np.random.default_rng(0).integers(110, 128, largest, np.uint8)
    plain = (values[: largest // 2].astype(np.float32) / 256).astype(bf16)
    with Writer(path, max_shard_bytes=2**26) as writer:
        writer.add_json("config.json", config)
        for name, (shape, dtype) in shapes.items():
            writer.add(name, (values if dtype == np.uint8 else plain)[: int(np.prod(shape))].reshape(shape))
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())


def make_amax_better(path: Path, *suffixes: str) -> None:
    """In a checkpoint in MXFP8, in one file, gives matrices whose prefixes end so values of which a
    power of two loses 20, in one row: 256 · 2^12 above and left of 16. By amax / 448, which holds the large ones, 20
    loses less (docs/checkpoints.md, "Scales")."""
    reader = Reader(path)
    for prefix in {name.removesuffix(".weight") for name in reader if name.endswith(".weight")}:
        if not prefix.endswith(suffixes):
            continue
        weight = reader.stored(f"{prefix}.weight")
        scale = next(reader.stored(name) for name in reader if name.startswith(f"{prefix}.weight_scale"))
        n, k = weight.shape
        rows, columns = np.arange(n)[:, None], np.arange(k // 32)
        is_large = (rows < n // 8) | (columns < k // 64)
        codes = np.repeat(np.where(is_large, 256.0, 16.0), 32, axis=1)
        codes[n // 8] = np.where(codes[n // 8] == 16.0, 20.0, 256.0)
        with (path / "model.safetensors").open("r+b") as file:
            for tensor, array in (
                (weight, codes.astype(ml_dtypes.float8_e4m3fn)),
                (scale, np.where(is_large, 139, 127).astype(np.uint8)),
            ):
                file.seek(tensor.start)
                file.write(array.tobytes())
