"""Moving a whole object: many reads under way, written in order, holes left out.

One of the places where bytes do not become memory: what `cat` and `copy` are made of.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Protocol

from ..errors import UsageError
from .base import Buffer, Source, check_length, holes_in_source, own_method

__all__ = ["PipeSink", "Sink", "SourceSink", "transfer"]

#: Bytes of one read, and reads under way at a time.
STEP, AHEAD = 2 << 20, 8


class Sink(Protocol):
    """Where bytes go; ``write`` and ``zeros`` are called for one range after the other."""

    async def write(self, offset: int, data: Buffer) -> None: ...
    async def zeros(self, offset: int, length: int) -> None: ...
    async def finish(self) -> None: ...
    async def abandon(self) -> None: ...


async def transfer(
    source: Source, sink: Sink, offset: int, length: int, advance: Callable[[int], None]
) -> None:
    """Write ``length`` bytes at ``offset`` of ``source`` (open) to ``sink``, from its byte 0 on.

    ``advance`` is told of each number of bytes done. Raises what either side raises; the sink is
    finished or abandoned.
    """
    end = offset + length
    if offset < 0 or length < 0 or end > source.size:
        raise UsageError(
            f"bytes {offset} to {end} are not within the {source.size} bytes of the source"
        )
    under_way: deque[tuple[int, asyncio.Task[Any]]] = deque()
    zeros = 0
    try:
        at = offset
        while at < end or under_way:
            while at < end and len(under_way) < AHEAD:
                step = min(STEP - at % STEP, end - at)
                under_way.append((at, asyncio.ensure_future(_piece(source, at, step))))
                at += step
            start, task = under_way[0]
            for data, count in await task:
                if data is None:
                    zeros += count
                else:
                    # One call for all zeros in a row, however they were found.
                    if zeros:
                        await sink.zeros(start - zeros - offset, zeros)
                        zeros = 0
                    await sink.write(start - offset, data)
                start += count
                advance(count)
            under_way.popleft()
        if zeros:
            await sink.zeros(end - zeros - offset, zeros)
        await sink.finish()
    except BaseException:
        for _, task in under_way:
            task.cancel()
        await asyncio.gather(*(task for _, task in under_way), return_exceptions=True)
        await sink.abandon()
        raise


async def _piece(source: Source, offset: int, length: int) -> list[tuple[Buffer | None, int]]:
    """A range as data and holes (None), each with its length."""
    parts: list[tuple[Buffer | None, int]] = []
    end = offset + length

    async def read(to: int) -> None:
        if to > offset:
            data = await source.read(offset, to - offset)
            parts.append((check_length(data, to - offset, offset=offset), to - offset))

    for start, count in await holes_in_source(source, offset, length):
        await read(start)
        parts.append((None, count))
        offset = start + count
    await read(end)
    return parts


class PipeSink:
    """A pipe, a terminal, another device that takes one byte after the other: zeros are written
    out. ``close`` the stream at the end, if it is nobody else's."""

    def __init__(self, stream: BinaryIO, *, close: bool = False) -> None:
        self._stream = stream
        self._close = close
        # A thread, for the reads go on while a pipe is full.
        self._executor = ThreadPoolExecutor(1, "aiouffd-pipe")

    async def write(self, offset: int, data: Buffer) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._put, data)

    def _put(self, data: Buffer) -> None:
        # One without a buffer of its own may take less than all.
        view = memoryview(data).cast("B")
        while view:
            view = view[self._stream.write(view) :]

    async def zeros(self, offset: int, length: int) -> None:
        chunk = bytes(min(length, STEP))
        for start in range(0, length, STEP):
            await self.write(offset + start, chunk[: length - start])

    async def finish(self) -> None:
        end = self._stream.close if self._close else self._stream.flush
        await asyncio.get_running_loop().run_in_executor(self._executor, end)
        self._executor.shutdown()

    async def abandon(self) -> None:
        # Not waited for: its thread may be stuck in a write that nobody reads.
        self._executor.shutdown(wait=False)


class SourceSink:
    """A source that can be written to (an NBD export, say)."""

    def __init__(self, source: Source) -> None:
        write = own_method(source, "write")
        if write is None:
            raise UsageError(f"{type(source).__name__} cannot be written to")
        self._write = write
        self._write_zeros = own_method(source, "write_zeros")
        self._flush = own_method(source, "flush")

    async def write(self, offset: int, data: Buffer) -> None:
        await self._write(offset, data)

    async def zeros(self, offset: int, length: int) -> None:
        if self._write_zeros is not None:
            await self._write_zeros(offset, length, hole=True)
            return
        chunk = bytes(min(length, STEP))
        for start in range(0, length, STEP):
            await self._write(offset + start, chunk[: length - start])

    async def finish(self) -> None:
        if self._flush is not None:
            await self._flush()

    async def abandon(self) -> None:
        """What was written is written."""
