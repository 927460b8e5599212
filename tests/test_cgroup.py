"""Memory control groups: who pays for the pages that a pager installs, and who is killed.

UFFDIO_COPY charges a page to the process whose memory it is, whoever calls it. At the limit the
kernel neither says ENOMEM nor lets the caller wait: it kills in the group that is full.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wait_until

SIZE = 64 << 20
LIMIT = 32 << 20
BYTES = bytes(range(1, 129)) * 32  # a page

JOIN = """
import os, sys
import aiouffd
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
"""
CLIENT = f"""{JOIN}
with aiouffd.attach(sys.argv[2]) as memory:
    for at in range(0, {SIZE}, 4096):
        memory.view[at]
"""
OWN = f"""{JOIN}
from aiouffd import sync
with sync.open(sys.argv[2]) as buffer:
    for at in range(0, {SIZE}, 4096):
        buffer.view[at]
"""
OUTSIDE = """
import sys
import aiouffd
with aiouffd.attach(sys.argv[1]) as memory:
    assert all(memory.view[at] == 1 for at in range(0, len(memory), 99 * 4096))
"""


class Group:
    """A group of processes with a limit of memory, of either version of cgroups."""

    def __init__(self) -> None:
        unified, folder = self._find()
        self.path = folder / f"aiouffd-test-{os.getpid()}"
        self.path.mkdir()
        self._events = self.path / ("memory.events" if unified else "memory.oom_control")
        if unified:
            (self.path / "memory.max").write_text(str(LIMIT))
        else:
            (self.path / "memory.limit_in_bytes").write_text(str(LIMIT))

    @staticmethod
    def _find() -> tuple[bool, Path]:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, options, *_ = line.split()
            folder = Path(place)
            if kind == "cgroup" and "memory" in options.split(","):
                return False, folder
            if kind == "cgroup2":
                control = folder / "cgroup.subtree_control"
                if "memory" in control.read_text().split():
                    return True, folder
        pytest.skip("no memory control groups here")

    @property
    def kills(self) -> int:
        """How many processes the kernel killed in it."""
        lines = dict(line.split() for line in self._events.read_text().splitlines())
        return int(lines["oom_kill"])

    def end(self) -> None:
        wait_until(lambda: not (self.path / "cgroup.procs").read_text(), "the group to be empty")
        self.path.rmdir()


@pytest.fixture
def group() -> Iterator[Group]:
    try:
        made = Group()
    except OSError as error:
        pytest.skip(f"a control group cannot be made: {error}")
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(BYTES * (SIZE // len(BYTES)))
    return path


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.needs_root
def test_the_client_pays_and_is_killed(group: Group, file: Path, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    command = [sys.executable, "-m", "aiouffd", "pager", "native", "--socket", socket, file]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(socket.exists, "the server", 30)
            ended = run(CLIENT, group.path, socket)
            assert ended.returncode == -signal.SIGKILL, ended.stderr
            assert group.kills == 1
            # Nobody else notices.
            assert server.poll() is None
            assert run(OUTSIDE, socket).returncode == 0
        finally:
            server.terminate()


@pytest.mark.needs_root
def test_who_pages_for_itself_is_killed_too(group: Group, file: Path) -> None:
    ended = run(OWN, group.path, file)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert group.kills == 1
