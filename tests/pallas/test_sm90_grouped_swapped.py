"""The kernel with weights on wgmma's 64-row side in the CPU interpreter, with race detection, against float64."""

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from metric import assert_close
from shapes import DENSE, GROUPED, Shape, fits, operands, quantize

import fp8x
from fp8x import ops
from fp8x.ops import mosaic_swapped
from fp8x.ops.groups import row_mask
from fp8x.pallas.dequantize import power_of_two
from fp8x.pallas.sm90_grouped_swapped import grouped_swapped
from fp8x.pallas.swapped_tiling import Tiling, estimates
from fp8x.scheme import Scheme, mx, per_row, per_tensor

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
BLOCK, ROWS_OF_128 = Scheme("e4m3", block=(128, 128)), Scheme("e5m2", block=(1, 128))
# Weights, how activations are quantized, their type.
KINDS = [
    (per_row(), None, BF16),
    (Scheme("e5m2", block=(None, None, None)), None, F16),
    (BLOCK, None, F16),
    (ROWS_OF_128, None, BF16),
    (mx(), None, BF16),
    (mx("e5m2"), None, F16),
    (mx(), mx(), F16),
    (per_tensor("e5m2"), per_tensor(), BF16),
    (per_row(), per_row("e5m2"), F16),
    (BLOCK, Scheme("e4m3", block=(1, 128)), BF16),
    (ROWS_OF_128, per_tensor(), F16),
]


@pytest.fixture(autouse=True)
def however_many_rows(monkeypatch):
    """8-bit activations take this kernel with any number of rows, not only where it is the better one."""
    monkeypatch.setattr(mosaic_swapped, "FEW_ROWS", 10**9)


def cases(shapes, fast):
    """Every shape with every kind; all but a few are slow, since each takes seconds in the interpreter."""
    return [
        pytest.param(
            shape,
            *kind,
            (kind[2], F32, BF16)[(i + j) % 3],
            (i + j) % 2 == 0,
            id=f"{shape}-{kind[0]} by {kind[1] or jnp.dtype(kind[2]).name}",
            marks=[] if (i, j) in fast else pytest.mark.slow,
        )
        for i, shape in enumerate(shapes)
        for j, kind in enumerate(KINDS)
        if fits(shape, *kind[:2]) and (len(kind[0].block) == 2 or len(shape.group_sizes) > 1)
    ]


@pytest.mark.sample
@pytest.mark.parametrize(
    ("shape", "weight", "activation", "dtype", "out_dtype", "use_bias"),
    cases(GROUPED, {(4, 0), (6, 5), (4, 9)}),
)
def test_grouped(interpreted, short_sums, shape, weight, activation, dtype, out_dtype, use_bias):
    given = operands(shape, weight, dtype=dtype)
    x = jnp.where(row_mask(given.group_sizes, shape.m)[:, None], given.x, 0)
    x = x if activation is None else quantize(x, activation)
    bias = given.bias if use_bias else None
    with interpreted():
        y = ops.grouped_matmul(
            given.x, given.w, given.group_sizes, activation=activation, bias=bias, out_dtype=out_dtype
        )
        y = np.asarray(y)
    assert y.dtype == out_dtype and y.shape == (shape.m, shape.n)
    short_sums &= activation is not None and not activation.is_mx
    assert_close(y, metric.grouped_matmul(x, given.w, shape.group_sizes, bias), short_sums=short_sums)
    assert not np.any(y[shape.m - shape.spare :]), "rows past the groups are zero"


