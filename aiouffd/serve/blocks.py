"""The blocks of one object, for everybody who is served from it.

One flight per block, however many clients wait for it. Who waits for bytes goes before who only
would like them soon, and among those who wait goes first who has had least, so that one that wants
much delays another by one flight and not by all of its own. Blocks that were fetched are kept for
a while: a thousand clones of one snapshot read it once.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from typing import Any, Protocol

from ..backoff import pause_after
from ..errors import ClosedError, SourceChangedError, SourceError, UsageError
from ..once import cancelled_from_outside
from ..sources.base import (
    Source,
    aclose_source,
    as_source_error,
    check_holes,
    check_length,
    open_source,
    own_method,
    size_of_source,
)
from ..sources.lifecycle import Life
from ..sources.memory import MemorySource
from ..tally import Tally
from ..usercode import describe, ends_the_program, is_ours, tell_loop
from .reactor import Share

__all__ = ["BlockStore", "Wanter", "end_all"]

log = logging.getLogger("aiouffd")

#: Bytes of one block, and of blocks that are kept; what one counts for that is all zeros.
BLOCK_SIZE, KEEP, ZEROS_COST = 64 * 1024, 64 << 20, 256
#: Flights at a time, and how many of them may be those that nobody waits for.
MAX_FLIGHTS, MAX_BACKGROUND = 64, 16
#: First and longest pause between two tries, in seconds.
RETRY_FIRST, RETRY_LONGEST = 0.05, 10.0
#: What a flight counts for in a client's share, in seconds of our time.
FLIGHT = 50e-6
#: Seconds that tasks may take to end once they were cancelled.
STUBBORN = 10.0
#: The granularity of offsets that blocks and areas have.
PAGE = 4096


async def end_all(owner: object, tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait until tasks that were cancelled have ended; one that does not in time is told of, and
    left to itself."""
    if tasks:
        _, left = await asyncio.wait(tasks, timeout=STUBBORN)
        for task in left:
            log.error("%r: %r does not end though it was cancelled", owner, task)


class Wanter(Protocol):
    """Who asks a `BlockStore` for blocks."""

    #: What it has had so far; who has had least is next. Wanters of one client share it.
    share: Share

    def landed(self, store: BlockStore, block: int, data: memoryview | None) -> None:
        """A block has come: its bytes, whole pages (zeros behind the object's end), or None if all
        of it is zeros. Valid until this returns."""

    def failed(self, store: BlockStore, block: int, error: BaseException) -> None:
        """A block could not be had."""

    def broken(self, error: Exception) -> None:
        """One of the above has raised, which is a bug of ours."""


class _Flight:
    __slots__ = ("count", "first", "limit", "running", "since", "urgent", "waited", "wanters")

    def __init__(self, first: int, count: int, urgent: bool) -> None:
        self.first, self.count, self.urgent = first, count, urgent
        self.running = False
        #: Somebody waits, from `since` on.
        self.waited = urgent
        self.limit: asyncio.Timeout | None = None
        self.since = time.monotonic()
        self.wanters: dict[int, list[Wanter]] = {}


