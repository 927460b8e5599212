"""How lazy memory ends: not under those who hold it, and once, whoever asks for it."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import ClosedError, UsageError
from aiouffd.regions.pager import shared_pagers
from aiouffd.regions.rescue import service
from tests.faulty import FullSource, PlainSource
from tests.scenarios import ending as scenarios
from tests.support import Counters, Gate, content, result_of, run, start, wait_until

BLOCK = 65536
SIZE = 8 * BLOCK
DATA = content(SIZE)


async def in_thread(function: Any, *arguments: Any) -> Any:
    """From a thread that is nobody's worker, and that nobody joins."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def body() -> None:
        nonlocal arguments
        result = function(*arguments)
        arguments = ()  # whoever waits may look at once who still holds what
        loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=body, daemon=True).start()
    return await future


class TestHeldMemory:
    """What somebody holds goes on being served."""

    async def test_closing_returns_at_once(self, counters: Counters) -> None:
        gate = Gate(DATA, is_open=False)
        async with aiouffd.open(gate.read, size=SIZE, readahead=0, portable=True) as buf:
            view = buf.view
            waiting = asyncio.ensure_future(in_thread(bytes, view[5 * BLOCK : 6 * BLOCK]))
            await asyncio.to_thread(gate.wait)
        assert buf.closed
        assert not waiting.done(), "who waits is neither served yet nor killed"
        gate.open()
        assert await waiting == DATA[5 * BLOCK : 6 * BLOCK]
        assert await in_thread(bytes, view) == DATA
        assert counters["live_regions"] == 1
        view.release()
        await buf.drained()
        assert counters["live_regions"] == 0

    @pytest.mark.parametrize("what", ["view", "slice", "cast", "memoryview of buf"])
    async def test_whatever_is_made_of_it_counts(self, what: str, counters: Counters) -> None:
        async with aiouffd.open(PlainSource(DATA), readahead=0) as buf:
            match what:
                case "view":
                    held: Any = buf.view
                case "slice":
                    held = buf.view[100:-100]
                case "cast":
                    held = buf.view[8:].cast("Q")
                case _:
                    held = memoryview(buf)
        assert await in_thread(held.__getitem__, -1) is not None
        drained = asyncio.ensure_future(buf.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        del held
        await drained
        assert counters["live_regions"] == 0

    async def test_a_view_that_was_let_go_before_does_not_count(self, counters: Counters) -> None:
        async with aiouffd.open(PlainSource(DATA)) as buf:
            for _ in range(3):
                buf.view.release()
                await in_thread(bytes, buf.view[:8])
        # The thread that was handed the last one may be on its way out.
        await asyncio.wait_for(buf.drained(), 5)
        assert counters["live_regions"] == 0

    async def test_methods_are_over(self) -> None:
        gate = Gate(DATA, is_open=False)
        async with aiouffd.open(gate.read, size=SIZE, readahead=0, portable=True) as buf:
            view = buf.view
            calls = [
                asyncio.create_task(buf.fetch()),
                asyncio.create_task(buf.read(3 * BLOCK, 5)),
                asyncio.create_task(buf.readinto(7, bytearray(9))),
            ]
            await asyncio.to_thread(gate.wait)
        for call in calls:
            with pytest.raises(ClosedError):
                await call
        for sync in (lambda: buf.view, lambda: buf[0], lambda: buf.resident(), lambda: buf.address):
            with pytest.raises(ClosedError):
                sync()
        gate.open()
        assert await in_thread(bytes, view) == DATA
        assert buf.stats.resident_bytes == SIZE, "figures still tell"
        del view
        await buf.drained()

    async def test_force_ends_it_now(self, counters: Counters) -> None:
        source = FullSource(DATA)
        buf = await aiouffd.open(source, readahead=0)
        view = buf.view
        await buf.fetch(0, BLOCK)
        await buf.aclose()
        assert counters["live_regions"] == 1
        await buf.aclose(force=True)
        assert bytes(view[:BLOCK]) == DATA[:BLOCK], "what is resident can be read"
        await asyncio.wait_for(buf.drained(), 5)
        view.release()
        assert counters["live_regions"] == 0

    async def test_a_source_that_fails_for_good_after_closing(self) -> None:
        """Soft errors go on being errors: a page, not the process's memory."""
        fails = False

        async def script(offset: int, length: int) -> None:
            if fails:
                raise aiouffd.SourceError("gone", transient=False)

        async with aiouffd.open(PlainSource(DATA, script), readahead=0, errors="soft") as buf:
            view = buf.view
            region = buf._region
            assert region is not None
        fails = True
        assert not await in_thread(region.touch, 0, 4096)
        fails = False
        assert await in_thread(bytes, view[BLOCK : 2 * BLOCK]) == DATA[BLOCK : 2 * BLOCK]
        del view
        await buf.drained()

    async def test_dropped_without_closing(self, counters: Counters) -> None:
        buf = await aiouffd.open(PlainSource(DATA), readahead=0)
        view = buf.view
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del buf
            gc.collect()
        assert await in_thread(bytes, view) == DATA
        del view
        await asyncio.to_thread(counters.wait_for_end, "live_regions")

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    async def test_dropped_where_that_is_an_error(self, counters: Counters) -> None:
        """With ``-W error`` the warning is an exception, which is no reason to keep it all."""
        buf = await aiouffd.open(PlainSource(DATA), readahead=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            del buf
            gc.collect()
        await asyncio.to_thread(counters.wait_for_end, "live_regions")

    def test_sync(self, counters: Counters) -> None:
        with aiouffd.sync.open(DATA) as buf:
            view = buf.view
        assert bytes(view) == DATA
        view.release()
        counters.wait_for_end("live_regions")

    @pytest.mark.parametrize("made_of", ["view", "slice", "buf"])
    def test_an_array_out_of_asyncio_run(self, loop_name: str, made_of: str) -> None:
        pytest.importorskip("numpy")
        found = result_of(scenarios.array_after_the_loop, loop_name, made_of, warnings="ignore")
        assert found == {
            "right": True,
            "source": True,
            "before": {"live_regions": 1, "live_engines": 1},
        }

    def test_a_loop_that_is_closed_without_a_word(self, loop_name: str) -> None:
        found = result_of(scenarios.loop_closed_without_a_word, loop_name)
        assert found == {"right": True, "quick": True}

    @pytest.mark.parametrize("what", ["buffer", "pager", "reading", "closing"])
    def test_a_loop_that_is_closed_before_it_came_to_that(self, loop_name: str, what: str) -> None:
        found = result_of(scenarios.loop_closed_before_it_came_to_that, loop_name, what)
        assert found == {"live_regions": 0, "live_engines": 0}

    def test_a_source_for_one_loop_only(self, loop_name: str) -> None:
        outcome = run(scenarios.not_clonable_after_the_loop, loop_name)
        assert "served while its loop ran: True" in outcome.stdout
        assert outcome.death == "SIGBUS"
        assert "could not be served" in outcome.stderr
        assert "ending.py:" in outcome.stderr, "the place that holds the memory"

    def test_a_pager(self, loop_name: str) -> None:
        found = result_of(scenarios.pager_closed_while_held, loop_name)
        assert found == {"right": True, "live_regions": 0, "live_engines": 0}


class TestExceptions:
    """The user's own exception is what the user sees."""

    @pytest.mark.parametrize("how", ["gather", "TaskGroup", "timeout", "wait_for", "raise"])
    def test_beside_workers_that_touch(self, loop_name: str, how: str) -> None:
        outcome = run(scenarios.exception_beside_workers, loop_name, how, 0.01)
        assert outcome.status == 1, outcome.stderr
        assert ("TimeoutError" if "t" in how[:1] or how == "wait_for" else "the user's own") in (
            outcome.stderr
        )
        assert "worked" in outcome.stdout, "those that had begun went on to their end"
        assert "wrong" not in outcome.stdout

    @pytest.mark.parametrize("block_size", [BLOCK, 1 << 20], ids=["read", "stream"])
    def test_a_dead_source_is_told_of(self, loop_name: str, block_size: int) -> None:
        with start(scenarios.dead_source_at_the_end, loop_name, block_size) as process:
            process.expect("begins")
            wait_until(lambda: "waits for thread" in process.stderr(), "the message")
            process.popen.send_signal(signal.SIGINT)
            outcome = process.wait(10)
        assert outcome.status in (1, 130, -signal.SIGINT), outcome.stderr
        assert "the user's own" in outcome.stderr
        assert "for byte 0 of" in outcome.stderr
        assert "asynchronous generator" not in outcome.stderr

    @pytest.mark.parametrize("how", ["nobody waits", "joined", "daemon"])
    def test_exit_is_prompt(self, loop_name: str, how: str) -> None:
        with start(scenarios.exit_holding_memory, loop_name, how) as process:
            process.expect("ends")
            outcome = process.wait(5)
        assert outcome.status == 0, outcome.stderr


class TestOnce:
    """Opening and closing are each one operation."""

    async def test_two_at_once_open_one(self) -> None:
        source = FullSource(DATA)
        opened = 0
        original = source.open

        async def count() -> None:
            nonlocal opened
            opened += 1
            await asyncio.sleep(0)
            await original()

        source.open = count  # type: ignore[method-assign]
        buf = aiouffd.open(source)
        assert await asyncio.gather(buf.aopen(), buf.aopen()) == [buf, buf]
        assert opened == 1
        await buf.aclose()

    @pytest.mark.parametrize("steps", range(8))
    async def test_closing_while_opening(self, steps: int, counters: Counters) -> None:
        source = Closing()
        buf = aiouffd.open(source, readahead=0)
        opening = asyncio.create_task(buf.aopen())
        for _ in range(steps):
            await asyncio.sleep(0)
        await buf.aclose()
        (result,) = await asyncio.gather(opening, return_exceptions=True)
        assert result is buf or isinstance(result, ClosedError)
        assert source.is_closed == source.is_open
        assert counters["live_regions"] == 0

    async def test_a_failed_opening_can_be_repeated(self) -> None:
        source = FullSource(DATA)
        fails = [OSError("not yet")]
        original = source.open

        async def open_() -> None:
            if fails:
                raise fails.pop()
            await original()

        source.open = open_  # type: ignore[method-assign]
        buf = aiouffd.open(source)
        with pytest.raises(OSError, match="not yet"):
            await buf.aopen()
        async with buf:
            assert await buf.read(0, 8) == DATA[:8]

    @pytest.mark.parametrize("given", ["path", "source", "function", "cached"])
    async def test_an_opening_that_fails_late_can_be_repeated(
        self, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The source was opened, and is closed again, which is for good."""
        path = tmp_path / "object"
        path.write_bytes(DATA)

        async def read(offset: int, length: int) -> bytes:
            return DATA[offset : offset + length]

        what: dict[str, tuple[Any, dict[str, Any]]] = {
            "path": (path, {}),
            "source": (aiouffd.sources.FileSource(path), {}),
            "function": (read, {"size": SIZE}),
            "cached": (path, {"cache": tmp_path / "cache"}),
        }
        source, options = what[given]
        buf = aiouffd.open(source, **options)
        with monkeypatch.context() as patch:

            def acquire(*_settings: Any) -> Any:
                raise OSError("no descriptors")

            patch.setattr(shared_pagers, "acquire", acquire)
            for _ in range(2):
                with pytest.raises(OSError, match="no descriptors"):
                    await buf.aopen()
        async with buf:
            assert await buf.read(0, 8) == DATA[:8]

    async def test_closing_that_is_given_up_goes_on(self, counters: Counters) -> None:
        """A read that is slow to end, and a timeout around `aclose`."""
        reading, leaving = asyncio.Event(), asyncio.Event()

        async def script(offset: int, length: int) -> None:
            reading.set()
            try:
                await asyncio.Event().wait()
            finally:
                await leaving.wait()

        source = Closing(script)
        buf = await aiouffd.open(source, readahead=0)
        fetching = asyncio.create_task(buf.fetch())
        await reading.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(buf.aclose(), 0.01)
        again = asyncio.create_task(buf.aclose())
        await asyncio.sleep(0)
        assert not again.done()
        leaving.set()
        await again
        with pytest.raises(ClosedError):
            await fetching
        assert source.is_closed
        assert counters["live_regions"] == 0

    async def test_a_source_whose_closing_fails(self, counters: Counters) -> None:
        class Bad(FullSource):
            async def aclose(self) -> None:
                raise OSError("cannot")

        buf = await aiouffd.open(Bad(DATA))
        with pytest.raises(OSError, match="cannot"):
            await buf.aclose()
        await buf.aclose()
        assert counters["live_regions"] == 0
        await asyncio.wait_for(buf.drained(), 5)

    async def test_a_clone_whose_closing_fails(
        self, counters: Counters, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Clone(FullSource):
            async def aclose(self) -> None:
                raise OSError("cannot")

        class Good(Closing):
            def clone(self) -> Any:
                return Clone(DATA)

        source = Good()
        buf = await aiouffd.open(source, readahead=0)
        sink = buf._sink
        assert sink is not None
        await service.run(sink.bring(0))  # by the rescue loop, from the clone
        await buf.aclose()
        assert source.is_closed
        assert counters["live_regions"] == 0
        assert "closing a clone" in caplog.text

    async def test_moving_closes_the_source_in_any_case(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where there are no descriptors for the loop that would watch over those who wait."""
        source = Closing()
        buf = await aiouffd.open(source, readahead=0)
        mapping = buf._mapping
        assert mapping is not None

        def refuse(*_: Any) -> None:
            raise OSError("no descriptors")

        with monkeypatch.context() as patch:
            patch.setattr(service, "call_soon", refuse)
            await mapping._move()
        assert source.is_closed
        await buf.aclose()

    async def test_another_loop_is_told(self) -> None:
        buf = await aiouffd.open(PlainSource(DATA))

        def elsewhere() -> None:
            with pytest.raises(UsageError, match="another event loop"):
                asyncio.run(buf.aclose())

        await asyncio.to_thread(elsewhere)
        assert not buf.closed
        await buf.aclose()

    async def test_closing_before_opening(self) -> None:
        source = Closing()
        buf = aiouffd.open(source)
        await buf.aclose()
        with pytest.raises(ClosedError):
            await buf.aopen()
        await asyncio.wait_for(buf.drained(), 5)

    async def test_an_empty_object(self) -> None:
        source = Closing(data=b"")
        async with aiouffd.open(source) as buf:
            assert len(buf) == 0
        assert source.is_closed
        await asyncio.wait_for(buf.drained(), 5)


class Closing(FullSource):
    """Knows whether it was closed, and takes a few turns of the loop for everything."""

    def __init__(self, script: Any = None, data: bytes = DATA) -> None:
        super().__init__(data, script)
        self.is_open = self.is_closed = False

    async def open(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.is_open = True

    async def aclose(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.is_closed = True


def test_exports_of_a_buffer_itself(loop_name: str) -> None:
    """On every Python, 3.11 included, whose classes cannot do it by a method."""
    with aiouffd.sync.open(DATA) as buf:
        assert memoryview(buf) == DATA
        assert bytes(buf) == DATA
        assert sys.getrefcount(buf) < 10
