"""TMA: bulk copies between global and shared memory (Data Movement: Asynchronous Copy), each at a time of its own."""

import abc
import dataclasses
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.memory import GlobalMemory, swizzled
from ptx.program import Address, Instruction, Operand, PtxError

if TYPE_CHECKING:
    from ptx.machine import Block
    from ptx.registers import Registers

TENSOR_MAP_BYTES = 128
# cuda.h: CUtensorMapDataType's sizes of elements, and CUtensorMapSwizzle's bytes.
_ITEM_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2)
_SWIZZLES = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory, and the box that is copied at once. All tuples have the innermost dimension first.

    Attributes:
        base: its address.
        item_bytes: an element's.
        sizes, box: in elements.
        strides: in bytes, one for each dimension.
        swizzle: width of the pattern in shared memory, in bytes; 16 if none.
    """

    base: int
    item_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @classmethod
    def decode(cls, content: bytes) -> "TensorMap":
        """From `ptx.launch`'s description."""
        base, kind, rank, *rest = struct.unpack_from("<Q2I5Q4Q5II", content)
        item = _ITEM_BYTES[kind]
        strides = item, *rest[5:][: rank - 1]
        return cls(base, item, tuple(rest[:rank]), strides, tuple(rest[9:][:rank]), _SWIZZLES[rest[14]])

    @property
    def bytes(self) -> int:
        """Of a box, of which parts out of bounds count too."""
        return int(np.prod(self.box)) * self.item_bytes

    def place(self, address: int) -> np.ndarray:
        """The box's bytes `[elements, item_bytes]` in shared memory; a multiple of 128 (Tensors: alignment)."""
        if address % 128:
            raise PtxError(f"a tensor's box at shared byte {address}, which 128 does not divide")
        return swizzled(address + np.arange(self.bytes), self.swizzle).reshape(-1, self.item_bytes)

    def load(self, memory: GlobalMemory, coordinates: tuple[int, ...]) -> np.ndarray:
        """The box's bytes; zeros out of the tensor's bounds."""
        addresses, is_inside = self._addresses(coordinates)
        content = np.zeros((len(addresses), self.item_bytes), np.uint8)
        content[is_inside] = memory.load(addresses[is_inside], self.item_bytes)
        return content

    def store(self, memory: GlobalMemory, coordinates: tuple[int, ...], content: np.ndarray, writer: int) -> None:
        """Writes what is within the tensor's bounds."""
        addresses, is_inside = self._addresses(coordinates)
        memory.store(addresses[is_inside], content[is_inside], writer)

    def _addresses(self, coordinates: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        if len(coordinates) != len(self.sizes):
            raise PtxError(f"{len(coordinates)} coordinates of a tensor of {len(self.sizes)} dimensions")
        addresses, is_inside = np.array([self.base]), np.array([True])
        for begin, size, stride, extent in zip(coordinates, self.sizes, self.strides, self.box):
            at = begin + np.arange(extent)[:, None]
            addresses = (addresses + at * stride).reshape(-1)
            is_inside = (is_inside & (at >= 0) & (at < size)).reshape(-1)
        return addresses, is_inside


class BulkCopies:
    """A warpgroup's cp.async.bulk, and the groups of its stores. One thread starts each copy.

    Attributes:
        number: the warpgroup's, for what it stores.
    """

    def __init__(self, block: "Block", registers: "Registers", number: int):
        self.block, self.registers, self.number = block, registers, number
        self._open: list[_Store] = []
        self._groups: list[list[_Store]] = []

    @property
    def is_idle(self) -> bool:
        return all(store.is_over for group in (*self._groups, self._open) for store in group)

    def execute(self, instruction: Instruction, mask: np.ndarray) -> None:
        """cp.async.bulk and what belongs to it; `mask` are the lanes that execute it."""
        modifiers, operands = instruction.modifiers, instruction.operands
        if modifiers[:2] != ("async", "bulk"):
            raise PtxError("not emulated")
        if modifiers[2] == "prefetch" or not mask.any():
            return
        if modifiers[2] == "commit_group":
            self._groups.append(self._open)
            self._open = []
        elif modifiers[2] == "wait_group":
            while len(self._groups) > operands[0]:
                for store in self._groups.pop(0):
                    store.finish()
        elif mask.sum() > 1:
            raise PtxError(f"started by {mask.sum()} threads")
        else:
            self._start(modifiers[2:], operands, int(np.flatnonzero(mask)[0]))

    def _start(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], lane: int) -> None:
        if modifiers[:2] == ("global", "shared::cta"):
            self._store_bytes(*operands, lane=lane)
        elif modifiers[0] == "tensor" and modifiers[2:4] == ("global", "shared::cta"):
            self._store_box(*operands, lane=lane)
        elif modifiers[0] == "tensor" and modifiers[2:4] == ("shared::cluster", "global"):
            self._load_box(*operands, lane=lane)
        else:
            raise PtxError("not emulated")

    def _load_box(self, to: Address, tensor: Address, barrier: Address, blocks: Operand | None = None, *, lane: int):
        """To this block, or by multicast to the blocks in a mask: the same bytes, and a signal to the same mbarrier."""
        cluster, (of, coordinates) = self.block.cluster, self._tensor(tensor, lane)
        place = of.place(self._value(to, "u32", lane))
        mask = 1 << self.block.rank if blocks is None else int(self.registers.read(blocks, "u16")[lane])
        if mask >> len(cluster.blocks):
            raise PtxError(f"multicast to blocks {mask:#b} of a cluster of {len(cluster.blocks)}")
        address = self._value(barrier, "u32", lane)
        for block in (block for block in cluster.blocks if mask >> block.rank & 1):
            if block.is_over:
                raise PtxError(f"to block {block.index}, which is over")
            _Load(block, place, of, coordinates, address)

    def _store_box(self, tensor: Address, of_shared: Address, *, lane: int):
        of, coordinates = self._tensor(tensor, lane)
        place = of.place(self._value(of_shared, "u32", lane))
        self._store(place, lambda memory, content: of.store(memory, coordinates, content, self.number))

    def _store_bytes(self, to: Address, of_shared: Address, size: Operand, *, lane: int):
        """So many bytes in a row, which nothing clips."""
        target, source = self._value(to, "u64", lane), self._value(of_shared, "u32", lane)
        size = int(self.registers.read(size, "u32")[lane])
        if target % 16 or source % 16 or size % 16:
            raise PtxError(f"{size} bytes from {source} to {target:#x}; all have to be multiples of 16")
        place, addresses = source + np.arange(size)[:, None], target + np.arange(size)
        self._store(place, lambda memory, content: memory.store(addresses, content, self.number))

    def _store(self, place: np.ndarray, write: Callable[[GlobalMemory, np.ndarray], None]) -> None:
        self._open.append(_Store(self.block, place, write))

    def _tensor(self, operand: Address, lane: int) -> tuple[TensorMap, tuple[int, ...]]:
        address = self._value(Address(operand.base), "u64", lane)
        coordinates = tuple(int(self.registers.read(c, "s32")[lane]) for c in operand.coordinates)
        return TensorMap.decode(self.block.parameters(address, TENSOR_MAP_BYTES)), coordinates

    def _value(self, operand: Address, kind: str, lane: int) -> int:
        return int(self.registers.read(operand.base, kind)[lane]) + operand.offset


