"""The NBD client against nbdkit and qemu-nbd, and against peers that lie."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import struct
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd.errors import AiouffdError, ClosedError, SourceChangedError, SourceError, UsageError
from aiouffd.nbd import client, wire
from aiouffd.nbd.client_core import Export, Handshake, Replies, Request
from aiouffd.nbd.extents import ZeroMap
from aiouffd.nbd.source import NbdSource
from aiouffd.nbd.uri import NbdAddress, parse
from aiouffd.nbd.wire import NbdProtocolError
from aiouffd.sources.base import SourcePermissionError
from aiouffd.util.ranges import Ranges
from tests.scenarios import torture
from tests.servers import nbd
from tests.support import result_of, wait_until

SIZE = 24 << 20


def pattern(offset: int, length: int) -> bytes:
    """What nbdkit's pattern plugin has: every eight bytes say where they are."""
    first = offset // 8
    words = struct.pack(f">{length // 8 + 2}Q", *range(first * 8, (first + length // 8 + 2) * 8, 8))
    return words[offset % 8 :][:length]


@pytest.fixture(scope="module")
def pattern_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("nbd") / "sock"
    with nbd.nbdkit(path, "pattern", str(SIZE)):
        yield nbd.url(path)


class Opened:
    """``async with Opened(url) as source``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.source = NbdSource(*arguments, **options)

    async def __aenter__(self) -> NbdSource:
        await self.source.open()
        return self.source

    async def __aexit__(self, *exc_info: object) -> None:
        await self.source.aclose()


async def check(source: NbdSource, offset: int, length: int) -> None:
    assert bytes(await source.read(offset, length)) == pattern(offset, length), (offset, length)


async def test_a_socket_of_others_is_no_reason_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an ordinary user sees it; root may connect everywhere."""

    async def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(client.Connection, "_connect", refuse)
    source = NbdSource("nbd+unix:///?socket=theirs")
    with pytest.raises(SourcePermissionError, match="Permission denied") as caught:
        await source.open()
    assert not caught.value.transient
    await source.aclose()


# ------------------------------------------------------------------------- URIs


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nbd://host/", NbdAddress("", "host")),
        ("nbd://host", NbdAddress("", "host")),
        ("nbd://host:99/a%20b/c", NbdAddress("a b/c", "host", 99)),
        ("nbds://[::1]:5/x", NbdAddress("x", "::1", 5, None, True)),
        ("nbd+unix:///x?socket=/tmp/s%20s", NbdAddress("x", socket="/tmp/s s")),
        ("nbds+unix:///?socket=s", NbdAddress("", socket="s", tls=True)),
    ],
)
def test_uris(text: str, address: NbdAddress) -> None:
    assert parse(text) == address
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["nbd://", "nbd:///x", "nbd+unix:///x", "nbd+tcp://host", "nbd://host:99999/", "http://x",
     "nbd+unix://host/x?socket=s", "nbd://host/x?socket=s"],
)  # fmt: skip
def test_bad_uris(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


# ------------------------------------------------------------------ real servers


async def test_reads(pattern_url: str) -> None:
    async with Opened(pattern_url) as source:
        assert source.size == SIZE
        await check(source, 0, 1)
        await check(source, SIZE - 5, 5)
        await check(source, 12_345, 3 << 20)
        chance = random.Random(3)
        places = [(chance.randrange(SIZE - 70_000), chance.randrange(1, 70_000)) for _ in range(64)]
        await asyncio.gather(*(check(source, *place) for place in places))
        assert await source.read(7, 0) == b""
        with pytest.raises(UsageError):
            await source.read(SIZE - 5, 6)
    with pytest.raises(ClosedError):
        await source.read(0, 1)


async def test_one_connection_and_several(pattern_url: str) -> None:
    for connections in (1, 3):
        async with Opened(pattern_url, connections=connections) as source:
            await asyncio.gather(*(check(source, at << 20, 1 << 20) for at in range(24)))
            assert source.connected == connections - 1


async def test_cancelled_reads_write_nothing_more(pattern_url: str) -> None:
    async with Opened(pattern_url, connections=1) as source:
        buffer = bytearray(8 << 20)
        for turns in range(8):
            task = asyncio.ensure_future(source.read_into(0, memoryview(buffer)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            buffer[:] = bytes(len(buffer))
            await check(source, 1 << 20, 1 << 20)
            assert not any(buffer)


async def test_a_buffer_over_nbd(pattern_url: str) -> None:
    async with aiouffd.open(pattern_url) as buf:
        expected = pattern(0, SIZE)
        assert (
            await asyncio.to_thread(buf.__getitem__, slice(5_000_000, 5_000_100))
            == (expected[5_000_000:5_000_100])
        )
        assert await asyncio.to_thread(bytes, buf.view) == expected


async def test_touched_on_the_loop_thread(pattern_url: str) -> None:
    async with aiouffd.open(pattern_url) as buf:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", aiouffd.BlockingTouchWarning)
            assert buf.view[100_007] == pattern(100_007, 1)[0]
            # The warning is a callback of the loop.
            await asyncio.sleep(0)
        assert buf.stats.rescued == 1


@pytest.mark.parametrize("server", ["nbdkit", "qemu"])
async def test_holes(server: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(8 << 20)
        file.write(b"x" * (1 << 20))
    path = tmp_path / "sock"
    start = (
        nbd.nbdkit(path, "file", str(image)) if server == "nbdkit" else nbd.qemu_nbd(path, image)
    )
    with start:
        async with Opened(nbd.url(path)) as source:
            found = await source.holes(0, 64 << 20)
            assert found == [(0, 8 << 20), (9 << 20, 55 << 20)]
            assert source.known_holes(8 << 20, 1 << 20) == []
        async with aiouffd.open(nbd.url(path)) as buf:
            assert await asyncio.to_thread(bytes, buf.view) == image.read_bytes()
            # The holes were not transferred.
            assert buf.stats.fetched_bytes <= 2 << 20
        # Also where the client does not ask for them: the server may send them as holes.
        async with Opened(nbd.url(path), holes=False) as source:
            assert bytes(await source.read(7 << 20, 3 << 20)) == (
                bytes(1 << 20) + b"x" * (1 << 20) + bytes(1 << 20)
            )


async def test_no_such_export_and_no_such_server(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await NbdSource(nbd.url(tmp_path / "none")).open()
    with pytest.raises(SourceError) as caught:
        await NbdSource("nbd://127.0.0.1:1/").open()
    assert caught.value.transient
    (tmp_path / "image").write_bytes(bytes(4096))
    path = tmp_path / "sock"
    with nbd.qemu_nbd(path, tmp_path / "image", "--export-name=there", "--read-only"):
        with pytest.raises(FileNotFoundError):
            await NbdSource(nbd.url(path, "elsewhere")).open()
        with pytest.raises(AiouffdError):
            await NbdSource(nbd.url(path, "there"), writable=True).open()
        async with Opened(nbd.url(path, "there")) as source:
            assert await source.read(0, 4096) == bytes(4096)


async def test_writes(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with nbd.nbdkit(path, "memory", "1M"):
        async with Opened(nbd.url(path), writable=True, connections=1) as source:
            assert await source.holes(0, 1 << 20) == [(0, 1 << 20)]
            await source.write(4096, b"abc" * 10_000)
            await source.flush()
            assert bytes(await source.read(4096, 30_000)) == b"abc" * 10_000
            assert (4096, 30_000) not in await source.holes(4096, 30_000)


async def test_errors_of_the_server(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with nbd.nbdkit(path, "memory", "1M", "error-pread=EIO", "error-rate=100%", filters=["error"]):
        async with Opened(nbd.url(path)) as source:
            with pytest.raises(SourceError) as caught:
                await source.read(0, 10)
            assert caught.value.transient


async def test_restart_in_the_middle_of_a_scan(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    delays = ["delay-read=2ms"]
    first = nbd.nbdkit(path, "pattern", str(SIZE), *delays, filters=["delay"])
    with first as server:
        async with aiouffd.open(nbd.url(path), readahead=0, block_size=1 << 20) as buf:
            touching = asyncio.ensure_future(asyncio.to_thread(bytes, buf.view))
            await asyncio.to_thread(wait_until, lambda: buf.stats.flights >= 4, "four flights")
            server.kill()
            server.wait()
            with nbd.nbdkit(path, "pattern", str(SIZE)):
                assert await touching == pattern(0, SIZE)
            assert buf.stats.failures == 0


async def test_another_export_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with nbd.nbdkit(path, "pattern", str(SIZE)) as server:
        async with Opened(nbd.url(path)) as source:
            server.kill()
            server.wait()
            other = nbd.nbdkit(path, "pattern", str(2 * SIZE))
            with other, pytest.raises(SourceChangedError):
                await source.read(0, 100)


async def test_gone_for_good(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with nbd.nbdkit(path, "pattern", str(SIZE)) as server:
        async with Opened(nbd.url(path), reconnect=0.1) as source:
            server.kill()
            server.wait()
            with pytest.raises(SourceError) as caught:
                await source.read(0, 100)
            assert caught.value.transient
            with nbd.nbdkit(path, "pattern", str(SIZE)):
                await check(source, 0, 100)


# -------------------------------------------------------------------- bad peers


def export(**changes: Any) -> Export:
    return Export(1 << 20, 1, structured=True, allocation=7, **changes)


GREETING = wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3)


def good_handshake() -> bytes:
    reply = wire.option_reply
    return b"".join(
        [
            GREETING,
            reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK),
            reply(
                wire.OPT_SET_META_CONTEXT,
                wire.REP_META_CONTEXT,
                wire.U32.pack(7) + wire.BASE_ALLOCATION.encode(),
            ),
            reply(wire.OPT_SET_META_CONTEXT, wire.REP_ACK),
            reply(wire.OPT_GO, wire.REP_INFO, wire.EXPORT_INFO.pack(0, 1 << 20, 1)),
            reply(wire.OPT_GO, wire.REP_INFO, wire.BLOCK_SIZE_INFO.pack(3, 512, 4096, 1 << 20)),
            reply(wire.OPT_GO, wire.REP_ACK),
        ]
    )


def test_a_handshake_byte_by_byte() -> None:
    handshake = Handshake("name")
    data = good_handshake() + b"rest"
    rest = b"".join(handshake.feed(data[at : at + 1]) for at in range(len(data)))
    assert rest == b"rest"
    assert handshake.export == Export(1 << 20, 1, 512, 4096, 1 << 20, True, 7)


DATA = random.Random(9).randbytes(60_000)


def chunk(kind: int, cookie: int, payload: bytes, *, done: bool = False) -> bytes:
    return wire.CHUNK.pack(wire.STRUCTURED_MAGIC, done, kind, cookie, len(payload)) + payload


def data_chunk(cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
    payload = wire.OFFSET.pack(offset) + DATA[offset : offset + length]
    return chunk(wire.CHUNK_OFFSET_DATA, cookie, payload, done=done)


class Conversation:
    """Reads and a question for extents, and what became of them."""

    def __init__(self) -> None:
        self.replies = Replies(export())
        self.ended: dict[int, BaseException | None] = {}
        self.buffers = {1: bytearray(50_000), 2: bytearray(4096)}
        self.requests = {
            1: self.request(1, wire.CMD_READ, 1000, 50_000),
            2: self.request(2, wire.CMD_READ, 0, 4096),
            3: self.request(3, wire.CMD_BLOCK_STATUS, 0, 1 << 20),
        }
        self.replies.requests.update(self.requests)

    def request(self, cookie: int, command: int, offset: int, length: int) -> Request:
        def done(error: BaseException | None) -> None:
            assert cookie not in self.ended
            self.ended[cookie] = error

        buffer = self.buffers.get(cookie)
        target = None if buffer is None else memoryview(buffer)
        return Request(command, offset, length, done, target=target)

    def right(self) -> None:
        assert self.ended == {1: None, 2: None, 3: None}
        hole = bytearray(DATA[1000:51_000])
        hole[39_000:41_000] = bytes(2000)
        assert self.buffers[1] == hole
        assert self.buffers[2] == DATA[:4096]
        assert self.requests[3].extents == [(4096, 0), (1 << 20, 3)]


def good_replies() -> bytes:
    """Out of order, in pieces, with a hole."""
    extents = wire.U32.pack(7) + wire.EXTENT.pack(4096, 0) + wire.EXTENT.pack(1 << 20, 3)
    return b"".join(
        [
            data_chunk(1, 42_000, 9000),
            chunk(wire.CHUNK_BLOCK_STATUS, 3, extents, done=True),
            data_chunk(1, 1000, 39_000),
            data_chunk(2, 0, 4096),
            chunk(wire.CHUNK_OFFSET_HOLE, 1, wire.HOLE.pack(40_000, 2000)),
            chunk(wire.CHUNK_NONE, 2, b"", done=True),
            chunk(wire.CHUNK_NONE, 1, b"", done=True),
        ]
    )


@pytest.mark.parametrize("step", [1, 3, 19, 4099, 1 << 20])
def test_replies_in_pieces(step: int) -> None:
    case = Conversation()
    stream = good_replies()
    for at in range(0, len(stream), step):
        case.replies.feed(stream[at : at + step])
    case.right()
    assert not case.replies.busy


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 400 Bad",
        data_chunk(9, 1000, 10),
        data_chunk(1, 990, 20),
        data_chunk(1, 50_990, 20),
        data_chunk(1, 1000, 100) + data_chunk(1, 1050, 100) + chunk(0, 1, b"", done=True),
        data_chunk(1, 1000, 49_999) + chunk(0, 1, b"", done=True),
        chunk(0, 2, b"", done=True),
        chunk(0, 3, b"", done=True),
        chunk(77, 2, b"x"),
        chunk(wire.CHUNK_ERROR, 2, b"x"),
        chunk(wire.CHUNK_BLOCK_STATUS, 3, wire.U32.pack(8) + wire.EXTENT.pack(1, 0)),
        chunk(wire.CHUNK_BLOCK_STATUS, 3, wire.U32.pack(7) + wire.EXTENT.pack(0, 0)),
        wire.CHUNK.pack(wire.STRUCTURED_MAGIC, 0, wire.CHUNK_BLOCK_STATUS, 3, 1 << 30),
        wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, 2),
    ],
)
def test_lies(stream: bytes) -> None:
    case = Conversation()
    with pytest.raises(NbdProtocolError):
        case.replies.feed(stream)


def test_a_cancelled_request_gets_nothing() -> None:
    case = Conversation()
    stream = good_replies()
    case.replies.feed(stream[:20_000])
    case.requests[1].cancel()
    case.buffers[1][:] = bytes(50_000)
    case.replies.feed(stream[20_000:])
    assert not any(case.buffers[1])
    assert set(case.ended) == {2, 3}


async def serve_bytes(data: bytes, path: Path) -> asyncio.Server:
    """A server that says what it has to say and hangs up."""

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        writer.close()

    return await asyncio.start_unix_server(connected, path)


@pytest.mark.parametrize(
    "data",
    [b"", GREETING[:10], GREETING, b"x" * 5000, wire.MAGIC + wire.OLDSTYLE_MAGIC + bytes(140),
     GREETING + bytes(20_000)],
)  # fmt: skip
async def test_bad_servers(data: bytes, tmp_path: Path) -> None:
    server = await serve_bytes(data, tmp_path / "s")
    with pytest.raises(SourceError):
        await NbdSource(nbd.url(tmp_path / "s")).open()
    server.close()


async def test_a_silent_server(tmp_path: Path) -> None:
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(lambda _r, w: writers.append(w), tmp_path / "s")
    with pytest.raises(TimeoutError):
        await NbdSource(nbd.url(tmp_path / "s"), connect_timeout=0.05).open()
    server.close()
    for writer in writers:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


# ---------------------------------------------------------------------- extents


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 12)), max_size=30))
def test_ranges_against_a_set(steps: list[tuple[bool, int, int]]) -> None:
    ranges, oracle = Ranges(), set[int]()
    for add, start, length in steps:
        (ranges.add if add else ranges.remove)(start, start + length)
        span = set(range(start, start + length))
        oracle = oracle | span if add else oracle - span
        found = ranges.within(5, 45)
        assert {n for at, count in found for n in range(at, at + count)} == {
            n for n in oracle if 5 <= n < 45
        }
        assert all(a + n < b for (a, n), (b, _) in pairwise(found))
        assert ranges.covers(start, start + length) == (span <= oracle)


def test_zero_map() -> None:
    zeros = ZeroMap()
    assert not zeros.knows(0, 1)
    assert zeros.add(100, [(50, True), (10, False), (40, True)]) == 200
    assert zeros.knows(100, 200)
    assert not zeros.knows(99, 200)
    assert zeros.zeros(0, 1000) == [(100, 50), (160, 40)]
    zeros.assume_data(120, 170)
    assert zeros.zeros(0, 1000) == [(100, 20), (170, 30)]


# ---------------------------------------------------------------------- torture


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    nbd.need("nbdkit")
    found = result_of(torture.torture, loop_name, "nbd", "anonymous", errors, 600, 5, limit=60.0)
    assert found["retries"] > 0
    if errors == "hard":
        assert found["refused"] == 0
