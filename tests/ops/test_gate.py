"""`ClampedSwiGLU`: values and gradients, by itself and through the ops, against float64 and transformers."""

import functools

import jax
import jax.numpy as jnp
import metric
import numpy as np
import pytest
from metric import assert_close, float64
from shapes import Shape, operands, quantize

import fp8x
from fp8x import ops
from fp8x.errors import ShapeError
from fp8x.ops.experts import Factor, gated_experts
from fp8x.ops.gate import gated
from fp8x.scheme import Scheme, mx, per_row

CLAMPED = ops.ClampedSwiGLU(limit=1.5)
# Gate and up; the value and both derivatives by `GptOssExperts._apply_gate` of transformers 5.24 in torch's float64.
BY_TRANSFORMERS = [
    (0.5, -0.25, 0.2627913274547851, 0.6594164339740607, 0.35038843660638014),
    (-3.0, 2.0, -0.05421392912335791, -0.07364497171695705, -0.01807130970778597),
    (7.5, 1.0, 13.999906256606636, 0.0, 6.999953128303318),
    (9.0, -8.0, -41.99971876981991, 0.0, 0.0),
    (-12.0, 7.5, -1.29491342686781e-07, -2.0960331973172007e-07, 0.0),
    (2.0, -7.25, -11.61395173886525, -6.44289212585125, 0.0),
]


def apply(gate, up, clamped=CLAMPED):
    """The value in float64, and its derivatives."""
    g, u = np.minimum(gate, clamped.limit), np.clip(up, -clamped.limit, clamped.limit)
    s = 1 / (1 + np.exp(-clamped.alpha * g))
    of_gate = (s + clamped.alpha * g * s * (1 - s)) * (u + 1) * (gate < clamped.limit)
    return g * s * (u + 1), of_gate, g * s * (np.abs(up) < clamped.limit)


def test_values_and_gradients_are_those_of_transformers():
    gate, up, *expected = np.asarray(BY_TRANSFORMERS, np.float32).T
    value = ops.ClampedSwiGLU()
    actual = value(gate, up), *jax.vmap(jax.grad(value, argnums=(0, 1)))(gate, up)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_in_16_bits_it_is_rounded_once():
    x = jnp.asarray(2 * np.random.default_rng(0).normal(size=(64, 2, 96)), jnp.bfloat16)
    expected, *_ = apply(float64(x)[:, 0], float64(x)[:, 1])
    np.testing.assert_array_equal(gated(x, CLAMPED), jnp.asarray(expected, jnp.bfloat16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=0.0), "alpha: 0.0 does not fit; use a positive number"),
        (dict(limit=-7.0), "limit: -7.0 does not fit; use a positive number"),
        (dict(limit=np.inf), "limit: inf does not fit"),
        (dict(limit=None), "limit: None does not fit"),
    ],
    ids=str,
)
def test_errors(options, message):
    with pytest.raises(ShapeError, match=message):
        ops.ClampedSwiGLU(**options)


def weights(e, n, k, scheme, seed):
    rng = np.random.default_rng(seed)
    return quantize(jnp.asarray(rng.normal(size=(e, *n, k)) * k**-0.5, jnp.float32), scheme)


def transposed(dy, w, sizes):
    """`dy @ w` of each group's rows, in float64."""
    return metric.grouped_matmul(dy, np.swapaxes(float64(w), -1, -2), sizes)


@pytest.mark.parametrize(("weight", "activation"), [(mx(), None), (per_row(), Scheme("e4m3", block=(1, 128)))], ids=str)
def test_grouped_and_expert_matmul(weight, activation):
    """Values and gradients, of clamped and other entries."""
    shape = Shape((5, 0, 9), 48, 160)
    given = operands(shape, weight, dtype=jnp.float32)
    rng = np.random.default_rng(1)
    x, dy = jnp.asarray(2 * rng.normal(size=(14, 2, 160)), jnp.float32), jnp.asarray(rng.normal(size=(14, 48)))
    gate, up = float64(x).swapaxes(0, 1)
    h, of_gate, of_up = apply(gate, up)
    assert 0.1 < np.mean(of_gate == 0) < 0.4 and 0.2 < np.mean(of_up == 0) < 0.6
    h = jnp.asarray(h, jnp.float32)
    expected = metric.grouped_matmul(h if activation is None else quantize(h, activation), given.w, shape.group_sizes)
    dh = transposed(dy, given.w, shape.group_sizes)
    experts = jnp.repeat(jnp.arange(3), given.group_sizes, total_repeat_length=14)
    for op, of_rows in ((ops.grouped_matmul, given.group_sizes), (ops.expert_matmul, experts)):
        run = functools.partial(op, gate=CLAMPED, activation=activation)
        y, gradient = jax.vjp(lambda x, run=run, of_rows=of_rows: run(x, given.w, of_rows), x)
        # By the last bit of h an 8-bit code moves now and then.
        assert_close(y, expected, tolerance=None if activation is None else 1e-3)
        assert_close(gradient(dy)[0], np.stack([dh * of_gate, dh * of_up], axis=1))


def test_gated_experts():
    """Through both products and their biases, with 8 bits between them."""
    sizes, k, i, n, group = (7, 0, 20), 96, 160, 64, Scheme("e4m3", block=(1, 128))
    rng = np.random.default_rng(2)
    x, dy = (jnp.asarray(rng.normal(size=(27, width)), jnp.float32) for width in (k, n))
    bias13, bias2 = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 2, i), (3, n)))
    w13, w2 = weights(3, (2, i), k, per_row(), 3), weights(3, (n,), i, per_row(), 4)
    factors = [Factor(w, group, None, jnp.dtype(jnp.float32)) for w in (w13, w2)]

    def run(x, bias13, bias2):
        return gated_experts(x, *factors, jnp.asarray(sizes), gate=CLAMPED, biases=(bias13, bias2))

    y, gradient = jax.vjp(run, x, bias13, bias2)
    gate_up = metric.grouped_matmul(quantize(x, group), w13, sizes, bias13)
    h, of_gate, of_up = apply(gate_up[:, 0], gate_up[:, 1])
    h = quantize(jnp.asarray(h, jnp.float32), group)
    assert_close(y, metric.grouped_matmul(h, w2, sizes, bias2), tolerance=1e-3)
    dh = transposed(dy, w2, sizes)
    dgate_up = np.stack([dh * of_gate, dh * of_up], axis=1)
    dx = sum(transposed(dgate_up[:, p], float64(w13)[:, p], sizes) for p in (0, 1))
    of_expert = np.repeat(np.eye(3), sizes, axis=0)
    expected = dx, np.einsum("me,mpi->epi", of_expert, dgate_up), np.einsum("me,mn->en", of_expert, float64(dy))
    for actual, wanted in zip(gradient(dy), expected):
        assert_close(actual, wanted, tolerance=1e-5)


def test_explain_names_it(no_gpu):
    x, sizes = jnp.zeros((8, 2, 64), jnp.bfloat16), jnp.asarray([8])
    w = fp8x.quantize(jnp.ones((1, 32, 64)), per_row())
    (choice,) = ops.explain(
        lambda x: ops.grouped_matmul(x, w, sizes, gate=ops.ClampedSwiGLU(), activation=per_row()), x
    )
    assert str(choice.quantize.call) == (
        "quantize bfloat16[8, 2, 64] by ClampedSwiGLU(alpha=1.702, limit=7.0) in e4m3 1×· f32"
    )
