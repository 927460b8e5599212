"""The NBD client against servers that hang up anywhere, hang, lie, or are very slow."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from aiouffd.errors import SourceError
from aiouffd.nbd import wire
from aiouffd.nbd.source import NbdSource
from aiouffd.nbd.wire import NbdProtocolError
from tests.nbd_peers import DATA, opened, until
from tests.servers import nbd

MIB = 1 << 20
SIZE = len(DATA)
GREETING = wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3)
FLAGS = wire.FLAG_HAS_FLAGS | wire.FLAG_SEND_FLUSH


def handshake() -> bytes:
    """All that a server says before the first request; it does not wait for what it answers."""
    reply = wire.option_reply
    return b"".join(
        [
            GREETING,
            reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK),
            reply(wire.OPT_SET_META_CONTEXT, wire.REP_ACK),
            reply(wire.OPT_GO, wire.REP_INFO, wire.EXPORT_INFO.pack(0, SIZE, FLAGS)),
            reply(wire.OPT_GO, wire.REP_ACK),
        ]
    )


def chunk(kind: int, cookie: int, payload: bytes, *, done: bool = True) -> bytes:
    return wire.CHUNK.pack(wire.STRUCTURED_MAGIC, done, kind, cookie, len(payload)) + payload


def data_of(cookie: int, offset: int, length: int) -> bytes:
    return chunk(1, cookie, wire.OFFSET.pack(offset) + DATA[offset : offset + length])


class Request:
    """What the client asks for."""

    def __init__(self, head: bytes) -> None:
        magic, self.flags, self.command, self.cookie, self.offset, self.length = (
            wire.REQUEST.unpack(head)
        )
        assert magic == wire.REQUEST_MAGIC

    def right(self) -> bytes:
        return data_of(self.cookie, self.offset, self.length)


class Server:
    """A server by hand: ``talk(server, number of the connection)``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def begin(self) -> None:
        """The handshake."""
        self.writer.write(handshake())
        await self.reader.readexactly(wire.CLIENT_FLAGS.size)
        option = 0
        while option != wire.OPT_GO:
            _, option, length = wire.OPTION.unpack(await self.reader.readexactly(wire.OPTION.size))
            await self.reader.readexactly(length)

    async def request(self) -> Request:
        return Request(await self.reader.readexactly(wire.REQUEST.size))


Talk = Callable[[Server, int], Awaitable[None]]


@contextlib.asynccontextmanager
async def speaking(path: Path, talk: Talk) -> AsyncIterator[str]:
    """A server whose every connection is a ``talk``; its URL."""
    tasks: set[asyncio.Task[None]] = set()
    count = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await talk(Server(reader, writer), count)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()
                await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        tasks.discard(task)

    server = await asyncio.start_unix_server(connected, path)
    try:
        yield nbd.url(path)
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def source(url: str, **options: Any) -> NbdSource:
    """One connection, no questions but those of the test."""
    return NbdSource(url, **{"connections": 1, "holes": False, "reconnect": 0, **options})


async def test_the_end_at_every_byte(tmp_path: Path) -> None:
    """Of the handshake, of a reply: an error that may pass, or the right bytes."""
    begin, length, cut = len(handshake()), 200, 0

    async def talk(server: Server, number: int) -> None:
        if number % 2 == 0:
            return  # it tries again, once
        if cut < begin:
            server.writer.write(handshake()[:cut])
            return
        await server.begin()
        asked = await server.request()
        server.writer.write(asked.right()[: cut - begin])

    async with speaking(tmp_path / "s", talk) as url:
        for cut in range(begin + 28 + length + 1):
            reading = source(url)
            try:
                await reading.open()
                found, failed = await reading.read(16, length), None
            except SourceError as error:
                found, failed = b"", error
            await reading.aclose()
            if cut < begin + 28 + length:
                assert failed is not None
                assert failed.transient
            else:
                assert found == DATA[16 : 16 + length]
            if cut < begin:
                # So that the odd ones are the first ones.
                with pytest.raises(SourceError):
                    await source(url).open()


async def test_a_lie_costs_a_connection_and_no_more(tmp_path: Path) -> None:
    lies = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, 77),
        data_of(1, 24, 8),
        chunk(wire.CHUNK_NONE, 1, b""),
        wire.CHUNK.pack(wire.STRUCTURED_MAGIC, 1, 1, 1, (1 << 32) - 1) + bytes(8),
        wire.CHUNK.pack(wire.STRUCTURED_MAGIC, 1, wire.CHUNK_ERROR, 1, (1 << 32) - 1),
    ]

    async def talk(server: Server, number: int) -> None:
        await server.begin()
        asked = await server.request()
        if number <= len(lies):
            server.writer.write(lies[number - 1])
            await server.reader.read()
            return
        server.writer.write(asked.right())
        await server.reader.read()

    async with speaking(tmp_path / "s", talk) as url, opened(source(url)) as reading:
        for _ in lies:
            with pytest.raises(NbdProtocolError):
                await reading.read(16, 8)
        assert await reading.read(16, 8) == DATA[16:24]


