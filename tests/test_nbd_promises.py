"""What an NBD client and server promise of writes, zeros and flushes, and what breaks a promise."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import FlushError, SourceError, UsageError
from aiouffd.nbd import NbdServer, wire
from aiouffd.nbd.client_core import Request
from aiouffd.nbd.fence import CONNECTION, ENDED, Fences
from aiouffd.nbd.order import Order
from aiouffd.nbd.source import NbdSource
from aiouffd.nbd.writes import Writes
from aiouffd.sources.base import BaseSource, Buffer
from aiouffd.sources.compose import RetrySource
from aiouffd.sources.file import FileSource
from aiouffd.sources.memory import MemorySource
from tests.nbd_peers import Peer, opened, run, until
from tests.servers import nbd
from tests.test_nbd_bad_servers import GREETING, Server, Talk, speaking

KIB, MIB = 1024, 1 << 20
A, B = b"A" * 512, b"B" * 512


class Disk(BaseSource):
    """Memory with a cache of what was not flushed, which `power_failure` loses; its next writes
    wait at the gates they are given."""

    version = None

    def __init__(self, size: int = MIB) -> None:
        self.data = bytearray(size)
        self.durable = bytearray(size)
        self.gates: list[asyncio.Event] = []
        self.begun = asyncio.Event()
        self.log: list[bytes] = []
        self.flushes = 0
        self.flush_errors = 0

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def writable(self) -> bool:
        return True

    async def read(self, offset: int, length: int) -> Buffer:
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: Buffer) -> None:
        data = bytes(data)
        self.begun.set()
        if self.gates:
            await self.gates.pop(0).wait()
        self.data[offset : offset + len(data)] = data
        self.log.append(data[:1])

    async def flush(self) -> None:
        self.flushes += 1
        if self.flush_errors:
            self.flush_errors -= 1
            self.power_failure()
            raise OSError(errno.EIO, "writeback failed")
        self.durable[:] = self.data

    def power_failure(self) -> None:
        self.data[:] = self.durable

    def clone(self) -> Disk:
        return self


class Line:
    """A proxy in front of a socket, whose connections can be cut, on the client's side at first."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self.sides: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        #: What cut lines do with the server's side: nothing, until it is set.
        self.tell = asyncio.Event()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        back, forth = await asyncio.open_unix_connection(self._target)
        self.sides.append((writer, forth))

        async def pump(
            source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, tells: bool
        ) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)
            if tells:
                await self.tell.wait()
            sink.close()

        try:
            await asyncio.gather(pump(reader, forth, tells=True), pump(back, writer, tells=False))
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()
            forth.close()

    def cut(self) -> None:
        for writer, _ in self.sides:
            writer.transport.abort()

    async def aclose(self) -> None:
        self.tell.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def line(target: Path, path: Path) -> AsyncIterator[Line]:
    between = Line(target)
    server = await asyncio.start_unix_server(between.connected, path)
    try:
        yield between
    finally:
        server.close()
        await between.aclose()


# ------------------------------------------------------------------------- zeros


async def test_zeros_are_those_of_now(tmp_path: Path) -> None:
    """Whoever wrote in between: we, our clone, or somebody else."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    async with (
        opened(FileSource(image, writable=True)) as back,
        NbdServer({"": back}, writable=True) as server,
    ):
        url = await server.listen_unix(tmp_path / "s")
        async with opened(NbdSource(url, writable=True)) as source:
            assert await source.holes(0, 16 * MIB) == [(0, 16 * MIB)]
            async with opened(source.clone()) as twin:
                assert await twin.holes(0, 16 * MIB) == [(0, 16 * MIB)]
                for at, writer in ((1, source), (2, twin), (3, back)):
                    await writer.write(at * MIB, b"x" * 65536)
                    for reader in (source, twin):
                        assert await reader.holes(at * MIB, 65536) == []
                        assert await reader.read(at * MIB, 65536) == b"x" * 65536
                        found = await reader.holes((at - 1) * MIB, 2 * MIB)
                        assert all(h + n <= at * MIB or h >= at * MIB + 65536 for h, n in found)
                await back.write_zeros(MIB, 65536, hole=True)
                # Data are believed: at worst zeros are read.
                assert await twin.read(MIB, 65536) == bytes(65536)


async def test_an_answer_that_was_under_way_during_a_write_is_not_used_after_it(
    tmp_path: Path,
) -> None:
    """Through a proxy: a client reads one place and writes another at the same time."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    async with (
        opened(FileSource(image, writable=True)) as back,
        NbdServer({"": back}, writable=True) as backend,
    ):
        url = await backend.listen_unix(tmp_path / "back")
        async with opened(NbdSource(url, writable=True, connections=1)) as source:
            asking = asyncio.create_task(source.holes(0, 4096))
            await asyncio.sleep(0)
            await source.write(MIB, A)
            await asking
            assert await source.holes(MIB, 512) == []
            async with NbdServer({"": source}, writable=True) as front:
                url = await front.listen_unix(tmp_path / "front")
                async with opened(NbdSource(url, writable=True, holes=False)) as client:
                    await asyncio.gather(client.read(0, 65536), client.write(8 * MIB, B))
                    assert await client.read(8 * MIB, 512) == B


