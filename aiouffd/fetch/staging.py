"""Staging buffers: where a source's bytes land before they become pages.

Two kinds. Small ones stay in the CPU's cache between the receive and UFFDIO_COPY, which does not
zero the page first. Huge ones are one transparent huge page each: the kernel zeroes it
once, the source fills it, and UFFDIO_MOVE hands the page itself over. Per byte that is half the
work of a copy into 512 small pages, and the reader gets a huge page.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from ..kernel.lib import ffi

__all__ = ["HUGE", "SMALL", "Stages", "huge_pages_work"]

#: Bytes in a small staging buffer, and in a huge one.
SMALL = 256 * 1024
HUGE = 2 * 1024 * 1024
#: Buffers kept for reuse, and how many huge ones there can be at all.
KEPT, ARENA = 32, 32


def huge_pages_work() -> bool:
    """Whether memory can be backed by transparent huge pages on request, of the size we know."""
    root = Path("/sys/kernel/mm/transparent_hugepage")
    try:
        return (
            "[never]" not in (root / "enabled").read_text()
            and int((root / "hpage_pmd_size").read_text()) == HUGE
        )
    except (OSError, ValueError):
        return False


class Stages:
    """Staging buffers of one loop. Not thread-safe."""

    def __init__(self) -> None:
        self._small: list[memoryview] = []
        self._huge: list[tuple[int, memoryview]] = []
        self._arena: mmap.mmap | None = None
        self._huge_wanted = huge_pages_work()

    def take_small(self) -> memoryview:
        """A buffer of `SMALL` bytes."""
        return self._small.pop() if self._small else memoryview(bytearray(SMALL))

    def give_small(self, stage: memoryview) -> None:
        """Take back what `take_small` gave; other buffers are dropped."""
        if len(stage) == SMALL and len(self._small) < KEPT:
            self._small.append(stage)

    def take_huge(self) -> tuple[int, memoryview] | None:
        """Address and view of `HUGE` bytes that may be moved away, or None if there are none."""
        if self._arena is None and self._huge_wanted:
            self._huge_wanted = False
            self._make_arena()
        return self._huge.pop() if self._huge else None

    def give_huge(self, stage: tuple[int, memoryview]) -> None:
        self._huge.append(stage)

    def lose_huge(self) -> None:
        """One will not come back, because somebody may still write to it: make another."""
        self._make_arena(1)

    def _make_arena(self, count: int = ARENA) -> None:
        arena = mmap.mmap(-1, (count + 1) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A page shared with a forked child could not be moved, not even after its end.
        arena.madvise(mmap.MADV_DONTFORK)
        arena.madvise(mmap.MADV_HUGEPAGE)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(arena)))
        skip = -address % HUGE
        view = memoryview(arena)
        for start in range(skip, skip + count * HUGE, HUGE):
            self._huge.append((address + start, view[start : start + HUGE]))
        self._arena = arena
