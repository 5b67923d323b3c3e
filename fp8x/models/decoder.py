"""The one decoder of all families: its module tree and numbers follow transformers."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from fp8x.array import ScaledArray
from fp8x.errors import ConfigError, RecipeError
from fp8x.models.attention import Attention, RMSNorm, causal_mask
from fp8x.models.config import DecoderConfig
from fp8x.models.hf_names import flat, linear_names, rule_names
from fp8x.models.inputs import check_context, check_ids, check_room
from fp8x.models.kv_cache import Cache, KeyValues
from fp8x.models.kv_quantizer import KVQuantizer, KVQuantizers, as_scheme, make_quantizers
from fp8x.models.latent import LatentAttention
from fp8x.models.rotary import Rotary
from fp8x.nn import GatedMLP, MoE
from fp8x.ops.gate import ClampedSwiGLU
from fp8x.scheme import KV_HEAD, KV_TENSOR, Scheme, is_kv_static
from fp8x.sharding.model import place_static, plan_of, static_dims
from fp8x.sharding.place import whole
from fp8x.sharding.plan import Placement
from fp8x.sharding.run import batch_spec, call, check_batch


class DecoderLayer(nnx.Module):
    """Attention, then the MLP (one gated MLP, or a mixture of experts), each residual."""

    def __init__(self, config: DecoderConfig, index: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.input_layernorm = _norm(config, param_dtype)
        attention = Attention if config.latent is None else LatentAttention
        self.self_attn = attention(config, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = _norm(config, param_dtype)
        if index in config.dense_layers:
            self.mlp = GatedMLP(
                hidden,
                config.intermediate_size,
                activation=config.hidden_act,
                use_bias=config.mlp_bias,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        else:
            mixture = config.mixture
            self.mlp = MoE(
                hidden,
                mixture.intermediate,
                mixture.num_experts,
                mixture.top_k,
                activation=ClampedSwiGLU(*mixture.clamped_swiglu) if mixture.clamped_swiglu else config.hidden_act,
                scores=mixture.scores,
                normalize_top_k=mixture.normalize,
                routed_scale=mixture.scale,
                use_correction_bias=mixture.use_correction_bias,
                groups=mixture.groups,
                top_groups=mixture.top_groups,
                group_best=mixture.group_best,
                use_bias=mixture.use_bias,
                router_bias=mixture.router_bias,
                shared_intermediate=mixture.shared_intermediate,
                shared_gate=mixture.shared_gate,
                router_dtype=jnp.float32 if mixture.router_float32 else None,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotary: Rotary,
        mask: Bool[Array, "#b t s"],
        cache: KeyValues | None,
        start: Int[Array, "*b"] | int,
    ) -> tuple[Float[Array, "b t hidden"], KeyValues]:
        """Arguments and results as `Attention`'s."""
        attended, seen = self.self_attn(self.input_layernorm(x), rotary, mask, cache, start)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype), seen


def _norm(config: DecoderConfig, param_dtype: DTypeLike) -> RMSNorm:
    """Of the residual."""
    return RMSNorm(
        config.hidden_size,
        eps=config.rms_norm_eps,
        scales_in_float32=config.norm_in_float32,
        param_dtype=param_dtype,
    )


