"""Every way to touch, from every kind of thread, on both loops: right bytes, and no hang.

A hang with the GIL held stops a whole process, so all ways of one kind of thread are tried in
a program with a limit, and its answers are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios import matrix
from tests.servers.http import ServerProcess, start_in_process
from tests.support import content, result_of

LOOPS = ("asyncio", "uvloop")
SOURCES = ("function", "http")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("object") / "bytes"
    path.write_bytes(content(matrix.ROOM * len(matrix.WAYS)))
    with start_in_process({"/a": path}, record=False) as process:
        yield process


class Answers:
    """Runs each program once, when the first of its cells is looked at."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self._folder = folder
        self._server = server
        self._found: dict[tuple[str, ...], dict[str, str] | Exception] = {}

    def of(
        self, loop: str, thread: str, source: str, storm: str = "none", mode: str = ""
    ) -> dict[str, str]:
        key = (loop, thread, source, storm, mode)
        if key not in self._found:
            url = self._server.url("/a") if source == "http" else None
            try:
                self._found[key] = result_of(
                    matrix.cells, loop, thread, url, str(self._folder), storm, mode == "user"
                )
            except AssertionError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, Exception):
            raise AssertionError(f"the program of this cell failed: {found}")
        return found


@pytest.fixture(scope="module")
def answers(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("matrix"), server)


def judge(found: dict[str, str], way: str) -> None:
    answer = found[way]
    if answer.startswith("skipped: "):
        pytest.skip(answer.removeprefix("skipped: "))
    kernel = way in matrix.KERNEL
    # Without the right to see faults of kernel mode: EFAULT, and right bytes after a fetch.
    assert answer == ("EFAULT ok" if kernel and found[matrix.MODE] == "user" else "ok")


@pytest.mark.parametrize("way", matrix.WAYS)
@pytest.mark.parametrize("thread", matrix.THREADS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loop", LOOPS)
def test_right_bytes(answers: Answers, loop: str, source: str, thread: str, way: str) -> None:
    judge(answers.of(loop, thread, source), way)


@pytest.mark.slow
@pytest.mark.parametrize("way", matrix.WAYS)
@pytest.mark.parametrize("storm", ["signals", "gc"])
@pytest.mark.parametrize("thread", matrix.THREADS)
@pytest.mark.parametrize("loop", LOOPS)
def test_in_a_storm(answers: Answers, loop: str, thread: str, storm: str, way: str) -> None:
    found = answers.of(loop, thread, "function", storm)
    # Readahead is on here, and may have brought the pages before a system call needs them.
    if found[way] != "ok":
        judge(found, way)


@pytest.mark.parametrize("way", matrix.WAYS)
@pytest.mark.parametrize("thread", ["worker", "loop"])
@pytest.mark.parametrize("loop", LOOPS)
def test_user_mode_only(answers: Answers, loop: str, thread: str, way: str) -> None:
    found = answers.of(loop, thread, "function", mode="user")
    assert found[matrix.MODE] == "user"
    judge(found, way)
