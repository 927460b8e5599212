"""The NBD server: clients of others, clients that lie, and what each of them may cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from aiouffd.errors import (
    ClosedError,
    SourceChangedError,
    SourceError,
    UnsupportedError,
    UsageError,
)
from aiouffd.nbd import NbdServer, server_core, wire
from aiouffd.nbd.server_core import Negotiation, Offer
from aiouffd.nbd.source import NbdSource
from aiouffd.nbd.wire import NbdProtocolError
from aiouffd.sources.base import Buffer
from aiouffd.sources.compose import RetrySource, SliceSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.memory import MemorySource
from tests.nbd_peers import DATA, GREETING_REST, SIZE, Peer, Slow, run, serve, until
from tests.scenarios import torture
from tests.servers.nbd import need
from tests.support import result_of

READ_ONLY = wire.FLAG_HAS_FLAGS | wire.FLAG_READ_ONLY | wire.FLAG_SEND_DF


@pytest.fixture(autouse=True)
async def _nobody_stays() -> AsyncIterator[None]:
    yield
    await Peer.hang_up()


@contextlib.asynccontextmanager
async def file(path: Path, **options: Any) -> AsyncIterator[FileSource]:
    """A file with known contents, open."""
    path.write_bytes(DATA)  # noqa: ASYNC240
    source = FileSource(path, **options)
    await source.open()
    try:
        yield source
    finally:
        await source.aclose()


# ------------------------------------------------------------- clients of others


async def test_read_by_others(tmp_path: Path) -> None:
    need("nbdcopy", "nbdinfo", "qemu-img")
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(DATA)
    async with NbdServer({"disk": MemorySource(DATA)}) as server:
        tcp = await server.listen(port=0)
        unix = await server.listen_unix(tmp_path / "s")
        assert (os.stat(tmp_path / "s").st_mode & 0o777) == 0o600
        await run("nbdcopy", "--connections=4", unix, str(copy))
        assert copy.read_bytes() == DATA
        for url in (tcp, unix):
            said = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", url, str(image))
            assert "identical" in said
        said = await run("nbdinfo", "--list", tcp)
        assert 'export="disk"' in said
        assert f"export-size: {SIZE}" in said
        said = await run("nbdinfo", "--map", unix)
        assert said.split()[:3] == ["0", str(SIZE), "0"]
        assert server.stats.clients_total >= 6
        assert server.stats.bytes_read >= 3 * SIZE
    assert not (tmp_path / "s").exists()


async def test_eight_clients_at_once(tmp_path: Path) -> None:
    need("nbdcopy")
    async with file(tmp_path / "image") as source, NbdServer({"": source}) as server:
        url = await server.listen_unix(tmp_path / "s")
        copies = [tmp_path / f"copy{number}" for number in range(8)]
        await asyncio.gather(*(run("nbdcopy", url, str(copy)) for copy in copies))
        assert all(copy.read_bytes() == DATA for copy in copies)


async def test_written_by_others(tmp_path: Path) -> None:
    """qemu-io's writes, zeros and flushes, and a copy of everything, end up in the file."""
    need("qemu-io", "nbdcopy")
    image = tmp_path / "image"
    async with (
        file(image, writable=True) as source,
        NbdServer({"": RetrySource(source)}, writable=True) as server,
    ):
        url = await server.listen_unix(tmp_path / "s")
        await run(
            "qemu-io", "-f", "raw", url,
            "-c", "write -P 7 4096 1M",
            "-c", "write -z 2M 64k",
            "-c", "write -z -u 3M 64k",
            "-c", "write -f -P 9 8192 512",
            "-c", "flush",
            "-c", "read -P 7 4096 4096",
        )  # fmt: skip
        expected = bytearray(DATA)
        expected[4096 : 4096 + (1 << 20)] = bytes([7]) * (1 << 20)
        expected[2 << 20 : (2 << 20) + 65536] = bytes(65536)
        expected[3 << 20 : (3 << 20) + 65536] = bytes(65536)
        expected[8192 : 8192 + 512] = bytes([9]) * 512
        assert image.read_bytes() == bytes(expected)
        assert (3 << 20, 65536) in await source.holes(0, SIZE)
        other = tmp_path / "other"
        other.write_bytes(bytes(reversed(DATA)))
        await run("nbdcopy", "--flush", str(other), url)
        assert image.read_bytes() == bytes(reversed(DATA))


