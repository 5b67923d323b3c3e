"""`MeshLoader`: fills an abstract decoder on a mesh; each process reads what its devices hold."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fp8x.array import ScaledArray
from fp8x.checkpoint import Format, Reader
from fp8x.checkpoint.exact import count_flushed, warn_of_flushed
from fp8x.checkpoint.format import MatrixScales, weight_spec
from fp8x.checkpoint.header import UNQUANTIZED
from fp8x.checkpoint.reader import Slices
from fp8x.models.decoder import Decoder
from fp8x.models.hf_names import Names, flat
from fp8x.models.loading import Loader, dequantized, get
from fp8x.nn.grouped import GroupedLinear
from fp8x.nn.linear import Linear
from fp8x.nn.quantized import QuantizedLayer
from fp8x.nn.walk import set_module
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme
from fp8x.sharding.layers import place_quantized, place_stored, place_weight
from fp8x.sharding.model import finish
from fp8x.sharding.place import Read, place, put, quantize_placed
from fp8x.sharding.plan import LayerSplit, Plan, plan


class MeshLoader(Loader):
    """A `Loader` onto a mesh. Where it quantizes, every device quantizes its own part, and magnitudes alone move."""

    def __init__(
        self,
        reader: Reader,
        model: Decoder,
        format: Format | None,
        allow_nonfinite: bool,
        progress: Callable[[int, int], None] | None,
        mesh: Mesh,
    ):
        super().__init__(reader, model, format, allow_nonfinite, progress)
        self.mesh = mesh

    def load(self, recipes: Mapping[str, Recipe | None], input_scales: Mapping[str, np.ndarray]) -> None:
        """Fills the model; `input_scales` by path, `[1, groups]`, where a calibration has found them.

        Raises:
            MeshError: an unknown axis, or heads or experts that their axis does not divide. Nothing is read by then.
        """
        layout = plan(self.model.config, self.mesh, recipes)
        biases = {}
        for path, names in self.params.items():
            variable = get(self.model, path)
            read = self._param(names, variable)
            if path.endswith(".bias"):
                biases[path.removesuffix(".bias")] = read
                continue
            dims = layout.param(path, variable.ndim)
            put(variable, place(read, variable.shape, variable.dtype, dims, self.mesh))
            self._finish(*(name for _, name in flat(names)))
        for path, names in self.names.items():
            self._layer(path, names, recipes[path], layout, biases.get(path), input_scales.get(path))
        finish(self.model, layout)

    def _param(self, names: Names, variable: nnx.Variable) -> Read:
        """Reads of a parameter that is no matrix of a linear layer's."""
        depth = max(len(at) for at, _ in flat(names))
        part = functools.cache(lambda name: self._part_of(name, variable.shape[depth:], variable.dtype))
        return _stacked(names, part, variable.ndim - depth)

    def _layer(
        self,
        path: str,
        names: Names,
        recipe: Recipe | None,
        layout: Plan,
        bias: Read | None,
        calibrated: np.ndarray | None,
    ) -> None:
        shape, split, module = self.shapes[path], layout.layers[path], get(self.model, path)
        stored = self.stored[path]
        if stored is None:
            read = _stacked(names, lambda prefix: self._part_of(f"{prefix}.weight", shape[-2:]))
        else:
            values = self._dequantized(stored, shape)
            read = _stacked(names, lambda prefix: self._cast(f"{prefix}.weight", values(prefix)))
        if recipe is not None:
            layer = _abstract(recipe, shape)
            layer.bias = nnx.data(module.bias)
            if stored is None:
                weight, scale = self._quantized(layer, split, read)
            elif stored.weight == recipe.weight:
                weight, scale = self._stored(layer, split, names, stored)
            else:
                weight, scale = self._requantized(layer, split, names, stored)
            scale = scale if calibrated is None else calibrated
            place_quantized(layer, split, self.mesh, weight, bias, None if scale is None else scale.__getitem__)
            set_module(self.model, path, layer)
        elif isinstance(module, nnx.Linear):
            place_weight(module, split, self.mesh, lambda index: read(index[::-1]).T, bias)
        else:
            place_weight(module, split, self.mesh, read, bias)
        self._finish(*(name for _, name in flat(self.params.get(f"{path}.bias", []))))
        for _, prefix in flat(names):
            self._finish(*self._tensors(prefix, stored, shape[-2:]))

    def _quantized(self, layer: QuantizedLayer, split: LayerSplit, read: Read) -> tuple[ScaledArray, np.ndarray | None]:
        """A weight that is quantized on the way, and the static activation scale of an uncalibrated layer."""
        shape, dims = layer.weight.shape, split.dims(layer.weight.ndim)
        placed = place(read, shape, self.dtype, dims, self.mesh)
        weight = quantize_placed(placed, layer.weight_scheme, shape, dims, self.mesh)
        return weight, _uncalibrated(layer)

    def _stored(
        self, layer: QuantizedLayer, split: LayerSplit, names: Names, stored: Recipe
    ) -> tuple[ScaledArray, np.ndarray | None]:
        """A weight that stays as it is stored, and its static activation scale."""
        shape = layer.weight.shape
        scales = functools.cache(lambda prefix: self._scales(prefix, stored, shape[-2:]))
        view = functools.cache(lambda prefix: self._view(prefix, stored, scales(prefix), shape[-2:]))
        data = _stacked(names, lambda prefix: self._checked(f"{prefix}.weight", view(prefix)))
        scale = _stacked(names, lambda prefix: scales(prefix).scale.__getitem__)
        weight = place_stored(data, scale, layer, split, self.mesh)
        return weight, _input_scale(layer, stored, (scales(prefix).input_scale for _, prefix in flat(names)))

    def _requantized(
        self, layer: QuantizedLayer, split: LayerSplit, names: Names, stored: Recipe
    ) -> tuple[ScaledArray, np.ndarray | None]:
        """A weight from the 8 bits that are stored to others, and its static activation scale."""
        shape, dims = layer.weight.shape, split.dims(layer.weight.ndim)
        read = _stacked(names, self._dequantized(stored, shape))
        placed = place(read, shape, np.dtype(np.float32), dims, self.mesh)
        weight = quantize_placed(placed, layer.weight_scheme, shape, dims, self.mesh, source=stored.weight)
        scales = (self._scales(prefix, stored, shape[-2:]).input_scale for _, prefix in flat(names))
        return weight, _input_scale(layer, stored, scales)

    def _dequantized(self, stored: Recipe, shape: tuple[int, ...]) -> Callable[[str], Read]:
        """Reads of a matrix of a layer in 8 bits, by its prefix: in float32."""

        @functools.cache
        def view(prefix: str) -> _Dequantized:
            scales = self._scales(prefix, stored, shape[-2:])
            codes = self._view(prefix, stored, scales, shape[-2:])
            return _Dequantized(f"{prefix}.weight", codes, scales.scale, stored.weight)

        return lambda prefix: self._checked(f"{prefix}.weight", view(prefix))

    def _cast(self, name: str, read: Read) -> Read:
        """Reads of a matrix in the model's type."""

        def cast(index: tuple[slice, ...]) -> np.ndarray:
            with np.errstate(over="ignore"):
                part = read(index).astype(self.dtype)
            self._check_overflow(name, part)
            return part

        return cast

    def _view(self, prefix: str, stored: Recipe, found: MatrixScales, shape: tuple[int, ...]) -> Slices | np.ndarray:
        """The codes of one matrix in 8 bits, in the scheme's type; whole where they have to be translated."""
        if found.translation is not None:
            return found.codes(prefix, stored, shape, self.reader)
        return weight_spec(stored, shape).slices(prefix, self.reader)

    def _checked(self, name: str, view: "Slices | np.ndarray | _Dequantized") -> Read:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            part = view[index]
            self._check_finite(name, part)
            return part

        return read

    def _part_of(self, name: str, shape: tuple[int, ...], dtype: np.dtype | None = None) -> Read:
        """Reads of an unquantized tensor, in the model's type unless another is given."""
        read = self._checked(name, self.reader.slices(name, shapes=[shape], dtypes=UNQUANTIZED))
        return lambda index: np.asarray(jnp.asarray(read(index)).astype(dtype or self.dtype))


