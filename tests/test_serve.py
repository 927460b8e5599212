"""Serving the memory of other processes: real processes, real faults, every event."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import serve
from aiouffd.errors import PeerError, SourceError, UsageError
from aiouffd.foreign import filling
from aiouffd.kernel.lib import lib
from aiouffd.serve import Area, Server
from tests.guests import AREA, COUNT, PlainDialect, guest
from tests.support import ROOT, Gate, content, environment, wait_until, word

PAGE = 4096
PAGES = 256
DATA = content(PAGES * PAGE)
ALL = ["EVENT_REMOVE", "EVENT_UNMAP", "EVENT_REMAP", "EVENT_FORK"]


def open_descriptors() -> dict[str, int]:
    """How many there are of the kinds that a server holds."""
    found = dict.fromkeys(("userfaultfd", "eventpoll", "pidfd"), 0)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            for kind in found:
                found[kind] += target == f"anon_inode:[{kind}]"
    return found


@asynccontextmanager
async def serving(
    tmp_path: Path, source: Any = DATA, *, dialect: PlainDialect | None = None, **options: Any
) -> AsyncIterator[tuple[Server, PlainDialect]]:
    dialect = dialect or PlainDialect()
    before = open_descriptors()
    async with serve.listen(tmp_path / "s", source=source, dialect=dialect, **options) as server:
        yield server, dialect
    assert not (tmp_path / "s").exists()
    assert open_descriptors() == before


async def ended(server: Server) -> None:
    """Until no client is left."""
    async with asyncio.timeout(10):
        for client in list(server.clients):
            await client.ended.wait()


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition, "the server to get so far")


def sha(first: int, count: int = 1) -> str:
    return hashlib.sha256(DATA[first * PAGE : (first + count) * PAGE]).hexdigest()


async def test_pages_come(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("word", 7) == word(7 * PAGE)
        assert await one.ask("read", 0, PAGES) == sha(0, PAGES)
        stats = server.stats
        assert stats.installed_bytes == len(DATA)
        assert 1 <= stats.faults <= PAGES


async def test_from_a_file_by_a_slow_source(tmp_path: Path) -> None:
    gate = Gate(DATA, is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with serving(tmp_path, source) as (server, _), guest(tmp_path / "s", PAGES) as one:
        touches = [one.tell("word", page) for page in (3, 4, 200)]
        await asyncio.to_thread(gate.wait, 2)  # pages 3 and 4 are of one block
        gate.open()
        assert await asyncio.gather(*touches) == [word(page * PAGE) for page in (3, 4, 200)]
        assert server.store is not None
        assert server.store.tally.flights == 2


@pytest.mark.needs_root
async def test_touched_by_the_kernel(tmp_path: Path) -> None:
    async with serving(tmp_path), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("read_through_kernel", 9) == word(9 * PAGE)


@pytest.mark.needs_root
async def test_a_fault_that_is_repeated_all_the_time(tmp_path: Path) -> None:
    """A thread in a system call that has a signal: its client is read less often."""
    gate = Gate(DATA, is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with serving(tmp_path, source) as (_, dialect), guest(tmp_path / "s", PAGES) as one:
        memory = await dialect.memories.get()
        touch = one.tell("read_through_kernel", 40)
        await asyncio.to_thread(gate.wait)
        await one.ask("interrupt")
        await until(lambda: memory._muted)
        faults = memory.stats.faults
        await until(lambda: memory.stats.faults > faults)  # and is not forgotten
        gate.open()
        assert await touch == word(40 * PAGE)
        await until(lambda: not memory._muted)
        assert await one.ask("word", 80) == word(80 * PAGE)


class Trouble:
    """The native module, whose fills fail for a while."""

    def __init__(self, native: Any, times: int, op: int, error: int) -> None:
        self.native, self.times, self.op, self.error = native, times, op, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def au_foreign_fill(self, *arguments: Any) -> Any:
        if self.times and arguments[1] == self.op:
            self.times -= 1
            return ~self.error
        return self.native.au_foreign_fill(*arguments)


async def test_an_error_that_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again for as long as it takes, and told once in a while."""
    monkeypatch.setattr(filling, "TROUBLE_PAUSE", 0.01)
    monkeypatch.setattr(filling, "lib", Trouble(lib, 5, lib.AU_OP_COPY, errno.ENOMEM))
    gate = Gate(DATA)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with serving(tmp_path, source) as (server, _), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("word", 40) == word(40 * PAGE)
        assert server.stats.retries == 5
    (record,) = [item for item in caplog.records if "is tried again" in item.getMessage()]
    assert os.strerror(errno.ENOMEM) in record.getMessage()


