"""Forked children that keep their parent's lazy memory, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.sources import FunctionSource
from tests.faulty import HUGE
from tests.scenarios.forking import CHILD, fork, in_child
from tests.scenarios.gil_yield import TOUCHES, NewLoop, Threads, numpy, on, serving
from tests.support import Counters, Gate, content, read_counters, wait_until, word

SIZE = 64 * PAGE_SIZE
BLOCK = 4 * PAGE_SIZE


class Fork:
    """A child that runs `function`; what it returned is read by `answer`."""

    def __init__(self, function: Callable[[], Any], limit: int = CHILD) -> None:
        self._reader, writer = os.pipe()
        self.pid = fork()
        if self.pid:
            os.close(writer)
            return
        status = 1
        try:
            signal.alarm(limit)
            os.write(writer, json.dumps(function()).encode())
            status = 0
        except BaseException as error:
            os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(status)

    def answer(self) -> Any:
        """What it returned, or the signal that ended it."""
        with os.fdopen(self._reader, "rb") as stream:
            answer = stream.read()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        if status:
            raise RuntimeError(f"the child failed: {answer!r}")
        return json.loads(answer)


def gated(gate: Gate) -> FunctionSource:
    return FunctionSource(gate.read, len(gate.data), portable=True)


async def buffer_of(gate: Gate, **settings: Any) -> aiouffd.LazyBuffer:
    settings = {"readahead": 0, "block_size": BLOCK, "fork": "serve", **settings}
    return await aiouffd.open(gated(gate), **settings)


@contextlib.contextmanager
def opened(
    new_loop: NewLoop, gate: Gate, force: bool = False, **settings: Any
) -> Iterator[aiouffd.LazyBuffer]:
    """A buffer on a loop that runs on another thread."""
    with serving(new_loop) as loop:
        buffer = on(loop, buffer_of(gate, **settings))
        try:
            yield buffer
        finally:
            on(loop, buffer.aclose(force=force))


def descriptors() -> list[str]:
    """What the open descriptors of this process name, one by one."""
    links = []
    for item in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(item).partition(":")[0])
    return sorted(links)


def raises(call: Callable[[], Any]) -> str:
    """Name of the exception of ``call``; "" if there is none."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return ""


def is_whole(buffer: aiouffd.LazyBuffer, data: bytes) -> bool:
    """Touch everything, in an order of this process's own, and compare."""
    pages = list(range(0, len(data), PAGE_SIZE))
    random.Random(os.getpid()).shuffle(pages)
    view = buffer.view
    return all(view[at : at + PAGE_SIZE] == data[at : at + PAGE_SIZE] for at in pages)


# -------------------------------------------------------------------- touching


