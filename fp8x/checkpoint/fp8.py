"""`quant_method: "fp8"`: per tensor as vLLM and AutoFP8 write it, 128×128 blocks as DeepSeek-V3 does.

    field                  means
    activation_scheme      "static": `input_scale` is on disk; "dynamic": from each input
    weight_block_size      [128, 128], or null (or missing) for one scale a matrix
    fmt                    "e4m3" (if missing) or "e5m2", DeepSeek's field
    scale_fmt              "ue8m0": scales are powers of two (scale rule "pow2"): float32 in DeepSeek-V3.1, a byte in
                           transformers
    modules_to_not_convert names that stay in 16 bits (`ignored_layers` is read too)
    expert_dtype           "fp4": experts are in MXFP4 (`packed.py`), whose own tensors say so too: DeepSeek-V4
    kv_cache_scheme        "static": there are scales of a KV cache in FP8, AutoFP8's field

Beside MXFP4 activations are MXFP8, as DeepGEMM has them there; DeepSeek-V4 calls scales `….scale`.

Dynamic activations are quantized per token beside per-tensor weights: a row's result then does not depend on the other
rows. So does vLLM wherever its CUTLASS kernels run (`Fp8LinearMethod` in quantization/fp8.py takes
`kFp8DynamicTokenSym` if `cutlass_fp8_supported()`, one scale for all tokens elsewhere), and so does transformers
(`fp8_linear`: "leave None for dynamic (per-token)"). Beside blocks they are per token and K-group.

Static activations have one scale, beside blocks too, as in transformers (vLLM has none there). Ours alone: an
`input_scale` of `[K / 128]` beside blocks, one for each K-group.

Blocks at the edges are ragged: the grid is `ceil(N / 128) × ceil(K / 128)`, as in DeepSeek-V3 and vLLM. (transformers
writes whole blocks alone; where it dequantizes, it divides the matrix evenly by the grid, which is another block.)
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.extras import KEY, apply_extras, extras
from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import Format, Layout, Recipes, TensorSpec, mx_scale, weight_spec
from fp8x.checkpoint.names import listed
from fp8x.checkpoint.reader import Reader
from fp8x.recipe import Recipe
from fp8x.scheme import ELEMENTS, KV_SCHEMES, Scheme, mx

SCALES = ("F32", "BF16", "F8_E8M0")
ONE = ((), (1,), (1, 1))  # how tools shape a single scale; the first is written


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
            fits = _activations(weight, recipe.activation_scale)
            if _kind(activation) not in map(_kind, fits):
                fits = " or ".join(map(str, fits))
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
        is_kept = listed(kept_modules(fields))
        return {prefix: None if is_kept(prefix) else recipe for prefix in prefixes}

    def recipes(self, reader: Reader, prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        found = dict(super().recipes(reader, prefixes, out_dtype))
        fields = Fields(reader.config["quantization_config"], "quantization_config")
        fields.one_of("expert_dtype", None, "fp8", "fp4", default=None)
        packed = self.packed_prefixes(reader, found)
        if packed:
            fields.one_of("activation_scheme", "dynamic")
        return found | dict.fromkeys(packed, Recipe(mx(), mx(), "dynamic", out_dtype))

    def kv_fields(self, scheme: Scheme) -> dict[str, Any] | None:
        return {"kv_cache_scheme": "static"} if scheme == KV_SCHEMES["tensor"] else None

    def kv_scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        fields = Fields(config, "quantization_config")
        stated = fields.one_of("kv_cache_scheme", None, "static", default=None)
        return None if stated is None else KV_SCHEMES["tensor"]

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        weight = recipe.weight
        dtypes = (*SCALES, "U8") if weight.scale_rule == "pow2" else SCALES
        if weight.is_mx:
            return Layout(weight_spec(recipe, shape), mx_scale(recipe, shape))
        # ….weight_scale_inv and ….activation_scale are transformers' own names for single scales.
        if weight.block == (None, None):
            scale = TensorSpec((".weight_scale", ".weight_scale_inv"), ONE, dtypes)
            inputs = TensorSpec((".input_scale", ".activation_scale"), ONE, SCALES)
        else:
            scale = TensorSpec((".weight_scale_inv", ".scale"), (weight.scale_shape(shape),), dtypes)
            inputs = TensorSpec((".activation_scale", ".input_scale"), ONE, SCALES)
            if recipe.is_static and recipe.activation.block != (None, None):
                groups = recipe.activation.scale_shape((1, shape[1]))[-1]
                inputs = TensorSpec((".input_scale",), ((groups,),), SCALES)
        return Layout(weight_spec(recipe, shape), scale, inputs if recipe.is_static else None)


def kept_modules(fields: Fields) -> list[str]:
    """The names that stay in 16 bits, from whichever of the two fields is there."""
    name = "ignored_layers" if fields.get("modules_to_not_convert", None) is None else "modules_to_not_convert"
    return fields.strings(name, [])


def _recipe(fields: Fields, out_dtype: np.dtype) -> Recipe:
    activation_scale = fields.one_of("activation_scheme", "static", "dynamic")
    element = fields.one_of("fmt", *ELEMENTS, default="e4m3")
    rule = "pow2" if fields.one_of("scale_fmt", None, "float", "ue8m0", default=None) == "ue8m0" else "amax"
    whole = fields.get("weight_block_size", None) is None
    weight = Scheme(element, block=(None, None) if whole else fields.block("weight_block_size"), scale_rule=rule)
    return Recipe(weight, _activations(weight, activation_scale)[0], activation_scale, out_dtype)


def _activations(weight: Scheme, activation_scale: str) -> list[Scheme]:
    """The activations that fit a weight; the first belongs to it, since the config does not describe them."""
    columns = weight.block[1]
    blocks = [(1, columns)] if activation_scale == "dynamic" else [(None, None), (None, columns)]
    return [Scheme(weight.element, block=block, scale_rule=weight.scale_rule) for block in dict.fromkeys(blocks)]


def _kind(scheme: Scheme) -> tuple:
    """A scheme without its rule, which other tools do not need to read it."""
    return scheme.element, scheme.block, scheme.scale_dtype


def _describe(recipe: Recipe) -> str:
    return f"{recipe.weight} × {recipe.activation or '16 bits'}"
