"""A lazy buffer in a plain script: no asyncio anywhere.

    python examples/sync_script.py [URL or path]

Without an argument it makes a file of 64 MiB of numbers and opens that. It looks at a few
places of it with NumPy, and then tells how much was read for that.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import aiouffd.sync

try:
    import numpy as np
except ImportError:
    print("skipped: this needs numpy; pip install numpy")
    sys.exit(0)

NUMBERS = 8 << 20


def make(path: Path) -> None:
    """The squares of 0, 1, 2, ... as 64-bit integers."""
    numbers = np.arange(NUMBERS, dtype="<i8")
    path.write_bytes(memoryview(numbers * numbers))


def look_at(source: str) -> None:
    with aiouffd.sync.open(source) as buffer:
        numbers = np.frombuffer(buffer.view, "<i8", len(buffer) // 8)
        middle = len(numbers) // 2
        print(f"{len(buffer):,} bytes, {len(numbers):,} numbers")
        print(f"first: {numbers[:5]}")
        print(f"middle: {numbers[middle]}, last: {numbers[-1]}")
        print(f"every {len(numbers) // 8:,}th: {numbers[:: max(1, len(numbers) // 8)]}")
        print(f"read for that: {buffer.stats.fetched_bytes / len(buffer):.1%} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description="A lazy buffer in a plain script.")
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="a URL or a path")
    source = parser.parse_args().source
    if source is not None:
        try:
            look_at(source)
        except (aiouffd.AiouffdError, OSError) as error:
            sys.exit(f"sync_script.py: {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "squares.bin")
        make(path)
        look_at(str(path))


if __name__ == "__main__":
    main()
