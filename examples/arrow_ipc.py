"""Columns of an Arrow table on a server: pyarrow's own reader, over lazy memory.

    python examples/arrow_ipc.py

An Arrow IPC file that is not compressed holds its columns as they are in memory, so pyarrow makes a
table of it without copying anything. Over lazy memory that costs the file's footer and the
descriptions of its batches; a column is fetched when something computes with it, or asked for
ahead. The same file, read from the disk by pyarrow, tells whether the results are right.

Needs pyarrow and aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from range_server import served

import aiouffd

try:
    import aiohttp  # noqa: F401  (the HTTP source needs it)
    import pyarrow as pa
    import pyarrow.compute as pc
except ImportError as error:
    print(f"skipped: this needs {error.name}; pip install pyarrow aiohttp")
    sys.exit(0)

COLUMNS = 24
BATCHES = 4
ROWS = 1 << 16  # of one batch: half a mebibyte for each column
TOUCHED, AHEAD = "column 3", "column 17"


def make(path: Path) -> None:
    schema = pa.schema([(f"column {number}", pa.float64()) for number in range(COLUMNS)])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in range(BATCHES):
            columns = [pc.random(ROWS, initializer=batch * COLUMNS + n) for n in range(COLUMNS)]
            writer.write_batch(pa.record_batch(columns, schema))


def table_over(memory: pa.Buffer) -> pa.Table:
    return pa.ipc.open_file(pa.BufferReader(memory)).read_all()


def total(column: pa.ChunkedArray) -> float:
    return pc.sum(column).as_py()


async def fetch(buffer: aiouffd.LazyBuffer, column: pa.ChunkedArray) -> None:
    """Make a column resident: pyarrow knows the addresses of its parts."""
    parts = [part for chunk in column.chunks for part in chunk.buffers() if part is not None]
    await asyncio.gather(
        *(buffer.fetch(part.address - buffer.address, part.size) for part in parts)
    )


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.arrow")
        make(path)
        # A column is read from front to back, so looking ahead pays; but columns are small here,
        # and the usual 8 MiB would look far beyond them.
        async with served(path) as url, aiouffd.open(url, readahead=256 << 10) as buffer:

            def fetched() -> str:
                return f"{buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes fetched"

            # pyarrow waits for what it touches: on another thread, while this loop fetches.
            before = pa.total_allocated_bytes()
            table = await asyncio.to_thread(table_over, pa.py_buffer(buffer.view))
            print(f"{url}: {table.num_rows:,} rows, {table.num_columns} columns")
            print(f"  {fetched()}, {pa.total_allocated_bytes() - before:,} bytes allocated")

            found = {TOUCHED: await asyncio.to_thread(total, table[TOUCHED])}
            print(f"{TOUCHED}, touched: {fetched()}")

            # What was fetched ahead can be used anywhere.
            await fetch(buffer, table[AHEAD])
            print(f"{AHEAD}, ahead: {fetched()}")
            found[AHEAD] = total(table[AHEAD])
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        for name, sum_found in found.items():
            if sum_found != total(table[name]):
                raise SystemExit(f"WRONG: {name} adds up to {sum_found}, not {total(table[name])}")
            print(f"  sum of {name}: {sum_found:.6f}, as it should be")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    asyncio.run(main())
