"""`Format`: how quantized matrices lie on disk. Its subclasses know tensors and config fields; here the bytes move.

Everything is by Hugging Face prefix: `model.layers.0.self_attn.q_proj` has the tensor `….weight`, and so on.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8x.checkpoint.finite import CHUNK_BYTES
from fp8x.checkpoint.fnuz import Translation, translation
from fp8x.checkpoint.header import UNQUANTIZED
from fp8x.checkpoint.packed import packed
from fp8x.checkpoint.reader import DTYPE_NAMES, DTYPES, Reader, Slices
from fp8x.checkpoint.unread import unread_parts
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import E8M0, FLOAT32, Scheme

if TYPE_CHECKING:
    import jax

    from fp8x.array import ScaledArray

Recipes = Mapping[str, Recipe | None]

SCALE_DTYPES = ("F32", "BF16", "F16")  # some libraries give scales the model's type


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a matrix, as a format stores it; the first of each is written, the others are read too."""

    suffixes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def name(self, prefix: str, reader: Reader) -> str:
        """The tensor's name in a checkpoint: the first suffix that is there, else the first."""
        names = [prefix + suffix for suffix in self.suffixes]
        return next((name for name in names if name in reader), names[0])

    def read(self, prefix: str, reader: Reader) -> np.ndarray:
        return reader.read(self.name(prefix, reader), shapes=self.shapes, dtypes=self.dtypes)

    def slices(self, prefix: str, reader: Reader) -> Slices:
        return reader.slices(self.name(prefix, reader), shapes=self.shapes, dtypes=self.dtypes)

    def write(self, prefix: str, array: "jax.Array | np.ndarray") -> dict[str, np.ndarray]:
        """The array's bytes, unchanged, in this tensor's type and shape."""
        dtype = DTYPES[self.dtypes[0]]
        return {prefix + self.suffixes[0]: np.asarray(array, order="C").view(dtype).reshape(self.shapes[0])}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of one matrix `[N, K]` beside each other."""

    weight: TensorSpec
    weight_scale: TensorSpec
    input_scale: TensorSpec | None = None


@dataclasses.dataclass(frozen=True)
class MatrixScales:
    """What belongs to the codes of a matrix `[N, K]`.

    Attributes:
        scale: what they are multiplied by, once they are in the scheme's type.
        input_scale: the static activation scale, float32 `[1, groups]`, or None.
        translation: how they come to the scheme's type, where they are in another.
    """

    scale: np.ndarray
    input_scale: np.ndarray | None
    translation: Translation | None

    def codes(self, prefix: str, recipe: Recipe, shape: tuple[int, int], reader: Reader) -> np.ndarray:
        """All codes of the matrix, in the scheme's type."""
        codes = weight_spec(recipe, shape).read(prefix, reader)
        return codes if self.translation is None else self.translation.rows(slice(0, shape[0]), codes)


