"""fsspec's file systems as sources: its own local, memory and HTTP ones, and chains of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import io
import os
import tarfile
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
from aiouffd.sources import FileSource, SourcePermissionError, as_source
from tests.cancelling import Cut, Way, cancel_everywhere
from tests.scenarios import torture
from tests.servers.http import MODIFIED, Entry, Fault, RangeServer
from tests.support import content, result_of

pytest.importorskip("fsspec")

import fsspec
from fsspec.asyn import AsyncFileSystem

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


async def test_the_rest_of_a_shorter_reply_is_asked_for(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        server.fault = lambda request: Fault(most=1000) if request.method == "GET" else None
        assert bytes(await source.read(5, 3500)) == DATA[5:3505]
        assert server.counts.ranges[-4:] == [(5, 3504), (1005, 3504), (2005, 3504), (3005, 3504)]
        server.fault = None


async def test_a_date_that_contradicts_the_etag_is_a_change(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        assert bytes(await source.read(5, 10)) == DATA[5:15]
        server.objects["/a"] = Entry(memoryview(DATA[::-1]), modified=MODIFIED + 1)
        with pytest.raises(SourceChangedError):
            await source.read(5, 10)


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


async def _archive(path: Path, kind: str, data: bytes) -> None:
    """An archive with one member, which is always equally old."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(zipfile.ZipInfo("a", (2020, 1, 1, 0, 0, 0)), data)
    else:
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("a")
            member.size, member.mtime = len(data), 1_600_000_000
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["zip", "tar"])
async def test_a_members_version_is_its_archives_too(tmp_path: Path, kind: str) -> None:
    """Opened again in one process, for which fsspec keeps the archive that it has open."""
    versions = []
    for number, data in enumerate((DATA, DATA[::-1])):
        path = tmp_path / "new"
        await _archive(path, kind, data)
        os.utime(path, (1.7e9, 1.7e9 + number))
        path.replace(tmp_path / "archive")
        for cache in (False, tmp_path / "cache"):
            url = f"fsspec+{kind}://a::file://{tmp_path}/archive"
            async with aiouffd.open(url, cache=cache) as buf:
                assert await buf.read(0, 1000) == data[:1000]
                versions.append(buf.source.version)
                assert not cache or buf.source.caching  # type: ignore[attr-defined]
    assert None not in versions
    assert len(set(versions)) == 2


@pytest.mark.parametrize("kind", ["zip", "tar"])
async def test_an_archive_that_is_replaced_is_a_change(tmp_path: Path, kind: str) -> None:
    await _archive(tmp_path / "archive", kind, DATA)
    os.utime(tmp_path / "archive", (1.7e9, 1.7e9))
    async with opened(f"{kind}://a::file://{tmp_path}/archive") as source:
        await check_reads(source)
        await _archive(tmp_path / "archive", kind, DATA[::-1])
        with pytest.raises(SourceChangedError):
            await source.read(0, 10)