@pytest.mark.parametrize("number", [1, 5, 4711, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
async def test_errors_with_any_number(number: int, tmp_path: Path) -> None:
    """What the protocol does not know counts as EINVAL; none of them is more than an error."""

    async def talk(server: Server, _: int) -> None:
        await server.begin()
        asked = await server.request()
        text = b"\xff\xfe what\x00ever"
        payload = wire.ERROR.pack(number, len(text)) + text
        server.writer.write(chunk(wire.CHUNK_ERROR, asked.cookie, payload))
        server.writer.write((await server.request()).right())
        await server.reader.read()

    async with speaking(tmp_path / "s", talk) as url, opened(source(url)) as reading:
        with pytest.raises(SourceError, match="what") as caught:
            await reading.read(0, 8)
        assert caught.value.errno == (number if number in (1, 5) else wire.EINVAL)
        assert caught.value.transient == (number == 5)
        assert await reading.read(0, 8) == DATA[:8]


async def test_a_read_that_is_cancelled_in_the_middle(tmp_path: Path) -> None:
    """Half of its bytes are there; the other half goes nowhere, and the next reply is right."""
    half, go_on = asyncio.Event(), asyncio.Event()

    async def talk(server: Server, _: int) -> None:
        await server.begin()
        reply = (await server.request()).right()
        server.writer.write(reply[: len(reply) // 2])
        half.set()
        await go_on.wait()
        server.writer.write(reply[len(reply) // 2 :])
        server.writer.write((await server.request()).right())
        await server.reader.read()

    async with speaking(tmp_path / "s", talk) as url, opened(source(url)) as reading:
        buffer = bytearray(2 * MIB)
        task = asyncio.ensure_future(reading.read_into(0, memoryview(buffer)))
        await half.wait()
        await until(lambda: any(buffer[MIB - 4096 :]))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        buffer[:] = bytes(2 * MIB)
        go_on.set()
        assert await reading.read(8, MIB) == DATA[8 : 8 + MIB]
        assert not any(buffer)


async def test_a_server_that_takes_its_time_to_take(tmp_path: Path) -> None:
    """It is not silent as long as it takes what it is to write."""

    async def talk(server: Server, _: int) -> None:
        await server.begin()
        asked = await server.request()
        left = asked.length
        while left:
            left -= len(await server.reader.readexactly(min(left, 128 * 1024)))
            await asyncio.sleep(0.03)
        server.writer.write(wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, asked.cookie))
        await server.reader.read()

    async with (
        speaking(tmp_path / "s", talk) as url,
        opened(source(url, writable=True, timeout=0.5)) as writing,
    ):
        await writing.write(0, DATA)
        assert writing.replayed == 0


async def test_a_server_that_takes_nothing(tmp_path: Path) -> None:
    """That is silence, also with much to send."""

    async def talk(server: Server, number: int) -> None:
        if number == 1:
            await server.begin()
            server.writer.transport.pause_reading()
            await asyncio.Event().wait()

    async with (
        speaking(tmp_path / "s", talk) as url,
        opened(source(url, writable=True, timeout=0.5)) as writing,
    ):
        async with asyncio.timeout(10):
            with pytest.raises(SourceError) as caught:
                await writing.write(0, DATA)
        assert caught.value.transient


# --------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For a server, for a client."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("silent", "too long"),
        ("reset", "reset"),
        ("eof", "cannot connect"),
        ("junk", "TLS failed"),
        ("injected", "before TLS had started"),
        ("early", "before TLS had started|that nobody asked for"),
    ],
)
async def test_tls_handshakes_that_fail(
    how: str,
    message: str,
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
    tmp_path: Path,
) -> None:
    """Each is an error within the time for connecting."""

    async def talk(server: Server, _: int) -> None:
        ack = wire.option_reply(wire.OPT_STARTTLS, wire.REP_ACK)
        server.writer.write(GREETING)
        await server.reader.readexactly(wire.CLIENT_FLAGS.size + wire.OPTION.size)
        server.writer.write(ack + (b"injected" if how == "injected" else b""))
        if how == "early":
            await server.writer.start_tls(contexts[0])
            server.writer.write(b"early" * 10)
        elif how != "injected":
            await server.reader.read(100)
            if how == "junk":
                server.writer.write(b"junk" * 30)
            if how == "eof":
                return
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                sock = server.writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                server.writer.transport.abort()
        await server.reader.read()
        await asyncio.Event().wait()

    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await talk(Server(reader, writer), 1)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"nbds://localhost:{port}/"
    try:
        async with asyncio.timeout(10):
            with pytest.raises(SourceError, match=message):
                await NbdSource(url, tls=contexts[1], connect_timeout=0.5).open()
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_request_that_always_ends_the_connection_fails(tmp_path: Path) -> None:
    """It is not sent again for ever; the failure may pass, so a buffer asks again, with pauses."""
    asked = 0

    async def talk(server: Server, _number: int) -> None:
        nonlocal asked
        await server.begin()
        await server.request()
        asked += 1

    async with (
        speaking(tmp_path / "s", talk) as url,
        opened(NbdSource(url, connections=1)) as source,
    ):
        with pytest.raises(SourceError, match="end instead of an answer") as caught:
            await asyncio.wait_for(source.read(0, 4096), 20)
        assert caught.value.transient
        assert asked == 5
