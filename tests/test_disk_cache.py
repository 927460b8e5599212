"""The disk cache: right bytes whatever happens to its files, its disk and its processes."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import random
import resource
import signal
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import ClosedError, SourceChangedError, SourceError, UsageError
from aiouffd.sources import cache
from aiouffd.sources.cache import CachedSource, cached, clear, layout, segment, usage
from aiouffd.sources.compose import ConcatSource, RetrySource, SliceSource
from aiouffd.sources.names import display_name
from tests.faulty import FullSource, PlainSource, transient
from tests.scenarios import caching, torture
from tests.scenarios.caching import BLOCK, NoSource, cached_blocks, damage, read_at_random, source
from tests.servers.http import Entry, RangeServer
from tests.support import result_of, start

DATA = random.Random(3).randbytes(300_001)
BLOCKS = -(-len(DATA) // BLOCK)


@asynccontextmanager
async def opened(inner: Any, directory: Path, **options: Any) -> AsyncIterator[CachedSource]:
    reader = source(inner, directory, **options)
    await reader.open()
    try:
        yield reader
    finally:
        await reader.aclose()


async def read_all(inner: Any, directory: Path, **options: Any) -> cache.CacheStats:
    """Read everything, see that it is right, and say where it came from."""
    async with opened(inner, directory, **options) as reader:
        assert await reader.read(0, len(DATA)) == DATA
    return reader.stats


def segments(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.seg"))


class Versioned(FullSource):
    """Another version of the bytes, which may be unreachable, or have holes."""

    def __init__(self, data: bytes = DATA, version: str = "one") -> None:
        super().__init__(data)
        self.version = version
        self.error: Exception | None = None
        self.opens = 0

    async def open(self) -> None:
        self.opens += 1
        if self.error is not None:
            raise self.error

    async def read(self, offset: int, length: int) -> Any:
        if self.error is not None:
            raise self.error
        return await super().read(offset, length)

    def clone(self) -> Versioned:
        return self


# ---------------------------------------------------------------------- reading


async def test_second_time_from_disk(tmp_path: Path) -> None:
    first = await read_all(PlainSource(DATA), tmp_path / "c")
    assert (first.hit_bytes, first.fetched_bytes) == (0, len(DATA))
    second = await read_all(NoSource(DATA), tmp_path / "c")
    assert (second.hit_bytes, second.fetched_bytes) == (len(DATA), 0)


async def test_any_range(tmp_path: Path) -> None:
    async with opened(FullSource(DATA), tmp_path) as reader:
        chance = random.Random(1)
        await asyncio.gather(*(read_at_random(reader, DATA[:], chance, 15) for _ in range(4)))
        assert await reader.read(len(DATA), 0) == b""
        for offset, length in ((0, len(DATA) + 1), (-1, 1)):
            with pytest.raises(UsageError):
                await reader.read(offset, length)
    assert await cached_blocks(tmp_path, DATA) > 0


async def test_all_parts_of_a_block_are_one_request(tmp_path: Path) -> None:
    inner = PlainSource(DATA)
    async with opened(inner, tmp_path) as reader:
        found = await asyncio.gather(*(reader.read(9000 + at, 7) for at in range(0, 700, 7)))
    assert b"".join(bytes(part) for part in found) == DATA[9000:9700]
    assert inner.reads == [(8192, BLOCK)]


async def test_what_waits_to_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is stuck: readers get their bytes, and those once fetched are not asked again."""
    stuck = threading.Event()
    write = segment.Segment.write

    def slow(self: Any, *args: Any, **options: Any) -> int:
        stuck.wait(10)
        return write(self, *args, **options)

    monkeypatch.setattr(segment.Segment, "write", slow)
    inner = PlainSource(DATA)
    async with opened(inner, tmp_path, queue=30 * BLOCK) as reader:
        for _ in range(2):
            for offset in range(0, 40 * BLOCK, 1000):
                assert await reader.read(offset, 1000) == DATA[offset : offset + 1000]
        # What did not fit into the queue is not cached.
        kept = [read for read in inner.reads if read[0] < 30 * BLOCK]
        assert kept == [(block * BLOCK, BLOCK) for block in range(30)]
        assert len(inner.reads) > 50
        assert reader.stats.dropped_bytes > 0
        stuck.set()
    assert await cached_blocks(tmp_path, DATA) == 30


async def test_close_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(segment.Segment, "write", lambda *_, **__: stuck.wait(10) and 0)
    reader = source(PlainSource(DATA), tmp_path, close_timeout=0.05)
    await reader.open()
    await reader.read(0, 100)
    await reader.aclose()
    assert not stuck.is_set()
    stuck.set()
    await reader.aclose()
    with pytest.raises(ClosedError):
        await reader.read(0, 1)
    with pytest.raises(ClosedError):
        await reader.open()


