"""Calling code that is not ours: callbacks, handlers and sources may raise anything.

Whatever they raise is the end of one request and of nothing else. Two questions come up wherever
they are called, and are answered here: whether an exception is theirs at all (`is_ours`), and whom
to tell where nobody waits for the outcome (`tell_loop`, `Complaints`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from typing import Any

from .once import cancelled_from_outside

__all__ = ["Complaints", "describe", "ends_the_program", "is_ours", "tell_loop"]

#: Kinds of complaint that are remembered, so that each is made once. Further ones are not made.
MOST = 100


def is_ours(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Whether an exception that came out of an await in ``task`` is meant for whoever awaits.

    That is a CancelledError if the task was cancelled, a GeneratorExit if its coroutine is being
    closed, which happens when it does not run, and a KeyboardInterrupt or SystemExit on the main
    thread, where they end the program. Anything else was raised by the code that was called, also
    a CancelledError that nobody asked for. Take ``task`` before the await, from
    `asyncio.current_task`.
    """
    if isinstance(error, Exception):
        return False
    if isinstance(error, asyncio.CancelledError):
        return cancelled_from_outside()
    if isinstance(error, GeneratorExit):
        return asyncio._get_running_loop() is None or asyncio.current_task() is not task
    return ends_the_program(error)


def ends_the_program(error: BaseException) -> bool:
    """Whether it is a KeyboardInterrupt or SystemExit, on the main thread."""
    ends = isinstance(error, KeyboardInterrupt | SystemExit)
    return ends and threading.current_thread() is threading.main_thread()


def describe(error: BaseException) -> str:
    """An exception in one line. Never raises, though its ``__str__`` may."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        text = "which cannot be printed"
    return f"{name}: {text}" if text else name


def tell_loop(
    loop: asyncio.AbstractEventLoop, message: str, error: BaseException, **more: Any
) -> None:
    """Call the loop's exception handler, which is code of the user's as well: nothing comes out of
    here. What ends the program is raised from the loop instead. From the loop's thread.
    """
    if not ends_the_program(error):
        try:
            loop.call_exception_handler({"message": message, "exception": error, **more})
            return
        except BaseException as another:  # of those that a loop lets pass, such as SystemExit
            error = another
    with contextlib.suppress(RuntimeError):  # it is closed, and so has ended
        loop.call_soon(_raise, error)


def _raise(error: BaseException) -> None:
    raise error


class Complaints:
    """Tells the loop what callbacks have raised: once per callback, class of error, and place."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._made: set[tuple[str, type[BaseException], str]] = set()

    def make(self, what: str, error: BaseException) -> None:
        """``what`` has raised ``error``. From the loop's thread."""
        place = _place(error)
        kind = (what, type(error), place)
        if not ends_the_program(error):
            if kind in self._made or len(self._made) >= MOST:
                return
            self._made.add(kind)
        tell_loop(
            self._loop,
            f"{what} raised {type(error).__name__}{place}, which is told once",
            error,
        )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
