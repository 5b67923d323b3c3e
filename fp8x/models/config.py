"""What a decoder is made of, as read from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fp8x.errors import ConfigError
from fp8x.models.families import read
from fp8x.models.parts import ACTIVATIONS, Latent, Mixture
from fp8x.models.rope import Rope

_DTYPES = ("float32", "bfloat16", "float16")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder and the options of its layers.

    Attributes:
        model_type: the family, as `fp8x.models.families.FAMILIES` has it.
        head_dim: dims of a query and of a key.
        intermediate_size: width of the dense layers' MLP; None where every layer is a mixture of experts.
        mixture: of the layers that are no dense ones; None without any.
        dense_layers: indices of the layers with a dense MLP, ascending.
        rope: how positions turn queries and keys.
        latent: attention through latents; None for grouped queries.
        qk_norm: whether queries and keys pass an RMSNorm over the head dimension.
        attention_bias, output_bias, mlp_bias: whether q, k and v, the attention's output and the dense MLPs add one.
        attention_sinks: whether every head of queries has a logit of its own beside those of the keys (gpt-oss).
        norm_in_float32: whether the residual's RMSNorm scales in float32 and casts after that (gpt-oss), or before.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None: all before it.
        full_layers: indices of the layers without that window.
        eos_token_id: the tokens that end a text; may be empty.
        skipped_layers: layers behind the last, for multi-token prediction, which are not loaded.
        context: how many tokens it reads at most: `max_position_embeddings`, stretched as `rope` says. None: no limit,
            as where config.json is silent. A sliding window is none: it ends what one token sees, not the text.
        dtype: name of the parameters' type.
        hf: the raw `config.json`; takes no part in comparison.

    Raises:
        ConfigError: a value is out of range or not supported.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    intermediate_size: int | None = None
    mixture: Mixture | None = None
    dense_layers: tuple[int, ...] = ()
    latent: Latent | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_sinks: bool = False
    norm_in_float32: bool = False
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    skipped_layers: int = 0
    context: int | None = None
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
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not supported; supported: {', '.join(_DTYPES)}")
        if self.dense_layers and self.intermediate_size is None:
            raise ConfigError(f"layers {list(self.dense_layers)} are dense, which needs intermediate_size")
        if self.attention_sinks and self.latent is not None:
            raise ConfigError("attention_sinks: attention through latents has none")
        if self.mixture is None and len(self.dense_layers) < self.num_hidden_layers:
            raise ConfigError("mixture: is None, but some layers are no dense ones")

    @property
    def num_experts(self) -> int:
        """How many experts a mixture has; 0 without one."""
        return 0 if self.mixture is None else self.mixture.num_experts

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the parsed `config.json` of a family that fp8x knows, of transformers 4 or 5.

        Fields that give a tensor its shape must be there; the others take transformers' defaults.

        Raises:
            ConfigError: a needed field is missing, a value has the wrong type or is not supported, or a field changes
                what the model computes and the family does not read it.

        Warns of fields that fp8x does not know at all.
        """
        return cls(**read(hf), hf=dict(hf))
