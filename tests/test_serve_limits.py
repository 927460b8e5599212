"""What one client can cost the others: the limits of docs/serving.md, and work in steps."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import serve
from aiouffd.foreign import areas, ending, memory, states
from aiouffd.foreign.areas import AreaMap
from aiouffd.foreign.blocks import ZEROS_COST, BlockStore
from aiouffd.foreign.reactor import Share
from aiouffd.serve import Area
from aiouffd.serve.dialects.native import REFUSED, UNAVAILABLE, mapped_runs
from aiouffd.sources import FunctionSource
from tests.guests import AREA, COUNT, PlainDialect, guest
from tests.other_user import as_nobody, shared_folder
from tests.support import ROOT, Gate, environment, word
from tests.test_serve import ALL, DATA, PAGE, PAGES, serving, until
from tests.test_serve_hostile import child_of, seen_by

# ------------------------------------------------------------------ work in steps


def endless(size: int) -> FunctionSource:
    """An object of any size, with its own offsets in it."""

    async def read(offset: int, length: int) -> bytes:
        return b"".join(word(at).to_bytes(8, "little") for at in range(offset, offset + length, 8))

    return FunctionSource(read, size=size)


async def test_others_have_their_turn_while_one_drops_a_lot(tmp_path: Path) -> None:
    pages = 1 << 24  # of which each has a state: 64 GiB
    async with (
        serving(tmp_path, endless(pages * PAGE)) as (_, dialect),
        guest(tmp_path / "s", pages, noreserve=True) as one,
    ):
        large = await dialect.memories.get()
        assert await one.ask("word", 5) == word(5 * PAGE)
        done = one.tell("drop", 0, pages)
        await until_settling(large)
        turns = 0
        while large.settling:
            await asyncio.sleep(0)
            turns += 1
        assert turns >= pages // states.STEP - 2
        await done
        assert await one.ask("words", [5, 6, pages - 1]) == [0, 0, 0]


async def until_settling(large: serve.Memory) -> None:
    async with asyncio.timeout(20):
        while True:
            if large.settling:
                return
            await asyncio.sleep(0)


@pytest.mark.needs_root
async def test_events_that_are_applied_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every event goes that way, and nobody sees a difference."""
    monkeypatch.setattr(memory, "WORK_MAX", -1)
    monkeypatch.setattr(areas, "STEP", 3)
    async with (
        serving(tmp_path) as (server, dialect),
        guest(tmp_path / "s", PAGES, features=ALL) as one,
    ):
        found = await dialect.memories.get()
        assert await one.ask("words", [10, 40]) == [word(10 * PAGE), word(40 * PAGE)]
        await one.ask("drop", 32, 32)
        assert await one.ask("words", [31, 32, 40, 64]) == [
            word(31 * PAGE), 0, 0, word(64 * PAGE),
        ]  # fmt: skip
        assert await one.ask("fork", [10, 40, 100]) == [word(10 * PAGE), 0, word(100 * PAGE)]
        await one.ask("unmap", 200, 10)
        await one.ask("move", 128, 32)
        await one.ask("drop", 130, 2)
        assert await one.ask("words", [129, 130, 132]) == [word(129 * PAGE), 0, word(132 * PAGE)]
        assert found.stats.events >= 5
        assert not found.settling
        await until(lambda: len(server.clients[0].memories) == 1)


async def test_bringing_everything_waits_out_what_came_at_a_bad_time(tmp_path: Path) -> None:
    """Blocks that come while nothing can be filled are asked for again, also if that is over by the
    time that they are missed."""
    gate = Gate(DATA, is_open=False)
    source = FunctionSource(gate.read, size=len(DATA))
    async with (
        serving(tmp_path, source, keep=0) as (_, dialect),
        guest(tmp_path / "s", PAGES) as one,
    ):
        found = await dialect.memories.get()
        real = found._bringer.heard

        def heard(store: BlockStore, block: int) -> bool:
            if len(found._bringer._liked) == 1 and not pauses:
                pauses.append(block)
                found.pause()
                asyncio.get_running_loop().call_soon(found.resume)
            return real(store, block)

        pauses: list[int] = []
        found._bringer.heard = heard  # type: ignore[method-assign]
        bringing = asyncio.ensure_future(found.complete())
        await asyncio.to_thread(gate.wait)
        gate.open()
        async with asyncio.timeout(10):
            await bringing
        assert pauses
        assert await one.ask("word", 255) == word(255 * PAGE)


