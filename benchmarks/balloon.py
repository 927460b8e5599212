"""Faults of a guest whose balloon inflates, against those of the same guest without.

The guest is a C program (tests/guests/balloon.c): a thread that touches pages, and one that drops
others, some of them in a row and then a pause. The server is a process of its own on one loop.

    python -m benchmarks.balloon            alone, without the other benchmarks
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .baseline.build import OUTPUT, compiler
from .common import Report
from .serve import ROOT, _ours, _running

PAGE, PAGES, TOUCHES, PAUSE_US = 4096, 32768, 3000, 200
#: madvise calls in a row, and the pause after them in microseconds.
STORMS = ((1, 1000), (64, 1000), (256, 100), (256, 0))
#: What a fault may take in a storm, the 99th of a hundred, in milliseconds.
ALLOWED = 10.0


def guest() -> Path:
    """The client program, compiled."""
    target = OUTPUT / "balloon"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    source = ROOT / "tests" / "guests" / "balloon.c"
    options = ["-std=gnu11", "-O2", "-pthread"]
    subprocess.run([compiler(), *options, str(source), "-o", str(target)], check=True)
    return target


def run(report: Report, loop: str, runner=asyncio.run) -> None:
    program = guest()
    with tempfile.TemporaryDirectory(prefix="aiouffd-balloon-") as name:
        path = Path(name, "s")

        def touches(batch: int, gap: int) -> tuple[float, float]:
            """Mean and 99th of a hundred, in milliseconds."""
            numbers = (PAGES, batch, gap, TOUCHES, PAUSE_US)
            command = [str(program), str(path), *map(str, numbers)]
            # Its exit status tells of wrong bytes.
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            words = [int(word) for word in done.stdout.split()]
            return words[3] / 1e6, words[4] / 1e6

        with _running(*_ours(path, PAGES * PAGE, loop)):
            for batch, gap in STORMS:
                late: list[float] = []

                def storm(batch: int = batch, gap: int = gap, late: list[float] = late) -> float:
                    mean, worst = touches(batch, gap)
                    late.append(worst)
                    return mean

                calm: Callable[[], float] = lambda: touches(0, 0)[0]  # noqa: E731
                what = f"{batch} removals in a row, {gap} us apart, {loop}"
                report.compare(
                    f"mean fault beside a balloon, {what}",
                    ("beside it", storm),
                    ("without", calm),
                    unit="ms",
                    repeats=5,
                    at_most=20.0,
                )
                report.compare(
                    f"  99th of a hundred, {what}",
                    ("beside it", lambda late=late: statistics.median(late)),
                    ("allowed", lambda: ALLOWED),
                    unit="ms",
                    repeats=1,
                    warm_up=False,
                    at_most=1.0,
                )


if __name__ == "__main__":
    for name in ("asyncio", "uvloop"):
        run(Report(name), name)
