"""Working sets: what is recorded, what a file of it keeps, and what bringing it saves."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd import SourceChangedError, SourceError, UsageError, WorkingSet
from aiouffd.fetch.workingset import Recording
from aiouffd.sources import BaseSource
from tests.servers.http import MODIFIED, Entry, RangeServer
from tests.support import ROOT, content, environment

BLOCK = 4096
BLOCKS = 200
SIZE = BLOCKS * BLOCK - 100
DATA = content(BLOCKS * BLOCK)[:SIZE]


class Counting(BaseSource):
    """Remembers what it was asked for, in order."""

    def __init__(self, version: str | None = "v1") -> None:
        self.version = version
        self.reads: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.delay = 0.0

    @property
    def size(self) -> int:
        return SIZE

    async def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        if self.error is not None:
            raise self.error
        if self.delay:
            await asyncio.sleep(self.delay)
        return DATA[offset : offset + length]

    def clone(self) -> Counting:
        return self


def opened(source: Any, **options: Any) -> aiouffd.LazyBuffer:
    return aiouffd.open(source, block_size=BLOCK, **options)


def touch(buf: aiouffd.LazyBuffer, blocks: list[int]) -> None:
    for block in blocks:
        at = min(block * BLOCK + 7, SIZE - 1)
        assert buf[at] == DATA[at]


def some_blocks(seed: int, count: int = 40) -> list[int]:
    return random.Random(seed).sample(range(BLOCKS), count)


def range_of(run: tuple[int, int]) -> range:
    return range(run[0], run[0] + run[1])


def of_blocks(blocks: list[int], **options: Any) -> WorkingSet:
    ranges = [(block * BLOCK, min(BLOCK, SIZE - block * BLOCK)) for block in blocks]
    return WorkingSet(ranges, **{"size": SIZE, "version": "v1", **options})


# ---------------------------------------------------------------------- recording


async def test_records_what_was_touched_in_order() -> None:
    """Sequential touches too, which readahead would have brought unseen."""
    blocks = [*some_blocks(1), *range(100, 130)]
    async with opened(Counting()) as buf:
        with buf.record() as recording:
            await asyncio.to_thread(touch, buf, blocks)
        found = recording.working_set()
        await asyncio.to_thread(touch, buf, [3, 4, 5, 6, 7, 8, 9])
        assert recording.working_set() == found
    assert found == of_blocks(list(dict.fromkeys(blocks)))
    assert found.source == "Counting"
    assert not found.is_stale("v1", SIZE)


@pytest.mark.filterwarnings("ignore::aiouffd.BlockingTouchWarning")
async def test_records_every_way_to_need_a_block() -> None:
    async with opened(Counting()) as buf:
        with buf.record() as recording:
            await buf.fetch(5 * BLOCK, 1)
            await buf.read(2 * BLOCK + 10, BLOCK)
            async with buf.pin(9 * BLOCK, 10):
                pass
            touch(buf, [1])  # on the loop's thread: the rescue loop brings it
            await asyncio.to_thread(buf.find, DATA[-8:], SIZE - 20)
    assert recording.working_set() == of_blocks([5, 2, 3, 9, 1, BLOCKS - 1])


async def test_two_threads_at_once() -> None:
    parts = [some_blocks(seed, 80) for seed in (1, 2, 3)]
    async with opened(Counting()) as buf:
        with buf.record() as recording:
            await asyncio.gather(*(asyncio.to_thread(touch, buf, part) for part in parts))
    found = {block for run in recording.working_set().blocks(BLOCK) for block in range_of(run)}
    assert found == {*parts[0], *parts[1], *parts[2]}


async def test_one_at_a_time_and_not_of_memory() -> None:
    async with opened(Counting()) as buf:
        with buf.record(), pytest.raises(UsageError):
            buf.record()
        buf.record().stop()
    async with aiouffd.open(DATA) as buf:
        with pytest.raises(UsageError):
            buf.record()


# ------------------------------------------------------------------------- replay


async def test_prefetch_brings_it_all(tmp_path: Path) -> None:
    blocks = some_blocks(4)
    of_blocks(blocks).save(tmp_path / "set")
    source = Counting()
    async with opened(source, prefetch=tmp_path / "set") as buf:
        limit = asyncio.get_running_loop().time() + 10
        while len(buf.resident()) < len(of_blocks(sorted(blocks)).ranges):
            assert asyncio.get_running_loop().time() < limit
            await asyncio.sleep(0.001)
        fetched = buf.stats.fetched_bytes
        await asyncio.to_thread(touch, buf, blocks)
        assert buf.stats.fetched_bytes == fetched
        assert buf.stats.faulted_blocks == 0
        # Neighbours came together.
        assert sum(length for _, length in source.reads) == of_blocks(blocks).total
        assert len(source.reads) <= len(of_blocks(sorted(blocks)).ranges)


async def test_prefetch_comes_after_what_somebody_waits_for() -> None:
    source = Counting()
    source.delay = 0.002
    async with opened(source) as buf:
        every_second = of_blocks(list(range(0, BLOCKS, 2)))
        bringing = asyncio.ensure_future(buf.prefetch(every_second))
        await asyncio.sleep(0)
        await asyncio.to_thread(touch, buf, [BLOCKS - 1])
        place = [offset // BLOCK for offset, _ in source.reads].index(BLOCKS - 1)
        assert place <= 32
        assert await bringing
        assert buf.resident(0, BLOCK)


async def test_stale_sets_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_blocks([1, 2], version="v0").save(tmp_path / "set")
    source = Counting()
    async with opened(source, prefetch=tmp_path / "set") as buf:
        assert "version v0" in caplog.text
        with pytest.raises(SourceChangedError):
            await buf.prefetch(of_blocks([1], version="v0"))
        with pytest.raises(SourceChangedError):
            await buf.prefetch(WorkingSet([], size=SIZE + 1))
        assert not source.reads
    # Where nobody knows versions, the size has to do.
    async with opened(Counting(None), prefetch=of_blocks([1], version="v0")) as buf:
        assert await buf.prefetch(of_blocks([1], version="v0"))


async def test_prefetch_from_a_source_that_fails() -> None:
    source = Counting()
    async with opened(source) as buf:
        source.error = SourceError("down")
        assert not await buf.prefetch(of_blocks(list(range(0, BLOCKS, 2))))
        assert len(source.reads) < BLOCKS // 2
        source.error = None
        await asyncio.to_thread(touch, buf, [0, 2, 4])
        assert await buf.prefetch(of_blocks(list(range(BLOCKS))))
        assert buf.resident() == [(0, SIZE)]


async def test_close_in_the_middle() -> None:
    source = Counting()
    source.delay = 60
    async with opened(source, prefetch=of_blocks(list(range(0, BLOCKS, 2)))):
        await asyncio.sleep(0)


def test_sync(tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(DATA)
    with aiouffd.sync.open(str(tmp_path / "object"), block_size=BLOCK) as buf:
        with buf.record() as recording:
            assert buf[5 * BLOCK] == DATA[5 * BLOCK]
        found = recording.working_set()
    assert found.ranges == ((5 * BLOCK, BLOCK),)
    with aiouffd.sync.open(str(tmp_path / "object"), block_size=BLOCK) as buf:
        assert buf.prefetch(found)
        assert buf.resident() == [(5 * BLOCK, 6 * BLOCK)]


async def test_over_http(tmp_path: Path) -> None:
    async with RangeServer({"/a": Entry(memoryview(DATA))}) as server:
        url = server.url("/a") + "?signature=secret"
        server.objects["/a?signature=secret"] = server.objects["/a"]
        async with opened(url) as buf:
            with buf.record() as recording:
                await asyncio.to_thread(touch, buf, some_blocks(5))
        found = recording.working_set()
        assert found.version == f'"v1" {formatdate(MODIFIED, usegmt=True)}'
        assert b"secret" not in found.to_bytes()
        async with opened(url.replace("//", "//user:geheim@")) as buf:
            with buf.record() as recording:
                pass
        assert recording.working_set().source == server.url("/a") + "?..."
        async with opened(url) as buf:
            before = server.counts.requests
            assert await buf.prefetch(found)
            assert server.counts.requests - before < len(some_blocks(5))
            await asyncio.to_thread(touch, buf, some_blocks(5))


# -------------------------------------------------------------- the set, its files


SETS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), max_size=30)


def members(working_set: WorkingSet) -> list[int]:
    return [n for run in working_set.ranges for n in range_of(run)]


def in_order(*lists: list[tuple[int, int]]) -> list[int]:
    """The oracle: every number once, where it came first."""
    numbers = (
        n for ranges in lists for start, count in ranges for n in range(start, start + count)
    )
    return list(dict.fromkeys(numbers))


@settings(max_examples=200, deadline=None)
@given(SETS, SETS)
def test_sets_against_lists(one: list[tuple[int, int]], two: list[tuple[int, int]]) -> None:
    first, second = WorkingSet(one, size=360), WorkingSet(two, size=360)
    assert members(first) == in_order(one)
    assert first.total == len(in_order(one))
    assert members(first | second) == in_order(one, two)
    assert members(first & second) == [n for n in in_order(one) if n in set(in_order(two))]
    assert WorkingSet.from_bytes(first.to_bytes()) == first
    for block_size in (1, 16, 512):
        found = {
            n for start, count in first.blocks(block_size) for n in range(start, start + count)
        }
        assert found == {n // block_size for n in members(first)}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files(data: st.DataObject) -> None:
    """A clear error, or the very same set."""
    whole = of_blocks(some_blocks(6), source="x")
    changed = bytearray(whole.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(len(changed) - 5, len(changed)))]
    try:
        found = WorkingSet.from_bytes(bytes(changed))
    except UsageError:
        return
    # The name, version and size are for comparison; the ranges are sealed.
    assert found.ranges == whole.ranges


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"aiouffd working set 1\n", b"aiouffd working set 1\n{}\n",
     b"aiouffd working set 2\n{}\n", b'aiouffd working set 1\n[1]\n',
     b"aiouffd working set 1\n" + b"[" * 60_000],
)  # fmt: skip
def test_what_is_no_working_set(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(data)
    with pytest.raises(UsageError):
        WorkingSet.load(tmp_path / "set")
    with pytest.raises(UsageError):
        aiouffd.open(b"", prefetch=tmp_path / "set")


def test_wrong_ranges_and_mixed_versions() -> None:
    for wrong in ((-1, 5), (0, SIZE + 1), (5, -1)):
        with pytest.raises(UsageError):
            WorkingSet([wrong], size=SIZE)
    with pytest.raises(UsageError):
        of_blocks([1]) | of_blocks([1], version="v2")
    with pytest.raises(FileNotFoundError):
        WorkingSet.load("/nothing/like/that")


def test_a_version_is_not_lost() -> None:
    unknown, known = of_blocks([1], version=None), of_blocks([1, 2])
    for one, two in ((unknown, known), (known, unknown)):
        assert (one | two).version == (one & two).version == "v1"
        assert (one | two).is_stale("v2", SIZE)


def test_many_ranges() -> None:
    """Of an object of a terabyte, touched all over, each one and a half blocks into the next."""
    blocks = random.Random(1).sample(range(1 << 24), 20_000)
    size = (1 << 40) + (1 << 17)
    found = WorkingSet(((block << 16, 1 << 17) for block in blocks), size=size)
    assert members_of(found) == {block + more for block in blocks for more in (0, 1)}
    assert found.total == len(members_of(found)) << 16
    assert (found | found) == (found & found) == found


def members_of(working_set: WorkingSet) -> set[int]:
    return {block for run in working_set.blocks(1 << 16) for block in range_of(run)}


def test_small() -> None:
    """A few bytes for each range."""
    scattered = of_blocks(random.Random(1).sample(range(BLOCKS), BLOCKS))
    assert len(scattered.to_bytes()) < 200 + 6 * BLOCKS


# ---------------------------------------------------------------- the command line


PROGRAM = """
import sys, aiouffd
with aiouffd.sync.open(sys.argv[1], block_size=4096) as buf:
    for block in map(int, sys.argv[2:]):
        buf[block * 4096]
