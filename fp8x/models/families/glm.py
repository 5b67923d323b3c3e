"""GLM-4.5 and 4.6: half of a head turns, sigmoid routing, a shared expert, the first layers dense."""

from typing import Any

from fp8x.models.families.family import Family, common, layers
from fp8x.models.fields import Fields
from fp8x.models.parts import Mixture


def first_dense(fields: Fields) -> dict[str, Any]:
    """The first layers have a dense MLP."""
    dense = tuple(range(min(fields.count("first_k_dense_replace"), layers(fields))))
    fields.raw("intermediate_size")
    return {"dense_layers": dense, "intermediate_size": fields.positive_int("intermediate_size") if dense else None}


def prediction_layers(fields: Fields) -> int:
    """Layers for multi-token prediction, behind the last."""
    return fields.count("num_nextn_predict_layers") or fields.count("num_mtp_layers")


def sigmoid_mixture(fields: Fields) -> Mixture:
    """The routing of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), which GLM takes over."""
    width, shared = fields.positive_int("moe_intermediate_size"), fields.count("n_shared_experts")
    return Mixture(
        fields.positive_int("n_routed_experts", "num_local_experts"),
        fields.positive_int("num_experts_per_tok"),
        width,
        scores="sigmoid",
        normalize=fields.flag("norm_topk_prob"),
        scale=fields.positive_float("routed_scaling_factor"),
        use_correction_bias=True,
        groups=fields.optional_positive_int("n_group") or 1,
        top_groups=fields.optional_positive_int("topk_group") or 1,
        group_best=2,
        shared_intermediate=width * shared or None,
        router_float32=True,
    )


def _glm4_moe(fields: Fields) -> dict[str, Any]:
    own = {
        "mixture": sigmoid_mixture(fields),
        "qk_norm": fields.flag("use_qk_norm"),
        "attention_bias": fields.flag("attention_bias"),
        "skipped_layers": prediction_layers(fields),
    }
    return {**common(fields, partial=0.5), **first_dense(fields), **own}


GLM4_MOE = Family(
    _glm4_moe,
    {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
)