class Decoder(nnx.Module):
    """A language model of any family in `fp8x.models.families`: `decoder(ids)` gives the logits of the next token at
    every position.

    Its matrices are `nnx.Linear` and `fp8x.nn.MoE`, which `fp8x.quantize_model` swaps for quantized ones; everything
    is computed in the parameters' type, logits are float32. `lm_head` is None where it is tied to the embedding.

    Arguments:
        config: what to build; `DecoderConfig.from_hf` reads it from a checkpoint's config.json.
        rngs: keys of the initial weights.
        param_dtype: type of the parameters; by default `config.dtype`.

    Attributes:
        placement: the mesh that the decoder lies on, by `fp8x.sharding.shard` or `fp8x.load`; None on one device. Its
            methods take and return whole arrays on the mesh then.
        vocab_axes: mesh axes over which the vocabulary is split, where the decoder is one device's part of another.
    """

    placement: Placement | None = None
    vocab_axes: tuple[str, ...] = ()

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike | None = None):
        param_dtype = jnp.dtype(config.dtype if param_dtype is None else param_dtype)
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        # nnx.Embed keeps the type it is made in; without one it follows its parameter when that is cast, like Linear.
        self.embed_tokens.dtype = None
        self.layers = nnx.List(
            DecoderLayer(config, index, param_dtype=param_dtype, rngs=rngs) for index in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, param_dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        )

    def __call__(self, ids: Int[Array, "b t"]) -> Float32[Array, "b t vocab"]:
        """Logits after each token of `ids`.

        Inside a compiled function, where nobody knows their values, an id outside the vocabulary makes its text's
        logits NaN; `check_ids` finds it before.

        Raises:
            DataError: `ids` that `check_ids` refuses.
            MeshError: a batch that the devices along the axis `data` can't share evenly.
        """
        self.check_ids(ids)
        if self.placement is not None:
            check_batch(self.placement, ids.shape[0], "ids")
            rows = batch_spec(self.placement)
            return call(Decoder.__call__, self, ids, in_specs=(rows,), out_specs=rows)
        hidden, _ = self._run(ids, None, 0)
        return self.logits(hidden)

    def checkpoint_names(self) -> dict[str, list[list[str]]]:
        """How rules of `fp8x.quantize_model` may call its layers, by path: by the names of their matrices."""
        modules = {path: [prefix for _, prefix in flat(names)] for path, names in linear_names(self.config).items()}
        return rule_names(modules | {"embed_tokens": ["model.embed_tokens"]})

    def check_ids(self, ids: Int[Array, "b t"], name: str = "ids") -> None:
        """What the model does before it reads `ids`: for those who compile a function that calls it.

        Arguments:
            name: what errors call them.

        Raises:
            DataError: ids that are no integers, or outside the vocabulary (where their values are known: not inside a
                compiled function, nor where other processes hold some), or more than the model's context.
        """
        check_ids(name, ids, self.config.vocab_size)
        check_context(name, ids.shape[1], self.config.context)

    def set_context(self, tokens: int | None) -> None:
        """Says how many tokens the model may read, whatever it was made for: more are an error everywhere.

        By default `config.context`: `max_position_embeddings`, stretched as config.json says. Beyond it positions come
        that the model has not learned, and what it predicts there may be worth nothing.

        Arguments:
            tokens: how many; None for no limit.

        Raises:
            ConfigError: no positive integer.
        """
        if tokens is not None and (not isinstance(tokens, int | np.integer) or tokens < 1):
            raise ConfigError(f"tokens: {tokens!r} does not fit; use a positive integer, or None for no limit")
        self.config = dataclasses.replace(self.config, context=None if tokens is None else int(tokens))

    @property
    def kv_cache(self) -> Scheme | None:
        """How keys and values are stored, over `[B, S, heads, dim]`; None for the type of the parameters."""
        quantizer, _ = self.kv_quantizers[0]
        return None if quantizer is None else quantizer.scheme

    def set_kv_cache(
        self,
        dtype: Scheme | str | DTypeLike | None,
        scales: Sequence[tuple[ArrayLike, ArrayLike]] | None = None,
    ) -> None:
        """Says how keys and values are stored from now on: in caches, and where the model is called without one.

        Arguments:
            dtype: "e4m3" or "e5m2": in 8 bits, with a scale a token and head; a `Scheme` over `[B, S, heads, dim]`, as
                docs/numerics.md lists them; None: in the type of the parameters.
            scales: of a scheme whose scales hold for all tokens: those of keys and of values, for every layer. Through
                latents one number serves for both. None leaves them to `fp8x.calibrate(model, batches, kv_cache=True)`.

        Raises:
            RecipeError: a scheme that does not fit keys and values.
            ShapeError: scales of another number than layers, or heads, or not finite and positive.
        """
        scheme = None if dtype is None else as_scheme(dtype, None)
        if not isinstance(scheme, Scheme | None):
            raise RecipeError(f"dtype: {dtype!r} is no 8-bit type; use 'e4m3', 'e5m2', a Scheme, or None")
        if scales is not None and (scheme is None or not is_kv_static(scheme)):
            raise RecipeError(
                f"scales: {dtype!r} takes none; give them with Scheme('e4m3', block={KV_TENSOR}) or {KV_HEAD}"
            )
        if scheme is None:
            self.hold_kv_quantizers([(None, None)] * len(self.layers))
            return
        self.hold_kv_quantizers(make_quantizers(self.config, scheme, scales))
        if self.placement is not None:
            place_static(self, plan_of(self, self.placement.mesh))

    @property
    def kv_quantizers(self) -> list[KVQuantizers]:
        """What stores the keys and the values of each layer in 8 bits; None where nothing does."""
        return [(layer.self_attn.k_cache, layer.self_attn.v_cache) for layer in self.layers]

    def hold_kv_quantizers(self, quantizers: Sequence[KVQuantizers]) -> None:
        """Takes what `kv_quantizers` has given."""
        for layer, (keys, values) in zip(self.layers, quantizers, strict=True):
            layer.self_attn.k_cache, layer.self_attn.v_cache = nnx.data(keys), nnx.data(values)

    def kv_scales(self) -> list[tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]:
        """The scales of keys and values that hold for all tokens, as `set_kv_cache` takes them: as on one device."""
        plan = None if self.placement is None else plan_of(self, self.placement.mesh)

        def of(path: str, quantizer: KVQuantizer) -> Float32[np.ndarray, " n"]:
            scale = quantizer.input_scale[...]
            return np.asarray(scale if plan is None else whole(scale, static_dims(path, quantizer, plan))).reshape(-1)

        return [
            (of(f"layers.{index}.self_attn.k_cache", keys), of(f"layers.{index}.self_attn.v_cache", values))
            for index, (keys, values) in enumerate(self.kv_quantizers)
        ]

    def init_cache(self, batch: int, capacity: int, dtype: Scheme | str | DTypeLike | None = None) -> Cache:
        """An empty cache for `batch` texts of up to `capacity` tokens.

        Arguments:
            dtype: what it holds: "e4m3" or "e5m2", with the model's own scales where it has them (`set_kv_cache`), else
                one a token and head; a `Scheme`; or a type of 16 or 32 bits. By default what the model says.

        Raises:
            CalibrationError: a scheme whose scales hold for all tokens, and the model has none.
            DataError: a capacity beyond the model's context (`set_context`).
            RecipeError: a type or scheme that does not fit keys and values.
        """
        check_context("capacity", capacity, self.config.context)
        return self.empty_cache(batch, capacity, dtype)

    def empty_cache(self, batch: int, capacity: int, dtype: Scheme | str | DTypeLike | None) -> Cache:
        """`init_cache` of any capacity: for whole chunks of prompts, which may end beyond the context."""
        sharding = None
        if self.placement is not None:
            check_batch(self.placement, batch, "batch")
            sharding = NamedSharding(self.placement.mesh, self.cache_specs(0).layers)
        param_dtype = self.embed_tokens.embedding.dtype
        stored = (self.kv_cache or param_dtype) if dtype is None else as_scheme(dtype, self.kv_cache)

        def empty(shape: tuple[int, int], own: KVQuantizer | None) -> Array | ScaledArray:
            if not isinstance(stored, Scheme):
                return jnp.zeros((batch, capacity, *shape), stored, device=sharding)
            quantizer = own if own is not None and own.scheme == stored else KVQuantizer(stored, shape)
            return quantizer.empty((batch, capacity, *shape), sharding)

        layers = (
            KeyValues(*map(empty, layer.self_attn.cache_shapes(), quantizers))
            for layer, quantizers in zip(self.layers, self.kv_quantizers)
        )
        return Cache(tuple(layers), jnp.int32(0))

    def cache_specs(self, length_rank: int) -> Cache:
        """How a cache lies on the mesh: rows of the batch, and heads; latents are every device's."""
        batch, heads = self.placement.batch, self.placement.heads if self.config.latent is None else ()
        layers = P(*(batch or (None,)), None, heads[0] if len(heads) == 1 else heads or None)
        return Cache(layers, P(*batch) if length_rank else P())

    def extend(
        self, ids: Int[Array, "b t"], cache: Cache, lengths: Int[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b t hidden"], Cache]:
        """Reads `ids` after what `cache` holds.

        Inside a compiled function, where nobody knows how much that is, the caller sees to the capacity: writes beyond
        it are misplaced. An id outside the vocabulary makes its text NaN there.

        Arguments:
            lengths: how many ids of each text count, from the first; by default all. What is given behind them is read
                too, but what is read next takes its place, and nothing that counts sees it.

        Returns the final hidden states, of which `logits` makes logits, and the longer cache.

        Raises:
            DataError: `ids` that `check_ids` refuses, more of them than the cache has room for, or a cache of another
                number of texts.
        """
        self.check_ids(ids)
        check_room(ids, cache)
        if self.placement is not None:
            rows = batch_spec(self.placement)
            before = self.cache_specs(jnp.ndim(cache.length))
            after = before if lengths is None else self.cache_specs(1)
            args, specs = (ids, cache), (rows, before)
            if lengths is not None:
                args, specs = (*args, lengths), (*specs, rows)
            return call(Decoder.extend, self, *args, in_specs=specs, out_specs=(rows, after))
        hidden, layers = self._run(ids, cache.layers, cache.length)
        return hidden, Cache(layers, cache.length + (ids.shape[1] if lengths is None else lengths))

    def logits(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocab"]:
        """The logits of final hidden states."""
        if self.placement is not None:
            rows = batch_spec(self.placement)
            return call(Decoder.logits, self, hidden, in_specs=(rows,), out_specs=rows)
        project = self.embed_tokens.attend if self.lm_head is None else self.lm_head
        logits = project(hidden).astype(jnp.float32)
        if self.vocab_axes:
            logits = jax.lax.all_gather(logits, self.vocab_axes, axis=logits.ndim - 1, tiled=True)
        return logits[..., : self.config.vocab_size]

    def _embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t hidden"]:
        if not self.vocab_axes:
            # Beyond the table's end NaN comes, but a negative id would count from there.
            ids = jnp.asarray(ids, jnp.int32)
            return self.embed_tokens(jnp.where(ids < 0, self.embed_tokens.embedding.shape[0], ids))
        # Every device has some rows of the table; the sum finds the one row that is not zero, exactly.
        here = self.embed_tokens.embedding.shape[0]
        row = ids - here * jax.lax.axis_index(self.vocab_axes)
        is_here = ((row >= 0) & (row < here))[..., None]
        x = jax.lax.psum(jnp.where(is_here, self.embed_tokens(jnp.clip(row, 0, here - 1)), 0), self.vocab_axes)
        return jnp.where(((ids >= 0) & (ids < self.config.vocab_size))[..., None], x, jnp.nan)

    def _run(
        self, ids: Int[Array, "b t"], caches: tuple[KeyValues, ...] | None, start: Int[Array, "*b"] | int
    ) -> tuple[Float[Array, "b t hidden"], tuple[KeyValues, ...]]:
        config = self.config
        x = self._embed(ids)
        # Of one text for all, or of each text.
        positions = jnp.reshape(start, (-1, 1)) + jnp.arange(ids.shape[1])
        seen_positions = positions[0] if caches is None else jnp.arange(caches[0].keys.shape[1])
        rotary = Rotary.at(positions, config.rope, x.dtype)
        windows = [None if index in config.full_layers else config.sliding_window for index in range(len(self.layers))]
        masks = {window: causal_mask(positions, seen_positions, window) for window in set(windows)}
        seen = []
        for layer, window, cache in zip(self.layers, windows, caches or [None] * len(self.layers), strict=True):
            x, key_values = layer(x, rotary, masks[window], cache, start)
            seen.append(key_values)
        return self.norm(x), tuple(seen)
