"""Gated experts as one op: w13, gate and w2, with 8 bits in between, and a gradient all the same."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from fp8x import ops
from fp8x.array import ScaledArray
from fp8x.ops.gate import Gate
from fp8x.ops.gated import multiply_parts
from fp8x.scheme import Scheme


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "activation_scale"],
    meta_fields=["activation", "out_dtype"],
)
@dataclasses.dataclass(frozen=True)
class Factor:
    """A matrix an expert, and how its input is quantized; all as in `fp8x.ops.grouped_matmul`."""

    w: ScaledArray
    activation: Scheme | None
    activation_scale: Float[Array, "..."] | None
    out_dtype: np.dtype


def gated_experts(
    x: Float[Array, "t k"],
    w13: Factor,
    w2: Factor,
    group_sizes: Int[Array, " e"],
    *,
    gate: Gate,
    rows: Int[Array, " m"] | None = None,
    biases: tuple[Float[Array, "e 2 i"] | None, Float[Array, "e n"] | None] = (None, None),
) -> Float[Array, "m n"]:
    """`grouped_matmul(gated_matmul(x, w13, …), w2, …)`, differentiable in `x` and `biases`, straight through.

    Arguments:
        x, group_sizes, rows, gate: as in `gated_matmul`.
        w13: of `[E, 2, I, K]`.
        w2: of `[E, N, I]`, whose input is quantized.

    Raises:
        As `gated_matmul` and `grouped_matmul`.
    """
    return _experts(gate, x, biases, w13, w2, group_sizes, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(gate, x, biases, w13: Factor, w2: Factor, group_sizes, rows):
    h = ops.gated_matmul(
        x,
        w13.w,
        group_sizes,
        gate=gate,
        out_activation=w2.activation,
        out_activation_scale=w2.activation_scale,
        rows=rows,
        activation=w13.activation,
        activation_scale=w13.activation_scale,
        bias=biases[0],
        out_dtype=w13.out_dtype,
    )
    return ops.grouped_matmul(h, w2.w, group_sizes, bias=biases[1], out_dtype=w2.out_dtype)


def _in_two_products(gate, x, biases, w13: Factor, w2: Factor, group_sizes, rows):
    """The same, by ops that have a gradient."""

    def multiply(x, w, bias, factor, **options):
        options |= {"activation": factor.activation, "activation_scale": factor.activation_scale}
        return ops.grouped_matmul(x, w, group_sizes, bias=bias, out_dtype=factor.out_dtype, **options)

    gate_up = multiply_parts(functools.partial(multiply, factor=w13, rows=rows), x, w13.w, biases[0])
    return multiply(gate_up, w2.w, biases[1], w2, gate=gate)


def _forward(gate, x, biases, *rest):
    return jax.vjp(lambda x, biases: _in_two_products(gate, x, biases, *rest), x, biases)


def _backward(gate, vjp, dy):
    dx, dbiases = vjp(dy)
    return dx, dbiases, None, None, None, None


_experts.defvjp(_forward, _backward)
