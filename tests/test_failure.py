"""When the source, the handler or the loop fails: an error or a wait, and never a wrong byte."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import ClosedError, SourceChangedError, SourceError
from aiouffd.errors import SourceTimeoutError
from aiouffd.fetch import fetcher as fetcher_module
from aiouffd.fetch import flights as flights_module
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.regions import handlers as handlers_module
from aiouffd.util import backoff
from tests.faulty import FailingSource, FullSource, PlainSource, final, transient
from tests.scenarios import buffers
from tests.servers.http import Entry, Fault, RangeServer
from tests.support import Counters, Gate, content, result_of, start, wait_until

BLOCK = 65536
DATA = content(8 * BLOCK)
SIZE = len(DATA)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after moments, for what is tested is not how long they wait."""
    monkeypatch.setattr(flights_module, "RETRY_FIRST", 0.002)
    monkeypatch.setattr(flights_module, "RETRY_LONGEST", 0.02)
    monkeypatch.setattr(handlers_module, "RETRY_FIRST", 0.002)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@contextlib.asynccontextmanager
async def opened(
    source: Any, force: bool = False, **settings: Any
) -> AsyncIterator[aiouffd.LazyBuffer]:
    async with aiouffd.open(source, **{"readahead": 0, **settings}) as buf:
        yield buf
        await buf.aclose(force=force)


