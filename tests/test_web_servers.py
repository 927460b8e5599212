"""HTTP sources against the servers that people have."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import RangeNotSupportedError, SourceChangedError, UnversionedSourceWarning
from aiouffd.sources import HttpSource, as_source
from tests.servers.http import pattern
from tests.servers.web import HEAD, KINDS, ROOT, Kind, Web, row, web_server

#: With a last block of a single byte.
SIZE = 4 * 65536 + 1
DATA = pattern(SIZE)
SCHEMES = ["", "obstore+"]
NUMBERS = itertools.count()
#: Seconds for which lighttpd believes what it once found out about a file.
STALE = 5.0


def named(kind: Kind) -> str:
    return kind.name


#: For tests of what not all of them do.
RANGED = pytest.mark.parametrize("kind", [k for k in KINDS if k.ranges], indirect=True, ids=named)
FILES = pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.ranges and k.stamped], indirect=True, ids=named
)
UNVERSIONED = pytest.mark.parametrize(
    "kind", [k for k in KINDS if not k.etag and not k.date], indirect=True, ids=named
)
# On one Python: what is tested is how others behave, and it takes a minute.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS, ids=named)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(scope="module")
def web(kind: Kind) -> Iterator[Web]:
    with web_server(kind) as server:
        yield server


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Any]:
    source: Any = as_source(url, **{"unversioned": "accept", **options})
    await source.open()
    try:
        yield source
    finally:
        await source.aclose()


def scheme_of(scheme: str) -> str:
    if scheme:
        pytest.importorskip("obstore")
    return scheme


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_every_byte_is_right(kind: Kind, web: Web, scheme: str) -> None:
    web.put("data.bin", DATA)
    url = scheme_of(scheme) + web.url("data.bin")
    if not kind.ranges:
        with pytest.raises(RangeNotSupportedError, match="whole object"):
            await as_source(url).open()  # type: ignore[attr-defined]
        return
    async with opened(url) as source:
        assert source.size == SIZE
        for offset, length in ((0, 1), (0, SIZE), (5, 70_000), (SIZE - 1, 1), (77, 1), (9, 0)):
            found = await source.read(offset, length)
            assert bytes(found) == DATA[offset : offset + length]
            memory = bytearray(length)
            await source.read_into(offset, memoryview(memory))
            assert memory == DATA[offset : offset + length]
    async with aiouffd.open(url, unversioned="accept") as buf:
        assert await asyncio.to_thread(lambda: buf.view[SIZE - 1]) == DATA[-1]
        assert await buf.read() == DATA


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_small_and_empty_files(web: Web, scheme: str) -> None:
    for size in (0, 1, 2, 5000):
        web.put(f"{size}.bin", DATA[:size])
        async with opened(scheme_of(scheme) + web.url(f"{size}.bin")) as source:
            assert source.size == size
            assert bytes(await source.read(0, size)) == DATA[:size]
    with pytest.raises(FileNotFoundError):
        await as_source(scheme + web.url("nothing.bin")).open()  # type: ignore[attr-defined]


@FILES
async def test_a_sparse_file(web: Web) -> None:
    """HTTP tells of no holes, so they come as zeros."""
    web.put("sparse.bin", b"")
    os.truncate(web.folder / "sparse.bin", 1 << 30)
    descriptor = os.open(web.folder / "sparse.bin", os.O_WRONLY)
    os.pwrite(descriptor, b"here", 1 << 29)
    os.close(descriptor)
    os.utime(web.folder / "sparse.bin", (1e9, 1e9))
    async with opened(web.url("sparse.bin")) as source:
        assert source.size == 1 << 30
        assert bytes(await source.read((1 << 29) - 4, 12)) == b"\0\0\0\0here\0\0\0\0"


@RANGED
async def test_connections_are_kept(kind: Kind, web: Web) -> None:
    connections = 0
    tasks: list[asyncio.Task[Any]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        theirs, ours = await asyncio.open_connection("127.0.0.1", web.port)
        await asyncio.gather(pump(reader, ours), pump(theirs, writer))

    web.put("data.bin", DATA)
    async with await asyncio.start_server(forward, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with opened(web.url("data.bin").replace(f":{web.port}/", f":{port}/")) as source:
            for at in range(8):
                assert await source.read(at * 9, 5000) == DATA[at * 9 :][:5000]
        assert connections == 1 or not kind.keep_alive
        await asyncio.gather(*tasks)


def test_validators_and_conditions(kind: Kind, web: Web) -> None:
    """What the table in docs/sources.md says of the server; being better is no failure."""
    web.put("data.bin", DATA)
    status, headers = web.ask("data.bin", Range="bytes=0-1")
    assert status == (206 if kind.ranges else 200)
    etag = headers.get("etag")
    found = etag and ("weak" if etag.startswith("W/") else "strong")
    assert found == kind.etag
    assert ("last-modified" in headers) == kind.date
    web.put("empty.bin", b"")
    assert web.ask("empty.bin", Range="bytes=0-1")[0] == kind.empty
    if kind.conditions:
        assert web.ask("data.bin", Range="bytes=0-1", If_Match='"other"')[0] == 412


def test_the_documentation_tells_the_same() -> None:
    document = (ROOT / "docs" / "sources.md").read_text()
    assert HEAD in document
    rows = dict(re.findall(r"^(\| [^|]+ \|) ([^|]+) \|", document, re.MULTILINE))
    for kind in KINDS:
        assert row(kind, rows[f"| {kind.name} |"]) in document.splitlines()


async def outcome(source: Any, old: bytes, new: bytes) -> str:
    """Whether a read of ``old``, which has been replaced, is "refused", "old" or "new"."""
    try:
        found = bytes(await source.read(100_000, 100))
    except SourceChangedError:
        return "refused"
    assert found in (old[100_000:100_100], new[100_000:100_100])
    return "old" if found == old[100_000:100_100] else "new"


@RANGED
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("how", ["size", "date", "second"])
async def test_a_replaced_file(kind: Kind, web: Web, scheme: str, how: str) -> None:
    """Bytes of two versions are mixed only where the server tells nothing of it."""
    other = DATA[::-1] + (b"x" if how == "size" else b"")
    # Of another name each time: some servers remember for a moment what they found.
    name = f"{next(NUMBERS)}.bin"
    web.put(name, DATA)
    async with opened(scheme_of(scheme) + web.url(name)) as source:
        assert bytes(await source.read(0, 100)) == DATA[:100]
        then = (web.folder / name).stat().st_mtime if kind.stamped else 0
        web.put(name, other, age=3600)
        if how == "second" and kind.stamped:
            # What tells is less than the second that dates are told in.
            later = int(then) + 0.9 if then % 1 < 0.5 else int(then) + 0.1
            os.utime(web.folder / name, (later, later))
        found = await outcome(source, DATA, other)
        limit = time.monotonic() + STALE
        while found == "old" and time.monotonic() < limit:
            # The server does not look at the file each time.
            await asyncio.sleep(0.05)
            found = await outcome(source, DATA, other)
    tells = {"size": True, "date": kind.date, "second": kind.same_second}[how]
    assert found == "refused" or not tells
    assert found != "old"


@UNVERSIONED
async def test_an_object_without_version_is_told_of(web: Web) -> None:
    web.put("data.bin", DATA)
    source = HttpSource(web.url("data.bin"))
    with pytest.warns(UnversionedSourceWarning):
        await source.open()
    assert source.weak
    await source.aclose()
