"""The 16/32-bit layers that a mixture of experts is built from before it is quantized; trainable."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fp8x.array import as_input
from fp8x.errors import ShapeError
from fp8x.ops.gate import Gate, apply_gate, check_gate, gated
from fp8x.ops.groups import check_group_sizes, row_groups
from fp8x.ops.xla import ragged_dot


def features(n: int | tuple[int, ...]) -> tuple[int, ...]:
    """Output features as a tuple: `n`, or several axes of them as `(2, n)` for gate and up side by side."""
    return n if isinstance(n, tuple) else (n,)


class UnquantizedGroupedLinear(nnx.Module):
    """One matrix per expert: `y[r] = x[r] @ weight[expert of r].T + bias[expert of r]`.

    Arguments:
        e: the number of experts.
        k: input features.
        n: output features; a tuple `(p, n)` makes p matrices an expert and outputs `[M, p, n]`.
        use_bias: whether each expert adds a bias.
        dtype: computation type; None takes the weight's.
        param_dtype: the weights' type.
        rngs: the stream `params` initializes: normal of variance 1/k, cut off at two standard deviations.

    Attributes:
        weight: `nnx.Param`, `[E, *n, K]`, K-major as Hugging Face stores matrices.
        bias: `nnx.Param`, `[E, *n]`, or None.
        rank: how many dims the weight of one layer has; a stack of layers, as `nnx.vmap` makes them, has more.
        k_axes: mesh axes over which K is split, where the layer is one device's part of another. It returns float32
            then, of which the sum over these axes is the product.
    """

    k_axes: tuple[str, ...] = ()

    def __init__(
        self,
        e: int,
        k: int,
        n: int | tuple[int, ...],
        *,
        use_bias: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (e, *features(n), k)
        self.rank = len(shape)
        init = jax.nn.initializers.truncated_normal(stddev=math.sqrt(1.0 / k))
        self.weight = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape[:-1], param_dtype)) if use_bias else None
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "t k"] | Float[Array, "t 2 k"],
        group_sizes: Int[Array, " e"],
        rows: Int[Array, " m"] | None = None,
        gate: Gate | None = None,
    ) -> Float[Array, "m ..."]:
        """Rows sorted by expert, or `rows` of `x` in that order; rows past `sum(group_sizes)` come out zero.

        `gate` makes `[T, 2, K]` what is multiplied: an activation's name or a `fp8x.ops.ClampedSwiGLU`.
        """
        weight = self.weight[...]
        dtype = self.dtype or weight.dtype
        x = as_input(x)
        x = x if gate is None else gated(x, gate)
        if x.ndim != 2 or x.shape[1] != weight.shape[-1]:
            raise ShapeError(f"x: shape is {x.shape}, but the layer takes [M, {weight.shape[-1]}]")
        x = x if rows is None else x[rows]
        group_sizes = check_group_sizes(group_sizes, weight.shape[0], x.shape[0])
        flat = weight.reshape(weight.shape[0], -1, weight.shape[-1])
        out_dtype = jnp.dtype(jnp.float32 if self.k_axes else dtype)
        y = ragged_dot(x.astype(dtype), flat.astype(dtype), group_sizes, out_dtype).reshape(-1, *weight.shape[1:-1])
        if self.bias is not None:
            group, bias = row_groups(group_sizes, x.shape[0]), once(self.bias[...].astype(out_dtype), self.k_axes)
            y += jnp.take(bias, group, axis=0, mode="fill", fill_value=0)
        return y


def once(bias: Float[Array, "..."] | None, axes: tuple[str, ...]) -> Float[Array, "..."] | None:
    """The bias on the first device along `axes` and zero on the others, so that their sum has it once."""
    return bias if bias is None or not axes else jnp.where(jax.lax.axis_index(axes) == 0, bias, 0)


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`: one expert as plain linears, for shared experts and dense layers.

    Attributes:
        gate_proj, up_proj: `nnx.Linear`, hidden -> intermediate.
        down_proj: `nnx.Linear`, intermediate -> hidden.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        activation: Gate = "silu",
        use_bias: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = nnx.Linear(hidden, intermediate, **options)
        self.up_proj = nnx.Linear(hidden, intermediate, **options)
        self.down_proj = nnx.Linear(intermediate, hidden, **options)
        self.activation = check_gate(activation)

    def __call__(self, x: Float[Array, "... h"]) -> Float[Array, "... h"]:
        return self.down_proj(apply_gate(self.gate_proj(x), self.up_proj(x), self.activation))
