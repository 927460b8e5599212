"""One byte for each page: what is known of the pages of an area.

Of a large area these are many, so memory for them is only used where something is known, and what
goes over all of them does so in steps, between which others have their turn.
"""

from __future__ import annotations

import asyncio
import mmap
import os

from ..errors import PeerError

__all__ = ["STEP", "copy", "load", "new", "new_file", "save"]

#: States that are looked at in one go: of 512 MiB of memory, which take some 0.1 ms.
STEP = 1 << 17
_SMALL = 1 << 16
#: States that are looked at for anything known.
_PART = 4096
_ZEROS = bytes(_PART)


def new(count: int) -> memoryview:
    """States of ``count`` pages of which nothing is known."""
    if count <= _SMALL:
        return memoryview(bytearray(count))
    # A bytearray would be written to as a whole.
    return memoryview(mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def copy(source: memoryview, target: memoryview) -> None:
    """Copy at most `STEP` states, as far as any are known, to where none are yet."""
    for at in range(0, len(source), _PART):
        some = bytes(source[at : at + _PART])
        if some != _ZEROS[: len(some)]:
            target[at : at + len(some)] = some


def new_file(name: str) -> int:
    """A file for `save`; the caller's to close. Raises OSError."""
    return os.memfd_create(name, os.MFD_CLOEXEC)


async def save(states: memoryview, fd: int, at: int) -> None:
    """Write states to a file, from byte ``at`` on. Raises OSError."""
    os.truncate(fd, at + len(states))
    for first in range(0, len(states), STEP):
        if first:
            await asyncio.sleep(0)
        for low in range(first, min(first + STEP, len(states)), _PART):
            some = bytes(states[low : low + _PART])
            if some != _ZEROS[: len(some)]:
                os.pwrite(fd, some, at + low)


async def load(fd: int, count: int) -> memoryview:
    """States of ``count`` pages from a file that `save` has written. Raises PeerError, OSError."""
    if os.fstat(fd).st_size != count:
        raise PeerError(f"a file of page states has {os.fstat(fd).st_size} bytes, not {count}")
    found, at = new(count), 0
    while at < count:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing more
            break
        stop = min(count, os.lseek(fd, at, os.SEEK_HOLE), at + STEP)
        at += os.preadv(fd, [found[at:stop]], at)
        await asyncio.sleep(0)
    return found
