"""Which parts of an export are known, and which of these read as zeros."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

__all__ = ["Ranges", "ZeroMap"]


class Ranges:
    """A set of integers as sorted, disjoint ranges that do not touch."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, end: int) -> None:
        """Put ``start`` to ``end`` in; merges with what it touches."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Take ``start`` to ``end`` out."""
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

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of ``start`` to ``end`` that are in, as pairs of offset and length."""
        first = bisect_right(self._ends, start)
        found = []
        while first < len(self._starts) and self._starts[first] < end:
            low, high = max(start, self._starts[first]), min(end, self._ends[first])
            found.append((low, high - low))
            first += 1
        return found

    def covers(self, start: int, end: int) -> bool:
        """Whether all of ``start`` to ``end`` is in."""
        at = bisect_right(self._starts, start) - 1
        return start >= end or (at >= 0 and self._ends[at] >= end)


class ZeroMap:
    """What a server said of its extents."""

    __slots__ = ("_known", "_zeros")

    def __init__(self) -> None:
        self._known = Ranges()
        self._zeros = Ranges()

    def add(self, offset: int, extents: Iterable[tuple[int, bool]]) -> int:
        """Note lengths, and whether they read as zeros, from ``offset`` on; returns the end."""
        start = offset
        for length, zero in extents:
            if zero:
                self._zeros.add(offset, offset + length)
            else:
                self._zeros.remove(offset, offset + length)
            offset += length
        self._known.add(start, offset)
        return offset

    def assume_data(self, start: int, end: int) -> None:
        """Nothing will be asked about this any more, for it has no known zeros."""
        self._zeros.remove(start, end)
        self._known.add(start, end)

    def knows(self, start: int, end: int) -> bool:
        """Whether nothing has to be asked about ``start`` to ``end``."""
        return self._known.covers(start, end)

    def zeros(self, start: int, end: int) -> list[tuple[int, int]]:
        """Offset and length of what is known to be zeros."""
        return self._zeros.within(start, end)
