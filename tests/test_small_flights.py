"""Blocks fetched without a task: sources that offer ``begin_read``, and how those fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import aiouffd
from aiouffd.errors import SourceError
from aiouffd.kernel.lib import lib
from aiouffd.sources.base import BaseSource

PAGE = 4096
BLOCKS = 64
DATA = bytes(range(1, 252)) * (BLOCKS * PAGE // 251 + 1)
DATA = DATA[: BLOCKS * PAGE - 100]

Done = Callable[[BaseException | None], None]


class Begun:
    """What `Beginner.begin_read` returns."""

    def __init__(self, source: Beginner, offset: int, buffer: memoryview, done: Done) -> None:
        self.offset, self.buffer, self.done = offset, buffer, done
        self.cancelled = False
        self.source = source

    def answer(self, error: BaseException | None = None) -> None:
        if error is None:
            self.buffer[:] = DATA[self.offset : self.offset + len(self.buffer)]
        self.done(error)

    def cancel(self) -> None:
        self.cancelled = True


class Beginner(BaseSource):
    """Has ``begin_read``, whose requests the test answers, and counts plain reads."""

    size = len(DATA)

    def __init__(self) -> None:
        self.begun: list[Begun] = []
        self.came = asyncio.Event()
        self.plain: list[int] = []
        self.answers: Callable[[Begun], None] | None = None
        self.refuses = False

    def begin_read(self, offset: int, buffer: memoryview, done: Done) -> Begun | None:
        if self.refuses:
            return None
        request = Begun(self, offset, buffer, done)
        self.begun.append(request)
        self.came.set()
        if self.answers is not None:
            asyncio.get_running_loop().call_soon(self.answers, request)
        return request

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.plain.append(offset)
        buffer[:] = DATA[offset : offset + len(buffer)]

    def clone(self) -> Beginner:
        return Beginner()


async def opened(source: Beginner, **settings: Any) -> aiouffd.LazyBuffer:
    """A buffer whose loop counts as alive however busy the machine is: a rescue would go to a clone
    of the source, that nobody here knows."""
    buf = await aiouffd.open(source, block_size=PAGE, readahead=0, **settings)
    assert buf._region is not None
    lib.au_engine_set_times(buf._region.pager._engine, 50_000, 10**11, 10**11)
    return buf


def touched(buf: aiouffd.LazyBuffer, offset: int) -> asyncio.Future[int]:
    return asyncio.ensure_future(asyncio.to_thread(buf.__getitem__, offset))


async def test_blocks_come_without_tasks() -> None:
    source = Beginner()
    source.answers = Begun.answer
    async with await opened(source) as buf:
        tasks = len(asyncio.all_tasks())
        for block in (3, 1, BLOCKS - 1):
            at = block * PAGE + 17
            assert await asyncio.to_thread(buf.__getitem__, at) == DATA[at]
        assert buf[(BLOCKS - 1) * PAGE :] == DATA[(BLOCKS - 1) * PAGE :]  # a short last block
        assert len(asyncio.all_tasks()) == tasks
        assert buf.stats.flights == 3
        assert buf.stats.in_flight == 0
        assert buf.stats.fetched_bytes == 3 * PAGE - 100
        assert await buf.read() == DATA
    assert [request.offset // PAGE for request in source.begun[:3]] == [3, 1, BLOCKS - 1]


async def test_many_threads_share_one() -> None:
    source = Beginner()
    async with await opened(source) as buf:
        touches = [touched(buf, 5 * PAGE + n) for n in range(5)]
        await source.came.wait()
        source.begun[0].answer()
        assert await asyncio.gather(*touches) == list(DATA[5 * PAGE :][:5])
        assert len(source.begun) == 1


async def test_fetch_waits_for_one_under_way() -> None:
    source = Beginner()
    async with await opened(source) as buf:
        touch = touched(buf, 0)
        await source.came.wait()
        fetch = asyncio.ensure_future(buf.fetch(0, 10))
        await asyncio.sleep(0)
        source.begun[0].answer()
        await fetch
        assert await touch == DATA[0]
        assert len(source.begun) == 1
        assert source.plain == []


async def test_failure_is_tried_again_properly() -> None:
    source = Beginner()
    source.answers = lambda request: request.answer(SourceError("not now"))
    async with await opened(source) as buf:
        assert await asyncio.to_thread(buf.__getitem__, 9 * PAGE) == DATA[9 * PAGE]
        assert source.plain == [9 * PAGE]
        assert buf.stats.in_flight == 0
        # The stage of the one that failed is not used for another.
        source.answers = Begun.answer
        assert await asyncio.to_thread(buf.__getitem__, 8 * PAGE) == DATA[8 * PAGE]
        first, second = source.begun
        assert first.buffer.obj is not second.buffer.obj


async def test_refusal_goes_the_usual_way() -> None:
    source = Beginner()
    source.refuses = True
    async with await opened(source) as buf:
        assert await asyncio.to_thread(buf.__getitem__, PAGE) == DATA[PAGE]
        assert source.plain == [PAGE]


async def test_a_deadline_needs_a_task() -> None:
    source = Beginner()
    async with await opened(source, errors="soft", deadline=5.0) as buf:
        assert await asyncio.to_thread(buf.__getitem__, PAGE) == DATA[PAGE]
        assert source.begun == []


async def test_closing_cancels() -> None:
    """Who waits gets an error, not zeros; a late answer reaches nothing."""
    source = Beginner()
    outcome: list[object] = []
    buf = await opened(source)

    def touch() -> None:
        try:
            outcome.append(buf[PAGE])
        except aiouffd.AiouffdError as error:
            outcome.append(type(error))

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    await source.came.wait()
    fetch = asyncio.ensure_future(buf.fetch(PAGE, 1))
    await asyncio.sleep(0)
    await buf.aclose()
    (request,) = source.begun
    assert request.cancelled
    await asyncio.to_thread(thread.join, 10)
    assert outcome == [aiouffd.ClosedError]
    assert isinstance((await asyncio.gather(fetch, return_exceptions=True))[0], aiouffd.ClosedError)
