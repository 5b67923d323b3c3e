"""`Loader`: fills an abstract decoder from a checkpoint, matrix by matrix."""

import functools
import re
import threading
import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.checkpoint import Format, Reader
from fp8x.checkpoint.exact import count_flushed, warn_of_flushed
from fp8x.checkpoint.finite import check_overflow, count_nonfinite, is_finite, nonfinite_error
from fp8x.checkpoint.format import MatrixScales, stored_recipes, weight_spec
from fp8x.checkpoint.header import DTYPE_NAMES, DTYPES, UNQUANTIZED
from fp8x.checkpoint.kv_cache import QUERIES, read_kv_scales
from fp8x.checkpoint.reader import aligned
from fp8x.checkpoint.requantize import Requantize, choose
from fp8x.checkpoint.threads import Threads
from fp8x.errors import CheckpointError, ShapeError, some
from fp8x.models.decoder import Decoder
from fp8x.models.hf_names import Names, flat, linear_names, param_names, skipped
from fp8x.nn.grouped import GroupedLinear, weight_scheme
from fp8x.nn.linear import Linear
from fp8x.nn.quantized import QuantizedLayer
from fp8x.nn.walk import set_module
from fp8x.recipe import Recipe
from fp8x.scheme import is_kv_static

# Old rotary tables, which say nothing that a config does not.
HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq")