async def test_where_there_are_data_nobody_asks_twice(tmp_path: Path) -> None:
    asked = []

    class Counted(FileSource):
        async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
            asked.append((offset, length))
            return await super().holes(offset, length)

    image = tmp_path / "image"
    image.write_bytes(b"x" * 4 * MIB + bytes(64 * KIB))
    async with (
        opened(Counted(image)) as back,
        NbdServer({"": back}) as server,
        opened(NbdSource(await server.listen_unix(tmp_path / "s"))) as source,
    ):
        for at in range(4):
            assert await source.holes(at * MIB, MIB) == []
            assert source.known_holes(at * MIB, MIB) == []
        assert asked == [(0, 4 * MIB + 64 * KIB)]


# ----------------------------------------------------------------------- flushes


async def test_a_flush_does_not_speak_for_a_server_that_is_gone(tmp_path: Path) -> None:
    disk = Disk()
    server = NbdServer({"": disk}, writable=True)
    url = await server.listen_unix(tmp_path / "s")
    async with opened(NbdSource(url, writable=True)) as source:
        await source.write(0, A)
        await source.flush()
        await source.write(512, A)
        disk.power_failure()
        await server.aclose(drain=0)
        async with NbdServer({"": disk}, writable=True) as server:
            await server.listen_unix(tmp_path / "s")
            for _ in range(2):
                with pytest.raises(FlushError) as caught:
                    await source.flush()
                assert caught.value.ranges == [(512, 512)]
            await source.write(512, B)
            await source.flush()
            assert disk.durable[:1024] == A + B


async def test_each_connection_keeps_its_own_promise(tmp_path: Path) -> None:
    """Also among several connections of one server: what one has acknowledged is in doubt when
    that one is lost, however well the others are."""
    disk = Disk()
    async with NbdServer({"": disk}, writable=True) as server:
        await server.listen_unix(tmp_path / "s")
        async with line(tmp_path / "s", tmp_path / "line") as between:
            url = nbd.url(tmp_path / "line")
            async with opened(NbdSource(url, writable=True, connections=2)) as source:
                await until(lambda: source.connected == 1)
                await asyncio.gather(*(source.write(at * 512, A) for at in range(8)))
                between.sides[0][0].transport.abort()
                await until(lambda: len(source._live) == 1)
                with pytest.raises(FlushError) as caught:
                    await source.flush()
                lost = sum(length for _, length in caught.value.ranges)
                assert 0 < lost < 8 * 512


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_flush_that_failed_is_not_made_good_by_asking_again(
    wrapped: bool, tmp_path: Path
) -> None:
    """Neither by the source, nor a wrapper, nor another client of the server."""
    disk = Disk()
    disk.flush_errors = 1
    async with NbdServer({"": disk}, writable=True) as backend:
        url = await backend.listen_unix(tmp_path / "back")
        inner: Any = NbdSource(url, writable=True)
        async with (
            opened(RetrySource(inner, first=0.001) if wrapped else inner) as middle,
            NbdServer({"": middle}, writable=True) as front,
        ):
            url = await front.listen_unix(tmp_path / "front")
            async with (
                opened(NbdSource(url, writable=True)) as one,
                opened(NbdSource(url, writable=True)) as two,
            ):
                await one.write(0, A)
                for client in (one, two, one):
                    with pytest.raises(FlushError):
                        await client.flush()
                await one.write(0, B)
                await one.flush()
                await two.flush()
    assert disk.durable[:512] == B


