"""Mixtral: Mistral with a mixture in every layer."""

from typing import Any

from fp8x.models.families.family import Family, MixtureNames, common
from fp8x.models.fields import Fields
from fp8x.models.parts import Mixture


def _mixtral(fields: Fields) -> dict[str, Any]:
    mixture = Mixture(
        fields.positive_int("num_local_experts", "num_experts"),
        fields.positive_int("num_experts_per_tok"),
        fields.positive_int("intermediate_size"),
    )
    return {**common(fields), "mixture": mixture, "sliding_window": fields.optional_positive_int("sliding_window")}


MIXTRAL = Family(
    _mixtral,
    {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "eos_token_id": 2},
    MixtureNames("block_sparse_moe", "w1", "w3", "w2"),
)
