"""Flushes that can be believed: the account of writes, and one flush at a time."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import ClosedError, FlushError, SourceError
from aiouffd.sources import durability
from aiouffd.sources.base import BaseSource, Buffer
from aiouffd.sources.compose import ConcatSource, RetrySource, SliceSource
from aiouffd.sources.durability import Flusher, Promises
from aiouffd.sources.file import FileSource
from tests.nbd_peers import opened

EIO = OSError(errno.EIO, "lost")


def test_what_is_in_doubt_stays_so_until_it_was_written_again() -> None:
    promises = Promises("it")
    promises.wrote(0, 100)
    promises.begin()
    promises.broken()
    assert promises.doubtful() == [(0, 100)]
    for _ in range(2):
        promises.begin()
        promises.kept()
        with pytest.raises(FlushError) as caught:
            promises.check()
        assert caught.value.ranges == [(0, 100)]
        assert not caught.value.transient
    promises.wrote(0, 60)
    assert promises.doubtful() == [(60, 40)]
    promises.wrote(60, 40)
    promises.check()


def test_a_promise_ends_with_who_gave_it() -> None:
    promises = Promises("it")
    promises.wrote(0, 10, "a")
    promises.wrote(10, 10, "b")
    assert promises.holders() == {"a", "b"}
    promises.gone("a")
    promises.begin()
    # Lost in the middle of the flush.
    promises.gone("b")
    promises.kept()
    assert promises.doubtful() == [(0, 20)]
    # A newer write, that was flushed, is what counts.
    promises.wrote(0, 20, "c")
    promises.begin()
    promises.kept()
    promises.gone("c")
    promises.check()


def test_what_is_written_during_a_flush_is_for_the_next_one() -> None:
    promises = Promises("it")
    promises.wrote(0, 10)
    promises.begin()
    promises.wrote(5, 10)
    promises.broken()
    assert promises.doubtful() == [(0, 5)]
    promises.begin()
    promises.broken()
    assert promises.doubtful() == [(0, 15)]


def test_scattered_writes_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "MOST", 4)
    promises = Promises("it")
    for at in range(0, 100, 10):
        promises.wrote(at, 1)
    promises.gone(None)
    found = promises.doubtful()
    assert len(found) <= 4
    for at in range(0, 100, 10):
        assert any(start <= at < start + length for start, length in found)


class Device:
    """Flushes when it is let, or fails."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun: list[int] = []
        self.fail: BaseException | None = None
        self.running = 0

    async def flush(self) -> None:
        self.running += 1
        assert self.running == 1
        self.begun.append(len(self.begun))
        try:
            await self.gate.wait()
            if self.fail is not None:
                raise self.fail
        finally:
            self.running -= 1


async def test_flushes_are_shared_and_one_at_a_time() -> None:
    promises, device = Promises("it"), Device()
    flusher = Flusher(promises)
    first = asyncio.create_task(flusher(device.flush))
    await asyncio.sleep(0)
    later = [asyncio.create_task(flusher(device.flush)) for _ in range(5)]
    while not device.begun:  # noqa: ASYNC110
        await asyncio.sleep(0)
    promises.wrote(0, 10)
    device.gate.set()
    await asyncio.gather(first, *later)
    assert device.begun == [0, 1]
    promises.gone(None)
    promises.check()


async def test_a_flush_that_nobody_waits_for_is_not_forgotten() -> None:
    promises, device = Promises("it"), Device()
    flusher = Flusher(promises)
    promises.wrote(0, 10)
    caller = asyncio.create_task(flusher(device.flush))
    while not device.begun:  # noqa: ASYNC110
        await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    device.fail = EIO
    device.gate.set()
    await flusher.settled()
    device.fail = None
    with pytest.raises(FlushError) as caught:
        await flusher(device.flush)
    assert caught.value.ranges == [(0, 10)]


async def test_a_flush_that_is_cancelled_has_failed() -> None:
    promises, device = Promises("it"), Device()
    flusher = Flusher(promises)
    promises.wrote(0, 10)
    caller = asyncio.create_task(flusher(device.flush))
    while not device.begun:  # noqa: ASYNC110
        await asyncio.sleep(0)
    flusher.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    device.gate.set()
    with pytest.raises(FlushError):
        await flusher(device.flush)


async def test_errors_of_the_caller_stay_what_they_are() -> None:
    device = Device()
    device.gate.set()
    device.fail = ClosedError("closed")
    with pytest.raises(ClosedError):
        await Flusher(Promises("it"))(device.flush)
    device.fail = SourceError("gone")
    with pytest.raises(FlushError, match="gone"):
        await Flusher(Promises("it"))(device.flush)


# ------------------------------------------------------------------------- files


class Failing:
    """fdatasync(2) as the kernel has it: an error is told once, and the pages are clean then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors = 0
        self.calls = 0
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        self.calls += 1
        if self.errors:
            self.errors -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_a_file_that_lost_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    sync = Failing(monkeypatch)
    async with opened(FileSource(path, writable=True)) as source:
        twin = source.clone()
        async with opened(twin):
            await source.write(0, b"a" * 4096)
            await source.flush()
            await source.write(4096, b"b" * 100)
            sync.errors = 1
            # The clone's flush is told of it: it uses the same descriptor.
            for each in (twin, source, twin):
                with pytest.raises(FlushError) as caught:
                    await each.flush()
                assert caught.value.ranges == [(4096, 100)]
                assert caught.value.errno == errno.EIO
            await twin.write_zeros(4096, 4096, hole=True)
            await source.flush()
            assert sync.calls == 5


# ---------------------------------------------------------------- around sources


class Disk(BaseSource):
    """Loses what it has not flushed at the first flush, which fails, and then works."""

    writable = True
    version = None

    def __init__(self, size: int, *, transient: bool = True) -> None:
        self._size = size
        self._transient = transient
        self.flushed = 0

    @property
    def size(self) -> int:
        return self._size

    async def read(self, offset: int, length: int) -> Buffer:
        return bytes(length)

    async def write(self, offset: int, data: Buffer) -> None:
        pass

    async def flush(self) -> None:
        self.flushed += 1
        if self.flushed == 1:
            error: Any = FlushError("lost", ranges=[(90, 20)])
            error.transient = self._transient
            raise error

    def clone(self) -> Disk:
        return Disk(self._size)


async def test_a_flush_is_not_tried_again() -> None:
    disk = Disk(1000)
    source = RetrySource(disk, first=0.001)
    with pytest.raises(FlushError):
        await source.flush()
    assert disk.flushed == 1


async def test_what_is_in_doubt_is_named_by_its_place_in_the_whole() -> None:
    with pytest.raises(FlushError) as caught:
        await SliceSource(Disk(1000), 100, 500).flush()
    assert caught.value.ranges == [(0, 10)]
    healthy = Disk(1000)
    healthy.flushed = 1
    source = ConcatSource([Disk(1000), healthy, Disk(1000)])
    with pytest.raises(FlushError) as caught:
        await source.flush()
    assert caught.value.ranges == [(90, 20), (2090, 20)]
    # All were, though the first one failed.
    assert healthy.flushed == 2
