"""Instructions that compute registers from registers, on all lanes at once.

Registers hold bits: `[lanes]` of uint8 to uint64, or bool. `as_type` views them as what an instruction's type says, and
`as_bits` undoes that. Two in one register, as in `bf16x2`, are `[lanes, 2]`, the lower half first.
"""

import functools
import operator
from collections.abc import Callable

import ml_dtypes
import numpy as np

from ptx.program import Instruction, PtxError

_FLOATS = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
_KINDS = {"u": "uint", "s": "int", "b": "uint"}
# What cvt makes of a NaN (Data Movement and Conversion Instructions: cvt).
_NAN_BYTE = 0x7F


@functools.cache
def dtype_of(kind: str) -> np.dtype:
    """The numpy type of a PTX type: `u32`, `b16`, `bf16`, … and, of one half, `bf16x2`."""
    kind = kind.removesuffix("x2")
    if kind == "pred":
        return np.dtype(bool)
    if kind in _FLOATS:
        return np.dtype(_FLOATS[kind])
    if kind[0] not in _KINDS or not kind[1:].isdigit():
        raise PtxError(f"type {kind} is not emulated")
    return np.dtype(_KINDS[kind[0]] + kind[1:])


def as_type(bits: np.ndarray, kind: str) -> np.ndarray:
    """Registers as `kind`. Of wider registers cvt and st take the lower bits."""
    dtype = dtype_of(kind)
    halves = 2 if kind.endswith("x2") else 1
    if dtype.kind == "b" or bits.dtype.kind == "b":
        if bits.dtype != dtype:
            raise PtxError(f"{kind} of a register of {bits.dtype}")
        return bits
    size = dtype.itemsize * halves
    if bits.itemsize < size:
        raise PtxError(f"a register of {8 * bits.itemsize} bits is too narrow for {kind}")
    values = np.ascontiguousarray(bits.astype(f"uint{8 * size}")).view(dtype)
    return values.reshape(-1, 2) if halves == 2 else values


