"""Memory, function and file sources, and as_source."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from aiouffd import errors
from aiouffd.sources import (
    BaseSource,
    FileSource,
    FunctionSource,
    HttpSource,
    MemorySource,
    Source,
    as_source,
)
from aiouffd.sources.base import (
    aclose_source,
    check_length,
    check_range,
    open_source,
    read_into_source,
    stream_source,
)
from tests.servers.http import pattern

DATA = pattern(3_000_001)


class Minimal:
    """Only what a source must have."""

    size = len(DATA)

    async def read(self, offset: int, length: int) -> bytes:
        return DATA[offset : offset + length]

    def clone(self) -> Minimal:
        return Minimal()


async def collect(source: Source, offset: int, length: int) -> bytes:
    return b"".join([bytes(chunk) async for chunk in stream_source(source, offset, length)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    return file


# The helpers.


def test_check_range() -> None:
    check_range(0, 10, 10)
    check_range(10, 0, 10)
    for offset, length in ((-1, 1), (0, -1), (0, 11), (10, 1)):
        with pytest.raises(errors.UsageError):
            check_range(offset, length, 10)


def test_check_length() -> None:
    data = bytearray(8)
    view = check_length(data, 8)
    view[0] = 7
    assert data[0] == 7, "not a copy"
    words = memoryview(data).cast("Q")
    assert check_length(words, 8).format == "B"
    for length in (7, 9):
        with pytest.raises(errors.ShortReadError) as info:
            check_length(data, length)
        assert info.value.transient
    with pytest.raises(errors.UsageError):
        check_length("text", 4)
    with pytest.raises(errors.UsageError):
        check_length(memoryview(data)[::2], 4)


async def test_helpers_with_a_minimal_source() -> None:
    source = Minimal()
    assert isinstance(source, Source)
    await open_source(source)
    buffer = bytearray(1000)
    await read_into_source(source, 5, memoryview(buffer))
    assert buffer == DATA[5:1005]
    assert await collect(source, 7, 5000) == DATA[7:5007]
    assert await collect(source, 7, 0) == b""
    await aclose_source(source)


async def test_stream_source_checks_the_total() -> None:
    class Bad(BaseSource):
        chunks: tuple[bytes, ...] = ()

        async def stream(self, offset: int, length: int) -> Any:
            for chunk in self.chunks:
                yield chunk

    bad = Bad()
    for chunks in ((), (b"1234", b"56789"), (b"1234", b"567890", b"1")):
        bad.chunks = chunks
        with pytest.raises(errors.ShortReadError):
            await collect(bad, 0, 10)


async def test_base_source_defaults() -> None:
    class Short(BaseSource):
        size = 100

        async def read(self, offset: int, length: int) -> bytes:
            return b"x" * (length - 1)

    source = Short()
    assert source.version is None
    with pytest.raises(errors.ShortReadError):
        await source.read_into(0, memoryview(bytearray(10)))


# Memory.


async def test_memory() -> None:
    data = bytearray(DATA)
    source = MemorySource(data)
    assert source.size == len(DATA)
    source.data[0] ^= 0xFF
    assert (await source.read(0, 1))[0] == DATA[0] ^ 0xFF, "zero copy"
    clone = source.clone()
    data[1] ^= 0xFF
    assert (await clone.read(1, 1))[0] == DATA[1] ^ 0xFF
    with pytest.raises(errors.UsageError):
        await source.read(len(DATA), 1)
    buffer = bytearray(100)
    await source.read_into(50, memoryview(buffer))
    assert buffer == DATA[50:150]
    assert MemorySource(b"").size == 0
    assert MemorySource(memoryview(bytes(16)).cast("Q")).size == 16
    with pytest.raises(errors.UsageError):
        MemorySource("text")


# Functions.


async def read_data(offset: int, length: int) -> bytes:
    return DATA[offset : offset + length]


async def test_function() -> None:
    source = FunctionSource(read_data, len(DATA), portable=True, version="7")
    assert await source.read(10, 20) == DATA[10:30]
    clone = source.clone()
    assert await clone.read(10, 20) == DATA[10:30]
    assert clone.size == source.size
    assert clone.version == "7"  # type: ignore[attr-defined]


async def test_function_clone() -> None:
    with pytest.raises(errors.UnsupportedError, match="portable=True"):
        FunctionSource(read_data, len(DATA)).clone()
    made = []

    def again() -> Any:
        made.append(1)
        return read_data

    source = FunctionSource(read_data, len(DATA), clone=again)
    assert await source.clone().clone().read(1, 2) == DATA[1:3]
    assert len(made) == 2
    whole = FunctionSource(read_data, len(DATA), clone=lambda: MemorySource(DATA)).clone()
    assert isinstance(whole, MemorySource)


async def test_function_errors() -> None:
    failure: BaseException = RuntimeError("bug")

    async def failing(offset: int, length: int) -> bytes:
        raise failure

    source = FunctionSource(failing, 100)
    with pytest.raises(errors.SourceError) as info:
        await source.read(0, 1)
    assert not info.value.transient
    assert info.value.__cause__ is failure
    for cause in (ConnectionResetError(104, "reset"), TimeoutError()):
        failure = cause
        with pytest.raises(errors.SourceError) as info:
            await source.read(0, 1)
        assert info.value.transient
    failure = errors.SourceChangedError("other")
    with pytest.raises(errors.SourceChangedError):
        await source.read(0, 1)
    failure = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await source.read(0, 1)
    with pytest.raises(errors.ShortReadError):
        await FunctionSource(lambda o, n: read_data(o, n - 1), 100).read(0, 10)
    with pytest.raises(errors.UsageError, match="async def"):
        await FunctionSource(lambda o, n: b"x" * n, 100).read(0, 10)  # type: ignore[arg-type, return-value]
    with pytest.raises(errors.UsageError):
        FunctionSource(read_data, -1)


# Files.


@pytest.mark.parametrize("cached", [True, False])
async def test_file(path: Path, cached: bool) -> None:
    source = FileSource(path)
    with pytest.raises(errors.UsageError, match="open"):
        _ = source.size
    await source.open()
    assert source._file is not None
    source._file.nowait = cached
    assert source.size == len(DATA)
    assert source.version is not None
    for offset, length in ((0, 0), (0, 1), (5, 4096), (1, 300_000), (0, len(DATA))):
        assert await source.read(offset, length) == DATA[offset : offset + length]
        buffer = bytearray(length)
        await source.read_into(offset, memoryview(buffer))
        assert buffer == DATA[offset : offset + length]
        assert await collect(source, offset, length) == DATA[offset : offset + length]
    with pytest.raises(errors.UsageError):
        await source.read(len(DATA), 1)
    await source.aclose()
    await source.aclose()
    with pytest.raises(errors.ClosedError):
        await source.read(0, 1)
    with pytest.raises(errors.ClosedError):
        await source.open()


async def test_many_reads_at_once(path: Path) -> None:
    source = FileSource(path)
    await source.open()
    spans = [(i * 9973, 300_000) for i in range(100)]
    found = await asyncio.gather(*(source.read(*span) for span in spans))
    for (offset, length), data in zip(spans, found, strict=True):
        assert data == DATA[offset : offset + length]
    await source.aclose()


async def test_close_during_reads(path: Path) -> None:
    source = FileSource(path)
    await source.open()
    assert source._file is not None
    file = source._file
    reads = [asyncio.ensure_future(source.read(0, 2_000_000)) for _ in range(8)]
    await asyncio.sleep(0)  # they have begun
    await source.aclose()
    for data in await asyncio.gather(*reads):
        assert data == DATA[:2_000_000]
    assert file.fd == -1, "the last read closed it"


async def test_file_open_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await FileSource(tmp_path / "none").open()
    with pytest.raises(IsADirectoryError):
        await FileSource(tmp_path).open()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(errors.UsageError):
        await FileSource(tmp_path / "fifo").open()


@pytest.mark.parametrize("length", [4096, 2_000_000])
@pytest.mark.parametrize("change", ["write", "truncate", "grow", "touch"])
async def test_a_changed_file_is_an_error(path: Path, change: str, length: int) -> None:
    source = FileSource(path)
    await source.open()
    if change == "write":
        with path.open("r+b") as file:
            file.write(DATA[::-1])
    elif change == "truncate":
        os.truncate(path, 1000)
    elif change == "grow":
        os.truncate(path, len(DATA) + 1)
    os.utime(path, ns=(1, 1))  # does not depend on the resolution of the clock
    for attempt in (
        source.read(0, length),
        source.read_into(0, memoryview(bytearray(length))),
        collect(source, 0, length),
    ):
        with pytest.raises(errors.SourceChangedError):
            await attempt
    clone = source.clone()
    with pytest.raises(errors.SourceChangedError):
        await clone.open()
    await source.aclose()


async def test_a_replaced_file_stays_readable(path: Path, tmp_path: Path) -> None:
    source = FileSource(path)
    await source.open()
    (tmp_path / "new").write_bytes(DATA[::-1])
    (tmp_path / "new").rename(path)
    assert await source.read(0, 100) == DATA[:100]
    clone = source.clone()
    late = source.clone()
    await clone.open()
    await source.aclose()
    assert await clone.read(0, 100) == DATA[:100]
    assert clone.version == source.version
    await late.open()  # still through the clone
    await clone.aclose()
    assert await late.read(0, 100) == DATA[:100]
    await late.aclose()
    with pytest.raises(errors.SourceChangedError):
        await late.clone().open()


async def test_a_file_clone_on_another_loop(path: Path) -> None:
    source = FileSource(path)
    await source.open()
    clone = source.clone()

    async def use() -> bytes:
        await clone.open()
        try:
            return bytes(await clone.read(100, 1_000_000))
        finally:
            await clone.aclose()

    assert await asyncio.to_thread(asyncio.run, use()) == DATA[100:1_000_100]
    await source.aclose()


async def test_cancelled_read_into_leaves_the_buffer_alone(path: Path) -> None:
    source = FileSource(path, max_threads=1)
    await source.open()
    assert source._executor is not None
    hold = threading.Event()
    source._executor.submit(hold.wait)
    buffer = bytearray(len(DATA))
    task = asyncio.ensure_future(source.read_into(0, memoryview(buffer)))
    await asyncio.sleep(0)  # it has begun
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done(), "waits for the thread"
    hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert buffer == bytes(len(DATA)), "a cancelled read stops before its first piece"
    assert await source.read(0, 10) == DATA[:10]
    await source.aclose()


async def test_file_does_not_need_the_default_executor(path: Path) -> None:
    loop = asyncio.get_running_loop()
    hold = threading.Event()
    blocked = [loop.run_in_executor(None, hold.wait) for _ in range(64)]
    source = FileSource(path)
    await source.open()
    assert await source.read(0, 1_000_000) == DATA[:1_000_000]
    await source.aclose()
    hold.set()
    await asyncio.gather(*blocked)


async def test_leaving_a_file_stream_early(path: Path) -> None:
    source = FileSource(path)
    await source.open()
    async with contextlib.aclosing(source.stream(0, len(DATA))) as chunks:
        async for chunk in chunks:
            assert chunk == DATA[: len(chunk)]
            break
    await source.aclose()


def test_an_unclosed_file_warns(path: Path) -> None:
    async def forget() -> None:
        await FileSource(path).open()

    with pytest.warns(ResourceWarning, match="unclosed"):
        asyncio.run(forget())


# as_source.


async def reader(offset: int, length: int) -> bytes:
    return bytes(length)


@pytest.mark.parametrize(
    ("obj", "options", "kind"),
    [
        (b"abc", {}, MemorySource),
        (bytearray(3), {}, MemorySource),
        (memoryview(b"abc"), {}, MemorySource),
        ("some/path", {}, FileSource),
        ("C:name", {}, FileSource),
        (Path("some/path"), {"max_threads": 2}, FileSource),
        ("file:///tmp/with%20space", {}, FileSource),
        ("http://host/x", {"timeout": 3}, HttpSource),
        ("HTTPS://host/x", {}, HttpSource),
        (reader, {"size": 10}, FunctionSource),
        (functools.partial(reader), {"size": 10, "portable": True}, FunctionSource),
    ],
)
def test_as_source(obj: Any, options: dict[str, Any], kind: type) -> None:
    assert type(as_source(obj, **options)) is kind


def test_as_source_file_url() -> None:
    source = as_source("file:///tmp/with%20space")
    assert isinstance(source, FileSource)
    assert source.path == "/tmp/with space"


def test_as_source_itself() -> None:
    for source in (Minimal(), HttpSource("http://host/x"), MemorySource(b"")):
        assert as_source(source) is source
    with pytest.raises(errors.UsageError, match="no options"):
        as_source(Minimal(), timeout=3)


@pytest.mark.parametrize(
    ("obj", "options", "words"),
    [
        ("ftp://host/key", {}, "known are"),
        ("s3a://bucket/key", {}, "s3://"),
        ("file://other/x", {}, "this machine"),
        ("http:///x", {}, "not an http"),
        (reader, {}, "size="),
        (b"x", {"size": 3}, "MemorySource"),
        ("path", {"timeuot": 3}, "timeuot"),
        (3, {}, "int"),
        (None, {}, "NoneType"),
        (Minimal, {}, "type"),
    ],
)
def test_as_source_refuses(obj: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.UsageError, match=words):
        as_source(obj, **options)


def test_importing_sources_is_light() -> None:
    code = (
        "import sys; import aiouffd.sources;"
        "sys.exit(any(m in sys.modules for m in ('aiohttp', 'yarl', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_aiohttp() -> None:
    code = """
import asyncio, sys
sys.modules["aiohttp"] = None
from aiouffd.sources import HttpSource
from aiouffd.errors import UnsupportedError
try:
    asyncio.run(HttpSource("http://host/x").open())
except UnsupportedError as exc:
    assert "pip install 'aiohttp>=3.9'" in str(exc), exc
else:
    sys.exit("no error")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
