"""Threads that touch missing pages while they hold the GIL, and all that goes on beside them."""

from __future__ import annotations

import _thread
import array
import asyncio
import contextlib
import ctypes
import gc
import importlib
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE, ffi, lib
from tests.support import WORD, Counters, Gate, content, wait_until, word

NewLoop = Callable[[], asyncio.AbstractEventLoop]
#: Seconds: a busy machine must not bring the rescue loop, which is not what is tested here.
PATIENT = 10.0


def numpy() -> Any:
    return importlib.import_module("numpy")


# --------------------------------------------------------- ways of touching

# Each returns the word at a byte offset, a multiple of eight. All but those of FREE hold the
# GIL while they touch; those of KERNEL touch inside a system call.


def by_index(view: memoryview, at: int) -> int:
    return sum(view[at + index] << 8 * index for index in range(WORD))


def by_bytes(view: memoryview, at: int) -> int:
    return int.from_bytes(bytes(view[at : at + WORD]), "little")


def by_struct(view: memoryview, at: int) -> int:
    value: int = struct.unpack_from("<Q", view, at)[0]
    return value


def by_array(view: memoryview, at: int) -> int:
    words = array.array("Q")
    words.frombytes(view[at : at + WORD])
    return words[0]


def by_slice(view: memoryview, at: int) -> int:
    copy = bytearray(WORD)
    copy[:] = view[at : at + WORD]
    return int.from_bytes(copy, "little")


def by_join(view: memoryview, at: int) -> int:
    return int.from_bytes(b"".join([view[at : at + 3], view[at + 3 : at + WORD]]), "little")


def by_comparing(view: memoryview, at: int) -> int:
    value = word(at)
    assert view[at : at + WORD] == value.to_bytes(WORD, "little")
    return value


def by_numpy(view: memoryview, at: int) -> int:
    return int(numpy().frombuffer(view, dtype="<u8")[at // WORD])


def by_memcpy(view: memoryview, at: int) -> int:
    target = ctypes.create_string_buffer(WORD)
    _libc().memcpy(target, ctypes.c_void_p(_address(view) + at), ctypes.c_size_t(WORD))
    return int.from_bytes(target.raw, "little")


def by_write(view: memoryview, at: int) -> int:
    reader, writer = os.pipe()
    try:
        os.write(writer, view[at : at + WORD])
        return int.from_bytes(os.read(reader, WORD), "little")
    finally:
        os.close(reader)
        os.close(writer)


def by_crc(view: memoryview, at: int) -> int:
    size = min(8192, len(view) - at)
    assert zlib.crc32(view[at : at + size]) == zlib.crc32(content(len(view))[at : at + size])
    return word(at)


HOLDING = {
    "index": by_index,
    "bytes": by_bytes,
    "struct": by_struct,
    "array": by_array,
    "slice": by_slice,
    "join": by_join,
    "compare": by_comparing,
    "numpy": by_numpy,
}
FREE = {"memcpy": by_memcpy, "crc": by_crc}
KERNEL = {"write": by_write}
TOUCHES = {**HOLDING, **FREE, **KERNEL}


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _address(view: memoryview) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer(view)))


# ------------------------------------------------------------------- helpers


