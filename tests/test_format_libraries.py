"""Libraries that read memory or files, over lazy buffers: what they fetch, and that it is right.

pyarrow is there in every run; the others are tested where somebody has installed them. The document
on formats says the same, library by library.
"""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import aiouffd
from tests.faulty import PlainSource

T = TypeVar("T")
BLOCK = 65536
COLUMNS, ROWS = 10, 1 << 17  # a column is a mebibyte
MIB = 1 << 20


class Opened:
    """A buffer without readahead, and how much of it was fetched."""

    def __init__(self, data: bytes) -> None:
        self.source = PlainSource(data)
        self.buffer = aiouffd.sync.open(self.source, readahead=0)

    @property
    def fetched(self) -> int:
        return self.source.bytes_read

    def fetched_by(self, function: Callable[[], T]) -> tuple[T, int]:
        before = self.fetched
        return function(), self.fetched - before


@contextmanager
def opened(data: bytes) -> Iterator[Opened]:
    given = Opened(data)
    with given.buffer:
        yield given


@functools.cache
def columns() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(1)
    return {f"c{n}": random.standard_normal(ROWS) for n in range(COLUMNS)}


# -------------------------------------------------------------------------- Arrow


@pytest.fixture(scope="module")
def pa() -> Any:
    pytest.importorskip("pyarrow.compute")
    return pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def table(pa: Any) -> Any:
    return pa.table(columns())


@pytest.fixture(scope="module")
def ipc(pa: Any, table: Any) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS // 4)
    return file.getvalue()


def opened_table(pa: Any, given: Opened) -> Any:
    return pa.ipc.open_file(pa.py_buffer(given.buffer)).read_all()


def test_arrow_ipc(pa: Any, table: Any, ipc: bytes) -> None:
    """The footer and the descriptions of the batches; then columns, in place."""
    with opened(ipc) as given:
        before = pa.total_allocated_bytes()
        lazy, fetched = given.fetched_by(lambda: opened_table(pa, given))
        assert fetched <= (4 * 2 + 1) * BLOCK
        assert pa.total_allocated_bytes() == before
        address = lazy["c3"].chunk(0).buffers()[1].address
        assert 0 <= address - given.buffer.address < len(ipc)
        total, fetched = given.fetched_by(lambda: pa.compute.sum(lazy["c3"]).as_py())
        assert total == pa.compute.sum(table["c3"]).as_py()
        assert fetched <= MIB + 4 * 2 * BLOCK


def test_arrow_tables_outlive_the_buffer(pa: Any, table: Any, ipc: bytes) -> None:
    with opened(ipc) as given:
        lazy = opened_table(pa, given)
    assert lazy["c5"].equals(table["c5"])


def test_feather(pa: Any, table: Any) -> None:
    feather = pytest.importorskip("pyarrow.feather")
    file = io.BytesIO()
    feather.write_feather(table, file, compression="uncompressed")
    with opened(file.getvalue()) as given:
        reader = pa.BufferReader(pa.py_buffer(given.buffer))
        lazy, fetched = given.fetched_by(lambda: feather.read_table(reader))
        assert fetched <= 6 * BLOCK
        total, fetched = given.fetched_by(lambda: pa.compute.sum(lazy["c9"]).as_py())
        assert total == pa.compute.sum(table["c9"]).as_py()
        assert fetched <= MIB + 6 * BLOCK


def test_parquet(pa: Any, table: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(table, file, use_dictionary=False, compression="none")
    with opened(file.getvalue()) as given:
        reader = pa.BufferReader(pa.py_buffer(given.buffer))
        found, fetched = given.fetched_by(lambda: parquet.read_table(reader, columns=["c2"]))
        assert found["c2"].equals(table["c2"])
        assert fetched <= MIB + 6 * BLOCK


def test_polars_over_arrow(pa: Any, table: Any, ipc: bytes) -> None:
    pl = pytest.importorskip("polars")
    with opened(ipc) as given:
        frame = pl.from_arrow(opened_table(pa, given)).lazy()
        before = given.fetched
        total = frame.select(pl.col("c5").sum()).collect().item()
        assert total == pytest.approx(pa.compute.sum(table["c5"]).as_py())
        assert given.fetched - before <= MIB + 4 * 2 * BLOCK


def test_duckdb_over_arrow(pa: Any, table: Any, ipc: bytes) -> None:
    duckdb = pytest.importorskip("duckdb")
    with opened(ipc) as given, duckdb.connect() as connection:
        lazy = opened_table(pa, given)
        connection.register("lazy", lazy)
        before = given.fetched
        ((total,),) = connection.execute("select sum(c7) from lazy").fetchall()
        assert total == pytest.approx(pa.compute.sum(table["c7"]).as_py())
        assert given.fetched - before <= MIB + 4 * 2 * BLOCK
        connection.unregister("lazy")


# ----------------------------------------------------------------------- by memory


def test_blosc2() -> None:
    blosc2 = pytest.importorskip("blosc2")
    known = np.random.default_rng(1).integers(0, 255, (2048, 4096), dtype="u1")
    made = blosc2.asarray(known, chunks=(256, 4096), blocks=(16, 4096), contiguous=True)
    with opened(made.to_cframe()) as given:
        array, fetched = given.fetched_by(
            lambda: blosc2.ndarray_from_cframe(given.buffer.view, copy=False)
        )
        assert fetched <= 3 * BLOCK
        rows, fetched = given.fetched_by(lambda: array[1000:1010])
        assert np.array_equal(rows, known[1000:1010])
        assert fetched <= 6 * BLOCK


def test_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    vectors = np.random.default_rng(1).standard_normal((20_000, 64)).astype("f4")
    known = faiss.IndexIVFFlat(faiss.IndexFlatL2(64), 64, 64)
    known.train(vectors)
    known.add(vectors)
    writer = faiss.VectorIOWriter()
    faiss.write_index(known, writer)
    with opened(faiss.vector_to_array(writer.data).tobytes()) as given:
        array = given.buffer.array()
        reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(array), array.size)
        index, fetched = given.fetched_by(lambda: faiss.read_index(reader, faiss.IO_FLAG_MMAP_IFC))
        assert fetched < 0.15 * len(given.buffer)
        found, fetched = given.fetched_by(lambda: index.search(vectors[5:6], 3))
        assert found[1].tolist() == known.search(vectors[5:6], 3)[1].tolist()
        assert fetched < 0.15 * len(given.buffer)


