"""Helpers of the tests: known bytes, a gate to hold answers back, and programs to run.

A thread stuck in a fault with the GIL held stops its whole process, timers of Python
included. So what may end that way is a function in ``tests/scenarios``, which `run` calls in
a process of its own, with a limit that needs no GIL, and the process's end is what the test
looks at.
"""

from __future__ import annotations

import array
import asyncio
import concurrent.futures
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiouffd import Fault
from aiouffd.kernel.lib import PAGE_SIZE, ffi, lib

ROOT = Path(__file__).resolve().parent.parent
WORD = 8
#: Seconds that a program gets; slow machines included.
LIMIT = 25.0

# ------------------------------------------------------------------ counters


@functools.cache
def _counter_numbers() -> dict[str, int]:
    numbers: dict[str, int] = {}
    while (name := lib.au_counter_name(len(numbers))) != ffi.NULL:
        numbers[ffi.string(name).decode()] = len(numbers)
    return numbers


def read_counters() -> dict[str, int]:
    """All native counters by name."""
    return {name: lib.au_counter_value(number) for name, number in _counter_numbers().items()}


class Counters:
    """What the native counters moved by since this object was made."""

    def __init__(self) -> None:
        self._before = read_counters()

    def __getitem__(self, name: str) -> int:
        return int(lib.au_counter_value(_counter_numbers()[name])) - self._before[name]

    @staticmethod
    def total(name: str) -> int:
        """A counter's value since the process began."""
        return int(lib.au_counter_value(_counter_numbers()[name]))

    def deltas(self) -> dict[str, int]:
        return {name: value - self._before[name] for name, value in read_counters().items()}

    def wait(self, name: str, least: int, timeout: float = 10.0) -> None:
        """Poll until a counter moved by ``least``: nothing tells when a thread has yielded."""
        wait_until(lambda: self[name] >= least, f"{name} to move by {least}", timeout)

    def wait_for_end(self, name: str, timeout: float = 10.0) -> None:
        """Poll until a counter of what lives is back: the last one to let go does not wait."""
        wait_until(lambda: self[name] <= 0, f"{name} to be back", timeout)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    """Poll ``condition``. Only for what has no event to wait for."""
    limit = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.001)


# ------------------------------------------------------- bytes, and their gate


