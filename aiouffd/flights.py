"""Flights: fetching blocks of a region from a source, on one loop.

A flight is one run of blocks that is being fetched: the unit of waiting, retrying and
cancelling. However many threads touch a block, the native page table lets one flight
have it. Blocks that threads wait for go before readahead; a flight that was readahead and is
touched becomes wanted.

What a blocked thread gets (``errors`` and ``deadline`` are those of `aiouffd.open`):

- the source fails for a while: it waits; retries back off with jitter, for ever if hard;
- soft, and the deadline has passed or the failure is not transient: SIGBUS for raw
  touches, SourceError from the calls of the buffer; a later fetch heals the page;
- soft, and the kernel cannot take the bytes: the same, after a while, also without a deadline;
- the source has changed: the same at once, also if hard, because waiting cannot help;
- the flight is cancelled: it is woken and faults again, which makes a new flight;
- the region closes: see `Region.close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .backoff import pause_after
from .errors import (
    AiouffdError,
    ClosedError,
    KernelError,
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
)
from .once import abandon
from .readahead import Readahead, Reads
from .region import Errors, Region
from .sources.base import Source, as_source_error
from .tally import Tally
from .transfer import Begun, Mover, Progress
from .usercode import Complaints, describe, is_ours

__all__ = ["Fetcher", "FlightCancelledError", "FlightEvent", "Policy"]

log = logging.getLogger("aiouffd")

#: First and longest pause between two tries, in seconds.
RETRY_FIRST, RETRY_LONGEST = 0.05, 10.0
#: Seconds for which errors="soft" takes errors of the kernel for passing ones, deadline or not.
KERNEL_PATIENCE = 5.0
#: Flights of one fetcher that run at a time, and how many of them may be prefetch.
MAX_FLIGHTS, MAX_PREFETCH = 32, 24
#: Failures in a row after which prefetching is given up, and the pause after each, in seconds.
PREFETCH_FAILURES, PREFETCH_PAUSE = 8, 0.1


class FlightCancelledError(SourceError):
    """Somebody has cancelled the task of a flight. Who waits for its blocks asks again."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What to do when the source fails."""

    errors: Errors = "hard"
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class FlightEvent:
    """A finished flight, for ``trace=``: bytes ``offset`` to ``offset + length``, seconds."""

    offset: int
    length: int
    started: float
    finished: float
    cause: str  # "fault", "readahead", "fetch" or "prefetch"


