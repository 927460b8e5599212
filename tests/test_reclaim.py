"""Shared memory whose mappings went: by reclaim, by khugepaged, by swap, by MADV_DONTNEED.

The bytes are in the page cache still, and the kernel sends a minor fault for each page that is
touched. A whole block comes back with the first of them, without Python.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from tests.support import Counters, content

BLOCK = 16 * PAGE_SIZE
SIZE = 4 << 20
HUGE = 2 << 20
DATA = content(SIZE)
MADV_PAGEOUT, MADV_COLLAPSE = 21, 25

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def advise(region: aiouffd.Region, advice: int, offset: int = 0, length: int = SIZE) -> None:
    if libc.madvise(region.address + offset, length, advice):
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.EBUSY, errno.ENOMEM):
            pytest.skip(f"madvise {advice} of shared memory: {os.strerror(number)}")
        raise OSError(number, os.strerror(number))


@asynccontextmanager
async def filled(block_size: int = BLOCK) -> AsyncIterator[tuple[aiouffd.Region, list[int]]]:
    """Shared memory with all its bytes, and the offsets that were asked for."""
    asked: list[int] = []
    async with aiouffd.Pager() as pager:
        region = pager.map(SIZE, kind="memfd", block_size=block_size)

        @region.on_missing
        async def serve(fault: aiouffd.Fault) -> None:
            asked.append(fault.offset)
            fault.copy(DATA[fault.offset : fault.offset + fault.length])

        await asyncio.to_thread(read_through, region)
        yield region, asked


def read_through(region: aiouffd.Region) -> None:
    """One word of each page, by raw touches, in order."""
    view = region.view.cast("Q")
    step = PAGE_SIZE // view.itemsize
    found = [view[index] for index in range(0, len(view), step)]
    view.release()
    assert found == list(range(1, SIZE // 8 + 1, step))


@pytest.mark.parametrize("advice", [mmap.MADV_DONTNEED, MADV_PAGEOUT], ids=["dropped", "reclaimed"])
async def test_one_message_brings_a_block_back(advice: int) -> None:
    async with filled() as (region, asked):
        before = len(asked)
        advise(region, advice)
        counters = Counters()
        await asyncio.to_thread(read_through, region)
        # Reclaim leaves pages that were touched a moment ago, or are on their way elsewhere.
        assert counters["messages"] <= SIZE // BLOCK
        assert counters["continues"] <= SIZE // PAGE_SIZE // 8
        if advice == mmap.MADV_DONTNEED:
            assert counters["messages"] == counters["continues"] == SIZE // BLOCK
            assert counters["continued_bytes"] == SIZE
        assert len(asked) == before
        assert bytes(region.view) == DATA


async def test_part_of_a_block_that_was_written_to() -> None:
    """Pages that stayed mapped are left alone, and what was written is what comes back."""
    async with filled() as (region, asked):
        before = len(asked)
        region.view[3 * PAGE_SIZE : 3 * PAGE_SIZE + 3] = b"new"
        advise(region, mmap.MADV_DONTNEED, 0, 5 * PAGE_SIZE)
        advise(region, mmap.MADV_DONTNEED, 7 * PAGE_SIZE, 4 * PAGE_SIZE)
        counters = Counters()
        assert await asyncio.to_thread(bytes, region.view[:BLOCK]) == (
            DATA[: 3 * PAGE_SIZE] + b"new" + DATA[3 * PAGE_SIZE + 3 : BLOCK]
        )
        assert counters["messages"] == 1
        assert counters["continues"] == 2
        assert len(asked) == before


async def test_a_page_that_is_no_longer_in_the_cache_is_fetched_again() -> None:
    async with filled() as (region, asked):
        before = len(asked)
        advise(region, mmap.MADV_DONTNEED, 0, BLOCK)
        os_punch(region.fileno(), 5 * PAGE_SIZE, PAGE_SIZE)
        assert await asyncio.to_thread(bytes, region.view[:BLOCK]) == DATA[:BLOCK]
        assert asked[before:] == [0]


def os_punch(fd: int, offset: int, length: int) -> None:
    keep, punch = 1, 2
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    assert libc.fallocate(fd, keep | punch, offset, length) == 0


@pytest.fixture
def huge_shared_pages() -> Iterator[None]:
    """Shared memory may have huge pages, where it asks for them."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        before = switch.read_text().split("[")[1].split("]")[0]
        switch.write_text("advise")
    except OSError as error:
        pytest.skip(f"no huge pages for shared memory: {error}")
    yield
    switch.write_text(before)


@pytest.mark.needs_root
async def test_collapsed_to_huge_pages(huge_shared_pages: None) -> None:
    """As khugepaged does it, which takes the page tables away."""
    async with filled() as (region, asked):
        before = len(asked)
        start = -region.address % HUGE
        advise(region, mmap.MADV_HUGEPAGE)
        advise(region, MADV_COLLAPSE, start, HUGE)
        counters = Counters()
        await asyncio.to_thread(read_through, region)
        assert counters["messages"] <= SIZE // BLOCK
        assert len(asked) == before
        assert bytes(region.view) == DATA


async def test_threads_that_come_for_the_same_block() -> None:
    async with filled() as (region, asked):
        before = len(asked)
        for _ in range(20):
            advise(region, mmap.MADV_DONTNEED)
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                for _ in range(6):
                    group.create_task(asyncio.to_thread(read_through, region))
        assert len(asked) == before


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """Some swap space, unless that cannot be had."""
    path = tmp_path / "swap"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * SIZE)
    path.chmod(0o600)
    try:
        subprocess.run(["mkswap", path], check=True, capture_output=True)
        subprocess.run(["swapon", path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no swap: {error}")
    yield
    subprocess.run(["swapoff", path], check=True, capture_output=True)


def swapped_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found["SwapTotal"] - found["SwapFree"]


@pytest.mark.needs_root
async def test_swapped_out(swap: None) -> None:
    async with filled() as (region, asked):
        before = len(asked)
        advise(region, MADV_PAGEOUT)
        assert swapped_bytes() > 0
        counters = Counters()
        await asyncio.to_thread(read_through, region)
        assert counters["messages"] <= SIZE // BLOCK
        assert counters["continued_bytes"] > SIZE // 2
        assert len(asked) == before
        assert bytes(region.view) == DATA
