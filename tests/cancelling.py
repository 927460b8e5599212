"""Cancel an operation at every place where it waits, and count what that leaves behind.

A test describes one run and says which part of it is cut off::

    async def run(cut: Cut) -> None:
        source = make()
        try:
            await cut(source.open())         # cancelled in here, or not
            ...                              # what must still be right; see `Cut.cancelled`
        finally:
            await source.aclose()

    await cancel_everywhere(run)

The run is repeated, cut off at the first suspension of the operation, the second and so on, until
one of them is through before it comes to that. All suspensions count: of the task that runs the
operation, and of every task that was made on its behalf, in the order in which they happen. After
each run everything that `probe` counts must be back where it was after one that was not cut off
(what a process starts once and keeps is started by then).

`Way` says who is cancelled then, and when.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, TypeVar

from tests.support import read_counters

T = TypeVar("T")

#: Seconds for an operation to end once it was cancelled, and for counts to come back.
LIMIT = 5.0
#: Seconds after which garbage is collected: what needs that is found by tests of its own.
_PATIENCE = 0.05
#: Runs after which an operation counts as one that never gets through.
MOST = 2000


class Way(enum.Enum):
    """Who is cancelled at a suspension of the operation."""

    #: Who called it, as the suspension begins.
    CALLER = "its caller"
    #: Who called it, when what is waited for has just come and nobody was told yet: what was made
    #: (a connection, a lock that was taken) is in nobody's hands then.
    LATE = "its caller, late"
    #: The task that is suspended, which may be one of the operation's own, by somebody else.
    TASK = "the task"
    #: All tasks of the operation at once, as at the end of `asyncio.run`.
    ALL = "all its tasks"


#: Ways in which the caller is cancelled; quick, and enough for most.
BY_CALLER = (Way.CALLER, Way.LATE)
EVERY_WAY = tuple(Way)

_cut: ContextVar[Cut | None] = ContextVar("cut", default=None)


def probe() -> dict[str, int]:
    """What an operation must not leave behind: descriptors, threads, tasks, native objects."""
    ours = asyncio.current_task()
    counts = {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "tasks": sum(task is not ours for task in asyncio.all_tasks()),
    }
    return counts | {
        name: value for name, value in read_counters().items() if name.startswith("live_")
    }


class Cut:
    """Runs the one operation of a run that is cut off: ``await cut(coroutine)``.

    Returns what the operation returns, and None if it was cancelled for that. Any exception of it
    comes out but CancelledError of our own making, so an operation that is cancelled by
    `Way.TASK` or `Way.ALL` may raise what it likes: let it be `cut.quiet`.
    """

    def __init__(self, number: int, way: Way) -> None:
        self._left = number
        self._way = way
        self._tasks: set[asyncio.Task[Any]] = set()
        self._caller: asyncio.Task[Any] | None = None
        self._over = False
        #: Where the operation was when it was cut off, None if it was not.
        self.where: str | None = None
        #: Whether the operation has ended in CancelledError.
        self.cancelled = False

    @property
    def reached(self) -> bool:
        """Whether it came to the suspension at which it is cut off."""
        return self.where is not None

    async def __call__(self, operation: Coroutine[Any, Any, T]) -> T | None:
        """Run ``operation``. Raises AssertionError if it does not end, or ends as if it had not
        been cancelled."""
        token = _cut.set(self)
        try:
            self._caller = task = asyncio.get_running_loop().create_task(operation)
        finally:
            _cut.reset(token)
        done, _ = await asyncio.wait((task,), timeout=LIMIT)
        # What it raised holds its frames; those that a program drops are not to be held here.
        self._over, self._caller = True, None
        if not done:
            task.cancel()
            raise AssertionError(f"it goes on, {self}\n{_stacks(self._tasks)}")
        if not task.cancelled():
            result = task.result()
            asked = self._way in (Way.CALLER, Way.LATE, Way.ALL) and task.cancelling()
            assert not asked, f"it went on as if nothing had happened, {self}"
            return result
        assert self.reached, "it was cancelled by somebody else"
        self.cancelled = True
        return None

    async def quiet(self, operation: Coroutine[Any, Any, T]) -> T | None:
        """As a call; an exception is as good as being cancelled, if it was cut off."""
        try:
            return await self(operation)
        except AssertionError:
            raise
        except Exception:
            if not self.reached:
                raise
            return None

    def __str__(self) -> str:
        return f"cancelled by way of {self._way.value!r} at {self.where or 'no place'}"

    # --------------------------------------------------------------- of `_Counted`

    def _suspended(self, coroutine: Any, awaited: Any) -> None:
        task = asyncio.current_task()
        if self._over or self.reached or task is None:
            return
        if self._left:
            self._left -= 1
            return
        self.where = _place(coroutine)
        if self._way is Way.LATE and awaited is not None:
            # Before the task's own callback, so that it is cancelled before it goes on.
            awaited.add_done_callback(lambda _: self._strike(task))
        else:
            # Once the task waits, and before anything else can happen.
            asyncio.get_running_loop().call_soon(self._strike, task)

    def _strike(self, suspended: asyncio.Task[Any]) -> None:
        match self._way:
            case Way.CALLER | Way.LATE:
                if self._caller is not None:
                    self._caller.cancel()
            case Way.TASK:
                suspended.cancel()
            case Way.ALL:
                for task in [*self._tasks]:
                    task.cancel()


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine, each suspension of which is told to a cut."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], cut: Cut) -> None:
        self._coroutine = coroutine
        self._told = cut

    def send(self, value: Any) -> Any:
        awaited = self._coroutine.send(value)
        self._told._suspended(self._coroutine, awaited)
        return awaited

    def throw(self, *error: Any) -> Any:
        awaited = self._coroutine.throw(*error)
        self._told._suspended(self._coroutine, awaited)
        return awaited

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        # For who prints stacks of tasks: cr_frame, cr_code and so on.
        return getattr(self._coroutine, name)


def _factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
    cut = _cut.get()
    if cut is None or cut._over:
        return asyncio.Task(coroutine, loop=loop, **options)
    task = asyncio.Task(_Counted(coroutine, cut), loop=loop, **options)
    cut._tasks.add(task)
    task.add_done_callback(cut._tasks.discard)
    return task


def _frames(coroutine: Any) -> Iterable[tuple[CodeType, FrameType]]:
    while coroutine is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(coroutine, f"{kind}_frame", None)
            if frame is not None:
                yield frame.f_code, frame
                follow = "gi_yieldfrom" if kind == "gi" else f"{kind}_await"
                coroutine = getattr(coroutine, follow)
                break
        else:
            return


def _place(coroutine: Any) -> str:
    """The functions that wait, from the outermost on, and the innermost one's line."""
    frames = list(_frames(coroutine))
    if not frames:
        return "?"
    code, frame = frames[-1]
    names = " > ".join(code.co_qualname for code, _ in frames)
    return f"{names} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"


