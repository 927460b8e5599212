"""Fork: the child has nothing of its parent's lazy memory, least of all zeros for it."""

from __future__ import annotations

import pytest

from tests.scenarios import forking
from tests.support import result_of

# Half of the cases wait in system calls, which a user-mode-only descriptor does not see.
pytestmark = pytest.mark.needs_root


def test_the_child_has_nothing_and_says_so(loop_name: str) -> None:
    found = result_of(forking.child_api, loop_name)
    assert set(found["said"].values()) == {"ClosedError"}, found["said"]
    assert found["mapped"] == [False, False]
    assert found["userfaultfds"] == 0
    assert found["own"] == "served"
    # What is not mapped cannot read as zero.
    assert found["raw"] == {"killed": "SIGSEGV"}


def test_the_child_closes_no_descriptors_of_others(loop_name: str) -> None:
    assert result_of(forking.descriptors_of_others, loop_name)["files"] == 64


@pytest.mark.parametrize("ways", [["struct"], ["memcpy", "write"], ["struct", "bytes", "write"]])
def test_fork_while_threads_wait(loop_name: str, ways: list[str]) -> None:
    assert result_of(forking.while_threads_wait, loop_name, ways)["answers"] == ["served"] * 3


def test_fork_at_any_moment(loop_name: str) -> None:
    assert result_of(forking.while_all_touch, loop_name, 40)["stall_poisons"] == 0


def test_multiprocessing(loop_name: str) -> None:
    assert result_of(forking.by_multiprocessing, loop_name)["answers"] == ["served"] * 4
