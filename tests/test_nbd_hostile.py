"""The NBD server against clients that cheat, hang or vanish, and sources that fail in the middle:
what each of them gets, and what it costs the others."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from aiouffd.errors import ShortReadError, SourceChangedError, SourceError, UsageError
from aiouffd.nbd import NbdServer, wire
from aiouffd.nbd.server_core import Negotiation, Offer, Requests
from aiouffd.nbd.uri import parse
from aiouffd.sources.base import BaseSource, Buffer
from aiouffd.sources.file import FileSource
from aiouffd.sources.memory import MemorySource
from tests.nbd_peers import DATA, GREETING_REST, SIZE, Peer, Slow, opened, request, until

MIB = 1 << 20
WRITABLE = Offer(SIZE, wire.FLAG_HAS_FLAGS)
READ_ONLY = Offer(SIZE, wire.FLAG_HAS_FLAGS | wire.FLAG_READ_ONLY | wire.FLAG_SEND_DF)


@pytest.fixture(autouse=True)
async def _nobody_stays() -> AsyncIterator[None]:
    yield
    await Peer.hang_up()


def port_of(url: str) -> int:
    return parse(url).port


class Gated(MemorySource):
    """Writes when it is told to, and says what it did."""

    def __init__(self, data: object) -> None:
        super().__init__(data)
        self.gate = asyncio.Event()
        self.writing = 0
        self.done: list[str] = []

    async def write(self, offset: int, data: Buffer) -> None:
        self.writing += 1
        try:
            await self.gate.wait()
        finally:
            self.writing -= 1
        await super().write(offset, data)
        self.done.append("write")

    async def flush(self) -> None:
        self.done.append("flush")


# ------------------------------------------------------------------ the handshake


def replies_to(*options: bytes, offers: dict[str, Offer] | None = None) -> Negotiation:
    negotiation = Negotiation(offers or {"": READ_ONLY})
    negotiation.take()
    negotiation.feed(GREETING_REST + b"".join(options))
    return negotiation


def test_df_goes_with_structured_replies() -> None:
    """The flag must not be set where the feature it is about was not agreed on."""
    for first, expected in ((b"", False), (wire.option(wire.OPT_STRUCTURED_REPLY), True)):
        go = wire.option(wire.OPT_GO, wire.string("") + wire.U16.pack(0))
        said = replies_to(first, go).take()
        at = said.index(wire.EXPORT.pack(SIZE, READ_ONLY.flags)[:8])
        assert bool(int.from_bytes(said[at + 8 : at + 10], "big") & wire.FLAG_SEND_DF) == expected
        said = replies_to(first, wire.option(wire.OPT_EXPORT_NAME)).take()
        assert bool(said[-1] & wire.FLAG_SEND_DF) == expected


@pytest.mark.parametrize(
    "payload",
    [
        wire.string("nothing like that") + wire.U32.pack(1) + wire.string("base:allocation"),
        wire.string("") + wire.U32.pack(7) + wire.string("base:allocation"),
        wire.string("") + wire.U32.pack(0),
        b"",
    ],
)
def test_selecting_contexts_forgets_those_of_before(payload: bytes) -> None:
    """Also where it fails."""
    good = wire.string("") + wire.U32.pack(1) + wire.string("base:allocation")
    negotiation = replies_to(
        wire.option(wire.OPT_STRUCTURED_REPLY),
        wire.option(wire.OPT_SET_META_CONTEXT, good),
        wire.option(wire.OPT_SET_META_CONTEXT, payload),
        wire.option(wire.OPT_GO, wire.string("") + wire.U16.pack(0)),
    )
    assert negotiation.chosen == ""
    assert not negotiation.allocation


async def test_who_does_not_take_the_answers_gets_no_more(tmp_path: Path) -> None:
    """Sixteen bytes ask for a list of thousands of exports; a thousand times."""
    exports = {f"a long name {number:0120}": MemorySource(DATA) for number in range(999)}
    async with NbdServer(exports) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.connect(tmp_path / "s")
        peer.writer.transport.pause_reading()
        peer.writer.write(GREETING_REST + wire.option(wire.OPT_LIST) * 500)
        (client,) = server._clients
        await until(lambda: not client._writing)
        # The rest is not answered, and what there is beyond a buffer is not even read.
        assert client._transport.get_write_buffer_size() < MIB
        peer.writer.transport.resume_reading()
        for _ in range(500):
            for _ in range(999):
                assert await peer.option_reply(wire.OPT_LIST) == wire.REP_SERVER
            assert await peer.option_reply(wire.OPT_LIST) == wire.REP_ACK
        await peer.close()


class Tls:
    def __init__(self) -> None:
        authority = trustme.CA()
        self.server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("localhost").configure_cert(self.server)
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)


@pytest.fixture(scope="module")
def tls() -> Tls:
    return Tls()


@asynccontextmanager
async def tls_server(tls: Tls, source: Any, **options: Any) -> AsyncIterator[tuple[NbdServer, int]]:
    async with NbdServer({"": source}, tls=tls.server, tls_required=True, **options) as server:
        yield server, port_of(await server.listen(port=0))


async def before_tls(port: int, after: bytes = b"") -> Peer:
    peer = await Peer.connect(port)
    peer.writer.write(GREETING_REST + wire.option(wire.OPT_STARTTLS) + after)
    if not after:
        assert await peer.option_reply(wire.OPT_STARTTLS) == wire.REP_ACK
    return peer


async def encrypted(tls: Tls, port: int) -> Peer:
    """As far as requests, with TLS."""
    peer = await before_tls(port)
    await peer.writer.start_tls(tls.client, server_hostname="localhost")
    peer.writer.write(wire.option(wire.OPT_EXPORT_NAME))
    await peer.reader.readexactly(wire.EXPORT.size)
    return peer


@pytest.mark.parametrize("how", ["silent", "reset", "eof", "junk", "half a hello"])
async def test_tls_handshakes_that_fail(how: str, tls: Tls) -> None:
    async with tls_server(tls, MemorySource(DATA), handshake_timeout=0.3) as (server, port):
        peer = await before_tls(port)
        if how == "reset":
            linger = struct.pack("ii", 1, 0)
            sock = peer.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            peer.writer.transport.abort()
        elif how == "eof":
            peer.writer.write_eof()
        elif how == "junk":
            peer.writer.write(b"GET / HTTP/1.0\r\n\r\n")
        elif how == "half a hello":
            peer.writer.write(bytes.fromhex("16030100c8010000c40303"))
        await peer.ended()
        await until(lambda: not server.stats.clients)
        good = await encrypted(tls, port)
        good.ask(wire.CMD_READ, 0, 8)
        assert await good.answer() == (0, 1)
        await good.close()


async def test_options_injected_before_tls(tls: Tls) -> None:
    """Bytes that came in the clear do not count as encrypted."""
    async with tls_server(tls, MemorySource(DATA)) as (server, port):
        peer = await before_tls(port, wire.option(wire.OPT_EXPORT_NAME))
        await peer.ended()
        assert server.stats.requests == 0
        # Nor what is only half an option, to be completed by the victim.
        peer = await before_tls(port, b"I")
        await peer.ended()


async def test_closed_during_a_tls_handshake(tls: Tls) -> None:
    async with tls_server(tls, MemorySource(DATA)) as (server, port):
        peer = await before_tls(port)
        await server.aclose()
        assert not server.stats.clients
        await peer.ended()


async def test_tls_needs_room_to_begin(tls: Tls) -> None:
    """Nobody is told that there is room again whose transport was given away meanwhile."""
    exports = {f"{number:01000}": MemorySource(DATA) for number in range(500)}
    async with NbdServer(exports, tls=tls.server) as server:
        peer = await Peer.connect(port_of(await server.listen(port=0)))
        peer.writer.transport.pause_reading()
        lists = 40
        peer.writer.write(GREETING_REST + wire.option(wire.OPT_LIST) * lists)
        peer.writer.write(wire.option(wire.OPT_STARTTLS))
        (client,) = server._clients
        await until(lambda: not client._writing)
        peer.writer.transport.resume_reading()
        for _ in range(lists * 501):
            await peer.option_reply(wire.OPT_LIST)
        assert await peer.option_reply(wire.OPT_STARTTLS) == wire.REP_ACK
        await peer.writer.start_tls(tls.client, server_hostname="localhost")
        peer.writer.write(wire.option(wire.OPT_ABORT))
        assert await peer.option_reply(wire.OPT_ABORT) == wire.REP_ACK
        await peer.ended()


# -------------------------------------------------------------------------- limits


async def test_replies_that_nobody_takes_count(tmp_path: Path) -> None:
    """However many clients ask and do not read: `memory` is what there is for all of them."""
    source = Slow()
    memory, count, clients = 32 * MIB, 64, 4
    async with NbdServer({"": source}, memory=memory) as server:
        await server.listen_unix(tmp_path / "s")
        peers = [await Peer.transmitting(tmp_path / "s") for _ in range(clients)]
        for peer in peers:
            peer.writer.transport.pause_reading()
            for cookie in range(count):
                peer.ask(wire.CMD_READ, 0, MIB, cookie=cookie)
        await source.asked.wait()
        source.gate.set()
        await until(lambda: not any(client._tasks for client in server._clients))
        # One request more for each, four MiB that may wait, and what the sockets hold.
        (client, *_) = server._clients
        sock = client._transport.get_extra_info("socket")
        held = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert server.stats.bytes_read <= memory + clients * (5 * MIB + held)
        assert server.stats.bytes_outstanding > 0
        # In time everybody gets everything.
        for peer in peers:
            peer.writer.transport.resume_reading()
        for peer in peers:
            for _ in range(count):
                assert (await peer.answer())[0] == 0
                assert await peer.reader.readexactly(MIB) == DATA[:MIB]
            await peer.close()
        await until(lambda: not server.stats.bytes_outstanding)


async def test_replies_at_hand_that_nobody_takes_count(tmp_path: Path) -> None:
    async with NbdServer({"": MemorySource(DATA)}, memory=MIB) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        peer.writer.transport.pause_reading()
        for cookie in range(8):
            peer.ask(wire.CMD_READ, 0, SIZE, cookie=cookie)
        (client,) = server._clients
        await until(lambda: not client._writing)
        assert server.stats.bytes_outstanding > SIZE
        peer.writer.transport.resume_reading()
        for cookie in range(8):
            assert await peer.answer() == (0, cookie)
            assert await peer.reader.readexactly(SIZE) == DATA
        await peer.close()
        await until(lambda: not server.stats.bytes_outstanding)


def test_a_write_that_will_be_refused_is_not_kept() -> None:
    """A header of 28 bytes does not get 32 MiB of memory; its data is counted and forgotten."""
    for offer, offset, error in (
        (READ_ONLY, 0, wire.EPERM),
        (WRITABLE, SIZE, wire.ENOSPC),
        (WRITABLE, (1 << 64) - 1, wire.ENOSPC),
    ):
        requests = Requests(offer)
        requests.feed(request(wire.CMD_WRITE, offset, 32 * MIB))
        assert requests.receiving is not None
        assert requests.receiving.data is None
        assert requests.waiting is None
        for _ in range(32):
            assert not requests.ready
            requests.feed(bytes(MIB))
        (refused,) = requests.ready
        assert refused.error == error
        assert refused.data is None
        requests.feed(request(wire.CMD_FLUSH))
        assert len(requests.ready) == 2


def test_a_large_write_waits_to_be_let_in() -> None:
    requests = Requests(WRITABLE)
    requests.feed(request(wire.CMD_WRITE, 0, 3 * MIB) + DATA[:100])
    assert requests.waiting is not None
    assert requests.receiving is None
    # It is not the client's turn.
    assert not requests.incomplete
    requests.admit()
    assert requests.waiting is None
    assert requests.incomplete
    requests.feed(DATA[100 : 3 * MIB] + request(wire.CMD_READ, 0, 8))
    written, read = requests.ready
    assert written.data == DATA[: 3 * MIB]
    assert read.command == wire.CMD_READ


async def test_writes_that_are_being_sent_count(tmp_path: Path) -> None:
    """A client sends the data of a second write when there is room for it, not before."""
    source = Gated(bytearray(SIZE))
    async with NbdServer({"": source}, writable=True, memory=3 * MIB) as server:
        await server.listen_unix(tmp_path / "s")
        first, second = [await Peer.transmitting(tmp_path / "s") for _ in range(2)]
        for cookie in range(3):
            first.ask(wire.CMD_WRITE, cookie * MIB, MIB, DATA[:MIB], cookie=cookie)
        await until(lambda: source.writing == 2)
        # Each may always have one.
        second.ask(wire.CMD_WRITE, 3 * MIB, MIB, DATA[:MIB])
        await until(lambda: source.writing == 3)
        assert server.stats.bytes_outstanding < 4 * MIB
        assert first.writer.transport.get_write_buffer_size() > 0
        source.gate.set()
        assert {await first.answer() for _ in range(3)} == {(0, 0), (0, 1), (0, 2)}
        assert await second.answer() == (0, 1)
        assert source.data == DATA[:MIB] * 4
        # One that goes away in the middle of a write leaves nothing.
        first.ask(wire.CMD_WRITE, 0, 2 * MIB, b"x" * MIB)
        await until(lambda: server.stats.bytes_outstanding > 2 * MIB)
        await first.close()
        await until(lambda: server.stats.clients == 1)
        assert server.stats.bytes_outstanding == 0
        await second.close()
    assert source.data == DATA[:MIB] * 4


@pytest.mark.parametrize("what", ["a write", "a header", "a write that will be refused"])
async def test_a_byte_now_and_then_is_not_enough(what: str, tmp_path: Path) -> None:
    source = MemorySource(bytearray(SIZE))
    async with NbdServer({"": source}, writable=True, stall_timeout=0.2) as server:
        await server.listen_unix(tmp_path / "s")
        busy = await Peer.transmitting(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        (_, client) = sorted(server._clients, key=lambda client: client._made)
        if what != "a header":
            offset = 0 if what == "a write" else SIZE
            peer.ask(wire.CMD_WRITE, offset, MIB)
        drip = request(wire.CMD_READ, 0, 8)[:20]
        async with asyncio.timeout(10):
            for number in range(10_000):
                if client._ended:
                    break
                if not peer.writer.is_closing():
                    # Of a header only its beginning.
                    peer.writer.write(drip[number : number + 1] if what == "a header" else b"x")
                # Meanwhile somebody who is only slow stays.
                busy.ask(wire.CMD_READ, 0, 8)
                assert await busy.answer() == (0, 1)
                await busy.reader.readexactly(8)
                await asyncio.sleep(0.02)
        assert client._ended
        assert server.stats.clients == 1
        await peer.ended()
        await busy.close()


async def test_a_stalled_client_does_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was under way for it is ended, and nothing more begun or said."""
    caplog.set_level(logging.WARNING)
    source = Slow()
    server = NbdServer({"": source}, max_requests=16)
    await server.listen_unix(tmp_path / "s")
    peer = await Peer.transmitting(tmp_path / "s")
    for cookie in range(100):
        peer.ask(wire.CMD_READ, 0, 8, cookie=cookie)
    await until(lambda: source.reading == 16)
    (client,) = server._clients
    client.abort()
    await until(lambda: not server.stats.clients)
    assert source.reads == 16
    assert not source.reading
    assert server.stats.bytes_outstanding == 0
    assert not caplog.records
    await server.aclose()
    await peer.ended()


