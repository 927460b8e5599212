"""Calling user code: callbacks, handlers and sources may raise anything.

Whatever they raise ends one request and nothing else. Two questions come up at every such call and
are answered here: whether an exception came from the user's code at all (`is_ours`), and where to
report it if no caller waits for the outcome (`tell_loop`, `Complaints`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from typing import Any

from .once import cancelled_from_outside

__all__ = ["Complaints", "describe", "ends_the_program", "is_ours", "tell_loop"]

#: Kinds of errors that are remembered, so that each is reported once. Further ones are dropped.
MOST = 100


def is_ours(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Return whether an exception from an await in ``task`` is aimed at the awaiting code itself.

    That is a CancelledError if the task was cancelled, a GeneratorExit if its coroutine is being
    closed, which happens when it does not run, and a KeyboardInterrupt or SystemExit on the main
    thread, where they end the program. Anything else was raised by the code that was called,
    including a CancelledError without a cancellation.

    Args:
        error: The exception.
        task: The running task, taken from `asyncio.current_task` before the await.
    """
    if isinstance(error, Exception):
        return False
    if isinstance(error, asyncio.CancelledError):
        return cancelled_from_outside()
    if isinstance(error, GeneratorExit):
        return asyncio._get_running_loop() is None or asyncio.current_task() is not task
    return ends_the_program(error)


def ends_the_program(error: BaseException) -> bool:
    """Return whether ``error`` is a KeyboardInterrupt or SystemExit, on the main thread."""
    ends = isinstance(error, KeyboardInterrupt | SystemExit)
    return ends and threading.current_thread() is threading.main_thread()


def describe(error: BaseException) -> str:
    """Format an exception in one line. Never raises, even if its ``__str__`` does."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        text = "which cannot be printed"
    return f"{name}: {text}" if text else name


def tell_loop(
    loop: asyncio.AbstractEventLoop, message: str, error: BaseException, **more: Any
) -> None:
    """Call the loop's exception handler, which is user code too: nothing is raised from here.

    KeyboardInterrupt and SystemExit are raised from the loop instead. On the loop's thread.

    Args:
        loop: The loop.
        message: The text for the handler's context.
        error: The exception for the context.
        **more: Further members of the context.
    """
    if not ends_the_program(error):
        try:
            loop.call_exception_handler({"message": message, "exception": error, **more})
            return
        except BaseException as another:  # of those that a loop lets pass, such as SystemExit
            error = another
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon(_raise, error)


def _raise(error: BaseException) -> None:
    raise error


class Complaints:
    """Reports exceptions of callbacks to the loop, once per callback, class of error, and place."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._made: set[tuple[str, type[BaseException], str]] = set()

    def make(self, what: str, error: BaseException) -> None:
        """Report that ``what`` raised ``error``. On the loop's thread."""
        place = _place(error)
        kind = (what, type(error), place)
        if not ends_the_program(error):
            if kind in self._made or len(self._made) >= MOST:
                return
            self._made.add(kind)
        tell_loop(
            self._loop,
            f"{what} raised {type(error).__name__}{place}; further ones like it are not reported",
            error,
        )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
