"""Which tile of rows belongs to which group: one small table a call, made in XLA."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class TileTable(NamedTuple):
    """Row tiles of a ragged grouped product. The rows that a tile is for, `start + skip` and on, are one group's.

    Attributes:
        group: the group of each tile; the last group for tiles beyond the last used one.
        start: the first row of each tile.
        skip: how many of the tile's first rows belong to a group before: less than the alignment.
        rows: how many rows after those are the group's; 0 for an unused tile. The rest lie past the group's end.
        first: the first tile of each group.
        ends: the cumulative sum of the group sizes.
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

    The number of tiles is static: each group can waste most of one tile and most of the alignment, so at most
    `(m + e * (block_m + align - 2)) // block_m`; and no tile is empty, so at most `m`.
    """
    e = group_sizes.shape[0]
    num_tiles = min((m + e * (block_m + align - 2)) // block_m, m)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    aligned = starts - starts % align
    tiles_of = jnp.where(group_sizes > 0, -(-(ends - aligned) // block_m), 0)
    last = jnp.cumsum(tiles_of)
    first = last - tiles_of
    tile = jnp.arange(num_tiles, dtype=group_sizes.dtype)
    # By comparing all: a binary search is a loop, of which a GPU launches every step. Along rows: that is one launch.
    group = jnp.sum(last <= tile[:, None], axis=1, dtype=group_sizes.dtype)
    group = jnp.minimum(group, e - 1)
    start = aligned[group] + (tile - first[group]) * block_m
    skip = jnp.clip(starts[group] - start, 0, block_m)
    rows = jnp.clip(jnp.minimum(ends[group] - start, block_m) - skip, 0, block_m)
    return TileTable(group, start, skip, rows, first, ends)
