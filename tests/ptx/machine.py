"""Runs a launch, one cluster of blocks after the other: warpgroups and transfers proceed in a random order."""

import random
from collections.abc import Iterable

import numpy as np

from ptx.barriers import MemoryBarrier, ThreadBarrier, Wait
from ptx.launch import Launch
from ptx.memory import GlobalMemory, SharedMemory
from ptx.program import Program, PtxError, parse
from ptx.registers import LANES
from ptx.transfers import Transfer
from ptx.warpgroup import PARAMETER_BASE, Warpgroup


def run(launch: Launch, arrays: list[np.ndarray], *, seed: int = 0) -> None:
    """Executes a kernel on its arrays (inputs, then outputs, which it writes), in the order that `seed` gives.

    Raises:
        PtxError: the kernel does what PTX leaves undefined, hangs, or is not emulated.
    """
    program, memory = parse(launch.ptx), GlobalMemory(arrays)
    for first in range(0, launch.blocks, launch.cluster):
        with np.errstate(all="ignore"):
            Cluster(launch, program, memory, first, seed).run()


class Block:
    """Shared memory, its barriers and the registers of a block.

    Attributes:
        index, rank: in the grid and in the cluster.
        registers: how many no warpgroup has, after setmaxnreg.
        barriers: of all its warpgroups, number 0.
        owners: the warpgroup that uses a barrier of another number.
        is_over: whether all warpgroups have left.
    """

    def __init__(self, cluster: "Cluster", launch: Launch, program: Program, index: int, rank: int):
        self.cluster, self.launch, self.program, self.index, self.rank = cluster, launch, program, index, rank
        warpgroups = launch.threads // LANES
        self.memory = SharedMemory(launch.shared_memory, warpgroups)
        self.registers = 0
        self.barriers = ThreadBarrier(warpgroups)
        self.owners: dict[int, Warpgroup] = {}
        self.is_over = False
        self._memory_barriers: dict[int, MemoryBarrier] = {}

    def add_barrier(self, address: int, count: int) -> None:
        """mbarrier.init"""
        if address % 8:
            raise PtxError(f"an mbarrier at {address}, which 8 does not divide")
        self._memory_barriers[address] = MemoryBarrier(count)

    def barrier(self, address: int) -> MemoryBarrier:
        if address not in self._memory_barriers:
            raise PtxError(f"no mbarrier at shared byte {address} of block {self.index}")
        return self._memory_barriers[address]

    def parameters(self, address: int, size: int) -> bytes:
        """The kernel's parameters from an address on."""
        begin = address - PARAMETER_BASE
        if not 0 <= begin <= len(self.launch.parameters) - size:
            raise PtxError(f"{address:#x} is no parameter")
        return self.launch.parameters[begin : begin + size]


class Cluster:
    """Blocks that run together.

    Attributes:
        barrier: of all their warpgroups.
        transfers: those under way.
    """

    def __init__(self, launch: Launch, program: Program, memory: GlobalMemory, first: int, seed: int):
        self.memory, self.seed = memory, seed
        self.transfers: list[Transfer] = []
        self.blocks = [Block(self, launch, program, first + rank, rank) for rank in range(launch.cluster)]
        self.barrier = ThreadBarrier(launch.cluster * launch.threads // LANES)
        self.random = random.Random(first * 1000 + seed)

    def run(self) -> None:
        groups = [Warpgroup(block, i) for block in self.blocks for i in range(block.barriers.warpgroups)]
        waits: dict[Warpgroup, Wait | None] = dict.fromkeys(groups)
        running = {group: group.run() for group in groups}
        while running:
            for group, wait in waits.items():
                if wait is not None and wait.is_over():
                    waits[group] = None
            ready = [group for group in running if waits[group] is None]
            chosen = self.random.choice([*ready, *self.transfers] or [None])
            if chosen is None:
                raise PtxError(
                    "deadlock: " + "; ".join(f"{group} waits for {waits[group].what()}" for group in running)
                )
            if chosen not in ready:
                chosen.finish()
                continue
            try:
                waits[chosen] = next(running[chosen])
            except StopIteration:
                del running[chosen]
                self._leave(chosen.block, running)

    def _leave(self, block: Block, running: Iterable[Warpgroup]) -> None:
        """A block is over with its last warpgroup; then nothing may be on its way to its shared memory."""
        block.is_over = not any(group.block is block for group in running)
        if block.is_over and any(transfer.block is block for transfer in self.transfers):
            raise PtxError(f"block {block.index} ends while a transfer to its shared memory is under way")
