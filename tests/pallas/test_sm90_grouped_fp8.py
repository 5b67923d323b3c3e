"""The FP8 kernels in the CPU interpreter, with race detection, against float64 by the one metric."""

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from metric import assert_close
from shapes import DENSE, GROUPED, Shape, operands, quantize

import fp8x
from fp8x import ops
from fp8x.ops.groups import row_mask
from fp8x.pallas.sm90_grouped_fp8 import Tiling, estimates, grouped_fp8
from fp8x.scheme import Scheme, per_row, per_tensor

GROUP, BLOCK = Scheme("e4m3", block=(1, 128)), Scheme("e4m3", block=(128, 128))
PAIRS = [
    (per_tensor(), per_tensor("e5m2")),
    (per_row("e5m2"), per_row()),
    (BLOCK, GROUP),
    (Scheme("e5m2", block=(None, None, None)), Scheme("e5m2", block=(None, 128))),
    (Scheme("e4m3", block=(256, 128)), per_row("e5m2")),
    (GROUP, GROUP),
    (Scheme("e5m2", block=(32, 256)), Scheme("e4m3", block=(None, 128))),
]
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def cases(shapes, fast):
    """Every shape with every pair; all but a few are slow, since each takes seconds in the interpreter."""
    return [
        pytest.param(
            shape,
            *pair,
            DTYPES[(i + j) % 3],
            (i + j) % 2 == 0,
            id=f"{shape}-{pair[0]} by {pair[1]}",
            marks=[] if (i, j) in fast else pytest.mark.slow,
        )
        for i, shape in enumerate(shapes)
        for j, pair in enumerate(PAIRS)
        if len(pair[0].block) == 2 or len(shape.group_sizes) > 1
    ]


@pytest.mark.sample
@pytest.mark.parametrize(
    ("shape", "weight", "activation", "dtype", "use_bias"), cases(GROUPED, {(1, 2), (2, 1), (6, 0), (7, 2)})
)
def test_grouped(interpreted, short_sums, shape, weight, activation, dtype, use_bias):
    given = operands(shape, weight, dtype=dtype)
    x = jnp.where(row_mask(given.group_sizes, shape.m)[:, None], given.x, 0)
    bias = given.bias if use_bias else None
    with interpreted():
        y = ops.grouped_matmul(given.x, given.w, given.group_sizes, activation=activation, bias=bias)
        y = np.asarray(y)
    assert y.dtype == dtype and y.shape == (shape.m, shape.n)
    expected = metric.grouped_matmul(quantize(x, activation), given.w, shape.group_sizes, bias)
    assert_close(y, expected, short_sums=short_sums)
    assert not np.any(y[shape.m - shape.spare :]), "rows past the groups are zero"


@pytest.mark.sample
@pytest.mark.parametrize(("shape", "weight", "activation", "dtype", "use_bias"), cases(DENSE, {(0, 0), (4, 1), (5, 2)}))
def test_dense(interpreted, shape, weight, activation, dtype, use_bias):
    given = operands(shape, weight, dtype=dtype)
    w = fp8x.ScaledArray(given.w.data[0], given.w.scale[0], weight)
    bias = given.bias[0] if use_bias else None
    with interpreted():
        y = np.asarray(ops.matmul(given.x, w, activation=activation, bias=bias))
    assert y.dtype == dtype and y.shape == (shape.m, shape.n)
    assert_close(y, metric.matmul(quantize(given.x, activation), w, bias))


