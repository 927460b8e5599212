"""Every way to get at the bytes of a lazy buffer, from every kind of thread: one program each.

A way is a function of a `Place` that checks what it finds and returns nothing. Each gets blocks of
its own, so that its pages are missing when it begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import hashlib
import importlib
import mmap
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.sources import FunctionSource
from tests.support import content

BLOCK = 4 * PAGE_SIZE
#: What each way gets.
ROOM = 4 * BLOCK


class Skipped(Exception):
    """This cannot be tried here; says why."""


@dataclass(frozen=True)
class Place:
    """A part of a buffer, and the bytes that it should have."""

    buf: aiouffd.LazyBuffer
    view: memoryview
    start: int
    data: bytes  # of this part
    folder: Path

    @property
    def part(self) -> memoryview:
        return self.view[self.start : self.start + ROOM]

    @property
    def array(self) -> Any:
        return numpy().frombuffer(self.view, dtype="<u8")[self.start // 8 :][: ROOM // 8]


def numpy() -> Any:
    return importlib.import_module("numpy")


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def same(found: object, wanted: object) -> None:
    assert found == wanted, f"{found!r:.60} and not {wanted!r:.60}"


# ------------------------------------------------------------------------ ways


def by_index(place: Place) -> None:
    for at in (0, PAGE_SIZE - 1, BLOCK, 2 * BLOCK + 77, ROOM - 1):
        same(place.view[place.start + at], place.data[at])


def by_slice(place: Place) -> None:
    same(place.view[place.start + 5 : place.start + ROOM - 5].tobytes(), place.data[5:-5])


def by_bytes(place: Place) -> None:
    same(bytes(place.part), place.data)


def by_struct(place: Place) -> None:
    for at in (PAGE_SIZE - 3, BLOCK - 4, ROOM - 8):
        found = struct.unpack_from("<Q", place.view, place.start + at)[0]
        same(found, int.from_bytes(place.data[at : at + 8], "little"))


def by_numpy_scalar(place: Place) -> None:
    array = place.array
    for index in (0, PAGE_SIZE // 8, ROOM // 8 - 1):
        same(int(array[index]), place.start // 8 + index + 1)


def by_numpy_sum(place: Place) -> None:
    first, count = place.start // 8 + 1, ROOM // 8
    same(int(place.array.sum()), count * (2 * first + count - 1) // 2)


def by_hash(place: Place) -> None:
    same(hashlib.sha256(place.part).digest(), hashlib.sha256(place.data).digest())


def by_guarded_copy(place: Place) -> None:
    same(place.buf[place.start : place.start + ROOM], place.data)
    same(place.buf[place.start + 9], place.data[9])


def by_find(place: Place) -> None:
    needle = place.data[ROOM - 24 :]
    same(place.buf.find(needle, place.start, place.start + ROOM), place.start + ROOM - 24)


def by_bytes_find(place: Place) -> None:
    same(bytes(place.part).find(place.data[BLOCK : BLOCK + 16]), BLOCK)


def by_regular_expression(place: Place) -> None:
    match = re.compile(re.escape(place.data[3 * BLOCK : 3 * BLOCK + 16])).search(place.part)
    assert match is not None
    same(match.start(), 3 * BLOCK)


def by_pickle(place: Place) -> None:
    same(pickle.loads(pickle.dumps(pickle.PickleBuffer(place.part), protocol=5)), place.data)
    same(pickle.loads(pickle.dumps(place.part.tobytes())), place.data)


def by_join(place: Place) -> None:
    same(b"".join([place.part[:BLOCK], place.part[BLOCK:]]), place.data)


def by_write(place: Place) -> None:
    with tempfile.TemporaryFile(dir=place.folder) as file:
        write_all(file.fileno(), place.part)
        same(os.pread(file.fileno(), ROOM, 0), place.data)


def by_pipe(place: Place) -> None:
    reader, writer = os.pipe()
    try:
        write_all(writer, place.part[: BLOCK + 9])
        same(os.read(reader, BLOCK + 9), place.data[: BLOCK + 9])
    finally:
        os.close(reader)
        os.close(writer)


def by_send(place: Place) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        left = place.part[:BLOCK]
        while left:
            left = left[ours.send(left) :]
        received = b""
        while len(received) < BLOCK:
            received += theirs.recv(BLOCK - len(received))
        same(received, place.data[:BLOCK])


def by_direct_write(place: Place) -> None:
    path = place.folder / f"direct-{threading.get_ident()}-{place.start}"
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        raise Skipped(f"no O_DIRECT on {place.folder}: {error}") from error
    try:
        write_all(file, place.part)
    finally:
        os.close(file)
    same(path.read_bytes(), place.data)
    path.unlink()


READER = """
import ctypes, sys
class iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
process, address, length = map(int, sys.argv[1:])
target = ctypes.create_string_buffer(length)
here, there = iovec(ctypes.addressof(target), length), iovec(address, length)
libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_ssize_t
done = libc.process_vm_readv(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
if done != length:
    sys.exit(ctypes.get_errno() or 1)
sys.stdout.buffer.write(target.raw)
"""
PR_SET_PTRACER = 0x59616D61


def by_other_process(place: Place) -> None:
    libc().prctl(PR_SET_PTRACER, ctypes.c_ulong(2**64 - 1), 0, 0, 0)
    address = place.buf.address + place.start
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", READER, str(os.getpid()), str(address), str(BLOCK)],
        capture_output=True,
        check=False,
    )
    if child.returncode in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        raise Skipped(f"process_vm_readv: {os.strerror(child.returncode)}")
    if child.returncode == errno.EFAULT:
        raise OSError(errno.EFAULT, "the other process")
    assert child.returncode == 0, child.stderr.decode()
    same(child.stdout, place.data[:BLOCK])


def write_all(file: int, view: memoryview) -> None:
    while view:
        view = view[os.write(file, view) :]


#: Ways that touch in user mode, and those that do in a system call.
USER: dict[str, Callable[[Place], None]] = {
    "index": by_index,
    "slice": by_slice,
    "bytes": by_bytes,
    "struct": by_struct,
    "numpy scalar": by_numpy_scalar,
    "numpy sum": by_numpy_sum,
    "hashlib": by_hash,
    "guarded copy": by_guarded_copy,
    "find": by_find,
    "bytes.find": by_bytes_find,
    "re": by_regular_expression,
    "pickle": by_pickle,
    "join": by_join,
}
KERNEL: dict[str, Callable[[Place], None]] = {
    "write": by_write,
    "pipe": by_pipe,
    "send": by_send,
    "O_DIRECT": by_direct_write,
    "process_vm_readv": by_other_process,
}
WAYS = {**USER, **KERNEL}
THREADS = ("worker", "loop", "two", "hungry")
#: Whether faults of kernel mode are seen: "all", or else "user".
MODE = "mode"


# --------------------------------------------------------------------- around it


@contextlib.contextmanager
def busy(function: Callable[[], object]) -> Iterator[None]:
    """A thread that calls ``function`` over and over."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            function()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def spin() -> int:
    return sum(range(2000))


def collect() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    gc.collect()


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGALRM and SIGPROF, each a thousand times a second, with handlers in Python."""
    count = [0, 0]

    def on_alarm(*_: object) -> None:
        count[0] += 1

    def on_profile(*_: object) -> None:
        count[1] += 1

    signal.signal(signal.SIGALRM, on_alarm)
    signal.signal(signal.SIGPROF, on_profile)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert count[0] > 0, "no signal came"


@contextlib.contextmanager
def storm_of(name: str) -> Iterator[None]:
    with signals() if name == "signals" else busy(collect) if name == "gc" else nothing():
        yield


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


async def on_thread(function: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def body() -> None:
        try:
            function()
        except BaseException as error:
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=body, daemon=True).start()
    await done


async def attempt(way: Callable[[Place], None], place: Place, thread: str) -> str:
    """ "ok", "EFAULT", "skipped: why" or what went wrong."""
    try:
        match thread:
            case "loop":
                way(place)
            case "two":
                barrier = threading.Barrier(2)

                def together() -> None:
                    barrier.wait(10)
                    way(place)

                await asyncio.gather(on_thread(together), on_thread(together))
            case _:
                await on_thread(lambda: way(place))
    except Skipped as reason:
        return f"skipped: {reason}"
    except OSError as error:
        return "EFAULT" if error.errno == errno.EFAULT else repr(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


async def cells(
    thread: str, url: str | None, folder: str, storm: str, user_mode_only: bool
) -> dict[str, str]:
    """Try all ways from one kind of thread; the result of each by its name, and of `MODE`."""
    warnings.simplefilter("ignore", aiouffd.BlockingTouchWarning)
    data = content(ROOM * len(WAYS))

    async def read(offset: int, length: int) -> bytes:
        await asyncio.sleep(0.0005)
        return data[offset : offset + length]

    source: Any = url or FunctionSource(read, len(data), portable=True)
    settings: dict[str, Any] = {"block_size": BLOCK}
    if storm == "none":
        settings["readahead"] = 0
    if user_mode_only:
        settings["user_mode_only"] = True
    found: dict[str, str] = {}
    numpy()
    async with aiouffd.open(source, **settings) as buf:
        found[MODE] = "user" if buf.user_mode_only else "all"
        with storm_of(storm), busy(spin) if thread == "hungry" else nothing(), buf.view as view:
            for number, (name, way) in enumerate(WAYS.items()):
                start = number * ROOM
                place = Place(buf, view, start, data[start : start + ROOM], Path(folder))
                found[name] = await attempt(way, place, thread)
                if buf.user_mode_only and found[name] == "EFAULT":
                    await buf.fetch(start, ROOM)
                    found[name] += " " + await attempt(way, place, thread)
                gc.collect(0)
            if await buf.read() != data:
                found["index"] += ", but wrong bytes at the end"
    assert mmap.PAGESIZE == PAGE_SIZE
    return found
