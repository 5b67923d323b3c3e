"""`quant_method: "mxfp8"`: bare MXFP8, as MiniMax publishes it and vLLM, SGLang and transformers read it. Read only.

    field                  means
    weight_block_size      [1, 32], or missing
    scale_fmt              "ue8m0", or missing
    activation_scheme      "dynamic", or missing: MXFP8 too, from each input
    modules_to_not_convert names that stay in 16 bits (or `ignored_layers`)

`weight_scale_inv` is U8 `[N, K / 32]`; byte b means 2^(b-127). Sources: SGLang `quantization/fp8.py` (`use_mxfp8`),
vLLM `quantization/__init__.py`, transformers `quantizers/auto.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import Layout, Recipes, mx_scale, weight_spec
from fp8x.checkpoint.fp8 import kept_modules
from fp8x.checkpoint.names import listed
from fp8x.checkpoint.read_only import ReadOnly
from fp8x.recipe import Recipe
from fp8x.scheme import mx


class Mxfp8(ReadOnly):
    """MXFP8 weights and activations."""

    name = quant_method = "mxfp8"
    instead = "'modelopt' and 'compressed-tensors' hold MXFP8"

    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        fields = Fields(config, "quantization_config")
        fields.one_of("weight_block_size", [1, 32], None, default=None)
        fields.one_of("scale_fmt", "ue8m0", None, default=None)
        fields.one_of("activation_scheme", "dynamic", default="dynamic")
        recipe, is_kept = Recipe(mx(), mx(), "dynamic", out_dtype), listed(kept_modules(fields))
        return {prefix: None if is_kept(prefix) else recipe for prefix in prefixes}

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        return Layout(weight_spec(recipe, shape), mx_scale(recipe, shape))
