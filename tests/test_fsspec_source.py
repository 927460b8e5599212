"""fsspec's file systems as sources: its own local, memory and HTTP ones, and chains of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import (
    ClosedError,
    RangeNotSupportedError,
    ShortReadError,
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
    UnsupportedError,
    UsageError,
)
from aiouffd.sources import SourcePermissionError, as_source
from tests.scenarios import torture
from tests.servers.http import Entry, Fault, RangeServer
from tests.support import content, result_of

pytest.importorskip("fsspec")

import fsspec

from aiouffd.sources.fsspec import FsspecSource

SIZE = 1_000_000
DATA = content(SIZE)


@pytest.fixture
async def server() -> AsyncIterator[RangeServer]:
    async with RangeServer({"/a": Entry(memoryview(DATA))}) as server:
        yield server


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[FsspecSource]:
    source = FsspecSource.from_url(f"fsspec+{url}", **options)
    await source.open()
    try:
        yield source
    finally:
        await source.aclose()


async def check_reads(source: FsspecSource) -> None:
    assert source.size == SIZE
    assert source.version
    for offset, length in ((0, 1), (SIZE - 1, 1), (4095, 70_000), (0, SIZE), (7, 0)):
        assert bytes(await source.read(offset, length)) == DATA[offset : offset + length]
    with pytest.raises(UsageError):
        await source.read(SIZE, 1)
    clone = source.clone()
    await clone.open()
    assert bytes(await clone.read(9, 9)) == DATA[9:18]
    await clone.aclose()


async def test_local(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(DATA)
    async with opened(f"file://{path}") as source:
        await check_reads(source)
        os.utime(path, (5, 5))
        with pytest.raises(SourceChangedError):
            await source.read(0, 10)
        with pytest.raises(SourceChangedError):
            await source.clone().open()


async def test_memory() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/a", DATA)
    async with opened("memory://a") as source:
        await check_reads(source)
        fs.pipe_file("/a", DATA[::-1])
        with pytest.raises(SourceChangedError):
            await source.read(0, 10)
    fs.rm("/a")


async def test_http(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        await check_reads(source)
        server.objects["/a"] = Entry(memoryview(DATA[::-1]), '"v2"')
        with pytest.raises(SourceChangedError):
            await source.read(0, 10)


async def test_an_existing_file_system(server: RangeServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    local = FsspecSource(fsspec.filesystem("file"), str(tmp_path / "a"))
    http = FsspecSource(fsspec.filesystem("http"), server.url("/a"))
    for source in (local, http):
        await source.open()
        await check_reads(source)
        await source.aclose()


async def test_a_chain(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as file:
        file.writestr("inner/a", DATA)
    async with opened(f"zip://inner/a::file://{tmp_path}/z.zip") as source:
        assert bytes(await source.read(100, 100)) == DATA[100:200]


async def test_a_buffer(server: RangeServer) -> None:
    async with aiouffd.open(f"fsspec+{server.url('/a')}", recheck=60) as buf:
        assert await asyncio.to_thread(bytes, buf.view) == DATA


async def test_neighbours_are_one_request_and_one_check(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        before = server.counts.requests
        await asyncio.gather(*(source.read(at * 4096, 4096) for at in range(20)))
        # One read, and the look at the version.
        assert server.counts.requests - before == 2
        await asyncio.gather(*(source.read(at * 40_960, 4096) for at in range(20)))
        assert server.counts.requests - before <= 2 + 2 * 20
    async with opened(server.url("/a"), recheck=60) as source:
        await source.read(0, 1)
        before = server.counts.requests
        for at in range(5):
            await source.read(at * 4096, 4096)
        assert server.counts.requests - before == 5


@pytest.mark.parametrize(
    ("fault", "error", "transient"),
    [
        (Fault(status=503), SourceError, True),
        (Fault(status=500), SourceError, True),
        (Fault(status=403), SourcePermissionError, False),
        (Fault(status=404), SourceError, False),
        (Fault(status=501), SourceError, False),
        (Fault(no_reply=True), SourceError, True),
        (Fault(cut_after=5), SourceError, True),
        (Fault(short_by=1), ShortReadError, True),
        (Fault(ignore_range=True), RangeNotSupportedError, False),
    ],
    ids=["503", "500", "403", "404", "501", "no-reply", "cut", "short", "no-ranges"],
)
async def test_failures(
    server: RangeServer, fault: Fault, error: type[SourceError], transient: bool
) -> None:
    async with opened(server.url("/a")) as source:
        # aiohttp repeats a GET on its own when the connection was an old one.
        server.fault = lambda request: fault
        with pytest.raises(SourceError) as caught:
            await source.read(10, 1000)
        assert isinstance(caught.value, error), caught.value
        assert caught.value.transient == transient
        server.fault = None
        assert bytes(await source.read(10, 1000)) == DATA[10:1010]


async def test_late(server: RangeServer) -> None:
    async with opened(server.url("/a"), timeout=0.1) as source:
        gate = asyncio.Event()
        server.faults.append(Fault(gate=gate))
        with pytest.raises(SourceTimeoutError):
            await source.read(0, 10)
        gate.set()


async def test_what_cannot_be_opened(server: RangeServer, tmp_path: Path) -> None:
    for url, error in (
        (f"file://{tmp_path}/missing", FileNotFoundError),
        (server.url("/missing"), FileNotFoundError),
        (f"file://{tmp_path}", IsADirectoryError),
    ):
        source = FsspecSource.from_url(f"fsspec+{url}")
        with pytest.raises(error):
            await source.open()
    server.objects["/a"] = Entry(memoryview(DATA))
    server.fault = lambda request: Fault(headers={"Content-Length": None}, chunked=1000)
    source = FsspecSource.from_url(f"fsspec+{server.url('/a')}")
    with pytest.raises((UsageError, SourceError)):
        await source.open()


def test_wrong_use() -> None:
    for url in ("fsspec+nonsense://x", "fsspec+file://x"):
        with pytest.raises((UsageError, UnsupportedError)):
            as_source(url, no_such_option=1, max_threads=0)
    source = as_source("fsspec+http://user:secret@host/a?signature=secret")
    assert "secret" not in repr(source)


async def test_closed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    async with opened(f"file://{tmp_path}/a") as source:
        pass
    with pytest.raises(ClosedError):
        await source.read(0, 1)
    with pytest.raises(ClosedError):
        await source.open()


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    arguments = (loop_name, "fsspec", "anonymous", errors, 200, 9)
    found = result_of(torture.torture, *arguments, limit=60.0)
    assert found["retries"] > 0