class Loader:
    """Fills an abstract decoder from a checkpoint. `progress` is called with the bytes read and the bytes in all."""

    def __init__(
        self,
        reader: Reader,
        model: Decoder,
        format: Format | None,
        allow_nonfinite: bool,
        progress: Callable[[int, int], None] | None,
    ):
        self.reader, self.model, self.format, self.allow_nonfinite = reader, model, format, allow_nonfinite
        self.names, self.params = linear_names(model.config), param_names(model.config)
        self.dtype = jnp.dtype(model.config.dtype)
        self.shapes = {path: _weight_shape(get(model, path)) for path in self.names}
        self.kv_scales = read_kv_scales(reader, format)
        self.stored = dict.fromkeys(self.names) if format is None else self._stored_recipes(format)
        self._progress, self._read_bytes, self._total_bytes = progress, 0, 0
        self._lock = threading.Lock()

    def _stored_recipes(self, format: Format) -> dict[str, Recipe | None]:
        """The recipe of every module of a quantized checkpoint."""
        prefixes = [prefix for names in self.names.values() for _, prefix in flat(names)]
        by_prefix = stored_recipes(format, self.reader, prefixes, self.dtype)
        recipes: dict[str, Recipe | None] = {}
        for path, names in self.names.items():
            first, *others = [prefix for _, prefix in flat(names)]
            recipes[path] = by_prefix[first]
            for other in others:
                if by_prefix[other] != by_prefix[first]:
                    raise CheckpointError(
                        f"{self.reader.path}: {other} is quantized unlike {first}; fp8x runs both as one layer"
                    )
        return recipes

    def check(self) -> None:
        """Every tensor that is needed is there, and no other; and room is made for none that is of another shape.

        Raises:
            CheckpointError: with some of the names.
        """
        params = [(path, at, name) for path, names in self.params.items() for at, name in flat(names)]
        needed = [name for _, _, name in params]
        for path, names in self.names.items():
            recipe, shape = self.stored[path], self.shapes[path][-2:]
            for _, prefix in flat(names):
                needed += self._tensors(prefix, recipe, shape)
        if missing := [name for name in needed if name not in self.reader]:
            raise CheckpointError(f"{self.reader.path}: {some(missing)} missing, which config.json calls for")
        unknown = set(self.reader) - set(needed) - ({"lm_head.weight"} if self.model.lm_head is None else set())
        left = [name for name in unknown if skipped(self.model.config, name)]
        unknown -= set(() if self.kv_scales is None else self.kv_scales.names)
        if queries := {name for name in unknown if QUERIES.fullmatch(name)}:
            unknown -= queries
            warnings.warn(
                f"{self.reader.path}: {some(sorted(queries))} not used: fp8x multiplies queries and attention weights "
                "in the type of the model",
                stacklevel=3,
            )
        if unknown := sorted(name for name in unknown.difference(left) if not HARMLESS.fullmatch(name)):
            is_lost = self.format is None and any("scale" in name for name in unknown)
            hint = "; is the quantization_config lost?" if is_lost else ""
            raise CheckpointError(f"{self.reader.path}: {some(unknown)} not part of what config.json describes{hint}")
        for path, at, name in params:
            self.reader.check(name, shapes=[get(self.model, path).shape[len(at) :]], dtypes=UNQUANTIZED)
        for path, names in self.names.items():
            recipe = self.stored[path]
            shape = self.shapes[path][-2:]
            dtypes = UNQUANTIZED if recipe is None else weight_spec(recipe, shape).dtypes
            for _, prefix in flat(names):
                self.reader.check(f"{prefix}.weight", shapes=[shape], dtypes=dtypes)
        self._total_bytes = sum(self.reader.stored(name).nbytes_on_disk for name in needed)
        if left:
            warnings.warn(
                f"{self.reader.path}: {len(left)} tensors of {self.model.config.skipped_layers} layers for multi-token "
                "prediction are not loaded; generation does without them",
                stacklevel=3,
            )

    def set_kv_cache(self) -> None:
        """Has the model store keys and values as the checkpoint says, if it does.

        Raises:
            CheckpointError: scales that are missing, or of another number of heads.
        """
        if self.kv_scales is None or self.kv_scales.scheme is None:
            return
        self.kv_scales.warn_of_missing(self.reader)
        config, scheme = self.model.config, self.kv_scales.scheme
        if not is_kv_static(scheme):
            return self.model.set_kv_cache(scheme)
        pairs = self.kv_scales.of(f"model.layers.{index}.self_attn" for index in range(config.num_hidden_layers))
        if config.latent is not None:
            pairs = [(keys, keys) for keys, _ in pairs]  # as vLLM: a latent is keys and values
        try:
            self.model.set_kv_cache(scheme, pairs)
        except ShapeError as error:
            raise CheckpointError(f"{self.reader.path}: the scales of its KV cache do not fit: {error}") from None

    def warn_of_kv_cache(self, dtype: str) -> None:
        """Says, where the checkpoint has keys and values stored in 8 bits, that the model has them in 16."""
        if self.kv_scales is not None:
            warnings.warn(
                f"{self.reader.path}: the scales of its KV cache are not used: recipe {dtype!r} leaves keys and values "
                "in the model's type, too",
                stacklevel=3,
            )

    def choose(self, requantize: Requantize) -> dict[str, Recipe | None]:
        """The recipe of every linear module: where it is stored in 8 bits the best of some. Arguments and errors as
        `fp8x.checkpoint.requantize.choose` has them."""
        modules = {path: [prefix for _, prefix in flat(names)] for path, names in self.names.items()}
        stored = {prefix: self.stored[path] for path, prefixes in modules.items() for prefix in prefixes}
        chosen = choose(
            self.reader,
            modules,
            stored,
            requantize,
            self.format,
            allow_nonfinite=self.allow_nonfinite,
            progress=self._progress,
        )
        return {path: recipe and chosen.recipes[path] for path, recipe in self.stored.items()}

    def load(self, recipes: Mapping[str, Recipe | None]) -> None:
        """Fills the model; `recipes` of every linear module, None where it stays in 16 or 32 bits."""
        for path, names in self.params.items():
            variable = get(self.model, path)
            if isinstance(names, str):
                variable.set_value(self._array(names, variable.shape, variable.dtype))
            else:
                variable.set_value(self._stack(names, variable.shape, self._read_into))
        for path, names in self.names.items():
            recipe, shape = recipes[path], self.shapes[path]
            if recipe is not None:
                set_module(self.model, path, self._quantized_layer(path, names, recipe, shape))
            elif isinstance(names, str):
                get(self.model, path).kernel.set_value(self._matrix(names, self.stored[path], shape).T)
            else:
                get(self.model, path).weight.set_value(self._matrices(names, self.stored[path], shape))

    def _quantized_layer(self, path: str, names: Names, recipe: Recipe, shape: tuple[int, ...]) -> QuantizedLayer:
        scheme, bias = weight_scheme(recipe, len(shape)), get(self.model, path).bias
        bias = None if bias is None else bias[...]
        if len(scheme.block) > 2:
            # Scales across experts: the layer has to be whole before it is quantized.
            stack = self._matrices(names, self.stored[path], shape)
            weight = numerics.quantize_weight(stack, scheme, name=path, allow_nonfinite=True)
            return GroupedLinear.from_arrays(weight, recipe, bias=bias)
        data, scale = aligned(shape, scheme.dtype), aligned(scheme.scale_shape(shape), scheme.scale_dtype)
        stored = self.stored[path]
        if stored is not None and stored.weight == recipe.weight:
            given = self._copy_all(names, stored, data, scale)
        else:
            given = [self._fill(prefix, stored, recipe, data[index], scale[index]) for index, prefix in flat(names)]
        keeps_scale = recipe == stored or recipe.needs_calibration
        given = [each for each in given if each is not None and keeps_scale]
        # One scale quantizes what all experts read. Where they differ the largest clips none, as in vLLM.
        input_scale = functools.reduce(np.maximum, given) if given else None
        weight = ScaledArray(jax.device_put(data), jax.device_put(scale), scheme)
        input_scale = None if input_scale is None else jnp.array(input_scale)
        kind = Linear if isinstance(names, str) else GroupedLinear
        return kind.from_arrays(weight, recipe, bias=bias, input_scale=input_scale)

    def _copy_all(self, names: Names, stored: Recipe, data: np.ndarray, scale: np.ndarray) -> list[np.ndarray | None]:
        """`_copy` of a layer's matrices, by expert on all cores: what quantizes computes on these by itself."""
        if isinstance(names, str):
            return self._copy(stored, {names: (data, scale)})
        jobs = [
            functools.partial(
                self._copy, stored, {prefix: (data[e][index], scale[e][index]) for index, prefix in flat(expert)}
            )
            for e, expert in enumerate(names)
        ]
        return [each for several in Threads(None, 0, 0).run(jobs) for each in several]

    def _copy(self, stored: Recipe, places: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray | None]:
        """Puts matrices in 8 bits into their places, as stored: data and scale by prefix. Gives their static activation
        scales."""
        shape = next(iter(places.values()))[0].shape
        found = {prefix: self._scales(prefix, stored, shape) for prefix in places}
        for prefix, (_, scale) in places.items():
            scale[...] = found[prefix].scale
        names = [f"{prefix}.weight" for prefix in places]
        if all(each.translation is None for each in found.values()):
            for name in names:
                self.reader.check_there(name)
            self.reader.read_together(names, [data for data, _ in places.values()])
        else:
            for prefix, (data, _) in places.items():
                data[...] = found[prefix].codes(prefix, stored, shape, self.reader)
        for name, prefix, (data, _) in zip(names, places, places.values()):
            if not self.reader.stored(name).is_packed:  # e2m1 has neither NaN nor Inf
                self._check_finite(name, data)
            self._finish(*self._tensors(prefix, stored, shape))
        return [each.input_scale for each in found.values()]

    def _fill(
        self, prefix: str, stored: Recipe | None, recipe: Recipe, data: np.ndarray, scale: np.ndarray
    ) -> np.ndarray | None:
        """Quantizes one matrix into its place; gives its static activation scale."""
        name = f"{prefix}.weight"
        if stored is None:
            # Non-finite values are settled: `_array` has looked.
            array = self._array(name, data.shape)
            weight = numerics.quantize_weight(array, recipe.weight, name=name, allow_nonfinite=True)
            data[...], scale[...] = weight.data, weight.scale
            return None
        found = self._scales(prefix, stored, data.shape)
        source = ScaledArray(found.codes(prefix, stored, data.shape, self.reader), found.scale, stored.weight)
        warn_of_flushed(name, count_flushed(source), source.data.size)
        self._check_finite(name, np.asarray(dequantized(source)))
        weight = requantized(source, scheme=recipe.weight)
        data[...], scale[...] = weight.data, weight.scale
        self._finish(*self._tensors(prefix, stored, data.shape))
        return found.input_scale

    def _scales(self, prefix: str, stored: Recipe, shape: tuple[int, ...]) -> MatrixScales:
        """What is stored beside the codes of one matrix in 8 bits."""
        found = self.format.scales(prefix, stored, shape, self.reader, allow_nonfinite=self.allow_nonfinite)
        if found.input_scale is not None and not (found.input_scale > 0).all():
            raise CheckpointError(
                f"{prefix}: its static activation scale in {self.reader.path} is 0, which quantizes nothing"
            )
        return found

    def _matrices(self, names: Names, stored: Recipe | None, shape: tuple[int, ...]) -> Array:
        """The experts' matrices in one array."""

        def fill(prefix: str, out: np.ndarray) -> None:
            if stored is None:
                self._read_into(f"{prefix}.weight", out)
            else:
                out[...] = self._matrix(prefix, stored, out.shape)

        return self._stack(names, shape, fill)

    def _stack(self, names: Names, shape: tuple[int, ...], fill: Callable[[str, np.ndarray], None]) -> Array:
        """What every expert has, in one array, by `fill(name, its part)` of each."""
        stack = aligned(shape, self.dtype)
        for index, name in flat(names):
            fill(name, stack[index])
        return jax.device_put(stack)

    def _read_into(self, name: str, out: np.ndarray) -> None:
        """An unquantized tensor to its place: read there, or cast from another type by XLA."""
        stored = self.reader.check(name, shapes=[out.shape], dtypes=UNQUANTIZED)
        if DTYPES[stored.dtype] != out.dtype:
            out[...] = self._array(name, out.shape, out.dtype)
            return
        self.reader.check_there(name)
        self.reader.read_into(name, 0, out)
        self._check_finite(name, out)
        self._finish(name)

    def _matrix(self, prefix: str, stored: Recipe | None, shape: tuple[int, ...]) -> Array:
        """One matrix in the model's type."""
        if stored is None:
            return self._array(f"{prefix}.weight", shape)
        found = self._scales(prefix, stored, shape)
        codes = found.codes(prefix, stored, shape, self.reader)
        self._check_finite(f"{prefix}.weight", codes)
        self._finish(*self._tensors(prefix, stored, shape))
        source = ScaledArray(codes, found.scale, stored.weight)
        warn_of_flushed(f"{prefix}.weight", count_flushed(source), codes.size)
        array = dequantized(source).astype(self.dtype)
        self._check_overflow(f"{prefix}.weight", np.asarray(array))
        return array

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype | None = None) -> Array:
        """An unquantized tensor, in the model's type unless another is given."""
        stored = self.reader.read(name, shapes=[shape], dtypes=UNQUANTIZED)
        self._check_finite(name, stored)
        array = jax.device_put(stored)  # on CPU the same memory
        self._finish(name)
        return array.astype(dtype or self.dtype)

    def _tensors(self, prefix: str, recipe: Recipe | None, shape: tuple[int, ...]) -> list[str]:
        """What is stored of a matrix."""
        return [f"{prefix}.weight"] if recipe is None else self.format.names(prefix, recipe, shape, self.reader)

    def _finish(self, *names: str) -> None:
        """Tensors are read."""
        with self._lock:
            for name in names:
                self._read_bytes += self.reader.stored(name).nbytes_on_disk
            if self._progress is not None:
                self._progress(self._read_bytes, self._total_bytes)

    def _check_overflow(self, name: str, array: np.ndarray) -> None:
        """`array` is a matrix, or a part of it, that was in 8 bits and finite there."""
        if not self.allow_nonfinite:
            check_overflow(name, self.reader.stored(name).file, array, DTYPE_NAMES[array.dtype])

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        """`array` is the tensor as stored, translated, or a part of it."""
        dtype = DTYPE_NAMES[array.dtype]
        if not self.allow_nonfinite and not is_finite(array, dtype):
            raise nonfinite_error(name, self.reader.stored(name).file, count_nonfinite(array, dtype), array.size)


# In float32: from there convert goes to other 8 bits, too.
dequantized = jax.jit(numerics.dequantize)
requantized = jax.jit(numerics.requantize, static_argnames="scheme")


def get(model: nnx.Module, path: str):
    """The module or variable at a dotted path."""
    for key in path.split("."):
        model = model[int(key)] if isinstance(model, nnx.List) else getattr(model, key)
    return model


def _weight_shape(module: nnx.Module) -> tuple[int, ...]:
    """`[..., N, K]`, as Hugging Face stores it."""
    return module.kernel.shape[::-1] if isinstance(module, nnx.Linear) else module.weight.shape
