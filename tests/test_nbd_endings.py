"""NBD sources, servers, and files are opened and closed once, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import ssl
import weakref
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
import trustme

from aiouffd.errors import AiouffdError, ClosedError, SourceError
from aiouffd.nbd import NbdServer, pool, wire
from aiouffd.nbd.source import NbdSource
from aiouffd.sources.base import Buffer
from aiouffd.sources.file import FileSource
from aiouffd.sources.memory import MemorySource
from tests.cancelling import BY_CALLER, EVERY_WAY, Cut, Way, cancel_everywhere
from tests.nbd_peers import Peer, Slow, opened, until
from tests.test_nbd_bad_servers import Server, speaking
from tests.test_nbd_promises import Disk, Plain

MIB = 1 << 20


class Yielding(MemorySource):
    """Memory whose answers come a few turns of the loop later, and are whole or nothing."""

    async def read(self, offset: int, length: int) -> Buffer:
        await asyncio.sleep(0)
        return await super().read(offset, length)

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        await asyncio.sleep(0)
        middle = max(offset, self.size // 2)
        return [(middle, offset + length - middle)] if middle < offset + length else []

    async def write(self, offset: int, data: Buffer) -> None:
        await asyncio.sleep(0)
        await super().write(offset, data)

    async def flush(self) -> None:
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[tuple[NbdServer, str]]:
    async with NbdServer({"": Yielding(bytearray(MIB))}, writable=True) as server:
        yield server, await server.listen_unix(path)


async def grown(source: NbdSource, more: int) -> None:
    await until(lambda: source.connected == more)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------ cancelled at every await


@pytest.mark.parametrize("what", ["open", "read", "write", "zeros", "flush", "aclose"])
async def test_a_source_that_is_cancelled_anywhere(what: str, tmp_path: Path) -> None:
    """Nothing is left behind, and what was not cancelled works."""
    async with serving(tmp_path / "s") as (server, url):

        def operation(source: NbdSource) -> Coroutine[Any, Any, Any]:
            operations = {
                "open": source.open,
                "read": lambda: source.read(5, 100_000),
                "write": lambda: source.write(0, b"x" * 512),
                "zeros": lambda: source.write_zeros(0, 512, hole=True),
                "flush": source.flush,
                "aclose": source.aclose,
            }
            return operations[what]()

        async def run(cut: Cut) -> None:
            source = NbdSource(url, writable=True, connections=2)
            try:
                if what != "open":
                    await source.open()
                if what == "flush":
                    await source.write(0, b"x" * 512)
                await cut.quiet(operation(source))
                if what == "open":
                    await source.open()
                if what == "aclose":
                    with pytest.raises(ClosedError):
                        await source.read(0, 1)
                else:
                    assert len(await source.read(0, 1000)) == 1000
                    await source.write(0, b"y" * 512)
                    assert await source.read(0, 512) == b"y" * 512
            finally:
                await source.aclose()

        ways = EVERY_WAY if what in ("open", "aclose") else BY_CALLER
        if what == "aclose":
            # By somebody who cancels all there is, as `asyncio.run` does: see below.
            ways = BY_CALLER
        await cancel_everywhere(run, ways=ways, also=lambda: {"clients": server.stats.clients})


async def test_closing_a_source_with_all_tasks_cancelled(tmp_path: Path) -> None:
    """As at the end of `asyncio.run`: what can be done without waiting is done."""
    async with serving(tmp_path / "s") as (server, url):

        async def run(cut: Cut) -> None:
            source = NbdSource(url, writable=True, connections=2)
            await source.open()
            await cut.quiet(source.aclose())

        await cancel_everywhere(
            run, ways=[Way.ALL, Way.TASK], also=lambda: {"clients": server.stats.clients}
        )


async def test_a_reconnect_that_is_cancelled_anywhere(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (server, url):

        async def run(cut: Cut) -> None:
            async with opened(NbdSource(url, connections=1)) as source:
                source._live[0].abort()
                await until(lambda: not source._live)
                await cut(source.read(0, 100))
                assert len(await source.read(0, 100)) == 100

        await cancel_everywhere(run, also=lambda: {"clients": server.stats.clients})


async def test_a_server_that_is_cancelled_anywhere_while_it_ends(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        slow = Slow()
        server = NbdServer({"": slow})
        await server.listen_unix(tmp_path / "s")
        peer = await Peer.transmitting(tmp_path / "s")
        peer.ask(wire.CMD_READ, 0, 8)
        await slow.asked.wait()
        asyncio.get_running_loop().call_later(0.01, slow.gate.set)
        await cut.quiet(server.aclose())
        await server.aclose()
        assert not server.stats.clients
        assert not (tmp_path / "s").exists()
        await peer.ended()

    await cancel_everywhere(run, ways=EVERY_WAY)


@pytest.mark.parametrize("where", ["unix", "tcp"])
async def test_listening_that_is_cancelled_anywhere(where: str, tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def run(cut: Cut) -> None:
        server = NbdServer({"": MemorySource(b"x")})

        async def listening() -> None:
            await asyncio.sleep(0)  # uvloop has nothing to wait for
            await (server.listen_unix(path) if where == "unix" else server.listen(port=0))

        await cut.quiet(listening())
        await server.aclose()
        assert not path.exists()

    await cancel_everywhere(run)


async def test_a_file_that_is_cancelled_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)

    async def run(cut: Cut) -> None:
        source = FileSource(path)
        await cut.quiet(source.open())
        await source.open()
        assert await source.read(0, 4) == b"xxxx"
        await source.aclose()

    await cancel_everywhere(run)


# ----------------------------------------------------------------------- once


@pytest.mark.parametrize("kind", ["nbd", "file"])
async def test_opened_twice_at_once(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    async with serving(tmp_path / "s") as (server, url):
        before = descriptors()
        source: Any = FileSource(tmp_path / "file")
        if kind == "nbd":
            source = NbdSource(url, connections=1)
        await asyncio.gather(*(source.open() for _ in range(3)))
        assert server.stats.clients == (kind == "nbd")
        await asyncio.gather(*(source.aclose() for _ in range(3)))
        await until(lambda: descriptors() <= before)
        with pytest.raises(ClosedError):
            await source.open()


@pytest.mark.parametrize("kind", ["nbd", "file"])
async def test_closed_while_it_is_opened(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    async with serving(tmp_path / "s") as (server, url):
        before = descriptors()
        for turns in range(30):
            source: Any = NbdSource(url) if kind == "nbd" else FileSource(tmp_path / "file")
            opening = asyncio.create_task(source.open())
            for _ in range(turns):
                await asyncio.sleep(0)
            await source.aclose()
            with contextlib.suppress(ClosedError, asyncio.CancelledError):
                await opening
            with pytest.raises(AiouffdError):
                await source.read(0, 1)
        await until(lambda: descriptors() <= before and not server.stats.clients)


async def test_opening_that_failed_can_be_repeated(tmp_path: Path) -> None:
    source = NbdSource(f"nbd+unix:///?socket={tmp_path}/s")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            await source.open()
    async with serving(tmp_path / "s"):
        await source.open()
        assert len(await source.read(0, 10)) == 10
        await source.aclose()


async def test_a_server_that_does_not_take_our_goodbye(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "GOODBYE", 0.05)

    async def stuck(server: Server, _number: int) -> None:
        server.writer.transport.pause_reading()
        await asyncio.Event().wait()

    async with speaking(tmp_path / "s", Plain(stuck, 64 * MIB)) as url:
        source = NbdSource(url, writable=True)
        await source.open()
        writing = asyncio.create_task(source.write(0, bytes(32 * MIB)))
        await until(lambda: source._live[0].outstanding > 0)
        async with asyncio.timeout(5):
            await source.aclose()
        with pytest.raises(ClosedError):
            await writing


async def test_closing_during_a_flush_and_a_reconnect(tmp_path: Path) -> None:
    async def deaf(server: Server, _number: int) -> None:
        await server.request()
        await server.reader.read()

    async with speaking(tmp_path / "s", Plain(deaf)) as url:
        source = NbdSource(url, writable=True)
        await source.open()
        flushing = asyncio.create_task(source.flush())
        await asyncio.sleep(0)
        await source.aclose()
        with pytest.raises((ClosedError, SourceError)):
            await flushing
    async with serving(tmp_path / "t") as (_, url):
        away = NbdSource(url, connections=1)
        await away.open()
    await until(lambda: not away._live)
    reading = asyncio.create_task(away.read(0, 1))
    for _ in range(3):
        await asyncio.sleep(0)
    await away.aclose()
    with pytest.raises(ClosedError):
        await reading


async def test_a_server_closed_while_it_begins_to_listen(tmp_path: Path) -> None:
    for turns in range(6):
        server = NbdServer({"": MemorySource(b"x")})
        listening = [
            asyncio.create_task(server.listen(port=0)),
            asyncio.create_task(server.listen_unix(tmp_path / "s")),
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        await server.aclose()
        for end in await asyncio.gather(*listening, return_exceptions=True):
            assert isinstance(end, str | ClosedError)
        assert not (tmp_path / "s").exists()
        assert not server._listeners


async def test_a_second_close_waits_for_the_first(tmp_path: Path) -> None:
    disk = Disk()
    gate = asyncio.Event()
    disk.gates = [gate]
    server = NbdServer({"": disk}, writable=True)
    await server.listen_unix(tmp_path / "s")
    peer = await Peer.transmitting(tmp_path / "s")
    peer.ask(wire.CMD_WRITE, 0, 4, b"abcd")
    await disk.begun.wait()
    first = asyncio.create_task(server.aclose(1000))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(server.aclose(2000))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not second.done()
    gate.set()
    assert await peer.answer() == (0, 1)
    await peer.ended()
    await second
    assert disk.data[:4] == b"abcd"


# ------------------------------------------------------------------- dropped


async def test_a_source_that_is_dropped_is_collected_with_its_connections(tmp_path: Path) -> None:
    """Without the garbage collector as far as the source goes."""
    async with serving(tmp_path / "s") as (server, url):
        before = descriptors()
        source = NbdSource(url, writable=True, connections=3)
        await source.open()
        await grown(source, 2)
        await source.write(0, b"x")
        assert len(await source.read(0, 100)) == 100
        await source.flush()
        gone = [weakref.ref(source), *map(weakref.ref, source._live)]
        gc.disable()
        try:
            with pytest.warns(ResourceWarning, match="unclosed"):
                del source
            assert gone[0]() is None
        finally:
            gc.enable()
        await until(lambda: not server.stats.clients and descriptors() <= before)
        gc.collect()
        assert [each() for each in gone] == [None] * 4


async def test_a_source_that_is_closed_leaves_no_cycle(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (_, url):
        gc.collect()
        gc.disable()
        try:
            source = NbdSource(url, writable=True, connections=2)
            await source.open()
            await source.write(0, b"x" * 512)
            assert await source.holes(0, MIB)
            connections = [weakref.ref(each) for each in source._live]
            its_pool = weakref.ref(source._pool)
            await source.aclose()
            del source
            await until(lambda: its_pool() is None and not any(each() for each in connections), 2)
        finally:
            gc.enable()


async def test_a_source_that_is_dropped_while_it_grows(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (server, url):
        before = descriptors()
        source = NbdSource(url, connections=4)
        await source.open()
        with pytest.warns(ResourceWarning, match="unclosed"):
            del source
        await until(lambda: not server.stats.clients and descriptors() <= before)


@pytest.mark.filterwarnings("ignore:unclosed", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_source_whose_loop_is_gone(tmp_path: Path) -> None:
    async def main() -> NbdSource:
        server = NbdServer({"": MemorySource(bytes(MIB))})
        url = await server.listen_unix(tmp_path / "s")
        source = NbdSource(url)
        await source.open()
        await server.aclose(drain=0)
        return source

    before = descriptors()
    source = asyncio.run(main())
    del source
    gc.collect()
    assert descriptors() <= before


async def test_opening_with_tls_that_is_cancelled_anywhere() -> None:
    authority = trustme.CA()
    theirs, ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    # By its address, for looking up a name takes threads that stay.
    authority.issue_cert("127.0.0.1").configure_cert(theirs)
    authority.configure_trust(ours)
    exports = {"": Yielding(bytearray(MIB))}
    async with NbdServer(exports, tls=theirs, tls_required=True) as server:
        url = await server.listen(port=0)

        async def run(cut: Cut) -> None:
            source = NbdSource(url, tls=ours, connections=1)
            await cut.quiet(source.open())
            await source.open()
            assert len(await source.read(0, 10)) == 10
            await source.aclose()

        await cancel_everywhere(run, also=lambda: {"clients": server.stats.clients})
