"""Which tile of rows belongs to which group: one small table a call, made in XLA."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class TileTable(NamedTuple):
    """Row tiles of a ragged grouped product. A tile never crosses a group; its last rows may lie past the group's end.

    Attributes:
        group: the group of each tile; the last group for tiles beyond the last used one.
        start: the first row of each tile.
        rows: how many rows of the tile are the group's; 0 for an unused tile.
        first: the first tile of each group.
        ends: the cumulative sum of the group sizes.
    """

    group: Int[Array, " tiles"]
    start: Int[Array, " tiles"]
    rows: Int[Array, " tiles"]
    first: Int[Array, " e"]
    ends: Int[Array, " e"]


def tile_table(group_sizes: Int[Array, " e"], m: int, block_m: int) -> TileTable:
    """The tiles of `block_m` rows that cover `m` rows in groups of `group_sizes`, in order.

    The number of tiles is static: each group can waste most of one tile, so at most `cdiv(m, block_m) + e - 1`;
    and no tile is empty, so at most `m`.
    """
    e = group_sizes.shape[0]
    num_tiles = min(-(-m // block_m) + e - 1, m)
    ends = jnp.cumsum(group_sizes)
    tiles_of = -(-group_sizes // block_m)
    last = jnp.cumsum(tiles_of)
    first = last - tiles_of
    tile = jnp.arange(num_tiles, dtype=group_sizes.dtype)
    group = jnp.minimum(jnp.searchsorted(last, tile, side="right"), e - 1).astype(group_sizes.dtype)
    start = (ends - group_sizes)[group] + (tile - first[group]) * block_m
    return TileTable(group, start, jnp.clip(ends[group] - start, 0, block_m), first, ends)