async def touch(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call from a thread that is nobody's worker."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def body() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, result)

    threading.Thread(target=body, daemon=True).start()
    return await done


def failing_with(error: Callable[[], Exception]) -> PlainSource:
    async def fail(offset: int, length: int) -> None:
        raise error()

    return PlainSource(DATA, fail)


class Hung(FullSource):
    """Never answers, until it is told to."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, self._hang)
        self.hangs = True

    async def _hang(self, offset: int, length: int) -> None:
        if self.hangs:
            await asyncio.Event().wait()


@pytest.mark.usefixtures("quick")
class TestHard:
    """errors="hard": touchers wait as long as it takes."""

    @pytest.mark.parametrize("times", [1, 5])
    @pytest.mark.parametrize(
        "error", [transient, final, lambda: OSError(errno.EIO, "no"), lambda: RuntimeError("bug")]
    )
    async def test_failures_then_bytes(self, times: int, error: Callable[[], Exception]) -> None:
        async with opened(FailingSource(DATA, times, error)) as buf:
            assert await touch(buf.__getitem__, 9) == DATA[9]
            stats = buf.stats
            assert stats.retries == times
            assert stats.failures == stats.poisoned_bytes == 0
            assert stats.last_error is not None

    async def test_all_ways_to_ask_wait(self) -> None:
        source = FailingSource(DATA, 20, transient)
        async with opened(source) as buf:
            found = await asyncio.gather(
                touch(lambda: buf.view[3]),
                touch(lambda: bytes(buf.view[BLOCK : BLOCK + 99])),
                touch(lambda: buf[2 * BLOCK : 2 * BLOCK + 9]),
                buf.read(3 * BLOCK, 50),
                buf.fetch(4 * BLOCK, 2 * BLOCK),
                touch(buf.find, DATA[-500:-400], 6 * BLOCK),
            )
            assert found == [
                DATA[3],
                DATA[BLOCK : BLOCK + 99],
                DATA[2 * BLOCK : 2 * BLOCK + 9],
                DATA[3 * BLOCK : 3 * BLOCK + 50],
                None,
                DATA.find(DATA[-500:-400], 6 * BLOCK),
            ]
            assert buf.stats.retries >= 20
            assert await buf.read() == DATA

    @pytest.mark.parametrize("wrong", [b"", b"\xee", DATA[: BLOCK - 1], DATA[: BLOCK + 1], DATA])
    @pytest.mark.parametrize("kind", [PlainSource, FullSource])
    async def test_a_wrong_length_is_not_installed(
        self, kind: type[PlainSource], wrong: bytes
    ) -> None:
        answers = [wrong, wrong]

        async def script(offset: int, length: int) -> bytes | None:
            return answers.pop() if answers else None

        async with opened(kind(DATA, script)) as buf:
            assert await touch(buf.__getitem__, slice(5, BLOCK)) == DATA[5:BLOCK]
            assert await buf.read() == DATA
            assert buf.stats.retries == 2

    async def test_a_stream_that_breaks_goes_on_where_it_was(self) -> None:
        data = content(1 << 20)
        breaks = [300_000, 700_000]

        class Breaking(FullSource):
            async def stream(self, offset, length):  # type: ignore[no-untyped-def]
                self.reads.append((offset, length))
                async for chunk in super().stream(offset, length):
                    if breaks and offset + length > breaks[0] and self.reads[-1][0] > breaks[0]:
                        del breaks[0]
                        raise transient()
                    yield chunk

        async with opened(Breaking(data)) as buf:
            await buf.fetch()
            assert await buf.read() == data
            assert buf.stats.retries == 2
            assert buf.stats.fetched_bytes < 1.3 * len(data)

    async def test_readahead_that_fails_is_dropped(self) -> None:
        """Nobody waits for it, so nobody is told, and a later touch asks again."""
        source = FullSource(DATA)

        async def script(offset: int, length: int) -> None:
            if offset >= 2 * BLOCK and not touched:
                raise final()

        touched: list[int] = []
        source.script = script
        async with opened(source, readahead=None) as buf:
            for at in (0, BLOCK):
                assert await touch(buf.__getitem__, at) == DATA[at]
            touched.append(1)
            assert await touch(bytes, buf.view) == DATA
            assert buf.stats.failures == buf.stats.poisoned_bytes == 0

    async def test_a_loop_that_comes_late_is_given_time(self, counters: Counters) -> None:
        """The loop stalls for a moment, then a slow source is waited for as ever."""
        gate = Gate(DATA, is_open=False)
        async with opened(gate.read, size=SIZE) as buf:
            assert buf._region is not None
            buf._region.pager.rescue_deadline = 0.2
            waits = asyncio.ensure_future(touch(buf.__getitem__, 5))
            await asyncio.to_thread(counters.wait, "misses", 1)
            # Two stalls: one before the fault is known, one while it is in hand.
            later = asyncio.ensure_future(touch(buf.__getitem__, BLOCK + 5))
            await asyncio.sleep(0)  # the thread starts
            wait_until(lambda: counters["misses"] == 2, "the second miss", 10.0)
            wait_until(lambda: counters["rescues"] >= 1, "the rescue loop", 10.0)
            await asyncio.to_thread(gate.wait, 2)
            await asyncio.sleep(0.5)  # well past the deadline
            gate.open()
            assert await waits == DATA[5]
            assert await later == DATA[BLOCK + 5]
            assert buf.stats.flights == 2

    async def test_retry_after_is_heeded(self) -> None:
        source = FailingSource(
            DATA, 1, lambda: SourceError("busy", transient=True, retry_after=0.15)
        )
        async with opened(source) as buf:
            started = time.monotonic()
            await buf.fetch(0, 1)
            assert time.monotonic() - started >= 0.15

    async def test_a_fetch_asks_at_once_whatever_was_asked_for(self) -> None:
        failed = asyncio.Event()

        def busy() -> SourceError:
            failed.set()
            return SourceError("busy", transient=True, retry_after=1e9)

        async with opened(FailingSource(DATA, 2, busy)) as buf:
            waits = asyncio.ensure_future(touch(buf.__getitem__, 5))
            await failed.wait()
            failed.clear()
            second = asyncio.ensure_future(buf.fetch(0, 10))
            await failed.wait()
            async with asyncio.timeout(5):
                await buf.read(0, 10)
                await second
                assert await waits == DATA[5]
            assert buf.stats.retries == 2

    async def test_no_source_is_left_alone_for_longer_than_a_minute(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert backoff.LONGEST_OBEYED == 60
        monkeypatch.setattr(backoff, "LONGEST_OBEYED", 0.1)
        busy = FailingSource(DATA, 1, lambda: SourceError("busy", retry_after=99_999_999))
        async with opened(busy) as buf, asyncio.timeout(5):
            started = time.monotonic()
            await buf.fetch(0, 1)
            assert time.monotonic() - started >= 0.1

    @pytest.mark.parametrize(
        "fault",
        [
            Fault(status=503),
            Fault(status=404),
            Fault(status=429, retry_after="0"),
            Fault(cut_after=100),
            Fault(cut_after=100, reset=True),
            Fault(no_reply=True),
            Fault(garbage=b"HTTP/1.1 999 what\r\n\r\n"),
            Fault(short_by=10),
            Fault(extra=b"more"),
            Fault(ignore_range=True),
            Fault(gzip=True),
            Fault(headers={"Content-Range": None}),
            Fault(chunked=1000, cut_after=5000),
        ],
        ids=lambda fault: repr({k: v for k, v in vars(fault).items() if v}),
    )
    async def test_http_faults(self, fault: Fault) -> None:
        async with RangeServer({"/a": DATA}) as server, opened(server.url("/a")) as buf:
            server.faults.extend([fault, fault])
            assert await touch(buf.__getitem__, slice(9, BLOCK)) == DATA[9:BLOCK]
            # The HTTP client itself asks again when an idle connection turns out to be closed.
            assert buf.stats.retries >= 1
            server.faults.extend([fault, fault])
            assert await buf.read() == DATA
            assert buf.stats.failures == buf.stats.poisoned_bytes == 0


@pytest.mark.usefixtures("quick")
class TestSoft:
    """errors="soft": an error after the deadline, or at once where waiting cannot help."""

    async def test_every_call_raises_and_a_fetch_heals(self, pipe: tuple[int, int]) -> None:
        source = failing_with(final)
        async with opened(source, errors="soft", deadline=10.0) as buf:
            for call in (
                lambda: buf.fetch(0, 10),
                lambda: buf.read(0, 10),
                lambda: buf.readinto(0, bytearray(10)),
                lambda: touch(buf.__getitem__, 5),
                lambda: touch(buf.__getitem__, slice(0, 99)),
                lambda: touch(buf.__getitem__, slice(0, 99, 3)),
                lambda: touch(buf.find, b"absent"),
            ):
                started = time.monotonic()
                with pytest.raises(SourceError) as caught:
                    await call()
                assert time.monotonic() - started < 5
                text = f"{caught.value} {caught.value.__cause__}"
                assert "the disk is gone" in text
            with pytest.raises(SourceError, match="disk is gone"):
                async with buf.pin(0, 10):
                    pass
            with pytest.raises(OSError, match="Bad address") as bad:
                await touch(os.write, pipe[1], buf.view[:10])
            assert bad.value.errno == errno.EFAULT
            assert buf.stats.poisoned_bytes == BLOCK
            assert buf.stats.failures >= 1
            source.script = None
            await buf.fetch(0, 10)
            assert buf.stats.poisoned_bytes == 0
            assert os.write(pipe[1], buf.view[:10]) == 10
            assert os.read(pipe[0], 10) == DATA[:10]
            assert await touch(bytes, buf.view) == DATA

    async def test_poisoned_stays_poisoned_until_fetched(self) -> None:
        source = failing_with(final)
        async with opened(source, errors="soft", deadline=10.0) as buf:
            with pytest.raises(SourceError):
                await touch(buf.__getitem__, BLOCK + 5)
            source.script = None
            asked = len(source.reads)
            with pytest.raises(SourceError) as caught:
                await touch(buf.__getitem__, BLOCK + 7)
            assert str(BLOCK + 7) in str(caught.value) or str(BLOCK) in str(caught.value)
            assert isinstance(caught.value.__cause__, SourceError)
            assert len(source.reads) == asked
            assert await buf.read(BLOCK, 10) == DATA[BLOCK : BLOCK + 10]
            assert await touch(buf.__getitem__, BLOCK + 7) == DATA[BLOCK + 7]

    async def test_only_what_failed_is_poisoned(self) -> None:
        async def script(offset: int, length: int) -> None:
            if offset < 3 * BLOCK < offset + length:
                raise final()
            if offset == 3 * BLOCK:
                raise final()

        source = PlainSource(DATA, script)
        async with opened(source, errors="soft", deadline=5.0) as buf:
            with pytest.raises(SourceError):
                await buf.fetch(3 * BLOCK, 1)
            assert await touch(bytes, buf.view[: 3 * BLOCK]) == DATA[: 3 * BLOCK]
            assert await touch(bytes, buf.view[4 * BLOCK :]) == DATA[4 * BLOCK :]
            assert buf.stats.poisoned_bytes == BLOCK
            assert buf.resident() == [(0, 3 * BLOCK), (4 * BLOCK, SIZE)]

    async def test_the_first_byte_that_cannot_be_had_is_named(self) -> None:
        """Copies and searches touch a page anywhere, which is nobody's business."""
        source = failing_with(final)
        start, page = 3 * BLOCK, mmap.PAGESIZE
        async with opened(source, errors="soft", deadline=5.0) as buf:
            for low, high, first in (
                (start, start + 10, start),
                (start + 7, start + 1000, start + 7),
                (start + page - 3, start + page + 3, start + page - 3),
            ):
                with pytest.raises(SourceError, match=f"byte {first} could"):
                    await touch(buf.__getitem__, slice(low, high))
            with pytest.raises(SourceError, match=f"byte {start + 7} could"):
                await touch(buf.find, b"not there at all", start + 7, start + 100)

    async def test_transient_failures_are_retried_until_the_deadline(self) -> None:
        source = failing_with(transient)
        async with opened(source, errors="soft", deadline=0.3) as buf:
            started = time.monotonic()
            with pytest.raises(SourceError, match="noisy"):
                await buf.read(0, 1)
            assert 0.25 <= time.monotonic() - started < 3
            assert len(source.reads) > 3

    async def test_transient_failures_within_the_deadline_are_not_seen(self) -> None:
        async with opened(FailingSource(DATA, 4, transient), errors="soft", deadline=20.0) as buf:
            assert await touch(bytes, buf.view) == DATA
            assert buf.stats.retries == 4
            assert buf.stats.failures == 0

    @pytest.mark.parametrize("way", ["read", "index", "kernel"])
    async def test_a_hung_source_ends_at_the_deadline(
        self, way: str, pipe: tuple[int, int]
    ) -> None:
        source = Hung(DATA)
        async with opened(source, errors="soft", deadline=0.3) as buf:
            started = time.monotonic()
            if way == "kernel":
                with pytest.raises(OSError, match="Bad address"):
                    await touch(os.write, pipe[1], buf.view[:10])
            elif way == "index":
                with pytest.raises(SourceError) as caught:
                    await touch(buf.__getitem__, 5)
                assert isinstance(caught.value.__cause__, SourceTimeoutError)
            else:
                with pytest.raises(SourceTimeoutError, match=r"0\.3 s"):
                    await buf.read(0, 5)
            waited = time.monotonic() - started
            if not (way == "kernel" and buf.user_mode_only):
                assert 0.25 <= waited < 3
            source.hangs = False
            assert await buf.read() == DATA

    async def test_more_hung_flights_than_run_at_a_time(self) -> None:
        """Those that wait for their turn fail at their own deadline too."""
        source = Hung(DATA)
        async with opened(source, errors="soft", deadline=0.4, block_size=PAGE_SIZE) as buf:
            started = time.monotonic()
            ended = await asyncio.gather(
                *[buf.fetch(at, 1) for at in range(0, 100 * PAGE_SIZE, PAGE_SIZE)],
                return_exceptions=True,
            )
            assert time.monotonic() - started < 4
            assert all(isinstance(end, SourceTimeoutError) for end in ended)
            source.hangs = False
            assert await buf.read() == DATA

    async def test_soft_without_a_deadline(self) -> None:
        async with opened(FailingSource(DATA, 3, transient), errors="soft") as buf:
            assert await buf.read(0, 9) == DATA[:9]
        async with opened(failing_with(final), errors="soft") as buf:
            with pytest.raises(SourceError):
                await buf.read(0, 9)

    @pytest.mark.parametrize("way", ["index", "numpy", "memcpy", "own thread"])
    def test_a_raw_touch_is_a_bus_error(self, loop_name: str, way: str) -> None:
        with start(buffers.raw_touch_of_failed_page, loop_name, way, warnings="ignore") as process:
            process.expect("begins")
            outcome = process.wait(15)
        assert outcome.death == "SIGBUS", outcome.stderr
        assert "of a lazy region: its source failed or it was closed" in outcome.stderr
        assert "not reached" not in outcome.stdout

    @pytest.mark.parametrize("kind", ["memfd", "anonymous"])
    async def test_kinds_heal(self, kind: Any) -> None:
        source = failing_with(final)
        async with opened(source, errors="soft", deadline=5.0, kind=kind) as buf:
            with pytest.raises(SourceError):
                await touch(buf.__getitem__, SIZE - 1)
            source.script = None
            assert await buf.read() == DATA
            assert await touch(bytes, buf.view) == DATA


@pytest.mark.usefixtures("quick")
class TestChanged:
    """Another version is an error at once, in both modes; what is there stays readable."""

    @pytest.mark.parametrize("errors", ["hard", "soft"])
    async def test_a_file_written_to(self, tmp_path: Path, errors: Any) -> None:
        path = tmp_path / "object"
        path.write_bytes(DATA)
        async with opened(path, errors=errors) as buf:
            await buf.fetch(0, BLOCK)
            stamp = path.stat().st_mtime_ns + 10**9
            path.write_bytes(DATA[::-1])
            os.utime(path, ns=(stamp, stamp))
            with pytest.raises(SourceChangedError):
                await buf.read()
            with pytest.raises(SourceError) as caught:
                await touch(buf.__getitem__, 2 * BLOCK)
            assert isinstance(caught.value.__cause__, SourceChangedError)
            with pytest.raises(SourceChangedError):
                await buf.fetch(2 * BLOCK, 1)
            for first, stop in buf.resident():
                assert buf[first:stop] == DATA[first:stop]
            assert buf.resident(0, BLOCK) == [(0, BLOCK)]

    async def test_a_file_replaced_stays_the_old_one(self, tmp_path: Path) -> None:
        path = tmp_path / "object"
        path.write_bytes(DATA)
        async with opened(path) as buf:
            assert await buf.read(0, 9) == DATA[:9]
            (tmp_path / "new").write_bytes(DATA[::-1])
            os.replace(tmp_path / "new", path)
            assert await touch(bytes, buf.view) == DATA

    async def test_a_file_cut_off(self, tmp_path: Path) -> None:
        path = tmp_path / "object"
        path.write_bytes(DATA)
        async with opened(path) as buf:
            assert await buf.read(0, 9) == DATA[:9]
            os.truncate(path, BLOCK)
            with pytest.raises(SourceError) as caught:
                await touch(buf.__getitem__, SIZE - 1)
            assert isinstance(caught.value.__cause__, SourceChangedError)

    @pytest.mark.parametrize("errors", ["hard", "soft"])
    @pytest.mark.parametrize("how", ["etag", "date", "size", "total"])
    async def test_an_object_on_a_server(self, errors: Any, how: str) -> None:
        plain = Entry(memoryview(DATA), None if how == "date" else '"v1"', 1e9)
        async with (
            RangeServer({"/a": plain}) as server,
            opened(server.url("/a"), errors=errors) as buf,
        ):
            assert await touch(buf.__getitem__, 5) == DATA[5]
            match how:
                case "etag":
                    server.objects["/a"] = Entry(memoryview(DATA[::-1]), '"v2"', 1e9)
                case "date":
                    server.objects["/a"] = Entry(memoryview(DATA[::-1]), None, 1.1e9)
                case "size":
                    server.objects["/a"] = Entry(memoryview(DATA[: 2 * BLOCK]), '"v1"', 1e9)
                case _:
                    server.objects["/a"] = Entry(memoryview(DATA + b"x"), '"v1"', 1e9)
            with pytest.raises(SourceError) as caught:
                await touch(buf.__getitem__, 5 * BLOCK)
            assert isinstance(caught.value.__cause__, SourceChangedError)
            with pytest.raises(SourceChangedError):
                await buf.fetch()
            assert buf.resident() == [(0, BLOCK)]
            assert buf[:BLOCK] == DATA[:BLOCK]

    async def test_a_source_that_tells_between_two_pages(self) -> None:
        """What a stream delivered before it found out is of the pinned version, and stays."""
        data = content(1 << 20)

        class Changing(FullSource):
            async def stream(self, offset, length):  # type: ignore[no-untyped-def]
                yield self.data[offset : offset + 5 * PAGE_SIZE + 1]
                raise SourceChangedError("it is another one now")

        async with opened(Changing(data)) as buf:
            with pytest.raises(SourceChangedError):
                await buf.fetch()
            for first, stop in buf.resident():
                assert buf[first:stop] == data[first:stop]
            assert buf.resident()[0] == (0, 5 * PAGE_SIZE)


class TestClosing:
    """Closing while threads wait: each gets an error of its kind."""

    async def test_callers_of_methods(self) -> None:
        gate = Gate(DATA, is_open=False)
        async with opened(gate.read, size=SIZE) as buf:
            calls = [
                asyncio.create_task(buf.read(0, 5)),
                asyncio.create_task(buf.fetch()),
                asyncio.create_task(buf.readinto(7, bytearray(9))),
            ]
            await asyncio.to_thread(gate.wait)
        for call in calls:
            with pytest.raises(ClosedError):
                await call

    async def test_callers_whose_flight_waits_for_its_turn(self) -> None:
        gate = Gate(DATA, is_open=False)
        async with opened(gate.read, size=SIZE, block_size=PAGE_SIZE) as buf:
            calls = [
                asyncio.create_task(buf.read(at, 5)) for at in range(0, 100 * PAGE_SIZE, PAGE_SIZE)
            ]
            await asyncio.to_thread(gate.wait, fetcher_module.MAX_FLIGHTS)
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ended} == {ClosedError}

    async def test_guarded_touchers(self, counters: Counters) -> None:
        gate = Gate(DATA, is_open=False)
        async with opened(gate.read, size=SIZE) as buf:
            touches = [
                asyncio.ensure_future(touch(buf.__getitem__, 5)),
                asyncio.ensure_future(touch(buf.__getitem__, slice(BLOCK, 3 * BLOCK))),
                asyncio.ensure_future(touch(buf.find, b"absent", 4 * BLOCK)),
            ]
            await asyncio.to_thread(counters.wait, "live_slots", 3)
        for one in touches:
            with pytest.raises(ClosedError):
                await one
        assert counters["live_regions"] == 0

    async def test_touchers_in_the_kernel(self, pipe: tuple[int, int], counters: Counters) -> None:
        gate = Gate(DATA, is_open=False)
        async with opened(gate.read, size=SIZE, force=True) as buf:
            if buf.user_mode_only:
                pytest.skip("needs a userfaultfd that sees faults of kernel mode")
            write = asyncio.ensure_future(touch(os.write, pipe[1], buf.view[:10]))
            await asyncio.to_thread(counters.wait, "misses", 1)
        with pytest.raises(OSError, match="Bad address"):
            await write

    @pytest.mark.parametrize("way", ["index", "crc"])
    def test_raw_touchers(self, loop_name: str, way: str) -> None:
        with start(buffers.raw_touch_while_closing, loop_name, way) as process:
            process.expect("begins")
            outcome = process.wait(15)
        assert outcome.death == "SIGBUS", outcome.stderr
        assert "its source failed or it was closed" in outcome.stderr

    def test_the_loop_ended_first(self, loop_name: str) -> None:
        found = result_of(buffers.touched_after_its_loop, loop_name, warnings="ignore")
        assert found["right"]
        assert found["rescued"] >= 7
        assert found["engines"] == 0

    async def test_close_among_touches(self) -> None:
        """Threads hammer while it is closed: right bytes or ClosedError, nothing else."""
        for _ in range(10):
            source = PlainSource(DATA)
            first = threading.Semaphore(0)

            async with opened(source, block_size=PAGE_SIZE) as buf:

                def hammer(start: int, buf: Any = buf, first: Any = first) -> str:
                    try:
                        for at in range(start, SIZE, 3 * PAGE_SIZE):
                            if buf[at : at + 8] != DATA[at : at + 8]:
                                return "wrong bytes"
                            first.release()
                    except ClosedError:
                        return "closed"
                    return "finished"

                touches = [
                    asyncio.ensure_future(touch(hammer, n * PAGE_SIZE + 16)) for n in range(3)
                ]
                await asyncio.to_thread(first.acquire)
            assert set(await asyncio.gather(*touches)) <= {"closed", "finished"}