class Threads:
    """Threads whose exceptions are not lost."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, function: Callable[..., object], *args: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                function(*args)
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        self._threads.append(thread)
        return thread

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    async def ended(self) -> None:
        """Join without blocking the loop."""
        done = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            try:
                self.join()
            except BaseException as error:
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, None)

        threading.Thread(target=wait).start()
        await done


@contextmanager
def serving(new_loop: NewLoop) -> Iterator[asyncio.AbstractEventLoop]:
    """A loop on a thread of its own, so that the main thread can touch."""
    loop = new_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def on(loop: asyncio.AbstractEventLoop, coroutine: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


async def open_region(gate: Gate, **times: float) -> tuple[aiouffd.Pager, aiouffd.Region]:
    pager = aiouffd.Pager(**times).open()  # type: ignore[arg-type]
    region = pager.map(len(gate.data))
    region.on_missing(gate, portable=True)
    return pager, region


async def close(pager: aiouffd.Pager) -> None:
    await pager.aclose()


def check_signals(counters: Counters, faults: int) -> None:
    """Case K: at most two signals a fault."""
    assert counters["signals"] <= 2 * faults, counters.deltas()


# ----------------------------------------------------------------- one touch


async def touch_each(ways: list[str]) -> dict[str, dict[str, int]]:
    """One page after the other, each in another way, from a worker; the answer comes only when
    the question has reached a coroutine, which a thread that kept the GIL would prevent."""
    found = {}
    for way in ways:
        counters = Counters()
        gate = Gate(content(8 * PAGE_SIZE), is_open=False)
        async with aiouffd.Pager(patience=PATIENT) as pager:
            region = pager.map(len(gate.data))
            region.on_missing(gate)
            at = 3 * PAGE_SIZE + 128
            touch = asyncio.create_task(asyncio.to_thread(TOUCHES[way], region.view, at))
            await asyncio.to_thread(gate.wait)
            gate.open()
            assert await touch == word(at)
        found[way] = counters.deltas()
    return found


async def touch_across(way: str) -> dict[str, int]:
    """One instruction that needs two pages, both missing."""
    counters = Counters()
    gate = Gate(content(4 * PAGE_SIZE))
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        region.on_missing(gate)
        at = 2 * PAGE_SIZE - 3

        def touch() -> int:
            if way == "struct":
                value: int = struct.unpack_from("<Q", region.view, at)[0]
                return value
            words = numpy().frombuffer(region.view[at : at + 8 * WORD], dtype="<u8")
            return int(words[0]) if way == "numpy" else int((words | words)[0])

        expected = int.from_bytes(gate.data[at : at + WORD], "little")
        assert await asyncio.to_thread(touch) == expected
        assert region.is_resident(PAGE_SIZE, 2 * PAGE_SIZE)
    return counters.deltas()


async def copy_lazy_to_lazy() -> None:
    """memcpy between two regions: both sides are missing."""
    first, second = Gate(content(16 * PAGE_SIZE)), Gate(bytes(16 * PAGE_SIZE))
    async with aiouffd.Pager(patience=PATIENT) as pager, aiouffd.Pager(patience=PATIENT) as other:
        source, target = pager.map(len(first.data)), other.map(len(second.data))
        source.on_missing(first)
        target.on_missing(second)

        def copy() -> None:
            target.view[: len(first.data)] = source.view

        await asyncio.to_thread(copy)
        assert bytes(target.view) == first.data


async def read_all(way: str, pages: int) -> dict[str, int]:
    """One thread, page after page, and every word of them compared."""
    counters = Counters()
    gate = Gate(content(pages * PAGE_SIZE))
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        region.on_missing(gate)

        def touch() -> None:
            for at in range(0, len(gate.data), PAGE_SIZE):
                assert TOUCHES[way](region.view, at) == word(at)
            assert region.view == gate.data

        await asyncio.to_thread(touch)
    check_signals(counters, pages)
    return counters.deltas()


# -------------------------------------------------- A: who reads the message

READER = """
#include <poll.h>
#include <stdint.h>
#include <unistd.h>
/* Tell the thread that is to touch, wait for its message and drain it, all without the GIL. */
int64_t drain_when_readable(int64_t (*drain)(void *, void *, int64_t, int), void *engine, int fd,
                            int tell, void *entries, int64_t max, int role)
{
    struct pollfd item = { .fd = fd, .events = POLLIN };

    if (write(tell, "", 1) != 1)
        return -1;
    poll(&item, 1, 1000);
    return drain(engine, entries, max, role);
}
"""


async def reader_takes_message(library: str, rounds: int) -> dict[str, int]:
    """The loop's native call reads the message of a thread that keeps the GIL meanwhile."""
    counters = Counters()
    helper = ctypes.CDLL(library).drain_when_readable
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    helper.restype = count
    helper.argtypes = [pointer, pointer, number, number, pointer, count, number]
    gate = Gate(content(rounds * PAGE_SIZE))
    taken = 0
    reader, writer = os.pipe()
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        region.on_missing(gate)
        drain = int(ffi.cast("uintptr_t", ffi.addressof(lib, "au_engine_drain")))
        engine = int(ffi.cast("uintptr_t", pager._engine))
        entries = ffi.new("struct au_entry[64]")
        room = int(ffi.cast("uintptr_t", entries))

        def touch(at: int) -> int:
            os.read(reader, 1)
            return by_struct(region.view, at)

        for at in range(0, len(gate.data), PAGE_SIZE):
            touched = asyncio.create_task(asyncio.to_thread(touch, at))
            await asyncio.sleep(0)  # the task runs up to its thread
            found = helper(drain, engine, pager.uffd.fileno(), writer, room, 64, lib.AU_DRAIN_LOOP)
            taken += found
            for index in range(found):
                start = entries[index].block * region.block_size
                region.install(start, gate.data[start : start + region.block_size])
            assert await touched == word(at)
    os.close(reader)
    os.close(writer)
    check_signals(counters, rounds)
    return {**counters.deltas(), "taken": taken}