async def test_what_one_client_lost_is_told_to_the_others(tmp_path: Path) -> None:
    disk = Disk()
    disk.flush_errors = 1
    async with NbdServer({"": disk}, writable=True) as server:
        await server.listen_unix(tmp_path / "s")
        one, two = [await Peer.transmitting(tmp_path / "s") for _ in range(2)]
        two.ask(wire.CMD_WRITE, 4096, 512, B)
        assert await two.answer() == (0, 1)
        one.ask(wire.CMD_WRITE, 0, 512, A)
        assert await one.answer() == (0, 1)
        for peer in (one, two):
            peer.ask(wire.CMD_FLUSH)
            assert await peer.answer() == (wire.EIO, 1)
        # Of this alone it can be said that it is durable.
        one.ask(wire.CMD_WRITE, 0, 512, A, flags=wire.CMD_FLAG_FUA)
        assert await one.answer() == (0, 1)
        one.ask(wire.CMD_FLUSH)
        assert await one.answer() == (wire.EIO, 1)
        two.ask(wire.CMD_WRITE_ZEROES, 4096, 512)
        assert await two.answer() == (0, 1)
        one.ask(wire.CMD_FLUSH)
        assert await one.answer() == (0, 1)
        for peer in (one, two):
            await peer.close()


async def test_fua_that_failed(tmp_path: Path) -> None:
    disk = Disk()
    disk.flush_errors = 1
    async with NbdServer({"": disk}, writable=True) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        peer.ask(wire.CMD_WRITE, 0, 512, A, flags=wire.CMD_FLAG_FUA)
        assert await peer.answer() == (wire.EIO, 1)
        peer.ask(wire.CMD_FLUSH)
        assert await peer.answer() == (wire.EIO, 1)
        await peer.close()


# ---------------------------------------------------------------- order of writes


async def test_turns_are_taken_in_order() -> None:
    order = Order()
    log: list[str] = []

    async def write(name: str, offset: int, length: int, gate: asyncio.Event | None) -> None:
        turn = await order.turn(offset, length)
        log.append(name)
        if gate is not None:
            await gate.wait()
        turn.end()

    gate = asyncio.Event()
    tasks = [
        asyncio.create_task(write("a", 0, 10, gate)),
        asyncio.create_task(write("b", 5, 10, None)),
        asyncio.create_task(write("c", 12, 10, None)),
        asyncio.create_task(write("d", 30, 1, None)),
    ]
    for _ in range(5):
        await asyncio.sleep(0)
    assert log == ["a", "d"]
    tasks[1].cancel()
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert log == ["a", "d", "c"]
    assert not len(order)


@pytest.mark.parametrize("how", ["read to the end", "never read"])
async def test_a_write_that_was_sent_again_does_not_land_after_a_newer_one(
    how: str, tmp_path: Path
) -> None:
    """Whether the server has noticed that the first line broke, or not."""
    disk = Disk()
    gate = asyncio.Event()
    disk.gates = [gate]
    async with NbdServer({"": disk}, writable=True) as server:
        await server.listen_unix(tmp_path / "s")
        async with line(tmp_path / "s", tmp_path / "line") as between:
            if how == "read to the end":
                between.tell.set()
            url = nbd.url(tmp_path / "line")
            async with opened(NbdSource(url, writable=True, connections=1)) as source:
                first = asyncio.create_task(source.write(0, A))
                await disk.begun.wait()
                between.cut()
                await until(lambda: source.replayed == 1)
                # Elsewhere it need not wait.
                await source.write(4096, A)
                assert not first.done()
                gate.set()
                await first
                await source.write(0, B)
                await source.flush()
    assert bytes(disk.data[:512]) == B
    assert disk.log[-1:] == [b"B"]


async def test_a_write_that_was_cancelled_does_not_land_after_a_newer_one(tmp_path: Path) -> None:
    disk = Disk()
    gate = asyncio.Event()
    disk.gates = [gate]
    async with NbdServer({"": disk}, writable=True) as server:
        url = await server.listen_unix(tmp_path / "s")
        async with opened(NbdSource(url, writable=True, connections=2)) as source:
            await until(lambda: source.connected == 1)
            first = asyncio.create_task(source.write(0, A))
            await disk.begun.wait()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            second = asyncio.create_task(source.write(256, B))
            await source.write(4096, B)
            assert not second.done()
            gate.set()
            await second
    assert disk.data[:768] == A[:256] + B
    assert disk.log == [b"B", b"A", b"B"]


