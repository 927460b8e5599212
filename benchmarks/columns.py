"""Columns of tables: bytes that came against those of the columns, and a scan from afar.

pyarrow reads columns of a Parquet and an Arrow file over the buffer's memory, from a source in this
process whose answers are 5 ms late. For the scan they are 30 ms late, and it is compared with what
two windows a round trip would give. `readahead_model` plays such things in virtual time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
from typing import Any

import aiouffd
from aiouffd.buffers.buffer import READAHEAD

from .common import Report, in_thread, warm_memory
from .scan import MIB, lazy_scan

ROWS = 4 << 20
COLUMNS = 5
NEAR, FAR = 0.005, 0.030
SIZE = 256 * MIB


class LateSource:
    """Bytes at hand, each answer of them ``latency`` seconds late."""

    def __init__(self, data: Any, latency: float, size: int | None = None) -> None:
        self._data, self._latency = memoryview(data), latency
        self.size = len(data) if size is None else size

    async def read(self, offset: int, length: int) -> memoryview:
        await asyncio.sleep(self._latency)
        # Of a size that is only claimed, anything will do.
        start = min(offset, len(self._data) - length)
        return self._data[start : start + length]

    def clone(self) -> LateSource:
        return LateSource(self._data, self._latency, self.size)


def _tables(groups: int) -> dict[str, bytes]:
    import numpy
    import pyarrow
    import pyarrow.parquet

    noise = numpy.random.default_rng(1).random(ROWS)
    table = pyarrow.table({f"c{number}": noise for number in range(COLUMNS)})
    parquet, arrow = io.BytesIO(), io.BytesIO()
    each = -(-ROWS // groups)
    pyarrow.parquet.write_table(
        table, parquet, compression="none", use_dictionary=False, row_group_size=each
    )
    with pyarrow.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table, max_chunksize=each)
    return {"Parquet": parquet.getvalue(), "Arrow": arrow.getvalue()}


def _read(kind: str, view: memoryview, names: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    memory = pyarrow.BufferReader(pyarrow.py_buffer(view))
    if kind == "Parquet":
        pyarrow.parquet.ParquetFile(memory).read(columns=names)
        return
    file = pyarrow.ipc.open_file(memory)
    for number in range(file.num_record_batches):
        for name in names:
            file.get_batch(number).column(name).to_numpy().sum()


async def _columns(report: Report, loop: str) -> None:
    for groups in (1, 10):
        for kind, data in _tables(groups).items():
            for names in (["c2"], ["c1", "c3"]):

                async def fetched(kind=kind, data=data, names=names) -> float:
                    async with aiouffd.open(LateSource(data, NEAR)) as buf:
                        await in_thread(_read, kind, buf.view, names)
                        return buf.stats.fetched_bytes / MIB

                async def needed(names=names) -> float:
                    return 8 * ROWS * len(names) / MIB

                await report.compare_async(
                    f"{len(names)} of {COLUMNS} columns of {kind}, in {groups} groups, {loop}",
                    ("fetched", fetched),
                    ("columns", needed),
                    unit="MiB",
                    at_most=1.3,
                )


async def _scan(report: Report, loop: str) -> None:
    async def scanned() -> float:
        warm_memory(SIZE + SIZE // 4)
        return await lazy_scan(LateSource(bytes(READAHEAD), FAR, SIZE), SIZE)

    async def ideal() -> float:
        return SIZE / (2 * READAHEAD) * FAR

    await report.compare_async(
        f"cold scan of {SIZE // MIB} MiB, 30 ms away / two windows a round trip, {loop}",
        ("aiouffd", scanned),
        ("ideal", ideal),
        unit="s",
        at_most=2,
    )


def run(report: Report, loop: str, runner: Any) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        report.skip(f"columns of tables, {loop}", "pyarrow is not installed")
    else:
        runner(_columns(report, loop))
    runner(_scan(report, loop))
