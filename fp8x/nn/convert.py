"""From a model in 16 or 32 bits to a quantized one."""

import collections
import re
import warnings
from collections.abc import Mapping
from typing import Literal

from flax import nnx

from fp8x.errors import RecipeError, RuleError, some
from fp8x.nn.registry import Holder, holders, known_types
from fp8x.nn.report import SKIPPED, remember_why
from fp8x.nn.walk import check_settable, named_layers, set_module
from fp8x.recipe import Decision, Recipe, Rules, as_recipe

Unsupported = Literal["warn", "error", "ignore"]


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
        recipe: for what no rule names; a `Recipe`, its code, or None to quantize only what rules name.
        rules: path regex to a recipe, its code, or None to skip; the first that matches a whole path wins. Embeddings,
            `lm_head`, routers and gates are skipped unless a rule names them.
        unsupported: what to do about matrices that no rule skips and that can't be quantized: warn once, raise an
            error, or nothing. `fp8x.report(model)` lists them with the reasons.
        allow_nonfinite: quantize weights that hold NaN or Inf instead of raising.

    Returns:
        The model; a new layer where `model` itself is a layer.

    Raises:
        RecipeError: the model is quantized already, or holds nothing that can be quantized, or holds it in a tuple; or
            matrices that can't be quantized, if those are to be an error, or if a rule names them alone.
        RuleError: a rule that matches no module, or rules that skip all.
        ShapeError: a weight that its recipe does not fit, or NaN or Inf in it, named by path.
    """
    if unsupported not in ("warn", "error", "ignore"):
        raise RecipeError(f"unsupported: {unsupported!r} is unknown; use 'warn', 'error' or 'ignore'")
    if layers := named_layers(model):
        raise RecipeError(f"model: {next(iter(layers)) or 'it'} is quantized already; start from the unquantized model")
    found = collections.deque(holders(model))
    if all(holder.conversion is None for holder in found):
        raise RecipeError(
            f"model: {type(model).__name__} holds no module to quantize ({known_types()}); see fp8x.nn.register"
        )
    chosen = Rules(None if recipe is None else as_recipe(recipe), rules or {}).decide(holder.path for holder in found)
    recipes = {holder.path: _recipe(holder, chosen[holder.path]) for holder in found}
    _check_rules(rules or {}, found, chosen)
    if not any(recipes.values()):
        raise RuleError("rules: they skip every module; nothing would be quantized")
    for holder in found:
        if recipes[holder.path] is not None:
            check_settable(model, holder.path)
            holder.conversion.check_before(holder.module, recipes[holder.path], holder.path or "model", allow_nonfinite)
    _say_unsupported([holder for holder in found if _is_unsupported(holder, chosen[holder.path])], unsupported)
    return _convert(model, found, recipes, chosen, allow_nonfinite)


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
            remember_why(holder.module, _why_kept(holder, chosen[path]))
            continue
        if id(holder.module) not in converted:
            try:
                converted[id(holder.module)] = holder.conversion.convert(
                    holder.module, recipe, name=path or "model", allow_nonfinite=allow_nonfinite
                )
            except Exception as error:
                if done:
                    error.add_note(f"fp8x.quantize_model: {some(done)} quantized already, {path} is not")
                raise
        if not path:
            return converted[id(holder.module)]
        set_module(model, path, converted[id(holder.module)])
        done.append(path)
    return model


def _recipe(holder: Holder, decision: Decision) -> Recipe | None:
    if holder.conversion is None or (holder.conversion.on_request and decision.pattern is None):
        return None
    return decision.recipe


def _why_kept(holder: Holder, decision: Decision) -> str:
    if decision.recipe is None and decision.pattern is not None:
        return f"the rule {decision.pattern!r} says so"
    if holder.conversion is None:
        return holder.fault
    if decision.is_skip or holder.conversion.on_request:
        return SKIPPED
    return "no rule names it, and the model had no recipe"


def _is_unsupported(holder: Holder, decision: Decision) -> bool:
    return holder.holds_matrix and holder.conversion is None and decision.recipe is not None


def _check_rules(rules: Mapping, found: collections.deque[Holder], chosen: dict[str, Decision]) -> None:
    """A rule with a recipe has to reach something that can have it."""
    for pattern, value in rules.items():
        reached = [holder for holder in found if re.fullmatch(pattern, holder.path)]
        if value is not None and all(holder.conversion is None for holder in reached):
            raise RecipeError(f"rules: {pattern!r} names what can't be quantized: {_described(reached)}")


def _say_unsupported(left: list[Holder], unsupported: Unsupported) -> None:
    if not left or unsupported == "ignore":
        return
    count = sum(reason is None for holder in left for _, reason in holder.matrices.values())
    text = (
        f"fp8x can't quantize {count} {'matrix' if count == 1 else 'matrices'} of the model: {_described(left)}. "
        "A rule with None for a path says that it is to stay; fp8x.report(model) lists every matrix"
    )
    if unsupported == "error":
        raise RecipeError(f"model: {text}")
    warnings.warn(text, stacklevel=3)


def _described(left: list[Holder]) -> str:
    each = [f"{holder.path or 'model'} ({holder.fault})" for holder in left]
    rest = f", and {len(each) - 4} more" if len(each) > 4 else ""
    return "; ".join(each[:4]) + rest
