"""Forked children that keep the lazy memory of their parent, which serves them.

The cases are programs of their own (``tests/scenarios/fork_serving.py``): what fails here may hang,
or read zeros in a child.
"""

from __future__ import annotations

import os
import platform
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.sources import FunctionSource
from tests.faulty import HUGE, huge_pages
from tests.scenarios import fork_serving as scenarios
from tests.support import Outcome, content, result_of, run, start, word

KINDS = ["anonymous", "memfd"]
SIZE = scenarios.SIZE
#: What a child says that touches a page which is an error.
TOUCHED = re.compile(r"aiouffd: thread \d+ touched 0x[0-9a-f]+, byte \d+ of a lazy region: .*\n")
REFUSED = re.compile(
    r"aiouffd: process \d+: the lazy memory that it got by fork cannot be served \(.*\n"
)

x86_64 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="knows the numbers of system calls of x86-64 alone"
)
kinds = pytest.mark.parametrize("kind", KINDS)


def result_with(outcome: Outcome, *lines: re.Pattern[str]) -> Any:
    """The scenario's result, after checking that nothing but such lines was said."""
    assert outcome.status == 0, f"{outcome.death or outcome.status}\n{outcome.stderr[-6000:]}"
    rest = outcome.stderr
    for line in lines:
        rest = line.sub("", rest)
    assert not rest, rest[-6000:]
    return outcome.result


# -------------------------------------------------------------------- touching


@kinds
@pytest.mark.parametrize("user_mode_only", [True, None])
def test_from_the_loops_own_thread(loop_name: str, kind: str, user_mode_only: bool | None) -> None:
    if user_mode_only is None and os.geteuid() != 0:
        pytest.skip("needs a userfaultfd for faults of kernel mode")
    found = result_of(scenarios.from_the_loop, loop_name, kind, user_mode_only)
    child = found["child"]
    assert child.pop("said") == dict.fromkeys(
        ["fetch", "read", "resident", "prefetch"], "ClosedError"
    )
    assert child.pop("closed") == ["", "ClosedError"]
    assert child.pop("len") == SIZE
    assert child.pop("threads") == 2
    assert set(child.values()) == {True}, child
    # A system call on a missing page fails where nobody can wait for it.
    assert found["ways"] == ["EFAULT" if user_mode_only else "right", "right", "right"]
    assert found["user_mode_only"] is bool(user_mode_only)
    # The loop's thread touched nothing itself, and private memory is the children's own.
    assert found["rescued"] == 0
    assert found["resident"] == (SIZE if kind == "memfd" else scenarios.BLOCK)
    assert found["fetched"] >= SIZE


@kinds
def test_a_pool(loop_name: str, kind: str) -> None:
    found = result_of(scenarios.by_pool, loop_name, kind, 4)
    assert found["answers"] == [True] * 16
    # Whoever asked, each block came once.
    assert found["fetched"] == SIZE


