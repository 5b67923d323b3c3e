"""Checks by hand that others load what `fp8x.save` writes, in every format, and compute the same.

In two steps, since those packages live in an environment of their own (torch, transformers 5, compressed-tensors 0.20,
accelerate). The first writes checkpoints, dequantized weights and logits; the second compares and prints a table:

    python tests/goldens/check_with_compressed_tensors.py write DIR
    python tests/goldens/check_with_compressed_tensors.py check DIR

`dense` is a Qwen3-MoE whose layers are all dense: compressed-tensors runs it with quantized activations. Its logits
differ from ours only after an activation so close to a rounding boundary that the last bit of float32 decides.
`experts` are held fused by transformers 5, which multiplies them with their scales when it loads (`dequantize=True`)
and does not quantize their activations: ours are compared weight-only. It can do so for scales per tensor and per
channel alone, so experts in blocks and MXFP8 are compared by matrix, as compressed-tensors decompresses them.
`fp8` is the format of that name, whose blocks transformers dequantizes on a CPU: compared weight-only too. Per tensor
(where transformers 5.23 reads no `weight_scale`) and `modelopt` (which it does not know) no library reads on a CPU:
torch code that follows vLLM's rule (`quantization/fp8.py`, `quantization/modelopt.py`) dequantizes them here.
`seeing` is no model of any library: compressed-tensors decompresses its matrices, experts out of transposed tensors
among them, and its tower has to be as it was. `experts-requantized` mixes channels and blocks. `packed` is in MXFP4,
in fp8x's own words: the library's golden as MXFP8, and back without what it was like.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
MODELS = {"dense": {"mlp_only_layers": [0, 1]}, "experts": {"mlp_only_layers": []}}
CODES = (
    "e4m3_e4m3_bf16",
    "e4m3_e4m3_bf16_dynamic",
    "e4m3_bf16",
    "fp8_e4m3fn_bf16_block_scale",
    "mxfp8_bf16",
    "mxfp8_mxfp8_bf16",
)
IDS = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 24))


def write(folder: Path) -> None:
    """Checkpoints, their weights and their logits, in every recipe that compressed-tensors holds."""
    from flax import nnx

    import fp8x
    from fp8x.models import Decoder, DecoderConfig, hub

    for name, fields in MODELS.items():
        config = DecoderConfig.from_hf(CONFIG | fields)
        plain = folder / f"{name}-unquantized"
        hub.save(Decoder(config, rngs=nnx.Rngs(0)), plain)
        np.save(plain / "logits.npy", hub.load(plain)(IDS))
        for code in CODES:
            recipe = dataclasses.replace(fp8x.RECIPES[code], out_dtype="float32")
            model = hub.load(plain, dataclasses.replace(recipe, observer="max" if recipe.is_static else None))
            if recipe.is_static:
                fp8x.calibrate(model, [IDS])
            path = folder / f"{name}-{code}"
            hub.save(model, path, "compressed-tensors")
            weight_only = hub.load(plain, dataclasses.replace(recipe, activation=None, activation_scale=None))
            np.save(path / "logits.npy", (weight_only if name == "experts" else model)(IDS))
            np.savez(path / "weights.npz", **_dequantized(path))
            for format in ("fp8", "modelopt"):
                if fp8x.checkpoint.FORMATS[format].objection([recipe]) is None:
                    hub.save(model, folder / f"{name}-{format}-{code}", format)
                    np.save(folder / f"{name}-{format}-{code}" / "logits.npy", weight_only(IDS))

    _write_conversions(folder)


# A model that sees: its tower and what leads from there stay as they are, its experts lie as [E, K, N] in one tensor.
SEEING = {
    "vision_tower.blocks.0.attn.q_proj.weight": (64, 64),
    "vision_tower.patch_embed.proj.weight": (64, 3, 4, 4),
    "multi_modal_projector.linear_1.weight": (128, 64),
    "language_model.model.embed_tokens.weight": (32, 128),
    "language_model.model.layers.0.self_attn.q_proj.weight": (128, 128),
    "language_model.model.layers.0.self_attn.k_proj.weight": (128, 128),
    "language_model.model.layers.0.self_attn.v_proj.weight": (128, 128),
    "language_model.model.layers.0.self_attn.o_proj.weight": (128, 128),
    "language_model.model.layers.0.mlp.gate.weight": (16, 128),
    "language_model.model.layers.0.mlp.experts.gate_up_proj": (16, 128, 192),
    "language_model.model.layers.0.mlp.experts.down_proj": (16, 96, 128),
    "language_model.lm_head.weight": (32, 128),
}


def _write_conversions(folder: Path) -> None:
    """What `fp8x.convert` makes of a model that fp8x can't build, and recipes that requantizing mixes."""
    import fp8x
    from fp8x.checkpoint import Writer

    rng = np.random.default_rng(0)
    with Writer(folder / "seeing-unquantized") as writer:
        writer.add_json("config.json", {"architectures": ["SeeingForConditionalGeneration"], "model_type": "seeing"})
        for name, shape in SEEING.items():
            writer.add(name, rng.standard_normal(shape, np.float32))
    for code, format in (
        ("e4m3_e4m3_bf16_dynamic", "compressed-tensors"),
        ("mxfp8_bf16", "compressed-tensors"),
        ("mxfp8_mxfp8_bf16", "modelopt"),
        ("e4m3_e4m3_bf16_dynamic", "modelopt"),
        ("fp8_e4m3fn_bf16_block_scale", "fp8"),
    ):
        fp8x.convert(folder / "seeing-unquantized", folder / f"seeing-{format}-{code}", code, format)
    mixed = folder / "experts-requantized"
    fp8x.convert(folder / "experts-mxfp8_mxfp8_bf16", mixed, requantize="hopper")
    np.save(mixed / "logits.npy", fp8x.load(mixed)(IDS))
    golden = Path(__file__).parent / "fp8" / "compressed_tensors_mxfp4_w4a4"
    fp8x.convert(golden, folder / "packed-mxfp8")
    (folder / "packed-mxfp8" / "fp8x_origin.json").unlink()
    packed = folder / "packed-mxfp4"
    fp8x.convert(folder / "packed-mxfp8", packed, format="mxfp4-pack-quantized")
    fp8x.convert(golden, folder / "packed-unquantized", "f32")
    for path in (mixed, packed, folder / "packed-mxfp8", *folder.glob("seeing-compressed-tensors-*")):
        np.savez(path / "weights.npz", **_dequantized(path))


