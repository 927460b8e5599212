"""Lazy restores: a restorer of our own, real memory, and peers that do not keep to the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import ClosedError, PeerError, SourceChangedError, SourceError, UsageError
from aiouffd.kernel.probe import probe
from aiouffd.serve.criu import CriuServer, ImageError, serve_images
from aiouffd.sources import FunctionSource
from tests.criu import images as written
from tests.criu.driver import Gate, check_all, descriptors, restorer, task_of
from tests.criu.images import LAZY, PAGE, PRESENT, Pages, Task
from tests.criu.restorer import new_uffd
from tests.support import environment

BASE = 0x20_0000_0000
FINISHED = struct.pack("=I", 0x52535446)


def at(page: int) -> int:
    return BASE + page * PAGE


def pid_of(pid: int) -> bytes:
    return struct.pack("=i", pid)


def tree() -> list[Task]:
    """Two living tasks at the same addresses and a dead one. Each has pages of all kinds: lazy ones
    over two mappings, one that is restored at once, and some that were never there."""
    one = Task(
        101,
        [(at(0), at(64)), (at(64), at(96)), (at(200), at(208))],
        [Pages(at(0), 20, tag=1), Pages(at(20), 4, PRESENT, tag=1), Pages(at(40), 40, tag=1)],
    )
    two = Task(102, [(at(0), at(64))], [Pages(at(8), 30, tag=2)])
    return [one, Task(103, dead=True), two]


@asynccontextmanager
async def serving(images: Any, **settings: Any) -> AsyncIterator[CriuServer]:
    """A server, which leaves nothing behind."""
    before = descriptors()
    async with CriuServer(images, **settings) as server:
        yield server
    assert not server.path.exists()
    assert not server.server.clients
    assert descriptors() == before


async def over(server: CriuServer) -> None:
    async with asyncio.timeout(20):
        await server.over()


# ------------------------------------------------------------------- restores


@pytest.mark.parametrize("dribble", [False, True])
async def test_a_tree_is_restored(tmp_path: Path, dribble: bool) -> None:
    tasks = tree()
    written.write(tmp_path, written.dump(tasks))
    gate = Gate(tmp_path, "gate")
    async with serving(tmp_path) as server:
        specification = [
            task_of(
                tasks[0], before=[["check", at(3), 2]], after=[gate.wait, *check_all(tasks[0])]
            ),
            task_of(tasks[1]),
            task_of(tasks[2], after=check_all(tasks[2])),
        ]
        async with restorer(tmp_path, specification, dribble=dribble) as process:
            await over(server)
            # Nobody serves any more, and everything is there.
            assert not server.server.clients
            await server.aclose()
            await gate.open()
            await process.end()
    assert server.stats.installed_bytes == 90 * PAGE
    assert server.dialect.finished == 1
    assert not server.dialect.failed


async def test_only_faults_before_the_last_word(tmp_path: Path) -> None:
    tasks = [Task(101, [(at(0), at(256))], [Pages(at(0), 256)])]
    written.write(tmp_path, written.dump(tasks))
    gate = Gate(tmp_path, "gate")
    by_kernel = [["kernel", at(41), 1]] if probe().kernel_mode_faults else []
    before = [["check", at(40), 1], *by_kernel, ["say", "touched"], gate.wait]
    async with serving(tmp_path) as server:
        specification = [task_of(tasks[0], before=before, after=check_all(tasks[0]))]
        async with restorer(tmp_path, specification) as process:
            await process.said("touched")
            for _ in range(20):
                await asyncio.sleep(0.01)  # nothing happens, and nothing tells so
            assert server.stats.installed_bytes == 16 * PAGE  # a block
            assert not server.dialect.finished
            await gate.open()
            await over(server)
            await process.end()
    assert server.stats.installed_bytes == 256 * PAGE


async def test_a_failed_restore(tmp_path: Path) -> None:
    tasks = tree()
    written.write(tmp_path, written.dump(tasks))
    async with serving(tmp_path) as server:
        specification = [task_of(task) for task in tasks]
        async with restorer(tmp_path, specification, finish=False, linger=False) as process:
            with pytest.raises(PeerError, match="hung up after 0 of 4 bytes"):
                await over(server)
            await process.process.wait()
    assert server.dialect.failed == 1


@pytest.mark.needs_root
async def test_forks(tmp_path: Path) -> None:
    """Before and after the last word; children of children; each writes, and sees its own."""
    task = Task(101, [(at(0), at(512))], [Pages(at(0), 400)])
    written.write(tmp_path, written.dump([task]))
    deep = ["fork", [["store", at(71)], ["check", at(64), 16], ["fork", check_all(task)]]]
    before = [["store", at(5)], ["fork", [["check", at(0), 8], ["store", at(6)], deep]]]
    after = [["fork_on", [*check_all(task), deep]], ["store", at(399)], *check_all(task)]
    async with (
        serving(tmp_path) as server,
        restorer(tmp_path, [task_of(task, before=before, after=after)]) as process,
    ):
        await over(server)
        await process.end()
    assert server.stats.forks >= 3


@pytest.mark.needs_root
async def test_children_outlive_their_parent(tmp_path: Path) -> None:
    """What was forked has all of its memory too before the server lets go."""
    task = Task(101, [(at(0), at(512))], [Pages(at(0), 512)])
    written.write(tmp_path, written.dump([task]))
    gate, hold = Gate(tmp_path, "gate"), Gate(tmp_path, "hold")
    before = [["fork_on", [["say", "forked"], gate.wait, *check_all(task)]], hold.wait]
    async with (
        serving(tmp_path) as server,
        restorer(tmp_path, [task_of(task, before=before)]) as process,
    ):
        await process.said("forked")
        await hold.open()
        await over(server)
        await server.aclose()
        await gate.open()
        await process.end()
    assert server.stats.installed_bytes == 2 * 512 * PAGE


@pytest.mark.needs_root
async def test_children_of_while_memory_is_brought(tmp_path: Path) -> None:
    """A fork after the last word, and its parent ends: the child is waited for."""
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    files: dict[str, Any] = written.dump([task])
    source = Slow(files["pages-1.img"])
    files["pages-1.img"] = source
    gate, hold = Gate(tmp_path, "gate"), Gate(tmp_path, "hold")
    after = [["fork_on", [["say", "forked"], gate.wait, *check_all(task)]], hold.wait]
    async with (
        serving(files, work_dir=tmp_path) as server,
        restorer(tmp_path, [task_of(task, after=after)]) as process,
    ):
        await process.said("forked")
        await source.asked()
        source.gate.set()
        await over(server)
        await server.aclose()
        await gate.open()
        await hold.open()
        await process.end()
    assert server.stats.installed_bytes == 2 * 256 * PAGE


@pytest.mark.parametrize("when", ["before", "after"])
async def test_memory_is_moved_dropped_and_unmapped(tmp_path: Path, when: str) -> None:
    task = Task(
        101, [(at(0), at(128)), (at(200), at(264))], [Pages(at(0), 128), Pages(at(200), 64)]
    )
    written.write(tmp_path, written.dump([task]))
    far = at(4096)
    actions: list[list[Any]] = [
        ["check", at(16), 2],
        ["drop", at(17), 3],
        ["check", at(16), 6],
        ["move", at(32), 32, far],
        ["check", far, 8],
        ["drop", far + 4 * PAGE, 8],
        ["store", far + 20 * PAGE],
        ["unmap", at(200), 8],
        ["free", at(64), 0] if False else ["drop", at(64), 1],
        ["check", at(208), 56],
    ]
    check = [
        ["check", at(0), 32],
        ["check", far, 32],
        ["check", at(64), 64],
        ["check", at(208), 56],
    ]
    more = {"before": [*actions, *check], "after": check}
    if when == "after":
        more = {"before": [], "after": [*actions, *check]}
    async with (
        serving(tmp_path) as server,
        restorer(tmp_path, [task_of(task, **more)]) as process,
    ):
        await over(server)
        await process.end()
    # After the last word it may be over before anything happens.
    assert when == "after" or server.stats.events >= 6


async def test_threads_wait_for_the_same_page(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(64))], [Pages(at(0), 64)])
    files: dict[str, Any] = written.dump([task])
    source = Slow(files["pages-1.img"])
    files["pages-1.img"] = source
    touches = [["touch", at(page % 3)] for page in range(12)]
    async with serving(files, work_dir=tmp_path) as server:
        specification = [task_of(task, before=[*touches, ["join"]], after=check_all(task))]
        async with restorer(tmp_path, specification) as process:
            await source.asked()
            source.gate.set()
            await over(server)
            await process.end()


class Slow(FunctionSource):
    """Bytes that come when they are let."""

    def __init__(self, data: bytes) -> None:
        self.gate = asyncio.Event()
        self._asked = asyncio.Event()
        self.error: Exception | None = None
        self.open_from = len(data)

        async def read(offset: int, length: int) -> bytes:
            self._asked.set()
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            return data[offset : offset + length]

        super().__init__(read, len(data), portable=True)

    async def asked(self) -> None:
        async with asyncio.timeout(10):
            await self._asked.wait()
            self._asked.clear()


async def test_restores_again_and_at_once(tmp_path: Path) -> None:
    tasks = tree()
    folders = [tmp_path / "a", tmp_path / "b"]
    written.write(tmp_path, written.dump(tasks))
    specification = [
        task_of(task, **({} if task.dead else {"after": check_all(task)})) for task in tasks
    ]
    async with serving(tmp_path, keep=True) as server:
        for _ in range(2):
            async with restorer(tmp_path, specification) as process:
                await process.end()
        async with (
            restorer(tmp_path, specification) as one,
            restorer(tmp_path, specification) as two,
        ):
            await asyncio.gather(one.end(), two.end())
        assert server.path.exists()
        await server.dialect.settle()
        assert server.dialect.finished == 4
        # One that fails is nothing to the others.
        stream = Peer(server)
        stream.close()
        async with restorer(tmp_path, specification) as process:
            await process.end()
    assert folders
    assert server.dialect.finished == 5


async def test_one_restore_is_accepted(tmp_path: Path) -> None:
    written.write(tmp_path, written.dump(tree()))
    async with serving(tmp_path) as server:
        one, two, three = Peer(server), Peer(server), Peer(server)
        one.close()  # it only looked whether somebody is there
        two.say(pid_of(101))
        await three.dropped()
        assert not server.path.exists()
        with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
            Peer(server)
        two.close()
        with pytest.raises(PeerError):
            await over(server)


def wait_for_end(pid: int) -> None:
    """Block until a process has ended, and leave it to others to hear how."""
    pidfd = os.pidfd_open(pid)
    try:
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        assert ended.poll(20_000)
    finally:
        os.close(pidfd)


async def test_the_restorer_ends_before_it_was_heard(tmp_path: Path) -> None:
    """All that it said is in the socket. Its end must not be taken for that of its processes."""
    task = Task(101, [(at(0), at(64))], [Pages(at(0), 64)])
    written.write(tmp_path, written.dump([task]))
    async with serving(tmp_path) as server:
        specification = [task_of(task, after=check_all(task))]
        async with restorer(tmp_path, specification, linger=False) as process:
            # Nothing runs here until it has ended: there is no fault before its last word.
            wait_for_end(process.process.pid)
            await over(server)
            await process.end()
    assert server.stats.installed_bytes == 64 * PAGE


async def test_it_all_from_serve_images(tmp_path: Path) -> None:
    tasks = tree()
    written.write(tmp_path, written.dump(tasks))
    ready = asyncio.Event()
    serve = asyncio.ensure_future(
        serve_images(tmp_path, ready=lambda server: ready.set(), block_size=8192)
    )
    await ready.wait()
    specification = [
        task_of(task, **({} if task.dead else {"after": check_all(task)})) for task in tasks
    ]
    async with restorer(tmp_path, specification) as process:
        async with asyncio.timeout(20):
            stats = await serve
        await process.end()
    assert stats.installed_bytes == 90 * PAGE


async def test_everything_without_lazy_flags(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(64))], [Pages(at(0), 64, PRESENT)])
    written.write(tmp_path, written.dump([task], entry=written.entry_20))
    specification = task_of(task, after=check_all(task), eager=[], lazy=[[at(0), 64, 1]])
    async with (
        serving(tmp_path, everything=True) as server,
        restorer(tmp_path, [specification]) as process,
    ):
        await over(server)
        await process.end()


# ------------------------------------------------------------------- closing


async def test_closing_lets_a_restore_end_first(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    written.write(tmp_path, written.dump([task]))
    gate, last = Gate(tmp_path, "gate"), Gate(tmp_path, "last")
    before = [["check", at(3), 1], ["say", "here"], gate.wait, ["check", at(100), 1]]
    async with serving(tmp_path) as server:
        specification = [task_of(task, before=before, after=[last.wait, *check_all(task)])]
        async with restorer(tmp_path, specification) as process:
            await process.said("here")
            closing = asyncio.ensure_future(server.aclose())
            await gate.open()
            async with asyncio.timeout(20):
                await closing
            await last.open()
            await process.end()


async def test_closing_completes_what_was_not_to_be(tmp_path: Path) -> None:
    """Without ``complete`` processes are served for as long as they live."""
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    written.write(tmp_path, written.dump([task]))
    gate = Gate(tmp_path, "gate")
    after = [["check", at(3), 1], ["say", "here"], gate.wait, *check_all(task)]
    async with (
        serving(tmp_path, complete=False) as server,
        restorer(tmp_path, [task_of(task, after=after)]) as process,
    ):
        await process.said("here")
        assert server.stats.installed_bytes == 16 * PAGE
        waiting = asyncio.ensure_future(server.over())
        await asyncio.sleep(0)
        assert not waiting.done()
        await server.aclose()
        await waiting
        await gate.open()
        await process.end()
    assert server.stats.installed_bytes == 256 * PAGE


async def test_processes_that_are_not_completed_end(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    written.write(tmp_path, written.dump([task]))
    async with (
        serving(tmp_path, complete=False) as server,
        restorer(tmp_path, [task_of(task, after=[["check", at(3), 1]])]) as process,
    ):
        await process.end()
        await over(server)
    assert server.stats.installed_bytes == 16 * PAGE


async def test_closing_at_once_makes_errors_and_not_zeros(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    files: dict[str, Any] = written.dump([task])
    source = Slow(files["pages-1.img"])
    files["pages-1.img"] = source
    gate = Gate(tmp_path, "gate")
    specification = task_of(task, after=[["say", "here"], gate.wait, ["check", at(9), 1]])
    async with (
        serving(files, work_dir=tmp_path) as server,
        restorer(tmp_path, [specification]) as process,
    ):
        await process.said("here")
        await source.asked()
        await server.aclose(now=True)
        with pytest.raises(ClosedError):
            await over(server)
        await gate.open()
        await process.said(f"killed by {int(signal.SIGBUS)}")
    assert server.stats.poisoned_pages == 256


async def test_the_source_fails_for_good(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    files: dict[str, Any] = written.dump([task])
    source = Slow(files["pages-1.img"])
    source.error = SourceChangedError("it is another one now")
    files["pages-1.img"] = source
    gate = Gate(tmp_path, "gate")
    specification = task_of(task, after=[gate.wait, ["check", at(9), 1]])
    async with (
        serving(files, work_dir=tmp_path) as server,
        restorer(tmp_path, [specification]) as process,
    ):
        source.gate.set()
        with pytest.raises(SourceError):
            await over(server)
        await gate.open()
        await process.said(f"killed by {int(signal.SIGBUS)}")
    assert server.stats.poisoned_pages == 256


async def test_the_source_fails_for_a_while(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    files: dict[str, Any] = written.dump([task])
    source = Slow(files["pages-1.img"])
    source.error = ConnectionResetError("gone")
    source.gate.set()
    files["pages-1.img"] = source
    async with (
        serving(files, work_dir=tmp_path) as server,
        restorer(tmp_path, [task_of(task, after=check_all(task))]) as process,
    ):
        await source.asked()
        await source.asked()
        source.error = None
        await over(server)
        await process.end()


async def test_all_processes_are_killed_while_they_are_completed(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    files: dict[str, Any] = written.dump([task])
    source = Slow(files["pages-1.img"])
    files["pages-1.img"] = source
    async with serving(files, work_dir=tmp_path) as server:
        async with restorer(tmp_path, [task_of(task, after=[["check", at(1), 1]])]):
            await source.asked()
        await over(server)


# ------------------------------------------------------------- where the socket is


async def test_a_work_directory_with_a_long_name(tmp_path: Path) -> None:
    task = Task(101, [(at(0), at(64))], [Pages(at(0), 64)])
    written.write(tmp_path / "images", written.dump([task]))
    folder = tmp_path / ("x" * 120) / ("y" * 120)
    folder.mkdir(parents=True)
    async with serving(tmp_path / "images", work_dir=folder) as server:
        assert server.path == folder / "lazy-pages.socket"
        assert server.path.is_socket()
        assert server.path.stat().st_mode & 0o777 == 0o600
        async with restorer(folder, [task_of(task, after=check_all(task))]) as process:
            await over(server)
            await process.end()


async def test_the_socket_is_where_the_images_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = written.dump(tree())
    written.write(tmp_path / "images", files)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    async with serving(tmp_path / "images") as server:
        assert server.path == tmp_path / "images" / "lazy-pages.socket"
        await server.aclose(now=True)
    async with serving(files) as server:
        assert server.path.resolve() == tmp_path / "elsewhere" / "lazy-pages.socket"
        await server.aclose(now=True)


async def test_a_socket_that_was_left_behind(tmp_path: Path) -> None:
    written.write(tmp_path, written.dump(tree()))
    with socket.socket(socket.AF_UNIX) as old, short(tmp_path / "lazy-pages.socket") as path:
        old.bind(path)
    async with serving(tmp_path) as server:
        # A server that lives stays.
        with pytest.raises(OSError, match="in use"):
            async with CriuServer(tmp_path):
                pass
        await server.aclose(now=True)


async def test_what_cannot_be_served_is_seen_at_once(tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(ImageError):
        async with CriuServer(tmp_path):
            pass
    left = [Task(101, [(at(0), at(64))], [Pages(at(0), 64, LAZY)])]
    with pytest.raises(UsageError, match="page server"):
        async with CriuServer(written.dump(left), work_dir=tmp_path):
            pass
    with pytest.raises(FileNotFoundError):
        async with CriuServer(written.dump(tree()), work_dir=tmp_path / "nowhere"):
            pass
    with pytest.raises(SourceError, match="cannot connect"):
        async with CriuServer(written.dump(left), work_dir=tmp_path, page_server="127.0.0.1:1"):
            pass
    assert descriptors() == before


# ------------------------------------------------------------ streams made by hand


@contextlib.contextmanager
def short(path: Path) -> Iterator[str]:
    """A name of a socket that fits into an address, however long the folder's is."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Peer:
    """A connection that says whatever a test likes."""

    def __init__(self, server: CriuServer) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short(server.path) as path:
                self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise
        self.socket.setblocking(False)

    def say(self, data: bytes, *fds: int) -> None:
        """Send, and close the descriptors here."""
        try:
            socket.send_fds(self.socket, [data], fds) if fds else self.socket.send(data)
        finally:
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        self.socket.close()

    async def dropped(self) -> None:
        """Until the server hangs up."""
        loop = asyncio.get_running_loop()
        with self.socket, contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                assert await loop.sock_recv(self.socket, 1) == b""


