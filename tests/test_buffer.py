"""Lazy buffers: what the methods give, what they refuse, and how much they fetch."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib.util
import itertools
import os
import pickle
import pty
import random
import struct
import subprocess
import sys
import threading
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

import aiouffd
from aiouffd import ClosedError, SourceChangedError, UsageError
from aiouffd.fetch.fetcher import MAX_FLIGHTS
from aiouffd.fetch.readahead import STREAMS, Readahead
from aiouffd.kernel.lib import PAGE_SIZE
from tests.faulty import (
    HUGE,
    FullSource,
    PlainSource,
    final,
    free_huge_pages,
    huge_page_pool,
    huge_pages,
)
from tests.scenarios import buffers
from tests.servers.http import Entry, RangeServer
from tests.support import ROOT, Counters, Gate, content, result_of, run, start

BLOCK = 65536
#: Not a multiple of anything.
SIZE = 5 * BLOCK + 3 * PAGE_SIZE + 123


def some(size: int = SIZE) -> bytes:
    return content(size + 8 - size % 8)[:size]


@pytest.fixture(params=[PlainSource, FullSource], ids=["plain source", "full source"])
def source(request: pytest.FixtureRequest) -> PlainSource:
    made: PlainSource = request.param(some())
    return made


async def in_threads(functions: list[Callable[[], Any]]) -> list[Any]:
    """Run each function on a thread of its own, all at once."""
    loop = asyncio.get_running_loop()

    def start(function: Callable[[], Any]) -> asyncio.Future[Any]:
        done = loop.create_future()

        def body() -> None:
            try:
                result = function()
            except BaseException as error:
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, result)

        threading.Thread(target=body, daemon=True).start()
        return done

    return await asyncio.gather(*[start(function) for function in functions])


class TestLife:
    async def test_async_with(self, source: PlainSource) -> None:
        buf = aiouffd.open(source)
        assert not buf.closed
        async with buf as same:
            assert same is buf
            assert len(buf) == SIZE
            assert buf.block_size == BLOCK
            assert buf.source is source
            assert buf.address % PAGE_SIZE == 0
            assert await buf.read() == source.data
        assert buf.closed
        assert len(buf) == SIZE

    async def test_await_and_aclose(self, source: PlainSource) -> None:
        buf = await aiouffd.open(source)
        assert await buf is buf
        assert await buf.read(0, 8) == source.data[:8]
        await buf.aclose()
        await buf.aclose()
        with pytest.raises(ClosedError):
            await buf

    async def test_closed_without_having_been_open(self, source: PlainSource) -> None:
        buf = aiouffd.open(source)
        await buf.aclose()
        assert buf.closed
        with pytest.raises(ClosedError):
            await buf.aopen()

    async def test_use_before_it_is_open(self, source: PlainSource) -> None:
        buf = aiouffd.open(source)
        for use in (
            lambda: buf.view,
            lambda: buf.address,
            lambda: buf.user_mode_only,
            lambda: len(buf),
            lambda: buf[0],
            lambda: buf[0:8],
            lambda: buf.find(b"x"),
            lambda: bytes(buf),
            lambda: list(buf),
        ):
            with pytest.raises(UsageError, match="not open"):
                use()
        with pytest.raises(UsageError, match="not open"):
            await buf.fetch()
        with pytest.raises(UsageError, match="not open"):
            await buf.read(0, 4)
        with pytest.raises(UsageError):
            await buf.fetch(0, 10)

    async def test_use_after_close(self, source: PlainSource) -> None:
        async with aiouffd.open(source) as buf:
            await buf.fetch()
        for use in (
            lambda: buf.view,
            lambda: buf.address,
            lambda: buf[0],
            lambda: buf[1:3],
            lambda: buf[::2],
            lambda: buf.find(b"x"),
            lambda: buf.resident(),
        ):
            with pytest.raises(ClosedError):
                use()
        for call in (buf.fetch, buf.read, lambda: buf.readinto(0, bytearray(3))):
            with pytest.raises(ClosedError):
                await call()
        with pytest.raises(ClosedError):
            async with buf.pin(0, 3):
                pass
        assert buf.stats.size == SIZE

    async def test_opening_fails(self, tmp_path: Path, counters: Counters) -> None:
        with pytest.raises(FileNotFoundError):
            await aiouffd.open(tmp_path / "nothing")

        class Unopenable(FullSource):
            async def open(self) -> None:
                raise final()

        with pytest.raises(aiouffd.SourceError, match="disk is gone"):
            await aiouffd.open(Unopenable(b"abc"))
        assert counters["live_regions"] == 0

    async def test_a_source_is_closed_when_mapping_fails(self) -> None:
        class Closing(FullSource):
            closed = False

            async def aclose(self) -> None:
                self.closed = True

        source = Closing(some())
        with pytest.raises(UsageError, match="in blocks of 512"):
            await aiouffd.open(source, block_size=512)
        assert source.closed

    async def test_close_is_prompt_with_fetches_under_way(self, counters: Counters) -> None:
        gate = Gate(some(), is_open=False)
        async with aiouffd.open(gate.read, size=SIZE) as buf:
            fetch = asyncio.create_task(buf.fetch())
            await asyncio.to_thread(gate.wait, 1)
        with pytest.raises(ClosedError):
            await fetch
        assert counters["live_regions"] == 0

    async def test_the_buffer_itself_is_a_buffer(self, source: PlainSource) -> None:
        async with aiouffd.open(source) as buf:
            await buf.fetch()
            assert bytes(buf) == source.data
            assert np.array_equal(np.frombuffer(buf, dtype="u1"), list(source.data))
            assert struct.unpack_from("<Q", buf, 8) == (2,)
            with memoryview(buf) as view:
                assert view.readonly

    async def test_repr_says_what_it_is(self, source: PlainSource) -> None:
        buf = aiouffd.open(source)
        assert "not open" in repr(buf)
        async with buf:
            assert f"{SIZE} bytes, open" in repr(buf)
        assert "closed" in repr(buf)


class TestReading:
    async def test_every_kind_of_index(self) -> None:
        data = some()
        rng = random.Random(1)
        ends = [None, 0, 1, -1, SIZE, SIZE + 9, -SIZE, -SIZE - 9, BLOCK, -BLOCK, PAGE_SIZE + 1]
        async with aiouffd.open(PlainSource(data)) as buf:
            await buf.fetch()
            for _ in range(1500):
                start, stop = rng.choice(ends), rng.choice(ends)
                step = rng.choice([None, None, 1, 2, 7, 4096, -1, -2, -4097, SIZE, -SIZE])
                assert buf[start:stop:step] == data[start:stop:step], (start, stop, step)
            for index in (0, 1, SIZE - 1, -1, -SIZE, BLOCK, np.int64(77), True):
                assert buf[index] == data[index]

    async def test_a_wrong_index(self, source: PlainSource) -> None:
        async with aiouffd.open(source) as buf:
            for index in (SIZE, SIZE + 1, -SIZE - 1, 2**64, -(2**70)):
                with pytest.raises(IndexError):
                    buf[index]
            with pytest.raises(ValueError, match="zero"):
                buf[::0]
            for key in ("a", 1.0, None, (1, 2)):
                with pytest.raises((TypeError, AttributeError)):
                    buf[key]  # type: ignore[index]
            with pytest.raises(TypeError):
                buf[0] = 1  # type: ignore[index]

    async def test_index_and_slice_wait_for_pages(self, source: PlainSource) -> None:
        async with aiouffd.open(source, readahead=0) as buf:

            def touch() -> None:
                assert buf[3] == source.data[3]
                assert buf[-1] == source.data[-1]
                assert buf[BLOCK - 5 : 2 * BLOCK + 5] == source.data[BLOCK - 5 : 2 * BLOCK + 5]
                block = slice(3 * BLOCK, 4 * BLOCK, 1001)
                assert buf[block] == source.data[block]

            await asyncio.to_thread(touch)

    async def test_read_and_readinto(self, source: PlainSource) -> None:
        data = source.data
        async with aiouffd.open(source) as buf:
            assert await buf.read(10, 0) == b""
            assert await buf.read(SIZE) == b""
            assert await buf.read(SIZE - 1) == data[-1:]
            assert await buf.read(7, BLOCK) == data[7 : BLOCK + 7]
            target = bytearray(1000)
            assert await buf.readinto(SIZE - 10, target) == 10
            assert target == data[-10:] + bytes(990)
            assert await buf.readinto(SIZE, target) == 0
            array = np.zeros(500, dtype="<u8")
            assert await buf.readinto(16, array) == 4000
            assert array[0] == 3
            for offset, length in ((-1, 5), (0, SIZE + 1), (SIZE, 1), (5, -1), (SIZE + 1, None)):
                with pytest.raises(UsageError):
                    await buf.read(offset, length)
                with pytest.raises(UsageError):
                    await buf.fetch(offset, length)
            with pytest.raises(UsageError):
                await buf.readinto(SIZE + 1, target)
            with pytest.raises((TypeError, BufferError)):
                await buf.readinto(0, b"read-only")

    async def test_a_large_read_is_in_steps(self) -> None:
        data = some(5 << 20)
        async with aiouffd.open(FullSource(data)) as buf:
            assert await buf.read(1, (5 << 20) - 2) == data[1:-1]
            target = bytearray(5 << 20)
            assert await buf.readinto(0, target) == 5 << 20
            assert target == data

    async def test_find(self) -> None:
        data = bytearray(some())
        data[BLOCK - 3 : BLOCK + 3] = b"needle"
        data[SIZE - 4 :] = b"tail"
        async with aiouffd.open(PlainSource(bytes(data)), readahead=0) as buf:

            def search() -> None:
                for sub in (b"needle", b"tail", b"absent?", b"tail\0", bytes(data[:1]), b""):
                    for start, end in ((0, None), (5, 100), (BLOCK - 3, None), (-4, None), (9, 2)):
                        wanted = data.find(sub, start, SIZE if end is None else end)
                        assert buf.find(sub, start, end) == wanted, (sub, start, end)

            await asyncio.to_thread(search)

    async def test_bytes_past_the_end_are_zero(self, source: PlainSource) -> None:
        async with aiouffd.open(source) as buf:
            last = SIZE - SIZE % PAGE_SIZE
            page = await asyncio.to_thread(ctypes.string_at, buf.address + last, PAGE_SIZE)
            assert page == source.data[last:] + bytes(PAGE_SIZE - SIZE % PAGE_SIZE)

    @pytest.mark.parametrize(
        "size", [1, 7, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, BLOCK, BLOCK + 1]
    )
    async def test_small_sizes(self, size: int) -> None:
        data = some(size)
        for kind in (PlainSource, FullSource):
            async with aiouffd.open(kind(data)) as buf:
                assert await asyncio.to_thread(bytes, buf.view) == data
                assert buf.resident() == [(0, size)]
                assert buf.stats.resident_bytes == size

    async def test_an_empty_object(self) -> None:
        async with aiouffd.open(PlainSource(b"")) as buf:
            assert len(buf) == 0
            assert bytes(buf.view) == b""
            assert buf[:] == buf[3:9] == buf[::-1] == b""
            with pytest.raises(IndexError):
                buf[0]
            assert await buf.read() == b""
            await buf.fetch()
            assert await buf.readinto(0, bytearray(4)) == 0
            assert buf.find(b"a") == -1
            assert buf.find(b"") == 0
            assert buf.resident() == []
            assert buf.stats.resident_bytes == 0
            with pytest.raises(UsageError, match="empty"):
                buf.address  # noqa: B018
            async with buf.pin() as view:
                assert bytes(view) == b""

    async def test_pin(self, source: PlainSource) -> None:
        async with aiouffd.open(source, readahead=0) as buf:
            async with buf.pin(PAGE_SIZE + 1, BLOCK) as view:
                assert len(view) == BLOCK
                assert view == source.data[PAGE_SIZE + 1 : PAGE_SIZE + 1 + BLOCK]
                assert buf.resident(PAGE_SIZE, BLOCK) == [(PAGE_SIZE, PAGE_SIZE + BLOCK)]
            with pytest.raises(ValueError, match="released"):
                view[0]
            with pytest.raises(UsageError):
                async with buf.pin(SIZE, 1):
                    pass

    async def test_bytes_and_paths_and_functions(self, tmp_path: Path) -> None:
        data = some()
        path = tmp_path / "object"
        path.write_bytes(data)

        async def read(offset: int, length: int) -> bytes:
            return data[offset : offset + length]

        for given, options in (
            (data, {}),
            (bytearray(data), {}),
            (memoryview(data), {}),
            (path, {}),
            (str(path), {}),
            (path.as_uri(), {}),
            (read, {"size": SIZE}),
        ):
            async with aiouffd.open(given, **options) as buf:
                assert await asyncio.to_thread(bytes, buf.view) == data
                assert await buf.read() == data


class TestArguments:
    @pytest.mark.parametrize(
        "settings",
        [
            {"block_size": 0},
            {"block_size": -4096},
            {"block_size": 12345},
            {"block_size": 3 * BLOCK},
            {"readahead": -1},
            {"errors": "firm"},
            {"errors": "hard", "deadline": 1.0},
            {"errors": "soft", "deadline": 0},
            {"errors": "soft", "deadline": -1.0},
            {"no_such_option": 1},
        ],
        ids=str,
    )
    def test_what_cannot_be(self, settings: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            aiouffd.open("a/path", **settings)

    @pytest.mark.parametrize(
        "settings",
        [{"block_size": PAGE_SIZE // 2}, {"kind": "tape"}, {"kind": "hugetlb", "block_size": 4096}],
        ids=str,
    )
    async def test_what_opening_refuses(self, settings: dict[str, Any]) -> None:
        with pytest.raises((UsageError, aiouffd.KernelError)):
            async with aiouffd.open(PlainSource(some()), **settings):
                pass

    async def test_unknown_things_are_no_source(self) -> None:
        for given in (5, None, object(), "gopher://host/x"):
            with pytest.raises(UsageError):
                aiouffd.open(given)

    @pytest.mark.parametrize("block_size", [PAGE_SIZE, 4 * PAGE_SIZE, 1 << 20, 1 << 60])
    @pytest.mark.parametrize("readahead", [0, 1, 100_000, None])
    async def test_block_sizes_and_readahead(self, block_size: int, readahead: int | None) -> None:
        data = some(3 * BLOCK + 77)
        sizes = {"block_size": block_size, "readahead": readahead}
        async with aiouffd.open(PlainSource(data), **sizes) as buf:
            assert buf.block_size == block_size
            assert await asyncio.to_thread(bytes, buf.view) == data

    async def test_read_only_unless_asked(self, source: PlainSource) -> None:
        async with aiouffd.open(source) as buf:
            assert buf.view.readonly
            assert not np.frombuffer(buf.view, dtype="u1").flags.writeable
            with pytest.raises(TypeError):
                buf.view[0] = 1

    async def test_written_bytes_stay(self) -> None:
        source = PlainSource(some())
        async with aiouffd.open(source, writable=True, readahead=0) as buf:

            def write() -> None:
                buf.view[5] = 0xAB
                buf.view[BLOCK - 2 : BLOCK + 2] = b"wxyz"
                array = np.frombuffer(buf.view, dtype="u1")
                array[3 * BLOCK] ^= 0xFF

            await asyncio.to_thread(write)
            expected = bytearray(source.data)
            expected[5] = 0xAB
            expected[BLOCK - 2 : BLOCK + 2] = b"wxyz"
            expected[3 * BLOCK] ^= 0xFF
            assert await buf.read() == expected
            assert source.data == some()


class TestKinds:
    async def test_memfd(self, source: PlainSource) -> None:
        async with aiouffd.open(source, kind="memfd", readahead=0) as buf:
            assert await asyncio.to_thread(bytes, buf.view[BLOCK:]) == source.data[BLOCK:]
            assert buf.resident() == [(BLOCK, SIZE)]
            assert await buf.read() == source.data

    async def test_memfd_written(self) -> None:
        async with aiouffd.open(PlainSource(some()), kind="memfd", writable=True) as buf:
            await asyncio.to_thread(buf.view.__setitem__, 7, 9)
            assert (await buf.read())[:9] == some()[:7] + b"\x09" + some()[8:9]

    @pytest.mark.hugetlb
    @pytest.mark.parametrize("kind", ["hugetlb", "hugetlb-memfd"])
    @pytest.mark.needs_root
    async def test_huge_pages(self, kind: Any, source: PlainSource) -> None:
        source.data = some(HUGE + SIZE)
        with huge_pages(2):
            async with aiouffd.open(source, kind=kind) as buf:
                assert buf.block_size == HUGE
                assert buf.address % HUGE == 0
                data = source.data
                assert await asyncio.to_thread(buf.__getitem__, HUGE + 5) == data[HUGE + 5]
                assert buf.resident() == [(HUGE, HUGE + SIZE)]
                assert await asyncio.to_thread(bytes, buf.view) == data
                tail = await asyncio.to_thread(
                    ctypes.string_at, buf.address + len(data), 2 * HUGE - len(data)
                )
                assert not any(tail)
            # Gone before the pages are given back.
            del buf
            gc.collect()

    @pytest.mark.hugetlb
    async def test_no_huge_page_left(self) -> None:
        with huge_page_pool():
            if free_huge_pages() != 0:
                pytest.skip("there are huge pages, or can be none")
            with pytest.raises(aiouffd.AiouffdError) as caught:
                async with aiouffd.open(
                    PlainSource(some()), kind="hugetlb", errors="soft", deadline=1.0
                ) as buf:
                    await buf.read(0, 10)
        assert "huge" in str(caught.value) or "memory" in str(caught.value)


class TestLooking:
    async def test_resident(self, source: PlainSource) -> None:
        async with aiouffd.open(source, readahead=0) as buf:
            assert buf.resident() == []
            await buf.fetch(BLOCK + 5, 1)
            await buf.fetch(3 * BLOCK, BLOCK)
            assert buf.resident() == [(BLOCK, 2 * BLOCK), (3 * BLOCK, 4 * BLOCK)]
            assert buf.resident(BLOCK + 7, 10) == [(BLOCK + 7, BLOCK + 17)]
            assert buf.resident(2 * BLOCK - 1, BLOCK + 2) == [
                (2 * BLOCK - 1, 2 * BLOCK),
                (3 * BLOCK, 3 * BLOCK + 1),
            ]
            assert buf.resident(0, BLOCK) == []
            assert buf.resident(5, 0) == []
            await buf.fetch()
            assert buf.resident() == [(0, SIZE)]
            assert buf.resident(SIZE - 1, 1) == [(SIZE - 1, SIZE)]
            with pytest.raises(UsageError):
                buf.resident(0, SIZE + 1)

    async def test_stats(self, source: PlainSource) -> None:
        async with aiouffd.open(source, readahead=0) as buf:
            stats = buf.stats
            assert (stats.size, stats.block_size, stats.resident_bytes) == (SIZE, BLOCK, 0)
            await asyncio.to_thread(lambda: [buf[at] for at in range(0, 3 * BLOCK, BLOCK)])
            stats = buf.stats
            assert stats.resident_bytes == stats.fetched_bytes == 3 * BLOCK
            assert stats.faulted_blocks == stats.flights == 3
            assert stats.in_flight == stats.retries == stats.failures == stats.rescued == 0
            assert stats.poisoned_bytes == 0
            assert stats.last_error is None
            assert sum(stats.latency) == 3
            await buf.fetch()
            assert buf.stats.resident_bytes == buf.stats.fetched_bytes == SIZE
        assert buf.stats.faulted_blocks == 3
        assert buf.stats.fetched_bytes == SIZE

    async def test_trace_tells_of_every_flight(self, source: PlainSource) -> None:
        events: list[aiouffd.FlightEvent] = []
        async with aiouffd.open(source, readahead=0, trace=events.append) as buf:
            await asyncio.to_thread(buf.__getitem__, 0)
            await buf.fetch()
        assert (events[0].offset, events[0].length, events[0].cause) == (0, BLOCK, "fault")
        assert {event.cause for event in events[1:]} == {"fetch"}
        assert all(event.finished >= event.started for event in events)


class TestCollecting:
    async def test_unclosed_buffer(self, counters: Counters) -> None:
        buf = await aiouffd.open(PlainSource(some()))
        gone = weakref.ref(buf)
        with pytest.warns(ResourceWarning, match="unclosed <LazyBuffer"):  # noqa: PT031
            del buf
            gc.collect()
        assert gone() is None
        await asyncio.to_thread(counters.wait_for_end, "live_regions")

    async def test_never_opened_is_nothing_to_close(self) -> None:
        buf = aiouffd.open(PlainSource(some()))
        del buf
        gc.collect()

    @pytest.mark.parametrize("what", ["view", "slice", "cast", "numpy"])
    def test_view_after_close(self, loop_name: str, what: str) -> None:
        outcome = run(buffers.view_after_close, loop_name, what)
        assert outcome.stdout == "resident part is right\n"
        assert outcome.death == "SIGBUS"
        assert "touched 0x" in outcome.stderr
        assert f"byte {3 * BLOCK + 5} of a lazy region" in outcome.stderr

    def test_the_last_view_takes_the_memory_along(self, loop_name: str) -> None:
        found = result_of(buffers.view_released_after_close, loop_name)
        assert found == {"viewed": 1, "after": 0}

    def test_collected_with_views(self, loop_name: str) -> None:
        found = result_of(buffers.collected_with_views, loop_name)
        assert found == {"gone": True, "warnings": ["ResourceWarning"], "regions": 0, "engines": 0}

    def test_errors_are_collected(self, loop_name: str) -> None:
        outcome = run(buffers.errors_are_collected, loop_name)
        assert (outcome.status, outcome.stderr) == (0, "")

    def test_collected_after_its_loop(self, loop_name: str) -> None:
        found = result_of(buffers.collected_after_its_loop, loop_name)
        assert found == {"warnings": ["ResourceWarning"], "regions": 0, "engines": 0}

    def test_exit_with_an_open_buffer(self, loop_name: str) -> None:
        with start(buffers.exit_with_open_buffer, loop_name, warnings="ignore") as process:
            process.expect("ends")
            outcome = process.wait(10.0)
        assert outcome.status == 0, outcome.stderr

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_use_in_a_child(self, loop_name: str) -> None:
        outcome = run(buffers.used_in_a_child, loop_name, warnings="ignore")
        assert outcome.status == 0, outcome.stderr
        assert outcome.result == ["ClosedError"] * 5


class TestPickling:
    async def test_by_path(self, tmp_path: Path) -> None:
        path = tmp_path / "object"
        path.write_bytes(some())
        async with aiouffd.open(path, block_size=2 * BLOCK, readahead=0) as buf:
            copy = pickle.loads(pickle.dumps(buf))
            async with copy:
                assert copy.block_size == 2 * BLOCK
                assert copy.address != buf.address
                assert await copy.read() == some()

    async def test_another_version_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "object"
        path.write_bytes(some())
        async with aiouffd.open(str(path)) as buf:
            pickled = pickle.dumps(buf)
        path.unlink()
        path.write_bytes(some()[::-1])
        with pytest.raises(SourceChangedError):
            await pickle.loads(pickled)

    async def test_by_url(self) -> None:
        async with RangeServer({"/a": some()}) as server:
            async with aiouffd.open(server.url("/a"), headers={"X-Test": "1"}) as buf:
                pickled = pickle.dumps(buf)
            async with pickle.loads(pickled) as copy:
                assert await copy.read() == some()
                assert server.requests[-1].headers["x-test"] == "1"
            server.objects["/a"] = Entry(memoryview(some()[::-1]), '"v2"')
            with pytest.raises(SourceChangedError):
                await pickle.loads(pickled)

    async def test_before_it_was_open(self, tmp_path: Path) -> None:
        path = tmp_path / "object"
        path.write_bytes(some())
        async with pickle.loads(pickle.dumps(aiouffd.open(path))) as copy:
            assert await copy.read() == some()

    async def test_what_cannot_be_pickled(self, source: PlainSource) -> None:
        for given in (source, some()):
            async with aiouffd.open(given) as buf:
                with pytest.raises(TypeError, match="cannot be pickled"):
                    pickle.dumps(buf)


class TestSync:
    def test_all_methods(self) -> None:
        source = FullSource(some())
        data = source.data
        with aiouffd.sync.open(source) as buf:
            assert len(buf) == SIZE
            assert buf[5] == data[5]
            assert buf[BLOCK:-1] == data[BLOCK:-1]
            assert bytes(buf.view) == data
            assert buf.read(3, 10) == data[3:13]
            target = bytearray(100)
            assert buf.readinto(50, target) == 100
            assert target == data[50:150]
            assert buf.find(data[1000:1010]) == data.find(data[1000:1010])
            buf.fetch()
            with buf.pin(9, 9) as view:
                assert view == data[9:18]
            assert buf.resident() == [(0, SIZE)]
            assert buf.stats.resident_bytes == SIZE
            assert buf.address % PAGE_SIZE == 0
            assert "SyncBuffer" in repr(buf)
        assert buf.closed
        buf.close()
        with pytest.raises(ClosedError):
            buf.read()
        with pytest.raises(ClosedError):
            buf.view  # noqa: B018

    def test_pickled(self, tmp_path: Path) -> None:
        path = tmp_path / "object"
        path.write_bytes(some())
        with aiouffd.sync.open(path) as buf, pickle.loads(pickle.dumps(buf)) as copy:
            assert copy.read() == some()

    def test_from_many_threads(self) -> None:
        errors: list[BaseException] = []
        barrier = threading.Barrier(16)

        def body(number: int) -> None:
            try:
                data = some()[number:]
                barrier.wait(10)
                with aiouffd.sync.open(PlainSource(data)) as buf:
                    assert bytes(buf.view) == data
                    assert buf.read(number, 99) == data[number : number + 99]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=body, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert errors == []

    def test_opening_fails(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            aiouffd.sync.open(tmp_path / "nothing")


class TestManyAtOnce:
    @pytest.mark.parametrize("way", ["guarded", "memcpy", "struct"])
    async def test_64_threads_one_block_one_read(self, way: str, counters: Counters) -> None:
        """The source answers only when all 64 wait."""
        gate = Gate(some(), is_open=False)
        reads: list[tuple[int, int]] = []

        async def read(offset: int, length: int) -> bytes:
            reads.append((offset, length))
            return await gate.read(offset, length)

        async with aiouffd.open(read, size=SIZE, readahead=0) as buf:
            view, address = buf.view, buf.address

            def touch(number: int) -> bytes:
                at = BLOCK + number * 1000
                if way == "guarded":
                    return bytes(buf[at : at + 8])
                if way == "struct":
                    return bytes(struct.unpack_from("8s", view, at)[0])
                target = ctypes.create_string_buffer(8)
                ctypes.CDLL(None).memmove(target, ctypes.c_void_p(address + at), ctypes.c_size_t(8))
                return target.raw

            touches = asyncio.ensure_future(
                in_threads([lambda n=n: touch(n) for n in range(64)])  # type: ignore[misc]
            )
            await asyncio.to_thread(counters.wait, "messages", 64)
            gate.open()
            found = await touches
            for number in range(64):
                at = BLOCK + number * 1000
                assert found[number] == gate.data[at : at + 8]
            assert reads == [(BLOCK, BLOCK)]
            assert buf.stats.faulted_blocks == 1

    async def test_fetch_and_touch_share_a_flight(self, counters: Counters) -> None:
        gate = Gate(some(), is_open=False)
        source = PlainSource(gate.data, gate.read)
        async with aiouffd.open(source, readahead=0) as buf:
            fetches = [asyncio.create_task(buf.fetch(n, BLOCK - n)) for n in range(5)]
            await asyncio.to_thread(gate.wait)
            touch = asyncio.ensure_future(in_threads([lambda: buf[7], lambda: buf.view[9]]))
            await asyncio.to_thread(counters.wait, "messages", 2)
            reads = [asyncio.create_task(buf.read(n, 10)) for n in range(5)]
            gate.open()
            await asyncio.gather(*fetches)
            assert await touch == [gate.data[7], gate.data[9]]
            assert await asyncio.gather(*reads) == [gate.data[n : n + 10] for n in range(5)]
            assert source.reads == [(0, BLOCK)]

    async def test_a_cancelled_fetch_goes_on_for_others(self) -> None:
        gate = Gate(some(), is_open=False)
        source = PlainSource(gate.data, gate.read)
        async with aiouffd.open(source, readahead=0) as buf:
            first = asyncio.create_task(buf.fetch(0, BLOCK))
            await asyncio.to_thread(gate.wait)
            second = asyncio.create_task(buf.fetch(0, BLOCK))
            touch = asyncio.create_task(asyncio.to_thread(buf.__getitem__, 5))
            await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            gate.open()
            await second
            assert await touch == gate.data[5]
            assert source.reads == [(0, BLOCK)]

    async def test_cancelled_while_many_flights_wait(self) -> None:
        gate = Gate(some(512 * PAGE_SIZE), is_open=False)
        source = PlainSource(gate.data, gate.read)
        async with aiouffd.open(source, block_size=PAGE_SIZE, readahead=0) as buf:
            fetches = [
                asyncio.create_task(buf.fetch(at, PAGE_SIZE))
                for at in range(0, len(gate.data), 2 * PAGE_SIZE)
            ]
            await asyncio.to_thread(gate.wait, MAX_FLIGHTS)
            for fetch in fetches:
                fetch.cancel()
            ended = await asyncio.gather(*fetches, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ended)
            gate.open()
            assert await buf.read() == gate.data

    async def test_reads_under_way_are_bounded(self, counters: Counters) -> None:
        gate = Gate(some(100 * PAGE_SIZE), is_open=False)
        source = PlainSource(gate.data, gate.read)
        async with aiouffd.open(source, block_size=PAGE_SIZE, readahead=0) as buf:
            touches = asyncio.ensure_future(
                in_threads([lambda n=n: buf[n * PAGE_SIZE] for n in range(100)])  # type: ignore[misc]
            )
            await asyncio.to_thread(counters.wait, "misses", 100)
            await asyncio.to_thread(gate.wait, MAX_FLIGHTS)
            # On a busy machine the rescue loop may take over, which has as many flights of its own.
            if not buf.stats.rescued:
                assert source.most == MAX_FLIGHTS
                assert buf.stats.in_flight == 100
            gate.open()
            await touches
            loops = 2 if buf.stats.rescued else 1
            assert MAX_FLIGHTS <= source.most <= loops * MAX_FLIGHTS
            assert 100 <= len(source.reads) <= loops * 100

    def test_several_loops_in_threads(self) -> None:
        errors: list[BaseException] = []

        async def main(number: int) -> None:
            data = some()[number:]
            async with aiouffd.open(PlainSource(data)) as a, aiouffd.open(FullSource(data)) as b:
                for buf in (a, b):
                    assert await asyncio.to_thread(bytes, buf.view) == data
                assert await a.read(5, 500) == await b.read(5, 500) == data[5:505]

        def body(number: int) -> None:
            factory = asyncio.new_event_loop if number % 2 else uvloop.new_event_loop
            try:
                for _ in range(3):
                    with asyncio.Runner(loop_factory=factory) as runner:
                        runner.run(main(number))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=body, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []

    async def test_many_buffers_share_a_descriptor(self, counters: Counters) -> None:
        data = some(PAGE_SIZE)
        buffers_ = [await aiouffd.open(PlainSource(data)) for _ in range(100)]
        assert counters["live_engines"] == 1
        assert counters["live_regions"] == 100
        found = await asyncio.gather(*[buf.read(0, 8) for buf in buffers_])
        assert set(found) == {data[:8]}
        await asyncio.gather(*[buf.aclose() for buf in buffers_])
        assert counters["live_engines"] == 0

    async def test_a_buffer_over_a_buffer(self) -> None:
        """Lazy memory as the source of lazy memory: awaited, and so never touched missing."""
        async with (
            aiouffd.open(PlainSource(some())) as below,
            aiouffd.open(below.read, size=SIZE) as above,
        ):
            assert await asyncio.to_thread(bytes, above.view) == some()


class TestHowMuchIsFetched:
    async def test_random_touches(self) -> None:
        """A touch of a page costs its block: at most 16 times itself by default."""
        data = some(64 << 20)
        source = PlainSource(data)
        pages = random.Random(5).sample(range(len(data) // PAGE_SIZE), 200)
        async with aiouffd.open(source) as buf:
            for page in pages:
                found = await asyncio.to_thread(buf.__getitem__, page * PAGE_SIZE)
                assert found == data[page * PAGE_SIZE]
            assert buf.stats.in_flight == 0
        assert source.bytes_read <= 16 * len(pages) * PAGE_SIZE

    @pytest.mark.parametrize("source_kind", [PlainSource, FullSource])
    async def test_exactly_the_pages_touched(self, source_kind: type[PlainSource]) -> None:
        data = some(4 << 20)
        source = source_kind(data)
        pages = random.Random(6).sample(range(len(data) // PAGE_SIZE), 100)
        async with aiouffd.open(source, block_size=PAGE_SIZE, readahead=0) as buf:
            await asyncio.to_thread(lambda: [buf.view[page * PAGE_SIZE] for page in pages])
        assert sorted(source.reads) == sorted((page * PAGE_SIZE, PAGE_SIZE) for page in pages)

    async def test_a_scan_reads_everything_once(self, source: PlainSource) -> None:
        source.data = some((6 << 20) + 99)
        async with aiouffd.open(source) as buf:
            assert await asyncio.to_thread(bytes, buf.view) == source.data
        assert source.bytes_read == len(source.data)

    async def test_a_scan_needs_few_faults(self) -> None:
        source = PlainSource(some(8 << 20))
        async with aiouffd.open(source) as buf:
            crc = await asyncio.to_thread(zlib.crc32, buf.view)
            assert crc == zlib.crc32(source.data)
            assert len(source.reads) < len(source.data) // BLOCK

    async def test_fetch_reads_in_long_flights(self) -> None:
        source = PlainSource(some(8 << 20))
        async with aiouffd.open(source) as buf:
            await buf.fetch()
        assert len(source.reads) <= 9
        assert source.bytes_read == len(source.data)

    async def test_fetch_skips_what_is_there(self) -> None:
        source = PlainSource(some())
        async with aiouffd.open(source, readahead=0) as buf:
            await buf.fetch(BLOCK, BLOCK)
            del source.reads[:]
            await buf.fetch()
            assert source.bytes_read == SIZE - BLOCK
            await buf.fetch()
            assert source.bytes_read == SIZE - BLOCK


def planned(plans: Readahead, touches: list[int]) -> list[tuple[int, int]]:
    """All runs that these touches lead to."""
    return [run for block in touches for run in plans.touch(block)]


def blocks_of(runs: list[tuple[int, int]]) -> list[int]:
    return [block for first, count in runs for block in range(first, first + count)]


class Reader:
    """Touches blocks as a program does: only those that are neither there nor asked for."""

    def __init__(self, blocks: int, window: int) -> None:
        self.plans = Readahead(blocks, window)
        self.there: set[int] = set()
        self.extra: list[int] = []
        self.faults = 0

    def touch(self, block: int) -> None:
        if block in self.there:
            return
        self.faults += 1
        self.there.add(block)
        asked = blocks_of(self.plans.touch(block))
        self.extra += asked
        self.there.update(asked)


class TestProgress:
    async def test_fetch_tells_how_far_it_is(self) -> None:
        told: list[tuple[int, int]] = []
        size = 20 * HUGE + 5
        async with aiouffd.open(PlainSource(bytes(size))) as buf:
            await buf.fetch(HUGE + 7, 12 * HUGE, progress=lambda *step: told.append(step))
            assert len(told) > 5
            assert told == sorted(set(told))
            assert told[-1] == (12 * HUGE, 12 * HUGE)
            del told[:]
            await buf.fetch(HUGE + 7, 12 * HUGE, progress=lambda *step: told.append(step))
            await buf.fetch(0, 0, progress=lambda *step: told.append(step))
            assert told == [(12 * HUGE, 12 * HUGE), (0, 0)]

    async def test_what_it_raises_comes_out(self) -> None:
        def fail(done: int, total: int) -> None:
            raise LookupError(done)

        async with aiouffd.open(PlainSource(some())) as buf:
            with pytest.raises(LookupError):
                await buf.fetch(progress=fail)
            assert await buf.read() == some()

    def test_sync(self) -> None:
        told: list[tuple[int, int, threading.Thread]] = []
        size = 20 * HUGE
        with aiouffd.sync.open(PlainSource(bytes(size))) as buf:
            buf.fetch(progress=lambda *step: told.append((*step, threading.current_thread())))
            assert buf.resident() == [(0, size)]
        assert [step[0] for step in told] == [8 * HUGE, 16 * HUGE, size]
        assert {step[1:] for step in told} == {(size, threading.main_thread())}


class TestNotebook:
    async def test_it_shows_what_is_resident(self) -> None:
        source = PlainSource(some())
        buf = aiouffd.open(source)
        assert "not open" in buf._repr_html_()
        async with buf:
            assert buf._repr_html_().count("<rect") == 1
            await buf.fetch(0, 1)
            await buf.fetch(3 * BLOCK, BLOCK)
            html = buf._repr_html_()
            assert html.count("<rect") == 3
            assert "128 KiB of 332.1 KiB resident" in html
            assert len(source.reads) == 2
        assert "closed" in buf._repr_html_()

    def test_names_are_escaped(self, tmp_path: Path) -> None:
        (tmp_path / "<b>&.bin").write_bytes(b"")
        with aiouffd.sync.open(tmp_path / "<b>&.bin") as buf:
            assert "&lt;b&gt;&amp;.bin" in buf._repr_html_()
            assert "SyncBuffer" in buf._repr_html_()


class TestReadahead:
    def test_sequential_doubles(self) -> None:
        plans = Readahead(10_000, 64)
        assert plans.touch(100) == []
        ahead, block = [], 101
        for _ in range(12):
            runs = plans.touch(block)
            assert len(runs) == 1
            first, count = runs[0]
            assert first == block + 1 or first > block
            ahead.append(first + count - 1 - block)
            block = first + count  # the reader has caught up
        assert ahead[0] <= 4
        assert all(a <= b for a, b in itertools.pairwise(ahead))
        assert ahead[-1] == 128

    def test_a_scan_asks_for_each_block_once(self) -> None:
        reader = Reader(4096, 128)
        for block in range(4096):
            reader.touch(block)
        assert len(reader.extra) == len(set(reader.extra))
        assert reader.faults < 60
        assert max(reader.extra) == 4095

    @pytest.mark.parametrize("stride", [2, 3, 16, 500, -1, -7])
    def test_strided(self, stride: int) -> None:
        reader = Reader(100_000, 64)
        place = 50_000
        for index in range(90):
            reader.touch(place + index * stride)
        wanted = {place + index * stride for index in range(90 + 16)}
        assert reader.faults < 20
        assert set(reader.extra) <= wanted

    def test_backwards_stops_at_the_start(self) -> None:
        reader = Reader(100, 16)
        for block in range(20, -1, -1):
            reader.touch(block)
        assert all(0 <= block < 100 for block in reader.extra)
        assert reader.faults < 15

    def test_forwards_stops_at_the_end(self) -> None:
        reader = Reader(50, 64)
        for block in range(50):
            reader.touch(block)
        assert all(block < 50 for block in reader.extra)

    def test_random_asks_for_nothing(self) -> None:
        reader = Reader(1_000_000, 128)
        for block in random.Random(2).sample(range(0, 1_000_000, 3), 400):
            reader.touch(block)
        assert len(reader.extra) <= 8  # where chance looked like a stride
        assert reader.faults >= 392

    def test_chance_in_a_small_object(self) -> None:
        """Of two hundred blocks out of a thousand, many are neighbours. Without doubt some seven
        blocks are fetched in vain on average."""
        vain = 0
        for seed in range(20):
            reader = Reader(1024, 128)
            pages = random.Random(seed).sample(range(16 * 1024), 200)
            for page in pages:
                reader.touch(page // 16)
            vain += len(reader.extra)
        assert vain <= 20

    def test_a_scan_after_touches_at_random(self) -> None:
        plans = Readahead(100_000, 64)
        assert planned(plans, [block * block * 97 for block in range(20, 30)]) == []
        assert planned(plans, [5000, 5001]) == []  # may be chance
        assert planned(plans, [5002]) == [(5003, 6)]
        # Who foresaw something is believed at once again.
        plans.touch(5003)
        assert planned(plans, [9000, 9001]) == [(9002, 4)]

    def test_a_stride_after_touches_at_random(self) -> None:
        plans = Readahead(1_000_000, 64)
        assert planned(plans, [block * block * 97 for block in range(20, 30)]) == []
        assert planned(plans, [500_000, 500_100, 500_200]) == []
        assert planned(plans, [500_300]) == [(500_400, 1)]

    def test_two_touches_are_no_stream_yet(self) -> None:
        plans = Readahead(10_000, 128)
        assert planned(plans, [5, 900, 4000, 70]) == []

    def test_interleaved_scans(self) -> None:
        reader = Reader(1_000_000, 64)
        starts = [number * 50_000 for number in range(STREAMS - 2)]
        for step in range(500):
            for first in starts:
                reader.touch(first + step)
        assert reader.faults < 40 * len(starts)
        assert len(reader.extra) == len(set(reader.extra))

    def test_more_scans_than_can_be_remembered(self) -> None:
        reader = Reader(1_000_000, 64)
        for step in range(50):
            for scan in range(3 * STREAMS):
                reader.touch(scan * 10_000 + step)
        assert all(0 <= block < 1_000_000 for block in reader.extra)

    def test_a_scan_among_random_touches(self) -> None:
        reader = Reader(1_000_000, 64)
        chance = random.Random(4)
        for block in range(1000):
            reader.touch(block)
            if block % 5 == 0:
                reader.touch(chance.randrange(10_000, 1_000_000))
        scan_faults = reader.faults - 200
        assert scan_faults < 150

    def test_no_window_no_readahead(self) -> None:
        assert planned(Readahead(100, 0), list(range(50))) == []

    def test_a_window_of_one(self) -> None:
        assert set(blocks_of(planned(Readahead(100, 1), list(range(50))))) <= set(range(2, 52))

    @pytest.mark.parametrize("seed", range(5))
    def test_what_is_asked_for_is_there_to_be_had(self, seed: int) -> None:
        chance = random.Random(seed)
        blocks = chance.choice([1, 2, 7, 1000])
        plans = Readahead(blocks, chance.choice([1, 2, 64]))
        at = 0
        for _ in range(2000):
            at = (at + chance.choice([1, 1, 1, 2, 5, -1, -1, chance.randrange(blocks)])) % blocks
            for first, count in plans.touch(at):
                assert count >= 1
                assert 0 <= first < first + count <= blocks


@asynccontextmanager
async def watched_server(data: bytes) -> AsyncIterator[RangeServer]:
    async with RangeServer({"/a": data}) as server:
        yield server


class TestOverHttp:
    async def test_everything(self) -> None:
        data = some((2 << 20) + 77)
        async with watched_server(data) as server, aiouffd.open(server.url("/a")) as buf:
            assert await asyncio.to_thread(lambda: buf.view[len(data) - 1]) == data[-1]
            assert await asyncio.to_thread(bytes, buf.view) == data
            assert await buf.read() == data
            assert server.counts.bytes == len(data) + 2  # two bytes to ask for the size

    async def test_a_missing_object(self) -> None:
        async with watched_server(b"x") as server:
            with pytest.raises(FileNotFoundError):
                await aiouffd.open(server.url("/b"))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


async def test_user_mode_only(pipe: tuple[int, int]) -> None:
    """Without privileges a system call on a missing page fails; after `fetch` it does not."""
    source = PlainSource(some())
    async with aiouffd.open(source, user_mode_only=True, readahead=0) as buf:
        assert buf.user_mode_only
        with pytest.raises(OSError, match="Bad address"):
            await asyncio.to_thread(os.write, pipe[1], buf.view[:100])
        assert await asyncio.to_thread(lambda: buf.view[5]) == source.data[5]
        await buf.fetch(BLOCK, BLOCK)
        assert os.write(pipe[1], buf.view[BLOCK : BLOCK + 100]) == 100
        assert os.read(pipe[0], 100) == source.data[BLOCK : BLOCK + 100]


class TestLanding:
    """Readahead that arrives is replaced by the next piece."""

    def grown(self) -> Readahead:
        planner = Readahead(10_000, window=64, piece=8)
        for block in range(10):
            planner.touch(block)
        for block in range(16, 80, 8):
            planner.touch(block)
        return planner

    def test_a_window_stays_under_way(self) -> None:
        planner = self.grown()
        first = planner.landed(72, 8)
        assert len(first) == 1
        start, count = first[0]
        assert count == 8
        assert planner.landed(80, 8) == [(start + 8, 8)]

    def test_the_lead_is_bounded_for_a_reader_that_stops(self) -> None:
        planner = self.grown()
        planned = 0
        for _ in range(100):
            for _, count in planner.landed(72, 8):
                planned += count
        assert 0 < planned <= 2 * 64

    def test_what_is_no_stream_is_not_replaced(self) -> None:
        planner = Readahead(10_000, window=64, piece=8)
        planner.touch(5)
        planner.touch(700)
        assert planner.landed(5, 1) == []


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich")
def test_a_bar_on_a_terminal_and_quiet_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(bytes(64 << 20))
    program = "import aiouffd, sys\nwith aiouffd.sync.open(sys.argv[1]) as buf:\n"
    program += "    buf.fetch(progress=True)\n    print(buf.resident())\n"
    command = [sys.executable, "-c", program, str(path)]
    quiet = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    assert quiet.stderr == b""
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the last one has closed it
            while part := screen.read(4096):
                shown += part
        assert process.communicate()[0] == quiet.stdout
    assert b"object" in shown
    assert b"MiB" in shown
