"""A warpgroup's registers, which wgmma reads and writes while the program goes on."""

import numpy as np

from ptx.arithmetic import as_bits, as_type
from ptx.program import Operand, PtxError

LANES = 128


class Registers:
    """Bits of each register in each lane.

    Attributes:
        in_flight: what wgmma does with a register until it is waited for: "reads" or "accumulates".
        unfenced: registers accessed since the last wgmma.fence.
    """

    def __init__(self, types: dict[str, str], symbols: dict[str, np.ndarray]):
        """`types` as the program declares them; `symbols` are names of constants: special registers and addresses."""
        self._widths = {name: 1 if kind == ".pred" else int(kind[2:]) for name, kind in types.items()}
        self._symbols, self._bits = symbols, {}
        self.in_flight: dict[str, str] = {}
        self.unfenced: set[str] = set()

    def is_narrow(self, name: str) -> bool:
        """Whether it has 32 bits, as addresses in shared memory may."""
        return self._widths.get(name) == 32

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """`[lanes]` of an operand as a PTX type; `{a, b}` is one number, the first the lower part."""
        if isinstance(operand, int):
            if kind == "pred":
                return np.full(LANES, operand != 0)
            width = 32 if kind.endswith("x2") else int(kind.lstrip("usbf"))
            return as_type(np.full(LANES, operand % 2**width, f"uint{width}"), kind)
        if isinstance(operand, tuple):
            part = f"b{int(kind[1:]) // len(operand)}"
            parts = np.stack([self.read(name, part) for name in operand], axis=1)
            return as_type(parts.view(f"uint{kind[1:]}")[:, 0], kind)
        if operand in self._symbols:
            return as_type(self._symbols[operand], kind)
        if self.in_flight.get(operand) == "accumulates":
            raise PtxError(f"{operand} is read while wgmma accumulates into it")
        self.unfenced.add(operand)
        return as_type(self._get(operand), kind)

    def write(self, operand: Operand, values: np.ndarray, mask: np.ndarray) -> None:
        """Sets the lanes in `mask`; to `{a, b}` goes the lower part of the bits first, and nothing to `_`."""
        if operand == "_":
            return
        if isinstance(operand, tuple):
            width = 8 * values.itemsize
            parts = as_bits(values, width).view(f"uint{width // len(operand)}").reshape(LANES, -1)
            for name, part in zip(operand, parts.T, strict=True):
                self.write(name, part, mask)
            return
        if operand not in self._widths:
            raise PtxError(f"{operand} is no register")
        if operand in self.in_flight:
            raise PtxError(f"{operand} is written while wgmma {self.in_flight[operand]} it")
        self.unfenced.add(operand)
        bits = as_bits(values, self._widths[operand])
        if not mask.all():
            bits = np.where(mask, bits, self._bits.get(operand, np.zeros_like(bits)))
        self._bits[operand] = bits

    def peek(self, name: str) -> np.ndarray:
        """32 bits, for wgmma."""
        return as_type(self._get(name), "b32")

    def poke(self, name: str, bits: np.ndarray) -> None:
        self._bits[name] = bits

    def _get(self, name: str) -> np.ndarray:
        if name not in self._bits:
            raise PtxError(f"{name} is read before it is written" if name in self._widths else f"what is {name}?")
        return self._bits[name]
