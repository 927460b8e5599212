"""Errors in place of what is missing, before the last descriptor goes.

Facts about the kernel that shape this file: with the last descriptor what is missing reads as
zeros, so it has to be an error (POISON, since Linux 6.6) by then. That answers EAGAIN too while an
event is unread, and until the thread that caused it has run, which one that is stopped never does.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from ..kernel.lib import ffi, lib
from ..kernel.results import unpack
from .areas import Area, AreaMap
from .filling import AGAIN_FIRST, PATIENCE
from .states import STEP
from .stats import MemoryStats

__all__ = ["Ending", "make_errors", "make_errors_now", "refuse"]

log = logging.getLogger("aiouffd")

_POISON: int = lib.AU_OP_POISON

#: Seconds that making errors of all pages may take, if a stopped thread is in the way; and where
#: the loop has to wait for it.
GIVE_UP, GIVE_UP_NOW = 2.0, 0.01


#: Seconds for which one that is cancelled goes on without giving the loop its turn.
AT_ONCE = 1.0
#: Pages that become errors in one call, which takes some 0.2 ms.
PIECE = 4096


class Ending(Protocol):
    """Memory that is to become errors."""

    fd: int
    areas: AreaMap
    stats: MemoryStats

    @property
    def closed(self) -> bool: ...

    @property
    def settling(self) -> bool:
        """Whether the areas are not what they should be, because they are being changed."""

    async def settled(self) -> None:
        """Until that is over."""

    def settle_now(self) -> None:
        """The same, however long it takes."""

    def read(self) -> dict[int, int]:
        """Read all there is to read."""

    def put_errors(self, start: int, length: int, page_size: int) -> int:
        """Errors in these pages: what ``au_foreign_fill`` returns. May read events, and applies
        them."""


async def make_errors(memory: Ending) -> None:
    """Errors of all that is missing. Returns once that is so, or cannot be. In steps."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + GIVE_UP
    again = True
    while again and not memory.closed:
        await memory.settled()
        again, version = False, memory.areas.version
        for in_the_way in _make_errors(memory):
            again = again or in_the_way
            if not in_the_way:
                limit = max(limit, loop.time() + GIVE_UP)
            await asyncio.sleep(0)
            if memory.closed:
                return
            if memory.settling or memory.areas.version != version:
                again = True
                break  # pages may be elsewhere now
        else:
            if again and loop.time() > limit:
                _complain(memory)
                return
            if again:
                await asyncio.sleep(AGAIN_FIRST)


def make_errors_now(memory: Ending) -> None:
    """The same where the loop has to wait for it."""
    limit = time.monotonic() + GIVE_UP_NOW
    while any(list(_make_errors(memory))):
        memory.settle_now()
        if time.monotonic() > limit:
            _complain(memory)
            return
        time.sleep(20e-6)  # for the thread that is in the way: microseconds


def _complain(memory: object) -> None:
    log.error(
        "%r: process is stopped; its missing pages could not be poisoned and may read as zeros",
        memory,
    )


def _make_errors(memory: Ending) -> Iterator[bool]:
    """Errors where something is missing, piece by piece. True: that cannot be yet."""
    memory.read()
    for area in list(memory.areas) if not memory.closed else ():
        if area.store is None:
            continue
        size = area.page_size
        for start in range(area.start, area.end, STEP * size):
            end = min(start + STEP * size, area.end)
            area.forget_absent(start, end)
            for at, length in _pieces(memory, area, start, end):
                done, code = unpack(memory.put_errors(at, length, size))
                area.mark_installed(at, at + done)
                memory.stats.poisoned_pages += done // size
                yield code == errno.EAGAIN
                if memory.settling:
                    return


def _pieces(memory: Ending, area: Area, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Addresses and lengths of what is missing, as of the moment when each of them is given."""
    most = PIECE * area.page_size
    while at < end:
        events = memory.stats.events
        for low, high in area.missing(at, end):
            at = low
            while at < high and memory.stats.events == events:
                length = min(most, high - at)
                yield at, length
                at += length
            if memory.stats.events != events:
                break  # something else may be missing now
        else:
            return


async def refuse(fd: int, ranges: Sequence[tuple[int, int, int]], name: str) -> None:
    """Errors in all ``ranges`` (first address, length, page size) of a process that is not served,
    where nothing is there yet, and close its descriptor ``fd``, of which it has no copy. In steps;
    one that is cancelled makes the rest of them at once, for up to a second."""
    steps = _refusing(fd, ranges, name)
    try:
        for pause in steps:
            await asyncio.sleep(pause)
    finally:
        # The last copy of the descriptor closes: what is missing then reads as zeros.
        _finish(steps, name)
        os.close(fd)


def _finish(steps: Iterator[float], name: str) -> None:
    limit = time.monotonic() + AT_ONCE
    for pause in steps:
        if time.monotonic() > limit:
            _complain(name)
            return
        time.sleep(pause)


def _refusing(fd: int, ranges: Sequence[tuple[int, int, int]], name: str) -> Iterator[float]:
    """Makes the errors, piece by piece; gives the seconds to wait between two of them."""
    messages, absent = ffi.new("struct au_uffd_msg[]", 16), ffi.new("uint64_t *")
    heard = ffi.new(
        "struct au_foreign_heard *", {"patience": PATIENCE, "messages": messages, "room": 16}
    )
    limit = time.monotonic() + GIVE_UP
    for start, length, size in ranges:
        at, end = start, start + length
        while at < end:
            piece = min(PIECE * size, end - at)
            result = lib.au_foreign_fill(
                fd, _POISON, at, ffi.NULL, piece, size, ffi.NULL, absent, heard
            )
            for message in messages[0 : heard.count]:
                if message.event == lib.AU_EVENT_FORK:
                    os.close(message.arg.fork.ufd)
            heard.count = 0
            done, code = unpack(result)
            at += done
            if done:
                limit = time.monotonic() + GIVE_UP
            elif code != errno.EAGAIN:
                return  # its process has ended, most likely
            if time.monotonic() > limit:
                _complain(name)
                return
            yield 0 if done else AGAIN_FIRST
