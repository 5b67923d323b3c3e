"""The XLA path: runs everywhere, and is the one that CPU and TPU take."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fp8x.array import ScaledArray
from fp8x.ops import reference
from fp8x.ops.groups import row_groups, row_mask
from fp8x.ops.operand import Operand, as_operand, common_dtype, multiply
from fp8x.ops.reference import as_float32
from fp8x.pallas.schedule import TileTable, tile_table

# Rows a tile: an expert's mean number of rows, so that an even load multiplies little padding, within these bounds.
# Dequantizing a matrix costs about as much as multiplying 16 rows by it; 128 hide that.
MIN_BLOCK_M, MAX_BLOCK_M = 16, 128


def matmul(
    x: Float[Array, "m k"] | ScaledArray, w: ScaledArray, bias: Float[Array, " n"] | None, out_dtype
) -> Float[Array, "m n"]:
    """The whole matrix, dequantized."""

    def product(x, w, bias, dtype):
        return multiply(as_operand(x, dtype), as_operand(w, dtype), bias, out_dtype)

    return _in_best_dtype(product, x, w, bias)


def grouped_matmul(
    x: Float[Array, "m k"] | ScaledArray,
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    bias: Float[Array, "e n"] | None,
    out_dtype,
) -> Float[Array, "m n"]:
    """Tile by tile: each dequantizes its expert's matrix, so that one matrix at most exists dequantized."""

    def product(x, w, bias, dtype):
        def tile(rows, group):
            bias_of_group = None if bias is None else _take(bias, group)
            return multiply(rows, as_operand(_expert(w, group), dtype), bias_of_group, out_dtype)

        return _by_tile(tile, as_operand(x, dtype), group_sizes, w.shape[1], out_dtype)

    return _in_best_dtype(product, x, w, bias)


def _in_best_dtype(product: Callable, x: Float[Array, "m k"] | ScaledArray, w: ScaledArray, bias) -> Array:
    """`product(x, w, bias, dtype)`: in the operands' common type where there are tensor cores, in float32 on CPU."""
    float32, best = (functools.partial(product, dtype=dtype) for dtype in (jnp.dtype(jnp.float32), common_dtype(x, w)))
    return jax.lax.platform_dependent(x, w, bias, cpu=float32, default=best)


def grouped_matmul_transposed(
    y: Float[Array, "m n"], w: ScaledArray, group_sizes: Int[Array, " e"]
) -> Float[Array, "m k"]:
    """`y @ dequantize(w)` of each expert's rows, in float32: what the gradient of `grouped_matmul` needs."""

    def multiply(rows, group):
        return jnp.matmul(rows, as_float32(_expert(w, group)), precision="highest")

    return _by_tile(multiply, as_float32(y), group_sizes, w.shape[2], jnp.float32)


def expert_matmul(
    x: Float[Array, "r k"] | ScaledArray,
    w: ScaledArray,
    experts: Int[Array, " r"],
    bias: Float[Array, "e n"] | None,
    out_dtype,
) -> Float[Array, "r n"]:
    """Row by row: each dequantizes its expert's matrix."""

    def multiply(row, expert):
        return reference.matmul(row, _expert(w, expert), None if bias is None else _take(bias, expert), out_dtype)

    return _by_row(multiply, as_float32(x), experts, w.shape[:2], out_dtype)


def expert_matmul_transposed(y: Float[Array, "r n"], w: ScaledArray, experts: Int[Array, " r"]) -> Float[Array, "r k"]:
    """`y @ dequantize(w)` of each row, in float32: what the gradient of `expert_matmul` needs."""

    def multiply(row, expert):
        return jnp.matmul(row, as_float32(_expert(w, expert)), precision="highest")

    return _by_row(multiply, as_float32(y), experts, (w.shape[0], w.shape[2]), jnp.float32)


def _by_row(multiply: Callable, x: Float[Array, "r k"], experts, shape: tuple[int, int], dtype) -> Float[Array, "r n"]:
    """`multiply(row [1, K], expert) -> [1, n]` of one row after another; zero where there is no such expert."""
    e, n = shape

    def row(_, index):
        x, expert = index
        return None, jax.lax.cond(expert < e, lambda: multiply(x[None], expert)[0], lambda: jnp.zeros(n, dtype))

    return jax.lax.scan(row, None, (x, experts))[1]