@functools.lru_cache(maxsize=4)
def content(size: int) -> bytes:
    """``size`` bytes, a multiple of eight, in which every word tells where it stands."""
    return array.array("Q", range(1, size // WORD + 1)).tobytes()


def word(offset: int) -> int:
    """The word of `content` at byte ``offset``, a multiple of eight."""
    return offset // WORD + 1


class Gate:
    """Answers faults with bytes of ``data``, when it is let; on any loop.

    A handler (``region.on_missing(gate)``), and a function for a source (`read`).
    """

    def __init__(self, data: bytes, *, is_open: bool = True) -> None:
        self.data = data
        self.is_open = is_open
        #: Counts what was asked for: acquire it to wait for the next question.
        self.arrivals = threading.Semaphore(0)
        self._held: list[concurrent.futures.Future[None]] = []

    async def _pass(self) -> None:
        held: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._held.append(held)
        if self.is_open:
            self._let_go()
        self.arrivals.release()
        if not held.done():
            await asyncio.wrap_future(held)

    def _let_go(self) -> None:
        while self._held:
            held = self._held.pop()
            if held.set_running_or_notify_cancel():
                held.set_result(None)

    async def __call__(self, fault: Fault) -> None:
        await self._pass()
        fault.copy(self.data[fault.offset : fault.offset + fault.length])

    async def read(self, offset: int, length: int) -> bytes:
        await self._pass()
        return self.data[offset : offset + length]

    def wait(self, count: int = 1, timeout: float = 10.0) -> None:
        """Block until ``count`` more questions have arrived. Any thread but the loop's."""
        for number in range(count):
            if not self.arrivals.acquire(timeout=timeout):
                raise TimeoutError(f"only {number} of {count} questions arrived")

    def open(self) -> None:
        """Answer what waits and what comes. Any thread."""
        self.is_open = True
        self._let_go()


# ------------------------------------------------------------------ programs


@dataclass(frozen=True)
class Outcome:
    """How a program ended. A negative ``status`` is the signal that killed it."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def result(self) -> Any:
        """What the scenario returned."""
        return json.loads(self.stdout.splitlines()[-1]) if self.stdout else None

    @property
    def death(self) -> str:
        """Name of the signal that killed it, or ''."""
        return signal.Signals(-self.status).name if self.status < 0 else ""


def command(
    scenario: Callable[..., Any],
    loop: str,
    *args: Any,
    limit: float = LIMIT,
    warnings: str = "error",
) -> list[str]:
    """The command line that calls ``scenario``; see ``tests/scenarios/__main__.py``."""
    # The watchdog of faulthandler needs no GIL: it shows where everybody is, and ends.
    return [
        sys.executable,
        "-W",
        warnings,
        "-m",
        "tests.scenarios",
        scenario.__module__,
        scenario.__qualname__,
        loop,
        str(limit),
        json.dumps(args),
    ]


def environment(**more: str) -> dict[str, str]:
    """Of this process, but without its fault handler: scenarios that die on purpose say so."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **more}


def start(scenario: Callable[..., Any], loop: str, *args: Any, **options: Any) -> Process:
    return Process(command(scenario, loop, *args, **options))


def run(scenario: Callable[..., Any], loop: str, *args: Any, **options: Any) -> Outcome:
    """Call ``scenario`` in a fresh process of this interpreter and wait for its end."""
    limit = options.get("limit", LIMIT)
    with start(scenario, loop, *args, **options) as process:
        return process.wait(limit + 5)


def result_of(scenario: Callable[..., Any], loop: str, *args: Any, **options: Any) -> Any:
    """As `run`; what it returns, after checking that all went well and nothing was said."""
    outcome = run(scenario, loop, *args, **options)
    assert outcome.status == 0, f"{outcome.death or outcome.status}\n{outcome.stderr[-6000:]}"
    assert not outcome.stderr, outcome.stderr[-6000:]
    return outcome.result


class Process:
    """A running program; killed at the end of the ``with`` block."""

    def __init__(self, arguments: list[str], *, stdin: int = subprocess.DEVNULL) -> None:
        self.started = time.monotonic()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._seen = b""
        self.popen = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment(),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self.pid = self.popen.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        self._stderr.close()

    def expect(self, line: str) -> str:
        """Wait for a line that starts with ``line``; returns the rest of it."""
        assert self.popen.stdout is not None
        # The child's watchdog ends a child that never says it.
        for seen in self.popen.stdout:
            self._seen += seen
            text = seen.decode().rstrip("\n")
            if text.startswith(line):
                return text[len(line) :].strip()
        raise AssertionError(f"it ended without saying {line!r}: {self.stderr()}")

    def stderr(self) -> str:
        return os.pread(self._stderr.fileno(), 1 << 20, 0).decode(errors="replace")

    def wait(self, timeout: float = LIMIT) -> Outcome:
        """Its end; a process that does not come to one in time is killed and fails the test."""
        started = time.monotonic()
        try:
            rest, _ = self.popen.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            where = thread_states(self.pid)
            self.popen.kill()
            self.popen.communicate()
            raise AssertionError(
                f"still there after {time.monotonic() - started:.1f} s\n{where}\n{self.stderr()}"
            ) from None
        return Outcome(
            self.popen.returncode,
            (self._seen + rest).decode(errors="replace"),
            self.stderr(),
            time.monotonic() - self.started,
        )


def thread_states(pid: int) -> str:
    """Name, system call and wait channel of each thread, for the message of a failed test."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        try:
            parts = [(task / leaf).read_text().strip() for leaf in ("comm", "syscall", "wchan")]
        except OSError:
            continue
        lines.append(f"{task.name}: {' | '.join(parts)}")
    return "\n".join(lines)


# ------------------------------------------------------------ native helpers


def compiler(name: str = "cc") -> str | None:
    """Path of a C ("cc") or C++ ("c++") compiler, or None."""
    return shutil.which(name) or shutil.which({"cc": "gcc", "c++": "g++"}[name])


def compile_helper(folder: Path, source: str, language: str = "c") -> Path:
    """Compile a few lines to a library in ``folder``; the caller has made sure of a compiler."""
    program = compiler({"c": "cc", "c++": "c++"}[language])
    assert program is not None
    code = folder / {"c": "helper.c", "c++": "helper.cc"}[language]
    library = code.with_suffix(".so")
    code.write_text(source)
    subprocess.run(
        [program, "-shared", "-fPIC", "-O1", "-pthread", "-o", str(library), str(code)], check=True
    )
    return library


__all__ = [
    "PAGE_SIZE",
    "Counters",
    "Gate",
    "Outcome",
    "Process",
    "compile_helper",
    "compiler",
    "content",
    "read_counters",
    "result_of",
    "run",
    "start",
    "wait_until",
    "word",
]