@contextlib.asynccontextmanager
async def region_of(handler: Any, **settings: Any) -> AsyncIterator[aiouffd.Region]:
    async with aiouffd.Pager() as pager:
        region = pager.map(SIZE, **settings)
        region.on_missing(handler)
        yield region


def word_at(region: aiouffd.Region, at: int) -> bytes:
    return bytes(region.view[at : at + 8])


@pytest.mark.usefixtures("quick")
class TestHandlers:
    """A handler that fails is told to the loop's exception handler, and its toucher never lost."""

    #: So many faults of a handler that does not wait, and it is run without a task.
    LEAD = 20

    def data(self, fault: aiouffd.Fault) -> bytes:
        return DATA[fault.offset : fault.offset + fault.length]

    async def lead(self, region: aiouffd.Region) -> None:
        """Faults that the handler serves well before the one that matters."""
        for at in range(0, self.LEAD * PAGE_SIZE, PAGE_SIZE):
            assert await touch(word_at, region, at) == DATA[at : at + 8]

    AT = 30 * PAGE_SIZE

    @pytest.mark.parametrize("lead", [False, True], ids=["at first", "after many"])
    @pytest.mark.parametrize(
        "how", ["raises", "returns", "cancelled", "cancels itself", "waits and raises", "not async"]
    )
    async def test_hard_calls_again(
        self, how: str, lead: bool, loop_errors: list[dict[str, Any]]
    ) -> None:
        calls: list[int] = []

        async def serve(fault: aiouffd.Fault) -> None:
            if fault.offset == self.AT:
                calls.append(fault.block)
                if len(calls) < 3:
                    match how:
                        case "raises":
                            raise RuntimeError("no idea")
                        case "returns":
                            return
                        case "cancelled":
                            raise asyncio.CancelledError
                        case "cancels itself":
                            task = asyncio.current_task()
                            if task is not None:
                                task.cancel()
                            await asyncio.sleep(0.001)
                        case "waits and raises":
                            await asyncio.sleep(0)
                            raise OSError("no line")
                        case _:
                            raise TypeError("not async")
            fault.copy(self.data(fault))

        async with region_of(serve) as region:
            if lead:
                await self.lead(region)
            assert await touch(word_at, region, self.AT) == DATA[self.AT : self.AT + 8]
            assert region.poisoned_bytes == 0
        assert len(calls) >= 3 or (lead and how == "cancels itself")
        if how in ("raises", "returns", "waits and raises", "not async"):
            # Without a task it is tried again in one before anybody is told.
            assert len(loop_errors) == (1 if lead and how != "waits and raises" else 2)
            told = loop_errors[-1]
            assert isinstance(told["fault"], aiouffd.Fault)
            assert told["fault"].block == self.AT // PAGE_SIZE
            assert isinstance(told["exception"], Exception)
        loop_errors.clear()

    @pytest.mark.parametrize("how", ["raises", "returns", "hangs", "poisons"])
    async def test_soft_poisons(
        self, how: str, loop_errors: list[dict[str, Any]], pipe: tuple[int, int]
    ) -> None:
        async def serve(fault: aiouffd.Fault) -> None:
            if fault.offset != self.AT:
                fault.copy(self.data(fault))
            elif how == "raises":
                raise RuntimeError("no idea")
            elif how == "hangs":
                await asyncio.Event().wait()
            elif how == "poisons":
                fault.poison()

        async with region_of(serve, errors="soft", deadline=0.3) as region:
            if region.pager.user_mode_only:
                pytest.skip("needs a userfaultfd that sees faults of kernel mode")
            with pytest.raises(OSError, match="Bad address"):
                await touch(os.write, pipe[1], region.view[self.AT : self.AT + 8])
            assert region.poisoned_bytes == PAGE_SIZE
            assert region.runs() == [
                (0, self.AT, "missing"),
                (self.AT, PAGE_SIZE, "poisoned"),
                (self.AT + PAGE_SIZE, SIZE - self.AT - PAGE_SIZE, "missing"),
            ]
            assert await touch(word_at, region, 0) == DATA[:8]
            region.install(self.AT, DATA[self.AT : self.AT + PAGE_SIZE], heal=True)
            assert os.write(pipe[1], region.view[self.AT : self.AT + 8]) == 8
            assert os.read(pipe[0], 8) == DATA[self.AT : self.AT + 8]
        assert len(loop_errors) == (0 if how == "poisons" else 1)
        if how == "hangs":
            assert isinstance(loop_errors[0]["exception"], SourceTimeoutError)
        loop_errors.clear()

    @pytest.mark.parametrize("how", ["raises", "returns", "hangs", "poisons"])
    def test_a_raw_touch_is_a_bus_error(self, loop_name: str, how: str) -> None:
        with start(buffers.raw_touch_of_failed_handler, loop_name, how) as process:
            outcome = process.wait(15)
        assert outcome.death == "SIGBUS", outcome.stderr
        assert "of a lazy region" in outcome.stderr
        assert "not reached" not in outcome.stdout
        assert ("handler: " in outcome.stdout) == (how != "poisons")

    async def test_hard_with_a_deadline_calls_again(
        self, loop_errors: list[dict[str, Any]]
    ) -> None:
        calls: list[int] = []

        async def serve(fault: aiouffd.Fault) -> None:
            calls.append(fault.block)
            if len(calls) < 3:
                await asyncio.Event().wait()
            fault.copy(self.data(fault))

        async with region_of(serve, deadline=0.1) as region:
            assert await touch(word_at, region, 0) == DATA[:8]
        assert len(calls) == 3
        assert [type(told["exception"]) for told in loop_errors] == [SourceTimeoutError] * 2
        loop_errors.clear()

    async def test_a_loop_that_comes_late_calls_once(self, counters: Counters) -> None:
        """What is in hand when the loop stalls is not served a second time."""
        gate = Gate(DATA, is_open=False)
        async with region_of(gate) as region:
            waits = asyncio.ensure_future(touch(word_at, region, 0))
            await asyncio.to_thread(gate.wait)
            wait_until(lambda: counters["rescues"] >= 1, "the rescue loop", 10.0)
            await asyncio.sleep(0.05)
            gate.open()
            assert await waits == DATA[:8]
            assert not gate.arrivals.acquire(blocking=False)

    async def test_part_of_a_block(self, loop_errors: list[dict[str, Any]]) -> None:
        """A handler that brings half of a block has not resolved it; the half stays."""
        calls: list[int] = []

        async def serve(fault: aiouffd.Fault) -> None:
            calls.append(fault.block)
            half = fault.length // 2
            if len(calls) == 1:
                fault.copy(self.data(fault)[:half])
            else:
                fault.copy(self.data(fault)[half:], offset=fault.offset + half)

        async with region_of(serve, block_size=BLOCK) as region:
            assert await touch(bytes, region.view[:BLOCK]) == DATA[:BLOCK]
        assert calls == [0, 0]
        assert len(loop_errors) == 1
        assert "without resolving" in str(loop_errors[0]["exception"])
        loop_errors.clear()

    async def test_a_block_poisoned_in_part(self, loop_errors: list[dict[str, Any]]) -> None:
        """One page of a block is given up and the handler returns: the others still come."""
        calls: list[int] = []

        async def serve(fault: aiouffd.Fault) -> None:
            calls.append(fault.block)
            if len(calls) == 1:
                fault.region.poison(fault.offset, PAGE_SIZE)
            else:
                fault.copy(self.data(fault))

        async with region_of(serve, block_size=BLOCK) as region:
            at = 5 * PAGE_SIZE
            assert await touch(word_at, region, at) == DATA[at : at + 8]
            assert region.runs(0, BLOCK) == [
                (0, PAGE_SIZE, "poisoned"),
                (PAGE_SIZE, BLOCK - PAGE_SIZE, "resident"),
            ]
        assert len(loop_errors) == 1
        assert "without resolving" in str(loop_errors[0]["exception"])
        loop_errors.clear()

    async def test_bytes_of_a_wrong_length(self, loop_errors: list[dict[str, Any]]) -> None:
        wrong = [DATA[: PAGE_SIZE - 1], b"", DATA + b"x"]

        async def serve(fault: aiouffd.Fault) -> None:
            fault.copy(wrong.pop() if wrong else self.data(fault))

        async with region_of(serve) as region:
            assert await touch(word_at, region, PAGE_SIZE) == DATA[PAGE_SIZE : PAGE_SIZE + 8]
        assert len(loop_errors) == 3
        assert {type(told["exception"]) for told in loop_errors} == {aiouffd.UsageError}
        loop_errors.clear()

    async def test_touched_before_there_is_a_handler(
        self, loop_errors: list[dict[str, Any]]
    ) -> None:
        async with aiouffd.Pager() as pager:
            region = pager.map(SIZE)
            early = asyncio.ensure_future(touch(word_at, region, 0))
            await asyncio.to_thread(wait_until, lambda: bool(loop_errors), "the complaint")

            @region.on_missing
            async def serve(fault: aiouffd.Fault) -> None:
                fault.copy(self.data(fault))

            assert await early == DATA[:8]
        assert "before it had a handler" in str(loop_errors[0]["exception"])
        loop_errors.clear()

    async def test_no_silent_zeros_after_trouble(self, loop_errors: list[dict[str, Any]]) -> None:
        """Every way to fail in turn, on every page: the whole region is right at the end."""
        attempts: dict[int, int] = {}

        async def serve(fault: aiouffd.Fault) -> None:
            attempt = attempts[fault.block] = attempts.get(fault.block, 0) + 1
            if attempt == 1:
                match fault.block % 5:
                    case 0:
                        raise RuntimeError("no idea")
                    case 1:
                        return
                    case 2:
                        await asyncio.sleep(0)
                        raise OSError("no line")
                    case 3:
                        raise asyncio.CancelledError
            fault.copy(self.data(fault))

        async with region_of(serve) as region:
            touches = [touch(bytes, region.view[n * BLOCK : (n + 1) * BLOCK]) for n in range(8)]
            assert b"".join(await asyncio.gather(*touches)) == DATA
        assert loop_errors
        loop_errors.clear()