async def test_an_archive_that_is_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is described as is not what was opened then."""
    from fsspec.implementations.zip import ZipFileSystem

    await _archive(tmp_path / "archive", "zip", DATA)
    make = ZipFileSystem.__init__

    def late(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        os.utime(tmp_path / "archive", (1, 1))

    source = FsspecSource.from_url(f"fsspec+zip://a::file://{tmp_path}/archive")
    with monkeypatch.context() as patch:
        patch.setattr(ZipFileSystem, "__init__", late)
        with pytest.raises(SourceError, match="while it was opened") as caught:
            await source.open()
        assert caught.value.transient
    await source.open()
    await source.aclose()


@pytest.mark.parametrize("first", ["simplecache", "filecache"])
async def test_a_chain_that_begins_without_a_path(tmp_path: Path, first: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(DATA)
    url = f"fsspec+{first}::file://{path}"
    for cache in (False, tmp_path / "cache"):
        async with aiouffd.open(url, cache=cache, cache_storage=str(tmp_path / first)) as buf:
            assert await buf.read(5, 1000) == DATA[5:1005]
            # Its copy may be older than what it says of the file.
            assert not cache or not buf.source.caching  # type: ignore[attr-defined]
    path.write_bytes(DATA[::-1])
    async with aiouffd.open(url) as buf:
        assert await buf.read(5, 1000) == DATA[::-1][5:1005]
    assert "a::b" not in repr(as_source(url))


def test_files_with_colons_are_files() -> None:
    for name in ("a::b", "simplecache::a", "zip::file://a"):
        assert isinstance(as_source(name), FileSource)
    with pytest.raises(UsageError, match="nonsense"):
        as_source("fsspec+nonsense::file:///a")


def test_keys_hold_the_options_of_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(url: str, **options: Any) -> str | None:
        return FsspecSource.from_url(f"fsspec+{url}", **options).cache_key

    http = "http://h/a"
    keys = [
        key(http),
        key(http, client_kwargs={"headers": {"X-Tenant": "a"}}),
        key(http, client_kwargs={"headers": {"X-Tenant": "b"}}),
        key("zip://a", fo="one.zip"),
        key("zip://a", fo="two.zip"),
        key("zip://a::http://h/z", http={"headers": {"X": "1"}}),
        key("zip://a::http://h/z", http={"headers": {"X": "2"}}),
        key("ftp://h/a", username="one"),
        key("ftp://h/a", username="two"),
    ]
    assert len({*keys, None}) == len(keys) + 1
    assert keys[0] == http
    assert key("ftp://h/a", username="one", password="x", timeout=5) == keys[-2]
    assert key(http, client_kwargs={"session": object()}) is None
    monkeypatch.setitem(fsspec.config.conf, "ftp", {"host": "other"})
    assert key("ftp://h/a", username="one") != keys[-2]

    monkeypatch.chdir(tmp_path)
    assert key("zip://a", fo="one.zip") != keys[3], "elsewhere it is another file"
    assert key("file://a") == f"file://{tmp_path}/a"
    with pytest.raises(UsageError, match="key="):
        aiouffd.open("fsspec+http://h/a", client_kwargs={"session": object()}, cache=tmp_path)


class Raising(fsspec.AbstractFileSystem):
    """Raises on order."""

    protocol = "raising"
    error: ClassVar[BaseException | None] = None

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": SIZE, "mtime": 5.5}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if start == 0 and self.error is not None:
            raise self.error
        return DATA[start:end]


class RaisingLater(AsyncFileSystem):
    """The same on the loop."""

    protocol = "raisinglater"
    error: ClassVar[BaseException | None] = None
    async_impl = True

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": SIZE, "mtime": 5.5}

    async def _cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        if start == 0 and self.error is not None:
            raise self.error
        return DATA[start:end]


@pytest.mark.parametrize("kind", [Raising, RaisingLater])
@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
        StopIteration(),
        StopAsyncIteration(),
        BaseException("odd"),
        ZeroDivisionError(),
    ],
    ids=repr,
)
async def test_a_file_system_may_raise_anything(
    kind: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FsspecSource(kind(skip_instance_cache=True), "a", coalesce=None)
    await source.open()
    monkeypatch.setattr(kind, "error", error)
    reads = [source.read(0, 10), source.read(10, 10), source.read(0, 20)]
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(found[0], SourceError)
    assert isinstance(found[2], SourceError)
    assert not found[0].transient
    assert found[1] == DATA[10:20]
    await source.aclose()


@pytest.mark.parametrize("kind", [Raising, RaisingLater])
async def test_a_file_system_may_raise_anything_when_it_is_opened(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FsspecSource(kind(skip_instance_cache=True), "a")
    errors = [asyncio.CancelledError(), StopIteration(), BaseException("odd"), KeyError("x")]
    # On the loop's thread these end the program.
    errors += [SystemExit(1), KeyboardInterrupt()] if kind is Raising else []
    for error in errors:
        with monkeypatch.context() as patch:

            def info(*_: Any, error: BaseException = error, **__: Any) -> Any:
                raise error

            patch.setattr(kind, "info" if kind is Raising else "_info", info)
            with pytest.raises(SourceError):
                await source.open()
    await source.open()
    assert await source.read(10, 10) == DATA[10:20]
    await source.aclose()


# ------------------------------------------------------- once, and cut off anywhere


@pytest.fixture(params=["file", "http", "zip"])
async def anywhere(request: Any, server: RangeServer, tmp_path: Path) -> str:
    """A URL of each kind: in threads, on the loop, in an archive."""
    if request.param == "http":
        return server.url("/a")
    if request.param == "zip":
        await _archive(tmp_path / "a", "zip", DATA)
        return f"zip://a::file://{tmp_path}/a"
    (tmp_path / "a").write_bytes(DATA)
    return f"file://{tmp_path}/a"


async def test_opening_may_be_cut_off_anywhere(anywhere: str) -> None:
    async def run(cut: Cut) -> None:
        source = FsspecSource.from_url(f"fsspec+{anywhere}")
        await cut(source.open())
        await source.open()
        assert bytes(await source.read(9, 9)) == DATA[9:18]
        await source.aclose()

    await cancel_everywhere(run)


async def test_closing_may_be_cut_off_anywhere(anywhere: str) -> None:
    async def run(cut: Cut) -> None:
        source = FsspecSource.from_url(f"fsspec+{anywhere}")
        await source.open()
        read = asyncio.ensure_future(source.read(9, 9))
        await asyncio.sleep(0)
        await cut(source.aclose())
        await source.aclose()
        await asyncio.wait((read,))
        with pytest.raises(ClosedError):
            read.result() and source._life.check()

    await cancel_everywhere(run)


@pytest.mark.parametrize("coalesce", [0, None])
async def test_reading_may_be_cut_off_anywhere(anywhere: str, coalesce: int | None) -> None:
    async def run(cut: Cut) -> None:
        async with opened(anywhere, coalesce=coalesce) as source:
            together = asyncio.ensure_future(source.read(18, 9))
            await cut(source.read(9, 9))
            assert bytes(await together) == DATA[18:27]
            assert bytes(await source.read(0, 9)) == DATA[:9]

    await cancel_everywhere(run)


async def test_the_end_of_a_loop_may_come_anywhere(anywhere: str) -> None:
    async def run(cut: Cut) -> None:
        source = FsspecSource.from_url(f"fsspec+{anywhere}")

        async def whole() -> None:
            try:
                await source.open()
                await source.read(9, 9)
            finally:
                await source.aclose()

        await cut.quiet(whole())
        await source.aclose()

    await cancel_everywhere(run, ways=[Way.TASK, Way.ALL])


async def test_opened_and_closed_by_many_at_a_time(anywhere: str) -> None:
    source = FsspecSource.from_url(f"fsspec+{anywhere}")
    await asyncio.gather(*(source.open() for _ in range(5)))
    assert bytes(await source.read(9, 9)) == DATA[9:18]
    await asyncio.gather(*(source.aclose() for _ in range(5)))

    source = FsspecSource.from_url(f"fsspec+{anywhere}")
    opening = asyncio.ensure_future(source.open())
    await asyncio.sleep(0)
    await source.aclose()
    with pytest.raises(ClosedError):
        await opening
    with pytest.raises(ClosedError):
        await source.open()


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    arguments = (loop_name, "fsspec", "anonymous", errors, 200, 9)
    found = result_of(torture.torture, *arguments, limit=60.0)
    assert found["retries"] > 0
