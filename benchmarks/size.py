"""(g) What size and number cost: bookkeeping per resident GiB, and a fault among many.

Regions are sparse: their length costs address space, and bookkeeping only where pages are.
Best run on one CPU, as `python -m benchmarks` does: what a wake-up on another one costs varies
by more than what is looked for here.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiouffd
from aiouffd.buffers.buffer import BLOCK_SIZE
from aiouffd.kernel.lib import ffi
from aiouffd.sources import FunctionSource

from .baseline.uffd import PAGE, touch, touch_all
from .common import Report, in_thread
from .fault_roundtrip import _percentile
from .scan import GIB, MIB

TIB = 1 << 40
#: Touches of one measurement, spread over the whole region.
TOUCHES = 128
#: How many of many regions are touched, and pages of each.
SAMPLE, PAGES = 16, 32
DATA = os.urandom(PAGE)


def _name(size: int) -> str:
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} bytes"


def _memory(field: str) -> int:
    """KiB of one kind of memory of this process, as /proc names it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise RuntimeError(f"no {field} in /proc/self/status")


# --- bookkeeping -----------------------------------------------------------------------------


async def _ours(length: int, block_size: int, resident: Iterable[tuple[int, int]]) -> float:
    """KiB that the process grows by for a region, when these ranges of it become resident.

    They become the kernel's one page of zeros, which is not counted, so what is counted
    is bookkeeping alone.
    """
    async with aiouffd.Pager() as pager:
        gc.collect()
        before = _memory("RssAnon")
        region = pager.map(length, block_size=block_size)
        for offset, count in resident:
            region.zero(offset, count)
        grown = _memory("RssAnon") - before
        region.close()
    return grown


async def _kernels(length: int, stride: int) -> float:
    """KiB of the kernel's own page tables for plain memory that is read in the same places."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, length, flags=flags, prot=mmap.PROT_READ) as memory:
        address = ffi.from_buffer(memory)
        before = _memory("VmPTE")
        touch_all(int(ffi.cast("uintptr_t", address)), 0, length // PAGE, stride // PAGE)
        grown = _memory("VmPTE") - before
        ffi.release(address)
    return grown


async def _bookkeeping(report: Report, loop: str) -> None:
    for size, block, step, count, what in (
        (GIB, PAGE, 16 * MIB, 16 * MIB, "all of it resident, blocks of 4 KiB"),
        (GIB, BLOCK_SIZE, 16 * MIB, 16 * MIB, "all of it resident, blocks of 64 KiB"),
        (TIB, PAGE, TIB // TOUCHES, PAGE, f"{TOUCHES} pages of it resident"),
    ):

        async def ours(
            size: int = size, block: int = block, step: int = step, count: int = count
        ) -> float:
            return await _ours(size, block, ((at, count) for at in range(0, size, step)))

        async def kernels(size: int = size, step: int = step, count: int = count) -> float:
            return await _kernels(size, PAGE if step == count else step)

        await report.compare_async(
            f"bookkeeping of {_name(size)}, {what}, {loop}",
            ("aiouffd", ours),
            ("the kernel's page tables", kernels),
            unit="KiB",
            at_most=1.5,
        )


# --- faults in regions of different sizes ----------------------------------------------------


def _serve(region: aiouffd.Region) -> None:
    @region.on_missing
    async def serve(fault: aiouffd.Fault) -> None:
        fault.copy(DATA)


def _in_size(
    pager: aiouffd.Pager, size: int, *, again: bool = False
) -> Callable[[], Awaitable[float]]:
    pages = size // PAGE

    async def run() -> float:
        """Microseconds of the median touch; if ``again``, of the pages next to the first ones."""
        region = pager.map(size)
        _serve(region)
        try:
            for first in (0, 1) if again else (0,):
                stride = pages // TOUCHES
                times = await in_thread(touch, region.address, first, pages, stride)
            return _percentile(times, 0.5)
        finally:
            region.close()

    return run


async def _sizes(report: Report, loop: str) -> None:
    """The first touch far from all others also pays for pages of bookkeeping, the kernel's
    and ours; the one next to it shows what size itself costs."""
    async with aiouffd.Pager() as pager:
        for size in (GIB, TIB):
            for again, what in ((True, "with neighbours there"), (False, "first of their area")):
                await report.compare_async(
                    f"fault p50, {TOUCHES} touches over {_name(size)}, {what}, {loop}",
                    (_name(size), _in_size(pager, size, again=again)),
                    (_name(MIB), _in_size(pager, MIB, again=again)),
                    unit="us",
                    at_most=1.5 if again else None,
                )


# --- faults among many regions and buffers ---------------------------------------------------


async def _median_touch(addresses: list[int], first: int) -> float:
    """Microseconds of the median touch of PAGES pages of each, from page `first` on."""

    def run() -> list[int]:
        times = []
        for address in addresses:
            times += touch(address, first, first + PAGES)
        return times

    return _percentile(await in_thread(run), 0.5)


@asynccontextmanager
async def _regions(count: int) -> AsyncIterator[list[int]]:
    async with aiouffd.Pager() as pager:
        regions = [pager.map(MIB * SAMPLE) for _ in range(count)]
        for region in regions:
            _serve(region)
        yield [region.address for region in regions]


@asynccontextmanager
async def _buffers(count: int) -> AsyncIterator[list[int]]:
    async def read(offset: int, length: int) -> bytes:
        return DATA[:length]

    async with AsyncExitStack() as stack:
        addresses = []
        for _ in range(count):
            source = FunctionSource(read, MIB * SAMPLE, portable=True)
            buf = await stack.enter_async_context(
                aiouffd.open(source, block_size=PAGE, readahead=0)
            )
            addresses.append(buf.address)
        yield addresses


def _among(make: Callable[[int], object], count: int) -> Callable[[], Awaitable[float]]:
    """Touch as many pages whatever the count: of one SAMPLE times, or of SAMPLE of them."""

    async def run() -> float:
        async with make(count) as addresses:  # type: ignore[attr-defined]
            if count < SAMPLE:
                chosen = addresses * (SAMPLE // count)
            else:
                chosen = random.Random(count).sample(addresses, SAMPLE)
            # Of a region that is met again, other pages.
            shifted = [address + i * PAGES * PAGE for i, address in enumerate(chosen)]
            return await _median_touch(shifted, 0)

    return run


async def _numbers(report: Report, loop: str) -> None:
    for what, make, counts in (
        ("regions on one pager", _regions, (100, 1000)),
        ("lazy buffers on one loop", _buffers, (1000,)),
    ):
        for count in counts:
            await report.compare_async(
                f"fault p50 among {count:,} {what}, {loop}",
                (f"{count:,}", _among(make, count)),
                ("1", _among(make, 1)),
                unit="us",
                at_most=1.5,
            )


def run(report: Report, loop: str, runner) -> None:
    if len(os.sched_getaffinity(0)) == 1:
        loop = f"one CPU, {loop}"
    runner(_bookkeeping(report, loop))
    runner(_sizes(report, loop))
    runner(_numbers(report, loop))
