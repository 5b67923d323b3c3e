"""Quantizing activations on Hopper, with or without the gate of an MLP before it, in one pass over memory.

For a reader who knows CUDA. A block of the grid is one warpgroup (128 threads). It loads its tile straight into
registers, 16 bytes a thread and load, and all loads before the first use; finds the amax of each block of elements
among the few threads that share it; multiplies, converts and stores. Nothing goes through shared memory, but for the
maxima of blocks that four warps share, and nothing is read twice: bytes bind (docs/performance.md).

The rules are those of fp8x/numerics.py, and so are the bits. What differs is how:
- The largest finite magnitude, by packed integers: magnitudes compare like their bits, and adding what carries Inf and
  NaN into the sign makes them negative.
- `1 / scale`: Mosaic divides by an approximation, which is corrected by an exact remainder.
- Subnormal inputs need no care here: the GPU's multiplication keeps them. Pallas' interpreter on the CPU flushes them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from fp8x import numerics
from fp8x.errors import ShapeError
from fp8x.pallas.packed import pack
from fp8x.pallas.quantize_tiles import Tile, choose_tile
from fp8x.pallas.reciprocal import reciprocal
from fp8x.scheme import Scheme

WARPS = 4


def quantize_blocks(
    x: Float[Array, "m parts b width"],
    scheme: Scheme,
    scale: Float[Array, " b"] | None,
    used: Int[Array, ""] | None,
    gate: Callable | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Float[Array, "m b width"], Array]:
    """Every block of `width` elements by its own scale; or by one that is given.

    Arguments:
        x: bfloat16, float16 or float32; the rows `[M, K]` of an activation as `[M, 1, K / width, width]`, or what comes
            to the same; of two parts if there is a gate.
        scheme: its element and scale rule count, its block does not.
        scale: float32; for blocks `[:, b]`. None finds a scale for each, of `scheme`'s type.
        used: int32, how many rows count. Those after become zero, whatever they hold; tiles of them are not read.
        gate: a function of two arrays in float32 (`fp8x.ops.gate.kernel_gate`): `gate(x[:, 0], x[:, 1])`, rounded to
            x's type, is quantized.
        tile: None chooses one.

    Returns:
        data, and scales `[m, b]`: float32, or bytes of e8m0 (uint8); or None where `scale` is given.

    Raises:
        ShapeError: no tile fits; see `choose_tile`.
    """
    m, parts, b, width = x.shape
    tile = tile or choose_tile(m, b, width, x.dtype.itemsize, parts)
    if not isinstance(tile, Tile):
        raise ShapeError(f"x: the kernel {tile}; shape is {x.shape}")
    layout = _layout(tile)
    row_tiles, block_tiles = m // tile.rows, b // tile.blocks
    # The columns of a tile. Where chunks do not divide them, the last one begins before the end of those before:
    # a maximum may see an element twice.
    whole = width - width % tile.chunk
    columns = [(0, whole), (width - tile.chunk, tile.chunk)][: 1 if whole == width else 2]

    def kernel(x, scale, used, out, out_scale):
        index = lax.axis_index("block")
        row_tile, at_block = lax.div(index, block_tiles), lax.rem(index, block_tiles) * tile.blocks
        at_block = pl.ds(at_block, tile.blocks)

        def load(row):
            """The tile, a piece for each of `columns`."""
            pieces = []
            for start, size in columns:
                at = [(pl.ds(row, tile.rows), part, at_block, pl.ds(start, size)) for part in range(parts)]
                piece, *up = [plgpu.load(x.at[i], layout=layout, optimized=False) for i in at]
                if gate is not None:
                    gated = gate(piece.astype(jnp.float32), up[0].astype(jnp.float32))
                    piece = pack(gated, x.dtype, (tile.thread_rows, tile.thread_blocks, tile.chunk))
                pieces.append(piece)
            return pieces

        def quantize(row):
            pieces = load(row)
            if used is not None:
                pieces = [_zero_from(piece, used[0] - row, layout) for piece in pieces]
            if scale is None:
                found, factor = _scale(_amax(pieces, tile.chunk), scheme)
                store_scale(row, found)
                spread = [0, 1]
            else:
                given = plgpu.load(scale.at[at_block], layout=layout.reduce((0, 2)), optimized=False)
                factor, spread = numerics.reciprocal(given), [1]
            for piece, (start, size) in zip(pieces, columns):
                y = piece.astype(jnp.float32) * lax.broadcast_in_dim(factor, piece.shape, spread)
                store(row, start, size, jnp.clip(y, np.float32(-scheme.max), np.float32(scheme.max)))

        def clear(row):
            zeros = plgpu.layout_cast(jnp.zeros((tile.rows, tile.blocks, tile.chunk), jnp.float32), layout)
            for start, size in columns:
                for at in range(start, start + size, tile.chunk):
                    store(row, at, tile.chunk, zeros)
            if scale is None:
                store_scale(row, _scale(jnp.max(zeros, axis=2), scheme)[0])

        def store(row, start, size, y):
            _store(out.at[pl.ds(row, tile.rows), at_block, pl.ds(start, size)], y.astype(out.dtype))

        def store_scale(row, found):
            found = plgpu.layout_cast(found, layout.reduce(2))  # scales of "unit" are a constant, which has none
            _store(out_scale.at[pl.ds(row, tile.rows), at_block], found.astype(out_scale.dtype))

        # Where tiles do not divide the rows, the last block takes one more, which ends with them.
        ends = jnp.where(row_tile == row_tiles - 1, 2, 1) if m % tile.rows else 1

        @pl.loop(0, ends)
        def _(i):
            row = jnp.where(i == 0, row_tile * tile.rows, m - tile.rows)
            if used is None:
                quantize(row)
            else:
                lax.cond(row < used[0], quantize, clear, row)

    out_scale = jax.ShapeDtypeStruct((m, b), jnp.uint8 if scheme.is_mx else jnp.float32) if scale is None else None
    run = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((m, b, width), scheme.dtype), out_scale),
        grid=(row_tiles * block_tiles,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,  # of exp and rsqrt, in gates
        ),
    )
    return run(x, scale, None if used is None else used[None])


def _store(ref, value) -> None:
    """To global memory. From jax 0.12 on a plain store refuses what is no multiple of 32 bytes a row; before, it had no
    other form."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _layout(tile: Tile):
    """Registers of `[rows, blocks, columns]`: warps, then lanes along each, as the tile has its threads."""
    threads = tile.thread_rows, tile.thread_blocks, tile.lanes
    lanes, warps = [], WARPS
    for extent in threads:
        lanes.append(extent // math.gcd(extent, warps))
        warps //= extent // lanes[-1]
    tiles = [(*extents[:2], extents[2] * tile.vector) for extents in (threads, lanes)]
    layout = TiledLayout(
        plgpu.Tiling((*tiles, (1, 1, tile.vector))),
        warp_dims=(-9, -8, -7),
        lane_dims=(-6, -5, -4),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _zero_from(x: Float[Array, "r b c"], row: Int[Array, ""], layout) -> Float[Array, "r b c"]:
    """`x` with zeros from `row` on."""
    rows = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
    return jnp.where(rows < row, x, jnp.zeros((), x.dtype))


def _amax(pieces: list[Float[Array, "r b _"]], chunk: int) -> Float[Array, "r b"]:
    """The largest finite magnitude of each block, float32; `numerics.block_amax`."""
    dtype = pieces[0].dtype
    integer = np.dtype(f"int{8 * dtype.itemsize}")
    # From Inf on, magnitudes become negative.
    infinity = int(np.array(np.inf, dtype).view(integer))
    carry = np.array(2 ** (8 * dtype.itemsize - 1) - infinity, integer)
    keys = []
    for piece in pieces:
        magnitudes = lax.bitcast_convert_type(piece, integer) & np.array(np.iinfo(integer).max, integer)
        keys += [(magnitudes + carry)[:, :, at : at + chunk] for at in range(0, piece.shape[2], chunk)]
    key = jnp.max(functools.reduce(jnp.maximum, keys).astype(jnp.int32), axis=2)
    bits = jnp.maximum(key, np.int32(carry)) - np.int32(carry)  # of no finite number, zero
    if dtype == jnp.float16:
        return lax.bitcast_convert_type(bits.astype(jnp.int16), dtype).astype(jnp.float32)
    return lax.bitcast_convert_type(bits << (32 - 8 * dtype.itemsize), jnp.float32)


def _scale(amax: Float[Array, "r b"], scheme: Scheme) -> tuple[Array, Float[Array, "r b"]]:
    """The scale, e8m0 as int32, and its reciprocal."""
    if scheme.is_mx:
        byte = numerics.e8m0_byte(amax, scheme)
        return byte, numerics.reciprocal_of_byte(byte)
    scale = numerics.compute_scale(amax, scheme)
    return scale, reciprocal(scale)
