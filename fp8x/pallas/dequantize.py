"""Eight-bit weights as the register operand of 16-bit wgmma: exact conversions, and powers of two from e8m0 bytes.

Hopper converts e4m3 and e5m2 to float16 alone, two values an instruction; bfloat16 is reached through float32. Those
are 2 instructions an element in SASS (`F2FP.UNPACK_B` for two, `HADD2.F32` for each, `F2FP.PACK_AB` for two), NaN and
Inf included. Shifting the bits into place and multiplying by 2^120 came out of the compiler as 5.5, and makes a number
of e4m3's NaN; `cvt.bf16x2.e4m3x2` needs a newer GPU.
"""

import jax.numpy as jnp
from jax import lax
from jax._src import config  # nothing public tells whether Pallas interprets
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

E8M0_NAN = 255


def load_as_16_bits(ref, dtype) -> Float[Array, "64 k"]:
    """64 rows of float8 in shared memory as bfloat16 or float16, in the layout of wgmma's register operand. Exact.

    Two bytes a load. Loads of four (`Layout.WGMMA_UPCAST_2X`) need a shuffle and a permutation for each, which is more
    instructions and no less traffic.
    """
    q = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
    return q.astype(jnp.float16) if dtype == jnp.float16 else q.astype(jnp.float32).astype(dtype)


def power_of_two(scale: Float[Array, " n"], dtype) -> Float[Array, " n"]:
    """An e8m0 scale in bfloat16 or float32, whose exponent is its byte, for Hopper can't convert it.

    2^-127, byte 0, is subnormal: a mantissa of 1/2. Byte 255 is NaN.
    """
    mantissa = {jnp.dtype(jnp.bfloat16): 7, jnp.dtype(jnp.float32): 23}[jnp.dtype(dtype)]
    byte = lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
    bits = jnp.maximum(byte << mantissa, 1 << (mantissa - 1))
    bits = jnp.where(byte == E8M0_NAN, bits | (1 << (mantissa - 1)), bits)
    if mantissa == 7:
        bits = bits.astype(jnp.int16)
    return lax.bitcast_convert_type(bits, dtype)


def scale_columns(a: Float[Array, "64 k"], factors: list[Float[Array, "64"]]) -> Float[Array, "64 k"]:
    """Each equal share of the columns times its own factor a row."""
    width = a.shape[1] // len(factors)
    shares = [a[:, i * width : (i + 1) * width] for i in range(len(factors))]
    return jnp.concatenate(
        [share * lax.broadcast_in_dim(factor, share.shape, [0]) for share, factor in zip(shares, factors)], axis=1
    )


def interpreted() -> bool:
    """Whether kernels that are traced now run in Pallas' interpreter, whose wgmma has no operand in registers."""
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def wgmma_registers(acc, a: Float[Array, "64 k"], b, memory) -> None:
    """`plgpu.wgmma` with its left operand in registers; by way of `memory`, a ref, in the interpreter."""
    if memory is None:
        plgpu.wgmma(acc, a, b)
    else:
        memory = memory.at[:, pl.ds(0, a.shape[1])]
        memory[...] = a
        plgpu.commit_smem()
        plgpu.wgmma(acc, memory, b)
