"""Several sources one after the other, as one: the shards of a model, the parts of an archive."""

from __future__ import annotations

import asyncio
import hashlib
import json
from bisect import bisect_right
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from ...errors import FlushError, UnsupportedError, UsageError
from .. import as_source
from ..base import (
    BaseSource,
    Buffer,
    Source,
    aclose_source,
    check_length,
    check_range,
    holes_in_source,
    open_source,
    own_method,
    read_into_source,
)
from ..lifecycle import Life, contained, give_back
from .slice import moved
from .wrapper import fresh

__all__ = ["ConcatSource", "together"]

#: Zeros are written in pieces of so many bytes where a part knows no better.
ZEROS = 1 << 20


async def together(calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Await all; when one fails, cancel the others, wait for their end, and raise its error."""
    coroutines = list(calls)
    tasks = [asyncio.ensure_future(contained(_given, call)) for call in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    finally:
        for call in coroutines:
            call.close()  # of a task that was cancelled before its first step


async def _given(call: Coroutine[Any, Any, Any]) -> Any:
    return await call


class ConcatSource(BaseSource):
    """``sources`` end to end. Their sizes are known once it is open; see `starts`.

    Reads that cross borders go to all parts at once. ``version`` tells all versions together,
    and is None if one of them is unknown.
    """

    def __init__(self, sources: Iterable[Any]) -> None:
        self._parts: list[Source] = [as_source(source) for source in sources]
        if not self._parts:
            raise UsageError("a concatenation needs at least one source")
        self._starts: list[int] | None = None
        self._life = Life(f"the {type(self).__name__}")

    def __repr__(self) -> str:
        return f"<ConcatSource of {len(self._parts)} sources>"

    @property
    def parts(self) -> Sequence[Source]:
        """What this is made of."""
        return tuple(self._parts)

    @property
    def starts(self) -> Sequence[int]:
        """Byte offsets at which the parts begin, and the size as the last item."""
        if self._starts is None:
            self._starts = [0, *accumulate(part.size for part in self._parts)]
        return self._starts

    @property
    def size(self) -> int:
        """Length of all together, in bytes."""
        return self.starts[-1]

    @property
    def writable(self) -> bool:
        """Whether all parts can be written to."""
        return all(getattr(part, "writable", False) for part in self._parts)

    async def open(self) -> None:
        """Open all parts at a time; if one fails, close the others and raise its error. Shared by
        all who call it at a time."""
        await self._life.open(self._open, self._take_back)

    async def _open(self) -> None:
        self._starts = None
        tasks = [asyncio.ensure_future(contained(open_source, part)) for part in self._parts]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            await self._take_back([number for number, end in enumerate(ends) if end is None])
            raise
        versions = [getattr(part, "version", None) for part in self._parts]
        if None not in versions:
            # JSON, so that no two lists give one text, whatever versions look like.
            sizes = [part.size for part in self._parts]
            text = json.dumps([*zip(sizes, versions, strict=True)])
            self.version = hashlib.sha256(text.encode()).hexdigest()[:32]

    async def _take_back(self, numbers: Iterable[int] | None = None) -> None:
        """Close those parts (all), so that they can be opened again."""
        opened: list[Source] = []
        for number in range(len(self._parts)) if numbers is None else numbers:
            opened.append(self._parts[number])
            self._parts[number] = fresh(self._parts[number])
        await asyncio.gather(*map(give_back, opened))

    async def aclose(self) -> None:
        """Close all parts, also when closing one of them fails; then raises that error. Shared by
        all who call it at a time."""
        await self._life.close(self._close)

    async def _close(self) -> None:
        closing = (contained(aclose_source, part) for part in self._parts)
        for end in await asyncio.gather(*closing, return_exceptions=True):
            if end is not None:
                raise end

    def clone(self) -> ConcatSource:
        """The same of clones, pinned to the same versions."""
        other = ConcatSource(part.clone() for part in self._parts)
        other.version = self.version
        return other

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[Source, int, int, int]]:
        """Parts with the offset and length to read there, and the part's first byte."""
        check_range(offset, length, self.size)
        starts = self.starts
        index = max(0, bisect_right(starts, offset) - 1)
        end = offset + length
        while offset < end:
            stop = min(end, starts[index + 1])
            if stop > offset:
                start = starts[index]
                yield self._parts[index], offset - start, stop - offset, start
                offset = stop
            index += 1

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; uncopied if they are of one part."""
        pieces = list(self._pieces(offset, length))
        if len(pieces) == 1:
            part, start, count, _ = pieces[0]
            return check_length(await part.read(start, count), count, offset=offset)
        data = bytearray(length)
        await self._fill(memoryview(data), pieces)
        return data

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` on."""
        await self._fill(buffer, list(self._pieces(offset, len(buffer))))

    async def _fill(self, buffer: memoryview, pieces: list[tuple[Source, int, int, int]]) -> None:
        calls = []
        at = 0
        for part, start, count, _ in pieces:
            calls.append(read_into_source(part, start, buffer[at : at + count]))
            at += count
        if len(calls) == 1:
            await calls[0]
        else:
            await together(calls)

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Those of the parts."""
        found: list[tuple[int, int]] = []
        for part, start, count, base in self._pieces(offset, length):
            for hole, extent in await holes_in_source(part, start, count):
                if found and sum(found[-1]) == base + hole:
                    found[-1] = (found[-1][0], found[-1][1] + extent)
                else:
                    found.append((base + hole, extent))
        return found

    async def write(self, offset: int, data: Buffer) -> None:
        """Write to the parts. Raises UnsupportedError if one of them cannot."""
        view = memoryview(data).cast("B")
        calls: list[Coroutine[Any, Any, None]] = []
        at = 0
        for part, start, count, _ in list(self._pieces(offset, view.nbytes)):
            method = own_method(part, "write")
            if method is None:
                for call in calls:
                    call.close()
                raise UnsupportedError(f"{part!r} cannot be written to")
            calls.append(method(start, view[at : at + count]))
            at += count
        await together(calls)

    async def write_zeros(self, offset: int, length: int, *, hole: bool) -> None:
        """Have zeros in the parts; written out where a part knows no better."""
        pieces = list(self._pieces(offset, length))
        if not all(own_method(part, "write") for part, *_ in pieces):
            raise UnsupportedError("not all parts can be written to")
        await together(_zeros(part, start, count, hole) for part, start, count, _ in pieces)

    async def trim(self, offset: int, length: int) -> None:
        """Trim the parts that can be."""
        calls = []
        for part, start, count, _ in self._pieces(offset, length):
            method = own_method(part, "trim")
            if method is not None:
                calls.append(method(start, count))
        await together(calls)

    async def flush(self) -> None:
        """Flush the parts that have a flush; all of them, also when one fails.

        Raises FlushError with all ranges that are in doubt, or the first error of another kind.
        """
        methods = [own_method(part, "flush") for part in self._parts]
        ends = await asyncio.gather(
            *(contained(method) for method in methods if method is not None), return_exceptions=True
        )
        with_flush = [number for number, method in enumerate(methods) if method is not None]
        errors: list[FlushError] = []
        for number, end in zip(with_flush, ends, strict=True):
            if isinstance(end, FlushError):
                errors.append(end)
                end.ranges = moved(end.ranges, self.starts[number], self.size)
            elif end is not None:
                raise end
        if len(errors) == 1:
            raise errors[0]
        if errors:
            ranges = [pair for error in errors for pair in error.ranges]
            message = "; ".join(error.message for error in errors)
            raise FlushError(message, ranges=ranges, errno=errors[0].errno) from errors[0]


async def _zeros(part: Source, offset: int, length: int, hole: bool) -> None:
    own = own_method(part, "write_zeros")
    if own is not None:
        await own(offset, length, hole=hole)
        return
    zeros = memoryview(bytes(min(length, ZEROS)))
    for at in range(0, length, ZEROS):
        await own_method(part, "write")(offset + at, zeros[: length - at])
