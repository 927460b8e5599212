"""What the tests of the NBD server share: clients by hand, programs of others, slow sources."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from aiouffd.errors import UnsupportedError
from aiouffd.nbd import wire
from aiouffd.sources.base import BaseSource, Buffer
from tests.support import ROOT, content, environment

SIZE = 4 << 20
DATA = content(SIZE)
#: A client that knows fixed newstyle and wants no zeros.
GREETING_REST = wire.CLIENT_FLAGS.pack(3)


async def run(*command: str, expected: int = 0) -> str:
    """A program of somebody else; what it said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said = (await process.communicate())[0].decode()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == expected, said
    return said


async def until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    """Poll, for what nothing tells."""
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class Slow(BaseSource):
    """Answers when it is told to."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.gate = asyncio.Event()
        self.asked = asyncio.Event()
        self.reading = self.most = self.reads = 0

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> Buffer:
        self.reading += 1
        self.reads += 1
        self.most = max(self.most, self.reading)
        self.asked.set()
        try:
            await self.gate.wait()
        finally:
            self.reading -= 1
        return self.data[offset : offset + length]

    def clone(self) -> Slow:
        raise UnsupportedError("this one is for one loop")


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0
) -> bytes:
    """A request's header."""
    return wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, cookie, offset, length)


class Peer:
    """A client by hand: it says what it is told to."""

    #: Those that a failed test left behind would spoil the next ones; see `hang_up`.
    open: ClassVar[set[Peer]] = set()

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.open.add(self)

    @classmethod
    async def hang_up(cls) -> None:
        """Close all that were not."""
        for peer in list(cls.open):
            peer.writer.transport.abort()
            await peer.close()

    @classmethod
    async def connect(cls, where: Path | int) -> Peer:
        """To a Unix socket, or a port of this machine."""
        if isinstance(where, int):
            peer = cls(*await asyncio.open_connection("127.0.0.1", where))
        else:
            peer = cls(*await asyncio.open_unix_connection(where))
        await peer.reader.readexactly(wire.GREETING.size)
        return peer

    @classmethod
    async def transmitting(cls, where: Path | int, export: str = "") -> Peer:
        """As far as requests, with simple replies."""
        peer = await cls.connect(where)
        peer.writer.write(GREETING_REST)
        peer.writer.write(wire.option(wire.OPT_EXPORT_NAME, export.encode()))
        await peer.reader.readexactly(wire.EXPORT.size)
        return peer

    @classmethod
    async def structured(cls, where: Path | int, export: str = "") -> Peer:
        """As far as requests, with structured replies and extents."""
        peer = await cls.connect(where)
        contexts = wire.string(export) + wire.U32.pack(1) + wire.string(wire.BASE_ALLOCATION)
        for option, payload in (
            (wire.OPT_STRUCTURED_REPLY, b""),
            (wire.OPT_SET_META_CONTEXT, contexts),
            (wire.OPT_GO, wire.string(export) + wire.U16.pack(0)),
        ):
            if option == wire.OPT_STRUCTURED_REPLY:
                peer.writer.write(GREETING_REST)
            peer.writer.write(wire.option(option, payload))
            while await peer.option_reply(option) != wire.REP_ACK:
                pass
        return peer

    async def option_reply(self, expected: int) -> int:
        """The kind of the next reply, which has to be to the option ``expected``."""
        head = await self.reader.readexactly(wire.OPTION_REPLY.size)
        magic, option, kind, length = wire.OPTION_REPLY.unpack(head)
        assert magic == wire.REPLY_MAGIC
        assert option == expected
        await self.reader.readexactly(length)
        return int(kind)

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"",
            *, cookie: int = 1, flags: int = 0) -> None:  # fmt: skip
        self.writer.write(request(command, offset, length, cookie=cookie, flags=flags) + data)

    async def answer(self) -> tuple[int, int]:
        """Error and cookie of a simple reply."""
        head = await self.reader.readexactly(wire.SIMPLE_REPLY.size)
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(head)
        assert magic == wire.SIMPLE_MAGIC
        return error, cookie

    async def chunk(self) -> tuple[int, int, int, bytes]:
        """Flags, kind, cookie and payload of a chunk of a structured reply."""
        head = await self.reader.readexactly(wire.CHUNK.size)
        magic, flags, kind, cookie, length = wire.CHUNK.unpack(head)
        assert magic == wire.STRUCTURED_MAGIC
        return flags, kind, cookie, await self.reader.readexactly(length)

    async def ended(self) -> None:
        """The server hangs up."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass
        await self.close()

    async def close(self) -> None:
        self.open.discard(self)
        self.writer.close()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)


@contextlib.asynccontextmanager
async def opened(source: Any) -> AsyncIterator[Any]:
    """``source``, open in the block."""
    await source.open()
    try:
        yield source
    finally:
        await source.aclose()


def serve(*arguments: str) -> subprocess.Popen[str]:
    """``aiouffd nbd``, started."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "aiouffd", "nbd", *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``aiouffd nbd`` and its URL; killed at the end of the block."""
    process = serve(*arguments)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise AssertionError(f"it did not begin: {process.communicate()[1]}")
        yield process, url
    finally:
        process.kill()
        process.communicate()