def _by_tile(multiply: Callable, x: Float[Array, "m k"] | Operand, group_sizes, n: int, dtype) -> Float[Array, "m n"]:
    """`multiply(rows [block_m, K], group) -> [block_m, n]` of one tile of rows after another."""
    m, e = jax.tree.leaves(x)[0].shape[0], group_sizes.shape[0]
    if m == 0:
        return jnp.zeros((0, n), dtype)
    block_m = min(max(-(-m // e), MIN_BLOCK_M), MAX_BLOCK_M)
    tiles = tile_table(group_sizes, m, block_m)
    rows = min(block_m, m)

    def tile(_, index):
        group, start, used = index
        at = _tile_rows(start, rows, m)
        return None, jax.lax.cond(
            used > 0,
            lambda: multiply(jax.tree.map(lambda x: x[at], x), group),
            lambda: jnp.zeros((rows, n), dtype),
        )

    _, out = jax.lax.scan(tile, None, (tiles.group, tiles.start, tiles.rows))
    return _untile(out, tiles, group_sizes, m, block_m)


def _expert(w: ScaledArray, e: Int[Array, ""]) -> ScaledArray:
    """The matrix `[N, K]` of one expert, whose scale may be shared with others."""
    scheme = dataclasses.replace(w.scheme, block=w.scheme.block[-2:])
    return ScaledArray(_take(w.data, e), _take(w.scale, e // w.scheme.block_of(w.shape)[0]), scheme)


def _take(x: Float[Array, "e ..."], e: Int[Array, ""]) -> Float[Array, "..."]:
    return jax.lax.dynamic_index_in_dim(x, e, axis=0, keepdims=False)


@functools.partial(jax.jit, static_argnums=3)
def ragged_dot(
    x: Float[Array, "m k"], w: Float[Array, "e n k"], group_sizes: Int[Array, " e"], out_dtype: np.dtype
) -> Float[Array, "m n"]:
    """`jax.lax.ragged_dot` with K-major weights, for layers that are not quantized. Differentiable.

    That multiplies every row by every expert on CPU and, in jax 0.11.2, on GPUs; there, tiles of rows meet a gathered
    matrix each instead.
    """
    tiles, native = (functools.partial(f, out_dtype=out_dtype) for f in (_ragged_dot_tiles, _ragged_dot_native))
    return jax.lax.platform_dependent(x, w, group_sizes, tpu=native, default=tiles)


def _ragged_dot_native(x, w, group_sizes, out_dtype):
    y = jax.lax.ragged_dot(x, w.swapaxes(1, 2), group_sizes, preferred_element_type=jnp.float32)
    return jnp.where(row_mask(group_sizes, x.shape[0])[:, None], y, 0).astype(out_dtype)


def _ragged_dot_tiles(x, w, group_sizes, out_dtype):
    m, e = x.shape[0], w.shape[0]
    if m == 0:
        return jnp.zeros((0, w.shape[1]), out_dtype)
    block_m = max(32, -(-m // e))  # at most two tiles a group on average: gathers at most twice the weights
    tiles = tile_table(group_sizes, m, block_m)
    rows = min(block_m, m)
    x_tiles = x[_tile_rows(tiles.start[:, None], rows, m)]
    y = jnp.einsum("tmk,tnk->tmn", x_tiles, w[tiles.group], preferred_element_type=jnp.float32)
    return _untile(y.astype(out_dtype), tiles, group_sizes, m, block_m)


def _tile_rows(start, rows: int, m: int):
    """Rows of the tile; those past the end repeat the last one, and `_untile` never reads what becomes of them."""
    return jnp.minimum(start + jnp.arange(rows), m - 1)


def _untile(
    out: Float[Array, "tiles rows n"], tiles: TileTable, group_sizes, m: int, block_m: int
) -> Float[Array, "m n"]:
    """Row r of the result from its tile; rows past the groups are zero."""
    group = row_groups(group_sizes, m)
    inside = group < group_sizes.shape[0]
    group = jnp.minimum(group, group_sizes.shape[0] - 1)
    offset = jnp.arange(m) - (tiles.ends - group_sizes)[group]
    tile = jnp.where(inside, tiles.first[group] + offset // block_m, 0)
    return jnp.where(inside[:, None], out[tile, offset % block_m], 0)
