"""Tasks of our own, on loops whose tasks belong to everybody.

Two things that a coroutine's author does not expect happen to tasks:

- Somebody cancels one before its first step, as `asyncio.run` does at its end with all there are.
  Nothing of its coroutine runs then, no ``except`` and no ``finally`` either.
- The loop's task factory begins them at once (`asyncio.eager_task_factory`), so that they run, and
  may end, before whoever makes one has noted it.

`begin` makes a task for which the first is told, and the second does not happen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["begin", "begin_surely"]

T = TypeVar("T")


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
    made = began = False

    async def run() -> T:
        nonlocal began
        if not made:
            await asyncio.sleep(0)
        began = True
        # Which would cost a turn of the loop at the end.
        task.remove_done_callback(ended)
        return await function()

    def ended(_task: asyncio.Task[T]) -> None:
        if not began and lost is not None:
            lost()

    task = (loop or asyncio.get_running_loop()).create_task(run(), name=name)
    made = True
    task.add_done_callback(ended)
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
