"""Tasks that are cancelled before their first step, as `asyncio.run` does it at its end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Coroutine, Iterator
from typing import Any


def name_of(coroutine: Coroutine[Any, Any, Any]) -> str:
    """The qualified name of a coroutine, or of what `aiouffd.util.tasks.begin` runs in it."""
    frame = getattr(coroutine, "cr_frame", None)
    function: Any = None if frame is None else frame.f_locals.get("function")
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function if function is not None else coroutine, "__qualname__", "")


class Losing:
    """A task factory that cancels the next tasks of some name right after it has made them."""

    def __init__(self, names: tuple[str, ...], times: int) -> None:
        self._names = names
        self.left = times
        #: How many were.
        self.lost = 0

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> asyncio.Task[Any]:
        name = name_of(coroutine)
        task = asyncio.Task(coroutine, loop=loop, **options)
        if self.left and name.endswith(self._names):
            self.left -= 1
            self.lost += 1
            task.cancel()
        return task


@contextlib.contextmanager
def losing(
    *names: str, times: int = 1, loop: asyncio.AbstractEventLoop | None = None
) -> Iterator[Losing]:
    """Lose the first tasks that are made for functions whose qualified names end so."""
    loop = loop or asyncio.get_running_loop()
    factory = Losing(names, times)
    before = loop.get_task_factory()
    loop.set_task_factory(factory)
    try:
        yield factory
    finally:
        loop.set_task_factory(before)
