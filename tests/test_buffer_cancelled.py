"""Lazy buffers and pagers leave nothing behind, wherever one of their operations is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.regions import exports
from aiouffd.regions.rescue import service
from aiouffd.sources.base import BaseSource, Buffer
from aiouffd.sources.cache import CachedSource
from tests.cancelling import BY_CALLER, EVERY_WAY, Cut, Way, cancel_everywhere
from tests.faulty import HUGE, huge_pages
from tests.support import content

BLOCK = 65536
SIZE = 4 * BLOCK
DATA = content(SIZE)


class Waiting(BaseSource):
    """Takes a turn of the loop for everything, and counts what is open and what reads."""

    version = "1"
    open_ones = 0

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.is_open = False

    @property
    def size(self) -> int:
        return len(self.data)

    async def open(self) -> None:
        await asyncio.sleep(0)
        if not self.is_open:
            self.is_open = True
            Waiting.open_ones += 1
            try:
                await asyncio.sleep(0)
            except BaseException:
                self._end()
                raise

    async def aclose(self) -> None:
        self._end()
        await asyncio.sleep(0)

    def _end(self) -> None:
        if self.is_open:
            self.is_open = False
            Waiting.open_ones -= 1

    async def read(self, offset: int, length: int) -> Buffer:
        await asyncio.sleep(0)
        assert self.is_open
        return self.data[offset : offset + length]

    def clone(self) -> Waiting:
        return type(self)(self.data)


class Streaming(Waiting):
    """In pieces, with a place to wait after each."""

    async def stream(self, offset: int, length: int) -> Any:
        for start in range(offset, offset + length, 50_001):
            yield await self.read(start, min(50_001, offset + length - start))


class Beginning(Waiting):
    """Without tasks: begin_read, answered by the loop."""

    def begin_read(self, offset: int, buffer: Any, done: Callable[[Any], None]) -> Any:
        handles: list[asyncio.Handle] = []
        loop = asyncio.get_running_loop()

        def answer() -> None:
            buffer[:] = self.data[offset : offset + len(buffer)]
            done(None)

        handles.append(loop.call_soon(lambda: handles.append(loop.call_soon(answer))))

        class Request:
            def cancel(self) -> None:
                for handle in handles:
                    handle.cancel()

        return Request()


class Alone(Waiting):
    """For one loop only."""

    def clone(self) -> Waiting:
        raise aiouffd.UnsupportedError("one loop only")


def counts() -> dict[str, int]:
    loop = service._loop
    return {
        "sources": Waiting.open_ones,
        "exports": len(exports._kept),
        "pagers": len(service._pagers),
        "rescue tasks": 0 if loop is None else len(asyncio.all_tasks(loop)),
    }


OPERATIONS = [
    "open", "fetch", "read", "readinto", "prefetch", "pin", "aclose", "force", "held", "drained",
    "with",
]  # fmt: skip


async def _nothing() -> None:
    pass


@pytest.fixture(autouse=True)
async def _background_loop() -> None:
    """It is there for good once it was needed, and so is what it takes."""
    await service.run(_nothing())


async def in_full(
    cut: Cut, what: str, make: Callable[[], aiouffd.LazyBuffer], data: bytes = DATA
) -> None:
    """One buffer from opening to its end, with one operation that is cut off."""
    try:
        async with asyncio.timeout(10):
            await _in_full(cut, what, make, data)
    except TimeoutError as late:
        raise AssertionError(f"it hangs after it was {cut}") from late


async def _in_full(
    cut: Cut, what: str, make: Callable[[], aiouffd.LazyBuffer], data: bytes
) -> None:

    async def opened_and_closed() -> None:
        async with make() as buf:
            assert await buf.read(5, 10) == data[5:15]

    async def pinned() -> None:
        async with buf.pin(BLOCK, 100) as view:
            assert bytes(view) == data[BLOCK : BLOCK + 100]
            await asyncio.sleep(0)

    if what == "with":
        await cut.quiet(opened_and_closed())
        return
    buf = make()
    view: memoryview | None = None
    try:
        if what == "open":
            await cut.quiet(buf.aopen())
            await buf.aopen()
        else:
            await buf.aopen()
        if what in ("held", "drained"):
            view = buf.view
        if what == "aclose":
            fetching = asyncio.create_task(buf.fetch())
            await asyncio.sleep(0)
            await cut.quiet(buf.aclose())
            with contextlib.suppress(aiouffd.ClosedError):
                await fetching
        elif what == "force":
            view = buf.view
            await cut.quiet(buf.aclose(force=True))
        elif what == "held":
            await cut.quiet(buf.aclose())
        elif what == "drained":
            await buf.aclose()
            asyncio.get_running_loop().call_soon(view.release)
            await cut.quiet(buf.drained())
        else:
            working_set = aiouffd.WorkingSet([(BLOCK, BLOCK), (0, 9)], size=len(data), version="1")
            operations: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
                "fetch": buf.fetch,
                "read": lambda: buf.read(100, 2 * BLOCK),
                "readinto": lambda: buf.readinto(100, bytearray(2 * BLOCK)),
                "prefetch": lambda: buf.prefetch(working_set),
                "pin": pinned,
            }
            if what in operations:
                await cut.quiet(operations[what]())
            assert await buf.read() == data
    finally:
        await buf.aclose()
        if view is not None:
            view.release()
        await buf.drained()


# All of them are run before a release; these are the ones that differ most.
QUICK = ("open", "read", "aclose", "with")
EVERYTHING = [
    pytest.param(what, marks=() if what in QUICK else pytest.mark.slow) for what in OPERATIONS
]


def ways_for(what: str) -> tuple[Way, ...]:
    """Reading is done by tasks of the buffer: nobody else cancels those."""
    return EVERY_WAY if what in ("open", "aclose", "force", "held", "drained") else BY_CALLER


@pytest.mark.parametrize("what", OPERATIONS)
async def test_any_operation(what: str) -> None:
    async def run(cut: Cut) -> None:
        await in_full(cut, what, lambda: aiouffd.open(Waiting(), readahead=0))

    await cancel_everywhere(run, ways=EVERY_WAY, also=counts)


@pytest.mark.parametrize("what", EVERYTHING)
@pytest.mark.parametrize("make", [Streaming, Beginning, Alone])
async def test_any_source(make: type[Waiting], what: str) -> None:
    async def run(cut: Cut) -> None:
        await in_full(cut, what, lambda: aiouffd.open(make()))

    await cancel_everywhere(run, ways=ways_for(what), also=counts)


SETTINGS: dict[str, dict[str, Any]] = {
    "readahead": {"readahead": 2 * BLOCK},
    "memfd": {"kind": "memfd"},
    "prefetch": {"prefetch": aiouffd.WorkingSet([(BLOCK, SIZE - BLOCK)], size=SIZE, version="1")},
    "children": {"fork": "serve"},
    "shared children": {"fork": "serve", "kind": "memfd"},
    "user mode": {"user_mode_only": True},
    "soft": {"errors": "soft", "deadline": 30.0},
    "cache": {},
}


@pytest.mark.parametrize("what", EVERYTHING)
@pytest.mark.parametrize("setting", SETTINGS)
async def test_any_setting(setting: str, what: str, tmp_path: Path) -> None:
    settings = {"readahead": 0, **SETTINGS[setting]}
    number = 0

    def make() -> aiouffd.LazyBuffer:
        nonlocal number
        source: Any = Waiting()
        if setting == "cache":
            number += 1
            source = CachedSource(source, directory=tmp_path, key=str(number % 3))
        return aiouffd.open(source, **settings)

    async def run(cut: Cut) -> None:
        await in_full(cut, what, make)

    await cancel_everywhere(run, ways=ways_for(what), also=counts)


@pytest.mark.parametrize("kind", ["hugetlb", "hugetlb-memfd"])
async def test_huge_pages(kind: Any) -> None:
    data = content(HUGE)

    async def run(cut: Cut) -> None:
        await in_full(cut, "with", lambda: aiouffd.open(Waiting(data), kind=kind), data)

    with huge_pages(4):
        await cancel_everywhere(run, ways=BY_CALLER, also=counts)


async def test_a_buffer_that_is_recorded() -> None:
    async def run(cut: Cut) -> None:
        async with asyncio.timeout(10), aiouffd.open(Waiting(), readahead=0) as buf:
            with buf.record() as recording:
                await cut.quiet(buf.read(BLOCK, 1))
            with buf.record() as again:  # nobody else does
                await buf.read(3 * BLOCK, 1)
            assert recording.working_set().total in (0, BLOCK)
            assert again.working_set().total == BLOCK

    await cancel_everywhere(run, ways=BY_CALLER, also=counts)


async def test_a_pager() -> None:
    async def serve(fault: aiouffd.Fault) -> None:
        await asyncio.sleep(0)
        fault.copy(DATA[fault.offset : fault.offset + fault.length])

    async def use(view: list[memoryview]) -> None:
        async with aiouffd.Pager() as pager:
            region = pager.map(SIZE, block_size=BLOCK)
            region.on_missing(serve)
            assert await asyncio.to_thread(region.view.__getitem__, 8) == DATA[8]
            view.append(region.view)
        await pager.drained()

    async def run(cut: Cut) -> None:
        view: list[memoryview] = []
        using = asyncio.ensure_future(cut.quiet(use(view)))
        while not using.done():
            if view:
                view.pop().release()
            await asyncio.sleep(0)
        await using
        view.clear()

    await cancel_everywhere(run, ways=EVERY_WAY, also=counts)