@pytest.mark.sample
@pytest.mark.parametrize(
    ("tiling", "pair", "dtype"),
    [
        (Tiling(128, 256, 2, cluster=2), (BLOCK, GROUP), jnp.float32),  # waves, panels, pairs, a ring that wraps
        (Tiling(64, 256, 2), (GROUP, GROUP), jnp.bfloat16),
        pytest.param(Tiling(128, 128, 3), (BLOCK, GROUP), jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(Tiling(128, 128, 3, cluster=2), (GROUP, GROUP), jnp.float16, marks=pytest.mark.slow),
        pytest.param(Tiling(64, 256, 1), (per_row(), per_row()), jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(Tiling(64, 128, 2, cluster=2), (per_row(), per_row()), jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(Tiling(128, 256, 4), (per_row(), per_row()), jnp.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tilings(interpreted, short_sums, tiling, pair, dtype):
    """Several tiles for each block, with groups that end anywhere in a tile."""
    shape = Shape((100, 0, 29, 200, 7), 328, 416, spare=20)
    given = operands(shape, pair[0])
    x = quantize(jnp.where(row_mask(given.group_sizes, shape.m)[:, None], given.x, 0), pair[1])
    w_scale = given.w.scale if pair[0] is BLOCK else given.w.scale.swapaxes(1, 2)
    scales = (x.scale.T, w_scale) if pair[1] is GROUP else (x.scale[:, 0], given.w.scale[:, :, 0])
    with interpreted():
        y = grouped_fp8(
            x.data, given.w.data, *scales, given.bias, given.group_sizes, out_dtype=dtype, tiling=tiling, programs=2
        )
        y = np.asarray(y)
    assert_close(y, metric.grouped_matmul(x, given.w, shape.group_sizes, given.bias), short_sums=short_sums)
    assert not np.any(y[shape.m - shape.spare :])


def test_nan_past_the_groups_stays_there(interpreted):
    """x was quantized before, with its scales: nobody has made a zero of what lies past the groups; nor of an expert
    that has no rows."""
    shape = Shape((3, 2, 0), 64, 128, spare=3)
    given = operands(shape, per_row())
    x = quantize(given.x, per_row())
    x_scale = x.scale[:, 0].at[shape.m - shape.spare :].set(np.nan)
    w_scale = given.w.scale[:, :, 0].at[-1].set(np.nan)
    with interpreted():
        y = grouped_fp8(x.data, given.w.data, x_scale, w_scale, None, given.group_sizes, out_dtype=jnp.float32)
        y = np.asarray(y)
    assert not np.any(y[-shape.spare :])
    assert np.isfinite(y).all() and np.any(y[0])


@pytest.mark.parametrize(
    ("m", "n", "groups", "expected"),
    [
        (8 * 4096, 4096, 8, (128, 256, 2)),
        (4096, 14336, 1, (128, 256, 2)),
        (64, 4096, 1, (64, 128, 2)),  # as many tiles as there can be
        (8 * 64, 16384, 8, (64, 256, 2)),  # 64 rows a group
        (4096, 256, 1, (64, 128, 2)),
        (8 * 4096, 128, 8, (128, 128, 1)),  # no second block has columns
    ],
)
def test_choice_of_tiling(m, n, groups, expected):
    choices = estimates(m, n, 4096, groups)
    tiling = min(choices, key=choices.get)
    assert (tiling.block_m, tiling.block_n, tiling.cluster) == expected


def test_estimates_are_of_tilings_with_registers_enough():
    shape = (8 * 4096, 4096, 7168, 8)
    assert next(iter(estimates(*shape))) == Tiling(128, 256, cluster=2)
    assert Tiling(128, 256) not in estimates(*shape, by_column=True)
    assert list(estimates(*shape, gated=True)) == [Tiling(128, 256, cluster=2), Tiling(128, 256)]


def test_estimated_seconds():
    """8 × 4096 rows, N 4096, K 7168: 2048 pairs of tiles on 66 clusters, 56 steps of 320 × 128 bytes at 34 a cycle."""
    seconds = estimates(8 * 4096, 4096, 7168, 8)[Tiling(128, 256, cluster=2)]
    assert seconds == pytest.approx(32 * 56 * (64 + 256) * 128 / 34 / 1.83e9)


def test_lowers_for_cuda_in_transformations():
    """Under jit, vmap, shard_map and export. Compiling takes more: test_aot.py."""
    given = operands(Shape((3, 5), 256, 256), BLOCK)

    def product(x, w, sizes):
        return ops.grouped_matmul(x, w, sizes, activation=GROUP)

    def add_dim(leaf):
        return leaf[None]

    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = P(None, "tensor")
    sharded = jax.shard_map(product, mesh=mesh, in_specs=(P(), columns, P()), out_specs=columns, check_vma=False)
    arguments = given.x, given.w, given.group_sizes
    with fp8x.backend("mosaic_gpu"):
        for fn in (product, sharded, lambda *arguments: jax.vmap(product)(*jax.tree.map(add_dim, arguments))):
            lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",))
            assert "mosaic_gpu" in lowered.as_text()
        allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
        exported = jax.export.export(jax.jit(product), platforms=("cuda",), disabled_checks=allowed)(*arguments)
    assert exported.platforms == ("cuda",)
