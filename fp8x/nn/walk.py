"""Modules inside a model, by dotted path."""

from collections.abc import Iterator

from flax import nnx

from fp8x.errors import CalibrationError, RecipeError, some
from fp8x.nn.calibrated import Calibrated
from fp8x.nn.quantized import QuantizedLayer, layer_paths


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


def remember_paths(model: nnx.Module) -> None:
    """Has errors of a model's quantized layers name their paths; of one that is held twice, the first."""
    for path, layer in reversed(named_layers(model).items()):
        layer_paths.set(layer, path)


def named_static(model: nnx.Module) -> dict[str, Calibrated]:
    """What has a static scale, by path: layers in 8 bits, and what stores keys and values in 8 bits."""
    found: dict[str, Calibrated] = {}
    for path, module in named_modules(model):
        is_static = isinstance(module, Calibrated) and module.static_scheme is not None
        if is_static and not any(module is other for other in found.values()):
            found[path] = module
    return found


def check_calibrated(model: nnx.Module) -> None:
    """Looks for layers that can't infer yet, before a model is compiled or saved.

    A layer that is called without its static scale raises by itself, inside jit too. It can't tell, and returns NaN,
    only where the compiled function has made the layer itself, or was given the state of another model than the one
    whose graph it merges. Then call this on the model outside of jit.

    Raises:
        CalibrationError: layers that are in calibration, or whose static activation scale is missing, by name.
    """
    static = named_static(model)
    if calibrating := [path for path, layer in static.items() if layer.is_calibrating]:
        raise CalibrationError(f"model: {some(calibrating)} in calibration; end it with fp8x.calibrate(model, batches)")
    if missing := [path for path, layer in static.items() if layer.input_scale.is_missing]:
        raise CalibrationError(
            f"model: {some(missing)} not calibrated; run fp8x.calibrate(model, batches), or use a recipe with dynamic "
            "activation scales"
        )


def check_settable(model: nnx.Module, path: str) -> None:
    """What `set_module` would raise."""
    *parents, _ = path.split(".")
    if parents and isinstance(get_module(model, ".".join(parents)), tuple):
        raise RecipeError(f"model: {path} is held in a tuple; hold modules that are to be quantized in an nnx.List")


def set_module(model: nnx.Module, path: str, module: nnx.Module) -> None:
    """Puts `module` at a dotted path.

    Raises:
        RecipeError: the module there is held in a tuple, which can't change.
    """
    check_settable(model, path)
    *parents, last = path.split(".")
    for key in parents:
        model = get_module(model, key)
    match model:
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
