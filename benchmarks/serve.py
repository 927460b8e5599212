"""Serving other processes: the round trip of a fault, and what a quiet client has of a busy server.

Clients are small C programs (tests/guests/swarm.c), the server is a process of its own on one
loop, with the object's bytes at hand, and so is what we are compared with: poll, read and
UFFDIO_COPY in C (baseline/foreign_server.c).
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .baseline.build import OUTPUT, build, compiler
from .common import Report

ROOT = Path(__file__).resolve().parent.parent
PAGE = 4096
PAGES = 4000
#: The crowd: processes, regions of each, pages of each region; the quiet one's pause between two
#: touches, and that of the others: 99 of them then make some 10,000 faults a second.
PROCESSES, REGIONS, REGION_PAGES, PAUSE_US, CROWD_PAUSE_US = 100, 10, 64, 1000, 10_000


def swarm() -> Path:
    """The client program, compiled."""
    target = OUTPUT / "swarm"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    source = ROOT / "tests" / "guests" / "swarm.c"
    command = [compiler(), "-std=gnu11", "-O2", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@contextlib.contextmanager
def _running(*command: str) -> Iterator[None]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def _ours(path: Path, size: int, loop: str, *more: str) -> tuple[str, ...]:
    command = (sys.executable, "-m", "tests.guests.server", str(path), str(size))
    return (*command, "--loop", loop, *more)


def _times(program: Path, path: Path, *arguments: int) -> list[int]:
    """Nanoseconds of a touch by the quiet client: median, 99th of a hundred, longest."""
    command = [str(program), str(path), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return [int(word) for word in done.stdout.split()]


def run(report: Report, loop: str, runner=asyncio.run) -> None:
    program = swarm()
    with tempfile.TemporaryDirectory(prefix="aiouffd-serve-") as name:
        ours, theirs, crowded = Path(name, "ours"), Path(name, "theirs"), Path(name, "crowded")

        def trip(path: Path) -> Callable[[], float]:
            return lambda: _times(program, path, 1, 1, PAGES, 3, 0, 0)[0] / 1000

        with (
            _running(*_ours(ours, PAGES * PAGE, loop)),
            _running(str(build("foreign_server", shared=False)), str(theirs), str(PAGES * PAGE)),
        ):
            report.compare(
                f"fault p50, client and server two processes, {loop}",
                ("aiouffd", trip(ours)),
                ("C process", trip(theirs)),
                unit="us",
                at_most=2.0,
            )

        def quiet(busy: int, *pause: int) -> Callable[[], float]:
            arguments = (PROCESSES, REGIONS, REGION_PAGES, 3, PAUSE_US, busy, *pause)
            return lambda: _times(program, crowded, *arguments)[1] / 1000

        size = REGIONS * REGION_PAGES * PAGE
        for what, more in (("bytes at hand", ()), ("1 ms of latency", ("--delay", "0.001"))):
            with _running(*_ours(crowded, size, loop, *more)):
                report.compare(
                    f"fault p99 of one client beside 99, 10,000 faults a second, {what}, {loop}",
                    ("beside them", quiet(1, CROWD_PAUSE_US)),
                    ("alone", quiet(0)),
                    unit="us",
                    at_most=5.0,
                )
        with _running(*_ours(crowded, size, loop)):
            report.compare(
                f"  beside 99 that fault without a pause, so that no CPU is ever free, {loop}",
                ("beside them", quiet(1)),
                ("alone", quiet(0)),
                unit="us",
                repeats=3,
                warm_up=False,
            )