@pytest.mark.needs_root
async def test_a_client_that_ends_while_its_events_are_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children whose forks were read and not applied are let go."""
    monkeypatch.setattr(memory, "WORK_MAX", -1)
    monkeypatch.setattr(areas, "STEP", 1)
    async with (
        serving(tmp_path) as (server, dialect),
        guest(tmp_path / "s", PAGES, features=ALL) as one,
    ):
        found = await dialect.memories.get()
        one.tell("drop", 0, PAGES)
        one.tell("fork", [10])
        await until_settling(found)
        server._end(server.clients[0])
        assert found.closed
        await one.end()


async def test_a_server_closes_while_events_are_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "WORK_MAX", -1)
    monkeypatch.setattr(areas, "STEP", 1)
    async with guest("", PAGES) as one:
        async with serving(tmp_path) as (_, dialect):
            await one.ask("hand_over", str(tmp_path / "s"))
            found = await dialect.memories.get()
            one.tell("drop", 0, PAGES)
            await until_settling(found)
        assert found.closed


async def test_a_hand_over_waits_for_events_that_are_being_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "WORK_MAX", -1)
    monkeypatch.setattr(areas, "STEP", 1)
    async with guest("", PAGES) as one:
        dialect = PlainDialect()
        old = serve.listen(tmp_path / "s", source=DATA, dialect=dialect)
        await old.open()
        await one.ask("hand_over", str(tmp_path / "s"))
        found = await dialect.memories.get()
        done = one.tell("drop", 16, 100)
        await until_settling(found)
        new = serve.listen(tmp_path / "s", source=DATA, dialect=PlainDialect(), take_over=True)
        async with new:
            await done
            await old.aclose()
            assert await one.ask("words", [15, 16, 115, 116]) == [
                word(15 * PAGE), 0, 0, word(116 * PAGE),
            ]  # fmt: skip


def test_what_is_left_of_large_memory_is_found_in_steps() -> None:
    """A client that connects again says what has gone; it may say that of every other page."""
    count = 1 << 20
    fd = states.new_file("states")
    try:
        os.write(fd, bytes([areas.GONE, 1]) * (count // 2))
        with mmap.mmap(fd, count) as data, memoryview(data) as view:
            finding = mapped_runs(view, fd, 0, count)
            turns = sum(1 for _ in zip(range(count), finding, strict=False))
        assert turns >= 8
    finally:
        os.close(fd)


async def test_many_areas_are_checked_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.client, "CHECKED", 1)
    monkeypatch.setattr(memory, "WAKES", 1)

    class InSteps(PlainDialect):
        async def talk(self, client: serve.Client) -> None:
            async def adopt(fd: int, whole: list[Area], **_: Any) -> Any:
                (area,) = whole
                pages = [
                    Area(area.start + at, PAGE, area.store, at)
                    for at in range(0, area.length, PAGE)
                ]
                turns = 0

                async def count() -> None:
                    nonlocal turns
                    while True:
                        await asyncio.sleep(0)
                        turns += 1

                counting = asyncio.ensure_future(count())
                found = await client.adopt_in_steps(fd, pages)
                counting.cancel()
                assert turns >= len(pages) - 1
                return found

            data, fds = await client.channel.recv_exactly(COUNT.size, max_fds=1)
            data, _ = await client.channel.recv_exactly(AREA.size)
            start, length, offset = AREA.unpack(data)
            await adopt(fds[0], [Area(start, length, client.source, offset)])
            await client.channel.send(b"k")
            client.keep_while_connected()

    async with (
        serving(tmp_path, dialect=InSteps()) as (server, _),
        guest(tmp_path / "s", PAGES) as one,
    ):
        assert len(server.clients[0].memories[0].areas) == PAGES
        assert await one.ask("words", [0, 99, 255]) == [word(0), word(99 * PAGE), word(255 * PAGE)]


class Blocks:
    """As much of a store as a map of areas needs."""

    block_size = 16 * PAGE


def test_many_areas_are_found_without_putting_them_in_order_each_time() -> None:
    store: Any = Blocks()
    found = AreaMap(
        Area((1 + 4 * number) * PAGE, 2 * PAGE, store, 2 * number * PAGE) for number in range(500)
    )

    def check() -> None:
        for block in range(0, 70, 3):
            low, high = block * 16 * PAGE, (block + 1) * 16 * PAGE
            expected = {
                page
                for area in found
                for page in range(area.start, area.end, PAGE)
                if low <= area.offset_of(page) < high
            }
            got = {
                page
                for _, start, end in found.of_block(store, block)
                for page in range(start, end, PAGE)
            }
            assert got == expected

    check()
    order = found._indexed
    found.unmapped(801 * PAGE, 802 * PAGE)
    found.moved(1001 * PAGE, 3000 * PAGE, 2 * PAGE)
    found.unmapped(3000 * PAGE, 3001 * PAGE)
    check()
    assert found._indexed == order
    for number in range(40):
        found.moved((1201 + 4 * number) * PAGE, (4000 + 4 * number) * PAGE, 2 * PAGE)
    check()
    assert found._indexed != order


# -------------------------------------------------------------------------- pages


async def test_pages_of_one_client(tmp_path: Path) -> None:
    limits = serve.Limits(pages=PAGES)
    async with serving(tmp_path, DATA + DATA, limits=limits) as (server, _):
        async with guest(tmp_path / "s", PAGES) as one:
            assert await one.ask("word", 4) == word(4 * PAGE)
            assert server.clients[0].pages == PAGES
        async with guest("", PAGES + 1) as two:
            assert await two.ask("hand_over", str(tmp_path / "s")) == ""
        assert server.refused == 1


async def test_pages_of_all_clients(tmp_path: Path) -> None:
    limits = serve.Limits(all_pages=PAGES + 10)
    async with serving(tmp_path, limits=limits) as (server, _):
        async with guest(tmp_path / "s", PAGES) as one, guest("", 11) as two:
            assert await two.ask("hand_over", str(tmp_path / "s")) == ""
            async with guest(tmp_path / "s", 10) as three:
                assert await three.ask("word", 4) == word(4 * PAGE)
            assert await one.ask("word", 4) == word(4 * PAGE)
            await one.end()
            await until(lambda: not server.clients)
        async with guest(tmp_path / "s", 11) as two:
            assert await two.ask("word", 4) == word(4 * PAGE)


@pytest.mark.needs_root
async def test_a_child_with_more_pages_than_there_may_be_gets_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "PIECE", 7)
    limits = serve.Limits(pages=2 * PAGES - 1)
    async with (
        serving(tmp_path, limits=limits) as (server, _),
        guest(tmp_path / "s", PAGES, features=ALL) as one,
    ):
        pid, name = await child_of(one, tmp_path, [17])
        assert await seen_by(pid, name) is None
        assert await one.ask("word", 200) == word(200 * PAGE)
        assert server.clients[0].pages == PAGES


def test_states_of_large_areas_take_no_memory_before_they_are_known() -> None:
    before = resource_of("RssAnon")
    large = states.new(1 << 30)
    assert large[1 << 29] == 0
    assert resource_of("RssAnon") - before < 1 << 24


def resource_of(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


async def test_states_are_saved_without_their_holes() -> None:
    large = states.new(1 << 24)
    large[5] = large[1 << 20] = large[(1 << 24) - 1] = 3
    fd = states.new_file("states")
    try:
        await states.save(large, fd, 0)
        assert os.fstat(fd).st_blocks * 512 <= 3 * PAGE
        found = await states.load(fd, 1 << 24)
        assert [at for at in (5, 6, 1 << 20, (1 << 24) - 1) if found[at]] == [
            5, 1 << 20, (1 << 24) - 1,
        ]  # fmt: skip
        with pytest.raises(aiouffd.PeerError):
            await states.load(fd, 1 << 23)
    finally:
        os.close(fd)


# --------------------------------------------------------------------- connections


@contextlib.contextmanager
def silent(path: Path, count: int) -> Any:
    """Connections that say nothing."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(10)
            sock.connect(str(path))
            found.append(sock)
        yield found


