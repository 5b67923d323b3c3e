"""DeepSeek-V2 and V3 (R1 too): attention through latents, the first layers dense, shared experts, and
experts in groups."""

from typing import Any

from fp8x.errors import ConfigError
from fp8x.models.families.family import Family, common
from fp8x.models.families.glm import first_dense, prediction_layers, sigmoid_mixture
from fp8x.models.fields import Fields
from fp8x.models.parts import Latent, Mixture


def _attention(fields: Fields, interleaved: bool) -> dict[str, Any]:
    # An explicit null makes queries of the hidden state; only a missing field takes transformers' default.
    is_direct = "q_lora_rank" in fields.hf and fields.raw("q_lora_rank") is None
    latent = Latent(
        None if is_direct else fields.optional_positive_int("q_lora_rank"),
        fields.positive_int("kv_lora_rank"),
        fields.positive_int("qk_nope_head_dim"),
        fields.positive_int("qk_rope_head_dim"),
        fields.positive_int("v_head_dim"),
    )
    fields.raw("head_dim")  # of older configs, where it means one thing or another
    if fields.flag("attention_bias"):
        raise ConfigError(f"config.json of a {fields.model_type} model: attention_bias is not supported there")
    head_dim = latent.nope_dim + latent.rope_dim
    found = common(fields, head_dim, rope_dim=latent.rope_dim, interleaved=interleaved)
    return {**found, "num_key_value_heads": found["num_attention_heads"], "latent": latent}


def _v2(fields: Fields) -> dict[str, Any]:
    fields.choice("scoring_func", "softmax")
    if fields.flag("norm_topk_prob"):
        raise ConfigError("config.json of a deepseek_v2 model: norm_topk_prob: DeepSeek's code and transformers differ")
    in_groups = fields.choice("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    _every_layer(fields)
    width, shared = fields.positive_int("moe_intermediate_size"), fields.count("n_shared_experts")
    groups = [fields.optional_positive_int(name) or 1 for name in ("n_group", "topk_group")]
    mixture = Mixture(
        fields.positive_int("n_routed_experts"),
        fields.positive_int("num_experts_per_tok"),
        width,
        normalize=False,
        scale=fields.positive_float("routed_scaling_factor"),
        groups=groups[0] if in_groups else 1,
        top_groups=groups[1] if in_groups else 1,
        shared_intermediate=width * shared or None,
        router_float32=True,
    )
    return {**_attention(fields, interleaved=True), **first_dense(fields), "mixture": mixture}


def _v3(fields: Fields) -> dict[str, Any]:
    fields.choice("scoring_func", "sigmoid")
    fields.choice("topk_method", "noaux_tc")
    _every_layer(fields)
    return {
        **_attention(fields, interleaved=fields.flag("rope_interleave")),
        **first_dense(fields),
        "mixture": sigmoid_mixture(fields),
        "skipped_layers": prediction_layers(fields),
    }


def _every_layer(fields: Fields) -> None:
    if fields.get("moe_layer_freq") not in (None, 1):
        raise fields.error("moe_layer_freq", fields.raw("moe_layer_freq"), "1")


_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": None, "q_lora_rank": 1536}

V2 = Family(
    _v2,
    {
        **_DEFAULTS,
        "eos_token_id": 2,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    },
)
V3 = Family(
    _v3,
    {
        **_DEFAULTS,
        "eos_token_id": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
)
