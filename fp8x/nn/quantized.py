"""What the quantized layers share: their variables, their static activation scale, and calibration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.errors import CalibrationError, RecipeError, ShapeError
from fp8x.ops.groups import concrete, row_mask
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme


class Float8Weight(nnx.Variable):
    """Weights in 8 bits. No `nnx.Param`: optimizers pass it by."""


class WeightScale(nnx.Variable):
    """The scales of a `Float8Weight`."""


class InputScale(nnx.Variable):
    """A static activation scale, float32 `[1, ceil(K / block_k)]`; NaN until it is calibrated."""


class Amax(nnx.Variable):
    """The running amax of a layer's input while it is in calibration, in the shape of its `InputScale`."""


class TokenCount(nnx.Variable):
    """Rows that a layer has seen in calibration, int32: `[]`, or `[E]` for one matrix per expert."""


class QuantizedLayer(nnx.Module):
    """Base of `Linear` and `GroupedLinear`.

    Attributes:
        recipe: what the layer does.
        weight: `Float8Weight` `[..., N, K]`, K-major.
        weight_scale: `WeightScale`, `weight_scheme.scale_shape(weight.shape)`.
        weight_scheme: the scheme of the two above.
        bias: `nnx.Param` or None.
        input_scale: `InputScale`, or None unless the recipe's activation scale is static.
        amax, tokens: statistics while the layer is in calibration, else None.
    """

    def hold(self, weight: ScaledArray, recipe: Recipe, bias: Array | None, input_scale: Array | None = None) -> None:
        """Sets every variable: what constructors end with, and how another weight gets into a layer.

        Raises:
            RecipeError: the weight is stored in another way than the recipe says.
        """
        _check_stored(weight, recipe)
        self.recipe = recipe
        self.weight_scheme = weight.scheme
        self.weight = Float8Weight(weight.data)
        self.weight_scale = WeightScale(weight.scale)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.input_scale = nnx.data(
            InputScale(_initial_scale(recipe, weight, input_scale)) if recipe.is_static else None
        )
        self.amax = self.tokens = nnx.data(None)
        if recipe.observer:
            self.start_calibration()

    @property
    def quantized_weight(self) -> ScaledArray:
        """Weight and scale as one array."""
        return ScaledArray(self.weight[...], self.weight_scale[...], self.weight_scheme)

    @property
    def is_calibrating(self) -> bool:
        return self.amax is not None

    def start_calibration(self) -> None:
        """From now on a call gathers the running amax of its input, and fake-quantizes with the scale that follows.

        Raises:
            CalibrationError: the recipe has no static activation scale.
        """
        if not self.recipe.is_static:
            raise CalibrationError(
                f"recipe: its activation scale is {self.recipe.activation_scale}; only a static one is calibrated"
            )
        self.amax = nnx.data(Amax(jnp.zeros(self.input_scale.shape, jnp.float32)))
        self.tokens = nnx.data(TokenCount(jnp.zeros(self.weight.shape[:-2][:1], jnp.int32)))

    def finish_calibration(self) -> None:
        """Sets the static scale from the amax gathered, and ends calibration.

        Raises:
            CalibrationError: no calibration was started, or the amax is zero: the layer saw nothing.
        """
        if not self.is_calibrating:
            raise CalibrationError("layer: it is not in calibration; call start_calibration first")
        if not np.asarray(self.amax[...]).any():
            raise CalibrationError(f"layer: it saw no activation other than zero in {np.sum(self.tokens[...])} tokens")
        self.input_scale[...] = numerics.compute_scale(self.amax[...], self.recipe.activation)
        self.recipe = dataclasses.replace(self.recipe, observer=None)
        self.abandon_calibration()

    def abandon_calibration(self) -> None:
        """Ends calibration and keeps the static scale as it was before."""
        self.amax = self.tokens = nnx.data(None)

    def _activation_scale(
        self, x: Float[Array, "m k"], group_sizes: Int[Array, " e"] | None = None
    ) -> Float[Array, "1 groups"] | None:
        """The static scale, if the recipe has one; in calibration, after `x` has joined the running amax."""
        if not self.recipe.is_static:
            return None
        if not self.is_calibrating:
            scale = self.input_scale[...]
            values = concrete(scale)
            if values is not None and np.isnan(values).any():
                raise CalibrationError(
                    f"input_scale: the layer [{x.shape[-1]} -> {self.weight.shape[-2]}] is not calibrated; "
                    "run fp8x.calibrate(model, batches), or use a recipe with dynamic activation scales"
                )
            return scale
        scheme = self.recipe.activation
        if group_sizes is not None:
            x = jnp.where(row_mask(group_sizes, x.shape[0])[:, None], x, 0)
        self.amax[...] = jnp.maximum(self.amax[...], numerics.block_amax(jax.lax.stop_gradient(x), scheme))
        self.tokens[...] = self.tokens[...] + (x.shape[0] if group_sizes is None else group_sizes)
        return numerics.compute_scale(self.amax[...], scheme)


def weight_scheme(recipe: Recipe, ndim: int) -> Scheme:
    """The recipe's weight scheme for `[..., N, K]`; for `[E, P, N, K]` a block over experts does not reach across P."""
    scheme = recipe.weight
    if ndim == 4 and len(scheme.block) == 3:
        return dataclasses.replace(scheme, block=(scheme.block[0], 1, *scheme.block[1:]))
    return scheme


def _check_stored(weight: ScaledArray, recipe: Recipe) -> None:
    expected = weight_scheme(recipe, weight.ndim)
    stored, fits = ((s.dtype, s.scale_dtype, s.block_of(weight.shape)) for s in (weight.scheme, expected))
    if stored != fits:
        raise RecipeError(f"weight: it is stored in {weight.scheme}, but the recipe's weights are in {expected}")


def _initial_scale(recipe: Recipe, weight: ScaledArray, given: Array | None) -> Float[Array, "1 groups"]:
    shape = recipe.activation.scale_shape((1, weight.shape[-1]))
    if given is None:
        # A unit scale needs no calibration.
        return jnp.full(shape, 1.0 if recipe.activation.scale_rule == "unit" else jnp.nan, jnp.float32)
    if given.shape != shape or given.dtype != jnp.float32:
        raise ShapeError(f"input_scale: {given.dtype}{list(given.shape)} does not fit; use float32{list(shape)}")
    return given


def initial_weight(rngs: nnx.Rngs, shape: tuple[int, ...], scheme: Scheme) -> ScaledArray:
    """A random weight `[..., N, K]`: truncated normal of variance 1/K, as `nnx.Linear` has it."""
    scheme.check_shape(shape, "weight")
    init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=range(len(shape) - 2))
    weight = init(rngs.params(), shape, jnp.float32)
    return numerics.quantize_weight(weight, scheme, name="weight", allow_nonfinite=True)
