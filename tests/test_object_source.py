"""Object stores: moto's S3 for what real ones say, and a server that misbehaves to order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd.errors import (
    ClosedError,
    RangeNotSupportedError,
    ShortReadError,
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
    UnversionedSourceWarning,
    UsageError,
)
from aiouffd.sources import SourcePermissionError, as_source
from aiouffd.sources.coalesce import Coalescer
from tests.scenarios import torture
from tests.servers.http import MODIFIED, Entry, Fault, RangeServer, Request, pattern
from tests.servers.s3 import KEYS, S3Server, s3_server
from tests.support import ROOT, environment, result_of

pytest.importorskip("obstore")

from aiouffd.sources._objects_url import locate
from aiouffd.sources.objects import ObjectSource

SIZE = 3_000_001
DATA = pattern(SIZE)
URL = "s3://bucket/a"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server(versions=True) as server:
        server.put("a", DATA)
        server.put("empty", b"")
        server.put("odd name/ä %41?x", b"odd")
        yield server


@pytest.fixture
async def server() -> AsyncIterator[RangeServer]:
    async with RangeServer({"/bucket/a": DATA, "/bucket/empty": b""}) as server:
        yield server


def to(server: RangeServer, **changes: Any) -> dict[str, Any]:
    """Options for our own server."""
    return {
        "config": {**KEYS, "endpoint": server.url("")},
        "client_options": {"allow_http": True, **changes},
    }


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[ObjectSource]:
    source = ObjectSource.from_url(url, **options)
    await source.open()
    try:
        yield source
    finally:
        await source.aclose()


async def into_ours(source: ObjectSource, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def told(value: object) -> str:
    """Which of its fields a fault sets, for the names of tests."""
    if not isinstance(value, Fault):
        return ""
    fields = dataclasses.asdict(value)
    return "-".join(f"{name}={fields[name]}" for name in fields if fields[name])


READERS: dict[str, Any] = {"read": ObjectSource.read, "read_into": into_ours}


# ---------------------------------------------------------------------- a real S3


async def test_reads(s3: S3Server) -> None:
    async with opened(URL, **s3.options) as source:
        assert source.size == SIZE
        assert source.version
        for offset, length in ((0, 1), (SIZE - 1, 1), (4095, 70_000), (0, SIZE), (7, 0)):
            assert bytes(await source.read(offset, length)) == DATA[offset : offset + length]
            assert await into_ours(source, offset, length) == DATA[offset : offset + length]
        with pytest.raises(UsageError):
            await source.read(SIZE, 1)
        clone = source.clone()
        await clone.open()
        assert bytes(await clone.read(9, 9)) == DATA[9:18]
        await clone.aclose()


async def test_a_buffer(s3: S3Server) -> None:
    async with aiouffd.open(URL, **s3.options) as buf:
        assert len(buf) == SIZE
        at = SIZE - 50_000
        assert await asyncio.to_thread(lambda: bytes(buf[at : at + 40_000])) == DATA[at:-10_000]
        await buf.fetch()
        assert bytes(buf.view) == DATA


async def test_settings_from_the_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEYS["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": KEYS["secret_access_key"],
        "AWS_REGION": KEYS["region"],
        "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    source = as_source(URL)
    assert isinstance(source, ObjectSource)
    await source.open()
    assert bytes(await source.read(1, 2)) == DATA[1:3]
    await source.aclose()


async def test_names_and_empty_objects(s3: S3Server) -> None:
    async with opened("s3://bucket/odd name/ä %41?x", **s3.options) as source:
        assert bytes(await source.read(0, 3)) == b"odd"
    async with opened("s3://bucket/empty", **s3.options) as source:
        assert source.size == 0
        assert await source.read(0, 0) == b""
    for url in ("s3://bucket/nothing", "s3://nowhere/a"):
        with pytest.raises(FileNotFoundError, match="no such object"):
            await ObjectSource.from_url(url, **s3.options).open()


async def test_a_change_is_an_error(s3: S3Server) -> None:
    s3.put("changing", DATA)
    async with opened("s3://bucket/changing", **s3.options) as source:
        await source.read(0, 10)
        clone = source.clone()
        s3.put("changing", DATA[::-1])
        with pytest.raises(SourceChangedError):
            await source.read(0, 10)
        with pytest.raises(SourceChangedError):
            await into_ours(source, 0, SIZE)
        # Its size is known; its first read finds out.
        await clone.open()
        with pytest.raises(SourceChangedError):
            await clone.read(0, 10)
        await clone.aclose()
    s3.client.delete_object(Bucket="bucket", Key="changing")


async def test_a_version_stays_readable(s3: S3Server) -> None:
    first = s3.put("versions", DATA)
    second = s3.put("versions", DATA[::-1])
    for version, data in ((first, DATA), (second, DATA[::-1])):
        async with opened("s3://bucket/versions", version_id=version, **s3.options) as source:
            assert bytes(await source.read(3, 1000)) == data[3:1003]
            assert source.version is not None
            assert source.version.startswith(f"{version} ")
        async with opened(f"s3://bucket/versions?versionId={version}", **s3.options) as source:
            assert bytes(await source.read(3, 1000)) == data[3:1003]
    with pytest.raises(UsageError):
        ObjectSource.from_url(f"s3://bucket/versions?versionId={first}", version_id="x")


# ------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://b/k", ("s3", "b", "k", None)),
        ("s3://b/k/l?versionId=v", ("s3", "b", "k/l", "v")),
        ("s3://b/k?versionId=", ("s3", "b", "k?versionId=", None)),
        ("gs://b/k?generation=5", ("gs", "b", "k", "5")),
        ("az://c/k", ("az", "c", "k", None)),
        ("S3://b/k", ("s3", "b", "k", None)),
        ("obstore+https://h/p?q=1", ("https", "https://h/p?q=1", "", None)),
        ("obstore+file:///a%20b", ("file", "/", "a b", None)),
    ],
)
def test_locations(url: str, expected: tuple[Any, ...]) -> None:
    found = locate(url)
    assert (found.scheme, found.place, found.path, found.version_id) == expected


@pytest.mark.parametrize(
    "url", ["s3://", "s3://b", "s3://b/", "gs:///k", "obstore+http://", "obstore+ftp://x/y",
            "obstore+file://host/x"]
)  # fmt: skip
def test_bad_locations(url: str) -> None:
    with pytest.raises(UsageError):
        locate(url)


def test_wrong_settings() -> None:
    with pytest.raises(UsageError):
        ObjectSource.from_url(URL, config={"no_such_setting": "x"})
    with pytest.raises(UsageError):
        ObjectSource.from_url("obstore+http://h/p", config={"region": "x"})


async def test_other_stores(server: RangeServer, tmp_path: Any) -> None:
    (tmp_path / "a b").write_bytes(DATA)
    urls = [server.url("/bucket/a").replace("http", "obstore+http"),
            f"obstore+file://{tmp_path}/a%20b"]  # fmt: skip
    for url in urls:
        async with opened(url) as source:
            assert source.size == SIZE
            assert bytes(await source.read(100, 100)) == DATA[100:200]


# ------------------------------------------------------------- a server that fails


@pytest.mark.parametrize(
    ("fault", "error", "transient"),
    [
        (Fault(status=500), SourceError, True),
        (Fault(status=503), SourceError, True),
        (Fault(status=429), SourceError, True),
        (Fault(status=408), SourceError, True),
        (Fault(status=501), SourceError, False),
        (Fault(status=403), SourcePermissionError, False),
        (Fault(status=401), SourcePermissionError, False),
        (Fault(status=404), SourceError, False),
        (Fault(status=416), SourceChangedError, False),
        (Fault(headers={"ETag": '"v2"'}), SourceChangedError, False),
        (Fault(ignore_range=True), RangeNotSupportedError, False),
        (Fault(no_reply=True), SourceError, True),
        (Fault(no_reply=True, reset=True), SourceError, True),
        (Fault(cut_after=5), SourceError, True),
        (Fault(cut_after=5, reset=True), SourceError, True),
        (Fault(garbage=b"what? " * 10), SourceError, True),
        (Fault(short_by=1), ShortReadError, True),
        (Fault(extra=b"more"), ShortReadError, True),
    ],
    ids=lambda value: told(value),
)
@pytest.mark.parametrize("how", ["read", "read_into"])
async def test_failures(
    server: RangeServer, fault: Fault, error: type[SourceError], transient: bool, how: str
) -> None:
    async with opened(URL, **to(server)) as source:
        server.faults.append(fault)
        with pytest.raises(SourceError) as caught:
            await READERS[how](source, 10, 1000)
        assert isinstance(caught.value, error), caught.value
        assert caught.value.transient == transient
        assert KEYS["secret_access_key"] not in str(caught.value)
        # It works again, and nothing was retried behind our back.
        assert bytes(await source.read(10, 1000)) == DATA[10:1010]
        assert server.counts.requests == 3


async def test_failures_to_open(server: RangeServer) -> None:
    for faults, error, transient in (
        ([Fault(status=404)], FileNotFoundError, None),
        ([Fault(status=403)], PermissionError, False),
        ([Fault(status=503)], SourceError, True),
        ([Fault(ignore_range=True)], RangeNotSupportedError, False),
        ([Fault(status=416)], SourceError, False),
        ([Fault(status=416), Fault(status=503)], SourceError, True),
        ([Fault(status=416), Fault(status=403)], SourceError, False),
        ([Fault(no_reply=True)], SourceError, True),
    ):
        source = ObjectSource.from_url(URL, **to(server))
        server.faults.extend(faults)
        with pytest.raises(error) as caught:
            await source.open()
        assert getattr(caught.value, "transient", None) == transient
        await source.open()
        assert bytes(await source.read(0, 1)) == DATA[:1]
        await source.aclose()


async def test_no_server_and_a_silent_one(server: RangeServer) -> None:
    nobody = ObjectSource.from_url(
        URL,
        config={**KEYS, "endpoint": "http://127.0.0.1:9"},
        client_options={"allow_http": True},
    )
    with pytest.raises(SourceError) as caught:
        await nobody.open()
    assert caught.value.transient
    async with opened(URL, **to(server, timeout="200ms")) as source:
        gate = asyncio.Event()
        server.faults.append(Fault(gate=gate))
        with pytest.raises(SourceTimeoutError):
            await source.read(0, 10)
        gate.set()
    with pytest.raises(SourceError, match="without TLS"):
        await ObjectSource.from_url(URL, config={**KEYS, "endpoint": server.url("")}).open()


async def test_changed_without_etags(server: RangeServer) -> None:
    server.objects["/bucket/a"] = Entry(memoryview(DATA), None)
    async with opened(URL, **to(server)) as source:
        await source.read(0, 10)
        server.objects["/bucket/a"] = Entry(memoryview(DATA[::-1]), None, 1_800_000_000.0)
        with pytest.raises(SourceChangedError):
            await source.read(0, 10)


@pytest.mark.parametrize("how", ["read", "read_into"])
@pytest.mark.parametrize("scheme", ["s3", "obstore+http"])
@pytest.mark.parametrize("etag", ['"v1"', 'W/"v1"', None])
async def test_a_condition_that_never_holds_is_given_up(
    server: RangeServer, how: str, scheme: str, etag: str | None
) -> None:
    def refusing(request: Request) -> Fault | None:
        conditions = {"if-match", "if-unmodified-since"} & set(request.headers)
        return Fault(status=412, headers={"ETag": '"other"'}) if conditions else None

    server.objects["/bucket/a"].etag = etag
    server.fault = refusing
    options = to(server) if scheme == "s3" else {}
    async with opened(URL if scheme == "s3" else web(server), **options) as source:
        assert bytes(await READERS[how](source, 10, 1000)) == DATA[10:1010]
        assert server.counts.requests == 3
        clone = source.clone()
        await clone.open()
        for one in (source, clone):
            assert bytes(await READERS[how](one, 10, 1000)) == DATA[10:1010]
        assert server.counts.requests == 5, "it was not sent again"
        # The replies' own validators are compared, and have to be there.
        server.objects["/bucket/a"] = Entry(memoryview(DATA[::-1]), '"v2"', MODIFIED + 1)
        for one in (source, clone):
            with pytest.raises(SourceChangedError):
                await READERS[how](one, 10, 1000)
        server.objects["/bucket/a"] = Entry(memoryview(DATA[::-1]), None, None)
        with pytest.raises(SourceChangedError):
            await READERS[how](source, 10, 1000)
        await clone.aclose()


async def test_a_connection_that_ends_with_the_refusal(server: RangeServer) -> None:
    """Said to be kept alive, as by nginx, so that the next request may still go there."""
    async with opened(URL, **to(server)) as source:
        server.faults.extend([Fault(status=412), Fault(no_reply=True)])
        assert bytes(await source.read(10, 1000)) == DATA[10:1010]
    async with opened(URL, **to(server)) as source:
        refused = [Fault(status=412), Fault(no_reply=True, reset=True)]
        server.faults.extend([*refused, Fault(headers={"ETag": '"v2"'})])
        with pytest.raises(SourceChangedError):
            await source.read(10, 1000)
        server.faults.extend([Fault(status=412), Fault(no_reply=True), Fault(no_reply=True)])
        with pytest.raises(SourceError) as caught:
            await source.read(10, 1000)
        assert caught.value.transient


def web(server: RangeServer, name: str = "a") -> str:
    return "obstore+" + server.url(f"/bucket/{name}")


@pytest.mark.parametrize("how", ["read", "read_into"])
async def test_the_rest_of_a_shorter_reply_is_asked_for(server: RangeServer, how: str) -> None:
    async with opened(URL, **to(server)) as source:
        server.fault = lambda request: Fault(most=1000)
        assert bytes(await READERS[how](source, 10, 3500)) == DATA[10:3510]
        server.faults.append(Fault(most=1000))
        server.faults.append(Fault(headers={"ETag": '"v2"'}))
        with pytest.raises(SourceChangedError):
            await READERS[how](source, 10, 3500)
        # A server that has a limit is asked for no more at a time, once that is known.
        server.fault = lambda request: Fault(most=50_000)
        assert bytes(await READERS[how](source, 10, 500_000)) == DATA[10:500_010]
        before = server.counts.requests
        for one in (source, source.clone()):
            await one.open()
            assert bytes(await READERS[how](one, 10, 500_000)) == DATA[10:500_010]
            await one.aclose()
        assert server.counts.requests == before + 20
    server.fault = lambda request: Fault(most=1)
    async with opened(URL, **to(server)) as source:
        assert source.size == SIZE
        assert bytes(await READERS[how](source, 0, 3)) == DATA[:3]


async def test_no_byte_is_asked_for_alone(server: RangeServer) -> None:
    def fault(request: Request) -> Fault | None:
        first, last = request.range or (0, 0)
        return Fault(ignore_range=True) if first >= last else None

    server.fault = fault
    async with opened(URL, **to(server)) as source:
        for offset in (0, 1, SIZE - 2, SIZE - 1):
            assert bytes(await source.read(offset, 1)) == DATA[offset : offset + 1]


@pytest.mark.parametrize(
    "wrong", [f"bytes 9-1008/{SIZE}", f"bytes 11-1010/{SIZE}", "bytes x", None]
)
async def test_another_place_than_was_asked_for(server: RangeServer, wrong: str | None) -> None:
    async with opened(URL, **to(server)) as source:
        server.faults.append(Fault(headers={"Content-Range": wrong}))
        with pytest.raises(SourceError) as caught:
            await source.read(10, 1000)
        assert not caught.value.transient


@pytest.mark.parametrize("size", [0, 1, 2, 5000, 65536])
@pytest.mark.parametrize("scheme", ["s3", "obstore+http"])
async def test_a_small_object_may_come_whole(server: RangeServer, size: int, scheme: str) -> None:
    server.objects["/bucket/small"] = Entry(memoryview(DATA[:size]), None, None)
    server.fault = lambda request: Fault(ignore_range=True)
    options = to(server) if scheme == "s3" else {}
    url = "s3://bucket/small" if scheme == "s3" else web(server, "small")
    # Nothing can change beneath it, so that a version is not missed.
    async with opened(url, unversioned="refuse", **options) as source:
        before = server.counts.requests
        clone = source.clone()
        await clone.open()
        for one in (source, clone):
            assert one.size == size
            for offset, length in ((0, size), (size // 2, size // 3), (size, 0)):
                assert bytes(await one.read(offset, length)) == DATA[offset : offset + length]
                assert await into_ours(one, offset, length) == DATA[offset : offset + length]
        assert server.counts.requests == before
        await clone.aclose()
    server.objects["/bucket/small"] = Entry(memoryview(DATA[:65537]))
    with pytest.raises(RangeNotSupportedError):
        await ObjectSource.from_url(url, **options).open()


async def test_a_whole_object_instead_of_a_range(server: RangeServer) -> None:
    server.objects["/bucket/small"] = Entry(memoryview(DATA[:50_000]))
    for name, size in (("small", 50_000), ("a", SIZE)):
        async with opened(f"s3://bucket/{name}", **to(server)) as source:
            server.fault = lambda request: Fault(ignore_range=True)
            assert bytes(await source.read(0, size)) == DATA[:size]
            if name == "small":
                for offset, length in ((0, 1), (49_999, 1), (3, 30_000)):
                    found = await source.read(offset, length)
                    assert bytes(found) == DATA[offset : offset + length]
                server.objects["/bucket/small"].etag = '"v2"'
            else:
                with pytest.raises(RangeNotSupportedError):
                    await source.read(0, size - 1)
                server.objects["/bucket/a"].etag = '"v2"'
            with pytest.raises(SourceChangedError):
                await source.read(0, size)
        server.fault = None


async def test_empty_objects_of_which_no_byte_can_be_sent(server: RangeServer) -> None:
    for url, options in (("s3://bucket/empty", to(server)), (web(server, "empty"), {})):
        for fault in (None, Fault(status=416), Fault(ignore_range=True)):
            server.faults.append(fault)
            async with opened(url, **options) as source:
                assert source.size == 0
                assert bytes(await source.read(0, 0)) == b""


async def test_a_compressed_part_is_refused(server: RangeServer) -> None:
    async with opened(web(server)) as source:
        server.faults.append(Fault(gzip=True))
        with pytest.raises(SourceError, match="Content-Encoding") as caught:
            await source.read(0, 1000)
        assert not caught.value.transient
    # What a store keeps compressed are its bytes.
    kept = Fault(headers={"Content-Encoding": "gzip"})
    async with opened(URL, **to(server)) as source:
        server.faults.append(kept)
        assert bytes(await source.read(0, 1000)) == DATA[:1000]


async def test_one_validator_that_contradicts_another_is_a_change(server: RangeServer) -> None:
    async with (
        opened(URL, **to(server)) as source,
        opened(URL, **to(server), ignore_dates=True) as trusting,
    ):
        server.objects["/bucket/a"].modified = MODIFIED + 1
        with pytest.raises(SourceChangedError, match="though its ETag stayed"):
            await source.read(0, 10)
        for one in (trusting, trusting.clone()):
            await one.open()
            assert bytes(await one.read(0, 10)) == DATA[:10]
            await one.aclose()


async def test_no_version_at_all(server: RangeServer) -> None:
    server.objects["/bucket/a"] = Entry(memoryview(DATA), None, None)
    source = ObjectSource.from_url(URL, **to(server))
    with pytest.warns(UnversionedSourceWarning, match="neither an ETag nor"):
        await source.open()
    assert source.weak
    clone = source.clone()
    await clone.open()  # said already
    await clone.aclose()
    await source.aclose()
    with pytest.raises(SourceError, match="no version") as caught:
        await ObjectSource.from_url(URL, **to(server), unversioned="refuse").open()
    assert not caught.value.transient
    async with opened(URL, **to(server), unversioned="accept") as source:
        assert source.version is None


async def test_cancelled_and_closed(server: RangeServer) -> None:
    async with opened(URL, **to(server)) as source:
        gate = asyncio.Event()
        server.faults.extend([Fault(gate=gate), Fault(gate=gate)])
        first = asyncio.ensure_future(source.read(0, 1000))
        second = asyncio.ensure_future(source.read(1 << 20, 1000))
        await server.wait_for(lambda counts: counts.requests == 3)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await source.aclose()
        with pytest.raises(ClosedError):
            await second
        with pytest.raises(ClosedError):
            await source.read(0, 1)
        await server.wait_for(lambda counts: counts.aborted == 2)
        gate.set()


async def test_not_closed(server: RangeServer) -> None:
    source = ObjectSource.from_url(URL, **to(server))
    await source.open()
    with pytest.warns(ResourceWarning):  # noqa: PT031
        del source
        gc.collect()


# -------------------------------------------------------------------- coalescing


async def test_neighbours_are_one_request(server: RangeServer) -> None:
    async with opened(URL, **to(server)) as source:
        before = server.counts.requests
        parts = await asyncio.gather(*(source.read(at * 4096, 4096) for at in range(20)))
        assert b"".join(map(bytes, parts)) == DATA[: 20 * 4096]
        assert server.counts.requests == before + 1
        await asyncio.gather(*(source.read(at * 40_960, 4096) for at in range(20)))
        assert server.counts.requests == before + 21
    async with opened(URL, **to(server), coalesce=None) as source:
        before = server.counts.requests
        await asyncio.gather(*(source.read(at * 4096, 4096) for at in range(5)))
        assert server.counts.requests == before + 5
    async with opened(URL, **to(server), coalesce=4096) as source:
        before = server.counts.requests
        await asyncio.gather(*(source.read(at * 8192, 4096) for at in range(5)))
        assert server.counts.requests == before + 1


async def test_amplification(server: RangeServer) -> None:
    """Bytes that left the server for 300 touches of four kilobytes at random places."""
    chance = random.Random(5)
    places = [chance.randrange(SIZE // 4096) * 4096 for _ in range(300)]
    touched = len(set(places)) * 4096
    for options, most in (({"block_size": 4096, "readahead": 0}, 1.2), ({}, 16)):
        async with aiouffd.open(URL, **to(server), **options) as buf:
            before = server.counts.bytes

            def touch(buf: Any = buf) -> None:
                for at in places:
                    assert buf[at] == DATA[at]

            await asyncio.to_thread(touch)
            assert server.counts.bytes - before <= most * touched


async def test_one_of_many_is_cancelled() -> None:
    gate = asyncio.Event()
    asked: list[tuple[int, int]] = []

    async def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        await gate.wait()
        return DATA[offset : offset + length]

    joined = Coalescer(read)
    tasks = [asyncio.ensure_future(joined.read(at * 10, 10)) for at in range(3)]
    for _ in range(4):
        await asyncio.sleep(0)
    tasks[1].cancel()
    gate.set()
    assert bytes(await tasks[0]) == DATA[:10]
    assert bytes(await tasks[2]) == DATA[20:30]
    assert tasks[1].cancelled()
    assert asked == [(0, 30)]
    gate.clear()
    tasks = [asyncio.ensure_future(joined.read(at * 10, 10)) for at in range(2)]
    for _ in range(4):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await joined.aclose()


async def test_an_error_reaches_all_that_were_joined() -> None:
    async def read(offset: int, length: int) -> bytes:
        raise SourceError("no")

    joined = Coalescer(read)
    found = await asyncio.gather(*(joined.read(at, 1) for at in range(3)), return_exceptions=True)
    assert all(isinstance(error, SourceError) for error in found)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3000)), max_size=20),
       st.integers(0, 500), st.integers(1, 4000))  # fmt: skip
def test_coalescing_against_the_bytes(reads: list[tuple[int, int]], gap: int, longest: int) -> None:
    fetched = 0

    async def read(offset: int, length: int) -> bytes:
        nonlocal fetched
        fetched += length
        await asyncio.sleep(0)
        return DATA[offset : offset + length]

    async def main() -> None:
        joined = Coalescer(read, gap=gap, longest=longest)
        found = await asyncio.gather(*(joined.read(*part) for part in reads))
        assert [bytes(part) for part in found] == [
            DATA[offset : offset + length] for offset, length in reads
        ]

    asyncio.run(main())
    assert fetched <= sum(length for _, length in reads) + gap * len(reads)


# -------------------------------------------------------- threads of the library


def script(text: str, server: RangeServer) -> subprocess.Popen[str]:
    endpoint = server.url("")
    head = f"""
