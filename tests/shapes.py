"""The one generator of shapes: what the tests of every backend, and benchmarks of odd shapes, multiply."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import fp8x
from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.scheme import Scheme

# Compiled: one compilation a shape, where eager execution has a dozen.
quantize = jax.jit(fp8x.quantize, static_argnames="scheme")
quantize_with_scale = jax.jit(numerics.quantize_with_scale, static_argnames="scheme")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows by group, and features. A dense product is a grouped one with one group.

    Attributes:
        group_sizes: rows of each expert.
        n, k: output and input features.
        spare: rows of x past the groups; `operands` fills them with NaN.
    """

    group_sizes: tuple[int, ...]
    n: int
    k: int
    spare: int = 0

    @property
    def m(self) -> int:
        return sum(self.group_sizes) + self.spare

    def __str__(self) -> str:
        spare = f"+{self.spare}" if self.spare else ""
        return f"m{'_'.join(map(str, self.group_sizes))}{spare}-n{self.n}-k{self.k}"


@dataclasses.dataclass(frozen=True)
class Operands:
    """`x [M, K]`, `w [E, N, K]`, `group_sizes [E]`, `bias [E, N]`."""

    x: Array
    w: ScaledArray
    group_sizes: Array
    bias: Array


# Around the 64 rows of a wgmma tile, and none. N and K that 128 does not divide, and N that 8 does not.
DENSE = (
    Shape((0,), 128, 128),
    Shape((1,), 256, 256),
    Shape((63,), 72, 160),
    Shape((64,), 128, 96),
    Shape((65,), 200, 200),
    Shape((130,), 33, 416),
)

GROUPED = (
    Shape((0, 0, 0, 0), 128, 128),
    Shape((1, 63, 64, 65), 128, 256),
    Shape((0, 5, 0, 0, 200, 0, 3, 0), 72, 160),  # empty experts, at both ends too
    Shape((0, 0, 300, 0), 200, 96),  # one hot expert, on several tiles
    Shape((1, 0, 2, 1), 96, 200),  # a decoding step
    Shape((129,), 33, 128),  # a single expert
    Shape((3, 0, 64, 20), 128, 160, spare=40),  # rows past the groups
    Shape((0, 0), 64, 128, spare=7),  # nothing but such rows
)


def fits(shape: Shape, *schemes: Scheme | None) -> bool:
    """Whether all schemes can store rows of K: MX blocks may not be ragged."""
    return not any(scheme is not None and scheme.is_mx and shape.k % scheme.block[-1] for scheme in schemes)


def quantized_zeros(shape: tuple[int, ...], scheme: Scheme) -> ScaledArray:
    """Zeros of numpy: for what a test module holds, since collecting tests touches no device and compiles nothing."""
    scale = np.ones(scheme.scale_shape(shape), scheme.scale_dtype)
    return ScaledArray(np.zeros(shape, scheme.dtype), scale, scheme)


def operands(shape: Shape, w: Scheme, *, dtype=jnp.bfloat16, seed: int = 0) -> Operands:
    """Random operands of a shape; columns of x and experts of w differ in magnitude, so that scales matter."""
    rng = np.random.default_rng(seed)
    e, n, k = len(shape.group_sizes), shape.n, shape.k
    x = rng.normal(size=(shape.m, k)) * np.exp(rng.normal(size=k))
    x[shape.m - shape.spare :] = np.nan
    weight = rng.normal(size=(e, n, k)) * k**-0.5 * np.exp(rng.normal(size=(e, 1, 1)))
    return Operands(
        x=jnp.asarray(x, dtype),
        w=quantize(jnp.asarray(weight, jnp.float32), w),
        group_sizes=jnp.asarray(shape.group_sizes, jnp.int32),
        bias=jnp.asarray(rng.normal(size=(e, n)), dtype),
    )
