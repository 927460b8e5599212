"""A source that never answers: who waits is told of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import aiouffd
from aiouffd import serve
from aiouffd.sources.function import FunctionSource
from tests.guests import PlainDialect, guest
from tests.support import Gate, content, wait_until, word

SIZE = 1 << 20
DATA = content(SIZE)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("aiouffd.fetch.silence.PATIENCE", 0.1)
    monkeypatch.setattr("aiouffd.fetch.silence.AGAIN_FIRST", 0.1)
    caplog.set_level(logging.WARNING, "aiouffd")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "waited" in record.getMessage()]


def touch(buf: Any) -> int:
    return int.from_bytes(buf.view[8192:8200], "little")


async def test_a_touch_that_waits_is_told(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(DATA, is_open=False)
    source = FunctionSource(gate.read, size=SIZE)
    async with aiouffd.open(source, block_size=65536, readahead=0) as buf:
        touching = asyncio.ensure_future(asyncio.to_thread(touch, buf))
        await asyncio.to_thread(wait_until, lambda: len(told(caplog)) > 1, "two lines")
        first, *_ = told(caplog)
        assert "bytes 0-65536 of FunctionSource" in first
        assert "has not answered" in first
        gate.open()
        assert await touching == word(8192)
        # With nothing under way it looks no more.
        silence = buf._sink.fetcher.flights._silence
        await asyncio.to_thread(wait_until, lambda: silence.timer is None, "its end")


async def test_what_the_source_says_is_told(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    broken = True

    async def read(offset: int, length: int) -> bytes:
        if broken:
            raise ConnectionError("out of order")
        return DATA[offset : offset + length]

    source = FunctionSource(read, size=SIZE)
    async with aiouffd.open(source, block_size=65536, readahead=0) as buf:
        touching = asyncio.ensure_future(asyncio.to_thread(touch, buf))
        await asyncio.to_thread(wait_until, lambda: bool(told(caplog)), "a line")
        assert "out of order" in told(caplog)[0]
        broken = False
        assert await touching == word(8192)


def test_a_loop_that_waits_for_its_own_threads(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of an executor blocks the loop, and the rescue loop waits for the source."""
    gate = Gate(DATA, is_open=False)
    portable = FunctionSource(gate.read, size=SIZE, portable=True)

    async def main() -> int:
        async with aiouffd.open(portable, block_size=65536, readahead=0) as buf:
            with ThreadPoolExecutor(1) as pool:
                touching = pool.submit(touch, buf)
            return touching.result()

    def opens() -> None:
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: bool(told(caplog)), "a line")
        gate.open()

    helper = Thread(target=opens)
    helper.start()
    assert asyncio.run(main()) == word(8192)
    helper.join()
    assert "has not answered" in told(caplog)[0]


async def test_clients_that_wait_are_told_of(
    quick: None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    gate = Gate(DATA, is_open=False)
    source = FunctionSource(gate.read, size=SIZE)
    async with (
        serve.listen(tmp_path / "s", source=source, dialect=PlainDialect()),
        guest(tmp_path / "s", SIZE // 4096) as one,
    ):
        asked = one.tell("word", 7)
        await asyncio.to_thread(wait_until, lambda: bool(told(caplog)), "a line")
        gate.open()
        assert await asked == word(7 * 4096)