class Transfer(abc.ABC):
    """Bytes on their way; `place` are those in the block's shared memory."""

    def __init__(self, block: "Block", place: np.ndarray):
        self.block, self.place, self.is_over = block, place, False
        block.cluster.transfers.append(self)

    def finish(self) -> None:
        """Once, at a random time or when it is waited for."""
        if not self.is_over:
            self.is_over = True
            self.block.cluster.transfers.remove(self)
            self._move()

    @abc.abstractmethod
    def _move(self) -> None: ...


class _Load(Transfer):
    """A tensor's box, to shared memory."""

    def __init__(self, block: "Block", place: np.ndarray, tensor: TensorMap, coordinates: tuple[int, ...], at: int):
        self.tensor, self.coordinates, self.barrier = tensor, coordinates, block.barrier(at)
        block.memory.begin_write(place)
        super().__init__(block, place)

    def _move(self) -> None:
        self.block.memory.end_write(self.place, self.tensor.load(self.block.cluster.memory, self.coordinates))
        self.barrier.complete(self.tensor.bytes)


class _Store(Transfer):
    """To global memory, where `write(memory, content)` puts them."""

    def __init__(self, block: "Block", place: np.ndarray, write: Callable[[GlobalMemory, np.ndarray], None]):
        self.write = write
        block.memory.begin_read(place)
        super().__init__(block, place)

    def _move(self) -> None:
        self.write(self.block.cluster.memory, self.block.memory.end_read(self.place))
