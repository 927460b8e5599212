"""Operations that happen once, however often they are asked for and whoever of those is cancelled.

Opening and closing take several steps with awaits between them. Done by the task of whoever asks,
they end half-way when that task is cancelled, and a flag that says "closed" from the first step on
then makes every later attempt do nothing. Here the operation is a task of its own, which all who
ask wait for, and whose result all of them get.

What such an operation still has to do itself: put what needs no await into a ``finally``, because
`asyncio.run` cancels every task at its end, and a loop that is closed first never resumes it.
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

    The first call starts it as a task on the running loop; calls that come meanwhile wait for the
    same task, and later ones get its result at once. The exception of a failed operation goes to
    those who wait; after that a new call starts it again, unless ``keep_failure``: then it stays
    ended, and later calls return None.

    Callers may be cancelled. The operation then goes on without them, or with ``abandon`` ends when
    the last of them is gone: it is cancelled, and if it had succeeded already, ``undo`` is run.

    :param what: how to call it in messages: "closing the buffer".
    :param keep_failure: for closing, which cannot be done again.
    :param abandon: for opening, which is for nobody when nobody waits.

    It refers to the operation only while that runs, so that an object may hold one for a method of
    its own without a cycle. One loop at a time, not thread-safe. Raises UsageError when called from
    within the operation, which would wait for itself, and while it runs on another loop.
    """

    __slots__ = (
        "_abandon",
        "_began",
        "_given_up",
        "_keep_failure",
        "_task",
        "_told",
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
        # A task that nobody waits for, and that is told to end.
        self._given_up: asyncio.Task[T] | None = None
        self._began = False
        self._waiting = 0
        # Whether anybody has been told of its success.
        self._told = False

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
        """Run ``operation``, or wait for its run. ``undo`` takes back a success that nobody was
        told of. Raises what the operation raises."""
        await self._undone()
        task = self._current()
        if task is None:
            task = self._start(operation)
        elif task.done() and _failed(task):
            return None  # type: ignore[return-value]
        if task.done():
            self._told = True
            return task.result()
        if task is asyncio.current_task():
            raise UsageError(f"{self._what} waits for itself")
        self._waiting += 1
        try:
            await asyncio.wait((task,))  # which leaves it alone when we are cancelled
        except asyncio.CancelledError:
            if self._abandon and self._waiting == 1 and not self._told:
                await self._give_up(task, undo)
            raise
        finally:
            self._waiting -= 1
        self._told = True
        return task.result()

    def begin(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Start it, unless that was done, and wait for nothing. Returns its task, which may have
        failed long ago; what it raises is the caller's business."""
        return self._current() or self._start(operation)

    def _start(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        self._began = self._told = False
        task = begin(partial(self._run, operation), name=self._what)
        self._task = task
        return task

    async def surely(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """The same for closing: also where all tasks are cancelled at once, as at the end of a
        loop, and this one has not begun yet. Raises what the operation raises, but CancelledError
        only if our own task was cancelled."""
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
        """The task to wait for; None if one has to be started."""
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
        """Cancel the operation if it runs, and wait until it has ended, or was taken back; its
        callers get CancelledError. A success stays one. No exception of the operation comes out
        here."""
        task = self._task
        if task is not None and self.running and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait((task,))
        await self._undone()

    def abandon(self) -> None:
        """Its loop was closed, and what it did half is done elsewhere. See `abandon`."""
        if self._task is not None:
            abandon(self._task)

    async def _give_up(
        self, task: asyncio.Task[T], undo: Callable[[], Coroutine[Any, Any, None]] | None
    ) -> None:
        """Nobody waits any more."""

        def ended(task: asyncio.Task[T]) -> None:
            if not _failed(task) and undo is not None and self._task is task:
                self._task = None
                begin_surely(undo, self._undoes, loop=task.get_loop(), name=f"undo {self._what}")

        self._given_up = task
        task.cancel()
        try:
            await asyncio.wait((task,))
        finally:
            # Cancelled once more we go at once, and the operation ends in the background.
            if task.done():
                ended(task)
            else:
                task.add_done_callback(ended)
        await self._undone()

    def _undoes(self, task: asyncio.Task[None]) -> None:
        self._undoing = task

    async def _undone(self) -> None:
        """Wait for what ends because nobody wanted it, not to be taken for its victim."""
        if (task := self._given_up) is not None and _on_this_loop(task):
            await asyncio.wait((task,))
        if (undoing := self._undoing) is not None and _on_this_loop(undoing):
            await asyncio.wait((undoing,))


def _on_this_loop(task: asyncio.Task[Any]) -> bool:
    return not task.done() and task.get_loop() is asyncio.get_running_loop()


def thrown_away() -> bool:
    """In a ``finally``: whether it is there because the coroutine is thrown away unfinished. Its
    loop is gone, and nothing can be awaited."""
    return isinstance(sys.exception(), GeneratorExit)


def abandon(task: asyncio.Task[Any]) -> None:
    """End a task whose loop was closed, if it has not ended, without a word. (When such a one is
    collected it is told of, and where its coroutine has not begun that is told as well.)"""
    if not task.done():
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        try:
            task.get_coro().close()
        except Exception as error:
            log.debug("%r of a loop that is closed: %r", task, error)


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


def cancelled_from_outside() -> bool:
    """In ``except CancelledError``: whether the running task was cancelled.

    Otherwise what was awaited ended in CancelledError by itself (the future of an executor that
    was shut down, a task that somebody else cancelled), which is an error like any other and not a
    reason to stop.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
