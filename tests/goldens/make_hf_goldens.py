"""Writes tiny random checkpoints of every family with the logits and texts that transformers makes of them.

The environment (CPU): `pip install torch transformers safetensors`; the committed files of Mixtral and Qwen3-MoE were
made with torch 2.13.0 and transformers 5.23.0, the others with torch 2.14.1 and transformers 5.24.0. Run `python
tests/goldens/make_hf_goldens.py NAME...`; it replaces the named case folders beside this file, or all. Each holds a
checkpoint (config.json and safetensors, with the tensor names of the published models) and `golden.safetensors`. Where
config.json says that experts are in MXFP4, they are packed here and dequantized by transformers, to either type:

  ids         int32   [2, 12]         prompts
  logits      float32 [2, 12, vocab]  in the checkpoint's own type
  logits_f32  float32 [2, 12, vocab]  of the same weights, computed in float32
  generated   int32   [2, 16]         greedy continuations, the same in both types

Weights are spread so that logits and routing differ from token to token. Prompts are searched for texts on which no
decision is close: the gap between the last expert chosen and the first left out, and between the best two next tokens,
is larger than what the type's rounding moves.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
PROMPT, NEW_TOKENS, ROWS = 12, 16, 2
# Least gaps of the router's logits and of a position's, in their standard deviations. bfloat16 moves logits by 0.03.
MIN_GAPS = {torch.float32: (0.01, 0.05), torch.bfloat16: (0.04, 0.15)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint: its config.json, and the largest shard if it has several."""

    name: str
    config: dict
    seed: int
    shard_size: str = "1GB"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config.get("dtype") or self.config["torch_dtype"])


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu"}

CASES = [
    Case(
        "mixtral",
        SMALL
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
            "transformers_version": "4.46.0",
        },
        seed=1,
    ),
    Case(
        "mixtral_bf16_sharded",
        SMALL
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "head_dim": None,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
            "sliding_window": 5,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": None,
            "dtype": "bfloat16",
            "transformers_version": "5.23.0",
        },
        seed=2,
        shard_size="64KB",
    ),
    Case(
        "qwen3_moe",
        SMALL
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": 16,
            "intermediate_size": 48,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
            "num_local_experts": 6,  # what transformers 5 writes; 4 wrote num_experts
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "eos_token_id": [2, 3],
            "dtype": "float32",
            "transformers_version": "5.23.0",
        },
        seed=3,
    ),
    Case(
        "qwen3_moe_bf16",
        SMALL
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": 12,
            "intermediate_size": 64,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 2,
            "mlp_only_layers": [],
            "decoder_sparse_step": 2,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "attention_bias": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000.0,
            "rope_scaling": None,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
        },
        seed=4,
    ),
]

DENSE = SMALL | {"intermediate_size": 48, "num_hidden_layers": 2}
LATENT = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu",
    "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "kv_lora_rank": 20, "rms_norm_eps": 1e-6, "rope_theta": 100.0,
    "attention_bias": False, "tie_word_embeddings": False, "eos_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8, "beta_slow": 1,
    "mscale": 0.9, "mscale_all_dim": 0.6,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

