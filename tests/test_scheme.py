"""`Scheme`: element facts, block arithmetic, and what it refuses."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fp8x
from fp8x.errors import Fp8xError, RecipeError, ShapeError
from fp8x.scheme import E8M0, ELEMENTS, MIN_SCALE, SCALE_RULES, Scheme, mx, per_row, per_tensor


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)])
def test_element_facts(name, dtype):
    element, info = ELEMENTS[name], ml_dtypes.finfo(dtype)
    assert element.dtype == dtype and Scheme(name, block=(None,)).dtype == dtype
    assert element.max == float(info.max) == Scheme(name, block=(None,)).max
    assert element.mantissa_bits == info.nmant
    assert 2.0**element.emax <= element.max < 2.0 ** (element.emax + 1)
    assert element.max_mantissa == 1.75


def test_min_scale_is_the_smallest_normal_float32():
    assert np.finfo(np.float32).tiny == MIN_SCALE and MIN_SCALE.dtype == np.float32


# DESIGN.md, section 2: name, block, shape, shape of the scales.
@pytest.mark.parametrize(
    ("block", "shape", "scales"),
    [
        ((None, None), (256, 512), (1, 1)),
        ((1, None), (256, 512), (256, 1)),
        ((1, 128), (256, 512), (256, 4)),
        ((128, 128), (256, 512), (2, 4)),
        ((1, 32), (256, 512), (256, 16)),
        ((None, 128), (7, 512), (1, 4)),
        # ragged
        ((128, 128), (257, 500), (3, 4)),
        ((128, 128), (96, 40), (1, 1)),
        ((1, 128), (3, 129), (3, 2)),
        # leading dims have block 1
        ((128, 128), (8, 256, 512), (8, 2, 4)),
        ((None, None), (8, 256, 512), (8, 1, 1)),
        ((None, None, None), (8, 256, 512), (1, 1, 1)),
        ((1, 32), (8, 2, 256, 512), (8, 2, 256, 16)),
        # empty dims: a whole dim has one block, another has none
        ((None, None), (0, 4), (1, 1)),
        ((1, None), (0, 4), (0, 1)),
        ((1, None), (4, 0), (4, 1)),
        ((1, 128), (4, 0), (4, 0)),
        ((128, 128), (0, 128), (0, 1)),
    ],
)
def test_scale_shape(block, shape, scales):
    assert Scheme("e4m3", block=block).scale_shape(shape) == scales


@given(
    blocks=st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=3),
    lead=st.lists(st.integers(1, 3), max_size=2),
    data=st.data(),
)
def test_scale_shape_counts_the_blocks_that_cells_fall_in(blocks, lead, data):
    shape = (*lead, *data.draw(st.lists(st.integers(1, 12), min_size=len(blocks), max_size=len(blocks))))
    scheme = Scheme("e5m2", block=tuple(blocks))
    extents = (1,) * len(lead) + tuple(n if b is None else b for n, b in zip(shape[len(lead) :], blocks))
    cells = itertools.product(*map(range, shape))
    found = {tuple(i // b for i, b in zip(cell, extents)) for cell in cells}
    assert found == set(itertools.product(*map(range, scheme.scale_shape(shape))))
    assert scheme.block_of(shape) == extents


def test_a_whole_dim_of_size_0_has_one_block():
    scheme = Scheme("e4m3", block=(None, 32), scale_dtype=E8M0)
    scheme.check_shape((0, 64))
    assert scheme.block_of((0, 64)) == (1, 32) and scheme.scale_shape((0, 64)) == (1, 2)


def test_defaults():
    scheme = Scheme("e4m3", block=(128, 128))
    assert scheme.scale_dtype == np.float32 and scheme.scale_rule == "amax" and not scheme.is_mx
    scheme = Scheme("e4m3", block=(1, 32), scale_dtype=jnp.float8_e8m0fnu)
    assert scheme.scale_dtype == E8M0 and scheme.scale_rule == "rceil" and scheme.is_mx


def test_named_schemes():
    assert per_tensor() == Scheme("e4m3", block=(None, None))
    assert per_row("e5m2") == Scheme("e5m2", block=(1, None))
    assert mx() == Scheme("e4m3", block=(1, 32), scale_dtype=jnp.float8_e8m0fnu, scale_rule="rceil")
    assert fp8x.Scheme is Scheme


def test_equal_however_it_was_written():
    a = Scheme("e4m3", block=[128, np.int64(128)], scale_dtype="float32", scale_rule="amax")
    b = Scheme("e4m3", block=(128, 128))
    assert a == b and hash(a) == hash(b) and type(a.block[1]) is int
    assert Scheme("e4m3", block=32).block == (32,)
    assert a != Scheme("e5m2", block=(128, 128))


def test_is_a_static_argument():
    shape = jax.jit(lambda x, scheme: jnp.zeros(scheme.scale_shape(x.shape)), static_argnums=1)
    assert shape(jnp.ones((4, 64)), mx()).shape == (4, 2)


def test_frozen():
    with pytest.raises(AttributeError):
        mx().block = (1, 16)


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (per_tensor(), "e4m3 ·×· f32"),
        (per_row("e5m2"), "e5m2 1×· f32"),
        (Scheme("e4m3", block=(128, 128), scale_rule="pow2"), "e4m3 128×128 f32 pow2"),
        (mx(), "e4m3 1×32 e8m0"),
        (Scheme("e4m3", block=(1, 32), scale_dtype=E8M0, scale_rule="floor"), "e4m3 1×32 e8m0 floor"),
    ],
)
def test_str(scheme, text):
    assert str(scheme) == text


@pytest.mark.parametrize("element", ["e4m3fn", "fp8", "", None])
def test_unknown_element(element):
    with pytest.raises(RecipeError, match=rf"element: {element!r} is unknown; use one of 'e4m3', 'e5m2'"):
        Scheme(element, block=(1, 32))


@pytest.mark.parametrize("block", [(), (0,), (-1, 32), (1.5,), "ab", (True, 32), (128, "128")])
def test_bad_block(block):
    with pytest.raises(ShapeError, match=r"block: .* does not fit; use a tuple of positive ints and None"):
        Scheme("e4m3", block=block)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64, np.uint8])
def test_bad_scale_dtype(dtype):
    with pytest.raises(RecipeError, match=r"scale_dtype: \w+ does not fit; use float32 or float8_e8m0fnu"):
        Scheme("e4m3", block=(1, 32), scale_dtype=dtype)


def test_scale_dtype_that_is_none():
    with pytest.raises(RecipeError, match="scale_dtype: 'e8m0' is no dtype"):
        Scheme("e4m3", block=(1, 32), scale_dtype="e8m0")


def test_rules_belong_to_their_scale_type():
    for dtype, rules in SCALE_RULES.items():
        for other, foreign in SCALE_RULES.items():
            for rule in foreign:
                if other == dtype:
                    assert Scheme("e4m3", block=(1, 32), scale_dtype=dtype, scale_rule=rule).scale_rule == rule
                else:
                    with pytest.raises(
                        RecipeError, match=rf"scale_rule: '{rule}' does not fit scale_dtype .*{rules[0]}"
                    ):
                        Scheme("e4m3", block=(1, 32), scale_dtype=dtype, scale_rule=rule)


def test_too_few_dims():
    with pytest.raises(ShapeError, match=r"shape \(4,\) has 1 dims, but block \(128, 128\) names 2"):
        Scheme("e4m3", block=(128, 128)).scale_shape((4,))


def test_mx_blocks_are_whole():
    for shape in [(3, 32), (3, 0), (0, 64), (8, 2, 3, 96)]:
        mx().check_shape(shape)
    with pytest.raises(ShapeError) as error:
        mx().check_shape((768, 2880 + 16), "layers.0.mlp.w2")
    assert str(error.value) == (
        "layers.0.mlp.w2: dim 1 of shape (768, 2896) is 2896, which 32 does not divide; an MX scheme needs whole "
        "blocks of 32 (K % 32 == 0): pad the dim to 2912, or use a scheme with float32 scales"
    )
    assert isinstance(error.value, Fp8xError) and isinstance(error.value, ValueError)


def test_float32_blocks_may_be_ragged():
    Scheme("e4m3", block=(128, 128)).check_shape((3, 5))