def _stacks(tasks: Iterable[asyncio.Task[Any]]) -> str:
    return "\n".join(f"  {task.get_name()}: {_place(task.get_coro())}" for task in tasks)


async def settle(
    expected: Mapping[str, int], count: Callable[[], Mapping[str, int]], what: str
) -> None:
    """Wait until all of ``count()`` is at most what is expected. Raises AssertionError, with
    ``what`` in it, when that takes too long."""
    begun = time.monotonic()
    while more := {
        name: value - expected.get(name, 0)
        for name, value in count().items()
        if value > expected.get(name, 0)
    }:
        waited = time.monotonic() - begun
        if waited > LIMIT:
            ours = asyncio.current_task()
            tasks = _stacks(task for task in asyncio.all_tasks() if task is not ours)
            raise AssertionError(f"{what}: left behind {more}\n{tasks}\n{_descriptors()}")
        if waited > _PATIENCE:
            gc.collect()
        await asyncio.sleep(0 if waited < _PATIENCE / 10 else 0.002)


def _descriptors() -> str:
    lines = []
    for name in os.listdir("/proc/self/fd"):
        try:
            lines.append(f"  {name}: {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue  # the directory's own
    return "\n".join(lines)


async def cancel_everywhere(
    run: Callable[[Cut], Awaitable[object]],
    *,
    ways: Iterable[Way] = BY_CALLER,
    also: Callable[[], Mapping[str, int]] = dict,
    step: int = 1,
) -> int:
    """Repeat ``run``, each time cut off at a later suspension, until it is not cut off any more.

    ``also`` gives more counts, of connections at a server for instance. ``step`` takes only every
    so many suspensions, where there are too many of them. Returns how many runs were cut off.
    Raises AssertionError when something was left behind, when an operation does not end within
    `LIMIT` seconds of being cancelled or swallows it, and if it never suspends.
    """

    def count() -> dict[str, int]:
        return {**probe(), **also()}

    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    loop.set_task_factory(_factory)
    try:
        whole = Cut(sys.maxsize, Way.CALLER)
        await run(whole)
        gc.collect()
        # What ends by itself a moment later (threads) is not to count as what was there before.
        first = count()
        await run(Cut(sys.maxsize, Way.CALLER))
        await settle(first, count, "when it was not cancelled at all")
        expected = {name: min(value, first.get(name, value)) for name, value in count().items()}
        done = 0
        for way in ways:
            for number in range(0, MOST * step, step):
                cut = Cut(number, way)
                await run(cut)
                await settle(expected, count, str(cut))
                if not cut.reached:
                    break
                done += 1
            else:
                raise AssertionError(f"it is not through after {MOST} runs, {cut}")
    finally:
        loop.set_task_factory(before)
    assert done, "the operation never waits"
    return done
