"""The rescue loop: what failed once is tried again, and one failure is no one else's."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import aiouffd
from aiouffd._lib import PAGE_SIZE
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
    from aiouffd.pager import service

    def refuse(pager: aiouffd.Pager) -> None:
        raise OSError(11, "no threads")

    pager = aiouffd.Pager()
    with monkeypatch.context() as patch:
        patch.setattr(service, "adopt", refuse)
        with pytest.raises(OSError, match="no threads"):
            pager.open()
    async with pager:
        assert pager.map(SIZE).length == SIZE
