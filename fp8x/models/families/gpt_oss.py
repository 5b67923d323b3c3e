"""gpt-oss: attention sinks, a window in every other layer, YaRN, and biased experts with a clamped gate."""

from typing import Any

from fp8x.errors import ConfigError
from fp8x.models.families.family import Family, MixtureNames, common, windows
from fp8x.models.fields import Fields
from fp8x.models.parts import Mixture


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    fields.choice("hidden_act", "silu")  # swish(alpha * x), clamped: the fields of the gate say the rest
    fields.raw("initial_context_length")  # of OpenAI's code; here `rope_scaling` has it
    mixture = Mixture(
        fields.positive_int("num_local_experts", "num_experts"),
        _top_k(fields),
        fields.positive_int("intermediate_size"),
        use_bias=True,
        router_bias=True,
        clamped_swiglu=(fields.positive_float("swiglu_alpha"), fields.positive_float("swiglu_limit")),
    )
    bias = fields.flag("attention_bias")
    own = {"attention_bias": bias, "output_bias": bias, "attention_sinks": True, "norm_in_float32": True}
    is_off = "sliding_window" in fields.hf and fields.raw("sliding_window") is None
    window = None if is_off else fields.optional_positive_int("sliding_window")
    return {**common(fields), **windows(fields, window, lambda index: index % 2 == 0), **own, "mixture": mixture}


def _top_k(fields: Fields) -> int:
    """The experts that a token visits; published configs say it in transformers' word and in OpenAI's."""
    top_k, stated = fields.positive_int("num_experts_per_tok", "experts_per_token"), fields.raw("experts_per_token")
    if stated not in (None, top_k):
        raise ConfigError(
            f"config.json of a {fields.model_type} model: experts_per_token ({stated!r}) and num_experts_per_tok "
            f"({top_k}) differ"
        )
    return top_k


GPT_OSS = Family(
    _gpt_oss,
    {
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",  # no field of the published config.json; its tensors are
        "head_dim": 64,
        "hidden_act": "silu",
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    MixtureNames(router="router", interleaved=True),
)