def _dequantized(path: Path) -> dict[str, np.ndarray]:
    import fp8x
    from fp8x.checkpoint import Reader, format_of

    reader, targets = Reader(path), fp8x.plan(path).targets
    format = format_of(reader.config)
    return {
        f"{prefix}.weight": format.decode(prefix, t.stored, reader.stored(f"{prefix}.weight").shape, reader)[
            0
        ].dequantize()
        for prefix, t in targets.items()
        if t.stored is not None
    }


def check(folder: Path) -> None:
    """Compares each; differences are in units of the largest logit, the median and the largest over tokens."""
    for path in sorted(folder.iterdir()):
        quantized = not path.name.endswith("unquantized")
        weights = f"{_count_equal(path)} weights equal" if (path / "weights.npz").exists() else ""
        if not (path / "logits.npy").exists():  # no library has the model
            kept = f"; {_count_kept(path)} others as they were" if quantized else ""
            print(f"{path.name:39} {weights}{kept}")
            continue
        try:
            logits = _logits(path)
        except Exception as error:  # one row of the table
            print(f"{path.name:39} {weights:26} {type(error).__name__}: {str(error)[:60]}")
            continue
        ours = np.load(path / "logits.npy")
        plain = np.load(path.with_name(path.name.split("-")[0] + "-unquantized") / "logits.npy")
        error, effect = (np.abs(ours - other).max(axis=-1) / np.abs(ours).max() for other in (logits, plain))
        effect = f"quantization moves them by {np.median(effect):.0e}" if quantized else ""
        print(
            f"{path.name:39} {weights:26} logits differ by {np.median(error):.0e}, at most {error.max():.0e},"
            f" over 1e-5 in {np.sum(error > 1e-5)} of {error.size}   {effect}"
        )


