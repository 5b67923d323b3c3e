"""From a model in 16 or 32 bits to a quantized one: a registry of module types, and the walk that applies it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
from flax import nnx

from fp8x.errors import CalibrationError, RecipeError, RuleError, some
from fp8x.nn.grouped import GroupedLinear
from fp8x.nn.linear import Linear
from fp8x.nn.quantized import QuantizedLayer
from fp8x.nn.unquantized import UnquantizedGroupedLinear
from fp8x.recipe import Recipe, Rules, as_recipe


class Converter(Protocol):
    """Makes the quantized counterpart of a module. `name` is its path, for errors."""

    def __call__(self, module: nnx.Module, recipe: Recipe, *, name: str, allow_nonfinite: bool) -> nnx.Module: ...


_CONVERTERS: dict[type[nnx.Module], Converter] = {
    nnx.Linear: Linear.from_linear,
    UnquantizedGroupedLinear: GroupedLinear.from_unquantized,
}


def register(
    source: type[nnx.Module], converter: Converter | None = None
) -> Callable[[Converter], Converter] | Converter:
    """Teaches `quantize_model` a module type: exactly `source`, not its subclasses. Usable as a decorator.

    @fp8x.nn.register(MyExperts)
    def quantize_my_experts(module, recipe, *, name, allow_nonfinite):
        return fp8x.nn.GroupedLinear.from_arrays(...)
    """
    if converter is None:
        return lambda function: register(source, function)
    _CONVERTERS[source] = converter
    return converter


def named_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Every module with its dotted path (`layers.0.self_attn.q_proj`); one that is held twice comes twice."""
    return _walk(model, (), ())


def _walk(node, path: tuple[str, ...], above: tuple) -> Iterator[tuple[str, nnx.Module]]:
    if any(node is ancestor for ancestor in above):
        return  # a module may hold the one that holds it
    if isinstance(node, nnx.Module):
        yield ".".join(path), node
    # nnx.iter_children knows no plain containers, which nnx.data lets a module hold.
    match node:
        case list() | tuple():
            children = enumerate(node)
        case dict():
            children = node.items()
        case _:
            children = vars(node).items()
    for key, child in children:
        if isinstance(child, nnx.Module | dict | list | tuple):
            yield from _walk(child, (*path, str(key)), (*above, node))


def named_layers(model: nnx.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model, by path."""
    return {path: module for path, module in named_modules(model) if isinstance(module, QuantizedLayer)}


def check_calibrated(model: nnx.Module) -> None:
    """Looks before work for what a layer can tell only outside of jit.

    Raises:
        CalibrationError: layers that are in calibration, or whose static activation scale is missing, by name.
    """
    layers = named_layers(model)
    if calibrating := [path for path, layer in layers.items() if layer.is_calibrating]:
        raise CalibrationError(f"model: {some(calibrating)} in calibration; end it with fp8x.calibrate(model, batches)")
    static = {path: layer.input_scale[...] for path, layer in layers.items() if layer.recipe.is_static}
    if missing := [path for path, scale in static.items() if not np.isfinite(np.asarray(scale)).all()]:
        raise CalibrationError(
            f"model: {some(missing)} not calibrated; run fp8x.calibrate(model, batches), or use a recipe with dynamic "
            "activation scales"
        )


def quantizable(model: nnx.Module) -> dict[str, nnx.Module]:
    """The modules that `quantize_model` can convert, by path."""
    return {path: module for path, module in named_modules(model) if type(module) in _CONVERTERS}


def quantize_module(module: nnx.Module, recipe: Recipe, *, name: str, allow_nonfinite: bool = False) -> nnx.Module:
    """The quantized counterpart of one module of a registered type."""
    return _CONVERTERS[type(module)](module, recipe, name=name, allow_nonfinite=allow_nonfinite)


def quantize_model(
    model: nnx.Module,
    recipe: Recipe | str | None,
    rules: Mapping[str, Recipe | str | None] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> nnx.Module:
    """Swaps the modules of a model for quantized ones, in place, one at a time: peak memory is the model and one layer.

    Arguments:
        model: any NNX module; every `nnx.Linear`, `fp8x.nn.UnquantizedGroupedLinear` and registered type inside.
        recipe: for what no rule names; a `Recipe`, its code, or None to quantize only what rules name.
        rules: path regex to a recipe, its code, or None to skip; the first that matches a whole path wins. Embeddings,
            `lm_head`, routers and gates are skipped unless a rule names them.
        allow_nonfinite: quantize weights that hold NaN or Inf instead of raising.

    Returns:
        The model; a new layer where `model` itself is a layer.

    Raises:
        RecipeError: the model is quantized already, or holds nothing that can be quantized, or holds it in a tuple.
        RuleError: a rule that matches no module.
        ShapeError: a weight that its recipe does not fit, named by path. The modules before it are quantized by then.
    """
    if layers := named_layers(model):
        raise RecipeError(f"model: {next(iter(layers)) or 'it'} is quantized already; start from the unquantized model")
    modules = quantizable(model)
    if not modules:
        known = ", ".join(source.__name__ for source in _CONVERTERS)
        raise RecipeError(f"model: {type(model).__name__} holds no module to quantize ({known}); see fp8x.nn.register")
    chosen = Rules(None if recipe is None else as_recipe(recipe), rules or {}).resolve(modules)
    converted: dict[int, nnx.Module] = {}  # a module that is held twice stays one
    for path in list(modules):
        module = modules.pop(path)
        if chosen[path] is None:
            continue
        if id(module) not in converted:
            converted[id(module)] = quantize_module(
                module, chosen[path], name=path or "model", allow_nonfinite=allow_nonfinite
            )
        if not path:
            return converted[id(module)]
        set_module(model, path, converted[id(module)])
    if not converted:
        raise RuleError("rules: they skip every module; nothing would be quantized")
    return model


def set_module(model: nnx.Module, path: str, module: nnx.Module) -> None:
    """Puts `module` at a dotted path.

    Raises:
        RecipeError: the module there is held in a tuple, which can't change.
    """
    *parents, last = path.split(".")
    for key in parents:
        model = get_module(model, key)
    match model:
        case tuple():
            raise RecipeError(f"model: {path} is held in a tuple; hold modules that are to be quantized in an nnx.List")
        case nnx.List() | list():
            model[int(last)] = module
        case dict():
            model[last] = module
        case _:
            setattr(model, last, module)


def get_module(model: nnx.Module, path: str) -> nnx.Module:
    """The module (or container of modules) at a dotted path."""
    for key in path.split("."):
        match model:
            case nnx.List() | list() | tuple():
                model = model[int(key)]
            case dict():
                model = model[key]
            case _:
                model = getattr(model, key)
    return model
