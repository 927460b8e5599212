"""Runs the restorer for a test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.criu.images import LAZY, PRESENT, Task
from tests.support import environment

PRIVATE = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
#: Seconds for anything that a restore waits for.
LIMIT = 20


def task_of(task: Task, **more: Any) -> dict[str, Any]:
    """The specification of a task that the dump has."""
    if task.dead:
        return {"pid": task.pid, "dead": True}
    return {
        "pid": task.pid,
        "vmas": [[start, end - start, PRIVATE] for start, end in task.vmas],
        "lazy": [[run.address, run.count, run.tag] for run in task.pages if run.flags & LAZY],
        "eager": [
            [run.address, run.count, run.tag]
            for run in task.pages
            if run.flags & PRESENT and not run.flags & LAZY
        ],
        **more,
    }


def check_all(task: Task) -> list[list[Any]]:
    """Actions that look at all of a task's memory."""
    return [["check", start, (end - start) // 4096] for start, end in task.vmas]


def descriptors() -> Counter[str]:
    """What this process has open, by kind."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target != "/dev/null":  # uvloop keeps one for the next program
            found[target if target.startswith("anon") else target.partition(":[")[0]] += 1
    return found


class Restorer:
    """A restorer that runs. Leaving its context kills it and all that it has made."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def said(self, text: str) -> None:
        """Until it has said a line that begins so."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            while not any(line.startswith(text) for line in self.lines):
                line = await self.process.stdout.readline()
                if not line:
                    raise AssertionError(f"it ended without {text!r}: {await self.errors()}")
                self.lines.append(line.decode().rstrip())

    async def errors(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    async def end(self) -> None:
        """Until it and all of its tasks have ended, and each has seen what it must."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            self.lines += (await self.process.stdout.read()).decode().splitlines()
            errors = await self.errors()
            status = await self.process.wait()
        assert not errors
        assert status == 0
        assert not any("ended with" in line and line[-1] != "0" for line in self.lines)


@asynccontextmanager
async def restorer(
    folder: Path, tasks: Iterable[dict[str, Any]], **specification: Any
) -> AsyncIterator[Restorer]:
    """A restorer in the work directory ``folder``."""
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps({"tasks": list(tasks), **specification}).encode())
        given.seek(0)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("restorer.py")),
            stdin=given,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env=environment(),
            start_new_session=True,
            limit=1 << 24,
        )
    made = Restorer(process)
    try:
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()
        # Their ends here go with the last of theirs.
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            await stream.read()


class Gate:
    """A FIFO that tasks wait at."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        os.mkfifo(self.path)

    @property
    def wait(self) -> list[Any]:
        return ["wait", str(self.path)]

    async def open(self) -> None:
        """Let one task through; waits until it is there."""
        await asyncio.wait_for(asyncio.to_thread(self._open), LIMIT)

    def _open(self) -> None:
        with open(self.path, "wb"):
            pass
