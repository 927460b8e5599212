"""NumPy's files over lazy buffers; NumPy, which reads them from the disk, tells what is in them."""

from __future__ import annotations

import asyncio
import io
import struct
import sys
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd import FormatError, SourceError, UnsupportedError, UsageError
from aiouffd.formats import load_npy, load_npy_sync, load_npz, load_npz_sync, npy
from tests.faulty import FailingSource, PlainSource, final

BLOCK = 65536
RANDOM = np.random.default_rng(1)

ARRAYS: dict[str, Any] = {
    "floats": RANDOM.standard_normal((100, 1000)),
    "fortran": np.asfortranarray(RANDOM.standard_normal((30, 40, 5))),
    "big-endian": np.arange(1000, dtype=">u4"),
    "scalar": np.array(3.5),
    "empty": np.zeros((3, 0, 5), "f4"),
    "structured": np.array([(1, 2.5, b"xy")], [("a", "<i2"), ("b", ">f8"), ("c", "S3", (2,))]),
    "text": np.array(["grüße", ""]),
    "times": np.array(["2026-11-27"], "M8[D]"),
    "bytes": np.frombuffer(b"abc", "V1"),
}


def npy_of(array: Any, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=True)
    return file.getvalue()


def npz_of(compressed: bool = False, **arrays: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def header_of(text: bytes, version: int = 1, body: bytes = bytes(64)) -> bytes:
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + body


def load(data: bytes, **settings: Any) -> Any:
    with aiouffd.sync.open(data) as buf:
        return load_npy_sync(buf, **settings)


class TestNpy:
    @pytest.mark.parametrize("name", ARRAYS)
    async def test_as_numpy_reads_it(self, name: str) -> None:
        known = ARRAYS[name]
        for version in ((1, 0), (2, 0), (3, 0)):
            async with aiouffd.open(PlainSource(npy_of(known, version))) as buf:
                found = await load_npy(buf)
                assert (found.dtype, found.shape) == (known.dtype, known.shape)
                assert found.flags.f_contiguous == known.flags.f_contiguous
                assert not found.flags.writeable
                assert await asyncio.to_thread(found.tobytes, "A") == known.tobytes("A")
                del found

    async def test_it_fetches_what_is_used(self) -> None:
        known = np.arange(1 << 21, dtype="<u8").reshape(-1, 8192)  # of 64 KiB each
        source = PlainSource(npy_of(known))
        async with aiouffd.open(source, readahead=0) as buf:
            array = await load_npy(buf)
            assert source.bytes_read == BLOCK
            assert array.ctypes.data > buf.address
            row = await asyncio.to_thread(array[100].copy)
            assert np.array_equal(row, known[100])
            assert source.bytes_read == 3 * BLOCK

    def test_it_outlives_the_buffer(self) -> None:
        array = load(npy_of(ARRAYS["floats"]))
        assert np.array_equal(array, ARRAYS["floats"])

    def test_names_of_fields_that_need_version_3(self) -> None:
        known = np.zeros(3, [("größe", "f4"), ("価\\'格", "f4")])
        with pytest.warns(UserWarning, match=r"format 3\.0"):
            data = npy_of(known)
        assert data[6] == 3
        assert load(data).dtype == known.dtype

    def test_written_to(self) -> None:
        with aiouffd.sync.open(npy_of(np.zeros(8)), writable=True) as buf:
            load_npy_sync(buf)[3] = 1
            assert np.load(buf.file()).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"", "is it an .npy file"),
            (b"\x93NUMPY\1\0", "is it an .npy file"),
            (b"PK\3\4" + bytes(100), "is it an .npy file"),
            (header_of(b"{'descr': 'f8', 'fortran_order': False, 'shape': (9,)}"), "72 bytes.* 64"),
            (header_of(b"{'descr': 'f8', 'fortran_order': False, 'shape': (-1,)}"), "the shape"),
            (header_of(b"{'descr':'f8','fortran_order':False,'shape':(0,1<<62)}"), "damaged"),
            (
                header_of(
                    b"{'descr': 'f8', 'fortran_order': False, 'shape': (0, %d)}" % (1 << 62)
                ),
                "the shape",
            ),
            (
                header_of(
                    b"{'descr': 'u1', 'fortran_order': False, 'shape': (%s)}" % (b"1," * 65)
                ),
                "the shape",
            ),
            (header_of(b"{'descr': 'u1', 'fortran_order': 0, 'shape': (1,)}"), "damaged"),
            (header_of(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "run code"),
            (header_of(b"{'descr': 'nothing', 'fortran_order': False, 'shape': (1,)}"), "damaged"),
            (header_of(b"(" * 9000), "damaged"),
            (header_of(b"9" * 9000), "damaged"),
            (header_of(b"\xff\xfe", 3), "damaged"),
            (header_of(b" " * 20_000), "longer than 10000"),
            (header_of(b"", 2, b"")[:8] + b"\xff\xff\xff\x7f", "longer than 10000"),
            (header_of(b"", 1, b"")[:8] + b"\x80\0\0\0", "cut short"),
        ],
    )  # fmt: skip
    async def test_what_is_none(self, data: bytes, said: str) -> None:
        async with aiouffd.open(data) as buf:
            with pytest.raises(FormatError, match=said):
                await load_npy(buf)

    def test_a_version_of_tomorrow(self) -> None:
        with pytest.raises(UnsupportedError, match=r"9\.0"):
            load(header_of(b"{}", 9))

    def test_a_long_header(self) -> None:
        known = np.zeros(1, [(f"field {n}", "u1") for n in range(1000)])
        with pytest.raises(FormatError, match="max_header_size"):
            load(npy_of(known))
        assert load(npy_of(known), max_header_size=1 << 20).dtype == known.dtype

    def test_another_buffer(self) -> None:
        with aiouffd.sync.open(npy_of(np.zeros(3))) as buf:
            with pytest.raises(UsageError, match="load_npy_sync"):
                asyncio.run(load_npy(buf))  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="load_npz_sync"):
                asyncio.run(load_npz(buf))  # type: ignore[arg-type]

    def test_without_numpy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = npy_of(np.zeros(3))
        monkeypatch.setitem(sys.modules, "numpy", None)
        with pytest.raises(UnsupportedError, match="pip install"):
            load(data)

    @given(st.data())
    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    def test_damaged_ones(self, draw: st.DataObject) -> None:
        """An array within the file, or an error of ours."""
        data = bytearray(npy_of(np.arange(4, dtype="<u2")))
        for _ in range(draw.draw(st.integers(1, 3))):
            data[draw.draw(st.integers(0, 75))] = draw.draw(st.integers(0, 255))
        try:
            load(bytes(data)).tobytes()
        except (FormatError, UnsupportedError, UsageError):
            pass