# ------------------------------------------------------ B, C: heavy concurrency


async def hammer(threads: int, touches: int, seed: int, ways: list[str]) -> dict[str, int]:
    """Threads touch pages that others throw away again; answers take their time, or none.

    Every gap between the steps of reading, installing and yielding is met by somebody.
    """
    counters = Counters()
    pages = 32
    data = content(pages * PAGE_SIZE)
    sys.setswitchinterval(1e-6)
    loop = asyncio.get_running_loop()
    pauses = random.Random(seed)
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(data), block_size=2 * PAGE_SIZE)

        @region.on_missing
        async def serve(fault: aiouffd.Fault) -> None:
            match pauses.randrange(4):
                case 0:
                    await asyncio.sleep(0)
                case 1:
                    await asyncio.sleep(pauses.random() * 2e-4)
                case 2:
                    later = loop.create_future()
                    loop.call_soon(later.set_result, None)
                    await later
            fault.copy(data[fault.offset : fault.offset + fault.length])

        left = threads
        ended = threading.Event()

        def touch(number: int) -> None:
            nonlocal left
            choice = random.Random(seed + number)
            view = region.view
            try:
                for _ in range(touches):
                    at = choice.randrange(len(data) // WORD) * WORD
                    assert TOUCHES[choice.choice(ways)](view, at) == word(at), at
            finally:
                left -= 1
                if not left:
                    ended.set()

        def drop() -> None:
            choice = random.Random(seed)
            while not ended.is_set():
                region.drop(choice.randrange(pages) * PAGE_SIZE, PAGE_SIZE)

        workers = Threads()
        for number in range(threads):
            workers.start(touch, number + 1)
        workers.start(drop)
        await workers.ended()
    check_signals(counters, counters["messages"])
    return counters.deltas()


# ------------------------------------------------------------ D: stale signals

SPINNER = """
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>
static _Atomic int stop, tid;
static _Atomic uint64_t turns;
static void *spin(void *ignored)
{
    tid = gettid();
    while (!stop)
        turns++;
    return ignored;
}
/* A thread that Python never sees. */
uint64_t spinner_start(void)
{
    pthread_t thread;

    pthread_create(&thread, 0, spin, 0);
    while (!tid)
        usleep(100);
    return (uint64_t)thread;
}
int spinner_tid(void)
{
    return tid;
}
uint64_t spinner_stop(uint64_t thread)
{
    stop = 1;
    pthread_join((pthread_t)thread, 0);
    return turns;
}
"""


async def stale_signals(library: str, touches: int) -> dict[str, int]:
    """Our signal, sent to threads that wait for nothing, that touch, and that are foreign."""
    counters = Counters()
    pages = 256
    gate = Gate(content(pages * PAGE_SIZE))
    helper = ctypes.CDLL(library)
    helper.spinner_start.restype = ctypes.c_uint64
    helper.spinner_stop.argtypes = [ctypes.c_uint64]
    helper.spinner_stop.restype = ctypes.c_uint64
    foreign = helper.spinner_start()
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        region.on_missing(gate)
        ended = threading.Event()
        begun = threading.Barrier(3)

        def compute() -> None:
            begun.wait()
            while not ended.is_set():
                assert sum(range(100)) == 4950

        def touch() -> None:
            begun.wait()
            choice = random.Random(1)
            for _ in range(touches):
                at = choice.randrange(len(gate.data) // WORD) * WORD
                assert by_struct(region.view, at) == word(at)
                region.drop(at // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE)
            ended.set()

        def send() -> None:
            begun.wait()
            number = lib.au_handler_signal()
            choice = random.Random(2)
            while not ended.is_set():
                target = choice.choice(targets)
                match choice.randrange(3):
                    case 0:
                        # As the sentry sends it.
                        lib.au_handler_send(target[0])
                    case 1:
                        signal.pthread_kill(target[1], number)
                    case 2:
                        os.kill(os.getpid(), number)

        workers = Threads()
        threads = [workers.start(compute), workers.start(touch), threading.current_thread()]
        targets = [
            *((thread.native_id or 0, thread.ident or 0) for thread in threads),
            (helper.spinner_tid(), foreign),
        ]
        sender = Threads()
        sender.start(send)
        await sender.ended()
        await workers.ended()
    assert helper.spinner_stop(foreign) > 0
    return counters.deltas()


# -------------------------------------------------------- E: sub-interpreters

IN_SUBINTERPRETER = """
import ctypes
for at in range({start}, {stop}, {page}):
    # string_at keeps the GIL while it copies.
    found = int.from_bytes(ctypes.string_at({address} + at, 8), "little")
    assert found == at // 8 + 1, (at, found)
"""


def subinterpreter(
    own: bool = False,
) -> tuple[Callable[[], Any], Callable[..., None], Callable[[Any], None]]:
    """Functions that make, run and destroy an interpreter that shares the GIL, or is isolated and,
    from 3.12 on, has its ``own``."""
    if sys.version_info >= (3, 13):
        interpreters = importlib.import_module("_interpreters")

        def create() -> Any:
            return interpreters.create("isolated" if own else "legacy")
    else:
        interpreters = importlib.import_module("_xxsubinterpreters")

        def create() -> Any:
            return interpreters.create(isolated=own)

    def run(interpreter: Any, code: str, shared: dict[str, Any] | None = None) -> None:
        failure = interpreters.run_string(interpreter, code, shared or {})
        if failure is not None:
            raise RuntimeError(failure)

    return create, run, interpreters.destroy


def subinterpreters(new_loop: NewLoop, where: str) -> dict[str, int]:
    """``where``: "exists" beside the threads that touch; or touches itself, on the thread that
    made it ("here") or on another one ("elsewhere")."""
    create, run, destroy = subinterpreter()
    gate = Gate(content(64 * PAGE_SIZE))
    with serving(new_loop) as loop:
        pager, region = on(loop, open_region(gate))
        interpreter = create()
        code = IN_SUBINTERPRETER.format(
            start=0, stop=len(gate.data) // 2, page=PAGE_SIZE, address=region.address
        )
        run(interpreter, "import ctypes")
        counters = Counters()
        if where == "here":
            run(interpreter, code)
        elif where == "elsewhere":
            workers = Threads()
            workers.start(run, interpreter, code)
            workers.join()
        workers = Threads()
        middle = len(gate.data) // 2

        def touch(way: str, first: int) -> None:
            for at in range(middle + first * PAGE_SIZE, len(gate.data), 4 * PAGE_SIZE):
                assert TOUCHES[way](region.view, at) == word(at)

        for first, way in enumerate(["struct", "memcpy", "write", "bytes"]):
            workers.start(touch, way, first)
        workers.join()
        deltas = counters.deltas()
        destroy(interpreter)
        on(loop, close(pager))
    return deltas


IN_ONE_WITH_ITS_OWN_GIL = """
import os, struct, sys, threading
def answer():
    os.read({reader}, 1)
    os.write({writer}, b"alive")
thread = threading.Thread(target=answer)
thread.start()
{touch}
assert found == {at} // 8 + 1, found
thread.join()
"""
TOUCHES_THERE = {
    "address": "import ctypes\n"
    "found = int.from_bytes(ctypes.string_at({address} + {at}, 8), 'little')",
    "view": "found = struct.unpack_from('<Q', view, {at})[0]",
}


def gil_of_its_own(new_loop: NewLoop, way: str) -> dict[str, int]:
    """A sub-interpreter with its own GIL touches memory of the main one: by its address, or by a
    memoryview that was handed over. Other threads of it run meanwhile."""
    create, run, destroy = subinterpreter(own=True)
    gate = Gate(content(4 * PAGE_SIZE), is_open=False)
    inward, outward = os.pipe(), os.pipe()
    with serving(new_loop) as loop:
        pager, region = on(loop, open_region(gate))
        interpreter = create()
        at = 2 * PAGE_SIZE
        touch = TOUCHES_THERE[way].format(address=region.address, at=at)
        code = IN_ONE_WITH_ITS_OWN_GIL.format(
            reader=inward[0], writer=outward[1], touch=touch, at=at
        )
        counters = Counters()
        workers = Threads()
        shared = {"view": region.view} if way == "view" else {}
        workers.start(run, interpreter, code, shared)
        gate.wait()
        os.write(inward[1], b"?")
        assert select.select([outward[0]], [], [], 10)[0], "it waits with its GIL held"
        gate.open()
        workers.join()
        deltas = counters.deltas()
        destroy(interpreter)
        # The main one goes on as ever.
        assert by_struct(region.view, 0) == word(0)
        on(loop, close(pager))
    return deltas


IMPORTS = """
import aiouffd
try:
    aiouffd.sync.open("/proc/self/exe")
except aiouffd.UnsupportedError as error:
    assert "sub-interpreter" in str(error), error
else:
    raise AssertionError("it opened")
"""


def import_in_a_subinterpreter(new_loop: NewLoop) -> dict[str, int]:
    """It imports aiouffd and ends, and nothing changes for others."""
    create, run, destroy = subinterpreter()
    gate = Gate(content(8 * PAGE_SIZE))
    for _ in range(2):
        interpreter = create()
        run(interpreter, IMPORTS)
        destroy(interpreter)
    counters = Counters()
    with serving(new_loop) as loop:
        pager, region = on(loop, open_region(gate))
        interpreter = create()
        run(interpreter, IMPORTS)
        destroy(interpreter)
        for at in range(0, len(gate.data), PAGE_SIZE):
            workers = Threads()
            workers.start(by_struct, region.view, at)
            workers.join()
        deltas = counters.deltas()
        assert bytes(region.view) == gate.data
        on(loop, close(pager))
    return deltas


def import_in_an_isolated_one(_: NewLoop) -> str:
    """What the ImportError says."""
    create, run, destroy = subinterpreter(own=True)
    reader, writer = os.pipe()
    interpreter = create()
    run(
        interpreter,
        f"""
import os
try:
    import aiouffd
except ImportError as error:
    os.write({writer}, str(error).encode())
else:
    raise AssertionError("it is imported")
""",
    )
    destroy(interpreter)
    return os.read(reader, 4096).decode()


# ----------------------------------------------------------------- F: signals


def signal_storm(new_loop: NewLoop, on_main: bool) -> dict[str, int]:
    """SIGALRM and SIGPROF a thousand times a second while pages are touched."""
    seen = {signal.SIGALRM: 0, signal.SIGPROF: 0}

    def count(number: int, _frame: Any) -> None:
        seen[signal.Signals(number)] += 1

    pages = 512
    gate = Gate(content(pages * PAGE_SIZE))
    with serving(new_loop) as loop:
        pager, region = on(loop, open_region(gate))
        for number in seen:
            signal.signal(number, count)
        counters = Counters()
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)

        def touch() -> None:
            while seen[signal.SIGALRM] < 100 or seen[signal.SIGPROF] < 20:
                for at in range(0, len(gate.data), PAGE_SIZE):
                    assert by_struct(region.view, at) == word(at)
                region.drop(0, len(gate.data))

        workers = Threads()
        if on_main:
            touch()
        else:
            workers.start(touch)
        workers.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        deltas = counters.deltas()
        on(loop, close(pager))
    assert deltas["signals"] <= 2 * deltas["messages"] + deltas["yields_given_way"] * 2
    return deltas


def signal_to_yielded_thread(new_loop: NewLoop) -> dict[str, float]:
    """A signal for a thread that has yielded is delivered soon, though its page is late."""
    gate = Gate(content(PAGE_SIZE), is_open=False)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    reader.settimeout(10)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno())
    delays = []
    counters = Counters()
    main = threading.get_ident()
    with serving(new_loop) as loop:
        pager, region = on(loop, open_region(gate))

        def send() -> None:
            gate.wait()
            for _ in range(5):
                before = counters["yields"]
                started = time.monotonic()
                signal.pthread_kill(main, signal.SIGUSR1)
                assert reader.recv(1) == bytes([signal.SIGUSR1])
                delays.append(time.monotonic() - started)
                # It faults once more and yields again, or this thread could not run.
                wait_until(lambda before=before: counters["yields"] > before, "another yield")
            gate.open()

        workers = Threads()
        workers.start(send)
        assert by_struct(region.view, 0) == word(0)
        workers.join()
        signal.set_wakeup_fd(-1)
        on(loop, close(pager))
    reader.close()
    writer.close()
    return {"longest": max(delays), "given_way": counters["yields_given_way"]}


async def python_handler_beside_yield() -> float:
    """The loop's own signal handlers run while a worker has yielded; returns the delay."""
    gate = Gate(content(PAGE_SIZE), is_open=False)
    loop = asyncio.get_running_loop()
    called = loop.create_future()
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        region.on_missing(gate)
        loop.add_signal_handler(signal.SIGTERM, lambda: called.set_result(time.monotonic()))
        touch = asyncio.create_task(asyncio.to_thread(by_struct, region.view, 0))
        await asyncio.to_thread(gate.wait)
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        delay: float = await called - started
        gate.open()
        assert await touch == word(0)
        loop.remove_signal_handler(signal.SIGTERM)
    return delay


#: The system call of signal.pause().
PAUSE = {"x86_64": "34 ", "aarch64": "73 "}


def signals_to_the_process(new_loop: NewLoop, touchers: int, count: int) -> int:
    """How many of ``count`` signals the main thread does not wake up for in pause(), while other
    threads have yielded."""
    gate = Gate(content(64 * PAGE_SIZE), is_open=False)
    main, number = threading.get_ident(), PAUSE[os.uname().machine]
    arrived = _thread.allocate_lock()
    arrived.acquire()
    signal.signal(signal.SIGUSR1, lambda *_: arrived.release())
    left = [count]
    missed = []

    def pauses() -> bool:
        return Path(f"/proc/self/task/{os.getpid()}/syscall").read_text().startswith(number)

    def send() -> None:
        while left[0]:
            wait_until(pauses, "the main thread to pause")
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGUSR1)
            if not arrived.acquire(timeout=0.5):
                missed.append(left[0])
                signal.pthread_kill(main, signal.SIGUSR1)
                assert arrived.acquire(timeout=5)

    with serving(new_loop) as loop:
        pager, region = on(loop, open_region(gate))
        counters = Counters()
        workers = Threads()
        for index in range(touchers):
            workers.start(by_struct, region.view, index * PAGE_SIZE)
        wait_until(lambda: counters["yields"] >= touchers, "all to yield")
        sender = Threads()
        sender.start(send)
        while left[0]:
            signal.pause()
        sender.join()
        gate.open()
        workers.join()
        on(loop, close(pager))
    return len(missed)


