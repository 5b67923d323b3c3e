"""What a Mixtral or Qwen3-MoE decoder is made of, as read from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from fp8x.errors import ConfigError
from fp8x.ops.gate import ACTIVATIONS

ModelType = Literal["mixtral", "qwen3_moe"]

# What transformers takes where config.json is silent: MixtralConfig and Qwen3MoeConfig.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "eos_token_id": 2},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "eos_token_id": None},
}
MODEL_TYPES = tuple(_DEFAULTS)
_DTYPES = ("float32", "bfloat16", "float16")
_QWEN3_DEFAULT_WINDOW = 4096
_SIZES = (
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
)
_MAX_LAYERS = 10_000
_MAX_INT = 2**31 - 1
_MAX_FLOAT = 3.4e38  # of float32, in which it is computed with


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder and the options of its layers; field names are those of transformers.

    Attributes:
        moe_intermediate_size: width of one expert (Mixtral's `intermediate_size`).
        intermediate_size: width of the dense layers' MLP; None where every layer is a mixture of experts.
        dense_layers: indices of the layers with a dense MLP, ascending (Qwen3-MoE only).
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None: all before it.
        eos_token_id: the tokens that end a text; may be empty.
        dtype: name of the parameters' type.
        hf: the raw `config.json`; takes no part in comparison.

    Raises:
        ConfigError: a value is out of range or not supported.
    """

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    intermediate_size: int | None = None
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    attention_bias: bool = False
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    dtype: str = "float32"
    hf: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most the number of experts "
                f"({self.num_experts})"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not supported; supported: {', '.join(_DTYPES)}")
        if self.dense_layers and self.intermediate_size is None:
            raise ConfigError(f"layers {list(self.dense_layers)} are dense, which needs intermediate_size")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys pass an RMSNorm over the head dimension."""
        return self.model_type == "qwen3_moe"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the parsed `config.json` of a Mixtral or Qwen3-MoE checkpoint, of transformers 4 or 5.

        Fields that give a tensor its shape must be there; the others take transformers' defaults.

        Raises:
            ConfigError: a needed field is missing, or a value has the wrong type or is not supported.
        """
        model_type = hf.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"config.json has model_type {model_type!r}; supported: {', '.join(map(repr, _DEFAULTS))}"
            )
        fields = _Fields(hf, model_type)
        read = _read_mixtral if model_type == "mixtral" else _read_qwen3_moe
        return cls(**_read_common(fields), **read(fields), hf=dict(hf))


class _Fields:
    """Typed access to config.json, with the field and what it holds in every error."""

    def __init__(self, hf: Mapping[str, Any], model_type: str):
        self.hf = hf
        self.model_type = model_type
        self.defaults = _DEFAULTS[model_type]

    def get(self, name: str) -> Any:
        """The value of a field that may be missing or null; then transformers' default."""
        value = self.hf.get(name)
        return self.defaults.get(name) if value is None else value

    def positive_int(self, *names: str) -> int:
        """A needed positive integer, under the first of `names` that is there."""
        for name in names:
            if self.hf.get(name) is not None:
                return self._check_positive(name, self.hf[name], int, "integer", _MAX_INT)
        raise ConfigError(f"config.json of a {self.model_type} model has no {' or '.join(names)} (a positive integer)")

    def optional_positive_int(self, name: str) -> int | None:
        value = self.get(name)
        return None if value is None else self._check_positive(name, value, int, "integer", _MAX_INT)

    def positive_float(self, name: str, value: Any) -> float:
        return float(self._check_positive(name, value, (int, float), "number", _MAX_FLOAT))

    def flag(self, name: str, default: bool) -> bool:
        value = self.hf.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def ints(self, name: str) -> tuple[int, ...]:
        """A list of non-negative integers, or one alone; empty where missing or null."""
        value = self.get(name)
        items = value if isinstance(value, list | tuple) else () if value is None else (value,)
        if any(type(item) is not int or not 0 <= item <= _MAX_INT for item in items):
            raise self.error(name, value, "a non-negative integer or a list of them")
        return tuple(items)

    def error(self, name: str, value: Any, expected: str) -> ConfigError:
        got = f"{type(value).__name__} {value!r:.200}"
        return ConfigError(f"config.json of a {self.model_type} model: {name} must be {expected}, got {got}")

    def _check_positive(
        self, name: str, value: Any, types: type | tuple[type, ...], kind: str, limit: int | float
    ) -> Any:
        if not isinstance(value, types) or isinstance(value, bool) or not value > 0:
            raise self.error(name, value, f"a positive {kind}")
        if value > limit:
            raise self.error(name, value, f"at most {limit}")
        return value


