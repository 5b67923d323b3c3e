"""`quant_method: "quark"`: what AMD's Quark exports and vLLM reads. Read only.

    dtype, qscheme of `weight`                     weights            weight_scale
    fp8_e4m3 (or fp8_e5m2), per_tensor             per tensor         [], of any float type
    the same, per_channel, ch_axis 0               per channel        [N]
    fp8_e4m3, per_group of 32, scale_format e8m0   MXFP8              U8 [N, K / 32]
    the same, per_block [1, 32]                    MXFP8, for vLLM    the same
    fp4, per_group of 32, scale_format e8m0        MXFP4              the same, beside two codes a byte

    `input_tensors`                                activations
    null                                           none
    per_tensor, is_dynamic or not                  per tensor; `input_scale` if static
    per_channel, is_dynamic                        per token
    like MXFP8 weights, is_dynamic                 MXFP8

A matrix has the first entry of `layer_quant_config` whose wildcards match its name, else that of its class in
`layer_type_quant_config`, else `global_quant_config`; `exclude` holds wildcards for whole names (or `re:` patterns, in
vLLM). A KV cache in FP8 is declared by the `output_tensors` of what `kv_cache_group` or `kv_cache_quant_config` names;
its scales are `k_proj.output_scale` and `v_proj.output_scale`. `pack_method` is about integers of 4 bits alone.

Sources: amd-quark 0.13 `torch/quantization/config/config.py`, `torch/export/{config/config.py,nn/modules/
realquantizer.py,main_export/quant_config_parser.py}`; vLLM `quantization/quark/{quark,utils}.py` and
`schemes/quark_w8a8_{fp8,mxfp8}.py` there.
"""

import dataclasses
import fnmatch
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import SCALE_DTYPES, Layout, Recipes, TensorSpec, weight_spec
from fp8x.checkpoint.names import whole_names
from fp8x.checkpoint.packed import warn_of_activations
from fp8x.checkpoint.read_only import ReadOnly
from fp8x.recipe import Recipe
from fp8x.scheme import E8M0, KV_SCHEMES, SCALE_RULES, Scheme, mx, per_row, per_tensor

Path = tuple[str, ...]  # of an object in the config, name by name

ELEMENTS = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}
FP4 = "fp4"
QUERIES = "*q_proj"  # whose outputs may be quantized beside a KV cache; `q_proj.output_scale` is warned of
LAYERS, CACHES = "layer_quant_config", "kv_cache_quant_config"
ONLINE = ("r3", "r4", "online_r1_rotation")  # rotations that are no part of the weights


class Quark(ReadOnly):
    """FP8 per tensor and per channel, and MXFP8; several recipes in one model."""

    name = quant_method = "quark"
    instead = "'compressed-tensors' and 'modelopt' hold the same"
    kv_names = ("k_proj.output_scale", "v_proj.output_scale")
    kv_shape = ()

    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        fields = Fields(config, "quantization_config")
        export = fields.object("export")
        export.one_of("weight_format", "real_quantized", default="real_quantized")
        export.one_of("pack_method", "reorder", "order", default="reorder")
        _check_algorithms(fields)
        if fields.peek("softmax_quant_spec") is not None:
            warnings.warn(
                "config.json: quantization_config.softmax_quant_spec: attention weights are quantized there; fp8x "
                "multiplies them in the type of the model",
                stacklevel=4,
            )
        is_excluded, layer_of = whole_names(fields.strings("exclude", [])), _layers(fields)
        recipe_of = functools.cache(lambda where: _recipe(_at(fields, where), _has_outputs(fields, where), out_dtype))
        return {prefix: None if is_excluded(prefix) else recipe_of(layer_of(prefix)) for prefix in prefixes}

    def kv_scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        fields = Fields(config, "quantization_config")
        fields.one_of("kv_cache_post_rope", False, default=False)
        cached = _cached(fields)
        for where in cached:
            outputs = _at(fields, where).object("output_tensors")
            outputs.one_of("dtype", "fp8_e4m3")
            outputs.one_of("qscheme", "per_tensor")
            outputs.one_of("is_dynamic", False, None, default=False)
        return KV_SCHEMES["tensor"] if cached else None

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        weight, n = recipe.weight, shape[0]
        scale_shape = weight.scale_shape(shape)
        shapes = {(None, None): ((), (1,)), (1, None): ((n,), (n, 1))}.get(weight.block, (scale_shape,))
        return Layout(
            weight_spec(recipe, shape),
            TensorSpec((".weight_scale",), shapes, ("U8", "F8_E8M0") if weight.is_mx else SCALE_DTYPES),
            TensorSpec((".input_scale",), ((), (1,)), SCALE_DTYPES) if recipe.is_static else None,
        )


