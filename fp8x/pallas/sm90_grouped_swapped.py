"""Grouped GEMM for Hopper with swapped operands: `x [M, K] × w [E, N, K] -> [M, N]`, 8-bit weights on the 64-row side.

For a reader who knows CUDA; sm90_grouped_fp8.py says what Pallas calls a thread, a ref and a barrier.

A wgmma has 64 rows on its left side and 8 to 256 columns on its right. Here rows of `w` are its rows and tokens its
columns: a few tokens waste nothing, and the left operand may come from registers, so 8-bit weights can be converted
to 16 bits on their way from shared memory. A block has two compute warpgroups, each with one or two waves of 64 rows
of `w` by `tokens` tokens, and a memory warpgroup that fills a ring of slots with 128 of K each by TMA.

What is done with 128 of K follows from the types that come in; one of the three is compiled:
- `x` in 16 bits, a scale a row of `w` or one e8m0 byte for 32 of K (bfloat16 only): the weights are converted
  exactly, times 2^k where there is one, and added up by wgmma itself, which has float32 for 16-bit products. While
  the tensor cores multiply one warpgroup's, the other converts.
- `x` in 16 bits, other scales: each `depth` of K (128 for float32 scales, 32 for e8m0 with float16, where 2^k may not
  fit) go to a fresh accumulator, `part`, and `total += part * scale` in float32.
- `x` in 8 bits: both operands straight from shared memory, a fresh accumulator for 128 of K, whose sum in the tensor
  cores is shorter than float32 (sm90_grouped_fp8.py), with row factors or block scales as there.

Decode reads each active expert's weights once; that is its floor. 4.8 TB/s times an assumed 700 ns of latency are
3.4 MB in flight (Little's law), 25 kB an SM. The ring asks for 130 kB of weights and more ahead, so memory is never
idle as long as slots are consumed faster than they come (docs/performance.md counts both).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from fp8x.pallas import tuning
from fp8x.pallas.dequantize import interpreted, load_as_16_bits, power_of_two, scale_columns, wgmma_registers
from fp8x.pallas.epilogue import COLUMN_OF_WGMMA, ROW_OF_WGMMA, load, send
from fp8x.pallas.sm90 import BLOCK_K, ROW_ALIGN, SMS, WAVE, group_tiles, pad, zero_of_loop
from fp8x.pallas.swapped_tiling import Tiling, estimates, out_buffers, slots

MX_BLOCK = 32  # elements of K that share an e8m0 byte
RASTER = 16  # token tiles side by side in the order of tiles


def grouped_swapped(
    x: Float[Array, "m k"],
    w: Float[Array, "e n k"],
    x_scale: Float[Array, "m"] | Float[Array, "1"] | Float[Array, "k/128 m"] | None,
    w_scale: Float[Array, "e n"]
    | Float[Array, "e 1"]
    | Float[Array, "e n/128 k/128"]
    | Float[Array, "e n k/128"]
    | Float[Array, "e n k/32"],
    bias: Float[Array, "e n"] | None,
    group_sizes: Int[Array, " e"] | None,
    *,
    experts: Int[Array, " m"] | None = None,
    out_dtype,
    tiling: Tiling | None = None,
    programs: int = SMS,
) -> Float[Array, "m n"]:
    """Each group's rows of `x` by its own matrix of `w`, times scales, plus bias; rows past the groups are zero.

    Arguments:
        x: bfloat16 or float16, without scales; or float8.
        w: float8_e4m3fn or float8_e5m2.
        x_scale: of a float8 `x`, float32: of rows, or one; or of 128 of K of each, where w_scale has some along K.
        w_scale: float32: of rows, or one a matrix, or of blocks of 128×128 or 1×128; or, with a 16-bit `x`,
            float8_e8m0fnu of 1×32.
        bias: any float type.
        group_sizes: int32; None means that there is one group and it has all rows, which needs no table.
        experts: int32, instead of group_sizes: the matrix of each row; of E and above none, and the row is zero.
        out_dtype: bfloat16, float16 or float32.
        tiling: None chooses one.
        programs: blocks in the grid, at most one an SM.
    """
    (m, k), (e, n, _) = x.shape, w.shape
    if m == 0 or n == 0:
        return jnp.zeros((m, n), out_dtype)
    is_16_bit, is_mx = x.dtype.itemsize == 2, w_scale.dtype == jnp.float8_e8m0fnu
    scaled_along_k = w_scale.ndim == 3
    scaled_by_row = w_scale.shape[1] == n
    in_place = is_16_bit and (x.dtype == jnp.bfloat16 if is_mx else not scaled_along_k)
    # 192 in place: 256 was no faster on an H200 and fits fewer groups. Elsewhere, with more, 256 rows would spill.
    widest = 192 if in_place else 120 if is_16_bit and not scaled_by_row else 64
    if tiling is None:
        name = "sm90_fp8_decode" if not is_16_bit else "sm90_mx" if is_mx else "sm90_w8a16"
        name += ("" if in_place else "_promoted") + ("" if experts is None else "_by_expert")
        # Two waves of sums in place: ptxas would wait for each wgmma, since the other's operand is written (C7513).
        waves = (1,) if in_place else (1, 2)
        choices = estimates(
            m, n, k, e, x_bytes=x.dtype.itemsize, widest=widest, waves=waves, by_expert=experts is not None
        )
        tiling = tuning.choose(tuning.Problem(name, m, n, k, e), choices)
    tokens, waves, splits = tiling.tokens, tiling.rows // (2 * WAVE), tiling.splits
    depth = MX_BLOCK if is_mx and not in_place else BLOCK_K  # of K, from one promotion to the next
    block_k = min(2 * depth, BLOCK_K)  # in a slot
    scales_of_step = block_k // (MX_BLOCK if is_mx else BLOCK_K)
    out_type = jnp.dtype(jnp.float32 if splits > 1 else out_dtype)
    steps_of_k, column_tiles = pl.cdiv(k, block_k), pl.cdiv(n, tiling.rows)
    steps_of_split = pl.cdiv(steps_of_k, splits)

    grouped = group_sizes is not None
    if grouped:
        _, _, table, used = group_tiles(group_sizes, m, tokens)
        most_row_tiles = table.shape[1]
    else:
        table, used = experts, None
        most_row_tiles = m if experts is not None else pl.cdiv(m, tokens)

    # TMA clips boxes at the end of an array, in whole tiles of the swizzle, which may be narrower than a slot. Rows of
    # x that 8, K that 32 and N that 8 do not divide cost a copy here; so do scales and bias, which are read without
    # bounds, of N that 64 does not divide.
    x = pad(x, (-m % ROW_ALIGN, -k % 32))
    w = pad(w, (0, -n % ROW_ALIGN, -k % 32))
    padded_n = n + -n % WAVE
    if scaled_by_row:
        w_scale = pad(w_scale, (0, padded_n - n, 0)[: w_scale.ndim])
    if x_scale is not None and x_scale.shape != (1,):
        # Rows of an even length: they are loaded in pairs, which a GPU wants at multiples of 8 bytes.
        x_scale = pad(x_scale, (0,) * (x_scale.ndim - 1) + (tokens + m % 2,))
    bias = None if bias is None else pad(bias.astype(jnp.float32), (0, padded_n - n))

    panel, buffers = out_buffers(tiling, out_type.itemsize)
    panels = tokens // panel
    stages = tiling.stages or slots(tiling, block_k, x.dtype.itemsize, out_type.itemsize)

    def kernel(table, used, x, w, x_scale, w_scale, bias, out, x_smem, w_smem, out_smem, full, empty, a_smem):
        """`full[slot]`: both operands came; `empty[slot]`: both compute warpgroups have read them."""
        warpgroup = lax.axis_index("warpgroup")

        def for_each_tile(do):
            """`step = do(group, start, skip, rows, column, split, steps, step)` of this block's tiles: `rows` tokens
            from `start + skip`, the rows of w from `column`; `step` counts slots."""
            row_tiles = used[0] if grouped else most_row_tiles

            def tile(loop, carry):
                index, split = lax.div(loop.index[0], splits), lax.rem(loop.index[0], splits)
                row_tile, column_tile = plgpu.planar_snake(index, (row_tiles, column_tiles), 0, RASTER)
                steps = jnp.minimum(steps_of_k - split * steps_of_split, steps_of_split)
                if grouped:
                    group, start, skip, rows = (table[i, row_tile] for i in range(4))
                    steps = jnp.where(group < e, steps, 0)
                elif experts is not None:
                    group, skip, rows = table[row_tile], lax.rem(row_tile, ROW_ALIGN), 1
                    start = row_tile - skip
                    steps = jnp.where(group < e, steps, 0)
                else:
                    start = row_tile * tokens
                    group, skip, rows = 0, 0, jnp.minimum(m - start, tokens)
                start = pl.multiple_of(start, ROW_ALIGN)
                return do(group, start, skip, rows, column_tile * tiling.rows, split, steps, carry)

            tasks = row_tiles * column_tiles * splits
            return plgpu.nd_loop((tasks,), collective_axes="block", init_carry=jnp.int32(0))(tile)

        @pl.when(warpgroup == 2)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")

            def prefetch_scales(group, column, split):
                """Into L2, for who loads them a step early would wait for memory at every eighth step."""
                of_split = steps_of_split * scales_of_step
                for i in range(0, of_split, 256):  # the longest box; and a row of one has whole 16 bytes
                    width = min(of_split - i + -(of_split - i) % 16, 256)
                    own = w_scale.at[group, pl.ds(column, tiling.rows), pl.ds(split * of_split + i, width)]
                    plgpu.async_prefetch(own)

            def load_tile(group, start, skip, rows, column, split, steps, step):
                if is_mx and w_scale.shape[2] % 16 == 0:
                    pl.when(steps > 0)(lambda: prefetch_scales(group, column, split))

                def fill(i, step):
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    at_k = pl.ds((split * steps_of_split + i) * block_k, block_k)
                    weights = w.at[group, pl.ds(column, tiling.rows), at_k]
                    plgpu.copy_gmem_to_smem(weights, w_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(start, tokens), at_k], x_smem.at[slot], full.at[slot])
                    return step + 1

                return lax.fori_loop(0, steps, fill, step)

            step = for_each_tile(load_tile)

            @pl.loop(jnp.maximum(step - stages, 0), step)
            def _until_all_is_read(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            spare = None if a_smem is None else a_smem.at[warpgroup]
            own_rows = [(warpgroup * waves + wave) * WAVE for wave in range(waves)]  # in a tile

            def release(step):
                plgpu.commit_smem()  # plain loads, before TMA writes there (docs/kernels.md)
                plgpu.barrier_arrive(empty.at[lax.rem(step, stages)])

            def compute_tile(group, start, skip, rows, column, split, steps, step):
                at_tokens = pl.ds(start, tokens)
                last_group = jnp.minimum(group, e - 1)  # of the rows past the groups: read, not used

                def rows_of(wave):
                    # Waves past the last row read other rows' scales; what becomes of them is clipped.
                    return jnp.minimum(column + own_rows[wave], padded_n - WAVE)

                def load_scales(i, wave):
                    """What is multiplied with at step `i`, straight from global memory (L2): of each row, for 32 of K
                    or all, or one of all rows; and of the tokens."""
                    i = jnp.clip(split * steps_of_split + jnp.minimum(i, steps - 1), 0, steps_of_k - 1)
                    if not scaled_along_k:
                        return ()
                    if scaled_by_row:
                        own = w_scale.at[last_group, pl.ds(rows_of(wave), WAVE)]
                        # Past the end of K weights are zero, and any scale will do.
                        at_k = [
                            jnp.minimum(i * scales_of_step + j, w_scale.shape[2] - 1) for j in range(scales_of_step)
                        ]
                        scales = tuple(load(own.at[:, at], ROW_OF_WGMMA) for at in at_k)
                    else:
                        scales = (w_scale[last_group, lax.div(rows_of(wave), 128), i],)
                    return scales if is_16_bit else (*scales, load(x_scale.at[i, at_tokens], COLUMN_OF_WGMMA))

                def scaled(part, scales, j):
                    """`part` times what `load_scales` found for its share `j` of a step."""
                    if not scaled_along_k:
                        return part
                    of_w, *of_x = scales[j : j + 1 if is_16_bit else None]
                    if is_mx:
                        of_w = power_of_two(of_w, jnp.float32)
                    if scaled_by_row:
                        part = part * lax.broadcast_in_dim(of_w, part.shape, [0])
                    elif is_16_bit:
                        part = part * of_w
                    else:  # numbers first: a multiplication less of each element
                        of_x = [of_x[0] * of_w]
                    return part * lax.broadcast_in_dim(of_x[0], part.shape, [1]) if of_x else part

                def first_scales():
                    return tuple(load_scales(0, wave) for wave in range(waves))

                def add_in_place(step):
                    def multiply_all(*totals):
                        def multiply(i, carry):
                            step, scales = carry
                            slot = lax.rem(step, stages)
                            next_scales = []
                            plgpu.barrier_wait(full.at[slot])
                            for wave, (total, own_scales) in enumerate(zip(totals, scales)):
                                # Tensor cores read `a` from its registers: this wave's step before has to be done.
                                plgpu.wgmma_wait(waves - 1)
                                if wave == waves - 1:
                                    pl.when(i > 0)(lambda step=step: release(step - 1))
                                a = load_as_16_bits(w_smem.at[slot, pl.ds(own_rows[wave], WAVE)], x.dtype)
                                if is_mx:
                                    a = scale_columns(a, [power_of_two(scale, x.dtype) for scale in own_scales])
                                next_scales.append(load_scales(i + 1, wave))  # a step early, for they take time
                                wgmma_registers(total, a, x_smem.at[slot].T, spare)
                            return step + 1, tuple(next_scales)

                        step_after, _ = lax.fori_loop(0, steps, multiply, (step, first_scales()))
                        plgpu.wgmma_wait(0)
                        pl.when(steps > 0)(lambda: release(step_after - 1))
                        return step_after, tuple(total[...] for total in totals)

                    return pl.run_scoped(multiply_all, *[plgpu.ACC((WAVE, tokens), jnp.float32)] * waves)

                def promote(step):
                    def multiply(i, carry):
                        step, totals, scales = carry
                        slot = lax.rem(step, stages)
                        next_scales = []
                        plgpu.barrier_wait(full.at[slot])
                        promoted = []
                        for wave, (total, own_scales) in enumerate(zip(totals, scales)):
                            next_scales.append(load_scales(i + 1, wave))
                            weights = w_smem.at[slot, pl.ds(own_rows[wave], WAVE)]
                            a = load_as_16_bits(weights, x.dtype) if is_16_bit else weights
                            for j in range(block_k // depth):
                                at_k = slice(j * depth, (j + 1) * depth)

                                def mma(part, a=a, at_k=at_k, slot=slot):
                                    b = x_smem.at[slot, :, at_k].T
                                    if is_16_bit:
                                        wgmma_registers(part, a[:, at_k], b, spare)
                                    else:
                                        plgpu.wgmma(part, a, b)
                                    return part[...]  # waits for the tensor cores

                                part = pl.run_scoped(mma, plgpu.ACC((WAVE, tokens), jnp.float32))
                                total = total + scaled(part, own_scales, j)
                            promoted.append(total)
                        release(step + zero_of_loop())
                        return step + 1, tuple(promoted), tuple(next_scales)

                    zeros = plgpu.layout_cast(jnp.zeros((WAVE, tokens), jnp.float32), plgpu.Layout.WGMMA)
                    step, totals, _ = lax.fori_loop(0, steps, multiply, (step, (zeros,) * waves, first_scales()))
                    return step, totals

                step, totals = (add_in_place if in_place else promote)(step)

                for wave, total in enumerate(totals):
                    rows_of_w = pl.ds(rows_of(wave), WAVE)
                    for i in range(panels):
                        # The tokens [begin, end) of this panel are the group's.
                        begin = jnp.clip(skip - i * panel, 0, panel)
                        end = jnp.clip(skip + rows - i * panel, 0, panel)

                        def finish(y, i=i, rows_of_w=rows_of_w):
                            if not scaled_along_k and scaled_by_row:
                                factor = load(w_scale.at[last_group, rows_of_w], ROW_OF_WGMMA)
                                y = y * lax.broadcast_in_dim(factor, y.shape, [0])
                            elif not scaled_along_k:
                                y = y * w_scale[last_group, 0]
                            if x_scale is not None and x_scale.shape == (1,):
                                y = y * x_scale[0]
                            elif x_scale is not None and not scaled_along_k:
                                factor = load(x_scale.at[pl.ds(start + i * panel, panel)], COLUMN_OF_WGMMA)
                                y = y * lax.broadcast_in_dim(factor, y.shape, [1])
                            if bias is None:
                                return y

                            def add_bias():
                                b = load(bias.at[last_group, rows_of_w], ROW_OF_WGMMA)
                                return y + lax.broadcast_in_dim(b, y.shape, [0])

                            return add_bias() if splits == 1 else lax.cond(split == 0, add_bias, lambda: y)

                        def store(wave=wave, i=i, total=total, begin=begin, end=end, finish=finish):
                            y = total[:, i * panel : (i + 1) * panel]
                            y = finish(y) if table is None else lax.cond(group < e, finish, lambda y: y, y)
                            buffer = out_smem.at[warpgroup, (wave * panels + i) % buffers]
                            plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
                            y = plgpu.layout_cast(y, plgpu.Layout.WGMMA).astype(out.dtype)
                            y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                            _store(buffer.T, y)
                            send(buffer, out.at[split], begin, end, start + i * panel, column + own_rows[wave])

                        # Nothing to store: wait for the stores before, so that the buffers stay in turn. Past the last
                        # column nobody may store: a row of float32 goes out without TMA's clipping.
                        is_used = (end > begin) & (column + own_rows[wave] < padded_n)
                        lax.cond(is_used, store, lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
                return step

            for_each_tile(compute_tile)
            plgpu.wait_smem_to_gmem(0)

    def swizzled(operand, width):
        width = math.gcd(width * operand.dtype.itemsize, operand.shape[-1] * operand.dtype.itemsize, 128)
        return plgpu.TilingTransform((ROW_ALIGN, width // operand.dtype.itemsize)), plgpu.SwizzleTransform(width)

    # Eight tokens of a store share four banks but for the swizzle, which is as wide as rows of 16 bits are here.
    out_transforms = (plgpu.SwizzleTransform(128),) if out_type.itemsize == 2 else ()
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits, m, padded_n), out_type),
        grid=(min(programs, most_row_tiles * column_tiles * splits),),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=plgpu.SMEM((stages, tokens, block_k), x.dtype, transforms=swizzled(x, depth)),
            w_smem=plgpu.SMEM((stages, tiling.rows, block_k), w.dtype, transforms=swizzled(w, block_k)),
            out_smem=plgpu.SMEM((2, buffers, panel, WAVE), out_type, transforms=out_transforms),
            a_smem=plgpu.SMEM((2, WAVE, block_k), x.dtype) if is_16_bit and interpreted() else None,
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    y = run(table, used, x, w, x_scale, w_scale, bias)[:, :, :n]
    return y[0] if splits == 1 else jnp.sum(y, axis=0).astype(out_dtype)


def _store(ref, y) -> None:
    """From jax 0.12 on a plain store refuses rows of 32 bits that are not swizzled; before, it had no other form."""
    if hasattr(plgpu, "store") and y.dtype == jnp.float32:
        plgpu.store(ref, y, optimized=False)
    else:
        ref[...] = y
