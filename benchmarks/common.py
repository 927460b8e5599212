"""How figures are taken: A and B in turn, in pairs, and the median of the pairs' ratios.

A figure alone says little on a shared machine; two figures taken within the same second
can be compared. So every comparison runs A B, B A, A B, ..., forms one ratio per pair and
reports the median ratio together with both absolute medians and the bar it has to meet.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import platform
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

REPEATS = 7
BEGIN, END = "<!-- begin figures -->", "<!-- end figures -->"

Measure = Callable[[], float]
AsyncMeasure = Callable[[], Awaitable[float]]
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """A against B: figures of all runs, and the bar for the median of a/b."""

    name: str
    a_name: str
    b_name: str
    unit: str
    a: tuple[float, ...]
    b: tuple[float, ...]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.a, self.b, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        ratios = [a / b for a, b in zip(self.a, self.b, strict=True)]
        return min(ratios), max(ratios)

    @property
    def bar(self) -> str:
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "none"

    @property
    def verdict(self) -> str:
        if self.at_most is not None:
            return "pass" if self.ratio <= self.at_most else "miss"
        if self.at_least is not None:
            return "pass" if self.ratio >= self.at_least else "miss"
        return "-"

    def __str__(self) -> str:
        low, high = self.spread
        return (
            f"{self.name}: {self.a_name} {statistics.median(self.a):.4g} {self.unit}, "
            f"{self.b_name} {statistics.median(self.b):.4g} {self.unit}, "
            f"ratio {self.ratio:.3f} ({low:.3f} to {high:.3f}), "
            f"bar {self.bar}: {self.verdict}"
        )

    def row(self) -> str:
        low, high = self.spread
        return (
            f"| {self.name} | {self.a_name}: {statistics.median(self.a):.4g} {self.unit} "
            f"| {self.b_name}: {statistics.median(self.b):.4g} {self.unit} "
            f"| {self.ratio:.3g} ({low:.3g} to {high:.3g}) | {self.bar} | {self.verdict} |"
        )


@dataclass
class Report:
    """Collects what a benchmark program found; prints each result as it comes."""

    loop: str = "asyncio"
    comparisons: list[Comparison] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, comparison: Comparison) -> Comparison:
        self.comparisons.append(comparison)
        print(comparison, flush=True)
        return comparison

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append((name, reason))
        print(f"{name}: skipped: {reason}", flush=True)

    def compare(
        self,
        name: str,
        a: tuple[str, Measure],
        b: tuple[str, Measure],
        *,
        unit: str,
        repeats: int = REPEATS,
        warm_up: bool = True,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Comparison:
        """Run both measures in turn. Each returns its figure in `unit`; the bar is for a/b."""
        a_figures: list[float] = []
        b_figures: list[float] = []
        if warm_up:
            a[1](), b[1]()
        for turn in range(repeats):
            for figures, measure in _turn(turn, (a_figures, a[1]), (b_figures, b[1])):
                figures.append(measure())
        return self.add(
            Comparison(
                name, a[0], b[0], unit, tuple(a_figures), tuple(b_figures), at_most, at_least
            )
        )

    async def compare_async(
        self,
        name: str,
        a: tuple[str, AsyncMeasure],
        b: tuple[str, AsyncMeasure],
        *,
        unit: str,
        repeats: int = REPEATS,
        warm_up: bool = True,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Comparison:
        """The same for measures that are coroutine functions."""
        a_figures: list[float] = []
        b_figures: list[float] = []
        if warm_up:
            await a[1]()
            await b[1]()
        for turn in range(repeats):
            for figures, measure in _turn(turn, (a_figures, a[1]), (b_figures, b[1])):
                figures.append(await measure())
        return self.add(
            Comparison(
                name, a[0], b[0], unit, tuple(a_figures), tuple(b_figures), at_most, at_least
            )
        )

    def write_json(self, path: Path) -> None:
        """All figures of all runs, for later comparison."""
        content = {
            "environment": environment(self.loop),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "comparisons": [
                {**asdict(c), "ratio": c.ratio, "verdict": c.verdict} for c in self.comparisons
            ],
            "skipped": self.skipped,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")

    def markdown(self) -> str:
        lines = [
            environment(self.loop),
            "",
            "| what | A | B | A/B: median (range) | bar | |",
            "|---|---|---|---|---|---|",
            *(comparison.row() for comparison in self.comparisons),
            *(f"| {name} | skipped: {reason} | | | | |" for name, reason in self.skipped),
        ]
        return "\n".join(lines)

    def write_markdown(self, path: Path) -> None:
        """Put the table between the markers of `path`, leaving the rest as it is."""
        text = path.read_text()
        try:
            before, rest = text.split(BEGIN, 1)
            _, after = rest.split(END, 1)
        except ValueError:
            raise ValueError(f"{path} lacks the lines {BEGIN} and {END}") from None
        path.write_text(f"{before}{BEGIN}\n\n{self.markdown()}\n\n{END}{after}")


def _turn(turn: int, a: T, b: T) -> tuple[T, T]:
    """Every other pair the other way round, so that what drifts hits both alike."""
    return (b, a) if turn % 2 else (a, b)


@contextmanager
def pinned(cpus: Iterable[int] | None) -> Iterator[None]:
    """Keep the calling thread, and threads it starts, on these CPUs. None: do nothing."""
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Call it in a fresh thread, for those of the executor may be pinned."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        result = function(*arguments)
        loop.call_soon_threadsafe(done.set_result, result)

    threading.Thread(target=run).start()
    return await done


def warm_memory(length: int) -> None:
    """Have the machine own `length` bytes of free memory before a measurement that needs them.

    A virtual machine's free pages go back to its host after a while, and the first touch of
    each then costs a fault in the host, up to a hundred times our own; whoever is measured
    first would pay for it.
    """
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, length, mmap.PAGESIZE):
            memory[start] = 1


def environment(loop: str = "asyncio") -> str:
    """One line that says where the figures come from."""
    return (
        f"Linux {platform.release()}, {len(os.sched_getaffinity(0))} CPUs, "
        f"{platform.python_implementation()} {platform.python_version()}, {loop}"
    )
