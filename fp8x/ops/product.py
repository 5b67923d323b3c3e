"""The step that every op shares: quantize the input, run the kernel; and its straight-through gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp8x import meshes, numerics
from fp8x.array import ScaledArray
from fp8x.ops import xla
from fp8x.ops.dispatch import Call, Kernel, logger, on_one_device
from fp8x.ops.gate import Gate, gated
from fp8x.ops.groups import row_groups, take_rows
from fp8x.ops.partition import is_left_to_xla, partitioned, rule_of
from fp8x.ops.quantize import QuantizeCall
from fp8x.ops.reference import as_float32
from fp8x.ops.split import Split, flat, layout, on_explicit_mesh, rows_layout, split_product, split_rows
from fp8x.scheme import Scheme


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4, 5))
def _product(
    kernel: Kernel,
    quantizer: Kernel | None,
    split: Split | None,
    activation: Scheme | None,
    gate: Gate | None,
    out_dtype,
    x: Float[Array, "t k"] | Float[Array, "t 2 k"] | ScaledArray,
    rows: Int[Array, " m"] | None,
    scale: Float[Array, "..."] | None,
    w: ScaledArray,
    groups: Int[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
) -> Float[Array, "m n"]:
    """Sends `x` through `gate`, quantizes it in `activation` by `quantizer`, takes `rows` of it, and runs `kernel`.

    `groups` is what its op takes: nothing, group sizes `[E]`, or the expert of each row, E for none. `split` says how
    it is split on an Explicit mesh.

    Without a rule of its own, JAX would round the gradient of `x` to an 8-bit float without a scale: to zero, mostly.
    """
    if activation is not None:
        used = None
        if groups is not None and rows is None:
            if kernel.op == "grouped_matmul":
                used = jnp.sum(groups)
            elif (1, *activation.block)[-2] != 1:
                # A row of no expert has no part in the scale of others. By itself it may be anything.
                is_used = groups < w.shape[0]

                def clear(x, is_used):
                    return jnp.where(is_used.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

                x = meshes.by_xla(clear, lambda: meshes.explicit_dims(x), x, is_used)
        x = quantize_input(quantizer, x, activation, scale, used, gate)
    elif gate is not None:
        x = gated(x, gate)
    x = x if rows is None else take_rows(x, rows)
    return multiply(kernel, split, x, w, groups, bias, out_dtype)


def quantize_input(quantizer: Kernel, x, activation: Scheme, scale, used, gate: Gate | None) -> ScaledArray:
    """What `quantizer` makes of `x`, or of what its gate makes of it, on every device's own part."""
    if quantizer.backend != "mosaic_gpu":
        return quantizer.run(x, activation, scale, used, gate)
    call = QuantizeCall(x.shape[0], x.shape[-1], x.dtype, activation, scale is not None, gate)
    operands, mesh = (x, scale, used), meshes.explicit_mesh((x, scale))
    if mesh is not None:
        split = split_rows(call, meshes.explicit_dims(x), mesh)
        data, scale = on_explicit_mesh(rows_layout(split, call, quantizer.run), mesh, operands)
    elif is_left_to_xla(operands):

        def layout_of(mesh, dims, _):
            split = split_rows(call, dims[0], mesh)
            return rows_layout(split, call, on_one_device(quantizer, split.local(call)).run)

        def run(x, scale, used):
            q = quantizer.run(x, activation, scale, used, gate)
            return [q.data, q.scale]

        rule = rule_of({0: "m k" if gate is None else "m two k"}, operands, "m k, s t")
        data, scale = partitioned(run, layout_of, rule, operands)
    else:
        return quantizer.run(x, activation, scale, used, gate)
    return ScaledArray(data, scale, activation)


def multiply(kernel: Kernel, split: Split | None, x, w: ScaledArray, groups, bias, out_dtype) -> Float[Array, "m n"]:
    """What `kernel` makes of operands as they are, on every device's own part."""
    given = () if groups is None else (groups,)
    call = Call.of(kernel.op, x, w, bias, out_dtype)
    operands = flat(x, w, groups, bias)
    if split is not None:
        return on_explicit_mesh(layout(split, call, kernel.run), split.mesh, operands)
    if kernel.backend != "mosaic_gpu" or not is_left_to_xla(operands):
        return numerics.rounded(kernel.run(x, w, *given, bias, out_dtype))

    def layout_of(mesh, dims, rows):
        split = split_product(call, dims[0], rows, dims[2], mesh)
        for move in split.moves:  # known as XLA compiles, where `explain` can't say it
            logger.warning("%s: %s", call, move)
        return layout(split, call, on_one_device(kernel, split.local(call)).run)

    def run(x, x_scale, w_data, w_scale, groups, bias):
        x = x if x_scale is None else ScaledArray(x, x_scale, call.x)
        given = () if groups is None else (groups,)
        return kernel.run(x, ScaledArray(w_data, w_scale, w.scheme), *given, bias, out_dtype)

    of_w = "n k" if kernel.op == "matmul" else "e n k"
    return partitioned(run, layout_of, rule_of({0: "m k", 2: of_w}, operands, "m n"), operands)


def _forward(kernel, quantizer, split, activation, gate, out_dtype, x, rows, scale, w, groups, bias):
    y = _product(kernel, quantizer, split, activation, gate, out_dtype, x, rows, scale, w, groups, bias)
    through_gate = None
    if gate is not None:
        x, through_gate = jax.vjp(lambda x: gated(x, gate), x)
    clipped = None if scale is None else numerics.is_clipped(x, scale, activation)
    like = None if isinstance(x, ScaledArray) else jnp.zeros((x.shape[0], 0), x.dtype)
    return y, (clipped, through_gate, like, rows, w, groups, bias)


def _backward(kernel, quantizer, split, activation, gate, out_dtype, residuals, dy):
    clipped, through_gate, like, rows, w, groups, bias = residuals

    def gradients(dy, clipped, like, rows, w, groups, bias):
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
        return [
            None if like is None else numerics.rounded(dx.astype(like.dtype)),
            None if bias is None else dbias.astype(bias.dtype),
        ]

    def dims():
        return [
            None if like is None else (split.x_dims[0], split.x_dims[-1]),
            None if bias is None else meshes.explicit_dims(bias),
        ]

    dx, dbias = meshes.by_xla(gradients, dims, dy, clipped, like, rows, w, groups, bias)
    dx = dx if through_gate is None else through_gate(dx)[0]
    return dx, None, None, None, None, dbias


_product.defvjp(_forward, _backward)

# Compiled also where the caller is not: the loop over tiles would otherwise compile anew with every call.
product = jax.jit(_product, static_argnums=(0, 1, 2, 3, 4, 5))