def _at(fields: Fields, where: Path) -> Fields:
    return functools.reduce(Fields.object, where, fields)


def _entries(fields: Fields, name: str) -> list[str]:
    """The names in an object that may be missing or null."""
    return [] if fields.get(name, None) is None else list(fields.object(name).value)


def _layers(fields: Fields) -> Callable[[str], Path]:
    """Prefix -> where its configuration stands."""
    patterns = [(re.compile(fnmatch.translate(name)), name) for name in _entries(fields, LAYERS)]
    types = "layer_type_quant_config"
    default = (types, "Linear") if "Linear" in _entries(fields, types) else ("global_quant_config",)

    def find(prefix: str) -> Path:
        return next(((LAYERS, name) for regex, name in patterns if regex.match(prefix)), default)

    return find


def _cached(fields: Fields) -> list[Path]:
    """Where layers stand whose outputs are a KV cache in 8 bits."""
    groups = fields.object("export").strings("kv_cache_group", [])
    named = [name for name in _entries(fields, LAYERS) if any(fnmatch.fnmatchcase(name, group) for group in groups)]
    caches = [(CACHES, name) for name in _entries(fields, CACHES)]
    if groups and not named and not caches:
        raise fields.error(LAYERS, f"an entry for what export.kv_cache_group names, {groups}")
    return [(LAYERS, name) for name in named] + caches


def _has_outputs(fields: Fields, where: Path) -> bool:
    """Whether quantized outputs there are a KV cache, or queries beside one."""
    cached = {name for _, name in _cached(fields)}
    return bool(cached) and where[-1] in {*cached, QUERIES}


def _check_algorithms(fields: Fields) -> None:
    """Refuses rotations that a model has to compute; others, and what scales weights, are part of the weights."""
    algorithms = fields.get("algo_config", None) or []
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        algorithm = Fields(algorithm, "quantization_config.algo_config")
        algorithm.get("name")
        for name in ONLINE:
            algorithm.one_of(name, False, None, default=None)
        if isinstance(algorithm.get("online_config", None), Mapping):
            algorithm.object("online_config").one_of("online_rotation_layers", None, [], default=None)


def _recipe(layer: Fields, has_outputs: bool, out_dtype: np.dtype) -> Recipe | None:
    """What an entry says; `has_outputs`: its `output_tensors` are not the layer's affair."""
    layer.one_of("bias", None, default=None)
    if not has_outputs:
        layer.one_of("output_tensors", None, default=None)
    if layer.get("weight") is None:
        layer.one_of("input_tensors", None, default=None)
        return None
    weights = layer.object("weight")
    weights.one_of("is_dynamic", False, None, default=False)
    weight = _scheme(weights, 0)
    if layer.get("input_tensors") is None:
        return Recipe(weight, out_dtype=out_dtype)
    inputs = layer.object("input_tensors")
    activation = _scheme(inputs, 0, 1)  # tokens, with or without a batch before them
    if inputs.peek("dtype") == FP4:
        warn_of_activations(f"{inputs.file}: {inputs.where}")
    # Only one scale for everything can be known before the tokens are.
    fits = (True, False, None) if activation.block == (None, None) else (True,)
    if not inputs.one_of("is_dynamic", *fits, default=False):
        return Recipe(weight, activation, "static", out_dtype)
    if not activation.is_mx:
        inputs.one_of("scale_type", "float", "float32", None, default=None)
    return Recipe(weight, activation, "dynamic", out_dtype)


def _scheme(tensor: Fields, *axes: int) -> Scheme:
    """What a tensor's configuration says; `axes`: which a scale a row may be named by."""
    dtype = tensor.one_of("dtype", *ELEMENTS, FP4)
    if dtype == FP4:
        tensor.one_of("qscheme", "per_group")
    tensor.one_of("symmetric", True, None, default=None)
    tensor.one_of("is_scale_quant", False, None, default=None)
    match tensor.one_of("qscheme", "per_tensor", "per_channel", "per_group", "per_block"):
        case "per_tensor":
            return per_tensor(ELEMENTS[dtype])
        case "per_channel":
            tensor.one_of("ch_axis", *axes)
            return per_row(ELEMENTS[dtype])
        case "per_group":
            tensor.one_of("ch_axis", -1, 1, None, default=None)
            tensor.one_of("group_size", 32)
        case "per_block":
            tensor.one_of("block_size", [1, 32])
    tensor.one_of("dtype", "fp8_e4m3", FP4)
    tensor.one_of("scale_format", "e8m0")
    rule = tensor.one_of("scale_calculation_mode", None, *SCALE_RULES[E8M0], default=None)
    return dataclasses.replace(mx(), scale_rule=rule)
