"""`quant_method: "torchao"`: what torchao (0.18) quantizes and transformers (5) saves as safetensors. Read only.

    class          `block_size` of [N, K]        scales
    Float8Tensor   [N, K], per tensor            F32 [1, 1]
                   [1, K], per row               F32 [N, 1]
                   [1, G] or [R, C], in blocks   F32 [N / R, K / C]
    MXTensor       32: MXFP8                     F8_E8M0 in the order of cuBLAS, or [N, K / 32]

The files themselves describe every tensor (`flattened.py`), its activations in `act_quant_kwargs` (null: none). That
counts here, not the config's `quant_type`: transformers writes its fields in the order of the alphabet, so the first
pattern of an `FqnToConfig` that matches a name is not the one that torchao took. Dynamic activations per tensor have
one scale for all tokens.

Sources: torchao `quantize_/workflows/float8/float8_tensor.py`, `prototype/mx_formats/{mx_tensor,utils}.py`;
transformers `quantizers/quantizer_torchao.py`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.fbgemm_fp8 import warn_of_bound
from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.flattened import METHOD
from fp8x.checkpoint.format import SCALE_DTYPES, Layout, Recipes, TensorSpec, weight_spec
from fp8x.checkpoint.header import FLOAT8, Stored
from fp8x.checkpoint.read_only import ReadOnly
from fp8x.checkpoint.reader import Reader
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import E8M0, SCALE_RULES, Scheme, mx, per_row, per_tensor

ELEMENTS = {"float8_e4m3fn": "e4m3", "float8_e4m3fnuz": "e4m3", "float8_e5m2": "e5m2"}
FLOAT8_TENSOR, MX_TENSOR = "Float8Tensor", "MXTensor"
TILE_ROWS, TILE_COLUMNS = 128, 4  # of MX scales in cuBLAS' order


class TorchAo(ReadOnly):
    """Weights in FP8 and MXFP8 with dynamic activations, or none; each matrix by its own description."""

    name = quant_method = METHOD
    instead = "'compressed-tensors' holds the same"

    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        """None for every prefix: the files describe them, the config does not."""
        fields = Fields(config, "quantization_config")
        fields.one_of("include_input_output_embeddings", False, default=False)
        return dict.fromkeys(prefixes)

    def recipes(self, reader: Reader, prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        recipes = dict(self.from_config(reader.config["quantization_config"], prefixes, out_dtype))
        bounds: dict[str, None] = {}
        for prefix in recipes:
            if (name := f"{prefix}.weight") not in reader or reader.stored(name).dtype not in FLOAT8:
                continue
            stored = reader.check(name, shapes=[reader.stored(name).shape[:2]], dtypes=FLOAT8)  # a matrix
            if stored.description is None:
                raise CheckpointError(
                    f"{name} in {stored.file}: is {stored.dtype}, but not one of torchao's tensors, which have a "
                    "description in the file's __metadata__"
                )
            fields = Fields(stored.description, f"__metadata__ of {name}", str(stored.file))
            recipes[prefix] = _recipe(fields, stored, out_dtype)
            bounds |= dict.fromkeys(f"act_quant_kwargs.{bound} is {value!r}" for bound, value in _bounds(fields))
        for bound in bounds:
            warn_of_bound(f"{reader.path}: {bound}")
        return recipes

    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        scale_shape = recipe.weight.scale_shape(shape)
        if recipe.weight.is_mx:
            rows, columns = _tiles(scale_shape)
            spec = TensorSpec((".weight_scale",), (scale_shape, (32 * rows, 16 * columns)), ("F8_E8M0", "U8"))
        else:
            shapes = (scale_shape, *(((), (1,)) if scale_shape == (1, 1) else ()))
            spec = TensorSpec((".weight_scale",), shapes, SCALE_DTYPES)
        return Layout(weight_spec(recipe, shape), spec)

    def unpacked_scale(self, scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """MX scales out of cuBLAS' order: tiles of 128×4, in each of them rows r, r + 32, r + 64 and r + 96 together.

        https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout
        """
        if scale.size == math.prod(shape):
            return scale.reshape(shape)
        rows, columns = _tiles(shape)
        tiles = scale.reshape(rows, columns, 32, 4, 4).transpose(0, 3, 2, 1, 4)
        return np.ascontiguousarray(tiles.reshape(rows * TILE_ROWS, columns * TILE_COLUMNS)[: shape[0], : shape[1]])


def _tiles(shape: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(shape[0] / TILE_ROWS), math.ceil(shape[1] / TILE_COLUMNS)


def _recipe(described: Fields, stored: Stored, out_dtype: np.dtype) -> Recipe:
    """What a file says of one matrix."""
    kind = described.one_of("_type", FLOAT8_TENSOR, MX_TENSOR)
    data = described.object("_data")
    weight = _weight(data, stored) if kind == FLOAT8_TENSOR else _mx(data)
    if data.get("act_quant_kwargs", None) is None:
        return Recipe(weight, out_dtype=out_dtype)
    given = data.object("act_quant_kwargs").object("_data")
    activation = _activation(given) if kind == FLOAT8_TENSOR else _mx(given)
    return Recipe(weight, activation, "dynamic", out_dtype)


def _weight(data: Fields, stored: Stored) -> Scheme:
    """Of a Float8Tensor; its `block_size` names sizes, where a scheme names whole dims."""
    element = "e5m2" if stored.dtype == "F8_E5M2" else "e4m3"
    size = data.get("block_size")
    if size == []:
        return per_tensor(element)
    if isinstance(size, list) and len(size) == 3 and size[0] == 1:  # of all experts, which have come apart
        data = Fields(data.value | {"block_size": size[1:]}, data.where, data.file)
    rows, columns = data.block("block_size")
    n, k = stored.shape
    if rows == 1 and columns >= k:
        return per_row(element)
    return per_tensor(element) if rows >= n and columns >= k else Scheme(element, block=(rows, columns))


def _activation(given: Fields) -> Scheme:
    element = ELEMENTS[_dtype(given, "float8_dtype", *ELEMENTS)]
    granularity = given.object("granularity")
    match granularity.one_of("_type", "PerRow", "PerTensor", "PerBlock"):
        case "PerRow":
            granularity.object("_data").one_of("dim", -1, default=-1)
            return per_row(element)
        case "PerTensor":
            return per_tensor(element)
    return Scheme(element, block=granularity.object("_data").block("block_size"))


def _mx(data: Fields) -> Scheme:
    """Of an MXTensor, or of the activations beside it, which name a rule for scales."""
    data.one_of("block_size", 32)
    _dtype(data, "elem_dtype", "float8_e4m3fn")
    if data.get("scaling_mode", None) is None:
        return mx()
    rule = data.object("scaling_mode").one_of("_data", *(rule.upper() for rule in SCALE_RULES[E8M0]))
    return dataclasses.replace(mx(), scale_rule=rule.lower())


def _dtype(fields: Fields, name: str, *fits: str) -> str:
    """A field that is a torch.dtype."""
    return fields.object(name).one_of("_data", *fits)


def _bounds(described: Fields) -> list[tuple[str, Any]]:
    """The bounds of the activations' amax in a description."""
    data = described.object("_data")
    if data.get("act_quant_kwargs", None) is None:
        return []
    given = data.object("act_quant_kwargs").object("_data")
    return [(name, given.peek(name)) for name in ("hp_value_lb", "hp_value_ub") if given.peek(name) is not None]