async def test_cancelled(tmp_path: Path) -> None:
    """A cancelled read leaves the buffer alone, and other readers of the block unharmed."""
    gate, asked = asyncio.Event(), asyncio.Event()

    async def wait(offset: int, length: int) -> None:
        asked.set()
        await gate.wait()

    async with opened(PlainSource(DATA, wait), tmp_path) as reader:
        buffers = [bytearray(100), bytearray(100)]
        tasks = [asyncio.create_task(reader.read_into(50, memoryview(b))) for b in buffers]
        await asked.wait()
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        gate.set()
        await tasks[1]
        assert buffers == [bytes(100), DATA[50:150]]
    gate.clear()
    asked.clear()
    reader = source(PlainSource(DATA, wait), tmp_path)
    await reader.open()
    late = asyncio.create_task(reader.read(100_000, 10))
    await asked.wait()
    await reader.aclose()
    with pytest.raises(ClosedError):
        await late


async def test_errors_of_the_source(tmp_path: Path) -> None:
    inner = Versioned()
    async with opened(inner, tmp_path, version=None) as reader:
        await reader.read(0, BLOCK)
        inner.error = SourceChangedError("another")
        assert await reader.read(0, BLOCK) == DATA[:BLOCK]
        for offset in (2 * BLOCK, 5 * BLOCK + 3):
            with pytest.raises(SourceChangedError, match="another"):
                await reader.read(offset, BLOCK)


async def test_holes(tmp_path: Path) -> None:
    whole = bytearray(DATA)
    whole[3 * BLOCK : 7 * BLOCK] = bytes(4 * BLOCK)
    whole[20 * BLOCK : 30 * BLOCK] = bytes(10 * BLOCK)
    asked: list[tuple[int, int]] = []

    class Sparse(FullSource):
        async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
            asked.append((offset, length))
            start, end = max(offset, 20 * BLOCK), min(offset + length, 30 * BLOCK)
            return [(start, end - start)] if start < end else []

    known = [(3 * BLOCK, 4 * BLOCK), (20 * BLOCK, 10 * BLOCK)]
    async with opened(Sparse(bytes(whole)), tmp_path) as reader:
        assert await reader.holes(0, len(DATA)) == known[1:]
        assert await reader.read(0, 19 * BLOCK) == whole[: 19 * BLOCK]
        assert await reader.read(31 * BLOCK, 5) == whole[31 * BLOCK :][:5]
        asked.clear()
    async with opened(Sparse(bytes(whole)), tmp_path) as reader:
        # What is cached is not asked for.
        assert await reader.holes(0, 19 * BLOCK) == known[:1]
        assert await reader.holes(20 * BLOCK, 5 * BLOCK) == [(20 * BLOCK, 5 * BLOCK)]
        assert asked == []
        assert await reader.read(0, len(DATA)) == whole
        inner: Any = reader.inner
        assert all(offset >= 19 * BLOCK for offset, _ in inner.reads)
    # Zeros take no space.
    async with opened(NoSource(bytes(whole)), tmp_path) as reader:
        assert await reader.read(20 * BLOCK, 10 * BLOCK) == bytes(10 * BLOCK)


async def test_checksums(tmp_path: Path) -> None:
    for name in ("crc32", "crc32c", "blake3", "sha256"):
        for _ in range(2):
            stats = await read_all(PlainSource(DATA), tmp_path, checksum=name, fsync=True)
        assert stats.fetched_bytes == 0


# ------------------------------------------------------------ keys and versions


async def test_another_version(tmp_path: Path) -> None:
    await read_all(Versioned(), tmp_path, version=None)
    old = segments(tmp_path)
    other = bytes(reversed(DATA))
    for _ in range(2):
        async with opened(Versioned(other, "two"), tmp_path, version=None) as reader:
            assert await reader.read(0, len(other)) == other
            assert reader.version == "two"
    assert reader.stats.fetched_bytes == 0
    # The old one goes first.
    assert all(path.stat().st_mtime == 0 for path in old)
    async with opened(PlainSource(DATA), tmp_path, size_limit=400_000, version="three") as reader:
        await reader.read(0, 1)
    assert not any(path.exists() for path in old)
    assert segments(tmp_path)


