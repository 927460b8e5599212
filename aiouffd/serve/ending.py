"""Errors in place of what is missing, before the last descriptor goes.

Facts about the kernel that shape this file: with the last descriptor what is missing reads as
zeros, so it has to be an error (POISON, since Linux 6.6) by then. That answers EAGAIN too while an
event is unread, and until the thread that caused it has run, which one that is stopped never does.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from typing import Protocol

from .._lib import ffi, lib
from .areas import AreaMap
from .filling import AGAIN_FIRST
from .stats import MemoryStats

__all__ = ["Ending", "make_errors", "make_errors_now"]

log = logging.getLogger("aiouffd")

_POISON: int = lib.AU_OP_POISON

#: Seconds that making errors of all pages may take, if a stopped thread is in the way; and where
#: the loop has to wait for it.
GIVE_UP, GIVE_UP_NOW = 2.0, 0.01


class Ending(Protocol):
    """Memory that is to become errors."""

    fd: int
    areas: AreaMap
    stats: MemoryStats

    @property
    def closed(self) -> bool: ...

    def read(self) -> dict[int, int]:
        """Read all there is to read."""


async def make_errors(memory: Ending) -> None:
    """Errors of all that is missing. Returns once that is so, or cannot be."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + GIVE_UP
    while not memory.closed and _make_errors(memory):
        if loop.time() > limit:
            _complain(memory)
            return
        await asyncio.sleep(AGAIN_FIRST)


def make_errors_now(memory: Ending) -> None:
    """The same where the loop has to wait for it."""
    limit = time.monotonic() + GIVE_UP_NOW
    while _make_errors(memory):
        if time.monotonic() > limit:
            _complain(memory)
            return
        time.sleep(20e-6)  # for the thread that is in the way: microseconds


def _complain(memory: Ending) -> None:
    log.error("%r: it is stopped, and what it lacks may read as zeros later", memory)


def _make_errors(memory: Ending) -> bool:
    """Errors where something is missing. True if that cannot be yet."""
    memory.read()
    again = False
    for area in list(memory.areas) if not memory.closed else ():
        if area.store is None:
            continue
        area.forget_absent()
        size = area.page_size
        for low, high in area.missing(area.start, area.end):
            result = lib.au_foreign_put(memory.fd, _POISON, low, ffi.NULL, high - low, size)
            done = high - low if result >= 0 else ~result >> 8
            area.mark_installed(low, low + done)
            memory.stats.poisoned_pages += done // size
            again = again or (result < 0 and ~result & 0xFF == errno.EAGAIN)
    return again
