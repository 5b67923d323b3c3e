"""Grouped FP8 GEMM for Hopper: `x [M, K] × w [E, N, K] -> [M, N]`, both operands in 8 bits, float32 accumulation.

For a reader who knows CUDA. What Pallas Mosaic GPU calls a thread is a warpgroup of 128 CUDA threads; `wgmma` and
the copies between global and shared memory (TMA) are asynchronous, and mbarriers say when they are done. A `Ref`
is memory, indexed with `.at[...]`; an array is registers.

A block has three warpgroups and takes tile after tile of the output, `block_m × block_n`:
- the memory warpgroup fills a ring of `stages` slots in shared memory, 128 of K a slot, as far ahead as the ring is
  long, into the next tile too;
- two compute warpgroups have half of the tile's columns each, and go through its rows in waves of 64, what one wgmma
  has. The tensor cores add fp8 products up with fewer mantissa bits than float32 has, so every 128 of K get a fresh
  accumulator, `part`, which is then added to `total` in float32 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
  While one of the two adds, the other keeps the tensor cores busy.
Blocks in a pair (a cluster of two) have the same rows and neighboring columns, and share what they fetch of x.

Scales come in one of two forms, and the kernel is compiled for one of them:
- a factor for each row and for each column (per tensor, token, channel or expert), multiplied with `total`;
- block scales, multiplied with `part`: at every 128 of K a factor for each row of x, and one for each 128 columns of
  w, or for each column.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from fp8x.pallas.schedule import tile_table

SMS = 132  # of an H100 or H200 SXM; another number costs balance, not correctness
BLOCK_K = 128  # one row of a slot is 128 bytes: the widest swizzle, and the longest sum before promotion
WAVE = 64  # rows of a wgmma
ROW_ALIGN = 8  # rows of a swizzle atom: a TMA box into one starts at a multiple
OUT_ALIGN = 64  # columns: TMA boxes of the output tile it without a rest
L2_BYTES = 34  # a cycle and SM: assumed (8.2 TB/s at 1.83 GHz), never measured
RASTER = 16  # row tiles side by side in the order of tiles: 16 × 128 rows by 8 × 256 columns are in flight on 132 SMs

ROW_OF_WGMMA = plgpu.Layout.WGMMA.reduce(1)  # the registers for a value a row of an accumulator
COLUMN_OF_WGMMA = plgpu.Layout.WGMMA.reduce(0)


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


def choose_tiling(m: int, n: int, groups: int, *, by_column: bool = False) -> Tiling:
    """The tiling with the least estimated time, the larger tile where two are equal.

    A step of K takes a tile the longer of its `block_m * block_n / 32` cycles of tensor work (8192 FLOP a cycle and
    SM) and what it fetches at L2_BYTES. Rows are taken as spread evenly over the groups. `by_column`: the kernel
    holds a scale for each column and 128 of K, for which 128×256 has no registers left.
    """

    def cost(tiling: Tiling) -> float:
        fetched = (tiling.block_m / tiling.cluster + tiling.block_n) * BLOCK_K
        step = max(tiling.block_m * tiling.block_n / 32, fetched / L2_BYTES)
        row_tiles = min(groups, m) * pl.cdiv(pl.cdiv(m, groups), tiling.block_m)
        column_tiles = pl.cdiv(n, tiling.block_n * tiling.cluster)
        return pl.cdiv(row_tiles * column_tiles, SMS // tiling.cluster) * step

    shapes = itertools.product((128, 64), (256, 128), (2, 1))
    tilings = [Tiling(m, n, cluster=cluster) for m, n, cluster in shapes if not (by_column and m == 128 and n == 256)]
    return min(tilings, key=cost)


def grouped_fp8(
    x: Float[Array, "m k"],
    w: Float[Array, "e n k"],
    x_scale: Float[Array, "m"] | Float[Array, "k/128 m"],
    w_scale: Float[Array, "e n"] | Float[Array, "e n/128 k/128"] | Float[Array, "e k/128 n"],
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
        x_scale, w_scale: float32, both of rank one a matrix (row and column factors), or both of rank two (blocks, of
            128 columns of w or of one).
        bias: any float type.
        group_sizes: int32; None means that there is one group and it has all rows, which needs no table.
        out_dtype: bfloat16, float16 or float32.
        tiling: None chooses one.
        programs: blocks in the grid, at most one an SM.
    """
    (m, k), (e, n, _) = x.shape, w.shape
    if m == 0 or n == 0:
        return jnp.zeros((m, n), out_dtype)
    steps_of_k = pl.cdiv(k, BLOCK_K)
    block_scaled = x_scale.ndim == 2
    by_column = w_scale.shape[1:] == (steps_of_k, n)
    tiling = tiling or choose_tiling(m, n, e, by_column=by_column)
    block_m, block_n, stages = tiling.block_m, tiling.block_n, tiling.stages
    waves, width = block_m // WAVE, block_n // 2
    panel = 128 // jnp.dtype(out_dtype).itemsize  # columns of the output that are 128 bytes wide
    panels = width // panel
    column_tiles = pl.cdiv(n, block_n * tiling.cluster)
    padded_n = column_tiles * tiling.cluster * block_n
    grouped = group_sizes is not None

    if grouped:
        # Rows past the groups are a group too, number e, that takes no step of K: its tiles are written as zeros.
        rest = m - jnp.sum(group_sizes)
        tiles = tile_table(jnp.append(group_sizes, rest), m, block_m, ROW_ALIGN)
        table = jnp.stack([tiles.group, tiles.start, tiles.skip, tiles.rows])
        used = jnp.sum(tiles.rows > 0, dtype=jnp.int32)[None]
        most_row_tiles = table.shape[1]
        if not block_scaled:
            x_scale = jnp.where(jnp.arange(m) < m - rest, x_scale, 0)  # may be NaN there
    else:
        table = used = None
        most_row_tiles = pl.cdiv(m, block_m)

    # TMA has no ragged boxes but at the end of an array, and only where 16 bytes divide each row. K and N that 128
    # and 8 do not divide cost a copy of the weights here. Scales and bias are read without bounds: a tile more of each.
    x = _pad(x, (-m % ROW_ALIGN, -k % BLOCK_K))
    w = _pad(w, (0, -n % ROW_ALIGN, -k % BLOCK_K))
    spare_n = padded_n - n
    x_scale = _pad(x_scale, (0, block_m) if block_scaled else (block_m,))
    if by_column:
        w_scale = _pad(w_scale, (int(grouped), 0, spare_n))
    elif block_scaled:
        w_scale = _pad(w_scale, (int(grouped), pl.cdiv(padded_n, 128) - w_scale.shape[1], 0))
    else:
        w_scale = _pad(w_scale, (int(grouped), spare_n))
    bias = None if bias is None else _pad(bias.astype(jnp.float32), (int(grouped), spare_n))

    def kernel(table, used, x, w, x_scale, w_scale, bias, out, x_smem, w_smem, out_smem, full, full_wave, empty):
        """`full[slot]`: w and the first wave of x came; `full_wave[slot]`: the others; `empty[slot]`: it was read."""
        warpgroup = lax.axis_index("warpgroup")

        def for_each_tile(do):
            """`step = do(group, start, skip, rows, column, steps, step)` of this block's tiles; `step` counts slots."""
            row_tiles = used[0] if grouped else most_row_tiles

            def tile(loop, carry):
                row_tile, column_tile = plgpu.planar_snake(loop.index[0], (row_tiles, column_tiles), 0, RASTER)
                if grouped:
                    group, start, skip, rows = (table[i, row_tile] for i in range(4))
                    start = pl.multiple_of(start, ROW_ALIGN)
                    steps = jnp.where(group < e, steps_of_k, 0)
                else:
                    start = row_tile * block_m
                    group, skip, rows, steps = 0, 0, jnp.minimum(m - start, block_m), steps_of_k
                column = (column_tile * tiling.cluster + lax.axis_index("pair")) * block_n
                return do(group, start, skip, rows, column, steps, carry)

            loop = plgpu.nd_loop((row_tiles * column_tiles,), collective_axes="block", init_carry=jnp.int32(0))
            return loop(tile)

        @pl.when(warpgroup == 2)
        def _memory():
            plgpu.set_max_registers(32, action="decrease")

            def load_tile(group, start, skip, rows, column, steps, step):
                def load(i, step):
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    at_k = pl.ds(i * BLOCK_K, BLOCK_K)
                    columns = w.at[group, pl.ds(column, block_n), at_k]
                    plgpu.copy_gmem_to_smem(columns, w_smem.at[slot], full.at[slot])
                    for wave in range(waves):
                        rows_of_wave = x.at[pl.ds(start + wave * WAVE, WAVE), at_k]
                        barrier = full if wave == 0 else full_wave
                        plgpu.copy_gmem_to_smem(
                            rows_of_wave, x_smem.at[slot, wave], barrier.at[slot], collective_axes=shared
                        )
                    return step + 1

                return lax.fori_loop(0, steps, load, step)

            step = for_each_tile(load_tile)

            @pl.loop(jnp.maximum(step - stages, 0), step)
            def _until_all_is_read(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            half = warpgroup * width  # this warpgroup's first column in a tile

            def compute_tile(group, start, skip, rows, column, steps, step):
                def load_factors(i):
                    """Block scales of a step, straight from global memory (L2). Read from a slot of the ring they
                    would need a fence before TMA may overwrite it (docs/kernels.md)."""
                    if not block_scaled:
                        return ()
                    waves_of_x = [pl.ds(start + wave * WAVE, WAVE) for wave in range(waves)]
                    x_factors = [_load(x_scale.at[i, rows_of_wave], ROW_OF_WGMMA) for rows_of_wave in waves_of_x]
                    if by_column:
                        w_factor = _load(w_scale.at[group, i, pl.ds(column + half, width)], COLUMN_OF_WGMMA)
                    else:
                        w_factor = w_scale[group, lax.div(column + half, 128), i]
                    return w_factor, *x_factors

                def multiply(i, carry):
                    step, totals, factors = carry
                    slot = lax.rem(step, stages)
                    # A step early: ptxas would have the tensor cores wait for them.
                    next_factors = load_factors(jnp.minimum(i + 1, steps_of_k - 1))
                    plgpu.barrier_wait(full.at[slot])
                    promoted = []
                    for wave in range(waves):
                        if wave > 0:
                            # A barrier of its own also keeps ptxas from starting this wave while the part before is
                            # still being added: two parts and the totals are more registers than there are.
                            plgpu.barrier_wait(full_wave.at[slot])

                        def mma(part, wave=wave, slot=slot):
                            plgpu.wgmma(part, x_smem.at[slot, wave], w_smem.at[slot].at[pl.ds(half, width)].T)
                            return part[...]  # waits for the tensor cores

                        part = pl.run_scoped(mma, plgpu.ACC((WAVE, width), jnp.float32))
                        if wave == waves - 1:
                            plgpu.barrier_arrive(empty.at[slot])
                        if block_scaled:
                            w_factor, *x_factors = factors
                            x_factor = x_factors[wave]
                            if by_column:
                                part = part * lax.broadcast_in_dim(w_factor, part.shape, [1])
                            else:
                                x_factor = x_factor * w_factor
                            part = part * lax.broadcast_in_dim(x_factor, part.shape, [0])
                        promoted.append(totals[wave] + part)
                    return step + 1, tuple(promoted), next_factors

                zeros = plgpu.layout_cast(jnp.zeros((WAVE, width), jnp.float32), plgpu.Layout.WGMMA)
                init = step, (zeros,) * waves, load_factors(0)
                step, totals, _ = lax.fori_loop(0, steps, multiply, init)

                for wave in range(waves):
                    # The rows [begin, end) of this wave are the group's.
                    begin = jnp.clip(skip - wave * WAVE, 0, WAVE)
                    end = jnp.clip(skip + rows - wave * WAVE, 0, WAVE)
                    store = _store_wave(totals[wave], wave, begin, end, group, start + wave * WAVE, column + half)
                    # Nothing to store: wait for the stores before, so that the two buffers stay in turn.
                    lax.cond(end > begin, store, lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
                return step

            def _store_wave(total, wave, begin, end, group, row, column):
                """Scales, bias and the way out of 64 rows: registers, shared memory (two panels in turn), TMA."""

                def store():
                    if not block_scaled:
                        row_factor = _load(x_scale.at[pl.ds(row, WAVE)], ROW_OF_WGMMA)
                    for i in range(panels):
                        y = total[:, i * panel : (i + 1) * panel]
                        columns = pl.ds(column + i * panel, panel)
                        if not block_scaled:
                            column_factor = _load(w_scale.at[group, columns], COLUMN_OF_WGMMA)
                            y = y * lax.broadcast_in_dim(row_factor, y.shape, [0])
                            y = y * lax.broadcast_in_dim(column_factor, y.shape, [1])
                        if bias is not None:
                            y = y + lax.broadcast_in_dim(_load(bias.at[group, columns], COLUMN_OF_WGMMA), y.shape, [1])
                        buffer = (wave * panels + i) % 2
                        one_buffer = waves * panels == 1
                        plgpu.wait_smem_to_gmem(0 if one_buffer else 1, wait_read_only=True)
                        out_smem[warpgroup, buffer] = y.astype(out.dtype)
                        plgpu.commit_smem()
                        # TMA boxes have static shapes: any number of rows is a sum of some of these.
                        at = begin
                        for length in (64, 32, 16, 8, 4, 2, 1):
                            take = (end - begin) & length

                            @pl.when(take != 0)
                            def _(at=at, length=length, columns=columns, buffer=buffer):
                                plgpu.copy_smem_to_gmem(
                                    out_smem.at[warpgroup, buffer].at[pl.ds(at, length)],
                                    out.at[pl.ds(row + at, length), columns],
                                    commit_group=False,
                                )

                            at = at + take
                        plgpu.commit_smem_to_gmem_group()

                return store

            for_each_tile(compute_tile)
            plgpu.wait_smem_to_gmem(0)

    shared = "pair" if tiling.cluster == 2 else None
    # A slot is free when the warpgroups of both blocks have read it: each block writes into both.
    empty = dict(num_arrivals=2, num_barriers=stages)
    swizzled = (plgpu.TilingTransform((ROW_ALIGN, BLOCK_K)), plgpu.SwizzleTransform(BLOCK_K))
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n + -n % OUT_ALIGN), out_dtype),
        grid=(min(programs // tiling.cluster, most_row_tiles * column_tiles),),
        grid_names=("block",),
        cluster=(tiling.cluster,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=plgpu.SMEM((stages, waves, WAVE, BLOCK_K), x.dtype, transforms=swizzled),
            w_smem=plgpu.SMEM((stages, block_n, BLOCK_K), w.dtype, transforms=swizzled),
            out_smem=plgpu.SMEM((2, 2, WAVE, panel), out_dtype, transforms=(plgpu.SwizzleTransform(128),)),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            full_wave=plgpu.Barrier(num_arrivals=max(waves - 1, 1), num_barriers=stages),
            empty=plgpu.ClusterBarrier(collective_axes=("pair",), **empty) if shared else plgpu.Barrier(**empty),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return run(table, used, x, w, x_scale, w_scale, bias)[:, :n]


def _load(ref, layout) -> Array:
    """Registers in the layout of an accumulator's rows or columns: each thread reads its own, a few lanes the same."""
    return plgpu.load(ref, layout=layout, optimized=False)


def _pad(x: Array, after: tuple[int, ...]) -> Array:
    """Zeros after the end of each dim."""
    return jnp.pad(x, [(0, count) for count in after]) if any(after) else x
