"""Tensors over lazy buffers: the same as the safetensors library's, but only what is touched comes;
and a header that lies is an error before anything relies on it."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd import ClosedError, SourceError, UnsupportedError, UsageError
from aiouffd.formats import safetensors as module
from aiouffd.formats.safetensors import (
    FormatError,
    SyncTensors,
    Tensors,
    load,
    load_shards,
    load_shards_sync,
    load_sync,
    parse_header,
    parse_index,
)
from aiouffd.util import json_pieces
from tests.support import ROOT, content, environment

BLOCK = 4096


class Asked:
    """A source over bytes that remembers what it was asked for; see `opened`."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []
        self.error: Exception | None = None

    async def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        if self.error is not None:
            raise self.error
        return self.data[offset : offset + length]

    def open(self, **options: Any) -> aiouffd.LazyBuffer:
        options = {"block_size": BLOCK, "readahead": 0, **options}
        return aiouffd.open(self.read, size=len(self.data), **options)


def opened(data: bytes, **options: Any) -> aiouffd.LazyBuffer:
    return Asked(data).open(**options)


def raw_file(header: Any, data: bytes = b"") -> bytes:
    """A file with any header: bytes as they are, all else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def by_library(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Name to type, shape and bytes, as the safetensors library reads them."""
    return {
        name: (found["dtype"], list(found["shape"]), bytes(found["data"]))
        for name, found in safetensors.deserialize(data)
    }


def by_us(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        info.name: (
            info.dtype,
            list(info.shape),
            data[info.offset : info.offset + info.length],
        )
        for info in parse_header(data).tensors.values()
    }


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """One of each type that NumPy has; large enough for blocks of their own."""
    random = np.random.default_rng(7)
    found = {
        code: random.integers(0, 2 if code == "?" else 100, (30, 500)).astype(code)
        for code in ("?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8")
    }
    return {
        **found,
        "scalar": np.array(2.5, "f4"),
        "empty": np.zeros((3, 0, 5), "i8"),
        "größe/ ☃": np.arange(7, dtype="u1"),
    }


@pytest.fixture(scope="module")
def model() -> bytes:
    return safetensors.numpy.save(arrays(), {"format": "np", "made by": "tëst"})


# -------------------------------------------------------------------- what is there


async def test_same_as_the_library(model: bytes) -> None:
    known = safetensors.numpy.load(model)
    async with opened(model) as buf:
        tensors = await load(buf)
        assert isinstance(tensors, Tensors)
        assert set(tensors) == set(known)
        assert len(tensors) == len(known)
        assert tensors.metadata == {"format": "np", "made by": "tëst"}
        found = await asyncio.to_thread(lambda: {name: a.copy() for name, a in tensors.items()})
    for name, array in known.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


async def test_in_the_order_of_the_data() -> None:
    header = {"z": entry("U8", [2], 2, 4), "a": entry("U8", [2], 0, 2), "e": entry("U8", [0], 2, 2)}
    async with opened(raw_file(header, b"abcd")) as buf:
        assert list(await load(buf)) == ["a", "e", "z"]


async def test_nothing_is_fetched_but_the_header(model: bytes) -> None:
    end = 8 + int.from_bytes(model[:8], "little")
    source = Asked(model)
    async with source.open() as buf:
        tensors = await load(buf)
        asked = list(source.reads)
        assert asked == [(0, BLOCK)]
        for name, array in tensors.items():
            assert array.shape == tensors.info[name].shape
            assert array.base is not None
            tensors.raw(name)
        assert "scalar" in tensors
        assert "nothing" not in tensors
        assert tensors.get("nothing") is None
        assert tensors == tensors
        assert tensors != await load(buf)
        assert repr(tensors) == f"<Tensors: {len(tensors)} tensors, {len(model) - end} bytes>"
        assert source.reads == asked
        assert buf.stats.faulted_blocks == 0


