"""Tasks of our own, on loops whose tasks belong to everybody.

Two things that a coroutine's author does not expect happen to tasks:

- Somebody cancels one before its first step, as `asyncio.run` does at its end with all there are.
  Nothing of its coroutine runs then, no ``except`` and no ``finally`` either.
- The loop's task factory begins them at once (`asyncio.eager_task_factory`), so that they run, and
  may end, before whoever makes one has noted it.

`begin` makes a task for which the first is told, and the second does not happen. It makes the first
step of its coroutine by hand, up to where that awaits `FIRST_TURN`: what is thrown into the task
from then on is thrown there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar, cast

__all__ = ["FIRST_TURN", "begin", "begin_coroutine", "begin_surely"]

T = TypeVar("T")


class _FirstTurn:
    __slots__ = ()

    def __await__(self) -> Iterator[None]:  # no generator, which would cost more
        return iter(_ONCE)


_ONCE = (None,)
#: What a coroutine for `begin_coroutine` awaits before anything else, and nobody else does.
#: Raises CancelledError if the task is cancelled before it has begun. With an eager task factory
#: it returns before `begin_coroutine` does.
FIRST_TURN = cast("Awaitable[None]", _FirstTurn())


def begin_coroutine(
    coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, name: str | None = None
) -> asyncio.Task[T]:
    """A task for a coroutine that awaits `FIRST_TURN` first. On the thread of ``loop``."""
    coroutine.send(None)
    try:
        return loop.create_task(coroutine, name=name)
    except BaseException:
        coroutine.close()
        raise


def begin(
    function: Callable[[], Coroutine[Any, Any, T]],
    lost: Callable[[], object] | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    name: str | None = None,
) -> asyncio.Task[T]:
    """A task that runs the coroutine function ``function``, after the caller has had its turn.

    ``lost`` is called, before the callbacks of the task, when it was cancelled before ``function``
    was called: it does what that would have done in its ``finally``. On the loop's thread; ``loop``
    is the running one by default.
    """
    made = False

    async def run() -> T:
        try:
            await FIRST_TURN
            if not made:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            if lost is not None:
                lost()
            raise
        return await function()

    task = begin_coroutine(run(), loop or asyncio.get_running_loop(), name)
    made = True
    return task


def begin_surely(
    function: Callable[[], Coroutine[Any, Any, None]],
    made: Callable[[asyncio.Task[None]], object],
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    name: str | None = None,
) -> None:
    """`begin` it again for as often as it was cancelled before ``function`` was called: for what
    nobody would do otherwise. ``made`` is told each task, from which on it is the caller's to keep.
    """

    def again() -> None:
        made(begin(function, again, loop=loop, name=name))

    again()
