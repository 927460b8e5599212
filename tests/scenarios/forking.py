"""What a forked child has of its parent's lazy memory (nothing), and what it can do itself."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.sources import FunctionSource
from tests.scenarios.gil_yield import TOUCHES, NewLoop, Threads, on, serving
from tests.support import Counters, Gate, content, word

SIZE = 32 * PAGE_SIZE
#: Seconds that a child may live.
CHILD = 10


def source() -> FunctionSource:
    return FunctionSource(Gate(content(SIZE)).read, SIZE, portable=True)


def fork() -> int:
    with warnings.catch_warnings():
        # 3.12: "use of fork() may lead to deadlocks". It must not do so by our doing.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(function: Callable[[], Any]) -> Any:
    """What ``function`` returns in a forked child, or the signal that killed it."""
    reader, writer = os.pipe()
    child = fork()
    if not child:
        status = 1
        try:
            signal.alarm(CHILD)
            os.write(writer, json.dumps(function()).encode())
            status = 0
        except BaseException as error:
            os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"killed": signal.Signals(os.WTERMSIG(status)).name}
    if status:
        raise RuntimeError(f"the child failed: {answer!r}")
    return json.loads(answer)


def userfaultfds() -> int:
    """Descriptors of this process that are userfaultfds."""
    links = []
    for item in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(item))
        except OSError:
            continue
    return sum("userfaultfd" in link for link in links)


_mincore = ctypes.CDLL(None, use_errno=True).mincore
_residence = (ctypes.c_ubyte * 1)()


def is_mapped(address: int) -> bool:
    """Asks without taking memory that might be mapped right there, as reading a file would."""
    return not _mincore(ctypes.c_void_p(address), ctypes.c_size_t(PAGE_SIZE), _residence)


def own_buffer(new_loop: NewLoop) -> str:
    """Open, touch and close a buffer of one's own, by loop and without."""

    async def use() -> None:
        async with aiouffd.open(source(), readahead=0) as buffer:
            at = 3 * PAGE_SIZE
            assert await asyncio.to_thread(TOUCHES["struct"], buffer.view, at) == word(at)
            assert await buffer.read(PAGE_SIZE, 100) == content(SIZE)[PAGE_SIZE : PAGE_SIZE + 100]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(use())
    with aiouffd.sync.open(source(), readahead=0) as buffer:
        assert TOUCHES["struct"](buffer.view, 0) == word(0)
        assert buffer[8:16] == content(SIZE)[8:16]
    return "served"


# ------------------------------------------------------------------ the child


def child_api(new_loop: NewLoop) -> dict[str, Any]:
    """What each call says in the child, and that the parent is as before."""
    with serving(new_loop) as loop:

        async def begin() -> tuple[aiouffd.Pager, aiouffd.Region, aiouffd.LazyBuffer]:
            pager = aiouffd.Pager().open()
            region = pager.map(SIZE)
            region.on_missing(Gate(content(SIZE)), portable=True)
            return pager, region, await aiouffd.open(source(), readahead=0)

        pager, region, buffer = on(loop, begin())
        assert TOUCHES["struct"](region.view, 0) == word(0)
        assert TOUCHES["struct"](buffer.view, 0) == word(0)
        before = userfaultfds()
        addresses = [region.address, buffer.address]

        def tries() -> dict[str, Any]:
            # At once: later on something else may be mapped there.
            mapped = [is_mapped(address) for address in addresses]

            def coroutine(call: Callable[[], Any]) -> Callable[[], Any]:
                return lambda: asyncio.run(call())

            calls: dict[str, Callable[[], Any]] = {
                "buffer[0]": lambda: buffer[0],
                "buffer.view": lambda: buffer.view,
                "buffer.find": lambda: buffer.find(b"x"),
                "region.runs": lambda: region.runs(),
                "region.begin": lambda: region.begin(0, 1),
                "buffer.resident": lambda: buffer.resident(),
                "buffer.fetch": coroutine(lambda: buffer.fetch(PAGE_SIZE, PAGE_SIZE)),
                "buffer.read": coroutine(lambda: buffer.read(0, PAGE_SIZE)),
                "region.install": lambda: region.install(PAGE_SIZE, bytes(PAGE_SIZE)),
                "region.poison": lambda: region.poison(PAGE_SIZE, PAGE_SIZE),
                "region.drop": lambda: region.drop(0, PAGE_SIZE),
                "region.is_resident": lambda: region.is_resident(0, PAGE_SIZE),
                "region.view": lambda: region.view,
                "pager.map": lambda: pager.map(PAGE_SIZE),
                "pager.uffd": lambda: pager.uffd,
            }
            said = {}
            assert buffer.stats.size == SIZE
            for name, call in calls.items():
                try:
                    said[name] = f"returned {call()!r}"
                except Exception as error:
                    said[name] = type(error).__name__
            asyncio.run(buffer.aclose())
            asyncio.run(pager.aclose())
            return {"said": said, "userfaultfds": userfaultfds(), "mapped": mapped}

        answer: dict[str, Any] = in_child(tries)
        answer["own"] = in_child(lambda: own_buffer(new_loop))
        view = region.view
        answer["raw"] = in_child(lambda: TOUCHES["struct"](view, 0))
        # Neither what the children did nor their end has touched anything here.
        assert userfaultfds() == before
        for at in range(0, SIZE, PAGE_SIZE):
            assert TOUCHES["struct"](region.view, at) == word(at)
            assert TOUCHES["write"](buffer.view, at) == word(at)
        on(loop, buffer.aclose())
        on(loop, pager.aclose())
    return answer