def _logits(path: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = json.loads((path / "config.json").read_text())
    quantization = config.pop("quantization_config", {})
    if quantization.get("quant_method") in ("fp8", "modelopt") and quantization.get("weight_block_size") is None:
        return _logits_by_vllm_rule(path, config, quantization)
    is_compressed = (path / "weights.npz").exists()
    dequantize = CompressedTensorsConfig(dequantize=True) if is_compressed and path.name.startswith("experts") else None
    options = {} if dequantize is None else {"quantization_config": dequantize}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    if is_compressed and dequantize is None:
        # It decompresses MXFP8 to bfloat16 (exactly) whatever the model's type: do it now, and go back to float32.
        model.hf_quantizer.compressor.decompress_model(model)
        torch.nn.Module.float(model)
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def _logits_by_vllm_rule(path: Path, config: dict, quantization: dict) -> np.ndarray:
    """Of the weights times `weight_scale`, whose shape and type depend on the algorithm."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(path / "model.safetensors")
    kept = quantization.get("modules_to_not_convert", quantization.get("ignore"))
    algorithm = quantization.get("quant_algo", "FP8")
    if algorithm != "FP8" or quantization["quant_method"] == "modelopt":
        legacy = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
        assert (legacy["quant_algo"], legacy["exclude_modules"]) == (algorithm, kept)
    plain = {}
    for name, tensor in tensors.items():
        prefix = name.removesuffix(".weight")
        if name.endswith("_scale"):
            continue
        if prefix in kept or tensor.dtype != torch.float8_e4m3fn:
            assert tensor.dtype == torch.float32, name
            plain[name] = tensor
            continue
        scale, (n, k) = tensors[f"{prefix}.weight_scale"], tensor.shape
        expected = {
            "FP8": ((), torch.float32),
            "FP8_PER_CHANNEL_PER_TOKEN": ((n,), torch.float32),
            "MXFP8": ((n, k // 32), torch.uint8),
        }[algorithm]
        assert (tuple(scale.shape), scale.dtype) == expected, name
        if algorithm == "FP8" and quantization.get("activation_scheme") != "dynamic":
            assert tensors[f"{prefix}.input_scale"].shape == () and tensors[f"{prefix}.input_scale"] > 0, name
        if algorithm == "MXFP8":
            scale = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
        plain[name] = tensor.float() * (scale[:, None] if scale.ndim == 1 else scale)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(plain, Path(folder, "model.safetensors"), {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.from_numpy(IDS)).logits.numpy()


def _count_kept(path: Path) -> str:
    """How many of the tensors that are not in 8 bits have the source's bytes, of how many."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    source = load_file(path.with_name(path.name.split("-")[0] + "-unquantized") / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if t.dtype != torch.float8_e4m3fn and not n.endswith("_scale")
            and not n.endswith("_scale_inv")}  # fmt: skip
    return f"{sum(name in source and torch.equal(t, source[name]) for name, t in kept.items())} of {len(kept)}"


def _count_equal(path: Path) -> str:
    """How many matrices compressed-tensors decompresses to our values, bit for bit, of how many."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name, match_targets
    from safetensors.torch import load_file

    config = QuantizationConfig.model_validate(json.loads((path / "config.json").read_text())["quantization_config"])
    tensors, ours = load_file(path / "model.safetensors"), np.load(path / "weights.npz")
    linear, equal = torch.nn.Linear(1, 1), 0
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    for name in ours.files:
        prefix = name.removesuffix(".weight")
        assert not any(match_name(prefix, entry) for entry in config.ignore), name
        # As it applies a config to a model: names, patterns and classes in this order, the first that matches.
        scheme = schemes[match_targets(prefix, linear, schemes)[0]]
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        stored = "weight_packed" if f"{name}_packed" in tensors else "weight"
        state = {stored: tensors[f"{prefix}.{stored}"], "weight_scale": tensors[f"{name}_scale"]}
        equal += np.array_equal(compressor.decompress(state, scheme)["weight"].float().numpy(), ours[name])
    return f"{equal} of {len(ours.files)}"


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
