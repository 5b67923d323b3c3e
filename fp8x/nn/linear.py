"""`Linear`: `nnx.Linear` in 8 bits."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fp8x import numerics, ops
from fp8x.array import ScaledArray
from fp8x.errors import ShapeError
from fp8x.nn.quantized import QuantizedLayer, initial_weight
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
        bias: Float[Array, " n"] | None = None,
        input_scale: Float[Array, "1 groups"] | None = None,
    ) -> "Linear":
        """A layer around a weight `[N, K]` that is quantized already.

        Raises:
            RecipeError: the weight is stored in another way than the recipe says.
            ShapeError: arrays that do not fit each other.
        """
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ShapeError(
                f"weight {weight.shape} and bias {getattr(bias, 'shape', None)} do not fit; use [N, K] and [N]"
            )
        n, k = weight.shape
        layer = nnx.eval_shape(lambda: cls(k, n, recipe=recipe, use_bias=False, rngs=nnx.Rngs(0)))
        layer.hold(weight, as_recipe(recipe), bias, input_scale)
        return layer

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, recipe: Recipe | str, *, name: str = "kernel", allow_nonfinite: bool = False
    ) -> "Linear":
        """Quantizes an `nnx.Linear`; its kernel `[K, N]` is transposed once. `name` stands in errors.

        Raises:
            ShapeError: sizes that the recipe's blocks do not fit, a kernel that is no matrix, or NaN or Inf in it.
        """
        recipe = as_recipe(recipe)
        if linear.kernel.ndim != 2:
            raise ShapeError(
                f"{name}: shape is {linear.kernel.shape}; use a kernel [K, N] (layers stacked by nnx.vmap have to be "
                "converted one by one)"
            )
        weight = numerics.quantize_weight(
            linear.kernel[...].T, recipe.weight, name=name, allow_nonfinite=allow_nonfinite
        )
        bias = None if linear.bias is None else linear.bias[...]
        layer = cls.from_arrays(weight, recipe, bias=bias)
        layer.keep_sharding(linear.kernel, linear.bias, transposed=True)
        return layer

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        """One product, of the recipe's output type, whatever the batch.

        Raises:
            ShapeError: `x`'s last dim is not K.
            CalibrationError: a static activation scale is not calibrated; inside jit the result is NaN instead.
        """
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
        return y
