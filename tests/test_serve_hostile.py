"""Serving where it is dangerous: events in the worst moment, and clients that mean harm."""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import gc
import mmap
import os
import resource
import select
import signal
import socket
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd import serve
from aiouffd.errors import PeerError, SourceError
from aiouffd.foreign.areas import ABSENT, REMOVED, AreaMap
from aiouffd.foreign.blocks import MAX_BACKGROUND, BlockStore
from aiouffd.foreign.bringing import PLACES
from aiouffd.foreign.reactor import Share
from aiouffd.serve import Area, handover
from tests.faulty import free_huge_pages, huge_pages
from tests.guests import PlainDialect, guest
from tests.support import Gate, content, word
from tests.test_serve import ALL, DATA, PAGE, PAGES, serving, until
from tests.test_serve_swarm import server as server_process

HUGE = 2 << 20


def gated(data: bytes = DATA) -> tuple[Gate, aiouffd.sources.FunctionSource]:
    gate = Gate(data, is_open=False)
    return gate, aiouffd.sources.FunctionSource(gate.read, size=len(data))


def has_messages(memory: serve.Memory) -> bool:
    poller = select.poll()
    poller.register(memory.fileno(), select.POLLIN)
    return bool(poller.poll(0))


@contextlib.asynccontextmanager
async def unread(memory: serve.Memory) -> AsyncIterator[None]:
    """What the process says is not heard, until something else makes us listen."""
    memory._reactor.remove(memory.fileno())
    try:
        yield
    finally:
        memory._reactor.add(memory)


# ------------------------------------------------------------ lost wake-ups


@pytest.mark.parametrize("event", ["drop", "unmap"])
async def test_an_event_in_front_of_who_waits(tmp_path: Path, event: str) -> None:
    """A block cannot be filled for an event is unread, which then takes its first page away. Who
    waits for another page of it has to be remembered all the same."""
    gate, source = gated()
    async with (
        serving(tmp_path, source, keep=0) as (_, dialect),
        guest(tmp_path / "s", PAGES) as one,
    ):
        memory = await dialect.memories.get()
        touch = one.tell("word", 40)
        await asyncio.to_thread(gate.wait)
        async with unread(memory):
            done = one.tell(event, 32, 2)
            await until(lambda: has_messages(memory))
            gate.open()
            await until(lambda: memory.stats.retries > 0)
        async with asyncio.timeout(5):
            assert await touch == word(40 * PAGE)
            await done


async def test_who_has_moved_away_does_not_get_an_error(tmp_path: Path) -> None:
    """A block fails, but by then its place shows something else."""

    async def read(offset: int, length: int) -> bytes:
        await gate._pass()
        if offset < 64 * PAGE:
            raise SourceError("gone", transient=False)
        return DATA[offset : offset + length]

    gate = Gate(DATA, is_open=False)
    source = aiouffd.sources.FunctionSource(read, size=len(DATA))
    async with (
        serving(tmp_path, source, deadline=5.0) as (_, dialect),
        guest(tmp_path / "s", PAGES) as one,
    ):
        memory = await dialect.memories.get()
        touch = one.tell("word", 40)
        await asyncio.to_thread(gate.wait)
        # The thread is served zeros; drops the page, and waits there again as its failure comes.
        await one.ask("drop", 40, 1)
        assert await touch == 0
        await one.ask("drop", 40, 1)
        gate.open()
        await until(lambda: not memory._wanted)
        assert await one.ask("word", 40) == 0
        assert memory.stats.poisoned_pages == 0


class Asker:
    """Asks a store for blocks, and notes what comes."""

    def __init__(self, expected: int = 0) -> None:
        self.share = Share()
        self.came: list[int] = []
        self.expected, self.has_all = expected, asyncio.Event()

    def landed(self, store: BlockStore, block: int, data: memoryview | None) -> None:
        self.came.append(block)
        if len(self.came) == self.expected:
            self.has_all.set()

    def failed(self, store: BlockStore, block: int, error: BaseException) -> None:
        raise AssertionError(error)

    def broken(self, error: Exception) -> None:
        raise error