# One line of what is special, each; a stretched context is short, so that the stretch shows in a prompt.
CASES += [
    Case(name, config, seed)
    for seed, (name, config) in enumerate(
        {
            "llama": DENSE | {
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 16, "rms_norm_eps": 1e-5,
                "rope_theta": 200.0, "rope_scaling": LLAMA3, "mlp_bias": True, "tie_word_embeddings": True,
                "eos_token_id": [1, 2], "max_position_embeddings": 128, "torch_dtype": "float32",
            },
            "llama_bf16": DENSE | {
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4,
                "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
                "attention_bias": True, "tie_word_embeddings": False, "eos_token_id": 2, "dtype": "bfloat16",
            },
            "mistral": DENSE | {
                "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6,
                "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": False, "eos_token_id": 2,
                "torch_dtype": "float32",
            },
            "qwen2_bf16": DENSE | {
                "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
                "sliding_window": 5, "max_window_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 100.0,
                "tie_word_embeddings": True, "eos_token_id": 2, "torch_dtype": "bfloat16",
            },
            "qwen3": DENSE | {
                "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12, "rms_norm_eps": 1e-6,
                "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 80.0}, "attention_bias": False,
                "use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
                "max_position_embeddings": 64, "tie_word_embeddings": False, "eos_token_id": 2, "dtype": "float32",
            },
            "qwen2_moe": DENSE | {
                "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 6,
                "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40,
                "decoder_sparse_step": 1, "mlp_only_layers": [0], "norm_topk_prob": False, "rms_norm_eps": 1e-6,
                "rope_theta": 100.0, "use_sliding_window": False, "tie_word_embeddings": False, "eos_token_id": 2,
                "torch_dtype": "float32",
            },
            "glm4_moe": DENSE | {
                "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "head_dim": 16,
                "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
                "norm_topk_prob": True, "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5,
                "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": False, "eos_token_id": 2,
                "num_nextn_predict_layers": 1, "torch_dtype": "float32",
            },
            "deepseek_v2": LATENT | {
                "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "q_lora_rank": None,
                "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_shared_experts": 2,
                "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
                "norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1, "rope_scaling": YARN,
                "torch_dtype": "float32",
            },
            "deepseek_v2_groups": LATENT | {
                "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "q_lora_rank": 24,
                "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1,
                "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0,
                "norm_topk_prob": False, "torch_dtype": "float32",
            },
            "deepseek_v3": LATENT | {
                "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 24,
                "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1,
                "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
                "norm_topk_prob": True, "scoring_func": "sigmoid", "moe_layer_freq": 1, "rope_scaling": YARN,
                "num_nextn_predict_layers": 1, "torch_dtype": "float32",
            },
            "deepseek_v3_direct": LATENT | {
                "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": None,
                "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_shared_experts": 1,
                "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0,
                "norm_topk_prob": False, "rope_interleave": False, "tie_word_embeddings": True, "dtype": "float32",
            },
        }.items(),
        start=5,
    )
]  # fmt: skip

# The fields of openai/gpt-oss-20b, and sizes of which no two are alike.
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 2, "experts_per_token": 2, "num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_act": "silu",
    "initial_context_length": 16, "initializer_range": 0.02, "max_position_embeddings": 128, "output_router_logits":
    False, "router_aux_loss_coef": 0.9, "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_theta": 150.0, "sliding_window":
    5, "layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 1.5, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 64, "rope_scaling": {
        "beta_fast": 8.0, "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 16, "rope_type": "yarn",
        "truncate": False,
    },
}  # fmt: skip
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip

