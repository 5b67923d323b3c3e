"""Layers onto a mesh: their parameters, and over which axes they sum and look for magnitudes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from fp8x.array import ScaledArray
from fp8x.errors import MeshError
from fp8x.nn.moe import MoE
from fp8x.nn.quantized import QuantizedLayer, weight_scheme
from fp8x.nn.unquantized import UnquantizedGroupedLinear
from fp8x.scheme import Scheme
from fp8x.sharding.place import Dims, Read, place, put, scale_dims, values_of, whole, whole_shape
from fp8x.sharding.plan import LayerSplit
from fp8x.sharding.split import Split

Layer = QuantizedLayer | UnquantizedGroupedLinear | nnx.Linear


@dataclasses.dataclass(frozen=True)
class SummedDot:
    """What an `nnx.Linear` whose K is split multiplies with: partial sums in float32, summed over `axes`, cast once."""

    axes: tuple[str, ...]

    def __call__(
        self, x, kernel, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None
    ) -> Array:
        out_dtype = jnp.result_type(x, kernel) if preferred_element_type is None else preferred_element_type
        partial = jax.lax.dot_general(x, kernel, dimension_numbers, precision, jnp.float32)
        return jax.lax.psum(partial, self.axes).astype(out_dtype)


def place_quantized(
    layer: QuantizedLayer,
    split: LayerSplit,
    mesh: Mesh,
    weight: ScaledArray,
    bias: Read | None,
    input_scale: Read | None,
) -> None:
    """Gives a layer of the whole weight's shape, abstract or not, a weight that is on the mesh, and places the rest.

    Raises:
        MeshError: the layer is in calibration, or blocks of its activations reach across rows on several devices.
    """
    if layer.is_calibrating:
        raise MeshError("layer: it is in calibration; end that with fp8x.calibrate before it is placed on a mesh")
    recipe, ndim = layer.recipe, layer.weight.ndim
    k, k_axes = layer.weight.shape[-1], () if split.k is None else split.k.axes
    if layer.bias is not None:
        put(layer.bias, place(bias, layer.bias.shape, layer.bias.dtype, split.dims(ndim)[:-1], mesh))
    if layer.input_scale is not None:
        dims = input_scale_dims(recipe.activation, k, split.k)
        put(layer.input_scale, place(input_scale, layer.input_scale.shape, np.dtype(np.float32), dims, mesh, fill=1))
    put(layer.weight, weight.data)
    put(layer.weight_scale, weight.scale)
    layer.weight_scheme, layer.k_axes = weight.scheme, k_axes
    if recipe.activation_scale == "dynamic":
        layer.amax_axes = _amax_axes(recipe.activation.block, k_axes, mesh, split)


def input_scale_dims(scheme: Scheme, width: int, split: Split | None) -> Dims:
    """How a static scale lies, `[1, groups]`, of `width` features that are split so; unless they are, the width is
    whole."""
    return scale_dims(scheme, (1, width if split is None else split.size), (None, split))[1]


def _amax_axes(block: tuple, k_axes: tuple[str, ...], mesh: Mesh, split: LayerSplit) -> tuple[str, ...]:
    """Axes over which a block of dynamically quantized activations reaches."""
    rows, columns = block
    axes = k_axes if columns is None else ()
    if rows == 1:
        return axes
    experts = () if split.experts is None else split.experts.axes
    row_axes = tuple(axis for axis in ("data", *experts) if mesh.shape.get(axis, 1) > 1)
    if rows is not None and row_axes:
        raise MeshError(
            f"recipe: a block of its activations holds {rows} rows, which may lie on several devices along mesh axis "
            f"{row_axes[0]!r}; use blocks of one row, or of all rows (None)"
        )
    return (*axes, *row_axes) if rows is None else axes


def place_weight(
    layer: nnx.Linear | UnquantizedGroupedLinear, split: LayerSplit, mesh: Mesh, weight: Read, bias: Read
) -> None:
    """Places a layer in 16 or 32 bits; `weight` and `bias` are read as the layer holds them."""
    is_linear = isinstance(layer, nnx.Linear)
    variable = layer.kernel if is_linear else layer.weight
    dims = split.dims(variable.ndim)
    put(variable, place(weight, variable.shape, variable.dtype, dims[::-1] if is_linear else dims, mesh))
    if layer.bias is not None:
        put(layer.bias, place(bias, layer.bias.shape, layer.bias.dtype, dims[:-1], mesh))
    if split.k is not None and is_linear:
        layer.dot_general = SummedDot(split.k.axes)
    elif split.k is not None:
        layer.k_axes = split.k.axes


def place_layer(layer: Layer, split: LayerSplit, mesh: Mesh) -> None:
    """Places a layer that is in memory, or abstract."""
    bias = None if layer.bias is None else values_of(layer.bias)
    if not isinstance(layer, QuantizedLayer):
        weight = layer.kernel if isinstance(layer, nnx.Linear) else layer.weight
        return place_weight(layer, split, mesh, values_of(weight), bias)
    input_scale = None if layer.input_scale is None else values_of(layer.input_scale)
    weight = place_stored(values_of(layer.weight), values_of(layer.weight_scale), layer, split, mesh)
    place_quantized(layer, split, mesh, weight, bias, input_scale)


def place_stored(data: Read, scale: Read, layer: QuantizedLayer, split: LayerSplit, mesh: Mesh) -> ScaledArray:
    """A weight that is quantized already, byte for byte."""
    scheme, shape = layer.weight_scheme, layer.weight.shape
    dims = split.dims(len(shape))
    finer, of_scales = scale_dims(scheme, shape, dims)
    fill = 0 if scheme.is_mx else 1  # the scale of a block of zeros: byte 0, or 1
    return ScaledArray(
        place(data, shape, scheme.dtype, dims, mesh),
        place(scale, scheme.scale_shape(shape), scheme.scale_dtype, of_scales, mesh, fill),
        finer,
    )


def mark_moe(moe: MoE, w2: LayerSplit) -> None:
    """Tells a mixture whose w2 is split so which experts are here, and over which axes its outputs are summed."""
    moe.expert_axes = () if w2.experts is None else w2.experts.axes
    moe.sum_axes = (*moe.expert_axes, *(() if w2.k is None else w2.k.axes))


def gathered(layer: Layer, split: LayerSplit) -> Layer:
    """A copy of a placed layer with the whole parameters in this process's memory, as they were before."""
    graphdef, state = nnx.split(layer)
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))  # variables of its own, around the same arrays
    weight = layer.kernel if isinstance(layer, nnx.Linear) else layer.weight
    dims = split.dims(weight.ndim)
    if isinstance(layer, QuantizedLayer):
        scheme = weight_scheme(layer.recipe, weight.ndim)
        _, of_scales = scale_dims(scheme, whole_shape(weight.shape, dims), dims)
        layer.weight_scale.set_value(whole(layer.weight_scale[...], of_scales))
        if layer.input_scale is not None:
            of_inputs = input_scale_dims(layer.recipe.activation, weight.shape[-1], split.k)
            layer.input_scale.set_value(whole(layer.input_scale[...], of_inputs))
    weight.set_value(whole(weight[...], dims[::-1] if isinstance(layer, nnx.Linear) else dims))
    if layer.bias is not None:
        layer.bias.set_value(whole(layer.bias[...], dims[:-1]))
    return layer
