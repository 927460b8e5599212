"""The disk cache: right bytes whatever happens to its files, its disk and its processes."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import os
import pickle
import random
import resource
import signal
import stat
import subprocess
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import ClosedError, SourceChangedError, SourceError, UsageError
from aiouffd.sources import BaseSource, FileSource, MemorySource, cache
from aiouffd.sources.cache import CachedSource, cached, clear, evict, layout, segment, usage
from aiouffd.sources.compose import ChecksumSource, ConcatSource, Manifest, RetrySource, SliceSource
from aiouffd.sources.compose.checksum import digest_function
from aiouffd.sources.names import display_name
from tests.faulty import FullSource, PlainSource, transient
from tests.scenarios import caching, torture
from tests.scenarios.caching import BLOCK, NoSource, cached_blocks, damage, read_at_random, source
from tests.servers.http import Entry, RangeServer
from tests.support import result_of, run, start

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


def taken(directory: Path) -> int:
    """Bytes on disk of everything in it, as du(1) would count them."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


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


async def test_cancelled_while_it_closes(tmp_path: Path) -> None:
    """Who was cancelled hears of that, and not that the source is closed."""
    asked = asyncio.Event()

    async def wait(offset: int, length: int) -> None:
        asked.set()
        await asyncio.Event().wait()

    reader = source(PlainSource(DATA, wait), tmp_path)
    await reader.open()
    late = asyncio.create_task(reader.read(100_000, 10))
    await asked.wait()
    (edge,) = reader._edges.values()
    edge.add_done_callback(lambda _: late.cancel())
    await reader.aclose()
    with pytest.raises(asyncio.CancelledError):
        await late


async def test_holes_of_a_long_range(tmp_path: Path) -> None:
    """Nobody looks at two million blocks while the loop waits."""
    asked: list[tuple[int, int]] = []

    class Vast(BaseSource):
        size = 1 << 33

        async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
            asked.append((offset, length))
            return [(offset, length)]

    async with opened(Vast(), tmp_path) as reader:
        found = await reader.holes(5, (1 << 33) - 5)
        assert found == asked == [(5, 4096 * BLOCK - 5)]
        assert await reader.holes(1 << 32, 10) == [(1 << 32, 10)]


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


