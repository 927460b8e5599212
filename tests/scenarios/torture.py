"""Thousands of random operations on lazy buffers whose source misbehaves.

Every byte that comes out is compared; what is left to chance is decided by one seed.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import random
import threading
import time
import warnings
from collections import Counter
from typing import Any

import aiouffd
from aiouffd.fetch import flights
from aiouffd.kernel.lib import PAGE_SIZE
from tests.support import content

PAGES = 300
SIZE = PAGES * PAGE_SIZE - 777
BLOCK = 4 * PAGE_SIZE


class Wrong(AssertionError):
    """A byte that is not the source's."""


def difference(found: object, wanted: object) -> str:
    if not isinstance(found, bytes) or not isinstance(wanted, bytes):
        return f"{found!r:.80} and not {wanted!r:.80}"
    if len(found) != len(wanted):
        return f"{len(found)} bytes and not {len(wanted)}"
    at = next(at for at, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
    return f"from {at} on {found[at : at + 16].hex()} and not {wanted[at : at + 16].hex()}"


class Torture:
    """One buffer, its oracle, and what may be done to it.

    ``hard`` operations are also those that end a process when a page is poisoned.
    """

    def __init__(self, data: bytes, buf: aiouffd.LazyBuffer, seed: int, *, hard: bool) -> None:
        self.data = data
        self.buf = buf
        self.seed = seed
        self.hard = hard
        self.done: Counter[str] = Counter()
        self.refused = 0
        self.numpy = importlib.import_module("numpy")

    def some(self, chance: random.Random) -> tuple[int, int]:
        """An offset and a length, often short, sometimes long, anywhere."""
        longest = chance.choice([1, 8, 300, PAGE_SIZE, 3 * BLOCK, SIZE])
        offset = chance.randrange(SIZE)
        return offset, min(chance.randint(1, longest), SIZE - offset)

    def expect(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            raise Wrong(f"{what}: {difference(found, wanted)}: seed {self.seed}")
        self.done[what.split()[0]] += 1

    # ---------------------------------------------------------------- threads

    def in_thread(self, chance: random.Random, view: memoryview) -> None:
        buf, data = self.buf, self.data
        at, length = self.some(chance)
        what = chance.choice(["index", "slice", "step", "find", "drop", "drop", "look"])
        if self.hard and chance.random() < 0.6:
            what = chance.choice(["raw byte", "raw bytes", "memcpy", "sum", "compare"])
        where = f"{what} {at} {length}"
        match what:
            case "index":
                self.expect(where, buf[at], data[at])
            case "slice":
                self.expect(where, buf[at : at + length], data[at : at + length])
            case "step":
                step = chance.choice([2, 100, 5000, -1, -777])
                key = slice(at, at + length, step) if step > 0 else slice(at + length, at, step)
                self.expect(where, buf[key], data[key])
            case "find":
                needle = data[at : at + 9]
                start = max(0, at - chance.randrange(2 * BLOCK))
                self.expect(where, buf.find(needle, start), data.find(needle, start))
            case "raw byte":
                self.expect(where, view[at], data[at])
            case "raw bytes":
                self.expect(where, bytes(view[at : at + length]), data[at : at + length])
            case "compare":
                self.expect(where, view[at : at + length] == data[at : at + length], True)
            case "memcpy":
                target = ctypes.create_string_buffer(length)
                source = ctypes.c_void_p(buf.address + at)
                ctypes.CDLL(None).memmove(target, source, ctypes.c_size_t(length))
                self.expect(where, target.raw, data[at : at + length])
            case "sum":
                array = self.numpy.frombuffer(view, dtype="u1")[at : at + length]
                wanted = self.numpy.frombuffer(data, dtype="u1")[at : at + length]
                self.expect(where, int(array.sum()), int(wanted.sum()))
            case "drop":
                assert buf._region is not None
                first = at // PAGE_SIZE
                count = min(1 + length // PAGE_SIZE, PAGES - first)
                buf._region.drop(first * PAGE_SIZE, count * PAGE_SIZE)
                self.done[what] += 1
            case _:
                self.look()

    def look(self) -> None:
        """What the buffer says of itself fits together, whatever goes on meanwhile."""
        assert self.buf._region is not None
        ranges = self.buf.resident()
        last = -1
        for start, stop in ranges:
            if not last < start < stop <= SIZE or start % PAGE_SIZE:
                raise Wrong(f"resident: {ranges}: seed {self.seed}")
            last = stop
        runs = self.buf._region.runs()
        self.expect("look", sum(length for _, length, _ in runs), PAGES * PAGE_SIZE)
        stats = self.buf.stats
        if not 0 <= stats.resident_bytes <= SIZE or stats.fetched_bytes < 0:
            raise Wrong(f"stats: {stats}: seed {self.seed}")

    def thread(self, number: int, operations: int) -> None:
        chance = random.Random(f"{self.seed} thread {number}")
        with self.buf.view as view:
            for _ in range(operations):
                try:
                    self.in_thread(chance, view)
                except aiouffd.SourceError:
                    if self.hard:
                        raise
                    self.refused += 1

    # ------------------------------------------------------------- coroutines

    async def on_loop(self, chance: random.Random) -> None:
        buf, data = self.buf, self.data
        at, length = self.some(chance)
        what = chance.choice(["read", "readinto", "fetch", "pin", "cancel"])
        where = f"{what} {at} {length}"
        match what:
            case "read":
                self.expect(where, await buf.read(at, length), data[at : at + length])
            case "readinto":
                target = bytearray(length)
                count = await buf.readinto(at, target)
                self.expect(where, (count, target), (length, data[at : at + length]))
            case "fetch":
                await buf.fetch(at, length)
                self.done[what] += 1
            case "pin":
                async with buf.pin(at, length) as view:
                    # Pages may be dropped by others here, so only a thread may look.
                    if self.hard:
                        found = await asyncio.to_thread(bytes, view)
                        self.expect(where, found, data[at : at + length])
            case _:
                task = asyncio.create_task(buf.fetch(at, length))
                await asyncio.sleep(0)
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    self.done[what] += 1

    async def coroutine(self, number: int, operations: int) -> None:
        chance = random.Random(f"{self.seed} coroutine {number}")
        for _ in range(operations):
            try:
                await self.on_loop(chance)
            except aiouffd.SourceError:
                if self.hard:
                    raise
                self.refused += 1

    # ----------------------------------------------------------------- all of it

    async def run(self, operations: int) -> None:
        loop = asyncio.get_running_loop()
        threads = 4
        ended: list[asyncio.Future[None]] = []

        def body(number: int, done: asyncio.Future[None]) -> None:
            try:
                self.thread(number, operations * 3 // 4 // threads)
            except BaseException as error:
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, None)

        for number in range(threads):
            ended.append(loop.create_future())
            threading.Thread(target=body, args=(number, ended[-1]), daemon=True).start()
        coroutines = [self.coroutine(number, operations // 4 // 4) for number in range(4)]
        # To the end, for a buffer that closes while threads touch it ends the process.
        results = await asyncio.gather(*coroutines, *ended, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def all_is_well(self) -> None:
        """With fair weather everything can be had, and is right."""
        limit = time.monotonic() + 20
        in_the_air = True
        while True:
            try:
                await self.buf.fetch()
                break
            except aiouffd.SourceError as error:
                # The deadline is short, and a busy machine may be slower. And what the first call
                # waits for may have begun in foul weather.
                late = isinstance(error, aiouffd.SourceTimeoutError)
                if self.hard or time.monotonic() > limit or not (late or in_the_air):
                    raise
                in_the_air = False
        if await self.buf.read() != self.data:
            raise Wrong(f"at the end: seed {self.seed}")
        if self.buf.resident() != [(0, SIZE)]:
            raise Wrong(f"resident at the end: {self.buf.resident()}: seed {self.seed}")
        if await asyncio.to_thread(bytes, self.buf.view) != self.data:
            raise Wrong(f"the view at the end: seed {self.seed}")
        if self.buf.stats.poisoned_bytes:
            raise Wrong(f"poisoned at the end: seed {self.seed}")


async def torture(
    kind: str, memory: Any, errors: Any, operations: int, seed: int
) -> dict[str, Any]:
    """``kind`` is what the bytes come from: a module of `tests.origins`."""
    warnings.simplefilter("ignore", aiouffd.BlockingTouchWarning)
    flights.RETRY_FIRST, flights.RETRY_LONGEST = 0.001, 0.01
    data = content(SIZE + 777)[:SIZE]
    started = time.monotonic()
    make = importlib.import_module(f"tests.origins.{kind}").origin
    async with make(data, seed) as origin:
        buf = aiouffd.open(
            origin.source,
            block_size=BLOCK,
            kind=memory,
            errors=errors,
            deadline=0.05 if errors == "soft" else None,
        )
        async with buf:
            origin.foul()
            case = Torture(data, buf, seed, hard=errors == "hard")
            await case.run(operations)
            origin.fair()
            await case.all_is_well()
            stats = buf.stats
            assert stats.in_flight == 0
    return {
        "done": sum(case.done.values()),
        "kinds": sorted(case.done),
        "refused": case.refused,
        "retries": stats.retries,
        "failures": stats.failures,
        "rescued": stats.rescued,
        "seconds": time.monotonic() - started,
    }
