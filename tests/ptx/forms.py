"""Every form of every kernel: what changes the generated code, apart from sizes.

`QUANTIZE`, `FP8`, `GATED` and `SWAPPED` list the forms that are emulated (`ptx.examples`). `recorded` finds those that
ops dispatch to. A form's `key` decides about the code's structure and is in a list as it is; its other fields, whose
code is in one place each, are there in every pair of values.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fp8x.ops.gate import KERNEL_ACTIVATIONS, ClampedSwiGLU, Gate, kernel_gate
from fp8x.pallas import sm90_grouped_fp8, sm90_grouped_swapped, sm90_quantize, tuning
from fp8x.pallas.quantize_tiles import choose_tile
from fp8x.pallas.sm90_grouped_fp8 import Tiling
from fp8x.pallas.swapped_tiling import Tiling as Swapped

F8, F16 = ("float8_e4m3fn", "float8_e5m2"), ("bfloat16", "float16")
OUT = (*F16, "float32")
# By the name that a form has; the limit is one that normal numbers pass.
GATES: dict[str, Gate] = {name: name for name in KERNEL_ACTIVATIONS} | {"ClampedSwiGLU": ClampedSwiGLU(limit=1.5)}


@dataclasses.dataclass(frozen=True)
class Form:
    """One form; subclasses name the fields of its key."""

    KEY: ClassVar[tuple[str, ...]]

    @property
    def key(self) -> tuple:
        return tuple(getattr(self, name) for name in self.KEY)

    @property
    def pairs(self) -> set[tuple]:
        fields = sorted((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return set(itertools.combinations(fields, 2))

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True)
class QuantizeForm(Form):
    """Of sm90_quantize.

    Attributes:
        x: the input's type.
        element: the output's.
        scale: the rule by which scales are found, or "given".
        gate: its name in `GATES`, or "".
        used: whether the number of rows that count is an argument.
        threads: "few" of a warp share a block, or "all" of the block of the grid.
        tile: whether a thread has "one" vector, or "several", the last of which may be "overlapping" the one before;
            and whether tiles divide the rows, which are "whole" or "ragged".
    """

    x: str
    element: str
    scale: str
    gate: str
    used: bool
    threads: str
    tile: str

    KEY = ("x", "scale", "gate", "threads")


@dataclasses.dataclass(frozen=True)
class ProductForm(Form):
    """Of the kernels that multiply.

    Attributes:
        kernel: "fp8", "gated" or "swapped".
        x, w: types.
        x_scale, w_scale: "one" a matrix, "rows", or blocks, as "1×128"; x has none in 16 bits.
        rows: "dense", "grouped" or "by expert".
        tiling: but for `stages`, `tokens` and `splits`, as text.
        tokens: of a tile of the swapped kernel.
        splits: whether it cuts K.
        swizzle: bytes of K, as its remainder leaves them.
        gate, h, h_scale: of a gated product, the gate's name in `GATES`, h's type, and the rule by which h's scales are
            found, or "given" or "given blocks".
    """

    kernel: str
    x: str
    w: str
    x_scale: str
    w_scale: str
    rows: str
    bias: bool
    out: str
    tiling: str
    swizzle: int
    tokens: int = 0
    splits: bool = False
    gate: str = ""
    h: str = ""
    h_scale: str = ""

    KEY = ("kernel", "x_scale", "w_scale", "rows", "tiling", "h_scale", "x_in_16_bits")

    @property
    def x_in_16_bits(self) -> str:
        """The structure differs between the two, where they are multiplied by e8m0 scales."""
        return self.x if self.x in F16 else ""


def of_tiling(tiling) -> dict[str, Any]:
    """The fields of a form that a tiling gives."""
    fields = dataclasses.asdict(tiling)
    fields.pop("stages")
    taken = {"tokens": fields.pop("tokens", 0), "splits": fields.pop("splits", 1) > 1}
    return {"tiling": ", ".join(f"{name}={value}" for name, value in fields.items()), **taken}


# The fields that a key fixes, and what each of the others may be.
Option = tuple[dict[str, Any], dict[str, Iterable]]


def covering(kind: type[Form], options: list[Option]) -> list[Form]:
    """A form for each option, and more until each pair of fields' values that an option has is in one of them."""
    rng, forms = random.Random(0), []
    choices = [{name: (value,) for name, value in fixed.items()} | free for fixed, free in options]
    missing = set()
    for values in choices:
        for (a, of_a), (b, of_b) in itertools.combinations(sorted(values.items()), 2):
            missing.update(((a, x), (b, y)) for x in of_a for y in of_b)

    def take(values: dict[str, Iterable]) -> None:
        candidates = [kind(**{name: rng.choice(of) for name, of in values.items()}) for _ in range(12)]
        forms.append(max(candidates, key=lambda form: len(form.pairs & missing)))
        missing.difference_update(forms[-1].pairs)

    for values in choices:
        take(values)
    while missing:
        pair = min(missing, key=str)
        fitting = [values for values in choices if all(value in values[name] for name, value in pair)]
        take(rng.choice(fitting) | {name: (value,) for name, value in pair})
    return forms


