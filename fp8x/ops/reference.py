"""The contract of every op, in plain jnp. Slow and obvious: all backends are tested against this."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp8x.array import ScaledArray
from fp8x.ops.groups import row_groups


def as_float32(x: Array | ScaledArray) -> Float[Array, "..."]:
    return x.dequantize(jnp.float32) if isinstance(x, ScaledArray) else x.astype(jnp.float32)


def matmul(
    x: Float[Array, "m k"] | ScaledArray, w: ScaledArray, bias: Float[Array, " n"] | None, out_dtype
) -> Float[Array, "m n"]:
    """`dequantize(x) @ dequantize(w).T` in float32, then bias, then one cast."""
    y = jnp.matmul(as_float32(x), as_float32(w).T, precision="highest")
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)


def grouped_matmul(
    x: Float[Array, "m k"] | ScaledArray,
    w: ScaledArray,
    group_sizes: Int[Array, " e"],
    bias: Float[Array, "e n"] | None,
    out_dtype,
) -> Float[Array, "m n"]:
    """`matmul` of each expert's rows by its own matrix; rows past `sum(group_sizes)` are zero."""
    x, w = as_float32(x), as_float32(w)
    group = row_groups(group_sizes, x.shape[0])[:, None]
    out = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    for e in range(w.shape[0]):
        y = jnp.matmul(x, w[e].T, precision="highest")
        out = jnp.where(group == e, y if bias is None else y + bias[e].astype(jnp.float32), out)
    return out.astype(out_dtype)


def expert_matmul(
    x: Float[Array, "r k"] | ScaledArray,
    w: ScaledArray,
    experts: Int[Array, " r"],
    bias: Float[Array, "e n"] | None,
    out_dtype,
) -> Float[Array, "r n"]:
    """`matmul` of row r by the matrix of `experts[r]`; rows of the expert E are zero."""
    x, w = as_float32(x), as_float32(w)
    y = jnp.einsum("rk,rnk->rn", x, jnp.take(w, experts, axis=0, mode="fill", fill_value=0), precision="highest")
    if bias is not None:
        y += jnp.take(bias.astype(jnp.float32), experts, axis=0, mode="fill", fill_value=0)
    return y.astype(out_dtype)