async def test_what_can_be_written_to_is_not_cached(tmp_path: Path) -> None:
    """Its version does not tell what was written."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    for first in (b"first", b"other"):
        with path.open("r+b") as file:
            file.write(first)
        for wrap in (lambda s: s, RetrySource, lambda s: ConcatSource([s, s])):
            inner = FileSource(path, writable=True)
            async with opened(wrap(inner), tmp_path / "c", version=None, key="k") as reader:
                assert not reader.caching
                assert reader.version
                assert await reader.read(0, 5) == first
    async with opened(FileSource(path), tmp_path / "c", version=None) as reader:
        assert reader.caching


async def test_weak_versions_are_not_cached(tmp_path: Path) -> None:
    """That a server calls two versions equivalent does not make them equal."""
    now = time.time()
    old, new = now - 3600, now - 1
    cases = [
        ('"1"', new, True), ('"1"', None, True), ('W/"1"', old, True), (None, old, True),
        ('W/"1"', new, False), ('W/"1"', None, False), (None, new, False), (None, None, False),
    ]  # fmt: skip
    async with RangeServer({}) as server:
        for number, (etag, modified, lasting) in enumerate(cases):
            for scheme, word in (("", b"first"), ("", b"other"), ("obstore+", b"third")):
                server.objects["/a"] = Entry(memoryview(word + DATA), etag, modified)
                directory = tmp_path / f"{number}{scheme}"
                url = scheme + server.url("/a")
                cached = CachedSource(url, directory=directory, unversioned="accept")
                async with aiouffd.open(cached) as buf:
                    inner: Any = buf.source
                    assert inner.caching == lasting, (etag, modified, scheme)
                    found = await buf.read(0, 5)
                    assert found == (b"first" if lasting and not scheme else word)
                    assert inner.version == inner.inner.version
            # The caller's word is enough.
            again = CachedSource(
                url,
                directory=tmp_path / "w",
                version="mine",
                key=f"{number}",
                unversioned="accept",
            )
            async with aiouffd.open(again):
                assert again.caching


async def test_names_with_queries(tmp_path: Path) -> None:
    """Two objects of one server with equal ETags and sizes, which is its right."""
    async with RangeServer({}) as server:
        for name, data in (("1", DATA), ("2", DATA[::-1])):
            server.objects[f"/a?id={name}"] = Entry(memoryview(data))
        for scheme in ("", "obstore+", "fsspec+"):
            for _ in range(2):
                for name, data in (("1", DATA), ("2", DATA[::-1])):
                    url = f"{scheme}{server.url('/a')}?id={name}"
                    async with aiouffd.open(url, cache=tmp_path / scheme) as buf:
                        assert await buf.read(0, 1000) == data[:1000]
                        inner: Any = buf.source
            assert inner.stats.hit_bytes


async def test_unverified_bytes_are_not_taken_for_verified(tmp_path: Path) -> None:
    manifest = await Manifest.make(MemorySource(DATA), block_size=BLOCK, algorithm="crc32c")
    bad = bytearray(DATA)
    bad[5000] ^= 1
    settings: dict[str, Any] = {"version": None, "key": None}

    def named(data: bytes) -> Versioned:
        inner = Versioned(data)
        inner.url = "http://h/a"  # type: ignore[attr-defined]
        return inner

    async with opened(named(bytes(bad)), tmp_path, **settings) as reader:
        await reader.read(0, len(DATA))
    async with opened(ChecksumSource(named(DATA), manifest), tmp_path, **settings) as reader:
        assert await reader.read(0, len(DATA)) == DATA
    async with opened(ChecksumSource(named(DATA), manifest), tmp_path, **settings) as reader:
        assert await reader.read(0, len(DATA)) == DATA
    assert reader.stats.fetched_bytes == 0


async def test_a_clone_brings_no_news(tmp_path: Path) -> None:
    """What it is pinned to may have been replaced since, and does not replace that again."""
    async with opened(Versioned(), tmp_path, version=None) as reader:
        async with opened(Versioned(version="two"), tmp_path, version=None) as other:
            await other.read(0, 10)
        (newer,) = segments(tmp_path)
        # The first thing that is stored of the older one.
        await reader.read(0, 10)
        twin = reader.clone()
        await twin.open()
        assert await twin.read(0, 10) == DATA[:10]
        await twin.aclose()
    assert newer.stat().st_mtime
    gone = Versioned()
    gone.error = transient()
    async with opened(gone, tmp_path, version=None, stale_ok=True) as reader:
        assert reader.version == "two"


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
    assert key(url) == "http://user@host:1/a?x=1"
    assert display_name(key(url)) == "http://host:1/a?..."
    for secret in (url, url.replace("host", "[::1]"), f"fsspec+zip://a::{url}"):
        assert "secret" not in display_name(secret)
    assert display_name("fsspec+zip://a::http://u:p@h/z?q") == "fsspec+zip://a::http://h/z?..."
    for odd in ("weird://[", "weird://user:secret@[?x", "a::b", "x://a::b"):
        assert "secret" not in display_name(odd)
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


async def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone uses the same one, wherever the process is by then; and a user may have none."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    reader = source(PlainSource(DATA), "here")
    monkeypatch.chdir(tmp_path / "elsewhere")
    twin = reader.clone()
    await twin.open()
    await twin.read(0, 10)
    await twin.aclose()
    assert segments(tmp_path / "here")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(FileNotFoundError, match="XDG_CACHE_HOME"):
        cache.default_directory()
    async with opened(PlainSource(DATA), None) as reader:  # type: ignore[arg-type]
        assert not reader.caching
        assert await reader.read(0, 10) == DATA[:10]
    gone = Versioned()
    gone.error = transient()
    with pytest.raises(SourceError, match="noisy"):
        await source(gone, None, stale_ok=True).open()  # type: ignore[arg-type]
    assert not list((tmp_path / "elsewhere").iterdir())


NASTY = [
    b"[" * 50_000,
    b'{"name": "a", "version": "1", "size": ' + b"9" * 5000 + b"}",
    b'{"name": "a", "version": "1", "size": -1}',
    b'{"name": "a", "version": "1", "size": 1e3}',
    b'{"name": ["a"], "version": "1", "size": 5}',
    b'{"name": "a", "version": {"x": 1}, "size": 5}',
    b'{"name": "a", "version": "1", "size": 9223372036854775808}',
    b'{"name": "a"}',
    b"null",
    b"\xff\xfe",
]


@pytest.mark.parametrize("body", NASTY)
async def test_a_note_that_is_none_is_not_believed(tmp_path: Path, body: bytes) -> None:
    """Though its seal is right, which anybody can make who can write here."""
    async with opened(PlainSource(DATA), tmp_path) as reader:
        await reader.read(0, 10)
        key = reader._entry.directory.parent  # type: ignore[union-attr]
    seal = hashlib.sha256(key.name.encode() + b"\n" + body).hexdigest().encode()
    (key / "latest").write_bytes(seal + b"\n" + body + b"\n")
    assert layout.read_latest(key) is None
    assert len(cache.usage(tmp_path).objects) == 1
    gone = Versioned()
    gone.error = transient()
    with pytest.raises(SourceError, match="noisy"):
        await source(gone, tmp_path, stale_ok=True, version=None).open()
    async with opened(PlainSource(DATA), tmp_path) as reader:
        assert await reader.read(0, 10) == DATA[:10]


async def test_files_of_any_length_cost_nothing(tmp_path: Path) -> None:
    async with opened(PlainSource(DATA), tmp_path) as reader:
        await reader.read(0, len(DATA))
        key = reader._entry.directory.parent  # type: ignore[union-attr]
    for path in (key / "latest", *segments(tmp_path)):
        with path.open("r+b") as file:
            file.truncate(1 << 42)
    tracemalloc.start()
    try:
        async with opened(PlainSource(DATA), tmp_path) as reader:
            assert await reader.read(0, len(DATA)) == DATA
        cache.usage(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


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


async def test_another_objects_latest(tmp_path: Path) -> None:
    """Nor does the note of what was seen last mean anything in another place."""
    for key, size in (("a", 300_000), ("b", 1000)):
        async with opened(PlainSource(DATA[:size]), tmp_path, key=key):
            pass
    one, two = (
        layout.key_directory(layout.root_of(tmp_path), key) / layout.LATEST for key in ("a", "b")
    )
    one.write_bytes(two.read_bytes())
    gone = Versioned(DATA[:300_000])
    gone.error = transient()
    with pytest.raises(SourceError, match="noisy"):
        await source(gone, tmp_path, key="a", stale_ok=True).open()


def changes(good: bytes, start: int, block: int) -> Iterator[tuple[str, bytes]]:
    """Each way in which a small segment file may be torn or garbled."""
    for at in range(start if start < 200 else 200):
        for bit in (1, 128):
            yield f"flip {at}", good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :]
        yield f"cut {at}", good[:at]
        yield f"zero from {at}", good[:at] + bytes(len(good) - at)
    for at in range(0, len(good), 512):
        yield f"cut {at}", good[:at]
        yield f"sector {at}", good[:at] + bytes(512) + good[at + 512 :]
        yield f"garbage {at}", good[:at] + random.Random(at).randbytes(512) + good[at + 512 :]
        yield f"shift {at}", good[:at] + b"x" + good[at:]
    blocks = range(start, len(good), block)
    for one, two in itertools.permutations(blocks, 2):
        moved = bytearray(good)
        moved[one : one + block] = good[two : two + block].ljust(block, b"\0")
        yield f"block {two} at {one}", bytes(moved)


def test_every_change_of_a_segment(tmp_path: Path) -> None:
    """Each block of what is left is right, or missing."""
    data = random.Random(4).randbytes(3 * BLOCK) + bytes(2 * BLOCK) + b"the end"
    digest = digest_function("crc32c")
    forms = [
        layout.Format(key, version, len(data), BLOCK, "crc32c")
        for key, version in (("k", "1"), ("k", "2"), ("l", "1"))
    ]
    files = []
    for number, form in enumerate(forms):
        path = tmp_path / str(number)
        mine = bytes(data) if not number else data[::-1]
        segment.Segment(str(path), form, 0, digest, write=True).write(
            0, memoryview(mine), 6, sync=False
        )
        files.append(path.read_bytes())
    width, start = forms[0].record_size, forms[0].data_start
    good = files[0]
    others = [(f"file {number}", other) for number, other in enumerate(files)]
    records = [good[at * width : (at + 1) * width] for at in range(6)]
    for one, two in itertools.permutations(range(6), 2):
        moved = [*records]
        moved[one] = records[two]
        others.append((f"record {two} at {one}", b"".join(moved) + good[6 * width :]))
        # And with the block that it is of.
        to, source_at = start + one * BLOCK, start + two * BLOCK
        both = bytearray(others[-1][1].ljust(start + 6 * BLOCK, b"\0"))
        both[to : to + BLOCK] = good[source_at : source_at + BLOCK].ljust(BLOCK, b"\0")
        others.append((f"record and block {two} at {one}", bytes(both)))
    for table, bytes_of in itertools.permutations(range(3), 2):
        others.append((f"table of {table}", files[table][:start] + files[bytes_of][start:]))
    path = tmp_path / "changed"
    seen = kept = 0
    for what, changed in itertools.chain(others, changes(good, start, BLOCK)):
        path.write_bytes(changed)
        os.chmod(path, 0o600)
        for first in (0, 1):
            opened_now = segment.Segment(str(path), forms[0], first, digest, write=False)
            buffer = memoryview(bytearray(b"\xee" * len(data)))
            missing = opened_now.read_into(first * layout.PER_SEGMENT, buffer, None)
            for block in range(6):
                part = slice(block * BLOCK, (block + 1) * BLOCK)
                if first * layout.PER_SEGMENT + block not in missing:
                    assert not first, f"{what}: as another segment"
                    assert buffer[part] == data[part], f"{what}: block {block}"
                    kept += 1
            seen += 1
    assert seen > 1000
    assert kept > seen  # most of what is untouched is still used


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0755", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.needs_root
async def test_a_disk_that_the_cache_has_filled(small_disk: Path) -> None:
    """Its limit is larger than the disk: new objects take the place of old ones all the same."""
    directory = small_disk / "c"
    for name in range(12):
        key, inner = str(name), PlainSource(DATA)
        async with opened(inner, directory, key=key) as reader:
            assert reader.caching
            for offset in range(0, len(DATA), 5 * BLOCK):
                length = min(5 * BLOCK, len(DATA) - offset)
                assert await reader.read(offset, length) == DATA[offset : offset + length]
    assert sum(found.name in ("10", "11") for found in usage(directory).objects) > 0
    # And somebody else fills what was left, to the last byte, while it is not open.
    with (small_disk / "full").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    async with opened(PlainSource(DATA), directory, key="last") as reader:
        assert reader.caching
        await reader.read(0, len(DATA))
    assert await cached_blocks(directory, DATA, key="last") > 0


@pytest.mark.needs_root
async def test_a_disk_that_cannot_be_written(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is on it is read, by root as well; nothing else goes wrong."""
    directory = small_disk / "c"
    async with opened(PlainSource(DATA), directory) as reader:
        await reader.read(0, 50 * BLOCK)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    await asyncio.to_thread(subprocess.run, remount, check=True)
    inner = PlainSource(DATA)
    async with opened(inner, directory) as reader:
        assert reader.caching
        assert await reader.read(0, len(DATA)) == DATA
        assert reader.stats.hit_bytes == 50 * BLOCK
        with pytest.raises(OSError, match="Read-only"):
            clear(directory)
        assert await reader.read(0, len(DATA)) == DATA
    async with opened(PlainSource(DATA), directory, key="new") as reader:
        assert await reader.read(0, len(DATA)) == DATA
        assert not reader.caching
    assert "Read-only" in caplog.text


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


