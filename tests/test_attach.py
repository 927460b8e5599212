"""Memory that another process fills: clients in Python and in C, and servers that die.

The servers are processes: the command ``aiouffd pager``, and a peer that shares no code with it.
``AIOUFFD_KILL_ROUNDS`` sets how many times the server is killed under load.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiouffd
from aiouffd import SourceError, UsageError
from aiouffd.kernel.lib import PAGE_SIZE
from tests.faulty import HUGE, huge_pages
from tests.scenarios import attaching
from tests.scenarios.attaching import keeper, waits
from tests.scenarios.gil_yield import TOUCHES
from tests.servers.pager import Kind, PagerProcess, serving
from tests.support import (
    ROOT,
    Process,
    compiler,
    content,
    environment,
    result_of,
    run,
    start,
    wait_until,
    word,
)

SIZE = 64 * PAGE_SIZE
DATA = content(SIZE)
ROUNDS = int(os.environ.get("AIOUFFD_KILL_ROUNDS", "10"))
CLIENT = ROOT / "native" / "client"
#: What is said of outages that last; a machine can be busy.
OUTAGE = re.compile(
    r"(aiouffd: process \d+, \S+: (lost the server; threads that touch missing pages wait.*"
    r"|a server is there again)\n)*"
)


@pytest.fixture(params=["pager", "peer"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def server(kind: Kind, tmp_path: Path) -> Iterator[PagerProcess]:
    with serving(kind, tmp_path, SIZE) as process:
        yield process


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Callable[..., PagerProcess]]:
    """Starts a peer in the given modes."""
    processes = []

    def begin(*modes: str, size: int = SIZE) -> PagerProcess:
        process = PagerProcess("peer", tmp_path, size, *modes)
        processes.append(process)
        process.start()
        return process

    yield begin
    for process in processes:
        process.kill()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No keeper, no userfaultfd."""
    yield
    gc.collect()
    assert keeper() is None
    assert attaching.userfaultfds() == 0


# ------------------------------------------------------------------------------ bytes


