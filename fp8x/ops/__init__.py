"""Functional ops: they check shapes, choose a kernel and call it. `reference` is the contract that each meets.

Tolerance, for every backend and batch size: relative Frobenius error against the float64 product of the dequantized
arrays at most one rounding to the output type (bfloat16 2^-8, float16 2^-11, float32 2^-24) plus 2^-18 for float32
accumulation. That holds where products do not mostly cancel and results are in the output type's normal range. On an
H200 products of 16 bits had 2.4e-7 at most in float32 (weight-only, MX, XLA's path).

Kernels that multiply 8 bits by 8 bits on tensor cores (`sm90_fp8*`) have a tolerance of their own: 2.5e-4 in float32,
3.3e-4 in float16, bfloat16's as above. Hopper adds fp8 products with 13 bits below the largest addend; kernels take the
sum to float32 registers every 128 of K, so K does not matter. An H200 had 1.25e-4 to 2.07e-4, 2.7e-4 to 3.2e-4, and
1.61e-3 to 1.73e-3, which is bfloat16's rounding alone, and 7.6e-5 to 2.46e-4 in float32 in tests of ops; the same
arithmetic, emulated, has 1.3e-4 on normal numbers, and up to 2.45e-4 where columns of x differ in magnitude, by a
factor e as a standard deviation.

Gradients, whichever kernel ran: straight through the rounding (Bengio et al., 2013, arXiv:1308.3432). That of `x` is
`dy @ dequantize(w)` in float32, zero where a given activation scale clips; that of `bias` sums dy's rows. Weights and
scales are frozen, and so is an `x` that is quantized already. Reverse mode only.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp8x import meshes
from fp8x.array import ScaledArray, as_input
from fp8x.errors import ShapeError
from fp8x.ops.dispatch import Call, Choice, backend, choose, explain
from fp8x.ops.gate import ClampedSwiGLU, Gate, check_gate
from fp8x.ops.gated import GatedCall, gated_product
from fp8x.ops.groups import check_experts, check_group_sizes, group_sizes_from_indptr
from fp8x.ops.product import product
from fp8x.ops.quantize import QuantizeCall
from fp8x.ops.split import plan
from fp8x.recipe import OUT_DTYPES
from fp8x.scheme import Scheme, as_dtype

__all__ = [
    "Choice",
    "ClampedSwiGLU",
    "backend",
    "expert_matmul",
    "explain",
    "gated_matmul",
    "group_sizes_from_indptr",
    "grouped_matmul",
    "matmul",
]


def matmul(
    x: Float[Array, "... k"] | ScaledArray,
    w: ScaledArray,
    *,
    activation: Scheme | None = None,
    activation_scale: Float[Array, "..."] | None = None,
    bias: Float[Array, " n"] | None = None,
    out_dtype=None,
) -> Float[Array, "... n"]:
    """`dequantize(x) @ dequantize(w).T` in float32, then bias, then one cast to `out_dtype`.

    Arguments:
        x: `[..., K]`; an Array, or a ScaledArray that is quantized already. float64, as NumPy has it, becomes float32.
        w: `[N, K]`, K-major.
        activation: the scheme in which an Array `x` is quantized first (over `[M, K]`, leading dims flattened);
            None multiplies it as it is (weight-only).
        activation_scale: the scale to quantize `x` with, `activation.scale_shape((M, K))`, calibrated before; None
            finds it in `x`.
        bias: `[N]`.
        out_dtype: bfloat16, float16 or float32; None takes x's type, and bfloat16 where x is a ScaledArray.

    Raises:
        ShapeError: shapes or dtypes that do not fit; the message names the argument.
        BackendError: a backend was asked for that can't run this call.
    """
    _check_weight(w, 2)
    x = as_input(x)
    rows = _rows(x)
    _check_input(rows, w, activation, activation_scale)
    _check_bias(bias, w.shape[:1])
    call = _call("matmul", rows, w, activation, bias, out_dtype)
    split = plan(call, rows, None, w)
    kernels = choose(call, _quantization(rows, activation, activation_scale), (rows, w), split)
    y = product(*kernels, split, activation, None, call.out_dtype, rows, None, activation_scale, w, None, bias)
    return _unmerged(y, x)


def grouped_matmul(
    x: Float[Array, "t k"] | Float[Array, "t 2 k"] | ScaledArray,
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    *,
    rows: Int[Array, " m"] | None = None,
    gate: Gate | None = None,
    activation: Scheme | None = None,
    activation_scale: Float[Array, "..."] | None = None,
    bias: Float[Array, "e n"] | None = None,
    out_dtype=None,
) -> Float[Array, "m n"]:
    """`matmul` of each expert's rows by its own matrix.

    Arguments:
        x: `[M, K]`, rows sorted by expert; an Array or a ScaledArray.
        rows: int32 `[M]`, the row of `x` that each row of the product is made of, where `x` is `[T, K]` in another
            order. A row that several experts visit is quantized once, so blocks of `activation` have one row, or all.
        gate: makes an Array `x` of `[M, 2, K]` what is multiplied, in float32 and rounded once to x's type: the name of
            an activation, `activation(x[:, 0]) * x[:, 1]`, or a `ClampedSwiGLU`, which is called with both.
        w: `[E, N, K]`.
        group_sizes: int32 `[E]`, rows of each expert, as `jax.lax.ragged_dot` has it. Empty experts, one hot expert and
            M = 0 are ordinary. Rows past the sum come out zero, and enter no activation scale. Outside of jit they
            are fetched from their device, to be checked. Inside, sizes below zero count as none, and those that sum
            past M are cut off there: each group ends at row M at the latest.
        activation, activation_scale, out_dtype: as in `matmul`.
        bias: `[E, N]`.

    Raises:
        ShapeError: shapes or dtypes that do not fit, or concrete group sizes that sum to more than M.
        BackendError: a backend was asked for that can't run this call.
    """
    _check_weight(w, 3)
    x = as_input(x)
    _check_input(x, w, activation, activation_scale, gate)
    m = x.shape[0] if rows is None else _check_rows(rows, x, activation)
    group_sizes = check_group_sizes(group_sizes, w.shape[0], m)
    _check_bias(bias, w.shape[:2])
    call = _call("grouped_matmul", x, w, activation, bias, out_dtype, m)
    split = plan(call, x, rows, w)
    kernels = choose(call, _quantization(x, activation, activation_scale, gate), (x, rows, w), split)
    operands = x, rows, activation_scale, w, group_sizes, bias
    return product(*kernels, split, activation, gate, call.out_dtype, *operands)


def expert_matmul(
    x: Float[Array, "r k"] | Float[Array, "r 2 k"] | ScaledArray,
    w: ScaledArray,
    experts: Int[Array, " r"],
    *,
    rows: Int[Array, " r"] | None = None,
    gate: Gate | None = None,
    activation: Scheme | None = None,
    activation_scale: Float[Array, "..."] | None = None,
    bias: Float[Array, "e n"] | None = None,
    out_dtype=None,
) -> Float[Array, "r n"]:
    """`matmul` of each row by the matrix of its expert: for a few rows, in any order.

    `grouped_matmul` reads a matrix once for all of an expert's rows; this reads one for every row.

    Arguments:
        x: `[R, K]`; an Array or a ScaledArray.
        w: `[E, N, K]`.
        experts: int32 `[R]`. A row whose expert is not in 0 … E-1 comes out zero, and enters no activation scale.
        rows, gate: as in `grouped_matmul`.
        activation, activation_scale, out_dtype: as in `matmul`.
        bias: `[E, N]`.

    Raises:
        ShapeError: shapes or dtypes that do not fit; the message names the argument.
        BackendError: a backend was asked for that can't run this call.
    """
    _check_weight(w, 3)
    x = as_input(x)
    _check_input(x, w, activation, activation_scale, gate)
    r = x.shape[0] if rows is None else _check_rows(rows, x, activation)
    experts = check_experts(experts, w.shape[0], r)
    _check_bias(bias, w.shape[:2])
    call = _call("expert_matmul", x, w, activation, bias, out_dtype, r)
    split = plan(call, x, rows, w)
    kernels = choose(call, _quantization(x, activation, activation_scale, gate), (x, rows, w), split)
    operands = x, rows, activation_scale, w, experts, bias
    return product(*kernels, split, activation, gate, call.out_dtype, *operands)


def gated_matmul(
    x: Float[Array, "t k"] | ScaledArray,
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    *,
    gate: Gate,
    out_activation: Scheme,
    out_activation_scale: Float[Array, "..."] | None = None,
    rows: Int[Array, " m"] | None = None,
    activation: Scheme | None = None,
    activation_scale: Float[Array, "..."] | None = None,
    bias: Float[Array, "e 2 i"] | None = None,
    out_dtype=None,
) -> ScaledArray:
    """The first half of gated experts, quantized for the second: `[M, I]`, which `grouped_matmul` takes with w2.

    `grouped_matmul` by gate and up, each rounded to `out_dtype`; `activation(gate) * up` in float32, rounded once to
    that type (or what a `ClampedSwiGLU` makes of both); then `quantize`. One kernel may do it all. No gradient.

    Backends differ by what their sums make of a rounding, to h's next 16-bit number, and so of some codes and scales.
    Between a kernel, whose 8-bit sums are short, and XLA fewer than 4 in 100 codes differ (in emulation 0.3 to 2.7),
    and what they dequantize to by a relative Frobenius error of less than 2e-2 (in emulation 9e-3 at most in e4m3,
    1.3e-2 in e5m2). With equal sums, the kernel's 2^-20 in the gate moves fewer than 1 in 1000.

    Arguments:
        w: `[E, 2, I, K]`: gate, then up.
        gate: the activation's name, or a `ClampedSwiGLU`.
        out_activation: the scheme in which the result is quantized, over `[M, I]`.
        out_activation_scale: its scale; None finds it in the result.
        bias: `[E, 2, I]`.
        x, group_sizes, rows, activation, activation_scale, out_dtype: as in `grouped_matmul`.

    Raises:
        ShapeError: shapes or dtypes that do not fit; the message names the argument.
        BackendError: a backend was asked for that can't run this call; or it is differentiated.
    """
    if not isinstance(w, ScaledArray) or w.ndim != 4 or w.shape[1] != 2:
        raise ShapeError(f"w: {getattr(w, 'shape', type(w).__name__)} does not fit; use a ScaledArray [E, 2, I, K]")
    check_gate(gate)
    x = as_input(x)
    _check_input(x, w, activation, activation_scale)
    m = x.shape[0] if rows is None else _check_rows(rows, x, activation)
    group_sizes = check_group_sizes(group_sizes, w.shape[0], m)
    _check_bias(bias, w.shape[:3])
    if out_activation_scale is not None:
        shape = out_activation.scale_shape((m, w.shape[2]))
        if out_activation_scale.shape != shape:
            raise ShapeError(
                f"out_activation_scale: shape is {out_activation_scale.shape}; {out_activation} has {shape}"
            )
    one = _call("gated_matmul", x, w, activation, bias, out_dtype, m)
    fields = one.m, one.n, one.k, w.shape[0], one.x, one.w, one.bias, one.out_dtype
    call = GatedCall(*fields, gate, out_activation, out_activation_scale is not None)
    split = plan(call, x, rows, w)
    kernels = choose(call, _quantization(x, activation, activation_scale), (x, rows, w), split)
    operands = x, rows, activation_scale, w, group_sizes, bias, out_activation_scale
    return gated_product(*kernels, split, activation, call, *operands)


def _rows(x: Float[Array, "... k"] | ScaledArray) -> Float[Array, "m k"] | ScaledArray:
    """`x` as `[M, K]`."""
    if x.ndim == 2:
        return x
    if not isinstance(x, ScaledArray):
        return meshes.merge_rows(x)
    *above, rows, _ = (1, *x.scheme.block_of(x.shape))
    if x.ndim > 2 and (any(block != 1 for block in above) or not x.shape[-2] or x.shape[-2] % rows):
        raise ShapeError(
            f"x: shape is {x.shape}, and its blocks of {x.scheme} are none of [M, K]; quantize it as [M, K]"
        )
    scheme = dataclasses.replace(x.scheme, block=(rows, x.scheme.block[-1]))  # None stays: kernels look for it
    return ScaledArray(meshes.merge_rows(x.data), meshes.merge_rows(x.scale), scheme)


def _unmerged(y: Float[Array, "m n"], x: Array | ScaledArray) -> Float[Array, "... n"]:
    """`y`, whose rows are those of `_rows(x)`, with x's leading dims."""
    shape = (*x.shape[:-1], y.shape[-1])
    if y.ndim == len(shape):
        return y
    data = x.data if isinstance(x, ScaledArray) else x

    def dims():
        lead, (rows, columns) = meshes.explicit_dims(data)[:-1], meshes.explicit_dims(y)
        return (*(tuple(axis for axis in axes if axis in rows) for axes in lead), columns)

    return meshes.by_xla(lambda y: y.reshape(shape), dims, y)


