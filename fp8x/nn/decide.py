"""Which of the modules found in a model get which recipe, and what is said about the others; NNX or Linen."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from fp8x.errors import RecipeError, RuleError
from fp8x.recipe import Decision, Recipe, Rules, as_recipe
from fp8x.roles import Roles, by_name

Unsupported = Literal["warn", "error", "ignore"]

OVERRIDE = "; a rule quantizes it"
EMBEDDING = "an embedding"


class Candidate(Protocol):
    """A module that can be quantized, or that holds a matrix.

    Attributes:
        path: where it is.
        fault: why it can't be quantized; None if it can.
        on_request: whether only a rule that names it gets it quantized.
        matrices: its parameters of two or more dims, by name, each with the reason why it is no matrix, or None.
    """

    path: str
    fault: str | None
    on_request: bool
    matrices: Mapping[str, tuple[Any, str | None]]


def check_unsupported(unsupported: Unsupported) -> None:
    """Raises a RecipeError for an option that is none."""
    if unsupported not in get_args(Unsupported):
        raise RecipeError(f"unsupported: {unsupported!r} is unknown; use 'warn', 'error' or 'ignore'")


def decide(
    found: Sequence[Candidate],
    recipe: Recipe | str | None,
    rules: Mapping[str, Recipe | str | None] | None,
    kept: Mapping[str, str],
) -> dict[str, Decision]:
    """What recipe and rules say of every path; `kept` as `kept_of` has it.

    Raises:
        RecipeError: a rule with a recipe that names only what can't be quantized.
        RuleError: a rule that matches no module.
    """
    paths = (each.path for each in found)
    chosen = Rules(None if recipe is None else as_recipe(recipe), rules or {}).decide(paths, kept=kept)
    for pattern, value in (rules or {}).items():
        reached = [each for each in found if re.fullmatch(pattern, each.path)]
        if value is not None and all(each.fault is not None for each in reached):
            raise RecipeError(f"rules: {pattern!r} names what can't be quantized: {_described(reached)}")
    return chosen


def kept_of(found: Iterable[Candidate], roles: Roles) -> dict[str, str]:
    """What those are that stay unless a rule names them, by path; of types without a known shape by the name alone."""
    unknown = (each.path for each in found if each.path not in roles.products)
    return dict(roles.kept) | {path: reason for path in unknown if (reason := by_name(path)) is not None}


def check_any(recipes: Iterable[Recipe | None]) -> None:
    """Raises a RuleError where nothing would be quantized."""
    if not any(recipes):
        raise RuleError("rules: they skip every module; nothing would be quantized")


def recipe_of(candidate: Candidate, decision: Decision) -> Recipe | None:
    """What a candidate gets."""
    if candidate.fault is not None or (candidate.on_request and decision.pattern is None):
        return None
    return decision.recipe


def why_kept(candidate: Candidate, decision: Decision) -> str:
    """Why it gets none."""
    if decision.recipe is None and decision.pattern is not None:
        return f"the rule {decision.pattern!r} says so"
    if candidate.fault is not None:
        return candidate.fault
    if decision.kept or candidate.on_request:
        return (decision.kept or EMBEDDING) + OVERRIDE
    return "no rule names it, and the model had no recipe"


def say_unsupported(
    found: Sequence[Candidate],
    chosen: Mapping[str, Decision],
    roles: Roles,
    unsupported: Unsupported,
    *,
    report: str,
) -> None:
    """Warns the caller of the function that calls this, or raises, about matrices that should be quantized and can't;
    and warns of what may be the router of experts, and is quantized.

    `report` is the call that lists every matrix.
    """
    if unsupported == "ignore":
        return
    left = [each for each in found if each.fault is not None and chosen[each.path].recipe is not None]
    left = [each for each in left if any(reason is None for _, reason in each.matrices.values())]
    texts = []
    if left:
        count = sum(reason is None for each in left for _, reason in each.matrices.values())
        matrices = "matrix" if count == 1 else "matrices"
        texts.append(f"fp8x can't quantize {count} {matrices} of the model: {_described(left)}")
    end = f"A rule with None for a path says that it is to stay; {report} lists every matrix"
    if left and unsupported == "error":
        raise RecipeError(f"model: {texts[0]}. {end}")
    quantized = {each.path for each in found if recipe_of(each, chosen[each.path]) is not None}
    missed = [path for path in roles.missed if path in quantized and chosen[path].pattern is None]
    if missed:
        listed = "; ".join(f"{path} ({roles.doubts[path]})" for path in missed[:4])
        more = f", and {len(missed) - 4} more" if len(missed) > 4 else ""
        texts.append(f"a router of experts is not known by name or shape, and is quantized if it is {listed}{more}")
    if texts:
        warnings.warn(". ".join([*texts, end]), stacklevel=3)


def _described(left: Sequence[Candidate]) -> str:
    each = [f"{candidate.path or 'model'} ({candidate.fault})" for candidate in left]
    rest = f", and {len(each) - 4} more" if len(each) > 4 else ""
    return "; ".join(each[:4]) + rest