def test_usearch(tmp_path: Path) -> None:
    index = pytest.importorskip("usearch.index")
    vectors = np.random.default_rng(1).standard_normal((4_000, 768)).astype("f4")
    known = index.Index(ndim=768, dtype="f32")
    known.add(np.arange(4_000), vectors)
    known.save(tmp_path / "index")
    with opened((tmp_path / "index").read_bytes()) as given:
        lazy = index.Index(ndim=768, dtype="f32")
        _, fetched = given.fetched_by(lambda: lazy.view(given.buffer.view))
        assert fetched < 0.8 * len(given.buffer)
        assert lazy.search(vectors[7], 3).keys[0] == 7


# ----------------------------------------------------------------------- by a file


def test_vortex(pa: Any, table: Any, tmp_path: Path) -> None:
    vortex = pytest.importorskip("vortex")
    vortex.io.write(vortex.array(table), str(tmp_path / "table.vortex"))
    with (
        opened((tmp_path / "table.vortex").read_bytes()) as given,
        given.buffer.file() as file,
    ):
        lazy, fetched = given.fetched_by(lambda: vortex.open_readable(file))
        assert fetched <= 3 * BLOCK
        scan = lazy.scan(projection=["c3"])
        found, fetched = given.fetched_by(scan.read_all)
        assert fetched <= MIB + 4 * BLOCK
        column = pa.concat_arrays(found.to_arrow_array().chunks).field("c3")
        assert column.equals(table["c3"].combine_chunks())


def test_h5py() -> None:
    h5py = pytest.importorskip("h5py")
    known = columns()
    file = io.BytesIO()
    with h5py.File(file, "w") as made:
        for name, column in known.items():
            made.create_dataset(name, data=column.reshape(512, -1), chunks=(64, 256))
    with opened(file.getvalue()) as given, given.buffer.file() as lazy_file:
        lazy, fetched = given.fetched_by(lambda: h5py.File(lazy_file, "r"))
        assert fetched <= 3 * BLOCK
        row, fetched = given.fetched_by(lambda: lazy["c7"][3])
        assert np.array_equal(row, known["c7"].reshape(512, -1)[3])
        assert fetched <= 64 * 256 * 8 + 8 * BLOCK
        lazy.close()


def test_zarr() -> None:
    zarr = pytest.importorskip("zarr")
    fsspec_zip = pytest.importorskip("fsspec.implementations.zip")
    wrapper = pytest.importorskip("fsspec.implementations.asyn_wrapper")
    known = columns()["c0"].reshape(512, 256)
    store = zarr.storage.MemoryStore()
    zarr.create_array(store, name="a", data=known, chunks=(64, 256))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in store._store_dict.items():
            archive.writestr(name, value.to_bytes())
    with opened(file.getvalue()) as given, given.buffer.file() as lazy_file:
        system = wrapper.AsyncFileSystemWrapper(
            fsspec_zip.ZipFileSystem(lazy_file), asynchronous=True
        )
        lazy_store = zarr.storage.FsspecStore(system, path="", read_only=True)
        array, fetched = given.fetched_by(lambda: zarr.open_array(lazy_store, path="a", mode="r"))
        assert fetched <= 3 * BLOCK
        row, fetched = given.fetched_by(lambda: array[300])
        assert np.array_equal(row, known[300])
        assert fetched <= 64 * 256 * 8 + 2 * BLOCK