def as_bits(values: np.ndarray, width: int) -> np.ndarray:
    """What registers of `width` bits hold: narrower integers are extended, with their sign if they have one."""
    if values.dtype == bool:
        return values
    if values.ndim == 2:
        values = np.ascontiguousarray(values).view(f"uint{16 * values.itemsize}")[:, 0]
    if values.dtype.kind not in "iu":
        values = values.view(f"uint{8 * values.itemsize}")
    if 8 * values.itemsize > width:
        raise PtxError(f"{8 * values.itemsize} bits for a register of {width}")
    signed = values.dtype.kind == "i"
    return values.astype(f"{'' if signed else 'u'}int{width}").view(f"uint{width}")


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Toward zero; all ones for a zero divisor, of which the quotient is unspecified (div)."""
    wide_x, wide_y = x.astype(np.int64), y.astype(np.int64)
    quotient = np.abs(wide_x) // np.maximum(np.abs(wide_y), 1) * np.sign(wide_x) * np.sign(wide_y)
    return np.where(y == 0, -1, quotient).astype(x.dtype)


def _binary(name: str, modifiers: tuple[str, ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if name in ("min", "max") and x.dtype.kind not in "iu":
        # A NaN loses, unless .NaN is there (Floating Point Instructions: min, max).
        table = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
        return table[name]["NaN" in modifiers](x, y)
    if x.dtype == ml_dtypes.bfloat16 or x.dtype == np.float16:
        return _OPERATORS[name](x.astype(np.float32), y.astype(np.float32)).astype(x.dtype)
    return _OPERATORS[name](x, y)


_OPERATORS: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "min": np.minimum,
    "max": np.maximum,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_INTEGER_ONLY = {"div": _divide, "rem": lambda x, y: x - _divide(x, y) * y}

_COMPARISONS: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_APPROXIMATE: dict[str, Callable] = {"rcp": lambda x: 1 / x, "ex2": np.exp2, "rsqrt": lambda x: 1 / np.sqrt(x)}
_MODIFIERS = {"rn", "lo", "wide", "hi", "NaN", "relu", "satfinite", "approx", "ftz", "to", "global", "param", "shared"}


class Arithmetic:
    """Evaluates instructions; `random` chooses what an approximation is off by."""

    def __init__(self, random: np.random.Generator):
        self.random = random

    def evaluate(self, instruction: Instruction, read: Callable[[int, str], np.ndarray]) -> np.ndarray:
        """The result of an instruction for all lanes; `read(i, kind)` gives its i-th operand, after the result.

        Raises:
            PtxError: the instruction is not emulated.
        """
        name, (*modifiers, kind) = instruction.name, instruction.modifiers
        modifiers = tuple(modifiers)
        handler = getattr(self, f"_{name}", None)
        if handler is not None:
            return handler(modifiers, kind, read)
        if set(modifiers) - _MODIFIERS:
            raise PtxError("not emulated")
        if name in _INTEGER_ONLY and kind[0] in "su" and dtype_of(kind).itemsize < 8:
            return _INTEGER_ONLY[name](read(1, kind), read(2, kind))
        if name in _OPERATORS:
            result = _binary(name, modifiers, read(1, kind), read(2, kind))
            return np.maximum(result, 0) if "relu" in modifiers else result
        if name in _APPROXIMATE:
            return self._approximate(name, modifiers, read(1, kind))
        raise PtxError("not emulated")

    def _approximate(self, name: str, modifiers: tuple[str, ...], x: np.ndarray) -> np.ndarray:
        """A unit in the last place off, or not, at random: about what the ISA allows (rcp, rsqrt, ex2)."""
        flush = "ftz" in modifiers
        x = _flushed(x) if flush else x
        exact = _APPROXIMATE[name](x.astype(np.float64)).astype(np.float32)
        ordinary = np.isfinite(exact) & (np.abs(exact) >= np.finfo(np.float32).tiny)
        off = self.random.integers(-1, 2, exact.shape, dtype=np.int32)
        result = np.where(ordinary, (exact.view(np.int32) + off).view(np.float32), exact)
        return _flushed(result) if flush else result

    def _mul(self, modifiers, kind, read):
        x, y = read(1, kind), read(2, kind)
        if kind[0] not in "su":
            return _binary("mul", modifiers, x, y)
        bits = 8 * x.itemsize
        if "hi" in modifiers and bits == 64:
            return np.array([int(a) * int(b) >> 64 for a, b in zip(x, y)], x.dtype)
        if "wide" in modifiers and bits == 64:
            raise PtxError("not emulated")
        if "wide" in modifiers or "hi" in modifiers:
            double = f"{'' if kind[0] == 's' else 'u'}int{2 * bits}"
            product = x.astype(double) * y.astype(double)
            return product if "wide" in modifiers else (product >> bits).astype(x.dtype)
        return x * y

    def _mad(self, modifiers, kind, read):
        if modifiers != ("lo",):
            raise PtxError("not emulated")
        return read(1, kind) * read(2, kind) + read(3, kind)

    def _fma(self, modifiers, kind, read):
        """Of float32, through float64: rounded twice, which hardly ever shows."""
        if (modifiers, kind) != (("rn",), "f32"):
            raise PtxError("not emulated")
        x, y, z = (read(i, kind).astype(np.float64) for i in (1, 2, 3))
        return (x * y + z).astype(np.float32)

    def _abs(self, modifiers, kind, read):
        return np.abs(read(1, kind))

    def _neg(self, modifiers, kind, read):
        return -read(1, kind)

    def _not(self, modifiers, kind, read):
        return ~read(1, kind)

    def _shl(self, modifiers, kind, read):
        return self._shift(np.left_shift, kind, read)

    def _shr(self, modifiers, kind, read):
        return self._shift(np.right_shift, kind, read)

    def _shift(self, function, kind, read):
        """Shifts by more than the width are shifts by it (Logic and Shift Instructions: shl, shr)."""
        x, count = read(1, kind), read(2, "u32").astype(np.int64)
        bits = 8 * x.itemsize
        shifted = function(x, np.minimum(count, bits - 1).astype(x.dtype))
        sign = kind[0] == "s" and function is np.right_shift
        return shifted if sign else np.where(count >= bits, 0, shifted).astype(x.dtype)

    def _bfe(self, modifiers, kind, read):
        """`length` bits from `begin` on; of signed types with the field's own sign."""
        x = read(1, kind)
        begin, length = (read(i, "u32").astype(x.dtype) & 255 for i in (2, 3))
        bits = 8 * x.itemsize
        if ((length == 0) | (begin + length > bits)).any():
            raise PtxError("not emulated")
        return (x << (bits - begin - length)) >> (bits - length)

    def _prmt(self, modifiers, kind, read):
        """Bytes of two registers, each by a nibble, whose top bit asks for the sign instead (prmt)."""
        pool = np.stack([read(i, "u32") for i in (1, 2)], axis=1).view(np.uint8)
        nibbles = (read(3, "u32")[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & 15
        chosen = np.take_along_axis(pool, nibbles & 7, axis=1)
        signs = np.where(chosen & 128, 255, 0)
        return np.where(nibbles & 8, signs, chosen).astype(np.uint8).view(np.uint32)[:, 0]

    def _selp(self, modifiers, kind, read):
        return np.where(read(3, "pred"), read(1, kind), read(2, kind))

    def _setp(self, modifiers, kind, read):
        (comparison,) = modifiers
        x, y = read(1, kind), read(2, kind)
        unordered = np.isnan(x) | np.isnan(y) if kind[0] == "f" else np.zeros(x.shape, bool)
        if comparison in ("nan", "num"):
            return unordered if comparison == "nan" else ~unordered
        if comparison in _COMPARISONS:
            return _COMPARISONS[comparison](x, y) & ~unordered
        if comparison.removesuffix("u") in _COMPARISONS and kind[0] == "f":
            return _COMPARISONS[comparison.removesuffix("u")](x, y) | unordered
        raise PtxError("not emulated")

    def _mov(self, modifiers, kind, read):
        return read(1, kind)

    def _cvta(self, modifiers, kind, read):
        """Generic addresses of what is global or a parameter; shared memory's are not emulated."""
        if "shared" in modifiers:
            raise PtxError("not emulated")
        return read(1, kind)

    def _cvt(self, modifiers, kind, read):
        """Of two float32s, the first becomes the upper half (cvt)."""
        *modifiers, to = modifiers
        integers = {"u", "s"} >= {to[0], kind[0]}
        if set(modifiers) - {"rn", "satfinite"} or ("satfinite" in modifiers) != to.startswith("e"):
            raise PtxError("not emulated")
        if not to.endswith("x2"):
            if not integers and to[0] in "su":
                raise PtxError("not emulated")
            return read(1, kind).astype(dtype_of(to))
        if kind != "f32":
            return read(1, kind).astype(dtype_of(to))
        values = np.stack([read(2, kind), read(1, kind)], axis=1)
        if not to.startswith("e"):
            return values.astype(dtype_of(to))
        largest = np.float32(ml_dtypes.finfo(dtype_of(to)).max)
        codes = np.clip(values, -largest, largest).astype(dtype_of(to)).view(np.uint8)
        return np.where(np.isnan(values), np.uint8(_NAN_BYTE), codes).view(dtype_of(to))


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
