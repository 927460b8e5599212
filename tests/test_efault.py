"""System calls on missing pages without privileges: the exception says why where it is shown."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.buffers.efault import explain
from aiouffd.sources import FunctionSource

SIZE = 8 << 20


def source() -> FunctionSource:
    async def read(offset: int, length: int) -> bytes:
        return bytes(length)

    return FunctionSource(read, size=SIZE, portable=True)


def write(view: memoryview, folder: Path) -> None:
    with (folder / "out").open("wb", buffering=0) as file:
        file.write(view)


def write_buffered(view: memoryview, folder: Path) -> None:
    with (folder / "out").open("wb") as file:
        file.write(view)


def send(view: memoryview, _folder: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(view)


def run(view: memoryview, _folder: Path) -> None:
    subprocess.run([sys.executable, "-c", "import sys; sys.stdin.read()"], input=view, check=False)


def numpy_tofile(view: memoryview, folder: Path) -> None:
    numpy = pytest.importorskip("numpy")
    numpy.frombuffer(view).tofile(folder / "out")


def numpy_save(view: memoryview, folder: Path) -> None:
    numpy = pytest.importorskip("numpy")
    numpy.save(folder / "out.npy", numpy.frombuffer(view))


WAYS = [write, write_buffered, send, run, numpy_tofile, numpy_save]


def check(caught: pytest.ExceptionInfo[Any], fetch: str) -> None:
    (note,) = caught.value.__notes__
    assert "without privileges it fails with EFAULT" in note
    assert f"`{fetch}`" in note
    assert "aiouffd doctor" in note


@pytest.mark.parametrize("way", WAYS)
def test_sync(way: Callable[[memoryview, Path], None], tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"Bad address|requested and") as caught,
        aiouffd.sync.open(source(), user_mode_only=True, readahead=0) as buf,
    ):
        way(buf.view, tmp_path)
    check(caught, "buf.fetch()")


@pytest.mark.parametrize("way", WAYS)
async def test_async(way: Callable[[memoryview, Path], None], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"Bad address|requested and") as caught:
        async with aiouffd.open(source(), user_mode_only=True, readahead=0) as buf:
            await asyncio.to_thread(way, buf.view, tmp_path)
    check(caught, "await buf.fetch()")


async def test_in_a_group_of_tasks(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with (
            aiouffd.open(source(), user_mode_only=True, readahead=0) as buf,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(asyncio.to_thread(write, buf.view, tmp_path))
    check(caught, "await buf.fetch()")


def test_another_error_gets_no_note() -> None:
    with (
        pytest.raises(FileNotFoundError) as caught,
        aiouffd.sync.open(source(), user_mode_only=True) as buf,
    ):
        os.stat(f"/nowhere/{len(buf)}")
    assert not hasattr(caught.value, "__notes__")


def failed_note(**given: Any) -> list[str]:
    error = OSError(errno.EFAULT, "Bad address")
    options = {"user_mode_only": False, "failed": None, "fetch": "f()", "save": "s()", **given}
    explain(error, "name", **options)
    explain(error, "name", **options)  # nested, or raised on
    return getattr(error, "__notes__", [])


def test_whose_it_can_not_be() -> None:
    assert failed_note() == []
    explain(None, "name", user_mode_only=True, failed=None, fetch="", save="")
    (note,) = failed_note(failed="403 Forbidden")
    assert "(403 Forbidden)" in note
    assert "`f()` tries again" in note


def test_a_source_that_failed(tmp_path: Path) -> None:
    async def read(offset: int, length: int) -> bytes:
        raise ValueError("no such bytes")

    def notes() -> list[str]:
        try:
            with aiouffd.sync.open(broken, errors="soft", readahead=0) as buf:
                try:
                    buf.fetch(0, 1)
                except aiouffd.SourceError:
                    pass
                write(buf.view, tmp_path)
        except OSError as error:
            return error.__notes__
        return []

    broken = FunctionSource(read, size=SIZE, portable=True)
    (note,) = notes()
    assert "no such bytes" in note


def test_whom_a_hint_tells_to_fetch_again() -> None:
    async def read(offset: int, length: int) -> bytes:
        raise ValueError("no such bytes")

    def said() -> str:
        with aiouffd.sync.open(read, size=SIZE, errors="soft", readahead=0) as buf:
            try:
                return str(buf[0])
            except aiouffd.SourceError as error:
                return str(error)

    assert said().endswith("(`buf.fetch()` tries again)")
