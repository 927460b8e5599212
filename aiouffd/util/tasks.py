"""Internal tasks, on loops where any code can cancel any task.

Two things that a coroutine's author does not expect happen to tasks:

- A task is cancelled before its first step, as `asyncio.run` does at its end with all there are.
  Nothing of its coroutine runs then, no ``except`` and no ``finally`` either.
- The loop's task factory starts tasks eagerly (`asyncio.eager_task_factory`), so that one runs, and
  may end, before its creator has stored it.

`begin` makes a task that reports the first and is not subject to the second. It runs the first step
of the coroutine itself, up to where that awaits `FIRST_TURN`: what is thrown into the task from
then on is thrown there.
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
#: A coroutine for `begin_coroutine` awaits this before anything else; no other coroutine may.
#: Raises CancelledError if the task is cancelled before it has begun. With an eager task factory
#: it returns before `begin_coroutine` does.
FIRST_TURN = cast("Awaitable[None]", _FirstTurn())


def begin_coroutine(
    coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, name: str | None = None
) -> asyncio.Task[T]:
    """Create a task for a coroutine that awaits `FIRST_TURN` first. On the thread of ``loop``."""
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
    """Create a task that runs ``function``, not before the caller has returned to the loop.

    To be called on the loop's thread.

    Args:
        function: The coroutine function.
        lost: Called, before the callbacks of the task, if that was cancelled before ``function``
            was called: it does what ``function`` would have done in its ``finally``.
        loop: The loop; the running one by default.
        name: The task's name.
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
    """Run `begin` again each time the task is cancelled before ``function`` was called.

    For clean-up that would otherwise not happen. To be called on the loop's thread.

    Args:
        function: The coroutine function.
        made: Called with each task; the caller has to keep a reference to it.
        loop: The loop; the running one by default.
        name: The tasks' name.
    """

    def again() -> None:
        made(begin(function, again, loop=loop, name=name))

    again()
