"""What is stored of a decoder's layers: the tensors' names, sizes and arrays."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx
from jaxtyping import Array

from fp8x.array import ScaledArray
from fp8x.checkpoint import Format
from fp8x.checkpoint.header import DTYPES
from fp8x.checkpoint.packed import BLOCK, packed
from fp8x.errors import CheckpointError, some
from fp8x.models.config import DecoderConfig
from fp8x.models.hf_names import Names, flat, interleaved_names, with_suffix
from fp8x.nn.quantized import QuantizedLayer
from fp8x.sharding.place import whole_shape
from fp8x.sharding.plan import LayerSplit

Tensors = Iterator[tuple[str, Array | np.ndarray]]


def fused_names(config: DecoderConfig, layers: Mapping[str, nnx.Module], format: Format | None) -> dict[str, str]:
    """The layers of experts that are written in one tensor, by path -> the name of that tensor: those that are not
    quantized, or all in gpt-oss's own MXFP4.

    Raises:
        CheckpointError: other layers that are to be in that format.
    """
    names = interleaved_names(config)
    if format is None or format.name != "mxfp4":
        return {path: name for path, name in names.items() if not isinstance(layers[path], QuantizedLayer)}
    others = [path for path, layer in layers.items() if isinstance(layer, QuantizedLayer) and path not in names]
    if others:
        raise CheckpointError(
            f"format: {format.name!r} holds the experts of gpt-oss alone; {some(others)} not; use "
            "'mxfp4-pack-quantized'"
        )
    return names


def stored_bytes(layer: nnx.Module, names: Names, format: Format | None, split: LayerSplit | None) -> int:
    """The size of what `tensors_of` gives."""
    weight = layer.kernel if isinstance(layer, nnx.Linear) else layer.weight
    shape = weight.shape[::-1] if isinstance(layer, nnx.Linear) else weight.shape
    shape = shape if split is None else whole_shape(shape, split.dims(len(shape)))
    if not isinstance(layer, QuantizedLayer):
        return weight.dtype.itemsize * math.prod(shape)
    layout = format.written(layer.recipe, shape[-2:])
    specs = [spec for spec in (layout.weight, layout.weight_scale, layout.input_scale) if spec is not None]
    each = sum(math.prod(spec.shapes[0]) * DTYPES[spec.dtypes[0]].itemsize for spec in specs)
    return each * len(list(flat(names)))


def tensors_of(layer: nnx.Module, names: Names, fused: str | None, format: Format | None) -> Tensors:
    """What is stored of a layer's matrices; under the name `fused` where all experts' go together."""
    if isinstance(layer, nnx.Linear):
        yield f"{names}.weight", layer.kernel[...].T
    elif not isinstance(layer, QuantizedLayer):
        yield from parts_of(layer.weight[...], with_suffix(names, ".weight"), fused)
    elif fused is not None:
        yield from _blocks(layer, names, fused)
    else:
        yield from _encoded(layer, names, format)


def parts_of(array: Array | np.ndarray, names: Names, fused: str | None) -> Tensors:
    """What is stored of an array in 16 or 32 bits, of one tensor or of all experts'; of all together under the name
    `fused`, `[E, 2, I, K]` as `[E, K, 2 I]` and `[E, N, K]` as `[E, K, N]`."""
    if isinstance(names, str):
        yield names, array
    elif fused is None:
        stack = np.asarray(array)
        yield from ((name, stack[index]) for index, name in flat(names))
    else:
        lines = _alternating(np.asarray(array), names)
        yield fused, np.ascontiguousarray(lines.swapaxes(1, -1))


def _alternating(stack: np.ndarray, names: Names) -> np.ndarray:
    """`[E, 2, I, ...]` as `[E, 2 I, ...]`, a line of gate and one of up in turn; down's as they are."""
    if isinstance(names[0], str):
        return stack
    return stack.swapaxes(1, 2).reshape(len(stack), -1, *stack.shape[3:])


def _blocks(layer: QuantizedLayer, names: Names, fused: str) -> Tensors:
    """The experts of gpt-oss in MXFP4: two codes a byte, and the scales of 32."""
    codes, scales = np.asarray(layer.weight[...]), _alternating(np.asarray(layer.weight_scale[...]), names)
    # Packed first: half as much is copied where lines alternate.
    blocks = _alternating(packed(codes, fused), names)
    yield f"{fused}_blocks", blocks.reshape(*scales.shape, BLOCK // 2)
    yield f"{fused}_scales", scales.view(np.uint8)


def _encoded(layer: QuantizedLayer, names: Names, format: Format) -> Tensors:
    data, scale = np.asarray(layer.weight[...]), np.asarray(layer.weight_scale[...])
    input_scale = None if layer.input_scale is None else np.asarray(layer.input_scale[...])
    for index, prefix in flat(names):
        weight = ScaledArray(data[index], scale[index], layer.recipe.weight)
        yield from format.encode(prefix, layer.recipe, weight, input_scale).items()
