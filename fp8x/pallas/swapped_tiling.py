"""Tilings of sm90_grouped_swapped.py, and what each is expected to take."""

import dataclasses
import itertools

from jax.experimental import pallas as pl

from fp8x.pallas.sm90 import BLOCK_K, CLOCK, L2_BYTES, ROW_ALIGN, SHARED_MEMORY, SMS, WAVE

PANEL = 64  # tokens that leave at a time, at most
MEMORY = 4.8e12  # bytes a second, of an H200
TASK = 1500  # cycles from a task's first request to its first product, and from its last to the next: a guess
SUM = 2e-6  # seconds for the launch that adds splits up: a guess


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The shape of an output tile, and how its work is cut.

    Arguments:
        tokens: a multiple of 8 up to 128: the width of a wgmma.
        rows: rows of w, 128 or 256.
        stages: slots of the ring, at least two: one is released when the next is multiplied. None takes as many as fit.
        splits: parts of K whose sums are added afterwards, for balance where there are few tiles.
    """

    tokens: int
    rows: int
    stages: int | None = None
    splits: int = 1


def estimates(
    m: int, n: int, k: int, groups: int, *, x_bytes: int, widest: int, by_expert: bool = False
) -> dict[Tiling, float]:
    """Seconds for each tiling; of equal ones the better comes first.

    The longer of what memory takes for the weights of all groups, and the SMs' turns: a step of K takes a tile the
    longer of its tensor work (8192 bytes of operands' products a cycle: 4096 FLOP in 16 bits, 8192 in 8) and what it
    fetches at L2_BYTES. Rows are taken as spread evenly over the groups, each of which begins up to 7 rows late.

    Arguments:
        x_bytes: 1 or 2, of an element of x.
        widest: the most tokens whose sums fit the registers with 256 rows of w.
        by_expert: each row is a group.
    """
    active = min(groups, m)
    floor = (m if by_expert else active) * n * k / MEMORY
    rows_of_group = 1 if by_expert else m if groups == 1 else pl.cdiv(m, active) + 7
    steps = pl.cdiv(k, BLOCK_K)

    def seconds(tiling: Tiling) -> float:
        row_tiles = (m if by_expert else active) * pl.cdiv(rows_of_group, tiling.tokens)
        tasks = row_tiles * pl.cdiv(n, tiling.rows) * tiling.splits
        tensor = tiling.tokens * tiling.rows * x_bytes / 32
        step = max(tensor, (tiling.rows + tiling.tokens * x_bytes) * BLOCK_K / L2_BYTES)
        busy = pl.cdiv(tasks, SMS) * (pl.cdiv(steps, tiling.splits) * step + TASK) / CLOCK
        added = SUM + m * n * 4 * (tiling.splits + 1) / MEMORY if tiling.splits > 1 else 0
        return max(floor, busy) + added

    # Of tokens the most first: where memory decides, they leave room for uneven groups. None has more than m rows.
    most = 8 if by_expert else m if groups == 1 else m + 7
    tokens = [t for t in (widest, 64, 32, 16, 8) if (t <= widest and t < 2 * most) or t == 8]
    shapes = itertools.product((1, 2, 4, 8), tokens, (128, 256))
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
