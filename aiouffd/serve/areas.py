"""What of another process's address space comes from where. No I/O, no kernel.

An `AreaMap` follows what the process does to its mappings: pages that were removed read as
zeros from then on, whatever their object has; what was unmapped is forgotten; what was moved is
found at its new place; a forked child begins with a copy. It is the only truth there is: who
has waited for bytes asks it again before installing them, because in the meantime the page may have
been removed, moved or forgotten.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .blocks import BlockStore

__all__ = ["ABSENT", "GONE", "INSTALLED", "MOVED", "REMOVED", "Area", "AreaMap"]

#: State of a page, bits of one byte. REMOVED: it reads as zeros, for the process dropped it.
REMOVED = 1
#: We have put it there. A hint: the process may have dropped it without telling.
INSTALLED = 2
#: It is not mapped there any more: a note for a server that comes after us, and knows the area as
#: it was at first.
GONE = 4
#: And it is mapped elsewhere: a note for the process, see the C client's detach.
MOVED = 16
#: It was not mapped as we tried to fill it. It may be later.
ABSENT = 8

_REMOVE = bytes(value & ~INSTALLED & 0xFF | REMOVED for value in range(256))
_INSTALL = bytes(value & ~ABSENT & 0xFF | INSTALLED for value in range(256))
_ZEROS = re.compile(rb"\0+")
_LOOK_AGAIN = bytes(value & ~ABSENT & 0xFF for value in range(256))
_UNMAP = bytes(value | GONE for value in range(256))
_MOVE = bytes(value | MOVED for value in range(256))
_REMAP = bytes(value & ~(GONE | MOVED) & 0xFF for value in range(256))


@dataclass(frozen=True, eq=False)
class Area:
    """A range of addresses of another process and where its bytes come from.

    :param start: its address, a multiple of the page size.
    :param length: in bytes, a multiple of the page size.
    :param store: the object; None if it reads as zeros.
    :param offset: of ``start`` in the object, in bytes.
    :param page_size: in bytes: 4096, or that of huge pages.
    :param states: one byte per page to keep the pages' states in, for example of a file that
        outlives us; made if None.
    :param lasting: the process tells of what it drops, so what was INSTALLED and is missing was
        removed, though the server that heard of it died before it could note it down.
    """

    start: int
    length: int
    store: BlockStore | None
    offset: int = 0
    page_size: int = 4096
    states: memoryview | None = None
    lasting: bool = False

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.length

    def page_of(self, address: int) -> int:
        """Number of the page that holds ``address``."""
        return (address - self.start) // self.page_size

    def offset_of(self, address: int) -> int:
        """Where the byte at ``address`` is in the object."""
        return self.offset + address - self.start

    def _states(self) -> memoryview:
        assert self.states is not None
        return self.states

    def state_of(self, address: int) -> int:
        """State of the page that holds ``address``."""
        return self._states()[(address - self.start) // self.page_size]

    def mark_installed(self, start: int, end: int) -> None:
        """The pages of ``start`` to ``end`` are there."""
        states, first, last = self._states(), self.page_of(start), self.page_of(end)
        states[first:last] = bytes(states[first:last]).translate(_INSTALL)

    def block(self, number: int, block_size: int) -> tuple[int, int]:
        """Addresses of the first byte of a block of the object and behind its last, in here."""
        low = max(number * block_size, self.offset)
        high = min((number + 1) * block_size, self.offset + self.length)
        return self.start + low - self.offset, self.start + high - self.offset

    def missing_bytes(self) -> int:
        """Bytes that `missing` would name, of all of it."""
        return bytes(self._states()).count(0) * self.page_size

    def forget_absent(self) -> None:
        """What was not mapped may be by now."""
        states = self._states()
        some = bytes(states)
        if any(some):
            states[:] = some.translate(_LOOK_AGAIN)

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Runs of pages in ``start`` to ``end`` that are neither removed nor there already."""
        first, size = self.page_of(start), self.page_size
        some = bytes(self._states()[first : self.page_of(end)])
        return [
            (start + run.start() * size, start + run.end() * size) for run in _ZEROS.finditer(some)
        ]

    def _part(self, start: int, end: int) -> Area:
        first, last = self.page_of(start), self.page_of(end)
        return Area(
            start,
            end - start,
            self.store,
            self.offset_of(start),
            self.page_size,
            self._states()[first:last],
            self.lasting,
        )

    def _unmapped(self) -> None:
        states = self._states()
        states[:] = bytes(states).translate(_UNMAP)

    def _moved(self, distance: int) -> Area:
        """The same at another address. Its states go with it; those of the old place stay there."""
        states = self._states()
        states[:] = bytes(states).translate(_MOVE)
        return Area(
            self.start + distance,
            self.length,
            self.store,
            self.offset,
            self.page_size,
            memoryview(bytearray(states).translate(_REMAP)),
            self.lasting,
        )


_NOWHERE: tuple[list[Area], list[int], list[int]] = ([], [], [])


