"""Causal attention with rotary positions by grouped queries, as in transformers; latent.py has that through latents."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from fp8x import meshes
from fp8x.array import ScaledArray
from fp8x.models.config import DecoderConfig
from fp8x.models.kv_cache import KeyValues, remember
from fp8x.models.kv_quantizer import Stored
from fp8x.models.rotary import Rotary
from fp8x.nn.training import source_of


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last dimension, `scale` of shape `[dim]`.

    The mean square is taken in float32 and the result cast to x's type before scaling, or after it with
    `scales_in_float32`, as transformers does: the order of the roundings matters in bf16.
    """

    def __init__(self, dim: int, *, eps: float, scales_in_float32: bool = False, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))
        self.eps, self.scales_in_float32 = eps, scales_in_float32

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.scales_in_float32:
            return (self.scale[...].astype(jnp.float32) * (x32 * inverse_rms)).astype(x.dtype)
        return self.scale[...].astype(x.dtype) * (x32 * inverse_rms).astype(x.dtype)


def causal_mask(queries: Int[Array, "b t"], keys: Int[Array, " s"], window: int | None) -> Bool[Array, "b t s"]:
    """Which key position each query position sees: itself and those before, `window` in all if given."""
    distance = queries[..., None] - keys
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class Attention(nnx.Module):
    """Grouped queries: `q_proj`, `k_proj`, `v_proj`, `o_proj` and, in some families, `q_norm` and `k_norm`, or `sinks`
    `[heads]`."""

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
        self.sinks = nnx.Param(jnp.zeros(config.num_attention_heads, param_dtype)) if config.attention_sinks else None
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.k_cache = self.v_cache = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotary: Rotary,
        mask: Bool[Array, "#b t s"],
        cache: KeyValues | None = None,
        start: Int[Array, "*b"] | int = 0,
    ) -> tuple[Float[Array, "b t hidden"], KeyValues]:
        """Attends from x to what `cache` holds before position `start` and to x itself.

        Returns the output in x's type, and the keys and values seen: `cache` with x's written from `start` on,
        or x's alone without a cache.
        """
        query, key, value = (heads(linear, x, self.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        seen = remember(KeyValues(rotary.rotate(key), value), (self.k_cache, self.v_cache), cache, start)
        sinks = None if self.sinks is None else self.sinks[...]
        out = attend(rotary.rotate(query), *seen, mask, 1 / math.sqrt(self.head_dim), sinks)
        return self.o_proj(meshes.merge_dims(out, (1, 1, 2))).astype(x.dtype), seen

    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and dims of the two arrays of `KeyValues`; on a mesh with what fills up devices."""
        shape = (_outputs(self.k_proj) // self.head_dim, self.head_dim)
        return shape, shape


def attend(
    query: Float[Array, "b t h d"],
    keys: Float[Stored, "b s kv d"],
    values: Float[Stored, "b s kv v"],
    mask: Bool[Array, "#b t s"],
    scale: float,
    sinks: Float[Array, " h"] | None = None,
) -> Float[Array, "b t h v"]:
    """`softmax(query @ keys.T * scale) @ values`, a head of keys and values for every `h / kv` of queries.

    A head's sink is one logit more in its softmax, of a key without a value: what it takes, no token gets (gpt-oss).

    Scores and softmax are in float32, sums too; the weights are cast to the queries' type. Of what is in 8 bits the
    codes are multiplied, and the scales go with the scores and the weights: both products read 8 bits.
    """
    b, t, h, d = query.shape
    keys, key_scale = _factors(keys, query.dtype)
    values, value_scale = _factors(values, query.dtype)
    query = query.reshape(b, t, keys.shape[2], h // keys.shape[2], d)
    scores = jnp.einsum("btkgd,bskd->bkgts", query, keys, preferred_element_type=jnp.float32) * scale
    if key_scale is not None:
        scores *= key_scale
    weights = _softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), sinks)
    if value_scale is not None:
        weights *= value_scale
    out = jnp.einsum("bkgts,bskv->btkgv", weights.astype(query.dtype), values)
    return out.reshape(b, t, h, values.shape[-1])


def _softmax(scores: Float32[Array, "b kv g t s"], sinks: Float[Array, " h"] | None) -> Float32[Array, "b kv g t s"]:
    """Softmax over the last dim and the head's sink, without the weight of the sink."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    exponentials = jnp.exp(scores - top)
    return exponentials / (jnp.sum(exponentials, axis=-1, keepdims=True) + jnp.exp(sinks - top))


def _factors(
    stored: Float[Stored, "b s kv d"], dtype: DTypeLike
) -> tuple[Float[Array, "b s kv d"], Float32[Array, "b kv 1 1 #s"] | None]:
    """What is stored as an array of `dtype`, in which 8-bit floats are exact, and what it is still to be multiplied by.

    float16 holds no weights that are multiplied by small scales, and scales inside a head are no factors of its sums.
    """
    if not isinstance(stored, ScaledArray):
        return stored.astype(dtype), None
    if stored.scale.shape[-1] != 1 or dtype == jnp.float16:
        return stored.dequantize(dtype), None
    return stored.data.astype(dtype), stored.scale.astype(jnp.float32).transpose(0, 2, 3, 1)[:, :, None]


def heads(linear: nnx.Module, x: Float[Array, "b t n"], dim: int) -> Float[Array, "b t heads dim"]:
    """What a projection gives, as heads, in x's type: a quantized one answers in its recipe's, and everything between
    is in the residual's."""
    y = linear(x).astype(x.dtype)
    return y.reshape(*y.shape[:-1], y.shape[-1] // dim, dim)


def _outputs(linear: nnx.Module) -> int:
    linear = source_of(linear)
    return linear.kernel.shape[1] if isinstance(linear, nnx.Linear) else linear.weight.shape[0]
