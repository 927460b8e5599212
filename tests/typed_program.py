"""A program of a user, for type checkers alone: what the public names give and take."""

from __future__ import annotations

import asyncio
from typing import assert_type

import aiouffd
import aiouffd.safetensors
import aiouffd.serve
from aiouffd import BufferFile, LazyBuffer, WorkingSet
from aiouffd.buffers.sync import SyncBuffer
from aiouffd.sources import BaseSource, FileSource, HttpSource


class Zeros(BaseSource):
    """A source of one's own."""

    @property
    def size(self) -> int:
        return 4096

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def clone(self) -> Zeros:
        return Zeros()


def plain() -> None:
    with aiouffd.sync.open("file", block_size="64K", errors="soft", deadline=3) as buf:
        assert_type(buf, SyncBuffer)
        assert_type(buf[0], int)
        assert_type(buf[0:3], bytes)
        assert_type(buf.read(0, 3), bytes)
        assert_type(buf.view, memoryview)
        assert_type(buf.find(b"x"), int)
        assert_type(buf.save("copy"), int)
        assert_type(buf.resident(), list[tuple[int, int]])
        assert_type(buf.stats.fetched_bytes, int)
        buf.fetch(0, 3, progress=lambda done, total: print(done / total))
    with aiouffd.open_file("file", readahead=0) as file:
        assert_type(file, BufferFile)
        assert_type(file.read(3), bytes)
    # What it does not take is an error for the checker too.
    aiouffd.sync.open("file", "rb")  # type: ignore[call-arg]
    aiouffd.sync.open("file", errors="strict")  # type: ignore[arg-type]
    aiouffd.open_file("file", block_size=1.5)  # type: ignore[arg-type]


async def lazy() -> None:
    with aiouffd.open("file"):  # type: ignore[attr-defined]
        pass
    async with aiouffd.open("http://host/name", headers={"X": "y"}, cache=True) as buf:
        assert_type(buf, LazyBuffer)
        assert_type(await buf.read(0, 3), bytes)
        assert_type(buf[0], int)
        with buf.record() as recording:
            pass
        assert_type(recording.working_set(), WorkingSet)
        async with buf.pin(0, 3) as view:
            assert_type(view, memoryview)
    assert_type(await aiouffd.open(Zeros()), LazyBuffer)
    aiouffd.open(FileSource("file"), strict=True)
    aiouffd.open(HttpSource("http://host/name"))
    async with aiouffd.Pager() as pager:
        region = pager.map("1 GiB", block_size="64K")

        @region.on_missing
        async def serve(fault: aiouffd.Fault) -> None:
            fault.copy(bytes(fault.length))

    async with aiouffd.serve.listen("socket", source="file", readahead="1M") as server:
        assert_type(server.stats.faults, int)
    with aiouffd.attach("socket") as memory:
        assert_type(memory.view, memoryview)
    try:
        aiouffd.probe()
    except aiouffd.AiouffdError as error:
        assert_type(error.hint, str | None)


asyncio.run(lazy())