@kinds
def test_a_pool_that_blocks_the_loop(loop_name: str, kind: str) -> None:
    assert result_of(scenarios.by_pool_on_the_loop, loop_name, kind) == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("fork", ["serve", "drop"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_by_pickling(loop_name: str, method: str, fork: str, tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(content(SIZE))
    assert result_of(scenarios.by_pickling, loop_name, method, str(path), fork) == [True, True]


@kinds
def test_sync_buffers(kind: str) -> None:
    assert result_of(scenarios.sync_buffer, "asyncio", kind) == [True, [-1, SIZE, "ClosedError"]]


@kinds
def test_other_sources(loop_name: str, kind: str, tmp_path: Path) -> None:
    found = result_of(scenarios.other_sources, loop_name, str(tmp_path / "object"), kind)
    assert found == [True] * 6


@kinds
def test_readahead(loop_name: str, kind: str) -> None:
    found = result_of(scenarios.with_readahead, loop_name, kind)
    assert found == {"without": 8, "ahead": True, "children": [True, True], "once": True}


@kinds
def test_threads_of_a_child(loop_name: str, kind: str) -> None:
    assert result_of(scenarios.in_threads, loop_name, kind)["threads"] == 8


@pytest.mark.hugetlb
@pytest.mark.parametrize("kind", ["hugetlb", "hugetlb-memfd"])
def test_huge_pages(loop_name: str, kind: str) -> None:
    size = 2 * HUGE + 12345
    with huge_pages(9):
        found = result_of(scenarios.huge_pages, loop_name, kind, size)
    assert found == {"served": True, "zeros behind": True, "len": size}


# --------------------------------------------------------------------- moments


@kinds
def test_fork_while_fetches_are_under_way(loop_name: str, kind: str) -> None:
    found = result_of(scenarios.while_fetching, loop_name, kind)
    assert found == {"child": True, "parent": True}


def test_fork_while_all_touch(loop_name: str) -> None:
    found = result_of(scenarios.while_all_touch, loop_name, 15)
    assert found == {"answers": [True] * 30, "whole": [True, True]}


@kinds
def test_grandchildren(loop_name: str, kind: str) -> None:
    found = result_of(scenarios.grandchildren, loop_name, kind)
    assert found == {"nested": [True, [True, True], True], "orphan": "y"}


def test_a_child_with_buffers_of_its_own(loop_name: str) -> None:
    found = result_of(scenarios.own_buffers, loop_name)
    assert found == {"child": [[True, True], True, True, True], "parent": True}


# ---------------------------------------------------------------------- memory


@kinds
def test_what_is_written(loop_name: str, kind: str) -> None:
    found = result_of(scenarios.written, loop_name, kind)
    assert found["child"] == ["PPPP", True]
    assert found["seen"] == (["child's"] * 2 if kind == "memfd" else ["source's"] * 2)
    assert found["around"]
    assert found["again"]


@kinds
def test_what_is_dropped_is_fetched_anew(loop_name: str, kind: str) -> None:
    found = result_of(scenarios.dropped, loop_name, kind)
    assert found == {"child": [True] * 4, "next": True}


# ------------------------------------------------------------------------- end


@kinds
@pytest.mark.parametrize("others", [False, True], ids=["", "beside others"])
def test_closing_while_children_wait(loop_name: str, kind: str, others: bool) -> None:
    outcome = run(scenarios.closed_while_waiting, loop_name, kind, others)
    call, *touches, late, later = result_with(outcome, TOUCHED)["answers"]
    assert call == ["SourceError", True, "SourceError", True]
    assert touches == ["SIGBUS", "SIGBUS"]
    # Those that come after it: what is there can be read through a view, as in the parent.
    assert late == ["ClosedError", True]
    assert later == "SIGBUS"


@kinds
@pytest.mark.parametrize("how", ["closed", "collected"])
def test_children_hold_the_memory(loop_name: str, kind: str, how: str) -> None:
    found = result_of(scenarios.closed_while_held, loop_name, kind, how)
    assert found.pop("answers") == [True, word(5 * scenarios.BLOCK)]
    assert found == {"held": True, "regions": 0}


@kinds
def test_a_parent_that_is_killed(loop_name: str, kind: str) -> None:
    with start(scenarios.parent_hangs, loop_name, kind) as parent:
        parent.expect("waiting")
        parent.popen.kill()
        assert parent.expect("call") == "SourceError True SourceError"
        assert parent.expect("touch") == "SIGBUS"
        assert not TOUCHED.sub("", parent.stderr())


def test_a_child_that_is_joined_at_exit(loop_name: str) -> None:
    outcome = run(scenarios.exits_with_children, loop_name, warnings="ignore")
    assert (outcome.status, outcome.stdout, outcome.stderr) == (0, "whole\n", "")


# -------------------------------------------------------------------- failures


@pytest.mark.slow
@kinds
@pytest.mark.parametrize(
    ("how", "answer"),
    [
        ("for a while", [True, True]),
        ("final", ["SourceError", "SIGBUS"]),
        ("late", ["SourceError", "SIGBUS"]),
        ("changed", ["SourceError", "SIGBUS"]),
    ],
)
def test_a_source_that_fails(loop_name: str, kind: str, how: str, answer: list[Any]) -> None:
    outcome = run(scenarios.failing, loop_name, kind, how)
    logged = re.compile(r"<child \d+> gets an error for block \d+: .*\n")
    found = result_with(outcome, TOUCHED, logged)
    assert [item["killed"] if isinstance(item, dict) else item for item in found] == answer


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_a_source_that_was_replaced(loop_name: str, tmp_path: Path, errors: str) -> None:
    outcome = run(scenarios.source_cannot_open, loop_name, str(tmp_path / "object"), errors)
    logged = re.compile(r"<child \d+> gets an error for block \d+: .*\n")
    assert result_with(outcome, logged) == [["SourceError", ""]]


@kinds
def test_a_child_that_cannot_be_handed_over(kind: str) -> None:
    # Not with uvloop, which aborts a child that has no descriptors left.
    outcome = run(scenarios.not_handed_over, "asyncio", kind)
    found = result_with(outcome, REFUSED)
    assert found == [["ClosedError", 0], ["", signal.SIGBUS], True]
    assert len(REFUSED.findall(outcome.stderr)) == 2


@kinds
@pytest.mark.parametrize("close_range", [True, pytest.param(False, marks=x86_64)])
def test_a_child_that_closes_all_descriptors(loop_name: str, kind: str, close_range: bool) -> None:
    outcome = run(scenarios.closes_everything, loop_name, kind, close_range)
    found = result_with(outcome, REFUSED)
    assert found == {"child": [True, True], "grandchild": ["SourceError", True]}
    assert len(REFUSED.findall(outcome.stderr)) == 1


def test_a_child_that_punches_a_hole(loop_name: str) -> None:
    assert result_of(scenarios.punches_a_hole, loop_name) == [True, True]


@x86_64
def test_closing_without_poison(loop_name: str) -> None:
    outcome = run(scenarios.closing_without_poison, loop_name)
    assert outcome.status == 0, outcome.stderr
    assert outcome.result == [["SourceError"], ["SourceError"]]


def test_a_child_of_one_that_was_refused() -> None:
    # On asyncio alone: without a free descriptor libuv aborts a child that forks again.
    outcome = run(scenarios.a_child_of_one_that_was_refused, "asyncio")
    assert result_with(outcome, REFUSED) == ["ClosedError", "ClosedError"]


async def test_a_source_that_cannot_be_cloned() -> None:
    async def read(offset: int, length: int) -> bytes:
        raise AssertionError

    with pytest.raises(aiouffd.UnsupportedError, match="second event loop"):
        await aiouffd.open(FunctionSource(read, SIZE), fork="serve")
    async with aiouffd.open(FunctionSource(read, SIZE)):
        pass


def test_arguments() -> None:
    with pytest.raises(aiouffd.UsageError, match="'drop' or 'serve'"):
        aiouffd.open(b"x", fork="copy")  # type: ignore[arg-type]


# ------------------------------------------------------------------------ many


def test_many_children(loop_name: str) -> None:
    found = result_of(scenarios.many, loop_name, 64, limit=60)
    assert found["answers"] == [True] * 64
    assert set(found["live"].values()) == {0}, found["live"]
    assert found["parent"]


def test_subprocesses(loop_name: str) -> None:
    assert result_of(scenarios.subprocesses, loop_name, 8)["codes"] == [0] * 8


def test_hundreds_of_buffers(loop_name: str) -> None:
    found = result_of(scenarios.hundreds_of_buffers, loop_name, 400)
    assert found == {"answer": [100, 200, 200]}


@pytest.mark.needs_root
def test_a_child_that_changes_its_user(loop_name: str) -> None:
    assert result_of(scenarios.changes_user, loop_name)["child"] == [["65534"], True]
