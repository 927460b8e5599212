"""A model of a reader, a link and the readahead between them, in virtual time.

Nothing is fetched and nobody waits: the same touches give the same figures on any machine, however
busy, so that two versions of `aiouffd.fetch.readahead` can be compared to the block and the round
trip. The rules of the fetcher are repeated here in a few lines: one flight for a block, flights
that end where pieces do, touched ones before the rest.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["BLOCK", "MIB", "Figures", "Link", "play", "workloads"]

MIB = 1 << 20
BLOCK = 64 * 1024
#: Blocks of one flight, of readahead's window, and flights that run at a time.
PIECE, WINDOW, FLIGHTS = 32, 128, 32
#: What a fault costs besides the source, and the end of a flight until its reader runs, in seconds.
FAULT, WAKE = 20e-6, 30e-6

#: A block that is touched, or the first and last of those that are read in one go.
Step = int | tuple[int, int]


@dataclass(frozen=True)
class Link:
    """Where bytes come from: seconds to the first one, bytes a second. Pages of a flight appear
    when all of it has come, or as they come."""

    latency: float
    bandwidth: float
    as_they_come: bool = False


@dataclass(frozen=True)
class Figures:
    """What a workload cost: seconds, bytes that came and that were needed, requests, and times
    that a thread waited."""

    seconds: float
    fetched: int
    needed: int
    flights: int
    waits: int

    @property
    def amplification(self) -> float:
        return self.fetched / self.needed


class _Flight:
    def __init__(self, first: int, count: int, wanted: bool) -> None:
        self.first, self.count, self.wanted = first, count, wanted
        self.started = False
        self.ahead = not wanted


class _World:
    def __init__(
        self,
        planner: Callable[[Callable[[int], bool]], Any],
        blocks: int,
        link: Link,
        speed: float,
    ) -> None:
        self.there: set[int] = set()
        self.planner, self.blocks, self.link = planner(self.there.__contains__), blocks, link
        self.work = BLOCK / speed
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.flights: dict[int, _Flight] = {}
        self.running = self.requests = self.waits = 0
        self.later: deque[_Flight] = deque()
        self.urgent: deque[_Flight] = deque()
        self.link_free = 0.0
        self.waiting: dict[int, list[Callable[[], None]]] = {}
        self.needed: set[int] = set()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what))

    def run(self) -> None:
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            what()

    # What the fetcher does.

    def take(self, first: int, count: int) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        for block in range(max(0, first), min(first + count, self.blocks)):
            if block in self.there or block in self.flights:
                continue
            if runs and sum(runs[-1]) == block and block % PIECE:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        return runs

    def ask(self, runs: Iterable[tuple[int, int]], wanted: bool = False) -> None:
        for first, count in runs:
            for part in self.take(first, count):
                flight = _Flight(*part, wanted)
                for block in range(flight.first, flight.first + flight.count):
                    self.flights[block] = flight
                (self.urgent if wanted else self.later).append(flight)
        self.fill()

    def fill(self) -> None:
        while self.running < FLIGHTS and (self.urgent or self.later):
            self.start(self.urgent.popleft() if self.urgent else self.later.popleft())

    def start(self, flight: _Flight) -> None:
        self.running += 1
        self.requests += 1
        flight.started = True
        each = BLOCK / self.link.bandwidth
        begin = max(self.now + self.link.latency, self.link_free)
        self.link_free = begin + each * flight.count
        if self.link.as_they_come:
            for index in range(flight.count):
                self.at(begin + each * (index + 1), lambda b=flight.first + index: self.arrive([b]))
        self.at(self.link_free, lambda: self.land(flight))

    def arrive(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block not in self.there:
                self.there.add(block)
                for go_on in self.waiting.pop(block, ()):
                    self.at(self.now + WAKE, go_on)

    def land(self, flight: _Flight) -> None:
        self.running -= 1
        blocks = range(flight.first, flight.first + flight.count)
        self.arrive(blocks)
        for block in blocks:
            del self.flights[block]
        if flight.ahead:
            self.ask(self.planner.landed(flight.first, flight.count))
        self.fill()

    def touch(self, block: int) -> None:
        """A thread waits for it."""
        flight = self.flights.get(block)
        if flight is None:
            self.ask([(block, 1)], wanted=True)
        elif not flight.wanted:
            flight.wanted = True
            if not flight.started:
                self.later.remove(flight)
                self.urgent.append(flight)
                self.fill()
        self.ask(self.planner.touch(block))

    # What a thread does.

    def thread(self, steps: Iterator[Step]) -> None:
        spent = 0.0
        for step in steps:
            if isinstance(step, tuple):
                self.at(self.now + spent + FAULT, lambda s=step: self.read(s, steps))
                return
            self.needed.add(step)
            # What was there when we began is looked at in virtual time that has not come yet, which
            # is right, for nothing goes away.
            if step not in self.there:
                self.at(self.now + spent, lambda s=step: self.look(s, steps))
                return
            spent += self.work
        self.at(self.now + spent, lambda: None)

    def look(self, block: int, steps: Iterator[Step]) -> None:
        def go_on() -> None:
            self.at(self.now + self.work, lambda: self.thread(steps))

        if block in self.there:
            go_on()
            return
        self.waits += 1
        self.waiting.setdefault(block, []).append(go_on)
        self.at(self.now + FAULT, lambda: block in self.there or self.touch(block))

    def read(self, step: tuple[int, int], steps: Iterator[Step]) -> None:
        first, last = step
        self.needed.update(range(first, last + 1))
        if first == last:
            self.look(first, steps)
            return
        self.ask([(first, last - first + 1)], wanted=True)
        self.ask(self.planner.read(first, last))
        missing = [block for block in range(first, last + 1) if block not in self.there]
        left = len(missing)

        def arrived() -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                self.at(self.now + self.work * (last - first + 1), lambda: self.thread(steps))

        self.waits += bool(missing)
        for block in missing:
            self.waiting.setdefault(block, []).append(arrived)
        if not missing:
            arrived()


def play(
    planner: Callable[[Callable[[int], bool]], Any],
    threads: Iterable[Iterable[Step]],
    blocks: int,
    link: Link,
    speed: float = 4e9,
) -> Figures:
    """Have threads touch blocks of an object of ``blocks``. ``planner`` makes one, given what tells
    whether a block is there; ``speed`` is what each thread works through, in bytes a second."""
    world = _World(planner, blocks, link, speed)
    for steps in threads:
        world.at(0.0, functools.partial(world.thread, iter(steps)))
    world.run()
    return Figures(
        world.now,
        BLOCK * len(world.there),
        BLOCK * len(world.needed),
        world.requests,
        world.waits,
    )


# ------------------------------------------------------------------- workloads


def scan(size: int) -> Iterator[int]:
    return iter(range(size * MIB // BLOCK))


def columns(
    length: int, groups: int, among: int, which: Iterable[int] = (3,), vary: float = 0.0
) -> list[list[int]]:
    """Columns ``which`` of a table, each a thread's: in ``groups`` chunks of ``length`` blocks in
    the midst of others."""
    chance = random.Random(length * groups)
    touches: dict[int, list[int]] = {number: [] for number in which}
    at = 1
    for _group in range(groups):
        for number in range(among):
            size = max(1, round(length * (1 + vary * (2 * chance.random() - 1))))
            if number in touches:
                touches[number] += range(at, at + size)
            at += size
    return list(touches.values())


def in_turn(touches: list[list[int]], length: int) -> list[int]:
    """One chunk of ``length`` blocks of each column after the other."""
    starts = range(0, len(touches[0]), length)
    return [block for at in starts for column in touches for block in column[at : at + length]]


def workloads() -> dict[str, tuple[list[list[Step]], int]]:
    """By name: what threads touch, and the blocks of the object."""
    chance = random.Random(7)
    found: dict[str, tuple[list[list[Step]], int]] = {}
    for size in (32, 64, 256, 1024):
        blocks = size * MIB // BLOCK
        found[f"scan of {size} MiB"] = [list(range(blocks))], blocks
    for size in (64, 256):
        blocks = size * MIB // BLOCK
        found[f"scan of {size} MiB in the midst"] = [list(range(100, blocks + 100))], blocks + 1000
    found["scan by 4 threads"] = [list(range(n * 1024, n * 1024 + 1024)) for n in range(4)], 4096
    found["scan in the midst"] = [list(range(100, 2148))], 4096
    found["scan backwards"] = [list(range(2047, -1, -1))], 2048
    for size in (1, 2, 3, 8, 16, 32, 64):
        length = size * MIB // BLOCK
        found[f"column of {size} MiB"] = columns(length, 1, 10), length * 10 + 2
    found["column of 32 MiB, as a whole, from a footer"] = (
        [[5119, *columns(512, 1, 10)[0]]],
        5122,
    )
    for groups in (2, 4, 10, 32, 128):
        length = 512 // groups
        found[f"32 MiB in {groups} chunks"] = columns(length, groups, 10), length * groups * 11
        found[f"32 MiB in {groups} chunks that vary"] = (
            columns(length, groups, 10, vary=0.1),
            length * groups * 11,
        )
        two = columns(length // 2, groups, 10, (2, 7))
        found[f"two of 16 MiB in {groups} chunks, threads"] = two, length * groups * 11
        mixed = in_turn(columns(length // 2, groups, 10, (2, 7)), length // 2)
        found[f"two of 16 MiB in {groups} chunks, in turn"] = [mixed], length * groups * 11
    for among, which in ((5, (1, 3)), (10, (2, 4, 7))):
        touches = in_turn(columns(16, 32, among, which), 16)
        found[f"{len(which)} of {among} in 32 chunks of 1 MiB, in turn"] = (
            [touches],
            512 * among + 2,
        )
    small = columns(13, 10, 3, (0,))[0]
    found["chunks of 13 and 51 blocks in turn"] = (
        [
            [
                b
                for g in range(10)
                for b in (*range(g * 700, g * 700 + 13), *range(g * 700 + 300, g * 700 + 351))
            ]
        ],
        8000,
    )
    found["a scan after columns"] = [[*small, *range(400, 400 + 2048)]], 2448
    found["random touches after columns"] = (
        [[*columns(51, 4, 10)[0], *(chance.randrange(16384) for _ in range(400))]],
        16384,
    )
    found["random"] = [[chance.randrange(16384) for _ in range(400)]], 16384
    found["random, small object"] = [[chance.randrange(1024) for _ in range(200)]], 1024
    found["random, 4 threads"] = (
        [[chance.randrange(16384) for _ in range(200)] for _ in range(4)],
        16384,
    )
    found["zipf"] = [[int(16384 * chance.random() ** 4) for _ in range(600)]], 16384
    found["stride of 3"] = [list(range(0, 1500, 3))], 4096
    found["stride of 16"] = [list(range(0, 8000, 16))], 8192
    found["clusters of 3"] = (
        [[s + i for s in chance.sample(range(0, 16000, 8), 150) for i in range(3)]],
        16384,
    )
    found["reads of 51 blocks apart"] = [[(n * 510, n * 510 + 50) for n in range(10)]], 5200
    found["reads of 51 blocks, two adjacent"] = (
        [[p for n in range(10) for p in ((n * 510, n * 510 + 50), (n * 510 + 51, n * 510 + 101))]],
        5200,
    )
    for each in (4, 16, 128):
        found[f"a scan by reads of {each} blocks"] = (
            [[(n, n + each - 1) for n in range(0, 2048, each)]],
            2048,
        )
    return found
