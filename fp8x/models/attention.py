"""Causal grouped-query attention with rotary positions, as in transformers' Mixtral and Qwen3-MoE."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from fp8x.models.config import DecoderConfig
from fp8x.nn.training import source_of


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last dimension, `scale` of shape `[dim]`.

    The mean square is taken in float32 and the result cast to x's type before scaling, as transformers does:
    the order of the roundings matters in bf16.
    """

    def __init__(self, dim: int, *, eps: float, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * (x32 * inverse_rms).astype(x.dtype)


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles, one row per position."""

    cos: Float[Array, "t head_dim"]
    sin: Float[Array, "t head_dim"]

    @classmethod
    def at(cls, positions: Int[Array, " t"], head_dim: int, theta: float, dtype: DTypeLike) -> "Rotary":
        """Angles `position · theta^(-2i/head_dim)` in float32 (RoFormer, arXiv:2104.09864, section 3.2.2)."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = np.float32(1) / np.float32(theta) ** exponents
        angles = positions[:, None].astype(jnp.float32) * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)
        return cls(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))

    def rotate(self, x: Float[Array, "b t heads head_dim"]) -> Float[Array, "b t heads head_dim"]:
        """Rotates dimension i with dimension i + head_dim / 2: the half layout of Hugging Face checkpoints."""
        first, second = jnp.split(x, 2, axis=-1)
        half_turn = jnp.concatenate([-second, first], axis=-1)
        return x * self.cos[:, None] + half_turn * self.sin[:, None]


class KeyValues(NamedTuple):
    """Keys (rotated) and values of one layer."""

    keys: Float[Array, "b s kv_heads head_dim"]
    values: Float[Array, "b s kv_heads head_dim"]

    def write(self, new: "KeyValues", start: Int[Array, ""]) -> "KeyValues":
        """These with `new` written from position `start` on."""
        return jax.tree.map(lambda old, update: jax.lax.dynamic_update_slice_in_dim(old, update, start, 1), self, new)


def causal_mask(queries: Int[Array, " t"], keys: Int[Array, " s"], window: int | None) -> Bool[Array, "t s"]:
    """Which key position each query position sees: itself and those before, `window` in all if given."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class Attention(nnx.Module):
    """Attention of one layer: `q_proj`, `k_proj`, `v_proj`, `o_proj` and, for Qwen3-MoE, `q_norm` and `k_norm`."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=config.attention_bias, param_dtype=param_dtype, rngs=rngs)

        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, queries)
        self.k_proj = linear(config.hidden_size, keys)
        self.v_proj = linear(config.hidden_size, keys)
        self.o_proj = linear(queries, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, param_dtype=param_dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotary: Rotary,
        mask: Bool[Array, "t s"],
        cache: KeyValues | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t hidden"], KeyValues]:
        """Attends from x to what `cache` holds before position `start` and to x itself.

        Returns the output in x's type, and the keys and values seen: `cache` with x's written from `start` on,
        or x's alone without a cache.
        """
        query, key, value = (self._heads(linear(x), x.dtype) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        seen = KeyValues(rotary.rotate(key), value)
        if cache is not None:
            seen = cache.write(seen, start)
        out = jax.nn.dot_product_attention(rotary.rotate(query), seen.keys, seen.values, mask=mask[None, None])
        heads = out.shape[-2] * self.head_dim
        return self.o_proj(out.reshape(*x.shape[:-1], heads)).astype(x.dtype), seen

    @property
    def kv_heads(self) -> int:
        """How many key and value heads are here: on a mesh, on one device."""
        linear = source_of(self.k_proj)
        outputs = linear.kernel.shape[1] if isinstance(linear, nnx.Linear) else linear.weight.shape[0]
        return outputs // self.head_dim

    def _heads(self, x: Float[Array, "b t n"], dtype: DTypeLike) -> Float[Array, "b t heads head_dim"]:
        # A quantized projection answers in its recipe's type; everything between is in the residual's.
        return x.astype(dtype).reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)
