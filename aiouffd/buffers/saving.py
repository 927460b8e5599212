"""A lazy buffer's bytes in a file, and its memory given back.

write(2) from missing lazy memory needs privileges: without them it fails with EFAULT. What is
saved is therefore fetched and copied first, piece by piece.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..sources.copying import transfer
from ..sources.destination import file_sink
from ..util.ranges import Ranges

if TYPE_CHECKING:
    from ..regions.region import Region
    from .buffer import LazyBuffer

__all__ = ["check_droppable", "drop", "save"]


class _Bytes:
    """The buffer as what `transfer` reads from."""

    def __init__(self, buffer: LazyBuffer) -> None:
        self._buffer = buffer
        self.size = len(buffer)

    async def read(self, offset: int, length: int) -> bytes:
        return await self._buffer.read(offset, length)

    def clone(self) -> _Bytes:
        return self


async def save(buffer: LazyBuffer, path: str | os.PathLike[str], offset: int, length: int) -> None:
    """See `LazyBuffer.save`."""
    sink = await file_sink(os.fsdecode(path), length)
    await transfer(_Bytes(buffer), sink, offset, length, lambda _count: None)


async def drop(region: Region, offset: int, length: int, pinned: list[tuple[int, int]]) -> int:
    """Forget the whole pages of a range but for those of ``pinned``, pairs of start and end.
    Returns the bytes of memory that were given back."""
    page = region.page_size
    end = offset + length
    if end == region.length:
        end = region.mapped_length
    pages = Ranges()
    pages.add(offset + -offset % page, end - end % page)
    for first, last in pinned:
        pages.remove(first - first % page, last + -last % page)
    before = region.resident_bytes

    def forget() -> None:
        for start, count in pages.pairs():
            region.drop(start, count)

    # The kernel holds it up until its events are read, on the loop too.
    await asyncio.get_running_loop().run_in_executor(None, forget)
    return max(0, before - region.resident_bytes)


def check_droppable(buffer: LazyBuffer, *, writes_too: bool) -> None:
    """Raise UsageError where dropping memory would lose what nobody can bring again."""
    if buffer._writable and not writes_too:
        raise UsageError(
            "what the program wrote into the buffer would be lost",
            hint="drop(..., writes_too=True) forgets that too; buf.save() keeps it",
        )
    if buffer._fork == "serve":
        raise UsageError("memory that forked children share cannot be dropped")
