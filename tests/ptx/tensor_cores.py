"""Asynchronous Warpgroup Level Matrix Instructions: wgmma with float32 accumulators, K-major in swizzled shared memory.

A product is computed where it is waited for. Until then its registers are in flight, and what it reads in shared memory
may not be written. Sums are as short as a GPU's: see `add_products`.
"""

import dataclasses
import re

import numpy as np

from ptx.arithmetic import dtype_of
from ptx.memory import SharedMemory, swizzled
from ptx.program import Instruction, PtxError
from ptx.registers import LANES, Registers

_LANE = np.arange(LANES)
# Fragments: a warp has 16 rows, four lanes one of them; registers alternate between it and the one 8 below.
_ROW = 16 * (_LANE // 32) + _LANE % 32 // 4
_SWIZZLES = {1: 128, 2: 64, 3: 32}  # Matrix descriptor: bits 62 to 63
# How many bits of an addend count, below the largest exponent. Nothing documents them; with these the errors are those
# that an H200 showed, to three digits (test_tensor_cores.py).
SUM_BITS = {"e4m3": 13, "e5m2": 13, "f16": 25, "bf16": 25}
_FLOAT32_BITS = 23
_LEAST = -500.0  # an exponent below all others


@dataclasses.dataclass(frozen=True)
class _Product:
    """One wgmma.mma_async: registers of D and perhaps A; bytes `[rows, 32]` of B, and perhaps A, in shared memory."""

    d: tuple[str, ...]
    a: tuple[str, ...]
    a_place: np.ndarray | None
    b_place: np.ndarray
    types: tuple[str, str]
    accumulates: bool


class TensorCore:
    """A warpgroup's."""

    def __init__(self, registers: Registers, memory: SharedMemory):
        self.registers, self.memory = registers, memory
        self._open: list[_Product] = []
        self._groups: list[list[_Product]] = []

    @property
    def is_idle(self) -> bool:
        return not self._open and not any(self._groups)

    def fence(self) -> None:
        """wgmma.fence: earlier accesses of threads to registers come before later ones of wgmma."""
        self.registers.unfenced.clear()

    def multiply(self, instruction: Instruction) -> None:
        """wgmma.mma_async.sync.aligned.m64nNkK.f32.TA.TB d, a, b-desc, scale-d, 1, 1 (, 0)…"""
        shape, d_type, a_type, b_type = instruction.modifiers[3:]
        d, a, b, accumulates, *signs = instruction.operands
        found = re.fullmatch(r"m64n(\d+)k(16|32)", shape)
        if d_type != "f32" or not found or signs[:2] != [1, 1] or any(signs[2:]):
            raise PtxError("not emulated")
        n, k = int(found[1]), int(found[2])
        if k * dtype_of(a_type).itemsize != 32 or len(d) != n // 2:
            raise PtxError(f"{len(d)} registers for {shape} of {a_type}")
        read = self.registers.read
        product = _Product(
            d=d,
            a=a if isinstance(a, tuple) else (),
            a_place=None if isinstance(a, tuple) else _rows(read(a, "b64"), 64),
            b_place=_rows(read(b, "b64"), n),
            types=(a_type, b_type),
            accumulates=bool(read(accumulates, "pred")[0]),
        )
        registers = {*product.d, *product.a}
        if unfenced := sorted(registers & self.registers.unfenced):
            raise PtxError(f"{unfenced[0]} was accessed after the last wgmma.fence")
        in_flight = self.registers.in_flight
        if busy := [name for name in product.a if in_flight.get(name) == "accumulates"]:
            raise PtxError(f"{busy[0]} is A of a wgmma while another accumulates into it")
        if busy := [name for name in product.d if in_flight.get(name) == "reads"]:
            raise PtxError(f"{busy[0]} is accumulated into while another wgmma reads it")
        in_flight |= dict.fromkeys(product.a, "reads") | dict.fromkeys(product.d, "accumulates")
        for place in (product.a_place, product.b_place):
            if place is not None:
                self.memory.begin_read(place)
        self._open.append(product)

    def commit(self) -> None:
        """wgmma.commit_group"""
        self._groups.append(self._open)
        self._open = []

    def wait(self, count: int) -> None:
        """wgmma.wait_group: until only so many of the last groups are pending."""
        while len(self._groups) > count:
            for product in self._groups.pop(0):
                self._compute(product)
        pending = [product for group in (*self._groups, self._open) for product in group]
        self.registers.in_flight = {name: "reads" for p in pending for name in p.a}
        self.registers.in_flight |= {name: "accumulates" for p in pending for name in p.d}

    def _compute(self, product: _Product) -> None:
        a_type, b_type = product.types
        if product.a_place is None:
            a = _fragments([self.registers.peek(name) for name in product.a], a_type)
        else:
            a = _matrix(self.memory.end_read(product.a_place), a_type)
        b = _matrix(self.memory.end_read(product.b_place), b_type)
        sums = np.zeros((len(a), len(b)), np.float32)
        # Register fragments of D: pairs of columns, 8 rows below, 8 columns further.
        places = [
            (_ROW + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (_LANE % 4) + i % 2, name) for i, name in enumerate(product.d)
        ]
        if product.accumulates:
            for row, column, name in places:
                sums[row, column] = self.registers.peek(name).view(np.float32)
        sums = add_products(sums, a, b, SUM_BITS[a_type])
        for row, column, name in places:
            self.registers.poke(name, sums[row, column].view(np.uint32))


def add_products(sums: np.ndarray, a: np.ndarray, b: np.ndarray, bits: int) -> np.ndarray:
    """`sums + a @ b.T` in float32, as tensor cores add for one instruction.

    The products and the sum so far are aligned to the largest exponent among them, and cut off `bits` below it, toward
    zero. A product's exponent is the sum of its operands', though its significand may reach 4. The exact sum of what is
    left is cut off in the same way below its own leading bit, as float32 if not before.

    Arguments:
        sums: float32 `[m, n]`.
        a, b: `[m, k]` and `[n, k]`, of which k is the instruction's.
    """
    products, sums = a[:, None] * b, sums.astype(np.float64)
    exponents = np.where(products == 0, _LEAST, _exponent(a)[:, None] + _exponent(b))
    top = np.maximum(exponents.max(axis=2), np.where(sums == 0, _LEAST, _exponent(sums)))
    unit = np.exp2(top - bits)
    total = (np.trunc(products / unit[..., None]).sum(axis=2) + np.trunc(sums / unit)) * unit
    unit = np.exp2(_exponent(total) - min(bits, _FLOAT32_BITS))
    return (np.trunc(total / unit) * unit).astype(np.float32)


def _exponent(x: np.ndarray) -> np.ndarray:
    return np.frexp(x)[1] - 1.0


def _rows(descriptors: np.ndarray, rows: int) -> np.ndarray:
    """The bytes `[rows, 32]` that a matrix descriptor names: rows of the swizzle's width, 8 of them a stride apart."""
    if (descriptors != descriptors[0]).any():
        raise PtxError("matrix descriptors differ between threads")
    descriptor = int(descriptors[0])
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 49 & 7 or descriptor >> 62 not in _SWIZZLES:
        raise PtxError("not emulated: a base offset, or no swizzle")
    width = _SWIZZLES[descriptor >> 62]
    if start >> 7 & (width // 16 - 1):
        raise PtxError(f"a matrix at shared byte {start}, within a pattern of the swizzle, without a base offset")
    row = np.arange(rows)[:, None]
    return swizzled(start + row // 8 * stride + row % 8 * width + np.arange(32), width)


def _matrix(content: np.ndarray, kind: str) -> np.ndarray:
    """`[rows, 32]` bytes as float64 `[rows, k]`."""
    return np.ascontiguousarray(content).view(dtype_of(kind)).astype(np.float64)


def _fragments(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """A in registers, four of 4 bytes each: alternately 8 rows below, then 16 bytes of K further."""
    per_register = 4 // dtype_of(kind).itemsize
    a = np.zeros((64, 8 * per_register))
    for i, bits in enumerate(registers):
        values = bits.view(dtype_of(kind)).reshape(LANES, per_register)
        for j in range(per_register):
            a[_ROW + 8 * (i % 2), per_register * (_LANE % 4 + i // 2 * 4) + j] = values[:, j]
    return a
