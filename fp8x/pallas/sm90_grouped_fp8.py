"""Grouped FP8 GEMM for Hopper: `x [M, K] × w [E, N, K] -> [M, N]`, both operands in 8 bits, float32 accumulation.

For a reader who knows CUDA. What Pallas Mosaic GPU calls a thread is a warpgroup of 128 CUDA threads; `wgmma` and
the copies between global and shared memory (TMA) are asynchronous, and mbarriers say when they are done. A `Ref`
is memory, indexed with `.at[...]`; an array is registers.

A block has three warpgroups and takes tile after tile of the output, `block_m × block_n`:
- the memory warpgroup fills a ring of `stages` slots in shared memory, 128 of K a slot, as far ahead as the ring is
  long, into the next tile too;
- two compute warpgroups share the tile: 64 rows each, what one wgmma has, and both halves of the columns one after
  the other; or, where the tile has no more rows than that, half of the columns each. The tensor cores add fp8
  products up with fewer mantissa bits than float32 has, so every 128 of K get a fresh accumulator, `part`, which is
  then added to `total` in float32 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). While one of the two adds, the
  other keeps the tensor cores busy.
Blocks in a pair (a cluster of two) have the same rows and neighboring columns, and share what they fetch of x.

Scales come in one of two forms, and the kernel is compiled for one of them:
- a factor for each row and for each column (per tensor, token, channel or expert), multiplied with `total`;
- block scales, multiplied with `part`: at every 128 of K a factor for each row of x, and one for each 128 columns of
  w, or for each column.

What becomes of the totals is in epilogue.py: the product, or with two matrices an expert (gate and up, whose columns
are the halves of a tile's) the 8-bit input of the next product.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from fp8x.pallas import tuning
from fp8x.pallas.epilogue import COLUMN_OF_WGMMA, ROW_OF_WGMMA, Gated, Plain, Rows, load
from fp8x.pallas.sm90 import BLOCK_K, CLOCK, L2_BYTES, ROW_ALIGN, SMS, WAVE, group_tiles, pad, zero_of_loop

RASTER = 16  # row tiles side by side in the order of tiles: 16 × 128 rows by 8 × 256 columns are in flight on 132 SMs


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The shape of an output tile, and the slots of the ring.

    Arguments:
        block_m: 64 or 128.
        block_n: 128 or 256: half of it is the width of a wgmma.
        stages: slots of `(block_m + block_n) * 128` bytes.
        cluster: 2 makes pairs of blocks with neighboring columns: each fetches half of their rows of x for both.
    """

    block_m: int
    block_n: int
    stages: int = 4
    cluster: int = 1


