"""`gated_matmul`: in two steps, against float64; which calls one kernel takes; what does not fit."""

import functools

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from metric import as_bits, float64, relative_error
from shapes import Shape, operands, quantize

import fp8x
from fp8x import ops
from fp8x.errors import BackendError, ShapeError
from fp8x.ops.gate import gated
from fp8x.scheme import Scheme, mx, per_row, per_tensor

GROUP, BLOCK = Scheme("e4m3", block=(1, 128)), Scheme("e4m3", block=(128, 128))
SHAPE = Shape((70, 0, 29), 192, 160, spare=7)  # n is I
QUANTIZATION = 2.0**-4 / np.sqrt(3) + 2.0**-7  # e4m3's rounding, uniform within half a step; gate, up and h in bfloat16


def experts(weight):
    given = operands(SHAPE, weight)
    rng = np.random.default_rng(1)
    e, i, k = len(SHAPE.group_sizes), SHAPE.n, SHAPE.k
    w = quantize(jnp.asarray(rng.normal(size=(e, 2, i, k)) * k**-0.5, jnp.float32), weight)
    return given.x, w, given.group_sizes, jnp.asarray(rng.normal(size=(e, 2, i)), jnp.bfloat16)


def truth(x, w, bias):
    """silu(gate) * up in float64, of rows in groups."""
    y = metric.grouped_matmul(x, w, SHAPE.group_sizes)
    y += float64(bias)[np.repeat(range(len(SHAPE.group_sizes)), SHAPE.group_sizes)]
    return y[:, 0] / (1 + np.exp(-y[:, 0])) * y[:, 1]


@pytest.mark.parametrize(
    ("weight", "activation", "out"),
    [
        (BLOCK, GROUP, GROUP),
        (per_row(), None, per_row()),
        pytest.param(mx(), mx(), mx(), marks=pytest.mark.slow),
        pytest.param(per_tensor(), per_row("e5m2"), per_tensor(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_result_is_near_float64(weight, activation, out):
    x, w, sizes, bias = experts(weight)
    options = dict(gate="silu", out_activation=out, activation=activation, bias=bias)
    h = ops.gated_matmul(x, w, sizes, **options)
    assert h.shape == (SHAPE.m, SHAPE.n) and h.scheme == out
    rows = x[: -SHAPE.spare]
    expected = truth(rows if activation is None else quantize(rows, activation), w, bias)
    assert relative_error(float64(h)[: -SHAPE.spare], expected) < QUANTIZATION
    assert not np.any(float64(h)[-SHAPE.spare :])


def test_it_is_the_product_gated_and_quantized():
    """Bit for bit, with a static scale and with rows in another order."""
    x, w, sizes, bias = experts(per_row())
    source = jnp.asarray(np.random.default_rng(2).permutation(SHAPE.m), jnp.int32)
    scale = jnp.full((1, 1), 0.01)
    options = dict(activation=per_row(), rows=source)
    x = jnp.nan_to_num(x)
    h = ops.gated_matmul(
        x, w, sizes, gate="gelu", out_activation=per_tensor(), out_activation_scale=scale, bias=bias, **options
    )
    y = [
        ops.grouped_matmul(
            x, fp8x.ScaledArray(w.data[:, p], w.scale[:, p], w.scheme), sizes, bias=bias[:, p], **options
        )
        for p in (0, 1)
    ]

    @jax.jit
    def gated_and_quantized(y):
        return fp8x.numerics.quantize_with_scale(gated(y, "gelu"), scale, per_tensor())

    np.testing.assert_array_equal(as_bits(h.data), as_bits(gated_and_quantized(jnp.stack(y, axis=1)).data))


def explained(weight=BLOCK, activation=GROUP, out=GROUP, gate="silu", scale=None, rows=40):
    fn = functools.partial(
        ops.gated_matmul, gate=gate, activation=activation, out_activation=out, out_activation_scale=scale
    )
    x, w = jax.ShapeDtypeStruct((2 * rows, 160), jnp.bfloat16), jax.ShapeDtypeStruct((2, 2, 192, 160), jnp.float32)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    with fp8x.backend("mosaic_gpu"):
        return ops.explain(lambda x, w, sizes: fn(x, fp8x.quantize(w, weight), sizes), x, w, sizes)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        (dict(), "sm90_fp8_block_gated"),
        (dict(weight=per_row(), activation=per_row()), "sm90_fp8_gated"),
        (
            dict(
                weight=per_tensor(),
                activation=GROUP,
                out=Scheme("e5m2", block=(None, 128)),
                scale=np.ones((1, 2), np.float32),
            ),
            "sm90_fp8_block_gated",
        ),
    ],
    ids=str,
)
def test_choice_of_kernel(options, kernel):
    assert explained(**options)[0].kernel == kernel


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(weight=GROUP), "has no registers for scales of single columns; w is e4m3 1×128 f32"),
        (dict(gate="gelu"), "applies silu, gelu_pytorch_tanh or a ClampedSwiGLU, not gelu"),
        (dict(out=per_row()), "finds the amax of a row's 128 columns, a tile's; out_activation is e4m3 1×· f32"),
        (dict(out=mx()), "quantizes with float32 scales; those of out_activation are e8m0"),
        (
            dict(out=Scheme("e4m3", block=(None, 64)), scale=np.ones((1, 3), np.float32)),
            "takes scales of all rows and 128 columns",
        ),
        (dict(rows=32), "is for tiles of 128 rows; a group has few here"),
    ],
    ids=str,
)
def test_what_the_kernel_leaves_to_two_steps(options, reason):
    choice, *steps = explained(**options)
    assert choice.kernel == "in_two_steps"
    assert reason in dict(choice.rejected)["sm90_fp8_block_gated"]
    assert [step.call.op for step in steps][-1] == "quantize"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(w=lambda w: w.data), r"w: \(3, 2, 192, 160\) does not fit; use a ScaledArray \[E, 2, I, K\]"),
        (dict(gate=lambda _: "swish"), "activation: 'swish' is unknown"),
        (dict(bias=lambda b: b[:, 0]), r"bias: shape is \(3, 192\), but w needs \(3, 2, 192\)"),
        (dict(x=lambda x: x[:, 1:]), r"x: shape is \(106, 159\)"),
        (
            dict(out_activation_scale=lambda _: jnp.ones((1, 2))),
            r"out_activation_scale: shape is \(1, 2\); e4m3 1×128 f32 has",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change, message):
    x, w, sizes, bias = experts(BLOCK)
    arguments = dict(
        x=x, w=w, group_sizes=sizes, gate="silu", bias=bias, out_activation=GROUP, out_activation_scale=None
    )
    arguments |= {name: of(arguments[name]) for name, of in change.items()}
    if isinstance(arguments["w"], jax.Array):
        message = r"w: \(3, 2, 192, 160\) does not fit"
    with pytest.raises(ShapeError, match=message):
        ops.gated_matmul(**arguments)


def test_no_gradient():
    x, w, sizes, _ = experts(BLOCK)

    def total(x):
        h = ops.gated_matmul(x, w, sizes, gate="silu", activation=GROUP, out_activation=GROUP)
        return jnp.sum(h.dequantize(jnp.float32))

    with pytest.raises(BackendError, match="gated_matmul: it has no gradient"):
        jax.grad(total)(x)
