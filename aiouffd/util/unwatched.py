"""Asynchronous generators that only their consumer closes.

An event loop notes each generator that starts on it, and `shutdown_asyncgens`, which `asyncio.run`
calls at its end, closes all of them at once. One that a task is in the middle of cannot be closed
("asynchronous generator is already running"), and the loop's exception handler gets that error,
though the task will close it in order. Streams of sources are always closed by their readers. See
https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.shutdown_asyncgens.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterable, AsyncIterator, Awaitable
from typing import Any, Generic, TypeVar

__all__ = ["Unwatched"]

T = TypeVar("T")


class Unwatched(Generic[T]):
    """Iterates over ``iterable`` without registering it with the loop; its creator closes it."""

    __slots__ = ("_begun", "_iterator")

    def __init__(self, iterable: AsyncIterable[T]) -> None:
        self._iterator: AsyncIterator[T] = aiter(iterable)
        self._begun = False

    def __aiter__(self) -> Unwatched[T]:
        return self

    def __anext__(self) -> Awaitable[T]:
        if self._begun:
            return self._iterator.__anext__()
        # A generator reads the hooks at its first iteration: see sys.set_asyncgen_hooks.
        self._begun = True
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(None, None)
        try:
            return self._iterator.__anext__()
        finally:
            sys.set_asyncgen_hooks(*hooks)

    async def aclose(self) -> None:
        """Close the iterator, if it can be closed."""
        aclose: Any = getattr(self._iterator, "aclose", None)
        if aclose is not None:
            await aclose()
