"""Quantizing what an op multiplies, with the gate of an MLP before it if there is one: by XLA or by a kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.ops.gate import Gate, gated, kernel_gate, not_in_kernels
from fp8x.ops.mosaic import no_hopper
from fp8x.pallas.quantize_tiles import Tile, choose_tile
from fp8x.scheme import E8M0, FLOAT32, Scheme


@dataclasses.dataclass(frozen=True)
class QuantizeCall:
    """What a kernel needs to know to say whether it quantizes rows `[m, k]`, or `[m, 2, k]` through a gate."""

    m: int
    k: int
    x: np.dtype
    scheme: Scheme
    has_scale: bool
    gate: Gate | None = None
    op: str = "quantize"

    def __str__(self) -> str:
        shape = f"[{self.m}, {self.k}]" if self.gate is None else f"[{self.m}, 2, {self.k}] by {self.gate}"
        return f"quantize {self.x}{shape} in {self.scheme}{' by a given scale' if self.has_scale else ''}"


def by_xla(
    x: Float[Array, "m k"] | Float[Array, "m 2 k"],
    scheme: Scheme,
    scale: Float[Array, "..."] | None,
    used: Int[Array, ""] | None,
    gate: Gate | None = None,
) -> ScaledArray:
    """`numerics.quantize` of `x`, or of what its gate makes of it.

    Arguments:
        scheme: over `[m, k]`.
        scale: the scale to quantize with; None finds it in `x`.
        used: how many rows count; those after are zeros. None counts all.
        gate: where `x` is `[m, 2, k]`, what makes `[m, k]` of it.
    """
    x = x if gate is None else gated(x, gate)
    if used is not None:
        # What lies there may be anything, uninitialized memory too.
        x = jnp.where((jnp.arange(x.shape[0]) < used)[:, None], x, 0)
    return numerics.quantize(x, scheme) if scale is None else numerics.quantize_with_scale(x, scale, scheme)


def unsupported(call: QuantizeCall) -> str | None:
    """Why `by_kernel` can't run a call; None if it can."""
    if reason := no_hopper():
        return reason
    if call.gate is not None and (reason := not_in_kernels(call.gate)):
        return reason
    rows, _ = _block(call.scheme)
    if call.has_scale and (rows is not None or call.scheme.is_mx):
        return f"takes float32 scales that hold for all rows; those of {call.scheme} don't"
    if not call.has_scale and rows != 1:
        return f"finds the amax of one row or a part of it; {call.scheme} has blocks of several"
    shape = view(call)
    width = shape[-1]
    if call.k % width:
        return f"reads whole blocks: {width} has to divide K, which is {call.k}"
    if call.m == 0:
        return None
    if shape[0] >= 2**31:
        return f"counts rows, or blocks where each has its own scale, in 32 bits; here are {shape[0]}"
    tile = choose_tile(*shape, call.x.itemsize, _parts(call))
    return None if isinstance(tile, Tile) else tile


def by_kernel(
    x: Float[Array, "m k"] | Float[Array, "m 2 k"],
    scheme: Scheme,
    scale: Float[Array, "..."] | None,
    used: Int[Array, ""] | None,
    gate: Gate | None = None,
) -> ScaledArray:
    """`by_xla` in one pass, bit for bit but where a gate (`kernel_gate`) rounds to another 16-bit number."""
    # Late: Mosaic's import takes a second and 35 MB, which whoever has no Hopper need not pay.
    from fp8x.pallas.sm90_quantize import quantize_blocks

    shape = m, k = x.shape[0], x.shape[-1]
    if m == 0:
        return by_xla(x, scheme, scale, None, gate)
    call = QuantizeCall(m, k, x.dtype, scheme, scale is not None, gate)
    rows, blocks, width = view(call)
    data, found = quantize_blocks(
        x.reshape(rows, _parts(call), blocks, width),
        scheme,
        None if scale is None else scale[0],
        None if used is None else used * (rows // m),
        None if gate is None else kernel_gate(gate),
    )
    if scale is None:
        found = found if scheme.scale_dtype == FLOAT32 else jax.lax.bitcast_convert_type(found, E8M0)
        scale = found.reshape(scheme.scale_shape(shape))
    return ScaledArray(data.reshape(shape), scale, scheme)


def _block(scheme: Scheme) -> tuple[int | None, int | None]:
    rows, columns = (1, *scheme.block)[-2:]  # a block that names K alone has rows of 1
    return rows, columns


def _parts(call: QuantizeCall) -> int:
    return 1 if call.gate is None else 2


def view(call: QuantizeCall) -> tuple[int, int, int]:
    """The input as rows of blocks of a width. Where nothing tells rows from blocks, all blocks are rows."""
    width = _block(call.scheme)[1] or call.k
    blocks = call.k // width
    return (call.m, blocks, width) if call.has_scale or call.gate else (call.m * blocks, 1, width)