async def test_holes_are_not_sent(tmp_path: Path) -> None:
    need("nbdinfo", "qemu-img")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(1 << 20)
        file.write(DATA[: 1 << 20])
    source = FileSource(image)
    await source.open()
    async with NbdServer({"": source}) as server:
        url = await server.listen_unix(tmp_path / "s")
        lines = [line.split()[:3] for line in (await run("nbdinfo", "--map", url)).splitlines()]
        assert lines == [
            ["0", str(1 << 20), "3"],
            [str(1 << 20), str(1 << 20), "0"],
            [str(2 << 20), str(2 << 20), "3"],
        ]
        said = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", url, str(image))
        assert "identical" in said
        client = NbdSource(url, holes=False)
        await client.open()
        assert bytes(await client.read(0, SIZE)) == image.read_bytes()
        # In two extents, the second one zeros.
        end = DATA[(1 << 20) - 10 : 1 << 20]
        assert bytes(await client.read((2 << 20) - 10, 100)) == end + bytes(90)
        await client.aclose()
        client = NbdSource(url)
        await client.open()
        assert await client.holes(0, SIZE) == [(0, 1 << 20), (2 << 20, 2 << 20)]
        await client.aclose()
    await source.aclose()


# -------------------------------------------------------------------- our client


async def test_writes_of_our_own(tmp_path: Path) -> None:
    memory = bytearray(SIZE)
    async with NbdServer({"a": MemorySource(memory), "b": MemorySource(bytearray(9))},
                         writable=True) as server:  # fmt: skip
        await server.listen_unix(tmp_path / "s")
        source = NbdSource(f"nbd+unix:///a?socket={tmp_path}/s", writable=True)
        await source.open()
        chance = random.Random(1)
        oracle = bytearray(SIZE)
        for _ in range(50):
            at, count = chance.randrange(SIZE - 200_000), chance.randrange(1, 200_000)
            data = chance.randbytes(count)
            await source.write(at, data)
            oracle[at : at + count] = data
        await source.flush()
        assert memory == oracle
        assert bytes(await source.read(0, SIZE)) == oracle
        await source.aclose()
        with pytest.raises(FileNotFoundError):
            await NbdSource(f"nbd+unix:///c?socket={tmp_path}/s").open()
        # With two of them the name has to be given.
        with pytest.raises(FileNotFoundError):
            await NbdSource(f"nbd+unix:///?socket={tmp_path}/s").open()


async def test_errors_of_the_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Slow):
        error: Exception = SourceError("secret detail", transient=False)

        async def read(self, offset: int, length: int) -> Buffer:
            raise self.error

    broken = Broken()
    async with NbdServer({"": broken}) as server:
        source = NbdSource(await server.listen_unix(tmp_path / "s"))
        await source.open()
        for error, number in (
            (SourceError("secret"), wire.EIO),
            (PermissionError(13, "secret"), wire.EPERM),
            (SourceChangedError("secret"), wire.EIO),
            (OSError(28, "secret"), wire.ENOSPC),
            (ZeroDivisionError("secret"), wire.EIO),
        ):
            broken.error = error
            with pytest.raises(SourceError) as caught:
                await source.read(0, 10)
            assert caught.value.errno == number
            assert "secret" not in str(caught.value)
        assert server.stats.failed == 5
        await source.aclose()


async def test_tls(tmp_path: Path) -> None:
    need("nbdinfo")
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    authority.cert_pem.write_to_path(tmp_path / "ca-cert.pem")
    async with NbdServer({"": MemorySource(DATA)}, tls=context, tls_required=True) as server:
        url = await server.listen("localhost", 0)
        assert url.startswith("nbds://")
        source = NbdSource(url, tls=trusting)
        await source.open()
        assert bytes(await source.read(5, SIZE - 10)) == DATA[5:-5]
        await source.aclose()
        with pytest.raises(SourceError, match="certificate"):
            await NbdSource(url).open()
        with pytest.raises(PermissionError):
            await NbdSource(url.replace("nbds:", "nbd:")).open()
        said = await run("nbdinfo", f"{url}?tls-certificates={tmp_path}")
        assert "TLS" in said
    async with NbdServer({"": MemorySource(DATA)}) as server:
        url = await server.listen("localhost", 0)
        with pytest.raises(UnsupportedError):
            await NbdSource(url.replace("nbd:", "nbds:"), tls=trusting).open()


