"""Ctrl-C ends a program whose main thread waits for a page that never comes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, os, signal, sys, threading
import aiouffd

called = threading.Event()

async def never(offset, length):
    called.set()
    await asyncio.Event().wait()

source = aiouffd.sources.FunctionSource(never, 1 << 20, portable=True)
buffer = aiouffd.sync.open(source)
view = buffer.view

def interrupt():
    called.wait()
    # As a person would: the first may come before anybody has noticed the wait.
    while True:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(5)

threading.Thread(target=interrupt, daemon=True).start()
how = sys.argv[1]
if how == "with the GIL":
    view[5]
elif how == "without the GIL":
    buffer[5]
else:
    _, writer = os.pipe()
    os.write(writer, view[:10])
"""


@pytest.mark.parametrize(
    "how",
    [
        "with the GIL",
        "without the GIL",
        pytest.param("in a system call", marks=pytest.mark.needs_root),
    ],
)
def test_the_main_thread_waits(how: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode == -signal.SIGINT, result.stderr
    assert "interrupted while the main thread waits" in result.stderr
