"""How sources open and close, and how they call code that is not theirs.

Both are operations that happen once (`aiouffd.util.once`), whoever of those who ask is cancelled,
and what others' code raises (a file system of fsspec, a function that gives credentials) is a
failure of the read it was called for: not an order to our task, and never the loop's.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

from ..errors import ClosedError, SourceError
from ..util.once import Once, cancelled_from_outside
from ..util.usercode import describe, is_ours
from .base import Source, aclose_source, as_source_error

__all__ = [
    "Life",
    "contained",
    "give_back",
    "in_any_case",
    "is_failure",
    "run_in_thread",
    "submit",
    "submitted",
]

log = logging.getLogger("aiouffd")

T = TypeVar("T")
Operation = Callable[[], Coroutine[Any, Any, None]]


class Life:
    """Of one source: opened once, closed once, and not opened any more after that.

    ``name`` is for messages. Keeps neither the source nor its methods alive. One loop at a time.
    """

    __slots__ = ("_closing", "_name", "_opening", "closed")

    def __init__(self, name: str) -> None:
        self._name = name
        #: Whether closing was asked for.
        self.closed = False
        self._opening = Once[None](f"opening {name}", abandon=True)
        self._closing = Once[None](f"closing {name}", keep_failure=True)

    @property
    def opened(self) -> bool:
        """Whether it was opened, and nobody has asked for it to be closed."""
        return self._opening.succeeded and not self.closed

    def check(self) -> None:
        """Raise ClosedError if closing was asked for."""
        if self.closed:
            raise ClosedError(f"{self._name} is closed")

    async def open(self, operation: Operation, undo: Operation) -> None:
        """Run ``operation``, unless that was done. A failure may be followed by another call.

        ``undo`` takes back what ``operation`` did, if whoever wanted it was cancelled meanwhile.
        Raises ClosedError after closing, also if that comes while it runs.
        """
        self.check()
        try:
            await self._opening(operation, undo)
        except asyncio.CancelledError:
            if self.closed and not cancelled_from_outside():
                raise ClosedError(f"{self._name} was closed while it was opened") from None
            raise
        self.check()

    async def close(self, operation: Operation) -> None:
        """End opening if it is under way, and run ``operation``. Others who ask wait for the same
        run; it goes on when one of them is cancelled. What it raises goes to those who wait."""
        self.closed = True
        await self._closing.surely(partial(self._close, operation))

    async def _close(self, operation: Operation) -> None:
        try:
            await self._opening.stop()
        finally:
            await in_any_case(operation)


def is_failure(error: BaseException) -> bool:
    """In ``except BaseException`` around others' code that was awaited: whether the error is that
    code's, and not an order to stop (see `usercode.is_ours`)."""
    return not is_ours(error, asyncio.current_task())


async def in_any_case(operation: Operation) -> None:
    """Run what may be run twice. Cancelled it runs once more, for with us all tasks may have been
    cancelled (at the end of a loop), and what it waited for may not even have begun."""
    try:
        await operation()
    except asyncio.CancelledError:
        await operation()
        raise


async def contained(function: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
    """Call and await others' code. What is no Exception, and a failure all the same, comes out as a
    SourceError. (Not given a coroutine: nobody would await that if we are cancelled at once.)"""
    try:
        return await function(*arguments, **options)
    except Exception:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise as_source_error(error) from error


async def give_back(source: Source) -> None:
    """Close a source because something else failed, which is what is to be raised: an error of
    closing goes to the log."""
    try:
        await in_any_case(partial(contained, aclose_source, source))
    except Exception as error:
        log.warning("%r could not be closed: %r", source, error)


async def run_in_thread(executor: Executor, function: Callable[..., T], *arguments: Any) -> T:
    """Call others' code in a thread. Whatever it raises comes out here, as an Exception; and
    SourceError, which is transient, if there is no thread to be had.

    A future refuses some exceptions (StopIteration; asyncio would wait for ever) and takes others
    for orders (CancelledError, SystemExit, which would end the loop), so none is given to one.
    """

    def call() -> tuple[T | None, BaseException | None]:
        try:
            return function(*arguments), None
        except BaseException as error:
            return None, error

    value, error = await submitted(executor, call)
    try:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise error
        if error is not None:
            raise RuntimeError(f"a thread ended by {describe(error)}") from error
    finally:
        del error  # which would be in a cycle with its traceback
    return value  # type: ignore[return-value]


def submitted(executor: Executor, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
    """As `submit`; the future is of the running loop."""
    return asyncio.wrap_future(submit(executor, function, *arguments))


def submit(executor: Executor, function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Have ``function`` called by a thread. Raises SourceError, which is transient, if there is
    none to be had (a limit of processes); then it is never called."""
    refused = False

    def call() -> T:
        if refused:
            # The executor has queued it all the same, for a thread that it gets one day.
            raise RuntimeError("nobody waits for this any more")
        return function(*arguments)

    try:
        return executor.submit(call)
    except RuntimeError as error:
        refused = True
        if "can't start new thread" not in str(error):
            raise
        raise SourceError("no thread can be started", transient=True, errno=errno.EAGAIN) from error
