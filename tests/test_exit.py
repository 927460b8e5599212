"""Processes end, whatever their threads wait for; and can be stopped, traced and killed."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aiouffd.regions import rescue
from tests.scenarios import exit as scenarios
from tests.support import Outcome, Process, compile_helper, compiler, run, start

# Half of the cases wait in system calls, which a user-mode-only descriptor does not see.
pytestmark = pytest.mark.needs_root

#: Seconds: the one that threads get, and the interpreter's own beginning and end.
SOON = 4.0
LEFT_BEHIND = re.compile(
    r"(aiouffd: thread '[^']+' still waits for a page at exit; left behind\n)?"
)


def check_end(outcome: Outcome, status: int) -> None:
    assert outcome.status == status, f"{outcome.death or outcome.status}\n{outcome.stderr}"
    assert LEFT_BEHIND.fullmatch(outcome.stderr), outcome.stderr
    assert outcome.seconds < SOON


@pytest.mark.parametrize(
    ("who", "way"),
    [
        *(("plain", way) for way in ("struct", "memcpy", "write")),
        *((who, way) for who in ("daemon", "executor") for way in ("struct", "write")),
    ],
)
def test_exit_beside_a_source_that_never_answers(loop_name: str, who: str, way: str) -> None:
    outcome = run(scenarios.blocked, loop_name, who, way, 3)
    check_end(outcome, 3)
    assert ("left behind" in outcome.stderr) == (who != "daemon")


@pytest.mark.parametrize("who", ["daemon", "plain"])
def test_return_from_main_is_status_zero(loop_name: str, who: str) -> None:
    check_end(run(scenarios.blocked, loop_name, who, "struct", 0), 0)


@pytest.mark.skipif(sys.version_info < (3, 15), reason="before 3.15 nobody has to be told")
def test_exit_though_the_interpreter_would_wait_for_ever() -> None:
    outcome = run(scenarios.blocked_for_python, "asyncio")
    assert (outcome.status, outcome.stdout) == (rescue.ENDED, "said"), outcome.stderr
    assert outcome.stderr.endswith("does not end beside threads that are left behind; ended\n")
    assert outcome.seconds < SOON


def test_exit_beside_a_sync_buffer() -> None:
    # It is not closed, on purpose.
    check_end(run(scenarios.blocked_sync, "asyncio", 3, warnings="ignore"), 3)


def test_a_late_answer_is_waited_for(loop_name: str) -> None:
    outcome = run(scenarios.answered_late, loop_name, 3)
    assert (outcome.status, outcome.stderr) == (3, "")
    assert outcome.stdout == "touched\n"


@pytest.mark.skipif(not compiler("c++"), reason="no C++ compiler for a helper")
def test_exit_through_a_noexcept_frame(loop_name: str, tmp_path: Path) -> None:
    library = compile_helper(tmp_path, scenarios.NOEXCEPT, "c++")
    check_end(run(scenarios.under_noexcept, loop_name, str(library), 3), 3)


@pytest.mark.parametrize("who", ["daemon", "plain"])
def test_a_signal_handler_that_exits(loop_name: str, who: str) -> None:
    with start(scenarios.exit_on_signal, loop_name, who) as process:
        process.expect("begins")
        process.popen.send_signal(signal.SIGTERM)
        check_end(process.wait(SOON), 7)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_a_random_moment(loop_name: str, number: signal.Signals) -> None:
    choice = random.Random(number)
    for _ in range(2):
        with start(scenarios.busy, loop_name, ["struct", "memcpy", "write", "bytes"]) as process:
            process.expect("begins")
            time.sleep(choice.random() * 0.05)  # the random moment
            process.popen.send_signal(number)
            outcome = process.wait(3.0)
        assert outcome.death == number.name, outcome.stderr
        if number != signal.SIGINT:
            assert outcome.stderr == ""
        else:
            assert outcome.stderr.rstrip().endswith("KeyboardInterrupt")
            assert "aiouffd:" not in outcome.stderr


def finish(process: Process) -> None:
    process.popen.send_signal(signal.SIGUSR1)
    outcome = process.wait(10.0)
    assert (outcome.status, outcome.stderr) == (0, ""), outcome.death
    assert outcome.result["stall_poisons"] == 0


@pytest.mark.parametrize("ways", [["struct", "memcpy", "bytes"], ["struct", "write"]])
def test_stopped_and_continued(loop_name: str, ways: list[str]) -> None:
    choice = random.Random(1)
    with start(scenarios.busy, loop_name, ways) as process:
        process.expect("begins")
        for _ in range(20):
            process.popen.send_signal(signal.SIGSTOP)
            if "write" not in ways:
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status)
            # Else the stop may not complete before SIGCONT: a thread that waits for a page in
            # the kernel cannot be stopped there, and who brings the page is stopped already.
            process.popen.send_signal(signal.SIGCONT)
            time.sleep(choice.random() * 0.005)  # the random moment
        finish(process)


PTRACE_ATTACH, PTRACE_DETACH, WALL = 16, 17, 0x40000000


def attach_and_detach(tid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(PTRACE_ATTACH, tid, None, None):
        pytest.skip(f"ptrace is not allowed here: {os.strerror(ctypes.get_errno())}")
    _, status = os.waitpid(tid, WALL)
    assert os.WIFSTOPPED(status)
    assert libc.ptrace(PTRACE_DETACH, tid, None, None) == 0


@pytest.mark.parametrize("way", ["struct", "memcpy"])
def test_traced_while_it_waits(loop_name: str, way: str) -> None:
    with start(scenarios.looked_at, loop_name, way) as process:
        tid = int(process.expect("begins"))
        for _ in range(10):
            attach_and_detach(tid)
        finish(process)


@pytest.mark.skipif(not shutil.which("gdb"), reason="no gdb")
def test_a_debugger_looks_at_all_threads(loop_name: str) -> None:
    with start(scenarios.looked_at, loop_name, "struct") as process:
        process.expect("begins")
        seen = subprocess.run(
            ["gdb", "-nx", "-p", str(process.pid), "-batch", "-ex", "thread apply all bt 3"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
        if "Thread 1" not in seen:
            pytest.skip("gdb may not attach here")
        finish(process)
