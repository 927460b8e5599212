"""Small helpers for waiting: countdowns, other loops, threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

__all__ = ["Done", "call_soon_at", "countdown", "in_thread", "retrieve"]

T = TypeVar("T")

#: Called once, with the error or None.
Done: TypeAlias = Callable[[BaseException | None], None]


def countdown(count: int) -> tuple[asyncio.Future[None], Done]:
    """Return a future and a function to call as each of ``count`` operations ends.

    The future is done at the last call, or fails at the first call with an error. It may be
    cancelled meanwhile. On the running loop.
    """
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = count

    def done(error: BaseException | None) -> None:
        nonlocal left
        left -= 1
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        elif not left:
            future.set_result(None)

    return future, done


def call_soon_at(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any
) -> bool:
    """Call ``loop.call_soon_threadsafe``, from any thread; return False if the loop is closed.

    The loop may be closed between a check and the call, so there is no check first.
    """
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        return False
    return True


def retrieve(task: asyncio.Future[Any]) -> None:
    """Mark a task's exception as retrieved; a done callback for one that is reported elsewhere."""
    if not task.cancelled():
        task.exception()


def in_thread(function: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run ``function`` in a daemon thread of its own; its outcome is the future's.

    The threads of the loop's executor may all be blocked in page faults. Cancelling the future does
    not stop the thread. On the running loop.

    Args:
        function: Called once, in the thread.
        name: The thread's name.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            value = function()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(value)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(result)