def descriptors_of_others(new_loop: NewLoop) -> dict[str, Any]:
    """In the child the parent's numbers may name other files, which nobody may close."""
    with serving(new_loop) as loop:

        async def begin() -> list[Any]:
            pager = aiouffd.Pager().open()
            region = pager.map(SIZE, kind="memfd")
            region.on_missing(Gate(content(SIZE)))
            return [pager, region, await aiouffd.open(source(), readahead=0)]

        things = on(loop, begin())

        def tries() -> int:
            files = [tempfile.TemporaryFile() for _ in range(64)]  # noqa: SIM115
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                asyncio.run(things[2].aclose())
                asyncio.run(things[0].aclose())
                things.clear()
                gc.collect()
            for file in files:
                file.write(b"x")
                file.close()
            return len(files)

        count = in_child(tries)
        on(loop, things[2].aclose())
        on(loop, things[0].aclose())
    return {"files": count}


# ----------------------------------------------------------------- the parent


def while_threads_wait(new_loop: NewLoop, ways: list[str]) -> dict[str, Any]:
    """Fork while threads have yielded, or wait in the kernel; then their pages come."""
    gate = Gate(content(SIZE), is_open=False)
    answers = []
    with serving(new_loop) as loop:

        async def begin() -> aiouffd.Region:
            region = aiouffd.Pager().open().map(SIZE)
            region.on_missing(gate, portable=True)
            return region

        region = on(loop, begin())
        workers = Threads()

        def touch(number: int, way: str) -> None:
            at = number * PAGE_SIZE
            assert TOUCHES[way](region.view, at) == word(at)

        for number, way in enumerate(ways):
            workers.start(touch, number, way)
        gate.wait(len(ways))
        for _ in range(3):
            answers.append(in_child(lambda: own_buffer(new_loop)))
        gate.open()
        workers.join()
        on(loop, region.pager.aclose())
    return {"answers": answers}


def while_all_touch(new_loop: NewLoop, count: int) -> dict[str, int]:
    """Fork at any moment of reading, installing and yielding."""
    counters = Counters()
    ended = threading.Event()
    with serving(new_loop) as loop:

        async def begin() -> aiouffd.Region:
            region = aiouffd.Pager().open().map(SIZE)
            region.on_missing(Gate(content(SIZE)), portable=True)
            return region

        region = on(loop, begin())
        workers = Threads()

        def touch(way: str) -> None:
            while not ended.is_set():
                for at in range(0, SIZE, PAGE_SIZE):
                    assert TOUCHES[way](region.view, at) == word(at)
                region.drop(0, SIZE)

        for way in ["struct", "memcpy", "write"]:
            workers.start(touch, way)
        for number in range(count):
            # A word of memory, nothing else: the child has only this thread.
            assert in_child(lambda number=number: number) == number
        ended.set()
        workers.join()
        on(loop, region.pager.aclose())
    return counters.deltas()


def _in_worker(loop_module: str) -> str:
    return own_buffer(__import__(loop_module).new_event_loop)


def by_multiprocessing(new_loop: NewLoop) -> dict[str, Any]:
    """A pool of forked workers, beside an open buffer, each with a buffer of its own."""
    context = multiprocessing.get_context("fork")
    with serving(new_loop) as loop, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        buffer = on(loop, aiouffd.open(source(), readahead=0).aopen())
        assert TOUCHES["struct"](buffer.view, 0) == word(0)
        with context.Pool(2) as pool:
            answers = pool.map(_in_worker, [new_loop.__module__.split(".")[0]] * 4)
            pool.close()
            pool.join()
        at = 5 * PAGE_SIZE
        assert TOUCHES["struct"](buffer.view, at) == word(at)
        on(loop, buffer.aclose())
    return {"answers": answers, "version": sys.version_info[:2]}
