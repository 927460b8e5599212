"""Nothing deadlocks: the rescue loop, and an error where even that cannot help."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scenarios import traps
from tests.support import result_of, run, start

# Half of the cases wait in system calls, which a user-mode-only descriptor does not see.
pytestmark = pytest.mark.needs_root

#: With the GIL, without, and in a system call.
WAYS = ["struct", "memcpy", "write"]


def moved(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value}


@pytest.mark.parametrize("way", ["struct", "memcpy", "write", "send"])
def test_the_loops_own_thread_touches(loop_name: str, way: str) -> None:
    found = result_of(traps.loop_thread, loop_name, way)
    assert found["rescued"] == found["touches"], moved(found)
    # One for three touches on one line, one for the other line.
    assert found["categories"] == ["BlockingTouchWarning"]
    assert len(found["warnings"]) == 2
    assert all("in loop_thread" in text for text in found["warnings"])
    assert found["stall_poisons"] == 0


def test_a_warning_that_is_an_error_goes_to_the_loops_handler(loop_name: str) -> None:
    assert result_of(traps.warning_is_error, loop_name)["kinds"] == ["BlockingTouchWarning"]


def test_strict_ends_the_process_with_a_traceback(loop_name: str) -> None:
    with start(traps.strict_touch, loop_name) as process:
        process.expect("begins")
        outcome = process.wait(5.0)
    assert outcome.death == "SIGABRT"
    assert "strict" in outcome.stderr
    assert "in strict_touch" in outcome.stderr
    assert "survived" not in outcome.stdout


@pytest.mark.parametrize("what", ["join", "future", "callback"])
def test_the_loop_waits_for_the_toucher(loop_name: str, what: str) -> None:
    found = result_of(traps.loop_waits_for, loop_name, what, WAYS)
    assert found["rescues"] >= 1, moved(found)
    assert found["stall_poisons"] == 0, moved(found)


@pytest.mark.parametrize("closed", [False, True], ids=["between runs", "closed"])
@pytest.mark.parametrize("on_main", [True, False], ids=["loop's thread", "worker"])
def test_the_loop_does_not_run(loop_name: str, on_main: bool, closed: bool) -> None:
    found = result_of(traps.loop_not_running, loop_name, WAYS, on_main, closed)
    assert found["rescues"] >= 1, moved(found)
    assert found["stall_poisons"] == 0, moved(found)


def test_a_handler_that_is_not_portable_gives_an_error(loop_name: str) -> None:
    found = result_of(traps.not_portable, loop_name, "write", 0.3)
    assert found["errno"] == "EFAULT"
    assert 0.3 <= found["seconds"] < 2.0
    assert any(
        line.startswith("ERROR") and "Declare the handler portable" in line
        for line in found["lines"]
    )


def test_a_handler_that_is_not_portable_kills_a_raw_touch(loop_name: str) -> None:
    with start(traps.not_portable, loop_name, "struct", 0.3) as process:
        process.expect("begins")
        outcome = process.wait(5.0)
    assert outcome.death == "SIGBUS"
    assert "byte 0 of a lazy region" in outcome.stderr


def test_a_loop_that_is_only_late_serves_in_the_end(loop_name: str) -> None:
    found = result_of(traps.slow_but_coming, loop_name)
    assert found["poisoned_bytes"] == 0, moved(found)
    assert not any(line.startswith("ERROR") for line in found["lines"])


@pytest.mark.parametrize("masked", [False, True], ids=["", "signal masked"])
def test_the_gil_held_in_the_kernel_ends_in_efault(loop_name: str, masked: bool) -> None:
    outcome = run(traps.kernel_mode_with_gil, loop_name, 0.5, masked)
    assert outcome.status == 0, outcome.stderr
    # Said at once, by the sentry, which needs nobody for it; the name follows in the log.
    assert "no progress for too long" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    found = outcome.result
    assert found["errno"] == "EFAULT", moved(found)
    assert 0.4 < found["seconds"] < 2.0, moved(found)
    assert found["stall_poisons"] == 1, moved(found)
    assert found["signals"] == 0, moved(found)
    assert any("thread the toucher" in line for line in found["lines"]), moved(found)
