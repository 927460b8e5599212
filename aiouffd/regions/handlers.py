"""Running a user's handler for each block of a region that is touched: `Region.on_missing`."""

from __future__ import annotations

import asyncio
import inspect
import sys
import types
from collections import deque
from collections.abc import Awaitable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import AiouffdError, ClosedError, SourceTimeoutError, UsageError
from ..util.backoff import Backoff
from ..util.stepping import Eagerness, resume
from ..util.tasks import begin
from ..util.usercode import ends_the_program, is_ours, tell_loop
from ..util.waiting import call_soon_at
from .fault import Fault, Handler

if TYPE_CHECKING:
    from .region import Region

__all__ = ["HandlerSink", "UnresolvedError"]

_EAGER = sys.version_info >= (3, 12)

#: Waits between two tries of a handler that failed, in seconds: first and longest.
RETRY_FIRST, RETRY_LONGEST = 0.02, 5.0


class HandlerSink:
    """Runs a user's handler for each block that is touched, with the failure policy around it.

    The first step of a handler is made by hand, see `aiouffd.util.stepping`: inside a task until it
    has shown a few times that it does not wait, then without one. Where it does wait after all, a
    task goes on with it; where it fails, which it may because it found no current task, it is
    called again in one.
    """

    def __init__(self, region: Region, handler: Handler, portable: bool) -> None:
        self._region = region
        self._handler = handler
        self._portable = portable
        self._tasks: dict[asyncio.Task[None], int] = {}  # and the blocks they serve
        self._waiting: deque[Fault] = deque()
        self._closed = False
        self._eager = Eagerness()

    def miss(
        self, block: int, address: int = 0, flags: int = 0, thread: int = 0, generation: int = 0
    ) -> None:
        fault = Fault(self._region, block, address, flags, thread, generation)
        if not self._eager or not self._take_in_hand(fault):
            self._start(fault, None)

    def _take_in_hand(self, fault: Fault) -> bool:
        """Make the first step of the handler by hand. False if a task has to begin anew."""
        try:
            coroutine = self._handle(fault)
            future = coroutine.send(None)
        except StopIteration:
            return self._is_done(fault)
        except BaseException as error:
            # Perhaps for want of a task, so that it is nobody's business yet.
            self._eager.disappointed()
            if not ends_the_program(error):
                return False
            self._region.end(fault.block, 1)
            self._report(fault, error)
        else:
            self._eager.disappointed()
            self._start(fault, resume(coroutine, future))
        return True

    def _handle(self, fault: Fault) -> Any:
        """Call the handler: a coroutine to be driven. Raises what the handler raises."""
        answer: Any = self._handler(fault)
        if type(answer) is types.CoroutineType or isinstance(answer, Coroutine):
            return answer
        if inspect.isawaitable(answer):
            return _await(answer)
        raise UsageError(
            f"the handler of {self._region!r} gave {type(answer).__name__}, not a coroutine",
            hint="define it with `async def`",
        )

    def hit(self, block: int) -> None:
        """Blocks in flight are not reported for handlers."""

    def rescue(self, block: int) -> bool:
        if not self._portable:
            return False
        region = self._region
        address = region.address + block * region.block_size
        self._start(Fault(region, block, address, 0, 0, 0), None)
        return True

    def late(self, block: int) -> None:
        waiting = any(fault.block == block for fault in self._waiting)
        if not waiting and block not in self._tasks.values():
            self.miss(block, self._region.address + block * self._region.block_size)

    def _start(self, fault: Fault, begun: Awaitable[None] | None) -> None:
        if begun is None and len(self._tasks) >= self._region.pager.max_in_flight:
            self._waiting.append(fault)
            return
        if _EAGER:
            try:
                task: asyncio.Task[None] = asyncio.Task(
                    self._serve(fault, begun),
                    loop=asyncio.get_running_loop(),
                    eager_start=True,  # type: ignore[call-arg]
                )
            except (KeyboardInterrupt, SystemExit) as error:
                # Raised by the handler, and to end the loop; not what else we are about to do.
                self._report(fault, error)
                return
            if task.done():
                return
        else:
            task = begin(partial(self._serve, fault, begun), partial(self._lost, fault, begun))
        self._tasks[task] = fault.block
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if self._waiting and not self._closed:
            self._start(self._waiting.popleft(), None)

    def _lost(self, fault: Fault, begun: Awaitable[None] | None) -> None:
        """Cancelled before its first step: the toucher asks again."""
        if isinstance(begun, Coroutine):
            begun.close()
        if not self._closed and not self._region._closed:
            self._region.end(fault.block, 1)

    async def _call(self, fault: Fault) -> None:
        coroutine = self._handle(fault)
        try:
            future = coroutine.send(None)
        except StopIteration:
            self._eager.finished()
        else:
            self._eager.waited()
            await resume(coroutine, future)

    async def _serve(self, fault: Fault, begun: Awaitable[None] | None) -> None:
        region = self._region
        task = asyncio.current_task()
        backoff = Backoff(RETRY_FIRST, RETRY_LONGEST)
        while True:
            limit = None
            try:
                attempt = begun or self._call(fault)
                begun = None
                if region.deadline is None:
                    await attempt
                else:
                    async with asyncio.timeout(region.deadline) as limit:
                        await attempt
                if self._is_done(fault):
                    return
                raise UnresolvedError(fault)
            except BaseException as error:
                if is_ours(error, task):
                    if not self._closed and not region._closed:
                        # Somebody cancelled the task: the toucher asks again.
                        region.end(fault.block, 1)
                    raise
                if region._closed:
                    return
                if isinstance(error, TimeoutError) and limit is not None and limit.expired():
                    error = SourceTimeoutError(
                        f"no answer for {fault!r} within {region.deadline} seconds"
                    )
                self._report(fault, error)
            if region._closed or self._is_done(fault):
                return
            if region.errors == "soft" and self._poison(fault):
                return
            await asyncio.sleep(backoff.next())

    def _poison(self, fault: Fault) -> bool:
        try:
            fault.poison()
        except ClosedError:
            return True
        except AiouffdError as error:
            self._report(fault, error)
            return False
        return True

    def _is_done(self, fault: Fault) -> bool:
        region = self._region
        if region._settled(fault.offset, fault.length):
            return True
        if not fault.resolved:
            return False
        # Pages were dropped while others were still on their way: who waits asks again.
        region.end(fault.block, 1)
        return True

    def _report(self, fault: Fault, error: BaseException) -> None:
        tell_loop(
            asyncio.get_running_loop(),
            f"the handler of {self._region!r} failed for {fault!r}",
            error,
            fault=fault,
        )

    def close(self) -> None:
        self._closed = True
        self._waiting.clear()
        for task in list(self._tasks):
            loop = task.get_loop()
            if loop.is_closed():
                continue
            if loop is asyncio._get_running_loop():
                task.cancel()
            else:
                call_soon_at(loop, task.cancel)


class UnresolvedError(UsageError):
    """A handler returned and left its fault as it was."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(
            f"the handler returned without resolving {fault!r}",
            hint="call fault.copy(), zero(), poison() or continue_() in it",
        )


async def _await(awaitable: Awaitable[Any]) -> None:
    await awaitable
