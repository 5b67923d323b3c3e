"""`GroupedLinear`: one matrix per expert, in 8 bits."""

import functools
from collections.abc import Callable
from typing import Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fp8x import numerics, ops
from fp8x.array import ScaledArray
from fp8x.errors import CalibrationError, ShapeError
from fp8x.nn.quantized import QuantizedLayer, initial_weight, names_layer, weight_scheme
from fp8x.nn.unquantized import UnquantizedGroupedLinear, features, once
from fp8x.ops.experts import Factor, gated_experts
from fp8x.ops.gate import Gate, gated
from fp8x.ops.gated import multiply_parts
from fp8x.ops.groups import check_group_sizes
from fp8x.recipe import Recipe, as_recipe
from fp8x.scheme import FLOAT32


class GroupedLinear(QuantizedLayer):
    """`y[r] = x[r] @ weight[expert of r].T + bias[expert of r]`, in 8 bits.

    Arguments:
        e: the number of experts.
        k: input features.
        n: output features; a tuple `(p, n)` makes p matrices an expert (gate and up), each with scales of its own,
            and outputs `[M, p, n]`.
        recipe: a `Recipe` or its code. The weight's scheme holds per expert, unless its block names three dims:
            `(None, None, None)` is one scale across all experts.
        use_bias: whether each expert adds a bias, of the recipe's output type.
        rngs: the stream `params` initializes the weight.

    Raises:
        ShapeError: sizes that the recipe's blocks do not fit (MX: `k` a multiple of 32).
    """

    def __init__(
        self, e: int, k: int, n: int | tuple[int, ...], *, recipe: Recipe | str, use_bias: bool = False, rngs: nnx.Rngs
    ):
        recipe = as_recipe(recipe)
        shape = (e, *features(n), k)
        self.rank = len(shape)
        bias = jnp.zeros(shape[:-1], recipe.out_dtype) if use_bias else None
        self.hold(initial_weight(rngs, shape, weight_scheme(recipe, len(shape))), recipe, bias)

    @classmethod
    def from_arrays(
        cls,
        weight: ScaledArray,
        recipe: Recipe | str,
        *,
        bias: Float[Array, "e ..."] | None = None,
        input_scale: Float[Array, "1 groups"] | None = None,
    ) -> Self:
        """A layer around a weight `[E, *n, K]` that is quantized already.

        Raises:
            RecipeError: the weight is stored in another way than the recipe says.
            ShapeError: arrays that do not fit each other.
        """
        if weight.ndim not in (3, 4) or (bias is not None and bias.shape != weight.shape[:-1]):
            raise ShapeError(
                f"weight {weight.shape} and bias {getattr(bias, 'shape', None)} do not fit; use [E, N, K] and [E, N], "
                "or [E, P, N, K] and [E, P, N]"
            )
        return cls._from_arrays(weight, as_recipe(recipe), weight.ndim, bias, input_scale)

    @classmethod
    def _from_arrays(cls, weight: ScaledArray, recipe: Recipe, rank: int, bias=None, input_scale=None) -> Self:
        """A layer, or a stack of them where the weight has more than `rank` dims."""
        e, *n, k = weight.shape[-rank:]
        layer = nnx.eval_shape(lambda: cls(e, k, tuple(n), recipe=recipe, rngs=nnx.Rngs(0)))
        layer.hold(weight, recipe, bias, input_scale)
        return layer

    @classmethod
    def from_unquantized(
        cls,
        source: UnquantizedGroupedLinear,
        recipe: Recipe | str,
        *,
        name: str = "weight",
        allow_nonfinite: bool = False,
    ) -> Self:
        """Quantizes an `UnquantizedGroupedLinear`, or a stack of them; `name` stands in errors.

        Raises:
            ShapeError: sizes that the recipe's blocks do not fit, or NaN or Inf in the weight.
        """
        recipe = as_recipe(recipe)
        scheme = weight_scheme(recipe, source.rank)
        check_grouped(source, recipe, name)
        weight = numerics.quantize_weight(source.weight[...], scheme, name=name, allow_nonfinite=allow_nonfinite)
        bias = None if source.bias is None else source.bias[...]
        layer = cls._from_arrays(weight, recipe, source.rank, bias)
        layer.keep_sharding(source.weight, source.bias)
        return layer

    @names_layer
    def __call__(
        self,
        x: Float[Array, "t k"] | Float[Array, "t 2 k"],
        group_sizes: Int[Array, " e"],
        rows: Int[Array, " m"] | None = None,
        gate: Gate | None = None,
    ) -> Float[Array, "m ..."]:
        """One product, of the recipe's output type; rows sorted by expert, rows past `sum(group_sizes)` come out zero.

        `rows` are the rows of `x` in that order; None where `x` is in it. `gate` makes `[T, 2, K]` what is multiplied:
        an activation's name or a `ClampedSwiGLU` (`fp8x.ops.grouped_matmul`). Where K is split over `k_axes`, float32
        of which the sum over these axes is the product: `MoE` weighs and adds up its experts' rows before it sums.

        Raises:
            ShapeError: `x` is not `[T, K]`, or group sizes that do not fit.
            CalibrationError: a static activation scale is not calibrated; see `check_calibrated`.
        """
        x, gate = self._check_input(x, gate)
        if rows is not None and not self._quantizes_in_any_order:
            x, rows = x[rows], None
        group_sizes = check_group_sizes(group_sizes, self.weight.shape[0], (x if rows is None else rows).shape[0])
        options = self._activation(x, group_sizes if rows is None else None)
        op = functools.partial(ops.grouped_matmul, group_sizes=group_sizes, rows=rows, gate=gate)
        return self._multiply(op, x, options)

    @names_layer
    def by_expert(
        self,
        x: Float[Array, "r k"] | Float[Array, "r 2 k"],
        experts: Int[Array, " r"],
        rows: Int[Array, " r"] | None = None,
        gate: Gate | None = None,
    ) -> Float[Array, "r ..."]:
        """`__call__` of a few rows in any order, each by the matrix of its expert; zero where that is not here.

        `rows` are the rows of `x` that meet the experts; None where each row meets one.

        Raises:
            ShapeError: `x` is not `[R, K]`, or not an expert for each row.
            CalibrationError: as `__call__`; or the layer is in calibration, which takes rows by group.
        """
        x, gate = self._check_input(x, gate)
        if self.is_calibrating:
            raise CalibrationError("layer: it is in calibration, which takes sorted rows; call it with group sizes")
        if rows is not None and not self._quantizes_in_any_order:
            x, rows = x[rows], None
        op = functools.partial(ops.expert_matmul, experts=experts, rows=rows, gate=gate)
        return self._multiply(op, x, self._activation(x))

    @names_layer
    def with_gate(
        self,
        w2: "GroupedLinear",
        x: Float[Array, "t k"],
        group_sizes: Int[Array, " e"],
        rows: Int[Array, " m"] | None,
        gate: Gate,
    ) -> Float[Array, "m n"]:
        """`w2(self(x, group_sizes, rows), group_sizes, gate=gate)`, with w2's input in 8 bits as it leaves this layer,
        unless w2 has to see it before."""
        x, _ = self._check_input(x, None)
        if w2.recipe.activation is None or w2.is_calibrating or w2.amax_axes or self.is_calibrating:
            return w2(self(x, group_sizes, rows), group_sizes, gate=gate)
        if rows is not None and not self._quantizes_in_any_order:
            x, rows = x[rows], None
        own, of_w2 = self._activation(x, group_sizes if rows is None else None), w2._activation(x)
        (w13, bias13), (w2, bias2) = self._factor(own), w2._factor(of_w2)
        return gated_experts(x, w13, w2, group_sizes, gate=gate, rows=rows, biases=(bias13, bias2))

    def _factor(self, activation: dict) -> tuple[Factor, Float[Array, "e ..."] | None]:
        """Weight and bias, as ops take them."""
        bias = None if self.bias is None else self.bias[...]
        if self.k_axes:
            return Factor(self.quantized_weight, **activation, out_dtype=FLOAT32), once(bias, self.k_axes)
        return Factor(self.quantized_weight, **activation, out_dtype=self.recipe.out_dtype), bias

    @property
    def _quantizes_in_any_order(self) -> bool:
        """Whether a row's codes depend on no other row, nor on how many there are."""
        if self.is_calibrating:
            return False
        return self.recipe.activation is None or self.recipe.is_static or self.recipe.activation.block[0] == 1

    def _check_input(self, x: Float[Array, "m ..."], gate: Gate | None) -> tuple[Float[Array, "m ..."], Gate | None]:
        """`x` and the gate that is still to be applied: none where magnitudes behind it are looked at before."""
        x = self.begin_call(x)
        k = self.weight.shape[-1]
        rows = (k,) if gate is None else (2, k)
        if x.shape[1:] != rows:
            takes = ", ".join(map(str, rows))
            raise ShapeError(f"x: shape is {x.shape}, but the layer takes [M, {takes}], rows sorted by expert")
        if gate is not None and (self.is_calibrating or self.amax_axes):
            return gated(x, gate), None
        return x, gate

    def _multiply(self, op: Callable, x: Float[Array, "t k"], activation: dict) -> Float[Array, "m ..."]:
        """`op` by each of the P matrices: by all at once, where their scales admit it."""
        factor, bias = self._factor(activation)

        def multiply(x, weight, bias):
            return op(x, weight, bias=bias, out_dtype=factor.out_dtype, **activation)

        return (multiply if factor.w.ndim == 3 else functools.partial(multiply_parts, multiply))(x, factor.w, bias)


def check_grouped(source: UnquantizedGroupedLinear, recipe: Recipe, name: str) -> None:
    """Raises what `GroupedLinear.from_unquantized` does, but for NaN and Inf."""
    weight_scheme(recipe, source.rank).check_shape(source.weight.shape[-source.rank :], name)
