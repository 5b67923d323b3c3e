"""How keys and values are stored in 8 bits, by the scheme that a model or a cache names.

Arrays are `[B, S, heads, dim]`; latents count as one head. In 8 bits they are in a `Scheme` over these dims:

    block                     scales                               come from
    (None, None, None, None)  one                                  calibration, or a checkpoint ("static")
    (None, None, 1, None)     one a head                           the same
    (1, None)                 one a token and head                 the token itself ("dynamic")
    (1, 32) and the like      one a block of a token's head        the same

Each token is quantized by itself, so that the same numbers are read however a text was cut into calls.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.errors import CalibrationError, RecipeError, ShapeError
from fp8x.models.config import DecoderConfig
from fp8x.nn.calibrated import Calibrated, InputScale
from fp8x.recipe import OUT_DTYPES
from fp8x.scheme import ELEMENTS, KV_HEAD, KV_TENSOR, Scheme, is_kv_static, per_row

Stored = Array | ScaledArray

STORED_STATIC = (1, None, 1, None)  # how a cache holds static scales: a text's heads have one each


class KVQuantizer(Calibrated):
    """How the keys, or the values, of a layer are stored in 8 bits.

    Attributes:
        scheme: over `[B, S, heads, dim]`, from the table above.
        shape: heads and dims.
        input_scale: of a static scheme, `[1, 1]` or `[1, heads]`; else None.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], scale: ArrayLike | None = None, *, name: str = "scale"):
        """
        Arguments:
            scale: of a static scheme; None leaves it to calibration.
            name: stands in errors.

        Raises:
            RecipeError: a scheme that is not in the table.
            ShapeError: a scale of another number of heads, or one that is not finite and positive.
        """
        check_scheme(scheme)
        scheme.check_shape((1, 1, *shape), "scheme")
        self.scheme, self.shape = scheme, shape
        self.input_scale = nnx.data(
            InputScale(_initial_scale(scheme, shape[0], scale, name)) if is_kv_static(scheme) else None
        )
        self.abandon_calibration()

    @property
    def static_scheme(self) -> Scheme | None:
        if not is_kv_static(self.scheme):
            return None
        return dataclasses.replace(self.scheme, block=(None, None if self.scheme.block == KV_TENSOR else self.shape[1]))

    def describe(self) -> str:
        return str(self.scheme)

    def __call__(self, x: Float[Array, "b t heads dim"]) -> Float[Stored, "b t heads dim"]:
        """`x` as a cache would hold it; in calibration as it is.

        Raises:
            CalibrationError: the scale is missing.
            RecipeError: a gradient is taken.
        """
        if self.is_calibrating:
            return x
        x = _without_gradient(x)
        if not is_kv_static(self.scheme):
            return numerics.quantize(x, self.scheme)
        return numerics.quantize_with_scale(x, self.scale_of(x.shape), stored_scheme(self.scheme))

    def scale_of(self, shape: tuple[int, ...]) -> Float[Array, "b 1 heads 1"]:
        """The static scale, as an array of `shape` `[B, S, heads, dim]` has it."""
        if self.input_scale.is_missing:
            raise CalibrationError(
                "kv_cache: its scales are missing; run fp8x.calibrate(model, batches, kv_cache=True), or store one a "
                "token: model.set_kv_cache('e4m3')"
            )
        return jnp.broadcast_to(self.input_scale[...][:, None, :, None], (shape[0], 1, shape[2], 1))

    def empty(self, shape: tuple[int, int, int, int], sharding: NamedSharding | None = None) -> ScaledArray:
        """Room for `[B, S, heads, dim]`."""
        scheme = stored_scheme(self.scheme)
        data = jnp.zeros(shape, scheme.dtype, device=sharding)
        if is_kv_static(self.scheme):
            return ScaledArray(data, jax.device_put(self.scale_of(shape), sharding), scheme)
        return ScaledArray(data, jnp.ones(scheme.scale_shape(shape), scheme.scale_dtype, device=sharding), scheme)


KVQuantizers = tuple[KVQuantizer | None, KVQuantizer | None]  # of keys, and of values


def make_quantizers(
    config: DecoderConfig, scheme: Scheme, scales: Sequence[tuple[ArrayLike, ArrayLike]] | None
) -> list[KVQuantizers]:
    """Those of every layer of a decoder; arguments and errors as `Decoder.set_kv_cache`'s."""
    count = config.num_hidden_layers
    if scales is None:
        return [_of_attention(config, f"layers.{index}.self_attn", scheme, None, None) for index in range(count)]
    if len(scales) != count:
        raise ShapeError(f"scales: are of {len(scales)} layers, but the model has {count}")
    for index, pair in enumerate(scales):
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or any(scale is None for scale in pair):
            raise ShapeError(f"scales: those of layer {index} are {pair!r}; give one of keys and one of values")
    return [_of_attention(config, f"layers.{index}.self_attn", scheme, *pair) for index, pair in enumerate(scales)]


