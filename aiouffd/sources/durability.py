"""What was acknowledged and is not known to be durable, and flushes that can be believed.

A flush says something about writes that the same server has acknowledged before, and nothing
about those of a server that went away since: it may have been a power failure, after which a new
one has nothing to flush and says so. And a flush that failed has nothing to say afterwards
either: Linux reports a lost write once, and takes the pages for clean from then on (fsync(2),
"Handling errors"), so trying again succeeds and has made nothing durable.

`Promises` keeps the account; `Flusher` runs flushes one at a time on an event loop. Everything
with a ``flush`` uses them: files, NBD exports, and the NBD server in front of any source.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any

from ..errors import AiouffdError, FlushError, SourceError
from ..util.ranges import Ranges
from ..util.tasks import begin
from ..util.waiting import retrieve

__all__ = ["Flusher", "Promises"]

#: Ranges that are told apart; more become one, so that scattered writes without end do not take
#: memory without end.
MOST = 65536
#: Ranges that a message names.
NAMED = 3


class Promises:
    """The account of what was written: acknowledged, being flushed, in doubt.

    ``what`` names the source in messages. Whoever acknowledges a write (``by``: a connection,
    say) has promised that its own flush will make it durable. Any thread.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._written: dict[Hashable, Ranges] = {}
        self._flushing: dict[Hashable, Ranges] = {}
        self._doubtful = Ranges()

    def wrote(self, offset: int, length: int, by: Hashable = None) -> None:
        """``length`` bytes at ``offset`` were acknowledged: what was there before, or is in doubt
        there, does not matter any more."""
        end = offset + length
        with self._lock:
            if self._doubtful:
                self._doubtful.remove(offset, end)
            for holder, ranges in self._written.items():
                if holder is not by and ranges:
                    ranges.remove(offset, end)
            for ranges in self._flushing.values():
                ranges.remove(offset, end)
            ranges = self._written.setdefault(by, Ranges())
            ranges.add(offset, end)
            _bound(ranges)

    def holders(self) -> set[Hashable]:
        """Those who have acknowledged what was not flushed yet, or is being flushed."""
        with self._lock:
            both = (*self._written.items(), *self._flushing.items())
            return {by for by, ranges in both if len(ranges)}

    def gone(self, by: Hashable) -> None:
        """Who acknowledged is no more: what was not flushed is in doubt."""
        with self._lock:
            for ranges in (self._written.pop(by, None), self._flushing.pop(by, None)):
                if ranges is not None:
                    self._doubtful.update(ranges)
            _bound(self._doubtful)

    def begin(self) -> None:
        """A flush begins, of all that was acknowledged until now. One at a time."""
        with self._lock:
            self._flushing, self._written = self._written, {}

    def kept(self) -> None:
        """The flush has succeeded, for all that is not gone meanwhile."""
        with self._lock:
            self._flushing.clear()

    def broken(self) -> None:
        """The flush has failed: all that it was to make durable is in doubt."""
        with self._lock:
            for ranges in self._flushing.values():
                self._doubtful.update(ranges)
            self._flushing.clear()
            _bound(self._doubtful)

    def doubtful(self) -> list[tuple[int, int]]:
        """Offset and length of what may be lost."""
        with self._lock:
            return self._doubtful.pairs()

    def check(self, cause: BaseException | None = None) -> None:
        """Raise FlushError if anything is in doubt, or because of ``cause``."""
        ranges = self.doubtful()
        if not ranges and isinstance(cause, FlushError):
            ranges = cause.ranges
        if not ranges and cause is None:
            return
        if cause is not None:
            said = cause.message if isinstance(cause, AiouffdError) else cause
            message = f"{self._what}: the flush failed: {said}"
        else:
            message = f"{self._what}: writes that were acknowledged were not made durable"
        if ranges and not isinstance(cause, FlushError):
            named = ", ".join(f"{length} bytes at {at}" for at, length in ranges[:NAMED])
            more = f" and {len(ranges) - NAMED} more ranges" if len(ranges) > NAMED else ""
            message += f"; in doubt are {named}{more}"
        number = getattr(cause, "errno", None)
        raise FlushError(message, ranges=ranges, errno=number) from cause


def _bound(ranges: Ranges) -> None:
    if len(ranges) > MOST:
        pairs = ranges.pairs()
        ranges.add(pairs[0][0], sum(pairs[-1]))


class Flusher:
    """Flushes of what ``promises`` is the account of: one at a time, and shared.

    Who asks while one runs waits for the next, together with all others who do: that begins after
    all they had written was acknowledged. Who asks may be cancelled; the flush goes on, for its
    failure must not be missed. One event loop.
    """

    def __init__(self, promises: Promises) -> None:
        self._promises = promises
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def __call__(self, operation: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Flush by ``operation``. Raises FlushError, also for what earlier flushes left in
        doubt; ClosedError and the like of ``operation`` as they are when nothing is in doubt."""
        task = self._next
        if task is None:
            before = self._running
            if before is None or before.done():
                task = self._running = begin(partial(self._run, operation))
            else:
                after = partial(self._after, before, operation)
                task = self._next = begin(after, self._not_next)
            task.add_done_callback(retrieve)
        await asyncio.shield(task)

    def _not_next(self) -> None:
        self._next = None

    async def _after(
        self, before: asyncio.Task[None], operation: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await asyncio.wait((before,))
        finally:
            self._running, self._next = self._next, None
        await self._run(operation)

    async def _run(self, operation: Callable[[], Coroutine[Any, Any, None]]) -> None:
        promises = self._promises
        promises.begin()
        try:
            await operation()
        except BaseException as error:
            promises.broken()
            if isinstance(error, SourceError | OSError) or (
                isinstance(error, Exception) and promises.doubtful()
            ):
                promises.check(error)
            raise
        promises.kept()
        promises.check()

    async def settled(self) -> None:
        """Until no flush is under way."""
        while tasks := [task for task in (self._running, self._next) if task and not task.done()]:
            await asyncio.wait(tasks)

    def cancel(self) -> None:
        """End what is under way; what it was to make durable is in doubt."""
        for task in (self._running, self._next):
            if task is not None:
                task.cancel()
