"""`Linear`: `nnx.Linear` in 8 bits; and with a LoRA adapter beside it."""

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fp8x import numerics, ops
from fp8x.array import ScaledArray
from fp8x.errors import ShapeError
from fp8x.nn.quantized import QuantizedLayer, initial_weight, names_layer, place
from fp8x.recipe import Recipe, as_recipe


class Linear(QuantizedLayer):
    """`y = x @ weight.T + bias`, weights (and, if the recipe says so, activations) in 8 bits.

    Arguments:
        k: input features.
        n: output features.
        recipe: a `Recipe` or its code.
        use_bias: whether a bias is added, of the recipe's output type.
        rngs: the stream `params` initializes the weight.

    Raises:
        ShapeError: sizes that the recipe's blocks do not fit (MX: `k` a multiple of 32).
    """

    def __init__(self, k: int, n: int, *, recipe: Recipe | str, use_bias: bool = True, rngs: nnx.Rngs):
        recipe = as_recipe(recipe)
        bias = jnp.zeros((n,), recipe.out_dtype) if use_bias else None
        self.hold(initial_weight(rngs, (n, k), recipe.weight), recipe, bias)

    @classmethod
    def from_arrays(
        cls,
        weight: ScaledArray,
        recipe: Recipe | str,
        *,
        bias: Float[Array, "... n"] | None = None,
        input_scale: Float[Array, "... 1 groups"] | None = None,
    ) -> Self:
        """A layer around a weight `[N, K]` that is quantized already, or a stack of layers around one `[..., N, K]`.

        Raises:
            RecipeError: the weight is stored in another way than the recipe says.
            ShapeError: arrays that do not fit each other.
        """
        if weight.ndim < 2 or (bias is not None and bias.shape != weight.shape[:-1]):
            raise ShapeError(
                f"weight {weight.shape} and bias {getattr(bias, 'shape', None)} do not fit; use [N, K] and [N], or a "
                "stack of both along leading axes"
            )
        n, k = weight.shape[-2:]
        layer = nnx.eval_shape(lambda: cls(k, n, recipe=recipe, use_bias=False, rngs=nnx.Rngs(0)))
        layer.hold(weight, as_recipe(recipe), bias, input_scale)
        return layer

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, recipe: Recipe | str, *, name: str = "kernel", allow_nonfinite: bool = False
    ) -> Self:
        """Quantizes an `nnx.Linear`, or a stack of them; its kernel `[..., K, N]` is transposed once.

        `name` stands in errors.

        Raises:
            ShapeError: sizes that the recipe's blocks do not fit, a kernel of another shape, or NaN or Inf in it.
        """
        recipe = as_recipe(recipe)
        check_linear(linear, recipe, name)
        options = dict(name=name, allow_nonfinite=allow_nonfinite, to_weight=jnp.matrix_transpose)
        weight = numerics.quantize_weight(linear.kernel[...], recipe.weight, **options)
        bias = None if linear.bias is None else linear.bias[...]
        layer = cls.from_arrays(weight, recipe, bias=bias)
        *lead, k, n = [[dim] for dim in range(linear.kernel.ndim)]
        layer.keep_sharding(linear.kernel, linear.bias, [*lead, n, k])
        return layer

    def source_matrix(self) -> Float[Array, "... k n"]:
        return super().source_matrix().mT

    @names_layer
    def __call__(self, x: Float[Array, "... k"], out_sharding=None) -> Float[Array, "... n"]:
        """One product, of the recipe's output type, whatever the batch.

        Raises:
            ShapeError: `x`'s last dim is not K, or the layer is a stack.
            CalibrationError: a static activation scale is not calibrated; see `check_calibrated`.
        """
        x = self.begin_call(x)
        k = self.weight.shape[-1]
        if x.shape[-1:] != (k,):
            raise ShapeError(f"x: shape is {x.shape}, but the layer takes [..., {k}]")
        bias = None if self.bias is None else self.bias[...]
        y = ops.matmul(
            x,
            self.quantized_weight,
            bias=None if self.k_axes else bias,
            out_dtype=jnp.float32 if self.k_axes else self.recipe.out_dtype,
            **self._activation(x),
        )
        if self.k_axes:
            # In float32, as the op accumulates: then bias, then one cast.
            y = jax.lax.psum(y, self.k_axes)
            y = y if bias is None else y + bias.astype(jnp.float32)
            y = numerics.rounded(y.astype(self.recipe.out_dtype))
        return place(y, out_sharding)


def check_linear(linear: nnx.Linear, recipe: Recipe, name: str) -> None:
    """Raises what `Linear.from_linear` does, but for NaN and Inf."""
    shape = linear.kernel.shape if linear.kernel.ndim == 2 else (linear.in_features, linear.out_features)
    if linear.kernel.ndim < 2 or linear.kernel.shape[-2:] != shape:
        raise ShapeError(
            f"{name}: shape is {linear.kernel.shape}; use a kernel {shape}, or a stack of these along leading axes"
        )
    recipe.weight.check_shape(shape[::-1], name)


class LoRALinear(Linear):
    """`nnx.LoRALinear` with its base in 8 bits: `y = base(x) + lora(x)`, of the recipe's output type.

    Attributes:
        lora: the `nnx.LoRA` of the layer, which stays as it is, and is trained.
    """

    @classmethod
    def from_linear(
        cls, linear: nnx.LoRALinear, recipe: Recipe | str, *, name: str = "kernel", allow_nonfinite: bool = False
    ) -> Self:
        layer = super().from_linear(linear, recipe, name=name, allow_nonfinite=allow_nonfinite)
        layer.lora = linear.lora
        return layer

    def __call__(self, x: Float[Array, "... k"], out_sharding=None) -> Float[Array, "... n"]:
        y = super().__call__(x, out_sharding)
        return (y + place(self.lora(x), out_sharding)).astype(y.dtype)
