"""Transfers: how the bytes of a flight come from a source into pages.

Whole pages of zeros that the source knows of are not asked for. Else the bytes go, by what the
source can do: from its chunks as they arrive (``stream``), through a staging buffer that stays in
the CPU's cache or a huge page that is moved (``read_into``), or from the buffer that it returned
(``read``). Small reads of a source with ``begin_read`` need neither a task nor a
future: see `Mover.begin`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Callable, Coroutine
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import AiouffdError, KernelError, UsageError
from ..kernel.lib import pin
from ..regions.region import Region
from ..sources.base import (
    Source,
    check_holes,
    check_length,
    own_method,
    read_into_source,
    stream_source,
)
from ..util.unwatched import Unwatched
from ..util.usercode import Complaints
from ..util.waiting import call_soon_at
from .flights import Flight
from .staging import HUGE, SMALL, Stages
from .tally import Tally

if TYPE_CHECKING:
    from ..kernel.calls.pointers import Bytes

__all__ = ["Mover"]

#: Longest install in one native call (or one huge page), for the sake of the loop's latency.
INSTALL_STEP = 1024 * 1024


#: Seconds for which an install is tried again while mappings change (EAGAIN); then it has failed.
AGAIN_PATIENCE = 5.0

#: A buffer to receive into: a pointer to it, and its memory.
Stage: TypeAlias = "tuple[Bytes, memoryview]"


class Begun:
    """A small transfer without a task: what a source calls at its end. See `Mover.begin`.

    One for each request, so that a source that calls it twice, or late, harms no other one.
    """

    __slots__ = ("_flight", "_length", "_mover", "_offset", "_over", "_request", "_stage")

    def __init__(self, mover: Mover, stage: Stage, offset: int, length: int, flight: Any) -> None:
        self._mover = mover
        self._stage = stage
        self._offset, self._length, self._flight = offset, length, flight
        self._request: Any = None
        self._over = False

    def _start(self, begin_read: Callable[..., Any]) -> bool:
        memory = self._stage[1]
        length = self._length
        self._request = begin_read(
            self._offset, memory if length == len(memory) else memory[:length], self
        )
        return self._request is not None

    def __call__(self, error: BaseException | None) -> None:
        mover = self._mover
        if get_ident() != mover._thread:
            call_soon_at(mover._loop, self, error)
        elif self._over:
            # Twice, or after it was cancelled: the flight is somebody else's by now.
            mover._complaints.make(
                f"begin_read of {mover._name}", UsageError("`done` was called more than once")
            )
        else:
            self._over = True
            if self._request is None:  # before `begin_read` has returned
                mover._loop.call_soon(self._end, error)
            else:
                self._end(error)

    def _end(self, error: BaseException | None) -> None:
        mover, flight = self._mover, self._flight
        self._request = self._flight = None
        if flight is None:
            return  # cancelled
        if error is None:
            mover._tally.fetched_bytes += self._length
            try:
                mover._region.install_from(self._offset, self._stage[0], self._length)
            except (AiouffdError, OSError) as failure:
                error = failure
            else:
                mover._healed(self._offset, self._length)
            mover._idle.append(self._stage)
        # After a failure a careless source might still write to the stage: it is not used again.
        mover.landed(flight, error)

    def _give_up(self) -> None:
        self._over = True
        self._request = self._flight = None

    def cancel(self) -> None:
        """Nothing is installed any more, and nobody is told."""
        request = self._request
        self._give_up()
        if request is not None:
            try:
                request.cancel()
            except BaseException as error:
                self._mover._complaints.make(f"cancel() of {type(request).__name__}", error)


def _nobody(_flight: Flight, _error: BaseException | None) -> None:
    raise AssertionError("nobody is told")


class Mover:
    """Brings ranges of ``source`` into ``region``. One loop; not thread-safe.

    ``failures`` maps blocks to the error that poisoned them; what arrives is taken out of it. What
    callbacks of the source raise goes to ``complaints``.
    """

    def __init__(
        self,
        region: Region,
        source: Source,
        tally: Tally,
        failures: dict[int, BaseException],
        complaints: Complaints,
    ) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), get_ident()
        self._complaints = complaints
        self._name = type(source).__name__
        self._region = region
        self._source = source
        self._tally = tally
        self._failures = failures
        self._stages = Stages()
        self._step = max(INSTALL_STEP, region.page_size)
        self._movable = region.kind == "anonymous" and region.address % HUGE == 0
        self._stream = own_method(source, "stream")
        self._read_into = own_method(source, "read_into")
        self._holes = own_method(source, "holes")
        self._begin_read = own_method(source, "begin_read")
        self._idle: list[Stage] = []
        #: Fetch and install bytes from ``flight.offset`` to ``flight.end``, moving the one along.
        #: Whole pages that the source knows to be zeros are not asked for.
        self.move: Callable[[Flight], Coroutine[Any, Any, None]] = self._by_holes
        if self._holes is None:
            # The shorter ways; the shortest where there is nothing but `read`.
            bare = self._stream is None and self._read_into is None
            self.move = self._by_read if bare else self._bring
        #: Whether `begin` is worth asking.
        self.begins = self._begin_read is not None
        #: Told of the end of what `begin` began.
        self.landed: Callable[[Flight, BaseException | None], None] = _nobody

    def begin(self, flight: Flight) -> Begun | None:
        """Bring the bytes of ``flight`` (whole pages, or up to the end) without a task.

        ``landed(flight, error)`` is called once they are installed, or when that failed: `move`
        then makes a proper attempt. None if the source cannot do it now.
        """
        offset, length = flight.offset, flight.end - flight.offset
        if self._begin_read is None or length > SMALL:
            return None
        idle = self._idle
        stage = idle.pop() if idle else pin(bytearray(min(self._region.block_size, SMALL)))
        begun = Begun(self, stage, offset, length, flight)
        try:
            if begun._start(self._begin_read):
                return begun
        except BaseException as error:
            # It may have begun nevertheless, so that its stage is not used again.
            self._complaints.make(f"begin_read of {self._name}", error)
        else:
            idle.append(stage)
        begun._give_up()
        return None

    async def _by_holes(self, flight: Flight) -> None:
        assert self._holes is not None
        page = self._region.page_size
        whole = (flight.offset, flight.end - flight.offset)
        for start, length in check_holes(await self._holes(*whole), *whole):
            first = start + -start % page
            stop = start + length
            # The rest of the object's last page is zeros anyhow.
            stop = stop if stop == self._region.length else stop - stop % page
            if first < stop and first >= flight.offset:
                await self._bring(flight, first)
                await self._zero(flight, stop)
        await self._bring(flight)

    async def _zero(self, flight: Flight, end: int) -> None:
        region, pause, limit = self._region, 0.001, time.monotonic() + AGAIN_PATIENCE
        while flight.offset < end:
            length = end - flight.offset
            try:
                region.zero(flight.offset, length + -length % region.page_size, heal=True)
            except KernelError as error:
                if error.errno != errno.EAGAIN or time.monotonic() > limit:
                    raise
                self._advance(flight, error.done)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.1)
            else:
                self._advance(flight, length)

    async def _bring(self, flight: Flight, end: int | None = None) -> None:
        """Fetch and install up to ``end``, or to the end of the flight."""
        end = flight.end if end is None else end
        length = end - flight.offset
        if length <= 0:
            return
        if self._stream is not None and length > SMALL:
            await self._by_stream(flight, end)
        elif self._read_into is not None:
            await self._by_stage(flight, end)
        else:
            await self._by_read(flight, end)

    async def _by_read(self, flight: Flight, end: int | None = None) -> None:
        offset = flight.offset
        length = (flight.end if end is None else end) - offset
        data = await self._source.read(offset, length)
        if type(data) is not bytes or len(data) != length:
            data = check_length(data, length, offset=offset)
        self._tally.fetched_bytes += length
        if length <= self._step:
            done = self._put(flight, data)
            if done is not None:
                await self._put_patiently(flight, data, done)
            return
        for start in range(0, length, self._step):
            if start:
                await asyncio.sleep(0)
            await self._install(flight, data[start : start + self._step])

    async def _by_stage(self, flight: Flight, end: int) -> None:
        """One request per huge page or less, for each request costs the source's latency."""
        stages = self._stages
        while flight.offset < end:
            length = min(HUGE - flight.offset % HUGE, end - flight.offset)
            huge = stages.take_huge() if length > SMALL else None
            if huge is None:
                size = max(length, self._region.page_size)
                stage = stages.take_small() if size <= SMALL else memoryview(bytearray(size))
                await self._by_copy(flight, stage[:length])
                # Not after a failure: a careless source might still write to it.
                stages.give_small(stage)
            else:
                try:
                    if length == HUGE and self._movable:
                        await self._by_huge_page(flight, huge)
                    else:
                        await self._by_copy(flight, huge[1][:length])
                except BaseException:
                    stages.lose_huge()
                    raise
                stages.give_huge(huge)

    async def _by_copy(self, flight: Flight, part: memoryview) -> None:
        await read_into_source(self._source, flight.offset, part)
        self._tally.fetched_bytes += len(part)
        for start in range(0, len(part), self._step):
            await self._install(flight, part[start : start + self._step])

    async def _by_huge_page(self, flight: Flight, stage: tuple[int, memoryview]) -> None:
        address, view = stage
        await read_into_source(self._source, flight.offset, view)
        self._tally.fetched_bytes += HUGE
        try:
            self._region.move_in(flight.offset, address, HUGE)
            self._advance(flight, HUGE)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
            await self._install(flight, view)

    async def _by_stream(self, flight: Flight, end: int) -> None:
        """Install whole pages straight from the source's chunks; only their ragged edges,
        less than a page each, are copied."""
        page = self._region.page_size
        edge = bytearray()
        start = flight.offset
        stream = Unwatched(stream_source(self._source, start, end - start))
        async with contextlib.aclosing(stream) as chunks:
            async for view in chunks:
                self._tally.fetched_bytes += view.nbytes
                if edge:
                    missing = page - len(edge)
                    edge += view[:missing]
                    view = view[missing:]
                    if len(edge) == page:
                        await self._install(flight, edge)
                        edge = bytearray()
                whole = view.nbytes & ~(page - 1)
                for at in range(0, whole, self._step):
                    await self._install(flight, view[at : min(at + self._step, whole)])
                edge += view[whole:]
                if edge and flight.offset + len(edge) == end:
                    await self._install(flight, edge)
                    edge = bytearray()

    async def _install(self, flight: Flight, data: Any) -> None:
        done = self._put(flight, data)
        if done is not None:
            await self._put_patiently(flight, data, done)

    def _put(self, flight: Flight, data: Any) -> int | None:
        """Install in one go. How many bytes are there if mappings change, and it is to be tried
        again; None if all are."""
        try:
            self._region.install(flight.offset, data, heal=True)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
            return error.done
        self._advance(flight, len(data))
        return None

    async def _put_patiently(self, flight: Flight, data: Any, done: int) -> None:
        await self._region.install_async(
            flight.offset + done, memoryview(data)[done:], heal=True, patience=AGAIN_PATIENCE
        )
        self._advance(flight, len(data))

    def _advance(self, flight: Flight, length: int) -> None:
        first = flight.offset
        flight.offset += length
        flight.pieces += 1
        if self._failures:
            self._healed(first, length)

    def _healed(self, offset: int, length: int) -> None:
        if self._failures:
            size = self._region.block_size
            for block in range(offset // size, (offset + length - 1) // size + 1):
                self._failures.pop(block, None)