def two_tasks() -> dict[str, bytes]:
    pages = [Pages(at(0), 4)]
    living = [Task(pid, [(at(0), at(4))], pages) for pid in (7, 8)]
    return written.dump([*living, Task(9, dead=True)])


def good_stream() -> list[tuple[bytes, bool]]:
    """Pieces, and whether a descriptor goes with one."""
    return [
        (pid_of(-9), False),
        (pid_of(8), False),
        (b"\0", True),
        (pid_of(7), False),
        (b"\0", True),
        (FINISHED, False),
    ]


LENGTH = sum(len(data) for data, _ in good_stream())


@pytest.mark.parametrize("length", range(1, LENGTH))
async def test_hung_up_after_each_byte(tmp_path: Path, length: int) -> None:
    async with serving(two_tasks(), work_dir=tmp_path) as server:
        peer, left = Peer(server), length
        for data, with_fd in good_stream():
            piece = data[:left]
            left -= len(piece)
            if piece:
                peer.say(piece, *([new_uffd()] if with_fd else []))
        peer.close()
        with pytest.raises(PeerError, match=r"hung up after \d of \d bytes"):
            await over(server)
    assert server.server.refused == 1


@pytest.mark.parametrize("at_a_time", [1, 4, LENGTH])
async def test_a_good_stream(tmp_path: Path, at_a_time: int) -> None:
    """However it is cut. There is no memory behind these descriptors, which is no matter."""
    async with serving(two_tasks(), work_dir=tmp_path) as server:
        peer = Peer(server)
        for data, with_fd in good_stream():
            for start in range(0, len(data), at_a_time):
                peer.say(data[start : start + at_a_time], *([new_uffd()] if with_fd else []))
                if at_a_time == 1:
                    await asyncio.sleep(0)
        await over(server)
        # It may go on talking: its processes are restored.
        with contextlib.suppress(ConnectionError):
            peer.say(b"more", new_uffd())
        peer.close()
    assert server.dialect.finished == 1


