"""Programs that end, or go on, while somebody holds lazy memory."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import aiouffd
from tests.faulty import FullSource, PlainSource
from tests.support import Gate, content, read_counters, wait_until

NewLoop = Callable[[], asyncio.AbstractEventLoop]
BLOCK = 65536
SIZE = 16 * BLOCK


def say(text: str) -> None:
    print(text, flush=True)


def run(new_loop: NewLoop, coroutine: Any) -> Any:
    """As asyncio.run."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(coroutine)


def living() -> dict[str, int]:
    """What there is in native memory."""
    counters = read_counters()
    return {name: counters[name] for name in ("live_regions", "live_engines")}


class Counted(FullSource):
    """Says which of its instances were closed."""

    closed: list[Counted]

    def __init__(self, data: bytes, script: Any = None) -> None:
        super().__init__(data, script)
        self.closed = []

    def clone(self) -> Counted:
        copy = Counted(self.data, self.script)
        copy.closed = self.closed
        return copy

    async def aclose(self) -> None:
        self.closed.append(self)
        await super().aclose()


def array_after_the_loop(new_loop: NewLoop, made_of: str) -> dict[str, Any]:
    """`return np.frombuffer(buf.view)` out of asyncio.run.

    Which itself touches it: looking for the handler of SIGINT it makes a message with the repr of
    its task, and so of the result (`signal.getsignal` asks an enum).
    """
    numpy = importlib.import_module("numpy")
    data = content(SIZE)
    source = Counted(data)

    async def main() -> Any:
        async with aiouffd.open(source, readahead=0) as buf:
            if made_of == "buf":
                return numpy.frombuffer(buf, dtype="u8")
            if made_of == "slice":
                return numpy.frombuffer(buf.view[BLOCK:], dtype="u8")
            return numpy.frombuffer(buf.view, dtype="u8")

    array = run(new_loop, main())
    closed_with_the_loop = source.closed == [source]
    skipped = BLOCK if made_of == "slice" else 0
    right = array.tobytes() == data[skipped:]
    before = living()
    del array
    wait_until(lambda: not any(living().values()), "the memory to go")
    wait_until(lambda: len(source.closed) == 2, "the clone to be closed")
    return {"right": right, "source": closed_with_the_loop, "before": before}


def exception_beside_workers(new_loop: NewLoop, how: str, slow: float) -> None:
    """One of several workers fails; the others are in the middle of touching."""
    data = content(SIZE)

    async def read(offset: int, length: int) -> bytes:
        await asyncio.sleep(slow)
        return data[offset : offset + length]

    def work(view: memoryview, number: int) -> int:
        for at in range(number * 8, SIZE, 4096):
            if int.from_bytes(view[at : at + 8], "little") != at // 8 + 1:
                say("wrong bytes")
        say("worked")
        return number

    async def fail() -> None:
        await asyncio.to_thread(started.wait)
        raise ValueError("the user's own")

    started = threading.Event()

    def begin(view: memoryview, number: int) -> int:
        started.set()
        return work(view, number)

    async def main() -> None:
        source = aiouffd.sources.FunctionSource(read, SIZE, portable=True)
        async with aiouffd.open(source, readahead=0) as buf:
            view = buf.view
            workers = [asyncio.to_thread(begin, view, number) for number in range(3)]
            match how:
                case "gather":
                    await asyncio.gather(*workers, fail())
                case "TaskGroup":
                    async with asyncio.TaskGroup() as group:
                        for worker in workers:
                            group.create_task(worker)
                        group.create_task(fail())
                case "timeout":
                    async with asyncio.timeout(0.05):
                        await asyncio.gather(*workers)
                case "wait_for":
                    await asyncio.wait_for(asyncio.gather(*workers), 0.05)
                case "raise":
                    tasks = [asyncio.create_task(worker) for worker in workers]
                    await fail()
                    await asyncio.wait(tasks)

    run(new_loop, main())