# ----------------------------------------------------------------- limits, the end


async def test_requests_out_of_order(tmp_path: Path) -> None:
    """Each gets its error, and the connection lives on."""
    cases = [
        (wire.CMD_READ, SIZE, 1, 0, wire.EINVAL),
        (wire.CMD_READ, SIZE - 1, 2, 0, wire.EINVAL),
        (wire.CMD_READ, (1 << 64) - 1, 1, 0, wire.EINVAL),
        (wire.CMD_READ, 0, 0, 0, wire.EINVAL),
        (wire.CMD_READ, 0, (1 << 32) - 1, 0, wire.EINVAL),
        (wire.CMD_READ, 0, 1, wire.CMD_FLAG_DF, wire.EINVAL),
        (wire.CMD_READ, 0, 1, 1 << 14, wire.EINVAL),
        (wire.CMD_WRITE_ZEROES, 0, 1, 0, wire.EPERM),
        (wire.CMD_BLOCK_STATUS, 0, 1, 0, wire.EINVAL),
        (wire.CMD_TRIM, 0, 1, 0, wire.EPERM),
        (wire.CMD_READ, 0, 1, wire.CMD_FLAG_FUA, wire.EINVAL),
        (wire.CMD_CACHE, 0, 1, 0, wire.EINVAL),
        (99, 0, 1, 0, wire.EINVAL),
        (wire.CMD_FLUSH, 0, 0, 0, 0),
    ]
    async with NbdServer({"": MemorySource(DATA)}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        for cookie, (command, offset, length, flags, _) in enumerate(cases):
            peer.ask(command, offset, length, cookie=cookie, flags=flags)
        found = [await peer.answer() for _ in cases]
        assert {cookie: error for error, cookie in found} == {
            cookie: case[4] for cookie, case in enumerate(cases)
        }
        # A write that is refused is taken off the line first.
        peer.ask(wire.CMD_WRITE, 0, 100_000, bytes(100_000), cookie=77)
        assert await peer.answer() == (wire.EPERM, 77)
        peer.ask(wire.CMD_READ, 8, 8)
        assert await peer.answer() == (0, 1)
        assert await peer.reader.readexactly(8) == DATA[8:16]
        peer.ask(wire.CMD_DISC)
        await peer.ended()


@pytest.mark.parametrize(
    "sent",
    [
        b"x" * 100,
        wire.CLIENT_FLAGS.pack(1 << 9),
        GREETING_REST + wire.OPTION.pack(b"IHAVENOT", 7, 0),
        GREETING_REST + wire.OPTION.pack(wire.OPTION_MAGIC, 7, 1 << 31),
        GREETING_REST + wire.option(wire.OPT_EXPORT_NAME, b"nothing like that"),
        GREETING_REST + wire.option(wire.OPT_LIST) * 1001,
        GREETING_REST + wire.option(wire.OPT_ABORT),
        GREETING_REST + wire.option(wire.OPT_EXPORT_NAME) + bytes(28),
        GREETING_REST + wire.option(wire.OPT_EXPORT_NAME)
        + wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_WRITE, 1, 0, (32 << 20) + 1),
    ],
)  # fmt: skip
async def test_bad_clients(sent: bytes, tmp_path: Path) -> None:
    """They are dropped; others do not notice."""
    async with NbdServer({"": MemorySource(DATA)}) as server:
        url = await server.listen_unix(tmp_path / "s")
        source = NbdSource(url)
        await source.open()
        peer = await Peer.connect(tmp_path / "s")
        peer.writer.write(sent)
        await peer.ended()
        assert bytes(await source.read(0, 100)) == DATA[:100]
        await source.aclose()