async def test_who_cannot_take_a_block_spares_the_others() -> None:
    gate, source = gated()
    store = BlockStore(source, block_size=PAGE)
    await store.open()

    class Broken(Asker):
        bugs: list[Exception]

        def landed(self, store: BlockStore, block: int, data: memoryview | None) -> None:
            raise ValueError("a bug")

        def broken(self, error: Exception) -> None:
            self.bugs.append(error)

    first, second = Broken(), Asker(1)
    first.bugs = []
    store.want(3, first)
    store.want(3, second)
    gate.open()
    async with asyncio.timeout(10):
        await second.has_all.wait()
    assert [str(bug) for bug in first.bugs] == ["a bug"]
    await store.aclose()


async def test_a_queued_block_that_becomes_urgent_comes_for_all() -> None:
    gate, source = gated()
    store = BlockStore(source, block_size=PAGE)
    await store.open()
    liked, urgent = Asker(MAX_BACKGROUND + 3), Asker(2)
    for block in range(MAX_BACKGROUND):
        store.like(2 * block, 1, liked)
    store.like(100, 1, liked)
    store.like(102, 2, liked)
    for block in (100, 102):
        store.want(block, urgent)
    await asyncio.to_thread(gate.wait, MAX_BACKGROUND + 2)
    gate.open()
    async with asyncio.timeout(5):
        await liked.has_all.wait()
        await urgent.has_all.wait()
    assert sorted(urgent.came) == [100, 102]
    assert sorted(liked.came) == [*range(0, 2 * MAX_BACKGROUND, 2), 100, 102, 103]
    await store.aclose()


async def test_a_deadline_holds_for_who_joins_a_background_flight(tmp_path: Path) -> None:
    gate, source = gated()
    store = BlockStore(source, block_size=PAGE, deadline=0.05)
    await store.open()
    failed = asyncio.Event()

    class Failing(Asker):
        def failed(self, store: BlockStore, block: int, error: BaseException) -> None:
            failed.set()

    store.like(0, 1, Failing())
    await asyncio.to_thread(gate.wait)
    store.want(0, Failing())
    async with asyncio.timeout(5):
        await failed.wait()
    await store.aclose()


# --------------------------------------------------------- never zeros for bytes


async def test_what_was_not_there_yet_is_not_taken_for_filled(tmp_path: Path) -> None:
    """A fault brings its neighbours, some of which are not registered at that time. They are
    missing still, and bringing everything brings them."""
    parts = [(0, 34), (38, PAGES - 38)]
    dialect = PlainDialect()
    async with (
        serving(tmp_path, dialect=dialect, keep=0) as (_, _),
        guest(tmp_path / "s", PAGES, register=parts) as one,
    ):
        memory = await dialect.memories.get()
        memory.recording = {}  # which is served by the slow path
        assert await one.ask("word", 33) == word(33 * PAGE)
        assert await one.ask("word", 40) == word(40 * PAGE)
        await one.ask("register", 34, 4)
        assert not memory.finish()
        async with asyncio.timeout(5):
            while not memory.finish():
                await memory.complete()
        pages = [33, 34, 35, 36, 37, 38, 255]
        assert await one.ask("words", pages) == [word(page * PAGE) for page in pages]


@pytest.mark.needs_root
async def test_what_was_not_there_yet_is_not_taken_for_filled_in_a_child(tmp_path: Path) -> None:
    """The child has what is known of its parent's pages, and has to look again as well."""
    parts = [(0, 34), (38, PAGES - 38)]
    async with (
        serving(tmp_path, keep=0) as (server, dialect),
        guest(tmp_path / "s", PAGES, register=parts, features=ALL) as one,
    ):
        memory = await dialect.memories.get()
        memory.recording = {}
        assert await one.ask("word", 33) == word(33 * PAGE)
        await one.ask("register", 34, 4)
        await memory.complete()
        for area in memory.areas:  # as if it had come to a fork before that
            area.mark_installed(area.start, area.end)
            area.states[34:38] = bytes([ABSENT]) * 4
        pid, name = await child_of(one, tmp_path, [34, 37])
        (client,) = server.clients
        await until(lambda: len(client.memories) == 2)
        child = client.memories[1]
        assert not child.finish()
        await child.complete()
        assert child.finish()
        assert await seen_by(pid, name) == [word(34 * PAGE), word(37 * PAGE)]


