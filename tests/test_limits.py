"""When the process lacks what the sentry looks with, a touch still ends.

Both cases hold the GIL while they wait, so each runs in a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

NO_DESCRIPTORS = """
import asyncio, os, resource
import aiouffd

async def main():
    async def read(offset, length):
        return b"x" * length
    source = aiouffd.sources.FunctionSource(read, 1 << 20, portable=True)
    async with aiouffd.open(source) as buf:
        view = buf.view
        await asyncio.to_thread(lambda: view[900_000])
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        taken = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        print(await asyncio.to_thread(lambda: view[5]))
        for fd in taken:
            os.close(fd)

asyncio.run(main())
"""

NOT_DUMPABLE = """
import asyncio, os, sys
sys.path.insert(0, os.getcwd())
import aiouffd
import aiouffd.sources

os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)

async def main():
    async def read(offset, length):
        return b"x" * length
    async with aiouffd.Pager(stall=1.0) as pager:
        region = pager.map(1 << 20)
        @region.on_missing(portable=True)
        async def serve(fault):
            fault.copy(b"x" * fault.length)
        view = region.view
        await asyncio.to_thread(lambda: view[5])

asyncio.run(main())
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=40, check=False
    )


def test_a_gil_holder_is_served_without_a_free_descriptor() -> None:
    result = run(NO_DESCRIPTORS)
    assert (result.returncode, result.stdout) == (0, "120\n"), result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the user")
def test_a_process_that_cannot_be_observed_gets_an_error_and_was_warned() -> None:
    result = run(NOT_DUMPABLE)
    assert result.returncode == -signal.SIGBUS, result.stderr
    assert "not dumpable" in result.stderr
    assert "no progress for too long" in result.stderr
