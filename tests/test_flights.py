"""The fetch engine by itself, and that every destination has one failure policy."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import ClosedError, SourceChangedError, SourceError, SourceTimeoutError
from aiouffd.fetch import flights as flights_module
from aiouffd.fetch.flights import Flight, FlightCancelledError, Flights
from aiouffd.fetch.policy import Policy
from aiouffd.fetch.tally import Tally
from aiouffd.foreign.blocks import BlockStore
from aiouffd.foreign.reactor import Share
from aiouffd.sources import FunctionSource
from aiouffd.util.backoff import LONGEST_OBEYED, Backoff
from aiouffd.util.usercode import Complaints
from tests.nbd_peers import until

PAGE = 4096


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights_module, "RETRY_FIRST", 0.002)
    monkeypatch.setattr(flights_module, "RETRY_LONGEST", 0.02)


class Place:
    """A destination that notes what comes, and waits until it is told to."""

    block_size = PAGE
    length = 1000 * PAGE - 1
    gone = False

    def __init__(self, policy: Policy | None = None, **settings: Any) -> None:
        self.tally = Tally()
        self.began: list[int] = []
        self.over: list[tuple[int, BaseException | None]] = []
        self.gave_up: list[SourceError] = []
        self.dropped_: list[int] = []
        self.gates: dict[int, asyncio.Future[None]] = {}
        self.wanted = False
        settings = {"most": 2, "closed": "the place is closed", **settings}
        complaints = Complaints(asyncio.get_running_loop())
        self.flights: Flights[Flight] = Flights(
            self, policy or Policy(), self.tally, complaints, **settings
        )

    def ask(self, first: int, count: int = 1, *, wanted: bool = True, rank: float = 0) -> Flight:
        flight = Flight(first, count, "fetch", wanted=wanted)
        self.flights.launch(flight, rank)
        return flight

    async def bring(self, flight: Flight) -> None:
        self.began.append(flight.first)
        self.gates[flight.first] = asyncio.get_running_loop().create_future()
        await self.gates[flight.first]
        flight.offset = flight.end

    async def land(self, *blocks: int, error: BaseException | None = None) -> None:
        for block in blocks:
            if error is None:
                self.gates.pop(block).set_result(None)
            else:
                self.gates.pop(block).set_exception(error)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(8):
            await asyncio.sleep(0)

    def arrived(self, flight: Flight) -> None:
        raise AssertionError("it came in one piece")

    def still_wanted(self, flight: Flight) -> bool:
        return self.wanted

    def give_up(self, flight: Flight, error: SourceError) -> bool:
        self.gave_up.append(error)
        return True

    def ended(self, flight: Flight, error: BaseException | None, finished: float) -> None:
        assert finished >= flight.started
        self.over.append((flight.first, error))

    def dropped(self, flight: Flight) -> None:
        self.dropped_.append(flight.first)

    def name(self, flight: Flight) -> str:
        return f"blocks {flight.blocks}"


class TestOrder:
    async def test_who_waits_goes_first_and_who_had_least(self) -> None:
        place = Place()
        place.ask(0)
        place.ask(1)
        place.ask(10, 5, wanted=False)
        for block, rank in ((2, 5.0), (3, 1.0), (4, 1.0), (5, 0.5)):
            place.ask(block, rank=rank)
        await place.settle()
        assert place.began == [0, 1]
        for block in (0, 1, 5, 3, 4, 2, 10):
            await place.land(block)
        assert place.began == [0, 1, 5, 3, 4, 2, 10]
        assert place.flights.of == {}
        assert place.flights.in_flight == 0

    async def test_background_has_a_limit_of_its_own(self) -> None:
        place = Place(most=3, background=1)
        for block in (0, 1, 2):
            place.ask(block, wanted=False)
        place.ask(3)
        await place.settle()
        assert place.began == [0, 3]
        await place.land(0)
        assert place.began == [0, 3, 1]
        await place.land(3, 1)
        await place.land(2)
        assert [block for block, _ in place.over] == [0, 3, 1, 2]

    async def test_waited_for_after_all(self) -> None:
        place = Place(most=1)
        place.ask(0)
        place.ask(1, wanted=False)
        later = place.ask(2, wanted=False)
        place.flights.want(later)
        place.flights.want(later)
        await place.settle()
        await place.land(0)
        await place.land(2)
        assert place.began == [0, 2, 1]
        await place.land(1)
        assert len(place.over) == 3

    async def test_nobody_wants_it_any_more(self) -> None:
        place = Place(most=1)
        place.ask(0)
        place.flights.drop(place.ask(1))
        place.flights.drop(place.ask(2, wanted=False))
        again = place.ask(1)
        await place.settle()
        await place.land(0)
        assert place.flights.of == {1: again}
        await place.land(1)
        assert place.began == [0, 1]

    async def test_the_last_block_is_short(self) -> None:
        place = Place()
        flight = place.ask(998, 2)
        assert (flight.offset, flight.end) == (998 * PAGE, place.length)
        await place.settle()
        await place.land(998)


class TestEnds:
    async def test_cancelled_before_its_first_step(self) -> None:
        """A task that is cancelled then runs no `finally`: who waits must be told all the same."""
        place = Place(most=1)
        flight, other = place.ask(0), place.ask(1)
        assert flight.task is not None
        flight.task.cancel()
        with pytest.raises(FlightCancelledError):
            await flight.wait()
        assert place.began == [] or place.began == [1]
        await place.settle()
        await place.land(1)
        await other.wait()
        assert [block for block, _ in place.over] == [0, 1]

    async def test_stopped(self) -> None:
        place = Place(most=1)
        running, queued, later = place.ask(0), place.ask(1), place.ask(2, wanted=False)
        await place.settle()
        tasks = place.flights.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for flight in (running, queued, later, place.ask(3)):
            with pytest.raises(ClosedError, match="the place is closed"):
                await flight.wait()
        assert sorted(place.dropped_) == [1, 2]
        assert [block for block, _ in place.over] == [0]
        assert isinstance(place.over[0][1], ClosedError)

    async def test_a_bug_of_ours_is_told_and_ends_one_flight(
        self, loop_errors: list[dict[str, Any]]
    ) -> None:
        place = Place()
        place.name = lambda flight: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        flight = place.ask(0)
        await place.settle()
        await place.land(0, error=ConnectionResetError("x"))
        with pytest.raises(FlightCancelledError):
            await flight.wait()
        assert [type(context["exception"]) for context in loop_errors] == [ZeroDivisionError]
        other = place.ask(1)
        await place.settle()
        await place.land(1)
        await other.wait()

    async def test_delivered_and_then_failed(self, loop_errors: list[dict[str, Any]]) -> None:
        place = Place()

        async def bring(flight: Flight) -> None:
            flight.offset = flight.end
            raise ValueError("too late")

        place.bring = bring  # type: ignore[method-assign]
        await place.ask(0).wait()
        assert "delivered all" in loop_errors[0]["message"]

    async def test_nobody_waits_for_a_failure(self) -> None:
        place = Place()
        flight = place.ask(0, wanted=False)
        await place.settle()
        await place.land(0, error=ConnectionResetError("x"))
        with pytest.raises(SourceError, match="ConnectionResetError"):
            await flight.wait()
        assert place.gave_up == []
        place.wanted = True
        flight = place.ask(0, wanted=False)
        await place.settle()
        await place.land(0, error=ConnectionResetError("x"))
        await until(lambda: 0 in place.gates)
        await place.land(0)
        await flight.wait()

    async def test_the_time_counts_from_when_somebody_waits(self) -> None:
        place = Place(Policy("soft", 0.05))
        flight = place.ask(0, wanted=False)
        await asyncio.sleep(0.1)  # which is more than a wait may last
        assert not flight.finished
        place.flights.want(flight)
        with pytest.raises(SourceTimeoutError, match=r"did not arrive within 0\.05 s"):
            await flight.wait()
        assert len(place.gave_up) == 1


def test_pauses_double_and_are_spread() -> None:
    backoff = Backoff(0.1, 1.0)
    for expected in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert backoff.pause == pytest.approx(expected)
        assert expected * 0.5 <= backoff.next() <= min(expected * 1.5, 1.0)
    assert backoff.next(SourceError("busy", retry_after=7.0)) == 7.0
    assert backoff.next(SourceError("busy", retry_after=1e9)) == LONGEST_OBEYED
    backoff.reset()
    assert backoff.next() <= 0.15


# ------------------------------------------------- one policy, whatever the destination

#: What a source raises, and what becomes of it: "again", until the deadline if there is one, or
#: "final"; for ever if hard, but for an object that has changed.
RAISED: list[tuple[Callable[[], BaseException], str]] = [
    (lambda: ConnectionResetError("x"), "again"),
    (lambda: BrokenPipeError("x"), "again"),
    (lambda: TimeoutError("x"), "again"),
    (lambda: asyncio.IncompleteReadError(b"", 3), "again"),
    (lambda: SourceError("x", transient=True), "again"),
    (lambda: SourceError("x", transient=False), "final"),
    (lambda: PermissionError("x"), "final"),
    (lambda: ValueError("x"), "final"),
    (lambda: asyncio.CancelledError(), "final"),
    (lambda: SourceChangedError("x"), "changed"),
]


class Failing:
    """Fails ``most`` times."""

    def __init__(self, make: Callable[[], BaseException], most: int) -> None:
        self.make, self.most, self.calls = make, most, 0

    async def read(self, offset: int, length: int) -> bytes:
        self.calls += 1
        if self.calls <= self.most:
            raise self.make()
        return bytes([7]) * length


class OneWanter:
    """Waits for a block of a store."""

    def __init__(self) -> None:
        self.share = Share()
        self.came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def landed(self, store: BlockStore, block: int, data: memoryview | None) -> None:
        self.came.set_result(b"" if data is None else bytes(data))

    def failed(self, store: BlockStore, block: int, error: BaseException) -> None:
        self.came.set_exception(error)

    def broken(self, error: Exception) -> None:
        raise AssertionError(error)


async def by_buffer(source: FunctionSource, policy: Policy) -> bytes:
    async with aiouffd.open(source, errors=policy.errors, deadline=policy.deadline) as buffer:
        return bytes(await buffer.read(0, PAGE))


async def by_store(source: FunctionSource, policy: Policy) -> bytes:
    store = BlockStore(source, policy=policy)
    await store.open()
    try:
        wanter = OneWanter()
        store.want(0, wanter)
        return (await wanter.came)[:PAGE]
    finally:
        await store.aclose()


@pytest.fixture(params=[by_buffer, by_store], ids=["buffer", "store"])
def fetch(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize(
    ("make", "fate"), RAISED, ids=[f"{type(make()).__name__}-{fate}" for make, fate in RAISED]
)
@pytest.mark.parametrize("policy", [Policy(), Policy("soft", 0.1)], ids=["hard", "soft"])
async def test_what_a_failure_leads_to(
    fetch: Any, make: Callable[[], BaseException], fate: str, policy: Policy
) -> None:
    passing = Failing(make, 3)
    if fate == "again" or (fate == "final" and policy.errors == "hard"):
        assert await fetch(FunctionSource(passing.read, PAGE), policy) == bytes([7]) * PAGE
        assert passing.calls == 4
    else:
        with pytest.raises(SourceError):
            await fetch(FunctionSource(passing.read, PAGE), policy)
        assert passing.calls == 1
    if fate == "again" and policy.errors == "soft":
        lasting = Failing(make, 10**9)
        with pytest.raises(SourceError):
            await fetch(FunctionSource(lasting.read, PAGE), policy)
        assert lasting.calls > 2


# ------------------------------------------------------------- without a task


class Moody:
    """Has its bytes at hand, until it is told to do otherwise."""

    def __init__(self) -> None:
        self.mood = "at hand"
        self.calls = 0

    async def read(self, offset: int, length: int) -> bytes:
        self.calls += 1
        match self.mood:
            case "waits":
                await asyncio.sleep(0.001)
            case "needs a task":
                async with asyncio.timeout(10):
                    await asyncio.sleep(0.001)
            case "needs a task at hand":
                assert asyncio.current_task() is not None
            case "fails":
                self.mood = "at hand"
                raise ConnectionResetError("x")
        return bytes([offset // PAGE % 251 + 1]) * length


@pytest.mark.parametrize("then", ["waits", "needs a task", "needs a task at hand", "fails"])
async def test_bytes_at_hand_need_no_task(then: str) -> None:
    moody, blocks = Moody(), 80
    loop, made = asyncio.get_running_loop(), 0

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> Any:
        nonlocal made
        made += getattr(coroutine, "__qualname__", "") == "Flights._fly"
        return asyncio.Task(coroutine, loop=loop, **more)

    loop.set_task_factory(factory)
    source = FunctionSource(moody.read, blocks * PAGE)
    async with aiouffd.open(source, block_size=PAGE, readahead=0) as buffer:
        view = buffer.view

        def touch(first: int, end: int) -> None:
            for block in range(first, end):
                # Which releases the GIL: the loop shall serve, and not the rescue loop.
                found = hashlib.sha256(view[block * PAGE : (block + 1) * PAGE]).digest()
                assert found == hashlib.sha256(bytes([block % 251 + 1]) * PAGE).digest()

        await asyncio.to_thread(touch, 0, 20)
        assert made
        before, calls = made, moody.calls
        await asyncio.to_thread(touch, 20, 40)
        assert made == before < 20
        assert moody.calls == calls + 20
        moody.mood = then
        await asyncio.to_thread(touch, 40, 60)
        moody.mood = "at hand"
        await asyncio.to_thread(touch, 60, 80)
        assert made > before
        assert buffer.stats.failures == 0


async def test_many_threads_leave_the_loop_its_turns() -> None:
    """Who is served at once faults again at once: that must not go on in one turn of the loop."""
    threads, each = 100, 100
    moody = Moody()
    loop, between, most = asyncio.get_running_loop(), 0, 0
    ended = asyncio.Event()

    async def read(offset: int, length: int) -> bytes:
        nonlocal between
        between += 1
        return await moody.read(offset, length)

    def turn() -> None:
        nonlocal between, most
        most, between = max(most, between), 0
        if not ended.is_set():
            loop.call_soon(turn)

    source = FunctionSource(read, threads * each * PAGE)
    async with aiouffd.open(source, block_size=PAGE, readahead=0) as buffer:
        view = buffer.view

        def touch(number: int) -> None:
            start = number * each * PAGE
            hashlib.sha256(view[start : start + each * PAGE]).digest()
            loop.call_soon_threadsafe(left.pop)
            loop.call_soon_threadsafe(lambda: left or ended.set())

        left = list(range(threads))
        turn()
        for number in range(threads):
            threading.Thread(target=touch, args=(number,), daemon=True).start()
        async with asyncio.timeout(60):
            await ended.wait()
    assert moody.calls == threads * each
    # The descriptor, and what was read beside it by a native thread.
    assert most <= 3 * threads
