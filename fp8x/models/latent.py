"""Attention through latents (DeepSeek-V2, arXiv:2405.04434, section 2.1), in two orders of the same products."""

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from fp8x import meshes
from fp8x.models.attention import RMSNorm, attend, heads
from fp8x.models.config import DecoderConfig
from fp8x.models.kv_cache import KeyValues, read, remember
from fp8x.models.rotary import Rotary
from fp8x.nn import Linear


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
        self.k_cache = self.v_cache = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotary: Rotary,
        mask: Bool[Array, "#b t s"],
        cache: KeyValues | None = None,
        start: Int[Array, "*b"] | int = 0,
    ) -> tuple[Float[Array, "b t hidden"], KeyValues]:
        """Arguments and results as `fp8x.models.attention.Attention`'s."""
        latent = self.latent
        if latent.q_rank is None:
            query = heads(self.q_proj, x, self.head_dim)
        else:
            query = heads(self.q_b_proj, self.q_a_layernorm(self.q_a_proj(x).astype(x.dtype)), self.head_dim)
        query = jnp.concatenate([query[..., : latent.nope_dim], rotary.rotate(query[..., latent.nope_dim :])], -1)
        low = self.kv_a_proj_with_mqa(x).astype(x.dtype)
        keys_values, position = self.kv_a_layernorm(low[..., : latent.kv_rank]), low[..., latent.kv_rank :]
        new = KeyValues(keys_values[:, :, None], rotary.rotate(position[:, :, None]))
        seen = remember(new, (self.k_cache, self.v_cache), cache, start)
        latents, positions = read(seen.keys, x.dtype), read(seen.values, x.dtype)
        through_latents = self._folded if self._is_folded(x.shape[1], latents.shape[1]) else self._expanded
        out = through_latents(query, latents, positions, mask)
        return self.o_proj(meshes.merge_dims(out, (1, 1, 2))).astype(x.dtype), seen

    def _is_folded(self, tokens: int, seen: int) -> bool:
        """Whether `kv_b_proj` goes with the queries and the output of `tokens`, where that is less work than to make
        keys and values of all the latents that are seen: for a few tokens that read many, as in decoding."""
        rank, made = self.latent.kv_rank, self.latent.nope_dim + self.latent.v_dim
        # A head's products: of each token in place of each latent, and 2 * rank in place of `made` for each pair.
        is_less = tokens * (rank * made + seen * (2 * rank - made)) <= seen * rank * made
        # What is in calibration or training is to see what it multiplies; others are not known here.
        is_plain = type(self.kv_b_proj) in (nnx.Linear, Linear) and not getattr(self.kv_b_proj, "is_calibrating", False)
        return is_less and is_plain

    def _expanded(
        self,
        query: Float[Array, "b t h d"],
        latents: Float[Array, "b s 1 rank"],
        positions: Float[Array, "b s 1 rope"],
        mask: Bool[Array, "#b t s"],
    ) -> Float[Array, "b t h v"]:
        """Every head makes keys and values of the latents."""
        latent = self.latent
        full = heads(self.kv_b_proj, latents[:, :, 0], latent.nope_dim + latent.v_dim)
        positions = jnp.broadcast_to(positions, (*full.shape[:-1], latent.rope_dim))
        keys, values = jnp.concatenate([full[..., : latent.nope_dim], positions], -1), full[..., latent.nope_dim :]
        return attend(query, keys, values, mask, self.scale)

    def _folded(
        self,
        query: Float[Array, "b t h d"],
        latents: Float[Array, "b s 1 rank"],
        positions: Float[Array, "b s 1 rope"],
        mask: Bool[Array, "#b t s"],
    ) -> Float[Array, "b t h v"]:
        """Queries and outputs are taken to the latents, which are keys and values of all heads as they are."""
        nope = self.latent.nope_dim
        weight = _weight(self.kv_b_proj, query.dtype).reshape(query.shape[2], -1, self.latent.kv_rank)
        if isinstance(self.kv_b_proj, Linear):
            latents = self.kv_b_proj.dequantized_input(latents)
        in_latents = jnp.einsum("bthn,hnr->bthr", query[..., :nope], weight[:, :nope])
        query = jnp.concatenate([in_latents, query[..., nope:]], -1)
        out = attend(query, jnp.concatenate([latents, positions], -1), latents, mask, self.scale)
        return jnp.einsum("bthr,hvr->bthv", out, weight[:, nope:])

    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """As `fp8x.models.attention.Attention`'s."""
        return (1, self.latent.kv_rank), (1, self.latent.rope_dim)


def _weight(linear: nnx.Linear | Linear, dtype: DTypeLike) -> Float[Array, "n k"]:
    if isinstance(linear, nnx.Linear):
        return linear.kernel[...].T.astype(dtype)
    return linear.quantized_weight.dequantize(dtype)