async def test_who_is_silent_is_dropped(tmp_path: Path) -> None:
    async with NbdServer(
        {"": MemorySource(DATA)}, handshake_timeout=0.1, stall_timeout=0.1
    ) as server:
        await server.listen_unix(tmp_path / "s")
        idle = await Peer.transmitting(tmp_path / "s")
        chooses_nothing = await Peer.connect(tmp_path / "s")
        await chooses_nothing.ended()
        half = await Peer.transmitting(tmp_path / "s")
        half.ask(wire.CMD_WRITE, 0, 1000, bytes(999))
        await half.ended()
        greedy = await Peer.transmitting(tmp_path / "s")
        greedy.writer.transport.pause_reading()
        for cookie in range(64):
            greedy.ask(wire.CMD_READ, 0, SIZE, cookie=cookie)
        await until(lambda: server.stats.clients == 1)
        # Not everything that was asked for was put into memory.
        assert server.stats.bytes_read < 16 * SIZE
        greedy.writer.transport.resume_reading()
        await greedy.ended()
        # Who wants nothing stays.
        idle.ask(wire.CMD_READ, 0, 8)
        assert await idle.answer() == (0, 1)
        await idle.close()


async def test_room_for_requests(tmp_path: Path) -> None:
    """Neither one client nor all of them get more than they may."""
    source = Slow()
    async with NbdServer({"": source}, max_requests=3, memory=5 * 65536) as server:
        await server.listen_unix(tmp_path / "s")
        peers = [await Peer.transmitting(tmp_path / "s") for _ in range(4)]
        for peer in peers:
            for cookie in range(20):
                peer.ask(wire.CMD_READ, cookie * 65536, 65536, cookie=cookie)
        await source.asked.wait()
        await until(lambda: server.stats.requests >= 6)
        source.gate.set()
        for peer in peers:
            cookies = set[int]()
            for _ in range(20):
                error, cookie = await peer.answer()
                data = await peer.reader.readexactly(65536)
                assert not error
                assert data == DATA[cookie * 65536 :][:65536]
                cookies.add(cookie)
            assert len(cookies) == 20
            await peer.close()
        # Five fit, and each client may have one.
        assert source.most <= 5 + 3
        assert server.stats.bytes_outstanding == 0


async def test_no_more_clients_than_allowed(tmp_path: Path) -> None:
    async with NbdServer({"": MemorySource(DATA)}, max_clients=2) as server:
        await server.listen_unix(tmp_path / "s")
        first, second = [await Peer.transmitting(tmp_path / "s") for _ in range(2)]
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
        await Peer(reader, writer).close()
        assert server.stats.refused == 1
        await first.close()
        await until(lambda: server.stats.clients == 1)
        third = await Peer.transmitting(tmp_path / "s")
        await third.close()
        await second.close()


async def test_requests_under_way_are_answered_at_the_end(tmp_path: Path) -> None:
    source = Slow()
    server = NbdServer({"": source})
    await server.listen_unix(tmp_path / "s")
    peer = await Peer.transmitting(tmp_path / "s")
    idle = await Peer.transmitting(tmp_path / "s")
    peer.ask(wire.CMD_READ, 0, 1000)
    await source.asked.wait()
    closing = asyncio.ensure_future(server.aclose())
    await idle.ended()
    with pytest.raises(FileNotFoundError):
        await asyncio.open_unix_connection(tmp_path / "s")
    assert not closing.done()
    source.gate.set()
    assert await peer.answer() == (0, 1)
    assert await peer.reader.readexactly(1000) == DATA[:1000]
    await peer.ended()
    await closing
    with pytest.raises(ClosedError):
        await server.listen(port=0)


async def test_the_end_has_a_limit(tmp_path: Path) -> None:
    source = Slow()
    server = NbdServer({"": source})
    await server.listen_unix(tmp_path / "s")
    peer = await Peer.transmitting(tmp_path / "s")
    peer.ask(wire.CMD_READ, 0, 1000)
    await source.asked.wait()
    await server.aclose(drain=0.05)
    assert not source.reading
    await peer.ended()


async def test_a_client_goes_away(tmp_path: Path) -> None:
    """What it wanted to read is not read any more; what it had written is."""
    source = Slow()
    memory = bytearray(SIZE)
    async with NbdServer({"r": source, "w": MemorySource(memory)}) as server:
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s", "r")
        for cookie in range(5):
            peer.ask(wire.CMD_READ, 0, 1000, cookie=cookie)
        await source.asked.wait()
        peer.writer.transport.abort()
        await until(lambda: not server.stats.clients and not source.reading)
        await peer.close()
        assert server.stats.bytes_outstanding == 0