async def test_what_a_client_left_behind_comes_before_what_the_next_one_writes(
    tmp_path: Path,
) -> None:
    disk = Disk()
    gate = asyncio.Event()
    disk.gates = [gate]
    async with NbdServer({"a": disk, "b": disk}, writable=True) as server:
        await server.listen_unix(tmp_path / "s")
        first = await Peer.transmitting(tmp_path / "s", "a")
        first.ask(wire.CMD_WRITE, 0, 512, A)
        await disk.begun.wait()
        first.writer.transport.abort()
        await first.close()
        second = await Peer.transmitting(tmp_path / "s", "b")
        second.ask(wire.CMD_WRITE_ZEROES, 0, 8, cookie=1)
        second.ask(wire.CMD_WRITE, 4096, 512, B, cookie=2)
        assert await second.answer() == (0, 2)
        gate.set()
        assert await second.answer() == (0, 1)
        await second.close()
    assert disk.data[:512] == bytes(8) + A[8:]


# ---------------------------------------- servers that know nothing of lost connections


def plain_handshake(size: int = MIB, flags: int = 0, minimum: int = 1) -> bytes:
    reply = wire.option_reply
    flags |= wire.FLAG_HAS_FLAGS | wire.FLAG_SEND_FLUSH
    return b"".join(
        [
            GREETING,
            reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ERR_UNSUP),
            reply(wire.OPT_GO, wire.REP_INFO, wire.EXPORT_INFO.pack(0, size, flags)),
            reply(
                wire.OPT_GO, wire.REP_INFO, wire.BLOCK_SIZE_INFO.pack(3, minimum, 4096, 32 * MIB)
            ),
            reply(wire.OPT_GO, wire.REP_ACK),
        ]
    )


class Plain:
    """A server by hand with simple replies over memory; ``first`` talks on the first connection
    instead, once its handshake is over."""

    def __init__(self, first: Talk | None = None, size: int = MIB, **export: int) -> None:
        self.data = bytearray(size)
        self.first = first
        self.asked: list[tuple[int, int, int]] = []
        self.handshake = plain_handshake(size, **export)
        self.minimum = export.get("minimum", 1)

    async def __call__(self, server: Server, number: int) -> None:
        server.writer.write(self.handshake)
        await server.reader.readexactly(wire.CLIENT_FLAGS.size)
        option = 0
        while option != wire.OPT_GO:
            head = await server.reader.readexactly(wire.OPTION.size)
            _, option, length = wire.OPTION.unpack(head)
            await server.reader.readexactly(length)
        if number == 1 and self.first is not None:
            await self.first(server, number)
            return
        while True:
            await self.answer(server)

    async def answer(self, server: Server) -> None:
        asked = await server.request()
        data = b""
        if asked.command == wire.CMD_WRITE:
            data = await server.reader.readexactly(asked.length)
        if asked.command == wire.CMD_DISC:
            raise ConnectionResetError
        self.asked.append((asked.command, asked.offset, asked.length))
        end = asked.offset + asked.length
        error = wire.EINVAL if asked.offset % self.minimum or asked.length % self.minimum else 0
        reply = b""
        if not error and asked.command == wire.CMD_READ:
            reply = bytes(self.data[asked.offset : end])
        elif not error and asked.command == wire.CMD_WRITE:
            self.data[asked.offset : end] = data
        elif not error and asked.command == wire.CMD_WRITE_ZEROES:
            self.data[asked.offset : end] = bytes(asked.length)
        head = wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, error, asked.cookie)
        server.writer.write(head + reply)


async def takes_a_write_and_hangs_up(server: Server, _number: int) -> None:
    asked = await server.request()
    await server.reader.readexactly(asked.length)