class Format(abc.ABC):
    """How quantized matrices lie on disk.

    Attributes:
        name: as `fp8x.save` takes it.
        quant_method: what `quantization_config` calls it.
        kv_names: the tensors of an attention that hold the scales of a KV cache in 8 bits: of keys, and of values.
        kv_shape: of these, where there is one scale.
        holds_several: whether matrices of one model may have several recipes.
        holds_kv_alone: whether it declares a KV cache in 8 bits where no matrix is.
        packs: whether it is written in 4 bits: matrices whose codes are all e2m1's (`packed.py`).
    """

    name: str
    quant_method: str
    kv_names: tuple[str, str] = ("k_scale", "v_scale")
    kv_shape: tuple[int, ...] = (1,)
    holds_several: bool = False
    holds_kv_alone: bool = False
    packs: bool = False

    @abc.abstractmethod
    def objection(self, recipes: Iterable[Recipe]) -> str | None:
        """Why a model with these recipes can't be written in this format; None if it can."""

    @abc.abstractmethod
    def to_config(self, recipes: Recipes, out_dtype: np.dtype) -> dict[str, Any]:
        """The `quantization_config` of a model.

        Arguments:
            recipes: of every matrix, by prefix; None where it stays as it is.
            out_dtype: the model's type, which a reader takes for the layers' output.
        """

    def beside(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Further JSON files that belong beside config.json, by name, for the `quantization_config` in it."""
        return {}

    @abc.abstractmethod
    def from_config(self, config: Mapping[str, Any], prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        """The recipe of every prefix; the inverse of `to_config`.

        Raises:
            CheckpointError: a field that is missing or not supported, by name.
        """

    def recipes(self, reader: Reader, prefixes: Iterable[str], out_dtype: np.dtype) -> Recipes:
        """The recipe of every prefix of a checkpoint: what its config says. Errors as there."""
        return self.from_config(reader.config["quantization_config"], prefixes, out_dtype)

    @staticmethod
    def packed_prefixes(reader: Reader, prefixes: Iterable[str]) -> list[str]:
        """The prefixes whose matrices are in MXFP4 on disk, which their tensors say (`packed.py`)."""
        weights = {prefix: f"{prefix}.weight" for prefix in prefixes}
        return [prefix for prefix, name in weights.items() if name in reader and reader.stored(name).is_packed]

    @abc.abstractmethod
    def kv_fields(self, scheme: Scheme) -> dict[str, Any] | None:
        """The fields of a `quantization_config` that declare a KV cache stored so; None if there are none."""

    @abc.abstractmethod
    def kv_scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        """How a config declares that a KV cache is stored, over `[B, S, heads, dim]`; None for 16 bits.

        Raises:
            CheckpointError: a declaration that is not supported.
        """

    @abc.abstractmethod
    def layout(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        """The tensors of a matrix of `shape` `[N, K]`, as they are read."""

    def written(self, recipe: Recipe, shape: tuple[int, int]) -> Layout:
        """As they are written."""
        return self.layout(recipe, shape)

    def encode(
        self, prefix: str, recipe: Recipe, weight: "ScaledArray", input_scale: "jax.Array | np.ndarray | None"
    ) -> dict[str, np.ndarray]:
        """The tensors of one matrix, name -> array: the bytes of `weight` `[N, K]` and `input_scale` `[1, groups]`.

        Raises:
            CheckpointError: codes that the format has not.
        """
        layout, data = self.written(recipe, weight.shape), weight.data
        if self.packs:
            data = packed(np.asarray(data), f"{prefix}.weight")
        tensors = layout.weight.write(prefix, data) | layout.weight_scale.write(prefix, weight.scale)
        if layout.input_scale is not None:
            tensors |= layout.input_scale.write(prefix, input_scale)
        return tensors

    def names(self, prefix: str, recipe: Recipe, shape: tuple[int, int], reader: Reader) -> list[str]:
        """The tensors that `decode` reads."""
        layout = self.layout(recipe, shape)
        specs = (layout.weight, layout.weight_scale, layout.input_scale)
        return [spec.name(prefix, reader) for spec in specs if spec is not None]

    def unread(self, prefix: str, recipe: Recipe, shape: tuple[int, int], reader: Reader) -> dict[str, str]:
        """Tensors of a matrix that `decode` does not read and that mean nothing, with the reason.

        Raises:
            CheckpointError: one that says that the matrix has other values than `decode` gives.
        """
        names = self.names(prefix, recipe, shape, reader)
        return unread_parts(prefix, names, recipe.weight.block[-1], reader)

    def decode(
        self,
        prefix: str,
        recipe: Recipe,
        shape: tuple[int, int],
        reader: Reader,
        *,
        allow_nonfinite: bool = False,
    ) -> "tuple[ScaledArray, np.ndarray | None]":
        """One matrix and its static activation scale (float32 `[1, groups]`, or None), as stored: nothing is rounded.
        (But for what `fnuz.py` warns of.)

        Codes are not looked at: `finite.py` does that where they are read.

        Arguments:
            allow_nonfinite: accept a matrix whose scales are NaN or Inf.

        Raises:
            CheckpointError: a tensor is missing, of another shape or type, or a scale that is no scale.
            ShapeError: a matrix that the scheme does not fit.
        """
        from fp8x.array import ScaledArray  # imported late: it is made of JAX, which a plan does not need

        found = self.scales(prefix, recipe, shape, reader, allow_nonfinite=allow_nonfinite)
        return ScaledArray(found.codes(prefix, recipe, shape, reader), found.scale, recipe.weight), found.input_scale

    def scales(
        self,
        prefix: str,
        recipe: Recipe,
        shape: tuple[int, int],
        reader: Reader,
        *,
        allow_nonfinite: bool = False,
    ) -> MatrixScales:
        """`decode` without the codes, for who reads these some rows at a time; arguments and errors as there."""
        layout, scheme = self.layout(recipe, shape), recipe.weight
        scheme.check_shape(shape, f"{prefix}.weight")
        self.unread(prefix, recipe, shape, reader)
        reader.check(layout.weight.name(prefix, reader), shapes=layout.weight.shapes, dtypes=layout.weight.dtypes)
        name = layout.weight_scale.name(prefix, reader)
        scale = as_scale(layout.weight_scale.read(prefix, reader), scheme.scale_dtype)
        scale = self.unpacked_scale(scale, scheme.scale_shape(shape))
        _check_scale(scale, name, reader, allow_nonfinite)
        codes = layout.weight.slices(prefix, reader)
        if count := _lost_blocks(codes, scale, scheme):
            raise CheckpointError(
                f"{name} in {reader.stored(name).file}: {count} of {scale.size} scales are 0, but their blocks of "
                f"{prefix}.weight are not: their values are lost"
            )
        translated = None
        if codes.dtype != scheme.dtype:
            translated, scale = translation(codes, scale, scheme, f"{prefix}.weight in {reader.path}")
        input_scale = None
        if layout.input_scale is not None:
            input_scale = as_scale(layout.input_scale.read(prefix, reader), FLOAT32)
            _check_scale(input_scale, layout.input_scale.name(prefix, reader), reader)
            input_scale = input_scale.reshape(recipe.activation.scale_shape((1, shape[1])))
        return MatrixScales(scale, input_scale, translated)

    def unpacked_scale(self, scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Scales of `shape`, from the order in which the format stores them."""
        return scale.reshape(shape)


def stored_recipes(
    format: Format, reader: Reader, prefixes: Iterable[str], out_dtype: np.dtype
) -> dict[str, Recipe | None]:
    """The recipe of every prefix of a quantized checkpoint.

    What lies in 16 bits stays so, also without a word in the config: others leave out routers, lm_head and
    (transformers 5, to which they are no Linear) experts.

    Raises:
        CheckpointError: a field of the config that is missing or not supported.
    """
    recipes = dict(format.recipes(reader, prefixes, out_dtype))
    for prefix in recipes:
        name = f"{prefix}.weight"
        if name in reader and reader.stored(name).dtype in UNQUANTIZED:
            recipes[prefix] = None
    return recipes


def weight_spec(recipe: Recipe, shape: tuple[int, int]) -> TensorSpec:
    """The matrix itself, in any format: `….weight`, as it is. e4m3fnuz is read as e4m3fn (`fnuz.py`)."""
    name = DTYPE_NAMES[recipe.weight.dtype]
    return TensorSpec((".weight",), (tuple(shape),), (name, "F8_E4M3FNUZ") if name == "F8_E4M3" else (name,))


def mx_scale(recipe: Recipe, shape: tuple[int, int]) -> TensorSpec:
    """The scales of MX blocks where no library says what they are called."""
    names = (".weight_scale_inv", ".weight_scale", ".scale")
    return TensorSpec(names, (recipe.weight.scale_shape(shape),), ("U8", "F8_E8M0"))


def as_scale(stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Scales in a scheme's type, from any type that formats store them in; exact."""
    if dtype == E8M0:
        return stored.view(E8M0)
    if stored.dtype in (np.uint8, E8M0):
        byte = stored.view(np.uint8).astype(np.uint32)
        # From bits: 2^-127 (byte 0) is subnormal in float32, which XLA flushes on CPU. 255 is NaN.
        bits = np.where(byte == 0, 0x00400000, np.where(byte == 255, 0x7FC00000, byte << 23))
        return bits.astype(np.uint32).view(FLOAT32)
    if stored.dtype == DTYPES["BF16"]:
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(FLOAT32)
    return stored.astype(FLOAT32, copy=False)


def _check_scale(scale: np.ndarray, name: str, reader: Reader, allow_nonfinite: bool = False) -> None:
    is_finite = scale.view(np.uint8) != 255 if scale.dtype == E8M0 else np.isfinite(scale)
    bad = ~is_finite if scale.dtype == E8M0 else ~(is_finite & (scale >= 0))
    if count := int((bad & is_finite if allow_nonfinite else bad).sum()):
        what = "negative" if allow_nonfinite else "NaN, infinite or negative"
        raise CheckpointError(f"{name} in {reader.stored(name).file}: {count} of {scale.size} scales are {what}")


def _lost_blocks(weight: Slices, scale: np.ndarray, scheme: Scheme) -> int:
    """How many blocks `[n, k]` of a matrix have scale 0 over values other than 0. Other blocks are not looked at."""
    if scheme.is_mx or (scale != 0).all():
        return 0
    (n, k), (rows, columns) = weight.shape, scheme.block_of(weight.shape)
    lost, step = np.zeros(scale.shape, bool), max(CHUNK_BYTES // max(k, 1), 1)
    for i in np.flatnonzero((scale == 0).any(axis=1)):
        stop = min((i + 1) * rows, n)
        for start in range(i * rows, stop, step):
            # -0 is a zero too.
            is_nonzero = (weight[start : min(start + step, stop), :].view(np.uint8) & 0x7F).any(axis=0)
            for j in np.flatnonzero(scale[i] == 0):
                lost[i, j] |= is_nonzero[j * columns : (j + 1) * columns].any()
    return int(lost.sum())
