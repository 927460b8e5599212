"""How a process ends, or is stopped and looked at, while threads wait for pages."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.regions import rescue
from tests.scenarios.gil_yield import TOUCHES, NewLoop, Threads, by_struct, on
from tests.support import Counters, Gate, content, wait_until, word

SIZE = 32 * PAGE_SIZE
#: What a program forgets to close.
kept: list[Any] = []


def dead_source(new_loop: NewLoop) -> tuple[aiouffd.Region, Gate]:
    """A region whose handler never answers, on a loop in a thread that nobody waits for."""
    gate = Gate(content(SIZE), is_open=False)
    loop = new_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def begin() -> aiouffd.Region:
        pager = aiouffd.Pager().open()
        region = pager.map(SIZE)
        region.on_missing(gate, portable=True)
        kept.append((pager, region, loop))
        return region

    return on(loop, begin()), gate


def blocked(new_loop: NewLoop, who: str, way: str, status: int) -> None:
    """Ends with ``status`` while a thread waits for a page for ever."""
    region, gate = dead_source(new_loop)
    touch: Callable[..., int] = TOUCHES[way]
    match who:
        case "daemon" | "plain":
            threading.Thread(
                target=touch, args=(region.view, 0), name="toucher", daemon=who == "daemon"
            ).start()
        case "executor":
            pool = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="toucher")
            kept.append((pool, pool.submit(touch, region.view, 0)))
    gate.wait()
    if way == "struct":
        wait_until(lambda: Counters.total("yields") > 0, "the yield")
    if status:
        sys.exit(status)


def blocked_for_python(new_loop: NewLoop) -> None:
    """The interpreter cannot be told that a thread is left behind."""
    rescue._take_for_daemon = lambda _thread: None
    print("said", end="")
    blocked(new_loop, "plain", "struct", 3)


def blocked_sync(new_loop: NewLoop, status: int) -> None:
    """The same with a buffer of `aiouffd.sync`, served by the background loop."""
    gate = Gate(content(SIZE), is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, SIZE, portable=True)
    buffer = aiouffd.sync.open(source)
    kept.append(buffer)
    threading.Thread(target=by_struct, args=(buffer.view, 0), name="toucher").start()
    gate.wait()
    sys.exit(status)


def answered_late(new_loop: NewLoop, status: int) -> None:
    """The source answers while the interpreter waits for its threads: nobody is left behind."""
    region, gate = dead_source(new_loop)

    def touch() -> None:
        assert by_struct(region.view, 0) == word(0)
        print("touched", flush=True)

    threading.Thread(target=touch).start()
    gate.wait()

    # Registered last, so called first when the interpreter begins to exit.
    threading._register_atexit(gate.open)  # type: ignore[attr-defined]
    sys.exit(status)


NOEXCEPT = """
// Whoever unwinds the stack through this is ended by std::terminate.
extern "C" int touch(const volatile char *address) noexcept
{
    return *address;
}
"""


class Finalized:
    """Brings a page when the interpreter throws its modules away, and lets threads run."""

    def __init__(self, region: aiouffd.Region, data: bytes) -> None:
        self.region, self.data = region, data

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self.region.install(0, self.data)
        # The thread is awake now; what it does to get the GIL is what this is about.
        sleep(0.3)


def under_noexcept(new_loop: NewLoop, library: str, status: int) -> None:
    """A thread has yielded below C++ code that cannot be unwound, and its page comes at the end."""
    region, gate = dead_source(new_loop)
    touch = ctypes.PyDLL(library).touch
    touch.argtypes = [ctypes.c_void_p]
    threading.Thread(target=touch, args=(region.address,), daemon=True).start()
    gate.wait()
    wait_until(lambda: Counters.total("yields") > 0, "the yield")
    kept.append(Finalized(region, gate.data[:PAGE_SIZE]))
    sys.exit(status)


def exit_on_signal(new_loop: NewLoop, who: str) -> None:
    """A service as many are: SIGTERM raises SystemExit in the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    region, gate = dead_source(new_loop)
    threading.Thread(
        target=by_struct, args=(region.view, 0), name="toucher", daemon=who == "daemon"
    ).start()
    gate.wait()
    print("begins", flush=True)
    while True:
        time.sleep(0.05)  # not pause(), for the signal may come just before that


# -------------------------------------------------------------- random moments


async def busy(ways: list[str]) -> dict[str, int]:
    """Threads touch in all ways and pages come and go, until SIGUSR1 or a cancellation."""
    counters = Counters()
    data = content(SIZE)
    gate = Gate(data)
    ended = threading.Event()
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, told.set)
    async with aiouffd.Pager() as pager:
        region = pager.map(SIZE)
        region.on_missing(gate, portable=True)
        workers = Threads()

        def touch(way: str, seed: int) -> None:
            choice = random.Random(seed)
            while not ended.is_set():
                at = choice.randrange(SIZE // PAGE_SIZE) * PAGE_SIZE
                assert TOUCHES[way](region.view, at) == word(at)
                region.drop(choice.randrange(SIZE // PAGE_SIZE) * PAGE_SIZE, PAGE_SIZE)

        for seed, way in enumerate(ways):
            workers.start(touch, way, seed)
        await asyncio.to_thread(counters.wait, "installs", 20)
        print("begins", flush=True)
        try:
            await told.wait()
        finally:
            ended.set()
            await workers.ended()
    return counters.deltas()


# ----------------------------------------------------------- stopped and looked at


async def looked_at(way: str) -> dict[str, int]:
    """Says which thread waits; the page comes after SIGUSR1."""
    counters = Counters()
    gate = Gate(content(SIZE), is_open=False)
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, told.set)
    tids: list[int] = []
    async with aiouffd.Pager() as pager:
        region = pager.map(SIZE)
        region.on_missing(gate, portable=True)

        def touch() -> None:
            tids.append(threading.get_native_id())
            assert TOUCHES[way](region.view, PAGE_SIZE) == word(PAGE_SIZE)

        workers = Threads()
        workers.start(touch)
        await asyncio.to_thread(gate.wait)
        if way == "struct":
            await asyncio.to_thread(counters.wait, "yields", 1)
        print(f"begins {tids[0]}", flush=True)
        await told.wait()
        gate.open()
        await workers.ended()
    return counters.deltas()