async def test_a_newer_write_is_refused_where_an_older_one_may_still_land(tmp_path: Path) -> None:
    """A server that cannot be told: the same bytes may be written, others not."""
    plain = Plain(takes_a_write_and_hangs_up)
    async with (
        speaking(tmp_path / "s", plain) as url,
        opened(NbdSource(url, writable=True)) as source,
    ):
        await source.write(0, A)
        assert source.replayed == 1
        await source.write(0, A)
        await source.write(100, A[:10])
        await source.flush()
        for offset, data in ((0, B), (511, B[:1])):
            with pytest.raises(SourceError, match="may still land") as caught:
                await source.write(offset, data)
            assert not caught.value.transient
        with pytest.raises(SourceError, match="may still land"):
            await source.write_zeros(0, 512, hole=True)
        await source.write(512, B)
        await source.flush()
        # It goes on with what it can do.
        assert await source.read(0, 1024) == A + B
        # To open it again is to say that nothing is left of the old one.
        async with opened(source.clone()) as other:
            await other.write(0, B)
            assert await source.read(0, 512) == B


async def test_a_write_nobody_waits_for_is_remembered_when_its_connection_is_lost(
    tmp_path: Path,
) -> None:
    taken, hang_up = asyncio.Event(), asyncio.Event()

    async def first(server: Server, _number: int) -> None:
        asked = await server.request()
        await server.reader.readexactly(asked.length)
        taken.set()
        await hang_up.wait()

    async with (
        speaking(tmp_path / "s", Plain(first)) as url,
        opened(NbdSource(url, writable=True)) as source,
    ):
        writing = asyncio.create_task(source.write(0, A))
        await taken.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        second = asyncio.create_task(source.write(0, B))
        hang_up.set()
        with pytest.raises(SourceError, match="may still land"):
            await second


def test_ghosts_are_compared_by_their_bytes() -> None:
    class Lost:
        token = None

    writes = Writes("it")
    done = lambda _error: None  # noqa: E731
    write = Request(wire.CMD_WRITE, 10, 4, done, data=b"abcd")
    zeros = Request(wire.CMD_WRITE_ZEROES, 20, 4, done)
    trim = Request(wire.CMD_TRIM, 30, 4, done)
    read = Request(wire.CMD_READ, 40, 4, done)
    writes.lost(Lost(), [write, zeros, trim, read])  # type: ignore[arg-type]

    def harmless(offset: int, content: bytes | bool | None, length: int = 4) -> bool:
        view = memoryview(content) if isinstance(content, bytes) else content
        return not writes.in_the_way(offset, length, view)

    assert harmless(10, b"abcd")
    assert harmless(8, b"xxab")
    assert harmless(12, b"cdxx")
    assert not harmless(12, b"cxxx")
    assert not harmless(10, None)
    assert harmless(20, None)
    assert harmless(18, b"xx\0\0")
    assert not harmless(22, b"\0xxx")
    assert not harmless(30, None)
    assert harmless(34, b"xxxx")
    assert harmless(0, False, 100)
    assert harmless(40, b"xxxx")
    assert writes.tokens() == []


def test_tokens_cannot_be_made_up() -> None:
    ended: list[int] = []
    fences, others = Fences(ended.append), Fences(ended.append)
    assert fences.ended(fences.token(7))
    for text in (others.token(7), "", "7", "7.", "x.y", "-1.x", fences.token(7) + "x", "\udcff",
                 "7" * 5000, fences.token(7).upper().replace(".", "..")):  # fmt: skip
        assert not fences.ended(text), text
    assert ended == [7]


async def test_a_client_ends_its_own_connections_only(tmp_path: Path) -> None:
    """And who may not write has no business with them."""
    async with (
        NbdServer({"w": MemorySource(bytearray(MIB))}, writable=True) as server,
        NbdServer({"r": MemorySource(bytes(MIB))}) as reader,
    ):
        url = await server.listen_unix(tmp_path / "s")
        await reader.listen_unix(tmp_path / "r")
        async with opened(NbdSource(url, writable=True, connections=1)) as source:
            token = source._live[0].token
            assert token
            for path, queries, said in (
                ("s", [ENDED + token[:-1] + "x"], []),
                ("r", [CONNECTION, ENDED + token], []),
                ("s", [ENDED + token], [ENDED + token]),
            ):
                peer = await Peer.connect(tmp_path / path)
                peer.writer.write(wire.CLIENT_FLAGS.pack(3))
                peer.writer.write(wire.option(wire.OPT_STRUCTURED_REPLY))
                assert await peer.option_reply(wire.OPT_STRUCTURED_REPLY) == wire.REP_ACK
                payload = wire.string("") + wire.U32.pack(len(queries))
                payload += b"".join(map(wire.string, queries))
                peer.writer.write(wire.option(wire.OPT_SET_META_CONTEXT, payload))
                for _ in said:
                    kind = await peer.option_reply(wire.OPT_SET_META_CONTEXT)
                    assert kind == wire.REP_META_CONTEXT
                assert await peer.option_reply(wire.OPT_SET_META_CONTEXT) == wire.REP_ACK
                if not said:
                    assert await source.read(0, 1) == b"\0"
                await peer.close()
            await until(lambda: not source._live)
            await source.write(0, A)
            assert source.connected == 1