async def test_silent_connections_lock_nobody_out(tmp_path: Path) -> None:
    async with serving(tmp_path, max_clients=8) as (server, _):
        with silent(tmp_path / "s", 20) as connections:
            async with asyncio.timeout(5), guest(tmp_path / "s", PAGES) as one:
                assert await one.ask("word", 4) == word(4 * PAGE)
                # Who has handed something over keeps its place.
                with silent(tmp_path / "s", 20):
                    await until(lambda: server.refused >= 33)
                    assert await one.ask("word", 99) == word(99 * PAGE)
                    assert len(server.clients) == 8
            assert await asyncio.to_thread(connections[0].recv, 1) == b""


async def test_silent_connections_give_their_descriptors_back(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _), guest("", PAGES) as one:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with silent(tmp_path / "s", 30):
            await until(lambda: len(server.clients) == 30)
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
            holders = []
            try:
                with contextlib.suppress(OSError):
                    while True:
                        holders.append(os.open("/", os.O_PATH))
                await one.ask("hand_over", str(tmp_path / "s"))
                assert await one.ask("word", 4) == word(4 * PAGE)
            finally:
                for fd in holders:
                    os.close(fd)
                resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_who_says_nothing_for_a_while_makes_place_for_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.server, "SILENT", 0.0)
    async with serving(tmp_path, max_clients=1) as (_, _):
        with silent(tmp_path / "s", 1):
            async with guest(tmp_path / "s", PAGES) as one:
                assert await one.ask("word", 4) == word(4 * PAGE)


