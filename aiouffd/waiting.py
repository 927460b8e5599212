"""Waiting for what others finish: small pieces that several parts share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Done", "countdown", "retrieve"]

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


def retrieve(task: asyncio.Future[Any]) -> None:
    """As a callback of a task whose error somebody else has heard of: asyncio need not complain."""
    if not task.cancelled():
        task.exception()
