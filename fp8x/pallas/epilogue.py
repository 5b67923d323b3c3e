"""What becomes of a tile's sums: they are rounded and sent to global memory, or gated and quantized before.

An epilogue is called by each compute warpgroup with 64 rows, the totals of one or both halves of a tile's columns in
wgmma's layout, and `scaled`, which multiplies some columns of a half with their factors and adds the bias.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from fp8x import numerics
from fp8x.pallas.packed import pack
from fp8x.pallas.reciprocal import reciprocal
from fp8x.pallas.sm90 import WAVE
from fp8x.scheme import Scheme

ROW_OF_WGMMA = plgpu.Layout.WGMMA.reduce(1)  # the registers for a value a row of an accumulator
COLUMN_OF_WGMMA = plgpu.Layout.WGMMA.reduce(0)
PANEL_BYTES = 128  # the width of a buffer on the way out: the widest swizzle, without which stores meet in few banks


@dataclasses.dataclass(frozen=True)
class Rows:
    """64 rows of a tile.

    Attributes:
        warpgroup: which one has them.
        begin, end: those among them that are the tile's group's.
        first: the first one's number in the output.
        slot: that in an array with a place for every row of every tile.
    """

    warpgroup: Array
    begin: Array
    end: Array
    first: Array
    slot: Array


@dataclasses.dataclass(frozen=True)
class Plain:
    """The product, rounded to `dtype`."""

    dtype: np.dtype

    parts = 1  # matrices an expert

    @property
    def panel(self) -> int:
        """Columns that leave together."""
        return PANEL_BYTES // self.dtype.itemsize

    def outputs(self, m: int, n: int, slots: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        aligned = 16 // self.dtype.itemsize  # TMA wants rows of whole 16 bytes
        return (jax.ShapeDtypeStruct((m, n + -n % aligned), self.dtype),)

    def buffer(self) -> plgpu.SMEM:
        return _buffer(2, self.panel, self.dtype)

    def store(
        self, rows: Rows, totals: Sequence[Array], columns: Sequence[Array], scaled: Callable, outs, buffer, _
    ) -> None:
        (out,) = outs
        panels = [(half, i) for half in range(len(totals)) for i in range(totals[half].shape[1] // self.panel)]
        for turn, (half, i) in enumerate(panels):
            first = i * self.panel
            y = scaled(totals[half][:, first : first + self.panel], half, first)
            plgpu.wait_smem_to_gmem(0 if len(panels) == 1 else 1, wait_read_only=True)
            panel = buffer.at[rows.warpgroup, turn % 2]
            panel[...] = y.astype(self.dtype)
            send(panel, out, rows.begin, rows.end, rows.first, columns[half] + first)


@dataclasses.dataclass(frozen=True)
class Gated:
    """`gate(y[:, 0], y[:, 1])` in 8 bits: what the product with w2 reads. The halves of a tile are gate's and up's.

    As in two steps (`fp8x.ops.gate`, `fp8x.numerics`): gate and up are rounded to `dtype`, and h, which is quantized by
    float32 scales.

    Attributes:
        gate: of gate and up in float32 registers (`fp8x.ops.gate.kernel_gate`); of two zeros it makes zero.
        scheme: of h. Where no scales are given, blocks of (1, 128): a row of a tile.
        is_static: whether reciprocals of scales are given.
    """

    gate: Callable[[Array, Array], Array]
    dtype: np.dtype
    scheme: Scheme
    is_static: bool

    parts = 2

    def outputs(self, m: int, n: int, slots: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        data = jax.ShapeDtypeStruct((m, n + -n % 16), self.scheme.dtype)
        scales = jax.ShapeDtypeStruct((pl.cdiv(n, PANEL_BYTES), slots), jnp.float32)
        return (data,) if self.is_static else (data, scales)

    def buffer(self) -> plgpu.SMEM:
        return _buffer(1, PANEL_BYTES, self.scheme.dtype)

    def store(self, rows: Rows, totals, columns, scaled, outs, buffer, out_inverse) -> None:
        data, *scales = outs
        gate, up = (_rounded(scaled(total, half, 0), self.dtype) for half, total in enumerate(totals))
        h = _rounded(self.gate(gate, up), self.dtype)
        block = lax.div(columns[0], PANEL_BYTES)
        if self.is_static:
            blocks = out_inverse.shape[0]
            inverse = lax.broadcast_in_dim(out_inverse[jnp.minimum(block, blocks - 1)], h.shape, [])
        else:
            magnitude = jnp.abs(h)
            amax = jnp.max(jnp.where(magnitude < np.float32(np.inf), magnitude, np.float32(0)), axis=1)
            scale = numerics.compute_scale(amax, self.scheme)
            scale = plgpu.layout_cast(scale, ROW_OF_WGMMA)  # those of "unit" are a constant, which has none
            inverse = lax.broadcast_in_dim(reciprocal(scale), h.shape, [0])

            @pl.when(block < scales[0].shape[0])
            def _():
                scales[0][block, pl.ds(rows.slot, WAVE)] = scale

        limit = np.float32(self.scheme.max)
        panel = buffer.at[rows.warpgroup, 0]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        panel[...] = jnp.clip(h * inverse, -limit, limit).astype(self.scheme.dtype)
        send(panel, data, rows.begin, rows.end, rows.first, columns[0])


def _rounded(y: Float[Array, "m n"], dtype) -> Float[Array, "m n"]:
    """`y` as `dtype` has it, in float32."""
    return pack(y, dtype).astype(jnp.float32)


def _buffer(panels: int, columns: int, dtype) -> plgpu.SMEM:
    """Panels for each compute warpgroup."""
    return plgpu.SMEM((2, panels, WAVE, columns), dtype, transforms=(plgpu.SwizzleTransform(PANEL_BYTES),))


def send(panel, out, begin, end, row, column) -> None:
    """The rows [begin, end) of a panel in shared memory to `out`, where its first element belongs at `row, column`."""
    plgpu.commit_smem()
    # TMA boxes have static shapes: any number of rows is a sum of some of these.
    at, (rows, columns) = begin, panel.shape
    for length in (64, 32, 16, 8, 4, 2, 1):
        if length > rows:
            continue
        take = (end - begin) & length

        @pl.when(take != 0)
        def _(at=at, length=length):
            plgpu.copy_smem_to_gmem(
                panel.at[pl.ds(at, length)], out.at[pl.ds(row + at, length), pl.ds(column, columns)], commit_group=False
            )

        at = at + take
    plgpu.commit_smem_to_gmem_group()


def load(ref, layout) -> Array:
    """Registers in the layout of an accumulator's rows or columns: each thread reads its own, a few lanes the same."""
    return plgpu.load(ref, layout=layout, optimized=False)
