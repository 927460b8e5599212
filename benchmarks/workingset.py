"""A working set that was recorded once and is brought ahead, against the same touches without.

The server (tests/servers/http.py, a process of its own) answers each request 5 ms late, as
another machine would. One thread touches the same places in the same order, with nothing to
do in between; the time runs from before the open to the last touch. Two patterns: pages all
over the object, where each touch waits for the server, and runs of some blocks, as when parts
of a file are loaded, where readahead helps whoever has no working set.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy

import aiouffd
from aiouffd.fetch.workingset import WorkingSet

from .baseline.uffd import PAGE
from .common import Report, in_thread
from .scan import MIB
from .served import MARK, mark, serving

SIZE = 256 * MIB
LATENCY = 0.005
#: Pages that are touched, the number and the longest of the runs, in blocks of 64 KiB.
SCATTERED = 400
RUNS, LONGEST = 60, 12


def _scattered() -> numpy.ndarray:
    return numpy.array(random.Random(1).sample(range(SIZE // MARK), SCATTERED)) * MARK


def _runs() -> numpy.ndarray:
    chance = random.Random(2)
    places: list[int] = []
    for _ in range(RUNS):
        length = chance.randint(1, LONGEST) * MARK
        start = chance.randrange((SIZE - length) // MARK) * MARK
        places += range(start, start + length, PAGE)
    return numpy.array(places)


async def _touch(url: str, places: numpy.ndarray, **options: Any) -> float:
    """Milliseconds from before the open to the last touch."""
    started = time.perf_counter()
    async with aiouffd.open(url, **options) as buf:
        array = numpy.frombuffer(buf.view, dtype=numpy.uint8)
        found = await in_thread(array.take, places)
        elapsed = time.perf_counter() - started
        for place, byte in zip(places, found, strict=True):
            if byte != mark(int(place))[0]:
                raise AssertionError(f"a wrong byte at {place}")
    return elapsed * 1000


async def _record(url: str, places: numpy.ndarray) -> WorkingSet:
    async with aiouffd.open(url) as buf:
        with buf.record() as recording:
            array = numpy.frombuffer(buf.view, dtype=numpy.uint8)
            await in_thread(array.take, places)
        # As from a file, the next day.
        return WorkingSet.from_bytes(recording.working_set().to_bytes())


async def _compare(report: Report, loop: str, url: str) -> None:
    for name, places in (
        (f"{SCATTERED} touches all over 256 MiB", _scattered()),
        (f"{RUNS} runs of up to {LONGEST} blocks, with readahead", _runs()),
    ):
        working_set = await _record(url, places)

        def without(places: numpy.ndarray = places) -> Awaitable[float]:
            return _touch(url, places)

        def replayed(
            places: numpy.ndarray = places, working_set: WorkingSet = working_set
        ) -> Awaitable[float]:
            return _touch(url, places, prefetch=working_set)

        sides: tuple[tuple[str, Callable[[], Awaitable[float]]], ...] = (
            ("without", without),
            ("with the working set", replayed),
        )
        await report.compare_async(
            f"{name}, 5 ms of latency, {loop}", *sides, unit="ms", at_least=5
        )


def run(report: Report, loop: str, runner: Any) -> None:
    if importlib.util.find_spec("aiohttp") is None:
        report.skip(f"working sets, {loop}", "aiohttp is not installed")
        return
    with serving(SIZE, step=PAGE, latency=LATENCY) as server:
        runner(_compare(report, loop, server.url("/object")))
