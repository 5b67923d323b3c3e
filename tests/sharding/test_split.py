"""Which rows lie where: parts, padding, heads and the scales of blocks."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import fp8x
from fp8x.errors import MeshError
from fp8x.numerics import dequantize
from fp8x.scheme import Scheme, mx, per_row, per_tensor
from fp8x.sharding import scale_spec
from fp8x.sharding.place import place, quantize_placed, scale_dims, spec_of, whole
from fp8x.sharding.split import even, key_value_heads

BLOCK = Scheme("e4m3", block=(128, 128))


def test_features_fill_whole_blocks():
    split = even(768, ("tensor",), 4, 128)
    assert (split.part, split.padded) == (256, 1024)
    assert split.ranges == (((0, 256),), ((256, 512),), ((512, 768),), ())
    assert split.of_scales(128).ranges == (((0, 2),), ((2, 4),), ((4, 6),), ())
    assert even(96, ("tensor",), 2, 32).ranges == (((0, 64),), ((64, 96),))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts", "granule", "expected"),
    [
        (8, 4, 2, 16, [[0, 1], [2, 3]]),
        (8, 2, 4, 16, [[0], [0], [1], [1]]),  # fewer than devices: copies
        (6, 2, 3, 16, [[0, 0], [0, 1], [1, 1]]),  # no group of query heads on one device
        (4, 2, 2, 128, [[0, 1], []]),  # a block of eight heads: the second device has none
        (6, 1, 2, 16, [[0], [0]]),
    ],
)
def test_key_and_value_heads_follow_their_queries(heads, kv_heads, parts, granule, expected):
    queries = even(heads * 16, ("tensor",), parts, granule)
    keys = key_value_heads(queries, heads, kv_heads, 16)
    assert [[first // 16 for first, _ in part] for part in keys.ranges] == expected
    here, group = queries.part // 16, heads // kv_heads
    per_key = here // (keys.part // 16)
    for device, part in enumerate(keys.ranges):
        for head in range(min(here, max(0, heads - device * here))):
            assert part[head // per_key][0] // 16 == (device * here + head) // group


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300), parts=st.integers(1, 8), granule=st.integers(1, 130), block=st.sampled_from([1, 32, 128])
)
def test_scales_lie_with_their_blocks(size, parts, granule, block):
    split = even(size, ("tensor",), parts, granule)
    scales, cut = split.of_scales(block), split.finer(block)
    assert split.part % cut == 0 and scales.padded * cut == split.padded and block % cut == 0
    row_of, scale_of = np.full(split.padded, -1), np.full(scales.padded, -1)
    for to, source in split.pieces(0, split.padded):
        row_of[to] = np.arange(source.start, source.stop)
    for to, source in scales.pieces(0, scales.padded):
        scale_of[to] = np.arange(source.start, source.stop)
    real = row_of >= 0
    np.testing.assert_array_equal(np.repeat(scale_of, cut)[real], row_of[real] // block)
    np.testing.assert_array_equal(np.sort(row_of[real]), np.arange(size))


@pytest.mark.parametrize(
    ("weight", "scheme", "shape", "expected"),
    [
        (P("tensor", None), BLOCK, (512, 256), P("tensor", None)),
        (P(None, "tensor"), BLOCK, (512, 512), P(None, "tensor")),
        (P("tensor", None), per_row(), (512, 256), P("tensor", None)),
        (P(None, "tensor"), per_row(), (512, 256), P(None, None)),  # one scale a row
        (P("tensor", None), per_tensor(), (512, 256), P(None, None)),
        (P(None, "tensor"), mx(), (64, 256), P(None, "tensor")),
        (P(None, "tensor"), mx(), (64, 96), P(None, None)),  # a boundary inside a block
        (P("expert", None, "tensor"), BLOCK, (4, 128, 512), P("expert", None, "tensor")),
        (P(("expert", "tensor")), BLOCK, (1024, 128), P(("expert", "tensor"))),
        (P("tensor"), BLOCK, (100, 100), P(None)),
    ],
)
def test_scale_spec(weight, scheme, shape, expected):
    assert scale_spec(weight, scheme, mesh_of(expert=2, tensor=4), shape) == expected


def test_scale_spec_errors():
    with pytest.raises(MeshError, match="has axis 'model'; the mesh has"):
        scale_spec(P("model"), BLOCK, mesh_of(tensor=2), (128, 128))
    with pytest.raises(MeshError, match="names 3 dims"):
        scale_spec(P(None, None, "tensor"), BLOCK, mesh_of(tensor=2), (128, 128))


@pytest.mark.sample
@pytest.mark.parametrize("scheme", [BLOCK, per_row(), per_tensor(), Scheme("e4m3", block=(None, None, None))], ids=str)
def test_quantizing_in_parts_equals_the_whole_bit_for_bit(scheme):
    mesh = mesh_of(expert=2, tensor=4)
    w = np.random.default_rng(0).normal(size=(4, 96, 80)).astype(np.float32)
    # Parts of 24 rows, which cut the blocks of 128; none of K.
    dims = (even(4, ("expert",), 2), even(96, ("tensor",), 4), None)
    expected = fp8x.quantize(w, scheme)
    placed = quantize_placed(place(w.__getitem__, w.shape, w.dtype, dims, mesh), scheme, w.shape, dims, mesh)
    _, of_scales = scale_dims(scheme, w.shape, dims)
    assert placed.data.sharding.spec == spec_of(dims)
    spec = scale_spec(spec_of(dims), placed.scheme, mesh, placed.shape)
    assert placed.scale.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    np.testing.assert_array_equal(whole(placed.data, dims).view(np.uint8), np.asarray(expected.data).view(np.uint8))
    np.testing.assert_array_equal(whole(placed.scale, of_scales), expected.scale)
    np.testing.assert_array_equal(whole(dequantize(jax.device_get(placed)), dims), dequantize(expected))