# ------------------------------------------------------------------------- goodbyes


async def test_what_comes_after_goodbye_is_not_looked_at(tmp_path: Path) -> None:
    source = Slow()
    async with NbdServer({"": source}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        peer.ask(wire.CMD_READ, 0, 8)
        peer.ask(wire.CMD_DISC)
        peer.writer.write(b"x" * 300_000)
        await source.asked.wait()
        source.gate.set()
        assert await peer.answer() == (0, 1)
        assert await peer.reader.readexactly(8) == DATA[:8]
        await peer.ended()


async def test_who_says_goodbye_gets_what_he_asked_for(tmp_path: Path) -> None:
    """Also when he does not send any more, and cannot: what he had written is written."""
    source = Slow()
    async with NbdServer({"": source}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        peer.ask(wire.CMD_READ, 16, 8)
        peer.ask(wire.CMD_DISC)
        peer.writer.write_eof()
        await source.asked.wait()
        source.gate.set()
        assert await peer.answer() == (0, 1)
        assert await peer.reader.readexactly(8) == DATA[16:24]
        await peer.ended()
    written = Gated(bytearray(SIZE))
    async with NbdServer({"": written}, writable=True, max_requests=2) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        for cookie in range(10):
            peer.ask(wire.CMD_WRITE, cookie * 8, 8, DATA[cookie * 8 :][:8], cookie=cookie)
        peer.ask(wire.CMD_FLUSH)
        peer.ask(wire.CMD_DISC)
        await until(lambda: written.writing == 2)
        (client,) = server._clients
        await until(lambda: client._requests.disconnected)
        peer.writer.transport.abort()
        written.gate.set()
        await until(lambda: not server.stats.clients)
        assert written.data[:80] == DATA[:80]
        assert written.done == ["write"] * 10 + ["flush"]
        await peer.close()


SESSION = b"".join(
    [
        GREETING_REST,
        wire.option(wire.OPT_STRUCTURED_REPLY),
        wire.option(wire.OPT_SET_META_CONTEXT,
                    wire.string("") + wire.U32.pack(1) + wire.string("base:allocation")),
        wire.option(wire.OPT_GO, wire.string("") + wire.U16.pack(1) + wire.U16.pack(3)),
        request(wire.CMD_READ, 8, 8),
        request(wire.CMD_WRITE, 0, 40, cookie=2) + b"w" * 40,
        request(wire.CMD_BLOCK_STATUS, 0, 4096, cookie=3),
        request(wire.CMD_DISC),
    ]
)  # fmt: skip


async def test_the_end_at_every_byte(tmp_path: Path) -> None:
    """A connection may end anywhere; a write is done if all of it has come."""
    memory = bytearray(4096)
    write_ends = SESSION.index(b"w" * 40) + 40
    async with NbdServer({"": MemorySource(memory)}, writable=True) as server:
        await server.listen_unix(tmp_path / "s")
        for length in range(len(SESSION) + 1):
            memory[:40] = bytes(40)
            peer = await Peer.connect(tmp_path / "s")
            peer.writer.write(SESSION[:length])
            if length % 2:
                peer.writer.write_eof()
            else:
                peer.writer.close()
            await peer.ended()
            await until(lambda: not server.stats.clients)
            assert server.stats.bytes_outstanding == 0
            assert any(memory[:40]) == (length >= write_ends), length
        assert server.stats.clients_total == len(SESSION) + 1


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "tls"])
async def test_a_clean_end_under_load(encrypt: bool, tls: Tls) -> None:
    """Closing a socket while the client goes on asking would throw away replies that are in it."""
    source = Slow(DATA * 2)
    options: dict[str, Any] = {"tls": tls.server, "tls_required": True} if encrypt else {}
    server = NbdServer({"": source}, **options)
    port = port_of(await server.listen(port=0))
    peer = await (encrypted(tls, port) if encrypt else Peer.transmitting(port))
    for cookie in range(8):
        peer.ask(wire.CMD_READ, cookie * 8, MIB, cookie=cookie)
    await until(lambda: source.reading == 8)
    closing = asyncio.ensure_future(server.aclose())
    await asyncio.sleep(0)
    peer.writer.transport.pause_reading()
    for cookie in range(8, 500):
        peer.ask(wire.CMD_READ, 0, MIB, cookie=cookie)
    source.gate.set()
    (client,) = server._clients
    # The replies are on the way, and most of them will be so for as long as nobody reads.
    await until(lambda: client._leaving or not client._writing)
    for cookie in range(500, 1000):
        peer.ask(wire.CMD_READ, 0, MIB, cookie=cookie)
    await asyncio.sleep(0.05)
    peer.writer.transport.resume_reading()
    cookies = set()
    for _ in range(8):
        error, cookie = await peer.answer()
        assert not error
        assert await peer.reader.readexactly(MIB) == (DATA * 2)[cookie * 8 :][:MIB]
        cookies.add(cookie)
    assert cookies == set(range(8))
    await peer.ended()
    await closing


