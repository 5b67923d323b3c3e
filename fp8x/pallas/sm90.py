"""What kernels for Hopper share before they start: the chip's numbers, and arrays as TMA and the tiles of groups want
them. Free of Mosaic, whose import takes a second."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from fp8x.pallas.schedule import TileTable, tile_table

SMS = 132  # of an H100 or H200 SXM; another number costs balance, not correctness
CLOCK = 1.83e9  # Hz, at which 132 SMs do 1979 TFLOP/s in fp8, 8192 FLOP a cycle each
L2_BYTES = 34  # a cycle and SM: assumed (8.2 TB/s at 1.83 GHz), never measured
WAVE = 64  # rows of a wgmma
SHARED_MEMORY = 227 * 1024  # what a block may have
BLOCK_K = 128  # of K in a slot of a ring, one row of the widest swizzle; in fp8 the longest sum before promotion
ROW_ALIGN = 8  # rows of a swizzle atom: a TMA box into one starts at a multiple


class GroupTiles(NamedTuple):
    """The row tiles of a product's groups, and of the rows past them: a group too, number E, that takes no step of K.

    Attributes:
        sizes: rows of each group, the last one included.
        tiles: all that there can be.
        table: of each tile group, start, skip and rows, as in `TileTable`.
        used: how many of them have rows.
    """

    sizes: Int[Array, " e+1"]
    tiles: TileTable
    table: Int[Array, "4 tiles"]
    used: Int[Array, "1"]


def group_tiles(group_sizes: Int[Array, " e"], m: int, block_m: int) -> GroupTiles:
    """Tiles of `block_m` rows, from multiples of ROW_ALIGN on. Sizes that do not fit `m` are cut to it."""
    tiles = tile_table(jnp.append(group_sizes, m), m, block_m, ROW_ALIGN)  # the last group is cut to what is left
    sizes = jnp.diff(tiles.ends, prepend=0)
    table = jnp.stack([tiles.group, tiles.start, tiles.skip, tiles.rows])
    return GroupTiles(sizes, tiles, table, jnp.sum(tiles.rows > 0, dtype=jnp.int32)[None])


def pad(x: Array, after: tuple[int, ...]) -> Array:
    """Zeros after the end of each dim; ones in e8m0, which has no zero."""
    value = 1 if x.dtype == jnp.float8_e8m0fnu else 0
    return jnp.pad(x, [(0, count) for count in after], constant_values=value) if any(after) else x


def zero_of_loop() -> Int[Array, ""]:
    """A zero that no compiler knows to be one, to be added to something after the last sum that a loop's body starts.

    LLVM takes one register of zero for all fresh accumulators. If they are its last use, it becomes one of the last
    accumulator's own, and ptxas, which starts other sums from RZ, copies it into the 63 others at every step: dense
    products lost a fifth to that on an H200. This zero is a later use.
    """
    return lax.optimization_barrier(jnp.int32(0))
