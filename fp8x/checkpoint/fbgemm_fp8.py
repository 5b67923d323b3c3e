"""`quant_method: "fbgemm_fp8"`: FBGEMM's, as Meta publishes Llama-3.1-405B-FP8 and transformers writes it. Read only.

    field                  means
    activation_scale_ub    the largest amax that a token may have, 1200 if missing
    modules_to_not_convert names that stay in 16 bits

Weights are e4m3 per channel, `weight_scale` F32 `[N, 1]`; activations e4m3 per token, dynamic. FBGEMM and vLLM take
`scale = min(amax, activation_scale_ub) / 448` and clip what lies beyond (`QuantFP8` in vLLM's
quantization/input_quant_fp8.py, `computeFP8QuantizeScale` in FBGEMM's quantize.cu). A `Scheme` has no such bound: fp8x
takes the token's own amax, and says so. Tokens within the bound come out the same.

Llama-4's experts, `gate_up_proj` `[E, K, 2I]`, are refused (`fused.py`).

Sources: transformers `quantizers/quantizer_fbgemm_fp8.py`, `integrations/fbgemm_fp8.py`; vLLM
`quantization/fbgemm_fp8.py`.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import SCALE_DTYPES, Layout, Recipes, TensorSpec, weight_spec
from fp8x.checkpoint.names import listed
from fp8x.checkpoint.read_only import ReadOnly
from fp8x.recipe import Recipe
from fp8x.scheme import per_row


class FbgemmFp8(ReadOnly):
    """Weights per channel, activations per token."""

    name = quant_method = "fbgemm_fp8"
    instead = "'compressed-tensors' and 'modelopt' hold the same"

    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        fields = Fields(config, "quantization_config")
        bound = fields.peek("activation_scale_ub", 1200.0)
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
            raise fields.error("activation_scale_ub", "a positive number")
        warn_of_bound(f"config.json: quantization_config.activation_scale_ub is {bound!r}")
        recipe = Recipe(per_row(), per_row(), "dynamic", out_dtype)
        is_kept = listed(fields.strings("modules_to_not_convert", []))
        return {prefix: None if is_kept(prefix) else recipe for prefix in prefixes}

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        scale = TensorSpec((".weight_scale",), ((shape[0], 1), (shape[0],)), SCALE_DTYPES)
        return Layout(weight_spec(recipe, shape), scale)


def warn_of_bound(stated: str) -> None:
    """Warns of a bound of the activations' amax, which a `Scheme` has not; `stated` says where it stands."""
    warnings.warn(
        f"{stated}: it bounds the amax from which the scale of an activation follows. fp8x has no such bound: scales "
        "follow from the amax itself, so activations beyond the bound are not clipped, and others beside them get "
        "coarser steps",
        stacklevel=4,
    )