async def test_no_version_is_not_cached(tmp_path: Path) -> None:
    for _ in range(2):
        async with opened(PlainSource(DATA), tmp_path, version=None) as reader:
            assert not reader.caching
            assert await reader.read(5, 10) == DATA[5:15]
            buffer = bytearray(10)
            await reader.read_into(5, memoryview(buffer))
            assert buffer == DATA[5:15]
            assert await reader.holes(0, 100) in ((), [])
    assert not segments(tmp_path)


async def test_clone_is_pinned(tmp_path: Path) -> None:
    inner = Versioned()
    async with opened(inner, tmp_path, version=None) as reader:
        twin = reader.clone()
        assert twin.size == len(DATA)
        await twin.open()
        assert await twin.read(0, 10) == DATA[:10]
        await twin.aclose()
        inner.version = "two"
        for _ in range(2):
            twin = reader.clone()
            with pytest.raises(SourceChangedError):
                await twin.open()
        # A fresh one takes what there is.
        assert await read_all(inner, tmp_path, version=None)


async def test_stale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner = Versioned()
    async with opened(inner, tmp_path, version=None) as reader:
        await reader.read(0, 100_000)
    inner.error = transient()
    for options in ({}, {"key": "unknown", "stale_ok": True}):
        with pytest.raises(SourceError, match="noisy"):
            await source(inner, tmp_path, version=None, **options).open()
    inner.error = SourceError("forbidden", transient=False)
    with pytest.raises(SourceError, match="forbidden"):
        await source(inner, tmp_path, version=None, stale_ok=True).open()

    inner.error = transient()
    async with opened(inner, tmp_path, version=None, stale_ok=True) as reader:
        assert reader.offline
        assert (reader.version, reader.size) == ("one", len(DATA))
        assert await reader.read(0, 90_000) == DATA[:90_000]
        with pytest.raises(SourceError, match="noisy"):
            await reader.read(200_000, 1)
        twin = reader.clone()
        await twin.open()
        assert await twin.read(0, 90_000) == DATA[:90_000]
        await twin.aclose()
        inner.error = None
        assert await reader.read(200_000, 1000) == DATA[200_000:201_000]
        assert not reader.offline
    assert "cannot be reached" in caplog.text

    inner.error = transient()
    async with opened(inner, tmp_path, version=None, stale_ok=True) as reader:
        inner.error, inner.version = None, "two"
        for _ in range(2):
            with pytest.raises(SourceChangedError):
                await reader.read(290_000, 1)
        assert await reader.read(0, 10) == DATA[:10]


def test_keys(tmp_path: Path) -> None:
    def key(what: Any) -> str:
        return CachedSource(what)._key

    url = "http://user:secret@host:1/a?x=1"
    assert key(url) == "http://host:1/a?x=1"
    assert display_name(key(url)) == "http://host:1/a?..."
    assert key(tmp_path / "f") == f"file://{tmp_path}/f"
    assert key(RetrySource(url)) == key(url)
    parts = [SliceSource(url, 5, 6), SliceSource(url, 5), url, ConcatSource([url, url])]
    assert len({key(part) for part in parts}) == 4
    for nameless in (b"bytes", SliceSource(b"bytes", 1), ConcatSource([url, b"bytes"])):
        with pytest.raises(UsageError, match="key="):
            CachedSource(nameless)
    for wrong in ({"block_size": 1000}, {"size_limit": -1}, {"checksum": "md5"}):
        with pytest.raises(UsageError):
            CachedSource(b"bytes", key="k", **wrong)


def test_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_directory() == tmp_path / "aiouffd"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.default_directory() == Path.home() / ".cache/aiouffd"
    plain = PlainSource(DATA)
    assert cached(plain, None) is cached(plain, False) is plain
    once = cached(plain, tmp_path, key="k")
    assert isinstance(once, CachedSource)
    assert cached(once, True) is once


# ------------------------------------------------------------------- the files


