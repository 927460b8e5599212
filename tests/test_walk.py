"""The tool that counts the steps of a fault, `benchmarks.walk`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.sources import FunctionSource
from benchmarks.walk import Walk


def test_moves_and_returns_are_told_apart() -> None:
    walk = Walk(Path("/package"))
    walk.steps = [("a", "f"), ("a", "g"), ("b", "f"), ("", "Lib.x"), ("b", "g"), ("a", "f")]
    walk.native = ["Lib.x"]
    assert walk.files == ["a", "b", "a"]
    assert walk.row() == "5 | 1 | 2 | 3 | 1"


async def test_a_fault_is_followed_through_the_package() -> None:
    async def read(_offset: int, length: int) -> bytes:
        return bytes(length)

    async with aiouffd.open(FunctionSource(read, 4 * PAGE_SIZE), readahead=0) as buffer:
        view = buffer.view
        walk = Walk(Path(aiouffd.__file__).parent)
        with walk.noted():
            await asyncio.to_thread(lambda: view[0])
        view.release()
    assert "Lib.au_engine_drain" in walk.native
    assert walk.files[0] == "regions/pager.py"
    assert "fetch/flights.py" in walk.files
    # What threads do is none of the loop's steps.
    assert walk.calls < 200
