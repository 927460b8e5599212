"""One server takes over from another: hundreds of clients, and deaths at every step."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiouffd
from aiouffd import serve
from aiouffd.errors import PeerError
from aiouffd.serve.handover import HELLO
from tests.guests import PlainDialect, guest
from tests.support import Gate, content, wait_until, word
from tests.test_serve import ALL, DATA, PAGE, PAGES, ended, serving, until
from tests.test_serve_hostile import seen_by
from tests.test_serve_swarm import SIZE, Running, server, swarm

#: The object of servers that are processes of their own.
THERE = content(SIZE)
PAGES_THERE = SIZE // PAGE


async def test_a_successor_takes_over(tmp_path: Path) -> None:
    """Clients that cannot connect again notice nothing: removed pages stay zeros, threads that
    waited are served, and new clients find the successor."""
    path = tmp_path / "s"
    file = tmp_path / "object"
    file.write_bytes(DATA)
    gate = Gate(DATA, is_open=False)

    async def other(client: serve.Client) -> None:
        if client.peer.pid == two.process.pid:
            client.source = await client.store_for(str(file))

    held = aiouffd.sources.FunctionSource(gate.read, size=len(DATA))
    async with guest("", PAGES) as one, guest("", PAGES) as two:
        old = serve.listen(path, source=held, dialect=PlainDialect(), on_client=other)
        await old.open()
        await one.ask("hand_over", str(path))
        await two.ask("hand_over", str(path))
        await one.ask("drop", 16, 8)
        assert await two.ask("word", 3) == word(3 * PAGE)
        await two.ask("drop", 100, 1)
        touch = one.tell("word", 40)
        await asyncio.to_thread(gate.wait)
        new = serve.listen(
            path, source=DATA, dialect=PlainDialect(), on_client=other, take_over=True
        )
        async with new:
            await old.taken_over.wait()
            assert await touch == word(40 * PAGE)
            await old.aclose()
            assert path.exists()
            assert [len(client.memories) for client in new.clients] == [1, 1]
            assert await one.ask("words", [15, 16, 23, 24]) == [
                word(15 * PAGE), 0, 0, word(24 * PAGE),
            ]  # fmt: skip
            assert await two.ask("words", [3, 99, 100]) == [word(3 * PAGE), word(99 * PAGE), 0]
            async with guest(path, PAGES) as three:
                assert await three.ask("word", 5) == word(5 * PAGE)
            await one.end()
            await two.end()
            await ended(new)
    assert not path.exists()
    assert os.listdir(tmp_path) == ["object"]


async def test_a_successor_with_another_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(tmp_path) as (old, _), guest(path, PAGES) as one:
        with pytest.raises(aiouffd.SourceChangedError):
            await serve.listen(
                path, source=DATA[PAGE:], dialect=PlainDialect(), take_over=True
            ).open()
        assert not old.taken_over.is_set()
        assert await one.ask("word", 5) == word(5 * PAGE)
        async with guest(path, PAGES) as two:
            assert await two.ask("word", 5) == word(5 * PAGE)


@pytest.mark.parametrize("said", [b"", HELLO[:5], b"nonsense of this size", HELLO])
async def test_a_successor_that_hangs_up(tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "s"
    async with serving(tmp_path) as (old, _), guest(path, PAGES) as one:
        await one.ask("word", 5)

        def hang_up() -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(str(path.with_name("s.handover")))
                connection.sendall(said)
                if said == HELLO:
                    connection.settimeout(10)
                    connection.recv(16)

        await asyncio.to_thread(hang_up)
        assert await one.ask("word", 99) == word(99 * PAGE)
        assert not old.taken_over.is_set()


async def test_nobody_to_take_over_from(tmp_path: Path) -> None:
    async with serving(tmp_path, take_over=True), guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("word", 5) == word(5 * PAGE)


async def test_another_one_waits_to_take_over(tmp_path: Path) -> None:
    """While nobody accepts, the loop must not wait for a place in the queue."""
    with contextlib.ExitStack() as sockets:
        silent = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        silent.bind(str(tmp_path / "s.handover"))
        silent.listen(0)
        others = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sockets.enter_context(others)
        others.connect(silent.getsockname())
        with pytest.raises(PeerError, match="others wait"):
            await serve.listen(
                tmp_path / "s", source=DATA, dialect=PlainDialect(), take_over=True
            ).open()


@pytest.mark.needs_root
async def test_children_of_clients_that_connect_again(tmp_path: Path) -> None:
    """Such clients are let go, and find the successor. Their children cannot."""

    class Reconnecting(PlainDialect):
        async def talk(self, client: serve.Client) -> None:
            await super().talk(client)
            client.reconnects = True

    path, name = tmp_path / "s", tmp_path / "look"
    async with guest("", PAGES, features=ALL) as one:
        old = serve.listen(path, source=DATA, dialect=Reconnecting())
        await old.open()
        await one.ask("hand_over", str(path))
        await one.ask("drop", 9, 1)
        pid = await one.ask("leave_child", [9, 200], str(name))
        (client,) = old.clients
        await until(lambda: len(client.memories) == 2)
        async with serve.listen(path, source=DATA, dialect=Reconnecting(), take_over=True) as new:
            await old.taken_over.wait()
            await old.aclose()
            assert [len(client.memories) for client in new.clients] == [1]
            assert await seen_by(pid, name) == [0, word(200 * PAGE)]
            new.clients[0].probe()
            assert new.clients == []


# ----------------------------------------------- processes that die on the way

CLIENTS = 6
#: What the successor does on the way: a message for the head, and one for each client.
RECEIVING = [f"_receive:{count}" for count in range(1, CLIENTS + 2)]


@contextlib.contextmanager
def crowd(running: Running, processes: int, rests: int, *, pause: int) -> Iterator[None]:
    """Clients that touch their pages until the first of them has rested for so many
    milliseconds, which is checked."""
    numbers = (processes, 2, 60, 7, rests * 1000 // 120, 1, pause)
    command = [swarm(), str(running.path), *map(str, numbers)]
    before = running.descriptors()
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        # A connection, a pidfd and a userfaultfd of each.
        wait_until(lambda: running.descriptors() >= before + 3 * processes, "clients to come", 60)
        yield
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
def test_hundreds_of_clients_and_many_successors(tmp_path: Path, loop_name: str) -> None:
    with contextlib.ExitStack() as servers:
        running = servers.enter_context(server(tmp_path, loop_name))
        idle = running.descriptors()
        with crowd(running, 250, 5000, pause=10_000):
            for _ in range(4):
                successor = servers.enter_context(server(tmp_path, loop_name, "--take-over"))
                faults, refused = running.end()
                assert faults
                assert refused == 0
                running = successor
        wait_until(lambda: running.descriptors() == idle, "the last server to let go", 30)
        faults, refused = running.end()
        assert faults
        assert refused == 0


@pytest.mark.slow
def test_successors_that_are_killed_at_each_step(tmp_path: Path, loop_name: str) -> None:
    with contextlib.ExitStack() as servers:
        running = servers.enter_context(server(tmp_path, loop_name))
        # Longer than it takes to start that many servers on a busy machine.
        with crowd(running, CLIENTS, 15_000, pause=2000):
            for step in RECEIVING:
                with (
                    pytest.raises(AssertionError),
                    server(tmp_path, loop_name, "--take-over", "--die-at", step),
                ):
                    pytest.fail("it lives")
                assert running.process.poll() is None
            successor = servers.enter_context(server(tmp_path, loop_name, "--take-over"))
            running.end()
            # Who comes then is served as well.
            done = subprocess.run(
                [swarm(), str(successor.path), "4", "2", "60", "7", "0", "1"],
                capture_output=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("step", "served"), [("_send:1", 0), ("_send:2", 0), ("_send:4", 2), ("_say:1", 3)]
)
async def test_a_server_that_is_killed_while_it_hands_over(
    tmp_path: Path, step: str, served: int
) -> None:
    """Whose memory has come is served; the others have lost their server, as if it had died
    alone. New clients find the successor in any case."""
    path = tmp_path / "s"
    async with contextlib.AsyncExitStack() as stack:
        running = await asyncio.to_thread(
            stack.enter_context,
            server(tmp_path, "asyncio", "--die-at", step),
        )
        guests = [await stack.enter_async_context(guest(path, PAGES_THERE)) for _ in range(3)]
        for one in guests:
            assert await one.ask("word", 5) == word(5 * PAGE)
            await one.ask("drop", 7, 1)
        new = serve.listen(path, source=THERE, dialect=PlainDialect(), take_over=True)
        await stack.enter_async_context(new)
        assert await asyncio.to_thread(running.process.wait, 10) == -signal.SIGKILL
        assert len(new.clients) == served
        for one in guests[:served]:
            assert await one.ask("words", [5, 6, 7]) == [word(5 * PAGE), word(6 * PAGE), 0]
        async with guest(path, PAGES_THERE) as another:
            assert await another.ask("word", 9) == word(9 * PAGE)
        for one in guests:
            await one.end()
        await ended(new)