@pytest.mark.parametrize(
    "error", [aiouffd.UsageError("not like this"), NotImplementedError("not at all")]
)
async def test_a_source_that_is_used_wrongly_is_an_error_also_when_hard(error: Exception) -> None:
    asked = 0

    async def read(offset: int, length: int) -> bytes:
        nonlocal asked
        asked += 1
        raise error

    source = aiouffd.sources.FunctionSource(read, size=1 << 20)
    async with aiouffd.open(source, readahead=0) as buf:
        with pytest.raises(SourceError) as caught:
            async with asyncio.timeout(10):
                await buf.fetch(0, 1)
        assert caught.value.__cause__ is error
        with pytest.raises(SourceError):
            await asyncio.to_thread(lambda: buf[0:1])
        assert asked == 1


async def test_errors_come_and_go_under_readers() -> None:
    """Whoever reads gets the bytes or an error, and never zeros, while the source fails at times,
    pages are dropped and errors heal, up to a close by force."""
    data = random.Random(5).randbytes(64 * PAGE_SIZE).replace(b"\0", b"\1")
    broken = False

    async def read(offset: int, length: int) -> bytes:
        if broken:
            raise SourceError("not now", transient=False)
        return data[offset : offset + length]

    source = aiouffd.sources.FunctionSource(read, len(data))
    settings: dict[str, Any] = {"block_size": PAGE_SIZE, "readahead": 0, "errors": "soft"}
    buffer = await aiouffd.open(source, **settings)
    seen = {"bytes": 0, "errors": 0}

    def reader(seed: int) -> None:
        choose = random.Random(seed)
        while True:
            at = choose.randrange(len(data) - 100)
            try:
                found = buffer[at : at + 100]
            except ClosedError:
                return
            except SourceError:
                seen["errors"] += 1
            else:
                assert found == data[at : at + 100]
                seen["bytes"] += 1

    readers = [asyncio.create_task(asyncio.to_thread(reader, seed)) for seed in range(4)]
    choose = random.Random(9)
    for step in range(120):
        broken = step % 3 == 2
        with contextlib.suppress(SourceError):
            await buffer.fetch(choose.randrange(32) * PAGE_SIZE, 32 * PAGE_SIZE)
        await buffer.drop(choose.randrange(48) * PAGE_SIZE, 16 * PAGE_SIZE)
    await buffer.aclose(force=True)
    await asyncio.gather(*readers)
    assert min(seen.values()) > 0
