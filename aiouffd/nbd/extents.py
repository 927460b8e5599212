"""Which parts of an export are known, and which of these read as zeros when that was asked."""

from __future__ import annotations

from collections.abc import Iterable

from ..util.ranges import Ranges

__all__ = ["ZeroMap"]


class ZeroMap:
    """What a server said of its extents.

    Of data it may be believed later: that is at worst slow. Of zeros it says where to ask again.
    """

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

    def forget(self, start: int, end: int) -> None:
        """It has to be asked about again."""
        self._zeros.remove(start, end)
        self._known.remove(start, end)

    def knows(self, start: int, end: int) -> bool:
        """Whether nothing has to be asked about ``start`` to ``end``."""
        return self._known.covers(start, end)

    def zeros(self, start: int, end: int) -> list[tuple[int, int]]:
        """Offset and length of what was zeros."""
        return self._zeros.within(start, end)
