"""The HTTP source against a real server that can be told to misbehave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from aiouffd import errors
from aiouffd.sources import HttpSource, SourcePermissionError
from aiouffd.sources._http_reply import Validator, parse_content_range, retry_after
from tests.servers.http import (
    MODIFIED,
    Entry,
    Fault,
    RangeServer,
    Request,
    pattern,
    start_in_process,
)

SIZE = 3_000_001
DATA = pattern(SIZE)
READERS = ["read", "read_into", "stream"]


@pytest.fixture
async def server() -> AsyncIterator[RangeServer]:
    async with RangeServer({"/a": DATA, "/empty": b""}) as server:
        yield server


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[HttpSource]:
    source = HttpSource(url, **options)
    await source.open()
    try:
        yield source
    finally:
        await source.aclose()


async def get(source: HttpSource, offset: int, length: int, how: str = "read") -> bytes:
    """Read in one of the three ways; check that nothing outside the range was written."""
    if how == "read":
        return bytes(await source.read(offset, length))
    if how == "stream":
        return b"".join([bytes(chunk) async for chunk in source.stream(offset, length)])
    memory = bytearray(b"\xaa" * (length + 32))
    try:
        await source.read_into(offset, memoryview(memory)[16 : 16 + length])
    finally:
        assert memory[:16] == memory[16 + length :] == b"\xaa" * 16
    return bytes(memory[16 : 16 + length])


# What works.


@pytest.mark.parametrize("how", READERS)
async def test_ranges(server: RangeServer, how: str) -> None:
    async with opened(server.url("/a")) as source:
        assert source.size == SIZE
        assert source.version == f'"v1" {formatdate(MODIFIED, usegmt=True)}'
        assert server.counts.requests == 1
        for offset, length in ((0, 1), (5, 65536), (SIZE - 1, 1), (0, SIZE), (7, 0), (SIZE, 0)):
            assert await get(source, offset, length, how) == DATA[offset : offset + length]
        assert server.counts.ranges == [
            (0, 1),
            (0, 1),
            (5, 65540),
            (SIZE - 2, SIZE - 1),
            (0, SIZE - 1),
        ]
        assert server.counts.connections == 1
        for request in server.requests[1:]:
            assert request.headers["if-match"] == '"v1"'
            assert request.headers["accept-encoding"] == "identity"
            assert "if-unmodified-since" not in request.headers


async def test_concurrent_reads_share_few_connections(server: RangeServer) -> None:
    async with opened(server.url("/a"), max_connections=3) as source:
        spans = [(i * 9973, 70_000) for i in range(60)]
        found = await asyncio.gather(*(source.read(*span) for span in spans))
        for (offset, length), data in zip(spans, found, strict=True):
            assert data == DATA[offset : offset + length]
    assert server.counts.connections <= 3


@pytest.mark.parametrize("how", READERS)
async def test_chunked_replies(server: RangeServer, how: str) -> None:
    async with opened(server.url("/a")) as source:
        server.fault = lambda request: Fault(chunked=1000)
        assert await get(source, 3, 100_000, how) == DATA[3:100_003]
        assert await get(source, 3, 100_000, how) == DATA[3:100_003]
    assert server.counts.connections == 1, "the end of the chunks was read"


async def test_stream_yields_before_the_end(server: RangeServer) -> None:
    gate = asyncio.Event()
    async with opened(server.url("/a")) as source:
        server.faults.append(Fault(body_gate=gate, body_gate_at=1000))
        seen = b""
        async with contextlib.aclosing(source.stream(0, 500_000)) as chunks:
            async for chunk in chunks:
                seen += chunk
                if len(seen) == 1000:
                    gate.set()
        assert seen == DATA[:500_000]


async def test_empty_object(server: RangeServer) -> None:
    async with opened(server.url("/empty")) as source:
        assert source.size == 0
        assert await source.read(0, 0) == b""
    server.fault = lambda request: Fault(ignore_range=True)
    async with opened(server.url("/empty")) as source:
        assert source.size == 0


async def test_size_from_head(server: RangeServer) -> None:
    server.faults.append(Fault(headers={"Content-Range": "bytes 0-1/*"}))
    async with opened(server.url("/a")) as source:
        assert source.size == SIZE
        assert [request.method for request in server.requests] == ["GET", "HEAD"]


async def test_size_from_a_whole_reply_where_head_is_refused(server: RangeServer) -> None:
    server.faults.extend([Fault(headers={"Content-Range": "bytes 0-1/*"}), Fault(status=403)])
    async with opened(server.url("/a")) as source:
        assert source.size == SIZE
        assert [request.method for request in server.requests] == ["GET", "HEAD", "GET"]
        assert await source.read(SIZE - 9, 9) == DATA[-9:]


async def test_size_of_another_version_is_not_taken(server: RangeServer) -> None:
    server.faults.extend(
        [Fault(headers={"Content-Range": "bytes 0-1/*"}), Fault(headers={"ETag": '"v2"'})]
    )
    with pytest.raises(errors.SourceChangedError):
        await HttpSource(server.url("/a")).open()


async def test_headers_and_auth(server: RangeServer) -> None:
    url = server.url("/a")
    async with opened(url, headers={"X-Key": "k"}, auth=("me", "pa:ss")) as source:
        await source.read(0, 1)
        clone = source.clone()
    await clone.open()
    await clone.read(0, 1)
    await clone.aclose()
    async with opened(url.replace("//", "//me:pa%3Ass@")) as source:
        assert "pa" not in repr(source)
    for request in server.requests:
        token = base64.b64decode(request.headers["authorization"].removeprefix("Basic "))
        assert token == b"me:pa:ss"
    assert [r.headers.get("x-key") for r in server.requests] == ["k", "k", "k", None]


async def test_the_query_is_sent_as_it_was_given(server: RangeServer) -> None:
    query = "?sig=a%2Fb%2b+c~%7E&x=%41"
    async with opened(server.url("/a" + query) + "#part") as source:
        assert server.requests[0].path == "/a" + query
        server.faults.append(Fault(status=418))
        with pytest.raises(errors.SourceError) as info:
            await source.read(0, 1)
        assert "sig" not in str(info.value) + repr(source)


async def test_a_clone_makes_no_request_to_open(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        clone = source.clone()
    assert clone.size == SIZE
    await clone.open()
    assert server.counts.requests == 1
    assert await clone.read(0, 10) == DATA[:10]
    await clone.aclose()


async def test_a_clone_of_an_unopened_source_is_not_pinned(server: RangeServer) -> None:
    clone = HttpSource(server.url("/a")).clone()
    await clone.open()
    assert clone.size == SIZE
    await clone.aclose()


def test_a_clone_on_another_loop() -> None:
    with start_in_process({"/p": 1 << 20}) as server:
        source = HttpSource(server.url("/p"))
        found: list[bytes] = []

        async def original() -> None:
            await source.open()
            found.append(bytes(await source.read(8, 100)))
            thread = threading.Thread(target=asyncio.run, args=(copy(),))
            thread.start()
            await asyncio.to_thread(thread.join)
            await source.aclose()

        async def copy() -> None:
            with pytest.raises(errors.UsageError, match="another event loop"):
                await source.read(0, 1)
            clone = source.clone()
            await clone.open()
            found.append(bytes(await clone.read(8, 100)))
            await clone.aclose()

        asyncio.run(original())
        assert found[0] == found[1] == pattern(108)[8:]
        assert server.counts().requests == 3


# Versions.


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("cloned", [False, True])
async def test_changed_object(server: RangeServer, how: str, cloned: bool) -> None:
    async with opened(server.url("/a")) as original:
        source = original.clone() if cloned else original
        await source.open()
        server.objects["/a"] = Entry(memoryview(DATA[::-1]), '"v2"')
        with pytest.raises(errors.SourceChangedError, match="v2") as info:
            await get(source, 0, 100_000, how)
        assert not info.value.transient
        # Refused, and asked for once more to see why.
        matches = [request.headers.get("if-match") for request in server.requests[-2:]]
        assert matches == ['"v1"', None]
        await source.aclose()


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"v2"'},
        {"ETag": 'W/"v1"'},
        {"ETag": None},
        {"Last-Modified": formatdate(MODIFIED + 1, usegmt=True)},
        {"Last-Modified": formatdate(MODIFIED - 1, usegmt=True)},
        {"Content-Range": f"bytes 0-99/{SIZE + 1}"},
    ],
)
async def test_server_without_if_match(server: RangeServer, headers: dict[str, Any]) -> None:
    async with opened(server.url("/a")) as source:
        server.faults.append(Fault(headers=headers))
        with pytest.raises(errors.SourceChangedError):
            await source.read(0, 100)


async def test_a_date_that_contradicts_a_strong_etag_is_a_change(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        server.objects["/a"].modified = None  # says nothing against it
        assert await source.read(0, 100) == DATA[:100]
        server.objects["/a"].modified = MODIFIED + 100
        with pytest.raises(errors.SourceChangedError, match="though its ETag stayed") as info:
            await source.read(0, 100)
        assert "ignore_dates" in str(info.value)


async def test_a_date_written_otherwise_is_the_same_date(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        asctime = time.strftime("%a %b %d %H:%M:%S %Y", time.gmtime(MODIFIED))
        server.faults.append(Fault(headers={"Last-Modified": asctime}))
        assert await source.read(0, 100) == DATA[:100]


async def test_dates_can_be_ignored_beside_a_strong_etag_only(server: RangeServer) -> None:
    async with opened(server.url("/a"), ignore_dates=True) as source:
        clone = source.clone()
        await clone.open()
        server.objects["/a"].modified = MODIFIED + 100
        for one in (source, clone):
            assert await one.read(0, 100) == DATA[:100]
            assert one.version == '"v1"'
        await clone.aclose()
    server.objects["/a"].etag = 'W/"v1"'
    async with opened(server.url("/a"), ignore_dates=True) as source:
        server.objects["/a"].modified = MODIFIED + 200
        with pytest.raises(errors.SourceChangedError):
            await source.read(0, 100)


@pytest.mark.parametrize("etag", ['W/"w"', None])
async def test_weak_versions(server: RangeServer, etag: str | None) -> None:
    server.objects["/a"].etag = etag
    async with opened(server.url("/a")) as source:
        assert source.version is not None
        assert await source.read(0, 100) == DATA[:100]
        headers = server.requests[-1].headers
        assert headers["if-unmodified-since"] == formatdate(MODIFIED, usegmt=True)
        assert "if-match" not in headers
        server.faults.append(Fault(headers={"Last-Modified": formatdate(1e9, usegmt=True)}))
        with pytest.raises(errors.SourceChangedError):
            await source.read(0, 100)
        server.objects["/a"].modified = MODIFIED + 1
        with pytest.raises(errors.SourceChangedError, match="last modified"):
            await source.read(0, 100)
        assert "if-unmodified-since" in server.requests[-2].headers


async def test_weak_etag_is_compared(server: RangeServer) -> None:
    server.objects["/a"].etag = 'W/"w"'
    async with opened(server.url("/a")) as source:
        server.objects["/a"].etag = 'W/"x"'
        with pytest.raises(errors.SourceChangedError, match="ETag"):
            await source.read(0, 100)


async def test_no_version_at_all(server: RangeServer) -> None:
    server.objects["/a"] = Entry(memoryview(DATA), None, None)
    source = HttpSource(server.url("/a"))
    with pytest.warns(errors.UnversionedSourceWarning, match="neither an ETag nor"):
        await source.open()
    clone = source.clone()
    await clone.open()  # said already
    await clone.aclose()
    await source.aclose()
    with pytest.raises(errors.SourceError, match="no version") as info:
        await HttpSource(server.url("/a"), unversioned="refuse").open()
    assert not info.value.transient
    async with opened(server.url("/a"), unversioned="accept") as source:
        assert source.version is None
        assert source.weak
        assert await source.read(0, 100) == DATA[:100]
        server.objects["/a"] = Entry(memoryview(DATA[:-1]), None, None)
        with pytest.raises(errors.SourceChangedError, match="size"):
            await source.read(0, 100)


async def test_shrunk_object(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        server.objects["/a"] = Entry(memoryview(DATA[:1000]))
        with pytest.raises(errors.SourceChangedError, match=r"416.*1000 bytes"):
            await source.read(5000, 100)


async def test_a_range_that_is_refused_is_no_change(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        server.faults.append(Fault(status=416, headers={"Content-Range": f"bytes */{SIZE}"}))
        with pytest.raises(errors.SourceError, match="refused to send bytes 5-14") as info:
            await source.read(5, 10)
        assert not isinstance(info.value, errors.SourceChangedError)
        assert not info.value.transient


# If-Match that is answered with 412 whatever the ETag is.


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("etag", ['"v1"', 'W/"v1"', None])
async def test_a_condition_that_never_holds_is_given_up(
    server: RangeServer, how: str, etag: str | None
) -> None:
    def refusing(request: Request) -> Fault | None:
        conditions = {"if-match", "if-unmodified-since"} & set(request.headers)
        return Fault(status=412, headers={"ETag": '"other"'}) if conditions else None

    server.objects["/a"].etag = etag
    server.fault = refusing
    async with opened(server.url("/a")) as source:
        assert await get(source, 5, 100_000, how) == DATA[5:100_005]
        assert server.counts.requests == 3
        clone = source.clone()
        await clone.open()
        for one in (source, clone):
            assert await get(one, 9, 1000, how) == DATA[9:1009]
        assert server.counts.requests == 5, "it was not sent again"
        # The replies' own validators are compared.
        server.objects["/a"] = Entry(memoryview(DATA[::-1]), '"v2"', MODIFIED + 1)
        for one in (source, clone):
            with pytest.raises(errors.SourceChangedError):
                await get(one, 9, 1000, how)
        await clone.aclose()


async def test_a_change_behind_a_condition_that_never_holds_is_found_at_once(
    server: RangeServer,
) -> None:
    server.fault = lambda request: Fault(status=412) if "if-match" in request.headers else None
    async with opened(server.url("/a")) as source:
        for headers in ({"ETag": '"v2"'}, {"ETag": None}):
            server.faults.extend([Fault(status=412), Fault(headers=headers)])
            with pytest.raises(errors.SourceChangedError):
                await source.read(0, 100)
        server.faults.extend([Fault(status=412), Fault(status=503)])
        with pytest.raises(errors.SourceError, match="503") as info:
            await source.read(0, 100)
        assert info.value.transient


# Replies with less, or more, than was asked for.


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("chunked", [None, 700])
async def test_the_rest_of_a_shorter_reply_is_asked_for(
    server: RangeServer, how: str, chunked: int | None
) -> None:
    async with opened(server.url("/a")) as source:
        server.fault = lambda request: Fault(most=1000, chunked=chunked)
        assert await get(source, 5, 3500, how) == DATA[5:3505]
        assert server.counts.ranges[1:] == [(5, 3504), (1005, 3504), (2005, 3504), (3005, 3504)]
        assert server.counts.connections == 1
        server.fault = lambda request: Fault(most=1)
        assert await get(source, 0, 3, how) == DATA[:3]
    server.fault = lambda request: Fault(most=1)
    async with opened(server.url("/a")) as source:
        assert source.size == SIZE


@pytest.mark.parametrize("how", READERS)
async def test_the_rest_of_a_shorter_reply_is_of_the_same_version(
    server: RangeServer, how: str
) -> None:
    async with opened(server.url("/a")) as source:
        server.faults.append(Fault(most=1000))
        server.faults.append(Fault(headers={"ETag": '"v2"'}))
        with pytest.raises(errors.SourceChangedError):
            await get(source, 0, 2000, how)


@pytest.mark.parametrize("how", READERS)
async def test_no_byte_is_asked_for_alone(server: RangeServer, how: str) -> None:
    def fault(request: Request) -> Fault | None:
        first, last = request.range or (0, 0)
        return Fault(ignore_range=True) if first >= last else None

    server.fault = fault
    async with opened(server.url("/a")) as source:
        for offset in (0, 1, SIZE - 2, SIZE - 1):
            assert await get(source, offset, 1, how) == DATA[offset : offset + 1]
        server.fault = lambda request: Fault(most=1)
        assert await get(source, SIZE - 2, 1, how) == DATA[-2:-1]
        with pytest.raises(errors.ShortReadError):
            await get(source, SIZE - 1, 1, how)


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("size", [0, 1, 2, 5000, 65536])
@pytest.mark.parametrize("fault", [Fault(ignore_range=True), Fault(ignore_range=True, chunked=999)])
async def test_a_small_object_may_come_whole(
    server: RangeServer, how: str, size: int, fault: Fault
) -> None:
    server.objects["/small"] = Entry(memoryview(DATA[:size]), None, None)
    server.fault = lambda request: fault
    # Nothing can change beneath it, so that a version is not missed.
    async with opened(server.url("/small"), unversioned="refuse") as source:
        assert source.size == size
        assert await get(source, 0, size, how) == DATA[:size]
        assert await get(source, size // 2, size // 3, how) == DATA[size // 2 :][: size // 3]
        clone = source.clone()
        await clone.open()
        assert await get(clone, 0, size, how) == DATA[:size]
        assert server.counts.requests == 1
        with pytest.raises(errors.UsageError):
            await get(source, 0, size + 1, how)
        await clone.aclose()


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault(ignore_range=True), errors.RangeNotSupportedError, "ignored the Range"),
        (Fault(ignore_range=True, chunked=9999), errors.RangeNotSupportedError, "ignored"),
        (Fault(ignore_range=True, cut_after=60), errors.ShortReadError, "ended inside"),
        (Fault(ignore_range=True, gzip=True), errors.SourceError, "Content-Encoding"),
        (
            # The end of the connection is the end of the body, if it did not break.
            Fault(garbage=b"HTTP/1.1 200 OK\r\n\r\nabc"),
            errors.RangeNotSupportedError,
            "ignored",
        ),
    ],
    ids=["large", "large, of unknown size", "cut", "compressed", "of no known size"],
)
async def test_what_is_no_small_whole_object(
    server: RangeServer, fault: Fault, kind: type[Exception], words: str
) -> None:
    small = fault.cut_after or fault.gzip or fault.garbage
    server.objects["/o"] = Entry(memoryview(DATA[: 100 if small else 65537]))
    server.fault = lambda request: fault
    with pytest.raises(kind, match=words):
        await HttpSource(server.url("/o")).open()


@pytest.mark.parametrize("how", READERS)
async def test_a_whole_object_instead_of_a_range(server: RangeServer, how: str) -> None:
    """As from a cache that does not have it yet."""
    server.objects["/small"] = Entry(memoryview(DATA[:50_000]))
    async with opened(server.url("/small")) as source:
        server.fault = lambda request: Fault(ignore_range=True)
        for offset, length in ((0, 50_000), (0, 1), (49_999, 1), (3, 30_000), (0, 0)):
            assert await get(source, offset, length, how) == DATA[offset : offset + length]
        server.fault = lambda request: Fault(ignore_range=True, headers={"ETag": '"v2"'})
        with pytest.raises(errors.SourceChangedError):
            await get(source, 3, 9, how)
        server.objects["/small"] = Entry(memoryview(DATA[:40_000]))
        server.fault = lambda request: Fault(ignore_range=True)
        with pytest.raises(errors.SourceChangedError, match="size"):
            await get(source, 3, 9, how)
    server.fault = None
    async with opened(server.url("/a")) as source:
        server.fault = lambda request: Fault(ignore_range=True)
        assert await get(source, 0, SIZE, how) == DATA, "all of it was asked for"


async def test_empty_objects_of_which_no_byte_can_be_sent(server: RangeServer) -> None:
    server.faults.append(Fault(status=416))
    async with opened(server.url("/empty")) as source:
        assert source.size == 0
    server.faults.append(Fault(status=416))
    server.objects["/small"] = Entry(memoryview(DATA[:3]))
    async with opened(server.url("/small")) as source:
        assert await source.read(0, 3) == DATA[:3]
    server.faults.append(Fault(status=416))
    with pytest.raises(errors.SourceError, match=r"refused to send bytes 0-1 \(HTTP 416") as info:
        await HttpSource(server.url("/a")).open()
    assert not info.value.transient
    for after in (Fault(status=503), Fault(status=403)):
        server.faults.extend([Fault(status=416), after])
        with pytest.raises(errors.SourceError, match="416") as info:
            await HttpSource(server.url("/small")).open()
        assert info.value.transient == (after.status == 503)


async def test_several_parts_are_refused(server: RangeServer) -> None:
    several = Fault(
        headers={"Content-Range": None, "Content-Type": "multipart/byteranges; boundary=x"}
    )
    server.faults.append(several)
    with pytest.raises(errors.RangeNotSupportedError, match="several parts"):
        await HttpSource(server.url("/a")).open()
    async with opened(server.url("/a")) as source:
        server.faults.append(several)
        with pytest.raises(errors.SourceError, match="several parts") as info:
            await source.read(0, 100)
        assert not info.value.transient


# Servers and replies that cannot be used.


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault(ignore_range=True), errors.RangeNotSupportedError, "ignored the Range"),
        (Fault(status=404), FileNotFoundError, "404"),
        (Fault(status=410), FileNotFoundError, "410"),
        (Fault(status=401), PermissionError, "401"),
        (Fault(status=403), SourcePermissionError, "403"),
        (Fault(status=302), errors.SourceError, "302"),
        (Fault(gzip=True), errors.SourceError, "Content-Encoding"),
        (Fault(headers={"Content-Range": None}), errors.RangeNotSupportedError, "Content-Range"),
        (Fault(headers={"Content-Range": "bytes 1-1/9"}), errors.RangeNotSupportedError, "1-1"),
        (Fault(extra=b"x"), errors.ShortReadError, "longer"),
        (Fault(status=503, retry_after="3"), errors.SourceError, "503"),
        (Fault(redirect="ftp://host/x"), errors.SourceError, "not an HTTP URL"),
        (Fault(garbage=b"SSH-2.0-x\r\n\r\n"), errors.SourceError, "not valid HTTP"),
    ],
)
async def test_open_fails(
    server: RangeServer, fault: Fault, kind: type[Exception], words: str
) -> None:
    server.faults.append(fault)
    source = HttpSource(server.url("/a"))
    with pytest.raises(kind, match=words):
        await source.open()
    assert server.counts.requests == 1
    await source.open()  # may be tried again, and no warning about the first session
    assert source.size == SIZE
    await source.aclose()


async def test_ignored_range_does_not_read_the_body(server: RangeServer) -> None:
    gate = asyncio.Event()
    server.faults.append(Fault(ignore_range=True, body_gate=gate, body_gate_at=1))
    with pytest.raises(errors.RangeNotSupportedError):
        await HttpSource(server.url("/a")).open()
    await server.wait_for(lambda counts: counts.aborted == 1)
    assert server.counts.bytes == 1


LENGTH = 100_000


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize(
    ("fault", "kind", "transient"),
    [
        (Fault(cut_after=0), errors.ShortReadError, True),
        (Fault(cut_after=50_000), errors.ShortReadError, True),
        (Fault(cut_after=50_000, reset=True), errors.SourceError, True),
        (Fault(cut_after=50_000, chunked=1000), errors.ShortReadError, True),
        (Fault(short_by=1), errors.ShortReadError, True),
        (Fault(short_by=1, chunked=1000), errors.ShortReadError, True),
        (Fault(extra=b"x"), errors.ShortReadError, True),
        (Fault(extra=b"x", chunked=1000), errors.ShortReadError, True),
        (Fault(extra=bytes(9999), chunked=77_777), errors.ShortReadError, True),
        (
            Fault(headers={"Content-Range": f"bytes 5-{5 + LENGTH}/{SIZE}"}),
            errors.ShortReadError,
            True,
        ),
        (
            Fault(headers={"Content-Range": f"bytes 4-{4 + LENGTH - 1}/{SIZE}"}),
            errors.SourceError,
            False,
        ),
        (Fault(headers={"Content-Range": None}), errors.SourceError, False),
        (Fault(headers={"Content-Range": "bytes 9-3/4"}), errors.SourceError, False),
        (Fault(gzip=True), errors.SourceError, False),
        (Fault(ignore_range=True), errors.RangeNotSupportedError, False),
        (Fault(status=404), errors.SourceError, False),
        (Fault(status=410), errors.SourceError, False),
        (Fault(status=400), errors.SourceError, False),
        (Fault(status=401), SourcePermissionError, False),
        (Fault(status=403), SourcePermissionError, False),
        (Fault(status=416), errors.SourceChangedError, False),
        (Fault(status=429), errors.SourceError, True),
        (Fault(status=500), errors.SourceError, True),
        (Fault(status=501), errors.SourceError, False),
        (Fault(status=502), errors.SourceError, True),
        (Fault(status=503), errors.SourceError, True),
        (Fault(status=204), errors.SourceError, False),
    ],
    ids=repr,
)
async def test_read_fails(
    server: RangeServer, how: str, fault: Fault, kind: type[errors.SourceError], transient: bool
) -> None:
    async with opened(server.url("/a")) as source:
        server.faults.append(fault)
        with pytest.raises(errors.SourceError) as info:
            await get(source, 5, LENGTH, how)
        assert isinstance(info.value, kind)
        assert info.value.transient is transient
        assert await get(source, 5, LENGTH, how) == DATA[5 : 5 + LENGTH]


async def test_a_lost_idle_connection_is_not_noticed(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        server.drop_connections()
        assert await source.read(0, 100) == DATA[:100]


async def test_bytes_nobody_asked_for(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        for connection in server._connections:
            connection.transport.write(b"junk")
        # Whether the read still meets that connection is a matter of timing.
        first = await asyncio.gather(source.read(0, 100), return_exceptions=True)
        assert first[0] == DATA[:100] or getattr(first[0], "transient", False)
        assert await source.read(0, 100) == DATA[:100]


async def test_no_reply(server: RangeServer) -> None:
    async with opened(server.url("/a")) as source:
        server.fault = lambda request: Fault(no_reply=True)
        with pytest.raises(errors.SourceError) as info:
            await source.read(0, 100)
        assert info.value.transient


async def test_refused_connection() -> None:
    with socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        with pytest.raises(errors.SourceError, match="Connection refused") as info:
            await HttpSource(f"http://127.0.0.1:{idle.getsockname()[1]}/x").open()
    assert info.value.transient


async def test_unknown_host() -> None:
    with pytest.raises(errors.SourceError) as info:
        await HttpSource("http://does-not-exist.invalid/x", connect_timeout=30).open()
    assert info.value.transient


async def test_names_are_looked_up_without_the_default_executor(server: RangeServer) -> None:
    hold = threading.Event()
    loop = asyncio.get_running_loop()
    blocked = [loop.run_in_executor(None, hold.wait) for _ in range(64)]
    try:
        async with opened(server.url("/a", host="localhost")) as source:
            assert await source.read(0, 10) == DATA[:10]
    finally:
        hold.set()
        await asyncio.gather(*blocked)


@pytest.mark.parametrize("at", ["headers", "body"])
async def test_timeout(server: RangeServer, at: str) -> None:
    gate = asyncio.Event()
    async with opened(server.url("/a"), timeout=0.05) as source:
        server.faults.append(Fault(gate=gate) if at == "headers" else Fault(body_gate=gate))
        with pytest.raises(errors.SourceTimeoutError) as info:
            await source.read(0, 100)
        assert info.value.transient
        gate.set()
        assert await source.read(0, 100) == DATA[:100]


async def test_waiting_for_a_connection_is_no_timeout(server: RangeServer) -> None:
    async with opened(server.url("/a"), timeout=0.2, max_connections=1) as source:
        server.fault = lambda request: Fault(delay=0.05)
        await asyncio.gather(*(source.read(0, 10) for _ in range(8)))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("0", 0.0), ("soon", None), ("-1", None), (None, None), ("9" * 30, 999_999_999)],
)
async def test_retry_after(server: RangeServer, value: str | None, seconds: float | None) -> None:
    async with opened(server.url("/a")) as source:
        server.faults.append(Fault(status=503, retry_after=value))
        with pytest.raises(errors.SourceError) as info:
            await source.read(0, 100)
        assert info.value.retry_after == seconds


def test_retry_after_date() -> None:
    now = formatdate(MODIFIED, usegmt=True)
    later = formatdate(MODIFIED + 90, usegmt=True)
    assert retry_after({"Retry-After": later, "Date": now}) == 90
    assert retry_after({"Retry-After": now, "Date": later}) == 0
    assert retry_after({"Retry-After": now}) == 0


# Redirects.


async def test_redirect_is_remembered(server: RangeServer) -> None:
    server.fault = redirecting("/r", "/a")
    async with opened(server.url("/r")) as source:
        assert await source.read(0, 100) == DATA[:100]
        assert [request.path for request in server.requests] == ["/r", "/a", "/a"]


def redirecting(path: str, target: str) -> Callable[[Request], Fault | None]:
    return lambda request: Fault(redirect=target) if request.path == path else None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_expired_redirect_goes_back(server: RangeServer, status: int) -> None:
    valid = 1

    def fault(request: Request) -> Fault | None:
        if request.path == "/r":
            return Fault(redirect=f"/a?ticket={valid}")
        return None if request.path == f"/a?ticket={valid}" else Fault(status=status)

    server.fault = fault
    async with opened(server.url("/r")) as source:
        valid = 2
        assert await source.read(0, 100) == DATA[:100]
        assert await source.read(0, 100) == DATA[:100]
        paths = [request.path for request in server.requests]
        assert paths == ["/r", "/a?ticket=1", "/a?ticket=1", "/r", "/a?ticket=2", "/a?ticket=2"]


async def test_dead_redirect_target_is_given_up(server: RangeServer) -> None:
    async with RangeServer({"/a": DATA}) as other:
        target = other.url("/a")
        server.fault = lambda request: Fault(redirect=target) if request.path == "/r" else None
        async with opened(server.url("/r")) as source:
            await other.__aexit__()
            target = "/a"
            with pytest.raises(errors.SourceError) as info:
                await source.read(0, 100)
            assert info.value.transient
            assert await source.read(0, 100) == DATA[:100]
        await other.__aenter__()


async def test_secrets_stay_with_their_origin(server: RangeServer) -> None:
    async with RangeServer({"/a": DATA}) as other:
        server.fault = redirecting("/r", other.url("/a"))
        secrets = {"Cookie": "c", "X-Key": "k"}
        async with opened(server.url("/r"), auth=("u", "p"), headers=secrets) as source:
            await source.read(0, 100)
        assert "authorization" in server.requests[0].headers
        assert "cookie" in server.requests[0].headers
        assert len(other.requests) == 2
        for request in other.requests:
            assert "authorization" not in request.headers
            assert "cookie" not in request.headers
            assert request.headers["x-key"] == "k"


async def test_endless_redirects(server: RangeServer) -> None:
    server.fault = redirecting("/r", "/r")
    with pytest.raises(errors.SourceError, match="redirects") as info:
        await HttpSource(server.url("/r")).open()
    assert not info.value.transient


# Cancelling and closing.


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("at", ["headers", "body"])
async def test_cancel_closes_the_connection(server: RangeServer, how: str, at: str) -> None:
    gate = asyncio.Event()
    async with opened(server.url("/a")) as source:
        server.faults.append(
            Fault(gate=gate) if at == "headers" else Fault(body_gate=gate, body_gate_at=1000)
        )
        task = asyncio.ensure_future(get(source, 0, LENGTH, how))
        await server.wait_for(lambda counts: counts.requests == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.wait_for(lambda counts: counts.aborted == 1)
        assert await get(source, 0, LENGTH, how) == DATA[:LENGTH]


async def test_leaving_a_stream_closes_the_connection(server: RangeServer) -> None:
    gate = asyncio.Event()
    async with opened(server.url("/a")) as source:
        server.faults.append(Fault(body_gate=gate, body_gate_at=1000))
        async with contextlib.aclosing(source.stream(0, LENGTH)) as chunks:
            async for _ in chunks:
                break
        await server.wait_for(lambda counts: counts.aborted == 1)


@pytest.mark.parametrize("at", ["headers", "body"])
async def test_close_ends_reads(server: RangeServer, at: str) -> None:
    gate = asyncio.Event()
    source = HttpSource(server.url("/a"), max_connections=2)
    await source.open()
    server.fault = lambda request: (
        Fault(gate=gate) if at == "headers" else Fault(body_gate=gate, body_gate_at=1000)
    )
    reads = [asyncio.ensure_future(source.read(0, LENGTH)) for _ in range(4)]
    await server.wait_for(lambda counts: counts.requests == 3)
    await source.aclose()
    for result in await asyncio.gather(*reads, return_exceptions=True):
        assert isinstance(result, errors.ClosedError)
    await source.aclose()
    with pytest.raises(errors.ClosedError):
        await source.read(0, 1)
    with pytest.raises(errors.ClosedError):
        await source.open()


async def test_cancelled_open_leaves_nothing(server: RangeServer) -> None:
    gate = asyncio.Event()
    server.faults.append(Fault(gate=gate))
    source = HttpSource(server.url("/a"))
    task = asyncio.ensure_future(source.open())
    await server.wait_for(lambda counts: counts.requests == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await server.wait_for(lambda counts: counts.aborted == 1)


def test_an_unclosed_source_warns() -> None:
    code = """
