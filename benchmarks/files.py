"""Files over lazy buffers that are resident, against `open` of the same bytes in page cache."""

from __future__ import annotations

import io
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiouffd

from .common import Report
from .scan import MIB

LENGTH = 64 * MIB
LINE = b"x" * 99 + b"\n"
THREADS, READS = 8, 500


def _pieces(file: Any, size: int) -> None:
    file.seek(0)
    while file.read(size):
        pass


def _lines(file: Any) -> None:
    file.seek(0)
    reader = io.BufferedReader(file)
    for _ in range(LENGTH // len(LINE) // 4):
        reader.readline()
    reader.detach()


def _at_random(read: Callable[[int], bytes]) -> None:
    places = random.Random(1).choices(range(LENGTH - 4096), k=THREADS * READS)

    def work(number: int) -> None:
        for place in places[number::THREADS]:
            assert len(read(place)) == 4096

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _timed(call: Callable[..., None], *arguments: Any) -> Callable[[], float]:
    def measure() -> float:
        started = time.perf_counter()
        call(*arguments)
        return 1000 * (time.perf_counter() - started)

    return measure


def run(report: Report, loop: str, runner: Any) -> None:
    if loop != "asyncio":
        return  # files that `open_file` opens are served by a loop of their own
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes"
        path.write_bytes(LINE * (LENGTH // len(LINE)) + bytes(LENGTH % len(LINE)))
        with aiouffd.open_file(path) as lazy, io.FileIO(path) as plain:
            lazy.read()
            for name, size in (("64 KiB", 64 << 10), ("1 MiB", MIB)):
                report.compare(
                    f"reads of {name} in a row, {LENGTH // MIB} MiB that are resident",
                    ("buf.file()", _timed(_pieces, lazy, size)),
                    ("open()", _timed(_pieces, plain, size)),
                    unit="ms",
                )
            report.compare(
                "lines of 100 bytes, BufferedReader, 16 MiB that are resident",
                ("buf.file()", _timed(_lines, lazy)),
                ("open()", _timed(_lines, plain)),
                unit="ms",
            )

            # As a library does it: where there is one handle, a lock around seek and read.
            lock = threading.Lock()

            def seek_and_read(place: int) -> bytes:
                with lock:
                    plain.seek(place)
                    return plain.read(4096)

            report.compare(
                f"{THREADS * READS} reads of 4 KiB at random, {THREADS} threads",
                ("file.pread", _timed(_at_random, lambda place: lazy.pread(4096, place))),
                ("open(), seek and read under a lock", _timed(_at_random, seek_and_read)),
                unit="ms",
            )