async def test_a_connection_that_is_lost_as_soon_as_it_was_made(tmp_path: Path) -> None:
    async def talk(server: Server, number: int) -> None:
        plain = Plain()
        plain.first = None
        if number == 1:
            plain.first = hangs_up_at_a_request
        elif number < 4:
            server.writer.write(plain_handshake())
            await server.reader.readexactly(wire.CLIENT_FLAGS.size)
            return
        await plain(server, number)

    async def hangs_up_at_a_request(server: Server, _number: int) -> None:
        await server.request()

    for _ in range(5):
        async with (
            speaking(tmp_path / "s", talk) as url,
            opened(NbdSource(url, connections=1, holes=False)) as source,
        ):

            async def late(source: NbdSource = source) -> Buffer:
                while source._live:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                return await source.read(4096, 512)

            assert await asyncio.gather(source.read(0, 512), late()) == [bytes(512)] * 2


# --------------------------------------------------------------- zeros, trim, blocks


async def test_zeros_and_trim_are_not_sent(tmp_path: Path) -> None:
    """From our client through our server to our client, and to nbdkit."""
    nbd.need("nbdkit")
    image = tmp_path / "image"
    image.write_bytes(b"x" * 8 * MIB)
    with nbd.nbdkit(tmp_path / "kit", "file", str(image)):
        async with (
            opened(NbdSource(nbd.url(tmp_path / "kit"), writable=True)) as back,
            NbdServer({"": back}, writable=True) as server,
        ):
            url = await server.listen_unix(tmp_path / "s")
            async with opened(NbdSource(url, writable=True)) as source:
                assert source.export.has(wire.FLAG_SEND_TRIM)
                await source.write_zeros(MIB + 100, 2 * MIB, hole=True)
                await source.trim(4 * MIB, MIB)
                await source.write_zeros(6 * MIB, 512, hole=False)
                await source.flush()
                assert await source.holes(2 * MIB, MIB) == [(2 * MIB, MIB)]
                assert server.stats.bytes_written == 2 * MIB + 512
    expected = bytearray(b"x" * 8 * MIB)
    expected[MIB + 100 : 3 * MIB + 100] = bytes(2 * MIB)
    expected[4 * MIB : 5 * MIB] = bytes(MIB)
    expected[6 * MIB : 6 * MIB + 512] = bytes(512)
    assert image.read_bytes() == expected
    assert image.stat().st_blocks * 512 < 6 * MIB


async def test_trim_by_others(tmp_path: Path) -> None:
    nbd.need("qemu-io")
    image = tmp_path / "image"
    image.write_bytes(b"x" * MIB)
    async with (
        opened(FileSource(image, writable=True)) as source,
        NbdServer({"": source}, writable=True) as server,
    ):
        url = await server.listen_unix(tmp_path / "s")
        await run("qemu-io", "-f", "raw", "-d", "unmap", url, "-c", "discard 0 512k")
    assert image.stat().st_blocks * 512 <= MIB // 2


async def test_where_the_server_has_no_such_command_zeros_are_written(tmp_path: Path) -> None:
    plain = Plain()
    plain.data[:] = b"x" * MIB
    async with (
        speaking(tmp_path / "s", plain) as url,
        opened(NbdSource(url, writable=True)) as source,
    ):
        await source.write_zeros(10, 1000, hole=True)
        await source.trim(5000, 1000)
        assert plain.asked == [(wire.CMD_WRITE, 10, 1000)]
        assert plain.data == b"x" * 10 + bytes(1000) + b"x" * (MIB - 1010)


