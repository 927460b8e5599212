"""What of another process's address space comes from where. No I/O, no kernel.

An `AreaMap` follows what the process does to its mappings: pages that were removed read as
zeros from then on, whatever their object has; what was unmapped is forgotten; what was moved is
found at its new place; a forked child begins with a copy. It is the only truth there is: who
has waited for bytes asks it again before installing them, because in the meantime the page may have
been removed, moved or forgotten.

Of a large area there is much to note down, so whatever does that is also there in steps, as an
iterator: each step is quick, and nothing else may be asked or changed before the last one.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from ..util.pages import PAGE_SIZE
from . import states as page_states
from .states import STEP
from .steps import Steps, at_once

if TYPE_CHECKING:
    from .blocks import BlockStore

__all__ = ["ABSENT", "GONE", "INSTALLED", "MOVED", "REMOVED", "Area", "AreaMap", "Steps", "at_once"]


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
_HAS_ABSENT = re.compile(b"[" + re.escape(bytes(v for v in range(256) if v & ABSENT)) + b"]")
_UNMAP = bytes(value | GONE for value in range(256))
_MOVE = bytes(value | MOVED for value in range(256))
_REMAP = bytes(value & ~(GONE | MOVED) & 0xFF for value in range(256))


def _change(states: memoryview, table: bytes) -> Steps[None]:
    for at in range(0, len(states), STEP):
        if at:
            yield
        some = states[at : at + STEP]
        some[:] = bytes(some).translate(table)


@dataclass(frozen=True, eq=False)
class Area:
    """A range of addresses of another process and where its bytes come from.

    :param start: its address, a multiple of the page size.
    :param length: in bytes, a multiple of the page size.
    :param store: the object; None if it reads as zeros.
    :param offset: of ``start`` in the object, in bytes.
    :param page_size: in bytes: the system's, or that of huge pages.
    :param states: one byte per page to keep the pages' states in, for example of a file that
        outlives us; made if None.
    :param lasting: the process tells of what it drops, so what was INSTALLED and is missing was
        removed, though the server that heard of it died before it could note it down.
    """

    start: int
    length: int
    store: BlockStore | None
    offset: int = 0
    page_size: int = PAGE_SIZE
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
        assert self.states is not None  # as `_states`; each fault asks twice
        return self.states[(address - self.start) // self.page_size]

    def mark_installed(self, start: int, end: int) -> None:
        """The pages of ``start`` to ``end`` are there."""
        states, first, last = self._states(), self.page_of(start), self.page_of(end)
        states[first:last] = bytes(states[first:last]).translate(_INSTALL)

    def block(self, number: int, block_size: int) -> tuple[int, int]:
        """``[start, end)`` addresses of a block of the object within this area."""
        low = max(number * block_size, self.offset)
        high = min((number + 1) * block_size, self.offset + self.length)
        return self.start + low - self.offset, self.start + high - self.offset

    def missing_bytes(self) -> Steps[int]:
        """Bytes that `missing` would name, of all of it."""
        states, found = self._states(), 0
        for at in range(0, len(states), STEP):
            if at:
                yield
            found += bytes(states[at : at + STEP]).count(0)
        return found * self.page_size

    def misses_any(self) -> bool:
        """Whether anything is missing."""
        states = self._states()
        return any(bytes(states[at : at + STEP]).find(0) >= 0 for at in range(0, len(states), STEP))

    def forget_absent(self, start: int, end: int) -> None:
        """What was not mapped in ``start`` to ``end`` may be by now."""
        first, last = self.page_of(start), self.page_of(end)
        some = bytes(self._states()[first:last])
        if _HAS_ABSENT.search(some):
            self._states()[first:last] = some.translate(_LOOK_AGAIN)

    def forgetting_absent(self) -> Steps[None]:
        """The same for all of it, in steps."""
        step = STEP * self.page_size
        for start in range(self.start, self.end, step):
            if start > self.start:
                yield
            self.forget_absent(start, min(start + step, self.end))

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Runs of pages in ``start`` to ``end`` that are neither removed nor there already."""
        size, base = self.page_size, self.start
        some = bytes(self._states()[(start - base) // size : (end - base) // size])
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

    def _moved(self, distance: int) -> Steps[Area]:
        """The same at another address. Its states go with it; those of the old place stay there."""
        states = self._states()
        moved = page_states.new(len(states))
        for at in range(0, len(states), STEP):
            if at:
                yield
            page_states.copy(states[at : at + STEP], moved[at : at + STEP])
        yield from _change(states, _MOVE)
        yield from _change(moved, _REMAP)
        return Area(
            self.start + distance,
            self.length,
            self.store,
            self.offset,
            self.page_size,
            moved,
            self.lasting,
        )

    def _copied(self) -> Steps[Area]:
        """The same with states of its own."""
        states = self._states()
        copy = page_states.new(len(states))
        for at in range(0, len(states), STEP):
            if at:
                yield
            page_states.copy(states[at : at + STEP], copy[at : at + STEP])
        return Area(
            self.start,
            self.length,
            self.store,
            self.offset,
            self.page_size,
            copy,
            self.lasting,
        )


#: As how many states an area counts that is changed.
_AREA_WORK = 256
#: Areas that are changed in one step; and how many of them are put in order anew for one change.
_AREAS_STEP, _INDEX_AGAIN = 256, 64
_RECENT_MAX = 1024

_NOWHERE: tuple[list[Area], list[int], list[int]] = ([], [], [])


class AreaMap:
    """The areas of one address space, by address. Not thread-safe."""

    def __init__(self, areas: Iterable[Area] = ()) -> None:
        self._areas: list[Area] = []
        self._starts: list[int] = []
        self._by_offset: dict[BlockStore, tuple[list[Area], list[int], list[int]]] = {}
        self._indexed = -1
        # Areas that came after it was put in order.
        self._recent: list[Area] = []
        #: Changes with every change of what is where; not with the states of pages.
        self.version = 0
        self._counted, self._pages = -1, 0
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
                page_states.new(area.length // area.page_size),
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
        if self._indexed >= 0 and area.store is not None:
            self._recent.append(area)
            if len(self._recent) > _RECENT_MAX:
                self._recent.clear()
                self._indexed = -1

    def find(self, address: int) -> Area | None:
        """The area that holds ``address``."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        area = self._areas[at]
        return area if address < area.start + area.length else None

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
        if (self.version - self._indexed) * _INDEX_AGAIN > len(self._areas):
            self._index()
        found: list[tuple[Area, int, int]] = []
        areas, offsets, reach = self._by_offset.get(store, _NOWHERE)
        size = store.block_size
        low = number * size
        at = bisect_left(offsets, low + size)
        # `reach` never falls, so before the first that ends too early all do.
        while at and reach[at - 1] > low:
            at -= 1
            self._still(areas[at], number, size, found)
        for area in self._recent:
            if area.store is store and area.offset < low + size:
                self._still(area, number, size, found)
        found.reverse()
        return found

    def _still(
        self, area: Area, number: int, size: int, found: list[tuple[Area, int, int]]
    ) -> None:
        """Add what is left of ``area``, as it was once, of a block that it showed."""
        start, end = area.block(number, size)
        if start >= end:
            return
        if self.find(area.start) is area:
            found.append((area, start, end))
            return
        for part, low, high in self.within(start, end):
            if part.store is area.store and part.offset_of(low) == area.offset_of(low):
                found.append((part, low, high))

    def _index(self) -> None:
        """The areas of each object by offset, and how far those up to each one reach. Where there
        are many of them this is not done for each change."""
        self._by_offset.clear()
        self._recent.clear()
        for area in sorted(self._areas, key=attrgetter("offset")):
            if area.store is not None:
                areas, offsets, reach = self._by_offset.setdefault(area.store, ([], [], []))
                areas.append(area)
                offsets.append(area.offset)
                reach.append(max(area.offset + area.length, reach[-1] if reach else 0))
        self._indexed = self.version

    def work(self, start: int, end: int) -> int:
        """How much it is to note something down of ``start`` to ``end``: at least as many as there
        are states to change, and many for each area."""
        first = max(0, bisect_right(self._starts, start) - 1)
        count = max(0, bisect_left(self._starts, end) - first)
        pages = min((end - start) // PAGE_SIZE + 1, self.pages) if count else 0
        return count * _AREA_WORK + pages

    @property
    def pages(self) -> int:
        """States in all areas."""
        if self._counted != self.version:
            self._counted = self.version
            self._pages = sum(len(area._states()) for area in self._areas)
        return self._pages

    def removed(self, start: int, end: int) -> None:
        """The process dropped the contents of ``start`` to ``end`` (MADV_DONTNEED and the like)."""
        at_once(self.removing(start, end))

    def removing(self, start: int, end: int) -> Steps[None]:
        """The same in steps."""
        for area, low, high in self.within(start, end):
            first = area.page_of(low)
            last = -(-(high - area.start) // area.page_size)
            yield from _change(area._states()[first:last], _REMOVE)

    def unmapped(self, start: int, end: int) -> list[Area]:
        """The process has no mapping at ``start`` to ``end`` any more. Returns what was there."""
        return at_once(self.unmapping(start, end))

    def unmapping(self, start: int, end: int) -> Steps[list[Area]]:
        """The same in steps."""
        gone = []
        for area, low, high in self.within(start, end):
            self.version += 1
            # Of a page that is gone in part nothing is left. The kernel cuts huge pages nowhere,
            # but a client may have called pages huge that are not.
            low = area.start + (low - area.start) // area.page_size * area.page_size
            high = area.start - (area.start - high) // area.page_size * area.page_size
            gone.append(area._part(low, high))
            yield from _change(gone[-1]._states(), _UNMAP)
            if len(gone) % _AREAS_STEP == 0:
                yield
            at = bisect_right(self._starts, area.start) - 1
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
        at_once(self.moving(source, target, length))

    def moving(self, source: int, target: int, length: int) -> Steps[None]:
        """The same in steps."""
        parts = yield from self.unmapping(source, source + length)
        # Whatever was at the target is gone: mremap has unmapped it.
        yield from self.unmapping(target, target + length)
        for part in parts:
            moved = yield from part._moved(target - source)
            if (target - source) % part.page_size:
                continue  # as above: what is in the midst of a page is nowhere
            # What was rounded up may be more than what was moved, and reach into another area.
            if not self.within(moved.start, moved.end):
                self.add(moved)

    def copy(self) -> AreaMap:
        """For a forked child: the same, with states of its own."""
        return at_once(self.copying())

    def copying(self) -> Steps[AreaMap]:
        """The same in steps."""
        found = AreaMap()
        for number, area in enumerate(self._areas, 1):
            found.add((yield from area._copied()))
            if number % _AREAS_STEP == 0:
                yield
        return found

    @property
    def bytes(self) -> int:
        """Bytes in all areas."""
        return sum(area.length for area in self._areas)