class Mapping:
    """Memory of this process that a server of this process has, and that nothing touches which
    could not wait: a child would do, but here it can be changed at will."""

    def __init__(self, pages: int, every: int = 1) -> None:
        self.file = os.memfd_create("mapping", os.MFD_CLOEXEC)
        os.ftruncate(self.file, pages * PAGE)
        self.memory = mmap.mmap(self.file, pages * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE, user_mode_only=None)
        self.uffd.register(self.address, pages * PAGE, aiouffd.Mode.MISSING)

    def areas(self, store: Any, count: int, pages: int) -> list[Area]:
        """So many areas, each with the first pages of the object."""
        return [
            Area(self.address + number * pages * PAGE, pages * PAGE, store)
            for number in range(count)
        ]

    def close(self) -> None:
        self.uffd.close()
        os.close(self.file)


@pytest.fixture
def mapping() -> Iterator[Mapping]:
    made = Mapping(256)
    yield made
    made.close()


class HandsOver:
    """A dialect that hears nothing, and adopts what it is told to."""

    name = "hands-over"

    def __init__(self, mapping: Mapping, count: int, pages: int) -> None:
        self.mapping, self.count, self.pages = mapping, count, pages
        self.memory: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def talk(self, client: serve.Client) -> None:
        areas = self.mapping.areas(client.source, self.count, self.pages)
        self.memory.set_result(client.adopt(os.dup(self.mapping.uffd.fileno()), areas))
        client.keep_while_connected()


@contextlib.asynccontextmanager
async def handed_over(
    tmp_path: Path, mapping: Mapping, count: int, pages: int
) -> AsyncIterator[Any]:
    dialect = HandsOver(mapping, count, pages)
    server = serve.listen(tmp_path / "s", source=DATA, dialect=dialect)
    async with server, asyncio.timeout(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(tmp_path / "s"))
            yield await dialect.memory


async def test_areas_that_show_the_same_bytes(tmp_path: Path, mapping: Mapping) -> None:
    """All places of a block are filled, a few in one turn of the loop."""
    count = 3 * PLACES + 7
    async with handed_over(tmp_path, mapping, count, 1) as memory:
        await memory.complete()
        assert memory.stats.installed_bytes == count * PAGE
        whole = os.pread(mapping.file, count * PAGE, 0)
        assert whole == DATA[:PAGE] * count


async def test_places_that_are_there_already(tmp_path: Path, mapping: Mapping) -> None:
    """That a turn had nothing to do does not mean that nothing can be done."""
    count = 2 * PLACES + 7
    async with handed_over(tmp_path, mapping, count, 1) as memory:
        gate, source = gated()
        for area in list(memory.areas)[: PLACES + 1]:
            memory.fill(area, area.store, 0, memoryview(DATA[: 16 * PAGE]), area.start)
        (store,) = {area.store for area in memory.areas}
        store._now, store.source = None, source  # it is not at hand any more
        bringing = asyncio.ensure_future(memory.complete())
        await asyncio.to_thread(gate.wait)
        gate.open()
        await bringing
        assert os.pread(mapping.file, count * PAGE, 0) == DATA[:PAGE] * count


