"""Callbacks, handlers and sources that raise what they like: each harms its own request alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import mmap
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvloop

import aiouffd
from aiouffd import SourceError, UsageError
from aiouffd.errors import ClosedError, KernelError, ShortReadError
from aiouffd.fetch import flights as flights_module
from aiouffd.fetch import policy as policy_module
from aiouffd.kernel.lib import PAGE_SIZE, lib
from aiouffd.regions import handlers as handlers_module
from aiouffd.sources.base import (
    as_source_error,
    check_holes,
    clone_source,
    open_source,
    read_into_source,
    size_of_source,
    stream_source,
)
from tests.faulty import PlainSource
from tests.support import content, wait_until

BLOCK = 65536
DATA = content(8 * BLOCK)


class OddError(BaseException):
    """Not an Exception, and known to nobody."""


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class EmptySourceError(SourceError):
    """Has forgotten what its base class needs."""

    def __init__(self) -> None:
        pass


#: What code may raise that is no loop's business unless the loop asked for it.
ODD: list[Callable[[], BaseException]] = [
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
    GeneratorExit,
    OddError,
    UnprintableError,
    EmptySourceError,
    lambda: StopAsyncIteration(1),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights_module, "RETRY_FIRST", 0.002)
    monkeypatch.setattr(flights_module, "RETRY_LONGEST", 0.02)
    monkeypatch.setattr(handlers_module, "RETRY_FIRST", 0.002)


async def touch(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call from a thread that is nobody's worker, within a time."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def tell(method: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            method(value)

    def body() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:
            loop.call_soon_threadsafe(tell, done.set_exception, error)
        else:
            loop.call_soon_threadsafe(tell, done.set_result, result)

    threading.Thread(target=body, daemon=True).start()
    return await asyncio.wait_for(done, 10)


def opened(source: Any, **settings: Any) -> aiouffd.LazyBuffer:
    return aiouffd.open(source, **{"readahead": 0, **settings})


def failing(error: Callable[[], BaseException], times: int = 10**9) -> PlainSource:
    left = times

    async def fail(offset: int, length: int) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            raise error()

    return PlainSource(DATA, fail)


class TestTrace:
    @pytest.mark.parametrize(
        "error", [lambda: ValueError("a bug"), asyncio.CancelledError, GeneratorExit, OddError]
    )
    async def test_one_that_raises_stops_no_flight(
        self, error: Callable[[], BaseException], loop_errors: list[dict[str, Any]]
    ) -> None:
        def trace(event: aiouffd.FlightEvent) -> None:
            raise error()

        # More than fly at a time.
        async with opened(PlainSource(DATA), block_size=PAGE_SIZE, trace=trace) as buf:
            without_rescue(buf)
            touches = [touch(buf.view.__getitem__, at) for at in range(0, len(DATA), PAGE_SIZE)]
            assert await asyncio.gather(*touches) == list(DATA[::PAGE_SIZE])
            assert buf.stats.in_flight == 0
            assert await buf.read() == DATA
        assert len(loop_errors) == 1
        assert "the trace callback" in loop_errors[0]["message"]
        assert __file__ in loop_errors[0]["message"]
        loop_errors.clear()

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
    def test_one_that_ends_the_program_does(
        self, loop_name: str, error: type[BaseException]
    ) -> None:
        """The loop ends as from any callback, and no flight is lost when it runs again."""
        traces = 0

        def trace(event: aiouffd.FlightEvent) -> None:
            nonlocal traces
            traces += 1
            if traces == 1:
                raise error(3)

        async def use(buf: aiouffd.LazyBuffer) -> None:
            assert await buf.read() == DATA
            await asyncio.Event().wait()

        factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[loop_name]
        loop = factory()
        try:
            buf = opened(PlainSource(DATA), trace=trace)
            loop.run_until_complete(buf.aopen())
            with pytest.raises(error):
                loop.run_until_complete(use(buf))
            assert loop.run_until_complete(asyncio.wait_for(buf.read(), 10)) == DATA
            assert buf.stats.in_flight == 0
            loop.run_until_complete(buf.aclose())
            for task in asyncio.all_tasks(loop):
                task.cancel()
                loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        finally:
            loop.close()


class TestSources:
    @pytest.mark.parametrize("error", ODD)
    async def test_hard_tries_again_after_pauses(self, error: Callable[[], BaseException]) -> None:
        async with opened(failing(error, 4)) as buf:
            without_rescue(buf)
            assert await touch(buf.view.__getitem__, 9) == DATA[9]
            assert buf.stats.retries == 4
            assert buf.stats.last_error
            assert await buf.read() == DATA

    @pytest.mark.parametrize("error", ODD)
    @pytest.mark.parametrize("deadline", [None, 30.0])
    async def test_soft_says_so_at_once(
        self, error: Callable[[], BaseException], deadline: float | None
    ) -> None:
        source = failing(error)
        async with opened(source, errors="soft", deadline=deadline) as buf:
            without_rescue(buf)
            with pytest.raises(SourceError) as caught:
                await touch(buf.__getitem__, 5)
            assert type(caught.value.__cause__.__cause__) is type(error())  # type: ignore[union-attr]
            with pytest.raises(SourceError):
                await buf.fetch(BLOCK, 1)
            assert len(source.reads) == 2
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling()
            assert buf.stats.in_flight == 0

    async def test_an_executor_that_was_shut_down_is_an_error(self) -> None:
        """Its futures are cancelled, which is not what our task is."""

        async def read(offset: int, length: int) -> None:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

        async with opened(PlainSource(DATA, read), errors="soft", deadline=1.0) as buf:
            async with asyncio.TaskGroup() as group:
                job = group.create_task(self._fails(buf))
            assert await job == "CancelledError"

    async def _fails(self, buf: aiouffd.LazyBuffer) -> str:
        with pytest.raises(SourceError) as caught:
            await buf.fetch(0, 4096)
        return type(caught.value.__cause__).__name__

    async def test_a_timeout_of_its_own_is_not_our_deadline(self) -> None:
        source = failing(lambda: TimeoutError("nothing for a moment"), 2)
        async with opened(source, errors="soft", deadline=20.0) as buf:
            assert await buf.read(0, 9) == DATA[:9]
            assert "nothing for a moment" in (buf.stats.last_error or "")

    async def test_a_flight_that_somebody_cancels_is_asked_for_again(self) -> None:
        asked = asyncio.Semaphore(0)
        let = asyncio.Event()

        async def read(offset: int, length: int) -> None:
            asked.release()
            await let.wait()

        source = PlainSource(DATA, read)
        async with opened(source) as buf:
            without_rescue(buf)
            before = asyncio.all_tasks()
            fetch = asyncio.create_task(buf.fetch(0, 1))
            touching = asyncio.create_task(touch(buf.view.__getitem__, 7))
            await asked.acquire()
            for task in asyncio.all_tasks() - before - {fetch, touching}:
                task.cancel()
            await asked.acquire()
            let.set()
            await asyncio.wait_for(fetch, 10)
            assert await touching == DATA[7]

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
    def test_one_that_ends_the_program_leaves_no_flight_behind(
        self, loop_name: str, error: type[BaseException]
    ) -> None:
        factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[loop_name]
        loop = factory()
        loop.set_exception_handler(lambda _loop, _context: None)
        try:
            buf = opened(failing(error, 1))
            loop.run_until_complete(buf.aopen())
            with pytest.raises(error):
                loop.run_until_complete(buf.read())
            assert buf.stats.in_flight == 0
            assert loop.run_until_complete(asyncio.wait_for(buf.read(), 10)) == DATA
            loop.run_until_complete(buf.aclose())
            for task in asyncio.all_tasks(loop):
                task.cancel()
                loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        finally:
            loop.close()

    @pytest.mark.parametrize("how", ["SystemExit", "KeyboardInterrupt", "stops the loop"])
    async def test_the_background_loop_outlives_a_clone(self, how: str) -> None:
        """Which may exit, or stop the loop it runs on: other buffers are served by it as well."""

        class Clone(PlainSource):
            left = 2

            async def read(self, offset: int, length: int) -> Any:
                if self.left:
                    self.left -= 1
                    match how:
                        case "SystemExit":
                            raise SystemExit(1)
                        case "KeyboardInterrupt":
                            raise KeyboardInterrupt
                        case _:
                            asyncio.get_running_loop().stop()
                return await super().read(offset, length)

        class Cloned(PlainSource):
            def clone(self) -> PlainSource:
                return Clone(DATA)

        def read(buf: aiouffd.LazyBuffer, at: int) -> None:
            """While the loop waits for the thread that waits for the loop."""
            found: list[int] = []
            thread = threading.Thread(target=lambda: found.append(buf[at]), daemon=True)
            thread.start()
            thread.join(10)
            assert found == [DATA[at]]

        async with opened(Cloned(DATA)) as buf:
            read(buf, 5 * BLOCK)
        async with opened(PlainSource(DATA)) as other:
            read(other, BLOCK)

    async def test_an_error_after_all_bytes_came_is_only_told(
        self, loop_errors: list[dict[str, Any]]
    ) -> None:
        class Chunks:
            def __init__(self, data: bytes) -> None:
                self.left = [data[: len(data) // 2 + 7], data[len(data) // 2 + 7 :]]

            def __aiter__(self) -> Chunks:
                return self

            async def __anext__(self) -> bytes:
                if not self.left:
                    raise StopAsyncIteration
                return self.left.pop(0)

            async def aclose(self) -> None:
                raise RuntimeError("cannot close")

        class Streaming(PlainSource):
            def stream(self, offset: int, length: int) -> Chunks:
                return Chunks(self.data[offset : offset + length])

        data = DATA[:-9]
        async with opened(Streaming(data), errors="soft", block_size=1 << 19) as buf:
            assert await buf.read() == data
            assert buf.stats.failures == buf.stats.retries == 0
        assert len(loop_errors) == 1
        loop_errors.clear()


class TestKernelErrors:
    """Of installing what has arrived."""

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(policy_module, "KERNEL_PATIENCE", 0.1)

    async def test_soft_does_not_wait_for_ever_for_memory_that_is_gone(self) -> None:
        """Its addresses are the buffer's all the same, and so an error can be made there."""
        libc = _libc()
        source = PlainSource(DATA)
        async with opened(source, errors="soft") as buf:
            fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
            assert libc.mmap(buf.address + BLOCK, BLOCK, 3, fixed, -1, 0) == buf.address + BLOCK
            with pytest.raises(SourceError) as caught:
                await asyncio.wait_for(buf.fetch(BLOCK, 1), 10)
            assert isinstance(caught.value.__cause__, KernelError)
            assert 1 < len(source.reads) < 200
            assert await buf.read(0, 9) == DATA[:9]
            assert buf.stats.failures == 1
            with pytest.raises(SourceError):
                buf[BLOCK]

    async def test_soft_does_not_wait_for_ever_for_a_file_that_was_cut(
        self, loop_errors: list[dict[str, Any]]
    ) -> None:
        async with opened(PlainSource(DATA), errors="soft", kind="memfd") as buf:
            assert buf._region is not None
            os.ftruncate(buf._region.fileno(), 4 * BLOCK)
            with pytest.raises(SourceError) as caught:
                await asyncio.wait_for(buf.fetch(5 * BLOCK, 1), 10)
            assert isinstance(caught.value.__cause__, KernelError)
            assert await buf.read(0, 9) == DATA[:9]
        loop_errors.clear()

    async def test_hard_waits_and_says_so(self) -> None:
        async with opened(PlainSource(DATA), kind="memfd") as buf:
            assert buf._region is not None
            os.ftruncate(buf._region.fileno(), 4 * BLOCK)
            fetch = asyncio.ensure_future(buf.fetch(5 * BLOCK, 1))
            await asyncio.to_thread(wait_until, lambda: buf.stats.retries >= 3, "some retries")
            assert "KernelError" in (buf.stats.last_error or "")
            os.ftruncate(buf._region.fileno(), len(DATA))
            await asyncio.wait_for(fetch, 10)
            assert await buf.read(5 * BLOCK, 9) == DATA[5 * BLOCK :][:9]


