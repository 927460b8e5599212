"""GGUF files over lazy buffers; the gguf package writes them, and its own reader tells what they
have."""

from __future__ import annotations

import asyncio
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd import FormatError, UnsupportedError, UsageError
from aiouffd.formats import gguf as ours
from aiouffd.formats import load_gguf, load_gguf_sync
from tests.faulty import PlainSource

gguf = pytest.importorskip("gguf")

BLOCK = 65536
Q4 = gguf.GGMLQuantizationType.Q4_0
RANDOM = np.random.default_rng(1)

ARRAYS: dict[str, Any] = {
    "norm": RANDOM.standard_normal(64).astype("f4"),
    "half": RANDOM.standard_normal((3, 5)).astype("f2"),
    "double": RANDOM.standard_normal((2, 3, 4)),
    "ids": np.arange(7, dtype="i4"),
    "bytes": np.arange(33, dtype="i1"),
    "long": np.arange(5, dtype="i8"),
}
WEIGHT = RANDOM.standard_normal((16, 64)).astype("f4")


def write(
    path: Path,
    arrays: dict[str, Any] = ARRAYS,
    *,
    alignment: int | None = None,
    big: bool = False,
    tokens: int = 0,
) -> bytes:
    endian = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_string("text", "grüße")
    writer.add_bool("yes", True)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(kind, 100)
    writer.add_float32("float32", 0.5)
    writer.add_float64("float64", 0.1)
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("texts", ["a", "", "bc"])
    if tokens:
        writer.add_array("tokens", [f"token {n}" for n in range(tokens)])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    if not big:
        writer.add_tensor("weight", gguf.quantize(WEIGHT, Q4), raw_dtype=Q4)
        brain = gguf.quantize(WEIGHT, gguf.GGMLQuantizationType.BF16)
        writer.add_tensor("brain", brain, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.mark.parametrize("alignment", [None, 8, 4096])
async def test_as_the_package_reads_it(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "model.gguf"
    write(path, alignment=alignment)
    known = gguf.GGUFReader(path)
    async with aiouffd.open(path) as buf:
        tensors = await load_gguf(buf)
        assert list(tensors) == [tensor.name for tensor in known.tensors]
        for tensor in known.tensors:
            info = tensors.info[tensor.name]
            assert info.shape == tuple(int(side) for side in tensor.shape[::-1])
            assert (info.type, info.offset, info.length) == (
                tensor.tensor_type,
                tensor.data_offset,
                tensor.n_bytes,
            )
            found = await asyncio.to_thread(tensors[tensor.name].tobytes)
            assert found == tensor.data.tobytes()
        for name, array in ARRAYS.items():
            assert tensors[name].dtype == array.dtype
            assert await asyncio.to_thread(np.array_equal, tensors[name], array)
        assert tensors.info["weight"].quantized
        assert tensors["weight"].shape == tensors.raw("weight").shape == (16, 2 * 18)
        assert not tensors["norm"].flags.writeable
        assert "8 tensors" in repr(tensors)


def test_quantized_ones_can_be_made_numbers(data: bytes) -> None:
    with aiouffd.sync.open(data) as buf:
        tensors = load_gguf_sync(buf)
        found = gguf.dequantize(tensors["weight"], tensors.info["weight"].type)
        assert np.array_equal(found, gguf.dequantize(gguf.quantize(WEIGHT, Q4), Q4))
        brain = tensors["brain"]
        assert (str(brain.dtype), brain.shape) == ("bfloat16", WEIGHT.shape)
        assert np.allclose(brain.astype("f4"), WEIGHT, rtol=0.01)
        raw = gguf.dequantize(tensors.raw("brain"), tensors.info["brain"].type)
        assert np.array_equal(raw, brain.astype("f4"))


def test_metadata(data: bytes) -> None:
    with aiouffd.sync.open(data) as buf:
        metadata = load_gguf_sync(buf).metadata
        assert metadata["general.architecture"] == "llama"
        assert (metadata["text"], metadata["yes"], metadata["float64"]) == ("grüße", True, 0.1)
        assert all(metadata[f"{sign}int{bits}"] == 100 for sign in ("", "u") for bits in (8, 64))
        assert metadata["numbers"].tolist() == [1, -2, 3]
        assert metadata["texts"] == ["a", "", "bc"]


def test_for_computers_of_the_other_kind(tmp_path: Path) -> None:
    with aiouffd.sync.open(write(tmp_path / "big.gguf", big=True)) as buf:
        tensors = load_gguf_sync(buf)
        assert tensors.metadata["numbers"].tolist() == [1, -2, 3]
        for name, array in ARRAYS.items():
            assert np.array_equal(tensors[name], array)


async def test_it_fetches_what_is_used(tmp_path: Path) -> None:
    arrays = {f"layer {n}": np.full((256, 1024), n, "f4") for n in range(8)}  # of 1 MiB
    source = PlainSource(write(tmp_path / "model.gguf", arrays, tokens=20_000))
    async with aiouffd.open(source, readahead=0) as buf:
        tensors = await load_gguf(buf)
        assert tensors.metadata["tokens"][19_999] == "token 19999"
        first = tensors.info["layer 0"].offset
        assert source.bytes_read < first + ours._CHUNK + 2 * BLOCK
        before = source.bytes_read
        array = tensors["layer 5"]
        assert source.bytes_read == before
        await tensors.fetch("layer 5")
        assert array.sum() == 5 * (1 << 18)
        assert source.bytes_read <= before + (1 << 20) + 2 * BLOCK
        assert tensors.buffer("layer 5") is buf
        del array


@pytest.mark.parametrize("chunk", [1, 7, 100])
async def test_a_header_in_pieces(data: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with aiouffd.sync.open(data) as buf:
        known = load_gguf_sync(buf)
        monkeypatch.setattr(ours, "_CHUNK", chunk)
        found = load_gguf_sync(buf)
        assert dict(found.info) == dict(known.info)
        assert repr(found.metadata) == repr(known.metadata)


async def test_several_files(tmp_path: Path) -> None:
    one = write(tmp_path / "1.gguf", {"a": np.zeros(3, "f4")}, big=True)
    two = write(tmp_path / "2.gguf", {"b": np.ones(3, "f4")}, big=True)
    async with aiouffd.open(one) as first, aiouffd.open(two) as second:
        tensors = await load_gguf(first, second)
        assert sorted(tensors) == ["a", "b"]
        assert tensors["b"].tolist() == [1, 1, 1]
        assert tensors.buffer("b") is second
        with pytest.raises(FormatError, match="two of the files"):
            await load_gguf(first, first)
        with pytest.raises(UsageError, match=r"aiouffd\.sync\.open"):
            load_gguf_sync(first)  # type: ignore[arg-type]


# -------------------------------------------------------------------- what is no such file


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, sides: list[int], kind: int = 0, offset: int = 0) -> bytes:
    given = struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)
    return text(name) + given


def made(entries: list[bytes], tensors: list[bytes], body: int = 64, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    head += b"".join((*entries, *tensors))
    return head + bytes(-len(head) % 32) + bytes(body)


def test_made_by_hand() -> None:
    for version in (2, 3):
        data = made([text(b"k") + struct.pack("<IB", 7, 1)], [tensor(b"t", [2, 3])], 24, version)
        with aiouffd.sync.open(data) as buf:
            tensors = load_gguf_sync(buf)
            assert (tensors["t"].shape, tensors.metadata["k"]) == ((3, 2), True)


def test_text_that_is_not_utf_8() -> None:
    data = made([text(b"k") + struct.pack("<I", 8) + text(b"\xff")], [])
    with aiouffd.sync.open(data) as buf:
        assert load_gguf_sync(buf).metadata["k"].encode("utf-8", "surrogateescape") == b"\xff"


COUNT = struct.Struct("<Q").pack
NESTED = text(b"k") + struct.pack("<I", 9) + 9 * struct.pack("<IQ", 9, 1)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (b"", FormatError, "is it one"),
        (b"GGU", FormatError, "is it one"),
        (b"GGML" + bytes(100), FormatError, "is it one"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), UnsupportedError, "version 1"),
        (b"GGUF" + struct.pack(">I", 9) + bytes(100), UnsupportedError, "version 9"),
        (b"GGUF" + struct.pack("<I", 3), FormatError, "the end of the file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), FormatError, "tensors are more than"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), FormatError, "entries of metadata"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1000, 1000), FormatError, "the end of the file"),
        (made([COUNT(1 << 60)], []), FormatError, "longer than 65535"),
        (made([text(b"k") + b"\x08\0\0\0" + COUNT(1 << 60)], []), FormatError, "longer than"),
        (made([text(b"k") + b"\x08\0\0\0" + COUNT(1 << 20)], []), FormatError, "the end of"),
        (made([text(b"k") + b"\x63\0\0\0"], []), UnsupportedError, "type 99"),
        (made([text(b"\xff") + b"\x07\0\0\0\1"], []), FormatError, "not UTF-8"),
        (made([text(b"k") + b"\x07\0\0\0\1"] * 2, []), FormatError, "twice"),
        (made([text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 50)], []), FormatError, "elements"),
        (made([text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 20)], []), FormatError, "the end of"),
        (made([text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 20)], []), FormatError, "longer|end of"),
        (made([NESTED], []), FormatError, "4 deep"),
        (made([text(b"general.alignment") + struct.pack("<II", 4, 24)], []), FormatError, "24"),
        (made([text(b"general.alignment") + struct.pack("<II", 4, 0)], []), FormatError, "power"),
        (made([text(b"general.alignment") + struct.pack("<If", 6, 32)], []), FormatError, "power"),
        (made([], [tensor(b"t", [1] * 5)]), FormatError, "5 dimensions"),
        (made([], [tensor(b"t", [17])]), FormatError, "and the file has"),
        (made([], [tensor(b"t", [1 << 40, 1 << 40])]), FormatError, "too large"),
        (made([], [tensor(b"t", [0, 1 << 63])]), FormatError, "too large"),
        (made([], [tensor(b"t", [1], 0, 32 << 50)]), FormatError, "and the file has"),
        (made([], [tensor(b"t", [1], 0, 8)]), FormatError, "not aligned"),
        (made([], [tensor(b"t", [33], 2)]), FormatError, "blocks of 32"),
        (made([], [tensor(b"t", [1], 9999)]), UnsupportedError, "type 9999"),
        (made([], [tensor(b"t", [1])] * 2), FormatError, "two tensors"),
        (made([], [tensor(b"a", [16]), tensor(b"b", [1], 0, 32)]), FormatError, "overlap"),
    ],
)
def test_what_is_none(data: bytes, error: type[Exception], said: str) -> None:
    with aiouffd.sync.open(data) as buf, pytest.raises(error, match=said):
        load_gguf_sync(buf)


def test_an_endless_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "HEADER_MAX", 1000)
    data = made([text(b"k") + struct.pack("<I", 8) + text(bytes(2000))], [])
    with aiouffd.sync.open(data) as buf, pytest.raises(FormatError, match="longer than 1000"):
        load_gguf_sync(buf)


@given(st.data())
@settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None)
def test_damaged_ones(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        damaged[draw.draw(st.integers(0, 1200))] = draw.draw(st.integers(0, 255))
    with aiouffd.sync.open(bytes(damaged)) as buf:
        try:
            for array in load_gguf_sync(buf).values():
                array.tobytes()
        except (FormatError, UnsupportedError):
            pass


def test_without_the_package(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with aiouffd.sync.open(data) as buf, pytest.raises(UnsupportedError, match="pip install"):
        load_gguf_sync(buf)