class AreaMap:
    """The areas of one address space, by address. Not thread-safe."""

    def __init__(self, areas: Iterable[Area] = ()) -> None:
        self._areas: list[Area] = []
        self._starts: list[int] = []
        self._by_offset: dict[BlockStore, tuple[list[Area], list[int], list[int]]] = {}
        self._indexed = -1
        #: Changes with every change of what is where; not with the states of pages.
        self.version = 0
        for area in areas:
            self.add(area)

    def __iter__(self) -> Iterator[Area]:
        return iter(self._areas)

    def __len__(self) -> int:
        return len(self._areas)

    def add(self, area: Area) -> None:
        """Put an area in, which overlaps none that is there (ValueError)."""
        if area.states is None:
            area = Area(
                area.start,
                area.length,
                area.store,
                area.offset,
                area.page_size,
                memoryview(bytearray(area.length // area.page_size)),
                area.lasting,
            )
        at = bisect_right(self._starts, area.start)
        if (at and self._areas[at - 1].end > area.start) or (
            at < len(self._areas) and self._areas[at].start < area.end
        ):
            raise ValueError(f"{area.start:#x}-{area.end:#x} overlaps another area")
        self.version += 1
        self._areas.insert(at, area)
        self._starts.insert(at, area.start)

    def find(self, address: int) -> Area | None:
        """The area that holds ``address``."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        area = self._areas[at]
        return area if address < area.end else None

    def within(self, start: int, end: int) -> list[tuple[Area, int, int]]:
        """Areas that overlap ``start`` to ``end``, and the addresses of the overlap."""
        at = max(0, bisect_right(self._starts, start) - 1)
        found = []
        while at < len(self._areas) and self._starts[at] < end:
            area = self._areas[at]
            low, high = max(start, area.start), min(end, area.end)
            if low < high:
                found.append((area, low, high))
            at += 1
        return found

    def of_block(self, store: BlockStore, number: int) -> list[tuple[Area, int, int]]:
        """Where a block of an object belongs: areas by offset, and the addresses there."""
        if self._indexed != self.version:
            self._index()
        found: list[tuple[Area, int, int]] = []
        areas, offsets, reach = self._by_offset.get(store, _NOWHERE)
        size = store.block_size
        low = number * size
        at = bisect_left(offsets, low + size)
        # `reach` never falls, so before the first that ends too early all do.
        while at and reach[at - 1] > low:
            at -= 1
            area = areas[at]
            if low < area.offset + area.length:
                found.append((area, *area.block(number, size)))
        found.reverse()
        return found

    def _index(self) -> None:
        """The areas of each object by offset, and how far those up to each one reach."""
        self._by_offset.clear()
        for area in sorted(self._areas, key=attrgetter("offset")):
            if area.store is not None:
                areas, offsets, reach = self._by_offset.setdefault(area.store, ([], [], []))
                areas.append(area)
                offsets.append(area.offset)
                reach.append(max(area.offset + area.length, reach[-1] if reach else 0))
        self._indexed = self.version

    def removed(self, start: int, end: int) -> None:
        """The process dropped the contents of ``start`` to ``end`` (MADV_DONTNEED and the like)."""
        for area, low, high in self.within(start, end):
            states, first = area._states(), area.page_of(low)
            last = -(-(high - area.start) // area.page_size)
            states[first:last] = bytes(states[first:last]).translate(_REMOVE)

    def unmapped(self, start: int, end: int) -> list[Area]:
        """The process has no mapping at ``start`` to ``end`` any more. Returns what was there."""
        gone = []
        self.version += 1
        for area, low, high in self.within(start, end):
            # Of a page that is gone in part nothing is left. The kernel cuts huge pages nowhere,
            # but a client may have called pages huge that are not.
            low = area.start + (low - area.start) // area.page_size * area.page_size
            high = area.start - (area.start - high) // area.page_size * area.page_size
            gone.append(area._part(low, high))
            gone[-1]._unmapped()
            at = self._starts.index(area.start)
            kept = []
            if area.start < low:
                kept.append(area._part(area.start, low))
            if high < area.end:
                kept.append(area._part(high, area.end))
            self._areas[at : at + 1] = kept
            self._starts[at : at + 1] = [part.start for part in kept]
        return gone

    def moved(self, source: int, target: int, length: int) -> None:
        """The process moved ``length`` bytes of mappings from ``source`` to ``target``."""
        parts = self.unmapped(source, source + length)
        # Whatever was at the target is gone: mremap has unmapped it.
        self.unmapped(target, target + length)
        for part in parts:
            moved = part._moved(target - source)
            if (target - source) % part.page_size:
                continue  # as above: what is in the midst of a page is nowhere
            # What was rounded up may be more than what was moved, and reach into another area.
            if not self.within(moved.start, moved.end):
                self.add(moved)

    def copy(self) -> AreaMap:
        """For a forked child: the same, with states of its own."""
        return AreaMap(
            Area(
                area.start,
                area.length,
                area.store,
                area.offset,
                area.page_size,
                memoryview(bytearray(area._states())),
                area.lasting,
            )
            for area in self._areas
        )

    @property
    def bytes(self) -> int:
        """Bytes in all areas."""
        return sum(area.length for area in self._areas)