def _libc() -> Any:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_size_t
    libc.mmap.argtypes = [
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return libc


Done = Callable[[Any], None]


class Beginner(PlainSource):
    """Has ``begin_read``, which does what the test wants."""

    def __init__(self, begin: Callable[[int, memoryview, Done], Any]) -> None:
        super().__init__(DATA)
        self._begin = begin

    def begin_read(self, offset: int, buffer: memoryview, done: Done) -> Any:
        return self._begin(offset, buffer, done)


class Request:
    def __init__(self, cancelled: BaseException | None = None) -> None:
        self.cancelled = cancelled

    def cancel(self) -> None:
        if self.cancelled is not None:
            raise self.cancelled


def without_rescue(buf: aiouffd.LazyBuffer) -> None:
    """Its loop counts as alive however busy the machine is, so that no clone serves it."""
    assert buf._mapping is not None
    assert buf._mapping.pager is not None
    lib.au_engine_set_times(buf._mapping.pager._engine, 50_000, 10**11, 10**11)


async def begun(begin: Callable[[int, memoryview, Done], Any]) -> aiouffd.LazyBuffer:
    buf = await opened(Beginner(begin), block_size=PAGE_SIZE)
    without_rescue(buf)
    return buf


def fill(offset: int, buffer: memoryview) -> None:
    buffer[:] = DATA[offset : offset + len(buffer)]


class TestBeginRead:
    @pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError, OddError])
    async def test_one_that_raises_is_read_otherwise(
        self, error: type[BaseException], loop_errors: list[dict[str, Any]]
    ) -> None:
        def begin(offset: int, buffer: memoryview, done: Done) -> Any:
            raise error

        async with await begun(begin) as buf:
            assert await touch(buf.__getitem__, 3 * PAGE_SIZE) == DATA[3 * PAGE_SIZE]
            assert await touch(buf.__getitem__, 4 * PAGE_SIZE) == DATA[4 * PAGE_SIZE]
            assert buf.stats.in_flight == 0
        assert len(loop_errors) == 1
        loop_errors.clear()

    async def test_done_before_it_has_returned(self) -> None:
        def begin(offset: int, buffer: memoryview, done: Done) -> Any:
            fill(offset, buffer)
            done(None)
            return Request()

        async with await begun(begin) as buf:
            for block in range(20):
                assert await touch(buf.__getitem__, block * PAGE_SIZE) == DATA[block * PAGE_SIZE]
            assert buf.stats.in_flight == 0

    async def test_done_and_then_raised(self, loop_errors: list[dict[str, Any]]) -> None:
        def begin(offset: int, buffer: memoryview, done: Done) -> Any:
            done(None)  # without a byte
            raise RuntimeError("after all")

        async with await begun(begin) as buf:
            assert await touch(buf.__getitem__, PAGE_SIZE) == DATA[PAGE_SIZE]
            assert buf.stats.in_flight == 0
        assert len(loop_errors) == 1
        loop_errors.clear()

    async def test_done_twice_completes_no_other_one(
        self, loop_errors: list[dict[str, Any]]
    ) -> None:
        """Which would get the bytes of the first."""
        answers: list[tuple[int, memoryview, Done]] = []
        came = asyncio.Semaphore(0)

        def begin(offset: int, buffer: memoryview, done: Done) -> Any:
            answers.append((offset, buffer, done))
            came.release()
            return Request()

        async with await begun(begin) as buf:
            first = asyncio.ensure_future(touch(buf.__getitem__, 0))
            await came.acquire()
            fill(*answers[0][:2])
            answers[0][2](None)
            assert await first == DATA[0]
            second = asyncio.ensure_future(touch(buf.__getitem__, 8 * PAGE_SIZE + 8))
            await came.acquire()
            answers[0][2](None)
            answers[0][2](RuntimeError("late"))
            fill(*answers[1][:2])
            answers[1][2](None)
            assert await second == DATA[8 * PAGE_SIZE + 8]
            assert buf.stats.in_flight == 0
        assert ["`done` was called more than once" in str(e["exception"]) for e in loop_errors] == [
            True
        ]
        loop_errors.clear()

    async def test_done_from_another_thread(self) -> None:
        def begin(offset: int, buffer: memoryview, done: Done) -> Any:
            fill(offset, buffer)
            threading.Thread(target=done, args=(None,)).start()
            return Request()

        async with await begun(begin) as buf:
            for block in range(5):
                assert await touch(buf.__getitem__, block * PAGE_SIZE) == DATA[block * PAGE_SIZE]
            assert buf.stats.in_flight == 0

    async def test_what_is_no_request_is_let_be(self, loop_errors: list[dict[str, Any]]) -> None:
        def begin(offset: int, buffer: memoryview, done: Done) -> Any:
            fill(offset, buffer)
            if offset == 0:
                asyncio.get_running_loop().call_soon(done, None)
            return "on its way"

        buf = await begun(begin)
        assert await touch(buf.__getitem__, 5) == DATA[5]
        fetch = asyncio.ensure_future(buf.fetch(PAGE_SIZE, 1))
        await asyncio.sleep(0)
        await buf.aclose()
        with pytest.raises(ClosedError):
            await fetch
        loop_errors.clear()

    @pytest.mark.parametrize("error", [RuntimeError(), asyncio.CancelledError(), OddError()])
    async def test_a_cancel_that_raises_keeps_nobody_from_closing(
        self, error: BaseException, loop_errors: list[dict[str, Any]]
    ) -> None:
        late: list[Done] = []

        def begin(offset: int, buffer: memoryview, done: Done) -> Any:
            late.append(done)
            return Request(error)

        buf = await begun(begin)
        fetches = [asyncio.ensure_future(buf.fetch(block * 2 * PAGE_SIZE, 1)) for block in range(4)]
        await asyncio.sleep(0)
        await buf.aclose()
        results = await asyncio.gather(*fetches, return_exceptions=True)
        assert {type(result) for result in results} == {ClosedError}
        assert len(loop_errors) == 1
        loop_errors.clear()
        late[0](None)  # after the buffer is gone
        assert len(loop_errors) == 1
        loop_errors.clear()


