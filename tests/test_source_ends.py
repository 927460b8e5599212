"""Opening, reading and closing of sources around others: once, and cut off anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import ClosedError, SourceError, UsageError
from aiouffd.sources import file as file_module
from aiouffd.sources.base import (
    aclose_source,
    holes_in_source,
    open_source,
    read_into_source,
    stream_source,
)
from aiouffd.sources.cache import CachedSource, writer
from aiouffd.sources.compose import (
    ChecksumSource,
    ConcatSource,
    Manifest,
    RetrySource,
    SliceSource,
    checksum,
)
from aiouffd.sources.file import FileSource
from aiouffd.sources.memory import MemorySource
from tests.cancelling import BY_CALLER, Cut, Way, cancel_everywhere
from tests.faulty import FullSource

DATA = random.Random(6).randbytes(400_000)
BLOCK = 65536
#: Makes a source around one with DATA.
Make = Callable[[Any], Any]


class Slow(FullSource):
    """Waits wherever it may, and knows whether it is open. What was closed stays closed."""

    opened = 0
    writable = True

    def __init__(self, data: bytes = DATA) -> None:
        super().__init__(bytearray(data))  # type: ignore[arg-type]
        self.version = "1"
        self.state = "new"

    async def open(self) -> None:
        if self.state != "new":
            raise ClosedError("used before")
        self.state = "opening"
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        except BaseException:
            self.state = "new"
            raise
        self.state = "open"
        Slow.opened += 1

    async def aclose(self) -> None:
        was, self.state = self.state, "closed"
        Slow.opened -= was == "open"
        await asyncio.sleep(0)

    async def read(self, offset: int, length: int) -> Any:
        assert self.state == "open"
        await asyncio.sleep(0)
        return bytes(self.data[offset : offset + length])

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        await asyncio.sleep(0)
        return []

    async def write(self, offset: int, data: Any) -> None:
        await asyncio.sleep(0)
        self.data[offset : offset + len(data)] = data  # type: ignore[index]

    async def flush(self) -> None:
        await asyncio.sleep(0)

    def clone(self) -> Slow:
        return Slow(bytes(self.data))


def _opened() -> dict[str, int]:
    return {"open sources": Slow.opened}


def _slice(source: Any) -> Any:
    return SliceSource(ConcatSource([b"12345", source]), 5)


def _concat(source: Any) -> Any:
    cut = len(DATA) // 2
    return ConcatSource([SliceSource(source, 0, cut), SliceSource(source.clone(), cut)])


async def _checked() -> Make:
    manifest = await Manifest.make(MemorySource(DATA), block_size=BLOCK, algorithm="crc32")
    return lambda source: ChecksumSource(source, manifest)


@pytest.fixture(params=["retry", "slice", "concat", "checksum", "cached", "all"])
async def around(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(checksum, "INLINE", 1000)  # so that hashing waits for a thread
    checked = await _checked()

    def cached(source: Any) -> Any:
        return CachedSource(source, directory=tmp_path / "c", key="k", version="1")

    makers: dict[str, Make] = {
        "retry": RetrySource,
        "slice": _slice,
        "concat": _concat,
        "checksum": checked,
        "cached": cached,
        "all": lambda source: RetrySource(cached(checked(_concat(source)))),
    }
    make: Make = makers[request.param]
    return make


async def _use(source: Any) -> None:
    buffer = memoryview(bytearray(len(DATA)))
    await read_into_source(source, 0, buffer)
    assert buffer == DATA
    await holes_in_source(source, 0, len(DATA))


async def test_opening_may_be_cut_off_anywhere(around: Make) -> None:
    async def run(cut: Cut) -> None:
        source = around(Slow())
        await cut(open_source(source))
        await open_source(source)
        await _use(source)
        await aclose_source(source)

    await cancel_everywhere(run, also=_opened)


async def test_reading_may_be_cut_off_anywhere(around: Make, tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        source = around(Slow())
        await open_source(source)
        others = asyncio.ensure_future(source.read(7, 100_000))
        await cut(source.read(5, 100_000))
        assert bytes(await others) == DATA[7:100_007]
        await _use(source)
        await aclose_source(source)

    await cancel_everywhere(run, also=_opened)


async def test_filling_may_be_cut_off_anywhere(around: Make) -> None:
    """Also by somebody who cancels a task of the source's own."""

    async def run(cut: Cut) -> None:
        source = around(Slow())
        await open_source(source)
        await cut.quiet(_use(source))
        await _use(source)
        await aclose_source(source)

    await cancel_everywhere(run, ways=[*BY_CALLER, Way.TASK], also=_opened)


