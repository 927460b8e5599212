"""Programs that use `aiouffd.sync` at awkward moments."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.regions.rescue import service
from tests.scenarios.gil_yield import NewLoop
from tests.support import Gate, content, read_counters, wait_until

SIZE = 64 * PAGE_SIZE
#: What lives until the interpreter throws its modules away.
kept: list[Any] = []


class Interrupted(Exception):
    """Raised by a signal handler."""


def opened(gate: Gate, **settings: Any) -> aiouffd.sync.SyncBuffer:
    source = aiouffd.sources.FunctionSource(gate.read, SIZE, portable=True)
    return aiouffd.sync.open(source, readahead=0, **settings)


def readinto_interrupted(new_loop: NewLoop) -> bool:
    """The caller's memory is the caller's again, whatever the source does later."""

    def ring(*_: Any) -> None:
        raise Interrupted

    gate = Gate(content(SIZE), is_open=False)
    signal.signal(signal.SIGUSR1, ring)
    mine = bytearray(PAGE_SIZE)
    with opened(gate) as buf:

        def send() -> None:
            gate.wait()
            os.kill(os.getpid(), signal.SIGUSR1)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            buf.readinto(0, mine)
        except Interrupted:
            mine[:] = b"M" * PAGE_SIZE
        sender.join()
        gate.open()
        # The very block arrives, and calls that come after it have been answered.
        assert buf.read(0, PAGE_SIZE) == content(SIZE)[:PAGE_SIZE]
        assert buf.read(PAGE_SIZE, 8) == content(SIZE)[PAGE_SIZE:][:8]
    return mine == b"M" * PAGE_SIZE


# ------------------------------------------------------- at the interpreter's end


class Model:
    """Closes its buffer when it is collected, as many do."""

    def __init__(self, buf: aiouffd.sync.SyncBuffer) -> None:
        self.buf = buf

    def __del__(self) -> None:
        self.buf.close()
        try:
            self.buf.read(0, 1)
        except aiouffd.ClosedError:
            print("closed", flush=True)


def numbers(buf: aiouffd.sync.SyncBuffer) -> Iterator[int]:
    try:
        yield from buf[:8]
    finally:
        buf.close()


def closed_at_exit(new_loop: NewLoop, how: str, answers: bool) -> None:
    """A buffer that is closed by what the interpreter runs at its end."""
    gate = Gate(content(SIZE), is_open=answers)
    buf = opened(gate)
    match how:
        case "__del__":
            sys.modules["__main__"].model = Model(buf)  # type: ignore[attr-defined]
        case "__del__ of another module":
            kept.append(Model(buf))
        case "generator":
            gate.open()
            generator = numbers(buf)
            next(generator)
            kept.append(generator)
        case "finalize":
            finalizer = weakref.finalize(buf.close.__func__, buf.close)  # type: ignore[attr-defined]
            finalizer.atexit = False
            kept.append(buf)
        case "finalize atexit":
            weakref.finalize(Model, buf.close)
        case "atexit":
            atexit.register(buf.close)
    if not answers:
        threading.Thread(target=buf.view.__getitem__, args=(0,), daemon=True).start()
        gate.wait()


# -------------------------------------------------------------- inside itself

OURS = ("/rescue.py", "/sync.py", "/guarded.py", "/threading.py", "/concurrent/futures/_base.py")


def everywhere(new_loop: NewLoop) -> list[int]:
    """A signal handler may come between any two lines of ours, and use what they are busy with."""
    places: set[tuple[str, int]] = set()
    nested = False
    buf: aiouffd.sync.SyncBuffer | None = None

    def handler() -> None:
        other = aiouffd.sync.open(content(SIZE))
        assert other.read(8, 8) == content(SIZE)[8:16]
        other.close()
        if buf is not None and not buf.closed:
            assert buf.read(16, 8) == content(SIZE)[16:24]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal nested
        name = frame.f_code.co_filename
        if not name.endswith(
            ("/rescue.py", "/sync.py", "/guarded.py", "/concurrent/futures/_base.py")
        ):
            return None
        place = (name, frame.f_lineno)
        if event == "line" and not nested and place not in places:
            places.add(place)
            nested = True
            try:
                handler()
            finally:
                nested = False
        return trace

    gate = Gate(content(SIZE))
    sys.settrace(trace)
    try:
        buf = opened(gate)
        assert buf.read(0, 8) == content(SIZE)[:8]
        assert buf[PAGE_SIZE] == content(SIZE)[PAGE_SIZE]
        buf.close()
    finally:
        sys.settrace(None)
    return [len(places)]


def inside_a_loop(new_loop: NewLoop) -> bool:
    """As in a notebook's cell: a loop runs in this thread, and stands still meanwhile."""

    async def cell() -> bool:
        with opened(Gate(content(SIZE))) as buf:
            target = bytearray(8)
            assert buf.readinto(8, target) == 8
            with buf.pin(0, 16) as view:
                return bytes(view) + bytes(target) == content(SIZE)[:16] + content(SIZE)[8:16]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(cell())


# ------------------------------------------------------------ what cannot be had


