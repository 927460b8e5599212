"""Two columns of a Parquet file with many, on a server: pyarrow's own reader, over lazy memory.

    python examples/parquet_columns.py

A Parquet file says in its last bytes where the parts of each column are. pyarrow reads that and the
parts that it needs, which is all that is fetched. The same file, read from the disk by pyarrow,
tells whether the columns are right.

pyarrow can fetch over HTTP and from object stores by itself, through its file systems. Lazy memory
is for sources that it does not know, for a cache that is shared with other readers, or for a
program that has the buffer anyhow. Needs pyarrow and aiohttp.
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
    import pyarrow.parquet as pq
except ImportError as error:
    print(f"skipped: this needs {error.name}; pip install pyarrow aiohttp")
    sys.exit(0)

COLUMNS = 30
ROWS = 200_000
WANTED = ["column 4", "names"]


def make(path: Path) -> None:
    columns = {f"column {n}": pc.random(ROWS, initializer=n) for n in range(COLUMNS)}
    columns["names"] = pc.cast(pc.random(ROWS, initializer=99), pa.string())
    pq.write_table(pa.table(columns), path, row_group_size=ROWS // 4)


def read_columns(memory: pa.Buffer) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(memory))
    print(f"{file.metadata.num_rows:,} rows, {file.metadata.num_columns} columns")
    return file.read(columns=WANTED)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.parquet")
        make(path)
        # See arrow_ipc.py for the readahead.
        async with served(path) as url, aiouffd.open(url, readahead=256 << 10) as buffer:
            print(url)
            # Parquet is decoded, not only looked at: the table is ordinary memory, and whole.
            table = await asyncio.to_thread(read_columns, pa.py_buffer(buffer.view))
            print(f"two columns, with {buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes")
        if not table.equals(pq.read_table(path, columns=WANTED)):
            raise SystemExit("WRONG: the columns are not what pyarrow reads from the file")
        print(f"  {', '.join(WANTED)}: as they should be, {table.nbytes:,} bytes decoded")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    asyncio.run(main())
