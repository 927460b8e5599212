"""Lazy buffers in situations that may end a process: views after close, fork, exit, SIGBUS."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from tests.faulty import FullSource, PlainSource, final
from tests.support import Gate, content, read_counters, wait_until

NewLoop = Callable[[], asyncio.AbstractEventLoop]
BLOCK = 65536


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------- views after close


async def view_after_close(what: str) -> None:
    """What is resident can be read when it was closed by force; the first page that is not ends it
    all."""
    data = content(8 * BLOCK)
    buf = await aiouffd.open(PlainSource(data), readahead=0)
    view: Any = buf.view
    if what == "numpy":
        view = importlib.import_module("numpy").frombuffer(buf.view, dtype="u1")
    elif what == "slice":
        view = buf.view[:]
    elif what == "cast":
        view = buf.view.cast("B", (8, BLOCK))
    await buf.fetch(BLOCK, BLOCK)
    await buf.aclose(force=True)
    del buf
    gc.collect()
    if what == "cast":
        assert all(view[1, i] == data[BLOCK + i] for i in range(0, BLOCK, 999))
    else:
        assert bytes(view[BLOCK : 2 * BLOCK]) == data[BLOCK : 2 * BLOCK]
    say("resident part is right")
    print(view[3, 5] if what == "cast" else view[3 * BLOCK + 5])
    say("not reached")


async def view_released_after_close() -> dict[str, int]:
    """The last view takes the mapping with it."""
    before = read_counters()
    async with aiouffd.open(PlainSource(content(BLOCK))) as buf:
        view = buf.view[1000:2000]
        await buf.fetch()
    while_viewed = read_counters()["live_regions"] - before["live_regions"]
    del view
    await buf.drained()
    return {
        "viewed": while_viewed,
        "after": read_counters()["live_regions"] - before["live_regions"],
    }


def wait_for_no_regions() -> None:
    """The last one to let go of memory does not wait for its end."""
    wait_until(lambda: not read_counters()["live_regions"], "the end of all regions")


# ------------------------------------------------------------------- not closed


async def collected_with_views() -> dict[str, Any]:
    """A buffer that nobody closes is collected while views of it are alive."""
    data = content(4 * BLOCK)
    buf = await aiouffd.open(PlainSource(data), readahead=0)
    await buf.fetch(0, BLOCK)
    view = buf.view
    gone = weakref.ref(buf)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del buf
        gc.collect()
        await asyncio.sleep(0)
    assert bytes(view[:BLOCK]) == data[:BLOCK]
    view.release()
    await asyncio.to_thread(wait_for_no_regions)
    names = [warning.category.__name__ for warning in seen]
    del seen  # the warning holds the buffer that it is about
    gc.collect()
    return {
        "gone": gone() is None,
        "warnings": names,
        "regions": read_counters()["live_regions"],
        "engines": read_counters()["live_engines"],
    }


def collected_after_its_loop(new_loop: NewLoop) -> dict[str, Any]:
    """The loop is closed first, then the buffer is collected."""
    data = content(4 * BLOCK)
    loop = new_loop()

    async def begin() -> aiouffd.LazyBuffer:
        buf = await aiouffd.open(PlainSource(data), readahead=0)
        await buf.fetch(0, BLOCK)
        return buf

    buf = loop.run_until_complete(begin())
    view = buf.view
    loop.close()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del buf
        gc.collect()
    assert bytes(view[:BLOCK]) == data[:BLOCK]
    view.release()
    del loop
    wait_for_no_regions()
    gc.collect()
    return {
        "warnings": [warning.category.__name__ for warning in seen],
        "regions": read_counters()["live_regions"],
        "engines": read_counters()["live_engines"],
    }


def touched_after_its_loop(new_loop: NewLoop) -> dict[str, Any]:
    """Nobody closed the buffer before the loop ended: the rescue loop serves, then it is closed."""
    data = content(8 * BLOCK)
    source = FullSource(data)
    with asyncio.Runner(loop_factory=new_loop) as runner:

        async def begin() -> aiouffd.LazyBuffer:
            buf = await aiouffd.open(source, readahead=0)
            await buf.fetch(0, BLOCK)
            return buf

        buf = runner.run(begin())
    view = buf.view
    threads = [
        threading.Thread(target=bytes, args=(view[at : at + BLOCK],))
        for at in range(0, len(data), BLOCK)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = bytes(view) == data and buf[BLOCK : 2 * BLOCK] == data[BLOCK : 2 * BLOCK]
    del threads[:], thread
    view.release()
    rescued = buf.stats.rescued
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(buf.aclose())
    del buf, view
    gc.collect()
    return {"right": found, "rescued": rescued, "engines": read_counters()["live_engines"]}


def exit_with_open_buffer(new_loop: NewLoop) -> None:
    """The interpreter ends with a buffer open and a thread waiting for a page."""
    gate = Gate(content(BLOCK), is_open=False)
    buf = aiouffd.sync.open(gate.read, size=BLOCK, portable=True)
    thread = threading.Thread(target=lambda: bytes(buf.view), daemon=True)
    thread.start()
    gate.wait()
    say("ends")


# ------------------------------------------------------------------------- fork


async def used_in_a_child() -> list[str]:
    """A forked child gets an error from every method, and the parent never notices."""
    data = content(4 * BLOCK)
    async with aiouffd.open(PlainSource(data), readahead=0) as buf:
        await buf.fetch(0, BLOCK)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            said = []
            for call in (
                lambda: buf[0],
                lambda: buf.view,
                lambda: buf.find(b"x"),
                lambda: buf.resident(),
                lambda: buf.address,
            ):
                try:
                    call()
                    said.append("no error")
                except aiouffd.ClosedError:
                    said.append("ClosedError")
            os.write(writer, ",".join(said).encode())
            os._exit(0)
        os.close(writer)
        await asyncio.to_thread(os.waitpid, child, 0)
        with os.fdopen(reader) as pipe:
            said = pipe.read().split(",")
        assert await asyncio.to_thread(bytes, buf.view) == data
    return said


# --------------------------------------------------------------- errors in cycles


async def errors_are_collected() -> None:
    """Errors whose tracebacks hold views are garbage in cycles, which must not crash."""
    data = memoryview(bytearray(content(4 * BLOCK)))

    def keep(error: BaseException) -> None:
        error.itself = error  # type: ignore[attr-defined]

    async with aiouffd.Pager() as pager:
        region = pager.map(4 * BLOCK)
        for call in (
            lambda: region.install(1, data[:PAGE_SIZE]),
            lambda: region.install(0, memoryview(region.view)),
            lambda: region.serve_from(data[:-5]),
        ):
            try:
                call()
            except aiouffd.UsageError as error:
                keep(error)
    async with aiouffd.open(PlainSource(data.tobytes(), refuse), errors="soft") as buf:
        for offset in (0, -1):
            try:
                await buf.readinto(offset, data[5:500])
            except (aiouffd.SourceError, aiouffd.UsageError) as error:
                keep(error)
    gc.collect()
    gc.collect()


async def refuse(offset: int, length: int) -> None:
    raise final()


# ------------------------------------------------------------------------ SIGBUS


async def raw_touch_of_failed_page(way: str) -> None:
    """The source has failed for good: a raw touch ends the process, and says why."""
    source = PlainSource(content(4 * BLOCK))
    buf = await aiouffd.open(source, readahead=0, errors="soft", deadline=5.0)
    await buf.fetch(0, BLOCK)

    async def fail(offset: int, length: int) -> None:
        raise final()

    source.script = fail
    view = buf.view
    say("begins")
    if way == "index":
        await asyncio.to_thread(lambda: view[BLOCK + 10])
    elif way == "numpy":
        numpy = importlib.import_module("numpy")
        await asyncio.to_thread(lambda: numpy.frombuffer(view, dtype="u1").sum())
    elif way == "own thread":
        view[BLOCK + 10]
    else:
        target = ctypes.create_string_buffer(8)
        await asyncio.to_thread(
            ctypes.CDLL(None).memcpy, target, ctypes.c_void_p(buf.address + BLOCK), 8
        )
    say("not reached")


async def raw_touch_while_closing(way: str) -> None:
    """A thread waits in a raw touch when the buffer is closed by force."""
    gate = Gate(content(4 * BLOCK), is_open=False)
    buf = await aiouffd.open(gate.read, size=len(gate.data), portable=True)
    view = buf.view
    touch = (lambda: view[5]) if way == "index" else (lambda: zlib_crc(view))
    threading.Thread(target=touch, daemon=True).start()
    await asyncio.to_thread(gate.wait)
    say("begins")
    await buf.aclose(force=True)
    await asyncio.sleep(5)
    say("not reached")


def zlib_crc(view: memoryview) -> int:
    return int(importlib.import_module("zlib").crc32(view))


async def raw_touch_of_failed_handler(how: str) -> None:
    """A soft region whose handler fails, says nothing, or never ends."""
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: print(f"handler: {type(context['exception']).__name__}", flush=True)
    )
    pager = aiouffd.Pager().open()
    region = pager.map(4 * PAGE_SIZE, errors="soft", deadline=0.2)

    @region.on_missing
    async def serve(fault: aiouffd.Fault) -> None:
        match how:
            case "raises":
                raise RuntimeError("no idea")
            case "returns":
                return
            case "hangs":
                await asyncio.Event().wait()
            case "poisons":
                fault.poison()

    view = region.view
    print("begins", file=sys.stderr, flush=True)
    await asyncio.to_thread(lambda: view[PAGE_SIZE])
    say("not reached")
