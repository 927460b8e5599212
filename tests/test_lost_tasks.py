"""Tasks of ours that somebody cancels before their first step: nobody waits for ever for that."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import socket
import ssl
import sys
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import aiouffd
from aiouffd import serve
from aiouffd.errors import AiouffdError
from aiouffd.nbd import NbdServer
from aiouffd.nbd.source import NbdSource
from aiouffd.regions.rescue import service
from aiouffd.serve.handover import HELLO
from aiouffd.sources.durability import Flusher, Promises
from aiouffd.sources.function import FunctionSource
from aiouffd.sources.memory import MemorySource
from aiouffd.util.once import Once
from aiouffd.util.tasks import FIRST_TURN, begin, begin_coroutine, begin_surely
from tests.guests import PlainDialect, guest
from tests.losing import losing
from tests.nbd_peers import opened, until
from tests.support import Gate, content, wait_until, word

SIZE = 1 << 20
DATA = content(SIZE)
PAGE = 4096
PAGES = SIZE // PAGE
#: Seconds in which what is to come has come.
LIMIT = 10.0


@pytest.fixture
async def eager() -> AsyncIterator[None]:
    """The loop of the test begins tasks at once."""
    if sys.version_info < (3, 12):
        pytest.skip("tasks can begin at once from 3.12 on")
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)

    async def nothing() -> None:
        pass

    coroutine = nothing()
    try:
        await loop.create_task(coroutine)
    except TypeError as error:
        coroutine.close()
        loop.set_task_factory(None)
        pytest.skip(f"this loop's create_task cannot: {error}")
    yield
    loop.set_task_factory(None)


async def test_a_task_that_is_lost_says_so() -> None:
    said: list[str] = []

    async def function() -> None:
        said.append("begun")

    task = begin(function, lambda: said.append("lost"))
    task.add_done_callback(lambda _: said.append("done"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert said == ["lost", "done"]
    said.clear()
    await begin(function, lambda: said.append("lost"))
    assert said == ["begun"]


async def test_a_coroutine_is_told_where_it_awaits_its_first_turn() -> None:
    said: list[str] = []

    async def function() -> None:
        try:
            await FIRST_TURN
            said.append("begun")
        except asyncio.CancelledError:
            said.append("lost")
            raise
        finally:
            said.append("ended")

    loop = asyncio.get_running_loop()
    task = begin_coroutine(function(), loop)
    assert not said
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert said == ["lost", "ended"]
    said.clear()
    await begin_coroutine(function(), loop)
    assert said == ["begun", "ended"]


async def test_what_no_task_could_be_made_for_is_closed() -> None:
    said: list[str] = []

    async def function() -> None:
        said.append("begun")

    def refuse(*_: object, **__: object) -> Any:
        raise RuntimeError("no task")

    loop = asyncio.get_running_loop()
    loop.set_task_factory(refuse)
    try:
        with pytest.raises(RuntimeError, match="no task"):
            begin(function, lambda: said.append("lost"))
    finally:
        loop.set_task_factory(None)
    gc.collect()
    # Who made it is told by the error.
    assert said == []


async def test_a_task_that_has_to_be_is_begun_again() -> None:
    begun = asyncio.Event()
    made: list[asyncio.Task[None]] = []

    async def function() -> None:
        begun.set()

    with losing("function", times=3) as factory:
        begin_surely(function, made.append)
        async with asyncio.timeout(LIMIT):
            await begun.wait()
    assert factory.lost == 3
    assert len(made) == 4


async def test_a_factory_that_begins_at_once_has_to_wait(eager: None) -> None:
    noted: list[Any] = []

    async def function() -> int:
        return len(noted)

    task = begin(function)
    noted.append(task)
    assert not task.done()
    assert await task == 1


# ---------------------------------------------------------------------- buffers


async def in_time(future: Any) -> Any:
    async with asyncio.timeout(LIMIT):
        return await future


def touch(view: memoryview, offset: int) -> int:
    """As a raw touch does it; in a thread."""
    return int.from_bytes(view[offset : offset + 8], "little")


@pytest.mark.parametrize("how", ["touch", "fetch", "index"])
async def test_a_flight(how: str) -> None:
    # Small blocks of memory fly without a task.
    source = FunctionSource(Gate(DATA).read, size=SIZE)
    async with aiouffd.open(source, block_size=65536, readahead=0) as buf:
        with losing("Flights._fly") as factory:
            if how == "touch":
                found = await in_time(asyncio.to_thread(touch, buf.view, 8 * PAGE))
            elif how == "index":
                found = int.from_bytes(
                    await in_time(asyncio.to_thread(lambda: buf[8 * PAGE : 8 * PAGE + 8])), "little"
                )
            else:
                with contextlib.suppress(AiouffdError):
                    await in_time(buf.fetch(8 * PAGE, PAGE))
                found = int.from_bytes(await in_time(buf.read(8 * PAGE, 8)), "little")
        assert factory.lost == 1
        assert found == word(8 * PAGE)


async def test_a_flight_of_readahead() -> None:
    source = FunctionSource(Gate(DATA).read, size=SIZE)
    async with aiouffd.open(source, block_size=65536) as buf:
        with losing("Flights._fly", times=6) as factory:
            for offset in range(0, SIZE, 65536):
                found = await in_time(asyncio.to_thread(touch, buf.view, offset))
                assert found == word(offset)
        assert factory.lost == 6


async def test_handlers() -> None:
    async with aiouffd.Pager() as pager:
        region = pager.map(SIZE)

        @region.on_missing
        async def fill(fault: aiouffd.Fault) -> None:
            await asyncio.sleep(0)
            fault.copy(DATA[fault.offset : fault.offset + fault.length])

        with losing("_serve", times=2) as factory:
            for page in range(0, 40, 3):
                found = await in_time(asyncio.to_thread(touch, region.view, page * PAGE))
                assert found == word(page * PAGE)
        # From 3.12 on they are begun at once.
        assert factory.lost == (2 if sys.version_info < (3, 12) else 0)


def rescue_loop() -> asyncio.AbstractEventLoop:
    """The background loop, once it is there."""
    found: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
    service.call_soon(lambda: found.set_result(asyncio.get_running_loop()))
    return found.result(LIMIT)


async def test_the_start_of_a_rescue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_reported", set())  # it is told once for each place
    source = MemorySource(DATA)
    async with aiouffd.open(Plain(source), block_size=65536, readahead=0) as buf:
        loop = await asyncio.to_thread(rescue_loop)
        with (
            losing("BufferSink._start_rescuer", loop=loop) as factory,
            warnings.catch_warnings(record=True) as told,
        ):
            warnings.simplefilter("always")
            assert touch(buf.view, 5 * PAGE) == word(5 * PAGE)
            await until(lambda: bool(told))
        assert factory.lost == 1
        assert {warning.category for warning in told} == {aiouffd.BlockingTouchWarning}


class Plain:
    """Another source, whose bytes have to be asked for."""

    def __init__(self, inner: MemorySource) -> None:
        self._inner = inner
        self.size = inner.size

    async def read(self, offset: int, length: int) -> Any:
        await asyncio.sleep(0)
        return bytes(await self._inner.read(offset, length))

    def clone(self) -> Plain:
        return Plain(self._inner)


async def test_what_an_opening_leaves_for_nobody() -> None:
    """It is taken back, though the task that does so is lost at first."""
    undone = asyncio.Event()
    opening: Once[None] = Once("opening", abandon=True)
    reached = asyncio.Event()

    async def operation() -> None:
        reached.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(LIMIT)

    async def undo() -> None:
        undone.set()

    caller = asyncio.ensure_future(opening(operation, undo))
    await reached.wait()
    with losing("undo") as factory:
        caller.cancel()
        await asyncio.wait((caller,))
        await in_time(undone.wait())
    assert factory.lost == 1


# ------------------------------------------------------------------------ serving


@contextlib.asynccontextmanager
async def serving(
    path: Path, source: Any = DATA, **options: Any
) -> AsyncIterator[tuple[serve.Server, PlainDialect]]:
    dialect = PlainDialect()
    async with serve.listen(path, source=source, dialect=dialect, **options) as server:
        yield server, dialect


async def test_a_block_of_a_served_client(tmp_path: Path) -> None:
    source = FunctionSource(Gate(DATA).read, size=SIZE)
    async with serving(tmp_path / "s", source), guest(tmp_path / "s", PAGES) as one:
        with losing("Flights._fly", times=2) as factory:
            assert await one.ask("word", 7) == word(7 * PAGE)
            assert await one.ask("word", 100) == word(100 * PAGE)
        assert factory.lost == 2


async def test_a_block_of_a_served_client_on_its_way(tmp_path: Path) -> None:
    """Cancelled later, by somebody who cancels all tasks there are."""
    gate = Gate(DATA, is_open=False)
    source = FunctionSource(gate.read, size=SIZE)
    async with serving(tmp_path / "s", source) as (server, _), guest(tmp_path / "s", PAGES) as one:
        asked = one.tell("word", 7)
        await asyncio.to_thread(gate.wait)
        assert server.store is not None
        for flight in set(server.store._flights.of.values()):
            assert flight.task is not None
            flight.task.cancel()
        await asyncio.sleep(0)
        gate.open()
        assert await in_time(asked) == word(7 * PAGE)


@pytest.mark.parametrize("how", ["before its first step", "later"])
async def test_events_that_are_applied_in_steps(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiouffd.foreign.memory.WORK_MAX", 8)
    async with serving(tmp_path / "s") as (_, dialect), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("read", 0, PAGES)
        memory = await dialect.memories.get()
        if how == "later":
            settle = memory._settle

            async def cancelled() -> None:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await settle()

            memory._settle = cancelled
        with losing(*(() if how == "later" else ("Memory._settle",))) as factory:
            await one.ask("drop", 16, 100)
            found = await one.ask("words", [15, 16, 115, 116])
        assert found == [word(15 * PAGE), 0, 0, word(116 * PAGE)]
        assert factory.lost == (how != "later")
        await in_time(memory.settled())


async def test_a_client_that_is_not_listened_to_is_told(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (server, _):
        with losing("Server._talk") as factory, socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(str(tmp_path / "s"))
            assert await in_time(asyncio.get_running_loop().sock_recv(client, 1)) == b""
        assert factory.lost == 1
        assert server.clients == []


async def test_a_client_that_is_turned_away_is_told(tmp_path: Path) -> None:
    class Talking(PlainDialect):
        @staticmethod
        def refusal(why: str, later: bool) -> bytes:
            return why.encode()

    before = len(os.listdir("/proc/self/fd"))
    async with serve.listen(
        tmp_path / "s", source=DATA, dialect=Talking(), allow=lambda _: False
    ) as server:
        with losing("Channel.dismiss") as factory, socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(str(tmp_path / "s"))
            assert await in_time(asyncio.get_running_loop().sock_recv(client, 1)) == b""
        assert factory.lost == 1
        assert server.refused == 1
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_successor_that_is_not_listened_to(tmp_path: Path) -> None:
    """The next one is."""
    path = tmp_path / "s"
    async with serving(path) as (old, _):
        with losing("Handover._hand_over") as factory, socket.socket(socket.AF_UNIX) as first:
            first.setblocking(False)
            first.connect(f"{path}.handover")
            await asyncio.get_running_loop().sock_sendall(first, HELLO)
            with contextlib.suppress(ConnectionResetError):
                assert await in_time(asyncio.get_running_loop().sock_recv(first, 1)) == b""
        assert factory.lost == 1
        async with serving(path, take_over=True):
            await in_time(old.taken_over.wait())


async def test_an_object_that_nobody_uses_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiouffd.serve.stores.LINGER", 0)
    file = tmp_path / "object"
    file.write_bytes(DATA)

    async def give(client: serve.Client) -> None:
        client.source = await client.store_for(str(file))

    def is_open() -> bool:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return any(os.path.realpath(link) == str(file) for link in links if os.path.exists(link))

    async with serving(tmp_path / "s", on_client=give):
        with losing("Stores._close") as factory:
            async with guest(tmp_path / "s", PAGES) as one:
                assert await one.ask("word", 7) == word(7 * PAGE)
                assert is_open()
            await asyncio.to_thread(wait_until, lambda: not is_open(), "the file to be closed")
        assert factory.lost == 1


@pytest.mark.needs_root
async def test_a_child_that_is_not_served(tmp_path: Path) -> None:
    """Its descriptor is closed, and what it misses is an error: its fork had to be refused."""
    limits = serve.Limits(memories=1)
    async with (
        serving(tmp_path / "s", limits=limits) as (_, _dialect),
        guest(tmp_path / "s", PAGES, features=["EVENT_FORK", "EVENT_REMOVE", "EVENT_UNMAP"]) as one,
    ):
        await one.ask("word", 1)
        descriptors = len(os.listdir("/proc/self/fd"))
        with losing("refuse") as factory:
            pid = await one.ask("leave_child", [200], str(tmp_path / "look"))
            await asyncio.to_thread(
                wait_until,
                lambda: factory.lost == 1 and len(os.listdir("/proc/self/fd")) == descriptors,
                "the descriptor to be closed",
            )
        (tmp_path / "look").touch()
        await asyncio.to_thread(
            wait_until, lambda: not _lives(pid), "the child to die of the error"
        )
        assert not (tmp_path / "look.seen").exists()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (OSError, IndexError):
        return False


# -------------------------------------------------------------------------- NBD


@contextlib.asynccontextmanager
async def exporting(path: Path) -> AsyncIterator[tuple[NbdServer, str]]:
    async with NbdServer({"": MemorySource(bytearray(DATA))}, writable=True) as server:
        yield server, await server.listen_unix(path)


async def test_a_reconnect(tmp_path: Path) -> None:
    """Requests get an error, and the next ones connect."""
    async with (
        exporting(tmp_path / "s") as (_, url),
        opened(NbdSource(url, connections=1)) as source,
    ):
        with losing("Pool._come_back") as factory:
            for connection in list(source._pool.live):
                connection.abort()
            await until(lambda: not source._pool.live)
            with contextlib.suppress(AiouffdError, asyncio.CancelledError):
                await in_time(source.read(0, 8))
        assert factory.lost == 1
        assert bytes(await in_time(source.read(0, 8))) == DATA[:8]


async def test_a_question_for_holes(tmp_path: Path) -> None:
    async with (
        exporting(tmp_path / "s") as (_, url),
        opened(NbdSource(url, connections=1)) as source,
    ):
        with losing("NbdSource._ask") as factory, contextlib.suppress(asyncio.CancelledError):
            await in_time(source.holes(0, SIZE))
        assert factory.lost == 1
        assert await in_time(source.holes(0, SIZE)) == []


async def test_a_handshake_and_a_request_of_a_server() -> None:
    authority = trustme.CA()
    theirs, ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(theirs)
    authority.configure_trust(ours)
    async with NbdServer({"": Plain(MemorySource(DATA))}, tls=theirs, tls_required=True) as server:
        url = await server.listen(port=0)
        with losing("_start_tls") as factory, pytest.raises((AiouffdError, OSError)):
            await in_time(NbdSource(url, tls=ours, connections=1).open())
        assert factory.lost == 1
        await until(lambda: server.stats.clients == 0)
        async with opened(NbdSource(url, tls=ours, connections=1)) as source:
            with losing("._serve") as factory, pytest.raises(AiouffdError):
                await in_time(source.read(0, 8))
            assert factory.lost == 1
            assert bytes(await in_time(source.read(0, 8))) == DATA[:8]


# ----------------------------------------------------------------- other sources


async def test_flushes() -> None:
    flusher, done = Flusher(Promises("it")), 0
    gate = asyncio.Event()

    async def flush() -> None:
        nonlocal done
        await gate.wait()
        done += 1

    with losing("Flusher._run", "Flusher._after", times=2) as factory:
        with pytest.raises(asyncio.CancelledError):
            await flusher(flush)
        factory.left = 0
        running = asyncio.ensure_future(flusher(flush))
        await asyncio.sleep(0)
        factory.left = 1
        with pytest.raises(asyncio.CancelledError):
            await flusher(flush)
        assert factory.lost == 2
    following = asyncio.ensure_future(flusher(flush))
    await asyncio.sleep(0)
    gate.set()
    await in_time(running)
    await in_time(following)
    assert done == 2


async def test_questions_that_are_shared() -> None:
    from aiouffd.sources.fsspec import _Shared

    done = 0

    async def ask() -> None:
        nonlocal done
        await asyncio.sleep(0)
        done += 1

    shared = _Shared(ask)
    with losing("_Shared._after") as factory, pytest.raises(asyncio.CancelledError):
        await shared.run()
    assert factory.lost == 1
    await in_time(shared.run())
    assert done == 1


async def test_reads_from_redis(tmp_path: Path) -> None:
    redis = pytest.importorskip("redis")
    from aiouffd.sources.redis import RedisSource
    from tests.servers.redis import redis_server

    with redis_server(tmp_path), redis.Redis(unix_socket_path=str(tmp_path / "redis")) as client:
        client.set("a", DATA)
        source = RedisSource(f"unix://{tmp_path / 'redis'}", "a")
        async with opened(source):
            with losing("RedisSource._bring") as factory, pytest.raises(AiouffdError):
                await in_time(source.read(0, 8))
            assert factory.lost == 1
            assert bytes(await in_time(source.read(0, 8))) == DATA[:8]


# ------------------------------------------------------------- tasks that begin at once


async def test_a_buffer_where_tasks_begin_at_once(eager: None) -> None:
    source = FunctionSource(Gate(DATA).read, size=SIZE)
    async with aiouffd.open(source, block_size=65536) as buf:
        assert await in_time(asyncio.to_thread(touch, buf.view, 8 * PAGE)) == word(8 * PAGE)
        await in_time(buf.fetch())
        assert await in_time(buf.read()) == DATA


async def test_serving_where_tasks_begin_at_once(eager: None, tmp_path: Path) -> None:
    async def read(offset: int, length: int) -> bytes:
        return DATA[offset : offset + length]

    source = FunctionSource(read, size=SIZE)
    async with serving(tmp_path / "s", source) as (old, _), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("words", [7, 100]) == [word(7 * PAGE), word(100 * PAGE)]
        async with serving(tmp_path / "s", source, take_over=True):
            await in_time(old.taken_over.wait())
            assert await one.ask("words", [8, 200]) == [word(8 * PAGE), word(200 * PAGE)]


async def test_nbd_where_tasks_begin_at_once(eager: None, tmp_path: Path) -> None:
    async with (
        exporting(tmp_path / "s") as (_, url),
        opened(NbdSource(url, connections=2, writable=True)) as source,
    ):
        assert bytes(await in_time(source.read(0, SIZE))) == DATA
        await in_time(source.write(0, b"x" * 512))
        await in_time(asyncio.gather(source.flush(), source.flush()))
        for connection in list(source._pool.live):
            connection.abort()
        assert bytes(await in_time(source.read(0, 512))) == b"x" * 512