class Dead(aiouffd.sources.BaseSource):
    """Never answers; by a stream where it is asked for much."""

    size = 64 * SIZE

    async def read(self, offset: int, length: int) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def stream(self, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        await asyncio.Event().wait()
        yield b""

    def clone(self) -> Dead:
        return Dead()


def dead_source_at_the_end(new_loop: NewLoop, block_size: int) -> None:
    """The loop's end waits for a worker that waits for ever; it says so, until Ctrl-C."""

    async def main() -> None:
        async with aiouffd.open(Dead(), readahead=0, block_size=block_size) as buf:
            worker = asyncio.create_task(asyncio.to_thread(buf.view.__getitem__, 5))
            await asyncio.sleep(0.1)
            worker.cancel()
            raise ValueError("the user's own")

    importlib.import_module("aiouffd.buffers.mapping").SILENCE = 0.2
    logging.basicConfig(stream=sys.stderr)
    say("begins")
    run(new_loop, main())


def loop_closed_without_a_word(new_loop: NewLoop) -> dict[str, Any]:
    """run_until_complete and close(), as many programs do."""
    data = content(SIZE)
    source = Counted(data)
    loop = new_loop()

    async def main() -> memoryview:
        async with aiouffd.open(source, readahead=0) as buf:
            return buf.view

    view = loop.run_until_complete(main())
    loop.close()
    del loop
    start = time.monotonic()
    right = bytes(view) == data
    seconds = time.monotonic() - start
    view.release()
    gc.collect()
    wait_until(lambda: not any(living().values()), "the memory to go")
    return {"right": right, "quick": seconds < SIZE / BLOCK * 0.04}


def loop_closed_before_it_came_to_that(new_loop: NewLoop, what: str) -> dict[str, Any]:
    """The last export goes while the loop stands still, or is in the middle of ending the rest, and
    then the loop is closed: nothing is left, and nobody is told of anything."""
    data = content(SIZE)
    loop = new_loop()
    asked = threading.Event()

    class Stuck(Counted):
        async def read(self, offset: int, length: int) -> bytes:
            asked.set()
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        async def aclose(self) -> None:
            await asyncio.get_running_loop().create_future()

    async def buffer(data: Any) -> memoryview:
        async with aiouffd.open(data, readahead=0) as buf:
            return buf.view

    async def pager() -> memoryview:
        async with aiouffd.Pager() as pager:
            return pager.map(SIZE, block_size=BLOCK).view

    match what:
        case "pager":
            held = [loop.run_until_complete(pager())]
        case "reading" | "closing":
            held = [loop.run_until_complete(buffer(Stuck(data)))]
        case _:
            held = [loop.run_until_complete(buffer(Counted(data)))]
    found: list[bytes] = []
    if what == "reading":
        reader = threading.Thread(target=lambda: found.append(bytes(held[0])))
        reader.start()
        loop.run_until_complete(asyncio.to_thread(asked.wait))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        reader.join()
        held.clear()
    elif what == "closing":
        held.clear()
        loop.run_until_complete(asyncio.sleep(0.01))
    else:
        clearing = threading.Thread(target=held.clear)
        clearing.start()
        clearing.join()
    loop.close()
    del loop
    wait_until(lambda: not any(living().values()), "the memory to go")
    gc.collect()
    assert found in ([], [data])
    return living()


def not_clonable_after_the_loop(new_loop: NewLoop) -> None:
    """What cannot be served any more is an error, told with the place that holds the memory."""
    data = content(SIZE)

    class Stuck(PlainSource):
        def clone(self) -> Any:
            raise aiouffd.UnsupportedError("one loop only")

    async def main() -> tuple[memoryview, int]:
        async with aiouffd.open(Stuck(data), readahead=0) as buf:
            view = buf.view
            pager = buf._region.pager  # type: ignore[union-attr]
            pager.rescue_deadline = 0.2
            worker = asyncio.create_task(asyncio.to_thread(view.__getitem__, BLOCK + 8))
            await asyncio.sleep(0.02)
        return view, await worker

    logging.basicConfig(stream=sys.stderr)
    view, found = run(new_loop, main())
    say(f"served while its loop ran: {found == data[BLOCK + 8]}")
    say(str(view[5 * BLOCK]))


def exit_holding_memory(new_loop: NewLoop, how: str) -> None:
    """The interpreter ends while arrays exist, and threads wait for a source that is dead."""
    gate = Gate(content(SIZE), is_open=False)

    async def main() -> memoryview:
        async with aiouffd.open(gate.read, size=SIZE, portable=True, readahead=0) as buf:
            return buf.view

    view = run(new_loop, main())
    globals()["kept"] = view
    if how != "nobody waits":
        thread = threading.Thread(target=view.__getitem__, args=(9,), daemon=how == "daemon")
        thread.start()
        gate.wait()
    say("ends")


def pager_closed_while_held(new_loop: NewLoop) -> dict[str, Any]:
    """Leaving `async with Pager()` by an exception, while a thread touches."""
    data = content(SIZE)
    gate = Gate(data, is_open=False)
    found: list[bytes] = []

    async def main() -> None:
        thread = None
        try:
            async with aiouffd.Pager() as pager:
                region = pager.map(SIZE, block_size=BLOCK)
                region.on_missing(gate)
                views = [region.view]
                thread = threading.Thread(target=lambda: found.append(bytes(views.pop())))
                thread.start()
                await asyncio.to_thread(gate.wait)
                raise ValueError("the user's own")
        except ValueError:
            pass
        assert pager.closed
        assert region.closed
        assert living()["live_regions"] == 1
        gate.open()
        assert thread is not None
        await asyncio.to_thread(thread.join)
        await pager.drained()

    run(new_loop, main())
    return {"right": found == [data], **living()}
