"""Neighbouring reads made in one turn of the event loop, as one request.

Threads that walk through memory together miss neighbouring pages together, and each request
costs the same whatever its length. For sources that pay per request: HTTP, object stores, fsspec.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from ..errors import UsageError
from .base import Buffer, check_length

__all__ = ["Coalescer"]

#: Longest joined request, in bytes: a short read should not wait for much more than its own.
LONGEST = 256 * 1024


class _Part:
    """One read that waits for its turn."""

    __slots__ = ("answer", "group", "length", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.group: _Group | None = None
        self.answer: asyncio.Future[Buffer] | None = None

    @property
    def end(self) -> int:
        return self.offset + self.length


class _Group:
    """Parts that one request answers; its task ends early when the last of them is given up."""

    __slots__ = ("offset", "parts", "task")

    def __init__(self, parts: list[_Part], task: asyncio.Task[Buffer]) -> None:
        self.offset = parts[0].offset
        self.parts = parts
        self.task = task
        loop = task.get_loop()
        for part in parts:
            part.group = self
            part.answer = loop.create_future()
        task.add_done_callback(self._landed)

    def give_up(self, part: _Part) -> None:
        if part in self.parts:
            self.parts.remove(part)
            if not self.parts:
                self.task.cancel()

    def _landed(self, task: asyncio.Task[Buffer]) -> None:
        # Asked for in any case, so that nobody is told that it was not.
        error = None if task.cancelled() else task.exception()
        parts, self.parts = self.parts, []
        for part in parts:
            assert part.answer is not None
            if part.answer.done():
                continue
            if task.cancelled():
                part.answer.cancel()
            elif error is not None:
                part.answer.set_exception(error)
            else:
                at = part.offset - self.offset
                part.answer.set_result(memoryview(task.result())[at : at + part.length])


class Coalescer:
    """Joins reads that are made in the same turn of the loop and lie close together.

    Arguments:
        read: a coroutine function ``(offset, length) -> buffer`` of exactly ``length`` bytes.
        gap: bytes nobody asked for that may lie between two reads that are joined. With 0 only
            reads that touch or overlap are; every byte of a gap is fetched in vain.
        longest: bytes of the longest joined request. Longer single reads go as they are.

    A read waits one turn of the loop for others. One that stays alone is then made by its own
    task, as if there were nothing in between. Joined ones get slices (memoryviews) of one
    buffer, which lives as long as the last of them. An error reaches all that were joined;
    cancelling one leaves the others alone, and cancelling all of them cancels the request.

    Belongs to one loop. Raises UsageError for a negative gap and a length below one byte.
    """

    def __init__(
        self,
        read: Callable[[int, int], Awaitable[Buffer]],
        *,
        gap: int = 0,
        longest: int = LONGEST,
    ) -> None:
        if gap < 0 or longest < 1:
            raise UsageError(
                f"gap must be at least 0 and longest at least 1, got {gap} and {longest}"
            )
        self._read = read
        self._gap = gap
        self._longest = longest
        self._waiting: list[_Part] = []
        self._tasks: set[asyncio.Task[Buffer]] = set()

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``. Raises what the given ``read`` raises."""
        if not 0 < length < self._longest:
            return await self._read(offset, length)
        part = _Part(offset, length)
        self._waiting.append(part)
        try:
            # One turn: whoever was ready to run with us has asked by then.
            await asyncio.sleep(0)
            if part in self._waiting:
                self._form_groups()
            group = part.group
            if group is None:
                return await self._read(offset, length)
            assert part.answer is not None
            return await part.answer
        except BaseException:
            if part in self._waiting:
                self._waiting.remove(part)
            elif part.group is not None:
                part.group.give_up(part)
            raise

    async def aclose(self) -> None:
        """Cancel joined requests under way and wait for their ends. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _form_groups(self) -> None:
        """The first reader to run again sorts what has come together, for all of them."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1:
            return
        for parts in self._runs(sorted(waiting, key=lambda part: part.offset)):
            if len(parts) > 1:
                first, end = parts[0].offset, max(part.end for part in parts)
                task = asyncio.get_running_loop().create_task(self._joined(first, end - first))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                _Group(parts, task)

    def _runs(self, parts: list[_Part]) -> Iterator[list[_Part]]:
        run, end = [parts[0]], parts[0].end
        for part in parts[1:]:
            joined = max(end, part.end)
            if part.offset - end <= self._gap and joined - run[0].offset <= self._longest:
                run.append(part)
                end = joined
            else:
                yield run
                run, end = [part], part.end
        yield run

    async def _joined(self, offset: int, length: int) -> Buffer:
        return check_length(await self._read(offset, length), length, offset=offset)