async def test_a_touch_fetches_what_it_touches(model: bytes) -> None:
    known = safetensors.numpy.load(model)
    source = Asked(model)
    async with source.open() as buf:
        tensors = await load(buf)
        source.reads.clear()
        info = tensors.info["f8"]
        row = await asyncio.to_thread(tensors["f8"][11].copy)
        np.testing.assert_array_equal(row, known["f8"][11])
        first = info.offset + 11 * 4000
        blocks = range(first // BLOCK, (first + 3999) // BLOCK + 1)
        assert sorted(source.reads) == [(block * BLOCK, BLOCK) for block in blocks]
        assert buf.stats.faulted_blocks == len(blocks)


async def test_fetch_makes_them_resident(model: bytes) -> None:
    """Then they can be touched on the loop's own thread: warnings are errors here."""
    known = safetensors.numpy.load(model)
    source = Asked(model)
    async with source.open() as buf:
        tensors = await load(buf)
        source.reads.clear()
        await tensors.fetch("f8", "i2", "empty", "f8")
        for name in ("f8", "i2"):
            info = tensors.info[name]
            assert buf.resident(info.offset, info.length) == [
                (info.offset, info.offset + info.length)
            ]
            np.testing.assert_array_equal(tensors[name], known[name])
        assert tensors["empty"].size == 0
        assert buf.stats.faulted_blocks == 0
        wanted = tensors.info["f8"].length + tensors.info["i2"].length
        assert wanted <= sum(length for _, length in source.reads) <= wanted + 4 * BLOCK


async def test_fetch_asks_for_neighbours_in_one_request() -> None:
    data = content(16 * BLOCK)
    header = {str(n): entry("U8", [BLOCK], n * BLOCK, (n + 1) * BLOCK) for n in range(16)}
    text = json.dumps(header).encode().ljust(BLOCK - 8)
    source = Asked(raw_file(text, data))
    async with source.open() as buf:
        tensors = await load(buf)
        source.reads.clear()
        await tensors.fetch("5", "3", "4", "9")
        assert sorted(source.reads) == [(4 * BLOCK, 3 * BLOCK), (10 * BLOCK, BLOCK)]
        await tensors.fetch()
        with pytest.raises(KeyError, match="nothing"):
            await tensors.fetch("12", "nothing")
        assert len(source.reads) == 2


async def test_fetch_raises_what_the_source_raised(model: bytes) -> None:
    source = Asked(model)
    async with source.open(errors="soft") as buf:
        tensors = await load(buf)
        source.error = SourceError("broken", transient=False)
        with pytest.raises(SourceError, match="broken"):
            await tensors.fetch("f8", "i8")
        source.error = None
        await tensors.fetch("f8", "i8")
        assert tensors["f8"].sum() == arrays()["f8"].sum()


async def test_pin_by_the_place(model: bytes) -> None:
    async with opened(model) as buf:
        tensors = await load(buf)
        info = tensors.info["i4"]
        assert tensors.buffer("i4") is buf
        async with buf.pin(info.offset, info.length) as view:
            assert view == arrays()["i4"].tobytes()


async def test_writable_as_the_buffer_is(model: bytes) -> None:
    async with opened(model) as buf:
        assert not (await load(buf))["f4"].flags.writeable
    async with opened(model, writable=True) as buf:
        tensors = await load(buf)
        await tensors.fetch("f4")
        tensors["f4"][3] = 17
        assert (tensors["f4"][3] == 17).all()
        assert tensors["f4"][2, 2] == arrays()["f4"][2, 2]


async def test_closed(model: bytes) -> None:
    async with opened(model) as buf:
        tensors = await load(buf)
    assert tensors.info["f4"].dtype == "F32"
    with pytest.raises(ClosedError):
        tensors["f4"]
    with pytest.raises(ClosedError):
        await tensors.fetch("f4")
    with pytest.raises(ClosedError):
        await load(buf)


async def test_unaligned() -> None:
    """The library pads headers; others need not."""
    numbers = np.arange(1000, dtype="<f8")
    data = raw_file({"a": entry("F64", [1000], 0, 8000)}, numbers.tobytes())
    data = data if (len(data) - 8000) % 8 else raw_file(data[8:-8000] + b" ", numbers.tobytes())
    async with opened(data) as buf:
        tensors = await load(buf)
        await tensors.fetch("a")
        assert not tensors["a"].flags.aligned
        np.testing.assert_array_equal(tensors["a"], numbers)


async def test_long_headers_are_not_parsed_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def parse(data: bytes, size: int) -> Any:
        threads.append(threading.current_thread())
        return parse_header(data, size)

    monkeypatch.setattr(module, "parse_header", parse)
    many = {f"tensor {n}": entry("U8", [1], n, n + 1) for n in range(5000)}
    async with opened(raw_file(many, bytes(5000))) as buf:
        assert len(await load(buf)) == 5000
    async with opened(raw_file({})) as buf:
        assert len(await load(buf)) == 0
    assert threads[0] is not threading.current_thread()
    assert threads[1] is threading.current_thread()


# ---------------------------------------------------------- types that NumPy lacks

NUMBERS = np.array([0.0, 1.0, -1.5, 0.25, 2.0, -0.5], "f4")
EXTENDED = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


def extended_file() -> bytes:
    header, data = {}, b""
    for name, dtype in EXTENDED.items():
        numbers = np.abs(NUMBERS) + 1 if name == "F8_E8M0" else NUMBERS
        part = numbers.astype(dtype).tobytes()
        header[name] = entry(name, [2, 3], len(data), len(data) + len(part))
        data += part
    return raw_file(header, data)


async def test_types_of_ml_dtypes() -> None:
    data = extended_file()
    assert by_us(data) == by_library(data)
    async with opened(data) as buf:
        tensors = await load(buf)
        await buf.fetch()
        for name, dtype in EXTENDED.items():
            assert tensors[name].dtype == dtype
            assert tensors[name].shape == (2, 3)
            if name != "F8_E8M0":  # which has powers of two alone
                np.testing.assert_array_equal(tensors[name].astype("f4").ravel(), NUMBERS)
        # Without ml_dtypes as its own witness: bfloat16 is the upper half of a float32.
        bits = tensors.raw("BF16").astype("u4") << 16
        np.testing.assert_array_equal(bits.view("f4").ravel(), NUMBERS)
        assert tensors.raw("F8_E5M2").dtype == np.uint8
        assert tensors.raw("F8_E5M2").shape == (2, 3)


async def test_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    async with opened(extended_file()) as buf:
        tensors = await load(buf)
        await buf.fetch()
        with pytest.raises(UnsupportedError, match=r"'BF16' is BF16.*pip install.*ml_dtypes.*raw"):
            tensors["BF16"]
        assert tensors.raw("BF16").dtype == np.uint16


async def test_parts_of_bytes() -> None:
    header = {"four": entry("F4", [2, 6], 0, 6), "six": entry("F6_E3M2", [4, 2], 6, 12)}
    data = raw_file(header, b"abcdefghijkl")
    assert by_us(data) == by_library(data)
    async with opened(data) as buf:
        tensors = await load(buf)
        await buf.fetch()
        for name in ("four", "six"):
            with pytest.raises(UnsupportedError, match="parts of bytes"):
                tensors[name]
        assert tensors.raw("four").tobytes() == b"abcdef"
        assert tensors.raw("six").tobytes() == b"ghijkl"


# --------------------------------------------------------------- the least of files


@pytest.mark.parametrize(
    ("header", "data", "shapes"),
    [
        ({}, b"", {}),
        ({"__metadata__": {}}, b"", {}),
        ({"__metadata__": None}, b"", {}),
        (b"{}   ", b"", {}),
        ({"a": entry("F32", [0], 0, 0)}, b"", {"a": (0,)}),
        ({"a": entry("F32", [0, 5], 0, 0), "b": entry("U8", [0], 0, 0)}, b"", None),
        ({"a": entry("F32", [], 0, 4)}, b"abcd", {"a": ()}),
        ({"": entry("U8", [1, 1, 1], 0, 1)}, b"a", {"": (1, 1, 1)}),
        ({"a": {**entry("U8", [1], 0, 1), "new": [1, {"x": None}]}}, b"a", {"a": (1,)}),
    ],
)
async def test_least(header: Any, data: bytes, shapes: Any) -> None:
    file = raw_file(header, data)
    assert by_us(file) == by_library(file)
    async with opened(file) as buf:
        tensors = await load(buf)
        await tensors.fetch(*tensors)
        found = {name: array.shape for name, array in tensors.items()}
        assert found == (shapes if shapes is not None else {"a": (0, 5), "b": (0,)})
        assert b"".join(array.tobytes() for array in tensors.values()) == data


# ------------------------------------------------------------------ hostile headers

OK = entry("U8", [4], 0, 4)
#: What is wrong with it, a file, and what the message has to say.
MALFORMED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "0 bytes are too few"),
    ("seven bytes", bytes(7), "7 bytes are too few"),
    ("no header", bytes(8), "not a JSON object"),
    ("header too long", (100_000_001).to_bytes(8, "little") + b"{}", "100000001 bytes is longer"),
    ("longest header", (100_000_000).to_bytes(8, "little") + b"{}", "not within a file of 10"),
    ("header of 2**64 - 1", b"\xff" * 8 + b"{}", "longer than"),
    ("header past the end", (3).to_bytes(8, "little") + b"{}", "not within a file of 10 bytes"),
    ("list", raw_file([]), "not a JSON object"),
    ("byte order mark", raw_file("\ufeff{}".encode()), "not a JSON object"),
    ("UTF-16", raw_file("{}".encode("utf-16-le")), "not JSON"),
    ("no UTF-8", raw_file(b'{"\xff": 1}'), "not JSON"),
    ("cut JSON", raw_file(b'{"a": '), "not JSON"),
    ("two objects", raw_file(b"{}{}"), "not JSON"),
    ("null bytes after it", raw_file(b"{}\0\0"), "not JSON"),
    ("deep", raw_file(b'{"a":' + b"[" * 100_000), "not JSON"),
    ("deep objects", raw_file(b'{"a":' * 100_000), "not JSON"),
    ("NaN", raw_file(b'{"a": NaN}'), "NaN"),
    ("many digits", raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    ("half a character", raw_file(b'{"\\ud800": 1}'), "not valid text"),
    (
        "two shapes",
        raw_file(b'{"a":{"dtype":"U8","shape":[1],"shape":[4],"data_offsets":[0,4]}}', b"abcd"),
        "'shape' comes twice",
    ),
    ("metadata of numbers", raw_file({"__metadata__": {"a": 1}}), "__metadata__"),
    ("metadata as a list", raw_file({"__metadata__": []}), "__metadata__"),
    ("half a character in metadata", raw_file(b'{"__metadata__": {"a": "\\udfff"}}'), "valid text"),
    ("tensor as text", raw_file({"a": "F32"}), "'a' is not described"),
    ("nothing said", raw_file({"a": {}}), "unknown dtype None"),
    ("unknown dtype", raw_file({"a": entry("F128", [0], 0, 0)}), "'F128'.*known are F4, "),
    ("dtype as a list", raw_file({"a": {**OK, "dtype": ["U8"]}}, b"abcd"), "unknown dtype"),
    ("no shape", raw_file({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"abcd"), "shape None"),
    ("negative size", raw_file({"a": {**OK, "shape": [-4]}}, b"abcd"), "not a list of sizes"),
    ("two negatives", raw_file({"a": {**OK, "shape": [-2, -2]}}, b"abcd"), "not a list of sizes"),
    ("size as a float", raw_file({"a": {**OK, "shape": [4.0]}}, b"abcd"), "not a list of sizes"),
    ("size as a bool", raw_file({"a": {**OK, "shape": [4, True]}}, b"abcd"), "not a list of"),
    ("size as text", raw_file({"a": {**OK, "shape": ["4"]}}, b"abcd"), "not a list of sizes"),
    ("size too large", raw_file({"a": {**OK, "shape": [1 << 64]}}, b"abcd"), "not a list of sizes"),
    ("overflow", raw_file({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}), "too large"),
    ("overflow to 4", raw_file({"a": entry("U8", [(1 << 62) + 1, 4], 0, 4)}, b"abcd"), "too large"),
    ("overflow of bits", raw_file({"a": entry("F64", [1 << 61], 0, 0)}), "too large"),
    ("no offsets", raw_file({"a": {"dtype": "U8", "shape": [4]}}, b"abcd"), "data_offsets None"),
    ("one offset", raw_file({"a": {**OK, "data_offsets": [0]}}, b"abcd"), "not a begin and an end"),
    ("three", raw_file({"a": {**OK, "data_offsets": [0, 4, 4]}}, b"abcd"), "not a begin and"),
    ("negative", raw_file({"a": {**OK, "data_offsets": [-4, 0]}}, b"abcd"), "not a begin and an"),
    ("backwards", raw_file({"a": {**OK, "data_offsets": [4, 0]}}, b"abcd"), "data_offsets 4 to 0"),
    ("too short", raw_file({"a": {**OK, "shape": [3]}}, b"abcd"), "is 3 bytes"),
    ("too long", raw_file({"a": {**OK, "shape": [5]}}, b"abcd"), "is 5 bytes"),
    ("half a byte", raw_file({"a": entry("F4", [7], 0, 4)}, b"abcd"), "ends within a byte"),
    ("past the end", raw_file({"a": entry("U8", [5], 0, 5)}, b"abcd"), "its tensors need.*cut"),
    ("far past the end", raw_file({"a": entry("U8", [1 << 60], 0, 1 << 60)}), "its tensors need"),
    ("bytes left over", raw_file({"a": OK}, b"abcdef"), "2 bytes after the last tensor"),
    ("bytes of nobody", raw_file({}, b"abcdef"), "6 bytes after the last tensor"),
    ("hole first", raw_file({"a": entry("U8", [3], 1, 4)}, b"abcd"), "the header and 'a' leave"),
    (
        "hole",
        raw_file({"a": entry("U8", [1], 0, 1), "b": entry("U8", [2], 2, 4)}, b"abcd"),
        "'a' and 'b' leave a hole",
    ),
    (
        "overlap",
        raw_file({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}, b"abcd"),
        "'a' and 'b' overlap",
    ),
    ("the same bytes", raw_file({"a": OK, "b": OK}, b"abcd"), "'a' and 'b' overlap"),
    (
        "empty inside another",
        raw_file({"a": OK, "b": entry("U8", [0], 2, 2)}, b"abcd"),
        "'a' and 'b' overlap",
    ),
    ("long name", raw_file({"n" * 100_000: 1}), r"nnn\.\.\.nnn"),
]
#: What the library lets pass, though its format forbids the first three.
STRICTER = [
    ("leading space", raw_file(b" {}"), "not a JSON object"),
    (
        "twice",
        raw_file(b'{"a": %b, "a": %b}' % (2 * (json.dumps(OK).encode(),)), b"abcd"),
        "'a' comes twice",
    ),
    (
        "twice in disguise",
        raw_file(b'{"a": %b, "\\u0061": %b}' % (2 * (json.dumps(OK).encode(),)), b"abcd"),
        "'a' comes twice",
    ),
    ("no library has it", raw_file({"a": entry("U8", [0, 1 << 62, 8], 0, 0)}), "too large"),
    ("dimensions", raw_file({"a": entry("U8", [1] * 65, 0, 1)}, b"a"), "65 dimensions"),
]


@pytest.mark.parametrize(
    ("file", "message"),
    [pytest.param(file, message, id=what) for what, file, message in MALFORMED + STRICTER],
)
async def test_malformed(file: bytes, message: str) -> None:
    """One clear error; nothing faulted, nothing asked for that lies behind the header."""
    source = Asked(file)
    async with source.open() as buf:
        with pytest.raises(FormatError, match=message) as caught:
            await load(buf)
        assert isinstance(caught.value, ValueError)
        assert len(str(caught.value)) < 500
        end = 8 + int.from_bytes(file[:8], "little")
        assert all(offset < max(8, min(end, len(file))) for offset, _ in source.reads)
        assert buf.stats.faulted_blocks == 0


@pytest.mark.parametrize("file", [pytest.param(file, id=what) for what, file, _ in MALFORMED])
def test_malformed_for_the_library_too(file: bytes) -> None:
    with pytest.raises(safetensors.SafetensorError):
        by_library(file)


@pytest.mark.parametrize("file", [pytest.param(file, id=what) for what, file, _ in STRICTER])
def test_stricter_than_the_library(file: bytes) -> None:
    by_library(file)


def valid_file(shapes: list[tuple[str, list[int]]]) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": {"k": "v"}}
    at = 0
    for number, (dtype, shape) in enumerate(shapes):
        length = int(np.prod(shape, dtype="u8")) * {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}[dtype]
        header[f"t{number}"] = entry(dtype, shape, at, at + length)
        at += length
    return header, bytes(n % 251 for n in range(at))


SHAPES = st.lists(
    st.tuples(
        st.sampled_from(["U8", "BF16", "F32", "I64"]), st.lists(st.integers(0, 5), max_size=3)
    ),
    max_size=5,
)
NUMBER = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 1 << 31, 1 << 32, 1 << 61, (1 << 64) - 1])
SIMPLE = (
    st.none()
    | st.booleans()
    | NUMBER
    | st.integers(-9, 40)
    | st.floats(-5, 5)
    | st.text("aU8", max_size=3)
)
VALUE = st.recursive(
    SIMPLE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abt01", max_size=2), inner, max_size=3)
    ),
    max_leaves=4,
)
#: Messages about what the library lets pass; -0 counts as 0 here and as a float there.
LET_PASS = re.compile(r"comes twice|too large|dimensions|not a JSON object")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file with a few things changed: what the header says, or bytes anywhere."""
    header, data = valid_file(draw(SHAPES))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header)))
        target = header[name]
        if isinstance(target, dict) and target and draw(st.booleans()):
            key = draw(st.sampled_from(sorted(target)))
            inner = target[key]
            if isinstance(inner, list) and inner and draw(st.booleans()):
                inner[draw(st.integers(0, len(inner) - 1))] = draw(NUMBER)
            else:
                target[key] = draw(VALUE)
        else:
            header[name] = draw(VALUE)
    file = bytearray(raw_file(header, data))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(file)))
        what = draw(st.integers(0, 3))
        if what == 0:
            file[at : at + 1] = draw(st.binary(max_size=2))
        elif what == 1:
            del file[at : at + draw(st.integers(1, 9))]
        elif what == 2:
            file[at:at] = file[at : at + draw(st.integers(1, 30))]
        else:
            del file[at:]
    return bytes(file)


@settings(max_examples=600, deadline=None)
@given(damaged())
@example(raw_file({}))
def test_damaged_files(file: bytes) -> None:
    """Either a clear error, or all that is said is true, and the library reads it the same."""
    try:
        found = by_us(file)
    except FormatError as error:
        if not LET_PASS.search(str(error)):
            with pytest.raises(safetensors.SafetensorError):
                by_library(file)
    else:
        if b"-0" not in file:
            assert found == by_library(file)


@settings(max_examples=60, deadline=None)
@given(damaged())
async def test_damaged_files_do_not_fault(file: bytes) -> None:
    async with opened(file) as buf:
        try:
            tensors = await load(buf)
        except FormatError:
            assert buf.stats.faulted_blocks == 0
            return
        arrays = dict(tensors)
        assert buf.stats.faulted_blocks == 0
        await tensors.fetch(*tensors)
        for name, (_, shape, data) in by_library(file).items():
            assert arrays[name].shape == tuple(shape)
            assert arrays[name].tobytes() == data


def test_header_alone_is_enough() -> None:
    file = raw_file({"a": OK}, b"abcd")
    assert parse_header(file[:-4], len(file)) == parse_header(file)
    assert parse_header(memoryview(bytearray(file))) == parse_header(file)
    with pytest.raises(UsageError, match="were given"):
        parse_header(file[:-5], len(file))


# ------------------------------------------------------------------- several files


def shards() -> list[bytes]:
    parts = [{"a": np.arange(5.0), "b": np.arange(9)}, {"c": np.arange(3)}, {}]
    return [
        safetensors.numpy.save(part, {"format": "np", "part": str(number)})
        for number, part in enumerate(parts)
    ]


async def test_several_files() -> None:
    first, second, third = map(Asked, shards())
    async with first.open() as one, second.open() as two, third.open() as three:
        tensors = await load(one, two, three)
        assert sorted(tensors) == ["a", "b", "c"]
        assert tensors.metadata == {"format": "np", "part": "0"}
        assert tensors.buffer("b") is one
        assert tensors.buffer("c") is two
        await tensors.fetch("c", "a")
        np.testing.assert_array_equal(tensors["a"], np.arange(5.0))
        np.testing.assert_array_equal(tensors["c"], np.arange(3))
        assert two.stats.faulted_blocks == one.stats.faulted_blocks == 0


async def test_one_name_in_two_files() -> None:
    first, second, _ = shards()
    async with opened(first) as one, opened(second) as two, opened(first) as again:
        with pytest.raises(FormatError, match=r"'[ab]' is in two of the files"):
            await load(one, two, again)


def test_index() -> None:
    text = json.dumps(
        {
            "metadata": {"total_size": 5},
            "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x y=z.safetensors"},
        }
    )
    known = {"a": "model-00001-of-00002.safetensors", "b": "x y=z.safetensors"}
    assert parse_index(text) == parse_index(text.encode()) == known


def test_index_of_folders() -> None:
    """As transformers resolves them: below the index's own folder."""
    known = {"a": "model.embed.safetensors", "b": "model.layers.0/layer.safetensors", "c": "x/y/z"}
    assert parse_index(json.dumps({"weight_map": known})) == known


