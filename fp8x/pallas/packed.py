"""Conversions of registers to 16 bits, two values an instruction."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def pack(y: Float[Array, "..."], dtype, vector: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """`y.astype(dtype)`, converted in pairs (`F2FP.PACK_AB`).

    Without a barrier behind it, ptxas may convert single values, which go through the special function unit, an eighth
    as fast. Mosaic's barrier (jax 0.11.2, `fragmented_array.optimization_barrier`) takes several vectors of 16-bit
    elements apart in one order and puts them together in another: vectors of more than two elements are permuted. So
    each goes through a barrier by itself.

    Arguments:
        y: float32.
        vector: the part of `y` of which each thread has one vector; it divides `y`. None where vectors have two
            elements, as those of wgmma's accumulators do.
    """
    vector = vector or y.shape

    def of_vectors(at: tuple[slice, ...]) -> Array:
        """The part of `y` at some places in its first dims, and all of the others."""
        axis = len(at)
        if axis == y.ndim:
            return lax.optimization_barrier(y[at].astype(dtype))
        starts = range(0, y.shape[axis], vector[axis])
        parts = [of_vectors((*at, slice(start, start + vector[axis]))) for start in starts]
        # Cut at once and put together afterwards: Mosaic finds no layout where cuts of cuts are put together.
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)

    return of_vectors(())
