"""The memory of a lazy buffer and what serves it, for as long as somebody holds that memory.

A `LazyBuffer` is its methods; this is the rest, and may live longer. What becomes of memory that
is held after `close`:

- Its loop runs: it is served as before, and the last export to go ends it there.
- Its loop ends (`asyncio.run` shuts its asynchronous generators down, and so tells us): the source
  is closed on it, and the rescue loop goes on with a clone. If the source cannot be cloned it goes
  on here until the loop is closed; what is touched later is an error, told in the log.
- Its loop was closed without a word: as above, but for the source, of which only that is closed
  which needs no loop.
- The interpreter ends: nothing is done. Threads that wait end with it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..regions.pager import Pager, shared_pagers
from ..regions.region import Region
from ..regions.rescue import service
from ..sources.base import Source, aclose_source
from ..util.once import Once, thrown_away

if TYPE_CHECKING:
    from .blocks import BufferSink

__all__ = ["Mapping"]

log = logging.getLogger("aiouffd")

#: Seconds between two looks whether a loop is closed that has to end something: first and longest.
ENDING_FIRST, ENDING_LONGEST = 0.02, 1.0
#: Seconds to close a source in whose loop is gone.
STRANDED = 5.0
#: Seconds for which the end of a loop may wait without a word.
SILENCE = 1.0


class Mapping:
    """A region, its pager, and the sink and source that fill it. Made on the buffer's loop.

    ``region``, ``pager`` and ``sink`` are None for an object without bytes.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        region: Region | None = None,
        pager: Pager | None = None,
        sink: BufferSink | None = None,
    ) -> None:
        self.source = source
        self.region = region
        self.pager = pager
        self.sink = sink
        self._name = name
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._finishing = Once[None](f"closing {name}", keep_failure=True)
        self._task: asyncio.Task[None] | None = None
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._until_loop_ends: AsyncGenerator[None, None] | None = None
        # Threads and bytes that they waited for at the last look, and those that were told of.
        self._waited: set[tuple[str, int]] = set()
        self._told: set[tuple[str, int]] = set()
        # Whether the source was closed on the loop, which ends.
        self._moved = False
        self._moving = Once[None](f"moving {name}", keep_failure=True)

    async def start(self) -> None:
        """Hear of the end of the loop. Nothing to undo but by `close`."""
        if self.sink is not None:
            self._until_loop_ends = self._wait_for_end()
            await anext(self._until_loop_ends)

    def ask(self, first: int, last: int, read: tuple[int, int]) -> None:
        """Have blocks brought, a part of those that somebody reads in one go; they are without it
        too, one by one. Any thread."""
        if self._pid != os.getpid() or self._moved or self.pager is None or self.sink is None:
            return
        if self.pager.on_its_thread:
            return  # nothing that begins there moves before the rescue loop has come
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.sink.ask, first, last, read)

    # ------------------------------------------------------------------- close

    @property
    def held(self) -> bool:
        """Whether somebody holds the memory."""
        return self.region is not None and self.region._exports.held

    def close(self, *, force: bool = False) -> None:
        """Done with the buffer: end when nobody holds the memory, or with ``force`` soon. Any
        thread. Idempotent."""
        if self._pid != os.getpid() or self._ended.done():
            return
        if force:
            self._begin_to_finish()
        if self._closed:
            return
        self._closed = True
        if self.sink is not None and self.sink.inheritance is not None:
            with contextlib.suppress(RuntimeError, OSError):
                service.submit(self._close_when_children_have_come())
        else:
            self._let_go()

    async def _close_when_children_have_come(self) -> None:
        """On the rescue loop: a child that was just forked holds the memory too."""
        assert self.sink is not None
        await self.sink.settle()
        self._let_go()

    def _let_go(self) -> None:
        if self.region is None:
            self._begin_to_finish()
        else:
            self.region._exports.end(self._begin_to_finish)

    def dismiss(self) -> None:
        """The buffer's coroutines are over. Does nothing elsewhere than on its loop."""
        if self.sink is not None and self._loop is asyncio._get_running_loop():
            self.sink.dismiss()

    def check_loop(self) -> None:
        """Raise UsageError unless this loop may close it: the one it was opened on, or any if that
        is closed."""
        if self._loop is not asyncio.get_running_loop() and not self._loop.is_closed():
            raise UsageError(
                f"{self._name} cannot be closed on another event loop than it was opened on",
                hint="close it on its own loop; sync buffers have none",
            )

    async def finish(self) -> None:
        """End now, also what is held: touches of what is missing are errors from here on.

        Shared by all who ask, and goes on when they are cancelled. Raises what closing the source
        raises, after everything else was done; UsageError on another loop than the buffer's, unless
        that is closed.
        """
        self.check_loop()
        if self._loop.is_closed():
            service.call_soon(self._finish_without_loop)
            await self.ended()
        else:
            await self._finishing(self._finish)

    async def ended(self) -> None:
        """Wait until nobody holds the memory any more and everything is closed."""
        await asyncio.shield(asyncio.wrap_future(self._ended))

    def _begin_to_finish(self) -> None:
        """The last export has gone, in whatever thread and in the middle of whatever it does."""
        if not self._moved:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._start_to_finish)
        # It may be closed before it comes to that, or is through with it.
        with contextlib.suppress(RuntimeError, OSError):
            service.call_soon(self._finish_without_loop)

    def _start_to_finish(self) -> None:
        if self._moved:
            self._begin_to_finish()
        else:
            self._finishing.begin(self._finish).add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        if self._finishing.lost:
            # Somebody cancels all tasks, those that have not begun yet too.
            self._begin_to_finish()
        elif not task.cancelled() and (error := task.exception()) is not None:
            log.warning("closing the source of %s failed: %r", self._name, error)

    async def _finish(self) -> None:
        try:
            try:
                await self._stop_waiting_for_end()
                if self.sink is not None:
                    await self.sink.stop()
            finally:
                if not thrown_away():
                    self._drop_memory()
                    if not self._moved:
                        await aclose_source(self.source)
        finally:
            if thrown_away():
                self._begin_to_finish()  # elsewhere
            else:
                self._set_ended()

    def _drop_memory(self) -> None:
        region, pager, self.pager = self.region, self.pager, None
        if region is not None and pager is not None:
            try:
                region._shut()
            finally:
                shared_pagers.release(pager)

    def _set_ended(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    # ------------------------------------------------------ the end of the loop

    async def _wait_for_end(self) -> AsyncGenerator[None, None]:
        """What a loop does for asynchronous generators when it is about to be closed tells us so,
        while we may still await on it."""
        try:
            yield
        finally:
            if self._until_loop_ends is not None:
                self._until_loop_ends = None
                if self._closed and not self.held:
                    await self._finishing(self._finish)
                else:
                    await self._moving(self._move)

    async def _stop_waiting_for_end(self) -> None:
        generator, self._until_loop_ends = self._until_loop_ends, None
        if generator is not None:
            await generator.aclose()
        elif self._moving.running:
            await self._moving(self._move)

    async def _move(self) -> None:
        assert self.sink is not None
        try:
            await self.sink.move()
        except Exception as error:
            log.debug("%s stays with its loop: %s", self._name, error)
            return
        self._moved = True
        with contextlib.suppress(RuntimeError, OSError):  # then in silence
            service.call_soon(self._watch)
        try:
            await aclose_source(self.source)
        except Exception as error:
            log.warning("closing the source of %s failed: %r", self._name, error)

    def _watch(self) -> None:
        """On the rescue loop: the end of a loop waits for its threads, but not in silence."""
        region, pager, sink = self.region, self.pager, self.sink
        if region is None or pager is None or sink is None or self._loop.is_closed():
            return
        waiting = set(pager.who_waits(region))
        for name, offset in (waiting & self._waited) - self._told:
            self._told.add((name, offset))
            log.warning(
                "the end of an event loop waits for thread %s, which waits for byte %d of %s: %s "
                "(Ctrl-C ends the program)",
                name,
                offset,
                self._name,
                sink.last_error or "the source has not answered yet",
            )
        self._waited = waiting
        asyncio.get_running_loop().call_later(SILENCE, self._watch)

    def _finish_without_loop(self, pause: float = ENDING_FIRST) -> None:
        """On the rescue loop: if ours is closed before it has ended this, do it here."""
        if self._ended.done():
            return
        if not self._loop.is_closed():
            # It may still be using the descriptor.
            longer = min(pause * 2, ENDING_LONGEST)
            asyncio.get_running_loop().call_later(pause, self._finish_without_loop, longer)
            return
        try:
            self._finishing.abandon()
            self._moving.abandon()
            if self.sink is not None:
                self.sink.close()
            self._drop_memory()
            if not self._moved:
                self._close_stranded()
        finally:
            self._set_ended()

    def _close_stranded(self) -> None:
        """Close of the source what does not need the loop that it had."""
        self._task = asyncio.get_running_loop().create_task(self._close_in_time())
        self._task.add_done_callback(self._stranded)

    async def _close_in_time(self) -> None:
        # What it waits for may be the other loop's, and never come.
        async with asyncio.timeout(STRANDED):
            await aclose_source(self.source)

    def _stranded(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("closing the source of %s without its loop: %r", self._name, error)
