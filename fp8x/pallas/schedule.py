"""Which tile of rows belongs to which group: one small table a call, made in XLA."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int


def group_bounds(group_sizes: Int[Array, " e"], m: int) -> tuple[Int[Array, " e"], Int[Array, " e"]]:
    """The first row of each group, and the one after its last.

    Whatever the sizes are, these are rows of `m`: what is negative counts as nothing, and what passes `m` is cut off.
    """
    sizes = jnp.clip(group_sizes, 0, m).astype(jnp.uint32)  # which twice m does not pass, if it is m at most

    def up_to(is_counted):
        # A sum of all that count, along rows: one launch on a GPU, where a cumulative sum takes two.
        counted = jnp.where(is_counted, sizes, jnp.uint32(0))
        rows = lax.reduce(counted, np.uint32(0), lambda a, b: lax.min(a + b, np.uint32(m)), (1,))
        return rows.astype(jnp.int32)

    group = jnp.arange(sizes.shape[0])
    return up_to(group < group[:, None]), up_to(group <= group[:, None])


class TileTable(NamedTuple):
    """Row tiles of a ragged grouped product. The rows that a tile is for, `start + skip` and on, are one group's.

    Attributes:
        group: the group of each tile; the last group for tiles beyond the last used one.
        start: the first row of each tile.
        skip: how many of the tile's first rows belong to a group before: less than the alignment.
        rows: how many rows after those are the group's; 0 for an unused tile. The rest lie past the group's end.
        first: the first tile of each group.
        ends: the row after each group's last.
    """

    group: Int[Array, " tiles"]
    start: Int[Array, " tiles"]
    skip: Int[Array, " tiles"]
    rows: Int[Array, " tiles"]
    first: Int[Array, " e"]
    ends: Int[Array, " e"]


def tile_table(group_sizes: Int[Array, " e"], m: int, block_m: int, align: int = 1) -> TileTable:
    """The tiles of `block_m` rows that cover `m` rows in groups of `group_sizes`, in order.

    Tiles start at multiples of `align`, so that the first of a group may begin within the group before.

    Sizes that do not fit `m` are cut to it (`group_bounds`): no tile begins past the rows.

    The number of tiles is static: each group can waste most of one tile and most of the alignment, so at most
    `(m + e * (block_m + align - 2)) // block_m`; and no tile is empty, so at most `m`.
    """
    e = group_sizes.shape[0]
    num_tiles = min((m + e * (block_m + align - 2)) // block_m, m)
    starts, ends = group_bounds(group_sizes, m)
    aligned = starts - starts % align
    tiles_of = jnp.where(ends > starts, -(-(ends - aligned) // block_m), 0)
    last = jnp.cumsum(tiles_of)
    first = last - tiles_of
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    # By comparing all: a binary search is a loop, of which a GPU launches every step. Along rows: that is one launch.
    group = jnp.sum(last <= tile[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, e - 1)
    start = aligned[group] + (tile - first[group]) * block_m
    skip = jnp.clip(starts[group] - start, 0, block_m)
    rows = jnp.clip(jnp.minimum(ends[group] - start, block_m) - skip, 0, block_m)
    return TileTable(group, start, skip, rows, first, ends)