async def test_an_idle_client_does_not_delay_the_end(tls: Tls) -> None:
    server = NbdServer({"": MemorySource(DATA)})
    idle = await Peer.transmitting(port_of(await server.listen(port=0)))
    idle.writer.transport.pause_reading()
    async with asyncio.timeout(5):
        await server.aclose(60)
    await idle.close()


async def test_a_second_close_is_faster(tmp_path: Path) -> None:
    source = Slow()
    server = NbdServer({"": source})
    await server.listen_unix(tmp_path / "s")
    peer = await Peer.transmitting(tmp_path / "s")
    peer.ask(wire.CMD_READ, 0, 8)
    await source.asked.wait()
    closing = asyncio.ensure_future(server.aclose(1000))
    await asyncio.sleep(0)
    await server.aclose(0)
    await closing
    assert not source.reading
    await peer.ended()


# -------------------------------------------------------------------------- sources


class AtHand(MemorySource):
    """Has an answer of a kind at once."""

    answer: Any = None

    def read_now(self, offset: int, length: int) -> Buffer:
        if isinstance(self.answer, BaseException):
            raise self.answer
        result: Buffer = self.answer
        return result


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (SourceChangedError("changed"), wire.EIO),
        (PermissionError(13, "no"), wire.EPERM),
        (ZeroDivisionError("oops"), wire.EIO),
        (b"short", wire.EIO),
        (b"much longer than it should be", wire.EIO),
        ("no bytes", wire.EINVAL),
    ],
)
async def test_answers_at_hand_that_are_none(answer: Any, error: int, tmp_path: Path) -> None:
    source = AtHand(DATA)
    async with NbdServer({"": source}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        for source.answer, expected in ((answer, error), (DATA[:8], 0), (answer, error)):
            peer.ask(wire.CMD_READ, 0, 8)
            assert await peer.answer() == (expected, 1)
            if not expected:
                assert await peer.reader.readexactly(8) == DATA[:8]
        await peer.close()


class Raises(BaseSource):
    """Raises what it is told to."""

    size = SIZE

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def read(self, offset: int, length: int) -> Buffer:
        raise self.error


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (asyncio.CancelledError(), wire.EIO),
        (SourceError("the upstream server shuts down", errno=wire.ESHUTDOWN), wire.EIO),
        (UsageError("whole blocks of 512 bytes"), wire.EINVAL),
        (ShortReadError("short"), wire.EIO),
        (OSError(122, "quota"), wire.ENOSPC),
        (OSError(30, "read-only"), wire.EPERM),
        (MemoryError(), wire.EIO),
    ],
)
async def test_errors_by_their_numbers(error: BaseException, number: int, tmp_path: Path) -> None:
    """None of them tells the client to leave, or is one that the protocol does not know."""
    async with NbdServer({"": Raises(error)}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        peer.ask(wire.CMD_READ, 0, 8)
        assert await peer.answer() == (number, 1)
        await peer.close()


async def test_a_bug_is_told_once_in_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with NbdServer({"": Raises(ZeroDivisionError())}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        for _ in range(50):
            peer.ask(wire.CMD_READ, 0, 8)
            assert await peer.answer() == (wire.EIO, 1)
        await peer.close()
    assert len(caplog.records) == 1


class Torn(BaseSource):
    """A hole, then bytes that cannot be had; or the other way round."""

    size = 3 * 4096

    def __init__(self, hole: tuple[int, int], answer: Any) -> None:
        self.hole, self.answer = hole, answer

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [self.hole]

    async def read(self, offset: int, length: int) -> Buffer:
        if offset and isinstance(self.answer, Exception):
            raise self.answer
        return bytes(self.answer) if offset else bytes(b"x" * length)


@pytest.mark.parametrize("answer", [SourceChangedError("changed"), 4095, 4097])
async def test_errors_in_the_middle_of_a_structured_reply(answer: Any, tmp_path: Path) -> None:
    """The error is a chunk of its own, and the last; with DF there is nothing before it."""
    async with NbdServer({"": Torn((4096, 4096), answer)}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.structured(tmp_path / "s")
        peer.ask(wire.CMD_READ, 0, 3 * 4096, cookie=9)
        assert await peer.chunk() == (0, 1, 9, wire.OFFSET.pack(0) + b"x" * 4096)
        assert await peer.chunk() == (0, 2, 9, wire.HOLE.pack(4096, 4096))
        flags, kind, cookie, payload = await peer.chunk()
        assert (flags, kind, cookie) == (1, wire.CHUNK_ERROR, 9)
        assert wire.ERROR.unpack_from(payload)[0] == wire.EIO
        peer.ask(wire.CMD_READ, 1, 3 * 4096 - 1, cookie=10, flags=wire.CMD_FLAG_DF)
        flags, kind, cookie, _ = await peer.chunk()
        assert (flags, kind, cookie) == (1, wire.CHUNK_ERROR, 10)
        # And the connection is in order.
        peer.ask(wire.CMD_READ, 4096, 4096, cookie=11)
        assert await peer.chunk() == (1, 2, 11, wire.HOLE.pack(4096, 4096))
        await peer.close()


async def test_a_file_that_changes_under_its_clients(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(DATA)
    async with opened(FileSource(image)) as source, NbdServer({"": source}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.structured(tmp_path / "s")
        peer.ask(wire.CMD_READ, 0, 8)
        assert (await peer.chunk())[1] == wire.CHUNK_OFFSET_DATA
        image.write_bytes(DATA[: SIZE // 2])
        for offset in (0, SIZE - 8):
            peer.ask(wire.CMD_READ, offset, 8)
            flags, kind, _, payload = await peer.chunk()
            assert (flags, kind) == (1, wire.CHUNK_ERROR)
            assert wire.ERROR.unpack_from(payload)[0] == wire.EIO
        await peer.close()


async def test_there_is_nothing_to_flush_in_a_file_that_is_read(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(DATA)
    async with opened(FileSource(image)) as source, NbdServer({"": source}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        peer.ask(wire.CMD_FLUSH)
        assert await peer.answer() == (0, 1)
        await peer.close()


async def test_a_flush_counts_for_all_connections(tmp_path: Path) -> None:
    """As CAN_MULTI_CONN promises: what was answered on one is flushed by the other; and FUA is
    answered after a flush of its own."""
    source = Gated(bytearray(SIZE))
    source.gate.set()
    async with NbdServer({"": source}, writable=True) as server:
        await server.listen_unix(tmp_path / "s")
        first, second = [await Peer.transmitting(tmp_path / "s") for _ in range(2)]
        first.ask(wire.CMD_WRITE, 0, 8, DATA[:8])
        assert await first.answer() == (0, 1)
        second.ask(wire.CMD_FLUSH)
        assert await second.answer() == (0, 1)
        second.ask(wire.CMD_READ, 0, 8)
        assert await second.answer() == (0, 1)
        assert await second.reader.readexactly(8) == DATA[:8]
        first.ask(wire.CMD_WRITE, 0, 8, DATA[:8], flags=wire.CMD_FLAG_FUA)
        assert await first.answer() == (0, 1)
        first.ask(wire.CMD_WRITE_ZEROES, 0, 8, flags=wire.CMD_FLAG_FUA)
        assert await first.answer() == (0, 1)
        assert source.done == ["write", "flush"] * 3
        await first.close()
        await second.close()


async def test_exports_that_cannot_be() -> None:
    class Huge(Slow):
        @property
        def size(self) -> int:
            return 1 << 63

    for name, source in (("", Huge()), ("\udcff", Slow()), ("a\0b", Slow())):
        with pytest.raises(UsageError):
            NbdServer({name: source})
    server = NbdServer({"": Slow()})
    for port in (-1, 65536, 99999):
        with pytest.raises(UsageError):
            await server.listen(port=port)
    await server.aclose()