import asyncio, os, sys
from aiouffd.sources.objects import ObjectSource
def make():
    return ObjectSource.from_url({URL!r}, config=dict({KEYS!r}, endpoint={endpoint!r}),
                                 client_options={{"allow_http": True}})
"""
    return subprocess.Popen(
        [sys.executable, "-c", head + text],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def said(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = await asyncio.to_thread(process.communicate, timeout=30)
    return process.returncode, out, err


async def test_exit_with_requests_under_way(server: RangeServer) -> None:
    server.fault = lambda request: Fault(delay=0.01)
    text = """
async def main():
    source = make()
    await source.open()
    tasks = [asyncio.ensure_future(source.read(at * 4097 * 3, 4096)) for at in range(200)]
    await tasks[0]
    print("done", flush=True)
    os.write(2, b"")
asyncio.run(main())
"""
    for _ in range(3):
        status, out, err = await said(script(text, server))
        assert (status, out) == (0, "done\n"), err


async def test_a_child_of_fork_is_told(server: RangeServer) -> None:
    text = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what this is about
async def use():
    source = make()
    await source.open()
    await source.read(0, 10)
    await source.aclose()
asyncio.run(use())
child = os.fork()
if not child:
    try:
        asyncio.run(use())
    except aiouffd.UnsupportedError if (aiouffd := __import__("aiouffd")) else ():
        os._exit(7)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert await said(script(text, server)) == (0, "7\n", "")


# ---------------------------------------------------------------------- torture


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    found = result_of(
        torture.torture, loop_name, "objects", "anonymous", errors, 300, 7, limit=60.0
    )
    assert found["retries"] > 0
    if errors == "hard":
        assert found["refused"] == 0
