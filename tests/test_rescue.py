"""The rescue loop: what failed once is tried again, and one failure is no one else's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.regions.rescue import service
from tests.support import content, wait_until

SIZE = 16 * PAGE_SIZE
DATA = content(SIZE)

pytestmark = pytest.mark.filterwarnings("ignore::aiouffd.BlockingTouchWarning")


class Source(aiouffd.sources.BaseSource):
    """Its clones cannot be made, or not be opened, as long as ``trouble`` says so."""

    size = SIZE

    def __init__(self, trouble: dict[str, list[BaseException]], *, is_clone: bool = False) -> None:
        self.trouble = trouble
        self.is_clone = is_clone

    async def open(self) -> None:
        if self.is_clone and self.trouble["open"]:
            raise self.trouble["open"].pop()

    async def read(self, offset: int, length: int) -> bytes:
        return DATA[offset : offset + length]

    def clone(self) -> Source:
        if self.trouble["clone"]:
            raise self.trouble["clone"].pop()
        return Source(self.trouble, is_clone=True)


@pytest.mark.parametrize("error", [OSError(24, "no descriptors"), asyncio.CancelledError()])
async def test_a_clone_that_could_not_be_opened_is_tried_again(error: BaseException) -> None:
    source = Source({"clone": [], "open": [error, error]})
    async with aiouffd.open(source, readahead=0, block_size=PAGE_SIZE) as buf:
        # On the loop's own thread, so only a clone can serve it.
        assert buf[PAGE_SIZE] == DATA[PAGE_SIZE]
        assert source.trouble["open"] == []


@pytest.mark.parametrize("error", [OSError(24, "no descriptors"), asyncio.CancelledError()])
async def test_after_an_error_the_next_touch_tries_again(error: BaseException) -> None:
    source = Source({"clone": [], "open": [error]})
    async with aiouffd.open(source, readahead=0, block_size=PAGE_SIZE, errors="soft") as buf:
        with pytest.raises(aiouffd.SourceError) as caught:
            buf[0]
        cause = caught.value.__cause__
        assert cause is error or (cause is not None and cause.__cause__ is error)
        assert buf[PAGE_SIZE] == DATA[PAGE_SIZE]
        await buf.fetch(0, 1)
        assert buf[0] == DATA[0]


async def test_a_clone_that_could_not_be_made_is_tried_again() -> None:
    source = Source({"clone": [OSError(24, "no descriptors")], "open": []})
    async with aiouffd.open(source, readahead=0, block_size=PAGE_SIZE) as buf:
        assert buf._mapping is not None
        assert buf._mapping.pager is not None
        buf._mapping.pager.rescue_deadline = 0.05
        with pytest.raises(aiouffd.SourceError):
            buf[0]
        assert buf[PAGE_SIZE] == DATA[PAGE_SIZE]


async def test_one_pager_that_fails_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source({"clone": [], "open": []})
    rescue = aiouffd.Pager._rescue
    failed: list[Any] = []

    def broken(pager: aiouffd.Pager) -> list[str]:
        if pager is first:
            failed.append(pager)
            raise RuntimeError("broken")
        return rescue(pager)

    async with aiouffd.Pager() as first:
        region = first.map(SIZE)

        @region.on_missing
        async def serve(fault: aiouffd.Fault) -> None:
            fault.copy(DATA[fault.offset : fault.offset + fault.length])

        monkeypatch.setattr(aiouffd.Pager, "_rescue", broken)
        async with aiouffd.open(source, readahead=0, block_size=PAGE_SIZE) as buf:
            seen: list[int] = []
            touch = threading.Thread(target=lambda: seen.append(region.view[PAGE_SIZE]))
            touch.start()
            # This thread's loop stands still, so both want to be rescued.
            wait_until(lambda: bool(failed), "the rescue that fails")
            assert buf[PAGE_SIZE] == DATA[PAGE_SIZE]
            await asyncio.to_thread(touch.join)
            assert seen == [DATA[PAGE_SIZE]]
    assert "a rescue failed" in caplog.text
    caplog.clear()  # and the traceback in it


async def test_a_pager_that_could_not_be_opened_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aiouffd.regions.pager import service

    def refuse(pager: aiouffd.Pager) -> None:
        raise OSError(11, "no threads")

    pager = aiouffd.Pager()
    with monkeypatch.context() as patch:
        patch.setattr(service, "adopt", refuse)
        with pytest.raises(OSError, match="no threads"):
            pager.open()
    async with pager:
        assert pager.map(SIZE).length == SIZE


# ------------------------------------------- what other threads take away meanwhile


class Closing:
    """A loop that another thread closes between a look at it and the call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, *_: Any) -> None:
        raise RuntimeError("Event loop is closed")


async def test_a_loop_that_is_closed_while_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with aiouffd.Pager() as pager:
        region = pager.map(SIZE)

        async def leave() -> None:
            pager._leave_to_loop(region, 0)

        async def report() -> None:
            with pytest.warns(aiouffd.BlockingTouchWarning):
                service._report_self_touch(pager._native_thread)

        with monkeypatch.context() as patch:
            patch.setattr(pager, "_loop", Closing(pager._loop))
            patch.setattr(pager, "rescue_deadline", 60)
            patch.setattr(pager, "_rescue_stack", [("a file", 1, "a function")], raising=False)
            patch.setattr(service, "_reported", set())
            await service.run(leave())
            await service.run(report())


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("what", ["who_waits", "_rescue", "_on_readable", "look_after"])
async def test_a_pager_that_ends_between_two_looks(
    what: str, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the thread of another loop, say, or by the collector."""
    async with aiouffd.Pager() as pager:
        region = pager.map(SIZE)
        engine = pager._engine
        left = [engine] * looks

        def look(_: aiouffd.Pager) -> Any:
            return left.pop() if left else None

        calls: dict[str, Callable[[], object]] = {
            "who_waits": lambda: pager.who_waits(region),
            "_rescue": pager._rescue,
            "_on_readable": pager._on_readable,
            "look_after": lambda: service._look_after(pager),
        }

        async def call() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(aiouffd.Pager, "_engine", property(look), raising=False)
                calls[what]()

        if what in ("_rescue", "look_after"):
            await service.run(call())
        else:
            await call()
        assert pager._engine is engine


def test_a_pager_that_ends_while_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop was closed, and the rescue loop begins to watch what has just come to its end."""
    loop = asyncio.new_event_loop()

    async def main() -> aiouffd.Pager:
        pager = aiouffd.Pager().open()
        region = pager.map(SIZE)
        held.append(region.view)
        await pager.aclose()
        return pager

    held: list[Any] = []
    pager = loop.run_until_complete(main())
    loop.close()
    watched: list[int] = []

    async def move() -> None:
        running = asyncio.get_running_loop()
        native_only = pager._native_only

        def ended() -> None:
            native_only()
            pager._ended = True

        with monkeypatch.context() as patch:
            patch.setattr(pager, "_native_only", ended)
            pager._move(pager._engine)
            notify = pager._engine.notify_fd
            watched.append(running.remove_reader(notify))
            pager._ended = False

    service.block_on(move())
    assert watched == [False]
    held.clear()
    pager.close(force=True)
