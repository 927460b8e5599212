"""Fetching the blocks of a region from a source: the destination of flights that are pages.

The native page table lets one flight have a block, however many threads touch it, on whatever loop
it is. What readahead brings goes behind what threads wait for.

What a blocked thread gets (``errors`` and ``deadline`` are those of `aiouffd.open`):

- the source fails for a while: it waits; retries back off with jitter, for ever if hard;
- soft, and the deadline has passed or the failure is not transient: SIGBUS for raw
  touches, SourceError from the calls of the buffer; a later fetch heals the page;
- soft, and the kernel cannot take the bytes: the same, after a while, also without a deadline;
- the source has changed, or says that it is used wrongly (UsageError, NotImplementedError): the
  same at once, also if hard, because waiting cannot help;
- the flight is cancelled: it is woken and faults again, which makes a new flight;
- the region closes: see `Region.close`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import AiouffdError, SourceError
from ..regions.region import Region
from ..sources.base import Source
from ..util.usercode import Complaints
from .flights import Flight, FlightCancelledError, Flights
from .policy import Policy
from .readahead import Readahead, Reads
from .tally import Tally
from .transfer import Mover

__all__ = ["Fetcher", "FlightEvent"]

#: Flights of one fetcher that run at a time, and how many of them may be prefetch.
MAX_FLIGHTS, MAX_PREFETCH = 32, 24
#: Failures in a row after which prefetching is given up, and the pause after each, in seconds.
PREFETCH_FAILURES, PREFETCH_PAUSE = 8, 0.1


@dataclass(frozen=True, slots=True)
class FlightEvent:
    """A finished flight, for ``trace=``: bytes ``offset`` to ``offset + length``, seconds."""

    offset: int
    length: int
    started: float
    finished: float
    cause: str  # "fault", "readahead", "fetch" or "prefetch"


class Fetcher:
    """Fetches the blocks of ``region`` from ``source``, on the loop that runs it.

    ``source`` is open. Not thread-safe. ``failures`` maps blocks to the error that poisoned them.
    """

    def __init__(
        self,
        region: Region,
        source: Source,
        *,
        policy: Policy,
        tally: Tally,
        failures: dict[int, BaseException],
        readahead: Readahead | None = None,
        reads: Reads | None = None,
        flight_blocks: int = 16,
        trace: Callable[[FlightEvent], None] | None = None,
    ) -> None:
        self._region = region
        self._tally = tally
        self._failures = failures
        self._readahead = readahead
        self._reads = reads or Reads()
        self._flight_blocks = flight_blocks
        self._trace = trace
        self._complaints = Complaints(asyncio.get_running_loop())
        self._give_back = False
        self.block_size, self.length = region.block_size, region.length
        self._mover = Mover(region, source, tally, failures, self._complaints)
        self._what = type(source).__name__
        self.bring = self._mover.move
        self.flights: Flights[Flight] = Flights(
            self,
            policy,
            tally,
            self._complaints,
            closed="the buffer is closed",
            most=MAX_FLIGHTS,
            begin=self._mover.begin if self._mover.begins else None,
        )
        self._mover.landed = self.flights.landed
        #: While somebody records: blocks that were needed, in order.
        self.recording: dict[int, None] | None = None

    # ------------------------------------------------------------- the sink

    def miss(self, block: int, address: int = 0, *_message: int) -> None:
        """A thread waits for ``block``, whose fetch is ours now. ``address``: from a message, which
        is to say that no task runs."""
        if self.recording is not None:
            self.recording.setdefault(block)
        if block in self.flights.of:
            # The rescue loop has told us of it while it was under way here.
            self.hit(block)
            return
        self._tally.faults += 1
        self.flights.launch(Flight(block, 1, "fault"), eagerly=address != 0)
        if self._readahead is not None:
            self._read_ahead(block)

    def under_way(self, block: int) -> Flight | None:
        """The flight that has ``block``."""
        return self.flights.of.get(block)

    def hit(self, block: int) -> None:
        """A thread waits for ``block``, which is in flight."""
        if self.recording is not None:
            self.recording.setdefault(block)
        self._tally.faults += 1
        flight = self.flights.of.get(block)
        if flight is not None:
            self.flights.want(flight)
        self._read_ahead(block)

    def ask(self, first: int, last: int, read: tuple[int, int]) -> None:
        """A thread is about to wait for blocks, a part of those that it reads in one go, ``read``:
        bring them together, and with the last part more if that read continues others."""
        if self.recording is not None:
            for block in range(first, last + 1):
                self.recording.setdefault(block)
        if self.gone:
            return
        for run_first, run_count in self._take(first, last - first + 1, heal=False):
            self.flights.launch(Flight(run_first, run_count, "fetch"))
        if self._readahead is not None and self.recording is None and last == read[1]:
            self._launch_ahead(self._readahead.read(*read))

    def _read_ahead(self, block: int) -> None:
        if self._readahead is None or self.recording is not None or block in self._reads:
            return
        self._launch_ahead(self._readahead.touch(block))

    def _launch_ahead(self, runs: list[tuple[int, int]]) -> None:
        for first, count in runs:
            for run_first, run_count in self._take(first, count, heal=False):
                self.flights.launch(Flight(run_first, run_count, "readahead", wanted=False))

    def _take(self, first: int, count: int, *, heal: bool) -> list[tuple[int, int]]:
        """Claim the unclaimed blocks of a range, as runs of at most one flight's length."""
        runs: list[tuple[int, int]] = []
        for block in self._region.begin(first, count, heal=heal):
            # Flights end where huge pages do, so that most of them fill whole ones.
            if runs and sum(runs[-1]) == block and block % self._flight_blocks:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        return runs

    async def fetch(
        self, first: int, count: int, landed: Callable[[int], None] | None = None
    ) -> None:
        """Make blocks resident; heals poisoned ones. Raises what the source raised. ``landed`` is
        told of blocks before which all are there.

        Where a flight waits for its next try it is made at once, whatever the source had asked for.
        """
        if self.recording is not None:
            for block in range(first, first + count):
                self.recording.setdefault(block)
        window = 4 * self._flight_blocks
        mine: deque[Flight] = deque()
        block, end = first, first + count
        while block < end or mine:
            while block < end and len(mine) < 8:
                step = min(window, end - block)
                for run_first, run_count in self._take(block, step, heal=True):
                    flight = Flight(run_first, run_count, "fetch")
                    self.flights.launch(flight)
                    mine.append(flight)
                for other in range(block, block + step):
                    under_way = self.flights.of.get(other)
                    if under_way is not None and (not mine or mine[-1] is not under_way):
                        self.flights.want(under_way)
                        under_way.ask_now()
                        mine.append(under_way)
                block += step
            if mine:
                flight = mine.popleft()
                # What was cancelled is missing still, which our caller sees.
                with contextlib.suppress(FlightCancelledError):
                    await flight.wait()
                if landed is not None:
                    landed(min(flight.first + flight.count, end))

    async def prefetch(self, runs: Iterable[tuple[int, int]]) -> bool:
        """Bring runs of blocks before anybody waits for them, in this order, behind what somebody
        waits for. False if the source failed so often that the rest was left to touches."""
        mine: deque[Flight] = deque()
        failures = 0

        async def settle(most: int) -> None:
            nonlocal failures
            while len(mine) > most and failures < PREFETCH_FAILURES:
                try:
                    await mine.popleft().wait()
                    failures = 0
                except SourceError:
                    failures += 1
                    await asyncio.sleep(PREFETCH_PAUSE)

        for first, count in runs:
            for block in range(first, first + count, self._flight_blocks):
                some = min(self._flight_blocks, first + count - block)
                for run_first, run_count in self._take(block, some, heal=False):
                    flight = Flight(run_first, run_count, "prefetch", wanted=False)
                    self.flights.launch(flight)
                    mine.append(flight)
                await settle(MAX_PREFETCH - 1)
                if failures >= PREFETCH_FAILURES or self.flights.closed:
                    return False
        await settle(0)
        return failures < PREFETCH_FAILURES

    # -------------------------------------------------- what flights ask of us

    @property
    def gone(self) -> bool:
        """Whether nothing can be delivered any more."""
        return self.flights.closed or self._region.closed

    def arrived(self, flight: Flight) -> None:
        """Pages may be dropped while others of their block are on the way. (One install of
        whole blocks sees to that by itself.) Who waits for them asks again."""
        start = flight.first * self.block_size
        if not self._region.is_resident(start, flight.end - start):
            self._region.end(flight.first, flight.count)

    def still_wanted(self, flight: Flight) -> bool:
        """Whether threads wait for blocks of a readahead flight; they stay ours then."""
        waiting = self._region.end(flight.first, flight.count, keep_wanted=True)
        if not waiting:
            return False
        # Take back what was let go, unless somebody was faster.
        self._region.begin(flight.first, flight.count)
        flight.wanted = True
        return True

    def give_up(self, flight: Flight, error: SourceError) -> bool:
        """An error instead of bytes, for the blocks that are not there yet. False if the kernel
        does not take that either."""
        size = self.block_size
        done = True
        for block in range(flight.offset // size, flight.first + flight.count):
            self._failures[block] = error
            start = block * size
            length = min(size, self._region.mapped_length - start)
            try:
                self._region.poison(start, length)
            except AiouffdError as problem:
                done = False
                self._complaints.make("making an error of pages that cannot be had", problem)
        return done or self._region.closed

    def ended(self, flight: Flight, error: BaseException | None, finished: float) -> None:
        """Readahead goes on where this flight has ended; who waits still is woken, and faults
        again or finds the poison."""
        if error is not None:
            if not self._region.closed:
                self._region.end(flight.first, flight.count)
            return
        if flight.cause == "readahead" and self._readahead and not self.flights.closed:
            self._launch_ahead(self._readahead.landed(flight.first, flight.count))
        if self._trace is not None:
            self._tell_trace(self._trace, flight, finished)

    def dropped(self, flight: Flight) -> None:
        """It never began. The region closes next and tells whoever waits, or another fetcher takes
        over, and whoever waits faults again."""
        if self._give_back and not self._region.closed:
            self._region.end(flight.first, flight.count)

    def name(self, flight: Flight) -> str:
        """What a flight brings, for the log."""
        return f"bytes {flight.offset}-{flight.end} of {self._what}"

    def _tell_trace(
        self, trace: Callable[[FlightEvent], None], flight: Flight, finished: float
    ) -> None:
        size = self.block_size
        event = FlightEvent(
            flight.first * size, flight.count * size, flight.started, finished, flight.cause
        )
        try:
            trace(event)
        except BaseException as error:
            self._complaints.make("the trace callback", error)

    # ----------------------------------------------------------------- close

    def cancel(self, *, give_back: bool = False) -> list[asyncio.Task[None]]:
        """Stop: cancels what runs, fails what waits. Returns the tasks to await.

        The region closes next and tells whoever waits; or with ``give_back`` another fetcher takes
        over, and whoever waits faults again.
        """
        self._give_back = give_back
        return self.flights.cancel()