@pytest.mark.sample
@pytest.mark.parametrize(
    ("shape", "weight", "activation", "dtype", "out_dtype", "use_bias"), cases(DENSE, {(1, 6), (4, 3), (5, 7)})
)
def test_dense(interpreted, shape, weight, activation, dtype, out_dtype, use_bias):
    given = operands(shape, weight, dtype=dtype)
    w = fp8x.ScaledArray(given.w.data[0], given.w.scale[0], weight)
    x = given.x if activation is None else quantize(given.x, activation)
    bias = given.bias[0] if use_bias else None
    with interpreted():
        y = np.asarray(ops.matmul(given.x, w, activation=activation, bias=bias, out_dtype=out_dtype))
    assert y.dtype == out_dtype and y.shape == (shape.m, shape.n)
    assert_close(y, metric.matmul(x, w, bias))


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (mx(), None),
        pytest.param(per_row(), None, marks=pytest.mark.slow),
        pytest.param(BLOCK, Scheme("e4m3", block=(1, 128)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_that_name_their_expert(interpreted, short_sums, weight, activation):
    given = operands(Shape((1,) * 9 + (0,) * 3, 136, 256), weight)
    experts = jnp.int32([3, 0, 11, 12, 0, 3, -1, 8, 7])
    with interpreted():
        y = np.asarray(ops.expert_matmul(given.x, given.w, experts, activation=activation, bias=given.bias))
    x = metric.float64(given.x if activation is None else quantize(given.x, activation))
    w, bias = metric.float64(given.w), metric.float64(given.bias)
    expected = [
        w[e] @ row + bias[e] if 0 <= e < 12 else np.zeros(136) for e, row in zip(experts.tolist(), x, strict=True)
    ]
    assert_close(y, np.stack(expected), short_sums=short_sums and activation is not None)
    assert not np.any(y[[3, 6]])


@pytest.mark.sample
@pytest.mark.parametrize(
    ("tiling", "weight", "dtype", "out_dtype"),
    [
        (Tiling(32, 128, 3, splits=4), BLOCK, F16, F16),  # a split without any step of K
        pytest.param(Tiling(120, 256, 2), BLOCK, BF16, BF16, marks=pytest.mark.slow),  # waves, panels of 40 tokens
        pytest.param(Tiling(192, 128), per_row(), BF16, F16, marks=pytest.mark.slow),  # one buffer, three panels
        pytest.param(Tiling(192, 128, 2), mx(), BF16, F32, marks=pytest.mark.slow),
        pytest.param(Tiling(64, 256, 2, splits=2), mx(), F16, F32, marks=pytest.mark.slow),
        pytest.param(Tiling(8, 256, splits=2), ROWS_OF_128, BF16, BF16, marks=pytest.mark.slow),
        pytest.param(Tiling(24, 128), per_row(), F16, BF16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tilings(interpreted, tiling, weight, dtype, out_dtype):
    """Several tiles for each block, with groups that end anywhere in a tile."""
    shape = Shape((50, 0, 29, 70, 7), 328, 544, spare=20)
    given = operands(shape, weight, dtype=dtype)
    scale = given.w.scale[:, :, 0] if weight.block[-1] is None else given.w.scale
    with interpreted():
        y = grouped_swapped(
            given.x,
            given.w.data,
            None,
            scale,
            given.bias,
            given.group_sizes,
            out_dtype=out_dtype,
            tiling=tiling,
            programs=2,
        )
        y = np.asarray(y)
    x = jnp.where(row_mask(given.group_sizes, shape.m)[:, None], given.x, 0)
    assert_close(y, metric.grouped_matmul(x, given.w, shape.group_sizes, given.bias))
    assert not np.any(y[shape.m - shape.spare :])


def product_with_ones(interpreted, data, scale, scheme, dtype):
    """Each row of weights has one code and one scale: 128 times their product."""
    w = fp8x.ScaledArray(data, scale, scheme)
    with interpreted():
        return np.asarray(ops.matmul(jnp.ones((8, 128), dtype), w, out_dtype=F32))[0] / 128


@pytest.mark.parametrize("element", ["e4m3", pytest.param("e5m2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=["bf16", "f16"])
def test_every_code(interpreted, element, dtype):
    """NaN and Inf among them."""
    scheme = per_row(element)
    codes = np.arange(256, dtype=np.uint8).view(scheme.dtype)
    data = jnp.asarray(np.repeat(codes[:, None], 128, axis=1))
    y = product_with_ones(interpreted, data, jnp.ones((256, 1)), scheme, dtype)
    np.testing.assert_array_equal(y, codes.astype(np.float32))


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=["bf16", "f16"])
@pytest.mark.filterwarnings("ignore:overflow")
def test_every_scale(interpreted, dtype):
    """As far as 128 times it is a float32; 2^-127 is zero here, since XLA on CPU has no subnormals."""
    scale = np.arange(256, dtype=np.uint8).view(mx().scale_dtype)
    scales = jnp.asarray(np.repeat(scale[:, None], 4, axis=1))
    y = product_with_ones(interpreted, jnp.ones((256, 128), mx().dtype), scales, mx(), dtype)
    expected = scale.astype(np.float32)
    expected[0] = 0
    np.testing.assert_array_equal(y[:248], expected[:248])
    assert np.isposinf(y[248:255]).all() and np.isnan(y[255])


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, np.uint16), (F32, np.uint32)])
def test_power_of_two(dtype, bits):
    scale = np.arange(256, dtype=np.uint8).view(mx().scale_dtype)
    found = np.asarray(jax.jit(power_of_two, static_argnums=1)(jnp.asarray(scale), dtype))
    np.testing.assert_array_equal(found.view(bits)[:255], scale.astype(np.float32).astype(dtype).view(bits)[:255])
    assert np.isnan(found[255])


@pytest.mark.slow
def test_nan_past_the_groups_stays_there(interpreted):
    """Scales and bias of the last matrix are read for those rows, and not used."""
    given = operands(Shape((3, 2), 64, 128, spare=3), per_row())
    w = fp8x.ScaledArray(given.w.data, given.w.scale.at[1].set(np.nan), given.w.scheme)
    with interpreted():
        y = np.asarray(ops.grouped_matmul(given.x, w, given.group_sizes, bias=given.bias.at[1].set(np.inf)))
    assert np.isfinite(y[:3]).all() and np.isnan(y[3:5]).all() and not np.any(y[5:])


IN_PLACE, BLOCKS, FP8 = (
    dict(x_bytes=2, widest=192, waves=(1,)),
    dict(x_bytes=2, widest=120, waves=(1, 2)),
    dict(x_bytes=1, widest=64, waves=(1, 2)),
)
MIXTRAL, QWEN = (128, 28672, 4096, 8), (512, 1536, 2048, 128)  # w13 of Mixtral and Qwen3-30B-A3B, 64 tokens


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((8 * 4096, 4096, 7168, 8), IN_PLACE, Tiling(192, 128)),
        ((8 * 4096, 7168, 2048, 8), IN_PLACE, Tiling(192, 128)),
        ((8 * 1000, 4096, 7168, 8), IN_PLACE, Tiling(192, 128)),
        ((8 * 4096, 4096, 7168, 8), BLOCKS, Tiling(120, 256)),
        (MIXTRAL, IN_PLACE, Tiling(32, 128)),
        (QWEN, IN_PLACE, Tiling(16, 128)),
        (QWEN, FP8, Tiling(16, 256)),
        ((512, 2048, 768, 128), FP8, Tiling(16, 256)),  # w2 of Qwen3-30B-A3B
        ((2, 28672, 4096, 8), IN_PLACE, Tiling(8, 128)),  # one token of Mixtral
        ((8, 1536, 2048, 128), FP8, Tiling(8, 128)),  # one of Qwen3
        ((8, 1536, 2048, 128), IN_PLACE | dict(by_expert=True), Tiling(8, 128)),
    ],
    ids=str,
)
def test_the_best_estimate(shape, options, expected):
    seconds = estimates(*shape, **options)
    assert min(seconds, key=seconds.get) == expected


@pytest.mark.parametrize(
    ("shape", "options", "measured"),
    [
        # µs of the kernel alone, on an H200 at 700 W: the faster first.
        ((8 * 4096, 4096, 7168, 8), IN_PLACE, {Tiling(192, 128): 2587, Tiling(128, 128): 2915}),
        ((8 * 4096, 4096, 7168, 8), BLOCKS, {Tiling(120, 256): 3036, Tiling(120, 128): 3442}),
        (QWEN, FP8, {Tiling(16, 256): 102.3, Tiling(64, 256): 111.2}),
    ],
    ids=str,
)
def test_estimates_have_the_order_that_was_measured(shape, options, measured):
    seconds = estimates(*shape, **options)
    assert sorted(measured, key=seconds.get) == list(measured)


def test_estimated_seconds():
    seconds = estimates(8 * 4096, 4096, 7168, 8, **IN_PLACE)
    # 23 tiles of tokens a group, which may have 128 more than the mean and begin 7 late, 32 of rows: 45 turns of 56
    # steps, in which 192 tokens' and 128 rows' bytes come at 34 a cycle.
    assert seconds[Tiling(192, 128)] == pytest.approx(45 * (56 * 512 * 128 / 34 + 1500) / 1.83e9)
    # Weights of two experts, and half of what 448 tiles fetch of x.
    fetched = 448 * 4096 * 8 * 2 / 132 / 34 / 1.83e9 / 2
    expected = 2 * 28672 * 4096 / 4.06e12 + fetched
    assert estimates(2, 28672, 4096, 8, **IN_PLACE)[Tiling(8, 128)] == pytest.approx(expected)


def test_lowers_for_cuda_in_transformations():
    """Under jit and vmap; test_sm90_grouped_fp8.py has the others. Compiling takes more: test_aot_swapped.py."""
    given = operands(Shape((3, 5), 256, 256), mx())

    def product(x, w, sizes):
        return ops.grouped_matmul(x, w, sizes)

    batch = jax.tree.map(lambda leaf: leaf[None], (given.x, given.w, given.group_sizes))
    with fp8x.backend("mosaic_gpu"):
        lowered = jax.jit(jax.vmap(product)).trace(*batch).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
