"""Which threads of `sm90_quantize` have which elements; free of Mosaic, whose import takes a second."""

import dataclasses
import math

from fp8x.pallas.sm90 import SMS

THREADS = 128  # a warpgroup: what a block of the grid has
BYTES_A_LOAD = 16  # a thread's widest
BYTES_IN_FLIGHT = (
    128  # a thread's: seven warpgroups of an SM then wait for 112 KB, of which 20 would do (docs/kernels.md)
)
MAX_BYTES = 512  # of a thread's input: half of its registers


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a block of the grid quantizes, of an array `[rows, blocks, width]` whose last dim has one scale.

    Attributes:
        rows, blocks: how many of each.
        thread_rows, thread_blocks, lanes: threads side by side in each dim: their product is THREADS.
        vector: elements that a thread loads at once.
    """

    rows: int
    blocks: int
    thread_rows: int
    thread_blocks: int
    lanes: int
    vector: int

    @property
    def chunk(self) -> int:
        """Elements of a block that its threads have side by side."""
        return self.lanes * self.vector


def choose_tile(rows: int, blocks: int, width: int, itemsize: int, parts: int = 1) -> Tile | str:
    """The tile for `[rows, blocks, width]` elements made of `parts` inputs each; or why there is none.

    A block's elements are spread over as few threads as keep 32 each, since threads have to exchange maxima. Over more
    where there are too few blocks for 128 threads, and where the grid is small and its last block would otherwise have
    a second tile, for which all wait.
    """
    vector = BYTES_A_LOAD // itemsize
    if width % vector or width < 2 * vector:
        return f"loads {BYTES_A_LOAD} bytes at once, {vector} elements, and blocks of {width} are no multiple of that"
    if width * parts * itemsize > THREADS * MAX_BYTES:
        return f"keeps blocks of up to {THREADS * MAX_BYTES // itemsize // parts} elements in registers, not of {width}"
    fits_a_warp = width * parts * itemsize <= 32 * BYTES_IN_FLIGHT
    lanes = min(max(_power_of_two(width // 32), 2), 32) if fits_a_warp else THREADS
    found = None
    while lanes <= THREADS and lanes * vector <= width:
        thread_blocks = math.gcd(blocks, THREADS // lanes)
        thread_rows = THREADS // lanes // thread_blocks
        if thread_rows <= rows:
            found = Tile(thread_rows, thread_blocks, thread_rows, thread_blocks, lanes, vector)
            if rows % thread_rows == 0 or rows // thread_rows * (blocks // thread_blocks) >= SMS:
                break
        lanes *= 2
    if found is None:
        return f"has {THREADS} threads for blocks of {width} elements, and {rows} × {blocks} of them are too few"
    row_bytes = found.blocks * width * parts * itemsize
    tile_rows = found.rows
    while (
        2 * tile_rows <= rows
        and 2 * tile_rows * row_bytes <= THREADS * BYTES_IN_FLIGHT
        and rows // (2 * tile_rows) * (blocks // found.blocks) >= SMS
    ):
        tile_rows *= 2
    return dataclasses.replace(found, rows=tile_rows)


def _power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
