"""`ScaledArray`: an array stored in a scheme."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from fp8x.errors import ShapeError
from fp8x.scheme import Scheme


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledArray:
    """An array in 8 bits: `data` (float8), `scale`, and the scheme that ties them. A pytree of the two arrays.

    Invariants, checked when one is built:
        data.dtype == scheme.dtype
        scale.dtype == scheme.scale_dtype
        scale.shape == scheme.scale_shape(data.shape)

    Raises:
        ShapeError: an invariant does not hold; the message says which.
    """

    data: Array
    scale: Array
    scheme: Scheme

    def __post_init__(self):
        if self.data.dtype != self.scheme.dtype:
            raise ShapeError(f"data: dtype is {self.data.dtype}, but scheme {self.scheme} stores {self.scheme.dtype}")
        if self.scale.dtype != self.scheme.scale_dtype:
            raise ShapeError(
                f"scale: dtype is {self.scale.dtype}, but scheme {self.scheme} has {self.scheme.scale_dtype} scales"
            )
        self.scheme.check_shape(self.data.shape, "data")
        expected = self.scheme.scale_shape(self.data.shape)
        if self.scale.shape != expected:
            raise ShapeError(
                f"scale: shape is {self.scale.shape}, but data {self.data.shape} in {self.scheme} needs {expected}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales together."""
        return math.prod(self.data.shape) + math.prod(self.scale.shape) * np.dtype(self.scale.dtype).itemsize

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "..."]:
        """`data * scale` in float32, cast once to `dtype`."""
        # Imported late: numerics builds ScaledArrays, so it imports this module.
        from fp8x import numerics

        return numerics.dequantize(self, dtype)

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("data"), self.data), (key("scale"), self.scale)), self.scheme

    @classmethod
    def tree_unflatten(cls, scheme: Scheme, leaves) -> "ScaledArray":
        # Transformations put tracers, specs and None where arrays were (vmap also drops a dim): no invariants here.
        array = object.__new__(cls)
        for name, value in zip(("data", "scale", "scheme"), (*leaves, scheme)):
            object.__setattr__(array, name, value)
        return array


def as_input(x: ArrayLike | ScaledArray, name: str = "x") -> Array | ScaledArray:
    """What a layer or an op is given as JAX has it: NumPy's arrays and Python's lists too, float64 as float32.

    Raises:
        ShapeError: something that is no array; `name` is in the message.
    """
    if isinstance(x, ScaledArray):
        return x
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{name}: a {type(x).__name__} came; use an array ({error})") from None
    return x.astype(jnp.float32) if x.dtype == jnp.float64 else x