@contextlib.asynccontextmanager
async def region_of(handler: Any, **settings: Any) -> AsyncIterator[aiouffd.Region]:
    async with aiouffd.Pager() as pager:
        region = pager.map(64 * PAGE_SIZE, **settings)
        region.on_missing(handler)
        yield region


def word_at(region: aiouffd.Region, at: int) -> bytes:
    return bytes(region.view[at : at + 8])


@pytest.mark.parametrize("lead", [0, 20], ids=["at first", "after many"])
class TestHandlers:
    """A handler that has never waited for a while is run without a task."""

    AT = 40 * PAGE_SIZE

    async def served(self, region: aiouffd.Region, lead: int) -> bool:
        for at in range(0, lead * PAGE_SIZE, PAGE_SIZE):
            assert await touch(word_at, region, at) == DATA[at : at + 8]
        return bool(await touch(word_at, region, self.AT) == DATA[self.AT : self.AT + 8])

    @pytest.mark.parametrize("where", ["at the call", "at first", "after a wait"])
    @pytest.mark.parametrize("error", [*ODD, lambda: ClosedError("another one")])
    async def test_whatever_it_raises_it_is_called_again(
        self,
        lead: int,
        error: Callable[[], BaseException],
        where: str,
        loop_errors: list[dict[str, Any]],
    ) -> None:
        calls = 0

        async def serve(fault: aiouffd.Fault) -> None:
            nonlocal calls
            if fault.offset == self.AT:
                calls += 1
                if calls < 4 and where != "at the call":
                    if where == "after a wait":
                        await asyncio.sleep(0)
                    raise error()
            fault.copy(DATA[fault.offset : fault.offset + fault.length])

        def call(fault: aiouffd.Fault) -> Any:
            nonlocal calls
            if where == "at the call" and fault.offset == self.AT and calls < 3:
                calls += 1
                raise error()
            return serve(fault)

        async with region_of(call) as region:
            assert await self.served(region, lead)
        assert calls == 4
        assert len(loop_errors) in (2, 3)
        assert all(told["fault"].offset == self.AT for told in loop_errors)
        loop_errors.clear()

    @pytest.mark.parametrize("gives", [None, 7, object(), iter(())])
    async def test_what_is_no_coroutine_is_told(
        self, lead: int, gives: Any, loop_errors: list[dict[str, Any]]
    ) -> None:
        calls = 0

        async def serve(fault: aiouffd.Fault) -> None:
            fault.copy(DATA[fault.offset : fault.offset + fault.length])

        def call(fault: aiouffd.Fault) -> Any:
            nonlocal calls
            calls += fault.offset == self.AT
            return gives if fault.offset == self.AT and calls < 3 else serve(fault)

        async with region_of(call) as region:
            assert await self.served(region, lead)
        assert loop_errors
        assert all("async def" in str(told["exception"]) for told in loop_errors)
        loop_errors.clear()

    async def test_a_future_is_as_good_as_a_coroutine(self, lead: int) -> None:
        async def serve(fault: aiouffd.Fault) -> None:
            await asyncio.sleep(0)
            fault.copy(DATA[fault.offset : fault.offset + fault.length])

        async with region_of(lambda fault: asyncio.ensure_future(serve(fault))) as region:
            assert await self.served(region, lead)

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
    def test_one_that_ends_the_program_loses_no_fault(
        self, lead: int, error: type[BaseException], loop_name: str
    ) -> None:
        left = 1

        async def serve(fault: aiouffd.Fault) -> None:
            nonlocal left
            if fault.offset == self.AT and left:
                left -= 1
                raise error
            fault.copy(DATA[fault.offset : fault.offset + fault.length])

        async def main(touches: list[asyncio.Future[bool]]) -> None:
            async with region_of(serve) as region:
                touches.append(asyncio.ensure_future(self.served(region, lead)))
                others = [touch(word_at, region, at * PAGE_SIZE) for at in range(50, 60)]
                await asyncio.gather(touches[0], *others)

        factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[loop_name]
        loop = factory()
        loop.set_exception_handler(lambda _loop, _context: None)
        try:
            touches: list[asyncio.Future[bool]] = []
            running = loop.create_task(main(touches))
            with pytest.raises(error):
                loop.run_until_complete(running)
            loop.run_until_complete(running)  # and goes on
            assert touches[0].result()
        finally:
            loop.close()