def test_the_bytes_are_right(server: PagerProcess) -> None:
    with aiouffd.attach(server.path) as memory:
        assert len(memory) == memory.object_size == SIZE
        assert memory.connected
        assert memory.address % PAGE_SIZE == 0
        assert memory[3] == DATA[3]
        assert memory[-1] == DATA[-1]
        assert memory[PAGE_SIZE - 4 : PAGE_SIZE + 4] == DATA[PAGE_SIZE - 4 : PAGE_SIZE + 4]
        assert memory[100:50:-7] == DATA[100:50:-7]
        assert memory[5:1000:9] == DATA[5:1000:9]
        assert memory[7:7] == b""
        assert bytes(memory) == b"".join([memory]) == DATA
        assert list(memory) == list(DATA)
        assert next(reversed(memory)) == DATA[-1]
        assert DATA[4000:9000] in memory
        assert memory.find(DATA[4000:9000], 8) == 4000
        assert b"no such thing" not in memory
        assert memory.array("<u8", 3, 800).tolist() == [101, 102, 103]
        for page, way in enumerate(TOUCHES):
            if way != "write" or not memory.user_mode_only:
                assert TOUCHES[way](memory.view, page * PAGE_SIZE) == word(page * PAGE_SIZE)
        memory.fetch(5, SIZE - 10)
        assert memory.view.readonly
        assert bytes(memory.view) == DATA
        assert int(np.frombuffer(memory.view, dtype="<u8").sum()) == sum(range(1, SIZE // 8 + 1))
        with pytest.raises(IndexError):
            memory[SIZE]
    assert memory.closed


async def test_with_async(server: PagerProcess) -> None:
    async with aiouffd.attach(server.path) as memory:
        assert await asyncio.to_thread(memory.__getitem__, slice(None)) == DATA
    memory = await aiouffd.attach(server.path)
    # The loop's own thread: the server is another process, and needs nothing of this one.
    assert TOUCHES["struct"](memory.view, 8) == word(8)
    await memory.aclose()
    await memory.aclose()


def test_a_part_of_an_object(server: PagerProcess) -> None:
    begin, count = 3 * PAGE_SIZE, 2 * PAGE_SIZE + 100
    with aiouffd.attach(server.path, offset=begin, length=count) as memory:
        assert memory[:] == DATA[begin : begin + count]
        assert (len(memory), memory.object_size) == (count, SIZE)
    with aiouffd.attach(server.path, offset=SIZE - PAGE_SIZE) as memory:
        assert memory[:] == DATA[-PAGE_SIZE:]


def test_an_object_that_ends_inside_of_a_page(kind: Kind, tmp_path: Path) -> None:
    size = PAGE_SIZE + 24
    with serving(kind, tmp_path, size) as server, aiouffd.attach(server.path) as memory:
        assert memory[:] == content(size)
        memory.discard(PAGE_SIZE, PAGE_SIZE)
        assert memory[PAGE_SIZE:] == bytes(24)


def test_an_empty_object(tmp_path: Path) -> None:
    with serving("peer", tmp_path, 0) as server, aiouffd.attach(server.path) as memory:
        assert len(memory) == 0
        assert memory[:] == b""
        assert memory.view.nbytes == 0
        memory.fetch()


def test_writing_is_ours_alone(server: PagerProcess) -> None:
    with (
        aiouffd.attach(server.path, writable=True) as one,
        aiouffd.attach(server.path) as other,
    ):
        one.view[PAGE_SIZE : PAGE_SIZE + 4] = b"ours"
        assert one[PAGE_SIZE : PAGE_SIZE + 8] == b"ours" + DATA[PAGE_SIZE + 4 : PAGE_SIZE + 8]
        assert other[:] == DATA


def test_what_is_discarded_reads_as_zeros(server: PagerProcess) -> None:
    with aiouffd.attach(server.path, writable=True) as memory:
        memory.fetch(0, 2 * PAGE_SIZE)
        memory.discard(PAGE_SIZE, 2 * PAGE_SIZE)  # one page that was there, one that was not
        expected = DATA[:PAGE_SIZE] + bytes(2 * PAGE_SIZE) + DATA[3 * PAGE_SIZE :]
        assert memory[:] == expected
        memory.discard(0, 0)
        for offset, length in (
            (1, PAGE_SIZE),
            (0, 100),
            (SIZE, PAGE_SIZE),
            (-PAGE_SIZE, PAGE_SIZE),
        ):
            with pytest.raises(UsageError):
                memory.discard(offset, length)
        assert memory[:] == expected


@pytest.mark.needs_root
def test_user_mode_only(server: PagerProcess) -> None:
    with aiouffd.attach(server.path, user_mode_only=True) as memory:
        assert memory.user_mode_only
        with pytest.raises(OSError, match="Bad address"):
            TOUCHES["write"](memory.view, 0)
        memory.fetch(0, 8)
        assert TOUCHES["write"](memory.view, 0) == word(0)
    with aiouffd.attach(server.path, user_mode_only=False) as memory:
        assert not memory.user_mode_only
        assert TOUCHES["write"](memory.view, 0) == word(0)


@pytest.mark.hugetlb
@pytest.mark.needs_root
def test_huge_pages(peer: Callable[..., PagerProcess]) -> None:
    data = content(3 << 20)
    server = peer(size=len(data))
    with huge_pages(2):
        with aiouffd.attach(server.path, kind="hugetlb") as memory:
            assert memory.address % HUGE == 0
            assert memory[5] == data[5]
            server.restart()
            assert memory[:] == data
            memory.discard(0, HUGE)
            assert memory[:HUGE] == bytes(HUGE)
        # Gone before the pages are given back.
        del memory
        gc.collect()


def test_in_the_background(kind: Kind, tmp_path: Path) -> None:
    if kind == "peer":
        pytest.skip("it does not know of it, and ignores the flag")
    with (
        serving(kind, tmp_path, SIZE) as server,
        aiouffd.attach(server.path, background=True) as memory,
    ):
        wait_until(lambda: _resident(memory) == SIZE // PAGE_SIZE, "everything to come")
        server.kill()
        assert bytes(memory.view) == DATA


def _resident(memory: aiouffd.Attachment) -> int:
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(memory.address // PAGE_SIZE * 8)
        words = np.frombuffer(pagemap.read(len(memory) // PAGE_SIZE * 8), dtype="<u8")
    return int(np.count_nonzero(words >> 62))


# -------------------------------------------------------------------------- beginnings


def test_wrong_arguments(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"kind": "memfd"},
        {"on_lost": "panic"},
        {"offset": -1},
        {"length": -1},
        {"timeout": -1},
        {"lost_timeout": 0},
    ]
    for arguments in wrong:
        with pytest.raises(UsageError):
            aiouffd.attach(tmp_path / "s", **arguments)
    with pytest.raises(UsageError, match="not open"):
        aiouffd.attach(tmp_path / "s").view  # noqa: B018
    with pytest.raises(UsageError):
        aiouffd.attach(tmp_path / "s", length=0).open()
    with pytest.raises(UsageError, match="107 bytes"):
        aiouffd.attach("/" + "x" * 200).open()
    with pytest.raises(UsageError, match="1024 bytes"):
        aiouffd.attach(tmp_path / "s", object="x" * 2000).open()


def test_no_server(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="no such socket"):
        aiouffd.attach(path).open()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        with pytest.raises(ConnectionRefusedError, match="nobody listens"):
            aiouffd.attach(path).open()
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        aiouffd.attach(path, timeout=0.3).open()
    assert 0.25 < time.monotonic() - began < 5


def test_what_the_server_refuses(server: PagerProcess) -> None:
    with pytest.raises(FileNotFoundError, match="no"):
        aiouffd.attach(server.path, object="other").open()
    for offset, length, text in (
        (0, SIZE + 1, "smaller"),
        (SIZE + PAGE_SIZE, None, "smaller"),
        (100, None, "page size"),
    ):
        with pytest.raises(UsageError, match=text):
            aiouffd.attach(server.path, offset=offset, length=length).open()
    with aiouffd.attach(server.path) as memory:
        assert memory[:] == DATA


async def test_a_server_in_this_process_is_refused(tmp_path: Path) -> None:
    async with aiouffd.serve.listen(tmp_path / "s", source=DATA):
        with pytest.raises(UsageError, match="this process"):
            await aiouffd.attach(tmp_path / "s")


async def test_waiting_for_a_server(kind: Kind, tmp_path: Path) -> None:
    server = PagerProcess(kind, tmp_path, SIZE)
    opening = asyncio.ensure_future(aiouffd.attach(server.path, timeout=None).aopen())
    try:
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(20):
            memory = await opening
        assert memory[:8] == DATA[:8]
        await memory.aclose()
    finally:
        server.kill()


async def test_cancelling_the_wait(tmp_path: Path) -> None:
    memory = aiouffd.attach(tmp_path / "s", timeout=None)
    opening = asyncio.ensure_future(memory.aopen())
    await asyncio.sleep(0)  # it has begun
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    with pytest.raises(UsageError, match="not open"):
        memory.fetch()


async def test_cancelling_while_the_server_thinks(peer: Callable[..., PagerProcess]) -> None:
    server = await asyncio.to_thread(peer, "silent")
    opening = asyncio.ensure_future(aiouffd.attach(server.path).aopen())
    await asyncio.to_thread(wait_until, lambda: connections(server.path) > 0, "it to connect")
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    # It has waited until the server had let go of whatever was sent.
    assert connections(server.path) == 0


def connections(path: str) -> int:
    """Accepted ones, at the server's end; by the kernel's list."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return sum(line[-1] == path and line[5] == "03" for line in lines)


def test_ctrl_c_while_waiting_for_a_server(tmp_path: Path) -> None:
    timer = threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        aiouffd.attach(tmp_path / "s", timeout=None).open()
    timer.join()


def test_closed(server: PagerProcess) -> None:
    memory = aiouffd.attach(server.path)
    memory.close()
    with pytest.raises(aiouffd.ClosedError):
        memory.open()
    memory = aiouffd.attach(server.path).open()
    assert memory.open() is memory
    memory.close()
    memory.close()
    assert "closed" in repr(memory)
    calls: list[Callable[[], Any]] = [
        lambda: memory.view,
        lambda: memory.address,
        lambda: memory[0],
        lambda: memory.fetch(),
        lambda: memory.discard(0, PAGE_SIZE),
        lambda: memory.connected,
        lambda: memory.open(),
    ]
    for call in calls:
        with pytest.raises(aiouffd.ClosedError):
            call()


def test_views_keep_it_alive(server: PagerProcess) -> None:
    array = np.frombuffer(aiouffd.attach(server.path).open().view, dtype="<u8")
    gc.collect()
    assert array[PAGE_SIZE // 8] == word(PAGE_SIZE)
    server.restart()
    assert int(array.sum()) == sum(range(1, SIZE // 8 + 1))
    del array
    gc.collect()
    assert keeper() is None


def test_many_threads_and_attachments(server: PagerProcess) -> None:
    def use() -> None:
        with aiouffd.attach(server.path) as memory:
            assert memory[:] == DATA

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ----------------------------------------------------------------------- the connection


def test_the_keeper_sleeps(server: PagerProcess) -> None:
    with aiouffd.attach(server.path) as memory:
        task = keeper()
        assert task is not None

        def switches() -> int:
            found = re.search(r"^voluntary.*:\s(\d+)", (task / "status").read_text(), re.MULTILINE)
            assert found is not None
            return int(found[1])

        wait_until(lambda: (task / "wchan").read_text().strip() in _POLLING, "the keeper to sleep")
        before = switches()
        assert memory[:] == DATA
        memory.discard(0, SIZE)
        assert memory[:] == bytes(SIZE)
        assert switches() == before
        status = (task / "status").read_text()
    blocked = re.search(r"^SigBlk:\s(\w+)", status, re.MULTILINE)
    assert blocked is not None
    # All but those that cannot be blocked, and the two that are the C library's own.
    assert int(blocked[1], 16) | 1 << 8 | 1 << 18 | 3 << 31 == (1 << 64) - 1


_POLLING = ("do_sys_poll", "do_poll", "poll_schedule_timeout.constprop.0", "do_poll.constprop.0")


def test_a_relative_path_survives_chdir(
    peer: Callable[..., PagerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = peer()
    monkeypatch.chdir(tmp_path)
    with aiouffd.attach("s") as memory:
        monkeypatch.chdir("/")
        server.restart()
        assert memory[:] == DATA


# -------------------------------------------------------------------------- a dead server


def test_a_dead_server_is_a_pause(server: PagerProcess) -> None:
    with aiouffd.attach(server.path, writable=True) as memory:
        memory.fetch(0, 8 * PAGE_SIZE)
        memory.view[:PAGE_SIZE] = b"w" * PAGE_SIZE
        memory.discard(PAGE_SIZE, PAGE_SIZE)  # was there
        memory.discard(20 * PAGE_SIZE, PAGE_SIZE)  # was not
        server.kill()
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda page=page: found.append(memory[page * PAGE_SIZE]))
            for page in (1, 20, 30, 31)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            wait_until(lambda thread=thread: waits(thread), "the thread to wait")
        assert not found
        assert memory.view[:PAGE_SIZE] == b"w" * PAGE_SIZE
        server.start()
        for thread in threads:
            thread.join(20)
        assert len(found) == 4
        # It may serve before the keeper has read its answer.
        wait_until(lambda: memory.resumed == 1, "the keeper to note it")
        expected = bytearray(DATA)
        expected[:PAGE_SIZE] = b"w" * PAGE_SIZE
        for page in (1, 20):
            expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
        assert memory[:] == expected


def test_the_message_died_with_the_server(peer: Callable[..., PagerProcess]) -> None:
    """The old one has read of the fault, the new one has not."""
    server = peer("swallow")
    with aiouffd.attach(server.path) as memory:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(memory[5 * PAGE_SIZE]))
        thread.start()
        wait_until(lambda: waits(thread), "the thread to wait")
        wait_until(lambda: unread() == 0, "the message to be read")
        server.restart("serve")
        thread.join(20)
        assert found == [DATA[5 * PAGE_SIZE]]


def unread() -> int:
    """Messages in our only userfaultfd that nobody has read, though somebody waits."""
    for item in Path("/proc/self/fd").iterdir():
        # One of them was that of the listing itself.
        if os.path.lexists(item) and "userfaultfd" in os.readlink(item):
            info = Path(f"/proc/self/fdinfo/{item.name}").read_text()
            pending, total = (
                int(re.search(rf"^{name}:\s*(\d+)", info, re.MULTILINE)[1])  # type: ignore[index]
                for name in ("pending", "total")
            )
            return pending if total else -1
    return -1


@pytest.mark.parametrize("way", ["struct", "index", "numpy"])
def test_the_gil_is_held_while_the_server_is_replaced(
    peer: Callable[..., PagerProcess], way: str
) -> None:
    server = peer("mute")
    with start(attaching.touch_with_gil, "asyncio", server.path, way) as client:
        client.expect("begins")
        main = Path(f"/proc/{client.pid}/task/{client.pid}/wchan")
        wait_until(lambda: main.read_text() == "handle_userfault", "the client to stand still")
        server.restart("serve")
        outcome = client.wait()
    assert outcome.status == 0, outcome.stderr
    assert outcome.result == word(3 * PAGE_SIZE)


def test_pagers_that_end_in_order(kind: Kind, tmp_path: Path) -> None:
    if kind == "peer":
        pytest.skip("it ends in no other way than by being killed")
    with serving(kind, tmp_path, SIZE) as server, aiouffd.attach(server.path) as memory:
        for page in range(3):
            assert memory[page * PAGE_SIZE] == DATA[page * PAGE_SIZE]
            server.stop()
            server.start()
            wait_until(lambda page=page: memory.resumed == page + 1, "it to be found")
        assert memory[:] == DATA


def test_another_version_is_not_mixed_in(
    peer: Callable[..., PagerProcess], capfd: pytest.CaptureFixture[str]
) -> None:
    server = peer("tag=one")
    with aiouffd.attach(server.path) as memory:
        assert memory[0] == DATA[0]
        server.restart("tag=two")
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(memory[PAGE_SIZE]))
        thread.start()
        said = ""

        def tells() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return "another one now" in said

        wait_until(tells, "the outage to be told")
        assert not found
        assert not memory.connected
        server.restart("tag=one")
        thread.join(20)
        assert found == [DATA[PAGE_SIZE]]
        wait_until(lambda: "there again" in capfd.readouterr().err, "the end of it to be told")
    assert said.count("\n") == 1


@pytest.mark.needs_root
@pytest.mark.parametrize("raw", [False, True])
def test_giving_up(peer: Callable[..., PagerProcess], raw: bool) -> None:
    server = peer()
    with start(attaching.given_up, "asyncio", server.path, raw) as client:
        client.expect("begins")
        server.kill()
        client.popen.send_signal(signal.SIGUSR1)
        outcome = client.wait()
    assert "no server came back in time" in outcome.stderr
    assert outcome.result == {
        "copy": "SourceError",
        "there": word(0),
        "removed": 0,
        "removed late": [0, 0],
        "connected": False,
        "write": "Bad address",
    }
    assert outcome.death == ("SIGBUS" if raw else ""), outcome.stderr


def test_aborting(peer: Callable[..., PagerProcess]) -> None:
    server = peer()
    with start(attaching.aborted, "asyncio", server.path) as client:
        client.expect("begins")
        server.kill()
        outcome = client.wait()
    assert outcome.death == "SIGABRT"
    assert "the program is aborted" in outcome.stderr


@pytest.mark.parametrize("way", ["poison", "tell"])
def test_a_page_that_cannot_be_had(peer: Callable[..., PagerProcess], way: str) -> None:
    server = peer(way)
    with aiouffd.attach(server.path) as memory:
        with pytest.raises(SourceError, match=f"byte {3 * PAGE_SIZE} "):
            memory.fetch(3 * PAGE_SIZE, 100)
        with pytest.raises(SourceError):
            memory[0]
        with pytest.raises(SourceError):
            memory[3 * PAGE_SIZE]
        assert memory.connected
        maps = Path("/proc/self/maps").read_text()
        assert maps.count("aiouffd: error page") >= (2 if way == "tell" else 0)
    assert "aiouffd: error page" not in Path("/proc/self/maps").read_text()


@pytest.mark.needs_root
def test_a_process_that_locks_its_memory(peer: Callable[..., PagerProcess]) -> None:
    """New mappings come filled with zeros then."""
    server = peer()
    code = "import ctypes, sys, aiouffd; assert not ctypes.CDLL(None).mlockall(2)\n"
    code += "with aiouffd.attach(sys.argv[1]) as memory: print(memory[0:16].hex())"
    done = subprocess.run(
        [sys.executable, "-c", code, server.path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == (b"\1" + bytes(7) + b"\2" + bytes(7)).hex(), done.stderr


def test_errors_of_a_server_before_6_6(tmp_path: Path) -> None:
    """The kernel makes no errors: the client is told, and makes them itself."""
    path = str(tmp_path / "socket")
    command = [sys.executable, "tools/run_before_6_6.py", sys.executable, "-c", _FAILING, path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            with aiouffd.attach(path) as memory:
                for offset in (0, PAGE_SIZE * 5, PAGE_SIZE * 5 + 7):
                    with pytest.raises(SourceError):
                        memory[offset]
                with pytest.raises(SourceError):
                    memory[0 : 8 * PAGE_SIZE]
        finally:
            server.kill()


_FAILING = """
import asyncio, sys
import aiouffd
from aiouffd import serve
from aiouffd.sources import FunctionSource

async def read(offset, length):
    raise aiouffd.SourceError("it is gone", transient=False)

async def main():
    async with serve.listen(sys.argv[1], source=FunctionSource(read, 1 << 20), deadline=0.2):
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


# ------------------------------------------------------------------------------- close


@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("way", "gets"),
    [
        ("copy", ["ClosedError"]),
        ("fetch", ["ClosedError"]),
        ("discard", ["discarded"]),
        ("write", ["OSError"]),
    ],
)
@pytest.mark.parametrize("alive", [True, False])
def test_close_below_who_waits(
    peer: Callable[..., PagerProcess], way: str, gets: list[str], alive: bool
) -> None:
    server = peer("mute")
    if alive:
        assert result_of(attaching.closed_below, "asyncio", server.path, way) == gets
        return
    with start(attaching.closed_below, "asyncio", server.path, way, True) as client:
        client.expect("begins")
        server.kill()
        client.popen.send_signal(signal.SIGUSR1)
        outcome = client.wait()
    assert (outcome.status, outcome.result) == (0, gets), outcome.stderr


def keeper_of(pid: int) -> bool:
    try:
        names = [
            (task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()
        ]
    except OSError:
        return False
    return "aiouffd-keeper" in names


def test_close_below_a_raw_touch(peer: Callable[..., PagerProcess]) -> None:
    outcome = run(attaching.closed_below, "asyncio", peer("mute").path, "memcpy")
    assert outcome.death == "SIGBUS", outcome.stderr
    assert "it was closed" in outcome.stderr


def test_an_exception_beside_a_touch(server: PagerProcess) -> None:
    with start(attaching.exception_beside_a_touch, "asyncio", server.path) as client:
        client.expect("begins")
        server.suspend()
        client.popen.send_signal(signal.SIGUSR1)
        client.expect("left")
        server.resume()
        outcome = client.wait()
    assert (outcome.status, outcome.result) == (0, [word(PAGE_SIZE)]), outcome.stderr


def test_views_after_close(server: PagerProcess) -> None:
    for force, page in ((False, 0), (False, 63), (True, 0)):
        found = result_of(attaching.after_close, "asyncio", server.path, page, force)
        assert found == word(page * PAGE_SIZE)
    outcome = run(attaching.after_close, "asyncio", server.path, 63, True)
    assert outcome.death == "SIGBUS", (outcome.stdout, outcome.stderr)


def test_closing_never_gives_zeros(kind: Kind, tmp_path: Path) -> None:
    with serving(kind, tmp_path, 1 << 20, "--block-size", "4K") as server:
        outcome = run(attaching.never_zeros, "asyncio", server.path, 12)
    assert outcome.status == 0, outcome.stderr
    assert all("it was closed" in line for line in outcome.stderr.splitlines()), outcome.stderr
    found = outcome.result
    assert found["bytes"] > 100, found
    assert found["signals"] > 0, found


@pytest.mark.slow
def test_closing_beside_a_server_that_hangs(peer: Callable[..., PagerProcess]) -> None:
    """Its addresses are not used again, because it may still fill pages there."""
    server = peer()
    memory = aiouffd.attach(server.path).open()
    address, task = memory.address, keeper()
    assert task is not None
    server.suspend()
    memory.close()
    assert attaching.is_mapped(address)
    lines = Path("/proc/self/maps").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{address:x}-"))
    assert line.split()[1] == "---p"


def test_a_server_that_hangs_up_comes_first(peer: Callable[..., PagerProcess]) -> None:
    """Closed and attached again at once: nothing of the old may land in the new."""
    server = peer()
    addresses = set()
    for _ in range(20):
        with aiouffd.attach(server.path) as memory:
            addresses.add(memory.address)
            assert memory[-8:] == DATA[-8:]
    assert len(addresses) < 20  # else this would prove nothing


# --------------------------------------------------------------------------- exit, fork


@pytest.mark.needs_root
@pytest.mark.parametrize("way", ["memcpy", "write", "crc"])
def test_exit_beside_a_daemon_that_waits(peer: Callable[..., PagerProcess], way: str) -> None:
    server = peer("mute")
    with start(attaching.exit_beside, "asyncio", server.path, way, True) as client:
        client.expect("begins")
        outcome = client.wait(5)
    assert (outcome.status, outcome.stderr) == (7, "")


def test_exit_waits_for_threads_as_ever(peer: Callable[..., PagerProcess]) -> None:
    server = peer("mute")
    with start(attaching.exit_beside, "asyncio", server.path, "memcpy", False) as client:
        client.expect("begins")
        server.restart("serve")
        client.expect("touched")
        outcome = client.wait(10)
    assert outcome.status == 7, outcome.stderr
    assert OUTAGE.fullmatch(outcome.stderr), outcome.stderr


def test_fork(server: PagerProcess) -> None:
    found = result_of(attaching.forked, "asyncio", server.path)
    assert set(found["said"].values()) == {"ClosedError"}, found
    assert found["mapped"] is False
    assert found["own"] is True
    assert found["userfaultfds"] == 1
    assert found["raw"] == {"killed": "SIGSEGV"}


# --------------------------------------------------------------------------- the C client


needs_compiler = pytest.mark.skipif(
    not compiler() or not os.path.exists("/usr/bin/make"), reason="needs make and a C compiler"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Builds a program of native/client, and returns its path."""
    folder = tmp_path_factory.mktemp("client")

    def build(name: str) -> str:
        make(f"{folder}/{name}", f"BUILD={folder}")
        return f"{folder}/{name}"

    return build


def make(*arguments: str) -> None:
    done = subprocess.run(
        ["make", "-s", "-C", str(CLIENT), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def run_c(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment(**variables)
    )


@pytest.mark.slow
@needs_compiler
def test_the_header_compiles_everywhere() -> None:
    make("check")


@needs_compiler
def test_the_example(built: Callable[[str], str], server: PagerProcess) -> None:
    done = run_c(built("example"), server.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{sum(DATA)}\n", "")
    assert len((CLIENT / "example.c").read_text().split("{", 1)[1].splitlines()) < 20
    done = run_c(built("example"), "/nowhere/s")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no such socket" in done.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["waiters 8", "waiters 60", "moved", "hole", "silent", "stuck", "locked"]
)
def test_how_it_ends(built: Callable[[str], str], tmp_path: Path, what: str) -> None:
    """See native/client/ends.c: servers that are gone, stopped or silent."""
    done = run_c(built("ends"), str(tmp_path / "s"), *what.split())
    assert (done.returncode, done.stdout) == (0, "ok\n"), done


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("program", ["vmm", "vmm-asan"])
def test_memory_that_the_program_mapped(
    built: Callable[[str], str], kind: Kind, tmp_path: Path, program: str
) -> None:
    """See native/client/vmm.c: two areas, holes, a restart, and the memory kept at the end."""
    with (
        serving(kind, tmp_path, SIZE, "--block-size", "4K") as server,
        Process([built(program), server.path], stdin=subprocess.PIPE) as client,
    ):
        client.expect("kill")
        server.restart()
        outcome = client.wait()  # closes its standard input
    assert outcome.status == 0, outcome.stderr
    assert OUTAGE.fullmatch(outcome.stderr), outcome.stderr
    assert outcome.stdout.splitlines()[-1] == "ok"


# -------------------------------------------------------------------------- kill -9


@needs_compiler
@pytest.mark.slow
def test_kill_9_at_any_moment(kind: Kind, built: Callable[[str], str], tmp_path: Path) -> None:
    """Under load, again and again; every client ends with the right bytes."""
    # In place of pytest's own, which is for tests of the usual length.
    faulthandler.dump_traceback_later(100 + 20 * ROUNDS, exit=True)
    size = 512 * PAGE_SIZE
    choice = random.Random(ROUNDS)
    with serving(kind, tmp_path, size) as server:
        path = server.path
        clients = [
            *(
                start(attaching.load, "asyncio", path, seed, 300, limit=100 + 20 * ROUNDS)
                for seed in (1, 2)
            ),
            *(
                Process([built(name), path, "3", str(seed), "500"], stdin=subprocess.PIPE)
                for seed, name in enumerate(("stress", "stress-asan", "stress-tsan"))
            ),
        ]
        try:
            for client in clients:
                wait_until(lambda client=client: keeper_of(client.pid), "it to attach", 30)
            for _ in range(ROUNDS):
                time.sleep(choice.random() * 0.3)  # a moment like any other
                server.kill()
                for client in clients:
                    assert client.popen.poll() is None, client.stderr()
                server.start()
            for client in clients[:2]:
                client.popen.send_signal(signal.SIGUSR1)
            outcomes = [client.wait(120) for client in clients]
        finally:
            for client in clients:
                client.__exit__()
    for outcome in outcomes:
        assert outcome.status == 0, outcome.stderr
        assert OUTAGE.fullmatch(outcome.stderr), outcome.stderr
    for outcome in outcomes[:2]:
        assert outcome.result["touched"] > 0
    for outcome in outcomes[2:]:
        assert outcome.stdout.startswith("ok "), outcome.stdout
    resumed = sum(outcome.result["resumed"] for outcome in outcomes[:2])
    print(f"{ROUNDS} kills", [outcome.stdout.strip() for outcome in outcomes])
    assert resumed > 0
