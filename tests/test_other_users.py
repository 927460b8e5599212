"""A name in a directory is no identity: what other users can put there is not believed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import serve
from aiouffd.errors import SourceError, UsageError
from aiouffd.fetch.workingset import WorkingSet
from aiouffd.nbd import NbdServer
from aiouffd.nbd.source import NbdSource
from aiouffd.serve import handover
from aiouffd.serve.channel import Channel
from aiouffd.serve.criu import CriuServer
from aiouffd.serve.dialects.native import REFUSED
from aiouffd.serve.handover import HELLO
from aiouffd.sources.cache import layout
from aiouffd.sources.memory import MemorySource
from aiouffd.util import unix_sockets
from aiouffd.util.places import Unsafe, check_directory, replace_file, user_id
from tests.criu import images as written
from tests.guests import PlainDialect, guest
from tests.other_user import NOBODY, as_nobody, listening, shared_folder
from tests.servers.pager import PagerProcess
from tests.support import wait_until, word
from tests.test_criu_dialect import tree
from tests.test_serve import DATA, PAGE, PAGES, serving

pytestmark = pytest.mark.needs_root


def server_at(path: Path, **options: Any) -> serve.Server:
    return serve.listen(path, source=DATA, dialect=PlainDialect(), **options)


# ------------------------------------------------------------------ directories


def test_directories_that_are_ours(tmp_path: Path) -> None:
    check_directory(tmp_path)
    check_directory("/")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "relative").symlink_to("link/../" + tmp_path.name)
    check_directory(tmp_path / "relative")
    with pytest.raises(FileNotFoundError):
        check_directory(tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_directory(tmp_path / "file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        check_directory(tmp_path / "loop")


@pytest.mark.parametrize(
    ("mode", "owner", "group", "safe"),
    [
        (0o755, 0, 0, True),
        (0o755, 0, 1, True),
        (0o1777, 0, 0, True),
        (0o777, 0, 0, False),
        (0o775, 0, 0, True),  # the user's own group, in which nobody else is
        (0o775, 0, 1, False),
        (0o755, 1, 1, False),
    ],
)
def test_directories_that_others_can_change(mode: int, owner: int, group: int, safe: bool) -> None:
    with shared_folder(mode, owner, group) as folder:
        below = folder / "below"
        below.mkdir()
        for path in (folder, below):
            with contextlib.nullcontext() if safe else pytest.raises(Unsafe, match=str(folder)):
                check_directory(path)


def test_links_of_others_are_not_followed(tmp_path: Path) -> None:
    with shared_folder() as folder:
        as_nobody(lambda: (folder / "link").symlink_to(tmp_path))
        with pytest.raises(Unsafe, match="user 65534"):
            check_directory(folder / "link")


# --------------------------------------------------------------------- hand-over


@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_somebody_else_poses_as_the_server_to_take_over_from(mode: int) -> None:
    """Not a word is said to it, whoever owns the directory."""
    with (
        shared_folder(mode, owner=0 if mode == 0o1777 else NOBODY) as folder,
        listening(folder / "s.handover", answer=b"x" * 100) as listener,
    ):
        server = server_at(folder / "s", take_over=True)

        async def main() -> None:
            with pytest.raises(PermissionError, match="pose as the server"):
                await server.open()
            await server.aclose()

        asyncio.run(main())
        assert b"".join(listener.heard()) == b""


async def test_a_socket_of_ours_that_others_may_replace_is_not_trusted() -> None:
    """Root listens there, but it is not known whether for this."""
    with shared_folder(0o777) as folder, socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "s.handover"))
        sock.listen()
        with pytest.raises(PermissionError):
            await server_at(folder / "s", take_over=True).open()


async def test_a_link_to_the_socket_of_another_server_is_not_followed(tmp_path: Path) -> None:
    """Or whoever makes it would have a server of ours take the clients of another one."""
    path = tmp_path / "s"
    async with serving(tmp_path) as (old, _), guest(path, PAGES) as one:
        (tmp_path / "other.handover").symlink_to("s.handover")
        with pytest.raises(PermissionError, match="not a socket"):
            await server_at(tmp_path / "other", take_over=True).open()
        assert not old.taken_over.is_set()
        assert await one.ask("word", 3) == word(3 * PAGE)


async def test_no_successor_is_waited_for_where_others_can_pose_as_one(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with shared_folder(0o777) as folder:
        async with server_at(folder / "s") as server, guest(folder / "s", PAGES) as one:
            assert os.listdir(folder) == ["s"]
            assert "no successor" in caplog.text
            assert await one.ask("word", 3) == word(3 * PAGE)
            # It is where it can be.
        async with (
            server_at(folder / "s", handover=tmp_path / "h") as server,
            guest(folder / "s", PAGES) as one,
            server_at(folder / "s", handover=tmp_path / "h", take_over=True),
        ):
            await server.taken_over.wait()
            assert await one.ask("word", 3) == word(3 * PAGE)
        assert os.listdir(tmp_path) == []


async def test_a_successor_of_another_user_is_hung_up_on() -> None:
    with shared_folder(0o755) as folder:
        async with server_at(folder / "s") as server, guest(folder / "s", PAGES) as one:
            (folder / "s.handover").chmod(0o666)

            def pose() -> bytes:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(10)
                    sock.connect(str(folder / "s.handover"))
                    with contextlib.suppress(BrokenPipeError):
                        sock.sendall(HELLO)
                    with contextlib.suppress(ConnectionResetError):
                        return sock.recv(100)
                    return b""

            assert await asyncio.to_thread(as_nobody, pose) == b""
            assert not server.taken_over.is_set()
            assert await one.ask("word", 3) == word(3 * PAGE)


class FakeServer:
    """A server of our own user that says what it likes."""

    def __init__(self, path: Path) -> None:
        self._sock, _ = unix_sockets.bind_at(path, 0o600)
        self._sock.listen(1)
        self._sock.setblocking(False)

    async def hand_over(self, item: dict[str, Any]) -> None:
        """One client, whose connection is with ourselves, and which has no memory."""
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._sock)
        self._sock.close()
        channel = Channel(connection, serve.Peer.of(connection))
        ours, theirs = socket.socketpair()
        pages = os.memfd_create("pages")
        uffd = aiouffd.Userfaultfd(user_mode_only=True)
        try:
            await channel.recv_exactly(len(HELLO))
            await handover._send(channel, {"clients": 1, "object": None}, [])
            os.ftruncate(pages, item["states"])
            fds = [ours.fileno(), pages, *[uffd.fileno()] * len(item["memories"])]
            await handover._send(channel, item, fds)
            assert await channel.recv(100) == (b"", [])
        finally:
            uffd.close()
            os.close(pages)
            ours.close()
            theirs.close()
            channel.close()
            channel.peer.close()


def described(**area: Any) -> dict[str, Any]:
    """A client with one area."""
    store = {"own": False, "name": "/etc/hostname", "size": 4096, "version": "x"}
    whole = {"start": 1 << 20, "length": 4096, "offset": 0, "store": store} | area
    memory = {
        "name": "of somebody",
        "page_size": 4096,
        "uncovered": "poison",
        "background": False,
        "sole": False,
        "areas": [whole],
    }
    return {
        "pidfd": False,
        "alone": False,
        "complete_on_close": False,
        "connected": True,
        "asked": None,
        "states": 1,
        "memories": [memory],
    }


async def test_no_source_is_opened_that_the_other_server_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = serve.stores.as_source
    monkeypatch.setattr(
        serve.stores, "as_source", lambda what, **more: opened.append(what) or real(what, **more)
    )
    fake = FakeServer(tmp_path / "s.handover")
    server = server_at(tmp_path / "s", take_over=True)
    said = asyncio.ensure_future(fake.hand_over(described()))
    with pytest.raises(UsageError, match=r"/etc/hostname.*not of this server"):
        await server.open()
    await said
    assert opened == [DATA]


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": "no"},
        {"length": 4095},
        {"store": {}},
        {"store": 5},
        {"store": {"own": True, "name": "x"}},
        {"offset": None},
    ],
)
async def test_nonsense_of_the_other_server_is_refused(tmp_path: Path, wrong: Any) -> None:
    fake = FakeServer(tmp_path / "s.handover")
    server = server_at(tmp_path / "s", take_over=True)
    said = asyncio.ensure_future(fake.hand_over(described(**wrong)))
    with pytest.raises(aiouffd.errors.AiouffdError):
        await server.open()
    await said
    assert server.clients == []


async def test_whose_clients_they_are_is_asked_of_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "s"
    seen: list[serve.Peer] = []

    async def on_client(client: serve.Client) -> None:
        seen.append(client.peer)
        assert client.peer.alive

    async with guest("", PAGES) as one:
        old = server_at(path)
        await old.open()
        await one.ask("hand_over", str(path))
        async with server_at(path, take_over=True, on_client=on_client) as new:
            await old.taken_over.wait()
            await old.aclose()
            assert [(peer.pid, peer.uid) for peer in seen] == [(one.process.pid, 0)]
            assert new.clients[0].kill()
            assert await one.process.wait() == -9


async def test_a_noted_pidfd_has_to_be_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.5 the kernel does not give one later on."""
    monkeypatch.setattr(serve.peer, "_SO_PEERPIDFD", 9999)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = serve.Peer.of(ours, os.pidfd_open(os.getppid()))
        assert peer.pidfd == -1
        peer = serve.Peer.of(ours, os.pidfd_open(os.getpid()))
        assert peer.pidfd >= 0
        peer.close()
        assert serve.Peer.of(ours, -1).pidfd == -1