@pytest.mark.parametrize("error", [ValueError, OddError, asyncio.CancelledError])
async def test_an_exception_handler_that_raises_harms_nobody(error: type[BaseException]) -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(_loop: Any, _context: Any) -> None:
        raise error("in the exception handler")

    def trace(event: aiouffd.FlightEvent) -> None:
        raise RuntimeError("in the trace")

    calls = 0

    async def serve(fault: aiouffd.Fault) -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise RuntimeError("in the handler")
        fault.copy(DATA[fault.offset : fault.offset + fault.length])

    loop.set_exception_handler(handle)
    try:
        async with opened(PlainSource(DATA), trace=trace) as buf:
            assert await buf.read() == DATA
        async with region_of(serve) as region:
            assert await touch(word_at, region, 0) == DATA[:8]
    finally:
        loop.set_exception_handler(before)


class TestAnswers:
    """What sources return is checked before it is believed."""

    @pytest.mark.parametrize(
        "holes",
        [
            None,
            7,
            "text",
            [1, 2],
            [(0, 1, 2)],
            [(0.0, 4096.0)],
            [(4096, 0)],
            [(4096, -4096)],
            [(-4096, 8192)],
            [(8192, 4096), (0, 4096)],
            [(0, 8192), (4096, 8192)],
        ],
    )
    async def test_holes_that_make_no_sense(self, holes: Any) -> None:
        with pytest.raises(UsageError, match="holes"):
            check_holes(holes, 0, 1 << 20)

        class Holey(PlainSource):
            async def holes(self, offset: int, length: int) -> Any:
                return holes

        async with opened(Holey(DATA), errors="soft") as buf:
            with pytest.raises(SourceError, match="holes"):
                await buf.fetch(0, 1)

    async def test_holes_are_cut_to_what_was_asked(self) -> None:
        assert check_holes([(0, 100)], 10, 20) == ((10, 20),)
        assert check_holes([(0, 5), (9, 2), (29, 9), (50, 1)], 10, 20) == ((10, 1), (29, 1))
        assert check_holes(((n * 10, 5) for n in iter(int, None)), 0, 0) == ()
        data = bytes(BLOCK) + DATA

        class Holey(PlainSource):
            async def holes(self, offset: int, length: int) -> Any:
                # For more than was asked, and for bytes that are none.
                return [(0, BLOCK + 5 * PAGE_SIZE)]

        source = Holey(data)
        async with opened(source) as buf:
            assert await buf.read(0, BLOCK) == bytes(BLOCK)
            assert not source.reads
            assert buf.resident() == [(0, BLOCK)]

    @pytest.mark.parametrize("count", [0, 5, 4097])
    async def test_a_count_that_is_not_all_is_too_little(self, count: int) -> None:
        class Counting(PlainSource):
            async def read_into(self, offset: int, buffer: memoryview) -> int:
                return count

        with pytest.raises(ShortReadError):
            await read_into_source(Counting(DATA), 0, memoryview(bytearray(4096)))

    async def test_a_stream_that_is_a_coroutine(self) -> None:
        class Streaming(PlainSource):
            async def stream(self, offset: int, length: int) -> Any:
                return [b"x"]

        with pytest.raises(UsageError, match="stream"):
            async for _ in stream_source(Streaming(DATA), 0, 10):  # type: ignore[arg-type]
                pass
        async with opened(Streaming(DATA), errors="soft", block_size=1 << 19) as buf:
            with pytest.raises(SourceError, match="coroutine"):
                await buf.fetch()

    async def test_a_stream_without_bytes_ends(self) -> None:
        class Streaming(PlainSource):
            async def stream(self, offset: int, length: int) -> Any:
                while True:
                    yield b""

        with pytest.raises(ShortReadError):
            async for _ in stream_source(Streaming(DATA), 0, 10):  # type: ignore[arg-type]
                pass

    @pytest.mark.parametrize("size", [None, "7", -1, 1.5])
    async def test_a_size_that_is_none(self, size: Any) -> None:
        class Sized(PlainSource):
            size = None  # type: ignore[assignment]

        source = Sized(DATA)
        source.size = size
        with pytest.raises(UsageError, match="size"):
            size_of_source(source)
        with pytest.raises(UsageError, match="size"):
            await opened(source)

    async def test_an_open_that_was_cancelled_by_nobody(self) -> None:
        class Opening(PlainSource):
            async def open(self) -> None:
                raise asyncio.CancelledError

        with pytest.raises(SourceError):
            await open_source(Opening(DATA))
        with pytest.raises(SourceError):
            await opened(Opening(DATA))

    async def test_an_open_that_was_cancelled(self) -> None:
        class Opening(PlainSource):
            async def open(self) -> None:
                await asyncio.Event().wait()

        task = asyncio.ensure_future(open_source(Opening(DATA)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    @pytest.mark.parametrize("what", [None, 7, "text", asyncio.CancelledError(), OddError()])
    async def test_a_clone_that_is_no_source(self, what: Any) -> None:
        class Cloned(PlainSource):
            def clone(self) -> Any:
                if isinstance(what, BaseException):
                    raise what
                return what

        with pytest.raises((UsageError, SourceError)):
            clone_source(Cloned(DATA))


@pytest.mark.parametrize("error", ODD)
def test_every_failure_can_be_told(error: Callable[[], BaseException]) -> None:
    failure = error()
    told = as_source_error(failure)
    assert type(told) is SourceError
    assert not told.transient
    assert told.__cause__ is failure
    assert type(failure).__name__ in str(told)


def test_errors_of_the_kernel_pass() -> None:
    assert as_source_error(KernelError("no memory", errno=12)).transient
    assert as_source_error(KernelError("no memory", errno=12)).errno == 12
