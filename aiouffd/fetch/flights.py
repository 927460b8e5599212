"""Flights: the fetch engine, on one loop, for every destination of bytes.

A flight is one run of blocks that is being fetched: the unit of waiting, retrying and cancelling.
However many wait for a block, one flight has it. What somebody waits for goes before what may be
of use later, and among those who wait goes first who has had least. A flight that nobody waited
for, and that somebody comes to wait for, is urgent from then on.

Where the bytes go, and who waits for them, is the business of a `Destination`: the pages of a
region (`aiouffd.fetch.fetcher`), or blocks that are kept for clients (`aiouffd.foreign.blocks`).
What becomes of failures is decided here, by the `Policy`, in the same way for all.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

from ..errors import AiouffdError, ClosedError, KernelError, SourceError, SourceTimeoutError
from ..sources.base import as_source_error
from ..util.backoff import Backoff
from ..util.once import abandon
from ..util.stepping import Eagerness, resume
from ..util.tasks import FIRST_TURN, begin_coroutine
from ..util.usercode import Complaints, describe, ends_the_program, is_ours, tell_loop
from .policy import Policy
from .silence import Silence
from .tally import Tally

__all__ = ["Begun", "Destination", "Flight", "FlightCancelledError", "Flights"]

log = logging.getLogger("aiouffd")

#: First and longest pause between two tries, in seconds.
RETRY_FIRST, RETRY_LONGEST = 0.05, 10.0


class FlightCancelledError(SourceError):
    """Somebody has cancelled the task of a flight. Who waits for its blocks asks again."""


class Begun(Protocol):
    """A transfer that is under way without a task."""

    def cancel(self) -> None:
        """Nothing arrives any more, and nobody is told."""


class Flight:
    """A run of ``count`` blocks from ``first`` on. Await `wait` for its end."""

    __slots__ = (
        "_done",
        "_pause",
        "background",
        "begun",
        "cause",
        "count",
        "end",
        "error",
        "finished",
        "first",
        "limit",
        "offset",
        "pieces",
        "running",
        "since",
        "started",
        "task",
        "wanted",
    )

    def __init__(self, first: int, count: int, cause: str, *, wanted: bool = True) -> None:
        self.first, self.count = first, count
        #: Why it was asked for, for those who trace.
        self.cause = cause
        #: Somebody waits for it, since `since`. It runs since `started`.
        self.wanted = wanted
        self.since = self.started = time.monotonic()
        self.running = self.background = False
        #: Bytes of the object that are to come yet, and in how many pieces others have.
        self.offset = self.end = self.pieces = 0
        # What brings it: a task, or for a small one what is under way without.
        self.task: asyncio.Task[None] | None = None
        self.begun: Begun | None = None
        self.limit: asyncio.Timeout | None = None
        self.error: BaseException | None = None
        self.finished = False
        self._done: asyncio.Future[None] | None = None
        # While it waits for its next try.
        self._pause: asyncio.Future[None] | None = None

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.count)

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


F = TypeVar("F", bound=Flight)
G = TypeVar("G", bound=Flight, contravariant=True)


class Destination(Protocol[G]):
    """Where the bytes of flights go. All of it is called on the engine's loop."""

    block_size: int

    @property
    def length(self) -> int:
        """Bytes of the object."""

    @property
    def gone(self) -> bool:
        """Whether nothing can be delivered any more."""

    async def bring(self, flight: G) -> None:
        """Make one try: fetch and deliver from ``flight.offset`` to ``flight.end``, moving
        ``offset`` along. What has arrived is not asked for again. Raises what the source raises.
        """

    def arrived(self, flight: G) -> None:
        """All of it has come, in several pieces."""

    def still_wanted(self, flight: G) -> bool:
        """After a failure: whether anybody wants it, though nobody was known to wait."""

    def give_up(self, flight: G, error: SourceError) -> bool:
        """Deliver an error instead of what has not come. False if that failed as well."""

    def ended(self, flight: G, error: BaseException | None, finished: float) -> None:
        """A flight is over; its blocks can be asked for again. ``finished``: `time.monotonic`."""

    def dropped(self, flight: G) -> None:
        """The same for one that never began, because the engine stops."""

    def name(self, flight: G) -> str:
        """What it brings, for the log."""


