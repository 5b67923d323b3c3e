"""`Scheme`: how one array is stored in 8 bits. Element type, block shape, scale type, scale rule."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from fp8x.errors import RecipeError, ShapeError

ElementName = Literal["e4m3", "e5m2"]
ScaleRule = Literal["amax", "pow2", "unit", "rceil", "floor", "ceil", "even"]

# Blocks over keys and values [B, S, heads, dim] whose scales hold for all tokens: one in all, or one a head.
KV_TENSOR, KV_HEAD = (None, None, None, None), (None, None, 1, None)

# Smallest normal float32: below it 1/s overflows.
MIN_SCALE = np.float32(2.0**-126)


@dataclasses.dataclass(frozen=True)
class Element:
    """An 8-bit float type. Facts from "FP8 Formats for Deep Learning" (Micikevicius et al., 2022), table 1."""

    name: ElementName
    dtype: np.dtype
    max: float  # the largest finite value
    emax: int  # its exponent
    mantissa_bits: int

    @property
    def max_mantissa(self) -> float:
        """The mantissa of `max`, in [1, 2)."""
        return self.max / 2.0**self.emax


ELEMENTS: dict[str, Element] = {
    "e4m3": Element("e4m3", np.dtype(ml_dtypes.float8_e4m3fn), max=448.0, emax=8, mantissa_bits=3),
    "e5m2": Element("e5m2", np.dtype(ml_dtypes.float8_e5m2), max=57344.0, emax=15, mantissa_bits=2),
}

FLOAT32 = np.dtype(np.float32)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)

# The scale rules that each scale type admits; the first is the default.
SCALE_RULES: dict[np.dtype, tuple[ScaleRule, ...]] = {
    FLOAT32: ("amax", "pow2", "unit"),
    E8M0: ("rceil", "floor", "ceil", "even"),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one array is stored in 8 bits.

    Arguments:
        element: `"e4m3"` (float8_e4m3fn, max 448) or `"e5m2"` (float8_e5m2, max 57344).
        block: read against the trailing dims of the array; `None` means the whole dim; leading dims that are not
            named have block 1. `scale.shape[i] == ceil(shape[i] / block[i])`.
        scale_dtype: float32, or float8_e8m0fnu (byte b means 2^(b-127)).
        scale_rule: how a scale follows from a block's amax; see docs/numerics.md.
            float32: `"amax"` (amax / max, the default), `"pow2"` (that, rounded up to a power of two), `"unit"` (1).
            float8_e8m0fnu: `"rceil"` (the default), `"floor"` (OCP MX v1.0), `"ceil"`, `"even"`.

    Raises:
        RecipeError: an unknown element or scale type, or a rule that the scale type does not admit.
        ShapeError: a block that is empty or holds something other than positive ints and None.
    """

    element: ElementName
    _: dataclasses.KW_ONLY
    block: tuple[int | None, ...]
    scale_dtype: np.dtype = FLOAT32
    scale_rule: ScaleRule | None = None

    def __post_init__(self):
        if self.element not in ELEMENTS:
            raise RecipeError(f"element: {self.element!r} is unknown; use one of {', '.join(map(repr, ELEMENTS))}")
        block = tuple(self.block) if isinstance(self.block, Sequence) else (self.block,)
        if not block or not all(map(_is_extent, block)):
            raise ShapeError(
                f"block: {self.block!r} does not fit; use a tuple of positive ints and None, like (128, 128)"
            )
        scale_dtype = as_dtype(self.scale_dtype, "scale_dtype")
        if scale_dtype not in SCALE_RULES:
            raise RecipeError(f"scale_dtype: {scale_dtype} does not fit; use float32 or float8_e8m0fnu")
        rules = SCALE_RULES[scale_dtype]
        scale_rule = self.scale_rule or rules[0]
        if scale_rule not in rules:
            raise RecipeError(f"scale_rule: {scale_rule!r} does not fit scale_dtype {scale_dtype}; use one of {rules}")
        object.__setattr__(self, "block", tuple(b if b is None else int(b) for b in block))
        object.__setattr__(self, "scale_dtype", scale_dtype)
        object.__setattr__(self, "scale_rule", scale_rule)

    @property
    def dtype(self) -> np.dtype:
        """The stored element type."""
        return ELEMENTS[self.element].dtype

    @property
    def max(self) -> float:
        """The largest finite element."""
        return ELEMENTS[self.element].max

    @property
    def is_mx(self) -> bool:
        """Whether scales are e8m0 bytes: such blocks may not be ragged."""
        return self.scale_dtype == E8M0

    def stores_alike(self, other: "Scheme") -> bool:
        """Whether arrays in the other scheme are of the same types and blocks: the rules of their scales may differ."""
        return (self.element, self.block, self.scale_dtype) == (other.element, other.block, other.scale_dtype)

    def chooses_scales(self, source: "Scheme") -> bool:
        """Whether an array that comes from `source` to this scheme gets, block by block, the better of two scales (a
        power of two, or amax / max; `fp8x.numerics.better_scale`): where this scheme's scales are amax / max, and the
        source's powers of two, as all other rules make them."""
        return source.scale_rule != "amax" and self.scale_rule == "amax"

    def block_of(self, shape: Sequence[int], name: str = "array") -> tuple[int, ...]:
        """The block's extent in every dim of an array of `shape`; `name` stands in errors.

        Raises:
            ShapeError: fewer dims than the block names.
        """
        if len(shape) < len(self.block):
            raise ShapeError(
                f"{name}: shape {tuple(shape)} has {len(shape)} dims, but block {self.block} names {len(self.block)}; "
                "give an array with as many dims or more, or a block that names fewer"
            )
        lead = len(shape) - len(self.block)
        # A whole dim of size 0 still has one (empty) block.
        return (1,) * lead + tuple(max(n, 1) if b is None else b for n, b in zip(shape[lead:], self.block))

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of an array of `shape`: `ceil(shape[i] / block[i])`, and 1 for a whole dim."""
        extents = self.block_of(shape)
        whole = (False,) * (len(shape) - len(self.block)) + tuple(b is None for b in self.block)
        return tuple(1 if w else math.ceil(n / b) for n, b, w in zip(shape, extents, whole))

    def check_shape(self, shape: Sequence[int], name: str = "array") -> None:
        """Raises ShapeError, naming the array, unless one of `shape` can be stored: MX blocks may not be ragged."""
        extents = self.block_of(shape, name)
        if self.is_mx:
            for axis, (n, b) in enumerate(zip(shape, extents)):
                if n % b:
                    raise ShapeError(
                        f"{name}: dim {axis} of shape {tuple(shape)} is {n}, which {b} does not divide; an MX scheme "
                        f"needs whole blocks of {b} (K % {b} == 0): pad the dim to {-(-n // b) * b}, or use a scheme "
                        "with float32 scales"
                    )

    def __str__(self) -> str:
        block = "×".join("·" if b is None else str(b) for b in self.block)
        scale = "e8m0" if self.is_mx else "f32"
        rule = "" if self.scale_rule == SCALE_RULES[self.scale_dtype][0] else f" {self.scale_rule}"
        return f"{self.element} {block} {scale}{rule}"


def as_dtype(value, name: str) -> np.dtype:
    """`np.dtype(value)`.

    Raises:
        RecipeError: `value` names no type; `name` is in the message.
    """
    try:
        return np.dtype(value)
    except TypeError:
        raise RecipeError(f"{name}: {value!r} is no dtype; use one like jnp.float32") from None


def _is_extent(b) -> bool:
    return b is None or (isinstance(b, (int, np.integer)) and not isinstance(b, bool) and b > 0)


def per_tensor(element: ElementName = "e4m3") -> Scheme:
    """One float32 scale for a matrix (one per expert for `[E, N, K]`)."""
    return Scheme(element, block=(None, None))


def per_row(element: ElementName = "e4m3") -> Scheme:
    """One float32 scale a row: per channel for weights `[N, K]`, per token for activations `[M, K]`."""
    return Scheme(element, block=(1, None))


def mx(element: ElementName = "e4m3") -> Scheme:
    """MXFP8: one e8m0 scale for every 32 elements of K (OCP Microscaling Formats v1.0, section 5)."""
    return Scheme(element, block=(1, 32), scale_dtype=E8M0)


# Keys and values in e4m3 whose scales hold for all tokens: one in all, or one a head.
KV_SCHEMES = {"tensor": Scheme("e4m3", block=KV_TENSOR), "head": Scheme("e4m3", block=KV_HEAD)}


def is_kv_static(scheme: Scheme) -> bool:
    """Whether a scale of keys and values holds for all tokens."""
    return scheme.block in (KV_TENSOR, KV_HEAD)
