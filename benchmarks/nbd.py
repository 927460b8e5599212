"""NBD: our server against nbdkit's memory plugin, our client against nbdcopy and nbdfuse.

Everything over Unix sockets, with 4 connections, from and to processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy

import aiouffd

from .baseline.uffd import PAGE, touch_all
from .common import Report, in_thread, warm_memory

GIB = 1 << 30
SIZE = GIB
CONNECTIONS = 4
TOUCHERS = 16
TOUCHES = 1000  # of each toucher


def _wait_for(path: Path) -> None:
    limit = time.monotonic() + 20
    while not path.exists():
        if time.monotonic() > limit:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.005)


@contextlib.contextmanager
def _running(*command: str, ready: Path) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(ready)
        time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def _url(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def nbdcopy(path: Path) -> float:
    """GiB/s of copying an export to nowhere."""
    started = time.perf_counter()
    subprocess.run(["nbdcopy", f"--connections={CONNECTIONS}", _url(path), "null:"], check=True)
    return SIZE / (time.perf_counter() - started) / GIB


@contextlib.contextmanager
def nbdfuse(path: Path, folder: Path) -> Iterator[mmap.mmap]:
    """The export as a file, mapped."""
    mountpoint = folder / "mnt"
    mountpoint.mkdir(exist_ok=True)
    file = mountpoint / "nbd"
    process = subprocess.Popen(["nbdfuse", str(file), _url(path)])
    try:
        _wait_for(file)
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as memory,
        ):
            yield memory
    finally:
        try:
            subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()


def _touch_at_random(memory, places: list[numpy.ndarray]) -> float:
    """Microseconds per touch of all touchers together."""
    array = numpy.frombuffer(memory, dtype=numpy.uint8)
    barrier = threading.Barrier(len(places) + 1)

    def touch(mine: numpy.ndarray) -> None:
        barrier.wait()
        array.take(mine).sum()  # without the GIL
        barrier.wait()

    threads = [threading.Thread(target=touch, args=(mine,)) for mine in places]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    barrier.wait()
    elapsed = time.perf_counter() - started
    for thread in threads:
        thread.join()
    return elapsed / sum(map(len, places)) * 1e6


def _scattered(chance: random.Random) -> list[numpy.ndarray]:
    pages = chance.sample(range(SIZE // PAGE), TOUCHERS * TOUCHES)
    return [numpy.array(pages[n::TOUCHERS]) * PAGE for n in range(TOUCHERS)]


def _local(chance: random.Random) -> list[numpy.ndarray]:
    """Runs of 16 neighbouring pages, in any order within each."""
    found = []
    for _ in range(TOUCHERS):
        runs = [chance.randrange(SIZE // PAGE // 16) for _ in range(TOUCHES // 16)]
        pages = [16 * run + page for run in runs for page in chance.sample(range(16), 16)]
        found.append(numpy.array(pages) * PAGE)
    return found


def _lazily(path: Path, runner, places: Callable[[], list[numpy.ndarray]], **options):
    async def touched() -> float:
        async with aiouffd.open(_url(path), connections=CONNECTIONS, **options) as buf:
            return await in_thread(_touch_at_random, buf.view, places())

    return lambda: runner(touched())


def _by_fuse(path: Path, folder: Path, places: Callable[[], list[numpy.ndarray]]):
    def touched() -> float:
        with nbdfuse(path, folder) as memory:
            memory.madvise(mmap.MADV_RANDOM)
            view = memoryview(memory)
            try:
                return _touch_at_random(view, places())
            finally:
                view.release()

    return touched


def _scan(path: Path, runner) -> Callable[[], float]:
    async def scan() -> float:
        async with aiouffd.open(_url(path), connections=CONNECTIONS) as buf:
            started = time.perf_counter()
            await in_thread(touch_all, buf.address, 0, SIZE // PAGE)
            return SIZE / (time.perf_counter() - started) / GIB

    def rate() -> float:
        warm_memory(SIZE + SIZE // 4)
        return runner(scan())

    return rate


def _fuse_scan(path: Path, folder: Path) -> float:
    warm_memory(SIZE + SIZE // 4)
    with nbdfuse(path, folder) as memory:
        memory.madvise(mmap.MADV_SEQUENTIAL)
        array = numpy.frombuffer(memory, dtype=numpy.uint8)
        started = time.perf_counter()
        array[::PAGE].sum()
        elapsed = time.perf_counter() - started
        del array
    return SIZE / elapsed / GIB


def run(report: Report, loop: str, runner=asyncio.run) -> None:
    for program in ("nbdkit", "nbdcopy", "nbdfuse", "fusermount3"):
        if shutil.which(program) is None:
            report.skip(f"NBD, {loop}", f"{program} is not installed")
            return
    with tempfile.TemporaryDirectory(prefix="aiouffd-nbd-") as name:
        folder = Path(name)
        image, ours, theirs = folder / "image", folder / "ours", folder / "theirs"
        with image.open("wb") as file:
            piece = os.urandom(1 << 20)
            for number in range(SIZE >> 20):
                file.write(number.to_bytes(8, "little") + piece[8:])
        serve = [sys.executable, "-m", "aiouffd", "nbd", str(image), "--socket"]
        with (
            _running("nbdkit", "-f", "--unix", str(theirs), "memory", str(SIZE), ready=theirs),
            _running(*serve, str(ours), ready=ours),
        ):
            subprocess.run(["nbdcopy", str(image), _url(theirs)], check=True)
            if loop == "uvloop":  # which the command uses in any case
                report.compare(
                    "nbdcopy of 1 GiB, from `aiouffd nbd` / nbdkit's memory plugin",
                    ("aiouffd", lambda: nbdcopy(ours)),
                    ("nbdkit", lambda: nbdcopy(theirs)),
                    unit="GiB/s",
                    at_least=0.5,
                )
            report.compare(
                f"cold scan of 1 GiB by nbd:// from nbdkit / nbdcopy to null, {loop}",
                ("aiouffd", _scan(theirs, runner)),
                ("nbdcopy", lambda: nbdcopy(theirs)),
                unit="GiB/s",
                at_least=0.6,
            )
            report.compare(
                f"the same / nbdfuse and mmap, {loop}",
                ("aiouffd", _scan(theirs, runner)),
                ("nbdfuse", lambda: _fuse_scan(theirs, folder)),
                unit="GiB/s",
                at_least=1.5,
            )
            chance = random.Random(1)
            report.compare(
                f"random 4 KiB touches by nbd://, 16 threads, 4 KiB blocks, {loop}",
                ("nbdfuse", _by_fuse(theirs, folder, lambda: _scattered(chance))),
                (
                    "aiouffd",
                    _lazily(
                        theirs, runner, lambda: _scattered(chance), block_size=PAGE, readahead=0
                    ),
                ),
                unit="us per touch",
                at_least=1.0,
            )
            report.compare(
                f"4 KiB touches with locality by nbd://, 16 threads, default blocks, {loop}",
                ("nbdfuse", _by_fuse(theirs, folder, lambda: _local(chance))),
                ("aiouffd", _lazily(theirs, runner, lambda: _local(chance))),
                unit="us per touch",
                at_least=2.0,
            )
