"""The GIL yield on real faults: each way that it could fail, as found before it was built.

The letters are those of the table in docs/concepts.md. Every test is a program of its own,
`tests.scenarios.gil_yield`: a failure is a process that stands still with the GIL held.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios import gil_yield
from tests.support import compile_helper, compiler, result_of, run, start

# Half of the cases wait in system calls, which a user-mode-only descriptor does not see.
pytestmark = pytest.mark.needs_root

needs_compiler = pytest.mark.skipif(not compiler("cc"), reason="no C compiler for a helper")


def moved(found: dict[str, Any]) -> dict[str, Any]:
    """What is worth seeing when an assertion fails."""
    return {name: value for name, value in found.items() if value}


def test_touches_with_the_gil_are_served_by_python(loop_name: str) -> None:
    for way, found in result_of(gil_yield.touch_each, loop_name, [*gil_yield.HOLDING]).items():
        assert found["yields"] >= 1, (way, moved(found))
        assert found["signals"] <= 2, (way, moved(found))
        assert found["rescues"] == found["stall_poisons"] == 0, (way, moved(found))


def test_touches_without_the_gil_never_yield(loop_name: str) -> None:
    ways = [*gil_yield.FREE, *gil_yield.KERNEL]
    for way, found in result_of(gil_yield.touch_each, loop_name, ways).items():
        assert found["yields"] == 0, (way, moved(found))
        if way in gil_yield.KERNEL:
            # With a signal pending a fault of the kernel's own would spin.
            assert found["signals"] == 0, (way, moved(found))


@pytest.mark.parametrize("way", ["struct", "numpy", "numpy-operator"])
def test_one_instruction_that_needs_two_pages(loop_name: str, way: str) -> None:
    assert result_of(gil_yield.touch_across, loop_name, way)["yields"] >= 1


def test_copy_from_lazy_to_lazy_memory(loop_name: str) -> None:
    result_of(gil_yield.copy_lazy_to_lazy, loop_name)


@pytest.mark.parametrize("way", ["struct", "memcpy", "write"])
def test_k_two_signals_per_fault_at_most(loop_name: str, way: str) -> None:
    found = result_of(gil_yield.read_all, loop_name, way, 500)
    assert found["misses"] == 500, moved(found)
    assert found["signals"] <= 1000, moved(found)
    assert found["rescues"] == 0, moved(found)


@pytest.mark.parametrize(
    "ways", [["struct"], ["memcpy"], ["struct", "memcpy", "write"]], ids="-".join
)
def test_k_duplicates_are_not_signalled_again(loop_name: str, ways: list[str]) -> None:
    found = result_of(gil_yield.one_page_many_threads, loop_name, 32, ways)
    assert found["misses"] == 1, moved(found)
    assert found["signals"] <= 64, moved(found)


@needs_compiler
def test_a_the_reader_takes_the_message_of_a_thread_with_the_gil(
    loop_name: str, tmp_path: Path
) -> None:
    library = compile_helper(tmp_path, gil_yield.READER)
    found = result_of(gil_yield.reader_takes_message, loop_name, str(library), 200)
    assert found["taken"] > 0, moved(found)
    assert found["yields"] > 0, moved(found)


@pytest.mark.parametrize(
    ("threads", "touches", "ways"),
    [
        (4, 700, ["struct"]),
        (8, 300, ["struct", "memcpy", "bytes"]),
        (6, 300, ["struct", "memcpy", "write"]),
    ],
    ids=["gil", "user mode", "mixed"],
)
def test_b_c_nothing_is_lost_between_the_steps(
    loop_name: str, threads: int, touches: int, ways: list[str]
) -> None:
    found = result_of(gil_yield.hammer, loop_name, threads, touches, 7, ways)
    assert found["yields"] > 0, moved(found)
    assert found["stall_poisons"] == 0, moved(found)


@needs_compiler
def test_d_stale_signals_are_harmless(loop_name: str, tmp_path: Path) -> None:
    library = compile_helper(tmp_path, gil_yield.SPINNER)
    found = result_of(gil_yield.stale_signals, loop_name, str(library), 60)
    assert found["signals_stale"] >= 100, moved(found)
    assert found["yields"] >= 60, moved(found)


@pytest.mark.parametrize("where", ["exists", "here", "elsewhere"])
def test_e_subinterpreters(loop_name: str, where: str) -> None:
    found = result_of(gil_yield.subinterpreters, loop_name, where)
    assert found["yields"] > 0, moved(found)
    assert found["rescues"] == found["stall_poisons"] == 0, moved(found)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="before 3.13 it cannot have ctypes")
@pytest.mark.parametrize("way", gil_yield.TOUCHES_THERE)
def test_e_a_subinterpreter_with_its_own_gil(loop_name: str, way: str) -> None:
    if way == "view" and sys.version_info < (3, 14):
        pytest.skip("before 3.14 no memoryview can be handed over")
    found = result_of(gil_yield.gil_of_its_own, loop_name, way)
    assert found["yields"] > 0, moved(found)
    assert found["rescues"] == found["stall_poisons"] == 0, moved(found)


def test_e_a_subinterpreter_imports_and_ends(loop_name: str) -> None:
    found = result_of(gil_yield.import_in_a_subinterpreter, loop_name)
    assert found["yields"] >= 8, moved(found)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="before 3.12 it shares the GIL")
def test_e_an_isolated_subinterpreter_is_told_why_not() -> None:
    said = result_of(gil_yield.import_in_an_isolated_one, "asyncio")
    assert "cannot be imported in this sub-interpreter" in said
    assert "Open the buffer in the main interpreter" in said


@pytest.mark.parametrize("on_main", [True, False], ids=["main thread", "worker"])
def test_f_a_storm_of_signals(loop_name: str, on_main: bool) -> None:
    found = result_of(gil_yield.signal_storm, loop_name, on_main)
    assert found["yields"] > 0, moved(found)
    assert found["stall_poisons"] == 0, moved(found)


def test_f_a_yielded_thread_gives_way_to_signals(loop_name: str) -> None:
    found = result_of(gil_yield.signal_to_yielded_thread, loop_name)
    assert found["longest"] < 1.0
    assert found["given_way"] >= 5


def test_f_handlers_of_the_loop_run_beside_a_yield(loop_name: str) -> None:
    assert result_of(gil_yield.python_handler_beside_yield, loop_name) < 0.5


@pytest.mark.skipif(os.uname().machine not in gil_yield.PAUSE, reason="what is pause() here?")
@pytest.mark.parametrize(
    ("touchers", "count"),
    [(0, 300), (32, 300), pytest.param(32, 2000, marks=pytest.mark.slow)],
    ids=["control", "some", "many"],
)
def test_f_signals_to_the_process_wake_the_main_thread(
    loop_name: str, touchers: int, count: int
) -> None:
    assert result_of(gil_yield.signals_to_the_process, loop_name, touchers, count) == 0


def test_f_a_signal_that_only_a_yielded_thread_may_take(loop_name: str) -> None:
    assert result_of(gil_yield.signal_that_main_blocks, loop_name) < 1.0


@pytest.mark.parametrize("on_main", [True, False], ids=["main thread", "worker"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_f_a_deadly_signal_kills_at_once(
    loop_name: str, number: signal.Signals, on_main: bool
) -> None:
    with start(gil_yield.wait_for_page, loop_name, on_main) as process:
        process.expect("waiting")
        process.popen.send_signal(number)
        assert process.wait(2.0).death == number.name


def test_h_bytes_at_hand_are_served_under_a_foreign_mutex(loop_name: str) -> None:
    outcome = run(gil_yield.sqlite_mutex, loop_name, True, 1.0)
    assert (outcome.status, outcome.stderr) == (0, "")


def test_h_a_foreign_mutex_is_an_error_and_not_a_hang(loop_name: str) -> None:
    with start(gil_yield.sqlite_mutex, loop_name, False, 0.5) as process:
        process.expect("begins")
        outcome = process.wait(10.0)
    assert outcome.death == "SIGABRT", outcome.stderr
    assert "a lock inside C code" in outcome.stderr


def test_j_a_masked_signal_is_an_error_and_not_a_hang(loop_name: str) -> None:
    with start(gil_yield.masked_signal, loop_name, "struct", 0.5) as process:
        process.expect("begins")
        outcome = process.wait(5.0)
    assert outcome.death == "SIGBUS", outcome.stderr
    assert "no progress for too long" in outcome.stderr


@pytest.mark.parametrize("way", ["memcpy", "write"])
def test_j_a_masked_signal_without_the_gil_changes_nothing(loop_name: str, way: str) -> None:
    outcome = run(gil_yield.masked_signal, loop_name, way, 0.5)
    assert (outcome.status, outcome.stderr) == (0, "")


def test_more_threads_than_the_first_slots(loop_name: str) -> None:
    found = result_of(gil_yield.many_threads, loop_name, 150, False, "struct")
    assert found["live"] == 150, moved(found)
    assert found["live_slots"] == 0, moved(found)
    assert found["yields"] >= 150, moved(found)


@pytest.mark.parametrize("way", ["struct", "memcpy", "write"])
def test_threads_with_small_stacks(loop_name: str, way: str) -> None:
    found = result_of(gil_yield.many_threads, loop_name, 32, True, way)
    assert found["live_slots"] == 0, moved(found)


@pytest.mark.parametrize(
    "what",
    ["gc", "settrace", "setprofile", "tracemalloc", "frames", "switch interval", "faulthandler"],
)
def test_beside_what_looks_at_all_threads(loop_name: str, what: str) -> None:
    assert result_of(gil_yield.beside, loop_name, what)["yields"] > 0


def test_one_thread_in_user_and_kernel_mode(loop_name: str) -> None:
    found = result_of(gil_yield.user_and_kernel_mixed, loop_name)
    assert found["stall_poisons"] == 0, moved(found)