async def test_small_objects_count_whole(tmp_path: Path) -> None:
    """Directories take space too: more than what is in them, if that is little."""
    limit = 400_000
    little = PlainSource(b"little")
    for name in range(60):
        async with opened(little, tmp_path, key=str(name), size_limit=limit) as reader:
            assert await reader.read(0, 6) == b"little"
    # What was not read takes some as well.
    for name in range(60, 120):
        async with opened(little, tmp_path, key=str(name), size_limit=limit):
            pass
    evict.shrink(layout.root_of(tmp_path), limit)
    assert 0 < taken(tmp_path) <= limit + 16384
    assert usage(tmp_path).bytes <= limit
    assert clear(tmp_path) > 0
    assert usage(tmp_path).bytes == 0


async def test_many_sources_have_one_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """None of them writes enough to look after the limit by itself; and all of them make
    directories while what they evict leaves others empty."""
    limit = 640_000
    readers = [
        source(PlainSource(DATA), tmp_path, key=str(name), size_limit=limit) for name in range(100)
    ]
    for reader in readers:
        await reader.open()
    await asyncio.gather(*(reader.read(0, 4 * BLOCK) for reader in readers))
    await asyncio.gather(*(reader.aclose() for reader in readers))
    assert taken(tmp_path) <= limit * (1 + 2 / 32) + 32768
    assert sum(reader.stats.written_bytes > 0 for reader in readers) == len(readers)
    assert "cannot be written" not in caplog.text


