"""Training through quantization: modules that keep their weights and quantize them at every call."""

import dataclasses
import functools
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from fp8x.errors import RecipeError, some
from fp8x.nn.embed import weight_only
from fp8x.nn.quantized import QuantizedLayer
from fp8x.nn.registry import Conversion, conversion_of, type_name
from fp8x.nn.walk import check_settable, named_modules, remember_paths, set_module
from fp8x.recipe import Recipe, as_recipe


class QuantizationAware(nnx.Module):
    """A module in training: it computes what its quantized layer will, from weights that an optimizer can move.

    Every call quantizes the module's matrix as `fp8x.quantize_model` does and runs the quantized layer, so the output
    has the bits that `finish_training` will leave. The gradient goes straight through (Bengio et al., arXiv 1308.3432):
    it is that of the module itself with its matrix replaced by the dequantized one, in the module's own computation
    type, and goes to the matrix as if rounding had not been there. It sees activations as they came, not their codes.

    `fp8x.quantize_model` makes these by a recipe with `master_weights=True`. Reverse mode alone: `jax.jvp` is refused.

    Arguments:
        source: an `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed`, `LoRALinear` or `UnquantizedGroupedLinear`, or a
            stack of these. Its parameters are the master weights; nothing is copied.
        recipe: a `Recipe` or its code, with a dynamic activation scale or none.

    Raises:
        RecipeError: another type of module, one that can't be quantized, or a static activation scale.
        ShapeError: sizes that the recipe's blocks do not fit.
    """

    def __init__(self, source: nnx.Module, recipe: Recipe | str):
        recipe = dataclasses.replace(as_recipe(recipe), master_weights=True)
        conversion = conversion_in_training(source, "source")
        conversion.check_before(source, recipe, "source", allow_nonfinite=True)
        self.source, self.recipe = source, weight_only(recipe) if isinstance(source, nnx.Embed) else recipe

    def __call__(self, *args, **kwargs) -> Float[Array, "..."]:
        """What the quantized layer returns for the same arguments; its errors too."""
        return self._call("__call__", args, kwargs)

    def attend(self, query: Float[Array, "... d"], out_sharding=None) -> Float[Array, "... v"]:
        """`query @ table.T`, of an `nnx.Embed`.

        Raises:
            RecipeError: the module is something else.
        """
        if not isinstance(self.source, nnx.Embed):
            raise RecipeError(f"attend: an nnx.Embed has it, but this is {type_name(self.source)} in training")
        return self._call("attend", (query,), {"out_sharding": out_sharding})

    def quantized(self, *, name: str = "source", allow_nonfinite: bool = False) -> QuantizedLayer:
        """The quantized layer as the weights are now. `name` stands in errors.

        Raises:
            ShapeError: NaN or Inf in the matrix.
        """
        return _quantized(self.source, stored(self.recipe), name=name, allow_nonfinite=allow_nonfinite)

    def _call(self, method: str, args: tuple, kwargs: dict[str, Any]) -> Float[Array, "..."]:
        if getattr(self.source, "k_axes", ()):
            raise RecipeError(
                "layer: it is one device's part of a matrix, which can't be trained; finish training first"
            )
        leaves, tree = jax.tree.flatten((args, kwargs))
        is_array = tuple(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves)
        graphdef, state = nnx.split(self.source)
        call = _Call(
            graphdef,
            stored(self.recipe),
            method,
            tree,
            tuple(None if dynamic else leaf for leaf, dynamic in zip(leaves, is_array)),
            is_array,
        )
        return _straight_through(call, nnx.as_pure(state), [leaf for leaf, found in zip(leaves, is_array) if found])


def stored(recipe: Recipe) -> Recipe:
    """The recipe of the layer that training ends with."""
    return dataclasses.replace(recipe, master_weights=False)


def conversion_in_training(source: nnx.Module, name: str) -> Conversion:
    """How a module is quantized at every call.

    Raises:
        RecipeError: it can't be.
    """
    conversion, fault = conversion_of(source)
    if fault:
        raise RecipeError(f"{name}: it can't be quantized: {fault}")
    if conversion is None or conversion.matrix is None:
        raise RecipeError(
            f"{name}: {type_name(source)} can't be trained in 8 bits, since only the built-in conversions say which "
            "weights they quantize; build it from nnx.Linear and the like, or skip it by a rule with None"
        )
    return conversion


