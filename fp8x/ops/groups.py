"""Group sizes: int32 `[E]`, the number of rows of each expert, as `jax.lax.ragged_dot` takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fp8x import meshes
from fp8x.array import ScaledArray
from fp8x.errors import ShapeError
from fp8x.pallas.schedule import group_bounds


def group_sizes_from_indptr(indptr: Int[Array, " n"], num_groups: int) -> Int[Array, " e"]:
    """Group sizes from row offsets, in either form, told apart by their length.

    Arguments:
        indptr: `[num_groups + 1]` (starts at 0, as CSR has it) or `[num_groups]` (inclusive ends).
        num_groups: the number of groups, E.

    Raises:
        ShapeError: another length, or concrete offsets that decrease or do not start at 0.
    """
    indptr = jnp.asarray(indptr)
    if indptr.ndim != 1 or indptr.shape[0] not in (num_groups, num_groups + 1):
        raise ShapeError(
            f"indptr: shape is {indptr.shape}; use [{num_groups + 1}] (from 0) or [{num_groups}] (inclusive ends)"
        )
    if not jnp.issubdtype(indptr.dtype, jnp.integer):
        raise ShapeError(f"indptr: dtype is {indptr.dtype}; use an integer type")
    indptr = indptr.astype(jnp.int32)
    if indptr.shape[0] == num_groups:
        indptr = jnp.concatenate([jnp.zeros((1,), indptr.dtype), indptr])
    elif (values := concrete(indptr)) is not None and values[0] != 0:
        raise ShapeError(f"indptr: starts at {values[0]}; the form with {num_groups + 1} offsets starts at 0")
    sizes = jnp.diff(indptr)
    if (values := concrete(sizes)) is not None and (values < 0).any():
        raise ShapeError(f"indptr: decreases at group {int(np.argmax(values < 0))}; offsets never decrease")
    return sizes


def check_group_sizes(group_sizes: Int[Array, " e"], num_groups: int, rows: int) -> Int[Array, " e"]:
    """The sizes in int32: a smaller or unsigned type would wrap in the arithmetic of tiles.

    Concrete sizes are fetched from their device. Traced ones, inside jit, can't be: those below zero become zero, and
    those that pass `rows` are cut off there, so that no kernel leaves its arrays.

    Raises:
        ShapeError: they do not fit `num_groups` experts or, where they are concrete, `rows` rows.
    """
    group_sizes = jnp.asarray(group_sizes)
    if group_sizes.shape != (num_groups,):
        raise ShapeError(
            f"group_sizes: shape is {group_sizes.shape}, but the weights hold {num_groups} experts; use [{num_groups}]"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ShapeError(f"group_sizes: dtype is {group_sizes.dtype}; use int32")
    group_sizes = group_sizes.astype(jnp.int32)
    values = concrete(group_sizes)
    if values is None:
        starts, ends = group_bounds(meshes.replicated(group_sizes), rows)
        return ends - starts
    if (values < 0).any():
        group = int(np.argmax(values < 0))
        raise ShapeError(f"group_sizes: group {group} is {values[group]}; sizes are never negative")
    if values.sum() > rows:
        raise ShapeError(
            f"group_sizes: they sum to {values.sum()}, but x has {rows} rows; they may sum to at most that"
        )
    return group_sizes


def check_experts(experts: Int[Array, " r"], num_experts: int, rows: int) -> Int[Array, " r"]:
    """The expert of each row in int32; `num_experts` for one that is not in 0 … num_experts - 1.

    Raises:
        ShapeError: not one integer for each of `rows` rows.
    """
    experts = jnp.asarray(experts)
    if experts.shape != (rows,):
        raise ShapeError(f"experts: shape is {experts.shape}, but x has {rows} rows; use [{rows}]")
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ShapeError(f"experts: dtype is {experts.dtype}; use int32")
    return jnp.where((experts >= 0) & (experts < num_experts), experts, num_experts).astype(jnp.int32)


def row_mask(group_sizes: Int[Array, " e"], m: int) -> Array:
    """Bool `[m]`: which rows belong to a group. Rows past the sum come out zero and enter no amax."""
    return jnp.arange(m) < jnp.sum(group_sizes)


def row_groups(group_sizes: Int[Array, " e"], m: int) -> Int[Array, " m"]:
    """The group of each row; the number of groups for rows past the sum."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right", method="scan_unrolled")


def take_rows(x: Float[Array, "t k"] | ScaledArray, rows: Int[Array, " m"]) -> Float[Array, "m k"] | ScaledArray:
    """`x[rows]`, of an array whose scales belong to one row each, or to all."""

    def take(x):
        dims = lambda: (meshes.explicit_dims(rows)[0], *meshes.explicit_dims(x)[1:])  # noqa: E731
        return meshes.by_xla(functools.partial(jnp.take, axis=0, mode="clip"), dims, x, rows)

    if not isinstance(x, ScaledArray):
        return take(x)
    is_shared = (1, *x.scheme.block)[-2] is None
    return ScaledArray(take(x.data), x.scale if is_shared else take(x.scale), x.scheme)


def concrete(x: Array) -> np.ndarray | None:
    """The values of `x`, or None while it is traced, or where other processes hold a part of it."""
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return np.asarray(x)