def estimates(m: int, n: int, k: int, groups: int, *, by_column: bool = False, gated: bool = False) -> dict:
    """Seconds that each tiling is estimated to take, the larger tiles first.

    A step of K takes a tile the longer of its `block_m * block_n / 32` cycles of tensor work and what it fetches at
    L2_BYTES. Rows are taken as spread evenly over the groups.

    Arguments:
        n: columns, of gate and up together.
        by_column: w has a scale for each column and 128 of K, for which 128×256 has no registers left.
        gated: a block of h's scales, 128 columns, comes from one tile, and a warpgroup has all of them: 128×256.
    """

    def seconds(tiling: Tiling) -> float:
        fetched = (tiling.block_m / tiling.cluster + tiling.block_n) * BLOCK_K
        step = max(tiling.block_m * tiling.block_n / 32, fetched / L2_BYTES)
        row_tiles = min(groups, m) * pl.cdiv(pl.cdiv(m, groups), tiling.block_m)
        column_tiles = pl.cdiv(n, tiling.block_n * tiling.cluster)
        turns = pl.cdiv(row_tiles * column_tiles, SMS // tiling.cluster)
        return turns * pl.cdiv(k, BLOCK_K) * step / CLOCK

    shapes = [(128, 256), (128, 128), (64, 256), (64, 128)]
    shapes = shapes[1:] if by_column else shapes[:1] if gated else shapes
    tilings = [Tiling(*shape, cluster=cluster) for shape, cluster in itertools.product(shapes, (2, 1))]
    return {tiling: seconds(tiling) for tiling in tilings}


def grouped_fp8(
    x: Float[Array, "m k"],
    w: Float[Array, "e n k"],
    x_scale: Float[Array, "m"] | Float[Array, "1"] | Float[Array, "k/128 m"],
    w_scale: Float[Array, "e n"] | Float[Array, "e 1"] | Float[Array, "e n/128 k/128"] | Float[Array, "e k/128 n"],
    bias: Float[Array, "e n"] | None,
    group_sizes: Int[Array, " e"] | None,
    *,
    out_dtype,
    tiling: Tiling | None = None,
    programs: int = SMS,
) -> Float[Array, "m n"]:
    """Each group's rows of `x` by its own matrix of `w`, times scales, plus bias; rows past the groups are zero.

    Arguments:
        x, w: float8_e4m3fn or float8_e5m2 each.
        x_scale, w_scale: float32, both of rank one a matrix (factors of rows and columns, or one for all), or both of
            rank two (blocks, of 128 columns of w or of one).
        bias: any float type.
        group_sizes: int32; None means that there is one group and it has all rows, which needs no table.
        out_dtype: bfloat16, float16 or float32.
        tiling: None chooses one.
        programs: blocks in the grid, at most one an SM.
    """
    if not x.shape[0] or not w.shape[1]:
        return jnp.zeros((x.shape[0], w.shape[1]), out_dtype)
    operands = x, w, x_scale, w_scale, bias, group_sizes
    (y,), _ = _run(*operands, Plain(jnp.dtype(out_dtype)), None, tiling, programs)
    return y


def gated_fp8(
    x: Float[Array, "m k"],
    w: Float[Array, "e 2 i k"],
    x_scale: Float[Array, "m"] | Float[Array, "1"] | Float[Array, "k/128 m"],
    w_scale: Float[Array, "e 2 i"] | Float[Array, "e 2 1"] | Float[Array, "e 2 i/128 k/128"],
    bias: Float[Array, "e 2 i"] | None,
    group_sizes: Int[Array, " e"] | None,
    out_inverse: Float[Array, "1"] | Float[Array, "i/128"] | None,
    *,
    end: Gated,
    tiling: Tiling | None = None,
    programs: int = SMS,
) -> tuple[Float[Array, "m i"], Float[Array, "m i/128"] | None]:
    """`end.gate(y[:, 0], y[:, 1])` of the products `y` with gate and up, quantized: data, and scales if computed.

    Arguments:
        out_inverse: 1 / scale to quantize with, for all columns or for each 128; None finds a scale for each row and
            128 columns.
        end: the gate, and the scheme of what comes out.
        Others as in `grouped_fp8`.
    """
    m, (e, _, i, _) = x.shape[0], w.shape
    if not m or not i:
        scale = None if end.is_static else jnp.ones((m, pl.cdiv(i, 128)), jnp.float32)
        return jnp.zeros((m, i), end.scheme.dtype), scale
    flat = [a if a is None else a.reshape(2 * e, *a.shape[2:]) for a in (w, w_scale, bias)]
    operands = x, flat[0], x_scale, flat[1], flat[2], group_sizes
    (data, *scales), row_of = _run(*operands, end, out_inverse, tiling, programs)
    return data, scales[0][:, row_of].T if scales else None


def _run(
    x, w, x_scale, w_scale, bias, group_sizes, end: Plain | Gated, out_inverse, tiling: Tiling | None, programs: int
) -> tuple[tuple[Array, ...], Int[Array, " m"] | slice]:
    """The epilogue's outputs, and the number of each row in an array with a place for every row of every tile."""
    (m, k), (matrices, n, _), parts = x.shape, w.shape, end.parts
    e = matrices // parts
    steps_of_k = pl.cdiv(k, BLOCK_K)
    block_scaled = x_scale.ndim == 2
    by_column = w_scale.shape[1:] == (steps_of_k, n)
    if tiling is None:
        name = f"sm90_fp8{'_block' if block_scaled else ''}{'_gated' if parts == 2 else ''}"
        choices = estimates(m, parts * n, k, e, by_column=by_column, gated=parts == 2)
        tiling = tuning.choose(tuning.Problem(name, m, parts * n, k, e), choices)
    block_m, block_n, stages, width = tiling.block_m, tiling.block_n, tiling.stages, tiling.block_n // 2
    waves = block_m // WAVE
    tile_n = block_n // parts  # columns of the output that are a tile's
    column_tiles = pl.cdiv(n, tile_n * tiling.cluster)
    grouped = group_sizes is not None

    if grouped:
        sizes, tiles, table, used = group_tiles(group_sizes, m, block_m)
        most_row_tiles = table.shape[1]
    else:
        table = used = None
        most_row_tiles = pl.cdiv(m, block_m)

    # TMA clips boxes at the end of an array, in whole tiles of the swizzle, which may be narrower than a slot. Rows of
    # x that 8, K that 32 and N that 8 do not divide cost a copy here; so do scales and bias, which are read without
    # bounds, of N that a tile does not divide. Scales of rows always have a tile more.
    x = pad(x, (-m % ROW_ALIGN, -k % 32))
    w = pad(w, (0, -n % ROW_ALIGN, -k % 32))
    swizzle = math.gcd(x.shape[1], BLOCK_K)
    one_of_x, one_of_w = x_scale.shape == (1,), not block_scaled and w_scale.shape[1] == 1
    if not one_of_x:
        x_scale = pad(x_scale, (0, block_m) if block_scaled else (block_m,))
    if by_column:
        w_scale = pad(w_scale, (0, 0, -n % tile_n))
    elif not (block_scaled or one_of_w):
        w_scale = pad(w_scale, (0, -n % tile_n))
    bias = None if bias is None else pad(bias.astype(jnp.float32), (0, -n % tile_n))

    def kernel(
        table, used, x, w, x_scale, w_scale, bias, out_inverse, *outs, x_smem, w_smem, buffer, full, full_half, empty
    ):
        """`full[slot]`: x and w came, or all but the second half of w where `full_half[slot]` tells of that;
        `empty[slot]`: it was read."""
        warpgroup = lax.axis_index("warpgroup")

        def for_each_tile(do):
            """`step = do(tile, step)` of this block's tiles; `step` counts slots."""
            row_tiles = used[0] if grouped else most_row_tiles

            def body(loop, carry):
                row_tile, column_tile = plgpu.planar_snake(loop.index[0], (row_tiles, column_tiles), 0, RASTER)
                if grouped:
                    group, start, skip, rows = (table[i, row_tile] for i in range(4))
                    start = pl.multiple_of(start, ROW_ALIGN)
                    steps = jnp.where(group < e, steps_of_k, 0)
                else:
                    start = row_tile * block_m
                    group, skip, rows, steps = 0, 0, jnp.minimum(m - start, block_m), steps_of_k
                column = (column_tile * tiling.cluster + lax.axis_index("pair")) * tile_n
                return do(_Tile(row_tile, group, start, skip, rows, column, steps), carry)

            loop = plgpu.nd_loop((row_tiles * column_tiles,), collective_axes="block", init_carry=jnp.int32(0))
            return loop(body)

        def half_of(tile, half):
            """The matrix of a half of a tile, and its first column there. The rest's factors are an expert's."""
            group = jnp.minimum(tile.group, e - 1) if grouped else tile.group
            return (group, tile.column + half * width) if parts == 1 else (group * parts + half, tile.column)

        @pl.when(warpgroup == 2)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")  # of 3 × 168 at launch; 240 for two more

            def load_tile(tile, step):
                def load_slot(i, step):
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    at_k = pl.ds(i * BLOCK_K, BLOCK_K)
                    for wave in range(waves):
                        rows = x.at[pl.ds(tile.start + wave * WAVE, WAVE), at_k]
                        plgpu.copy_gmem_to_smem(rows, x_smem.at[slot, wave], full.at[slot], collective_axes=shared)
                    for half in range(2):
                        matrix, first = half_of(tile, half)
                        columns = w.at[matrix, pl.ds(first, width), at_k]
                        barrier = full_half if (half, waves) == (1, 2) else full
                        plgpu.copy_gmem_to_smem(columns, w_smem.at[slot, half], barrier.at[slot])
                    return step + 1

                return lax.fori_loop(0, tile.steps, load_slot, step)

            step = for_each_tile(load_tile)

            @pl.loop(jnp.maximum(step - stages, 0), step)
            def _until_all_is_read(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            wave, halves = (warpgroup, (0, 1)) if waves == 2 else (0, (warpgroup,))

            def compute_tile(tile, step):
                row = tile.start + wave * WAVE

                def columns_of(half, first=0, size=width):
                    """A part of a half's columns, for factors and bias; of a tile without columns, another's."""
                    matrix, column = half_of(tile, half)
                    return matrix, pl.ds(jnp.minimum(column + first, n + -n % tile_n - size), size)

                def load_factors(i):
                    """Block scales of a step, straight from global memory (L2). Read from a slot of the ring they
                    would need a fence before TMA may overwrite it (docs/kernels.md)."""
                    if not block_scaled:
                        return ()
                    factors = [_load(x_scale, (i, pl.ds(row, WAVE)), 0)]
                    for half in halves:
                        if by_column:
                            matrix, columns = columns_of(half)
                            at_columns = matrix, i, columns
                        else:
                            matrix, column = half_of(tile, half)
                            at_columns = matrix, jnp.minimum(lax.div(column, 128), pl.cdiv(n, 128) - 1), i
                        factors.append(_load(w_scale, at_columns, 1))
                    return tuple(factors)

                def multiply(i, carry):
                    step, totals, factors = carry
                    slot = lax.rem(step, stages)
                    # A step early: ptxas would have the tensor cores wait for them.
                    next_factors = load_factors(jnp.minimum(i + 1, steps_of_k - 1))
                    plgpu.barrier_wait(full.at[slot])
                    promoted = []
                    for at, half in enumerate(halves):
                        if at > 0:
                            # A barrier of its own also keeps ptxas from starting this half while the part before is
                            # still being added: two parts and the totals are more registers than there are.
                            plgpu.barrier_wait(full_half.at[slot])

                        def mma(part, half=half, slot=slot):
                            plgpu.wgmma(part, x_smem.at[slot, wave], w_smem.at[slot, half].T)
                            return part[...]  # waits for the tensor cores

                        part = pl.run_scoped(mma, plgpu.ACC((WAVE, width), jnp.float32))
                        if at == len(halves) - 1:
                            plgpu.barrier_arrive(empty.at[slot])
                        if block_scaled:
                            row_factor, w_factor = factors[0], factors[1 + at]
                            if by_column:
                                part = part * _spread(w_factor, part, 1)
                            else:
                                row_factor = row_factor * w_factor
                            part = part * _spread(row_factor, part, 0)
                        promoted.append(totals[at] + part)
                    return step + 1 + zero_of_loop(), tuple(promoted), next_factors

                zeros = plgpu.layout_cast(jnp.zeros((WAVE, width), jnp.float32), plgpu.Layout.WGMMA)
                init = step, (zeros,) * len(halves), load_factors(0)
                step, totals, _ = lax.fori_loop(0, tile.steps, multiply, init)

                begin = jnp.clip(tile.skip - wave * WAVE, 0, WAVE)
                stop = jnp.clip(tile.skip + tile.rows - wave * WAVE, 0, WAVE)

                def store():
                    def of_a_group(factor):
                        """Zero in the rest, whose own may be NaN, and the last expert's too."""
                        if not grouped:
                            return factor
                        return jnp.where(lax.broadcast_in_dim(tile.group < e, factor.shape, []), factor, 0)

                    if not block_scaled:
                        row_factor = of_a_group(_load(x_scale, (0 if one_of_x else pl.ds(row, WAVE),), 0))

                    def scaled(y, at, first):
                        matrix, columns = columns_of(halves[at], first, y.shape[1])
                        if not block_scaled:
                            at_columns = (matrix, 0) if one_of_w else (matrix, columns)
                            y = y * _spread(row_factor, y, 0) * _spread(of_a_group(_load(w_scale, at_columns, 1)), y, 1)
                        if bias is not None:
                            y = y + _spread(of_a_group(_load(bias, (matrix, columns), 1)), y, 1)
                        return y

                    rows = Rows(warpgroup, begin, stop, row, tile.index * block_m + wave * WAVE)
                    columns = [half_of(tile, half)[1] for half in halves]
                    end.store(rows, totals, columns, scaled, outs, buffer, out_inverse)

                # Nothing to store: wait for the stores before, so that the two buffers stay in turn.
                lax.cond(stop > begin, store, lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
                return step

            for_each_tile(compute_tile)
            plgpu.wait_smem_to_gmem(0)

    shared = "pair" if tiling.cluster == 2 else None
    # A slot is free when the warpgroups of both blocks have read it: each block writes into both.
    empty = dict(num_arrivals=2, num_barriers=stages)
    swizzled = (plgpu.TilingTransform((ROW_ALIGN, swizzle)), plgpu.SwizzleTransform(swizzle))
    run = plgpu.kernel(
        kernel,
        out_type=end.outputs(m, n, most_row_tiles * block_m),
        grid=(min(programs // tiling.cluster, most_row_tiles * column_tiles),),
        grid_names=("block",),
        cluster=(tiling.cluster,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=plgpu.SMEM((stages, waves, WAVE, BLOCK_K), x.dtype, transforms=swizzled),
            w_smem=plgpu.SMEM((stages, 2, width, BLOCK_K), w.dtype, transforms=swizzled),
            buffer=end.buffer(),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            full_half=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            empty=plgpu.ClusterBarrier(collective_axes=("pair",), **empty) if shared else plgpu.Barrier(**empty),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,  # of exp2 in an epilogue: subnormal results are zero
        ),
    )
    first, *others = run(table, used, x, w, x_scale, w_scale, bias, out_inverse)
    if not grouped:
        return (first[:, :n], *others), slice(0, m)
    row, starts = jnp.arange(m), tiles.ends - sizes
    group = jnp.searchsorted(tiles.ends, row, side="right", method="compare_all")
    return (first[:, :n], *others), (tiles.first * block_m - starts + starts % ROW_ALIGN)[group] + row


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Row tile number `index`, of a group, is rows of x from `start` on, of which `rows` after `skip` are the group's;
    `column` is its first one in the output; it takes `steps` of K."""

    index: Array
    group: Array
    start: Array
    skip: Array
    rows: Array
    column: Array
    steps: Array


def _load(ref, at: tuple, dim: int) -> Array:
    """Factors of an accumulator's rows (dim 0) or columns (1), or one for all, where `at` is a single place."""
    if not any(isinstance(index, pl.Slice) for index in at):
        return ref[at]
    return load(ref.at[at], (ROW_OF_WGMMA, COLUMN_OF_WGMMA)[dim])


def _spread(factor: Array, y: Array, dim: int) -> Array:
    """A value for each row (dim 0) or column (1) of `y`, or one for all, in `y`'s shape."""
    return lax.broadcast_in_dim(factor, y.shape, [dim] if factor.ndim else [])