def _pipe_end() -> int:
    source, sink = os.pipe()
    os.close(sink)
    return source


BAD_STREAMS: dict[str, tuple[list[tuple[bytes, int]], str]] = {
    "an unknown task": ([(pid_of(6), 0)], "does not have"),
    "an unknown dead task": ([(pid_of(-6), 0)], "does not have"),
    "no task": ([(pid_of(0), 0)], "does not have"),
    "the lowest number": ([(pid_of(-(1 << 31)), 0)], "does not have"),
    "the last word at once": ([(FINISHED, 0)], "does not have"),
    "a task twice": ([(pid_of(7), 0), (b"\0", 1), (pid_of(7), 0)], "twice"),
    "a task and it is dead": ([(pid_of(7), 0), (b"\0", 1), (pid_of(-7), 0)], "twice"),
    "a dead task twice": ([(pid_of(-9), 0), (pid_of(-9), 0)], "twice"),
    "a dead task that lives": ([(pid_of(9), 0), (b"\0", 1)], "no memory"),
    "no descriptor": ([(pid_of(7), 0), (b"\0", 0), (pid_of(8), 0)], "no descriptor"),
    "no descriptor, next record": ([(pid_of(7), 0), (pid_of(8), 0)], "no descriptor"),
    "two descriptors": ([(pid_of(7), 0), (b"\0", 2)], "2 descriptors"),
    "two hundred descriptors": ([(pid_of(7), 0), (b"\0", 200)], "200 descriptors"),
    "a descriptor with the pid": ([(pid_of(7), 1)], "1 descriptors"),
    "a descriptor with half a pid": ([(pid_of(7)[:2], 0), (pid_of(7)[2:], 1)], "1 descriptors"),
    "a descriptor with the last word": (
        [(pid_of(-7), 0), (pid_of(-8), 0), (pid_of(-9), 0), (FINISHED, 1)],
        "1 descriptors",
    ),
    "another last word": (
        [(pid_of(-7), 0), (pid_of(-8), 0), (pid_of(-9), 0), (b"FTSR"[::-1], 0)],
        "not with RSTF",
    ),
    "more tasks than there are": (
        [(pid_of(-7), 0), (pid_of(-8), 0), (pid_of(-9), 0), (pid_of(10), 0)],
        "not with RSTF",
    ),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
async def test_a_bad_stream(tmp_path: Path, case: str) -> None:
    stream, reason = BAD_STREAMS[case]
    async with serving(two_tasks(), work_dir=tmp_path) as server:
        peer = Peer(server)
        for data, count in stream:
            peer.say(data, *(new_uffd() for _ in range(count)))
        with pytest.raises(PeerError, match=reason):
            await over(server)
        await peer.dropped()


async def test_a_descriptor_of_something_else(tmp_path: Path) -> None:
    async with serving(two_tasks(), work_dir=tmp_path) as server:
        peer = Peer(server)
        peer.say(pid_of(7))
        peer.say(b"\0", _pipe_end())
        with pytest.raises(PeerError, match="something else"):
            await over(server)
        await peer.dropped()


async def test_descriptors_that_nobody_took(tmp_path: Path) -> None:
    """They are in the socket when the peer is dropped, and go with it."""
    async with serving(two_tasks(), work_dir=tmp_path) as server:
        peer = Peer(server)
        peer.say(pid_of(6))
        for _ in range(20):
            peer.say(b"\0", new_uffd())
        with pytest.raises(PeerError):
            await over(server)
        await peer.dropped()


async def test_closing_while_a_peer_is_silent(tmp_path: Path) -> None:
    async with serving(two_tasks(), work_dir=tmp_path) as server:
        peer = Peer(server)
        peer.say(pid_of(7))
        await asyncio.sleep(0.01)
        await server.aclose(now=True)
        with pytest.raises(ClosedError):
            await over(server)
        await peer.dropped()


async def test_stopping_before_any_restore(tmp_path: Path) -> None:
    stop = asyncio.Event()
    stats = asyncio.ensure_future(serve_images(two_tasks(), work_dir=tmp_path, stop=stop))
    await asyncio.sleep(0)
    stop.set()
    async with asyncio.timeout(10):
        assert (await stats).faults == 0


# ------------------------------------------------------------------ the command line


@asynccontextmanager
async def pager(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """``aiouffd pager criu``, as far as having said where its socket is."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "aiouffd", "pager", "criu", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            await process.stdout.readline()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_from_the_command_line(tmp_path: Path) -> None:
    tasks = tree()
    files = written.dump(tasks)
    written.write(tmp_path / "images", files)
    (tmp_path / "work").mkdir()
    arguments = ("--images", str(tmp_path / "images"), "--work-dir", str(tmp_path / "work"))
    specification = [task_of(t, **({} if t.dead else {"after": check_all(t)})) for t in tasks]
    async with pager(*arguments) as process:
        async with restorer(tmp_path / "work", specification) as one:
            async with asyncio.timeout(20):
                _, errors = await process.communicate()
            await one.end()
        assert process.returncode == 0
        assert b"360 KiB installed" in errors


async def test_a_failed_restore_from_the_command_line(tmp_path: Path) -> None:
    written.write(tmp_path, written.dump(tree()))
    async with pager("--images", str(tmp_path)) as process:
        with socket.socket(socket.AF_UNIX) as peer, short(tmp_path / "lazy-pages.socket") as path:
            peer.connect(path)
            peer.sendall(b"\1")
        async with asyncio.timeout(20):
            _, errors = await process.communicate()
        assert process.returncode == 1
        assert b"hung up" in errors
        assert b"Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
async def test_a_signal_in_the_middle_of_a_restore(tmp_path: Path, number: signal.Signals) -> None:
    """The restore comes to its end, and then the server does."""
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    written.write(tmp_path, written.dump([task]))
    gate, last = Gate(tmp_path, "gate"), Gate(tmp_path, "last")
    before = [["say", "here"], gate.wait, ["check", at(100), 1]]
    specification = task_of(task, before=before, after=[last.wait, *check_all(task)])
    async with (
        pager("--images", str(tmp_path), "--keep") as process,
        restorer(tmp_path, [specification]) as one,
    ):
        await one.said("here")
        process.send_signal(number)
        await gate.open()
        async with asyncio.timeout(20):
            await process.communicate()
        assert process.returncode == 0
        await last.open()
        await one.end()


async def test_two_signals_in_the_middle_of_a_restore(tmp_path: Path) -> None:
    """It is given up, which is no success."""
    task = Task(101, [(at(0), at(256))], [Pages(at(0), 256)])
    written.write(tmp_path, written.dump([task]))
    gate = Gate(tmp_path, "gate")
    specification = task_of(task, before=[["say", "here"], gate.wait])
    async with (
        pager("--images", str(tmp_path)) as process,
        restorer(tmp_path, [specification]) as one,
    ):
        await one.said("here")
        process.terminate()
        process.send_signal(signal.SIGHUP)  # two of one kind at once may be one
        async with asyncio.timeout(20):
            _, errors = await process.communicate()
        assert process.returncode == 1
        assert b"given up" in errors
        await gate.open()


async def test_images_that_are_none_from_the_command_line(tmp_path: Path) -> None:
    async with pager("--images", str(tmp_path)) as process:
        _, errors = await process.communicate()
        assert process.returncode == 1
        assert errors.startswith(b"aiouffd: there is no ")
