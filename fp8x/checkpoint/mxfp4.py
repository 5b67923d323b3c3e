"""`quant_method: "mxfp4"`: gpt-oss as OpenAI publishes it, with experts in MXFP4.

    field                  means
    modules_to_not_convert names that stay in 16 bits, or null; written with the modules of experts that do
    dequantize             whether transformers does so while loading; what is stored is the same

Activations are in 16 bits. Tensors hold all experts of a layer, gate and up alternating (`fused.py`): read as MXFP8,
and written back where every code is one of e2m1's (`fusing.py`).

Sources: transformers `quantizers/quantizer_mxfp4.py`, `integrations/mxfp4.py`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.extras import KEY, apply_extras, extras
from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import Format, Layout, Recipes, TensorSpec, mx_scale, weight_spec
from fp8x.checkpoint.fp8 import kept_modules
from fp8x.checkpoint.names import listed
from fp8x.checkpoint.reader import Reader
from fp8x.errors import CheckpointError, some
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme, mx

# As in the published models.
KEPT = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")

_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")


class Mxfp4(Format):
    """Weight-only MXFP4, of experts."""

    name = quant_method = "mxfp4"
    packs = True

    def objection(self, recipes: Iterable[Recipe]) -> str | None:
        recipes = list(recipes)
        for recipe in recipes:
            if not recipe.weight.stores_alike(mx()):
                return f"weights {recipe.weight} are not in MX blocks"
            if recipe.activation is not None:
                return f"no activations in 8 bits, here {recipe.activation}"
        return "one recipe for all layers" if len(set(recipes)) > 1 else None

    def to_config(self, recipes: Recipes, out_dtype: np.dtype) -> dict[str, Any]:
        (recipe,) = {recipe for recipe in recipes.values() if recipe is not None}
        fields = extras(recipe, Recipe(mx(), out_dtype=out_dtype))
        kept = [*KEPT, *_kept_experts(recipes)]
        written = {"modules_to_not_convert": kept, "quant_method": self.quant_method}
        return written | ({KEY: fields} if fields else {})

    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        fields = Fields(config, "quantization_config")
        fields.one_of("dequantize", True, False, None, default=None)
        is_kept, recipe = listed(kept_modules(fields)), _recipe(fields, out_dtype)
        return {prefix: None if is_kept(prefix) else recipe for prefix in prefixes}

    def recipes(self, reader: Reader, prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        """By the tensors, which say it all: `modules_to_not_convert` of others lists what has none in 4 bits anyway."""
        found = dict(super().recipes(reader, prefixes, out_dtype))
        recipe = _recipe(Fields(reader.config["quantization_config"], "quantization_config"), out_dtype)
        return found | dict.fromkeys(self.packed_prefixes(reader, found), recipe)

    def kv_fields(self, scheme: Scheme) -> dict[str, Any] | None:
        return None

    def kv_scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        return None

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        return Layout(weight_spec(recipe, shape), mx_scale(recipe, shape))

    def written(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        """A part of tensors that hold all experts."""
        weight = TensorSpec((".weight_blocks",), ((shape[0], shape[1] // 2),), ("U8",))
        scale = TensorSpec((".weight_scales",), (recipe.weight.scale_shape(shape),), ("U8",))
        return Layout(weight, scale)


def _kept_experts(recipes: Recipes) -> list[str]:
    """The modules of experts that are in 16 bits.

    Raises:
        CheckpointError: some of a module's are, and some are not: readers know all or none.
    """
    blocks: dict[str, dict[str, Recipe | None]] = {}
    for prefix, recipe in recipes.items():
        if match := _EXPERT.fullmatch(prefix):
            blocks.setdefault(match[1], {})[prefix] = recipe
    for found in blocks.values():
        lacking = [prefix for prefix, recipe in found.items() if recipe is None]
        if 0 < len(lacking) < len(found):
            raise CheckpointError(
                f"format: 'mxfp4' holds gate, up and down of all experts in a layer, or none; {some(lacking)} in 16 "
                "bits; use 'mxfp4-pack-quantized'"
            )
    return [block for block, found in blocks.items() if not any(found.values())]


def _recipe(fields: Fields, out_dtype: np.dtype) -> Recipe:
    return apply_extras(Recipe(mx(), out_dtype=out_dtype), fields.object(KEY, {}))
