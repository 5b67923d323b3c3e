"""The table of row tiles: every row of every group in exactly one tile, and no more tiles than announced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fp8x.pallas.schedule import tile_table

_tile_table = jax.jit(tile_table, static_argnums=(1, 2, 3))


def check(sizes: list[int], m: int, block_m: int):
    table = jax.device_get(_tile_table(np.int32(sizes), m, block_m, 1))
    assert not table.skip.any()
    e = len(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    # By walking the groups: their tiles, in order.
    expected = [
        (g, row, min(block_m, starts[g + 1] - row))
        for g in range(e)
        for row in range(starts[g], starts[g + 1], block_m)
    ]
    used = len(expected)
    assert used <= len(table.group) <= min(-(-m // block_m) + e - 1, m)
    assert list(zip(table.group, table.start, table.rows))[:used] == expected
    assert (table.rows[used:] == 0).all() and (table.group[used:] == e - 1).all()
    assert table.ends.tolist() == starts[1:].tolist()
    for g in range(e):
        assert table.first[g] == sum(-(-size // block_m) for size in sizes[:g])
    assert all(field.dtype == np.int32 for field in table)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.sampled_from([(1, 65, 64), (4, 36, 4), (4, 36, 1), (4, 40, 7), (4, 37, 64)]),
    data=st.data(),
)
def test_every_row_is_in_one_tile(shape, data):
    e, m, block_m = shape
    sizes = data.draw(st.lists(st.integers(0, m // e), min_size=e, max_size=e))
    check(sizes, m, block_m)


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(0, 300), min_size=7, max_size=7))
@example(cuts=[0] * 7)
@example(cuts=[300] * 7)
@example(cuts=[1, 2, 3, 4, 5, 6, 7])
@example(cuts=[65, 130, 195, 260, 260, 260, 260])  # each group just over a tile: the most tiles there can be
def test_groups_that_fill_the_rows(cuts):
    ends = [0, *sorted(cuts), 300]
    check(np.diff(ends).tolist(), 300, 64)


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(0, 40), min_size=8, max_size=8))
@example(sizes=[7, 58, 7, 58, 7, 58, 7, 58])  # each begins in the last row before an aligned one: the most tiles
@example(sizes=[8, 0, 16, 0, 0, 40, 0, 24])
def test_aligned_tiles_of_each_group_cover_its_rows_once(sizes):
    m, block_m, align = 320, 16, 8
    table = jax.device_get(_tile_table(np.int32(sizes), m, block_m, align))
    assert (table.start % align == 0).all() and (table.skip < align).all()
    assert (table.skip + table.rows <= block_m).all()
    begin = table.start + table.skip
    covered = [(g, row) for g, r, n in zip(table.group, begin, table.rows) for row in range(r, r + n)]
    starts = np.cumsum([0, *sizes])
    assert covered == [(g, row) for g in range(8) for row in range(starts[g], starts[g + 1])]
    used = int((table.rows > 0).sum())
    assert (table.rows[:used] > 0).all() and not table.rows[used:].any()


@settings(deadline=None, max_examples=100)
@given(sizes=st.lists(st.one_of(st.integers(-20, 60), st.integers(-(2**31), 2**31 - 1)), min_size=6, max_size=6))
@example(sizes=[2**31 - 1] * 6)
@example(sizes=[-(2**31), 2**31 - 1, 1, 0, 2, -1])
def test_sizes_that_do_not_fit_are_cut(sizes):
    """What is negative is nothing; groups end where the rows do."""
    m, left, cut = 100, 100, []
    for size in sizes:
        cut.append(min(max(size, 0), left))
        left -= cut[-1]
    bad, good = (jax.device_get(_tile_table(np.int32(s), m, 16, 8)) for s in (sizes, cut))
    for name, values in good._asdict().items():
        np.testing.assert_array_equal(getattr(bad, name), values)
    used = bad.rows > 0
    assert (bad.start[used] >= 0).all() and ((bad.start + bad.skip + bad.rows)[used] <= m).all()


def test_tables_of_a_batch():
    sizes = np.int32([[5, 0, 9], [2**31 - 1, -4, 7]])
    tables = jax.vmap(lambda sizes: tile_table(sizes, 20, 4))(sizes)
    assert tables.ends.tolist() == [[5, 5, 14], [20, 20, 20]]


@pytest.mark.parametrize("m", [1, 63, 64, 65, 128])
def test_one_group(m):
    check([m], m, 64)
    check([0], m, 64)


def test_more_experts_than_rows():
    # Decode: never more tiles than rows, however many experts.
    check([0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 3, 64)
    assert tile_table(jnp.zeros(128, jnp.int32), 8, 64).group.shape == (8,)


def test_no_rows():
    table = tile_table(jnp.zeros(4, jnp.int32), 0, 64)
    assert table.group.shape == table.start.shape == table.rows.shape == (0,)
    assert table.ends.tolist() == table.first.tolist() == [0] * 4


def test_by_hand():
    table = tile_table(jnp.asarray([5, 0, 9]), 20, 4)
    assert table.group.tolist() == [0, 0, 2, 2, 2, 2, 2]
    assert table.start.tolist()[:5] == [0, 4, 5, 9, 13]
    assert table.rows.tolist() == [4, 1, 4, 4, 1, 0, 0]
    assert table.first.tolist() == [0, 2, 2] and table.ends.tolist() == [5, 5, 14]
