"""The kernel with weights on wgmma's 64-row side as ops: weight-only, MXFP8, and few tokens of everything."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.ops.mosaic import factors, no_hopper, scale_of_blocks
from fp8x.scheme import Scheme

FEW_ROWS = 32  # of a group on average: with more, tiles of 64 tokens would leave groups in two, and weights read twice


def unsupported_16_bit(call) -> str | None:
    """Why `grouped_matmul` can't run a `dispatch.Call` of 16-bit activations by float32-scaled weights, or None."""
    if reason := _not_16_bit(call):
        return reason
    if call.w.is_mx:
        return f"reads float32 scales; those of w are e8m0 ({call.w})"
    return _not_by_128("w", call.w)


def unsupported_mx(call) -> str | None:
    """Why `grouped_matmul` can't run a `dispatch.Call` of 16-bit or MX activations by MX weights, or None."""
    if reason := _not_16_bit(call):
        return reason
    if not call.w.is_mx or (1, *call.w.block)[-2:] != (1, 32):
        return f"reads e8m0 scales of 32 along K; w is {call.w}"
    return None


def unsupported_few_rows(call) -> str | None:
    """Why `grouped_matmul` can't, or should not, run a `dispatch.Call` of 8-bit activations and weights, or None."""
    if reason := no_hopper() or _no_k(call):
        return reason
    if not isinstance(call.x, Scheme):
        return f"multiplies 8-bit activations, not {call.x}"
    for name, scheme in (("x", call.x), ("w", call.w)):
        if scheme.is_mx:
            return f"reads float32 scales; those of {name} are e8m0 ({scheme})"
        if reason := _not_by_128(name, scheme):
            return reason
    rows = -(-call.m // max(min(call.groups, call.m), 1))
    if call.op != "expert_matmul" and rows > FEW_ROWS:
        return f"is for {FEW_ROWS} rows a group on average, or fewer; here are {rows}"
    return None


def _not_16_bit(call) -> str | None:
    if reason := no_hopper() or _no_k(call):
        return reason
    if call.x == jnp.float32 or (isinstance(call.x, Scheme) and not call.x.is_mx):
        return f"multiplies activations in 16 bits, or in MX, which 16 bits hold, not {call.x}"
    return None


def _no_k(call) -> str | None:
    return None if call.k else "multiplies rows of some K, not of 0"


def _not_by_128(name: str, scheme: Scheme) -> str | None:
    if (scheme.block[-1] or 0) % 128:
        return f"reads blocks of 128, or multiples, along K; {name} is {scheme}"
    return None


def grouped_matmul(
    x: Float[Array, "m k"] | ScaledArray,
    w: ScaledArray,
    group_sizes: Int[Array, " e"] | None,
    bias: Float[Array, "e n"] | None,
    out_dtype,
) -> Float[Array, "m n"]:
    return _run(x, w, bias, out_dtype, group_sizes=group_sizes)


def expert_matmul(
    x: Float[Array, "r k"] | ScaledArray,
    w: ScaledArray,
    experts: Int[Array, " r"],
    bias: Float[Array, "e n"] | None,
    out_dtype,
) -> Float[Array, "r n"]:
    return _run(x, w, bias, out_dtype, experts=experts)


def _run(x, w: ScaledArray, bias, out_dtype, group_sizes=None, experts=None) -> Float[Array, "m n"]:
    # Late: Mosaic's import takes a second and 35 MB, which whoever has no Hopper need not pay.
    from fp8x.pallas.sm90_grouped_swapped import grouped_swapped

    is_quantized = isinstance(x, ScaledArray)
    if is_quantized and x.scheme.is_mx:
        x, is_quantized = _in_16_bits(x), False
    along_k = w.scheme.block[-1] is not None or (is_quantized and x.scheme.block[-1] is not None)
    x_scale = None
    if is_quantized:
        x_scale = scale_of_blocks(x, (1, 128)).T if along_k else factors(x)
        x = x.data
    return grouped_swapped(
        x, w.data, x_scale, _scale(w, along_k), bias, group_sizes, experts=experts, out_dtype=out_dtype
    )


def _in_16_bits(x: ScaledArray) -> Float[Array, "m k"]:
    """An MX array in bfloat16, which holds it exactly. `x.dequantize` keeps scales that `jit` closes over from being
    folded; those of activations are none, and without its barrier XLA has one launch instead of two."""
    byte = jax.lax.bitcast_convert_type(x.scale, jnp.uint8)[..., None]
    half, power = numerics.factors_of_byte(byte)
    blocks = x.data.reshape(*x.scale.shape, x.scheme.block[-1]).astype(jnp.float32)
    return (blocks * half * power).astype(jnp.bfloat16).reshape(x.shape)


def _scale(w: ScaledArray, along_k: bool) -> Float[Array, "..."]:
    """In the form that the kernel reads: of rows or a matrix, or of 128×128, 1×128, or 1×32 in e8m0."""
    n, rows = w.shape[1], w.scheme.block_of(w.shape)[1]
    if w.scheme.is_mx:
        return w.scale
    if not along_k:
        return factors(w)
    return scale_of_blocks(w, (1, 128, 128) if rows % 128 == 0 or rows >= n else (1, 1, 128))