def signal_that_main_blocks(new_loop: NewLoop) -> float:
    """A signal to the process that only a thread which has yielded would take; seconds until then.
    The handler of C tells, for Python's would run in the main thread."""
    gate = Gate(content(PAGE_SIZE), is_open=False)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    reader.settimeout(10)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno())
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    counters = Counters()
    with serving(new_loop) as loop:
        pager, region = on(loop, open_region(gate))

        def touch() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
            assert by_struct(region.view, 0) == word(0)

        workers = Threads()
        workers.start(touch)
        wait_until(lambda: counters["yields"] > 0, "the yield")
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert reader.recv(1) == bytes([signal.SIGUSR1])
        took = time.monotonic() - started
        gate.open()
        workers.join()
        signal.set_wakeup_fd(-1)
        on(loop, close(pager))
    reader.close()
    writer.close()
    return took


def wait_for_page(new_loop: NewLoop, on_main: bool) -> None:
    """Waits for a page that never comes, having yielded; says "waiting" when it does."""
    gate = Gate(content(PAGE_SIZE), is_open=False)
    with serving(new_loop) as loop:
        _, region = on(loop, open_region(gate))

        def say() -> None:
            gate.wait()
            print("waiting", flush=True)

        workers = Threads()
        workers.start(say)
        if on_main:
            by_struct(region.view, 0)
        else:
            workers.start(by_struct, region.view, 0)
            while True:
                signal.pause()