class TestNpz:
    @pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
    async def test_as_numpy_reads_it(self, compressed: bool) -> None:
        data = npz_of(compressed, **ARRAYS)
        async with aiouffd.open(PlainSource(data)) as buf:
            arrays = await load_npz(buf)
            assert list(arrays) == list(ARRAYS)
            for name, known in ARRAYS.items():
                assert arrays.info[name].compressed == compressed
                assert (arrays.info[name].dtype, arrays.info[name].shape) == (
                    known.dtype,
                    known.shape,
                )
                found = await asyncio.to_thread(arrays.__getitem__, name)
                assert (found.dtype, found.shape) == (known.dtype, known.shape)
                assert await asyncio.to_thread(found.tobytes, "A") == known.tobytes("A")
                assert not found.flags.writeable
                del found

    async def test_it_fetches_what_is_used(self) -> None:
        parts = {f"part{n}": RANDOM.standard_normal(1 << 17) for n in range(8)}  # of 1 MiB
        source = PlainSource(npz_of(**parts))
        async with aiouffd.open(source, readahead=0) as buf:
            arrays = await load_npz(buf)
            # The end of the archive, and two blocks for a header that is in two.
            assert source.bytes_read <= (8 + 2 + 2) * BLOCK
            before = source.bytes_read
            await arrays.fetch("part5")
            assert np.array_equal(arrays["part5"], parts["part5"])
            assert source.bytes_read <= before + (1 << 20) + BLOCK
            assert arrays.buffer("part5") is buf
            assert "8 arrays" in repr(arrays)

    def test_a_compressed_one_is_read_when_it_is_asked_for(self) -> None:
        noise = RANDOM.integers(0, 256, 1 << 20, dtype="u1")
        source = PlainSource(npz_of(True, a=noise, b=noise))
        with aiouffd.sync.open(source, readahead=0) as buf:
            arrays = load_npz_sync(buf)
            before = source.bytes_read
            assert before < 6 * BLOCK
            arrays.fetch("b")
            assert np.array_equal(arrays["b"], noise)
            assert source.bytes_read < before + (1 << 20) + 2 * BLOCK
            assert arrays.buffer("a") is buf

    def test_other_members_and_a_program_in_front(self) -> None:
        file = io.BytesIO()
        file.write(b"#!/bin/sh\n")
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("notes.txt", "hello")
            archive.writestr("grüße/x.npy", npy_of(np.arange(3)))
            with archive.open("later.npy", "w", force_zip64=True) as member:
                member.write(npy_of(np.arange(4)))
        with aiouffd.sync.open(file.getvalue()) as buf:
            arrays = load_npz_sync(buf)
            assert {name: array.tolist() for name, array in arrays.items()} == {
                "grüße/x": [0, 1, 2],
                "later": [0, 1, 2, 3],
            }

    @pytest.mark.parametrize("data", [b"", b"x", b"PK\5\6", bytes(70_000), npy_of(np.zeros(9))])
    async def test_what_is_no_archive(self, data: bytes) -> None:
        async with aiouffd.open(data) as buf:
            with pytest.raises(FormatError, match=r"\.npz file"):
                await load_npz(buf)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_compressions(self, compression: int) -> None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            archive.writestr("a.npy", npy_of(np.zeros(9)))
        with aiouffd.sync.open(file.getvalue()) as buf, pytest.raises(UnsupportedError):
            load_npz_sync(buf)

    def test_the_source_fails(self) -> None:
        data = npz_of(a=np.zeros(1 << 17))
        source = FailingSource(data, 99, final)
        with aiouffd.sync.open(source, errors="soft") as buf, pytest.raises(SourceError):
            load_npz_sync(buf)

    def test_twice(self) -> None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.npy", npy_of(np.zeros(1)))
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("a.npy", npy_of(np.zeros(1)))
        data = file.getvalue()
        with aiouffd.sync.open(data) as buf, pytest.raises(FormatError, match="twice"):
            load_npz_sync(buf)

    @pytest.mark.parametrize(
        ("place", "value", "said"),
        [
            ("local", (0, b"PK\3\5"), "not where the directory says"),
            ("local", (6, b"\1\0"), "encrypted"),
            ("local", (30, b"b"), "another name"),
            ("directory", (20, struct.pack("<L", 1 << 30)), "not where the directory says"),
            ("directory", (24, struct.pack("<L", 1 << 30)), "cannot be"),
            ("directory", (42, struct.pack("<L", 1 << 30)), "not within"),
            ("end", (12, struct.pack("<L", 9 << 20)), "no zip archive"),
        ],
    )
    def test_archives_that_lie(self, place: str, value: tuple[int, bytes], said: str) -> None:
        data = bytearray(npz_of(True, a=np.zeros(100)))
        start = {
            "local": 0,
            "directory": data.index(b"PK\1\2"),
            "end": data.index(b"PK\5\6"),
        }[place]
        at = start + value[0]
        data[at : at + len(value[1])] = value[1]
        with aiouffd.sync.open(bytes(data)) as buf, pytest.raises(FormatError, match=said):
            load_npz_sync(buf)

    def test_a_directory_that_is_too_long(self) -> None:
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 9 << 20, 0, 0)
        source = PlainSource(bytes(9 << 20) + end)
        with aiouffd.sync.open(source, readahead=0) as buf:
            with pytest.raises(FormatError, match=f"longer than {npy.DIRECTORY_MAX}"):
                load_npz_sync(buf)
            assert source.bytes_read < 5 * BLOCK

    def test_a_compressed_array_that_is_another_than_it_says(self) -> None:
        file = io.BytesIO()
        array = npy_of(np.zeros(100))
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", array)
        data = file.getvalue().replace(struct.pack("<L", zlib.crc32(array)), b"\1\2\3\4")
        with aiouffd.sync.open(data) as buf:
            arrays = load_npz_sync(buf)
            with pytest.raises(FormatError, match="checksum"):
                arrays["a"]

    @given(st.data(), st.booleans())
    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    def test_damaged_ones(self, draw: st.DataObject, compressed: bool) -> None:
        data = bytearray(npz_of(compressed, a=np.arange(4, dtype="<u2")))
        for _ in range(draw.draw(st.integers(1, 3))):
            data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
        with aiouffd.sync.open(bytes(data)) as buf:
            try:
                for array in load_npz_sync(buf).values():
                    array.tobytes()
            except (FormatError, UnsupportedError, UsageError):
                pass