def _quantize_options() -> Iterator[Option]:
    mx, float32 = ("rceil", "floor", "ceil", "even"), ("amax", "pow2", "unit", "given")
    for x, scale, gate in itertools.product(OUT, mx + float32, ("", *GATES)):
        tiles = quantizer_shapes(x, is_mx=scale in mx, has_gate=gate != "")
        for threads in sorted({threads for threads, _ in tiles}):
            free = dict(element=F8, used=(False, True), tile=tuple(tile for of, tile in tiles if of == threads))
            yield dict(x=x, scale=scale, gate=gate, threads=threads), free


@functools.cache
def quantizer_shapes(x: str, *, is_mx: bool, has_gate: bool) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Rows, blocks of each and their width: a small example of each `threads` and `tile` that there is."""
    found = {}
    parts, itemsize = 2 if has_gate else 1, np.dtype(x).itemsize
    widths = (32,) if is_mx else (128, 264, 1024, 2048, 2888, 7168)
    for m, width, b in itertools.product((*range(3, 70), 140, 281, 4225, 8449, 16897), widths, (1, 4)):
        tile = choose_tile(m, b, width, itemsize, parts)
        if not isinstance(tile, str) and m * b * width < 1_500_000:
            found.setdefault(_of_tile(tile, m, width), (m, b, width))
    return found


def _of_tile(tile, m: int, width: int) -> tuple[str, str]:
    vectors = "one" if tile.chunk == width and tile.rows == tile.thread_rows else "several"
    vectors = "overlapping" if width % tile.chunk else vectors
    return "all" if tile.lanes > 32 else "few", f"{vectors} {'ragged' if m % tile.rows else 'whole'}"


def _product_options(kernel, x, scales, rows, tilings, **others: Iterable) -> Iterator[Option]:
    for (x_scale, w_scale), of_rows, tiling in itertools.product(scales, rows, tilings):
        fixed = dict(kernel=kernel, x_scale=x_scale, w_scale=w_scale, rows=of_rows, tiling=of_tiling(tiling)["tiling"])
        yield fixed, dict(x=x, w=F8, bias=(False, True), out=OUT, swizzle=(32, 64, 128)) | others


_FACTORS = list(itertools.product(("one", "rows"), ("one", "rows")))
_TILINGS = [Tiling(m, n, cluster=c) for m in (64, 128) for n in (128, 256) for c in (1, 2)]
_ROWS = ("dense", "grouped", "by expert")
_GATED = [
    option
    for h_scale in ("amax", "pow2", "unit", "given", "given blocks")
    for option in _product_options(
        "gated", F8, [*_FACTORS, ("1×128", "128×128")], ("grouped",), _TILINGS[-2:],
        gate=tuple(GATES), h=F8, h_scale=(h_scale,),
    )
]  # fmt: skip


def _swapped_options() -> Iterator[Option]:
    few = (8, 16, 32, 64)
    # Of as many tokens as the registers hold sums of.
    for x, scales, widest in [
        (F8, [*_FACTORS, ("1×128", "128×128"), ("1×128", "1×128")], 64),
        *((x, [("", "one"), ("", "rows")], 192) for x in zip(F16)),
        *((x, [("", "128×128")], 120) for x in zip(F16)),
        *((x, [("", "1×128")], 64) for x in zip(F16)),
        (("bfloat16",), [("", "1×32")], 192),
        (("float16",), [("", "1×32")], 64),
    ]:
        for rows in _ROWS:
            # Two waves that are added up in place would run one by one.
            tilings = [Swapped(8, 128), Swapped(8, 256)][: 1 if widest == 192 else 2]
            tokens = (8,) if rows == "by expert" else few
            yield from _product_options("swapped", x, scales, (rows,), tilings, tokens=tokens, splits=(False, True))
            if widest > 64 and rows != "by expert":
                yield from _product_options(
                    "swapped", x, scales, (rows,), tilings, tokens=tuple(sorted({min(widest, 128), widest}))
                )


QUANTIZE = covering(QuantizeForm, list(_quantize_options()))
FP8 = covering(
    ProductForm,
    [
        *_product_options("fp8", F8, [*_FACTORS, ("1×128", "128×128")], _ROWS[:2], _TILINGS),
        *_product_options("fp8", F8, [("1×128", "1×128")], _ROWS[:2], _TILINGS[:-2]),
    ],
)
GATED = covering(ProductForm, _GATED)
SWAPPED = covering(ProductForm, list(_swapped_options()))
EMULATED: list[Form] = [*QUANTIZE, *FP8, *GATED, *SWAPPED]


class _Chosen(Exception):
    """Carries the tilings that a kernel could take."""


@contextlib.contextmanager
def recorded() -> Iterator[list[Form]]:
    """The forms that ops come to within it as they are traced; the kernels themselves are not."""
    found: list[Form] = []

    def tilings(real, *arguments, **options) -> Iterable:
        """What `real` would choose from."""
        with _replaced(tuning, choose=_raise_choices):
            try:
                real(*arguments, **options)
            except _Chosen as chosen:
                return chosen.args[0]
        return ()

    def quantize_blocks(x, scheme, scale, used, gate=None):
        found.append(form_of_quantizer(x, scheme, scale, used, gate))
        m, _, b, width = x.shape
        scales = None if scale is not None else jnp.zeros((m, b), jnp.uint8 if scheme.is_mx else jnp.float32)
        return jnp.zeros((m, b, width), scheme.dtype), scales

    def product(kernel, real, x, w, x_scale, w_scale, bias, sizes, *rest, end=None, out_dtype=None, experts=None):
        options = {"end": end} if end else {"out_dtype": out_dtype}
        options |= {} if experts is None else {"experts": experts}
        for tiling in tilings(real, x, w, x_scale, w_scale, bias, sizes, *rest, **options):
            *_, n, k = w.shape
            form = ProductForm(
                kernel,
                x.dtype.name,
                w.dtype.name,
                _of_x_scale(x_scale),
                _of_w_scale(w_scale, n, k, parts=end is not None),
                "by expert" if experts is not None else "dense" if sizes is None else "grouped",
                bias is not None,
                np.dtype(end.dtype if end else out_dtype).name,
                swizzle=math.gcd(k + -k % 32, 128),
                **of_tiling(tiling),
                **(_of_end(end, rest[0]) if end else {}),
            )
            found.append(form)
        if not end:
            return jnp.zeros((x.shape[0], w.shape[1]), out_dtype)
        m, i = x.shape[0], w.shape[2]
        return jnp.zeros((m, i), end.scheme.dtype), None if end.is_static else jnp.ones((m, -(-i // 128)))

    def of(kernel, real):
        return lambda *arguments, **options: product(kernel, real, *arguments, **options)

    with (
        tuning.recorded(),  # traces of these kernels are cached under its key
        _replaced(sm90_quantize, quantize_blocks=quantize_blocks),
        _replaced(sm90_grouped_fp8, grouped_fp8=of("fp8", sm90_grouped_fp8.grouped_fp8)),
        _replaced(sm90_grouped_fp8, gated_fp8=of("gated", sm90_grouped_fp8.gated_fp8)),
        _replaced(sm90_grouped_swapped, grouped_swapped=of("swapped", sm90_grouped_swapped.grouped_swapped)),
    ):
        yield found


def _raise_choices(problem, estimates):
    raise _Chosen(list(estimates))


@contextlib.contextmanager
def _replaced(module, **functions) -> Iterator[None]:
    before = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def form_of_quantizer(x, scheme, scale, used, gate) -> QuantizeForm:
    """Of a call of `quantize_blocks`."""
    m, parts, b, width = x.shape
    tile = choose_tile(m, b, width, x.dtype.itemsize, parts)
    return QuantizeForm(
        x.dtype.name,
        scheme.dtype.name,
        "given" if scale is not None else scheme.scale_rule,
        "" if gate is None else _name_of(gate),
        used is not None,
        *_of_tile(tile, m, width),
    )


def _name_of(function) -> str:
    return next(name for name, gate in GATES.items() if kernel_gate(gate) is function)


def _of_x_scale(scale: jax.Array | None) -> str:
    if scale is None:
        return ""
    return "1×128" if scale.ndim == 2 else "one" if scale.shape == (1,) else "rows"


def _of_w_scale(scale: jax.Array, n: int, k: int, *, parts: bool) -> str:
    if scale.dtype == jnp.float8_e8m0fnu:
        return "1×32"
    own = scale.shape[2 if parts else 1 :]  # of a matrix
    if len(own) == 1:
        return "one" if own == (1,) else "rows"
    return "128×128" if own == (-(-n // 128), -(-k // 128)) else "1×128"


def _of_end(end, inverse) -> dict[str, Any]:
    given = "" if inverse is None else "given" if inverse.shape == (1,) else "given blocks"
    return {"gate": _name_of(end.gate), "h": end.scheme.dtype.name, "h_scale": given or end.scheme.scale_rule}
