"""Where the torture test's bytes come from: one module for each source, with its ways to fail.

Each has ``origin(data, seed)``, an async context manager that gives an `Origin` over ``data``.
What serves must not need the loop's thread (a process or a thread of its own), because that
thread may wait for a page.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def nothing() -> None:
    """For origins whose weather is always the same."""


@dataclass
class Origin:
    """A source (or what `aiouffd.open` takes) and how to make it fail: ``foul`` after the buffer
    is open, ``fair`` when everything has to work again."""

    source: Any
    foul: Callable[[], None] = nothing
    fair: Callable[[], None] = nothing


@contextmanager
def in_thread(server: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """``server`` entered on an event loop of another thread, which goes on when ours waits."""
    ready = threading.Event()
    ends: list[Callable[[], object]] = []
    entered: list[T] = []

    async def serve() -> None:
        end = asyncio.Event()
        loop = asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(end.set))
        async with server as value:
            entered.append(value)
            ready.set()
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    if not ready.wait(20):
        raise TimeoutError("the server did not start")
    try:
        yield entered[0]
    finally:
        ends[0]()
        thread.join()