def doubled() -> tuple[bytes, bytes, dict[str, str]]:
    """Two files that both have ``shared``, and the index, which gives it to the second."""
    ones, twos = np.ones(4, "f4"), np.full(2, 2, "f4")
    one = safetensors.numpy.save({"a": ones, "shared": np.ones(2, "f4")})
    two = safetensors.numpy.save({"b": ones, "shared": twos, "unknown": twos})
    index = {"a": "1.safetensors", "b": "below/2.safetensors", "shared": "below/2.safetensors"}
    return one, two, parse_index(json.dumps({"weight_map": index}))


async def test_the_index_says_which_file_counts() -> None:
    one, two, index = doubled()
    async with opened(one) as first, opened(two) as second:
        with pytest.raises(FormatError, match="load_shards"):
            await load(first, second)
        files = {"1.safetensors": first, "below/2.safetensors": second}
        for order in (files, dict(reversed(files.items()))):
            tensors = await load_shards(index, order)
            assert sorted(tensors) == ["a", "b", "shared"]
            assert tensors.buffer("shared") is second
            await tensors.fetch("shared")
            np.testing.assert_array_equal(tensors["shared"], [2, 2])
        assert sorted(await load_shards(index, {"1.safetensors": first})) == ["a"]
        assert not await load_shards(index, {})

        with pytest.raises(UsageError, match=r"names no file '2\.safetensors'"):
            await load_shards(index, {"2.safetensors": second})
        with pytest.raises(FormatError, match=r"'b' is not in 'below/2\.safetensors'"):
            await load_shards(index, {"below/2.safetensors": first})


