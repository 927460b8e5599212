"""`aiouffd.sync`: interrupted, at the interpreter's end, inside itself, and short of everything."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.regions.rescue import service
from tests.faulty import PlainSource
from tests.scenarios import sync as scenarios
from tests.support import Gate, content, result_of, run, wait_until

SIZE = 64 * PAGE_SIZE
DATA = content(SIZE)


def test_an_interrupted_readinto_writes_no_more() -> None:
    assert result_of(scenarios.readinto_interrupted, "asyncio") is True


def test_an_interrupted_opening_leaves_nothing_open() -> None:
    seen = result_of(scenarios.interrupted_opening, "asyncio")
    assert seen == ["ended", "interrupted", "opening"]


def test_an_interrupted_closing_goes_on() -> None:
    assert result_of(scenarios.closing_goes_on, "asyncio") == ["interrupted", "closed"]


def test_readinto_other_lazy_memory() -> None:
    with (
        aiouffd.sync.open(PlainSource(DATA), readahead=0) as source,
        aiouffd.sync.open(PlainSource(bytes(SIZE)), readahead=0, writable=True) as target,
    ):
        assert source.readinto(5, target.view[PAGE_SIZE + 7 : 3 * PAGE_SIZE]) == 2 * PAGE_SIZE - 7
        assert target[PAGE_SIZE + 7 : 3 * PAGE_SIZE] == DATA[5 : 2 * PAGE_SIZE - 2]
        assert target[: PAGE_SIZE + 7] == bytes(PAGE_SIZE + 7)


@pytest.mark.filterwarnings("ignore::aiouffd.BlockingTouchWarning")
async def test_async_readinto_other_lazy_memory() -> None:
    async with (
        aiouffd.open(PlainSource(DATA), readahead=0) as source,
        aiouffd.open(PlainSource(bytes(SIZE)), readahead=0, writable=True) as target,
    ):
        assert await source.readinto(5, target.view[7:PAGE_SIZE]) == PAGE_SIZE - 7
        assert await target.read(7, PAGE_SIZE - 7) == DATA[5 : PAGE_SIZE - 2]


async def test_installing_from_lazy_memory_is_refused() -> None:
    async with (
        aiouffd.Pager() as pager,
        aiouffd.open(PlainSource(DATA), readahead=0) as lazy,
    ):
        region = pager.map(SIZE)
        with pytest.raises(aiouffd.UsageError) as caught:
            region.install(0, lazy.view[:PAGE_SIZE])
        assert "not lazy itself" in str(caught.value.hint)
        with pytest.raises(aiouffd.UsageError):
            region.serve_from(lazy.view)


def test_inside_a_loop_it_blocks_that_loop(loop_name: str) -> None:
    assert result_of(scenarios.inside_a_loop, loop_name) is True


def test_a_signal_handler_may_come_anywhere() -> None:
    (places,) = result_of(scenarios.everywhere, "asyncio")
    assert places > 40


def test_a_signal_handler_may_raise_anywhere() -> None:
    outcome = run(scenarios.interrupted_at_random, "asyncio", 100, warnings="ignore")
    assert outcome.status == 0, outcome.stderr
    assert outcome.result == {"tasks": 0, "regions": 0, "descriptors": 0}


@pytest.mark.parametrize("answers", [True, False], ids=["a live source", "a dead source"])
@pytest.mark.parametrize(
    "how",
    ["__del__", "__del__ of another module", "generator", "finalize", "finalize atexit", "atexit"],
)
def test_closing_at_the_end_of_the_interpreter(how: str, answers: bool) -> None:
    outcome = run(scenarios.closed_at_exit, "asyncio", how, answers, warnings="ignore", limit=15.0)
    assert (outcome.status, outcome.stderr) == (0, "")
    assert outcome.stdout == ("closed\n" if how.startswith("__del__") else "")
    assert outcome.seconds < 10


def test_with_too_few_descriptors_it_is_an_error_now_and_works_later() -> None:
    outcomes = result_of(scenarios.sync_without_descriptors, "asyncio")
    first = outcomes.index(1)
    assert set(outcomes[:first]) == {errno.EMFILE}
    assert set(outcomes[first:]) == {1}


def test_a_touch_waits_for_descriptors_of_the_rescue_loop(loop_name: str) -> None:
    assert (
        result_of(scenarios.touch_without_descriptors, loop_name, warnings="ignore")
        == DATA[PAGE_SIZE]
    )


@pytest.mark.needs_root
def test_without_threads_it_is_an_error_now_and_works_later() -> None:
    outcomes = result_of(scenarios.without_threads, "asyncio", warnings="ignore")
    assert outcomes == [errno.EAGAIN, errno.EAGAIN, 1]


def test_an_interrupt_just_after_a_call_was_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be running by then: it is cancelled, and not thrown away under the loop."""
    data = content(SIZE)
    posting = service._post

    def post(call: Any) -> None:
        posting(call)
        if getattr(call, "posted", False) and not gone:
            gone.append(call)
            wait_until(lambda: call._task is not None, "it to run")
            raise KeyboardInterrupt

    gone: list[Any] = []
    with aiouffd.sync.open(data):  # so that the loop is there
        pass
    gate = Gate(data, is_open=False)
    with aiouffd.sync.open(gate.read, size=SIZE, portable=True, readahead=0) as buf:
        monkeypatch.setattr(service, "_post", post)
        with pytest.raises(KeyboardInterrupt):
            buf.fetch(0, SIZE)
        (call,) = gone
        wait_until(lambda: call._task.done(), "it to end")
        gate.open()
        assert buf.read(0, SIZE) == data
