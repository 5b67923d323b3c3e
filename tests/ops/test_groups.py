"""Group sizes: both forms of row offsets, and which row is whose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8x.errors import ShapeError
from fp8x.ops import group_sizes_from_indptr
from fp8x.ops.groups import check_group_sizes, concrete, row_groups, row_mask

SIZES = st.lists(st.integers(0, 9), min_size=4, max_size=4)


@settings(deadline=None)
@given(sizes=SIZES)
def test_both_forms_of_offsets(sizes):
    ends = np.cumsum(sizes).astype(np.int32)
    for indptr in (ends, np.concatenate([[0], ends]).astype(np.int32)):
        result = group_sizes_from_indptr(indptr, 4)
        assert result.dtype == jnp.int32 and result.tolist() == sizes


def test_offsets_by_hand():
    # The last offset of the short form equals the number of groups: the length tells, not the values.
    assert group_sizes_from_indptr(jnp.asarray([0, 2, 2, 3]), 3).tolist() == [2, 0, 1]
    assert group_sizes_from_indptr(jnp.asarray([2, 2, 3]), 3).tolist() == [2, 0, 1]
    assert group_sizes_from_indptr(jnp.asarray([0, 2, 2, 3]), 4).tolist() == [0, 2, 0, 1]
    assert group_sizes_from_indptr(jnp.asarray([5]), 1).tolist() == [5]
    assert group_sizes_from_indptr([0, 5], 1).tolist() == [5]


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.int16])
def test_any_integers(dtype):
    result = group_sizes_from_indptr(np.asarray([1, 1, 7], dtype), 3)
    assert result.dtype == jnp.int32 and result.tolist() == [1, 0, 6]


def test_offsets_while_traced():
    sizes = jax.jit(group_sizes_from_indptr, static_argnums=1)
    assert sizes(jnp.asarray([0, 1, 4]), 2).tolist() == [1, 3]
    assert sizes(jnp.asarray([1, 4]), 2).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("indptr", "match"),
    [
        (np.zeros(3, np.int32), r"indptr: shape is \(3,\); use \[5\] \(from 0\) or \[4\] \(inclusive ends\)"),
        (np.zeros(6, np.int32), r"shape is \(6,\)"),
        (np.zeros((4, 1), np.int32), r"shape is \(4, 1\)"),
        (np.zeros(4, np.float32), "indptr: dtype is float32; use an integer type"),
        (np.int32([1, 2, 3, 4, 5]), "indptr: starts at 1; the form with 5 offsets starts at 0"),
        (np.int32([0, 2, 1, 4, 5]), "indptr: decreases at group 1; offsets never decrease"),
        (np.int32([3, 2, 4, 5]), "indptr: decreases at group 1"),
        (np.int32([-1, 2, 4, 5]), "indptr: decreases at group 0"),
        (np.uint32([3, 2, 4, 5]), "indptr: decreases at group 1"),
    ],
)
def test_bad_offsets(indptr, match):
    with pytest.raises(ShapeError, match=match):
        group_sizes_from_indptr(indptr, 4)


def test_good_group_sizes():
    for sizes in [[0, 0, 0], [4, 0, 4], [0, 0, 7]]:
        check_group_sizes(jnp.asarray(sizes), 3, 8)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ([4, 4], r"group_sizes: shape is \(2,\), but the weights hold 3 experts; use \[3\]"),
        ([[4, 2, 1]], r"shape is \(1, 3\)"),
        ([1.0, 2.0, 3.0], "group_sizes: dtype is float32; use int32"),
        ([4, -1, -2], "group_sizes: group 1 is -1; sizes are never negative"),
        ([4, 4, 1], "group_sizes: they sum to 9, but x has 8 rows"),
        ([2**31 - 1, 2**31 - 1, 2], "group_sizes: they sum to 4294967296, but x has 8 rows"),
    ],
)
def test_bad_group_sizes(sizes, match):
    with pytest.raises(ShapeError, match=match):
        check_group_sizes(jnp.asarray(sizes), 3, 8)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([9, 9, -9], [8, 0, 0]), ([4, -1, 2], [4, 0, 2]), ([3, 6, 1], [3, 5, 0]), ([2**31 - 1, 2**31 - 1, 2], [8, 0, 0])],
)
def test_traced_sizes_are_cut_to_the_rows(sizes, expected):
    assert jax.jit(lambda sizes: check_group_sizes(sizes, 3, 8))(np.int32(sizes)).tolist() == expected


_row_groups = jax.jit(row_groups, static_argnums=1)
_row_mask = jax.jit(row_mask, static_argnums=1)


@settings(deadline=None)
@given(sizes=SIZES, m=st.sampled_from([36, 40]))
def test_rows(sizes, m):
    expected = [group for group, size in enumerate(sizes) for _ in range(size)]
    rest = m - len(expected)
    assert _row_groups(np.int32(sizes), m).tolist() == expected + [4] * rest
    assert _row_mask(np.int32(sizes), m).tolist() == [True] * len(expected) + [False] * rest


def test_no_rows():
    assert row_groups(jnp.zeros(3, jnp.int32), 0).shape == row_mask(jnp.zeros(3, jnp.int32), 0).shape == (0,)


def test_concrete():
    assert concrete(jnp.asarray([1, 2])).tolist() == [1, 2]
    assert jax.eval_shape(lambda x: x if concrete(x) is None else None, jnp.ones(2)) is not None