class Flight:
    """A run of blocks under way. Await `wait` for its end."""

    __slots__ = ("_done", "_pause", "begun", "cause", "count", "error", "finished", "first",
                 "since", "started", "task", "wanted")  # fmt: skip

    def __init__(self, first: int, count: int, cause: str) -> None:
        self.first = first
        self.count = count
        self.cause = cause
        self.wanted = cause in ("fault", "fetch")
        self.since = self.started = time.monotonic()
        # What brings it: a task, or for a small one what is under way without.
        self.task: asyncio.Task[None] | None = None
        self.begun: Begun | None = None
        self.error: BaseException | None = None
        self.finished = False
        self._done: asyncio.Future[None] | None = None
        # While it waits for its next try.
        self._pause: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Until it has landed; raises what made it fail."""
        if not self.finished:
            if self._done is None:
                self._done = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._done)
        if self.error is not None:
            raise self.error

    async def pause(self, seconds: float) -> None:
        """Between two tries; `ask_now` cuts it short."""
        loop = asyncio.get_running_loop()
        self._pause = loop.create_future()
        timer = loop.call_later(seconds, self.ask_now)
        try:
            await self._pause
        finally:
            timer.cancel()
            self._pause = None

    def ask_now(self) -> None:
        """Try again without waiting any longer, if it waits for that."""
        if self._pause is not None and not self._pause.done():
            self._pause.set_result(None)

    def dismiss(self) -> None:
        """Who awaits it gets ClosedError; it goes on for threads that wait."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(ClosedError("the buffer is closed"))
            self._done.exception()  # whether anybody still waits or not

    def finish(self, error: BaseException | None) -> None:
        self.error = error
        self.finished = True
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


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
        self._policy = policy
        self._tally = tally
        self._failures = failures
        self._readahead = readahead
        self._reads = reads or Reads()
        self._flight_blocks = flight_blocks
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._flights: dict[int, Flight] = {}
        self._running = 0
        self._urgent: deque[Flight] = deque()
        self._later: deque[Flight] = deque()
        self._complaints = Complaints(self._loop)
        self._mover = Mover(region, source, tally, failures, self._landed, self._complaints)
        # A deadline needs a timer, and so a task.
        self._direct = policy.deadline is None
        self._closed = False
        #: While somebody records: blocks that were needed, in order.
        self.recording: dict[int, None] | None = None

    # ------------------------------------------------------------- the sink

    def miss(self, block: int, *_message: int) -> None:
        """A thread waits for ``block``, whose fetch is ours now."""
        if self.recording is not None:
            self.recording.setdefault(block)
        if block in self._flights:
            # The rescue loop has told us of it while it was under way here.
            self.hit(block)
            return
        self._tally.faults += 1
        self._launch(Flight(block, 1, "fault"))
        self._read_ahead(block)

    def under_way(self, block: int) -> Flight | None:
        """The flight that has ``block``."""
        return self._flights.get(block)

    def hit(self, block: int) -> None:
        """A thread waits for ``block``, which is in flight."""
        if self.recording is not None:
            self.recording.setdefault(block)
        self._tally.faults += 1
        flight = self._flights.get(block)
        if flight is not None and not flight.wanted:
            flight.wanted = True
            flight.since = time.monotonic()
            if flight.task is None and flight.begun is None:
                with contextlib.suppress(ValueError):
                    self._later.remove(flight)
                    self._urgent.append(flight)
                self._fill()
        self._read_ahead(block)

    def ask(self, first: int, last: int, read: tuple[int, int]) -> None:
        """A thread is about to wait for blocks, a part of those that it reads in one go, ``read``:
        bring them together, and with the last part more if that read continues others."""
        if self.recording is not None:
            for block in range(first, last + 1):
                self.recording.setdefault(block)
        if self._closed or self._region.closed:
            return
        for run_first, run_count in self._take(first, last - first + 1, heal=False):
            self._launch(Flight(run_first, run_count, "fetch"))
        if self._readahead is not None and self.recording is None and last == read[1]:
            self._launch_ahead(self._readahead.read(*read))

    def _read_ahead(self, block: int) -> None:
        if self._readahead is None or self.recording is not None or block in self._reads:
            return
        self._launch_ahead(self._readahead.touch(block))

    def _launch_ahead(self, runs: list[tuple[int, int]]) -> None:
        for first, count in runs:
            for run_first, run_count in self._take(first, count, heal=False):
                self._launch(Flight(run_first, run_count, "readahead"))

    def _take(self, first: int, count: int, *, heal: bool) -> list[tuple[int, int]]:
        """Own what can be owned of a range, as runs of at most one flight's length."""
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
                    self._launch(flight)
                    mine.append(flight)
                for other in range(block, block + step):
                    under_way = self._flights.get(other)
                    if under_way is not None and (not mine or mine[-1] is not under_way):
                        under_way.wanted = True
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
                    flight = Flight(run_first, run_count, "prefetch")
                    self._launch(flight)
                    mine.append(flight)
                await settle(MAX_PREFETCH - 1)
                if failures >= PREFETCH_FAILURES or self._closed:
                    return False
        await settle(0)
        return failures < PREFETCH_FAILURES

    # -------------------------------------------------------------- flights

    def _launch(self, flight: Flight) -> None:
        if self._closed:
            # Who was woken by the end of a flight has asked again. The region closes soon, and
            # tells whoever waits; until then the blocks stay taken.
            flight.finish(ClosedError("the buffer is closed"))
            return
        for block in range(flight.first, flight.first + flight.count):
            self._flights[block] = flight
        if self._running < MAX_FLIGHTS:
            self._start(flight)
        else:
            (self._urgent if flight.wanted else self._later).append(flight)

    def _start(self, flight: Flight) -> None:
        self._running += 1
        self._tally.flights += 1
        flight.started = time.monotonic()
        if self._direct and flight.count == 1:
            region = self._region
            offset = flight.first * region.block_size
            length = min(region.block_size, region.length - offset)
            flight.begun = self._mover.begin(offset, length, flight)
            if flight.begun is not None:
                return
        self._begin(flight)

    def _landed(self, flight: Flight, error: BaseException | None) -> None:
        """The end of a flight that had no task."""
        flight.begun = None
        if error is None:
            self._settle(flight, None)
        elif not self._closed:
            # The failure policy is a task's business, and it begins with a try of its own.
            self._begin(flight)

    def _fill(self) -> None:
        while self._running < MAX_FLIGHTS and (self._urgent or self._later) and not self._closed:
            self._start(self._urgent.popleft() if self._urgent else self._later.popleft())

    def _begin(self, flight: Flight) -> None:
        def ended(_task: asyncio.Task[None]) -> None:
            # A task that is cancelled before its first step does nothing at all.
            if not flight.finished:
                self._settle(flight, self._end_of_flight())

        flight.task = self._loop.create_task(self._fly(flight))
        flight.task.add_done_callback(ended)

    async def _fly(self, flight: Flight) -> None:
        error: BaseException | None = None
        try:
            await self._attempts(flight)
        except (SourceError, ClosedError) as failure:
            error = failure
        except BaseException:
            # The task was cancelled, or the program ends. Whoever waits asks again.
            error = self._end_of_flight()
            raise
        finally:
            self._settle(flight, error)

    def _end_of_flight(self) -> AiouffdError:
        if self._closed:
            return ClosedError("the buffer is closed")
        return FlightCancelledError("somebody has cancelled the fetch", hint="try again")

    def _settle(self, flight: Flight, error: BaseException | None) -> None:
        """A flight has ended: tell who waits, and start what waited for its place."""
        finished = time.monotonic()
        self._running -= 1
        self._withdraw(flight)
        if error is not None and not self._region.closed:
            # Whoever waits still is woken, and faults again or finds the poison.
            self._region.end(flight.first, flight.count)
        elif error is None:
            self._tally.landed(finished - flight.started)
            if flight.cause == "readahead" and self._readahead and not self._closed:
                self._launch_ahead(self._readahead.landed(flight.first, flight.count))
        flight.finish(error)
        if self._urgent or self._later:
            self._fill()
        if self._trace is not None and error is None:
            self._tell_trace(self._trace, flight, finished)

    def _tell_trace(
        self, trace: Callable[[FlightEvent], None], flight: Flight, finished: float
    ) -> None:
        size = self._region.block_size
        event = FlightEvent(
            flight.first * size, flight.count * size, flight.started, finished, flight.cause
        )
        try:
            trace(event)
        except BaseException as error:
            self._complaints.make("the trace callback", error)

    async def _attempts(self, flight: Flight) -> None:
        pause = RETRY_FIRST
        progress = Progress(flight.first * self._region.block_size)
        end = min((flight.first + flight.count) * self._region.block_size, self._region.length)
        task = asyncio.current_task()
        # Since when the kernel has not taken the bytes.
        refused: float | None = None
        while True:
            before = progress.offset
            try:
                await self._with_deadline(flight, progress, end)
                return self._arrived(flight, progress, end)
            except BaseException as failure:
                if is_ours(failure, task):
                    raise
                if self._region.closed or self._closed:
                    raise ClosedError("the buffer is closed") from None
                if progress.offset >= end and not isinstance(failure, SourceError):
                    self._complaints.make("a source that had delivered all", failure)
                    return self._arrived(flight, progress, end)
                error = as_source_error(failure)
                if not isinstance(failure, KernelError):
                    refused = None
                elif refused is None or progress.offset > before:
                    refused = time.monotonic()
            self._tally.last_error = describe(error)
            if progress.offset > before:
                pause = RETRY_FIRST
            if not flight.wanted and not self._wanted(flight):
                # Nobody waits: leave it, a touch will ask again.
                raise error
            if self._hopeless(error, flight, refused):
                self._tally.failures += 1
                if not self._poison(flight, progress.offset, error):
                    # Who waits asks again: not at once, for nothing has changed.
                    await flight.pause(RETRY_FIRST)
                raise error
            self._tally.retries += 1
            delay = pause_after(error, pause * (0.5 + random.random()))
            log.log(
                logging.WARNING if pause >= 1 else logging.INFO,
                "bytes %d-%d: %s; next try in %.2f s",
                progress.offset,
                end,
                self._tally.last_error,
                delay,
            )
            if self._policy.errors == "soft" and self._policy.deadline is not None:
                left = flight.since + self._policy.deadline - time.monotonic()
                delay = min(delay, max(left, 0.001))
            await flight.pause(delay)
            pause = min(pause * 2, RETRY_LONGEST)

    def _arrived(self, flight: Flight, progress: Progress, end: int) -> None:
        """Pages may be dropped while others of their block are on the way. (One install of
        whole blocks sees to that by itself.) Who waits for them asks again."""
        if progress.pieces <= 1:
            return
        start = flight.first * self._region.block_size
        if not self._region.is_resident(start, end - start):
            self._region.end(flight.first, flight.count)

    def _wanted(self, flight: Flight) -> bool:
        """Whether threads wait for blocks of a readahead flight; they stay ours then."""
        waiting = self._region.end(flight.first, flight.count, keep_wanted=True)
        if not waiting:
            return False
        # Take back what was let go, unless somebody was faster.
        self._region.begin(flight.first, flight.count)
        flight.wanted = True
        return True

    async def _with_deadline(self, flight: Flight, progress: Progress, end: int) -> None:
        deadline = self._policy.deadline
        if self._policy.errors == "hard" or deadline is None:
            await self._mover.move(progress, end)
            return
        left = flight.since + deadline - time.monotonic()
        limit = asyncio.timeout(max(left, 0.001))
        try:
            async with limit:
                await self._mover.move(progress, end)
        except TimeoutError as late:
            if not limit.expired():
                raise  # the source's own
            raise SourceTimeoutError(
                f"bytes {progress.offset}-{end} did not arrive within {deadline} s"
            ) from late

    def _hopeless(self, error: SourceError, flight: Flight, refused: float | None) -> bool:
        if isinstance(error, SourceChangedError):
            return True
        if self._policy.errors == "hard":
            return False
        now = time.monotonic()
        if not error.transient or (refused is not None and now >= refused + KERNEL_PATIENCE):
            return True
        deadline = self._policy.deadline
        return deadline is not None and now >= flight.since + deadline

    def _poison(self, flight: Flight, offset: int, error: SourceError) -> bool:
        """An error instead of bytes, for the blocks that are not there yet. False if the kernel
        does not take that either."""
        size = self._region.block_size
        done = True
        for block in range(offset // size, flight.first + flight.count):
            self._failures[block] = error
            start = block * size
            length = min(size, self._region.mapped_length - start)
            try:
                self._region.poison(start, length)
            except AiouffdError as problem:
                done = False
                self._complaints.make("making an error of pages that cannot be had", problem)
        return done or self._region.closed

    # ----------------------------------------------------------------- close

    @property
    def in_flight(self) -> int:
        """Flights that run or wait to run."""
        return self._running + len(self._urgent) + len(self._later)

    @property
    def orphaned(self) -> bool:
        """Whether its loop is closed, with all that ran there."""
        return self._loop.is_closed()

    def dismiss(self) -> None:
        """Coroutines that wait for flights get ClosedError; the flights go on."""
        for flight in set(self._flights.values()):
            flight.dismiss()

    def cancel(self, *, give_back: bool = False) -> list[asyncio.Task[None]]:
        """Stop: cancels what runs, fails what waits. Returns the tasks to await.

        The region closes next and tells whoever waits; or with ``give_back`` another fetcher takes
        over, and whoever waits faults again.
        """
        self._closed = True
        closed = ClosedError("the buffer is closed")
        for flight in (*self._urgent, *self._later):
            self._withdraw(flight)
            flight.finish(closed)
            if give_back and not self._region.closed:
                self._region.end(flight.first, flight.count)
        self._urgent.clear()
        self._later.clear()
        tasks = []
        for flight in set(self._flights.values()):
            if flight.begun is not None:
                flight.begun.cancel()
                self._settle(flight, closed)
            elif flight.task is not None and not flight.task.done():
                flight.task.cancel()
                tasks.append(flight.task)
        return tasks

    def abandon(self) -> None:
        """Its loop was closed: what was under way never goes on, which nobody need be told."""
        self._closed = True
        for flight in set(self._flights.values()):
            if flight.task is not None:
                abandon(flight.task)

    def _withdraw(self, flight: Flight) -> None:
        flights = self._flights
        for block in range(flight.first, flight.first + flight.count):
            if flights.get(block) is flight:
                del flights[block]