import asyncio, sys
from aiouffd.sources import HttpSource
asyncio.run(HttpSource(sys.argv[1]).open())
"""
    with start_in_process({"/p": 4096}) as server:
        result = subprocess.run(
            [sys.executable, "-W", "always", "-c", code, server.url("/p")],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "ResourceWarning: unclosed <HttpSource" in result.stderr


# TLS.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def tls_server(authority: trustme.CA) -> AsyncIterator[RangeServer]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with RangeServer({"/a": DATA}, ssl=context) as server:
        yield server


async def test_tls(tls_server: RangeServer, authority: trustme.CA) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    url = tls_server.url("/a", host="localhost")
    async with opened(url, ssl=context) as source:
        for how in READERS:
            assert await get(source, 9, 1_000_000, how) == DATA[9:1_000_009]
        tls_server.faults.append(Fault(redirect=f"http://localhost:{tls_server.port}/a"))
        with pytest.raises(errors.SourceError, match="from https to http"):
            await source.read(0, 1)
    with pytest.raises(errors.SourceError, match="certificate") as info:
        await HttpSource(tls_server.url("/a"), ssl=context).open()  # another name
    assert not info.value.transient


async def test_tls_is_verified(tls_server: RangeServer) -> None:
    url = tls_server.url("/a", host="localhost")
    with pytest.raises(errors.SourceError, match="certificate") as info:
        await HttpSource(url).open()
    assert not info.value.transient
    assert "ssl=" in str(info.value)
    async with opened(url, ssl=False) as source:
        assert await source.read(0, 10) == DATA[:10]


# Use.


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("ftp://host/x", {}),
        ("http://", {}),
        ("http://host:99999/", {}),
        ("http://[::1/", {}),
        ("http://host/", {"max_connections": 0}),
        ("http://host/", {"read_buffer": 1}),
        ("http://host/", {"headers": {"range": "bytes=0-1"}}),
    ],
)
def test_wrong_arguments(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError):
        HttpSource(url, **options)


async def test_use_before_open(server: RangeServer) -> None:
    source = HttpSource(server.url("/a"))
    with pytest.raises(errors.UsageError, match="open"):
        await source.read(0, 1)
    with pytest.raises(errors.UsageError, match="open"):
        _ = source.size
    await source.open()
    with pytest.raises(errors.UsageError, match="not within"):
        await source.read(SIZE, 1)
    await source.aclose()


# Pure functions.


@given(st.integers(0, 1 << 60), st.integers(0, 1 << 60), st.integers(0, 1 << 60))
def test_content_range_round_trip(first: int, more: int, total: int) -> None:
    got = parse_content_range(f"bytes {first}-{first + more}/{total}")
    assert got is not None
    assert (got.first, got.last, got.total) == (first, first + more, total)


@given(st.text())
def test_content_range_survives_anything(text: str) -> None:
    parse_content_range(text)
    retry_after({"Retry-After": text, "Date": text})
    Validator.of(1, {"ETag": text}).conditions()


def test_content_range_refuses() -> None:
    for text in (None, "", "bytes", "bytes 1-0/5", "bytes a-b/c", "items 0-1/2", "bytes 0-1"):
        assert parse_content_range(text) is None
    got = parse_content_range("bytes */0")
    assert got is not None
    assert (got.first, got.total) == (None, 0)
