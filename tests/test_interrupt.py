"""Signals, Ctrl-C above all, while the main thread waits for bytes that never come."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scenarios import interrupt as scenarios
from tests.support import Process, result_of, start, wait_until

#: Seconds from a signal to its handler: well under a tenth, but for a machine that is busy.
PROMPT = 0.5


def test_blocking_calls_are_cut_short() -> None:
    took = result_of(scenarios.sync_calls, "asyncio")
    assert len(took) == 9
    assert max(took.values()) < PROMPT, took


def test_touches_through_the_buffer_are_cut_short_on_its_loop(loop_name: str) -> None:
    took = result_of(scenarios.on_the_loop, loop_name, warnings="ignore")
    assert max(took.values()) < PROMPT, took


def test_the_first_one_ends_asyncio_run(loop_name: str) -> None:
    seen = result_of(scenarios.under_asyncio_run, loop_name, warnings="ignore")
    assert seen == ["cancelled", "KeyboardInterrupt"]


def test_a_handler_may_use_the_buffer_and_the_call_goes_on() -> None:
    seen = result_of(scenarios.handler_that_returns, "asyncio")
    assert seen == ["0106000000000000", True]


def test_closing_ends_the_wait() -> None:
    assert result_of(scenarios.closed_meanwhile, "asyncio") == "ClosedError"


def test_a_forked_child_is_cut_short() -> None:
    assert result_of(scenarios.in_a_child, "asyncio", warnings="ignore") < PROMPT


def test_attached_is_cut_short(tmp_path: Path) -> None:
    path = str(tmp_path / "s")  # which has to be short
    with start(scenarios.serve_dead, "asyncio", path) as server:
        server.expect("serving")
        with start(scenarios.attached, "asyncio", path) as client:
            for _ in range(2):
                server.expect("asked")
                client.popen.send_signal(signal.SIGINT)
                client.expect("interrupted")
            outcome = client.wait(10.0)
    assert (outcome.status, outcome.stderr) == (0, "")


RAW = """
import asyncio, os, signal, sys, threading, time
import aiouffd

asked = threading.Event()

class Dead(aiouffd.sources.BaseSource):
    size = 1 << 20
    async def read(self, offset, length):
        asked.set()
        await asyncio.Event().wait()
    def clone(self):
        return Dead()

buffer = aiouffd.sync.open(Dead(), readahead=0)
view = buffer.view
touch, handler = sys.argv[1:]
if handler == "of the program":
    signal.signal(signal.SIGINT, lambda *_: print("heard"))

def interrupt():
    asked.wait()
    time.sleep(0.1)  # for a wait that is under way, as a person's is
    print("waits", flush=True)

threading.Thread(target=interrupt).start()
if touch == "with the GIL":
    view[70000]
elif touch == "without the GIL":
    import ctypes
    ctypes.CDLL(None).memchr(ctypes.c_void_p(buffer.address + 70000), 1, 1)
else:
    os.write(os.pipe()[1], view[70000:70010])
"""
TOUCHES = [
    "with the GIL",
    "without the GIL",
    pytest.param("in a system call", marks=pytest.mark.needs_root),
]


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("handler", ["default", "of the program"])
def test_a_raw_touch_tells_and_the_second_interrupt_ends(touch: str, handler: str) -> None:
    with Process([sys.executable, "-c", RAW, touch, handler]) as process:
        process.expect("waits")
        process.popen.send_signal(signal.SIGINT)
        wait_until(lambda: "\n" in process.stderr(), "the message")
        told = process.stderr()
        assert re.fullmatch(
            r"aiouffd: interrupted, but the main thread has touched byte 69632 of Dead and has "
            r"waited for it for 0\.\d s; Python goes on when it comes\. A second interrupt ends "
            r"the process\n",
            told,
        ), told
        # It does not end by itself. (And interrupts that come together are one.)
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(0.4)
        process.popen.send_signal(signal.SIGINT)
        outcome = process.wait(5.0)
    assert outcome.death == "SIGINT"
    assert outcome.stderr == told
