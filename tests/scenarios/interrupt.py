"""Signals while the main thread waits for bytes that do not come."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from tests.scenarios.gil_yield import NewLoop
from tests.support import Counters, Gate, content, wait_until

SIZE = 64 * PAGE_SIZE


class Dead(aiouffd.sources.BaseSource):
    """Answers nothing; ``asked`` tells that somebody waits."""

    size = SIZE

    def __init__(self, hangs_in: str = "read", asked: threading.Semaphore | None = None) -> None:
        self.hangs_in = hangs_in
        self.asked = asked or threading.Semaphore(0)

    async def _maybe_hang(self, where: str) -> None:
        if where == self.hangs_in:
            self.asked.release()
            await asyncio.Event().wait()

    async def open(self) -> None:
        await self._maybe_hang("open")

    async def read(self, offset: int, length: int) -> bytes:
        await self._maybe_hang("read")
        return content(SIZE)[offset : offset + length]

    async def aclose(self) -> None:
        await self._maybe_hang("aclose")

    def clone(self) -> Dead:
        return Dead(self.hangs_in, self.asked)


def interrupted(source: Dead, call: Callable[[], Any]) -> float:
    """Seconds from the signal that comes while ``call`` waits to the KeyboardInterrupt."""
    while source.asked.acquire(blocking=False):
        pass
    sent: list[float] = []

    def send() -> None:
        source.asked.acquire()
        time.sleep(0.05)  # for a wait that is well under way, as a person's is
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        call()
    except KeyboardInterrupt:
        took = time.monotonic() - sent[0]
    else:
        raise AssertionError("not interrupted")
    sender.join()
    return took


def sync_calls(new_loop: NewLoop) -> dict[str, float]:
    """Each blocking call of a sync buffer is cut short by a signal."""
    source = Dead()
    mine = bytearray(10)
    calls: dict[str, Callable[[Any], Any]] = {
        "item": lambda buf: buf[5],
        "slice": lambda buf: buf[5 : 5 * PAGE_SIZE],
        "find": lambda buf: buf.find(b"nothing"),
        "read": lambda buf: buf.read(0, 10),
        "readinto": lambda buf: buf.readinto(0, mine),
        "fetch": lambda buf: buf.fetch(),
        "pin": lambda buf: buf.pin(0, 10).__enter__(),
    }
    took: dict[str, float] = {}
    for name, call in calls.items():
        # A new one each time: a fetch under way is not begun again.
        with aiouffd.sync.open(source, readahead=0) as buf:
            took[name] = interrupted(source, lambda call=call, buf=buf: call(buf))  # type: ignore[misc]
    slow = Dead("open")
    took["open"] = interrupted(slow, lambda: aiouffd.sync.open(slow))
    slow = Dead("aclose")
    buf = aiouffd.sync.open(slow)
    took["close"] = interrupted(slow, buf.close)
    assert buf.closed
    assert bytes(mine) == bytes(10)
    return took


def on_the_loop(new_loop: NewLoop) -> dict[str, float]:
    """The same for touches through the buffer on the thread of its own loop."""
    source = Dead()
    took = {}

    async def main() -> None:
        for name in ("item", "find"):
            async with aiouffd.open(source, readahead=0) as buf:
                call = {"item": lambda: buf[5], "find": lambda: buf.find(b"nothing")}[name]
                took[name] = interrupted(source, call)

    loop = new_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    return took


def handler_that_returns(new_loop: NewLoop) -> list[Any]:
    """A handler runs while the call waits, may use the buffer itself, and the call goes on."""
    gate = Gate(content(SIZE), is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, SIZE, portable=True)
    seen: list[Any] = []

    with aiouffd.sync.open(source, readahead=0, block_size=PAGE_SIZE) as buf:

        def handle(number: int, frame: Any) -> None:
            gate.open()
            seen.append(buf[3 * PAGE_SIZE :][:8].hex())

        def send() -> None:
            gate.wait()
            os.kill(os.getpid(), signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, handle)
        sender = threading.Thread(target=send)
        sender.start()
        seen.append(buf[: 2 * PAGE_SIZE] == content(SIZE)[: 2 * PAGE_SIZE])
        sender.join()
        assert Counters.total("live_slots") == 0
    return seen


def closed_meanwhile(new_loop: NewLoop) -> str:
    """Another thread forces the buffer closed while the main thread waits in it."""
    source = Dead()
    buf = aiouffd.sync.open(source, readahead=0)

    def close() -> None:
        source.asked.acquire()
        buf._buffer._region.close()  # type: ignore[union-attr]

    closer = threading.Thread(target=close)
    closer.start()
    try:
        buf[5]
    except aiouffd.ClosedError:
        result = "ClosedError"
    closer.join()
    buf.close()
    return result


def in_a_child(new_loop: NewLoop) -> float:
    """A forked child that has the buffer waits for a page of it."""
    source = Dead()
    buf = aiouffd.sync.open(source, fork="serve", readahead=0)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            buf[5]
        except KeyboardInterrupt:
            os.write(writer, b"%f" % time.monotonic())
        os._exit(0)
    source.asked.acquire()
    wait_until(lambda: len(os.listdir(f"/proc/{child}/task")) > 1, "the child's wait")
    sent = time.monotonic()
    os.kill(child, signal.SIGINT)
    os.close(writer)
    took = float(os.read(reader, 100)) - sent
    os.waitpid(child, 0)
    buf.close()
    return took


async def serve_dead(path: str) -> None:
    """A server of memory that never comes."""
    source = Dead()
    async with aiouffd.serve.listen(path, source=source):
        print("serving", flush=True)
        while True:
            await asyncio.to_thread(source.asked.acquire)
            print("asked", flush=True)


def attached(new_loop: NewLoop, path: str) -> None:
    """Waits for memory of a server, twice, each time until it is interrupted."""
    with aiouffd.attach(path) as memory:
        for call in (lambda: memory[5], lambda: memory.fetch(SIZE - 1, 1)):
            try:
                call()
            except KeyboardInterrupt:
                print("interrupted", flush=True)


def under_asyncio_run(new_loop: NewLoop) -> list[str]:
    """The handler of asyncio.run cancels the task, which blocks the loop by then, and raises
    nothing itself."""
    source = Dead()
    seen: list[str] = []

    def interrupt() -> None:
        source.asked.acquire()
        os.kill(os.getpid(), signal.SIGINT)

    async def main() -> None:
        async with aiouffd.open(source, readahead=0) as buf:
            threading.Thread(target=interrupt, daemon=True).start()
            try:
                buf[5:10]
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())
    except KeyboardInterrupt:
        seen.append("KeyboardInterrupt")
    return seen
