"""Touches that the pager's own loop cannot serve: the rescue loop, and what ends in an error."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE, lib
from aiouffd.sources import FunctionSource
from tests.scenarios.gil_yield import TOUCHES, NewLoop, Threads, on, serving
from tests.support import WORD, Counters, Gate, content, wait_until, word

SIZE = 64 * PAGE_SIZE


def opened(**settings: Any) -> aiouffd.LazyBuffer:
    """A buffer over `content` whose source works on any loop."""
    gate = Gate(content(SIZE))
    source = FunctionSource(gate.read, SIZE, portable=settings.pop("portable", True))
    return aiouffd.open(source, block_size=PAGE_SIZE, readahead=0, **settings)


@contextmanager
def logged() -> Iterator[list[str]]:
    """What aiouffd logs, instead of writing it to stderr."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    logger, handler = logging.getLogger("aiouffd"), Keep()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@contextmanager
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


async def until(condition: Callable[[], object], what: str) -> None:
    """Let the loop run until ``condition``: reports come after the service, from another thread."""
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit, f"waited for {what}"
        await asyncio.sleep(0.001)


# ----------------------------------------------------------- the loop's thread


def touch_by(way: str, view: memoryview, at: int) -> int:
    """As the touches of `gil_yield`, and with a socket."""
    if way == "send":
        left, right = socket.socketpair()
        with left, right:
            left.send(view[at : at + WORD])
            return int.from_bytes(right.recv(WORD), "little")
    return TOUCHES[way](view, at)


async def loop_thread(way: str) -> dict[str, Any]:
    """The loop's own thread touches: it is served, and told about."""
    counters = Counters()
    async with opened() as buffer:
        with recorded() as found:
            for number in range(3):
                at = (2 * number + 1) * PAGE_SIZE
                assert touch_by(way, buffer.view, at) == word(at)
            await until(lambda: found, "the warning")
            # Reports are in order: this one comes after all of those. A rescue that is under way
            # may serve a touch before it has seen who waits, so more than one may be needed.
            at = 20 * PAGE_SIZE
            while len(found) < 2 and at < 60 * PAGE_SIZE:
                assert touch_by("compare", buffer.view, at) == word(at)
                at += PAGE_SIZE
                for _ in range(20):
                    await asyncio.sleep(0.001)
            assert len(found) > 1, "no word of the second call site"
        rescued = buffer.stats.rescued
    return {
        **counters.deltas(),
        "rescued": rescued,
        "touches": 3 + at // PAGE_SIZE - 20,
        "warnings": [str(item.message) for item in found],
        "categories": sorted({item.category.__name__ for item in found}),
        "files": [os.path.basename(item.filename) for item in found],
    }


async def warning_is_error() -> dict[str, Any]:
    """With warnings as errors the loop's exception handler gets it; the touch is unharmed."""
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
    async with opened() as buffer:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert TOUCHES["struct"](buffer.view, PAGE_SIZE) == word(PAGE_SIZE)
            await until(lambda: contexts, "the exception handler")
    return {"kinds": [type(context.get("exception")).__name__ for context in contexts]}


async def strict_touch() -> None:
    async with opened(strict=True) as buffer:
        print("begins", flush=True)
        TOUCHES["struct"](buffer.view, PAGE_SIZE)
        print("survived", flush=True)


# ------------------------------------------------------------ the loop is away


async def loop_waits_for(what: str, ways: list[str]) -> dict[str, int]:
    """The loop's thread waits for a thread that waits for pages: only a rescue can help."""
    counters = Counters()
    async with opened() as buffer:
        touched = False

        def touch() -> None:
            nonlocal touched
            for number, way in enumerate(ways):
                at = 2 * number * PAGE_SIZE
                assert TOUCHES[way](buffer.view, at) == word(at)
            touched = True

        match what:
            case "join":
                thread = threading.Thread(target=touch)
                thread.start()
                thread.join()
            case "future":
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    pool.submit(touch).result()
            case "callback":
                # A slow callback, which is over when the touch is.
                over = threading.Event()

                def slow() -> None:
                    assert over.wait(10)

                asyncio.get_running_loop().call_soon(slow)
                workers = Threads()

                def touch_and_tell() -> None:
                    touch()
                    over.set()

                workers.start(touch_and_tell)
                await workers.ended()
        assert touched
        # The loop is back and serves as before.
        for number, way in enumerate(ways):
            at = (2 * number + 1) * PAGE_SIZE
            assert await asyncio.to_thread(TOUCHES[way], buffer.view, at) == word(at)
    return counters.deltas()


