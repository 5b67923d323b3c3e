"""w13 of a gated expert and the quantization of what its gate makes: in one kernel, or one after the other."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.errors import BackendError
from fp8x.ops import mosaic
from fp8x.ops.gate import Gate, kernel_gate, not_in_kernels
from fp8x.ops.groups import take_rows
from fp8x.ops.mosaic_swapped import unsupported_few_rows
from fp8x.ops.quantize import QuantizeCall
from fp8x.ops.split import Split, flat, gated_layout, is_split, on_explicit_mesh
from fp8x.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class GatedCall:
    """What a kernel needs to know to say whether it supports a `gated_matmul`.

    `m` rows of `x [·, k]` by `w [groups, 2, n, k]`, rounded to `out_dtype`, through `gate`, then quantized in `out`.
    """

    m: int
    n: int
    k: int
    groups: int
    x: Scheme | np.dtype
    w: Scheme
    bias: bool
    out_dtype: np.dtype
    gate: Gate
    out: Scheme
    has_scale: bool
    op: str = "gated_matmul"

    def __str__(self) -> str:
        scale = " by a given scale" if self.has_scale else ""
        return (
            f"gated_matmul [{self.m}, {self.k}] x [2, {self.n}, {self.k}] x {self.groups} groups: {self.x} by {self.w} "
            f"-> {self.out_dtype}, {self.gate} -> {self.out}{scale}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _gated_product(
    kernel,
    quantizer,
    split: Split | None,
    activation: Scheme | None,
    call: GatedCall,
    x: Float[Array, "t k"] | ScaledArray,
    rows: Int[Array, " m"] | None,
    scale: Float[Array, "..."] | None,
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    bias: Float[Array, "e 2 i"] | None,
    out_scale: Float[Array, "..."] | None,
) -> ScaledArray:
    """Quantizes `x` in `activation` by `quantizer`, if there are, takes `rows` of it, and runs `kernel`."""
    from fp8x.ops.product import quantize_input  # late: it imports this module

    if activation is not None:
        used = jnp.sum(group_sizes) if rows is None else None
        x = quantize_input(quantizer, x, activation, scale, used, None)
    x = x if rows is None else take_rows(x, rows)
    if split is None or kernel.backend != "mosaic_gpu":
        return kernel.run(x, w, group_sizes, bias, call.out_dtype, call.gate, call.out, out_scale)
    operands = (*flat(x, w, group_sizes, bias), out_scale)
    data, scale = on_explicit_mesh(gated_layout(split, call, kernel.run), split.mesh, operands)
    return ScaledArray(data, scale, call.out)


def _no_gradient(*_):
    raise BackendError(
        "gated_matmul: it has no gradient, which codes can't carry; use grouped_matmul, and its gate with w2"
    )


_gated_product.defvjp(_no_gradient, _no_gradient)

gated_product = jax.jit(_gated_product, static_argnums=(0, 1, 2, 3, 4))


def unsupported_by_factors(call: GatedCall) -> str | None:
    """Why `by_factors` can't, or should not, run a call; None if it can."""
    return mosaic.unsupported_by_factors(call) or _unsupported(call)


def unsupported_by_blocks(call: GatedCall) -> str | None:
    """Why `by_blocks` can't, or should not, run a call; None if it can."""
    rows = (1, *call.w.block)[-2]
    if reason := mosaic.unsupported_by_blocks(call):
        return reason
    if rows is not None and rows % 128 and rows < call.n:
        return f"has no registers for scales of single columns; w is {call.w}"
    return _unsupported(call)


def _unsupported(call: GatedCall) -> str | None:
    if reason := not_in_kernels(call.gate):
        return reason
    rows, columns = (1, *call.out.block)[-2:]
    if call.out.is_mx:
        return f"quantizes with float32 scales; those of out_activation are e8m0 ({call.out})"
    if call.has_scale and (rows is not None or (columns or 0) % 128):
        return f"takes scales of all rows and 128 columns, or multiples, or all; out_activation is {call.out}"
    if not call.has_scale and (rows, columns) != (1, 128):
        return f"finds the amax of a row's 128 columns, a tile's; out_activation is {call.out}"
    if unsupported_few_rows(call) is None:
        return "is for tiles of 128 rows; a group has few here"
    return None


def by_factors(x, w, group_sizes, bias, out_dtype, gate, scheme, scale) -> ScaledArray:
    return _run(x, w, mosaic.factors(x), mosaic.factors(w), group_sizes, bias, out_dtype, gate, scheme, scale)


