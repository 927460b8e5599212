#!/usr/bin/env bash
# How much of a Python file object does polars read for one column of a Parquet file, or for its schema alone?
#
# A good guess: the footer and that column's chunks, as of a path, and as pyarrow does with the very same object.
# Seen here: all of the file, always: by read_parquet(columns=), by scan_parquet() whatever is selected, and even by
# read_parquet_schema(). The object is read to its end before anything is parsed. So a lazy scan of a file object
# that is a remote object is a download.
#
# aiouffd's documents say so (docs/formats.md), and give polars Arrow tables over the buffer's memory, of which it
# reads what it uses (tests/test_format_libraries.py).
#
# Needs Python 3.11 or later as $PYTHON, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check polars==2.1.0 pyarrow==26.0.1
"$work/venv/bin/python" - <<'END'
import array
import io
import random
import sys

import polars
import pyarrow
import pyarrow.parquet


class Counting(io.RawIOBase):
    """A file that can be read at any place, and counts what was read."""

    def __init__(self, data):
        self.data, self.at, self.read_bytes = data, 0, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, len(self.data))[whence]
        return self.at

    def readinto(self, target):
        part = self.data[self.at : self.at + len(target)]
        target[: len(part)] = part
        self.at += len(part)
        self.read_bytes += len(part)
        return len(part)


random.seed(1)
columns = {f"c{n}": array.array("d", (random.random() for _ in range(20_000))) for n in range(20)}
made = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(c) for name, c in columns.items()}), made)
data = made.getvalue()
print("Python", sys.version.split()[0], "polars", polars.__version__, "pyarrow", pyarrow.__version__)
print("a file of", len(data), "bytes, 20 columns")


def share(name, use):
    file = Counting(data)
    use(file)
    print(f"{name}: {file.read_bytes / len(data):.1%} read")
    return file.read_bytes / len(data)


shares = [
    share("polars.read_parquet_schema", polars.read_parquet_schema),
    share("polars.read_parquet, one column", lambda f: polars.read_parquet(f, columns=["c3"])),
    share("polars.scan_parquet, one row of one column", lambda f: polars.scan_parquet(f).select("c3").head(1).collect()),
]
other = share("pyarrow.parquet.read_table, one column", lambda f: pyarrow.parquet.read_table(f, columns=["c3"]))
sys.exit(0 if min(shares) >= 1 and other < 0.2 else "the behaviour has changed")
END
