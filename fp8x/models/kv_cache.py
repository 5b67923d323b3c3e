"""What a decoder remembers of the tokens that it has read: keys and values, in 8 bits or more."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from fp8x import meshes, numerics
from fp8x.array import ScaledArray
from fp8x.models.kv_quantizer import STORED_STATIC, KVQuantizers, Stored


class KeyValues(NamedTuple):
    """What a layer keeps of the tokens that it has read. By grouped queries: keys (rotated) and values. Through
    latents: these, as one head, and in place of values the keys' part with positions (rotated)."""

    keys: Float[Stored, "b s heads dim"]
    values: Float[Stored, "b s heads dim"]

    def write(self, new: "KeyValues", start: Int[Array, "*b"]) -> "KeyValues":
        """These with `new` written from position `start` on, of each text its own where it has a dim."""
        return KeyValues(*(_write(old, update, start) for old, update in zip(self, new)))


class Cache(NamedTuple):
    """What a decoder has read: per layer, room for the keys and values of `capacity` tokens, and how many are set: in
    all texts, or in each."""

    layers: tuple[KeyValues, ...]
    length: Int[Array, "*b"]


def remember(
    new: KeyValues,
    quantizers: KVQuantizers,
    cache: KeyValues | None,
    start: Int[Array, "*b"] | int,
) -> KeyValues:
    """What attention reads: `cache` with `new` written from `start` on, or `new` alone without a cache."""
    keys, values = quantizers
    if keys is not None and keys.is_calibrating:
        if keys is values:  # through latents one serves for both
            keys.observe(meshes.merge_dims(jnp.concatenate(new, axis=-1), (2, 2)))
        else:
            keys.observe(meshes.merge_dims(new.keys, (2, 2)))
            values.observe(meshes.merge_dims(new.values, (2, 2)))
    if cache is not None:
        return cache.write(new, start)
    return KeyValues(*(x if quantizer is None else quantizer(x) for x, quantizer in zip(new, quantizers)))


def read(stored: Float[Stored, "b s heads dim"], dtype: DTypeLike) -> Float[Array, "b s heads dim"]:
    """What is stored, in `dtype`."""
    return stored.dequantize(dtype) if isinstance(stored, ScaledArray) else stored.astype(dtype)


def _write(old: Stored, new: Array, start: Int[Array, "*b"]) -> Stored:
    if not isinstance(old, ScaledArray):
        return _update(old, new.astype(old.dtype), start)
    if old.scheme.block == STORED_STATIC:
        stored = numerics.quantize_with_scale(new, old.scale, old.scheme)
        return ScaledArray(_update(old.data, stored.data, start), old.scale, old.scheme)
    stored = numerics.quantize(new, old.scheme)
    return ScaledArray(_update(old.data, stored.data, start), _update(old.scale, stored.scale, start), old.scheme)


def _update(old: Array, new: Array, start: Int[Array, "*b"]) -> Array:
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, 1)
    return jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice_in_dim(old, new, start, 0))(old, new, start)