def _check_rows(rows, x, activation: Scheme | None) -> int:
    """The number of rows that `rows` takes of `x`."""
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ShapeError(f"rows: {rows.dtype}{list(rows.shape)} does not fit; use int32[M], rows of x")
    scheme = x.scheme if isinstance(x, ScaledArray) else activation
    if scheme is not None and (1, *scheme.block)[-2] not in (1, None):
        raise ShapeError(f"rows: they cut the blocks of {scheme}; use blocks of one row, or give x in order")
    return rows.shape[0]


def _call(op: str, x, w: ScaledArray, activation: Scheme | None, bias, out_dtype, m: int | None = None) -> Call:
    if out_dtype is None:
        out_dtype = OUT_DTYPES["bf16"] if isinstance(x, ScaledArray) else x.dtype
    out_dtype = as_dtype(out_dtype, "out_dtype")
    if out_dtype not in OUT_DTYPES.values():
        raise ShapeError(f"out_dtype: {out_dtype} does not fit; use one of {', '.join(map(str, OUT_DTYPES.values()))}")
    kind = x.scheme if isinstance(x, ScaledArray) else activation or x.dtype
    groups = w.shape[0] if w.ndim == 3 else 1
    m = x.shape[0] if m is None else m
    return Call(op, m, w.shape[-2], w.shape[-1], groups, kind, w.scheme, bias is not None, out_dtype)


