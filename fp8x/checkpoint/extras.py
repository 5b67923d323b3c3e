"""What a recipe holds and no other tool's config does: under `"fp8x"` in `quantization_config`, which others pass by.

Nothing is written where a reader would come to the same recipe without it.
"""

import dataclasses
from typing import Any

from fp8x.checkpoint.fields import Fields
from fp8x.recipe import OUT_DTYPES, Recipe
from fp8x.scheme import SCALE_RULES, Scheme

KEY = "fp8x"


def extras(recipe: Recipe, derived: Recipe) -> dict[str, Any]:
    """What to add so that a reader who derives `derived` from a config's other fields comes to `recipe`."""
    fields: dict[str, Any] = {}
    for name in ("weight", "activation"):
        scheme, other = getattr(recipe, name), getattr(derived, name)
        if scheme is not None and scheme.scale_rule != other.scale_rule:
            fields[f"{name}_scale_rule"] = scheme.scale_rule
    if recipe.is_static and recipe.activation.block != derived.activation.block:
        fields["activation_block"] = list(recipe.activation.block)
    if recipe.out_dtype != derived.out_dtype:
        fields["out_dtype"] = str(recipe.out_dtype)
    return fields


def apply_extras(recipe: Recipe, fields: Fields) -> Recipe:
    """The inverse of `extras`: `recipe` is what the other fields say."""

    def scheme(name: str) -> Scheme | None:
        plain: Scheme | None = getattr(recipe, name)
        if plain is None:
            return None
        rule = fields.one_of(f"{name}_scale_rule", *SCALE_RULES[plain.scale_dtype], default=plain.scale_rule)
        return dataclasses.replace(plain, scale_rule=rule)

    if recipe.is_static:
        plain = list(recipe.activation.block)
        block = fields.one_of("activation_block", plain, [None, recipe.weight.block[-1]], default=plain)
        recipe = dataclasses.replace(recipe, activation=dataclasses.replace(recipe.activation, block=tuple(block)))
    out_dtype = fields.one_of("out_dtype", *map(str, OUT_DTYPES.values()), default=str(recipe.out_dtype))
    return dataclasses.replace(recipe, weight=scheme("weight"), activation=scheme("activation"), out_dtype=out_dtype)
