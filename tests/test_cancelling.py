"""The harness that cancels everywhere finds what operations leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading

import pytest

from tests import cancelling
from tests.cancelling import BY_CALLER, EVERY_WAY, Cut, Way, cancel_everywhere


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancelling, "LIMIT", 0.2)


async def _steps(count: int) -> int:
    for _ in range(count):
        await asyncio.sleep(0)
    return 7


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_it_is_cut_off_at_every_suspension(way: Way) -> None:
    places: list[str | None] = []

    async def run(cut: Cut) -> None:
        result = await cut(_steps(3))
        assert result == (None if cut.cancelled else 7)
        places.append(cut.where)

    assert await cancel_everywhere(run, ways=[way]) == 3
    assert [place is None for place in places] == [True, True, False, False, False, True]


async def test_tasks_of_the_operation_count_as_well() -> None:
    ends: list[str] = []

    async def child() -> None:
        try:
            await _steps(2)
            ends.append("child")
        except asyncio.CancelledError:
            ends.append("cancelled child")
            raise

    async def operation() -> None:
        task = asyncio.ensure_future(child())
        try:
            await asyncio.wait((task,))
            ends.append("operation")
        finally:
            task.cancel()
            await asyncio.wait((task,))

    async def run(cut: Cut) -> None:
        await cut(operation())

    assert await cancel_everywhere(run, ways=[Way.TASK]) == 4
    assert ends.count("cancelled child") == 3, "twice itself, once its parent"
    assert ends.count("child") == 4, "three whole runs, and one in which it was done by then"


@pytest.mark.usefixtures("impatient")
async def test_a_result_that_nobody_was_told_of_is_found() -> None:
    async def operation() -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[int, int]] = loop.create_future()
        loop.call_soon(lambda: future.cancelled() or future.set_result(os.pipe()))
        held.append(future)
        for fd in await future:
            os.close(fd)
        held.clear()

    held: list[asyncio.Future[tuple[int, int]]] = []

    async def run(cut: Cut) -> None:
        await cut(operation())

    with pytest.raises(AssertionError, match=r"late.*descriptors': 2"):
        await cancel_everywhere(run, ways=[Way.LATE])
    for fd in held.pop().result():
        os.close(fd)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", ["descriptors", "threads", "tasks"])
async def test_what_is_left_behind_is_named(what: str) -> None:
    let_go: list[object] = []

    async def operation() -> None:
        if what == "descriptors":
            fd = os.open("/dev/null", os.O_RDONLY)
            let_go.append(lambda: os.close(fd))
            await asyncio.sleep(0)
            os.close(fd)
        elif what == "threads":
            event = threading.Event()
            thread = threading.Thread(target=event.wait)
            thread.start()
            let_go.append(event.set)
            await asyncio.sleep(0)
            event.set()
        else:
            task = asyncio.ensure_future(asyncio.sleep(3600))
            let_go.append(task.cancel)
            await asyncio.sleep(0)
            task.cancel()
        let_go.clear()

    async def run(cut: Cut) -> None:
        await cut(operation())

    with pytest.raises(AssertionError, match=f"(?s)operation > sleep.*left behind.*{what}"):
        await cancel_everywhere(run, ways=[Way.CALLER])
    for function in let_go:
        function()  # type: ignore[operator]


@pytest.mark.usefixtures("impatient")
async def test_an_operation_that_does_not_end_is_found() -> None:
    async def operation() -> None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            await asyncio.sleep(3600)

    async def run(cut: Cut) -> None:
        await cut(operation())

    with pytest.raises(AssertionError, match="it goes on, cancelled by way of 'its caller'"):
        await cancel_everywhere(run, ways=[Way.CALLER])


@pytest.mark.parametrize("way", BY_CALLER)
async def test_an_operation_that_swallows_it_is_found(way: Way) -> None:
    async def operation() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)

    async def run(cut: Cut) -> None:
        await cut(operation())

    with pytest.raises(AssertionError, match="as if nothing had happened"):
        await cancel_everywhere(run, ways=[way])


@pytest.mark.usefixtures("impatient")
async def test_other_counts_are_compared_too() -> None:
    made = 0

    async def operation() -> None:
        nonlocal made
        made += 1
        await asyncio.sleep(0)
        made -= 1

    async def run(cut: Cut) -> None:
        await cut(operation())

    with pytest.raises(AssertionError, match="connections': 1"):
        await cancel_everywhere(run, also=lambda: {"connections": made})


async def test_an_operation_that_never_waits_is_no_test() -> None:
    async def operation() -> None:
        pass

    async def run(cut: Cut) -> None:
        await cut(operation())

    with pytest.raises(AssertionError, match="never waits"):
        await cancel_everywhere(run)
