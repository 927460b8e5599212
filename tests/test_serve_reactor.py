"""The reader of many clients' descriptors: who is served when, with pipes in place of clients."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator

import pytest

from aiouffd.foreign.reactor import TURN, Reactor, Share

NAMES = list[str]


def work(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


async def turns(until: Callable[[], bool]) -> None:
    """Turns of the loop, as many as it needs."""
    for _ in range(1000):
        if until():
            return
        await asyncio.sleep(0)
    raise AssertionError("nobody was served")


class Pipe:
    """Is readable until it was served as often as it was rung."""

    def __init__(self, name: str, served: NAMES, then: Callable[[], None] = lambda: None) -> None:
        self.share = Share()
        self.name, self.served, self.then = name, served, then
        self.reading, self.writing = os.pipe()

    def ring(self, count: int = 1) -> None:
        os.write(self.writing, b"x" * count)

    def fileno(self) -> int:
        return self.reading

    def serve_some(self) -> None:
        os.read(self.reading, 1)
        self.served.append(self.name)
        self.then()

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)


@pytest.fixture
def served() -> NAMES:
    return []


@pytest.fixture
def make(served: NAMES) -> Iterator[Callable[..., Pipe]]:
    made: list[Pipe] = []

    def make(name: str, **more: Callable[[], None]) -> Pipe:
        made.append(Pipe(name, served, **more))
        return made[-1]

    yield make
    for pipe in made:
        pipe.close()


async def test_who_has_had_least_comes_first(served: NAMES, make: Callable[..., Pipe]) -> None:
    reactor = Reactor()
    try:
        # Each turn has time for one of them.
        greedy = [make(f"greedy {n}", then=lambda: work(2 * TURN)) for n in range(4)]
        quiet = make("quiet")
        for pipe in (*greedy, quiet):
            reactor.add(pipe)
        for pipe in greedy:
            pipe.ring(20)
        await turns(lambda: len(served) >= 20)
        del served[:]
        quiet.ring()
        await turns(lambda: "quiet" in served)
        assert served[0] == "quiet"
        # Nobody starves. (How often each comes is a matter of the time that it was charged, in
        # which others may have had the CPU.)
        await turns(lambda: all(served.count(pipe.name) >= 3 for pipe in greedy))
    finally:
        reactor.close()


async def test_work_gives_way_to_who_waits(served: NAMES, make: Callable[..., Pipe]) -> None:
    reactor = Reactor()
    try:
        waiting = make("waiting", then=reactor.give_way)  # which does not begin another turn
        reactor.add(waiting)
        waiting.ring(2)
        work(2 * TURN)
        reactor.give_way()
        assert served == ["waiting"]
        reactor.give_way()  # it has just had its turn
        assert served == ["waiting"]
        work(2 * TURN)
        reactor.give_way()
        assert served == ["waiting", "waiting"]
    finally:
        reactor.close()
        reactor.give_way()  # nobody is there any more


async def test_who_is_removed_is_not_served(served: NAMES, make: Callable[..., Pipe]) -> None:
    reactor = Reactor()
    try:
        # Of two that are ready at once, the first that is served ends the other.
        first = make("one", then=lambda: reactor.remove(second.fileno()))
        second = make("other", then=lambda: reactor.remove(first.fileno()))
        for pipe in (first, second):
            reactor.add(pipe)
            pipe.ring(1)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(served) == 1
    finally:
        reactor.close()