def test_the_index_says_which_file_counts_without_a_loop() -> None:
    one, two, index = doubled()
    with aiouffd.sync.open(one) as first, aiouffd.sync.open(two) as second:
        files = {"1.safetensors": first, "below/2.safetensors": second}
        tensors = load_shards_sync(index, files)
        np.testing.assert_array_equal(tensors["shared"], [2, 2])
        tensors.fetch()
        tensors.fetch("a", "b")
        assert not load_shards_sync(index, {})
        with pytest.raises(UsageError, match="load_shards"):
            load_shards_sync(index, dict.fromkeys(files))  # type: ignore[arg-type]


#: Would lead to another folder, as a path or as a URL, or are no names.
ELSEWHERE = [
    "../a",
    "a/../b",
    "a//b",
    "a/",
    "a/.b",
    "/etc/passwd",
    "a\\b",
    "..",
    ".",
    ".hidden",
    "a?b",
    "a#b",
    "a%2fb",
]
NO_NAMES = ["http:a", "", " a", "a\0", "a\n", 5, None, ["a"]]


@pytest.mark.parametrize("name", [*ELSEWHERE, *NO_NAMES])
def test_index_leads_nowhere_else(name: Any) -> None:
    with pytest.raises(FormatError, match="not the name of a file"):
        parse_index(json.dumps({"weight_map": {"a": "good", "b": name}}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "{",
        '{"\ud800": 1}',
    ],
)
def test_index_malformed(text: str) -> None:
    with pytest.raises(FormatError):
        parse_index(text)