async def test_nothing_is_asked_for_whose_process_is_gone(
    tmp_path: Path, mapping: Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filling the page of a fault shows that the process is gone: nothing is read ahead for it."""
    async with handed_over(tmp_path, mapping, 1, 64) as memory:
        (area,) = memory.areas
        store, asked = area.store, list[int]()
        monkeypatch.setattr(memory, "readahead", len(DATA))
        monkeypatch.setattr(store, "peek", lambda block: (None,) if block < 2 else None)
        monkeypatch.setattr(store, "like", lambda first, count, wanter: asked.append(first))
        memory.serve(area.start)
        monkeypatch.setattr(memory, "fill", lambda *_: memory.vanished())
        memory.serve(area.start + store.block_size)
        assert memory.closed
        assert not asked


async def test_memory_that_has_ended_is_freed_at_once(tmp_path: Path, mapping: Mapping) -> None:
    """There may be much of it, a byte per page, and a client may fork all the time."""
    async with handed_over(tmp_path, mapping, 1, 64) as memory:
        fd, areas = os.dup(memory.fd), AreaMap()
        reactor = memory._reactor
        gc.disable()
        try:
            other = serve.Memory(reactor, fd, areas, share=Share())
            other.start()
            other.close()
            freed = weakref.ref(other)
            del other
            assert freed() is None
        finally:
            gc.enable()


async def test_a_file_that_was_made_shorter(
    tmp_path: Path, mapping: Mapping, caplog: pytest.LogCaptureFixture
) -> None:
    """What lies behind its end cannot be filled, and is passed over."""
    async with handed_over(tmp_path, mapping, 1, 200) as memory:
        os.ftruncate(mapping.file, 70 * PAGE)
        await memory.complete()
        assert memory.stats.installed_bytes == 70 * PAGE
        assert os.pread(mapping.file, 256 * PAGE, 0) == DATA[: 70 * PAGE]
    assert not caplog.records


async def test_what_is_never_there_does_not_stop_completing(tmp_path: Path) -> None:
    features = ["EVENT_REMOVE"]
    async with (
        serving(tmp_path) as (_, dialect),
        guest(tmp_path / "s", PAGES, features=features) as one,
    ):
        memory = await dialect.memories.get()
        await one.ask("unmap", 40, 20)  # untold
        async with asyncio.timeout(5):
            while not memory.finish():
                await memory.complete()
        assert await one.ask("words", [39, 60]) == [word(39 * PAGE), word(60 * PAGE)]


async def child_of(one: Any, tmp_path: Path, pages: list[int]) -> tuple[int, Path]:
    await asyncio.to_thread(tmp_path.mkdir, exist_ok=True)
    name = tmp_path / "look"
    return await one.ask("leave_child", pages, str(name)), name


async def seen_by(pid: int, name: Path) -> list[int] | None:
    """What the child sees, None if it gets an error. Its end is awaited."""
    return await asyncio.to_thread(_seen_by, pid, name)


def _seen_by(pid: int, name: Path) -> list[int] | None:
    pidfd = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    name.touch()
    try:
        assert poller.poll(10_000)
    finally:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    seen = name.with_name("look.seen")
    return array.array("Q", seen.read_bytes()).tolist() if seen.exists() else None


@pytest.mark.needs_root
async def test_a_child_is_served_after_its_parent_has_gone(tmp_path: Path) -> None:
    """It has no copy of its descriptor: to close ours would be zeros."""
    async with serving(tmp_path) as (server, _):
        async with guest(tmp_path / "s", PAGES, features=ALL) as one:
            pid, name = await child_of(one, tmp_path, [3, 200])
            (client,) = server.clients
            await until(lambda: len(client.memories) == 2)
        await until(lambda: len(client.memories) == 1 or client.ended.is_set())
        assert await seen_by(pid, name) == [word(3 * PAGE), word(200 * PAGE)]
        client.probe()
        assert client.ended.is_set()
        assert server.clients == []


@pytest.mark.needs_root
async def test_a_child_gets_errors_and_not_zeros_when_the_server_closes(tmp_path: Path) -> None:
    async with guest("", PAGES, features=ALL) as one:
        async with serving(tmp_path) as (server, _):
            await one.ask("hand_over", str(tmp_path / "s"))
            await one.ask("drop", 9, 1)
            pid, name = await child_of(one, tmp_path, [9, 200])
            (client,) = server.clients
            await until(lambda: len(client.memories) == 2)
        assert await seen_by(pid, name) is None


@pytest.mark.needs_root
async def test_too_many_children_get_errors(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, limits=serve.Limits(memories=1)) as (server, _),
        guest(tmp_path / "s", PAGES, features=ALL) as one,
    ):
        pid, name = await child_of(one, tmp_path, [200])
        assert await seen_by(pid, name) is None
        (client,) = server.clients
        assert len(client.memories) == 1
        assert await one.ask("word", 5) == word(5 * PAGE)


# -------------------------------------------------------------- bad clients


@pytest.mark.needs_root
async def test_forks_without_a_free_descriptor(tmp_path: Path) -> None:
    """A few are served out of the reserve, the next waits until one is free; nobody else does, and
    the server does not run in circles meanwhile."""
    with server_process(tmp_path, "asyncio", "--block", "65536") as running:
        pid = running.process.pid
        async with guest(running.path, 64, features=ALL) as one, guest(running.path, 64) as two:
            await one.ask("word", 3)
            await two.ask("word", 3)
            taken = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            limit = (max(taken) + 1, before[1])
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
            free = limit[0] - len(taken) + 8  # and the reserve
            children = [
                await child_of(one, tmp_path / str(number), [40 + number % 4])
                for number in range(free)
            ]
            waiting = asyncio.ensure_future(child_of(one, tmp_path / "last", [44]))
            await two.ask("word", 20)
            used = cpu_time(pid)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(waiting), 1.0)
            assert cpu_time(pid) - used < 0.5
            assert await two.ask("word", 40) == word(40 * PAGE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            children.append(await waiting)
            for number, child in enumerate(children[:-1]):
                assert await seen_by(*child) == [word((40 + number % 4) * PAGE)]
            assert await seen_by(*children[-1]) == [word(44 * PAGE)]
        running.end()


def cpu_time(pid: int) -> float:
    """Seconds that a process has run for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("delay", ["0", "0.001"])
async def test_nobody_can_make_the_server_block(tmp_path: Path, delay: str) -> None:
    """O_NONBLOCK is of the open file, which the client has as well."""
    with server_process(tmp_path, "asyncio", "--delay", delay) as running:
        async with guest(running.path, 64) as bad, guest(running.path, 64) as good:
            await bad.ask("word", 3)
            await bad.ask("make_blocking")
            async with asyncio.timeout(10):
                assert await bad.ask("word", 4) == word(4 * PAGE)
                for page in range(20):
                    assert await good.ask("word", page) == word(page * PAGE)
        running.end()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_events_of_pages_that_are_not_huge(data: st.DataObject) -> None:
    """Who says that its pages are huge where they are not has events in the midst of them. The
    areas are made of whole pages all the same: native code relies on it."""
    store: Any = object()
    areas = AreaMap([Area(HUGE, 4 * HUGE, store, HUGE, HUGE)])
    pages = st.integers(0, 6 * HUGE // PAGE)
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(["removed", "unmapped", "moved"]))
        start, count, to = data.draw(pages), data.draw(st.integers(1, 1200)), data.draw(pages)
        if what == "moved":
            if to < start + count and start < to + count:
                continue
            areas.moved(start * PAGE, to * PAGE, count * PAGE)
        else:
            getattr(areas, what)(start * PAGE, (start + count) * PAGE)
            for page in range(start, start + count):
                area = areas.find(page * PAGE)
                assert area is None or what == "removed"
                assert area is None or area.state_of(page * PAGE) & REMOVED
        for area in areas:
            assert not (area.start | area.length | area.offset) % HUGE
            assert area.states is not None
            assert len(area.states) == area.length // HUGE


@pytest.mark.hugetlb
@pytest.mark.needs_root
async def test_no_huge_page_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel says of a page that it exists where it has none to give. Whoever waits for it
    waits on, and is told of; once there is a page again it comes with the right bytes."""
    dialect = PlainDialect(page_size=HUGE)
    with huge_pages(2):
        count = free_huge_pages() or 0
        assert count >= 2
        data = content((count + 2) * HUGE)
        async with (
            serving(tmp_path, data, dialect=dialect, block_size=HUGE) as (server, _),
            guest(tmp_path / "s", count + 2, page_size=HUGE, noreserve=True) as one,
        ):
            assert await one.ask("words", list(range(count))) == [
                word(page * HUGE) for page in range(count)
            ]
            last = [one.tell("word", page) for page in (count, count + 1)]
            await until(lambda: "no huge pages are left" in caplog.text)
            assert not any(touch.done() for touch in last)
            await one.ask("drop", 0, 2)
            assert await asyncio.gather(*last) == [word(count * HUGE), word((count + 1) * HUGE)]
            # What was dropped reads zero as soon as there is a page for it.
            dropped = one.tell("word", 0)
            await one.ask("drop", count, 1)
            assert await dropped == 0
            assert server.stats.poisoned_pages == 0


async def test_an_error_of_ours_in_one_client_spares_the_others(
    tmp_path: Path, loop_errors: list[dict[str, Any]]
) -> None:
    async with (
        serving(tmp_path) as (server, dialect),
        guest(tmp_path / "s", PAGES) as one,
        guest(tmp_path / "s", PAGES) as two,
    ):
        first, _ = await dialect.memories.get(), await dialect.memories.get()
        first.areas.find = None
        first.recording = {}
        first.share.used = -1e9
        touch = one.tell("word", 3)
        assert await two.ask("words", list(range(50))) == [word(page * PAGE) for page in range(50)]
        async with asyncio.timeout(5):
            await first.ended.wait()
        assert len(loop_errors) == 1
        loop_errors.clear()
        assert len(server.clients) == 1
        await one.end()
        with pytest.raises(EOFError):
            await touch


async def test_a_policy_that_fails_lets_nobody_in(
    tmp_path: Path, loop_errors: list[dict[str, Any]]
) -> None:
    def broken(peer: serve.Peer) -> bool:
        raise ValueError("oops")

    async with serving(tmp_path, allow=broken) as (server, _):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(tmp_path / "s"))
            connection.settimeout(10)
            assert await asyncio.to_thread(connection.recv, 1) == b""
        assert server.refused == 1
        assert len(loop_errors) == 1
        loop_errors.clear()


# ------------------------------------------------------------------ closing


class Sticky(aiouffd.sources.FunctionSource):
    """A source that does not want to be closed."""

    async def aclose(self) -> None:
        raise OSError("no")


async def test_a_source_that_cannot_be_closed_keeps_nothing_open(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, Sticky(Gate(DATA).read, size=len(DATA))),
        guest(tmp_path / "s", PAGES) as one,
    ):
        assert await one.ask("word", 4) == word(4 * PAGE)


async def test_closing_can_be_given_up(tmp_path: Path) -> None:
    """Who is to be given everything first, and is not to, gets errors instead of zeros."""
    gate, source = gated()

    class Whole(PlainDialect):
        async def talk(self, client: serve.Client) -> None:
            await super().talk(client)
            client.complete_on_close = True

    async with (
        serving(tmp_path, source, dialect=Whole()) as (server, dialect),
        guest(tmp_path / "s", PAGES) as one,
    ):
        memory = await dialect.memories.get()
        closing = asyncio.ensure_future(server.aclose())
        await asyncio.to_thread(gate.wait)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert memory.closed
        assert memory.stats.poisoned_pages == PAGES
        with pytest.raises(EOFError):
            await one.ask("word", 4)


# ---------------------------------------------------------------- hand-over


async def test_two_servers_never_serve_one_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has waited long enough, and goes on: the second must not begin."""
    path = tmp_path / "s"
    async with serving(tmp_path) as (old, _), guest(path, PAGES) as one:
        await one.ask("word", 5)
        slow, gave_up = asyncio.Event(), asyncio.Event()
        new = serve.listen(path, source=DATA, dialect=PlainDialect(), take_over=True)
        real_restore, real_go_on = handover._restore, old.go_on

        async def restore(*arguments: Any) -> Any:
            await slow.wait()
            return await real_restore(*arguments)

        def go_on() -> None:
            real_go_on()
            gave_up.set()

        monkeypatch.setattr(handover, "_restore", restore)
        monkeypatch.setattr(old, "go_on", go_on)
        monkeypatch.setattr(handover, "PATIENCE", 0.1)
        opening = asyncio.ensure_future(new.open())
        await asyncio.wait_for(gave_up.wait(), 5)
        monkeypatch.setattr(handover, "PATIENCE", 30.0)
        slow.set()
        with pytest.raises((PeerError, TimeoutError)):
            await opening
        assert not old.taken_over.is_set()
        assert await one.ask("word", 99) == word(99 * PAGE)
        await new.aclose()


async def test_a_client_that_ends_meanwhile_does_not_end_the_hand_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    async with guest("", PAGES) as one, guest("", PAGES) as two:
        old = serve.listen(path, source=DATA, dialect=PlainDialect())
        await old.open()
        await one.ask("hand_over", str(path))
        await two.ask("hand_over", str(path))
        real = handover._describe

        async def describe(client: serve.Client, pages: int) -> Any:
            if client.number == 1:
                old._end(old.clients[1])
            return await real(client, pages)

        monkeypatch.setattr(handover, "_describe", describe)
        async with serve.listen(path, source=DATA, dialect=PlainDialect(), take_over=True) as new:
            await old.taken_over.wait()
            await old.aclose()
            assert len(new.clients) == 1
            assert await one.ask("word", 5) == word(5 * PAGE)
