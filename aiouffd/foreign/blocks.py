"""The blocks of one object, for everybody who is served from it.

One flight per block, however many clients wait for it (`aiouffd.fetch.flights`). Among those who
wait goes first who has had least, so that one that wants much delays another by one flight and not
by all of its own. Blocks that were fetched are kept for a while: a thousand clones of one snapshot
read it once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, Protocol

from ..errors import ClosedError, SourceError, UsageError
from ..fetch.flights import Flight, Flights
from ..fetch.policy import Policy
from ..fetch.tally import Tally
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
from ..util.once import cancelled_from_outside
from ..util.pages import PAGE_SIZE
from ..util.usercode import Complaints, describe, ends_the_program, tell_loop
from .reactor import Share

__all__ = ["BlockStore", "Wanter", "end_all"]

log = logging.getLogger("aiouffd")

#: Bytes of one block, and of blocks that are kept; what one counts for that is all zeros.
BLOCK_SIZE, KEEP, ZEROS_COST = 64 * 1024, 64 << 20, 256
#: Flights at a time, and how many of them may be those that nobody waits for.
MAX_FLIGHTS, MAX_BACKGROUND = 64, 16
#: What a flight counts for in a client's share, in seconds of our time.
FLIGHT = 50e-6
#: Seconds that tasks may take to end once they were cancelled.
STUBBORN = 10.0
#: The granularity of offsets that blocks and areas have.
PAGE = PAGE_SIZE
#: What those get to read who wait when a store closes.
CLOSED = "the server is closing"


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
        """A block could not be had. After FlightCancelledError it can be asked for again."""

    def broken(self, error: Exception) -> None:
        """One of the above has raised, which is a bug of ours."""


class _Flight(Flight):
    """One whose blocks go to wanters."""

    __slots__ = ("data", "wanters")

    def __init__(self, first: int, count: int, *, wanted: bool) -> None:
        super().__init__(first, count, "client", wanted=wanted)
        self.wanters: dict[int, list[Wanter]] = {}
        #: The blocks, once they have come: bytes, or None for zeros.
        self.data: list[memoryview | None] = []


class BlockStore:
    """The blocks of ``source``, on the loop that opens it.

    :param source: a `Source`; opened by `open`, closed by `aclose`.
    :param block_size: bytes fetched at a time, a power of two and at least a page.
    :param keep: bytes of fetched blocks that are kept for the next who wants them.
    :param deadline: seconds after which a block that somebody waits for has failed; None: it is
        tried again for ever. Short for a ``policy``.
    """

    def __init__(
        self,
        source: Source,
        *,
        block_size: int = BLOCK_SIZE,
        keep: int = KEEP,
        deadline: float | None = None,
        policy: Policy | None = None,
    ) -> None:
        if block_size < PAGE or block_size & (block_size - 1):
            raise UsageError(f"the block size {block_size} is not a power of two from {PAGE} on")
        self.source = source
        self.block_size = block_size
        self.tally = Tally()
        self._keep = keep
        if policy is None:
            policy = Policy() if deadline is None else Policy("soft", deadline)
        self._policy = policy
        self._now: Callable[[int, int], Any] | None = getattr(source, "read_now", None)
        self._holes = own_method(source, "holes")
        self._kept: OrderedDict[int, memoryview | None] = OrderedDict()
        self._kept_bytes = 0
        self._engine: Flights[_Flight] | None = None
        self._closed = False
        self._size = 0
        self._life = Life("a store")

    #: Whether a failure may be tried again here at all.
    _retry = True

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

    @property
    def _flights(self) -> Flights[_Flight]:
        """Those of the loop that asks, which need not be the one that has made this."""
        if self._engine is None:
            self._engine = Flights(
                self,
                self._policy,
                self.tally,
                Complaints(asyncio.get_running_loop()),
                closed=CLOSED,
                most=MAX_FLIGHTS,
                background=MAX_BACKGROUND,
                retry=self._retry,
            )
            self._engine.closed = self._closed
        return self._engine

    def want(self, block: int, wanter: Wanter) -> None:
        """Somebody waits for ``block``: ``wanter`` is told, later, when it has come."""
        flights = self._flights
        flight = flights.of.get(block)
        if flight is None or not (flight.running or flight.wanted):
            # One that waits behind others, as part of a longer one, may take long.
            queued, flight = flight, _Flight(block, 1, wanted=True)
            if queued is not None:
                flight.wanters[block] = queued.wanters.pop(block, [])
            flight.wanters.setdefault(block, []).append(wanter)
            flights.launch(flight, wanter.share.used)
            if queued is not None and not any(flights.of.get(b) is queued for b in queued.blocks):
                flights.drop(queued)
            wanter.share.used += FLIGHT
        else:
            flights.want(flight)
            flight.wanters.setdefault(block, []).append(wanter)

    def like(self, first: int, count: int, wanter: Wanter) -> None:
        """``count`` blocks from ``first`` on would be good to have, behind what is waited for."""
        flights = self._flights
        end = min(first + count, self.blocks)
        runs: list[_Flight] = []
        for block in range(first, end):
            flight = flights.of.get(block)
            if flight is None:
                if not runs or runs[-1].first + runs[-1].count != block:
                    runs.append(_Flight(block, 0, wanted=False))
                flight = runs[-1]
                flight.count += 1
            flight.wanters.setdefault(block, []).append(wanter)
        for run in runs:
            flights.launch(run)

    def forget(self, wanter: Wanter, block: int) -> None:
        """``wanter`` does not want ``block`` any more. What nobody wants is not fetched."""
        flight = self._flights.of.get(block)
        if flight is None:
            return
        left = [other for other in flight.wanters.get(block, ()) if other is not wanter]
        if left:
            flight.wanters[block] = left
        else:
            flight.wanters.pop(block, None)
        if not flight.wanters and not flight.running:
            self._flights.drop(flight)

    # ---------------------------------------------- what flights ask of us

    @property
    def length(self) -> int:
        """Length of the object in bytes."""
        return self._size

    @property
    def gone(self) -> bool:
        """Whether nothing can be delivered any more."""
        return self._closed

    async def bring(self, flight: _Flight) -> None:
        """Fetch the blocks of a flight."""
        size = self.block_size
        start, length = flight.offset, flight.end - flight.offset
        if self._holes is not None:
            holes = check_holes(await self._holes(start, length), start, length)
            if any(offset <= start and offset + many >= flight.end for offset, many in holes):
                flight.data = [None] * flight.count
                return
        data = check_length(await self.source.read(start, length), length, offset=start)
        self.tally.fetched_bytes += length
        flight.data = [
            self._whole_pages(data[at : at + size], min(size, length - at))
            for at in range(0, length, size)
        ]

    def arrived(self, flight: _Flight) -> None:
        """Nothing: all of it comes at once."""

    def still_wanted(self, flight: _Flight) -> bool:
        """Whether anybody would like to have it."""
        return bool(flight.wanters)

    def give_up(self, flight: _Flight, error: SourceError) -> bool:
        """The wanters are told at the end."""
        return True

    def ended(self, flight: _Flight, error: BaseException | None, finished: float) -> None:
        """Hand the blocks over, or tell that they cannot be had."""
        wanters, flight.wanters = flight.wanters, {}
        if error is not None:
            self._tell_failed(wanters, error)
            return
        for block, data in zip(flight.blocks, flight.data, strict=True):
            self._put(block, data)
            for wanter in wanters.get(block, ()):
                # What one cannot take must not keep it from the others.
                try:
                    wanter.landed(self, block, data)
                except Exception as bug:
                    wanter.broken(bug)
        flight.data = []

    def dropped(self, flight: _Flight) -> None:
        """The store closes."""
        wanters, flight.wanters = flight.wanters, {}
        self._tell_failed(wanters, ClosedError(CLOSED))

    def name(self, flight: _Flight) -> str:
        """What a flight brings, for the log."""
        return f"{self!r}, bytes {flight.offset}-{flight.end}"

    def _tell_failed(self, wanted: dict[int, list[Wanter]], error: BaseException) -> None:
        for block, wanters in wanted.items():
            for wanter in wanters:
                try:
                    wanter.failed(self, block, error)
                except Exception as bug:
                    wanter.broken(bug)

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
        try:
            if self._engine is not None:
                await end_all(self, self._engine.cancel())
        finally:
            self._kept.clear()
            await self._close_source()

    def __repr__(self) -> str:
        return f"<BlockStore {type(self.source).__name__} {self._size} bytes>"