async def from_the_loop(kind: str, user_mode_only: bool | None) -> dict[str, Any]:
    """The loop's own thread forks, and blocks until the child has ended."""
    data = content(SIZE)
    gate = Gate(data)
    found: dict[str, Any] = {}
    async with await buffer_of(gate, kind=kind, user_mode_only=user_mode_only) as buffer:
        await buffer.fetch(0, BLOCK)
        array = numpy().frombuffer(buffer.view, dtype="<u8")

        def touches() -> dict[str, Any]:
            calls: dict[str, Callable[[], Any]] = {
                "fetch": lambda: asyncio.run(buffer.fetch(0, 1)),
                "read": lambda: asyncio.run(buffer.read(0, 1)),
                "resident": buffer.resident,
                "prefetch": lambda: asyncio.run(buffer.prefetch(None)),  # type: ignore[arg-type]
            }
            return {
                "threads": len(os.listdir("/proc/self/task")),
                "index": buffer[5 * PAGE_SIZE] == data[5 * PAGE_SIZE],
                "slice": buffer[6 * PAGE_SIZE : 9 * PAGE_SIZE]
                == data[6 * PAGE_SIZE : 9 * PAGE_SIZE],
                "find": buffer.find(data[20 * PAGE_SIZE : 20 * PAGE_SIZE + 8]) == 20 * PAGE_SIZE,
                "array": int(array[SIZE // 8 - 1]) == word(SIZE - 8),
                "whole": is_whole(buffer, data),
                "len": len(buffer),
                "address": buffer.address == address,
                "said": {name: raises(call) for name, call in calls.items()},
                "closed": [raises(lambda: asyncio.run(buffer.aclose())), raises(lambda: buffer[0])],
            }

        address = buffer.address

        def touch(way: str, at: int) -> str:
            try:
                return "right" if TOUCHES[way](buffer.view, at) == word(at) else "wrong"
            except OSError as error:
                return errno.errorcode[error.errno or 0]

        found["ways"] = [
            in_child(lambda way=way, at=at: touch(way, at))
            for way, at in [("write", 2 * BLOCK), ("struct", 3 * BLOCK), ("memcpy", 4 * BLOCK)]
        ]
        found["child"] = in_child(touches)
        found["user_mode_only"] = in_child(lambda: buffer.user_mode_only)
        found["rescued"] = buffer.stats.rescued
        found["resident"] = buffer.stats.resident_bytes
        found["fetched"] = buffer.stats.fetched_bytes
    return found


_global: Any = None


def _worker_touches(number: int) -> bool:
    """In a pool's worker, which has the buffer by fork."""
    buffer, data = _global
    if number % 2:
        return is_whole(buffer, data)
    return bool(buffer[:] == data)


def by_pool(new_loop: NewLoop, kind: str, workers: int) -> dict[str, Any]:
    """A pool of forked workers over one buffer."""
    global _global
    gate = Gate(content(SIZE))
    with opened(new_loop, gate, kind=kind) as buffer, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        _global = buffer, gate.data
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            answers = pool.map(_worker_touches, range(4 * workers), chunksize=1)
            pool.close()
            pool.join()
        wait_until(lambda: buffer.stats.children == 0, "the workers to be forgotten")
        _global = None
        return {"answers": answers, "fetched": buffer.stats.fetched_bytes}


async def by_pool_on_the_loop(kind: str) -> list[bool]:
    """The same from the loop's thread, which `Pool.map` blocks."""
    global _global
    gate = Gate(content(SIZE))
    async with await buffer_of(gate, kind=kind) as buffer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            _global = buffer, gate.data
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return pool.map(_worker_touches, range(4), chunksize=1)


async def _use_pickled(buffer: aiouffd.LazyBuffer) -> str:
    async with buffer:
        view = buffer.view
        return str(await asyncio.to_thread(TOUCHES["struct"], view, 5 * PAGE_SIZE))


def _worker_opens(module: str, buffer: Any) -> tuple[str, str]:
    """In a worker that has the buffer by pickling, so one of its own."""
    if isinstance(buffer, aiouffd.sync.SyncBuffer):
        with buffer:
            return str(TOUCHES["struct"](buffer.view, 5 * PAGE_SIZE)), buffer._buffer._fork
    factory = __import__(module).new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return str(runner.run(_use_pickled(buffer))), buffer._fork


def by_pickling(new_loop: NewLoop, method: str, path: str, fork: str) -> list[Any]:
    """Workers that are not forked from here get the buffer opened anew, with its settings."""
    module = new_loop.__module__.split(".")[0]

    async def opening() -> aiouffd.LazyBuffer:
        return await aiouffd.open(path, fork=fork, readahead=0)  # type: ignore[arg-type]

    with serving(new_loop) as loop:
        buffer = on(loop, opening())
        with aiouffd.sync.open(path, fork=fork, readahead=0) as other:
            context = multiprocessing.get_context(method)
            with context.Pool(1) as pool:
                answers = pool.starmap(_worker_opens, [(module, buffer), (module, other)])
                pool.close()
                pool.join()
        on(loop, buffer.aclose())
    return [answer == (str(word(5 * PAGE_SIZE)), fork) for answer in answers]


def sync_buffer(_: NewLoop, kind: str) -> list[Any]:
    """Without a loop of one's own."""
    gate = Gate(content(SIZE))
    with aiouffd.sync.open(gated(gate), fork="serve", kind=kind, readahead=0) as buffer:
        return [
            in_child(lambda: buffer[:] == gate.data and bytes(buffer.view) == gate.data),
            in_child(lambda: [buffer.find(b"\xff" * 9), len(buffer), raises(buffer.fetch)]),
        ]


def other_sources(new_loop: NewLoop, path: str, kind: str) -> list[Any]:
    """Bytes of this process, which need no loop at all, and a file; not a whole page at the end."""
    data = content(SIZE)[: SIZE - 1000]
    Path(path).write_bytes(data)

    async def opening(source: Any) -> aiouffd.LazyBuffer:
        return await aiouffd.open(source, fork="serve", kind=kind, block_size=BLOCK)  # type: ignore[arg-type]

    answers = []
    with serving(new_loop) as loop:
        for source in (data, path):
            buffer = on(loop, opening(source))
            assert buffer[0:8] == data[0:8]
            answers += [
                in_child(lambda buffer=buffer: buffer[:] == data),
                in_child(lambda buffer=buffer: is_whole(buffer, data)),
            ]
            address = buffer.address
            answers.append(
                in_child(lambda a=address: ctypes.string_at(a + SIZE - 1000, 1000)[-9:] == bytes(9))
            )
            on(loop, buffer.aclose())
    return answers


def with_readahead(new_loop: NewLoop, kind: str) -> dict[str, Any]:
    """A child that reads in order is read ahead of, one with readahead=0 is not; and two
    children cost one fetch."""
    data = content(SIZE * 16)
    touched = 8

    def begins(buffer: aiouffd.LazyBuffer) -> bool:
        # Byte by byte, so that it faults on one block after the other.
        return all(buffer.view[at] == data[at] for at in range(0, touched * BLOCK, BLOCK))

    found: dict[str, Any] = {}
    with opened(new_loop, Gate(data), kind=kind) as buffer:
        assert in_child(lambda: begins(buffer))
        wait_until(lambda: buffer.stats.children == 0, "the child to be forgotten")
        found["without"] = buffer.stats.fetched_bytes // BLOCK
    with opened(new_loop, Gate(data), kind=kind, readahead=SIZE * 4) as buffer:
        gone = os.pipe()

        def stays() -> bool:
            os.close(gone[1])
            whole = begins(buffer)
            os.read(gone[0], 1)  # until the parent has seen what came ahead
            return whole

        child = Fork(stays)
        wait_until(lambda: buffer.stats.fetched_bytes > touched * BLOCK, "blocks ahead")
        os.close(gone[1])
        os.close(gone[0])
        found["ahead"] = child.answer()
        whole = [in_child(lambda: bytes(buffer.view) == data) for _ in range(2)]
        found["children"] = whole
        found["once"] = buffer.stats.fetched_bytes == len(data)
    return found


def huge_pages(new_loop: NewLoop, kind: str, size: int) -> dict[str, Any]:
    """Pages of 2 MiB, the last of them not full."""
    data = random.Random(4).randbytes(size)
    gate = Gate(data)
    with opened(new_loop, gate, kind=kind, block_size=HUGE) as buffer:
        served = in_child(lambda: buffer[:] == data)
        view = buffer.view  # which ends with the object, and its last page does not

        def end() -> bool:
            address = ctypes.addressof(ctypes.c_char.from_address(buffer.address))
            return ctypes.string_at(address + size, -size % HUGE) == bytes(-size % HUGE)

        return {"served": served, "zeros behind": in_child(end), "len": len(view)}


# --------------------------------------------------------------------- moments


def while_fetching(new_loop: NewLoop, kind: str) -> dict[str, Any]:
    """Fork while threads of the parent wait for pages; parent and child get them."""
    gate = Gate(content(SIZE), is_open=False)
    with opened(new_loop, gate, kind=kind) as buffer:
        workers = Threads()

        def touch(number: int, way: str) -> None:
            at = number * BLOCK
            assert TOUCHES[way](buffer.view, at) == word(at)

        ways = ["struct", "memcpy", "bytes"]
        for number, way in enumerate(ways):
            workers.start(touch, number, way)
        gate.wait(len(ways))
        child = Fork(lambda: buffer[:] == gate.data)
        # It has asked for the first block as well, which nobody will bring but we.
        gate.wait()
        gate.open()
        answer = child.answer()
        workers.join()
        return {"child": answer, "parent": buffer[:] == gate.data}


def while_all_touch(new_loop: NewLoop, count: int) -> dict[str, Any]:
    """Fork in several threads while others touch and open and close buffers."""
    gate = Gate(content(SIZE))
    ended = threading.Event()
    answers: list[Any] = []
    with serving(new_loop) as loop:
        buffers = [on(loop, buffer_of(gate, kind=kind)) for kind in ("anonymous", "memfd")]
        workers, forking = Threads(), Threads()

        def touch(way: str) -> None:
            while not ended.is_set():
                buffer = on(loop, buffer_of(gate))
                for at in range(0, SIZE, BLOCK):
                    assert TOUCHES[way](buffer.view, at) == word(at)
                on(loop, buffer.aclose())

        def forks() -> None:
            for number in range(count):
                buffer = buffers[number % 2]
                answers.append(Fork(lambda buffer=buffer: buffer[:] == gate.data).answer())

        for way in ["struct", "memcpy"]:
            workers.start(touch, way)
        for _ in range(2):
            forking.start(forks)
        forking.join()
        ended.set()
        workers.join()
        whole = [buffer[:] == gate.data for buffer in buffers]
        for buffer in buffers:
            on(loop, buffer.aclose())
    return {"answers": answers, "whole": whole}


def grandchildren(new_loop: NewLoop, kind: str) -> dict[str, Any]:
    """Each generation is served by the first process, also when the ones between are gone."""
    gate = Gate(content(SIZE))
    with opened(new_loop, gate, kind=kind) as buffer:

        def first() -> list[Any]:
            here = buffer[0:8] == gate.data[0:8]
            return [here, in_child(second), buffer[:] == gate.data]

        def second() -> list[Any]:
            return [in_child(lambda: buffer[:] == gate.data), is_whole(buffer, gate.data)]

        nested = in_child(first)
        reader, writer = os.pipe()
        middle = fork()
        if not middle:
            parent = os.getpid()
            if fork():
                os._exit(0)
            signal.alarm(CHILD)
            wait_until(lambda: os.getppid() != parent, "the one between to be gone")
            os.write(writer, b"y" if buffer[:] == gate.data else b"n")
            os._exit(0)
        os.waitpid(middle, 0)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            orphan = stream.read()
        wait_until(lambda: buffer.stats.children == 0, "all to be forgotten")
    return {"nested": nested, "orphan": orphan.decode()}


def own_buffers(new_loop: NewLoop) -> dict[str, Any]:
    """A child has its parent's buffer and one of its own, and both go to its children."""
    gate, other = Gate(content(SIZE)), Gate(content(SIZE)[::-1])
    with opened(new_loop, gate) as buffer:

        def child() -> list[Any]:
            with opened(new_loop, other) as mine:
                return [
                    in_child(lambda: [buffer[:] == gate.data, mine[:] == other.data]),
                    buffer[:] == gate.data,
                    mine[:] == other.data,
                    in_child(lambda: bytes(mine.view) == other.data),
                ]

        return {"child": in_child(child), "parent": buffer[:] == gate.data}


# ---------------------------------------------------------------------- memory


def written(new_loop: NewLoop, kind: str) -> dict[str, Any]:
    """Who sees what is written by whom; and that a fetch overwrites none of it."""
    data = content(SIZE)
    gate = Gate(data)
    with opened(new_loop, gate, kind=kind, writable=True) as buffer:
        view = buffer.view
        view[0:4] = b"PPPP"  # the parent's, in a page that so becomes resident
        at = 8 * PAGE_SIZE

        def child() -> list[Any]:
            mine = buffer.view
            inherited = bytes(mine[0:4]).decode()
            # Pages that nobody has touched: the rest of their blocks is still missing.
            mine[at : at + 4] = b"CCCC"
            mine[4:8] = b"cccc"
            return [inherited, mine[at + 4 : at + PAGE_SIZE] == data[at + 4 : at + PAGE_SIZE]]

        answer = in_child(child)
        around = (at - BLOCK, at + 2 * BLOCK)
        seen = [bytes(view[place : place + 4]) for place in (at, 4)]
        expected = bytearray(data[slice(*around)])
        expected[BLOCK : BLOCK + 4] = seen[0]
        return {
            "child": answer,
            "seen": [
                "child's" if value in (b"CCCC", b"cccc") else "source's"
                for value in seen
                if value in (b"CCCC", b"cccc", data[at : at + 4], data[4:8])
            ],
            "around": view[slice(*around)] == expected,
            "again": in_child(lambda: bytes(buffer.view[at : at + 4]).decode(errors="replace"))
            == seen[0].decode(errors="replace"),
        }


def dropped(new_loop: NewLoop, kind: str) -> dict[str, Any]:
    """What is dropped comes anew, and is no zeros: in the child, and in the parent before."""
    gate = Gate(content(SIZE))
    with opened(new_loop, gate, kind=kind) as buffer:
        assert buffer[0:SIZE] == gate.data
        region = buffer._region
        assert region is not None
        region.drop(0, 4 * BLOCK)

        def child() -> list[bool]:
            found = [buffer[:] == gate.data]
            libc = ctypes.CDLL(None, use_errno=True)
            result = libc.madvise(
                ctypes.c_void_p(buffer.address),
                ctypes.c_size_t(SIZE),
                mmap.MADV_DONTNEED,
            )
            return [*found, result == 0, buffer[:] == gate.data, is_whole(buffer, gate.data)]

        found = in_child(child)
        region.drop(0, SIZE)
        return {"child": found, "next": in_child(lambda: buffer[:] == gate.data)}


# ------------------------------------------------------------------------- end


def closed_while_waiting(new_loop: NewLoop, kind: str, others: bool) -> dict[str, Any]:
    """The parent closes the buffer by force; children that wait, and later touches, get errors."""
    gate, open_gate = Gate(content(SIZE), is_open=False), Gate(content(SIZE))
    with serving(new_loop) as loop:
        buffer = on(loop, buffer_of(gate, kind=kind))
        other = on(loop, buffer_of(open_gate, kind=kind)) if others else None
        view = buffer.view
        gate.is_open = True
        assert buffer[0:8] == gate.data[0:8]
        gate.is_open = False
        gate.wait()

        def by_call() -> list[Any]:
            said = raises(lambda: buffer[3 * BLOCK])
            kept = buffer[0:8] == gate.data[0:8]
            rest = other is None or other[:] == open_gate.data
            return [said, kept, raises(lambda: buffer[5 * BLOCK]), rest]

        def by_touch() -> int:
            return TOUCHES["struct"](view, 3 * BLOCK)

        children = [Fork(by_call), Fork(by_touch), Fork(lambda: TOUCHES["memcpy"](view, 7 * BLOCK))]
        wait_until(lambda: buffer.stats.children == 3, "the children to come")
        gate.wait(2)
        on(loop, buffer.aclose(force=True))
        answers = [child.answer() for child in children]
        late = Fork(lambda: [raises(lambda: buffer[0]), TOUCHES["struct"](view, 0) == word(0)])
        later = Fork(lambda: TOUCHES["struct"](view, 3 * BLOCK))
        answers += [late.answer(), later.answer()]
        if other is not None:
            on(loop, other.aclose())
    return {"answers": answers}


def closed_while_held(new_loop: NewLoop, kind: str, how: str) -> dict[str, Any]:
    """The parent closes the buffer, or drops it; children hold its memory, and are served."""
    gate = Gate(content(SIZE), is_open=False)
    with serving(new_loop) as loop:
        holder = [on(loop, buffer_of(gate, kind=kind))]
        children = [
            Fork(lambda: is_whole(holder[0], gate.data)),
            Fork(lambda: TOUCHES["struct"](holder[0].view, 5 * BLOCK)),
        ]
        mapping = holder[0]._mapping
        assert mapping is not None
        ended = asyncio.run_coroutine_threadsafe(mapping.ended(), loop)
        if how == "collected":
            gate.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                holder.clear()
        else:
            # They may not even have come by now.
            on(loop, holder[0].aclose())
            holder.clear()
        held = not ended.done()
        del mapping
        gate.open()
        answers = [child.answer() for child in children]
        ended.result(10)
    return {"answers": answers, "held": held, "regions": read_counters()["live_regions"]}


def parent_hangs(new_loop: NewLoop, kind: str) -> None:
    """Children that wait, until the test kills this process."""
    gate = Gate(content(SIZE), is_open=False)
    loop = new_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    buffer = on(loop, buffer_of(gate, kind=kind))
    gate.is_open = True
    assert buffer[0:8] == gate.data[0:8]
    gate.is_open = False
    gate.wait()
    view = buffer.view

    def waits() -> None:
        def by_call() -> None:
            said = raises(lambda: buffer[3 * BLOCK])
            kept = bytes(view[0:PAGE_SIZE]) == gate.data[0:PAGE_SIZE]
            print("call", said, kept, raises(lambda: buffer[SIZE - 1]), flush=True)

        # One thread by call, and a child of this child by a plain touch.
        child = Fork(lambda: TOUCHES["struct"](view, 5 * BLOCK), 60)
        by_call()
        print("touch", child.answer(), flush=True)

    Fork(lambda: waits() or 0, 60)
    gate.wait(2)
    print("waiting", flush=True)
    signal.pause()


_left_open: list[aiouffd.LazyBuffer] = []


def exits_with_children(new_loop: NewLoop) -> None:
    """A child that the interpreter joins at exit touches then; the buffer was never closed."""
    gate = Gate(content(SIZE))
    loop = new_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    buffer = on(loop, buffer_of(gate))
    _left_open.append(buffer)
    reader, writer = os.pipe()

    def work() -> None:
        os.close(writer)
        os.read(reader, 1)  # until the parent has come to its end
        print("whole" if buffer[:] == gate.data else "broken", flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        multiprocessing.get_context("fork").Process(target=work).start()

    import atexit

    # Runs before multiprocessing's own, which joins.
    atexit.register(os.close, writer)


# -------------------------------------------------------------------- failures


def failing(new_loop: NewLoop, kind: str, how: str) -> list[Any]:
    """The source fails; ``how``: for a while, for good (soft), late (soft), or has changed."""
    data = content(SIZE)
    left = [3]

    async def read(offset: int, length: int) -> bytes:
        if how == "late":
            await asyncio.sleep(60)
        if how == "changed":
            raise aiouffd.SourceChangedError("another version")
        if how == "final" or left[0] > 0:
            left[0] -= 1
            raise aiouffd.SourceError("no", transient=how != "final")
        return data[offset : offset + length]

    soft: dict[str, Any] = {
        "final": {"errors": "soft"},
        "late": {"errors": "soft", "deadline": 0.2},
    }.get(how, {})
    source = FunctionSource(read, SIZE, portable=True)

    async def opening() -> aiouffd.LazyBuffer:
        return await aiouffd.open(
            source, fork="serve", kind=kind, readahead=0, block_size=BLOCK, **soft
        )

    with serving(new_loop) as loop:
        buffer = on(loop, opening())
        view = buffer.view
        answers = [
            in_child(lambda: raises(lambda: buffer[BLOCK]) or buffer[BLOCK] == data[BLOCK]),
            in_child(lambda: TOUCHES["struct"](view, 3 * BLOCK) == word(3 * BLOCK)),
        ]
        on(loop, buffer.aclose())
    return answers


def source_cannot_open(new_loop: NewLoop, path: str, errors: str) -> list[Any]:
    """The clone finds the file replaced by another: what is missing is an error."""
    Path(path).write_bytes(content(SIZE))

    async def opening() -> aiouffd.LazyBuffer:
        return await aiouffd.open(
            path,
            fork="serve",
            readahead=0,
            block_size=BLOCK,
            errors=errors,  # type: ignore[arg-type]
        )

    with serving(new_loop) as loop:
        buffer = on(loop, opening())
        assert buffer[0:8] == content(SIZE)[0:8]
        Path(path).write_bytes(content(2 * SIZE))
        answers = [in_child(lambda: [raises(lambda: buffer[BLOCK]), raises(lambda: buffer[0])])]
        on(loop, buffer.aclose())
    return answers


def not_handed_over(new_loop: NewLoop, kind: str) -> list[Any]:
    """No descriptor is free in the child: it has no access, and says so."""
    gate = Gate(content(SIZE))
    with opened(new_loop, gate, kind=kind) as buffer:
        assert buffer[0:8] == gate.data[0:8]
        view = buffer.view
        pipes = [os.pipe() for _ in range(2)]
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        pids = []
        try:
            for call, (_, writer) in zip(
                [lambda: raises(lambda: buffer[0]), lambda: str(TOUCHES["struct"](view, 0))],
                pipes,
                strict=True,
            ):
                pid = fork()
                if not pid:
                    os.write(writer, call().encode())
                    os._exit(0)
                pids.append(pid)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        answers = []
        for pid, (reader, writer) in zip(pids, pipes, strict=True):
            os.close(writer)
            with os.fdopen(reader, "rb") as stream:
                said = stream.read().decode()
            _, status = os.waitpid(pid, 0)
            answers.append([said, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0])
        return [*answers, buffer[:] == gate.data]


#: System calls on x86-64, and UFFDIO_POISON.
IOCTL, CLOSE_RANGE, POISON = 16, 436, 0xC020AA08


def deny(call: int, code: int, second: int | None = None) -> None:
    """Have a system call fail from now on, in all threads and in children, by seccomp: as in
    containers, and on kernels that lack it. With ``second`` only if that is its argument."""
    load, equal, back = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 0), (equal, 0, 1 if second is None else 3, call)]
    if second is not None:
        steps += [(load, 0, 0, 24), (equal, 0, 1, second)]
    steps += [(back, 0, 0, 0x50000 | code), (back, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    filter_ = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.syscall(317, 1, 1, filter_) == 0, os.strerror(ctypes.get_errno())


def punches_a_hole(new_loop: NewLoop) -> list[bool]:
    """A child drops a page of the shared memory for everybody. It is fetched again, for both."""
    gate = Gate(content(SIZE))
    libc = ctypes.CDLL(None, use_errno=True)
    with opened(new_loop, gate, kind="memfd", writable=True) as buffer:

        def punch() -> bool:
            right = buffer[BLOCK] == gate.data[BLOCK]
            address = ctypes.c_void_p(buffer.address + BLOCK)
            assert libc.madvise(address, PAGE_SIZE, 9) == 0  # MADV_REMOVE
            return right and buffer[BLOCK : BLOCK + 8] == gate.data[BLOCK : BLOCK + 8]

        return [in_child(punch), buffer[:] == gate.data]


def closing_without_poison(new_loop: NewLoop) -> list[list[str]]:
    """Before Linux 6.6, with several threads of two children waiting as the buffer closes."""
    deny(IOCTL, errno.EINVAL, POISON)
    gate = Gate(content(SIZE), is_open=False)
    with opened(new_loop, gate, force=True) as buffer:

        def wait() -> list[str]:
            found: set[str] = set()
            threads = [
                threading.Thread(target=lambda at=start: found.add(raises(lambda: buffer[at])))
                for start in range(0, SIZE, BLOCK)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return sorted(found)

        children = [Fork(wait) for _ in range(2)]
        gate.wait(SIZE // BLOCK)  # which both of them wait for
        wait_until(lambda: buffer.stats.children == 2, "both children to come")
    return [child.answer() for child in children]


def a_child_of_one_that_was_refused(new_loop: NewLoop) -> list[str]:
    gate = Gate(content(SIZE))
    with opened(new_loop, gate) as buffer:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)

        def both() -> list[str]:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            return [raises(lambda: buffer[0]), in_child(lambda: raises(lambda: buffer[0]))]

        reader, writer = os.pipe()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        pid = fork()
        if not pid:
            signal.alarm(CHILD)
            try:
                os.write(writer, json.dumps(both()).encode())
            except BaseException as error:
                os.write(writer, json.dumps(repr(error)).encode())
            finally:
                os._exit(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            answer = stream.read()
        _, status = os.waitpid(pid, 0)
        assert not os.WIFSIGNALED(status), os.WTERMSIG(status)
        found: list[str] = json.loads(answer)
        return found


def closes_everything(new_loop: NewLoop, kind: str, close_range: bool) -> dict[str, Any]:
    """A daemon: closes all descriptors. It is still served; a child of it gets errors."""
    if not close_range:
        deny(CLOSE_RANGE, errno.ENOSYS)
    gate = Gate(content(SIZE))
    with opened(new_loop, gate, kind=kind) as buffer:
        reader, writer = os.pipe()
        assert buffer[0:8] == gate.data[0:8]
        pid = fork()
        if not pid:
            signal.alarm(CHILD)
            os.closerange(3, writer)
            os.closerange(writer + 1, 4096)
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3, 64):  # the numbers name other files now
                if number != writer:
                    os.dup2(null, number)
            whole = buffer[0 : SIZE // 2] == gate.data[0 : SIZE // 2]
            child = fork()
            if not child:
                said = [raises(lambda: buffer[SIZE - 1]), buffer[0:8] == gate.data[0:8]]
                os.write(writer, json.dumps(said).encode())
                os._exit(0)
            os.waitpid(child, 0)
            os.write(writer, f"\n{json.dumps([whole, buffer[:] == gate.data])}".encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            grandchild, child = (json.loads(line) for line in stream.read().splitlines())
        os.waitpid(pid, 0)
        return {"child": child, "grandchild": grandchild}


# ------------------------------------------------------------------------ many


def many(new_loop: NewLoop, count: int) -> dict[str, Any]:
    """Many children at once, some that exit at once, some that are killed, some that exec."""
    gate = Gate(content(SIZE))
    with opened(new_loop, gate) as buffer:
        in_child(lambda: 0)
        wait_until(lambda: buffer.stats.children == 0, "the first child to be forgotten")
        before, counters = descriptors(), Counters()
        start = threading.Barrier(2)
        reader, writer = os.pipe()

        def whole() -> bool:
            os.close(writer)
            os.read(reader, 1)  # all of them begin at the same time
            return buffer[:] == gate.data

        children = [Fork(whole) for _ in range(count)]
        wait_until(lambda: buffer.stats.children == count, "all children to come", 20)
        os.close(writer)
        os.close(reader)
        answers = [child.answer() for child in children]
        for number in range(count):
            pid = fork()
            if not pid:
                if number % 3 == 0:
                    os._exit(0)
                if number % 3 == 1:
                    os.execv(sys.executable, [sys.executable, "-c", ""])
                signal.pause()
            if number % 3 == 2:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        wait_until(lambda: buffer.stats.children == 0, "all to be forgotten", 20)
        wait_until(lambda: descriptors() == before, "the descriptors to be closed", 20)
        del start
        return {
            "answers": answers,
            "live": {name: value for name, value in counters.deltas().items() if "live" in name},
            "parent": buffer[:] == gate.data,
        }


def subprocesses(new_loop: NewLoop, count: int) -> dict[str, Any]:
    """Programs that are started beside it, with a fork and with a vfork."""
    gate = Gate(content(SIZE))
    with opened(new_loop, gate) as buffer:
        codes = []
        for number in range(count):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                done = subprocess.run(
                    ["/bin/true"],
                    # With it Python forks; it also touches, in the child.
                    preexec_fn=(lambda: bytes(buffer.view)) if number % 2 else None,
                )
            codes.append(done.returncode)
        wait_until(lambda: buffer.stats.children == 0, "all to be forgotten")
        return {"codes": codes}


def hundreds_of_buffers(new_loop: NewLoop, count: int) -> dict[str, Any]:
    """One child of hundreds of buffers, half of which are closed while it is there."""
    gates = [Gate(content(SIZE)[number * 8 : number * 8 + PAGE_SIZE]) for number in range(count)]
    with serving(new_loop) as loop:
        buffers = [on(loop, buffer_of(gate)) for gate in gates]
        reader, writer = os.pipe()

        def touches() -> list[int]:
            first = sum(
                buffer[:] == gate.data
                for buffer, gate in zip(buffers[::4], gates[::4], strict=True)
            )
            os.close(writer)
            os.read(reader, 1)
            said = [raises(lambda buffer=buffer: buffer[0]) for buffer in buffers[1::2]]
            rest = [raises(lambda buffer=buffer: buffer[0]) for buffer in buffers[::2]]
            return [first, said.count("SourceError"), rest.count("")]

        child = Fork(touches)
        wait_until(lambda: all(buffer.stats.children for buffer in buffers), "the child")
        for buffer in buffers[1::2]:
            on(loop, buffer.aclose(force=True))
        os.close(writer)
        answer = child.answer()
        os.close(reader)
        for buffer in buffers[::2]:
            on(loop, buffer.aclose())
    return {"answer": answer}


def in_threads(new_loop: NewLoop, kind: str) -> dict[str, Any]:
    """Threads of a child, with and without the GIL, all at the same pages."""
    gate = Gate(content(SIZE), is_open=False)
    with opened(new_loop, gate, kind=kind) as buffer:

        def child() -> int:
            # The GIL is held by who touches first, until the page is there: no other thread of
            # this process has to come.
            workers = Threads()
            seen: list[int] = []

            def touch(way: str) -> None:
                for at in range(0, SIZE, PAGE_SIZE):
                    assert TOUCHES[way](buffer.view, at) == word(at)
                seen.append(1)

            for way in ["struct", "memcpy", "bytes", "crc"] * 2:
                workers.start(touch, way)
            workers.join()
            return len(seen)

        forked = Fork(child)
        gate.wait()
        gate.open()
        return {"threads": forked.answer()}


def changes_user(new_loop: NewLoop) -> dict[str, Any]:
    """A child that gives up its privileges gives up all of them, and is served on."""
    gate = Gate(content(SIZE))
    with opened(new_loop, gate) as buffer:

        def child() -> list[Any]:
            os.setgid(65534)
            os.setuid(65534)
            users = {
                line.split()[2]
                for task in Path("/proc/self/task").iterdir()
                for line in (task / "status").read_text().splitlines()
                if line.startswith("Uid:")
            }
            return [sorted(users), buffer[:] == gate.data]

        return {"child": in_child(child)}


def timing(new_loop: NewLoop, count: int) -> dict[str, float]:
    """What a fork costs, with and without (not a test)."""
    gate = Gate(content(SIZE))

    def forks() -> float:
        started = time.perf_counter()
        for _ in range(count):
            pid = fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
        return (time.perf_counter() - started) / count

    with opened(new_loop, gate, fork="drop"):
        before = forks()
    with opened(new_loop, gate):
        return {"drop": before, "serve": forks()}