async def test_an_error_that_cannot_be_made_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made later, without asking the source again."""
    reads = 0

    async def fails(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        raise SourceError("gone", transient=False)

    trouble = Trouble(lib, 7, lib.AU_OP_POISON, errno.EAGAIN)
    monkeypatch.setattr(filling, "lib", trouble)
    source = aiouffd.sources.FunctionSource(fails, size=len(DATA))
    async with (
        serving(tmp_path, source, deadline=0.01) as (server, _),
        guest(tmp_path / "s", PAGES) as one,
    ):
        with pytest.raises(EOFError):
            await one.ask("word", 40)
        assert await one.process.wait() == -signal.SIGBUS
        assert trouble.times == 0
        assert reads < 4
        assert server.stats.poisoned_pages == 1
    assert caplog.text.count("poisoning page") == 1


async def test_what_was_unmapped_is_not_tried_again() -> None:
    served: list[int] = []
    done = asyncio.Event()

    class Owner:
        def hear(self) -> dict[int, int]:
            return {}

        def serve(self, address: int, flags: int = 0) -> None:
            served.append(address)

        def caught_up(self) -> None:
            done.set()

        def vanished(self) -> None:
            raise AssertionError

        def broken(self, error: Exception) -> None:
            raise error

    filler = filling.Filler(Owner(), 1000, serve.MemoryStats())
    for address in (0x5000, 0x6000, 0x9000):
        filler.later(address)
    filler.not_again(0x5000, 0x7000)
    await done.wait()
    assert served == [0x9000]
    # Nor what was to be tried again when somebody else took over for a while.
    filler.later(0xA000)
    filler.rest()
    filler.later(0xB000)
    await asyncio.sleep(0.01)
    assert served == [0x9000]
    done.clear()
    filler.go_on()
    await done.wait()
    assert served == [0x9000, 0xB000]
    filler.stop()


async def test_removed_pages_read_zero(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("word", 20) == word(20 * PAGE)
        await one.ask("drop", 16, 8)  # some there, some never touched
        assert await one.ask("words", list(range(14, 26))) == [
            0 if 16 <= page < 24 else word(page * PAGE) for page in range(14, 26)
        ]
        await one.ask("write_word", 17, 5)
        assert await one.ask("word", 17) == 5
        assert server.stats.events == 1


@pytest.mark.parametrize("at_hand", [True, False])
async def test_shared_memory_comes_back_by_blocks(tmp_path: Path, at_hand: bool) -> None:
    """What reclaim unmaps of shared memory is in the page cache still: one message for a block."""
    source: Any = (
        DATA if at_hand else aiouffd.sources.FunctionSource(Gate(DATA).read, size=len(DATA))
    )
    blocks = PAGES * PAGE // (1 << 16)
    options = {"shared": True, "features": ["MINOR_SHMEM"]}
    async with (
        serving(tmp_path, source, block_size=1 << 16) as (server, _),
        guest(tmp_path / "s", PAGES, **options) as one,
    ):
        assert await one.ask("read", 0, PAGES - 3) == sha(0, PAGES - 3)
        faults, installed = server.stats.faults, server.stats.installed_bytes
        await one.ask("write_word", 9, 5)
        await one.ask("drop", 0, 5)
        await one.ask("drop", 7, PAGES - 7)
        assert await one.ask("words", list(range(PAGES - 3))) == [
            5 if page == 9 else word(page * PAGE) for page in range(PAGES - 3)
        ]
        assert server.stats.faults - faults == blocks
        assert server.stats.installed_bytes == installed
        assert await one.ask("read", PAGES - 3, 3) == sha(PAGES - 3, 3)


async def test_removed_while_its_fetch_is_under_way(tmp_path: Path) -> None:
    """Old bytes never come back: who waits gets zeros, and so does who comes after the fetch."""
    gate = Gate(DATA, is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with serving(tmp_path, source) as (server, _), guest(tmp_path / "s", PAGES) as one:
        touch = one.tell("word", 40)
        await asyncio.to_thread(gate.wait)
        await one.ask("drop", 40, 2)
        assert await touch == 0  # at once, though the source has not answered
        gate.open()
        assert await one.ask("word", 44) == word(44 * PAGE)  # the same block: it has landed
        assert await one.ask("words", [40, 41, 42]) == [0, 0, word(42 * PAGE)]
        assert server.stats.retries < 100


async def test_unmapped_under_a_fault(tmp_path: Path) -> None:
    gate = Gate(DATA, is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with serving(tmp_path, source), guest(tmp_path / "s", PAGES) as one:
        touch = one.tell("word", 40)
        await asyncio.to_thread(gate.wait)
        unmapping = one.tell("unmap", 40, 1)
        # The thread is woken, and finds nothing: the process ends by SIGSEGV, not by a hang.
        results = await asyncio.gather(touch, unmapping, return_exceptions=True)
        assert isinstance(results[0], EOFError)
        assert await one.process.wait() == -signal.SIGSEGV


async def test_moved_mappings_are_followed(tmp_path: Path) -> None:
    async with serving(tmp_path), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("word", 64) == word(64 * PAGE)
        await one.ask("drop", 70, 2)
        await one.ask("move", 64, 32)
        assert await one.ask("words", [64, 65, 70, 71, 95]) == [
            *(word(page * PAGE) for page in (64, 65)),
            0,
            0,
            word(95 * PAGE),
        ]


@pytest.mark.needs_root
async def test_forked_children_are_served(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as (server, dialect),
        guest(tmp_path / "s", PAGES, features=ALL) as one,
    ):
        await one.ask("word", 3)
        await one.ask("drop", 8, 1)
        await one.ask("write_word", 100, 4711)
        pages = [3, 8, 9, 100, 200]
        assert await one.ask("fork", pages) == [
            word(3 * PAGE), 0, word(9 * PAGE), 4711, word(200 * PAGE),
        ]  # fmt: skip
        assert server.stats.forks == 1
        # The child has ended, which nobody tells: a look finds out.
        (client,) = server.clients
        client.probe()
        assert client.memories == [await dialect.memories.get()]


@pytest.mark.needs_root
async def test_forked_while_a_fetch_is_under_way(tmp_path: Path) -> None:
    """Parent and child wait for the same block, each in its own memory."""
    gate = Gate(DATA, is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with (
        serving(tmp_path, source) as (server, _),
        guest(tmp_path / "s", PAGES, features=ALL) as one,
    ):
        touch = one.tell("word", 40)
        await asyncio.to_thread(gate.wait)
        forked = one.tell("fork", [40, 41])
        await until(
            lambda: any(
                memory._wanted for client in server.clients for memory in client.memories[1:]
            )
        )
        gate.open()
        assert await touch == word(40 * PAGE)
        assert await forked == [word(40 * PAGE), word(41 * PAGE)]
        assert server.store is not None
        assert server.store.tally.flights == 1


async def test_a_failed_block_is_an_error(tmp_path: Path) -> None:
    async def read(offset: int, length: int) -> bytes:
        if offset >= 64 * PAGE:
            raise SourceError("gone", transient=False)
        return DATA[offset : offset + length]

    source = aiouffd.sources.FunctionSource(read, size=len(DATA))
    async with serving(tmp_path, source, deadline=5.0) as (server, _):
        async with guest(tmp_path / "s", PAGES) as one, guest(tmp_path / "s", PAGES) as other:
            assert await one.ask("word", 1) == word(PAGE)
            with pytest.raises(EOFError):
                await one.ask("word", 100)
            assert await one.process.wait() == -signal.SIGBUS
            assert await other.ask("word", 2) == word(2 * PAGE)
        await ended(server)


async def test_a_failed_block_may_be_the_end(tmp_path: Path) -> None:
    async def read(offset: int, length: int) -> bytes:
        raise SourceError("gone", transient=False)

    source = aiouffd.sources.FunctionSource(read, size=len(DATA))
    async with (
        serving(tmp_path, source, deadline=5.0, on_failure="kill"),
        guest(tmp_path / "s", PAGES) as one,
    ):
        with pytest.raises(EOFError):
            await one.ask("word", 100)
        assert await one.process.wait() == -signal.SIGKILL


async def test_what_fails_for_a_while_is_waited_out(tmp_path: Path) -> None:
    failures = 3

    async def read(offset: int, length: int) -> bytes:
        nonlocal failures
        if failures:
            failures -= 1
            raise SourceError("busy")
        return DATA[offset : offset + length]

    source = aiouffd.sources.FunctionSource(read, size=len(DATA))
    async with serving(tmp_path, source) as (server, _), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("word", 5) == word(5 * PAGE)
        assert server.store is not None
        assert server.store.tally.retries == 3


async def test_the_end_of_a_client_is_noticed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _):
        before = open_descriptors()
        async with guest(tmp_path / "s", PAGES) as one:
            assert await one.ask("word", 5) == word(5 * PAGE)
            assert len(server.clients) == 1
        await ended(server)
        assert server.clients == []
        assert open_descriptors() == before
        assert server.stats.faults == 1


async def test_closing_leaves_the_client_waiting_for_the_next_server(tmp_path: Path) -> None:
    """It keeps a copy of its descriptor: no zeros, and whoever is handed it serves on."""
    async with guest("", PAGES) as one:
        async with serving(tmp_path):
            await one.ask("hand_over", str(tmp_path / "s"))
            assert await one.ask("word", 5) == word(5 * PAGE)
        touch = one.tell("word", 99)
        async with serving(tmp_path):
            await one.ask("hand_over", str(tmp_path / "s"))
            assert await touch == word(99 * PAGE)


async def test_faults_that_a_dead_server_had_read_are_not_lost(tmp_path: Path) -> None:
    gate = Gate(DATA, is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with guest("", PAGES) as one:
        async with serving(tmp_path, source):
            await one.ask("hand_over", str(tmp_path / "s"))
            touch = one.tell("word", 99)
            await asyncio.to_thread(gate.wait)
        async with serving(tmp_path):
            await one.ask("hand_over", str(tmp_path / "s"))
            assert await touch == word(99 * PAGE)


async def test_complete_brings_everything(tmp_path: Path) -> None:
    gate = Gate(DATA)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with serving(tmp_path, source) as (server, dialect), guest(tmp_path / "s", PAGES) as one:
        await one.ask("drop", 16, 8)
        memory = await dialect.memories.get()
        await memory.complete()
        assert server.stats.installed_bytes == len(DATA) - 8 * PAGE
        faults = server.stats.faults
        pages = (0, 100, 255)
        assert await one.ask("words", pages) == [word(page * PAGE) for page in pages]
        assert server.stats.faults == faults
        assert await one.ask("word", 17) == 0


async def test_complete_over_a_pause(tmp_path: Path) -> None:
    """As when a successor asks to take over, and gives up."""
    gate = Gate(DATA, is_open=False)
    source = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with serving(tmp_path, source) as (_, dialect), guest(tmp_path / "s", PAGES) as one:
        memory = await dialect.memories.get()
        bringing = asyncio.ensure_future(memory.complete())
        await asyncio.to_thread(gate.wait)
        memory.pause()
        gate.open()
        done, _ = await asyncio.wait([bringing], timeout=0.1)
        assert not done
        memory.resume()
        await bringing
        assert await one.ask("read", 0, PAGES) == sha(0, PAGES)


async def test_complete_after_a_move(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, dialect), guest(tmp_path / "s", PAGES) as one:
        memory = await dialect.memories.get()
        await one.ask("move", 64, 32)
        await memory.complete()
        faults = memory.stats.faults
        assert await one.ask("read", 64, 32) == sha(64, 32)
        assert memory.stats.faults == faults


async def test_working_set(tmp_path: Path) -> None:
    async def remember(client: serve.Client) -> None:
        client.record = True

    async with (
        serving(tmp_path, on_client=remember) as (server, _),
        guest(tmp_path / "s", PAGES) as one,
    ):
        await one.ask("words", [200, 3])
        used = server.clients[0].working_set()
    size = 16 * PAGE
    assert used.ranges == ((200 * PAGE // size * size, size), (0, size))
    async with serving(tmp_path, prefetch=used) as (server, _), guest(tmp_path / "s", PAGES) as one:
        await until(lambda: server.stats.installed_bytes == 2 * size)
        assert await one.ask("words", [200, 3]) == [word(200 * PAGE), word(3 * PAGE)]
        assert server.stats.faults == 0


async def test_uncovered_addresses(tmp_path: Path) -> None:
    class Half(PlainDialect):
        async def talk(self, client: serve.Client) -> None:
            adopt = client.adopt

            def less(fd: int, areas: list[Area], **options: Any) -> serve.Memory:
                (area,) = areas
                half = Area(area.start, area.length // 2, area.store, area.offset)
                return adopt(fd, [half], **options)

            client.adopt = less  # type: ignore[method-assign, assignment]
            await super().talk(client)

    zeros = serving(tmp_path, dialect=Half(uncovered="zero"))
    async with zeros, guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("words", [127, 128]) == [word(127 * PAGE), 0]
    async with serving(tmp_path, dialect=Half()), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("word", 127) == word(127 * PAGE)
        with pytest.raises(EOFError):
            await one.ask("word", 128)
        assert await one.process.wait() == -signal.SIGBUS


# ------------------------------------------------------------- bad clients


async def converse(path: Path, data: bytes, fds: list[int] | None = None) -> bytes:
    """Say something to a server and hear what it answers before it hangs up."""

    def speak() -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(str(path))
            if fds:
                socket.send_fds(connection, [data], fds)
            elif data:
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            try:
                return connection.recv(10)
            except ConnectionResetError:
                return b""

    return await asyncio.to_thread(speak)


@pytest.mark.parametrize(
    "area",
    [
        (4096, 4095, 0),
        (4097, 4096, 0),
        (4096, 0, 0),
        (2**63, 4096, 0),
        (2**64 - 4096, 8192, 0),
        (4096, 4096, 100),
        (4096, 4096, len(DATA)),
        (4096, len(DATA) + 4096, 0),
        (4096, 2**62, 0),
    ],
)
async def test_impossible_areas(tmp_path: Path, area: tuple[int, int, int]) -> None:
    async with serving(tmp_path) as (server, _), guest(tmp_path / "s", PAGES) as other:
        with aiouffd.Userfaultfd(user_mode_only=True) as uffd:
            data = COUNT.pack(1) + AREA.pack(*area)
            assert await converse(tmp_path / "s", data, [uffd.fileno()]) == b""
        await other.ask("word", 4)
        assert server.refused == 1
        assert len(server.clients) == 1


async def test_overlapping_areas_and_other_descriptors(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _):
        with aiouffd.Userfaultfd(user_mode_only=True) as uffd:
            data = COUNT.pack(2) + AREA.pack(8192, 8192, 0) + AREA.pack(12288, 8192, 0)
            assert await converse(tmp_path / "s", data, [uffd.fileno()]) == b""
            data = COUNT.pack(1) + AREA.pack(8192, 8192, 0)
            assert await converse(tmp_path / "s", data, [0]) == b""
            assert await converse(tmp_path / "s", data, [uffd.fileno()] * 2) == b""
            assert await converse(tmp_path / "s", data) == b""
            assert await converse(tmp_path / "s", data[:7], [uffd.fileno()]) == b""
            assert await converse(tmp_path / "s", b"") == b""
            assert await converse(tmp_path / "s", data, [uffd.fileno()]) == b"k"
        assert server.refused == 6


async def test_who_is_let_in(tmp_path: Path) -> None:
    async with serving(tmp_path, allow=lambda peer: peer.pid != os.getpid()) as (server, _):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        assert await converse(tmp_path / "s", b"") == b""
        async with guest(tmp_path / "s", PAGES) as one:
            assert await one.ask("word", 4) == word(4 * PAGE)
        assert server.refused == 1


async def test_who_says_nothing_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=serve.Limits(handshake=0.05)) as (server, _):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(tmp_path / "s"))
            connection.settimeout(10)
            assert await asyncio.to_thread(connection.recv, 1) == b""
        assert server.refused == 1


async def test_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(path))
    stale.close()
    async with serving(tmp_path):
        with pytest.raises(OSError, match="in use"):
            await serve.listen(path, source=DATA, dialect=PlainDialect()).open()
    path.write_bytes(b"a file")
    with pytest.raises(OSError, match="in use"):
        await serve.listen(path, source=DATA, dialect=PlainDialect()).open()
    assert path.read_bytes() == b"a file"
    with pytest.raises(UsageError):
        serve.listen(path, dialect="klingon")
    with pytest.raises(FileNotFoundError):
        await serve.listen(path, source="/no/such/file", dialect=PlainDialect()).open()


async def test_turned_away_by_on_client(tmp_path: Path) -> None:
    async def no(client: serve.Client) -> None:
        raise PeerError("not today")

    async with serving(tmp_path, on_client=no) as (server, _):
        assert await converse(tmp_path / "s", b"") == b""
        assert server.refused == 1


@pytest.mark.parametrize(
    ("error", "told"), [(PeerError("not today"), "not today"), (OSError(13, "secret"), "reasons")]
)
async def test_a_client_of_ours_that_is_turned_away(
    tmp_path: Path, error: Exception, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told so, once, and does not try again."""
    calls = 0

    async def no(client: serve.Client) -> None:
        nonlocal calls
        calls += 1
        raise error

    program = "import sys, aiouffd; aiouffd.attach(sys.argv[1], timeout=5.0).open()"
    async with serve.listen(tmp_path / "s", source=DATA, on_client=no):
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, str(tmp_path / "s")),
            stderr=asyncio.subprocess.PIPE,
            env=environment(PYTHONPATH=str(ROOT)),
        )
        _, said = await client.communicate()
        assert client.returncode == 1
        assert told in said.decode()
        assert "secret" not in said.decode()
        assert calls == 1
    assert "turned away" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_source_that_is_no_store(tmp_path: Path) -> None:
    failed: list[UsageError] = []

    async def wrong(client: serve.Client) -> None:
        try:
            client.source = str(tmp_path)  # type: ignore[assignment]
        except UsageError as error:
            failed.append(error)
            raise

    async with serving(tmp_path, on_client=wrong):
        assert await converse(tmp_path / "s", b"") == b""
    assert "store_for" in str(failed[0])
    with pytest.raises(UsageError, match="0o600"):
        serve.listen(tmp_path / "s", source=DATA, mode="0600")  # type: ignore[arg-type]