# ----------------------------------------------- H: a mutex of C, and the GIL


def sqlite_mutex(new_loop: NewLoop, at_hand: bool, stall: float) -> None:
    """One thread touches under SQLite's mutex and the GIL; another wants both."""
    sqlite3 = importlib.import_module("sqlite3")
    size = 64 * PAGE_SIZE
    gate = Gate(content(size))
    database = sqlite3.connect(":memory:", check_same_thread=False)
    with serving(new_loop) as loop:
        pager = aiouffd.Pager(stall=stall)

        async def begin() -> aiouffd.Region:
            region = pager.open().map(size)
            if at_hand:
                region.serve_from(gate.data)
            else:
                region.on_missing(gate, portable=True)
            return region

        region = on(loop, begin())
        ended = threading.Event()

        def define() -> None:
            while not ended.is_set():
                # It takes the mutex before it finds that a statement is running.
                with contextlib.suppress(sqlite3.OperationalError):
                    database.create_function("f", 1, lambda x: x)

        workers = Threads()
        workers.start(define)
        print("begins", flush=True)
        # The process ends here, or goes on for as many rounds as it takes to believe it.
        limit = time.monotonic() + (1.0 if at_hand else 60.0)
        while time.monotonic() < limit:
            found = database.execute("select length(?)", (region.view,)).fetchone()[0]
            assert found == size
            region.drop(0, size)
        ended.set()
        workers.join()
        on(loop, close(pager))
    database.close()


