"""Arrays of more than 2^31 elements: plain loads and stores of all kernels compute addresses in 64 bits, read from PTX.

TMA has a coordinate of 32 bits for each dim, and its own strides. A plain access goes to a pointer and an offset. What
has 32 bits in an offset may be an index along a dim, which is a tile's number times its extent; strides of an array,
which are longer than a tile here, have to be multiplied in 64 bits.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from ptx.launch import launches_sm90
from ptx.program import Address, Instruction, Program, parse

from fp8x.ops.gate import kernel_gate
from fp8x.pallas import aot
from fp8x.pallas.epilogue import Gated
from fp8x.pallas.sm90_grouped_fp8 import gated_fp8, grouped_fp8
from fp8x.pallas.sm90_grouped_swapped import grouped_swapped
from fp8x.pallas.sm90_quantize import quantize_blocks
from fp8x.scheme import Scheme, mx, per_row, per_tensor

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
E4M3, E8M0, BF16, F32, I32 = jnp.float8_e4m3fn, jnp.float8_e8m0fnu, jnp.bfloat16, jnp.float32, jnp.int32
LONGEST_TILE = 512  # of a tile's extents, and a cluster's together
GROUP = Scheme("e4m3", block=(1, 128))
of = jax.ShapeDtypeStruct
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def quantizer(shape, scheme, *, dtype=BF16, given=False, used=False, gate=None):
    scale = of(shape[2:3], F32) if given else None

    def run(x, scale, used):
        return quantize_blocks(x, scheme, scale, used, gate)

    return run, of(shape, dtype), scale, of((), I32) if used else None


def product(run, m, n, k, e, x_scale, w_scale, *, x=E4M3, w_scale_dtype=F32, rows="grouped", parts=(), end=None):
    """Arguments of a kernel; scales by the shape of a matrix's."""
    sizes = of((e,), I32) if rows == "grouped" else None
    options = {"end": end} if end else {"out_dtype": BF16}
    bias = of((e, *parts, n), F32)
    operands = [of((m, k), x), of((e, *parts, n, k), E4M3), x_scale and of(x_scale, F32)]
    operands += [of((e, *parts, *w_scale), w_scale_dtype), bias, sizes]
    if rows == "by expert":
        return lambda experts, *operands: run(*operands, experts=experts, **options), of((m,), I32), *operands
    return lambda *operands: run(*operands, *([None] if end else []), **options), *operands