def all_descriptors(spare: int) -> Callable[[], None]:
    """Leave only ``spare`` descriptors; returns what gives the others back."""
    taken = []
    try:
        while True:
            taken.append(os.dup(2))
    except OSError:
        pass
    for number in taken[:spare]:
        os.close(number)

    def give_back() -> None:
        for number in taken[spare:]:
            os.close(number)

    return give_back


def sync_without_descriptors(new_loop: NewLoop) -> list[Any]:
    """However few there are it is an OSError, and with enough of them it works."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    path = f"/proc/self/fd/{os.memfd_create('object')}"
    with open(path, "wb") as file:
        file.write(content(SIZE))
    outcomes: list[Any] = []
    for spare in range(25):
        give_back = all_descriptors(spare)
        try:
            with aiouffd.sync.open(path) as buf:
                outcomes.append(buf[0])
        except OSError as error:
            outcomes.append(type(error).__mro__[-4].__name__ if not error.errno else error.errno)
        finally:
            give_back()
    with aiouffd.sync.open(path) as buf:
        outcomes.append(buf[0])
    return outcomes


def touch_without_descriptors(new_loop: NewLoop) -> int:
    """The rescue loop cannot be made when a thread needs it, and is when it can."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    gate = Gate(content(SIZE))

    async def main() -> int:
        source = aiouffd.sources.FunctionSource(gate.read, SIZE, portable=True)
        async with aiouffd.open(source, readahead=0) as buf:
            give_back = all_descriptors(0)
            timer = threading.Timer(0.4, give_back)
            timer.start()
            # This thread's loop stands still, so only the rescue loop can serve it.
            value: int = buf.view[PAGE_SIZE]
            timer.join()
            return value

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main())


def without_threads(new_loop: NewLoop) -> list[Any]:
    """As a user who may have no more threads, and then may."""
    uid = 54321
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    outcomes: list[Any] = []
    for most in (1, 2):  # the sentry cannot be had; the rescue thread cannot
        resource.setrlimit(resource.RLIMIT_NPROC, (most, hard))
        try:
            aiouffd.sync.open(content(SIZE))
        except OSError as error:
            outcomes.append(error.errno)
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    with aiouffd.sync.open(content(SIZE)) as buf:
        outcomes.append(buf[0])
    return outcomes


def interrupted_opening(new_loop: NewLoop) -> list[str]:
    """Opening that is interrupted leaves nothing open."""
    seen: list[str] = []

    class Slow(aiouffd.sources.BaseSource):
        size = SIZE

        async def open(self) -> None:
            seen.append("opening")
            os.kill(os.getpid(), signal.SIGUSR1)
            try:
                await asyncio.sleep(30)
            finally:
                seen.append("ended")

    def ring(*_: Any) -> None:
        raise Interrupted

    signal.signal(signal.SIGUSR1, ring)
    try:
        aiouffd.sync.open(Slow())
    except Interrupted:
        seen.append("interrupted")
    wait_until(lambda: "ended" in seen, "the opening to end")
    return sorted(seen)


def closing_goes_on(new_loop: NewLoop) -> list[str]:
    """Closing that is interrupted goes on, and can be waited for."""
    seen: list[str] = []
    go_on = threading.Event()

    class Slow(aiouffd.sources.BaseSource):
        size = SIZE

        async def aclose(self) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not go_on.is_set():  # noqa: ASYNC110 (by another thread)
                await asyncio.sleep(0.001)
            seen.append("closed")

    def ring(*_: Any) -> None:
        raise Interrupted

    signal.signal(signal.SIGUSR1, ring)
    buf = aiouffd.sync.open(Slow())
    try:
        buf.close()
    except Interrupted:
        seen.append("interrupted")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    time.sleep(0)
    go_on.set()
    buf.close()
    return seen


def interrupted_at_random(new_loop: NewLoop, times: int) -> dict[str, int]:
    """A signal handler raises at any moment of opening, reading and closing. Tasks, memory and
    descriptors that are left afterwards."""
    data = content(SIZE)

    class Slow(aiouffd.sources.BaseSource):
        size = SIZE

        async def open(self) -> None:
            await asyncio.sleep(0.0005)

        async def read(self, offset: int, length: int) -> bytes:
            await asyncio.sleep(0.0005)
            return data[offset : offset + length]

        async def aclose(self) -> None:
            await asyncio.sleep(0.0005)

        def clone(self) -> Slow:
            return Slow()

    def ring(*_: Any) -> None:
        raise Interrupted

    def once() -> None:
        with aiouffd.sync.open(Slow(), readahead=0) as buf:
            assert buf[SIZE // 2 :] == data[SIZE // 2 :]
            assert buf.read(0, SIZE) == data

    once()
    signal.signal(signal.SIGALRM, ring)
    descriptors = len(os.listdir("/proc/self/fd"))
    chance = random.Random(4)
    interrupted = 0
    while interrupted < times:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.00001 + chance.random() * 0.012)
            once()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)

    def left() -> dict[str, int]:
        gc.collect()
        loop = service._loop
        assert loop is not None
        return {
            "tasks": len(asyncio.all_tasks(loop)),
            "regions": read_counters()["live_regions"],
            "descriptors": len(os.listdir("/proc/self/fd")) - descriptors,
        }

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not any(left().values()), "everything to end", 5)
    return left()
