"""An object of a store, by s3://: a cold scan of it, and what random touches cost in bytes.

The server is our own (tests/servers/http.py) on loopback, in a process of its own, and answers
what obstore's S3 client asks for reading: HEAD and GET with Range, If-Match and ETag; it does not
look at signatures, and requests are not signed. moto would be ten times slower than either side,
and both would measure moto. Bytes are counted by the server: those of all bodies, readahead that
was in vain and the question for the size included.

The scan's peer is what obstore itself does to have an object in memory: ranges, many at a time,
kept in the buffers that obstore makes. Of all lengths and numbers of ranges those in `SETTINGS`
were the fastest: the shorter ones with memory that is new, the longer ones with memory that the
allocator has kept. (Joined to one piece of memory, as the lazy buffer is, it is slower; that is
measured too.) Both begin with memory that is new to the process, as a program does that loads an
object: what the allocator has kept of the run before is given back.

The table of random touches compares with files of fsspec over plain HTTP, with the same client
below both, aiohttp.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy

import aiouffd

from .baseline.uffd import PAGE, touch_all
from .common import Comparison, Report, in_thread, warm_memory
from .scan import GIB, MIB
from .served import MARK, mark, serving, wrong

SIZE = GIB // 2
#: Lengths of the peer's ranges, and how many of them at a time.
SETTINGS = ((2 * MIB, 4), (8 * MIB, 8))
#: The object that is touched at random, and how many of its pages are.
SMALL, TOUCHES = 64 * MIB, 200
#: Lazy buffers and files of fsspec, with their settings. Enough blocks to keep the whole object.
KEEP_ALL = {"cache_type": "blockcache", "cache_options": {"maxblocks": SMALL // PAGE}}
TABLE: tuple[tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]], ...] = (
    (("aiouffd", {}), ("fsspec's default", {})),
    (("aiouffd", {}), ("fsspec's blockcache", {"cache_type": "blockcache"})),
    (("aiouffd", {}), ("blockcache of 64 KiB", {**KEEP_ALL, "block_size": 64 << 10})),
    (
        ("aiouffd, 4 KiB blocks", {"block_size": PAGE}),
        ("blockcache of 4 KiB", {**KEEP_ALL, "block_size": PAGE}),
    ),
    (("aiouffd, 4 KiB blocks", {"block_size": PAGE}), ("fsspec, none", {"cache_type": "none"})),
)

_libc = ctypes.CDLL(None)


def store_options(endpoint: str) -> dict[str, Any]:
    return {
        "config": {
            "endpoint": endpoint,
            "region": "us-east-1",
            "skip_signature": True,
            "virtual_hosted_style_request": False,
        },
        "client_options": {"allow_http": True},
    }


def fresh_memory(length: int) -> None:
    """Let the process own no spare memory, and the machine so much of it."""
    _libc.malloc_trim(0)
    warm_memory(length + length // 4)


# --- scans -----------------------------------------------------------------------------------


async def lazy_scan(endpoint: str) -> float:
    """GiB/s of touching every page in order, opening and connecting included."""
    started = time.perf_counter()
    async with aiouffd.open("s3://bucket/object", **store_options(endpoint)) as buf:
        await in_thread(touch_all, buf.address, 0, SIZE // PAGE)
        elapsed = time.perf_counter() - started
        if found := await in_thread(wrong, buf.view, MARK):
            raise AssertionError(f"wrong bytes at {found[:4]}")
    return SIZE / elapsed / GIB


async def ranged_download(endpoint: str, piece: int, at_a_time: int, *, join: bool) -> float:
    """GiB/s of obstore's ranges in parallel: kept as they come, or copied into one buffer."""
    import obstore
    from obstore.store import S3Store

    started = time.perf_counter()
    store = S3Store("bucket", **store_options(endpoint))
    memory = memoryview(bytearray(SIZE)) if join else None
    parts: dict[int, memoryview] = {}
    offsets = iter(range(0, SIZE, piece))

    async def worker() -> None:
        for offset in offsets:
            data = await obstore.get_range_async(store, "object", start=offset, length=piece)
            if memory is None:
                parts[offset] = memoryview(data)
            else:
                memory[offset : offset + piece] = memoryview(data)

    await asyncio.gather(*(worker() for _ in range(at_a_time)))
    elapsed = time.perf_counter() - started
    if memory is not None:
        parts[0] = memory
    for start, part in parts.items():
        if wrong(part, MARK, start):
            raise AssertionError("wrong bytes in obstore's download")
    return SIZE / elapsed / GIB


