"""`quant_method: "modelopt"`: what NVIDIA's ModelOpt exports and vLLM and TensorRT-LLM read.

    quant_algo                   weights              weight_scale          activations
    FP8                          e4m3 per tensor      F32 scalar            per tensor, static: `input_scale` F32 scalar
    FP8_PER_CHANNEL_PER_TOKEN    e4m3 per channel     F32 [N]               per token, dynamic
    MXFP8                        MXFP8                U8 [N, K / 32]        MXFP8, dynamic
    FP8_PB_WO                    e4m3 128×128         F32 [N/128,1,K/128,1] none; read only, for vLLM quantizes them

They lie in config.json (`quantization_config`, with `ignore`), in older checkpoints in `hf_quant_config.json` beside it
(`quantization`, with `exclude_modules`); written to both, as by ModelOpt. MIXED_PRECISION (a `quant_algo` for each of
`quantized_layers`) is read.

A KV cache in FP8 is declared by `kv_cache_quant_algo: "FP8"` there, by `kv_cache_scheme` in config.json; its scales are
`k_proj.k_scale` and `v_proj.v_scale`, F32 scalars.

Sources: ModelOpt `export/{convert_hf_config,quant_utils,unified_export_hf}.py`, `quantization/qtensor/mxfp8_tensor.py`;
vLLM `quantization/modelopt.py`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.extras import KEY, apply_extras, extras
from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import SCALE_DTYPES, Format, Layout, Recipes, TensorSpec, weight_spec
from fp8x.checkpoint.names import shell_wildcards, wildcards
from fp8x.checkpoint.reader import LEGACY
from fp8x.recipe import Recipe
from fp8x.scheme import KV_SCHEMES, Scheme, mx, per_row, per_tensor
from fp8x.version import __version__

MIXED = "MIXED_PRECISION"
# Readers look for the name before all else. The version is ModelOpt's whose files these are like, then who wrote them.
PRODUCER = {"name": "modelopt", "version": f"0.47.0+fp8x.{__version__}"}
READ_ONLY = "FP8_PB_WO"
ALGORITHMS = {
    "FP8": Recipe(per_tensor(), per_tensor(), "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": Recipe(per_row(), per_row(), "dynamic"),
    "MXFP8": Recipe(mx(), mx(), "dynamic"),
    READ_ONLY: Recipe(Scheme("e4m3", block=(128, 128))),
}


class ModelOpt(Format):
    """One algorithm a model, from the table above."""

    name = quant_method = "modelopt"
    kv_names = ("k_proj.k_scale", "v_proj.v_scale")
    kv_shape = ()

    def objection(self, recipes: Iterable[Recipe]) -> str | None:
        unique = list(dict.fromkeys(dataclasses.replace(recipe, observer=None) for recipe in recipes))
        for recipe in unique:
            if _algorithm(recipe) in (None, READ_ONLY):
                activation = f"{recipe.activation_scale} {recipe.activation}" if recipe.activation else "16 bits"
                return f"no algorithm with weights {recipe.weight} and activations in {activation}"
        return "one recipe for all layers" if len(unique) > 1 else None

    def to_config(self, recipes: Recipes, out_dtype: np.dtype) -> dict[str, Any]:
        (recipe,) = {recipe for recipe in recipes.values() if recipe is not None}
        algorithm = _algorithm(recipe)
        fields = extras(recipe, dataclasses.replace(ALGORITHMS[algorithm], out_dtype=out_dtype))
        return {
            "quant_method": self.quant_method,
            "producer": PRODUCER,
            "quant_algo": algorithm,
            "ignore": shell_wildcards(
                [prefix for prefix, other in recipes.items() if other is None],
                [prefix for prefix, other in recipes.items() if other is not None],
            ),
        } | ({KEY: fields} if fields else {})

    def beside(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        quantization = {
            "quant_algo": config["quant_algo"],
            "kv_cache_quant_algo": None if config.get("kv_cache_scheme") is None else "FP8",
            "exclude_modules": config["ignore"],
        }
        if config["quant_algo"] == "MXFP8":
            quantization["group_size"] = 32
        return {LEGACY: {"producer": config["producer"], "quantization": quantization}}

    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        fields = Fields(config, "quantization_config")
        added = fields.object(KEY, {})
        if "quantization" in config:
            fields = fields.object("quantization")
        excluded = fields.strings("exclude_modules", []) + fields.strings("ignore", [])
        is_excluded, recipe_of = wildcards(excluded), _reader(fields, added, out_dtype)
        return {prefix: None if is_excluded(prefix) else recipe_of(prefix) for prefix in prefixes}

    def kv_fields(self, scheme: Scheme) -> dict[str, Any] | None:
        is_held = scheme == KV_SCHEMES["tensor"]
        return {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if is_held else None

    def kv_scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        fields = Fields(config, "quantization_config")
        if "quantization" in config:
            fields = fields.object("quantization")
        algorithm = fields.one_of("kv_cache_quant_algo", None, "FP8", default=None)
        if isinstance(fields.get("kv_cache_scheme", None), Mapping):
            args = fields.object("kv_cache_scheme")
            args.one_of("dynamic", False, default=False)
            args.one_of("num_bits", 8)
            args.one_of("type", "float")
            algorithm = "FP8"
        elif algorithm is None:
            algorithm = fields.one_of("kv_cache_scheme", None, "FP8", default=None)
        return None if algorithm is None else KV_SCHEMES["tensor"]

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        n, scale_shape = shape[0], recipe.weight.scale_shape(shape)
        match recipe.weight.block:
            case (None, None):
                shapes = ((), (1,), (1, 1))
            case (1, None):
                shapes = ((n,), (n, 1))
            case (1, 32):
                shapes = (scale_shape,)
            case _:
                # A single block comes out as a scalar.
                shapes = ((scale_shape[0], 1, scale_shape[1], 1), scale_shape, *([()] if scale_shape == (1, 1) else []))
        dtypes = ("U8", "F8_E8M0") if recipe.weight.is_mx else SCALE_DTYPES
        return Layout(
            weight_spec(recipe, shape),
            TensorSpec((".weight_scale",), shapes, dtypes),
            TensorSpec((".input_scale",), ((), (1,)), SCALE_DTYPES) if recipe.is_static else None,
        )


def _reader(fields: Fields, added: Fields, out_dtype: np.dtype) -> Callable[[str], Recipe | None]:
    """Prefix -> recipe, before exclusions."""

    def recipe(algorithm: str) -> Recipe:
        return apply_extras(dataclasses.replace(ALGORITHMS[algorithm], out_dtype=out_dtype), added)

    if (algorithm := _read_algorithm(fields, MIXED)) != MIXED:
        same = recipe(algorithm)
        return lambda prefix: same
    layers = fields.object("quantized_layers")
    recipes = {name: recipe(_read_algorithm(layers.object(name))) for name in layers.value}

    def nearest(prefix: str) -> Recipe | None:
        """Of the module itself, or of the innermost that holds it."""
        while prefix and prefix not in recipes:
            prefix = prefix.rpartition(".")[0]
        return recipes.get(prefix)

    return nearest


def _read_algorithm(fields: Fields, *more: str) -> str:
    """Its name in capitals: ModelOpt writes some in small letters."""
    name = fields.get("quant_algo")
    if isinstance(name, str):
        fields = Fields(fields.value | {"quant_algo": name.upper()}, fields.where)
    return fields.one_of("quant_algo", *ALGORITHMS, *more)


def _algorithm(recipe: Recipe) -> str | None:
    """What ModelOpt calls the weights, activations and scales of a recipe; None without a name."""
    return next((name for name, other in ALGORITHMS.items() if _kind(other) == _kind(recipe)), None)


def _kind(recipe: Recipe) -> tuple:
    schemes = (recipe.weight, recipe.activation)
    return recipe.activation_scale, *(s and (s.element, s.block, s.scale_dtype) for s in schemes)
