"""NumPy's own files on a server, as arrays of which only what is touched is fetched.

    python examples/npy_npz.py

An .npy file is a header and an array: the header is read with `await`, the array is lazy memory. An
.npz file is a zip archive of .npy files. What np.savez writes is stored as it is, so these arrays
are lazy too; members that are compressed (np.savez_compressed) are read as a whole when they are
asked for. np.load, which reads the files from the disk, tells whether the arrays are right.

Needs NumPy and aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import zipfile
from pathlib import Path

from range_server import served

import aiouffd

try:
    import aiohttp  # noqa: F401  (the HTTP source needs it)
    import numpy as np
except ImportError as error:
    print(f"skipped: this needs {error.name}; pip install numpy aiohttp")
    sys.exit(0)


def check(name: str, found: np.ndarray, known: np.ndarray) -> None:
    if not np.array_equal(found, known):
        raise SystemExit(f"WRONG: {name} is not what np.load reads")
    print(f"  {name}: as it should be")


async def npy(folder: Path) -> None:
    path = folder / "array.npy"
    np.save(path, np.random.default_rng(1).standard_normal((4096, 1024)))
    async with served(path) as url, aiouffd.open(url) as buffer:
        array = await aiouffd.formats.load_npy(buffer)
        print(f"{url}: {array.dtype}{list(array.shape)}")
        rows = await asyncio.to_thread(lambda: array[[5, 1000, 3000]])
        check("three rows", rows, np.load(path)[[5, 1000, 3000]])
        print(f"{buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes fetched")


async def npz(folder: Path) -> None:
    path, packed = folder / "arrays.npz", folder / "packed.npz"
    random = np.random.default_rng(2)
    np.savez(path, **{f"part{n}": random.standard_normal((512, 1024)) for n in range(8)})
    np.savez_compressed(packed, labels=np.arange(50_000) // 1000)
    with zipfile.ZipFile(path, "a") as archive, zipfile.ZipFile(packed) as other:
        archive.writestr("labels.npy", other.read("labels.npy"), zipfile.ZIP_DEFLATED)
    async with served(path) as url, aiouffd.open(url, readahead=0) as buffer:
        arrays = await aiouffd.formats.load_npz(buffer)
        print(f"{url}: {', '.join(arrays)}")
        print(f"all of them, with {buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes fetched")
        row = await asyncio.to_thread(arrays["part6"][300].copy)
        with np.load(path) as known:
            check("row 300 of part6", row, known["part6"][300])
            check("labels", await asyncio.to_thread(lambda: arrays["labels"]), known["labels"])
        print(f"{buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes fetched")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(npy(Path(folder)))
        asyncio.run(npz(Path(folder)))


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
