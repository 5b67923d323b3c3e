"""The Mosaic GPU kernels as ops: which calls each supports, and the scales in the form that it reads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp8x.array import ScaledArray
from fp8x.scheme import Scheme


def unsupported_by_factors(call) -> str | None:
    """Why `grouped_matmul_by_factors` can't run a `dispatch.Call`; None if it can."""
    if reason := _not_fp8(call):
        return reason
    for name, scheme in (("x", call.x), ("w", call.w)):
        if scheme.block[-1] is not None:
            return f"reads one scale for all of K; {name} is {scheme}"
    return None


def unsupported_by_blocks(call) -> str | None:
    """Why `grouped_matmul_by_blocks` can't run a `dispatch.Call`; None if it can."""
    if reason := _not_fp8(call):
        return reason
    for name, scheme in (("x", call.x), ("w", call.w)):
        if (scheme.block[-1] or 0) % 128:
            return f"reads blocks of 128, or multiples, along K; {name} is {scheme}"
    return None


def _not_fp8(call) -> str | None:
    if reason := no_hopper():
        return reason
    if not call.k:
        return "multiplies rows of some K, not of 0"
    if not isinstance(call.x, Scheme):
        return f"multiplies 8-bit activations, not {call.x}"
    for name, scheme in (("x", call.x), ("w", call.w)):
        if scheme.is_mx:
            return f"reads float32 scales; those of {name} are e8m0 ({scheme})"
    return None


def no_hopper() -> str | None:
    """Why the GPUs here are none. Without any GPU the kernels still lower for CUDA, and run in Pallas' interpreter."""
    for device in jax.devices():
        if device.platform == "gpu" and device.compute_capability != "9.0":
            return f"needs compute capability 9.0 (Hopper); {device.device_kind} has {device.compute_capability}"
    return None


MANY_ROWS = 1024  # measured at 4096; below 1024 nobody has looked


def on_request(call) -> str | None:
    """Why a kernel that supports a call has to be asked for: there is no GPU, or XLA is quicker; None if it need not.

    Measured on an H200 (docs/performance.md): `[4096, 16384] x [7168, 16384]`, a scale a row, takes XLA 821 µs
    sustained and `sm90_fp8` 836 to 888. XLA takes cuBLASLt there, which has no product of e5m2 by e5m2.
    """
    if jax.devices()[0].platform != "gpu":
        return "there is no GPU here; taken where backend 'mosaic_gpu' is asked for"
    if call.op != "matmul" or call.m < MANY_ROWS or call.n % 16 or call.k % 16 or not isinstance(call.x, Scheme):
        return None
    if any(scheme.is_mx or scheme.block[-1] is not None for scheme in (call.x, call.w)):
        return None
    if call.x.element == call.w.element == "e5m2":
        return None
    return "XLA's cuBLASLt is quicker at dense products of many rows with a scale a row or a matrix (measured)"


def grouped_matmul_by_factors(
    x: ScaledArray, w: ScaledArray, group_sizes: Int[Array, " e"] | None, bias: Float[Array, "e n"] | None, out_dtype
) -> Float[Array, "m n"]:
    return _kernel()(x.data, w.data, factors(x), factors(w), bias, group_sizes, out_dtype=out_dtype)


def grouped_matmul_by_blocks(
    x: ScaledArray, w: ScaledArray, group_sizes: Int[Array, " e"] | None, bias: Float[Array, "e n"] | None, out_dtype
) -> Float[Array, "m n"]:
    n, rows = w.shape[1], w.scheme.block_of(w.shape)[1]
    if rows % 128 == 0 or rows >= n:
        w_scale = scale_of_blocks(w, (1, 128, 128))
    else:
        w_scale = scale_of_blocks(w, (1, 1, 128)).swapaxes(1, 2)
    x_scale = scale_of_blocks(x, (1, 128)).T
    return _kernel()(x.data, w.data, x_scale, w_scale, bias, group_sizes, out_dtype=out_dtype)


def _kernel() -> Callable:
    # Late: Mosaic's import takes a second and 35 MB, which whoever has no Hopper need not pay.
    from fp8x.pallas.sm90_grouped_fp8 import grouped_fp8

    return grouped_fp8


def dense(grouped: Callable) -> Callable:
    """The dense product as a grouped one: of one group, which the kernel is specialized for."""

    def run(x: ScaledArray, w: ScaledArray, bias: Float[Array, " n"] | None, out_dtype) -> Float[Array, "m n"]:
        # The scheme says what it said: an extent in place of None would be a block along K to whoever asks.
        w = ScaledArray(w.data[None], w.scale[None], w.scheme)
        return grouped(x, w, None, None if bias is None else bias[None], out_dtype)

    return run


def factors(q: ScaledArray) -> Float[Array, "..."]:
    """A scale for each row of each matrix, or one for a whole matrix, where no scale is for a part of K."""
    *leads, rows = q.scheme.block_of(q.shape)[:-1]
    one = q.scale.shape[-2] == 1
    return scale_of_blocks(q, (*(1 for _ in leads), rows if one else 1, q.shape[-1]))[..., 0]


def scale_of_blocks(q: ScaledArray, block: tuple[int, ...]) -> Float[Array, "..."]:
    """The scales of `q` as if its blocks were the given smaller ones: each is repeated."""
    scale = q.scale
    for axis, (n, own, wanted) in enumerate(zip(q.shape, q.scheme.block_of(q.shape), block)):
        if own != wanted:
            scale = jnp.take(scale, jnp.arange(0, n, wanted) // own, axis=axis)
    return scale