# -------------------------------------------------------------------------- bounds


MIB = 1 << 20

#: Headers of ten megabytes that mean to cost more, and why they are refused.
COSTLY = [
    (b'{"a": {"dtype": "U8", "shape": [' + b"1," * (5 * MIB), "longer than"),
    (b'{"a": ' + b"[" * (10 * MIB), "nested|longer"),
    (b'{"a": ' + b"[[[[[[[[]]]]]]]]," * (MIB // 2), "JSON"),
    (b'{"a": {"b": [' + b"{}," * (3 * MIB), "longer than"),
    (b'{"__metadata__": {"a": "' + b"\\n" * (9 * MIB), "longer than"),
    (b'{"' + b"n" * (10 * MIB) + b'": 1}', "longer than"),
    (b"{" + b" " * (10 * MIB), "missing|JSON"),
    (b'{"a": ' + b"1" * (10 * MIB), "digits|longer than"),
    (
        b"{"
        + b",".join(
            b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(5000)
        )
        + b',"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        "more than 5000 tensors",
    ),
]


class Gaps:
    """How long other threads had to wait for the GIL, at most: seconds."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        before = time.monotonic()
        while not self._over.wait(0.0005):
            now = time.monotonic()
            self.longest, before = max(self.longest, now - before), now

    def __enter__(self) -> Gaps:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize(("header", "message"), COSTLY)
def test_a_hostile_header_costs_little(
    header: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TENSORS_MAX", 5000)
    file = raw_file(header)
    tracemalloc.start()
    try:
        with Gaps() as gaps, pytest.raises(FormatError, match=message):
            parse_header(file)
        assert tracemalloc.get_traced_memory()[1] < 400 * MIB
    finally:
        tracemalloc.stop()
    assert gaps.longest < 2, "which is little for a machine that has much else to do"


def test_others_run_while_a_long_header_is_parsed() -> None:
    many = {f"{n}": entry("U8", [1], n, n + 1) for n in range(30_000)}
    file = raw_file(many)
    with Gaps() as gaps:
        assert len(parse_header(file, len(file) + 30_000).tensors) == 30_000
    assert gaps.longest < 1


def test_metadata_may_be_long() -> None:
    text = "ä\n" * MIB
    found = parse_header(raw_file({"__metadata__": {"a": text, "b": ""}, "x": EMPTY}))
    assert found.metadata == {"a": text, "b": ""}
    assert list(found.tensors) == ["x"]


EMPTY = entry("U8", [0], 0, 0)


def test_an_index_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INDEX_MAX", 3000)
    for text, message in (
        (b'{"weight_map": {' + b'"a": ' + b"[" * MIB, "nested|longer"),
        (b'{"metadata": ' + b"[" * MIB, "nested|longer"),
        (json.dumps({"weight_map": {"a": "x" * 5000}}).encode(), "name of a file"),
        (json.dumps({"weight_map": dict.fromkeys(map(str, range(3001)), "x")}), "more than 3000"),
        (b'{"weight_map": {}, "weight_map": {}}', "weight_map"),
        (b'{"weight_map": {}} {', "follows"),
    ):
        with pytest.raises(FormatError, match=message):
            parse_index(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    value=st.dictionaries(st.text(), json_values, max_size=6),
    window=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
)
def test_pieces_against_the_library(value: Any, window: int, indent: Any, ascii: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii) + "  "
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_pieces, "_WINDOW", window)
        pieces = json_pieces.JsonPieces(data, json.JSONDecoder(), ValueError)
        found = {name: pieces.value(1 << 20) for name in pieces.members(1 << 20)}
        pieces.end()
        assert found == value
        for cut in range(0, len(data.rstrip()), max(1, len(data) // 10)):
            pieces = json_pieces.JsonPieces(data[:cut], json.JSONDecoder(), ValueError)
            with pytest.raises(ValueError, match="byte"):
                _ = {name: pieces.value(1 << 20) for name in pieces.members(1 << 20)}


# ------------------------------------------------------------------ without a loop


def test_sync(model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(model)
    known = safetensors.numpy.load_file(path)
    with aiouffd.sync.open(path, block_size=BLOCK, readahead=0) as buf:
        tensors = load_sync(buf)
        assert isinstance(tensors, SyncTensors)
        assert buf.stats.faulted_blocks == 0
        assert buf.stats.fetched_bytes == BLOCK
        assert tensors.buffer("f4") is buf
        tensors.fetch("f4", "i8")
        tensors.fetch()
        for name in ("f4", "i8"):
            np.testing.assert_array_equal(tensors[name], known[name])
        assert buf.stats.faulted_blocks == 0
        for name, array in known.items():
            np.testing.assert_array_equal(tensors[name], array)
        with pytest.raises(KeyError):
            tensors.fetch("nothing")
    path.write_bytes(b"not a model")
    with (
        aiouffd.sync.open(path) as buf,
        pytest.raises(FormatError, match="longer than the format"),
    ):
        load_sync(buf)


def test_sync_of_several_files(tmp_path: Path) -> None:
    for number, data in enumerate(shards()):
        (tmp_path / str(number)).write_bytes(data)
    with (
        aiouffd.sync.open(tmp_path / "0") as one,
        aiouffd.sync.open(tmp_path / "1") as two,
    ):
        tensors = load_sync(one, two)
        tensors.fetch("a", "c")
        assert tensors["c"].tolist() == [0, 1, 2]
        assert tensors["a"].tolist() == [0, 1, 2, 3, 4]
        assert two.stats.faulted_blocks == 0


async def test_the_other_kind_of_buffer(model: bytes) -> None:
    async with opened(model) as buf:
        with pytest.raises(UsageError, match=r"aiouffd\.sync\.open"):
            load_sync(buf)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"aiouffd\.open"):
        await load(b"bytes")  # type: ignore[arg-type]


# --------------------------------------------------------------------- light to have

LIGHT = """
import sys
import aiouffd
assert "numpy" not in sys.modules and "aiouffd.safetensors" not in sys.modules
sys.modules["numpy"] = None
with aiouffd.sync.open(bytes.fromhex(sys.argv[1])) as buf:
    tensors = aiouffd.safetensors.load_sync(buf)
    tensors.fetch("a")
    info = tensors.info["a"]
    print(info.dtype, info.shape, buf[info.offset : info.offset + info.length])
    try:
        tensors["a"]
    except aiouffd.UnsupportedError as error:
        print(error)
assert not hasattr(aiouffd, "numpy")
"""


def test_light() -> None:
    """Importing aiouffd loads neither this nor NumPy, and without NumPy all but arrays works."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIGHT, raw_file({"a": OK}, b"abcd").hex()],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "U8 (4,) b'abcd'",
        "arrays need NumPy (pip install 'numpy>=1.26' 'ml-dtypes>=0.5')",
    ]
