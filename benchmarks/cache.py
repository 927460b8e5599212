"""A second open, through the disk cache, against the same bytes in a local file.

The object is first read through the cache from a server (tests/servers/http.py, a process of its
own), until all of it is on the disk. Then it is opened again, which asks the server for the
version and for nothing else, and scanned. Everything is in the page cache by then: the figures
are what the library costs, not the disk. The cache verifies each block against its checksum at
each read.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiouffd
from aiouffd.sources.cache import CachedSource, clear

from .baseline.build import OUTPUT
from .baseline.uffd import PAGE, touch_all
from .common import REPEATS, Report, in_thread, warm_memory
from .scan import GIB, MIB
from .served import MARK, marked_file, wrong

SIZE = GIB // 2
#: Bytes of one read of those who read the file by themselves.
READ = MIB


async def _fill(url: str, folder: str) -> None:
    """Have all of the object in the cache."""
    while True:
        source = CachedSource(url, directory=folder)
        async with aiouffd.open(source) as buf:
            await in_thread(touch_all, buf.address, 0, SIZE // PAGE)
        # What came while the writer's queue was full was not stored.
        if not source.stats.fetched_bytes:
            return


async def first_scan(url: str, cache: str | None) -> float:
    """GiB/s of the first time, with a cache that is being filled meanwhile, or without any."""
    warm_memory(SIZE + SIZE // 4)
    if cache is not None:
        clear(cache)
    started = time.perf_counter()
    async with aiouffd.open(url, cache=cache) as buf:
        await in_thread(touch_all, buf.address, 0, SIZE // PAGE)
        return SIZE / (time.perf_counter() - started) / GIB


async def cached_scan(url: str, folder: str) -> float:
    """GiB/s of touching every page in order, opening included."""
    warm_memory(SIZE + SIZE // 4)
    source = CachedSource(url, directory=folder)
    started = time.perf_counter()
    async with aiouffd.open(source) as buf:
        await in_thread(touch_all, buf.address, 0, SIZE // PAGE)
        elapsed = time.perf_counter() - started
        if source.stats.fetched_bytes or source.stats.hit_bytes != SIZE:
            raise AssertionError("not all of it came from the cache")
        if found := await in_thread(wrong, buf.view, MARK):
            raise AssertionError(f"wrong bytes at {found[:4]}")
    return SIZE / elapsed / GIB


async def local_scan(path: Path) -> float:
    """The same of a lazy buffer over the file."""
    warm_memory(SIZE + SIZE // 4)
    started = time.perf_counter()
    async with aiouffd.open(path) as buf:
        await in_thread(touch_all, buf.address, 0, SIZE // PAGE)
        elapsed = time.perf_counter() - started
        if found := await in_thread(wrong, buf.view, MARK):
            raise AssertionError(f"wrong bytes at {found[:4]}")
    return SIZE / elapsed / GIB


async def read_scan(path: Path) -> float:
    """GiB/s of reading the file into fresh memory, and touching that."""
    warm_memory(SIZE + SIZE // 4)

    def read() -> float:
        started = time.perf_counter()
        with (
            path.open("rb", buffering=0) as file,
            mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
            memoryview(memory) as view,
        ):
            for at in range(0, SIZE, READ):
                file.readinto(view[at : at + READ])
            return SIZE / (time.perf_counter() - started) / GIB

    return await in_thread(read)


async def mapped_scan(path: Path) -> float:
    """GiB/s of touching every page of the mapped file."""

    def touch() -> float:
        started = time.perf_counter()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            address = _address(memory)
            touch_all(address, 0, SIZE // PAGE)
            return SIZE / (time.perf_counter() - started) / GIB

    return await in_thread(touch)


def _address(memory: mmap.mmap) -> int:
    import numpy

    return int(numpy.frombuffer(memory, dtype=numpy.uint8).ctypes.data)


def run(report: Report, loop: str, runner: Any) -> None:
    for package in ("aiohttp", "crc32c"):
        if importlib.util.find_spec(package) is None:
            report.skip(f"disk cache, {loop}", f"{package} is not installed")
            return
    from tests.servers.http import start_in_process

    with (
        marked_file(SIZE, sparse=False) as path,
        start_in_process({"/object": path}, record=False) as server,
        TemporaryDirectory(dir=OUTPUT, prefix="cache-") as folder,
    ):
        runner(_compare(report, loop, server.url("/object"), path, folder))


async def _compare(report: Report, loop: str, url: str, path: Path, folder: str) -> None:
    await _fill(url, folder)
    os.sync()  # nobody writes back while we measure
    cached = ("through the cache", lambda: cached_scan(url, folder))
    local: tuple[tuple[str, str, Callable[[Path], Awaitable[float]], float | None], ...] = (
        ("scan of 512 MiB, second open / the local file", "aiouffd, local file", local_scan, 0.8),
        ("  against reading it into fresh memory", "readinto, 1 MiB each", read_scan, None),
        ("  against the mapped file, which copies nothing", "mmap", mapped_scan, None),
    )
    for name, peer, scan, bar in local:
        await report.compare_async(
            f"{name}, {loop}",
            cached,
            (peer, lambda scan=scan: scan(path)),  # type: ignore[misc]
            unit="GiB/s",
            at_least=bar,
            repeats=REPEATS if bar else 3,
        )
    await report.compare_async(
        f"the first open, while the cache is filled / without a cache, {loop}",
        ("filling", lambda: first_scan(url, folder)),
        ("without", lambda: first_scan(url, None)),
        unit="GiB/s",
        repeats=3,
        warm_up=False,
    )
