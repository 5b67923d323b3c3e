"""Functional ops: they check shapes, choose a kernel and call it. `reference` is the contract that each meets.

Tolerance, for every backend and batch size: relative Frobenius error against the float64 result at most 4 roundings
of the output type (bfloat16 2^-9, float16 2^-12, float32 accumulation 2^-20 each).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.errors import ShapeError
from fp8x.ops.dispatch import Call, Choice, backend, choose, explain
from fp8x.ops.groups import check_group_sizes, group_sizes_from_indptr, row_mask
from fp8x.recipe import OUT_DTYPES
from fp8x.scheme import Scheme

__all__ = ["Choice", "backend", "explain", "group_sizes_from_indptr", "grouped_matmul", "matmul"]


def matmul(
    x: Float[Array, "... k"] | ScaledArray,
    w: ScaledArray,
    *,
    activation: Scheme | None = None,
    bias: Float[Array, " n"] | None = None,
    out_dtype=None,
) -> Float[Array, "... n"]:
    """`dequantize(x) @ dequantize(w).T` in float32, then bias, then one cast to `out_dtype`.

    Arguments:
        x: `[..., K]`; an Array, or a ScaledArray that is quantized already (a static activation scale).
        w: `[N, K]`, K-major.
        activation: the scheme in which an Array `x` is quantized first (over `[M, K]`, leading dims flattened);
            None multiplies it as it is (weight-only).
        bias: `[N]`.
        out_dtype: bfloat16, float16 or float32; None takes x's type, and bfloat16 where x is a ScaledArray.

    Raises:
        ShapeError: shapes or dtypes that do not fit; the message names the argument.
        BackendError: a backend was asked for that can't run this call.
    """
    _check_weight(w, 2)
    _check_input(x, w, activation)
    _check_bias(bias, w.shape[:1])
    lead = x.shape[:-1]
    if not isinstance(x, ScaledArray):
        x = x.reshape(-1, x.shape[-1])
        x = x if activation is None else numerics.quantize(x, activation)
    call = _call("matmul", x, w, bias, out_dtype)
    y = choose(call).run(x, w, bias, call.out_dtype)
    return y.reshape(*lead, w.shape[0])


def grouped_matmul(
    x: Float[Array, "m k"] | ScaledArray,
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    *,
    activation: Scheme | None = None,
    bias: Float[Array, "e n"] | None = None,
    out_dtype=None,
) -> Float[Array, "m n"]:
    """`matmul` of each expert's rows by its own matrix.

    Arguments:
        x: `[M, K]`, rows sorted by expert; an Array or a ScaledArray.
        w: `[E, N, K]`.
        group_sizes: int32 `[E]`, rows of each expert, as `jax.lax.ragged_dot` has it. Empty experts, one hot expert and
            M = 0 are ordinary. Rows past the sum come out zero, and enter no activation scale.
        activation, out_dtype: as in `matmul`.
        bias: `[E, N]`.

    Raises:
        ShapeError: shapes or dtypes that do not fit, or concrete group sizes that sum to more than M.
        BackendError: a backend was asked for that can't run this call.
    """
    _check_weight(w, 3)
    _check_input(x, w, activation)
    if x.ndim != 2:
        raise ShapeError(f"x: shape is {x.shape}; a grouped product takes [M, {w.shape[-1]}], rows sorted by expert")
    check_group_sizes(group_sizes, w.shape[0], x.shape[0])
    _check_bias(bias, w.shape[:2])
    if activation is not None:
        # What lies past the groups may be anything, uninitialized memory too.
        x = numerics.quantize(jnp.where(row_mask(group_sizes, x.shape[0])[:, None], x, 0), activation)
    call = _call("grouped_matmul", x, w, bias, out_dtype)
    return choose(call).run(x, w, group_sizes, bias, call.out_dtype)


def _call(op: str, x, w: ScaledArray, bias, out_dtype) -> Call:
    if out_dtype is None:
        out_dtype = OUT_DTYPES["bf16"] if isinstance(x, ScaledArray) else x.dtype
    out_dtype = np.dtype(out_dtype)
    if out_dtype not in OUT_DTYPES.values():
        raise ShapeError(f"out_dtype: {out_dtype} does not fit; use one of {', '.join(map(str, OUT_DTYPES.values()))}")
    kind = x.scheme if isinstance(x, ScaledArray) else x.dtype
    groups = w.shape[0] if w.ndim == 3 else 1
    m = math.prod(x.shape[:-1])
    return Call(op, m, w.shape[-2], w.shape[-1], groups, kind, w.scheme, bias is not None, out_dtype)


def _check_weight(w, ndim: int) -> None:
    layout = "[N, K]" if ndim == 2 else "[E, N, K]"
    if not isinstance(w, ScaledArray):
        raise ShapeError(f"w: a {type(w).__name__} came; use a ScaledArray {layout}, made by fp8x.quantize")
    if w.ndim != ndim:
        raise ShapeError(f"w: shape is {w.shape}; use {layout}, K-major")


def _check_input(x, w: ScaledArray, activation: Scheme | None) -> None:
    if x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise ShapeError(f"x: shape is {x.shape}, but w {w.shape} has K = {w.shape[-1]}; x's last dim has to be K")
    if isinstance(x, ScaledArray):
        if activation is not None:
            raise ShapeError("activation: x is quantized already; leave activation out, or give x as an Array")
    elif x.dtype not in OUT_DTYPES.values():
        raise ShapeError(
            f"x: dtype is {x.dtype}; use one of {', '.join(map(str, OUT_DTYPES.values()))} or a ScaledArray"
        )


def _check_bias(bias, shape: tuple[int, ...]) -> None:
    if bias is not None and bias.shape != shape:
        raise ShapeError(f"bias: shape is {bias.shape}, but w needs {shape}")