async def test_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with NbdServer({"": MemorySource(DATA)}) as server:
        await server.listen_unix(path)
        async with NbdServer({"": MemorySource(DATA)}) as second:
            with pytest.raises(OSError, match="in use"):
                await second.listen_unix(path)
            (tmp_path / "file").write_bytes(b"precious")
            with pytest.raises(OSError, match="in use"):
                await second.listen_unix(tmp_path / "file")
            assert (tmp_path / "file").read_bytes() == b"precious"
        assert path.exists()
        # What a killed server left behind is in nobody's way.
        path.rename(tmp_path / "dead")
    async with NbdServer({"": MemorySource(DATA)}) as server:
        await server.listen_unix(tmp_path / "dead")
        await (await Peer.transmitting(tmp_path / "dead")).close()


async def test_wrong_use() -> None:
    memory = MemorySource(b"read-only")
    for exports, options in (
        ({}, {}),
        ({"": memory}, {"writable": True}),
        ({"": memory}, {"tls_required": True}),
        ({"": memory}, {"max_clients": 0}),
        ({"": memory}, {"stall_timeout": 0}),
        ({"x" * 5000: memory}, {}),
    ):
        with pytest.raises(UsageError):
            NbdServer(exports, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------- the core


OFFERS = {"one": Offer(1 << 20, READ_ONLY, description="the first"), "two": Offer(5, READ_ONLY)}


def options() -> list[bytes]:
    go = wire.string("one") + wire.U16.pack(2) + wire.U16.pack(1) + wire.U16.pack(2)
    contexts = wire.string("one") + wire.U32.pack(2) + wire.string("x:y")
    return [
        wire.option(wire.OPT_LIST),
        wire.option(wire.OPT_STRUCTURED_REPLY),
        wire.option(wire.OPT_LIST_META_CONTEXT, wire.string("one") + wire.U32.pack(0)),
        wire.option(wire.OPT_SET_META_CONTEXT, contexts + wire.string(wire.BASE_ALLOCATION)),
        wire.option(wire.OPT_INFO, go),
        wire.option(1234, b"whatever"),
        wire.option(wire.OPT_GO, go),
    ]


def replies(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    while data:
        magic, option, kind, length = wire.OPTION_REPLY.unpack_from(data)
        assert magic == wire.REPLY_MAGIC
        yield option, kind, data[wire.OPTION_REPLY.size :][:length]
        data = data[wire.OPTION_REPLY.size + length :]


def test_a_negotiation_byte_by_byte() -> None:
    negotiation = Negotiation(OFFERS)
    said = GREETING_REST + b"".join(options()) + b"rest"
    rest = b"".join(negotiation.feed(said[at : at + 1]) for at in range(len(said)))
    assert rest == b"rest"
    assert negotiation.chosen == "one"
    assert negotiation.structured
    assert negotiation.allocation
    answers = list(replies(negotiation.take()[wire.GREETING.size :]))
    kinds = [(option, kind & ~wire.REP_FLAG_ERROR) for option, kind, _ in answers]
    assert kinds == [
        (3, 2), (3, 2), (3, 1), (8, 1), (9, 4), (9, 1), (10, 4), (10, 1),
        (6, 3), (6, 3), (6, 3), (6, 3), (6, 1), (1234, 1), (7, 3), (7, 3), (7, 3), (7, 3), (7, 1),
    ]  # fmt: skip
    assert answers[-4][2] == wire.U16.pack(1) + b"one"
    assert answers[-3][2] == wire.U16.pack(2) + b"the first"


def test_contexts_of_another_export_do_not_count() -> None:
    negotiation = Negotiation(OFFERS)
    go = wire.string("two") + wire.U16.pack(0)
    negotiation.feed(GREETING_REST + b"".join(options()[:4]) + wire.option(wire.OPT_GO, go))
    assert negotiation.chosen == "two"
    assert not negotiation.allocation


def test_tls_forgets_what_was_said_in_the_clear() -> None:
    negotiation = Negotiation(OFFERS, tls=True)
    negotiation.feed(GREETING_REST + options()[1] + wire.option(wire.OPT_STARTTLS))
    assert negotiation.wants_tls
    negotiation.tls_started()
    assert not negotiation.structured
    assert not negotiation.wants_tls
    injected = Negotiation(OFFERS, tls=True)
    with pytest.raises(NbdProtocolError):
        injected.feed(GREETING_REST + wire.option(wire.OPT_STARTTLS) + options()[1])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(1, 50), st.sets(st.integers(0, 120)))
def test_parts_against_a_set(offset: int, length: int, zeros: set[int]) -> None:
    holes: list[tuple[int, int]] = []
    for place in sorted(zeros):
        if holes and sum(holes[-1]) == place:
            holes[-1] = (holes[-1][0], holes[-1][1] + 1)
        else:
            holes.append((place, 1))
    at = offset
    for start, count, zero in server_core.parts(offset, length, holes):
        assert start == at
        assert count > 0
        assert all((place in zeros) == zero for place in range(start, start + count))
        at += count
    assert at == offset + length


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve(number: int, tmp_path: Path) -> None:
    need("nbdcopy")
    image, copy, back = tmp_path / "image", tmp_path / "copy", tmp_path / "back"
    image.write_bytes(DATA)
    where = ["--socket", str(tmp_path / "s")] if number == signal.SIGINT else ["--port", "0"]
    process = serve(str(image), "--writable", "--export", "disk", *where)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        subprocess.run(["nbdcopy", url, str(copy)], check=True, timeout=20)
        assert copy.read_bytes() == DATA
        back.write_bytes(bytes(reversed(DATA)))
        subprocess.run(["nbdcopy", str(back), url], check=True, timeout=20)
        assert image.read_bytes() == bytes(reversed(DATA))
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0, said
        assert "2 clients" in said or "clients" in said
    finally:
        process.kill()
        process.communicate()


def test_the_former_name_of_the_command(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x")
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", "serve", image, "--nbd", "--key", "k"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2
    assert "`aiouffd serve` is called `aiouffd nbd` now" in done.stderr
    assert "--key and --client-ca go with --cert" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["/nothing/like/that"],
        ["{image}", "--socket", "s", "--port", "1"],
        ["{image}", "--key", "k"],
        ["{image}", "--cert", "/nothing/like/that"],
    ],
)
def test_serve_refuses(arguments: list[str], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x")
    process = serve(*(argument.format(image=image) for argument in arguments))
    out, said = process.communicate(timeout=20)
    assert process.returncode in (1, 2)
    assert not out
    assert "Traceback" not in said
    assert said


# ------------------------------------------------------------- writable files


async def test_file_writes(tmp_path: Path) -> None:
    async with file(tmp_path / "image", writable=True) as source:
        await check_writes(source, tmp_path)
    async with file(tmp_path / "image") as reader:
        with pytest.raises(UnsupportedError):
            await reader.write(0, b"x")


async def check_writes(source: FileSource, tmp_path: Path) -> None:
    image = tmp_path / "image"
    part = SliceSource(source, 1 << 20, 1 << 20)
    await part.write(10, b"in the middle")
    await part.write_zeros(4096 * 4, 4096 * 4, hole=True)
    await part.flush()
    assert image.read_bytes()[(1 << 20) + 10 :][:13] == b"in the middle"
    assert await part.holes(0, 1 << 20) == [(4096 * 4, 4096 * 4)]
    await part.write_zeros(0, 64, hole=False)
    assert not any(image.read_bytes()[1 << 20 :][:64])
    with pytest.raises(UsageError):
        await source.write(SIZE - 1, b"xx")


async def test_holes_of_a_file_that_changes(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    source = FileSource(image)
    await source.open()
    assert await source.holes(100, 1000) == [(100, 1000)]
    os.utime(image, ns=(1, 1))
    with pytest.raises(SourceChangedError):
        await source.holes(0, SIZE)
    await source.aclose()


# ---------------------------------------------------------------------- torture


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    """A buffer in one thread over our client, and our server in another."""
    found = result_of(torture.torture, loop_name, "served", "anonymous", errors, 400, 6, limit=60.0)
    assert found["retries"] > 0
    if errors == "hard":
        assert found["refused"] == 0