def _quantized(source: nnx.Module, recipe: Recipe, *, name: str = "source", allow_nonfinite: bool) -> QuantizedLayer:
    convert = conversion_in_training(source, name).convert
    return convert(source, recipe, name=name, allow_nonfinite=allow_nonfinite)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a module, but for the arrays.

    Attributes:
        graphdef: of the module.
        recipe: of its quantized layer.
        method: which one is called.
        tree: of its arguments.
        static: an argument each, None where it is an array.
        is_array: whether it is.
    """

    graphdef: nnx.GraphDef
    recipe: Recipe
    method: str
    tree: jax.tree_util.PyTreeDef
    static: tuple[Hashable, ...]
    is_array: tuple[bool, ...]

    def run(self, module: nnx.Module, arrays: Iterable[Array]) -> Float[Array, "..."]:
        """The call, of the module or of the layer that was made of it."""
        arrays = iter(arrays)
        leaves = [next(arrays) if found else leaf for leaf, found in zip(self.static, self.is_array)]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return getattr(module, self.method)(*args, **kwargs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_quantized_layer(call: _Call, state: PyTree, arrays: list[Array]) -> Float[Array, "..."]:
    # A model that diverges goes on with NaN, as it would without quantization; `finish_training` refuses it.
    layer = _quantized(nnx.merge(call.graphdef, state), call.recipe, allow_nonfinite=True)
    return call.run(layer, arrays)


def _forward(call: _Call, state: PyTree, arrays: list[Array]):
    # The matrix is quantized again on the way back, which costs less than memory for it until then.
    return _by_quantized_layer(call, state, arrays), (state, arrays)


def _backward(call: _Call, residuals, dy: Float[Array, "..."]):
    state, arrays = residuals
    source = nnx.merge(call.graphdef, state)
    matrix = getattr(source, conversion_of(source)[0].matrix)
    matrix[...] = _quantized(source, call.recipe, allow_nonfinite=True).source_matrix().astype(matrix.dtype)

    def run(state, arrays):
        return call.run(nnx.merge(call.graphdef, state), arrays).astype(dy.dtype)

    _, vjp = jax.vjp(run, nnx.as_pure(nnx.split(source)[1]), arrays)
    return vjp(dy)


_by_quantized_layer.defvjp(_forward, _backward)

# Compiled also where the caller is not: making the layer takes longer than running it.
_straight_through = jax.jit(_by_quantized_layer, static_argnums=0)


def layers_in_training(model: nnx.Module) -> dict[str, QuantizationAware]:
    """The modules of a model that are in training, by path."""
    return {path: module for path, module in named_modules(model) if isinstance(module, QuantizationAware)}


def source_of(module: nnx.Module) -> nnx.Module:
    """The module itself, or what it holds while it is in training."""
    return module.source if isinstance(module, QuantizationAware) else module


def check_finished(model: nnx.Module) -> None:
    """Raises a RecipeError, with paths, where a model is in training."""
    if paths := [path or "it" for path in layers_in_training(model)]:
        raise RecipeError(f"model: {some(paths)} in training; end it with fp8x.nn.finish_training(model)")


def finish_training(
    model: nnx.Module, recipe: Recipe | str | None = None, *, allow_nonfinite: bool = False
) -> nnx.Module:
    """Quantizes the weights that a model was trained with, in place, one layer at a time; the outputs stay as they are.

    Everything is checked before the first swap, so that an error leaves the model as it was.

    Arguments:
        model: what `fp8x.quantize_model` made by a recipe with `master_weights=True`.
        recipe: for all of its layers instead of their own, for instance one with a static activation scale, which
            `fp8x.calibrate` sets then. The outputs change with it.
        allow_nonfinite: quantize weights that hold NaN or Inf instead of raising.

    Returns:
        The model; a new layer where `model` itself is in training.

    Raises:
        RecipeError: nothing is in training, or it is held in a tuple.
        ShapeError: NaN or Inf in a weight, or one that `recipe` does not fit, named by path.
    """
    layers = layers_in_training(model)
    if not layers:
        raise RecipeError(
            "model: nothing is in training; fp8x.quantize_model begins it, with a recipe that has master_weights=True"
        )
    given = None if recipe is None else stored(as_recipe(recipe))
    for path, layer in layers.items():
        check_settable(model, path)
        name = path or "model"
        conversion = conversion_in_training(layer.source, name)
        conversion.check_before(layer.source, given or stored(layer.recipe), name, allow_nonfinite)
    finished: dict[int, QuantizedLayer] = {}  # a module that is held twice stays one
    for path in list(layers):
        layer = layers.pop(path)
        name = path or "model"
        if id(layer) not in finished:
            finished[id(layer)] = _quantized(
                layer.source, given or stored(layer.recipe), name=name, allow_nonfinite=allow_nonfinite
            )
        if not path:
            return finished[id(layer)]
        set_module(model, path, finished[id(layer)])
    remember_paths(model)
    return model
