"""(b, d) An object over HTTP: a cold scan of it, and the time to its first byte.

Against an eager download with the same client, aiohttp, into fresh memory. The server is
a process of its own; its object is a mapped file that stays in the page cache.
"""

from __future__ import annotations

import importlib.util
import mmap
import time
from collections.abc import Awaitable, Callable
from functools import partial

import aiouffd

from .baseline.uffd import PAGE, touch_all
from .common import Report, in_thread
from .scan import GIB, MIB
from .served import mark, serving, wrong

SIZE = GIB
#: What the eager client buffers before it pauses the socket; the lazy one has the same.
READ_BUFFER = 256 * 1024

# --- the lazy way ----------------------------------------------------------------------------


async def lazy_scan(url: str) -> float:
    """GiB/s of touching every page in order, opening and connecting included."""
    started = time.perf_counter()
    async with aiouffd.open(url) as buf:
        await in_thread(touch_all, buf.address, 0, SIZE // PAGE)
        elapsed = time.perf_counter() - started
        if found := await in_thread(wrong, buf.view, MIB):
            raise AssertionError(f"wrong bytes at {found[:4]}")
    return SIZE / elapsed / GIB


def first_byte(url: str, offset: int) -> Callable[[], Awaitable[float]]:
    async def run() -> float:
        """Milliseconds until a thread has the byte of an object that was not open before."""
        started = time.perf_counter()
        async with aiouffd.open(url) as buf:
            got = await in_thread(buf.__getitem__, offset)
            elapsed = time.perf_counter() - started
        if got != mark(offset)[0]:
            raise AssertionError(f"a wrong byte at {offset}")
        return elapsed * 1000

    return run


def first_byte_sync(url: str, offset: int) -> float:
    """The same in milliseconds for a program without a loop."""
    started = time.perf_counter()
    with aiouffd.sync.open(url) as buf:
        got = buf[offset]
        elapsed = time.perf_counter() - started
    if got != mark(offset)[0]:
        raise AssertionError(f"a wrong byte at {offset}")
    return elapsed * 1000


# --- the eager way ---------------------------------------------------------------------------


async def eager_copy(url: str, huge_pages: bool = False) -> float:
    """Seconds to download into fresh memory of the right size, chunk by chunk."""
    import aiohttp

    started = time.perf_counter()
    async with (
        aiohttp.ClientSession(read_bufsize=READ_BUFFER) as session,
        session.get(url) as response,
    ):
        with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            if huge_pages:
                memory.madvise(mmap.MADV_HUGEPAGE)
            at = 0
            # Unlike read() and iter_any() this joins nothing.
            async for chunk, _ in response.content.iter_chunks():
                memory[at : at + len(chunk)] = chunk
                at += len(chunk)
            elapsed = time.perf_counter() - started
            with memoryview(memory) as view:
                if at != SIZE or wrong(view, MIB):
                    raise AssertionError("wrong bytes in the eager download")
    return elapsed


async def eager_read(url: str) -> float:
    """Seconds of ``await response.read()``, which collects chunks and joins them."""
    import aiohttp

    started = time.perf_counter()
    async with (
        aiohttp.ClientSession(read_bufsize=READ_BUFFER) as session,
        session.get(url) as response,
    ):
        data = await response.read()
        elapsed = time.perf_counter() - started
    if len(data) != SIZE:
        raise AssertionError("the eager download is short")
    return elapsed


def _rate(download: Callable[[str], Awaitable[float]], url: str) -> Callable[[], Awaitable[float]]:
    async def run() -> float:
        return SIZE / await download(url) / GIB

    return run


def _milliseconds(
    download: Callable[[str], Awaitable[float]], url: str
) -> Callable[[], Awaitable[float]]:
    async def run() -> float:
        return await download(url) * 1000

    return run


# --- the comparisons -------------------------------------------------------------------------


async def _compare(report: Report, loop: str, url: str) -> None:
    async def lazy() -> float:
        return await lazy_scan(url)

    copy, read = ("eager download", eager_copy), ("await response.read()", eager_read)
    await report.compare_async(
        f"cold scan of 1 GiB over HTTP, {loop}",
        ("aiouffd", lazy),
        (copy[0], _rate(copy[1], url)),
        unit="GiB/s",
        at_least=1.2,
    )
    await report.compare_async(
        f"  against reading it into bytes, {loop}",
        ("aiouffd", lazy),
        (read[0], _rate(read[1], url)),
        unit="GiB/s",
        repeats=3,
        warm_up=False,
    )
    await report.compare_async(
        f"  against eager download into huge pages, {loop}",
        ("aiouffd", lazy),
        ("eager, huge pages", _rate(partial(eager_copy, huge_pages=True), url)),
        unit="GiB/s",
        repeats=3,
        warm_up=False,
    )
    for where, offset in (("first byte", 0), ("a byte in the middle", SIZE // 2)):
        await report.compare_async(
            f"time to {where} of 1 GiB over HTTP, {loop}",
            ("aiouffd", first_byte(url, offset)),
            (copy[0], _milliseconds(copy[1], url)),
            unit="ms",
            at_most=0.02,
        )


def run(report: Report, loop: str, runner) -> None:
    if importlib.util.find_spec("aiohttp") is None:
        report.skip("HTTP", "aiohttp is not installed: pip install aiohttp")
        return
    with serving(SIZE) as server:
        url = server.url("/object")
        runner(_compare(report, loop, url))
        if loop == "asyncio":  # the loop below is the library's own
            report.compare(
                "time to first byte of 1 GiB over HTTP, aiouffd.sync",
                ("aiouffd", lambda: first_byte_sync(url, 0)),
                ("eager download", lambda: runner(eager_copy(url)) * 1000),
                unit="ms",
                repeats=3,
                at_most=0.02,
            )