async def test_looking_is_not_for_each_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes time for each file that there is."""
    looks = []
    monkeypatch.setattr(
        "aiouffd.sources.cache.writer.shrink", lambda *arguments: looks.append(arguments) or 0
    )
    for name in range(20):
        async with opened(PlainSource(DATA), tmp_path, key=str(name)) as reader:
            await reader.read(0, 10)
    assert len(looks) == 1
    # But if the limit is another one.
    async with opened(PlainSource(DATA), tmp_path, size_limit=1 << 30):
        pass
    assert len(looks) == 2
    # And each time as long as another process is at it, for it may have looked too early.
    monkeypatch.setattr(
        "aiouffd.sources.cache.writer.shrink", lambda *arguments: looks.append(arguments)
    )
    async with opened(PlainSource(DATA), tmp_path, size_limit=100_000) as reader:
        for offset in (0, 10 * BLOCK, 20 * BLOCK):
            await reader.read(offset, 2 * BLOCK)
    assert len(looks) >= 5


async def test_what_cannot_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a lock that cannot be taken nor one bad file is the end of evicting; and where
    nothing can be evicted nothing is written."""
    root = layout.root_of(tmp_path)
    await read_all(PlainSource(DATA), tmp_path, key="first")
    (root / layout.LOCK).unlink()
    (root / layout.LOCK / "in the way").mkdir(parents=True)
    (first,) = segments(tmp_path)
    stuck = first.with_name("00000001.seg")
    (stuck / "in the way").mkdir(parents=True)
    os.utime(stuck, (0, 0))
    async with opened(PlainSource(DATA), tmp_path, size_limit=400_000) as reader:
        await reader.read(0, len(DATA))
    assert not first.exists()
    assert "cannot be written" not in caplog.text
    (segment_now,) = (path for path in segments(tmp_path) if path.is_file())
    for limit in (1, 1):
        async with opened(PlainSource(DATA), tmp_path, key="more", size_limit=limit) as reader:
            await reader.read(0, len(DATA))
        assert not segment_now.exists()
        assert usage(tmp_path).bytes < 100_000
    assert "cannot be written" in caplog.text


