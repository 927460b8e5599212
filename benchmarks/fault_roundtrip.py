"""(a) A fault's round trip: 4 KiB pages, memory source, touchers without the GIL.

Against a C thread that polls, reads and copies. Also served natively (bytes at hand), and
with everything on one CPU, where the wake-up costs little and our own cost shows. (e) What a thread
that hungers for the GIL does to it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterable

import aiouffd

from .baseline.uffd import PAGE, UffdServer, touch, touch_threads
from .common import Report, in_thread, pinned

PAGES = 2000
DATA = os.urandom(PAGES * PAGE)


def _percentile(figures: list[int], part: float) -> float:
    return sorted(figures)[min(len(figures) - 1, int(len(figures) * part))] / 1000


def _handler_region(pager: aiouffd.Pager, native: bool) -> aiouffd.Region:
    region = pager.map(PAGES * PAGE)
    if native:
        region.serve_from(DATA)
    else:

        @region.on_missing
        async def serve(fault: aiouffd.Fault) -> None:
            offset = fault.offset
            fault.copy(DATA[offset : offset + PAGE])

    return region


class Ours:
    def __init__(self, pager: aiouffd.Pager, *, native: bool = False, threads: int = 1) -> None:
        self.pager, self.native, self.threads = pager, native, threads
        self.last: list[int] = []

    async def __call__(self) -> float:
        region = _handler_region(self.pager, self.native)
        try:
            if self.threads > 1:
                elapsed = await in_thread(touch_threads, region.address, PAGES, self.threads)
                return elapsed / PAGES / 1000
            self.last = await in_thread(touch, region.address, 0, PAGES)
            return _percentile(self.last, 0.5)
        finally:
            region.close()


class Bare:
    """A reader callback and a copy, with nothing of the framework: the floor for Python."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    async def __call__(self) -> float:
        import mmap

        from aiouffd.kernel.lib import ffi, lib

        memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
        source = int(ffi.cast("uintptr_t", ffi.from_buffer(DATA)))
        uffd = aiouffd.Userfaultfd()
        uffd.register(address, PAGES * PAGE, aiouffd.Mode.MISSING)
        messages = ffi.new("struct au_uffd_msg[]", 16)
        done = ffi.new("int64_t *")
        fd = uffd.fileno()

        def on_readable() -> None:
            for index in range(lib.au_abi_read(fd, messages, 16)):
                at = messages[index].arg.pagefault.address
                lib.au_abi_copy(fd, at, source + at - address, PAGE, 0, done)

        loop = asyncio.get_running_loop()
        loop.add_reader(fd, on_readable)
        try:
            if self.threads > 1:
                elapsed = await in_thread(touch_threads, address, PAGES, self.threads)
                return elapsed / PAGES / 1000
            return _percentile(await in_thread(touch, address, 0, PAGES), 0.5)
        finally:
            loop.remove_reader(fd)
            uffd.close()


class TheirsInC:
    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.last: list[int] = []

    async def __call__(self) -> float:
        with UffdServer(PAGES * PAGE, bytearray(DATA)) as server:
            if self.threads > 1:
                elapsed = await in_thread(touch_threads, server.address, PAGES, self.threads)
                return elapsed / PAGES / 1000
            self.last = await in_thread(touch, server.address, 0, PAGES)
            return _percentile(self.last, 0.5)


def _p99(measure: Ours | TheirsInC):
    async def run() -> float:
        await measure()
        return _percentile(measure.last, 0.99)

    return run


async def _round_trips(report: Report, loop: str, where: str, cpus: Iterable[int] | None) -> None:
    with pinned(cpus):
        async with aiouffd.Pager() as pager:
            bar = 1.5 if cpus is None else 2.5
            name = f"fault p50, 1 toucher, {where}, {loop}"
            ours, c = Ours(pager), TheirsInC()
            await report.compare_async(
                name, ("aiouffd", ours), ("C thread", c), unit="us", at_most=bar
            )
            await report.compare_async(
                f"  of that, a bare add_reader handler, {where}, {loop}",
                ("bare", Bare()),
                ("C thread", c),
                unit="us",
            )
            await report.compare_async(
                f"fault p50, bytes at hand, {where}, {loop}",
                ("aiouffd native", Ours(pager, native=True)),
                ("C thread", c),
                unit="us",
                at_most=1.3 if cpus is None else None,
            )
            if cpus is None:
                await report.compare_async(
                    f"fault p99, 1 toucher, {loop}",
                    ("aiouffd", _p99(ours)),
                    ("C thread", _p99(c)),
                    unit="us",
                    at_most=2.0,
                )
                await report.compare_async(
                    f"time per touch, 16 touchers, {loop}",
                    ("aiouffd", Ours(pager, threads=16)),
                    ("C thread", TheirsInC(16)),
                    unit="us",
                    at_most=2.0,
                )


class Hungry:
    """A thread that always wants the GIL, while the wrapped measure runs."""

    def __init__(self, measure) -> None:
        self.measure = measure

    async def __call__(self) -> float:
        stop = False

        def spin() -> None:
            while not stop:
                pass

        thread = threading.Thread(target=spin)
        thread.start()
        try:
            return await self.measure()
        finally:
            stop = True
            thread.join()


async def _hunger(report: Report, loop: str) -> None:
    global PAGES
    pages, PAGES = PAGES, 200
    try:
        async with aiouffd.Pager() as pager:
            native, handler = Ours(pager, native=True), Ours(pager)
            await report.compare_async(
                f"fault p99 beside a GIL-hungry thread, bytes at hand, {loop}",
                ("with", Hungry(_p99(native))),
                ("without", _p99(native)),
                unit="us",
                at_most=3.0,
            )
            floor = sys.getswitchinterval() * 1e6
            await report.compare_async(
                f"fault p99 beside a GIL-hungry thread, coroutine (the switch interval alone "
                f"is {floor:.0f} us), {loop}",
                ("with", Hungry(_p99(handler))),
                ("without", _p99(handler)),
                unit="us",
            )
    finally:
        PAGES = pages


def run(report: Report, loop: str, runner) -> None:
    """The part for one CPU where the process was started on one: native threads stay
    where the thread was that made them."""
    cpus = os.sched_getaffinity(0)
    if len(cpus) == 1:
        runner(_round_trips(report, loop, "one CPU", cpus))
    else:
        runner(_round_trips(report, loop, "unpinned", None))
        runner(_hunger(report, loop))
