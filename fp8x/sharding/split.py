"""`Split`: how one dim of a parameter lies on the devices along some mesh axes."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Split:
    """Parts of one size, a device each. A part is ranges of the whole dim, one after another, and zeros behind them.

    Attributes:
        axes: mesh axes, the first the slowest.
        size: of the whole dim.
        part: what a device holds, zeros included.
        ranges: for each device, what it holds of the whole dim. Ranges of two devices may overlap.
    """

    axes: tuple[str, ...]
    size: int
    part: int
    ranges: tuple[tuple[Range, ...], ...]

    @property
    def padded(self) -> int:
        """The size of the sharded dim."""
        return self.part * len(self.ranges)

    @property
    def entry(self) -> str | tuple[str, ...]:
        """What stands in a PartitionSpec. One axis is not written as a tuple: jit would take it for another type."""
        return self.axes[0] if len(self.axes) == 1 else self.axes

    def pieces(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Of the parts that rows `start` to `stop` of the sharded dim are: (where it goes, counted from `start`, where
        it comes from)."""
        for index in range(start // self.part, stop // self.part):
            at = index * self.part - start
            for first, last in self.ranges[index]:
                yield slice(at, at + last - first), slice(first, last)
                at += last - first

    def inverse(self) -> list[tuple[slice, slice]]:
        """How the whole dim comes back: (where it goes, where it comes from in the sharded dim)."""
        found, done = [], 0
        for to, source in sorted(self.pieces(0, self.padded), key=lambda piece: piece[1].start):
            if source.start == done:  # the others are copies
                found.append((source, to))
                done = source.stop
        return found

    def finer(self, block: int) -> int:
        """The largest block into which blocks of `block` can be cut so that every device holds whole ones."""
        starts = [(piece.start, source.start) for piece, source in self.pieces(0, self.padded)]
        cuts = (self.part, *itertools.chain.from_iterable(starts))
        return math.gcd(block, *cuts)

    def of_scales(self, block: int) -> "Split":
        """How the scales of blocks of `block` lie, one for each block of `finer(block)`."""
        finer = self.finer(block)

        def of_range(first: int, last: int) -> list[Range]:
            if finer == block:
                return [(first // block, -(-last // block))]
            return [(row // block, row // block + 1) for row in range(first, last, finer)]

        ranges = tuple(tuple(itertools.chain.from_iterable(of_range(*rows) for rows in part)) for part in self.ranges)
        return Split(self.axes, -(-self.size // block), self.part // finer, ranges)


def even(size: int, axes: tuple[str, ...], parts: int, granule: int = 1) -> Split:
    """`size` rows over `parts` devices, each a multiple of `granule` of them; the last ones have fewer, or none."""
    part = -(-size // (parts * granule)) * granule
    bounds = [min(index * part, size) for index in range(parts + 1)]
    return Split(axes, size, part, tuple(((a, b),) if a < b else () for a, b in itertools.pairwise(bounds)))


def key_value_heads(queries: Split, heads: int, kv_heads: int, head_dim: int) -> Split:
    """The key and value heads that the query heads on each device read, in their order.

    A head stands once for every run of query heads that reads it and lies on one device, where that is what lets every
    device have as many: then `heads_here / kv_heads_here` is the same everywhere.
    """
    here, group = queries.part // head_dim, heads // kv_heads
    run = math.gcd(here, group)
    firsts = range(0, len(queries.ranges) * here, here)
    used = [[head // group for head in range(first, min(first + here, heads), run)] for first in firsts]
    ranges = tuple(tuple((head * head_dim, (head + 1) * head_dim) for head in part) for part in used)
    return Split(queries.axes, kv_heads * head_dim, here // run * head_dim, ranges)
