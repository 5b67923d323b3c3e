"""Llama 2 and 3, and Mistral: dense, with rotary positions that Llama 3.1 stretches."""

from typing import Any

from fp8x.models.families.family import Family, common, dense, windows
from fp8x.models.fields import Fields


def _llama(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias")
    biases = {"attention_bias": bias, "output_bias": bias, "mlp_bias": fields.flag("mlp_bias")}
    return {**common(fields), **dense(fields), **biases}


def _mistral(fields: Fields) -> dict[str, Any]:
    window = None
    if "sliding_window" not in fields.hf or fields.raw("sliding_window") is not None:
        window = fields.optional_positive_int("sliding_window")
    return {**common(fields), **dense(fields), **windows(fields, window, lambda _: True)}


_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "eos_token_id": 2}

LLAMA = Family(_llama, {**_DEFAULTS, "num_key_value_heads": None})
MISTRAL = Family(_mistral, {**_DEFAULTS, "sliding_window": 4096})
