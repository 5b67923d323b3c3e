"""The Mosaic GPU kernels as ops: which calls each supports, and the scales in the form that it reads."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp8x.array import ScaledArray
from fp8x.pallas.sm90_grouped_fp8 import grouped_fp8
from fp8x.scheme import Scheme


def unsupported_by_factors(call) -> str | None:
    """Why `sm90_grouped_fp8` can't take the scales as a factor for each row of x and of w."""
    return _unsupported(call, lambda b: b is None, lambda b: True, "one scale for all of K")


def unsupported_by_blocks(call) -> str | None:
    """Why `sm90_grouped_fp8` can't take the scales of 1×128 blocks of x and 128×128 blocks of w."""
    whole = lambda b: b is None or b % 128 == 0  # noqa: E731
    return _unsupported(call, whole, whole, "blocks of 128, or multiples, along K and w's rows")


def _unsupported(call, along_k: Callable, along_n: Callable, wanted: str) -> str | None:
    if reason := _no_hopper():
        return reason
    if not isinstance(call.x, Scheme):
        return f"multiplies 8-bit activations, not {call.x}"
    for name, scheme in (("x", call.x), ("w", call.w)):
        if scheme.is_mx:
            return f"reads float32 scales; those of {name} are e8m0 ({scheme})"
        rows = (None, *scheme.block)[-2]
        if not along_k(scheme.block[-1]) or (name == "w" and not along_n(rows)):
            return f"reads {wanted}; {name} is {scheme}"
    return None


def _no_hopper() -> str | None:
    """A GPU that is none. Without any GPU the kernels still lower for CUDA, and run in Pallas' interpreter."""
    device = jax.devices()[0]
    if device.platform == "gpu" and device.compute_capability != "9.0":
        return f"needs compute capability 9.0 (Hopper); {device.device_kind} has {device.compute_capability}"
    return None


def grouped_matmul_by_factors(
    x: ScaledArray, w: ScaledArray, group_sizes: Int[Array, " e"] | None, bias: Float[Array, "e n"] | None, out_dtype
) -> Float[Array, "m n"]:
    k = x.shape[1]
    x_scale, w_scale = _scale_of_blocks(x, (1, k))[:, 0], _scale_of_blocks(w, (1, 1, k))[:, :, 0]
    return grouped_fp8(x.data, w.data, x_scale, w_scale, bias, group_sizes, out_dtype=out_dtype)


def grouped_matmul_by_blocks(
    x: ScaledArray, w: ScaledArray, group_sizes: Int[Array, " e"] | None, bias: Float[Array, "e n"] | None, out_dtype
) -> Float[Array, "m n"]:
    x_scale, w_scale = _scale_of_blocks(x, (1, 128)).T, _scale_of_blocks(w, (1, 128, 128))
    return grouped_fp8(x.data, w.data, x_scale, w_scale, bias, group_sizes, out_dtype=out_dtype)


def dense(grouped: Callable) -> Callable:
    """The dense product as a grouped one: of one group, which the kernel is specialized for."""

    def run(x: ScaledArray, w: ScaledArray, bias: Float[Array, " n"] | None, out_dtype) -> Float[Array, "m n"]:
        w = ScaledArray(w.data[None], w.scale[None], dataclasses.replace(w.scheme, block=w.scheme.block_of(w.shape)))
        return grouped(x, w, None, None if bias is None else bias[None], out_dtype)

    return run


def _scale_of_blocks(q: ScaledArray, block: tuple[int, ...]) -> Float[Array, "..."]:
    """The scales of `q` as if its blocks were the given smaller ones: each is repeated."""
    scale = q.scale
    for axis, (n, own, wanted) in enumerate(zip(q.shape, q.scheme.block_of(q.shape), block)):
        if own != wanted:
            scale = jnp.take(scale, jnp.arange(0, n, wanted) // own, axis=axis)
    return scale