async def test_a_client_that_the_successor_may_not_serve(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(tmp_path) as (old, _), guest(path, PAGES) as one:
        new = server_at(path, take_over=True, allow=lambda peer: False)
        with pytest.raises(UsageError, match="allow="):
            await new.open()
        assert not old.taken_over.is_set()
        assert await one.ask("word", 3) == word(3 * PAGE)


# -------------------------------------------------------------- listening sockets


@pytest.mark.parametrize("mode", [0o600, 0o666, 0o640])
@pytest.mark.parametrize("umask", [0o022, 0o177, 0])
def test_a_socket_has_exactly_its_mode(tmp_path: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        sock, identity = unix_sockets.bind_at(tmp_path / "s", mode)
    finally:
        assert os.umask(before) == umask
    with sock:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        assert unix_sockets.identity_of(tmp_path / "s") == identity


def test_no_file_is_touched_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "s").symlink_to("file")
    with pytest.raises(OSError, match="in use"):
        unix_sockets.bind_at(tmp_path / "s", 0o666)
    (tmp_path / "t").symlink_to("nowhere")
    with pytest.raises(OSError, match="in use"):
        unix_sockets.bind_at(tmp_path / "t", 0o666)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert not (tmp_path / "nowhere").exists()


async def test_clients_of_other_users_are_told_that_they_are_not_served() -> None:
    with shared_folder() as folder:

        def ask() -> bytes:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(str(folder / "s"))
                with contextlib.suppress(BrokenPipeError):
                    sock.sendall(b"anything")
                return sock.recv(1000)

        async with serve.listen(folder / "s", source=DATA, mode=0o666) as server:
            said = await asyncio.to_thread(as_nobody, ask)
            assert int.from_bytes(said[20:24], "little") == REFUSED
            assert b"does not serve the user 65534" in said
            assert server.refused == 1
        async with server_at(folder / "s", mode=0o666) as server:
            # This dialect has no words for it.
            with pytest.raises(AssertionError, match=r"ConnectionResetError|assert"):
                assert await asyncio.to_thread(as_nobody, ask)
            assert server.refused == 1


async def test_the_one_restore_is_not_another_users(tmp_path: Path) -> None:
    written.write(tmp_path, written.dump(tree()))
    with shared_folder() as folder:
        async with CriuServer(tmp_path, work_dir=folder) as server:
            server.path.chmod(0o666)

            def ask() -> bytes:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(10)
                    sock.connect(str(server.path))
                    with contextlib.suppress(BrokenPipeError):
                        sock.sendall(bytes(4))
                    with contextlib.suppress(ConnectionResetError):
                        return sock.recv(1)
                    return b""

            assert await asyncio.to_thread(as_nobody, ask) == b""
            assert server.dialect.begun == 0
            assert server.path.exists()


# ------------------------------------------------------------------------ attach


def test_attach_says_nothing_to_the_server_of_another_user() -> None:
    with shared_folder() as folder, listening(folder / "s") as listener:
        with pytest.raises(PermissionError, match="another user"):
            aiouffd.attach(folder / "s", timeout=5.0).open()
        assert listener.heard() == [b""]


@pytest.mark.parametrize("user", [NOBODY, "nobody", -1])
def test_attach_to_the_server_of_another_user_that_was_named(user: int | str) -> None:
    with shared_folder() as folder, listening(folder / "s", answer=b"x" * 16) as listener:
        with pytest.raises(Exception, match=r"hung up|protocol"):
            aiouffd.attach(folder / "s", server_user=user).open()
        assert len(listener.heard()[0]) == 24  # a question


def test_users_that_are_none() -> None:
    assert user_id("root") == 0
    assert user_id("1234") == 1234
    for wrong in ("no such user", -2, 1 << 32):
        with pytest.raises(UsageError):
            user_id(wrong)


def test_memory_is_not_handed_to_another_user_when_the_server_is_gone() -> None:
    with shared_folder() as folder:
        server = PagerProcess("pager", folder, len(DATA))
        server.start()
        try:
            with aiouffd.attach(folder / "s") as memory:
                assert memory[:8] == DATA[:8]
                server.kill()
                os.unlink(folder / "s")
                with listening(folder / "s") as listener:
                    listener.wait()
                    listener.wait()  # it tries again
                    assert b"".join(listener.heard()) == b""
                os.unlink(folder / "s")
                server.start()
                at = 200 * PAGE
                assert memory[at : at + 8] == DATA[at : at + 8]
                wait_until(lambda: memory.resumed == 1, "the keeper to say so")
        finally:
            server.kill()


# --------------------------------------------------------------------------- NBD


async def test_nbd_on_the_socket_of_another_user(tmp_path: Path) -> None:
    with shared_folder() as folder, listening(folder / "s", answer=b"x" * 200) as listener:
        url = f"nbd+unix:///x?socket={folder / 's'}"
        source = NbdSource(url, reconnect=0.0)
        with pytest.raises(PermissionError, match=r"65534.*server_user"):
            await source.open()
        await source.aclose()
        other = NbdSource(url, reconnect=0.0, server_user="nobody")
        with pytest.raises(SourceError, match=r"NBD|magic|protocol"):
            await other.open()
        await other.aclose()
        assert (await asyncio.to_thread(listener.heard))[0] == b""


async def test_nbd_on_a_socket_of_ours(tmp_path: Path) -> None:
    source = MemorySource(DATA)
    async with NbdServer({"": source}) as server:
        url = await server.listen_unix(tmp_path / "s")
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
        found = NbdSource(url)
        await found.open()
        assert bytes(await found.read(0, 16)) == DATA[:16]
        await found.aclose()
        # And it replaces nothing but a socket that was left behind.
        (tmp_path / "file").symlink_to("nowhere")
        with pytest.raises(OSError, match="in use"):
            await server.listen_unix(tmp_path / "file", 0o666)
    assert not (tmp_path / "s").exists()


# -------------------------------------------------------------------------- files


def test_files_are_written_beside_what_others_have_put_there(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    with shared_folder() as folder:
        target = folder / "start.ws"
        # What the name of the part was before: the process's number.
        names = [f".start.ws.{os.getpid()}.part", "start.ws"]
        as_nobody(lambda: [(folder / name).symlink_to(victim) for name in names])
        found = WorkingSet([(0, 4096)], size=8192)
        found.save(target)
        assert WorkingSet.load(target) == found
        assert not target.is_symlink()
    assert victim.read_bytes() == b"mine"


def test_a_file_appears_as_a_whole(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "f", b"one")
        replace_file(tmp_path / "f", b"two")
    finally:
        os.umask(before)
    assert (tmp_path / "f").read_bytes() == b"two"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    (tmp_path / "d").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "d", b"three")
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o755, NOBODY)])
async def test_a_cache_below_a_directory_of_others_is_not_believed(mode: int, owner: int) -> None:
    with shared_folder(mode, owner) as folder:
        with pytest.raises(Unsafe):
            layout.make_directory(folder / "cache" / "v1")
        assert not (folder / "cache" / "v1").exists()


async def test_a_cache_in_a_directory_that_all_can_write_to(tmp_path: Path) -> None:
    with shared_folder(0o1777) as folder:
        layout.make_directory(folder / "cache" / "v1")
        (folder / "cache" / "CACHEDIR.TAG").unlink()
        with pytest.raises(Unsafe):
            layout.make_directory(folder / "v1")  # in itself
        as_nobody(lambda: (folder / "link").symlink_to(tmp_path))
        with pytest.raises(Unsafe):
            layout.make_directory(folder / "link" / "v1")
    assert os.listdir(tmp_path) == []
