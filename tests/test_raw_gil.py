"""`Userfaultfd` without the framework: nothing deadlocks there either.

The cases hold the GIL while they wait, so they run in a process of their own.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import asyncio, faulthandler, mmap, os, sys, threading
faulthandler.dump_traceback_later(20, exit=True)
import uvloop
from aiouffd import Feature, Mode, Userfaultfd
from aiouffd.abi import PageFault, Remove
from aiouffd.uffd import address_of

PAGE = mmap.PAGESIZE
PAGES = 64
DATA = os.urandom(PAGES * PAGE)
memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = address_of(memory)

async def serve(uffd, events):
    async for message in uffd:
        if isinstance(message, PageFault):
            offset = (message.address - base) & ~(PAGE - 1)
            uffd.copy(base + offset, DATA[offset:offset + PAGE])
        else:
            events.append(message)
"""

TOUCH = """
async def main():
    with Userfaultfd(user_mode_only=None) as uffd:
        uffd.register(base, PAGES * PAGE, Mode.MISSING)
        server = asyncio.create_task(serve(uffd, []))
        await asyncio.sleep(0)
        view = memoryview(memory)
        def touch(first):
            return all(view[i * PAGE + 5] == DATA[i * PAGE + 5] for i in range(first, PAGES, 4))
        right = await asyncio.gather(*[asyncio.to_thread(touch, i) for i in range(4)])
        server.cancel()
        print("right", right)
"""

EVENT = """
async def main():
    events = []
    with Userfaultfd(Feature.EVENT_REMOVE, user_mode_only=None) as uffd:
        uffd.register(base, PAGES * PAGE, Mode.MISSING)
        server = asyncio.create_task(serve(uffd, events))
        await asyncio.sleep(0)
        await asyncio.to_thread(memory.__getitem__, 7)
        # mmap.madvise holds the GIL while it waits for its event to be read.
        await asyncio.to_thread(memory.madvise, mmap.MADV_DONTNEED, 0, PAGE)
        while not events:
            await asyncio.sleep(0.001)
        assert isinstance(events[0], Remove), events
        right = await asyncio.to_thread(memory.__getitem__, 7) == DATA[7]
        server.cancel()
        print("right", right)
"""


def run(body: str, loop: str) -> str:
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(body) + f"\n{loop}.run(main())\n"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=40, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_touching_with_the_gil_held(loop: str) -> None:
    assert run(TOUCH, loop) == "right [True, True, True, True]\n"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_event_whose_maker_holds_the_gil(loop: str) -> None:
    assert run(EVENT, loop) == "right True\n"