async def test_streaming_may_be_cut_off_anywhere(around: Make) -> None:
    async def run(cut: Cut) -> None:
        source = around(Slow())
        await open_source(source)

        async def stream() -> None:
            async with aclosing(stream_source(source, 5, 200_000)) as chunks:
                found = b"".join([bytes(chunk) async for chunk in chunks])
            assert found == DATA[5:200_005]

        await cut(stream())
        await stream()
        await aclose_source(source)

    await cancel_everywhere(run, also=_opened)


@pytest.mark.parametrize("make", [RetrySource, _slice, _concat])
async def test_writing_may_be_cut_off_anywhere(make: Make) -> None:
    async def run(cut: Cut) -> None:
        source = make(Slow()) if make is not _slice else SliceSource(Slow(), 0)
        await open_source(source)

        async def write() -> None:
            await source.write(len(DATA) // 2 - 500, b"x" * 1000)
            await source.flush()

        await cut(write())
        await write()
        assert bytes(await source.read(len(DATA) // 2 - 500, 1000)) == b"x" * 1000
        await aclose_source(source)

    await cancel_everywhere(run, also=_opened)


async def test_closing_may_be_cut_off_anywhere(around: Make) -> None:
    async def run(cut: Cut) -> None:
        source = around(Slow())
        await open_source(source)
        await cut(aclose_source(source))
        await aclose_source(source)
        with pytest.raises(ClosedError):
            await open_source(source)

    await cancel_everywhere(run, also=_opened)


async def test_the_end_of_a_loop_may_come_anywhere(around: Make, tmp_path: Path) -> None:
    """Over files, whose descriptors and threads are given back without waiting."""
    path = tmp_path / "file"
    path.write_bytes(DATA)

    async def run(cut: Cut) -> None:
        source = around(FileSource(path))

        async def whole() -> None:
            try:
                await open_source(source)
                await _use(source)
            finally:
                await aclose_source(source)

        await cut.quiet(whole())
        await aclose_source(source)

    await cancel_everywhere(run, ways=[Way.ALL])


async def test_closed_while_it_is_opened(around: Make) -> None:
    source = around(Slow())
    openings = [asyncio.ensure_future(open_source(source)) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.gather(*(aclose_source(source) for _ in range(2)))
    found = await asyncio.gather(*openings, return_exceptions=True)
    assert [type(error) for error in found] == [ClosedError, ClosedError]
    assert Slow.opened == 0


async def test_opened_and_closed_by_many_at_a_time(around: Make) -> None:
    source = around(Slow())
    await asyncio.gather(*(open_source(source) for _ in range(4)))
    await _use(source)
    await asyncio.gather(*(aclose_source(source) for _ in range(4)))
    assert Slow.opened == 0


# -------------------------------------------------------------- what others raise


class Unclosable(Slow):
    """Is closed, and then says what it was told to say."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def aclose(self) -> None:
        await super().aclose()
        raise self.error

    def clone(self) -> Slow:
        return Unclosable(self.error)


ERRORS = [asyncio.CancelledError(), BaseException("odd"), OSError("no"), ZeroDivisionError()]
any_error = pytest.mark.parametrize("error", ERRORS, ids=repr)


@any_error
async def test_a_part_that_cannot_be_closed_keeps_no_other_open(error: BaseException) -> None:
    parts = [Unclosable(error), Slow(), Unclosable(error), Slow()]
    source = ConcatSource(parts)
    await source.open()
    assert Slow.opened == 4
    with pytest.raises((SourceError, type(error))) as caught:  # type: ignore[type-var]
        await source.aclose()
    assert isinstance(caught.value, Exception)
    assert Slow.opened == 0
    await source.aclose()


@any_error
async def test_what_is_around_a_source_that_cannot_be_closed_is_closed(
    around: Make, error: BaseException
) -> None:
    source = around(Unclosable(error))
    await open_source(source)
    await _use(source)
    with pytest.raises((SourceError, type(error))) as caught:  # type: ignore[type-var]
        await aclose_source(source)
    assert isinstance(caught.value, Exception)
    assert Slow.opened == 0
    with pytest.raises(ClosedError):
        await open_source(source)


@any_error
async def test_the_error_of_opening_is_the_one_that_is_raised(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with pytest.raises(UsageError, match="is not within"):
        await SliceSource(Unclosable(error), len(DATA) + 1).open()
    assert "could not be closed" in caplog.text
    assert Slow.opened == 0


class Unreadable(Slow):
    """Raises what it was told to, for the first byte; the rest is right."""

    error: BaseException | None = None

    def _raise(self, offset: int) -> None:
        if self.error is not None and offset == 0:
            raise self.error

    async def read(self, offset: int, length: int) -> Any:
        self._raise(offset)
        return await super().read(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._raise(offset)
        await super().read_into(offset, buffer)

    def clone(self) -> Slow:
        return Slow(bytes(self.data))


@any_error
async def test_a_source_may_raise_anything_and_harms_its_own_read(
    around: Make, error: BaseException
) -> None:
    inner = Unreadable()
    source = around(inner)
    await open_source(source)
    inner.error = error
    at = 3 * BLOCK  # another block of manifest and cache
    bad, good = source.read(0, 100), source.read(at, 100)
    found = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(found[0], Exception), found[0]
    assert bytes(found[1]) == DATA[at : at + 100]
    inner.error = None
    await _use(source)
    await aclose_source(source)


class Unopenable(Slow):
    error: BaseException | None = None

    async def open(self) -> None:
        if self.error is not None:
            raise self.error
        await super().open()


@any_error
async def test_opening_that_raises_anything_can_be_repeated(
    around: Make, error: BaseException
) -> None:
    inner = Unopenable()
    inner.error = error
    source = around(inner)
    with pytest.raises((SourceError, type(error))) as caught:  # type: ignore[type-var]
        await open_source(source)
    assert isinstance(caught.value, Exception)
    assert Slow.opened == 0
    inner.error = None
    await open_source(source)
    await _use(source)
    await aclose_source(source)
    assert Slow.opened == 0


# ------------------------------------------------------------------------ bounds


def test_a_manifest_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="block size"):
        Manifest(1 << 40, 1 << 40, "crc32", b"1234")
    Manifest(10, 1 << 40, "crc32", b"1234")
    body = checksum.MAGIC + b"[" * 100_000
    with pytest.raises(UsageError, match="too long"):
        Manifest.from_bytes(body + hashlib.sha256(body).digest())
    path = tmp_path / "long"
    monkeypatch.setattr(checksum, "_FILE_MAX", 1 << 20)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="at most"):
        Manifest.load(path)


async def test_a_manifest_from_a_source_has_bounds() -> None:
    class Endless(Slow):
        @property
        def size(self) -> int:
            return 1 << 50

    with pytest.raises(UsageError, match="at most"):
        await Manifest.fetch(Endless())
    assert Slow.opened == 0


# ------------------------------------------------------------------------- files


async def test_a_file_may_be_cut_off_anywhere(tmp_path: Path) -> None:
    """With all its threads busy, so that calls are cancelled before they begin."""
    path = tmp_path / "file"
    path.write_bytes(DATA)

    async def run(cut: Cut) -> None:
        source = FileSource(path, max_threads=1, writable=True)
        await cut(source.open())
        await source.open()
        others = [asyncio.ensure_future(source.read(0, 300_000)) for _ in range(3)]
        await asyncio.sleep(0)
        if not cut.reached:
            await cut(source.read(1, 300_000))
        for task in others[1:]:
            task.cancel()
        await asyncio.wait(others)
        await source.write(0, DATA[:10])
        await source.aclose()

    await cancel_everywhere(run)


# ----------------------------------------------------------------------- threads


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """As at a limit of processes."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield


async def test_a_file_without_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    monkeypatch.setattr(file_module, "_NOWAIT", 0)  # so that reading needs a thread
    source = FileSource(path)
    with no_threads(), pytest.raises(SourceError) as caught:
        await source.open()
    assert caught.value.transient
    await source.open()
    # All that it has are busy elsewhere: a new pool, of which no thread was started yet.
    source._executor = ThreadPoolExecutor(1)
    buffer = bytearray(1000)
    with no_threads():
        for _ in range(2):
            with pytest.raises(SourceError, match="no thread"):
                await source.read(0, 1000)
            with pytest.raises(SourceError, match="no thread"):
                await source.read_into(0, memoryview(buffer))
    assert await source.read(0, 1000) == DATA[:1000]
    assert not any(buffer), "what was refused is not done later, to a buffer that others have now"
    await source.aclose()


async def test_around_a_source_without_threads(
    around: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only saves something is done without, and what verifies is done on the loop."""
    source = around(Slow())
    with no_threads():
        await open_source(source)
        await _use(source)
        await _use(source)
    await _use(source)
    await aclose_source(source)


async def test_a_cache_goes_on_when_there_are_threads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PAUSE", 0.0)
    source = CachedSource(Slow(), directory=tmp_path, key="k", version="1")
    await source.open()
    assert source._writer is not None
    source._executor, source._writer._executor = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    with no_threads():
        await _use(source)
    assert source.stats.dropped_bytes == len(DATA)
    await _use(source)
    await source.aclose()
    source = source.clone()
    await source.open()
    await _use(source)
    assert source.stats.hit_bytes == len(DATA)
    await source.aclose()
