"""Waiting for what others finish: small pieces that several parts share."""

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
    """A future, and what to call at each of ``count`` ends: it has its result at the last one, or
    the first error at once. It may be cancelled meanwhile. On the running loop."""
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
    """``loop.call_soon_threadsafe``, from any thread. False if the loop is closed, which it may
    become between a look and the call: so there is no look before."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        return False
    return True


def retrieve(task: asyncio.Future[Any]) -> None:
    """As a callback of a task whose error somebody else has heard of: asyncio need not complain."""
    if not task.cancelled():
        task.exception()


def in_thread(function: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run it in a thread of its own, called ``name``: those of the loop's executor may all wait for
    pages. On the running loop. It goes on when the future is cancelled, and ends with the process.
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
