"""`Family`, and what all families read alike."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fp8x.errors import ConfigError
from fp8x.models.fields import MAX_LAYERS, Fields
from fp8x.models.rope import read_rope


@dataclasses.dataclass(frozen=True)
class MixtureNames:
    """How a checkpoint names the parts of a mixture, in its layer.

    Attributes:
        block: the mixture.
        gate, up, down: the matrices of an expert.
        shared: the expert that every token visits.
        router: what chooses the experts.
        interleaved: whether experts in 16 or 32 bits are written all in one tensor, `[E, K, N]`, gate and up in
            alternate columns: `experts.gate_up_proj`, `experts.down_proj` and, `[E, N]`, these with `_bias`.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"
    router: str = "gate"
    interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What one `model_type` differs in.

    Attributes:
        read: what `DecoderConfig` takes, of config.json: `common` and what is special.
        defaults: what transformers takes where config.json is silent.
        mixture: how tensors of a mixture are named.
    """

    read: Callable[[Fields], dict[str, Any]]
    defaults: Mapping[str, Any]
    mixture: MixtureNames = MixtureNames()


def common(fields: Fields, head_dim: int | None = None, **rope: Any) -> dict[str, Any]:
    """What every family has.

    Arguments:
        head_dim: of queries and keys; None reads it.
        rope: options of `read_rope`; there `rope_dim` dims of a head turn, or all.
    """
    hidden, heads = fields.positive_int("hidden_size"), fields.positive_int("num_attention_heads")
    if head_dim is None and (head_dim := fields.optional_positive_int("head_dim")) is None:
        if hidden % heads:
            raise ConfigError(
                f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) without head_dim"
            )
        head_dim = hidden // heads
    rotation = read_rope(fields, rope.pop("rope_dim", head_dim), **rope)
    return {
        "model_type": fields.model_type,
        "vocab_size": fields.positive_int("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": layers(fields),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(fields, heads),
        "head_dim": head_dim,
        "hidden_act": _activation(fields),
        "rms_norm_eps": fields.positive_float("rms_norm_eps"),
        "rope": rotation,
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "eos_token_id": fields.ints("eos_token_id"),
        "context": rotation.context(fields.optional_positive_int("max_position_embeddings")),
        "dtype": _dtype(fields),
    }


def dense(fields: Fields) -> dict[str, Any]:
    """Every layer has a dense MLP."""
    return {
        "intermediate_size": fields.positive_int("intermediate_size"),
        "dense_layers": tuple(range(layers(fields))),
    }


def layers(fields: Fields) -> int:
    count = fields.positive_int("num_hidden_layers")
    if count > MAX_LAYERS:
        raise fields.error("num_hidden_layers", count, f"at most {MAX_LAYERS}")
    return count


def windows(fields: Fields, window: int | None, default: Callable[[int], bool]) -> dict[str, Any]:
    """The layers with a sliding window: those that `layer_types` names, or where `default` says so."""
    count, stated = layers(fields), fields.raw("layer_types")
    sliding = [default(index) for index in range(count)]
    if stated is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(stated, list) or len(stated) != count or any(kind not in kinds for kind in stated):
            raise fields.error("layer_types", stated, f"{count} times 'full_attention' or 'sliding_attention'")
        sliding = [kind == kinds[1] for kind in stated]
    if window is None or not any(sliding):
        return {"sliding_window": None}
    return {"sliding_window": window, "full_layers": tuple(i for i, slides in enumerate(sliding) if not slides)}


def _kv_heads(fields: Fields, heads: int) -> int:
    """`num_key_value_heads`; null means as many as heads, as in transformers."""
    if fields.get("num_key_value_heads") is None and (
        "num_key_value_heads" in fields.hf or "num_key_value_heads" in fields.defaults
    ):
        return heads
    return fields.positive_int("num_key_value_heads")


def _activation(fields: Fields) -> str:
    name = fields.get("hidden_act") or "silu"
    if not isinstance(name, str):
        raise fields.error("hidden_act", name, "a name")
    return "silu" if name == "swish" else name


def _dtype(fields: Fields) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (4); where neither is the family's, or float32, which holds any."""
    name = fields.raw("dtype") or fields.raw("torch_dtype") or fields.defaults.get("dtype", "float32")
    return name.removeprefix("torch.") if isinstance(name, str) else name
