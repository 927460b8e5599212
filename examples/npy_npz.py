"""NumPy's own files on a server, as arrays of which only what is touched is fetched.

    python examples/npy_npz.py

An .npy file is a header and an array: the header is read with `await` and parsed by NumPy's public
functions, the array is lazy memory. An .npz file is a zip archive of .npy files. What np.savez
writes is stored as it is, so these arrays are lazy too, found through the archive's directory;
members that are compressed (np.savez_compressed) have to be read as a whole. np.load, which
reads the files from the disk, tells whether the arrays are right.

Needs NumPy and aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import struct
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

HEADER = 16 * 1024  # more than the longest header that NumPy accepts
LOCAL = struct.Struct("<4s22xHH")  # of a zip archive's member: its magic number, two lengths


def array_over(memory: memoryview, start: int, head: bytes) -> np.ndarray:
    """The array of the .npy file that begins at byte `start` of `memory`, with `head`."""
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format is for np.load")
    if dtype.hasobject:
        raise ValueError("pickled objects cannot be used where they are")
    order = "F" if fortran_order else "C"
    return np.ndarray(shape, dtype, memory, start + file.tell(), order=order)


def arrays_of(buffer: aiouffd.LazyBuffer) -> dict[str, np.ndarray]:
    """The arrays of an .npz file: over the buffer's memory where that can be, else read."""
    found = {}
    with buffer.file() as directory, zipfile.ZipFile(directory) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED:
                with archive.open(member) as file:
                    found[name] = np.lib.format.read_array(file)
                continue
            # A header of the member's own stands before it, with a name and extra fields.
            at = member.header_offset
            magic, *lengths = LOCAL.unpack(buffer[at : at + LOCAL.size])
            if magic != b"PK\3\4":
                raise zipfile.BadZipFile(f"there is no member at byte {at}")
            at += LOCAL.size + sum(lengths)
            found[name] = array_over(buffer.view, at, buffer[at : at + HEADER])
    return found


def check(name: str, found: np.ndarray, known: np.ndarray) -> None:
    if not np.array_equal(found, known):
        raise SystemExit(f"WRONG: {name} is not what np.load reads")
    print(f"  {name}: as it should be")


async def npy(folder: Path) -> None:
    path = folder / "array.npy"
    np.save(path, np.random.default_rng(1).standard_normal((4096, 1024)))
    async with served(path) as url, aiouffd.open(url) as buffer:
        head = await buffer.read(0, min(HEADER, len(buffer)))
        array = array_over(buffer.view, 0, head)
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
        arrays = await asyncio.to_thread(arrays_of, buffer)
        print(f"{url}: {', '.join(arrays)}")
        print(f"all of them, with {buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes fetched")
        row = await asyncio.to_thread(arrays["part6"][300].copy)
        with np.load(path) as known:
            check("row 300 of part6", row, known["part6"][300])
            check("labels", arrays["labels"], known["labels"])
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
