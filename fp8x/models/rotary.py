"""`Rotary`: queries and keys turned by their positions."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from fp8x.models.rope import Rope


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles, one row per position; `interleaved` as in `Rope`."""

    cos: Float[Array, "*b t dim"]
    sin: Float[Array, "*b t dim"]
    interleaved: bool = False

    @classmethod
    def at(cls, positions: Int[Array, "*b t"], rope: Rope, dtype: DTypeLike) -> "Rotary":
        """Angles `position · frequency`, in float32."""
        angles = positions[..., None].astype(jnp.float32) * rope.frequencies()
        angles = jnp.concatenate([angles, angles], axis=-1)
        cos, sin = jnp.cos(angles) * np.float32(rope.amplitude), jnp.sin(angles) * np.float32(rope.amplitude)
        return cls(cos.astype(dtype), sin.astype(dtype), rope.interleaved)

    def rotate(self, x: Float[Array, "b t heads head_dim"]) -> Float[Array, "b t heads head_dim"]:
        """Turns the first dims of every head; of interleaved pairs the first ones come out in front."""
        dim = self.cos.shape[-1]
        turned, rest = x[..., :dim], x[..., dim:]
        if self.interleaved:
            turned = jnp.concatenate([turned[..., ::2], turned[..., 1::2]], axis=-1)
        first, second = jnp.split(turned, 2, axis=-1)
        quarter_turn = jnp.concatenate([-second, first], axis=-1)
        turned = turned * self.cos[..., None, :] + quarter_turn * self.sin[..., None, :]
        return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
