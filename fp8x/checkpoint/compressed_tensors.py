"""`quant_method: "compressed-tensors"`: what llm-compressor writes and vLLM reads.

`format` is "float-quantized" (float32 scales), "mxfp8-quantized" (e8m0 scales as U8) or "mxfp4-pack-quantized" (these
beside e2m1, two codes a byte: `weight_packed`), and "mixed-precision" for several in one model.

Fields and shapes follow compressed-tensors 0.20: `quantization/quant_args.py`, `quant_scheme.py` (presets FP8,
FP8_DYNAMIC, FP8_BLOCK, MXFP8, MXFP8A16, MXFP4, MXFP4A16, MXFP4XFP8), `lifecycle/initialize.py` and
`compressors/mxfp4/base.py`.
`kv_cache_scheme` declares a KV cache in FP8, also where nothing else is quantized.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.extras import KEY, apply_extras, extras
from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import SCALE_DTYPES, Format, Layout, Recipes, TensorSpec, weight_spec
from fp8x.checkpoint.names import first_target, patterns
from fp8x.checkpoint.packed import warn_of_activations
from fp8x.recipe import Recipe
from fp8x.scheme import KV_HEAD, KV_SCHEMES, KV_TENSOR, Scheme, mx, per_row, per_tensor

FLOAT, MXFP8, MXFP4 = "float-quantized", "mxfp8-quantized", "mxfp4-pack-quantized"
MIXED = "mixed-precision"
NAIVE = "naive-quantized"  # what the library infers for weight-only FP8; stored alike
UINT8 = ("torch.uint8", "uint8")
LINEAR = "Linear"  # the class name that stands for every matrix


class CompressedTensors(Format):
    """Per tensor, per channel, block and MXFP8 weights, e4m3 only."""

    name = quant_method = "compressed-tensors"
    holds_several = holds_kv_alone = True
    of_mx = MXFP8  # what the format of MX matrices is called

    def objection(self, recipes: Iterable[Recipe]) -> str | None:
        for recipe in recipes:
            if "e5m2" in (recipe.weight.element, recipe.activation and recipe.activation.element):
                return "no e5m2: its 8-bit floats are e4m3"
            if _weight_args(recipe) is None:
                return f"weights {recipe.weight} are neither per tensor, per channel, 2-d blocks nor MXFP8"
            if recipe.activation is not None and _input_args(recipe) is None:
                return f"{recipe.activation_scale} activations {recipe.activation} have no strategy there"
        return None

    def to_config(self, recipes: Recipes, out_dtype: np.dtype) -> dict[str, Any]:
        # The commonest recipe takes every matrix that no other group names, as the library's own files have it. Last:
        # the library warns of every target that matches only what an earlier one did (`match_named_modules`).
        ordered = [r for r, _ in reversed(Counter(r for r in recipes.values() if r is not None).most_common())]
        formats = {recipe: self.of_mx if recipe.weight.is_mx else FLOAT for recipe in ordered}
        groups, added = {}, {}
        for index, recipe in enumerate(ordered):
            name, mine = f"group_{index}", [prefix for prefix, other in recipes.items() if other == recipe]
            groups[name] = {
                "targets": [LINEAR] if recipe == ordered[-1] else patterns(mine, set(recipes) - set(mine)),
                "weights": _packed(_weight_args(recipe)) if self.packs else _weight_args(recipe),
                "input_activations": _input_args(recipe),
                "output_activations": None,
            }
            if fields := extras(recipe, _recipe(Fields(groups[name], name), out_dtype, recipe.weight.is_mx)):
                added[name] = fields
            if len(set(formats.values())) > 1:
                groups[name]["format"] = formats[recipe]
        kept = [prefix for prefix, recipe in recipes.items() if recipe is None]
        return {
            "quant_method": self.quant_method,
            "format": MIXED if len(set(formats.values())) > 1 else next(iter(formats.values()), FLOAT),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": patterns(kept, set(recipes) - set(kept)) if groups else [],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        } | ({KEY: added} if added else {})

    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        fields = Fields(config, "quantization_config")
        common = None
        if fields.get("format", None) is not None or not _name_formats(fields):
            common = fields.one_of("format", FLOAT, NAIVE, MXFP8, MXFP4, MIXED)
        fields.one_of("quantization_status", "compressed", default="compressed")
        for name in ("sparsity_config", "transform_config"):
            # Both change what the stored weights mean, but for zeros that are stored like all else.
            if (stated := fields.peek(name)) and not _is_dense(stated):
                raise fields.error(name, "none: fp8x reads quantization alone")
        added = fields.object(KEY, {})
        targets: dict[str, Recipe] = {}
        groups = fields.object("config_groups", {})
        for name in groups.value:
            group = _group(groups, name)
            own = group.one_of("format", None, FLOAT, NAIVE, MXFP8, MXFP4, default=None) or common
            recipe = apply_extras(_recipe(group, out_dtype, own == MXFP8), added.object(name, {}))
            targets |= dict.fromkeys(group.strings("targets"), recipe)
        if not targets and fields.get("kv_cache_scheme", None) is None:
            raise fields.error("config_groups", "an object of groups with targets")
        ignored = first_target(fields.strings("ignore", []), LINEAR)
        target = first_target(targets, LINEAR)
        # No target is called None: what none matches has no recipe.
        return {prefix: None if ignored(prefix) is not None else targets.get(target(prefix)) for prefix in prefixes}

    def kv_fields(self, scheme: Scheme) -> dict[str, Any] | None:
        dynamic = scheme == per_row()
        strategy = {KV_TENSOR: "tensor", KV_HEAD: "attn_head"}.get(scheme.block, "token" if dynamic else None)
        if strategy is None or scheme.element != "e4m3":
            return None
        args = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": dynamic, "symmetric": True}
        return {"kv_cache_scheme": args}

    def kv_scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        fields = Fields(config, "quantization_config")
        if fields.get("kv_cache_scheme", None) is None:
            return None
        args = fields.object("kv_cache_scheme")
        args.one_of("num_bits", 8)
        args.one_of("type", "float")
        args.one_of("symmetric", True, default=True)
        if args.one_of("dynamic", False, True, default=False):
            return per_row()
        strategy = args.one_of("strategy", "tensor", "attn_head", None, default=None)
        return KV_SCHEMES["head" if strategy == "attn_head" else "tensor"]

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        scheme, n = recipe.weight, shape[0]
        scale_shape = scheme.scale_shape(shape)
        shapes = {(None, None): ((1,), ()), (1, None): ((n, 1), (n,))}.get(scheme.block, (scale_shape,))
        dtypes = ("U8", "F8_E8M0") if scheme.is_mx else SCALE_DTYPES
        return Layout(
            weight_spec(recipe, shape),
            TensorSpec((".weight_scale",), shapes, dtypes),
            TensorSpec((".input_scale",), ((1,), ()), SCALE_DTYPES) if recipe.is_static else None,
        )


class PackedCompressedTensors(CompressedTensors):
    """MXFP4 weights, with activations in 16 or 8 bits. Written; `CompressedTensors` reads it."""

    name = of_mx = MXFP4
    packs = True

    def objection(self, recipes: Iterable[Recipe]) -> str | None:
        for recipe in recipes:
            if not recipe.weight.stores_alike(mx()):
                return f"weights {recipe.weight} are not in MX blocks"
        return super().objection(recipes)

    def written(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        weight = TensorSpec((".weight_packed",), ((shape[0], shape[1] // 2),), ("U8",))
        return dataclasses.replace(self.layout(recipe, shape), weight=weight)


def _is_dense(sparsity: Any) -> bool:
    """Whether a `sparsity_config` describes zeros alone (`config/dense.py` of the library)."""
    return isinstance(sparsity, dict) and sparsity.get("format") == "dense" and "targets" not in sparsity


def _name_formats(fields: Fields) -> bool:
    """Whether every group names a format of its own."""
    groups = fields.peek("config_groups")
    return isinstance(groups, Mapping) and all(isinstance(g, Mapping) and g.get("format") for g in groups.values())


def _group(groups: Fields, name: str) -> Fields:
    """A config group; a list of targets alone stands under the name of a preset."""
    targets = groups.value[name]
    if isinstance(targets, list) and name.upper() in PRESETS:
        return Fields({"targets": targets} | PRESETS[name.upper()], f"{groups.where}.{name}")
    return groups.object(name)


def _recipe(group: Fields, out_dtype: np.dtype, is_mx: bool) -> Recipe:
    """What a config group says; `is_mx`: its format has e8m0 scales, whether or not its arguments say so."""
    group.one_of("output_activations", None, default=None)
    weights = group.object("weights")
    weights.one_of("dynamic", False, default=False)
    weight = _scheme(weights, "channel", is_mx)
    if group.get("input_activations", None) is None:
        return Recipe(weight, out_dtype=out_dtype)
    inputs = group.object("input_activations")
    activation = _scheme(inputs, "token", is_mx)
    dynamic = inputs.one_of("dynamic", *((True, False) if activation.block == (None, None) else (True,)), default=False)
    return Recipe(weight, activation, "dynamic" if dynamic else "static", out_dtype)


def _scheme(args: Fields, row_strategy: str, is_mx: bool) -> Scheme:
    """What QuantizationArgs say.

    Arguments:
        row_strategy: what a scale a row is called, "channel" (of weights) or "token".
        is_mx: whether scales are e8m0 where the arguments do not name their type: of activations those in blocks of 32.
    """
    bits = args.one_of("num_bits", 8, 4)
    args.one_of("type", "float")
    args.one_of("symmetric", True, default=True)
    if bits == 4:
        return _mxfp4(args, is_weight=row_strategy == "channel")
    size = args.get("group_size", None)
    is_mx = is_mx and (row_strategy == "channel" or size == 32)
    is_mx = args.one_of("scale_dtype", None, *UINT8, default=None) in UINT8 or is_mx
    implied = "tensor" if size is None else row_strategy if size == -1 else "group"
    if args.get("strategy", None) is None:
        strategy = implied
    else:
        own = ("channel", "block") if row_strategy == "channel" else ("token",)
        strategy = args.one_of("strategy", "tensor", "group", *own)
    if is_mx and (strategy != "group" or args.size("group_size") != 32):
        raise args.error("strategy", "'group' with group_size 32, beside scale_dtype uint8")
    match strategy:
        case "tensor":
            return per_tensor()
        case "group":
            return mx() if is_mx else Scheme("e4m3", block=(1, args.size("group_size")))
        case "block":
            return Scheme("e4m3", block=_block(args))
    return per_row()


def _mxfp4(args: Fields, is_weight: bool) -> Scheme:
    """MXFP8: weights have the same values in it, activations more."""
    args.one_of("strategy", "group", None, default=None)
    args.one_of("group_size", 32)
    args.one_of("scale_dtype", None, *UINT8, default=None)
    if not is_weight:
        warn_of_activations(f"{args.file}: {args.where}")
    return mx()


def _block(args: Fields) -> tuple[int, int]:
    """`block_structure`: [128, 128], or "128x128" as the library wrote it once."""
    value = args.get("block_structure")
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", value):
        args = Fields(args.value | {"block_structure": [int(size) for size in value.split("x")]}, args.where)
    return args.block("block_structure")


def _args(scheme: Scheme, row_strategy: str, dynamic: bool) -> dict[str, Any] | None:
    """The inverse of `_scheme`; None where there is none."""
    args = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic, "group_size": None}
    match scheme.block:
        case (1, 32) if scheme.is_mx:
            return args | {"strategy": "group", "group_size": 32, "scale_dtype": UINT8[0]}
        case _ if scheme.is_mx:
            return None
        case (None, None):
            return args | {"strategy": "tensor"}
        case (1, None):
            return args | {"strategy": row_strategy}
        # Static scales per group of K: the library has the words for them, but broadcasts them over rows (0.20).
        case (1, int(size)) if dynamic:
            return args | {"strategy": "group", "group_size": size}
        case (int(rows), int(columns)) if not dynamic:
            return args | {"strategy": "block", "block_structure": [rows, columns]}
    return None


def _weight_args(recipe: Recipe) -> dict[str, Any] | None:
    return _args(recipe.weight, "channel", dynamic=False)


def _input_args(recipe: Recipe) -> dict[str, Any] | None:
    return None if recipe.activation is None else _args(recipe.activation, "token", dynamic=not recipe.is_static)


def _packed(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of MXFP4 with the values of MXFP8's."""
    return args | {"num_bits": 4}


def _preset(recipe: Recipe) -> dict[str, Any]:
    return {"weights": _weight_args(recipe), "input_activations": _input_args(recipe)}


# The library's own names for whole groups (`PRESET_SCHEMES` of quant_scheme.py), as far as they are in FP8.
PRESETS: dict[str, dict[str, Any]] = {
    "FP8": _preset(Recipe(per_tensor(), per_tensor(), "static")),
    "FP8_DYNAMIC": _preset(Recipe(per_row(), per_row(), "dynamic")),
    "FP8_BLOCK": _preset(Recipe(Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128)), "dynamic")),
    "MXFP8": _preset(Recipe(mx(), mx(), "dynamic")),
    "MXFP8A16": _preset(Recipe(mx())),
    "MXFP4": dict.fromkeys(("weights", "input_activations"), _packed(_weight_args(Recipe(mx())))),
    "MXFP4A16": {"weights": _packed(_weight_args(Recipe(mx()))), "input_activations": None},
    "MXFP4XFP8": {
        "weights": _packed(_weight_args(Recipe(mx()))),
        "input_activations": _args(Scheme("e4m3", block=(1, 128)), "token", dynamic=True),
    },
}