def _read_common(fields: _Fields) -> dict[str, Any]:
    hidden = fields.positive_int("hidden_size")
    heads = fields.positive_int("num_attention_heads")
    head_dim = fields.optional_positive_int("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise ConfigError(
                f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) without head_dim"
            )
        head_dim = hidden // heads
    return {
        "model_type": fields.model_type,
        "vocab_size": fields.positive_int("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": _read_layers(fields),
        "num_attention_heads": heads,
        "num_key_value_heads": _read_kv_heads(fields, heads),
        "head_dim": head_dim,
        "num_experts": fields.positive_int("num_local_experts", "num_experts"),
        "num_experts_per_tok": fields.positive_int("num_experts_per_tok"),
        "hidden_act": _read_activation(fields),
        "rms_norm_eps": fields.positive_float("rms_norm_eps", fields.get("rms_norm_eps")),
        "rope_theta": _read_rope_theta(fields),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", default=False),
        "eos_token_id": fields.ints("eos_token_id"),
        "dtype": _read_dtype(fields),
    }


def _read_mixtral(fields: _Fields) -> dict[str, Any]:
    return {
        "moe_intermediate_size": fields.positive_int("intermediate_size"),
        "sliding_window": fields.optional_positive_int("sliding_window"),
    }


def _read_qwen3_moe(fields: _Fields) -> dict[str, Any]:
    mlp_only = set(fields.ints("mlp_only_layers"))
    sparse_step = fields.optional_positive_int("decoder_sparse_step") or 1
    dense = tuple(i for i in range(_read_layers(fields)) if i in mlp_only or (i + 1) % sparse_step)
    window = None
    if fields.flag("use_sliding_window", default=False):
        # An explicit null turns the window off; only a missing field takes transformers' default.
        missing = "sliding_window" not in fields.hf
        window = _QWEN3_DEFAULT_WINDOW if missing else fields.optional_positive_int("sliding_window")
    return {
        "moe_intermediate_size": fields.positive_int("moe_intermediate_size"),
        "intermediate_size": fields.positive_int("intermediate_size") if dense else None,
        "dense_layers": dense,
        "norm_topk_prob": fields.flag("norm_topk_prob", default=False),
        "attention_bias": fields.flag("attention_bias", default=False),
        "sliding_window": window,
    }


def _read_layers(fields: _Fields) -> int:
    count = fields.positive_int("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise fields.error("num_hidden_layers", count, f"at most {_MAX_LAYERS}")
    return count


def _read_kv_heads(fields: _Fields, heads: int) -> int:
    """`num_key_value_heads`; null means as many as heads, as in transformers."""
    if "num_key_value_heads" in fields.hf and fields.hf["num_key_value_heads"] is None:
        return heads
    return fields.positive_int("num_key_value_heads")


def _read_rope_theta(fields: _Fields) -> float:
    """The rotary base: `rope_theta` beside `rope_scaling` (transformers 4) or in `rope_parameters` (5)."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.hf.get(name) or {}
        if not isinstance(rope, Mapping):
            raise fields.error(name, rope, "an object")
        if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
            raise ConfigError(f"config.json: {name} per layer type ({', '.join(nested)}) is not supported")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"config.json: {name} has rope_type {kind!r}; supported: 'default'")
    theta = fields.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        theta = (fields.hf.get(name) or {}).get("rope_theta", theta)
    return fields.positive_float("rope_theta", theta)


def _read_activation(fields: _Fields) -> str:
    name = fields.hf.get("hidden_act", "silu")
    if not isinstance(name, str):
        raise fields.error("hidden_act", name, "a name")
    return "silu" if name == "swish" else name


def _read_dtype(fields: _Fields) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (4); float32, which holds any of the others, where neither is."""
    name = fields.hf.get("dtype") or fields.hf.get("torch_dtype") or "float32"
    return name.removeprefix("torch.") if isinstance(name, str) else name
