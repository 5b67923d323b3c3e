"""What the quantized layers share: their variables, their static activation scale, and calibration."""

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_pspec
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from fp8x import meshes, numerics, ops
from fp8x.array import ScaledArray, as_input
from fp8x.errors import CalibrationError, Fp8xError, RecipeError, ShapeError
from fp8x.nn.calibrated import Calibrated, InputScale
from fp8x.nn.notes import Notes
from fp8x.ops.groups import row_mask
from fp8x.recipe import Recipe, check_stored
from fp8x.scheme import Scheme

layer_paths = Notes()  # of layers in models that fp8x has quantized or loaded

_called: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("called", default=None)


class Float8Weight(nnx.Variable):
    """Weights in 8 bits. No `nnx.Param`: optimizers pass it by."""


class WeightScale(nnx.Variable):
    """The scales of a `Float8Weight`."""


def names_layer(method: Callable) -> Callable:
    """A call of a layer, of which errors say whose they are."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except Fp8xError as error:
            if not hasattr(error, "layer"):  # a layer that calls another has its errors pass by
                error.layer = self.title
                error.args = (f"{error.layer}: {error}",)
            raise

    return call


class QuantizedLayer(Calibrated):
    """Base of the layers in 8 bits.

    A stack of layers, as `nnx.vmap` makes them, is one of these whose variables have further leading axes; `nnx.scan`
    and `nnx.vmap` take one layer after another out of it.

    Attributes:
        recipe: what the layer does.
        rank: how many dims the weight of one layer has.
        name: its path, while `called_layers` asks.
        weight: `Float8Weight` `[..., N, K]`, K-major.
        weight_scale: `WeightScale`, `weight_scheme.scale_shape(weight.shape)`.
        weight_scheme: the scheme of the two above.
        bias: `nnx.Param` or None.
        k_axes: mesh axes over which K is split, where the layer is one device's part of another.
        amax_axes: those over which a block of dynamically quantized activations reaches.
    """

    rank: int = 2
    name: str = ""
    k_axes: tuple[str, ...] = ()
    amax_axes: tuple[str, ...] = ()

    def hold(self, weight: ScaledArray, recipe: Recipe, bias: Array | None, input_scale: Array | None = None) -> None:
        """Sets every variable: what constructors end with, and how another weight gets into a layer.

        Raises:
            RecipeError: the weight is stored in another way than the recipe says.
        """
        _check_stored(weight, recipe, self.rank)
        self.recipe = recipe
        self.weight_scheme = weight.scheme
        self.weight = Float8Weight(weight.data)
        self.weight_scale = WeightScale(weight.scale)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.input_scale = nnx.data(
            InputScale(_initial_scale(recipe, weight, self.rank, input_scale)) if recipe.is_static else None
        )
        self.abandon_calibration()
        if recipe.observer:
            self.start_calibration()

    def keep_sharding(
        self,
        weight: nnx.Variable,
        bias: nnx.Variable | None,
        dims: Sequence[Sequence[int]] | None = None,
        bias_dims: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Gives the variables the partitioning metadata of those that they replace (`nnx.with_partitioning`).

        Scales lie over the axes of their weight's dims, but for dims with one scale, and dims whose blocks a boundary
        between devices would cut, where the mesh is known.

        Arguments:
            weight, bias: what is replaced.
            dims, bias_dims: the dims of `weight` and `bias` that each dim here was merged from; None where they are
                the same. The merged dim lies as its first one does: an array can't say that it is split within that.
        """
        if bias is not None and (names := _merged_names(bias, bias_dims)) is not None:
            _copy_partitioning(bias, self.bias, names)
        if (names := _merged_names(weight, dims)) is None:
            return
        of_scales = [name if count > 1 else None for name, count in zip(names, self.weight_scale.shape)]
        mesh = weight.get_metadata("mesh", None) or meshes.explicit_mesh(self.weight[...])
        if mesh is not None:
            spec = get_pspec(P(*names), weight.get_metadata("sharding_rules", None))
            dims = meshes.scale_dims(meshes.dims_of(spec, len(names)), self.weight_scheme, self.weight.shape, mesh)
            of_scales = [name if axes else None for name, axes in zip(of_scales, dims)]
        _copy_partitioning(weight, self.weight, names)
        _copy_partitioning(weight, self.weight_scale, tuple(of_scales))

    @property
    def title(self) -> str:
        """The layer, for errors: its path where it is known, its type and sizes."""
        *_, n, k = self.weight.shape
        what = f"{type(self).__name__} {k} -> {n}"
        path = layer_paths.get(self)
        return f"{path} ({what})" if path else what

    @property
    def quantized_weight(self) -> ScaledArray:
        """Weight and scale as one array."""
        return ScaledArray(self.weight[...], self.weight_scale[...], self.weight_scheme)

    def source_matrix(self) -> Float[Array, "..."]:
        """The weight, dequantized, as the module that it was made from holds it."""
        return self.quantized_weight.dequantize()

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of a stack of layers; empty for one layer."""
        return self.weight.shape[: -self.rank]

    def begin_call(self, x: ArrayLike | ScaledArray, name: str = "x") -> Array | ScaledArray:
        """What every call begins with. The input as an array.

        Raises:
            ShapeError: a stack of layers is called like one, or `x` is no array; `name` is in the message.
        """
        if (names := _called.get()) is not None:
            names.add(self.name)
        if self.stack:
            raise ShapeError(
                f"layer: it is a stack of {list(self.stack)} layers, made by nnx.vmap; run it by nnx.scan or nnx.vmap"
            )
        return as_input(x, name)

    @property
    def static_scheme(self) -> Scheme | None:
        return self.recipe.activation if self.recipe.is_static else None

    @property
    def experts(self) -> tuple[int, ...]:
        return self.weight.shape[-self.rank : -2][:1]

    def start_calibration(self, *, histogram: bool = False, fake_quantize: bool = True) -> None:
        if not self.recipe.is_static:
            raise CalibrationError(
                f"recipe: its activation scale is {self.recipe.activation_scale}; only a static one is calibrated"
            )
        super().start_calibration(histogram=histogram, fake_quantize=fake_quantize)

    def finish_calibration(self, scale: Float[Array, "1 groups"] | None = None) -> None:
        super().finish_calibration(scale)
        self.recipe = dataclasses.replace(self.recipe, observer=None)

    def _activation(
        self, x: Float[Array, "... k"], group_sizes: Int[Array, " e"] | None = None
    ) -> dict[str, Scheme | Array | None]:
        """How a product is to quantize its input `x`; in calibration, after `x` has joined the statistics."""
        scheme, scale = self.recipe.activation, None
        ops.check_dtype(x)
        if self.is_calibrating:
            self.observe(meshes.merge_rows(x), group_sizes)
            if not self.fake_quantize:
                return {"activation": None, "activation_scale": None}
            scale = numerics.compute_scale(self.amax[...], scheme)
        elif self.recipe.is_static:
            scale = self.input_scale[...]
            if self.input_scale.is_missing:
                raise CalibrationError(
                    f"input_scale: the layer [{self.weight.shape[-1]} -> {self.weight.shape[-2]}] is not calibrated; "
                    "run fp8x.calibrate(model, batches), or use a recipe with dynamic activation scales"
                )
        elif self.amax_axes:
            x = meshes.merge_rows(x)
            if group_sizes is not None:
                x = jnp.where(row_mask(group_sizes, x.shape[0])[:, None], x, 0)
            amax = jax.lax.pmax(numerics.block_amax(x, scheme), self.amax_axes)
            scale = numerics.compute_scale(amax, scheme)
        return {"activation": scheme, "activation_scale": scale}

    @names_layer
    def dequantized_input(self, x: Float[Array, "... k"]) -> Float[Array, "... k"]:
        """`x` as a product of this layer reads it: through 8 bits and back, if the recipe quantizes activations."""
        x = self.begin_call(x)
        scheme, scale = self._activation(x).values()
        if scheme is None:
            return x
        x2 = meshes.merge_rows(x)
        x2 = numerics.quantize(x2, scheme) if scale is None else numerics.quantize_with_scale(x2, scale, scheme)
        return x2.dequantize(x.dtype).reshape(x.shape)


def _merged_names(variable: nnx.Variable, dims: Sequence[Sequence[int]] | None) -> tuple | None:
    """The mesh axes in the metadata of `variable`, for the dims that `dims` merges; None where there are none."""
    if (names := variable.get_metadata("out_sharding", None)) is None:
        return None
    names = (*names, *[None] * (variable.ndim - len(names)))
    return names if dims is None else tuple(names[merged[0]] if merged else None for merged in dims)


def _copy_partitioning(source: nnx.Variable, to: nnx.Variable, names: tuple) -> None:
    """The metadata of `source` that says how it lies on a mesh, for a variable with `names` for its dims."""
    metadata = source.get_metadata()
    kept = {name: metadata[name] for name in ("sharding_rules", "mesh") if name in metadata}
    to.set_metadata(**kept | {"out_sharding": names})


def called_layers(layers: Mapping[str, QuantizedLayer], model: nnx.Module, inputs: Sequence) -> set[str]:
    """Which of a model's layers, by path, `model(*inputs)` calls. Traces it; runs nothing, and changes nothing."""
    for path, layer in layers.items():
        if "name" not in vars(layer):  # one that is held twice has its first path
            layer.name = path  # it goes along through nnx.split and nnx.merge
    graphdef, state = nnx.split(model)
    for layer in layers.values():
        if "name" in vars(layer):
            del layer.name
    token = _called.set(set())
    try:
        jax.eval_shape(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs), state, *inputs)
        return _called.get()
    finally:
        _called.reset(token)


def place(y: Array, out_sharding) -> Array:
    """`y` as Flax's layers return it where they are called with an `out_sharding`."""
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def weight_scheme(recipe: Recipe, ndim: int) -> Scheme:
    """The recipe's weight scheme for `[..., N, K]`; for `[E, P, N, K]` a block over experts does not reach across P."""
    scheme = recipe.weight
    if ndim == 4 and len(scheme.block) == 3:
        return dataclasses.replace(scheme, block=(scheme.block[0], 1, *scheme.block[1:]))
    return scheme


def _check_stored(weight: ScaledArray, recipe: Recipe, rank: int) -> None:
    check_stored([recipe])
    expected = weight_scheme(recipe, rank)
    stored, fits = ((s.dtype, s.scale_dtype, s.block_of(weight.shape)) for s in (weight.scheme, expected))
    if stored != fits:
        raise RecipeError(f"weight: it is stored in {weight.scheme}, but the recipe's weights are in {expected}")


def _initial_scale(recipe: Recipe, weight: ScaledArray, rank: int, given: Array | None) -> Float[Array, "... groups"]:
    shape = (*weight.shape[:-rank], *recipe.activation.scale_shape((1, weight.shape[-1])))
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
