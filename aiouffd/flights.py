"""Flights: fetching blocks of a region from a source, on one loop.

A flight is one run of blocks that is being fetched: the unit of waiting, retrying and
cancelling. However many threads touch a block, the native page table lets one flight
have it. Blocks that threads wait for go before readahead; a flight that was readahead and is
touched becomes wanted.

What a blocked thread gets (``errors`` and ``deadline`` are those of `aiouffd.open`):

- the source fails for a while: it waits; retries back off with jitter, for ever if hard;
- soft, and the deadline has passed or the failure is not transient: SIGBUS for raw
  touches, SourceError from the calls of the buffer; a later fetch heals the page;
- the source has changed: the same at once, also if hard, because waiting cannot help;
- the flight is cancelled: it is woken and faults again, which makes a new flight;
- the region closes: see `Region.close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import (
    AiouffdError,
    ClosedError,
    KernelError,
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
)
from .readahead import Readahead
from .region import Errors, Region
from .sources.base import Source, check_length, own_method, read_into_source
from .staging import HUGE, SMALL, Stages

__all__ = ["Fetcher", "FlightEvent", "Policy", "Tally"]

log = logging.getLogger("aiouffd")

#: First and longest pause between two tries, in seconds.
RETRY_FIRST, RETRY_LONGEST = 0.05, 10.0
#: Longest install in one native call (or one huge page), for the sake of the loop's latency.
INSTALL_STEP = 1024 * 1024
#: Flights of one fetcher that run at a time, and how many of them may be prefetch.
MAX_FLIGHTS, MAX_PREFETCH = 32, 24
#: Failures in a row after which prefetching is given up, and the pause after each, in seconds.
PREFETCH_FAILURES, PREFETCH_PAUSE = 8, 0.1


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


@dataclass(slots=True)
class Tally:
    """Counters of one buffer, shared by its fetchers."""

    faults: int = 0
    flights: int = 0
    fetched_bytes: int = 0
    readahead_bytes: int = 0
    retries: int = 0
    failures: int = 0
    rescued: int = 0
    last_error: str | None = None
    #: Finished flights by duration: item i counts those under 2**i milliseconds.
    seconds: list[int] = field(default_factory=lambda: [0] * 20)

    def landed(self, duration: float) -> None:
        self.seconds[min(19, max(0, int(duration * 1000)).bit_length())] += 1


class Flight:
    """A run of blocks under way. Await `wait` for its end."""

    __slots__ = ("_done", "cause", "count", "error", "finished", "first", "since", "task", "wanted")

    def __init__(self, first: int, count: int, cause: str) -> None:
        self.first = first
        self.count = count
        self.cause = cause
        self.wanted = cause in ("fault", "fetch")
        self.since = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self.error: BaseException | None = None
        self.finished = False
        self._done: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Until it has landed; raises what made it fail."""
        if not self.finished:
            if self._done is None:
                self._done = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._done)
        if self.error is not None:
            raise self.error

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
        flight_blocks: int = 16,
        trace: Callable[[FlightEvent], None] | None = None,
    ) -> None:
        self._region = region
        self._source = source
        self._policy = policy
        self._tally = tally
        self._failures = failures
        self._readahead = readahead
        self._flight_blocks = flight_blocks
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._flights: dict[int, Flight] = {}
        self._running = 0
        self._urgent: deque[Flight] = deque()
        self._later: deque[Flight] = deque()
        self._stages = Stages()
        self._step = max(INSTALL_STEP, region.page_size)
        self._movable = region.kind == "anonymous" and region.address % HUGE == 0
        self._closed = False
        #: While somebody records: blocks that were needed, in order.
        self.recording: dict[int, None] | None = None
        self._stream = own_method(source, "stream")
        self._read_into = own_method(source, "read_into")
        self._holes = own_method(source, "holes")

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
        if self._readahead is not None and self.recording is None:
            self._read_ahead(block)

    def hit(self, block: int) -> None:
        """A thread waits for ``block``, which is in flight."""
        if self.recording is not None:
            self.recording.setdefault(block)
        self._tally.faults += 1
        flight = self._flights.get(block)
        if flight is not None and not flight.wanted:
            flight.wanted = True
            flight.since = time.monotonic()
            if flight.task is None:
                with contextlib.suppress(ValueError):
                    self._later.remove(flight)
                    self._urgent.append(flight)
                self._fill()
        if self._readahead is not None and self.recording is None:
            self._read_ahead(block)

    def _read_ahead(self, block: int) -> None:
        assert self._readahead is not None
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

    async def fetch(self, first: int, count: int) -> None:
        """Make blocks resident; heals poisoned ones. Raises what the source raised."""
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
                        mine.append(under_way)
                block += step
            if mine:
                await mine.popleft().wait()

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
        for block in range(flight.first, flight.first + flight.count):
            self._flights[block] = flight
        if self._running < MAX_FLIGHTS:
            self._start(flight)
        else:
            (self._urgent if flight.wanted else self._later).append(flight)

    def _start(self, flight: Flight) -> None:
        self._running += 1
        self._tally.flights += 1
        flight.task = self._loop.create_task(self._fly(flight))

    def _fill(self) -> None:
        while self._running < MAX_FLIGHTS and (self._urgent or self._later) and not self._closed:
            self._start(self._urgent.popleft() if self._urgent else self._later.popleft())

    async def _fly(self, flight: Flight) -> None:
        error: BaseException | None = None
        started = time.monotonic()
        try:
            await self._attempts(flight)
        except asyncio.CancelledError as cancelled:
            error = ClosedError("the buffer is closed") if self._closed else cancelled
            raise
        except BaseException as failure:
            error = failure
            if not isinstance(failure, Exception):
                raise
        finally:
            finished = time.monotonic()
            self._running -= 1
            for block in range(flight.first, flight.first + flight.count):
                if self._flights.get(block) is flight:
                    del self._flights[block]
            if error is not None and not self._region.closed:
                # Whoever waits still is woken, and faults again or finds the poison.
                self._region.end(flight.first, flight.count)
            elif error is None:
                self._tally.landed(finished - started)
                if flight.cause == "readahead" and self._readahead and not self._closed:
                    self._launch_ahead(self._readahead.landed(flight.first, flight.count))
            flight.finish(error)
            if self._trace is not None and error is None:
                block_size = self._region.block_size
                self._trace(
                    FlightEvent(
                        flight.first * block_size,
                        flight.count * block_size,
                        started,
                        finished,
                        flight.cause,
                    )
                )
            self._fill()

    async def _attempts(self, flight: Flight) -> None:
        pause = RETRY_FIRST
        progress = _Progress(flight.first * self._region.block_size)
        end = min((flight.first + flight.count) * self._region.block_size, self._region.length)
        while True:
            before = progress.offset
            try:
                await self._with_deadline(flight, progress, end)
                if progress.pieces > 1:
                    self._see_to_dropped(flight, end)
                return
            except Exception as failure:
                if self._region.closed or self._closed:
                    raise ClosedError("the buffer is closed") from None
                error = self._as_source_error(failure)
            self._tally.last_error = f"{type(error).__name__}: {error}"
            if progress.offset > before:
                pause = RETRY_FIRST
            if not flight.wanted and not self._wanted(flight):
                # Nobody waits: leave it, a touch will ask again.
                raise error
            if self._hopeless(error, flight):
                self._tally.failures += 1
                self._poison(flight, progress.offset, error)
                raise error
            self._tally.retries += 1
            delay = max(pause * (0.5 + random.random()), error.retry_after or 0.0)
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
            await asyncio.sleep(delay)
            pause = min(pause * 2, RETRY_LONGEST)

    def _see_to_dropped(self, flight: Flight, end: int) -> None:
        """Pages may be dropped while others of their block are on the way. (One install of
        whole blocks sees to that by itself.) Who waits for them asks again."""
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

    async def _with_deadline(self, flight: Flight, progress: _Progress, end: int) -> None:
        deadline = self._policy.deadline
        if self._policy.errors == "hard" or deadline is None:
            await self._transfer(progress, end)
            return
        left = flight.since + deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0.001)):
                await self._transfer(progress, end)
        except TimeoutError as late:
            if isinstance(late, AiouffdError):
                raise
            raise SourceTimeoutError(
                f"bytes {progress.offset}-{end} did not arrive within {deadline} s"
            ) from late

    def _hopeless(self, error: SourceError, flight: Flight) -> bool:
        if isinstance(error, SourceChangedError):
            return True
        if self._policy.errors == "hard":
            return False
        if not error.transient:
            return True
        deadline = self._policy.deadline
        return deadline is not None and time.monotonic() >= flight.since + deadline

    @staticmethod
    def _as_source_error(failure: Exception) -> SourceError:
        if isinstance(failure, SourceError):
            return failure
        error = SourceError(
            f"reading the source failed: {type(failure).__name__}: {failure}",
            transient=isinstance(failure, KernelError),
        )
        error.__cause__ = failure
        return error

    def _poison(self, flight: Flight, offset: int, error: SourceError) -> None:
        """An error instead of bytes, for the blocks that are not there yet."""
        size = self._region.block_size
        for block in range(offset // size, flight.first + flight.count):
            self._failures[block] = error
            start = block * size
            length = min(size, self._region.mapped_length - start)
            with contextlib.suppress(AiouffdError):
                self._region.poison(start, length)

    # ------------------------------------------------------------- transfers

    async def _transfer(self, progress: _Progress, end: int) -> None:
        """Fetch and install bytes from ``progress`` to ``end``, moving ``progress`` along.

        Whole pages that the source knows to be zeros are not asked for.
        """
        if self._holes is not None:
            page = self._region.page_size
            for start, length in await self._holes(progress.offset, end - progress.offset):
                first = start + -start % page
                stop = start + length
                # The rest of the object's last page is zeros anyhow.
                stop = stop if stop == self._region.length else stop - stop % page
                if first < stop and first >= progress.offset:
                    await self._bring(progress, first)
                    await self._zero(progress, stop)
        await self._bring(progress, end)

    async def _zero(self, progress: _Progress, end: int) -> None:
        region, pause = self._region, 0.001
        while progress.offset < end:
            length = end - progress.offset
            try:
                region.zero(progress.offset, length + -length % region.page_size, heal=True)
            except KernelError as error:
                if error.errno != errno.EAGAIN:
                    raise
                self._advance(progress, error.done)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.1)
            else:
                self._advance(progress, length)

    async def _bring(self, progress: _Progress, end: int) -> None:
        length = end - progress.offset
        if length <= 0:
            return
        if self._stream is not None and length > SMALL:
            await self._by_stream(progress, end)
        elif self._read_into is not None:
            await self._by_stage(progress, end)
        else:
            data = check_length(
                await self._source.read(progress.offset, length), length, offset=progress.offset
            )
            self._tally.fetched_bytes += length
            for start in range(0, length, self._step):
                if start:
                    await asyncio.sleep(0)
                await self._install(progress, data[start : start + self._step])

    async def _by_stage(self, progress: _Progress, end: int) -> None:
        """One request per huge page or less, for each request costs the source's latency."""
        stages = self._stages
        while progress.offset < end:
            length = min(HUGE - progress.offset % HUGE, end - progress.offset)
            huge = stages.take_huge() if length > SMALL else None
            if huge is None:
                size = max(length, self._region.page_size)
                stage = stages.take_small() if size <= SMALL else memoryview(bytearray(size))
                await self._by_copy(progress, stage[:length])
                # Not after a failure: a careless source might still write to it.
                stages.give_small(stage)
            else:
                try:
                    if length == HUGE and self._movable:
                        await self._by_huge_page(progress, huge)
                    else:
                        await self._by_copy(progress, huge[1][:length])
                except BaseException:
                    stages.lose_huge()
                    raise
                stages.give_huge(huge)

    async def _by_copy(self, progress: _Progress, part: memoryview) -> None:
        await read_into_source(self._source, progress.offset, part)
        self._tally.fetched_bytes += len(part)
        for start in range(0, len(part), self._step):
            await self._install(progress, part[start : start + self._step])

    async def _by_huge_page(self, progress: _Progress, stage: tuple[int, memoryview]) -> None:
        address, view = stage
        await read_into_source(self._source, progress.offset, view)
        self._tally.fetched_bytes += HUGE
        try:
            self._region.move_in(progress.offset, address, HUGE)
            self._advance(progress, HUGE)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
            await self._install(progress, view)

    async def _by_stream(self, progress: _Progress, end: int) -> None:
        """Install whole pages straight from the source's chunks; only their ragged edges,
        less than a page each, are copied."""
        assert self._stream is not None
        page = self._region.page_size
        edge = bytearray()
        start = progress.offset
        received = 0
        async with contextlib.aclosing(self._stream(start, end - start)) as chunks:
            async for chunk in chunks:
                view = memoryview(chunk)
                if view.format != "B" or view.ndim != 1:
                    view = view.cast("B")
                received += view.nbytes
                if received > end - start:
                    raise SourceError(f"the source sent more than bytes {start}-{end}")
                self._tally.fetched_bytes += view.nbytes
                if edge:
                    missing = page - len(edge)
                    edge += view[:missing]
                    view = view[missing:]
                    if len(edge) < page:
                        continue
                    await self._install(progress, edge)
                    edge = bytearray()
                whole = view.nbytes & ~(page - 1)
                for at in range(0, whole, self._step):
                    await self._install(progress, view[at : min(at + self._step, whole)])
                edge += view[whole:]
        if edge and progress.offset + len(edge) == end:
            await self._install(progress, edge)
        if progress.offset < end:
            raise SourceError(f"the source ended at byte {start + received}, {end} were expected")

    async def _install(self, progress: _Progress, data: Any) -> None:
        region, offset = self._region, progress.offset
        try:
            region.install(offset, data, heal=True)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
            await region.install_async(
                offset + error.done, memoryview(data)[error.done :], heal=True
            )
        self._advance(progress, len(data))

    def _advance(self, progress: _Progress, length: int) -> None:
        first = progress.offset
        progress.offset += length
        progress.pieces += 1
        if self._failures:
            size = self._region.block_size
            for block in range(first // size, (progress.offset - 1) // size + 1):
                self._failures.pop(block, None)

    # ----------------------------------------------------------------- close

    @property
    def in_flight(self) -> int:
        """Flights that run or wait to run."""
        return self._running + len(self._urgent) + len(self._later)

    def cancel(self) -> list[asyncio.Task[None]]:
        """Stop: cancels what runs, fails what waits. Returns the tasks to await."""
        self._closed = True
        for flight in (*self._urgent, *self._later):
            flight.finish(ClosedError("the buffer is closed"))
        self._urgent.clear()
        self._later.clear()
        tasks = []
        for flight in set(self._flights.values()):
            if flight.task is not None and not flight.task.done():
                flight.task.cancel()
                tasks.append(flight.task)
        return tasks


class _Progress:
    """How far a flight has come, in bytes from the start of the object, and in how many pieces."""

    __slots__ = ("offset", "pieces")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.pieces = 0
