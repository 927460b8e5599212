"""Sources made of sources: retry, checksums, slices, concatenations."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd.errors import ClosedError, ShortReadError, SourceChangedError, SourceError, UsageError
from aiouffd.sources.base import (
    BaseSource,
    aclose_source,
    check_length,
    holes_in_source,
    open_source,
    own_method,
    read_into_source,
    stream_source,
)
from aiouffd.sources.compose import (
    ChecksumError,
    ChecksumSource,
    ConcatSource,
    Manifest,
    RetrySource,
    SliceSource,
    retry,
)
from aiouffd.sources.compose.checksum import ALGORITHMS
from aiouffd.sources.memory import MemorySource
from tests.faulty import FailingSource, FullSource, PlainSource, final, transient
from tests.scenarios import torture
from tests.support import result_of

DATA = random.Random(5).randbytes(300_001)


class Noted(FullSource):
    """Notes what was called; has holes and can be written to."""

    def __init__(self, data: bytes = DATA, version: str | None = "one") -> None:
        super().__init__(data)
        self.version = version
        self.events: list[str] = []
        self.written: list[tuple[int, bytes]] = []

    async def open(self) -> None:
        self.events.append("open")

    async def aclose(self) -> None:
        self.events.append("close")

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(offset + 1, length - 2)] if length > 2 else []

    async def write(self, offset: int, data: Any) -> None:
        self.written.append((offset, bytes(data)))

    async def flush(self) -> None:
        self.events.append("flush")

    def clone(self) -> Noted:
        return Noted(self.data, self.version)


class Final(Noted):
    """As most sources: what was closed stays closed."""

    failures = 0

    async def open(self) -> None:
        if "close" in self.events:
            raise ClosedError("closed before")
        if self.failures:
            self.failures -= 1
            raise transient()
        await super().open()

    def clone(self) -> Final:
        return Final(self.data, self.version)


class Unopenable(Noted):
    async def open(self) -> None:
        raise final()


async def all_ways(source: Any, offset: int, length: int) -> set[bytes]:
    """The same range by each method there is."""
    buffer = bytearray(length)
    await read_into_source(source, offset, memoryview(buffer))
    chunks = [bytes(chunk) async for chunk in stream_source(source, offset, length)]
    data = check_length(await source.read(offset, length), length)
    return {bytes(data), bytes(buffer), b"".join(chunks)}


async def oracle(source: Any, data: bytes) -> None:
    chance = random.Random(11)
    assert source.size == len(data)
    for _ in range(20):
        offset = chance.randrange(len(data))
        length = min(chance.choice([1, 100, 70_000, len(data)]), len(data) - offset)
        assert await all_ways(source, offset, length) == {data[offset : offset + length]}


# ----------------------------------------------------------------------- slice


async def test_slice() -> None:
    inner = Noted()
    part = SliceSource(inner, 1000, 200_000)
    await part.open()
    await oracle(part, DATA[1000:201_000])
    assert await holes_in_source(part, 5, 10) == ((6, 8),)
    await part.write(3, b"abc")
    await part.flush()
    assert inner.written == [(1003, b"abc")]
    await oracle(part.clone(), DATA[1000:201_000])
    await part.aclose()
    assert inner.events == ["open", "flush", "close"]
    assert part.version == "one"


async def test_slice_to_the_end() -> None:
    part = SliceSource(DATA, 77)
    await part.open()
    await oracle(part, DATA[77:])


async def test_slice_outside() -> None:
    with pytest.raises(UsageError):
        SliceSource(DATA, -1)
    inner = Noted()
    with pytest.raises(UsageError):
        await SliceSource(inner, len(DATA) - 10, 11).open()
    assert inner.events == ["open", "close"]
    holes = SliceSource(Noted(), 10, 10)
    await holes.open()
    with pytest.raises(UsageError):
        await holes_in_source(holes, 5, 6)
    part = SliceSource(DATA, 10, 10)
    await part.open()
    for call in (part.read(5, 6), part.read_into and part.read_into(5, memoryview(bytearray(6)))):
        if call:
            with pytest.raises(UsageError):
                await call


def test_optional_methods_are_those_inside() -> None:
    plain = SliceSource(PlainSource(DATA), 0)
    for name in ("stream", "read_into", "holes", "write", "flush"):
        assert own_method(plain, name) is None
    full = SliceSource(Noted(), 0)
    for name in ("stream", "holes", "write", "flush"):
        assert own_method(full, name) is not None


# ---------------------------------------------------------------------- concat


async def test_concat() -> None:
    cuts = [0, 1, 1, 70_000, 200_000, len(DATA)]
    pieces = [DATA[a:b] for a, b in itertools.pairwise(cuts)]
    source = ConcatSource([Noted(piece) if piece else piece for piece in pieces])
    await source.open()
    assert list(source.starts) == cuts
    await oracle(source, DATA)
    twin = source.clone()
    await twin.open()
    await oracle(twin, DATA)
    await source.aclose()


async def test_concat_holes_and_writes() -> None:
    left, right = Noted(DATA[:100]), Noted(DATA[100:])
    source = ConcatSource([left, right])
    await source.open()
    assert await source.holes(90, 20) == [(91, 8), (101, 8)]
    await source.write(98, b"abcd")
    assert (left.written, right.written) == ([(98, b"ab")], [(0, b"cd")])
    await source.flush()
    assert left.events == right.events == ["open", "flush"]
    assert source.version
    other = ConcatSource([Noted(DATA[:100]), Noted(DATA[100:], "two")])
    await other.open()
    assert other.version not in (None, source.version)


async def test_concat_versions_of_any_kind() -> None:
    """Whoever writes versions with line breaks in them makes no two lists look alike."""
    found = set()
    for one, two in (("a", "b\n1 c"), ("a\n1 b", "c"), ("a", "b"), ("b", "a"), ("", "ab")):
        source = ConcatSource([Noted(b"x", one), Noted(b"y", two)])
        await source.open()
        found.add(source.version)
    assert len(found) == 5


async def test_concat_closes_what_it_opened_when_one_fails() -> None:
    parts = [Noted(), Unopenable(), Noted()]
    with pytest.raises(SourceError):
        await ConcatSource(parts).open()
    assert parts[0].events == parts[2].events == ["open", "close"]
    with pytest.raises(UsageError):
        ConcatSource([])


async def test_open_again_after_a_failure() -> None:
    """What was opened before something else failed is closed, and opened again the next time."""
    parts = [Final(DATA[:1000]), Final(DATA[1000:])]
    parts[1].failures = 2
    source = RetrySource(SliceSource(ConcatSource(parts), 5), first=0.001)
    await source.open()
    await oracle(source, DATA[5:])
    assert parts[0].events == ["open", "close"]
    await source.aclose()
    assert parts[1].events == ["open", "close"]

    manifest = await Manifest.make(MemorySource(DATA), block_size=4096, algorithm="crc32")
    cases: list[tuple[Any, type[Exception]]] = [
        (SliceSource(Final(), len(DATA) + 1), UsageError),
        (ChecksumSource(Final(DATA[:-1]), manifest), SourceChangedError),
    ]
    for wrong, error in cases:
        for _ in range(2):
            with pytest.raises(error):
                await wrong.open()


async def test_concat_leaves_no_reader_behind() -> None:
    """When one part fails nobody writes to the buffer any more."""
    begun, ended = asyncio.Event(), asyncio.Event()

    class Slow(BaseSource):
        size = 10

        async def read_into(self, offset: int, buffer: memoryview) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

    class Bad(BaseSource):
        size = 10

        async def read_into(self, offset: int, buffer: memoryview) -> None:
            await begun.wait()
            raise final()

    with pytest.raises(SourceError):
        await ConcatSource([Slow(), Bad()]).read_into(0, memoryview(bytearray(20)))
    assert ended.is_set()


# ----------------------------------------------------------------------- retry


async def test_retry() -> None:
    source = RetrySource(FailingSource(DATA, 3, transient), first=0.001)
    assert bytes(await source.read(5, 10)) == DATA[5:15]
    assert source.retries == 3


async def test_retry_in_the_middle_of_a_stream() -> None:
    inner = FullSource(DATA)
    failed: list[int] = []

    async def once(offset: int, length: int) -> None:
        if offset > 100_000 and not failed:
            failed.append(offset)
            raise transient()

    inner.script = once
    source = RetrySource(inner, first=0.001)
    assert b"".join([bytes(c) async for c in stream_source(source, 0, len(DATA))]) == DATA
    # What had arrived was not asked for again.
    assert inner.bytes_read < len(DATA) + inner.piece + 1
    assert failed


async def test_retry_of_a_stream_that_breaks_all_the_time() -> None:
    """As long as it makes progress it uses up neither budget nor reserve."""
    inner = FullSource(DATA)
    inner.piece = 1000
    broken: set[int] = set()

    async def each_once(offset: int, length: int) -> None:
        if offset not in broken:
            broken.add(offset)
            raise transient()

    inner.script = each_once
    source = RetrySource(inner, first=0.0001, longest=0.0002, budget=0.5, reserve=5)
    assert b"".join([bytes(c) async for c in stream_source(source, 0, len(DATA))]) == DATA
    assert source.retries == 301


async def test_retry_counts_from_the_first_try() -> None:
    """A try that took longer than the budget was the last one."""
    clock = [1000.0]

    async def slow(offset: int, length: int) -> None:
        clock[0] += 50
        raise transient()

    inner = PlainSource(DATA, slow)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        source = RetrySource(inner, first=0.001, budget=60)
        for tries in (2, 4):
            with pytest.raises(SourceError, match="noisy"):
                await source.read(0, 1)
            assert len(inner.reads) == tries


async def test_retry_pauses_no_longer_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(retry, "asyncio", SimpleNamespace(sleep=sleep))
    source = RetrySource(FailingSource(DATA, 99, transient), first=0.5, longest=1.0, budget=1e9)
    await source.read(0, 1)
    assert len(pauses) == 99
    assert 0.25 <= pauses[0] <= 0.75
    assert all(0.5 <= pause <= 1.0 for pause in pauses[2:])


async def test_retry_gives_up() -> None:
    for error in (final, lambda: SourceChangedError("another")):
        source = RetrySource(FailingSource(DATA, 3, error), first=0.001)
        with pytest.raises(SourceError):
            await source.read(0, 1)
        assert source.retries == 0
    dead = RetrySource(FailingSource(DATA, 10**6, transient), first=0.001, budget=0.05)
    with pytest.raises(SourceError, match="noisy"):
        await dead.read(0, 1)
    assert dead.retries > 0
    # All readers of a dead source together, not each of them.
    spent = RetrySource(
        FailingSource(DATA, 10**6, transient), first=0.001, longest=0.001, reserve=20
    )
    found = await asyncio.gather(*(spent.read(0, 1) for _ in range(50)), return_exceptions=True)
    assert all(isinstance(error, SourceError) for error in found)
    assert 20 <= spent.retries < 40


async def test_retry_obeys_retry_after() -> None:
    error = SourceError("busy", retry_after=3600)
    source = RetrySource(FailingSource(DATA, 1, lambda: error), first=0.001)
    with pytest.raises(SourceError, match="busy"):
        await source.read(0, 1)


async def test_retry_obeys_retry_after_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(retry, "asyncio", SimpleNamespace(sleep=sleep))
    error = SourceError("busy", retry_after=3600)
    source = RetrySource(FailingSource(DATA, 1, lambda: error), budget=1e9)
    await source.read(0, 1)
    assert pauses == [60]


# ------------------------------------------------------------------- checksums


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
async def test_checksums(algorithm: str, tmp_path: Path) -> None:
    manifest = await Manifest.make(MemorySource(DATA), block_size=5000, algorithm=algorithm)
    path = tmp_path / "m"
    manifest.save(path)
    assert os.listdir(tmp_path) == ["m"]
    assert Manifest.load(path) == manifest
    source = ChecksumSource(PlainSource(DATA), path)
    await source.open()
    executor = source._executor
    await source.open()
    assert source._executor is executor
    await oracle(source, DATA)
    assert source.bad_blocks == 0
    await source.aclose()


class Corrupting(PlainSource):
    """Flips a bit of one byte, so many times."""

    def __init__(self, at: int, times: int) -> None:
        super().__init__(DATA, self._script)  # type: ignore[arg-type]
        self.at, self.left = at, times

    async def _script(self, offset: int, length: int) -> bytes | None:
        if not offset <= self.at < offset + length or not self.left:
            return None
        self.left -= 1
        data = bytearray(DATA[offset : offset + length])
        data[self.at - offset] ^= 4
        return bytes(data)


async def test_a_bad_block_is_fetched_again() -> None:
    manifest = await Manifest.make(MemorySource(DATA), block_size=4096, algorithm="blake2b")
    inner = Corrupting(100_000, 2)
    source = ChecksumSource(inner, manifest, refetch=2)
    await source.open()
    assert bytes(await source.read(0, len(DATA))) == DATA
    # Only that block.
    assert inner.reads[1:] == [(98304, 4096)] * 2
    inner.left = 99
    with pytest.raises(ChecksumError) as caught:
        await source.read(99_000, 1)
    assert not caught.value.transient
    await source.aclose()


async def test_holes_are_verified_too() -> None:
    """A hole that the manifest knows nothing of is read, and found to be wrong."""
    whole = bytearray(DATA)
    whole[8192:20_480] = bytes(12_288)
    manifest = await Manifest.make(MemorySource(bytes(whole)), block_size=4096, algorithm="crc32")

    class Lying(FullSource):
        async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
            return [(offset, length)]

    source = ChecksumSource(Lying(bytes(whole)), manifest)
    await source.open()
    assert await holes_in_source(source, 0, len(DATA)) == ((8192, 12_288),)
    # Only whole blocks can be told.
    assert await holes_in_source(source, 8193, 8191) == ((12_288, 4096),)
    await source.aclose()


async def test_manifest_from_a_source() -> None:
    manifest = await Manifest.make(MemorySource(DATA), block_size=4096, algorithm="crc32")
    assert await Manifest.fetch(manifest.to_bytes()) == manifest
    with pytest.raises(UsageError):
        await Manifest.fetch(DATA)
    deep = b"aiouffd-manifest 1\n" + b"[" * 100_000
    with pytest.raises(UsageError):
        Manifest.from_bytes(deep + hashlib.sha256(deep).digest())


async def test_a_bad_block_is_never_installed() -> None:
    manifest = await Manifest.make(MemorySource(DATA), block_size=4096, algorithm="crc32c")
    source = ChecksumSource(Corrupting(100_000, 10**6), manifest)
    async with aiouffd.open(source, block_size=4096, readahead=0, errors="soft") as buf:
        assert await asyncio.to_thread(buf.__getitem__, 5) == DATA[5]
        with pytest.raises(SourceError):
            await asyncio.to_thread(buf.__getitem__, 100_001)
        assert buf.resident() == [(0, 4096)]


async def test_a_manifest_of_something_else() -> None:
    manifest = await Manifest.make(Noted(), block_size=4096, algorithm="crc32")
    assert manifest.version == "one"
    for other in (Noted(version="two"), Noted(DATA[:-1])):
        with pytest.raises(SourceChangedError):
            await ChecksumSource(other, manifest).open()
        assert other.events == ["open", "close"]
    short = ChecksumSource(PlainSource(DATA), manifest)
    await short.open()
    short.inner.data = DATA[:-1]  # type: ignore[attr-defined]
    with pytest.raises((SourceError, UsageError, ShortReadError)):
        await short.read(len(DATA) - 10, 10)
    await short.aclose()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_manifests(data: st.DataObject) -> None:
    good = Manifest(10_000, 4096, "crc32", b"abcdefghijkl", "v").to_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    bad = {
        "flip": good[:at] + bytes([good[at] ^ 0x11]) + good[at + 1 :],
        "cut": good[:at],
        "grow": good + b"x",
    }[kind]
    with pytest.raises(UsageError):
        Manifest.from_bytes(bad)


# --------------------------------------------------------------------- torture


@pytest.mark.slow
@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    found = result_of(
        torture.torture, loop_name, "composed", "anonymous", errors, 600, 3, limit=60.0
    )
    assert found["retries"] > 0
    if errors == "hard":
        assert found["refused"] == 0


async def test_nested_close_is_idempotent() -> None:
    source = RetrySource(SliceSource(ConcatSource([Noted(), Noted()]), 5, 10))
    await open_source(source)
    await aclose_source(source)
    await aclose_source(source)
