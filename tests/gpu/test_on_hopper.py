"""The kernels on a Hopper GPU, against float64 by the one metric. benchmarks/on_gpu.py runs it."""

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from metric import assert_close
from shapes import DENSE, GROUPED, Shape, fits, operands, quantize

import fp8x
from fp8x import ops
from fp8x.array import ScaledArray
from fp8x.ops.groups import row_mask
from fp8x.ops.quantize import QuantizeCall, by_kernel, by_xla, unsupported
from fp8x.pallas import tuning
from fp8x.scheme import Scheme, mx, per_row, per_tensor

GROUP, BLOCK = Scheme("e4m3", block=(1, 128)), Scheme("e4m3", block=(128, 128))
# A weight scheme and an activation scheme; None leaves activations in 16 bits.
PAIRS = {
    "factors": (per_row(), per_row()),
    "blocks": (BLOCK, GROUP),
    "tensor": (per_tensor(), per_tensor("e5m2")),
    "groups": (GROUP, GROUP),
    "w8a16": (per_row(), None),
    "w8a16 blocks": (BLOCK, None),
    "mx weights": (mx(), None),
    "mx": (mx(), mx()),
}
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
RAGGED = Shape((100, 0, 29, 200, 7), 328, 416, spare=20)  # several tiles for some groups, which end anywhere in one
MOST_TILINGS = 16
LARGE = Shape((700, 3, 0, 1345), 1024, 2048)

pytestmark = [
    pytest.mark.gpu,  # the condition is text, since collecting tests starts no backend
    pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="there is no GPU"),
]
pairs = pytest.mark.parametrize("pair", PAIRS)


@pytest.fixture(autouse=True)
def mosaic_gpu():
    with fp8x.backend("mosaic_gpu"):
        yield


def has_short_sums(activation) -> bool:
    """MX by MX goes through 16 bits."""
    return activation is not None and not activation.is_mx


def product(given, activation, bias=None, dtype=None):
    return ops.grouped_matmul(
        given.x, given.w, given.group_sizes, activation=activation, bias=bias, out_dtype=dtype or given.x.dtype
    )


def expected(given, shape, activation, bias=None):
    x = jnp.where(row_mask(given.group_sizes, shape.m)[:, None], given.x, 0)
    return metric.grouped_matmul(x if activation is None else quantize(x, activation), given.w, shape.group_sizes, bias)


