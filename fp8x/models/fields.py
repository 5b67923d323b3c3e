"""`Fields`: typed access to a Hugging Face `config.json`, which knows what was not read."""

import warnings
from collections.abc import Mapping
from typing import Any

from fp8x.errors import ConfigError, some

MAX_LAYERS = 10_000
_MAX_INT = 2**31 - 1
_MAX_FLOAT = 3.4e38  # of float32, in which it is computed with

# What changes no logits of a decoder in inference, or is read elsewhere.
_NEUTRAL = {
    "architectures", "attention_dropout", "aux_loss_alpha", "auto_map", "bos_token_id", "dtype", "embd_pdrop",
    "ep_size", "eos_token_id", "hidden_dropout", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type", "name_or_path", "num_mtp_layers",
    "num_nextn_predict_layers", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "quantization_config", "resid_pdrop", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "seq_aux", "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_fixed",
    "unsloth_version", "use_cache",
}  # fmt: skip
# What changes logits in the families that have it; no other family may hold more than its neutral value.
_CHANGING: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "layer_types": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "mup_factor": (1.0,),
    "n_group": (1,),
    "n_shared_experts": (0,),
    "no_rope_layers": ([],),
    "num_kv_shared_layers": (0,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1.0,),
    "q_lora_rank": (),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "residual_multiplier": (1.0,),
    "rope_local_base_freq": (),
    "routed_scaling_factor": (1.0,),
    "scale_depth": (),
    "scale_emb": (1.0,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "swiglu_alpha": (),
    "swiglu_limit": (),
    "sliding_window": (),
    "topk_method": ("greedy",),
    "use_bias": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}


class Fields:
    """Every error names the field and what it holds.

    Arguments:
        hf: the parsed config.json.
        defaults: what transformers takes where it is silent.
    """

    def __init__(self, hf: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any]):
        self.hf, self.model_type, self.defaults = hf, model_type, defaults
        self._read: set[str] = set()

    def raw(self, name: str) -> Any:
        """What config.json holds; None where it is missing or null."""
        self._read.add(name)
        return self.hf.get(name)

    def get(self, name: str) -> Any:
        """The value of a field that may be missing or null; then transformers' default."""
        value = self.raw(name)
        return self.defaults.get(name) if value is None else value

    def positive_int(self, *names: str) -> int:
        """A needed positive integer, under the first of `names` that is there."""
        for name in names:
            if (value := self.raw(name)) is not None:
                return self._check_positive(name, value, int, "integer", _MAX_INT)
        raise ConfigError(f"config.json of a {self.model_type} model has no {' or '.join(names)} (a positive integer)")

    def optional_positive_int(self, name: str) -> int | None:
        value = self.get(name)
        return None if value is None else self._check_positive(name, value, int, "integer", _MAX_INT)

    def count(self, name: str) -> int:
        """A whole number that may be 0, which it is where it is missing."""
        value = self.get(name)
        return 0 if value in (None, 0) else self._check_positive(name, value, int, "integer", _MAX_INT)

    def positive_float(self, name: str, value: Any = None) -> float:
        """The field, or `value`, which was found under that name elsewhere."""
        value = self.get(name) if value is None else value
        return float(self._check_positive(name, value, (int, float), "number", _MAX_FLOAT))

    def flag(self, name: str) -> bool:
        self._read.add(name)
        value = self.hf.get(name, self.defaults.get(name, False))
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def choice(self, name: str, *choices: str | None) -> str | None:
        """One of some names."""
        if (value := self.get(name)) not in choices:
            raise self.error(name, value, " or ".join(map(repr, choices)))
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

    def check_rest(self) -> None:
        """Nothing that was not read changes what the model computes.

        Raises:
            ConfigError: a field that does, in the models that have it.

        Warns of fields that nobody here knows.
        """
        left = {name: value for name, value in self.hf.items() if name not in self._read and value is not None}
        for name, value in left.items():
            if name in _CHANGING and value not in _CHANGING[name]:
                raise ConfigError(
                    f"config.json of a {self.model_type} model has {name} {value!r:.100}, which fp8x does not know "
                    "there"
                )
        unknown = [n for n in left if n not in _NEUTRAL and n not in _CHANGING and not n.startswith("_")]
        if unknown:
            warnings.warn(
                f"config.json of a {self.model_type} model: {some(sorted(unknown))} not read; if logits depend on it, "
                "they are wrong here",
                stacklevel=4,
            )

    def _check_positive(
        self, name: str, value: Any, types: type | tuple[type, ...], kind: str, limit: int | float
    ) -> Any:
        if not isinstance(value, types) or isinstance(value, bool) or not value > 0:
            raise self.error(name, value, f"a positive {kind}")
        if value > limit:
            raise self.error(name, value, f"at most {limit}")
        return value
