"""Operations that run once, however many callers ask for them and whichever are cancelled.

Opening and closing take several steps with awaits between them. Run in the caller's task, they
stop half-way when that task is cancelled, and a flag that says "closed" from the first step on
then makes every later attempt do nothing. Here the operation has a task of its own; all callers
wait for that task and get its result.

The operation itself still has to put what needs no await into a ``finally``, because `asyncio.run`
cancels every task at its end, and a loop that is closed before that never resumes it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

from ..errors import UsageError
from .tasks import begin, begin_surely

__all__ = ["Once", "abandon", "cancelled_from_outside", "thrown_away"]

log = logging.getLogger("aiouffd")

T = TypeVar("T")


class Once(Generic[T]):
    """One run of an operation: ``await once(operation)``, with a coroutine function.

    The first call starts it as a task on the running loop; concurrent calls wait for the same task,
    and later ones return its result at once. If the operation fails, all waiting callers get the
    exception; a later call starts it again, unless ``keep_failure``: then it stays ended, and later
    calls return None.

    Callers may be cancelled. The operation then goes on without them, or, with ``abandon``, is
    cancelled when the last caller is gone; if it had succeeded already, ``undo`` is run.

    It refers to the operation only while that runs, so that an object may hold one for a method of
    its own without a cycle. One loop at a time, not thread-safe.

    Args:
        what: Its name in messages, such as "closing the buffer".
        keep_failure: Do not run it again after a failure: for closing.
        abandon: Cancel it when no caller waits for it any more: for opening.

    Raises:
        UsageError: When called from within the operation, which would wait for itself, and while it
            runs on another loop.
    """

    __slots__ = (
        "_abandon",
        "_began",
        "_delivered",
        "_given_up",
        "_keep_failure",
        "_task",
        "_undoing",
        "_waiting",
        "_what",
    )

    def __init__(self, what: str, *, keep_failure: bool = False, abandon: bool = False) -> None:
        self._what = what
        self._keep_failure = keep_failure
        self._abandon = abandon
        self._task: asyncio.Task[T] | None = None
        self._undoing: asyncio.Task[None] | None = None
        # A task that has no waiters left and was cancelled.
        self._given_up: asyncio.Task[T] | None = None
        self._began = False
        self._waiting = 0
        # Whether any caller has got its result.
        self._delivered = False

    @property
    def running(self) -> bool:
        """Whether it was begun and has not ended."""
        task = self._task
        return task is not None and not task.done() and not task.get_loop().is_closed()

    @property
    def succeeded(self) -> bool:
        """Whether it has ended without an exception."""
        task = self._task
        return task is not None and task.done() and not _failed(task)

    @property
    def lost(self) -> bool:
        """Whether its task was cancelled before its first step, so that nothing was done."""
        task = self._task
        return task is not None and task.done() and not self._began

    async def __call__(
        self,
        operation: Callable[[], Coroutine[Any, Any, T]],
        undo: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> T:
        """Run ``operation``, or wait for the run in progress.

        Args:
            operation: The coroutine function. Its exceptions propagate to all callers.
            undo: Reverts a success whose result no caller got. Used with ``abandon`` only.
        """
        await self._undone()
        task = self._current()
        if task is None:
            task = self._start(operation)
        elif task.done() and _failed(task):
            return None  # type: ignore[return-value]
        if task.done():
            self._delivered = True
            return task.result()
        if task is asyncio.current_task():
            raise UsageError(f"{self._what} waits for itself")
        self._waiting += 1
        try:
            await asyncio.wait((task,))  # which leaves it alone when we are cancelled
        except asyncio.CancelledError:
            if self._abandon and self._waiting == 1 and not self._delivered:
                await self._give_up(task, undo)
            raise
        finally:
            self._waiting -= 1
        self._delivered = True
        return task.result()

    def begin(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Start ``operation`` unless it was started, without waiting for it.

        Returns:
            Its task, which may be done; the caller has to retrieve its exception.
        """
        return self._current() or self._start(operation)

    def _start(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        self._began = self._delivered = False
        task = begin(partial(self._run, operation), name=self._what)
        self._task = task
        return task

    async def surely(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """Run ``operation`` even if all tasks are cancelled at once, as at the end of a loop.

        That cancels the operation's task before its first step; it is then started again. Raises
        what the operation raises, but CancelledError only if the caller's own task was cancelled.
        """
        try:
            await self(operation)
        except asyncio.CancelledError:
            if self.lost:
                await self(operation)
            if cancelled_from_outside():
                raise

    async def _run(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        self._began = True
        return await operation()

    def _current(self) -> asyncio.Task[T] | None:
        """Return the task to wait for; None if one has to be started."""
        task = self._task
        if task is None:
            return None
        if task.done():
            # A task that is cancelled before its first step does nothing at all.
            again = not self._began or not self._keep_failure
            return None if _failed(task) and again else task
        loop = task.get_loop()
        if loop.is_closed():
            return None
        if loop is not asyncio.get_running_loop():
            raise UsageError(
                f"{self._what} is under way on another event loop",
                hint="await it on the loop that it was begun on",
            )
        return task

    async def stop(self) -> None:
        """Cancel the operation if it runs, and wait until it has ended or was undone.

        Its callers get CancelledError. A success stays one. Exceptions of the operation are not
        raised here.
        """
        task = self._task
        if task is not None and self.running and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait((task,))
        await self._undone()

    def abandon(self) -> None:
        """End the operation of a loop that was closed; the caller does the rest. See `abandon`."""
        if self._task is not None:
            abandon(self._task)

    async def _give_up(
        self, task: asyncio.Task[T], undo: Callable[[], Coroutine[Any, Any, None]] | None
    ) -> None:
        """Cancel ``task``, whose last caller is gone, and undo it if it succeeds all the same."""

        def ended(task: asyncio.Task[T]) -> None:
            if not _failed(task) and undo is not None and self._task is task:
                self._task = None
                begin_surely(undo, self._undoes, loop=task.get_loop(), name=f"undo {self._what}")

        self._given_up = task
        task.cancel()
        try:
            await asyncio.wait((task,))
        finally:
            # If we are cancelled once more we return at once; it ends in the background.
            if task.done():
                ended(task)
            else:
                task.add_done_callback(ended)
        await self._undone()

    def _undoes(self, task: asyncio.Task[None]) -> None:
        self._undoing = task

    async def _undone(self) -> None:
        """Wait for an abandoned run to end, so that a new call does not get its CancelledError."""
        if (task := self._given_up) is not None and _on_this_loop(task):
            await asyncio.wait((task,))
        if (undoing := self._undoing) is not None and _on_this_loop(undoing):
            await asyncio.wait((undoing,))


def _on_this_loop(task: asyncio.Task[Any]) -> bool:
    return not task.done() and task.get_loop() is asyncio.get_running_loop()


def thrown_away() -> bool:
    """Return, in a ``finally``, whether the coroutine is being closed unfinished.

    Its loop is gone then, and nothing can be awaited.
    """
    return isinstance(sys.exception(), GeneratorExit)


def abandon(task: asyncio.Task[Any]) -> None:
    """End a task whose loop was closed, unless it is done.

    Collecting it would log "Task was destroyed but it is pending", and warn of a coroutine that was
    never awaited; this does neither.
    """
    if not task.done():
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        try:
            task.get_coro().close()
        except Exception as error:
            log.debug("%r of a loop that is closed: %r", task, error)


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


def cancelled_from_outside() -> bool:
    """Return, in ``except CancelledError``, whether the running task itself was cancelled.

    Otherwise what was awaited ended in CancelledError (the future of an executor that was shut
    down, a task cancelled by other code), which is an error like any other and no reason to stop.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