# In transformers 5's words, and silent where it has a default; as published; and as published in MXFP4.
CASES += [
    Case(
        "gpt_oss",
        {name: value for name, value in GPT_OSS.items() if name not in ("layer_types", "rope_theta", "rope_scaling")}
        | {
            "hidden_size": 32, "intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 3,
            "experts_per_token": 3, "head_dim": 12, "swiglu_alpha": 1.2, "dtype": "float32",
            "rope_parameters": GPT_OSS["rope_scaling"] | {"rope_theta": 150.0},
        },
        seed=21,
    ),
    Case("gpt_oss_bf16", GPT_OSS | {"hidden_size": 64, "intermediate_size": 32, "torch_dtype": "bfloat16"}, seed=22),
    Case(
        "gpt_oss_mxfp4",
        GPT_OSS | {
            "hidden_size": 64, "intermediate_size": 96, "torch_dtype": "bfloat16", "quantization_config": MXFP4,
        },
        seed=23,
    ),
]  # fmt: skip


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter: matrices keep their input's variance or enlarge it, so that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif name.endswith("bias") or "embed" in name:
            value = 0.3 * noise
        elif name.endswith("sinks"):
            value = 1 + noise
        else:
            is_transposed = model.config.model_type == "gpt_oss" and "experts" in name
            gain = 2.0 if "gate.weight" in name or "router" in name or "lm_head" in name else 1.4
            value = gain * parameter.shape[-2 if is_transposed else -1] ** -0.5 * noise
        parameter.data.copy_(value)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack_mxfp4(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[E, K, N]` as `blocks [E, N, K / 32, 16]` and `scales [E, N, K / 32]`, uint8, by OCP's rule (MX v1.0, 6.3).

    The scale is the largest power of two in a block over that in e2m1, 4; values are rounded to nearest, of two equally
    near to the even code, and saturate. The first of two values is in the low bits.
    """
    values = experts.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = values.abs().amax(-1, keepdim=True).frexp().exponent - 1 - 2
    scaled = values.ldexp(-exponent)
    distance = (scaled.abs()[..., None] - E2M1).abs()
    is_nearest = distance == distance.amin(-1, keepdim=True)
    preferred = is_nearest.int() * torch.tensor([2, 1] * 4)  # even codes first
    codes = preferred.argmax(-1) + 8 * scaled.signbit()
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponent.squeeze(-1) + 127).to(torch.uint8)


def save_mxfp4(model: torch.nn.Module, folder: Path) -> None:
    """The model with its experts' matrices as gpt-oss has them on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack_mxfp4(value)
        else:
            tensors[name] = value
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_checkpoint(case: Case, folder: Path) -> None:
    plain = {name: value for name, value in case.config.items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomize(model, case.seed)
    model.to(case.dtype)
    if plain == case.config:
        model.save_pretrained(folder, max_shard_size=case.shard_size)
        (folder / "generation_config.json").unlink()
    else:
        save_mxfp4(model, folder)
    # save_pretrained rewrites config.json in the style of its own version; the case says which style it tests.
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")


@torch.no_grad()
def continue_greedily(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Prompts with NEW_TOKENS more, stopping at no token."""
    model.generation_config.eos_token_id = None
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )


def relative_gap(scores: torch.Tensor, rank: int) -> torch.Tensor:
    """The gap between the `rank`-th score and the next, in standard deviations over the last dimension."""
    ordered = scores.float().sort(dim=-1, descending=True).values
    return (ordered[..., rank - 1] - ordered[..., rank]) / scores.float().std(dim=-1)


@torch.no_grad()
def is_decided(model: torch.nn.Module, texts: torch.Tensor) -> torch.Tensor:
    """Which texts have no close decision, of a router anywhere or of a next token after the prompt."""
    rows = texts.shape[0]
    routing_gap, token_gap = MIN_GAPS[model.dtype]
    routed: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: routed.append(choices(module, output[0])))
        for name, module in model.named_modules()
        if name.endswith(("mlp.gate", "block_sparse_moe.gate", "mlp.router"))
    ]
    logits = model(texts).logits
    for hook in hooks:
        hook.remove()
    decided = (relative_gap(logits[:, PROMPT - 1 : -1], 1) > token_gap).all(dim=1)
    for scores, rank in routed:
        decided &= (relative_gap(scores, rank).reshape(rows, -1) > routing_gap).all(dim=1)
    return decided


def choices(router: torch.nn.Module, logits: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What a router chooses by, and how many; gaps between groups are as close as they are."""
    if (bias := getattr(router, "e_score_correction_bias", None)) is not None:
        logits = logits.sigmoid() + bias
    if getattr(router, "num_group", None) in (None, 1) or getattr(router, "topk_method", "") == "greedy":
        return logits, router.top_k
    best = 1 if bias is None else 2
    groups = logits.reshape(*logits.shape[:-1], router.num_group, -1)
    ranked = groups.topk(best, dim=-1)[0].sum(-1)
    kept = ranked >= ranked.sort(-1, descending=True).values[..., router.topk_group - 1, None]
    return groups.masked_fill(~kept[..., None], logits.min() - 1).flatten(-2), router.top_k


def find_texts(models: list[torch.nn.Module], seed: int) -> torch.Tensor:
    """ROWS prompts with greedy continuations that all `models` agree on, varied and without an end-of-text token."""
    config = models[0].config
    stop = torch.tensor(config.eos_token_id if config.eos_token_id is not None else -1).reshape(-1)
    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor] = []
    while len(found) < ROWS:
        prompts = torch.randint(4, config.vocab_size, (256, PROMPT), generator=generator)
        texts, *others = (continue_greedily(model, prompts) for model in models)
        good = torch.stack(
            [*((texts == other).all(dim=1) for other in others), *(is_decided(m, texts) for m in models)]
        )
        for text in texts[good.all(dim=0)]:
            new = text[PROMPT:]
            if new.unique().numel() >= 6 and not torch.isin(new, stop).any():
                found.append(text)
    return torch.stack(found[:ROWS])


@torch.no_grad()
def make(case: Case) -> None:
    folder = HERE / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_checkpoint(case, folder)
    own, wide = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for dtype in ("auto", torch.float32))
    assert own.dtype == case.dtype
    texts = find_texts([own, wide], case.seed)
    ids = texts[:, :PROMPT].contiguous()
    golden = {
        "ids": ids.int(),
        "logits": own(ids).logits.float(),
        "logits_f32": wide(ids).logits,
        "generated": texts[:, PROMPT:].int().contiguous(),
    }
    save_file(golden, folder / "golden.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    rounding = (golden["logits"] - golden["logits_f32"]).square().mean().sqrt() / golden["logits_f32"].std()
    print(f"{case.name}: {size / 1024:.0f} KiB, {case.dtype} moves logits by {rounding:.1e} deviations")
    print(golden["generated"].tolist())


if __name__ == "__main__":
    for case in CASES:
        if len(sys.argv) == 1 or case.name in sys.argv[1:]:
            make(case)
