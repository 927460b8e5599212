"""What brings the blocks of one lazy buffer: a `Fetcher` on its own loop, and when need be another
one, with a clone of the source, on the rescue loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import AiouffdError, ClosedError, UsageError
from ..fetch.advice import Advice
from ..fetch.fetcher import Fetcher, FlightEvent
from ..fetch.flights import FlightCancelledError
from ..fetch.policy import Policy
from ..fetch.readahead import Readahead, Reads
from ..fetch.tally import Tally
from ..regions.region import Region
from ..regions.rescue import service
from ..sources.base import Source, aclose_source, as_source_error, clone_source, open_source
from ..util.backoff import Backoff
from ..util.once import abandon, thrown_away
from ..util.tasks import begin
from ..util.usercode import describe

if TYPE_CHECKING:
    from ..foreign.children import Inheritance

__all__ = ["BufferSink"]

log = logging.getLogger("aiouffd")

#: Longest single flight of readahead and `fetch`, in bytes.
FLIGHT = 2 * 1024 * 1024
#: First and longest pause between two tries to open a clone, in seconds.
RETRY_FIRST, RETRY_LONGEST = 0.05, 5.0


def _retrieve(task: asyncio.Task[bool]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.debug("prefetching ended early", exc_info=task.exception())


class BufferSink:
    """Brings the blocks of one buffer: on its loop, and when need be on the rescue loop.

    Does not refer to the LazyBuffer, which can so be collected.
    """

    def __init__(
        self,
        region: Region,
        source: Source,
        policy: Policy,
        tally: Tally,
        readahead: int,
        trace: Callable[[FlightEvent], None] | None,
    ) -> None:
        self.failures: dict[int, BaseException] = {}
        self._region = region
        self._source = source
        self._policy = policy
        self._tally = tally
        self._window = readahead // region.block_size
        self._trace = trace
        self._closed = self._stopped = False
        # Whether the rescue loop alone serves, because the loop of the buffer ends.
        self._moved = False
        #: What threads read in one go, as blocks.
        self.reads = Reads()
        #: How the program will read, as blocks.
        self.advice = Advice()
        self.fetcher = self._fetcher(source)
        self._prefetching: asyncio.Task[bool] | None = None
        self._recording: dict[int, None] | None = None
        # Of the rescue loop only.
        self._rescuer: Fetcher | None = None
        self._rescue_queue: deque[int] = deque()
        self._rescue_start: asyncio.Task[None] | None = None
        self._rescue_error: Exception | None = None
        self._rescue_end: asyncio.Task[None] | None = None
        self._clone: Source | None = None
        # A clone that nobody has needed yet.
        self._spare: Source | None = None
        #: What children are served from.
        self.inheritance: Inheritance | None = None

    def _fetcher(self, source: Source) -> Fetcher:
        region = self._region
        piece = max(1, FLIGHT // region.block_size)
        ahead = None
        if self._window:
            ahead = Readahead(region.blocks, self._window, piece, self.advice, self._is_there)
        return Fetcher(
            region,
            source,
            policy=self._policy,
            tally=self._tally,
            failures=self.failures,
            readahead=ahead,
            reads=self.reads,
            flight_blocks=piece,
            trace=self._trace,
        )

    def _is_there(self, block: int) -> bool:
        region = self._region
        start = block * region.block_size
        return region.is_resident(start, min(region.block_size, region.length - start))

    def leave_to_children(self, clone: Source) -> None:
        """Serve forked children; with ``clone``, unless their memory is that of the region."""
        from ..foreign.children import RegionBlocks, SourceBlocks, children

        region = self._region
        if region.kind in ("memfd", "hugetlb-memfd"):
            store: Any = RegionBlocks(region, self.bring)
        else:
            store = SourceBlocks(
                clone,
                region.length,
                self._tally,
                block_size=region.block_size,
                policy=self._policy,
                readahead=self._window * region.block_size,
            )
        self.inheritance = children.leave(region, store)

    async def bring(self, block: int) -> None:
        """On the rescue loop: make a block resident, for a child that shares the memory and
        waits for it. Raises what the source raises, and ClosedError."""
        if self._rescuer is None:
            if self._rescue_start is None:
                self._begin_rescue()
            assert self._rescue_start is not None
            await asyncio.shield(self._rescue_start)
        if self._closed:
            raise ClosedError("the buffer is closed")
        if self._rescuer is None:
            raise self._rescue_error or ClosedError("the buffer is closed")
        again = True
        while again:
            again = False
            self._region.begin(block, 1)
            self._rescuer.miss(block)
            flight = self._rescuer.under_way(block)
            if flight is not None:
                try:
                    await flight.wait()
                except FlightCancelledError:
                    again = True

    def prefetch(self, runs: Iterable[tuple[int, int]]) -> None:
        """In the background, until all is there or the buffer closes."""
        self._prefetching = asyncio.get_running_loop().create_task(self.fetcher.prefetch(runs))
        self._prefetching.add_done_callback(_retrieve)

    def record(self, blocks: dict[int, None]) -> None:
        """Note in ``blocks`` what is needed from now on."""
        if self._recording is not None:
            raise UsageError("a recording is already active")
        self._set_recording(blocks)

    def stop_recording(self) -> None:
        self._set_recording(None)

    def _set_recording(self, blocks: dict[int, None] | None) -> None:
        self._recording = self.fetcher.recording = blocks
        if self._rescuer is not None:
            # On another loop, where at worst its next step still sees the old one.
            self._rescuer.recording = blocks

    def miss(self, block: int, *message: int) -> None:
        if self._moved:
            service.call_soon(self.rescue, block)
        else:
            self.fetcher.miss(block, *message)

    def hit(self, block: int) -> None:
        if not self._moved:
            self.fetcher.hit(block)

    def ask(self, first: int, last: int, read: tuple[int, int]) -> None:
        """Bring blocks that somebody reads: see `Fetcher.ask`. On the buffer's loop."""
        if not self._moved and not self._closed:
            self.fetcher.ask(first, last, read)

    @property
    def last_error(self) -> str | None:
        """What the source answered last, if that was an error."""
        return self._tally.last_error

    async def settle(self) -> None:
        """Wait for what was forked and has not come to be served yet."""
        if self.inheritance is not None:
            await service.run(self.inheritance.settle())

    def dismiss(self) -> None:
        """The coroutines of the buffer are over: those that wait get ClosedError, and nothing is
        prefetched any more. Threads are served as before. On the buffer's loop."""
        if self._prefetching is not None:
            self._prefetching.cancel()
        self.fetcher.flights.dismiss()

    async def move(self) -> None:
        """The buffer's loop ends: leave everything to the rescue loop and a clone. Raises what
        cloning raises, and then nothing has changed."""
        if self._clone is None and self._spare is None:
            self._spare = clone_source(self._source)
        self._moved = True
        tasks = [*self.fetcher.cancel(give_back=True)]
        if self._prefetching is not None:
            self._prefetching.cancel()
            tasks.append(self._prefetching)  # type: ignore[arg-type]
        await asyncio.gather(*tasks, return_exceptions=True)

    def rescue(self, block: int) -> bool:
        if self._closed:
            return True
        self._tally.rescued += 1
        if self._rescuer is not None:
            self._rescuer.miss(block)
            return True
        self._rescue_queue.append(block)
        if self._rescue_start is None:
            try:
                self._begin_rescue()
            except Exception as error:
                log.debug("the source cannot be cloned: %s", error)
                self._rescue_queue.clear()
                return False
        return True

    def _begin_rescue(self) -> None:
        clone, self._spare = self._spare or clone_source(self._source), None
        self._rescue_start = begin(partial(self._start_rescuer, clone), self._no_rescuer)

    def late(self, block: int) -> None:
        self.miss(block)  # the fetcher knows what is under way

    async def _start_rescuer(self, clone: Source) -> None:
        try:
            if await self._open_clone(clone):
                self._clone = clone
                self._rescuer = self._fetcher(clone)
                self._rescuer.recording = self._recording
                while self._rescue_queue and not self._closed:
                    self._rescuer.miss(self._rescue_queue.popleft())
        finally:
            if self._rescuer is None:
                self._no_rescuer()

    def _no_rescuer(self) -> None:
        """The next touch tries again, and so does who waits in this one."""
        self._rescue_start = None
        while self._rescue_queue and not self._region.closed:
            self._region.end(self._rescue_queue.popleft(), 1)

    async def _open_clone(self, clone: Source) -> bool:
        """Until it is open. False when that failed for good, of which all who wait were told."""
        backoff, since = Backoff(RETRY_FIRST, RETRY_LONGEST), time.monotonic()
        while not self._closed:
            try:
                await open_source(clone)
                return True
            except Exception as failure:
                error = as_source_error(failure)
                if self._policy.is_final(error, time.monotonic() - since, 0.0):
                    self._give_up(failure)
                    return False
                self._tally.last_error = describe(failure)
            await asyncio.sleep(backoff.next(error))
        return False

    def _give_up(self, error: Exception) -> None:
        self._rescue_error = error
        region = self._region
        while self._rescue_queue:
            block = self._rescue_queue.popleft()
            self.failures[block] = error
            start = block * region.block_size
            try:
                region.poison(start, min(region.block_size, region.mapped_length - start))
            except AiouffdError:
                return

    async def stop(self) -> None:
        """Cancel what is under way, on both loops, and wait for it. Idempotent. On the buffer's
        loop, or the rescue loop if that is gone."""
        self._closed = True
        try:
            if not self.fetcher.flights.orphaned:
                tasks: list[asyncio.Task[Any]] = [*self.fetcher.cancel()]
                if self._prefetching is not None:
                    self._prefetching.cancel()
                    tasks.append(self._prefetching)
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            try:
                if self.inheritance is not None and not thrown_away():
                    await self.inheritance.aclose()
            finally:
                if self._rescue_start is not None and not thrown_away():
                    await service.run(self._stop_rescuer())
        self._stopped = True

    async def _stop_rescuer(self) -> None:
        try:
            if self._rescue_start is not None:
                self._rescue_start.cancel()
                await asyncio.gather(self._rescue_start, return_exceptions=True)
            if self._rescuer is not None:
                await asyncio.gather(*self._rescuer.cancel(), return_exceptions=True)
        finally:
            clone, self._clone = self._clone, None
            if clone is not None:
                try:
                    await aclose_source(clone)
                except Exception as error:
                    log.warning("closing a clone of the source failed: %r", error)

    def close(self) -> None:
        """The region closes without `stop` having run to its end (collected, or the loop is gone).
        Any thread, if the loop is closed. Idempotent."""
        self._closed = True
        if self._stopped:
            return
        self._stopped = True
        if self.fetcher.flights.orphaned:
            self.fetcher.flights.abandon()
            if self._prefetching is not None:
                abandon(self._prefetching)
        else:
            self.fetcher.cancel()
        if self.inheritance is not None:
            self.inheritance.close()
        if self._rescue_start is not None:
            # At the interpreter's end there may be nobody to do it.
            with suppress(RuntimeError, OSError):
                service.call_soon(self._abandon_rescuer)

    def _abandon_rescuer(self) -> None:
        self._rescue_end = asyncio.get_running_loop().create_task(self._stop_rescuer())