def check_tiling(pair, index):
    """One of MOST_TILINGS that a kernel could take, from all over its list, those without pairs of blocks first."""
    weight, activation = PAIRS[pair]
    given = operands(RAGGED, weight)
    with tuning.recorded() as choices:
        jax.eval_shape(lambda: product(given, activation))
    tilings = sorted(choices[-1].estimates, key=lambda tiling: getattr(tiling, "cluster", 1)) if choices else []
    tilings = tilings[:: -(-len(tilings) // MOST_TILINGS) or 1]
    if index >= len(tilings):
        pytest.skip("no such tiling")
    with tuning.forced(tilings[index]):
        y = np.asarray(product(given, activation, dtype=DTYPES[index % 3]))
    assert_close(y, expected(given, RAGGED, activation), short_sums=has_short_sums(activation))
    assert not np.any(y[RAGGED.m - RAGGED.spare :]), "rows past the groups are zero"


@pytest.mark.parametrize("index", range(2))
@pairs
def test_tilings(pair, index):
    check_tiling(pair, index)


@pytest.mark.parametrize("shape", GROUPED, ids=str)
@pairs
def test_grouped(pair, shape):
    weight, activation = PAIRS[pair]
    if not fits(shape, weight, activation):
        pytest.skip("blocks of MX are never ragged")
    dtype = DTYPES[GROUPED.index(shape) % 3]
    given = operands(shape, weight, dtype=dtype if activation or dtype != jnp.float32 else jnp.bfloat16)
    bias = given.bias if GROUPED.index(shape) % 2 else None
    y = np.asarray(product(given, activation, bias, dtype))
    assert y.dtype == dtype
    assert_close(y, expected(given, shape, activation, bias), short_sums=has_short_sums(activation))
    assert not np.any(y[shape.m - shape.spare :])


@pytest.mark.parametrize("shape", DENSE, ids=str)
@pairs
def test_dense(pair, shape):
    weight, activation = PAIRS[pair]
    if not fits(shape, weight, activation):
        pytest.skip("blocks of MX are never ragged")
    given = operands(shape, weight)
    w = ScaledArray(given.w.data[0], given.w.scale[0], weight)
    y = np.asarray(ops.matmul(given.x, w, activation=activation, bias=given.bias[0]))
    x = given.x if activation is None else quantize(given.x, activation)
    assert_close(y, metric.matmul(x, w, given.bias[0]), short_sums=has_short_sums(activation))


@pairs
def test_by_expert(pair):
    weight, activation = PAIRS[pair]
    shape = Shape((3, 0, 2, 3), 200, 256)
    given, experts = operands(shape, weight), np.int32([3, 0, 2, 3, 0, 0, 3, 2])
    try:
        y = np.asarray(ops.expert_matmul(given.x, given.w, jnp.asarray(experts), activation=activation))
    except fp8x.errors.BackendError as error:
        pytest.skip(str(error))
    x = metric.float64(given.x if activation is None else quantize(given.x, activation))
    y_true = np.einsum("mk,mnk->mn", x, metric.float64(given.w)[experts])
    assert_close(y, y_true, short_sums=has_short_sums(activation))


@pairs
def test_the_same_bits_every_time(pair):
    """A race shows as a result that changes."""
    weight, activation = PAIRS[pair]
    given = operands(LARGE, weight)
    first = np.asarray(product(given, activation))
    assert_close(first, expected(given, LARGE, activation), short_sums=has_short_sums(activation))
    for _ in range(20):
        np.testing.assert_array_equal(first, np.asarray(product(given, activation)))


@pytest.mark.parametrize("gate", ["silu", ops.ClampedSwiGLU(limit=1.5)], ids=str)
@pytest.mark.parametrize("code", ["fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16"])
def test_gated(code, gate):
    """w13, its gate and the quantization behind it, beside XLA's, whose sums are longer."""
    recipe = fp8x.recipe(code)
    given = operands(Shape((700, 0, 1291), 192, 160, spare=7), recipe.weight)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 192, 160)) * 160**-0.5, jnp.float32)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 192)), jnp.bfloat16)
    options = dict(gate=gate, activation=recipe.activation, out_activation=recipe.activation, bias=bias)
    if recipe.is_static:
        options |= dict(activation_scale=jnp.full((1, 1), 0.05), out_activation_scale=jnp.full((1, 1), 0.02))
    arguments = given.x, quantize(w, recipe.weight), given.group_sizes
    (choice,) = ops.explain(lambda *arguments: ops.gated_matmul(*arguments, **options), *arguments)
    assert choice.kernel.endswith("_gated")
    h = ops.gated_matmul(*arguments, **options)
    with fp8x.backend("xla"):
        other = ops.gated_matmul(*arguments, **options)
    np.testing.assert_allclose(h.scale, other.scale, rtol=2**-6)
    metric.assert_codes_close(h, other)


@pytest.mark.parametrize("scheme", [per_tensor(), per_row("e5m2"), GROUP, mx()], ids=str)
@pytest.mark.parametrize("by", ["xla", "kernel"])
def test_quantized_as_on_a_cpu(scheme, by):
    rng, magnitude = np.random.default_rng(0), np.exp2(np.arange(1024) % 40 - 20)
    x = np.asarray(jnp.asarray(rng.normal(size=(300, 1024)) * magnitude, jnp.bfloat16))
    call = QuantizeCall(*x.shape, x.dtype, scheme, has_scale=False)
    if by == "kernel" and (reason := unsupported(call)):
        pytest.skip(reason)
    run = jax.jit(by_xla if by == "xla" else by_kernel, static_argnums=1)
    y = run(jnp.asarray(x), scheme, None, None)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = quantize(jnp.asarray(x), scheme)
    np.testing.assert_array_equal(metric.as_bits(y.scale), metric.as_bits(expected.scale))
    np.testing.assert_array_equal(metric.as_bits(y.data), metric.as_bits(expected.data))


@pytest.mark.parametrize("index", range(2, MOST_TILINGS))
@pairs
def test_more_tilings(pair, index):
    check_tiling(pair, index)