class BlockStore:
    """The blocks of ``source``, on the loop that opens it.

    :param source: a `Source`; opened by `open`, closed by `aclose`.
    :param block_size: bytes fetched at a time, a power of two and at least 4096.
    :param keep: bytes of fetched blocks that are kept for the next who wants them.
    :param deadline: seconds after which a block that somebody waits for has failed; None: a
        transient failure is tried again for ever.
    """

    def __init__(
        self,
        source: Source,
        *,
        block_size: int = BLOCK_SIZE,
        keep: int = KEEP,
        deadline: float | None = None,
    ) -> None:
        if block_size < PAGE or block_size & (block_size - 1):
            raise UsageError(f"the block size {block_size} is not a power of two from 4096 on")
        self.source = source
        self.block_size = block_size
        self.tally = Tally()
        self._keep = keep
        self._deadline = deadline
        self._now: Callable[[int, int], Any] | None = getattr(source, "read_now", None)
        self._holes = own_method(source, "holes")
        self._kept: OrderedDict[int, memoryview | None] = OrderedDict()
        self._kept_bytes = 0
        self._flights: dict[int, _Flight] = {}
        self._queue: list[tuple[float, int, _Flight]] = []  # a heap
        self._number = 0
        self._background: deque[_Flight] = deque()
        self._tasks: dict[asyncio.Task[None], _Flight] = {}
        self._running_background = 0
        self._closed = False
        self._size = 0
        self._life = Life("a store")

    async def open(self) -> None:
        """Open the source. Raises what it raises, and ClosedError. Idempotent; what has failed can
        be tried again."""
        await self._life.open(self._open, self._close_source)

    async def _open(self) -> None:
        try:
            await open_source(self.source)
            self._size = size_of_source(self.source)
        except asyncio.CancelledError as error:
            if not cancelled_from_outside():
                raise as_source_error(error) from error
            await self._close_source()  # it may be half open
            raise

    async def _close_source(self) -> None:
        try:
            await aclose_source(self.source)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and cancelled_from_outside():
                raise
            log.error("%r could not be closed: %r", self, error)

    @property
    def size(self) -> int:
        """Length of the object in bytes."""
        return self._size

    @property
    def version(self) -> str | None:
        return getattr(self.source, "version", None)

    @property
    def memory(self) -> memoryview | None:
        """The whole object, if it is memory of this process."""
        return self.source.data if isinstance(self.source, MemorySource) else None

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self._size // self.block_size)

    # ------------------------------------------------------------------ asking

    def peek(self, block: int) -> tuple[memoryview | None] | None:
        """A block that is at hand, as ``(data,)`` (``(None,)``: zeros); None if it is not."""
        if block in self._kept:
            self._kept.move_to_end(block)
            return (self._kept[block],)
        if self._now is not None:
            length = self.block_size
            start = block * length
            if start + length > self._size:
                length = self._size - start
            try:
                data = self._now(start, length)
                if data is not None:
                    data = check_length(data, length, offset=start)
                    return (self._whole_pages(data, length),)
            except BaseException as error:
                # What it cannot do so it may still be able to do by `read`.
                self._now = None
                if ends_the_program(error):
                    tell_loop(asyncio.get_running_loop(), "", error)
                self.tally.last_error = describe(error)
                log.error(
                    "%r: its source's read_now is not used any more: %s", self, describe(error)
                )
        return None

    def want(self, block: int, wanter: Wanter) -> None:
        """Somebody waits for ``block``: ``wanter`` is told, later, when it has come."""
        flight = self._flights.get(block)
        if flight is None or not (flight.running or flight.urgent):
            # One that waits behind others, as part of a longer one, may take long.
            queued, flight = flight, _Flight(block, 1, True)
            if queued is not None:
                flight.wanters[block] = queued.wanters.pop(block, [])
            self._flights[block] = flight
            self._number += 1
            heapq.heappush(self._queue, (wanter.share.used, self._number, flight))
            wanter.share.used += FLIGHT
        elif not flight.waited:
            # It was nobody's until now, and had all the time in the world.
            flight.waited = True
            flight.since = time.monotonic()
            if flight.limit is not None and self._deadline is not None:
                now = asyncio.get_running_loop().time()
                flight.limit.reschedule(now + self._deadline)
        flight.wanters.setdefault(block, []).append(wanter)
        self._start()

    def like(self, first: int, count: int, wanter: Wanter) -> None:
        """``count`` blocks from ``first`` on would be good to have, behind what is waited for."""
        end = min(first + count, self.blocks)
        run: _Flight | None = None
        for block in range(first, end):
            flight = self._flights.get(block)
            if flight is None:
                if run is None:
                    run = _Flight(block, 0, False)
                    self._background.append(run)
                run.count += 1
                self._flights[block] = flight = run
            else:
                run = None
            flight.wanters.setdefault(block, []).append(wanter)
        self._start()

    def forget(self, wanter: Wanter, block: int) -> None:
        """``wanter`` does not want ``block`` any more. What nobody wants is not fetched."""
        flight = self._flights.get(block)
        if flight is None:
            return
        left = [other for other in flight.wanters.get(block, ()) if other is not wanter]
        if left:
            flight.wanters[block] = left
        else:
            flight.wanters.pop(block, None)
        if not flight.wanters and not flight.running:
            self._drop(flight)

    def _drop(self, flight: _Flight) -> None:
        for block in range(flight.first, flight.first + flight.count):
            if self._flights.get(block) is flight:
                del self._flights[block]
        flight.count = 0  # whoever finds it in a queue passes on

    # ----------------------------------------------------------------- flights

    def _next(self) -> _Flight | None:
        """The next flight: an urgent one, else one of the background."""
        while self._queue:
            flight = heapq.heappop(self._queue)[2]
            if flight.count:
                return flight
        while self._background and self._running_background < MAX_BACKGROUND:
            flight = self._background.popleft()
            if any(self._flights.get(block) is flight for block in _blocks(flight)):
                return flight
        return None

    def _start(self) -> None:
        while len(self._tasks) < MAX_FLIGHTS and not self._closed:
            flight = self._next()
            if flight is None:
                return
            flight.running = True
            self._running_background += not flight.urgent
            task = asyncio.get_running_loop().create_task(self._fly(flight))
            self._tasks[task] = flight
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        flight = self._tasks.pop(task)
        self._running_background -= not flight.urgent
        if not task.cancelled():
            error = task.exception()
            # What ends the program has ended the loop already.
            if error is not None and not ends_the_program(error):
                tell_loop(task.get_loop(), f"a flight of {self!r} broke", error)
        if not self._closed:
            self._start()

    async def _fly(self, flight: _Flight) -> None:
        started = time.monotonic()
        self.tally.flights += 1
        try:
            pieces = await self._attempts(flight)
        except BaseException as error:
            wanted = self._take(flight)
            if isinstance(error, asyncio.CancelledError):
                error = ClosedError("the server is closing")
            if isinstance(error, Exception):
                self._tell_failed(wanted, error)
            if not isinstance(error, SourceError | ClosedError):
                raise
            return
        self.tally.landed(time.monotonic() - started)
        wanted = self._take(flight)
        for block, data in pieces:
            self._put(block, data)
            for wanter in wanted.get(block, ()):
                # What one cannot take must not keep it from the others.
                try:
                    wanter.landed(self, block, data)
                except Exception as bug:
                    wanter.broken(bug)

    def _tell_failed(self, wanted: dict[int, list[Wanter]], error: BaseException) -> None:
        for block, wanters in wanted.items():
            for wanter in wanters:
                try:
                    wanter.failed(self, block, error)
                except Exception as bug:
                    wanter.broken(bug)

    def _take(self, flight: _Flight) -> dict[int, list[Wanter]]:
        self._drop(flight)
        wanted, flight.wanters = flight.wanters, {}
        return wanted

    async def _attempts(self, flight: _Flight) -> list[tuple[int, memoryview | None]]:
        pause, task = RETRY_FIRST, asyncio.current_task()
        while True:
            try:
                if self._deadline is None:
                    return await self._read(flight)
                left = max(0.001, flight.since + self._deadline - time.monotonic())
                async with asyncio.timeout(left if flight.waited else None) as flight.limit:
                    return await self._read(flight)
            except BaseException as failure:
                if is_ours(failure, task):
                    raise
                error = as_source_error(failure)
            finally:
                flight.limit = None
            self.tally.last_error = str(error)
            if isinstance(error, SourceChangedError) or not flight.wanters:
                self.tally.failures += 1
                raise error
            if self._deadline is not None and (
                not error.transient or time.monotonic() >= flight.since + self._deadline
            ):
                self.tally.failures += 1
                raise error
            self.tally.retries += 1
            delay = pause_after(error, pause * (0.5 + random.random()))
            log.log(
                logging.WARNING if pause >= 1 else logging.INFO,
                "%r, block %d: %s; next try in %.2f s", self, flight.first, error, delay,
            )  # fmt: skip
            if self._deadline is not None and flight.waited:
                delay = min(delay, max(0.0, flight.since + self._deadline - time.monotonic()))
            await asyncio.sleep(delay)
            pause = min(pause * 2, RETRY_LONGEST)

    async def _read(self, flight: _Flight) -> list[tuple[int, memoryview | None]]:
        size = self.block_size
        start, end = flight.first * size, min((flight.first + flight.count) * size, self._size)
        if self._holes is not None:
            holes = check_holes(await self._holes(start, end - start), start, end - start)
            if any(offset <= start and offset + length >= end for offset, length in holes):
                return [(block, None) for block in _blocks(flight)]
        length = end - start
        data = check_length(await self.source.read(start, length), length, offset=start)
        self.tally.fetched_bytes += length
        return [
            (block, self._whole_pages(data[at : at + size], min(size, length - at)))
            for block, at in zip(_blocks(flight), range(0, length, size), strict=True)
        ]

    @staticmethod
    def _whole_pages(data: memoryview, length: int) -> memoryview:
        rest = -length % PAGE
        return memoryview(bytes(data) + bytes(rest)) if rest else data

    def _put(self, block: int, data: memoryview | None) -> None:
        """Keep a block for the next who wants it, as long as there is room."""
        size = self._cost(data)
        if block in self._kept or size > self._keep:
            return
        self._kept[block] = data
        self._kept_bytes += size
        while self._kept_bytes > self._keep:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= self._cost(old)

    def _cost(self, data: memoryview | None) -> int:
        return self.block_size if data is not None else ZEROS_COST

    # -------------------------------------------------------------------- end

    async def aclose(self) -> None:
        """Cancel what is under way, whose wanters are told, and close the source; if that fails, it
        is logged. Idempotent."""
        self._closed = True
        await self._life.close(self._aclose)

    async def _aclose(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        try:
            await end_all(self, tasks)
        finally:
            for flight in set(self._flights.values()):
                self._tell_failed(self._take(flight), ClosedError("the server is closing"))
            self._kept.clear()
            await self._close_source()

    def __repr__(self) -> str:
        return f"<BlockStore {type(self.source).__name__} {self._size} bytes>"


def _blocks(flight: _Flight) -> range:
    return range(flight.first, flight.first + flight.count)
