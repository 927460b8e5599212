"""(f) What a lazy buffer costs the other users of the event loop.

    python -m benchmarks.loop_latency idle asyncio|uvloop tcp|memory     (used by itself)

While a large `fetch` runs: the longest time for which the loop came round to nobody. And
when nothing is touched: how often any thread of the process wakes up, which should be never.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiouffd
from aiouffd.sources import FunctionSource

from .baseline.tcp import TcpServer
from .baseline.uffd import touch_all
from .common import REPEATS, Report, in_thread
from .scan import MIB, TcpSource

SIZE = 256 * MIB
LONGEST = 5.0  # milliseconds that are allowed
SETTLE, WATCH = 1.0, 3.0  # seconds
ROOT = Path(__file__).resolve().parent.parent


# --- the longest gap -------------------------------------------------------------------------


class Heartbeat:
    """A callback in every round of the loop; `longest` is the longest round in seconds.

    It keeps the loop from sleeping, so a round lasts as long as the other callbacks in it,
    which is how long anybody else would have had to wait. With `time.thread_time` as the
    clock it leaves out the time in which the machine was busy with other programs.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def __enter__(self) -> Heartbeat:
        self.longest = 0.0
        self._loop = asyncio.get_running_loop()
        self._last = self._clock()
        self._handle = self._loop.call_soon(self._beat)
        return self

    def _beat(self) -> None:
        now = self._clock()
        self.longest = max(self.longest, now - self._last)
        self._last = now
        self._handle = self._loop.call_soon(self._beat)

    def __exit__(self, *exc_info: object) -> None:
        self._handle.cancel()
        self.longest = max(self.longest, self._clock() - self._last)


def _function_source() -> FunctionSource:
    """A source that has its bytes at hand and never waits: the hardest for the loop."""
    block = bytes(4 * MIB)

    async def read(offset: int, length: int) -> memoryview:
        return memoryview(block)[:length]

    return FunctionSource(read, SIZE, portable=True)


class Fetch:
    """Milliseconds of the longest round during one `fetch` of everything."""

    def __init__(
        self,
        make_source: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._make_source = make_source
        self._clock = clock
        self.seconds = 0.0

    async def __call__(self) -> float:
        async with aiouffd.open(self._make_source()) as buf:
            await asyncio.sleep(0.01)
            started = time.perf_counter()
            with Heartbeat(self._clock) as heartbeat:
                await buf.fetch()
            self.seconds = time.perf_counter() - started
        return heartbeat.longest * 1000


async def _allowed() -> float:
    return LONGEST


async def _gaps(report: Report, loop: str) -> None:
    block = bytes(SIZE)
    with TcpServer() as server:
        sources: dict[str, Callable[[], object]] = {
            "TCP": lambda: TcpSource(server.host, server.port, SIZE),
            "a function": _function_source,
            "memory": lambda: block,
        }
        for name, make_source in sources.items():
            fetch = Fetch(make_source)
            await report.compare_async(
                f"longest gap of the loop, fetch of 256 MiB from {name}, {loop}",
                ("aiouffd", fetch),
                ("allowed", _allowed),
                unit="ms",
                at_most=1.0,
            )
            await report.compare_async(
                f"  of that, work of the loop's thread, {loop}",
                ("aiouffd", Fetch(make_source, time.thread_time)),
                ("allowed", _allowed),
                unit="ms",
            )
        await report.compare_async(
            f"  the same of a loop with nothing to do (this machine's noise), {loop}",
            ("idle", _idle_gap(fetch.seconds)),
            ("allowed", _allowed),
            unit="ms",
        )


def _idle_gap(seconds: float) -> Callable[[], Awaitable[float]]:
    async def run() -> float:
        with Heartbeat() as heartbeat:
            await asyncio.sleep(seconds)
        return heartbeat.longest * 1000

    return run


# --- wake-ups when idle ----------------------------------------------------------------------


async def _idle(kind: str) -> None:
    """An open buffer that was used a little; says so, and then only waits."""
    with TcpServer() as server:
        source = TcpSource(server.host, server.port, SIZE) if kind == "tcp" else bytes(SIZE)
        async with aiouffd.open(source) as buf:
            await buf.fetch(0, MIB)
            await in_thread(touch_all, buf.address, 1000, 2000, 10)
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(sys.stdin.fileno(), ended.set)
            print("ready", flush=True)
            await ended.wait()
            loop.remove_reader(sys.stdin.fileno())


def _switches(process: int) -> int:
    """Context switches of all threads so far: each is a wake-up, or work."""
    total = 0
    for status in Path(f"/proc/{process}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"):
                total += int(value)
    return total


def wake_ups(loop: str, kind: str) -> list[float]:
    """Wake-ups per second of several processes that have an idle buffer, side by side."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.loop_latency", "idle", loop, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for _ in range(REPEATS)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("a process with an idle buffer did not start")
        time.sleep(SETTLE)
        before = [_switches(process.pid) for process in processes]
        time.sleep(WATCH)
        after = [_switches(process.pid) for process in processes]
    finally:
        for process in processes:
            process.communicate()
    return [(b - a) / WATCH for a, b in zip(before, after, strict=True)]


def _idle_wake_ups(report: Report, loop: str) -> None:
    for kind, name in (("tcp", "TCP"), ("memory", "memory")):
        figures = iter(wake_ups(loop, kind))
        report.compare(
            f"wake-ups of an idle buffer over {name}, {loop}",
            ("aiouffd", lambda figures=figures: next(figures)),
            ("one per second", lambda: 1.0),
            unit="/s",
            repeats=REPEATS,
            warm_up=False,
            at_most=0.0,
        )


def run(report: Report, loop: str, runner) -> None:
    runner(_gaps(report, loop))
    _idle_wake_ups(report, loop)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "idle":
        sys.exit(__doc__)
    if sys.argv[2] == "uvloop":
        import uvloop

        uvloop.run(_idle(sys.argv[3]))
    else:
        asyncio.run(_idle(sys.argv[3]))
