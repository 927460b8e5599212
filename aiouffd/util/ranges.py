"""Sets of integers as ranges: the parts of an object that are known, kept or requested."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

__all__ = ["Ranges"]


class Ranges:
    """A set of integers as sorted, disjoint ranges that do not touch."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, end: int) -> None:
        """Add [start, end) and merge it with adjacent ranges."""
        if start >= end:
            return
        if not self._ends or start > self._ends[-1]:
            self._starts.append(start)
            self._ends.append(end)
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Remove [start, end)."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last or start >= end:
            return
        kept = []
        if self._starts[first] < start:
            kept.append((self._starts[first], start))
        if self._ends[last - 1] > end:
            kept.append((end, self._ends[last - 1]))
        self._starts[first:last] = [piece[0] for piece in kept]
        self._ends[first:last] = [piece[1] for piece in kept]

    def pairs(self) -> list[tuple[int, int]]:
        """Return all ranges as pairs of offset and length."""
        return [(start, end - start) for start, end in zip(self._starts, self._ends, strict=True)]

    def update(self, other: Ranges) -> None:
        """Add all ranges of ``other``."""
        for start, end in zip(other._starts, other._ends, strict=True):
            self.add(start, end)

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of [start, end) in the set, as pairs of offset and length."""
        first = bisect_right(self._ends, start)
        found = []
        while first < len(self._starts) and self._starts[first] < end:
            low, high = max(start, self._starts[first]), min(end, self._ends[first])
            found.append((low, high - low))
            first += 1
        return found

    def covers(self, start: int, end: int) -> bool:
        """Return whether all of [start, end) is in the set."""
        at = bisect_right(self._starts, start) - 1
        return start >= end or (at >= 0 and self._ends[at] >= end)