@dataclasses.dataclass(frozen=True)
class _Dequantized:
    """A stored matrix whose parts are in float32."""

    name: str
    codes: Slices | np.ndarray
    scale: np.ndarray
    scheme: Scheme

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        outer, of_scales, inner = [], [], []
        for where, size, block in zip(index, self.codes.shape, self.scheme.block, strict=True):
            part = range(size)[where]
            # Outwards to whole blocks; one that spans the dim is cut anywhere.
            first, last = (part.start, part.stop) if block is None else (part.start // block, -(-part.stop // block))
            start = first * (block or 1)
            outer.append(slice(start, min(last * (block or 1), size)))
            of_scales.append(slice(None) if block is None else slice(first, last))
            inner.append(slice(part.start - start, part.stop - start))
        whole = ScaledArray(self.codes[tuple(outer)], self.scale[tuple(of_scales)], self.scheme)
        warn_of_flushed(self.name, count_flushed(whole), math.prod(self.codes.shape))
        return np.asarray(dequantized(whole))[tuple(inner)]


def _input_scale(layer: QuantizedLayer, stored: Recipe, scales: Iterable[np.ndarray]) -> np.ndarray | None:
    """The static activation scale of a layer, from those that are stored for its matrices."""
    if not layer.recipe.is_static or (layer.recipe != stored and not layer.recipe.needs_calibration):
        return _uncalibrated(layer)
    # One scale quantizes what all experts read, those on other devices too.
    return functools.reduce(np.maximum, scales)


def _uncalibrated(layer: QuantizedLayer) -> np.ndarray | None:
    """The static activation scale of a layer for which none is known."""
    if not layer.recipe.is_static:
        return None
    value = 1.0 if layer.recipe.activation.scale_rule == "unit" else np.nan
    return np.full(layer.input_scale.shape, value, np.float32)


def _abstract(recipe: Recipe, shape: tuple[int, ...]) -> QuantizedLayer:
    if len(shape) == 2:
        return nnx.eval_shape(lambda: Linear(*shape[::-1], recipe=recipe, use_bias=False, rngs=nnx.Rngs(0)))
    e, *n, k = shape
    return nnx.eval_shape(lambda: GroupedLinear(e, k, tuple(n), recipe=recipe, rngs=nnx.Rngs(0)))


def _stacked(names: Names, read: Callable[[str], Read], ndim: int = 2) -> Read:
    """Reads of the matrices of a layer, or of what has `ndim` dims, as one array, from reads of each."""
    if isinstance(names, str):
        return lambda index: read(names)(index)
    prefixes = dict(flat(names))

    def read_all(index: tuple[slice, ...]) -> np.ndarray:
        leading, rest = [range(10**9)[where] for where in index[:-ndim]], index[-ndim:]
        counts = [len(which) for which in leading]
        parts = [read(prefixes[at])(rest) for at in itertools.product(*leading)]
        return np.stack(parts).reshape(*counts, *parts[0].shape)

    return read_all