class Flights(Generic[F]):
    """The flights to one destination. One loop, the running one; not thread-safe.

    Args:
        closed: What those get to read who wait when it is stopped.
        most: Flights that run at a time; ``background``: those of them that nobody waits for.
        begin: Starts a flight of one block without a task, or returns None; `landed` is to be
            called at its end.
        retry: Whether a failure may be tried again at all.
    """

    def __init__(
        self,
        destination: Destination[F],
        policy: Policy,
        tally: Tally,
        complaints: Complaints,
        *,
        closed: str,
        most: int,
        background: int | None = None,
        begin: Callable[[F], Begun | None] | None = None,
        retry: bool = True,
    ) -> None:
        self._destination = destination
        self._policy = policy
        self._limit = policy.limit
        self._tally = tally
        self._complaints = complaints
        self._closed_text = closed
        self._most = most
        self._most_background = most if background is None else background
        # A deadline needs a timer, and so a task.
        self._begin = begin if self._limit is None else None
        self._retry = retry
        self._eager = Eagerness()
        self._loop = asyncio.get_running_loop()
        self._size = destination.block_size
        #: The flight that has a block.
        self.of: dict[int, F] = {}
        self._running = self._running_background = 0
        self._urgent: list[tuple[float, int, F]] = []  # a heap
        self._later: deque[F] = deque()
        self._number = 0
        self._silence = Silence(self)
        self.closed = False

    # ---------------------------------------------------------------- asking

    def launch(self, flight: F, rank: float = 0.0, *, eagerly: bool = False) -> None:
        """Begin a flight, or queue it: by ``rank`` if somebody waits for it, smallest first.

        With ``eagerly``, which is for callbacks of the loop that are no part of a task, it may end
        before this returns.
        """
        if self.closed:
            # Who was woken by the end of a flight has asked again. What is told to those who wait
            # is the destination's business; until then the blocks stay taken.
            flight.finish(ClosedError(self._closed_text))
            return
        if flight.count == 1:
            self.of[flight.first] = flight
        else:
            for block in flight.blocks:
                self.of[block] = flight
        if self._running < self._most and (
            flight.wanted or self._running_background < self._most_background
        ):
            self._start(flight, eagerly)
        else:
            self._queue(flight, rank)

    def want(self, flight: F, rank: float = 0.0) -> None:
        """Somebody has come to wait for ``flight``."""
        if flight.wanted:
            return
        # It had all the time in the world until now.
        flight.wanted = True
        flight.since = time.monotonic()
        if flight.limit is not None and self._limit is not None:
            flight.limit.reschedule(self._loop.time() + self._limit)
        if not flight.running and not flight.finished:
            self._queue(flight, rank)  # and where it was it is passed by
            self._fill()

    def _queue(self, flight: F, rank: float) -> None:
        if flight.wanted:
            self._number += 1
            heapq.heappush(self._urgent, (rank, self._number, flight))
        else:
            self._later.append(flight)

    def drop(self, flight: F) -> None:
        """Nobody wants a flight that has not begun."""
        self._withdraw(flight)
        flight.finished = True  # and is passed by

    # --------------------------------------------------------------- running

    def _start(self, flight: F, eagerly: bool = False) -> None:
        flight.running = True
        self._running += 1
        if not flight.wanted:
            flight.background = True
            self._running_background += 1
        self._tally.flights += 1
        if self._silence.timer is None:  # each flight asks
            self._silence.watch(self._loop)
        offset = flight.offset = flight.first * self._size
        end, length = offset + flight.count * self._size, self._destination.length
        flight.end = end if end < length else length
        if self._begin is not None and flight.count == 1:
            flight.begun = self._begin(flight)
            if flight.begun is not None:
                return
        if eagerly and self._eager and self._limit is None and self._take_in_hand(flight):
            return
        self._fly_with_task(flight)

    def _take_in_hand(self, flight: F) -> bool:
        """Make the first step without a task. False if one has to begin anew."""
        coroutine: Any = self._destination.bring(flight)
        try:
            future = coroutine.send(None)
        except StopIteration:
            if flight.pieces > 1:
                self._destination.arrived(flight)
            self._settle(flight, None)
            return True
        except BaseException as error:
            # Perhaps for want of a task, so that it is no failure yet.
            self._eager.disappointed()
            if not ends_the_program(error):
                return False
            self._settle(flight, self._cancelled())
            tell_loop(self._loop, "", error)
        else:
            self._eager.disappointed()
            self._fly_with_task(flight, resume(coroutine, future))
        return True

    def _fill(self) -> None:
        while self._running < self._most and not self.closed:
            if self._urgent:
                flight = heapq.heappop(self._urgent)[2]
            elif self._later and self._running_background < self._most_background:
                flight = self._later.popleft()
            else:
                return
            if not flight.running and not flight.finished:
                flight.started = time.monotonic()
                self._start(flight)

    def landed(self, flight: F, error: BaseException | None) -> None:
        """The end of a flight that had no task."""
        flight.begun = None
        if error is None:
            self._settle(flight, None)
        elif not self.closed:
            # The failure policy is a task's business, and it begins with a try of its own.
            self._fly_with_task(flight)

    def _fly_with_task(self, flight: F, begun: Awaitable[None] | None = None) -> None:
        flight.task = begin_coroutine(self._fly(flight, begun), self._loop)

    async def _fly(self, flight: F, begun: Awaitable[None] | None) -> None:
        error: BaseException | None = None
        try:
            await FIRST_TURN
            if flight.task is None:  # which begins at once on this loop
                await asyncio.sleep(0)
            await self._attempts(flight, begun)
            if flight.pieces > 1:
                self._destination.arrived(flight)
        except (SourceError, ClosedError) as failure:
            error = failure
        except BaseException as failure:
            # The task was cancelled, or the program ends. Whoever waits asks again.
            error = self._cancelled()
            if not isinstance(failure, Exception):
                raise
            tell_loop(self._loop, f"a flight to {self._destination!r} broke", failure)
        finally:
            self._settle(flight, error)

    def _cancelled(self) -> AiouffdError:
        if self.closed:
            return ClosedError(self._closed_text)
        return FlightCancelledError("somebody has cancelled the fetch", hint="try again")

    def _settle(self, flight: F, error: BaseException | None) -> None:
        """A flight has ended: tell who waits, and start what waited for its place."""
        finished = time.monotonic()
        self._running -= 1
        if flight.background:
            self._running_background -= 1
        self._withdraw(flight)
        if error is None:
            self._tally.landed(finished - flight.started)
        self._destination.ended(flight, error, finished)
        flight.finish(error)
        if self._urgent or self._later:
            self._fill()

    def _withdraw(self, flight: F) -> None:
        of = self.of
        if flight.count == 1:
            if of.get(flight.first) is flight:
                del of[flight.first]
            return
        for block in flight.blocks:
            if of.get(block) is flight:
                del of[block]

    def describe(self, flight: F) -> str:
        """What a flight brings, for the log."""
        return self._destination.name(flight)

    # -------------------------------------------------------------- failures

    async def _attempts(self, flight: F, begun: Awaitable[None] | None) -> None:
        destination, task = self._destination, flight.task
        backoff: Backoff | None = None
        # Since when the kernel has not taken the bytes.
        refused: float | None = None
        while True:
            before = flight.offset
            try:
                if begun is not None:
                    attempt, begun = begun, None
                    await attempt
                elif self._limit is None:
                    await (self._bring if self._eager.look() else destination.bring)(flight)
                else:
                    await self._in_time(flight, self._limit)
                return
            except BaseException as failure:
                if is_ours(failure, task):
                    raise
                if self.closed or destination.gone:
                    raise ClosedError(self._closed_text) from None
                if flight.offset >= flight.end and not isinstance(failure, SourceError):
                    self._complaints.make("a source that had delivered all", failure)
                    return
                error = as_source_error(failure)
                if not isinstance(failure, KernelError):
                    refused = None
                elif refused is None or flight.offset > before:
                    refused = time.monotonic()
            flight.error = error  # so far
            self._tally.last_error = describe(error)
            if not flight.wanted and not destination.still_wanted(flight):
                # Nobody waits: leave it, who needs it will ask again.
                raise error
            now = time.monotonic()
            waited, stuck = now - flight.since, 0.0 if refused is None else now - refused
            if not self._retry or self._policy.is_final(error, waited, stuck):
                self._tally.failures += 1
                if not destination.give_up(flight, error):
                    # Who waits asks again: not at once, for nothing has changed.
                    await flight.pause(RETRY_FIRST)
                raise error
            self._tally.retries += 1
            if backoff is None or flight.offset > before:
                backoff = Backoff(RETRY_FIRST, RETRY_LONGEST)
            level = logging.WARNING if backoff.pause >= 1 else logging.INFO
            delay = backoff.next(error)
            log.log(level, "%s: %s; next try in %.2f s", destination.name(flight), error, delay)
            if self._limit is not None:
                delay = min(delay, max(flight.since + self._limit - time.monotonic(), 0.001))
            await flight.pause(delay)

    async def _bring(self, flight: F) -> None:
        """One try, of which it is noted whether it had to wait."""
        coroutine: Any = self._destination.bring(flight)
        try:
            future = coroutine.send(None)
        except StopIteration:
            self._eager.finished()
        else:
            self._eager.waited()
            await resume(coroutine, future)

    async def _in_time(self, flight: F, seconds: float) -> None:
        """One try, which has failed when somebody has waited for too long."""
        left = max(flight.since + seconds - time.monotonic(), 0.001)
        limit = asyncio.timeout(left if flight.wanted else None)
        try:
            async with limit:
                flight.limit = limit
                await self._destination.bring(flight)
        except TimeoutError as late:
            if not limit.expired():
                raise  # the source's own
            raise SourceTimeoutError(
                f"{self._destination.name(flight)} did not arrive within {seconds} s"
            ) from late
        finally:
            flight.limit = None

    # ------------------------------------------------------------------- end

    @property
    def in_flight(self) -> int:
        """Flights that run or wait to run."""
        return len(set(self.of.values()))

    @property
    def orphaned(self) -> bool:
        """Whether its loop is closed, with all that ran there."""
        return self._loop.is_closed()

    def dismiss(self) -> None:
        """Coroutines that wait for flights get ClosedError; the flights go on."""
        for flight in set(self.of.values()):
            flight.dismiss()

    def cancel(self) -> list[asyncio.Task[None]]:
        """Stop: cancels what runs, drops what waits. Returns the tasks to await."""
        self.closed = True
        self._silence.stop()
        tasks = []
        for flight in set(self.of.values()):
            if not flight.running:
                self._withdraw(flight)
                flight.finish(ClosedError(self._closed_text))
                self._destination.dropped(flight)
            elif flight.begun is not None:
                flight.begun.cancel()
                flight.begun = None
                self._settle(flight, ClosedError(self._closed_text))
            elif flight.task is not None and not flight.task.done():
                flight.task.cancel()
                tasks.append(flight.task)
        self._urgent.clear()
        self._later.clear()
        return tasks

    def abandon(self) -> None:
        """Its loop was closed: what was under way never goes on, which nobody need be told."""
        self.closed = True
        for flight in set(self.of.values()):
            if flight.task is not None:
                abandon(flight.task)
