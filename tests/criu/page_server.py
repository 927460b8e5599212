"""A page server of either layout, well behaved or not."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.criu.images import PAGE, Pages

GET, ADD, CLOSE = 7, 6, 0x1023
PRESENT = 4


def pages_of(pid: int, runs: Iterable[Pages]) -> dict[tuple[int, int], bytes]:
    """The pages of a task by pid and address."""
    return {
        (pid, run.address + at): run.data[at : at + PAGE]
        for run in runs
        for at in range(0, run.count * PAGE, PAGE)
    }


def pack(head: int, command: int, pages: int, address: int, pid: int) -> bytes:
    if head == 24:
        return struct.pack("<II", command, pages) + struct.pack("<QQ", address, pid)
    return struct.pack("<I", command) + bytes(4) + struct.pack("<QQQ", pages, address, pid)


def unpack(head: int, data: bytes) -> tuple[int, int, int, int]:
    if head == 24:
        command, pages, address, pid = struct.unpack("<IIQQ", data)
    else:
        command, _, pages, address, pid = struct.unpack("<IIQQQ", data)
    return command, pages, address, pid


@dataclass
class Ask:
    """A request that came."""

    pid: int
    address: int
    pages: int


@dataclass
class Trick:
    """What is wrong with an answer."""

    command: int = ADD | PRESENT << 16
    address: int = 0  # added to the right one
    pid: int = 0  # added to the right one
    pages: int | None = None  # what the head says
    #: Send this instead.
    instead: bytes | None = None
    #: Bytes of the answer after which to hang up, negative ones from its end.
    cut: int | None = None
    #: Say nothing, for ever.
    silent: bool = False


class FakePageServer:
    """Serves ``pages``. Use with ``async with``.

    ``short`` is the most pages in one answer; ``tricks`` are played in turn, by requests, None for
    none; ``once``: stop listening with the first connection, as CRIU does; ``crumbs``: send in
    pieces of so many bytes.
    """

    def __init__(
        self,
        pages: Mapping[tuple[int, int], bytes],
        *,
        head: int = 32,
        short: int = 1 << 20,
        once: bool = False,
        crumbs: int = 0,
        ssl: Any = None,
    ) -> None:
        self.pages = pages
        self.head = head
        self.short = short
        self.once = once
        self.crumbs = crumbs
        self.ssl = ssl
        self.tricks: list[Trick | None] = []
        self.asked: list[Ask] = []
        self.connections = 0
        self.goodbyes = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FakePageServer:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self.ssl)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def drop(self) -> None:
        """Hang up on everybody."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def has_asked(self, count: int) -> None:
        """Until there were so many requests."""
        async with asyncio.timeout(10):
            while len(self.asked) < count:
                self._changed.clear()
                await self._changed.wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        if self.once:
            self._server.close()
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the last one is us: streams complain of it
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        command, pages, address, pid = unpack(self.head, await reader.readexactly(self.head))
        if command == CLOSE:
            self.goodbyes += 1
            writer.write(struct.pack("<i", 0))
            await writer.drain()
            await reader.read(1)
            return False
        if command != GET:
            return False
        self.asked.append(Ask(pid, address, pages))
        self._changed.set()
        await self.gate.wait()
        found = []
        for at in range(address, address + min(pages, self.short) * PAGE, PAGE):
            if (pid, at) not in self.pages:
                break
            found.append(self.pages[pid, at])
        if not found:
            return False
        trick = (self.tricks.pop(0) if self.tricks else None) or Trick()
        if trick.silent:
            await asyncio.Event().wait()
        count = len(found) if trick.pages is None else trick.pages
        head = pack(self.head, trick.command, count, address + trick.address, pid + trick.pid)
        answer = head + b"".join(found) if trick.instead is None else trick.instead
        if trick.cut is not None:
            answer = answer[: trick.cut]
        step = self.crumbs or max(1, len(answer))
        for start in range(0, len(answer), step):
            if writer.is_closing():
                return False
            writer.write(answer[start : start + step])
            await writer.drain()
            if self.crumbs:
                await asyncio.sleep(0)
        return trick.cut is None
