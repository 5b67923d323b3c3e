"""From a model in 16 or 32 bits to a quantized one."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from fp8x.errors import RecipeError, some
from fp8x.nn.decide import (
    Unsupported,
    check_any,
    check_unsupported,
    decide,
    kept_of,
    recipe_of,
    say_unsupported,
    why_kept,
)
from fp8x.nn.products import roles_of
from fp8x.nn.registry import Holder, holders, known_types, without_matrices
from fp8x.nn.report import why_left
from fp8x.nn.training import QuantizationAware, check_finished, conversion_in_training
from fp8x.nn.walk import check_settable, named_layers, remember_paths, set_module
from fp8x.recipe import Decision, Recipe


def quantize_model(
    model: nnx.Module,
    recipe: Recipe | str | None,
    rules: Mapping[str, Recipe | str | None] | None = None,
    *,
    unsupported: Unsupported = "warn",
    allow_nonfinite: bool = False,
) -> nnx.Module:
    """Swaps the modules of a model for quantized ones, in place, one at a time: peak memory is the model and one layer.

    Everything is checked before the first swap, so that an error leaves the model as it was; only a converter of the
    user's own (`fp8x.nn.register`) can fail later, and the error says how far it had come.

    Arguments:
        model: any NNX module. Quantized are `nnx.Linear`, `LinearGeneral`, `Einsum`, `LoRALinear` (its base) and so
            `MultiHeadAttention`, `fp8x.nn.UnquantizedGroupedLinear`, registered types, subclasses of all these that
            override nothing, and stacks of them as `nnx.vmap` makes; `nnx.Embed` where a rule names it.
        recipe: for what no rule names; a `Recipe`, its code, or None to quantize only what rules name. One with
            `master_weights=True` begins training: a module is put into an `fp8x.nn.QuantizationAware`.
        rules: path regex to a recipe, its code, or None to skip; the first that matches a whole path wins, or, of a
            `Decoder`'s layers, their names in a checkpoint. Embeddings, heads and routers are skipped unless a rule
            names them (`fp8x.roles` tells them by names and shapes).
        unsupported: what to do about matrices that no rule skips and that can't be quantized: warn once, raise an
            error, or nothing. `fp8x.report(model)` lists them with the reasons. The warning also names what may be the
            router of the model's experts, where none is known.
        allow_nonfinite: quantize weights that hold NaN or Inf instead of raising.

    Returns:
        The model; a new layer where `model` itself is a layer.

    Raises:
        RecipeError: the model is quantized already, or holds nothing that can be quantized, or holds it in a tuple; or
            matrices that can't be quantized, if those are to be an error, or if a rule names them alone.
        RuleError: a rule that matches no module, or rules that skip all.
        ShapeError: a weight that its recipe does not fit, or NaN or Inf in it, named by path.
    """
    check_unsupported(unsupported)
    if not isinstance(model, nnx.Module):
        raise RecipeError(_no_module(model))
    if layers := named_layers(model):
        raise RecipeError(f"model: {next(iter(layers)) or 'it'} is quantized already; start from the unquantized model")
    check_finished(model)
    found = collections.deque(holders(model))
    if all(holder.conversion is None for holder in found):
        raise RecipeError(
            f"model: {type(model).__name__} holds no module to quantize ({known_types()}); see fp8x.nn.register"
        )
    roles = roles_of(model)
    # A decoder knows how checkpoints name its layers.
    names = model.checkpoint_names() if hasattr(model, "checkpoint_names") else None
    chosen = decide(found, recipe, rules, kept_of(found, roles), names=names, others=without_matrices(model, found))
    recipes = {holder.path: recipe_of(holder, chosen[holder.path]) for holder in found}
    check_any(recipes.values())
    for holder in found:
        if recipes[holder.path] is not None:
            check_settable(model, holder.path)
            if recipes[holder.path].master_weights:
                conversion_in_training(holder.module, holder.path or "model")
            holder.conversion.check_before(holder.module, recipes[holder.path], holder.path or "model", allow_nonfinite)
    say_unsupported(found, chosen, roles, unsupported, report="fp8x.report(model)")
    model = _convert(model, found, recipes, chosen, allow_nonfinite)
    remember_paths(model)
    return model


def _no_module(model: Any) -> str:
    """What came in the place of an NNX module."""
    if isinstance(model, type):
        return f"model: the class {model.__name__} came; give an instance of it"
    if any(kind.__module__.startswith("flax.linen") for kind in type(model).__mro__):
        return f"model: {type(model).__name__} is a Linen module; fp8x.linen.quantize takes it, with its variables"
    return f"model: a {type(model).__name__} came; give an nnx.Module"


def _convert(
    model: nnx.Module,
    found: collections.deque[Holder],
    recipes: dict[str, Recipe | None],
    chosen: dict[str, Decision],
    allow_nonfinite: bool,
) -> nnx.Module:
    converted: dict[int, nnx.Module] = {}  # a module that is held twice stays one
    done: list[str] = []
    while found:
        holder = found.popleft()  # its module is gone before the next one is converted
        path, recipe = holder.path, recipes[holder.path]
        if recipe is None:
            why_left.set(holder.module, why_kept(holder, chosen[path]))
            continue
        if id(holder.module) not in converted:
            try:
                converted[id(holder.module)] = _converted(holder, recipe, allow_nonfinite)
            except Exception as error:
                if done:
                    error.add_note(f"fp8x.quantize_model: {some(done)} quantized already, {path} is not")
                raise
        if not path:
            return converted[id(holder.module)]
        set_module(model, path, converted[id(holder.module)])
        done.append(path)
    return model


def _converted(holder: Holder, recipe: Recipe, allow_nonfinite: bool) -> nnx.Module:
    if recipe.master_weights:
        return QuantizationAware(holder.module, recipe)
    name = holder.path or "model"
    layer = holder.conversion.convert(holder.module, recipe, name=name, allow_nonfinite=allow_nonfinite)
    # What is only queued holds its memory already, and that of the module before.
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(nnx.state(layer)) if not isinstance(leaf, jax.core.Tracer)])
    return layer