async def download_ranges(endpoint: str) -> float:
    """GiB/s of obstore's one call for many ranges. It joins neighbours to one request."""
    import obstore
    from obstore.store import S3Store

    starts = range(0, SIZE, 8 * MIB)
    started = time.perf_counter()
    store = S3Store("bucket", **store_options(endpoint))
    lengths = [8 * MIB] * len(starts)
    found = await obstore.get_ranges_async(store, "object", starts=[*starts], lengths=lengths)
    elapsed = time.perf_counter() - started
    if len(found) != len(starts) or wrong(memoryview(found[-1]), MARK, starts[-1]):
        raise AssertionError("wrong bytes in obstore's download")
    return SIZE / elapsed / GIB


def _cold(scan: Callable[[], Awaitable[float]]) -> Callable[[], Awaitable[float]]:
    async def run() -> float:
        fresh_memory(SIZE)
        return await scan()

    return run


async def _scans(report: Report, loop: str, endpoint: str) -> None:
    lazy = ("aiouffd", _cold(lambda: lazy_scan(endpoint)))
    for piece, at_a_time in SETTINGS:

        def ranges(piece: int = piece, at_a_time: int = at_a_time) -> Awaitable[float]:
            return ranged_download(endpoint, piece, at_a_time, join=False)

        await report.compare_async(
            f"cold scan of 512 MiB by s3:// / obstore's ranges in parallel, {loop}",
            lazy,
            (f"{at_a_time} ranges of {piece // MIB} MiB", _cold(ranges)),
            unit="GiB/s",
            at_least=0.9,
        )
    for name, what, peer in (
        (
            "joined",
            "the same into one bytearray",
            lambda: ranged_download(endpoint, *SETTINGS[0], join=True),
        ),
        ("get_ranges_async", "obstore.get_ranges_async", lambda: download_ranges(endpoint)),
    ):
        await report.compare_async(
            f"  against {what}, {loop}",
            lazy,
            (name, _cold(peer)),
            unit="GiB/s",
            repeats=3,
            warm_up=False,
        )


# --- random touches --------------------------------------------------------------------------


