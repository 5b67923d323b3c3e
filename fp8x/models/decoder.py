"""Mixtral and Qwen3-MoE: a decoder whose module tree and numbers follow transformers."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from fp8x.models.attention import Attention, KeyValues, RMSNorm, Rotary, causal_mask
from fp8x.models.config import DecoderConfig
from fp8x.nn import GatedMLP, MoE


class Cache(NamedTuple):
    """What a decoder has read: per layer, room for the keys and values of `capacity` tokens, and how many are set."""

    layers: tuple[KeyValues, ...]
    length: Int[Array, ""]


class DecoderLayer(nnx.Module):
    """Attention, then the MLP (a mixture of experts or, in Qwen3-MoE's dense layers, one gated MLP), each residual."""

    def __init__(self, config: DecoderConfig, index: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps=eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps, param_dtype=param_dtype)
        if index in config.dense_layers:
            self.mlp = GatedMLP(
                hidden,
                config.intermediate_size,
                activation=config.hidden_act,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        else:
            self.mlp = MoE(
                hidden,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                activation=config.hidden_act,
                normalize_top_k=config.norm_topk_prob,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotary: Rotary,
        mask: Bool[Array, "t s"],
        cache: KeyValues | None,
        start: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b t hidden"], KeyValues]:
        """Arguments and results as `Attention`'s."""
        attended, seen = self.self_attn(self.input_layernorm(x), rotary, mask, cache, start)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype), seen


class Decoder(nnx.Module):
    """A Mixtral or Qwen3-MoE language model: `decoder(ids)` gives the logits of the next token at every position.

    Its matrices are `nnx.Linear` and `fp8x.nn.MoE`, which `fp8x.quantize_model` swaps for quantized ones; everything
    is computed in the parameters' type, logits are float32. `lm_head` is None where it is tied to the embedding.

    Arguments:
        config: what to build; `DecoderConfig.from_hf` reads it from a checkpoint's config.json.
        rngs: keys of the initial weights.
        param_dtype: type of the parameters; by default `config.dtype`.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike | None = None):
        param_dtype = jnp.dtype(config.dtype if param_dtype is None else param_dtype)
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        # nnx.Embed keeps the type it is made in; without one it follows its parameter when that is cast, like Linear.
        self.embed_tokens.dtype = None
        self.layers = nnx.List(
            DecoderLayer(config, index, param_dtype=param_dtype, rngs=rngs) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        )

    def __call__(self, ids: Int[Array, "b t"]) -> Float32[Array, "b t vocab"]:
        """Logits after each token of `ids`; a token id outside the vocabulary gives NaN."""
        hidden, _ = self._run(ids, None, 0)
        return self.logits(hidden)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` texts of up to `capacity` tokens."""
        config = self.config
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        empty = jnp.zeros(shape, self.embed_tokens.embedding.dtype)
        return Cache((KeyValues(empty, empty),) * config.num_hidden_layers, jnp.int32(0))

    def extend(self, ids: Int[Array, "b t"], cache: Cache) -> tuple[Float[Array, "b t hidden"], Cache]:
        """Reads `ids` after what `cache` holds. The caller sees to the capacity: writes beyond it are misplaced.

        Returns the final hidden states, of which `logits` makes logits, and the longer cache.
        """
        hidden, layers = self._run(ids, cache.layers, cache.length)
        return hidden, Cache(layers, cache.length + ids.shape[1])

    def logits(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocab"]:
        """The logits of final hidden states."""
        project = self.embed_tokens.attend if self.lm_head is None else self.lm_head
        return project(hidden).astype(jnp.float32)

    def _run(
        self, ids: Int[Array, "b t"], caches: tuple[KeyValues, ...] | None, start: Int[Array, ""] | int
    ) -> tuple[Float[Array, "b t hidden"], tuple[KeyValues, ...]]:
        config = self.config
        x = self.embed_tokens(ids)
        positions = start + jnp.arange(ids.shape[1])
        seen_positions = positions if caches is None else jnp.arange(caches[0].keys.shape[1])
        rotary = Rotary.at(positions, config.head_dim, config.rope_theta, x.dtype)
        mask = causal_mask(positions, seen_positions, config.sliding_window)
        seen = []
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x, key_values = layer(x, rotary, mask, cache, start)
            seen.append(key_values)
        return self.norm(x), tuple(seen)
