"""Opening and closing servers, their parts and their clients, cancelled wherever they wait."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import Mode, Userfaultfd, serve
from aiouffd.errors import AiouffdError, ClosedError, KernelError
from aiouffd.foreign import ending
from aiouffd.foreign.blocks import BlockStore
from aiouffd.kernel.uffd import address_of
from aiouffd.serve.criu import CriuServer
from aiouffd.serve.stores import Stores
from aiouffd.sources import FunctionSource
from tests.cancelling import BY_CALLER, EVERY_WAY, Cut, Way, cancel_everywhere
from tests.criu import images as written
from tests.guests import AREA, COUNT, PlainDialect
from tests.servers.pager import PagerProcess
from tests.support import Gate, content
from tests.test_criu_dialect import tree
from tests.test_serve import until

PAGE = 4096
SIZE = 64 * PAGE
DATA = content(SIZE)


class Slow(FunctionSource):
    """Takes its time to open and to close, and counts."""

    is_open = 0

    def __init__(self) -> None:
        super().__init__(self._bytes, size=SIZE)

    async def _bytes(self, offset: int, length: int) -> bytes:
        return DATA[offset : offset + length]

    async def open(self) -> None:
        await asyncio.sleep(0)
        Slow.is_open += 1
        try:
            await asyncio.sleep(0)
        except BaseException:
            Slow.is_open -= 1
            raise
        self.mine = True

    async def aclose(self) -> None:
        # Whatever needs no waiting is done in any case, as sources have to.
        try:
            await asyncio.sleep(0)
        finally:
            if getattr(self, "mine", False):
                self.mine = False
                Slow.is_open -= 1


def open_sources() -> dict[str, int]:
    return {"sources": Slow.is_open}


@pytest.fixture(autouse=True)
def _all_sources_are_closed() -> Iterator[None]:
    Slow.is_open = 0
    yield
    assert Slow.is_open == 0


@contextlib.contextmanager
def client(path: Path) -> Iterator[None]:
    """Memory of this process that the server there fills, if it likes."""
    with (
        mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE, user_mode_only=None) as uffd,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        del first
        uffd.register(address, SIZE, aiouffd.Mode.MISSING)
        connection.connect(str(path))
        socket.send_fds(connection, [COUNT.pack(1)], [uffd.fileno()])
        connection.sendall(AREA.pack(address, SIZE, 0))
        yield
        uffd.unregister(address, SIZE)


def server_at(path: Path, **options: Any) -> serve.Server:
    return serve.listen(path, source=Slow(), dialect=PlainDialect(), **options)


# -------------------------------------------------------------------------- servers


async def test_opening_a_server(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        server = server_at(tmp_path / "s")
        try:
            await cut.quiet(server.open())
            if cut.cancelled:
                assert os.listdir(tmp_path) == []
        finally:
            await server.aclose()
        assert os.listdir(tmp_path) == []

    await cancel_everywhere(run, ways=EVERY_WAY, also=open_sources)


async def test_a_server_whose_opening_was_cancelled_can_be_opened(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        # Not a source that is closed for good.
        server = serve.listen(tmp_path / "s", source=DATA, dialect=PlainDialect())
        await cut(server.open())
        async with server:
            with client(tmp_path / "s"):
                await until(lambda: server.clients != [])

    await cancel_everywhere(run)


async def test_closing_a_server_with_clients(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        server = server_at(tmp_path / "s")
        await server.open()
        with client(tmp_path / "s"), client(tmp_path / "s"):
            async with asyncio.timeout(10):
                for _ in range(2):
                    await server.dialect.memories.get()  # type: ignore[attr-defined]
            await cut.quiet(server.aclose())
            if not cut.reached:
                assert server.clients == []
            await server.aclose()
            assert server.clients == []
            assert os.listdir(tmp_path) == []

    await cancel_everywhere(run, ways=EVERY_WAY, also=open_sources)


async def test_closing_a_server_that_waits_for_its_source(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        gate = Gate(DATA, is_open=False)
        source = FunctionSource(gate.read, size=SIZE)
        server = serve.listen(tmp_path / "s", source=source, dialect=PlainDialect())
        await server.open()
        with client(tmp_path / "s"):
            async with asyncio.timeout(10):
                memory = await server.dialect.memories.get()  # type: ignore[attr-defined]
            server.clients[0].complete_on_close = True
            server.clients[0]._run(memory.complete)
            await asyncio.to_thread(gate.wait)
            closing = asyncio.ensure_future(server.aclose())
            await asyncio.sleep(0)
            gate.open()
            await cut.quiet(server.aclose())  # both wait for the same
            await closing
            assert memory.closed

    await cancel_everywhere(run, ways=BY_CALLER, step=5)


async def test_one_gives_closing_up_and_another_waits(tmp_path: Path) -> None:
    """What clients are owed is brought for as long as anybody waits for that."""
    gate = Gate(DATA, is_open=False)
    source = FunctionSource(gate.read, size=SIZE)
    server = serve.listen(tmp_path / "s", source=source, dialect=PlainDialect())
    await server.open()
    with client(tmp_path / "s"):
        async with asyncio.timeout(10):
            memory = await server.dialect.memories.get()  # type: ignore[attr-defined]
        server.clients[0].complete_on_close = True
        one, two = (asyncio.ensure_future(server.aclose()) for _ in range(2))
        await asyncio.to_thread(gate.wait)
        one.cancel()
        await asyncio.wait((one,))
        assert one.cancelled()
        assert not memory.closed
        gate.open()
        async with asyncio.timeout(10):
            await two
        assert memory.closed
        assert memory.stats.installed_bytes == SIZE
        assert memory.stats.poisoned_pages == 0


async def test_closing_while_it_opens(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        server = server_at(tmp_path / "s")
        opening = asyncio.ensure_future(server.open())
        await asyncio.sleep(0)
        await cut.quiet(server.aclose())
        with pytest.raises(ClosedError):
            await opening
        await server.aclose()
        with pytest.raises(ClosedError):
            await server.open()
        assert os.listdir(tmp_path) == []

    await cancel_everywhere(run, ways=BY_CALLER, also=open_sources)


async def test_opening_twice_at_once(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        server = server_at(tmp_path / "s")
        other = asyncio.ensure_future(server.open())
        await cut(server.open())
        assert await other is server
        with client(tmp_path / "s"):
            await until(lambda: server.clients != [])
            await server.aclose()

    await cancel_everywhere(run, ways=BY_CALLER, also=open_sources)


async def test_closing_one_that_was_never_opened(tmp_path: Path) -> None:
    server = server_at(tmp_path / "s")
    await server.aclose()
    await server.aclose()


class Failing(Slow):
    async def aclose(self) -> None:
        await super().aclose()
        raise OSError("it does not want to")


async def test_a_part_that_cannot_be_closed_keeps_no_other_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0
    real = serve.Memory.close

    def close(self: serve.Memory) -> None:
        nonlocal calls
        calls += 1
        real(self)
        if calls == 1:
            raise RuntimeError("a bug")

    async def on_client(one: serve.Client) -> None:
        one.source = await one.store_for(Failing())

    monkeypatch.setattr(serve.Memory, "close", close)
    server = server_at(tmp_path / "s", on_client=on_client)
    await server.open()
    with client(tmp_path / "s"), client(tmp_path / "s"):
        async with asyncio.timeout(10):
            for _ in range(2):
                await server.dialect.memories.get()  # type: ignore[attr-defined]
        await server.aclose()
    assert calls == 2
    assert "a bug" in caplog.text
    assert "does not want to" in caplog.text


# ------------------------------------------------------------------------ hand-over


@pytest.mark.parametrize("way", [Way.CALLER, Way.LATE, Way.ALL])
async def test_a_successor_that_is_cancelled(tmp_path: Path, way: Way) -> None:
    """The first server goes on, or the client waits for the next one; nothing is left behind."""

    async def run(cut: Cut) -> None:
        old = server_at(tmp_path / "s")
        await old.open()
        with client(tmp_path / "s"):
            async with asyncio.timeout(10):
                await old.dialect.memories.get()  # type: ignore[attr-defined]
            new = server_at(tmp_path / "s", take_over=True)
            try:
                await cut.quiet(new.open())
                if not cut.reached:
                    assert len(new.clients) == 1
            finally:
                await new.aclose()
                await old.aclose()
        # Cancelled as the old one had just let go, nobody removes the socket; but it is replaced.
        assert os.listdir(tmp_path) in ([], ["s"])
        async with server_at(tmp_path / "s"):
            pass
        assert os.listdir(tmp_path) == []

    await cancel_everywhere(run, ways=[way], also=open_sources, step=3)


async def test_a_server_that_closes_while_it_hands_over(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        old = server_at(tmp_path / "s")
        await old.open()
        with client(tmp_path / "s"):
            async with asyncio.timeout(10):
                await old.dialect.memories.get()  # type: ignore[attr-defined]
            new = server_at(tmp_path / "s", take_over=True)
            opening = asyncio.ensure_future(new.open())
            await asyncio.sleep(0)
            await cut.quiet(old.aclose())
            with contextlib.suppress(AiouffdError, OSError):
                await opening
            await new.aclose()
            await old.aclose()
        assert os.listdir(tmp_path) == []

    await cancel_everywhere(run, ways=BY_CALLER, also=open_sources)


# --------------------------------------------------------------------------- stores


async def test_opening_and_closing_a_store() -> None:
    async def run(cut: Cut) -> None:
        store = BlockStore(Slow())
        await cut.quiet(store.open())
        await store.aclose()
        with pytest.raises(ClosedError):
            await store.open()

    await cancel_everywhere(run, ways=EVERY_WAY, also=open_sources)

    async def end(cut: Cut) -> None:
        store = BlockStore(Slow())
        await store.open()
        await cut.quiet(store.aclose())
        await store.aclose()

    await cancel_everywhere(end, ways=EVERY_WAY, also=open_sources)


async def test_getting_a_store(tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(DATA)

    async def run(cut: Cut) -> None:
        stores = Stores(block_size=PAGE)
        try:
            await stores.get(str(tmp_path / "object"), {}, "one")
            await cut.quiet(stores.get(str(tmp_path / "object"), {}, "two"))
            await stores.get(str(tmp_path / "object"), {}, "three")
        finally:
            await stores.aclose()
        with pytest.raises(ClosedError):
            await stores.get(str(tmp_path / "object"), {}, "two")

    await cancel_everywhere(run, ways=EVERY_WAY)


async def test_closing_stores(tmp_path: Path) -> None:
    async def run(cut: Cut) -> None:
        stores = Stores(block_size=PAGE)
        for _ in range(3):
            await stores.get(Slow(), {}, "one")
        opening = asyncio.ensure_future(stores.get(Slow(), {}, "two"))
        await asyncio.sleep(0)
        await cut.quiet(stores.aclose())
        await stores.aclose()
        with pytest.raises(ClosedError):
            await opening

    await cancel_everywhere(run, ways=BY_CALLER, also=open_sources)


# ----------------------------------------------------------------------------- CRIU


async def test_a_server_of_images(tmp_path: Path) -> None:
    written.write(tmp_path, written.dump(tree()))
    before = sorted(os.listdir(tmp_path))

    async def run(cut: Cut) -> None:
        server = CriuServer(tmp_path)
        try:
            await cut.quiet(server.__aenter__())
        finally:
            await server.aclose()
        assert sorted(os.listdir(tmp_path)) == before

    await cancel_everywhere(run, ways=BY_CALLER)

    async def end(cut: Cut) -> None:
        server = CriuServer(tmp_path)
        await server.__aenter__()
        await cut.quiet(server.aclose())
        await server.aclose()
        assert sorted(os.listdir(tmp_path)) == before

    await cancel_everywhere(end, ways=EVERY_WAY)


# --------------------------------------------------------------------------- attach


@pytest.fixture
def pager(tmp_path: Path) -> Iterator[PagerProcess]:
    server = PagerProcess("pager", tmp_path, SIZE)
    server.start()
    yield server
    server.kill()


async def test_attaching(pager: PagerProcess) -> None:
    async def run(cut: Cut) -> None:
        memory = aiouffd.attach(pager.path)
        await cut(memory.aopen())
        if cut.cancelled:
            await memory.aopen()  # it can be tried again
        assert memory[:8] == DATA[:8]
        await memory.aclose()

    await cancel_everywhere(run, ways=BY_CALLER)


async def test_closing_an_attachment(pager: PagerProcess) -> None:
    async def run(cut: Cut) -> None:
        memory = aiouffd.attach(pager.path)
        await memory.aopen()
        await cut.quiet(memory.aclose())
        await memory.aclose()
        with pytest.raises(ClosedError):
            memory[:8]

    await cancel_everywhere(run, ways=EVERY_WAY)


async def test_one_of_two_who_attach_is_cancelled(pager: PagerProcess) -> None:
    async def run(cut: Cut) -> None:
        memory = aiouffd.attach(pager.path)
        other = asyncio.ensure_future(memory.aopen())
        await cut(memory.aopen())
        assert await other is memory
        assert memory[:8] == DATA[:8]
        await memory.aclose()

    await cancel_everywhere(run, ways=BY_CALLER)


@pytest.mark.parametrize("how", ["aopen", "open"])
async def test_closing_ends_who_waits_for_a_server(tmp_path: Path, how: str) -> None:
    memory = aiouffd.attach(tmp_path / "s", timeout=None)
    if how == "aopen":
        opening: Any = asyncio.ensure_future(memory.aopen())
    else:
        opening = asyncio.ensure_future(asyncio.to_thread(memory.open))
    await until(lambda: bool(memory._attempts))
    async with asyncio.timeout(5):
        await memory.aclose()
        with pytest.raises(ClosedError):
            await opening
    with pytest.raises(ClosedError):
        await memory.aopen()


async def test_a_refusal_that_is_cancelled_leaves_no_zeros() -> None:
    """The descriptor is the last one, and what is missing when it closes reads as zeros."""
    length = 4 * ending.PIECE * PAGE
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = address_of(memory)
    with Userfaultfd(user_mode_only=None) as uffd:
        uffd.register(start, length, Mode.MISSING)
        copy = os.dup(uffd.fileno())
        refusal = asyncio.create_task(ending.refuse(copy, [(start, length, PAGE)], "a child"))
        await asyncio.sleep(0)  # so that the first piece is made
        await asyncio.sleep(0)
        refusal.cancel()
        with pytest.raises(asyncio.CancelledError):
            await refusal
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(copy)
        for page in range(0, length, ending.PIECE * PAGE // 2):
            with pytest.raises(KernelError, match="exist"):  # as an error is there
                uffd.zeropage(start + page, PAGE)
    memory.close()
