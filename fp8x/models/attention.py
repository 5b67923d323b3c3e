"""Causal attention with rotary positions, as in transformers: by grouped queries, and through latents."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from fp8x.models.config import DecoderConfig
from fp8x.models.rope import Rotary
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


class KeyValues(NamedTuple):
    """What a layer keeps of the tokens that it has read: of grouped queries keys (rotated) and values, a head each; of
    latents these, as one head, and the keys' part with positions (rotated)."""

    keys: Float[Array, "b s heads dim"]
    values: Float[Array, "b s heads dim"]

    def write(self, new: "KeyValues", start: Int[Array, ""]) -> "KeyValues":
        """These with `new` written from position `start` on."""
        return jax.tree.map(lambda old, update: jax.lax.dynamic_update_slice_in_dim(old, update, start, 1), self, new)


def causal_mask(queries: Int[Array, " t"], keys: Int[Array, " s"], window: int | None) -> Bool[Array, "t s"]:
    """Which key position each query position sees: itself and those before, `window` in all if given."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class Attention(nnx.Module):
    """Grouped queries: `q_proj`, `k_proj`, `v_proj`, `o_proj` and, in some families, `q_norm` and `k_norm`."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, use_bias: bool) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)

        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, queries, config.attention_bias)
        self.k_proj = linear(config.hidden_size, keys, config.attention_bias)
        self.v_proj = linear(config.hidden_size, keys, config.attention_bias)
        self.o_proj = linear(queries, config.hidden_size, config.output_bias)
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
        query, key, value = (heads(linear, x, self.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        seen = KeyValues(rotary.rotate(key), value)
        if cache is not None:
            seen = cache.write(seen, start)
        out = jax.nn.dot_product_attention(rotary.rotate(query), seen.keys, seen.values, mask=mask[None, None])
        return self.o_proj(joined(out)).astype(x.dtype), seen

    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and dims of the two arrays of `KeyValues`; on a mesh, on one device."""
        shape = (_outputs(self.k_proj) // self.head_dim, self.head_dim)
        return shape, shape


class LatentAttention(nnx.Module):
    """Through latents: `q_proj`, or `q_a_proj`, `q_a_layernorm` and `q_b_proj`; `kv_a_proj_with_mqa`, `kv_a_layernorm`,
    `kv_b_proj`; and `o_proj`. See `Latent`."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, param_dtype=param_dtype, rngs=rngs)

        # Their epsilon is no field of config.json: transformers' classes leave it at its default.
        norm = lambda dim: RMSNorm(dim, eps=1e-6, param_dtype=param_dtype)  # noqa: E731
        latent, count, hidden = config.latent, config.num_attention_heads, config.hidden_size
        self.latent, self.head_dim = latent, config.head_dim
        self.scale = config.rope.score_factor / math.sqrt(config.head_dim)
        if latent.q_rank is None:
            self.q_proj = linear(hidden, count * config.head_dim)
        else:
            self.q_a_proj = linear(hidden, latent.q_rank)
            self.q_a_layernorm = norm(latent.q_rank)
            self.q_b_proj = linear(latent.q_rank, count * config.head_dim)
        self.kv_a_proj_with_mqa = linear(hidden, latent.kv_rank + latent.rope_dim)
        self.kv_a_layernorm = norm(latent.kv_rank)
        self.kv_b_proj = linear(latent.kv_rank, count * (latent.nope_dim + latent.v_dim))
        self.o_proj = linear(count * latent.v_dim, hidden)

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotary: Rotary,
        mask: Bool[Array, "t s"],
        cache: KeyValues | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t hidden"], KeyValues]:
        """Arguments and results as `Attention`'s."""
        latent = self.latent
        if latent.q_rank is None:
            query = heads(self.q_proj, x, self.head_dim)
        else:
            query = heads(self.q_b_proj, self.q_a_layernorm(self.q_a_proj(x).astype(x.dtype)), self.head_dim)
        query = jnp.concatenate([query[..., : latent.nope_dim], rotary.rotate(query[..., latent.nope_dim :])], -1)
        low = self.kv_a_proj_with_mqa(x).astype(x.dtype)
        keys_values, position = self.kv_a_layernorm(low[..., : latent.kv_rank]), low[..., latent.kv_rank :]
        seen = KeyValues(keys_values[:, :, None], rotary.rotate(position[:, :, None]))
        if cache is not None:
            seen = cache.write(seen, start)
        full = heads(self.kv_b_proj, seen.keys[:, :, 0], latent.nope_dim + latent.v_dim)
        position = jnp.broadcast_to(seen.values, (*full.shape[:-1], latent.rope_dim))
        key, value = jnp.concatenate([full[..., : latent.nope_dim], position], -1), full[..., latent.nope_dim :]
        out = attend(query, key, value, mask, self.scale)
        return self.o_proj(joined(out)).astype(x.dtype), seen

    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """As `Attention`'s."""
        return (1, self.latent.kv_rank), (1, self.latent.rope_dim)


def attend(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h v"],
    mask: Bool[Array, "t s"],
    scale: float,
) -> Float[Array, "b t h v"]:
    """`jax.nn.dot_product_attention` of keys and values of different sizes: scores and softmax in float32, weights in
    the values' type."""
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(value.dtype)
    return jnp.einsum("bhts,bshv->bthv", weights, value)


def heads(linear: nnx.Module, x: Float[Array, "b t n"], dim: int) -> Float[Array, "b t heads dim"]:
    """What a projection gives, as heads, in x's type: a quantized one answers in its recipe's, and everything between
    is in the residual's."""
    y = linear(x).astype(x.dtype)
    return y.reshape(*y.shape[:-1], y.shape[-1] // dim, dim)


def joined(y: Float[Array, "b t heads dim"]) -> Float[Array, "b t n"]:
    """The heads side by side."""
    return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])


def _outputs(linear: nnx.Module) -> int:
    linear = source_of(linear)
    return linear.kernel.shape[1] if isinstance(linear, nnx.Linear) else linear.weight.shape[0]
