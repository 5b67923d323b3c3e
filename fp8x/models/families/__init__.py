"""The families of decoders: what each reads from config.json, and how it names its tensors. docs/models.md says how to
add one."""

from collections.abc import Mapping
from typing import Any

from fp8x.errors import ConfigError
from fp8x.models.families import deepseek, glm, gpt_oss, llama, mixtral, qwen
from fp8x.models.families.family import Family
from fp8x.models.fields import Fields

FAMILIES: dict[str, Family] = {
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "mixtral": mixtral.MIXTRAL,
    "qwen2_moe": qwen.QWEN2_MOE,
    "qwen3_moe": qwen.QWEN3_MOE,
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "glm4_moe": glm.GLM4_MOE,
    "gpt_oss": gpt_oss.GPT_OSS,
}


def read(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What `DecoderConfig` takes; errors as `DecoderConfig.from_hf`."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(map(repr, FAMILIES))
        raise ConfigError(
            f"config.json has model_type {model_type!r}, of which fp8x builds no decoder; supported: {supported}. "
            "Weights of any model are converted without one, in dynamic and weight-only recipes; to run it and to "
            "calibrate it takes a decoder, or your own Flax model (docs/flax-models.md)"
        )
    family = FAMILIES[model_type]
    fields = Fields(hf, model_type, family.defaults)
    found = family.read(fields)
    fields.check_rest()
    return found