async def test_a_full_server_says_so(tmp_path: Path) -> None:
    async with serve.listen(tmp_path / "s", source=DATA, max_clients=1) as server:
        program = "import aiouffd, sys; m = aiouffd.attach(sys.argv[1]).open(); input()"
        holder = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, str(tmp_path / "s")),
            stdin=asyncio.subprocess.PIPE,
            env=environment(PYTHONPATH=str(ROOT)),
        )
        await until(lambda: bool(server.clients and server.clients[0].memories))
        with silent(tmp_path / "s", 1) as (sock,):
            said = await asyncio.to_thread(sock.recv, 1000)
        assert int.from_bytes(said[20:24], "little") == UNAVAILABLE
        assert b"1 clients already" in said
        await holder.communicate(b"\n")


@pytest.mark.needs_root
async def test_connections_of_another_user() -> None:
    limits = serve.Limits(user_clients=2)
    with shared_folder() as folder:
        path = folder / "s"

        def ask() -> list[bytes]:
            with silent(path, 2) as (first, second), silent(path, 1) as (third,):
                said = [third.recv(1000)]
                for sock in (first, second):
                    sock.settimeout(0.0)
                    with contextlib.suppress(BlockingIOError):
                        said.append(sock.recv(1))
                return said

        async with serve.listen(
            path, source=DATA, mode=0o666, allow=serve.anybody, limits=limits
        ) as server:
            (said,) = await asyncio.to_thread(as_nobody, ask)
            assert b"has 2 clients already" in said
            assert server.refused == 1


async def test_few_are_told_why_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.server, "REFUSING", 3)
    async with serve.listen(tmp_path / "s", source=DATA, allow=lambda peer: False) as server:
        with silent(tmp_path / "s", 10) as connections:
            await until(lambda: server.refused == 10)
            said = [await asyncio.to_thread(sock.recv, 1000) for sock in connections]
            assert [bool(text) for text in said] == [True] * 3 + [False] * 7
            assert len(server._refusing) == 3
            assert server.clients == []


async def test_who_is_turned_away_is_told_why(tmp_path: Path) -> None:
    """And its program does not try again."""
    calls = 0

    def no(peer: serve.Peer) -> bool:
        nonlocal calls
        calls += 1
        return False

    program = "import sys, aiouffd; aiouffd.attach(sys.argv[1], timeout=5.0).open()"
    async with serve.listen(tmp_path / "s", source=DATA, allow=no):
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, str(tmp_path / "s")),
            stderr=asyncio.subprocess.PIPE,
            env=environment(PYTHONPATH=str(ROOT)),
        )
        _, said = await client.communicate()
        assert b"PermissionError" in said
        assert f"does not serve the user {os.geteuid()}".encode() in said
        assert calls == 1


# ------------------------------------------------------------------------- user code


async def no_policy(peer: serve.Peer) -> bool:
    return True


def fails(error: BaseException) -> Any:
    def policy(*_: Any) -> bool:
        raise error

    return policy


@pytest.mark.parametrize(
    "allow", [no_policy, fails(asyncio.CancelledError()), fails(ValueError("oops"))]
)
async def test_a_policy_that_cannot_say_lets_nobody_in(
    tmp_path: Path, loop_errors: list[dict[str, Any]], allow: Any
) -> None:
    async with serve.listen(tmp_path / "s", source=DATA, allow=allow) as server:
        with silent(tmp_path / "s", 2) as connections:
            for sock in connections:
                said = await asyncio.to_thread(sock.recv, 1000)
                assert int.from_bytes(said[20:24], "little") == REFUSED
        assert server.refused == 2
        assert len(loop_errors) == 2
        loop_errors.clear()


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyError("x"), TypeError("bug")])
async def test_an_on_client_that_fails_harms_one_client(
    tmp_path: Path, loop_errors: list[dict[str, Any]], error: BaseException
) -> None:
    async def on_client(client: serve.Client) -> None:
        if client.number == 2:
            raise error

    async with (
        serving(tmp_path, on_client=on_client) as (server, _),
        guest(tmp_path / "s", PAGES) as one,
    ):
        with silent(tmp_path / "s", 1) as (sock,):
            assert await asyncio.to_thread(sock.recv, 1) == b""
        assert await one.ask("word", 4) == word(4 * PAGE)
        assert len(server.clients) == 1
        assert len(loop_errors) == 1
        loop_errors.clear()
        async with guest(tmp_path / "s", PAGES) as three:
            assert await three.ask("word", 4) == word(4 * PAGE)


