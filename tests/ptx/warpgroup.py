"""Four warps in step: control, memory and communication. What only computes is in `arithmetic`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ptx.arithmetic import Arithmetic, as_type, dtype_of
from ptx.barriers import Wait
from ptx.memory import SHARED_BASE
from ptx.program import Address, Instruction, Operand, PtxError
from ptx.registers import LANES, Registers
from ptx.tensor_cores import TensorCore
from ptx.transfers import BulkCopies

if TYPE_CHECKING:
    from ptx.machine import Block

PARAMETER_BASE = 1 << 60
# Addresses of the block of rank r in shared::cluster; those of shared::cta are the own block's there (State Spaces).
_CLUSTER_WINDOW = 1 << 24
_LANE = np.arange(LANES)
_WARP_BEGIN = _LANE // 32 * 32
_IGNORED = {"prefetch"}


class Warpgroup:
    """`run` executes it; after everything that others can see, and where it has to wait, it lets others go on."""

    def __init__(self, block: "Block", index: int):
        self.block, self.index = block, index
        program = block.program
        symbols = {
            "%tid.x": _LANE + LANES * index,
            "%ctaid.x": np.full(LANES, block.index),
            "%cluster_ctaid.x": np.full(LANES, block.rank),
            "__dynamic_shmem__0": np.full(LANES, SHARED_BASE),
            **{name: np.full(LANES, PARAMETER_BASE + offset) for name, offset in program.parameters.items()},
        }
        self.registers = Registers(program.registers, {name: bits.astype(np.uint64) for name, bits in symbols.items()})
        self.tensor_core = TensorCore(self.registers, block.memory)
        self.number = 1 + index + block.index * block.launch.threads // LANES
        self.copies = BulkCopies(block, self.registers, self.number)
        self.arithmetic = Arithmetic(np.random.default_rng([block.cluster.seed, block.index, index]))
        self.register_count = block.launch.registers
        self._cluster_round = 0

    def __str__(self) -> str:
        return f"warpgroup {self.index} of block {self.block.index}"

    def run(self) -> Iterator[Wait | None]:
        """Yields None where others may go first, and what it waits for where they have to."""
        program, at = self.block.program, 0
        while True:
            instruction = program.instructions[at]
            try:
                mask = self._mask(instruction)
                if instruction.name in ("ret", "exit") and mask.any():
                    self._leave(mask)
                    return
                if instruction.name == "bra":
                    taken = self._is_uniform(mask)
                    at = program.labels[instruction.operands[0]] if taken else at + 1
                    continue
                handler = getattr(self, f"_{instruction.name}", None)
                if handler is not None:
                    yield handler(instruction, mask)
                elif instruction.name not in _IGNORED:
                    self._compute(instruction, mask)
            except PtxError as error:
                raise PtxError(f"{self}, {instruction}: {error}") from error
            at += 1

    def _mask(self, instruction: Instruction) -> np.ndarray:
        if instruction.predicate is None:
            return np.ones(LANES, bool)
        return self.registers.read(instruction.predicate, "pred") ^ instruction.negated

    def _is_uniform(self, mask: np.ndarray) -> bool:
        if mask.any() and not mask.all():
            raise PtxError("not emulated: threads of a warpgroup go different ways")
        return bool(mask.all())

    def _leave(self, mask: np.ndarray) -> None:
        self._is_uniform(mask)
        if not self.tensor_core.is_idle:
            raise PtxError("ends while wgmma is in flight")
        if not self.copies.is_idle:
            raise PtxError("ends while stores read its block's shared memory")

    def _compute(self, instruction: Instruction, mask: np.ndarray) -> None:
        def read(i: int, kind: str) -> np.ndarray:
            return self.registers.read(instruction.operands[i], kind)

        self.registers.write(instruction.operands[0], self.arithmetic.evaluate(instruction, read), mask)

    def _addresses(self, operand: Address, kind: str = "u64") -> np.ndarray:
        if isinstance(operand.base, str) and self.registers.is_narrow(operand.base):
            kind = "u32"
        return self.registers.read(operand.base, kind).astype(np.int64) + operand.offset

    def _uniform(self, values: np.ndarray, mask: np.ndarray) -> int:
        if (values[mask] != values[mask][0]).any():
            raise PtxError("not emulated: an operand differs between threads")
        return int(values[mask][0])

    # Data movement

    def _ld(self, instruction: Instruction, mask: np.ndarray) -> None:
        """ld: of the state space that it names, or by a generic address, which here is global."""
        to, source = instruction.operands
        names, size = _vector(to, instruction)
        kind, space = instruction.modifiers[-1], _space(instruction)
        addresses = self._addresses(source)[mask]
        if space == "param":
            content = np.frombuffer(self.block.parameters(int(addresses[0]), size), np.uint8)
        elif space == "shared":
            content = self.block.memory.load(self.index, addresses, size)
        else:
            content = self.block.cluster.memory.load(addresses, size)
        loaded = np.zeros((LANES, size), np.uint8)
        loaded[mask] = content
        for name, values in zip(names, loaded.view(dtype_of(kind)).T, strict=True):
            self.registers.write(name, np.ascontiguousarray(values), mask)

    def _st(self, instruction: Instruction, mask: np.ndarray) -> None:
        target, values = instruction.operands
        names, _ = _vector(values, instruction)
        kind = instruction.modifiers[-1]
        content = np.stack([self.registers.read(name, kind) for name in names], axis=1).view(np.uint8)
        addresses = self._addresses(target)[mask]
        if _space(instruction) == "shared":
            self.block.memory.store(self.index, addresses, content[mask])
        else:
            self.block.cluster.memory.store(addresses, content[mask], self.number)

    def _stmatrix(self, instruction: Instruction, mask: np.ndarray) -> None:
        """Up to four matrices of 8×8 16-bit elements a warp; 8 lanes have the addresses of each's rows (stmatrix)."""
        target, names = instruction.operands
        if "m8n8" not in instruction.modifiers or not mask.all():
            raise PtxError("not emulated")
        addresses = self._addresses(target)
        for i, name in enumerate(names):
            # [warps, rows, columns]: a lane has two neighbors of a row.
            matrix = as_type(self.registers.read(name, "b32"), "b32").view(np.uint16).reshape(4, 8, 8)
            matrix = matrix.swapaxes(1, 2) if "trans" in instruction.modifiers else matrix
            rows = np.ascontiguousarray(matrix).reshape(32, 8).view(np.uint8)
            self.block.memory.store(self.index, addresses.reshape(4, -1, 8)[:, i].reshape(-1), rows)

    def _cp(self, instruction: Instruction, mask: np.ndarray) -> None:
        self.copies.execute(instruction, mask)

    def _mapa(self, instruction: Instruction, mask: np.ndarray) -> None:
        to, address, rank = instruction.operands
        if instruction.modifiers != ("shared::cluster", "u32"):
            raise PtxError("not emulated")
        window = _CLUSTER_WINDOW * (self.registers.read(rank, "u32") + np.uint32(1))
        self.registers.write(to, self.registers.read(address, "u32") + window, mask)

    # Between the lanes of a warp

    def _elect(self, instruction: Instruction, mask: np.ndarray) -> None:
        leader, is_leader = instruction.operands[:2]
        self.registers.write(leader, np.zeros(LANES, np.uint32), mask)
        self.registers.write(is_leader, _LANE == _WARP_BEGIN, mask)

    def _shfl(self, instruction: Instruction, mask: np.ndarray) -> None:
        _, mode, _ = instruction.modifiers
        to, value, lane, clamp, members = instruction.operands
        if mode not in ("idx", "bfly") or clamp != 31 or not (mask.all() and self._is_whole_warp(members)):
            raise PtxError("not emulated")
        lane = self.registers.read(lane, "s32")
        source = lane & 31 if mode == "idx" else (_LANE ^ lane) & 31
        self.registers.write(to, self.registers.read(value, "b32")[_WARP_BEGIN + source], mask)

    def _redux(self, instruction: Instruction, mask: np.ndarray) -> None:
        _, operation, kind = instruction.modifiers
        to, value, members = instruction.operands
        if operation not in ("max", "min") or not (mask.all() and self._is_whole_warp(members)):
            raise PtxError("not emulated")
        values = self.registers.read(value, kind).reshape(4, 32)
        self.registers.write(to, np.repeat(getattr(values, operation)(axis=1), 32), mask)

    def _is_whole_warp(self, members: Operand) -> bool:
        return bool((self.registers.read(members, "u32") == 2**32 - 1).all())

    # Synchronization

    def _mbarrier(self, instruction: Instruction, mask: np.ndarray) -> Wait | None:
        operation = instruction.modifiers[0]
        if operation == "init":
            address, count = instruction.operands
            if mask.any():
                place = self._uniform(self._addresses(address), mask)
                self.block.add_barrier(place, self._uniform(self.registers.read(count, "u32"), mask))
            return None
        if operation == "arrive":
            self._arrive(instruction, mask)
            return None
        if instruction.modifiers[:2] != ("try_wait", "parity"):
            raise PtxError("not emulated")
        is_over, address, parity, *_ = instruction.operands
        place = self._uniform(self._addresses(address), mask)
        parity = self._uniform(self.registers.read(parity, "u32"), mask)
        barrier = self.block.barrier(place)
        # It may return early; here it does not.
        self.registers.write(is_over, np.ones(LANES, bool), mask)
        return Wait(
            lambda: barrier.is_over(parity), lambda: f"parity {parity} of the mbarrier at {place}, whose {barrier}"
        )

    def _arrive(self, instruction: Instruction, mask: np.ndarray) -> None:
        _, address, *amount = instruction.operands
        expects = "expect_tx" in instruction.modifiers
        amounts = self.registers.read(amount[0], "u32") if amount else np.ones(LANES, np.uint32)
        addresses = self._addresses(address)
        for place in np.unique(addresses[mask]):
            lanes = mask & (addresses == place)
            total = int(amounts[lanes].sum())
            rank, place = divmod(int(place), _CLUSTER_WINDOW)
            block = self.block.cluster.blocks[rank - 1] if rank else self.block
            if block.is_over:
                raise PtxError(f"an arrival at block {block.index}, which is over")
            block.barrier(place).arrive(int(lanes.sum()) if expects else total, total if expects else 0)

    def _bar(self, instruction: Instruction, mask: np.ndarray) -> Wait | None:
        """bar.sync: of all warpgroups by number 0; of this one alone by one of its own."""
        number, *threads = instruction.operands
        number = self._uniform(self.registers.read(number, "u32"), mask)
        if instruction.modifiers != ("sync",) or not mask.all() or (number == 0) == bool(threads):
            raise PtxError("not emulated")
        if number == 0:
            of_round = self.block.barriers.arrive()
            return Wait(lambda: self.block.barriers.is_over(of_round), lambda: "all warpgroups of the block")
        if threads != [LANES] or self.block.owners.setdefault(number, self) is not self:
            raise PtxError(f"barrier {number} of {threads[0]} threads, where {self.block.owners.get(number)} is")
        return None

    def _barrier(self, instruction: Instruction, mask: np.ndarray) -> Wait | None:
        if instruction.modifiers[0] != "cluster":
            raise PtxError("not emulated")
        barrier = self.block.cluster.barrier
        if instruction.modifiers[1] == "arrive":
            self._cluster_round = barrier.arrive()
            return None
        of_round = self._cluster_round
        return Wait(lambda: barrier.is_over(of_round), lambda: "all warpgroups of the cluster")

    def _fence(self, instruction: Instruction, mask: np.ndarray) -> None:
        if instruction.modifiers[:2] == ("proxy", "async") and mask.all():
            self.block.memory.fence(self.index)
        elif instruction.modifiers[0] != "mbarrier_init":
            raise PtxError("not emulated")

    def _setmaxnreg(self, instruction: Instruction, mask: np.ndarray) -> Wait:
        """Gives registers to the block's pool, or waits until there are as many as it takes (setmaxnreg)."""
        (count,) = instruction.operands
        if not 24 <= count <= 256 or count % 8:
            raise PtxError(f"{count} registers; 24 to 256 by 8 are possible")
        more, block = count - self.register_count, self.block

        def take() -> bool:
            if more > block.registers:
                return False
            block.registers -= more
            return True

        if (instruction.modifiers[0] == "inc") != (more > 0):
            raise PtxError(f"{count} registers after {self.register_count}")
        self.register_count = count
        return Wait(take, lambda: f"{more} registers a thread more, of which the block has {block.registers}")

    def _wgmma(self, instruction: Instruction, mask: np.ndarray) -> None:
        if not mask.all():
            raise PtxError("not by all threads")
        operation = instruction.modifiers[0]
        if operation == "fence":
            self.tensor_core.fence()
        elif operation == "commit_group":
            self.tensor_core.commit()
        elif operation == "wait_group":
            self.tensor_core.wait(instruction.operands[0])
        else:
            self.tensor_core.multiply(instruction)


def _vector(operand: Operand, instruction: Instruction) -> tuple[tuple[Operand, ...], int]:
    """The operands that are loaded or stored, and their bytes together."""
    names = operand if isinstance(operand, tuple) else (operand,)
    return names, len(names) * dtype_of(instruction.modifiers[-1]).itemsize


def _space(instruction: Instruction) -> str:
    """param, shared or global; without a state space an address is generic, which here is global."""
    *modifiers, _ = instruction.modifiers
    spaces = [modifier.split("::")[0] for modifier in modifiers if not modifier.startswith("v")]
    if len(spaces) > 1 or not {"param", "shared", "global"}.issuperset(spaces):
        raise PtxError("not emulated")
    return spaces[0] if spaces else "global"
