"""fsspec's file systems as sources: its own local, memory and HTTP ones, and chains of them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import threading
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

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


class Connecting(fsspec.AbstractFileSystem):
    """Connects when it is made, as those of FTP, SFTP and SMB do, and counts who uses it."""

    protocol = "connecting"
    makers: ClassVar[list[str]] = []
    inside: ClassVar[list[int]] = [0, 0]

    def __init__(self, *args: Any, fail: Exception | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.makers.append(threading.current_thread().name)
        if fail is not None:
            raise fail

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": SIZE}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self.inside[0] += 1
        self.inside[1] = max(self.inside)
        time.sleep(0.001)  # lets the other threads come in, if they can
        self.inside[0] -= 1
        return DATA[start:end]


async def test_used_by_one_thread_at_a_time() -> None:
    Connecting.inside[:] = [0, 0]
    fs = Connecting(skip_instance_cache=True)
    source = FsspecSource(fs, "a", coalesce=None)
    sources = [source, source.clone(), FsspecSource(fs, "a", coalesce=None)]
    for each in sources:
        await each.open()
    places = [at * 999 for at in range(20)]
    found = await asyncio.gather(*(each.read(at, 99) for at in places for each in sources))
    assert found == [DATA[at : at + 99] for at in places for _ in sources]
    assert Connecting.inside == [0, 1]
    for each in sources:
        await each.aclose()


async def test_made_in_a_thread() -> None:
    fsspec.register_implementation("connecting", Connecting, clobber=True)
    Connecting.makers.clear()
    options: dict[str, Any] = {"skip_instance_cache": True, "coalesce": None}
    source = FsspecSource.from_url("fsspec+connecting://a", **options)
    assert not Connecting.makers
    await source.open()
    (maker,) = Connecting.makers
    assert maker.startswith("aiouffd-fsspec")
    await source.aclose()
    for failure, error in ((ConnectionRefusedError(), SourceError), (ValueError(), UsageError)):
        broken = FsspecSource.from_url("fsspec+connecting://a", fail=failure, **options)
        with pytest.raises(error):
            await broken.open()
    async with aiouffd.open("fsspec+connecting://a", max_threads=4, **options) as buf:
        assert await asyncio.to_thread(bytes, buf.view) == DATA


async def test_a_chain_over_our_own_loop(server: RangeServer) -> None:
    """The file system of an archive reads it when it is made; here the loop serves it."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", DATA)
    server.objects["/z.zip"] = Entry(memoryview(archive.getvalue()))
    async with aiouffd.open(f"fsspec+zip://a::{server.url('/z.zip')}") as buf:
        assert await buf.read(5, 10) == DATA[5:15]


async def test_cache_keys(server: RangeServer, tmp_path: Path) -> None:
    def key(url: str) -> str | None:
        return FsspecSource.from_url(f"fsspec+{url}").cache_key

    assert key("http://user:secret@h/a?id=1") == "http://user@h/a?id=1"
    assert key("http://h/a?id=1") != key("http://h/a?id=2")
    assert key("zip://x@a::file:///z.zip") != key("zip://y@a::file:///z.zip")
    assert key("http://[::1]:80/a") == "http://[::1]:80/a"
    http = FsspecSource(fsspec.filesystem("http"), "http://u:secret@h/a?secret")
    assert "secret" not in repr(http)
    assert http.cache_key == "http://u@h/a?secret"
    assert FsspecSource(fsspec.filesystem("file"), "/a").cache_key is None

    # Two objects, told apart by nothing but a query.
    for name, data in (("1", DATA), ("2", DATA[::-1])):
        server.objects[f"/a?id={name}"] = Entry(memoryview(data))
    for _ in range(2):
        for name, data in (("1", DATA), ("2", DATA[::-1])):
            url = f"fsspec+{server.url('/a')}?id={name}"
            async with aiouffd.open(url, cache=tmp_path) as buf:
                assert await buf.read(0, 1000) == data[:1000]


async def test_weak_versions(server: RangeServer, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(DATA)
    now = int(time.time())
    for modified, weak in ((now, True), (now - 3600, False), (now - 0.5, False)):
        os.utime(path, (now, modified))
        async with opened(f"file://{path}") as source:
            assert source.weak == weak
        async with opened(f"file://{path}", recheck=1) as source:
            assert source.weak
    for etag, weak in (('W/"1"', True), ('"1"', False)):
        server.objects["/a"] = Entry(memoryview(DATA), etag)
        async with opened(server.url("/a")) as source:
            assert source.weak == weak


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


async def test_a_look_that_fails_is_no_absence(server: RangeServer) -> None:
    """To fsspec everything that goes wrong there is FileNotFoundError."""

    def fault(request: Any) -> Fault | None:
        return None if request.range else Fault(status=503)

    async with opened(server.url("/a")) as source:
        server.fault = fault
        for call in (source.read(0, 10), FsspecSource.from_url(f"fsspec+{source.url}").open()):
            with pytest.raises(SourceError) as caught:
                await call
            assert caught.value.transient
    source = FsspecSource.from_url("fsspec+http://127.0.0.1:1/a")
    with pytest.raises(SourceError) as caught:
        await source.open()
    assert caught.value.transient


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


@pytest.mark.parametrize("coalesce", [0, None])
async def test_closed_during_reads(server: RangeServer, coalesce: int | None) -> None:
    """In the transfer, and in the look at the version after it."""
    for where in ("transfer", "look"):
        gate = asyncio.Event()
        async with opened(server.url("/a"), coalesce=coalesce) as source:

            def fault(request: Any, where: str = where, gate: asyncio.Event = gate) -> Fault | None:
                return Fault(gate=gate) if (where == "transfer") == bool(request.range) else None

            server.fault = fault
            before = server.counts.requests
            reads = [asyncio.ensure_future(source.read(at, 10)) for at in (0, 10, 500_000)]
            wanted = before + (1 if where == "look" else 0) + 2
            await server.wait_for(lambda counts, wanted=wanted: counts.requests >= wanted)
            reads[2].cancel()
            await asyncio.sleep(0)
            await source.aclose()
            found = await asyncio.gather(*reads, return_exceptions=True)
            kinds = [type(error) for error in found]
            assert kinds == [ClosedError, ClosedError, asyncio.CancelledError]
        gate.set()
        server.fault = None


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    arguments = (loop_name, "fsspec", "anonymous", errors, 200, 9)
    found = result_of(torture.torture, *arguments, limit=60.0)
    assert found["retries"] > 0