GATED = Gated(kernel_gate("silu"), jnp.dtype(BF16), GROUP, False)
LARGE = dict(m=2**20, n=2**14, k=2**14, e=16)
DEEP, WIDE, M, N = 2**14 // 128, 2**14 // 128, 2**20, 2**14
MX_LARGE = dict(m=64, n=2**15, k=2**14, e=256)
CASES = {
    "quantizer, 1×128": slow(quantizer((2**24 + 3, 1, 1, 128), GROUP)),
    "quantizer, MX, gate, used": quantizer((2**20 + 3, 2, 96, 32), mx(), gate=kernel_gate("silu"), used=True),
    "quantizer, rows": slow(quantizer((2**19 + 3, 1, 1, 7168), per_row(), used=True)),
    "quantizer, given": slow(quantizer((2**19 + 3, 1, 64, 128), Scheme("e4m3", block=(None, 128)), given=True)),
    "quantizer, float32": slow(quantizer((2**19 + 3, 1, 1, 7168), per_tensor(), dtype=F32, given=True)),
    "fp8, factors": product(grouped_fp8, **LARGE, x_scale=(M,), w_scale=(N,)),
    "fp8, blocks": slow(product(grouped_fp8, **LARGE, x_scale=(DEEP, M), w_scale=(WIDE, DEEP))),
    "fp8, columns": slow(product(grouped_fp8, **LARGE, x_scale=(DEEP, M), w_scale=(DEEP, N))),
    "fp8, dense": slow(product(grouped_fp8, **(LARGE | {"e": 1}), x_scale=(DEEP, M), w_scale=(DEEP, N), rows="dense")),
    "gated": slow(product(gated_fp8, **LARGE, x_scale=(DEEP, M), w_scale=(WIDE, DEEP), parts=(2,), end=GATED)),
    "gated, factors": slow(product(gated_fp8, **LARGE, x_scale=(M,), w_scale=(N,), parts=(2,), end=GATED)),
    "decode, blocks": slow(product(grouped_swapped, **LARGE, x_scale=(DEEP, M), w_scale=(WIDE, DEEP))),
    "decode, factors": slow(product(grouped_swapped, **LARGE, x_scale=(M,), w_scale=(N,))),
    "w8a16, rows": slow(product(grouped_swapped, **LARGE, x=BF16, x_scale=None, w_scale=(N,))),
    "w8a16, 1×128": slow(product(grouped_swapped, **LARGE, x=BF16, x_scale=None, w_scale=(N, DEEP))),
    "mx": product(
        grouped_swapped, **MX_LARGE, x=BF16, x_scale=None, w_scale=(2**15, 2**14 // 32), w_scale_dtype=E8M0
    ),
    "mx, by expert": slow(
        product(
            grouped_swapped, **MX_LARGE, x=BF16, x_scale=None, w_scale=(2**15, 2**14 // 32), w_scale_dtype=E8M0,
            rows="by expert",
        )
    ),
}  # fmt: skip


class Offsets:
    """What the offsets of a program's plain accesses to global memory are made of."""

    def __init__(self, program: Program, blocks: int):
        self.program = program
        self._bounds: dict[str, float] = {"%tid.x": 3 * 128 - 1, "%ctaid.x": blocks - 1}
        self._writers: dict[str, list[Instruction]] = {}
        for instruction in program.instructions:
            for register in [] if instruction.name in ("st", "bra") else _names(instruction.operands[:1]):
                self._writers.setdefault(register, []).append(instruction)

    @property
    def accesses(self) -> list[Instruction]:
        return [i for i in self.program.instructions if i.name in ("ld", "st") and not _is_elsewhere(i)]

    def overflows(self, access: Instruction) -> set[str]:
        """Products in 32 bits that an offset is made of, by more than a tile, which may pass them."""
        place = access.operands[1 if access.name == "ld" else 0]
        assert self.program.registers[place.base] == ".b64", f"an address of {access}"
        found, seen, ahead = set(), set(), [place.base]
        while ahead:
            register = ahead.pop()
            if register in seen or self.program.registers.get(register) == ".pred":
                continue
            seen.add(register)
            for writer in self._writers.get(register, []):
                if writer.name == "ld":
                    continue  # an index, from a table
                ahead += _names(writer.operands[1:])
                # LLVM narrows what it has shown to fit, and widens it without a sign. `1 << slot` is a barrier's phase.
                is_bit = writer.name == "shl" and self.bound(writer.operands[1]) == 1
                if _factor(writer) > LONGEST_TILE and self._bound(writer) >= 2**32 and not is_bit:
                    found.add(f"{writer} of {', '.join(map(str, writer.operands[1:]))}")
        return found

    def bound(self, operand) -> float:
        """What an operand is at most, as its numbers and the grid say; of a loop's counter nothing does."""
        if isinstance(operand, int):
            return abs(operand)
        if operand not in self._bounds:
            self._bounds[operand] = math.inf  # where it depends on itself
            writers = self._writers.get(operand, [])
            self._bounds[operand] = max((self._bound(writer) for writer in writers), default=math.inf)
        return self._bounds[operand]

    def _bound(self, writer: Instruction) -> float:
        name, (x, *others) = writer.name, writer.operands[1:] or (None,)
        if name in ("mov", "cvt"):
            return self.bound(x)
        if name in ("selp", "max", "or", "xor"):
            return max(map(self.bound, (x, others[0]))) * (2 if name in ("or", "xor") else 1)
        if name in ("add", "sub"):
            is_less = name == "sub" or (isinstance(others[0], int) and others[0] < 0)
            return self.bound(x) + (0 if is_less else self.bound(others[0]))
        if name in ("min", "and"):
            return min(map(self.bound, (x, others[0])))
        if name == "bfe" and isinstance(others[1], int):
            return 2 ** others[1] - 1
        if name in ("shl", "shr", "div", "rem", "mul") and isinstance(others[0], int) and others[0] > 0:
            by = others[0] if name in ("div", "rem", "mul") else 2 ** others[0]
            if name == "mul":
                return self.bound(x) * by / (2**32 if "hi" in writer.modifiers else 1)
            return by if name == "rem" else self.bound(x) * by if name == "shl" else self.bound(x) // by
        return math.inf


def _factor(instruction: Instruction) -> float:
    """By how much an instruction multiplies into 32 bits."""
    if instruction.modifiers[-1:] not in (("s32",), ("u32",), ("b32",)) or "wide" in instruction.modifiers:
        return 1
    if instruction.name == "shl":
        return 2 ** instruction.operands[2] if isinstance(instruction.operands[2], int) else math.inf
    if (instruction.name, instruction.modifiers[0]) not in (("mul", "lo"), ("mad", "lo")):
        return 1
    constants = [abs(operand) for operand in instruction.operands[1:3] if isinstance(operand, int)]
    return min(constants, default=math.inf)


def _names(operands) -> list[str]:
    names = []
    for operand in operands:
        parts = (
            (operand.base,) if isinstance(operand, Address) else operand if isinstance(operand, tuple) else (operand,)
        )
        names += [part for part in parts if isinstance(part, str)]
    return names


def _is_elsewhere(access: Instruction) -> bool:
    return any(modifier.split("::")[0] in ("param", "shared") for modifier in access.modifiers)


@pytest.mark.sample
@needs_compiler
@pytest.mark.parametrize("case", [c if hasattr(c, "marks") else pytest.param(c) for c in CASES.values()], ids=CASES)
def test_strides_are_multiplied_in_64_bits(case):
    run, *operands = case
    (launch,) = launches_sm90(run, *operands)
    offsets = Offsets(parse(launch.ptx), launch.blocks)
    found = {str(access): overflows for access in offsets.accesses if (overflows := offsets.overflows(access))}
    assert offsets.accesses and not found


def test_a_stride_in_32_bits_is_found():
    code = """
.visible .entry kernel(
	.param .u64 .ptr .align 256 array
)
{{ .reg .b32 %r<9>; .reg .b64 %rd<9>; ld.param.b64 %rd1, [array]; ld.global.b32 %r1, [%rd1];
{product} add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r1; ret; }}"""
    narrow = "mul.lo.s32 %r2, %r1, 7168; mul.wide.s32 %rd2, %r2, 4;"
    for product, count in [(narrow, 1), (narrow.replace("7168", "128"), 0), ("mul.wide.s32 %rd2, %r1, 28672;", 0)]:
        offsets = Offsets(parse(code.format(product=product)), blocks=1)
        assert [len(offsets.overflows(access)) for access in offsets.accesses] == [0, count]
