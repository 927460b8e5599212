"""Many clients of one server: a hundred processes with a thousand regions, and their deaths.

The clients are a C program (``tests/guests/swarm.c``), the server is a process of its own, so that
its descriptors and memory can be counted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, environment, wait_until

PROCESSES, REGIONS, PAGES = 100, 10, 12
SIZE = REGIONS * PAGES * 4096


@functools.cache
def swarm() -> str:
    """The client program, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tempfile.mkdtemp(prefix="aiouffd-swarm-")
    source, program = ROOT / "tests" / "guests" / "swarm.c", f"{folder}/swarm"
    subprocess.run(
        [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", program],
        check=True,
    )
    return program


class Running:
    """A server that was started."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self.path = path

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        """Bytes that are its alone."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * 4096

    def end(self) -> tuple[int, int]:
        """Faults that it served, and clients that it refused."""
        out, _ = self.process.communicate("", timeout=30)
        faults, refused, _ = out.split()
        return int(faults), int(refused)


@contextlib.contextmanager
def server(folder: Path, loop: str, *arguments: str) -> Iterator[Running]:
    path = folder / "s"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.guests.server", path, str(SIZE), "--loop", loop, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Running(process, path)
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()


def command(running: Running, processes: int, pause: int, busy: int) -> list[str]:
    numbers = (processes, REGIONS, PAGES, 7, pause, busy)
    return [swarm(), str(running.path), *map(str, numbers)]


@pytest.mark.slow
@pytest.mark.parametrize("delay", ["0", "0.001"])
def test_a_thousand_regions(tmp_path: Path, loop_name: str, delay: str) -> None:
    with server(tmp_path, loop_name, "--delay", delay) as running:
        before = running.descriptors()
        done = subprocess.run(
            command(running, PROCESSES, 500, 1), capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, done.stderr
        wait_until(lambda: running.descriptors() == before, "the server to let go", 30)
        faults, refused = running.end()
        assert faults >= PROCESSES * REGIONS * PAGES
        assert refused == 0


@pytest.mark.slow
def test_clients_that_are_killed_leave_nothing(tmp_path: Path, loop_name: str) -> None:
    with server(tmp_path, loop_name, "--delay", "0.002") as running:
        before = running.descriptors()
        memory = 0
        for turn in range(4):
            crowd = subprocess.Popen(
                command(running, 30, 1_000_000, 1),
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_until(lambda: running.descriptors() > before + 60, "clients to come", 30)
            os.killpg(crowd.pid, signal.SIGKILL)
            crowd.wait()
            wait_until(lambda: running.descriptors() == before, "the server to let go", 30)
            if turn == 0:
                memory = running.memory()
        # The first turn has filled caches and arenas; after that nothing is added.
        assert running.memory() < memory + (4 << 20)
        done = subprocess.run(command(running, 1, 0, 0), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
