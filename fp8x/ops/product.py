"""The step that every op shares: quantize the input, run the kernel; and its straight-through gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.ops import xla
from fp8x.ops.dispatch import Kernel
from fp8x.ops.gate import gated
from fp8x.ops.groups import row_groups
from fp8x.ops.reference import as_float32
from fp8x.scheme import Scheme


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _product(
    kernel: Kernel,
    quantizer: Kernel | None,
    activation: Scheme | None,
    gate: str | None,
    out_dtype,
    x: Float[Array, "t k"] | Float[Array, "t 2 k"] | ScaledArray,
    rows: Int[Array, " m"] | None,
    scale: Float[Array, "..."] | None,
    w: ScaledArray,
    groups: Int[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
) -> Float[Array, "m n"]:
    """Sends `x` through `gate`, quantizes it in `activation` by `quantizer`, takes `rows` of it, and runs `kernel`.

    `groups` is what its op takes: nothing, group sizes `[E]`, or the expert of each row, E for none.

    Without a rule of its own, JAX would round the gradient of `x` to an 8-bit float without a scale: to zero, mostly.
    """
    if activation is not None:
        used = None
        if groups is not None and rows is None:
            if kernel.op == "grouped_matmul":
                used = jnp.sum(groups)
            elif (1, *activation.block)[-2] != 1:
                # A row of no expert has no part in the scale of others. By itself it may be anything.
                x = jnp.where((groups < w.shape[0]).reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
        x = quantizer.run(x, activation, scale, used, gate)
    elif gate is not None:
        x = gated(x, gate)
    x = x if rows is None else take_rows(x, rows)
    return numerics.rounded(kernel.run(x, w, *(() if groups is None else (groups,)), bias, out_dtype))


def take_rows(x: Float[Array, "t k"] | ScaledArray, rows: Int[Array, " m"]) -> Float[Array, "m k"] | ScaledArray:
    """`x[rows]`, of an array whose scales belong to one row each, or to all."""
    take = functools.partial(jnp.take, indices=rows, axis=0, mode="clip")
    if not isinstance(x, ScaledArray):
        return take(x)
    is_shared = (1, *x.scheme.block)[-2] is None
    return ScaledArray(take(x.data), x.scale if is_shared else take(x.scale), x.scheme)


def _forward(kernel, quantizer, activation, gate, out_dtype, x, rows, scale, w, groups, bias):
    y = _product(kernel, quantizer, activation, gate, out_dtype, x, rows, scale, w, groups, bias)
    through_gate = None
    if gate is not None:
        x, through_gate = jax.vjp(lambda x: gated(x, gate), x)
    clipped = None if scale is None else numerics.is_clipped(x, scale, activation)
    like = None if isinstance(x, ScaledArray) else jnp.zeros((x.shape[0], 0), x.dtype)
    return y, (clipped, through_gate, like, rows, w, groups, bias)


def _backward(kernel, quantizer, activation, gate, out_dtype, residuals, dy):
    clipped, through_gate, like, rows, w, groups, bias = residuals
    dy = dy.astype(jnp.float32)
    if kernel.op == "matmul":
        dx = jnp.matmul(dy, as_float32(w), precision="highest")
        dbias = jnp.sum(dy, axis=0)
    else:
        is_grouped = kernel.op == "grouped_matmul"
        dx = (xla.grouped_matmul_transposed if is_grouped else xla.expert_matmul_transposed)(dy, w, groups)
        group = row_groups(groups, dy.shape[0]) if is_grouped else groups
        dbias = jax.ops.segment_sum(dy, group, num_segments=w.shape[0])
    if rows is not None and like is not None:
        dx = jnp.zeros((like.shape[0], dx.shape[1]), dx.dtype).at[rows].add(dx)
    if clipped is not None:
        dx = jnp.where(clipped, 0, dx)
    dx = None if like is None else numerics.rounded(dx.astype(like.dtype))
    dx = dx if through_gate is None else through_gate(dx)[0]
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return dx, None, None, None, None, dbias


_product.defvjp(_forward, _backward)

# Compiled also where the caller is not: the loop over tiles would otherwise compile anew with every call.
product = jax.jit(_product, static_argnums=(0, 1, 2, 3, 4))
