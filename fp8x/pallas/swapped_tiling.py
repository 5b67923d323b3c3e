"""Tilings of sm90_grouped_swapped.py, and what each is expected to take."""

import dataclasses
import itertools
import math

from jax.experimental import pallas as pl

from fp8x.pallas.sm90 import BLOCK_K, CLOCK, L2_BYTES, ROW_ALIGN, SHARED_MEMORY, SMS, WAVE

PANEL = 64  # tokens that leave at a time, at most
MEMORY = 4.06e12  # bytes a second that a copy of 2 GB takes on an H200
TASK = 1500  # cycles from a task's first request to its first product, and from its last to the next: a guess
SUM = 2e-6  # seconds for the launch that adds splits up: a guess


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The shape of an output tile, and how its work is cut.

    Arguments:
        tokens: a multiple of 8 up to 192: the width of a wgmma.
        rows: rows of w, 128 or 256.
        stages: slots of the ring, at least two: one is released when the next is multiplied. None takes as many as fit.
        splits: parts of K whose sums are added afterwards, for balance where there are few tiles.
    """

    tokens: int
    rows: int
    stages: int | None = None
    splits: int = 1


def estimates(
    m: int, n: int, k: int, groups: int, *, x_bytes: int, widest: int, waves: tuple[int, ...], by_expert: bool = False
) -> dict[Tiling, float]:
    """Seconds for each tiling; of equal ones the better comes first.

    The longer of what memory takes for the weights of all groups, and the SMs' turns: a step of K takes a tile the
    longer of its tensor work (8192 bytes of operands' products a cycle: 4096 FLOP in 16 bits, 8192 in 8) and what it
    fetches at L2_BYTES. Memory has to wait for half of what each tile fetches of x, which lies in L2: on an H200 64
    experts' tiles of 64 tokens took 9 µs more than tiles of 16, of 102, where that half is 6; and MX 30 of 345 more
    than of 32, where it is 29. Rows are taken as drawn at random: a group may have two standard deviations more than
    the mean, for which its weights must not be read again, and begins up to 7 rows late.

    Arguments:
        x_bytes: 1 or 2, of an element of x.
        widest: the most tokens whose sums fit the registers.
        waves: of 64 rows of w, that each of the two compute warpgroups may have.
        by_expert: each row is a group.
    """
    active = min(groups, m)
    mean = pl.cdiv(m, active)
    rows_of_group = 1 if by_expert else m if groups == 1 else min(mean + 7 + 2 * math.isqrt(mean), m)
    matrices = m if by_expert else active
    steps = pl.cdiv(k, BLOCK_K)

    def seconds(tiling: Tiling) -> float:
        tiles = matrices * pl.cdiv(rows_of_group, tiling.tokens) * pl.cdiv(n, tiling.rows)
        x_cycles = tiling.tokens * x_bytes * BLOCK_K / L2_BYTES
        step = max(tiling.tokens * tiling.rows * x_bytes / 32, x_cycles + tiling.rows * BLOCK_K / L2_BYTES)
        turns = pl.cdiv(tiles * tiling.splits, SMS)
        busy = turns * (pl.cdiv(steps, tiling.splits) * step + TASK) / CLOCK
        read = matrices * n * k / MEMORY + tiles / SMS * steps * x_cycles / CLOCK / 2
        added = SUM + m * n * 4 * (tiling.splits + 1) / MEMORY if tiling.splits > 1 else 0
        return max(read, busy) + added

    most = 8 if by_expert else m if groups == 1 else m + 7
    widths = sorted({widest, 128, 64, 32, 16, 8}, reverse=True)
    tokens = [t for t in widths if (t <= widest and t < 2 * most) or t == 8]
    shapes = itertools.product((1, 2, 4, 8), tokens, [2 * WAVE * wave for wave in waves])
    tilings = (Tiling(t, rows, splits=splits) for splits, t, rows in shapes if t <= 64 or splits == 1)
    return {tiling: seconds(tiling) for tiling in tilings if tiling.splits == 1 or tiling.splits * 4 <= steps}


def out_buffers(tiling: Tiling, out_bytes: int) -> tuple[int, int]:
    """How many tokens leave at a time, and through how many buffers in turn a warpgroup's do, by WAVE of w's rows."""
    panel = next(panel for panel in range(PANEL, 0, -ROW_ALIGN) if tiling.tokens % panel == 0)
    turns = tiling.rows // (2 * WAVE) * (tiling.tokens // panel)
    return panel, 2 if out_bytes == 2 and turns % 2 == 0 else 1


def slots(tiling: Tiling, block_k: int, x_bytes: int, out_bytes: int) -> int:
    """As many slots with `block_k` of K as fit a block's shared memory beside both warpgroups' buffers."""
    panel, buffers = out_buffers(tiling, out_bytes)
    barriers = 1024
    free = SHARED_MEMORY - 2 * buffers * panel * WAVE * out_bytes - barriers
    return free // ((tiling.rows + tiling.tokens * x_bytes) * block_k)
