"""A `Recipe` as JSON, spelled out field by field: short codes may come to mean something else, files stay."""

from collections.abc import Mapping
from typing import Any

from fp8x.errors import CheckpointError, Fp8xError
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme


def to_json(recipe: Recipe) -> dict[str, Any]:
    """What `from_json` reads. Without the observer: what is stored has been calibrated."""
    return {
        "weight": _scheme_to_json(recipe.weight),
        "activation": None if recipe.activation is None else _scheme_to_json(recipe.activation),
        "activation_scale": recipe.activation_scale,
        "out_dtype": str(recipe.out_dtype),
    }


def from_json(value: Any, where: str) -> Recipe:
    """The recipe in a JSON value.

    Raises:
        CheckpointError: fields that are missing, unknown or do not fit; `where` they stand is in the message.
    """
    try:
        _check_fields(value, ("weight", "activation", "activation_scale", "out_dtype"))
        schemes = {
            name: None if value[name] is None else _scheme_from_json(value[name]) for name in ("weight", "activation")
        }
        return Recipe(**value | schemes)
    except (TypeError, Fp8xError) as error:
        raise CheckpointError(f"{where}: is no recipe that fp8x knows: {error}") from None


def _scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    return {
        "element": scheme.element,
        "block": list(scheme.block),
        "scale_dtype": str(scheme.scale_dtype),
        "scale_rule": scheme.scale_rule,
    }


def _scheme_from_json(value: Any) -> Scheme:
    _check_fields(value, ("element", "block", "scale_dtype", "scale_rule"))
    return Scheme(**value)


def _check_fields(value: Any, fields: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping) or set(value) != set(fields):
        found = ", ".join(value) if isinstance(value, Mapping) else repr(value)
        raise CheckpointError(f"it has {found:.200}, expected {', '.join(fields)}")