def _quantization(x, activation: Scheme | None, scale, gate: Gate | None = None) -> QuantizeCall | None:
    if activation is None:
        return None
    return QuantizeCall(x.shape[0], x.shape[-1], x.dtype, activation, scale is not None, gate)


def _check_weight(w, ndim: int) -> None:
    layout = "[N, K]" if ndim == 2 else "[E, N, K]"
    if not isinstance(w, ScaledArray):
        raise ShapeError(f"w: a {type(w).__name__} came; use a ScaledArray {layout}, made by fp8x.quantize")
    if w.ndim != ndim:
        raise ShapeError(f"w: shape is {w.shape}; use {layout}, K-major")


def _check_input(x, w: ScaledArray, activation: Scheme | None, activation_scale, gate: Gate | None = None) -> None:
    k = w.shape[-1]
    if gate is not None:
        check_gate(gate)
        if isinstance(x, ScaledArray):
            raise ShapeError("gate: x is quantized already, and what a gate makes of it would be anew; give an Array")
    rows = (k,) if gate is None else (2, k)
    if x.shape[1:] != rows:
        raise ShapeError(f"x: shape is {x.shape}, but w {w.shape} takes rows [M, {', '.join(map(str, rows))}]")
    if activation_scale is not None:
        if activation is None:
            raise ShapeError("activation_scale: it came without activation, the scheme in which x is quantized")
        shape, dtype = activation.scale_shape((x.shape[0], k)), activation.scale_dtype
        if activation_scale.shape != shape or activation_scale.dtype != dtype:
            raise ShapeError(
                f"activation_scale: {activation_scale.dtype}{list(activation_scale.shape)} does not fit x {x.shape} in "
                f"{activation}; use {dtype}{list(shape)}"
            )
    if isinstance(x, ScaledArray):
        if activation is not None:
            raise ShapeError("activation: x is quantized already; leave activation out, or give x as an Array")
    else:
        check_dtype(x)


def check_dtype(x) -> None:
    """Raises a ShapeError unless `x` is an Array of a type that is multiplied, or in 8 bits."""
    if not isinstance(x, ScaledArray) and x.dtype not in OUT_DTYPES.values():
        raise ShapeError(
            f"x: dtype is {x.dtype}; use one of {', '.join(map(str, OUT_DTYPES.values()))} or a ScaledArray"
        )


def _check_bias(bias, shape: tuple[int, ...]) -> None:
    if bias is not None and bias.shape != shape:
        raise ShapeError(f"bias: shape is {bias.shape}, but w needs {shape}")