async def test_objects_that_cannot_be_looked_up(tmp_path: Path) -> None:
    from aiouffd.serve.dialects.native import NativeDialect

    def objects(name: str) -> Any:
        raise RuntimeError("secret")

    program = "import sys, aiouffd; aiouffd.attach(sys.argv[1], object='x').open()"
    async with serve.listen(tmp_path / "s", dialect=NativeDialect(objects)):
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, str(tmp_path / "s")),
            stderr=asyncio.subprocess.PIPE,
            env=environment(PYTHONPATH=str(ROOT)),
        )
        _, said = await client.communicate()
        assert b"looking the object up has failed" in said
        assert b"secret" not in said


async def test_few_objects_are_opened_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.stores, "OPENINGS", 3)
    stores = serve.stores.Stores(block_size=PAGE)
    gate, under_way, most = asyncio.Event(), 0, 0

    class Counted(FunctionSource):
        async def open(self) -> None:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await gate.wait()
            under_way -= 1

    async def read(offset: int, length: int) -> bytes:
        return bytes(length)

    wanted = [
        asyncio.ensure_future(stores.get(Counted(read, size=PAGE), {}, number))
        for number in range(10)
    ]
    await until(lambda: under_way == 3)
    gate.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*wanted)
    assert most == 3
    await stores.aclose()


async def test_who_comes_again_and_again_does_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve.listen(tmp_path / "s", source=DATA, allow=lambda peer: False) as server:
        with silent(tmp_path / "s", 40):
            await until(lambda: server.refused == 40)
    assert caplog.text.count("is turned away") == serve.server.TELL_TIMES


# ------------------------------------------------------------------ blocks and waiters


class Asker:
    def __init__(self) -> None:
        self.share = Share()
        self.came = 0

    def landed(self, store: BlockStore, block: int, data: memoryview | None) -> None:
        self.came += 1

    def failed(self, store: BlockStore, block: int, error: BaseException) -> None:
        raise AssertionError(error)

    def broken(self, error: Exception) -> None:
        raise error


async def test_blocks_of_zeros_are_kept_within_the_limit() -> None:
    class Zeros(FunctionSource):
        async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
            return [(offset, length)]

    async def read(offset: int, length: int) -> bytes:
        raise AssertionError("it is a hole")

    store = BlockStore(Zeros(read, size=1 << 40), block_size=PAGE, keep=100 * ZEROS_COST)
    await store.open()
    asker = Asker()
    for block in range(1000):
        store.want(block, asker)
    await until(lambda: asker.came == 1000)
    assert len(store._kept) == 100
    assert store.peek(999) == (None,)
    assert store.peek(0) is None
    await store.aclose()


async def test_what_nobody_wants_any_more_is_not_fetched() -> None:
    gate = Gate(DATA, is_open=False)
    store = BlockStore(FunctionSource(gate.read, size=len(DATA)), block_size=PAGE)
    await store.open()
    one, two = Asker(), Asker()
    for block in range(80):  # 64 are on their way at a time
        store.want(block, one)
    store.want(79, two)
    for block in (1, 70, 79):
        store.forget(one, block)
    gate.open()
    await until(lambda: one.came == 77 and two.came == 1)
    assert store.peek(70) is None
    await store.aclose()


async def test_who_waits_for_more_than_is_remembered_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "WAITING_MAX", 4)
    gate = Gate(DATA, is_open=False)
    source = FunctionSource(gate.read, size=len(DATA))
    async with (
        serving(tmp_path, source, block_size=PAGE, keep=0) as (_, dialect),
        guest(tmp_path / "s", PAGES) as one,
    ):
        found = await dialect.memories.get()
        touches = [one.tell("word", page) for page in range(4)]
        await until(lambda: len(found._wanted) == 4)
        more = one.tell("word", 40)
        await until(lambda: found.stats.faults > 5)
        assert len(found._wanted) <= 4
        gate.open()
        async with asyncio.timeout(10):
            assert await asyncio.gather(*touches, more) == [
                word(page * PAGE) for page in (0, 1, 2, 3, 40)
            ]