def _of_attention(
    config: DecoderConfig, path: str, scheme: Scheme, keys: ArrayLike | None, values: ArrayLike | None
) -> KVQuantizers:
    names = (f"{path}.k_scale", f"{path}.v_scale")
    if config.latent is None:
        shape = (config.num_key_value_heads, config.head_dim)
        return tuple(KVQuantizer(scheme, shape, each, name=name) for each, name in zip((keys, values), names))
    latents, positions = (1, config.latent.kv_rank), (1, config.latent.rope_dim)
    if not is_kv_static(scheme):
        return KVQuantizer(scheme, latents), KVQuantizer(scheme, positions)
    # One number for both, as vLLM has it; a latent is one head.
    if keys is not None and not np.array_equal(keys, values):
        raise ShapeError(f"{path}: {keys} and {values} differ, but one is for the whole latent; give it twice")
    both = KVQuantizer(dataclasses.replace(scheme, block=KV_TENSOR), latents, keys, name=names[0])
    return both, both


def stored_scheme(scheme: Scheme) -> Scheme:
    """The scheme of a cache's arrays. Static scales get dims for texts and heads, to lie on a mesh as these."""
    return dataclasses.replace(scheme, block=STORED_STATIC) if is_kv_static(scheme) else scheme


def check_scheme(scheme: Scheme) -> None:
    """
    Raises:
        RecipeError: one that is not in this module's table.
    """
    lead = (1,) * (4 - len(scheme.block)) + scheme.block[:-1]
    if is_kv_static(scheme) and not scheme.is_mx:
        return
    if len(scheme.block) > 4 or lead != (1, 1, 1):
        raise RecipeError(
            f"scheme: {scheme} does not fit keys and values [B, S, heads, dim]; use float32 scales with block "
            f"{KV_TENSOR} or {KV_HEAD}, which are calibrated, or blocks of one token and head, like (1, None)"
        )


def as_scheme(kind: Scheme | str | DTypeLike, declared: Scheme | None, name: str = "dtype") -> Scheme | np.dtype:
    """What a cache is to hold: a scheme, or a type of 16 or 32 bits.

    Arguments:
        kind: "e4m3" or "e5m2" (or their float8 types), with the scales that the model has for them, else one a token
            and head; "bf16", "f16", "f32" or such a type; or a scheme.
        declared: the model's scheme.
        name: of the parameter that `kind` was given as.

    Raises:
        RecipeError: anything else.
    """
    if isinstance(kind, Scheme):
        check_scheme(kind)
        return kind
    named = OUT_DTYPES | {element: facts.dtype for element, facts in ELEMENTS.items()}
    try:
        dtype = named[kind] if isinstance(kind, str) and kind in named else np.dtype(kind)
    except TypeError:
        dtype = None
    if dtype in OUT_DTYPES.values():
        return dtype
    element = next((element for element, facts in ELEMENTS.items() if facts.dtype == dtype), None)
    if element is None:
        names = ", ".join(map(repr, (*ELEMENTS, *OUT_DTYPES)))
        raise RecipeError(f"{name}: {kind!r} is no type for keys and values; use {names} or a Scheme")
    return declared if declared is not None and declared.element == element else per_row(element)


@jax.custom_vjp
def _without_gradient(x: Array) -> Array:
    return x


def _refuse_gradient(x: Array) -> None:
    raise RecipeError(
        "model: keys and values in 8 bits pass no gradient on; call model.set_kv_cache(None) before training"
    )


_without_gradient.defvjp(_refuse_gradient, _refuse_gradient)


def _initial_scale(scheme: Scheme, heads: int, given: ArrayLike | None, name: str) -> Float[Array, "1 heads"]:
    count = 1 if scheme.block == KV_TENSOR else heads
    if given is None:
        # A unit scale needs no calibration.
        return jnp.full((1, count), 1.0 if scheme.scale_rule == "unit" else jnp.nan, jnp.float32)
    scale = np.asarray(given, np.float32)
    if scale.size != count:
        raise ShapeError(f"{name}: shape is {list(scale.shape)}, but {scheme} takes {count} for {heads} heads")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ShapeError(f"{name}: {scale.reshape(-1).tolist()} are not all finite and positive")
    return jnp.asarray(scale.reshape(1, count))
