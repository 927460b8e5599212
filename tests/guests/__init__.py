"""Processes whose memory the tests serve, and a dialect with as little in it as can be.

A `Guest` runs ``tests/guests/program.py``, which maps memory, hands its userfaultfd over and then
does what it is told, a line of JSON each; answers come as they are ready, in any order.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiouffd.errors import PeerError
from aiouffd.serve import Area, Client
from tests.support import ROOT, environment

#: Number of areas; then of each its address, length and offset.
COUNT, AREA = struct.Struct("<I"), struct.Struct("<QQQ")


class PlainDialect:
    """`COUNT` with the descriptor, then `AREA` as often."""

    name = "plain"

    def __init__(self, *, page_size: int = 4096, uncovered: str = "poison") -> None:
        self.page_size = page_size
        self.uncovered: Any = uncovered
        self.memories: asyncio.Queue[Any] = asyncio.Queue()

    async def talk(self, client: Client) -> None:
        data, fds = await client.channel.recv_exactly(COUNT.size, max_fds=1)
        if len(fds) != 1:
            raise PeerError("no descriptor")
        (count,) = COUNT.unpack(data)
        try:
            data, _ = await client.channel.recv_exactly(AREA.size * count)
        except BaseException:
            os.close(fds[0])
            raise
        areas = [
            Area(start, length, client.source, offset, self.page_size)
            for start, length, offset in AREA.iter_unpack(data)
        ]
        memory = client.adopt(fds[0], areas, page_size=self.page_size, uncovered=self.uncovered)
        self.memories.put_nowait(memory)
        await client.channel.send(b"k")
        client.keep_while_connected()


class Guest:
    """A process that is served. Each command is a method; all can be awaited at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.ensure_future(self._read())

    @classmethod
    async def start(cls) -> Guest:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("program.py")),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment(PYTHONPATH=str(ROOT)),
            limit=1 << 24,
        )
        return cls(process)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            number, result, error = json.loads(line)
            future = self._waiting.pop(number)
            if error is not None:
                future.set_exception(RuntimeError(error))
            else:
                future.set_result(result)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EOFError("the guest has ended"))

    def tell(self, command: str, *arguments: Any) -> asyncio.Future[Any]:
        """Have it do something in a thread of its own; the future has the result."""
        assert self.process.stdin is not None
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self.process.stdin.write(json.dumps([number, command, *arguments]).encode() + b"\n")
        return future

    async def ask(self, command: str, *arguments: Any) -> Any:
        async with asyncio.timeout(20):
            return await self.tell(command, *arguments)

    async def end(self) -> int:
        """Kill it, unless it has ended; returns its status."""
        if self.process.returncode is None:
            self.process.kill()
        status = await self.process.wait()
        await self._reading
        # What nobody asked for any more ended with it.
        for future in self._waiting.values():
            future.exception()
        return status


@asynccontextmanager
async def guest(path: Path | str, pages: int = 64, **options: Any) -> AsyncIterator[Guest]:
    """A guest with ``pages`` of memory, which begins where the object does, handed over."""
    made = await Guest.start()
    try:
        await made.ask("map", pages, options)
        if path:
            await made.ask("hand_over", str(path))
        yield made
    finally:
        await made.end()
