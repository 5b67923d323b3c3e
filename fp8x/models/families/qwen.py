"""Qwen 2 and 3: dense with biases or norms of queries and keys, and mixtures of experts."""

from typing import Any

from fp8x.models.families.family import Family, MixtureNames, common, dense, layers, windows
from fp8x.models.fields import Fields
from fp8x.models.parts import Mixture


def _window(fields: Fields) -> int | None:
    # An explicit null turns the window off; only a missing field takes transformers' default.
    if not fields.flag("use_sliding_window"):
        fields.raw("sliding_window")
        return None
    is_off = "sliding_window" in fields.hf and fields.raw("sliding_window") is None
    return None if is_off else fields.optional_positive_int("sliding_window")


def _upper_windows(fields: Fields) -> dict[str, Any]:
    first = fields.count("max_window_layers")
    return windows(fields, _window(fields), lambda index: index >= first)


def _qwen2(fields: Fields) -> dict[str, Any]:
    return {**common(fields), **dense(fields), **_upper_windows(fields), "attention_bias": True}


def _qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias")
    own = {"qk_norm": True, "attention_bias": bias, "output_bias": bias}
    return {**common(fields), **dense(fields), **_upper_windows(fields), **own}


def _layers_and_mixture(fields: Fields, **options: Any) -> dict[str, Any]:
    mlp_only = set(fields.ints("mlp_only_layers"))
    sparse_step = fields.optional_positive_int("decoder_sparse_step") or 1
    dense = tuple(i for i in range(layers(fields)) if i in mlp_only or (i + 1) % sparse_step)
    fields.raw("intermediate_size")
    mixture = Mixture(
        fields.positive_int("num_experts", "num_local_experts"),
        fields.positive_int("num_experts_per_tok"),
        fields.positive_int("moe_intermediate_size"),
        normalize=fields.flag("norm_topk_prob"),
        **options,
    )
    intermediate = fields.positive_int("intermediate_size") if dense else None
    return {"mixture": mixture, "dense_layers": dense, "intermediate_size": intermediate}


def _qwen2_moe(fields: Fields) -> dict[str, Any]:
    shared = {"shared_intermediate": fields.positive_int("shared_expert_intermediate_size"), "shared_gate": True}
    last = fields.count("max_window_layers")
    window = windows(fields, _window(fields), lambda index: index % 2 == 0 and index < last)
    own = {"attention_bias": fields.flag("qkv_bias")}
    return {**common(fields), **_layers_and_mixture(fields, **shared), **window, **own}


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    fields.raw("max_window_layers")
    bias = fields.flag("attention_bias")
    own = {"qk_norm": True, "attention_bias": bias, "output_bias": bias, "sliding_window": _window(fields)}
    return {**common(fields), **_layers_and_mixture(fields), **own}


_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096, "max_window_layers": 28}

QWEN2 = Family(_qwen2, _DEFAULTS)
QWEN3 = Family(_qwen3, {**_DEFAULTS, "head_dim": 128})
QWEN2_MOE = Family(_qwen2_moe, {**_DEFAULTS, "qkv_bias": True}, MixtureNames(shared="shared_expert"))
QWEN3_MOE = Family(_qwen3_moe, _DEFAULTS)
