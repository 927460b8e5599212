"""What people write to open something: sizes, keywords, and what is said of wrong ones."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import UsageError
from aiouffd.keywords import SETTINGS, meant, size_in_bytes
from aiouffd.sources import MemorySource


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
