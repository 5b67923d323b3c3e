"""`quant_method: "fp8"`: per tensor as vLLM and AutoFP8 write it, 128×128 blocks as DeepSeek-V3 does.

    field                  means
    activation_scheme      "static": `input_scale` is on disk; "dynamic": from each input
    weight_block_size      [128, 128], or null (or missing) for one scale a matrix
    fmt                    "e4m3" (if missing) or "e5m2", DeepSeek's field
    scale_fmt              "ue8m0": float32 scales are powers of two (DeepSeek-V3.1); scale rule "pow2"
    modules_to_not_convert names that stay in 16 bits (`ignored_layers` is read too)

Dynamic activations are quantized per token beside per-tensor weights (as vLLM does: then a row's result does not
depend on the other rows), per token and K-group beside blocks. Ours alone: `activation_scheme: "static"` beside blocks,
with an `input_scale` of `[K / 128]`, one for each K-group.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.extras import KEY, apply_extras, extras
from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import Format, Layout, Recipes, TensorSpec, weight_spec
from fp8x.checkpoint.names import is_listed
from fp8x.recipe import Recipe
from fp8x.scheme import ELEMENTS, FLOAT32, Scheme

SCALES = ("F32", "BF16", "F8_E8M0")


class Fp8(Format):
    """Per-tensor and block weights with activations of the same element type; one recipe a model."""

    name = quant_method = "fp8"

    def objection(self, recipes: Iterable[Recipe]) -> str | None:
        unique = list(dict.fromkeys(recipes))
        if len(unique) > 1:
            return f"one recipe for all layers; this model has {'; '.join(map(_describe, unique[:3]))}"
        for recipe in unique:
            weight, activation = recipe.weight, recipe.activation
            if activation is None:
                return "no weight-only form: activation_scheme is static or dynamic"
            if weight.is_mx or not (weight.block == (None, None) or (len(weight.block) == 2 and all(weight.block))):
                return f"weights {weight} are neither per tensor nor 2-d blocks with float32 scales"
            fits = _activation(weight, recipe.activation_scale)
            if (activation.element, activation.block, activation.scale_dtype) != (fits.element, fits.block, FLOAT32):
                return f"{recipe.activation_scale} activations beside weights {weight} are {fits}, not {activation}"
        return None

    def to_config(self, recipes: Recipes, out_dtype: np.dtype) -> dict[str, Any]:
        (recipe,) = {recipe for recipe in recipes.values() if recipe is not None}
        weight = recipe.weight
        config = {
            "quant_method": self.quant_method,
            "activation_scheme": recipe.activation_scale,
            "fmt": weight.element,
            # Written as null too: transformers takes [128, 128] where the field is missing.
            "weight_block_size": None if weight.block == (None, None) else list(weight.block),
            "modules_to_not_convert": [prefix for prefix, other in recipes.items() if other is None],
        }
        if weight.scale_rule == "pow2":
            config["scale_fmt"] = "ue8m0"
        fields = extras(recipe, _recipe(Fields(config, "quantization_config"), out_dtype))
        return config | ({KEY: fields} if fields else {})

    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        fields = Fields(config, "quantization_config")
        recipe = apply_extras(_recipe(fields, out_dtype), fields.object(KEY, {}))
        name = "ignored_layers" if fields.get("modules_to_not_convert", None) is None else "modules_to_not_convert"
        kept = fields.strings(name, [])
        return {prefix: None if is_listed(prefix, kept) else recipe for prefix in prefixes}

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        if recipe.weight.block == (None, None):
            # The second names are transformers' own.
            scale = TensorSpec((".weight_scale", ".weight_scale_inv"), ((), (1,)), SCALES)
            inputs = TensorSpec((".input_scale", ".activation_scale"), ((), (1,)), SCALES)
        else:
            scale = TensorSpec((".weight_scale_inv",), (recipe.weight.scale_shape(shape),), SCALES)
            groups = recipe.activation.scale_shape((1, shape[1]))[-1]
            inputs = TensorSpec((".input_scale",), ((groups,),), SCALES)
        return Layout(weight_spec(recipe, shape), scale, inputs if recipe.is_static else None)


def _recipe(fields: Fields, out_dtype: np.dtype) -> Recipe:
    activation_scale = fields.one_of("activation_scheme", "static", "dynamic")
    element = fields.one_of("fmt", *ELEMENTS, default="e4m3")
    rule = "pow2" if fields.one_of("scale_fmt", None, "float", "ue8m0", default=None) == "ue8m0" else "amax"
    whole = fields.get("weight_block_size", None) is None
    weight = Scheme(element, block=(None, None) if whole else fields.block("weight_block_size"), scale_rule=rule)
    return Recipe(weight, _activation(weight, activation_scale), activation_scale, out_dtype)


def _activation(weight: Scheme, activation_scale: str) -> Scheme:
    """The activations that belong to a weight, since the config does not describe them."""
    rows = None if activation_scale == "static" else 1
    return Scheme(weight.element, block=(rows, weight.block[1]), scale_rule=weight.scale_rule)


def _describe(recipe: Recipe) -> str:
    return f"{recipe.weight} × {recipe.activation or '16 bits'}"