# ------------------------------------------------------------- J: masked signal


def masked_signal(new_loop: NewLoop, way: str, stall: float) -> None:
    """A thread that holds the GIL has our signal blocked."""
    gate = Gate(content(PAGE_SIZE))
    with serving(new_loop) as loop:
        _, region = on(loop, open_region(gate, stall=stall))
        signal.pthread_sigmask(signal.SIG_BLOCK, {lib.au_handler_signal()})
        print("begins", flush=True)
        assert TOUCHES[way](region.view, 0) == word(0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {lib.au_handler_signal()})
        on(loop, close(region.pager))


# ------------------------------------------------------ what else may go on


def smallest_stack() -> int:
    """Sets what new threads get to the least that Python allows; bytes. 32 KiB up to 3.13."""
    for size in range(32 << 10, 1 << 20, 4096):
        with contextlib.suppress(ValueError):
            threading.stack_size(size)
            return size
    raise AssertionError("it allows none")


async def many_threads(count: int, small: bool, way: str) -> dict[str, int]:
    """So many threads have yielded at once, each on its own page; then all answers come."""
    counters = Counters()
    gate = Gate(content(count * PAGE_SIZE), is_open=False)
    if small:
        smallest_stack()
    async with aiouffd.Pager(max_in_flight=count, patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        # Portable, for so many threads may keep the loop from coming for a while.
        region.on_missing(gate, portable=True)

        def touch(number: int) -> None:
            at = number * PAGE_SIZE + 8 * number
            assert TOUCHES[way](region.view, at) == word(at)

        workers = Threads()

        def begin() -> None:
            for number in range(count):
                workers.start(touch, number)
            gate.wait(count)

        await asyncio.to_thread(begin)
        threading.stack_size(0)
        live = counters["live_slots"]
        gate.open()
        await workers.ended()
    check_signals(counters, count)
    return {**counters.deltas(), "live": live}


async def one_page_many_threads(count: int, ways: list[str]) -> dict[str, int]:
    """All wait for the same page: duplicates, of which some hold the GIL."""
    counters = Counters()
    gate = Gate(content(PAGE_SIZE), is_open=False)
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        region.on_missing(gate)
        workers = Threads()

        def touch(number: int) -> None:
            assert TOUCHES[ways[number % len(ways)]](region.view, 8 * number) == word(8 * number)

        for number in range(count):
            workers.start(touch, number)
        await asyncio.to_thread(counters.wait, "messages", count)
        gate.open()
        await workers.ended()
    check_signals(counters, count)
    return counters.deltas()


async def beside(what: str) -> dict[str, int]:
    """Pages are touched while the interpreter is busy with something that looks at all frames."""
    ended = threading.Event()
    workers = Threads()

    def collect() -> None:
        while not ended.is_set():
            cycle: list[Any] = []
            cycle.append(cycle)
            gc.collect()

    def look(*_: Any) -> Any:
        return look

    def frames() -> None:
        while not ended.is_set():
            for frame in sys._current_frames().values():
                assert frame.f_lineno is None or frame.f_lineno >= 0

    match what:
        case "gc":
            gc.set_threshold(1, 1, 1)
            workers.start(collect)
        case "settrace":
            threading.settrace(look)
        case "setprofile":
            threading.setprofile(look)
        case "tracemalloc":
            tracemalloc.start(20)
        case "frames":
            workers.start(frames)
        case "switch interval":
            sys.setswitchinterval(1e-6)
            workers.start(collect)
        case "faulthandler":
            importlib.import_module("faulthandler").enable()
    counters = Counters()
    gate = Gate(content(64 * PAGE_SIZE))
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        region.on_missing(gate)
        touchers = Threads()

        def touch(first: int, way: str) -> None:
            for at in range(first * PAGE_SIZE, len(gate.data), 4 * PAGE_SIZE):
                assert TOUCHES[way](region.view, at) == word(at)

        for first, way in enumerate(["struct", "bytes", "memcpy", "index"]):
            touchers.start(touch, first, way)
        await touchers.ended()
        ended.set()
        await workers.ended()
    threading.settrace(None)  # type: ignore[arg-type]
    threading.setprofile(None)
    tracemalloc.stop()
    return counters.deltas()


async def user_and_kernel_mixed() -> dict[str, int]:
    """The same thread: now it holds the GIL, now it has released it, now it is in the kernel."""
    counters = Counters()
    names = ["struct", "write", "memcpy", "bytes", "write", "crc"]
    gate = Gate(content(120 * PAGE_SIZE))
    async with aiouffd.Pager(patience=PATIENT) as pager:
        region = pager.map(len(gate.data))
        region.on_missing(gate)

        def touch() -> None:
            for number, at in enumerate(range(0, len(gate.data), PAGE_SIZE)):
                assert TOUCHES[names[number % len(names)]](region.view, at) == word(at)

        workers = Threads()
        for _ in range(4):
            workers.start(touch)
        await workers.ended()
    return counters.deltas()