async def test_what_is_in_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if all of it is read without waiting, which leaves no trace by itself."""
    monkeypatch.setattr(segment, "_TOUCH", 0.0)
    await read_all(PlainSource(DATA), tmp_path)
    async with opened(NoSource(DATA), tmp_path) as reader:
        await reader.read(0, len(DATA))
        (path,) = segments(tmp_path)
        os.utime(path, (5, 5))
        await reader.read(0, BLOCK)
        assert path.stat().st_mtime > 5


async def test_clocks_that_jump(tmp_path: Path) -> None:
    """What was last used in 2099, as the clock was then, is not kept for ever."""
    future = time.time() + 2e9
    await read_all(PlainSource(DATA), tmp_path, key="first")
    (first,) = segments(tmp_path)
    os.utime(first, (future, future))
    evict.shrink(layout.root_of(tmp_path), 1 << 30)
    assert first.stat().st_mtime < future
    await read_all(PlainSource(DATA), tmp_path, key="second", size_limit=450_000)
    assert not first.exists()
    assert segments(tmp_path)


async def test_what_was_seen_survives_eviction(tmp_path: Path) -> None:
    """Directories without segments are removed; who still fills them notes it again."""
    async with opened(Versioned(), tmp_path, version=None) as reader:
        clear(tmp_path)
        await reader.read(0, len(DATA))
    gone = Versioned()
    gone.error = transient()
    async with opened(gone, tmp_path, version=None, stale_ok=True) as reader:
        assert await reader.read(0, len(DATA)) == DATA


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


@pytest.mark.slow
def test_kill_at_each_step(tmp_path: Path) -> None:
    found = result_of(caching.kill_at_each_step, "asyncio", str(tmp_path), limit=120.0)
    assert found["killed"] > 100
    assert found["cached"] > found["killed"]


def test_fork_while_evicting(tmp_path: Path) -> None:
    """The child has the lock's descriptor, and keeps nobody from evicting."""
    asyncio.run(read_all(PlainSource(DATA), tmp_path))
    assert result_of(caching.forked_while_evicting, "asyncio", str(tmp_path)) == 0


def test_out_of_descriptors(tmp_path: Path) -> None:
    """Files that cannot be opened now are not thrown away."""
    whole = caching.data()

    async def fill() -> None:
        async with opened(PlainSource(whole), tmp_path) as reader:
            await reader.read(0, len(whole))

    asyncio.run(fill())
    outcome = run(caching.out_of_descriptors, "asyncio", str(tmp_path))
    assert outcome.status == 0, outcome.stderr
    assert outcome.result == [True] * 3


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


async def test_open_that_fails_late_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the source was opened, which is closed then."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    reader = source(FileSource(path), tmp_path / "c", version=None)
    with monkeypatch.context() as patch:
        patch.setattr("aiouffd.sources.cache.source._prepare", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await reader.open()
    await reader.open()
    assert await reader.read(0, len(DATA)) == DATA
    await reader.aclose()


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


@pytest.mark.slow
@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    found = result_of(torture.torture, loop_name, "cached", "anonymous", errors, 600, 5, limit=60.0)
    assert found["retries"] > 0
    if errors == "hard":
        assert found["refused"] == 0