def loop_not_running(
    new_loop: NewLoop, ways: list[str], on_main: bool, closed: bool
) -> dict[str, int]:
    """Between two runs of the loop, or after its end."""
    counters = Counters()
    loop = new_loop()
    buffer = loop.run_until_complete(opened().aopen())
    if closed:
        loop.close()

    def touch() -> None:
        for number, way in enumerate(ways):
            at = 3 * number * PAGE_SIZE
            assert TOUCHES[way](buffer.view, at) == word(at)

    with recorded():
        if on_main:
            touch()
        else:
            workers = Threads()
            workers.start(touch)
            workers.join()
        if closed:
            loop = new_loop()
        loop.run_until_complete(buffer.aclose())
        loop.close()
    return counters.deltas()


# ------------------------------------------------------------- not portable


async def not_portable(way: str, deadline: float) -> dict[str, Any]:
    """A handler that only its own loop can run, and a touch from that loop's thread."""
    gate = Gate(content(SIZE))
    with logged() as lines, recorded() as found:
        async with aiouffd.Pager(rescue_deadline=deadline) as pager:
            region = pager.map(SIZE)
            region.on_missing(gate)
            started = time.monotonic()
            reader, writer = os.pipe()
            print("begins", flush=True)
            try:
                if way == "write":
                    os.write(writer, region.view[:WORD])
                else:
                    TOUCHES[way](region.view, 0)
                failed = 0
            except OSError as error:
                failed = error.errno or -1
            seconds = time.monotonic() - started
            os.close(reader)
            os.close(writer)
            # The others live: the loop's handler serves as before.
            at = 2 * PAGE_SIZE
            assert await asyncio.to_thread(TOUCHES["struct"], region.view, at) == word(at)
            await until(lambda: found, "the warning")
    return {"errno": errno.errorcode.get(failed), "seconds": seconds, "lines": lines}


async def slow_but_coming() -> dict[str, Any]:
    """Not portable, and the loop is late but comes before the deadline: no error."""
    gate = Gate(content(SIZE))
    counters = Counters()
    with logged() as lines:
        async with aiouffd.Pager(rescue_deadline=20.0) as pager:
            region = pager.map(SIZE)
            region.on_missing(gate)
            workers = Threads()

            def touch() -> None:
                assert TOUCHES["struct"](region.view, 0) == word(0)

            workers.start(touch)
            # Blocks the loop until its absence has been noticed.
            wait_until(lambda: counters["rescues"] > 0, "a rescue")
            await workers.ended()
    return {**counters.deltas(), "lines": lines}


# ------------------------------------------------------------------ last resort


def kernel_mode_with_gil(new_loop: NewLoop, stall: float, masked: bool) -> dict[str, Any]:
    """setsockopt reads the page in the kernel and keeps the GIL: nobody can ask for it back."""
    gate = Gate(content(SIZE))
    with logged() as lines, serving(new_loop) as loop:

        async def begin() -> tuple[aiouffd.Pager, aiouffd.Region]:
            pager = aiouffd.Pager(stall=stall).open()
            region = pager.map(SIZE)
            region.on_missing(gate, portable=True)
            return pager, region

        pager, region = on(loop, begin())
        if masked:
            signal.pthread_sigmask(signal.SIG_BLOCK, {lib.au_handler_signal()})
        threading.current_thread().name = "the toucher"
        counters = Counters()
        failed = 0
        started = time.monotonic()
        with socket.socket() as endpoint:
            try:
                endpoint.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVTIMEO, region.view[PAGE_SIZE : PAGE_SIZE + 16]
                )
            except OSError as error:
                failed = error.errno or -1
        seconds = time.monotonic() - started
        wait_until(lambda: any("the toucher" in line for line in lines), "the report")
        deltas = counters.deltas()
        # All else lives.
        assert TOUCHES["write"](region.view, 0) == word(0)
        on(loop, pager.aclose())
    return {**deltas, "errno": errno.errorcode.get(failed), "seconds": seconds, "lines": lines}