def by_blocks(x, w, group_sizes, bias, out_dtype, gate, scheme, scale) -> ScaledArray:
    x_scale, w_scale = mosaic.scale_of_blocks(x, (1, 128)).T, mosaic.scale_of_blocks(w, (1, 1, 128, 128))
    return _run(x, w, x_scale, w_scale, group_sizes, bias, out_dtype, gate, scheme, scale)


def _run(x, w, x_scale, w_scale, group_sizes, bias, out_dtype, gate, scheme, scale) -> ScaledArray:
    # Late: Mosaic's import takes a second and 35 MB, which whoever has no Hopper need not pay.
    from fp8x.pallas.epilogue import Gated
    from fp8x.pallas.sm90_grouped_fp8 import gated_fp8

    end = Gated(kernel_gate(gate), out_dtype, scheme, scale is not None)
    inverse = None
    if scale is not None:
        inverse = numerics.reciprocal(scale[0])
        if (columns := scheme.block[-1]) is not None:
            inverse = jnp.take(inverse, jnp.arange(0, w.shape[2], 128) // columns)
    data, found = gated_fp8(x.data, w.data, x_scale, w_scale, bias, group_sizes, inverse, end=end)
    return ScaledArray(data, found if scale is None else scale, scheme)


def in_two_steps(
    x: Float[Array, "m k"] | ScaledArray,
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    bias: Float[Array, "e 2 i"] | None,
    out_dtype,
    gate: Gate,
    scheme: Scheme,
    scale: Float[Array, "..."] | None,
) -> ScaledArray:
    """`grouped_matmul`, then what quantizes through a gate; each by the kernel that it takes on its own."""
    # Late: all import this module.
    from fp8x.ops import grouped_matmul
    from fp8x.ops.dispatch import choose
    from fp8x.ops.product import quantize_input

    def multiply(x, w, bias):
        return grouped_matmul(x, w, group_sizes, bias=bias, out_dtype=out_dtype)

    gate_up = multiply_parts(multiply, x, w, bias)
    m, _, i = gate_up.shape
    call = QuantizeCall(m, i, gate_up.dtype, scheme, scale is not None, gate)
    quantizer, _ = choose(call, operands=gate_up)
    return quantize_input(quantizer, gate_up, scheme, scale, jnp.sum(group_sizes), gate)


def multiply_parts(
    multiply: Callable, x: Float[Array, "m k"] | ScaledArray, w: ScaledArray, bias: Float[Array, "e p n"] | None
) -> Float[Array, "m p n"]:
    """`multiply(x, w, bias)` by each of the P matrices of `w [E, P, N, K]`: by all at once if that is possible."""
    if (merged := merge_rows(w)) is not None:
        flat_bias = None if bias is None else bias.reshape(bias.shape[0], -1)
        return multiply(x, merged, flat_bias).reshape(-1, *w.shape[1:-1])
    parts = [multiply(x, _part(w, p), None if bias is None else bias[:, p]) for p in range(w.shape[1])]
    return jnp.stack(parts, axis=1)


def merge_rows(w: ScaledArray) -> ScaledArray | None:
    """`[E, P, N, K]` as `[E, P * N, K]`, or None where a scale holds for several matrices, or where rows of each lie on
    several devices.

    Blocks that do not divide N, and so would reach from one matrix into the next, are cut into ones that do: 128×128 of
    N 2880 (gpt-oss) into 64×128. One matrix after the other would have XLA copy all weights for every call, since a
    kernel takes whole arrays; finer scales are a few hundredths of their bytes.
    """
    e, p, n, k = w.shape
    block = (1,) * (4 - len(w.scheme.block)) + w.scheme.block
    rows = min(block[2] or n, n)
    if block[1] != 1 or rows == 0 or is_split(w.data, 2):
        return None
    scale, finer = w.scale, math.gcd(rows, n)
    if finer < rows:
        scale = jnp.repeat(scale, rows // finer, axis=2)[:, :, : n // finer]
    scheme = dataclasses.replace(w.scheme, block=(block[0], finer, block[3]))
    return ScaledArray(w.data.reshape(e, p * n, k), scale.reshape(scale.shape[0], -1, scale.shape[-1]), scheme)


def _part(w: ScaledArray, p: int) -> ScaledArray:
    scheme = dataclasses.replace(
        w.scheme, block=w.scheme.block[-2:] if len(w.scheme.block) < 4 else (w.scheme.block[0], *w.scheme.block[2:])
    )
    return ScaledArray(w.data[:, p], w.scale[:, p], scheme)