async def test_usage_and_clear(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "er"
    assert usage(directory).bytes == clear(directory) == 0
    await read_all(PlainSource(DATA), directory, key="http://h/a?secret")
    found = usage(directory)
    assert found.bytes >= len(DATA)
    assert [(o.name, o.version, o.size) for o in found.objects] == [
        ("http://h/a?...", "1", len(DATA))
    ]
    for path in [directory, *directory.rglob("*")]:
        if path.name != "CACHEDIR.TAG":
            assert not path.stat().st_mode & 0o077, path
    async with opened(PlainSource(DATA), directory) as reader:
        assert await reader.read(0, len(DATA)) == DATA
        assert clear(directory) >= len(DATA)
        # It goes on.
        assert await reader.read(0, len(DATA)) == DATA
    clear(directory)
    assert usage(directory).objects == ()
    await read_all(PlainSource(DATA), directory)
    assert (await read_all(NoSource(DATA), directory)).fetched_bytes == 0


async def test_damage(tmp_path: Path) -> None:
    chance = random.Random(os.urandom(8))
    reused = 0
    for _ in range(60):
        done = [damage(tmp_path, chance) for _ in range(chance.choice([1, 1, 3]))]
        try:
            reused += (await read_all(PlainSource(DATA), tmp_path)).hit_bytes
            # And it heals.
            assert (await read_all(NoSource(DATA), tmp_path)).fetched_bytes == 0
        except BaseException:
            print(done)
            raise
    assert reused


async def test_damage_while_open(tmp_path: Path) -> None:
    """What was verified once is not believed the next time."""
    chance = random.Random(os.urandom(8))
    async with opened(PlainSource(DATA), tmp_path) as reader:
        for _ in range(60):
            assert await reader.read(0, len(DATA)) == DATA
            damage(tmp_path, chance, gently=True)


async def test_files_of_another_place(tmp_path: Path) -> None:
    """A whole segment of another object has right checksums, and is still not believed."""
    other = bytes(reversed(DATA))
    async with opened(PlainSource(other), tmp_path, key="other") as reader:
        assert await reader.read(0, len(other)) == other
    (foreign,) = segments(tmp_path)
    await read_all(PlainSource(DATA), tmp_path)
    (ours,) = set(segments(tmp_path)) - {foreign}
    ours.write_bytes(foreign.read_bytes())
    assert (await read_all(PlainSource(DATA), tmp_path)).hit_bytes == 0


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
async def test_full_disk(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = [50_000]
    pwrite = os.pwrite

    def write(fd: int, data: memoryview, position: int) -> int:
        if left[0] <= 0:
            raise OSError(kind, os.strerror(kind))
        # Disks fill up in the middle of a write.
        count = min(len(data), left[0])
        left[0] -= count
        return pwrite(fd, data[:count], position)

    monkeypatch.setattr(segment.os, "pwrite", write)
    for size in (50_000, 0, 5000):
        left[0] = size
        async with opened(PlainSource(DATA), tmp_path) as reader:
            for offset in range(0, len(DATA), 20_000):
                length = min(20_000, len(DATA) - offset)
                assert await reader.read(offset, length) == DATA[offset : offset + length]
    assert os.strerror(kind) in caplog.text
    await cached_blocks(tmp_path, DATA)
    monkeypatch.undo()
    await read_all(PlainSource(DATA), tmp_path)
    assert await cached_blocks(tmp_path, DATA) == BLOCKS


async def test_file_size_limit(tmp_path: Path) -> None:
    """The same from the kernel itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        await read_all(PlainSource(DATA), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await cached_blocks(tmp_path, DATA)


async def test_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await read_all(PlainSource(DATA), tmp_path)
    real = os.open

    def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "read-only")
        return real(path, flags, *args, **options)

    def no(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    # Root may write where permissions forbid it, so a real directory would not do.
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "utime", no)
    monkeypatch.setattr(os, "mkdir", no)
    assert (await read_all(NoSource(DATA), tmp_path)).fetched_bytes == 0
    monkeypatch.undo()
    segments(tmp_path)[0].unlink()
    monkeypatch.setattr(os, "open", open_)
    await read_all(PlainSource(DATA), tmp_path)
    assert segments(tmp_path) == []


async def test_no_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        await read_all(PlainSource(DATA), directory)
    assert "is no cache" in caplog.text


async def test_directory_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums are no protection against somebody who can write them."""
    await read_all(PlainSource(DATA), tmp_path)
    os.chmod(tmp_path, 0o777)
    assert (await read_all(PlainSource(DATA), tmp_path)).hit_bytes == 0
    os.chmod(tmp_path, 0o700)
    segments(tmp_path)[0].chmod(0o666)
    assert (await read_all(PlainSource(DATA), tmp_path)).hit_bytes == 0
    assert stat.S_IMODE(segments(tmp_path)[0].stat().st_mode) == 0o600
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    assert (await read_all(PlainSource(DATA), tmp_path)).hit_bytes == 0


async def test_many_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More files than may be open."""
    whole = caching.data()
    for module in ("segment", "layout", "entry"):
        monkeypatch.setattr(f"aiouffd.sources.cache.{module}.PER_SEGMENT", 4)
    monkeypatch.setattr("aiouffd.sources.cache.entry.OPEN", 3)
    for inner in (PlainSource(whole), NoSource(whole)):
        async with opened(inner, tmp_path) as reader:
            assert await reader.read(0, len(whole)) == whole
            await read_at_random(reader, whole, random.Random(2), 40)
    assert len(segments(tmp_path)) > 100


# -------------------------------------------------------------------- eviction


async def test_size_limit(tmp_path: Path) -> None:
    limit = 100_000
    for name in range(6):
        await read_all(PlainSource(DATA), tmp_path, key=str(name), size_limit=limit)
        async with opened(PlainSource(DATA), tmp_path, key="last", size_limit=limit) as reader:
            await reader.read(0, BLOCK)
        assert usage(tmp_path).bytes <= limit
    # What was used last is there still.
    assert [found.name for found in usage(tmp_path).objects] == ["last"]
    assert len(list((tmp_path / layout.VERSION).iterdir())) == 2


async def test_evicted_while_read(tmp_path: Path) -> None:
    await read_all(PlainSource(DATA), tmp_path)
    inner = PlainSource(DATA)
    async with opened(inner, tmp_path) as reader:
        await reader.read(0, BLOCK)
        for path in segments(tmp_path):
            path.unlink()
        # Still open, still right.
        assert await reader.read(0, len(DATA)) == DATA
        assert inner.reads == []
        assert reader.stats.hit_bytes == len(DATA) + BLOCK


# ------------------------------------------------------------------- processes


def test_kill(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(seed)
    ends = result_of(caching.kills, "asyncio", str(tmp_path), seed, 25)
    assert ends == [signal.SIGKILL] * 25
    whole = caching.data()
    assert asyncio.run(cached_blocks(tmp_path, whole)) > 0

    async def again() -> CachedSource:
        async with opened(PlainSource(whole), tmp_path) as reader:
            assert await reader.read(0, len(whole)) == whole
        return reader

    assert asyncio.run(again()).stats.hit_bytes > 0


def test_two_processes_that_evict(tmp_path: Path, loop_name: str) -> None:
    """They fill, read and evict the same object, of which only a part may stay."""
    arguments = (str(tmp_path), caching.SIZE // 2, 1.0)
    with (
        start(caching.readers, loop_name, arguments[0], 1, *arguments[1:]) as one,
        start(caching.readers, loop_name, arguments[0], 2, *arguments[1:]) as two,
    ):
        for process in (one, two):
            outcome = process.wait()
            assert outcome.status == 0, outcome.stderr
            assert outcome.result["hits"] > 0


# ------------------------------------------------------------------ end to end


async def test_http(tmp_path: Path) -> None:
    body = DATA
    async with RangeServer({"/a": Entry(body, etag='"1"')}) as server:
        url = server.url("/a")
        for expected in (None, 1):
            server.counts.requests = 0
            async with aiouffd.open(CachedSource(url, directory=tmp_path)) as buf:
                assert await asyncio.to_thread(bytes, buf.view) == body
            if expected is not None:
                # Only for the version.
                assert server.counts.requests == expected
    async with aiouffd.open(CachedSource(url, directory=tmp_path, stale_ok=True)) as buf:
        assert await asyncio.to_thread(bytes, buf.view) == body


async def test_by_keyword(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    async with RangeServer({"/a": Entry(DATA, etag='"1"')}) as server:
        for where in (tmp_path / "here", True):
            async with aiouffd.open(server.url("/a"), cache=where) as buf:
                assert await asyncio.to_thread(bytes, buf.view) == DATA
                copy = pickle.loads(pickle.dumps(buf))
            server.counts.requests = 0
            async with copy:
                assert await asyncio.to_thread(bytes, copy.view) == DATA
            assert server.counts.requests == 1
    assert usage(tmp_path / "here").bytes > len(DATA)
    assert usage().bytes > len(DATA)
    assert usage().objects[0].name == server.url("/a")


async def test_unclosed_is_a_warning(tmp_path: Path) -> None:
    reader = source(PlainSource(DATA), tmp_path)
    await reader.open()
    caught: list[Any] = [reader]
    del reader
    with pytest.warns(ResourceWarning, match="unclosed"):
        caught.clear()


async def test_open_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    inner = Versioned()
    inner.error = transient()
    reader = source(inner, tmp_path, version=None)
    for call in (reader.open(), reader.read(0, 1)):
        with pytest.raises((SourceError, UsageError)):
            await call
    inner.error = None
    await reader.open()
    await reader.open()
    assert inner.opens == 2
    assert await reader.read(0, 10) == DATA[:10]
    await reader.aclose()


# --------------------------------------------------------------------- torture


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    found = result_of(torture.torture, loop_name, "cached", "anonymous", errors, 600, 5, limit=60.0)
    assert found["retries"] > 0
    if errors == "hard":
        assert found["refused"] == 0