class Touches:
    """One set of random pages after the other; each is touched by all that are compared."""

    def __init__(self, server: Any, loop: str, runner: Any) -> None:
        self._server = server
        self._loop = loop
        self._runner = runner
        self.touched = TOUCHES * PAGE / MIB

    def places(self, seed: int) -> numpy.ndarray:
        return numpy.array(random.Random(seed).sample(range(SMALL // PAGE), TOUCHES)) * PAGE

    def by_s3(self, seed: int, **options: Any) -> tuple[float, float]:
        """MiB that the server sent, and milliseconds, opening included."""
        endpoint = self._server.url("")
        return self._lazily("s3://bucket/object", seed, **store_options(endpoint), **options)

    def by_http(self, seed: int, **options: Any) -> tuple[float, float]:
        """The same by http://."""
        return self._lazily(self._server.url("/bucket/object"), seed, **options)

    def _lazily(self, url: str, seed: int, **options: Any) -> tuple[float, float]:
        places = self.places(seed)

        async def touch() -> float:
            started = time.perf_counter()
            async with aiouffd.open(url, **options) as buf:
                array = numpy.frombuffer(buf.view, dtype=numpy.uint8)
                found = await in_thread(array.take, places)
                elapsed = time.perf_counter() - started
                # What was ahead and has not arrived yet counts as well.
                while buf.stats.in_flight:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            self._check(places, found)
            return elapsed

        return self._counted(lambda: self._runner(touch()))

    def by_fsspec(self, seed: int, **options: Any) -> tuple[float, float]:
        """The same through a file of fsspec, over aiohttp."""
        import fsspec

        def touch() -> float:
            started = time.perf_counter()
            files = fsspec.filesystem("http", skip_instance_cache=True)
            found = []
            with files.open(self._server.url("/bucket/object"), "rb", **options) as file:
                for place in self.places(seed):
                    file.seek(int(place))
                    found.append(file.read(PAGE)[0])
            elapsed = time.perf_counter() - started
            self._check(self.places(seed), found)
            return elapsed

        return self._counted(touch)

    def _counted(self, touch: Callable[[], float]) -> tuple[float, float]:
        self._server.reset()
        milliseconds = touch() * 1000
        return self._server.counts().bytes / MIB, milliseconds

    def _check(self, places: numpy.ndarray, found: Any) -> None:
        for place, byte in zip(places, found, strict=True):
            if byte != mark(int(place))[0]:
                raise AssertionError(f"a wrong byte at {place}")

    def compare(
        self,
        report: Report,
        name: str,
        a: tuple[str, Callable[[int], tuple[float, float]]],
        b: tuple[str, Callable[[int], tuple[float, float]]],
    ) -> None:
        """Bytes and times of both, from the same runs."""
        seconds: dict[str, list[float]] = {a[0]: [], b[0]: []}

        def sent(side: tuple[str, Callable[[int], tuple[float, float]]]) -> Callable[[], float]:
            seeds = itertools.count()

            def run() -> float:
                mib, milliseconds = side[1](next(seeds))
                seconds[side[0]].append(milliseconds)
                return mib

            return run

        found = report.compare(
            f"{name}: sent, {self._loop}", (a[0], sent(a)), (b[0], sent(b)), unit="MiB"
        )
        # Without the ones for warming up.
        times = [tuple(seconds[side][-len(found.a) :]) for side in (a[0], b[0])]
        report.add(Comparison(f"{name}: time, {self._loop}", a[0], b[0], "ms", *times))


def _amplification(report: Report, loop: str, touches: Touches) -> None:
    for what, options, most in (
        ("default", {}, 16.0),
        ("block_size=4096", {"block_size": PAGE}, 1.2),
    ):
        seeds = itertools.count()

        def sent(options: Any = options, seeds: Iterator[int] = seeds) -> float:
            return touches.by_s3(next(seeds), **options)[0]

        report.compare(
            f"amplification of {TOUCHES} random 4 KiB touches by s3://, {what}, {loop}",
            ("sent", sent),
            ("touched", lambda: touches.touched),
            unit="MiB",
            at_most=most,
        )


def _tables(report: Report, touches: Touches) -> None:
    for (ours, lazy_options), (theirs, file_options) in TABLE:

        def lazily(seed: int, options: Any = lazy_options) -> tuple[float, float]:
            return touches.by_http(seed, **options)

        def by_fsspec(seed: int, options: Any = file_options) -> tuple[float, float]:
            return touches.by_fsspec(seed, **options)

        touches.compare(
            report,
            f"{TOUCHES} random 4 KiB of 64 MiB by http://",
            (ours, lazily),
            (theirs, by_fsspec),
        )


# --- all of it -------------------------------------------------------------------------------


def run(report: Report, loop: str, runner: Any) -> None:
    for package in ("obstore", "aiohttp", "fsspec"):
        if importlib.util.find_spec(package) is None:
            report.skip(f"object stores, {loop}", f"{package} is not installed")
            return
    with serving(SIZE, path="/bucket/object") as server:
        runner(_scans(report, loop, server.url("")))
    with serving(SMALL, path="/bucket/object", step=PAGE) as server:
        touches = Touches(server, loop, runner)
        _amplification(report, loop, touches)
        _tables(report, touches)