async def test_parts_of_blocks_are_completed(tmp_path: Path) -> None:
    plain = Plain(flags=wire.FLAG_SEND_WRITE_ZEROES, minimum=512)
    plain.data[:] = b"x" * MIB
    oracle = bytearray(plain.data)
    async with (
        speaking(tmp_path / "s", plain) as url,
        opened(NbdSource(url, writable=True)) as source,
    ):
        for offset, length in ((0, 512), (1, 1), (500, 24), (511, 1026), (5000, 512), (MIB - 3, 3)):
            data = bytes([offset % 251]) * length
            await source.write(offset, data)
            oracle[offset : offset + length] = data
            assert plain.data == oracle
        for offset, length in ((2048, 512), (3000, 10), (3000, 2000), (6000, 80), (MIB - 700, 700)):
            await source.write_zeros(offset, length, hole=True)
            oracle[offset : offset + length] = bytes(length)
            assert plain.data == oracle
        # At the same time, to the same block.
        await asyncio.gather(*(source.write(8192 + at, bytes([at])) for at in range(64)))
        assert plain.data[8192:8256] == bytes(range(64))
        async with NbdServer({"": source}, writable=True) as front:
            url = await front.listen_unix(tmp_path / "front")
            async with opened(NbdSource(url)) as client:
                assert client.export.minimum == 512


@pytest.mark.parametrize("strict", [False, True])
async def test_a_size_that_is_no_multiple_of_the_smallest_block(
    strict: bool, tmp_path: Path
) -> None:
    """All whole blocks work, and the rest if the server lets it; else the error says why."""
    size = 8192 + 100
    plain = Plain(size=size, minimum=512)
    plain.data[:] = bytes(at % 251 for at in range(size))
    if not strict:
        plain.minimum = 1
    async with (
        speaking(tmp_path / "s", plain) as url,
        opened(NbdSource(url, writable=True)) as source,
    ):
        assert source.size == size
        assert source.minimum_block == 1
        assert await source.read(100, 8000) == plain.data[100:8100]
        await source.write(8000, b"abc")
        if strict:
            for call in (source.read(8100, 100), source.write(8200, b"x")):
                with pytest.raises(SourceError, match="no multiple of the server's smallest"):
                    await call
        else:
            assert await source.read(8100, 192) == plain.data[8100:]
            await source.write(8200, b"xyz")
            assert plain.data[8200:8203] == b"xyz"


async def test_extents_of_a_size_that_is_no_multiple(tmp_path: Path) -> None:
    """nbdkit says which blocks are holes as far as there are whole ones."""
    nbd.need("nbdkit")
    size = 2 * MIB + 100
    arguments = (f"size={size}", "data=1", "blocksize-minimum=4096",
                 "blocksize-error-policy=error")  # fmt: skip
    with nbd.nbdkit(tmp_path / "s", "data", *arguments, filters=["blocksize-policy"]):
        async with opened(NbdSource(nbd.url(tmp_path / "s"))) as source:
            assert source.export.minimum == 4096
            found = await source.holes(0, size)
            assert found
            assert all(at >= 4096 and at + length <= size for at, length in found)
            assert await source.read(0, 10) == b"\x01" + bytes(9)


async def test_what_the_server_says_of_blocks() -> None:
    class Blocks(MemorySource):
        minimum_block = 0

    for minimum, size, said in (
        (1, 100, (1, 65536)),
        (512, MIB, (512, 65536)),
        (65536, MIB, (65536, 65536)),
        (512, MIB + 1, (1, 65536)),
        (500, MIB, (1, 65536)),
        (1 << 20, MIB, (1, 65536)),
        (0, MIB, (1, 65536)),
    ):
        source = Blocks(bytes(size))
        source.minimum_block = minimum
        server = NbdServer({"": source})
        offer = server.exports[""].offer
        assert (offer.minimum, offer.preferred) == said
        await server.aclose()


async def test_writes_outside(tmp_path: Path) -> None:
    async with (
        speaking(tmp_path / "s", Plain()) as url,
        opened(NbdSource(url, writable=True)) as source,
    ):
        for call in (
            source.write(MIB - 1, b"xx"),
            source.write_zeros(-1, 2, hole=True),
            source.trim(0, MIB + 1),
        ):
            with pytest.raises(UsageError):
                await call
