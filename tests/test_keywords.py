"""What people write to open something: sizes, keywords, and what is said of wrong ones."""

from __future__ import annotations

import array
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import UsageError
from aiouffd.sources import MemorySource
from aiouffd.util.keywords import SETTINGS, meant, size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("64k", 65536), ("64K", 65536), ("64 KiB", 65536), ("4096", 4096), ("2MB", 2 << 20), (8, 8)],
)
def test_sizes(text: Any, size: int) -> None:
    assert size_in_bytes("block_size", text) == size


@pytest.mark.parametrize("wrong", ["", "k", "1.5M", "-1", "64 kilo", 1.5, None, True, b"64k"])
def test_what_is_no_size(wrong: Any) -> None:
    with pytest.raises(UsageError, match="readahead is a number of bytes"):
        size_in_bytes("readahead", wrong)


def test_sizes_of_a_buffer() -> None:
    with aiouffd.sync.open(b"abc", block_size="128K", readahead="0") as buf:
        assert buf.stats.block_size == 128 << 10
    for settings in ({"block_size": "lots"}, {"readahead": "-1"}, {"block_size": "3k"}):
        with pytest.raises(UsageError):
            aiouffd.open(b"abc", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [b"abc", "file", Path("file"), "nbd://host/name"])
def test_a_keyword_that_nobody_has(source: Any) -> None:
    with pytest.raises(UsageError, match=r"no keyword blocksize \(did you mean block_size=\?\)"):
        aiouffd.open(source, blocksize=4096)
    with pytest.raises(UsageError, match=r"no keyword xyzzy \(it has"):
        aiouffd.sync.open(source, xyzzy=1)


def test_a_keyword_of_the_source() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(UsageError, match="did you mean headers="):
        aiouffd.open("http://127.0.0.1/x", header={})


def test_a_keyword_where_there_can_be_none() -> None:
    with pytest.raises(UsageError, match="did you mean readahead="):
        aiouffd.open(MemorySource(b"abc"), read_ahead=0)


def test_all_settings_can_be_meant() -> None:
    parameters = inspect.signature(aiouffd.open).parameters.values()
    assert set(SETTINGS) == {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert meant(["prefetch-version"], SETTINGS) == "did you mean prefetch_version=?"
    assert meant(["q"], SETTINGS) is None


def test_the_other_ways_to_open_take_the_same() -> None:
    parameters = inspect.signature(aiouffd.open).parameters
    for function, result in (
        (aiouffd.sync.open, "SyncBuffer"),
        (aiouffd.open_file, "BufferFile"),
    ):
        signature = inspect.signature(function)
        assert signature.parameters == parameters
        assert signature.return_annotation == result


def test_what_is_public() -> None:
    assert all(hasattr(aiouffd, name) for name in aiouffd.__all__)
    assert {"open", "open_file", "LazyBuffer", "sync", "Userfaultfd"} <= set(aiouffd.__all__)


@pytest.mark.parametrize("buffer", [aiouffd.LazyBuffer, aiouffd.sync.SyncBuffer])
def test_an_index_is_typed(buffer: type) -> None:
    overloads = typing.get_overloads(buffer.__getitem__)  # type: ignore[attr-defined]
    assert [each.__annotations__["return"] for each in overloads] == ["int", "bytes"]


def refused(call: Any, *parts: str) -> None:
    """It is an error that says all of this."""
    with pytest.raises((UsageError, TypeError, AttributeError)) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("opener", [aiouffd.open, aiouffd.sync.open, aiouffd.open_file])
def test_a_mode_as_for_a_file(opener: Any) -> None:
    refused(lambda: opener(b"abc", "rb"), "after the source come keywords, not 'rb'", "open_file")
    refused(lambda: opener(b"abc", 65536), "not 65536", "block_size")
    refused(lambda: opener(b"abc", mode="rb"), "has no keyword mode", "for reading, as bytes")
    refused(lambda: opener("file", encoding="utf-8"), "io.TextIOWrapper")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache": 3}, "cache is a path, not 3"),
        ({"cache": ""}, "cache is a path, not ''"),
        ({"prefetch": 3}, "prefetch is a path, not 3"),
        ({"kind": 3}, "kind is one of anonymous, memfd, hugetlb, hugetlb-memfd, not 3"),
        ({"errors": "soft", "deadline": "3"}, "deadline is a positive number of seconds, not '3'"),
        ({"errors": "soft", "deadline": float("nan")}, "a positive number of seconds, not nan"),
        ({"deadline": 3}, "deadline goes with errors='soft'"),
        ({"trace": 3}, "trace is a function"),
    ],
)
def test_values_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    refused(lambda: aiouffd.open(b"abc", **settings), said)


def test_what_is_no_source(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with path.open("rb") as file:
        refused(lambda: aiouffd.open(file), "it is a file: give its path")
    refused(lambda: aiouffd.open(array.array("B", b"abc")), "memoryview(...).cast('B')")
    refused(lambda: aiouffd.open(""), "the path is empty")
    refused(lambda: aiouffd.open("https:/host/name"), "write https://", "./ before it")
    # A file of that name.
    assert aiouffd.open("./https:/host/name") is not None
    refused(lambda: aiouffd.open("redis://host/0/key?ssl=1"), "has no parameter ssl", "keywords")


async def test_plain_with_and_async_with() -> None:
    refused(lambda: aiouffd.open(b"abc").__enter__(), "`async with`", "aiouffd.sync.open")
    buffer = aiouffd.open(b"abc")
    with pytest.raises(TypeError, match=r"`async with`; for plain `with`"), buffer:
        pass
    with pytest.raises(TypeError, match="goes with plain `with`"):
        async with aiouffd.sync.open(b"abc"):
            pass


def test_names_of_the_other_kind() -> None:
    refused(lambda: aiouffd.open(b"abc").close(), "`await buf.aclose()`")
    with aiouffd.sync.open(b"abc") as buf:
        refused(lambda: buf.aclose(), "close() closes it")
        refused(lambda: buf.find("b"), "not str; text.encode()")
        refused(lambda: "b" in buf, "not str")
        refused(lambda: 1.5 in buf, "not float")
        refused(lambda: buf.fetch("0"), "'str' object cannot be interpreted as an integer")
        assert repr(buf).startswith("<SyncBuffer")
        assert "<b>SyncBuffer</b>" in buf._repr_html_()


def test_a_buffer_that_nobody_closed_says_how() -> None:
    buf = aiouffd.sync.open(b"abc")
    with pytest.warns(ResourceWarning, match="unclosed <SyncBuffer .*`with` or buf.close()"):
        del buf  # collected at once


async def test_sizes_elsewhere(tmp_path: Path) -> None:
    async with aiouffd.Pager() as pager:
        region = pager.map("1 MiB", block_size="64K")
        assert (region.length, region.block_size) == (1 << 20, 64 << 10)
        refused(lambda: pager.map("big"), "length is a number of bytes, not 'big'")
        refused(lambda: pager.map(4096, deadline=-1), "deadline is a positive number of seconds")
    path = tmp_path / "socket"
    async with aiouffd.serve.listen(path, source=b"abc", block_size="128K", readahead="1M"):
        pass
    for wrong in ({"block_size": "x"}, {"keep": "x"}, {"readahead": "x"}, {"deadline": "x"}):
        refused(lambda wrong=wrong: aiouffd.serve.listen(path, source=b"abc", **wrong), "'x'")
    with pytest.raises(UsageError, match="did you mean block_size="):
        async with aiouffd.serve.listen(path, source=b"abc", blocksize=65536):
            pass
