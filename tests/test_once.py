"""Operations that happen once: shared by all who ask, cancelled by none of them."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from aiouffd.errors import UsageError
from aiouffd.util.once import Once, cancelled_from_outside


class Steps:
    """An operation that waits at a gate, and counts how often it began and ended."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.began = self.ended = self.undone = 0

    async def run(self) -> int:
        self.began += 1
        try:
            await self.gate.wait()
        finally:
            self.ended += 1
        return 7

    async def undo(self) -> None:
        await asyncio.sleep(0)
        self.undone += 1


async def _begun(steps: Steps, count: int = 1) -> None:
    while steps.began < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_all_who_ask_share_one_run() -> None:
    steps, once = Steps(), Once[int]("opening")
    callers = [asyncio.create_task(once(steps.run)) for _ in range(3)]
    await _begun(steps)
    assert once.running
    steps.gate.set()
    assert await asyncio.gather(*callers) == [7, 7, 7]
    assert await once(steps.run) == 7
    assert (steps.began, once.succeeded, once.running) == (1, True, False)


async def test_closing_goes_on_when_its_caller_is_cancelled() -> None:
    steps, once = Steps(), Once[int]("closing", keep_failure=True)
    caller = asyncio.create_task(once(steps.run))
    await _begun(steps)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert once.running
    steps.gate.set()
    assert await once(steps.run) == 7
    assert steps.began == 1


async def test_opening_ends_when_its_last_caller_is_cancelled() -> None:
    steps, once = Steps(), Once[int]("opening", abandon=True)
    first, second = (asyncio.create_task(once(steps.run)) for _ in range(2))
    await _begun(steps)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait((first,))
    assert (once.running, steps.ended) == (True, 0)
    second.cancel()
    await asyncio.wait((second,))
    assert (once.running, steps.ended) == (False, 1)
    steps.gate.set()
    assert await once(steps.run) == 7, "it can be opened again"
    assert steps.began == 2


async def test_a_success_that_nobody_was_told_of_is_taken_back() -> None:
    steps, once = Steps(), Once[int]("opening", abandon=True)
    caller = asyncio.create_task(once(steps.run, steps.undo))
    await _begun(steps)
    steps.gate.set()
    while not steps.ended:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert not caller.done(), "the operation has succeeded, its caller not yet resumed"
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert (steps.undone, once.succeeded) == (1, False)


async def test_who_asks_while_it_is_given_up_gets_a_run_of_its_own() -> None:
    """And not the end of one that was cancelled for others."""
    leaving = asyncio.Event()
    steps, once = Steps(), Once[int]("opening", abandon=True)

    async def slow_to_end() -> int:
        try:
            return await steps.run()
        finally:
            await leaving.wait()

    caller = asyncio.create_task(once(slow_to_end))
    await _begun(steps)
    caller.cancel()
    await asyncio.sleep(0)
    other = asyncio.create_task(once(steps.run))
    await asyncio.sleep(0)
    caller.cancel()  # once more, and it waits no longer for that end
    with pytest.raises(asyncio.CancelledError):
        await caller
    steps.gate.set()
    leaving.set()
    assert await other == 7
    assert steps.began == 2


@pytest.mark.parametrize("keep", [False, True])
async def test_a_failure_goes_to_those_who_wait(keep: bool) -> None:
    runs = 0

    async def fail() -> None:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)
        raise OSError("no")

    once = Once[None]("it", keep_failure=keep)
    results = await asyncio.gather(once(fail), once(fail), return_exceptions=True)
    assert [type(result) for result in results] == [OSError, OSError]
    if keep:
        assert await once(fail) is None
    else:
        with pytest.raises(OSError, match="no"):
            await once(fail)
    assert runs == (1 if keep else 2)


async def test_what_was_cancelled_before_it_began_can_be_asked_for_again() -> None:
    steps, once = Steps(), Once[int]("closing", keep_failure=True)
    steps.gate.set()
    caller = asyncio.create_task(once(steps.run))
    await asyncio.sleep(0)
    (task,) = asyncio.all_tasks() - {caller, asyncio.current_task()}
    task.cancel()  # as asyncio.run does at its end
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert steps.began == 0
    assert await once(steps.run) == 7


async def test_stop_waits_for_the_end() -> None:
    steps, once = Steps(), Once[int]("opening")
    caller = asyncio.create_task(once(steps.run))
    await _begun(steps)
    await once.stop()
    assert steps.ended == 1
    with pytest.raises(asyncio.CancelledError):
        await caller
    await once.stop()


async def test_an_operation_cannot_wait_for_itself() -> None:
    once = Once[None]("closing the thing")

    async def again() -> None:
        await once(again)

    with pytest.raises(UsageError, match="closing the thing waits for itself"):
        await once(again)


def test_a_loop_that_is_gone_is_not_waited_for() -> None:
    once = Once[str]("closing")

    async def never() -> str:
        await asyncio.Event().wait()
        return "never"

    async def at_once() -> str:
        return "done"

    loop = asyncio.new_event_loop()
    caller = loop.create_task(once(never))
    loop.run_until_complete(asyncio.sleep(0.0))
    assert once.running
    with pytest.raises(UsageError, match="another event loop"):
        asyncio.run(once(at_once))
    left = list(asyncio.all_tasks(loop))
    loop.close()
    assert asyncio.run(once(at_once)) == "done"
    for task in (caller, *left):
        task._log_destroy_pending = False  # type: ignore[attr-defined]


async def test_it_keeps_nothing_alive() -> None:
    class Owner:
        def __init__(self) -> None:
            self.once = Once[None]("closing")

        async def close(self) -> None:
            await asyncio.sleep(0)

    gc.disable()
    try:
        owner = Owner()
        await owner.once(owner.close)
        gone = weakref.ref(owner)
        del owner
        for _ in range(3):
            await asyncio.sleep(0)
        assert gone() is None
    finally:
        gc.enable()


async def test_who_cancelled() -> None:
    seen: list[bool] = []

    async def wait(future: asyncio.Future[Any]) -> None:
        try:
            await future
        except asyncio.CancelledError:
            seen.append(cancelled_from_outside())
            raise

    future = asyncio.get_running_loop().create_future()
    future.cancel()
    task = asyncio.create_task(wait(future))
    await asyncio.wait((task,))
    task = asyncio.create_task(wait(asyncio.get_running_loop().create_future()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    assert seen == [False, True]


async def test_a_success_that_somebody_has_is_not_taken_back() -> None:
    """Two wait; as it succeeds one is told, and the other one is cancelled at the same moment."""
    undone = 0

    async def undo() -> None:
        nonlocal undone
        undone += 1

    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def operation() -> int:
        await ready
        return 7

    once: Once[int] = Once("it", abandon=True)
    first, second = (asyncio.ensure_future(once(operation, undo)) for _ in range(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert once._task is not None
    once._task.add_done_callback(lambda _: second.cancel())
    ready.set_result(None)
    assert await first == 7
    with pytest.raises(asyncio.CancelledError):
        await second
    await asyncio.sleep(0)
    assert undone == 0
    assert await once(operation, undo) == 7