with aiouffd.sync.open(__file__) as other:
    other[0]
sys.exit(3)
"""


def record(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "aiouffd", "record", *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_record_command(tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(DATA)
    (tmp_path / "program.py").write_text(PROGRAM)
    source, target = str(tmp_path / "object"), tmp_path / "set"
    done = record(source, str(target), str(tmp_path / "program.py"), source, "7", "3", "150")
    assert done.returncode == 3, done.stderr
    assert "12 KiB of" in done.stderr
    assert [start // 4096 for start, _ in WorkingSet.load(target).ranges] == [7, 3, 150]
    done = record("nobody opens this", str(target), str(tmp_path / "program.py"), source)
    assert done.returncode == 2
    assert "opened no lazy buffer" in done.stderr
    done = record(source, str(target), str(tmp_path / "missing.py"))
    assert done.returncode == 2


# ------------------------------------------------------------------------- copies


def copy_of(path: Path, where: Path) -> Path:
    """As rsync -a makes it: same bytes, size and times, another file."""
    where.mkdir()
    return Path(shutil.copy2(path, where / path.name))


async def brought(source: Any, **options: Any) -> list[tuple[int, int]]:
    """What is resident once bringing it ahead has ended."""
    async with opened(source, readahead=0, **options) as buf:
        task = buf._sink._prefetching  # type: ignore[union-attr]
        if task is not None:
            await task
        return buf.resident()


async def test_a_working_set_of_a_copy_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "memory"
    path.write_bytes(DATA)
    blocks = [9, 10, 3]
    async with opened(path, readahead=0) as buf:
        with buf.record() as recording:
            await asyncio.to_thread(touch, buf, blocks)
    recording.working_set().save(tmp_path / "set")
    expected = [(3 * BLOCK, 4 * BLOCK), (9 * BLOCK, 11 * BLOCK)]
    assert await brought(path, prefetch=tmp_path / "set") == expected
    assert not caplog.records

    copy = copy_of(path, tmp_path / "other")
    assert await brought(copy, prefetch=tmp_path / "set") == []
    assert 'prefetch_version="any"' in caplog.text, "who looks for it is told what to do"
    caplog.clear()
    options = {"prefetch": tmp_path / "set", "prefetch_version": "any"}
    assert await brought(copy, **options) == expected
    copies = recording.working_set().for_copies()
    assert await brought(copy, prefetch=copies) == expected
    assert copies.version is None
    assert copies.source == recording.working_set().source

    copy.write_bytes(DATA + b"x")
    assert await brought(copy, **options) == [], "which is no copy"
    assert "bytes" in caplog.text
    assert "any" not in caplog.text
    with pytest.raises(UsageError, match="prefetch_version"):
        aiouffd.open(copy, prefetch_version="other")  # type: ignore[arg-type]


async def test_prefetching_by_hand_says_what_to_do(tmp_path: Path) -> None:
    async with opened(Counting("v2"), readahead=0) as buf:
        with pytest.raises(SourceChangedError, match=r"for_copies\(\)"):
            await buf.prefetch(of_blocks([1]))
        assert await buf.prefetch(of_blocks([1]).for_copies())
        assert buf.resident() == [(BLOCK, 2 * BLOCK)]


# ------------------------------------------------------------------------- bounds


def file_of(body: bytes, **head: Any) -> bytes:
    fields = {
        "source": "", "version": None, "size": SIZE, "ranges": 0, "bytes": 0,
        "crc32": zlib.crc32(body), **head,
    }  # fmt: skip
    text = json.dumps(fields).encode()
    return b"aiouffd working set 1\n" + text + b"\n" + zlib.compress(body, 9)


@pytest.mark.parametrize("claimed", [100, 1 << 18, 1 << 25])
def test_a_small_file_does_not_become_a_large_one(claimed: int) -> None:
    """Decompressed it has thirty million ranges."""
    data = file_of(b"\x04\x01" * (1 << 25), size=1 << 62, ranges=claimed, bytes=claimed)
    assert len(data) < 100_000
    tracemalloc.start()
    try:
        before = time.thread_time()
        with pytest.raises(UsageError):
            WorkingSet.from_bytes(data)
        assert time.thread_time() - before < 5
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


def test_bounds_of_files(tmp_path: Path) -> None:
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.write(b"aiouffd working set 1\n")
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="at most"):
        WorkingSet.load(path)
    for head in ({"size": 1 << 63}, {"size": 10**4000}, {"bytes": -1}, {"version": ["x"]}):
        with pytest.raises(UsageError):
            WorkingSet.from_bytes(file_of(b"", **head))
    with pytest.raises(UsageError):
        WorkingSet.from_bytes(b"aiouffd working set 1\n" + b"[" * 100_000)
    many = ((2 * number, 1) for number in range((1 << 18) + 1))
    with pytest.raises(UsageError, match="at most"):
        WorkingSet(many, size=1 << 40)


def test_the_most_ranges_there_may_be(tmp_path: Path) -> None:
    most = WorkingSet([(4 * number, 3) for number in range(1 << 18)], size=1 << 30)
    most.save(tmp_path / "set")
    assert WorkingSet.load(tmp_path / "set") == most


def test_a_recording_of_too_many_is_kept_in_larger_pieces() -> None:
    count = (1 << 18) + 10
    blocks = dict.fromkeys(range(0, 4 * count, 4))
    size = 4 * count * BLOCK
    recording = Recording(blocks, BLOCK, source="", version="1", size=size, stop=lambda: None)
    found = recording.working_set()
    assert len(found.ranges) <= 1 << 18
    needed = WorkingSet([(block * BLOCK, BLOCK) for block in list(blocks)[::1000]], size=size)
    assert (found & needed).total == needed.total


@pytest.mark.parametrize(
    "body",
    [
        b"\x00\x05\x00\x05",  # touching
        b"\x14\x05\x0d\x05",  # overlapping
        b"\x01\x05",  # before the beginning
        b"\x00\x00",
        b"\x80" * 20,
        b"\x00",
    ],
)
def test_ranges_that_cannot_be(body: bytes) -> None:
    for count in (1, 2):
        for total in (5, 10):
            with pytest.raises(UsageError):
                WorkingSet.from_bytes(file_of(body, ranges=count, bytes=total, size=100))
