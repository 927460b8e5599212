"""A program in C whose memory is filled by a page server in Python.

    python examples/page_server.py

Compiles ``native/client/example.c``, which attaches to a socket and adds up an object's bytes as if
they were in memory, and serves it from a coroutine. The C program knows one header file, and
nothing of Python, HTTP or caches. Needs a C compiler.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import aiouffd.serve
from aiouffd.sources import FunctionSource

CLIENT = Path(__file__).resolve().parent.parent / "native" / "client"
SIZE = 4 << 20
PAGE = 4096


def page(number: int) -> bytes:
    """What the object has there: any function of the place will do."""
    return hashlib.shake_128(number.to_bytes(8, "little")).digest(PAGE)


async def read(offset: int, length: int) -> bytes:
    await asyncio.sleep(0.002)  # somewhere far away
    first, end = offset // PAGE, -(-(offset + length) // PAGE)
    data = b"".join(page(number) for number in range(first, end))
    return data[offset - first * PAGE :][:length]


async def main() -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not CLIENT.exists():
        print("skipped: this needs a C compiler, and the checkout's native/client")
        return
    with tempfile.TemporaryDirectory() as name:
        program, path = Path(name, "example"), Path(name, "pager.sock")
        command = [compiler, "-std=c11", "-O2", "-pthread", "-I", aiouffd.include_dir()]
        command += [CLIENT / "example.c", "-o", program]
        await asyncio.to_thread(subprocess.run, command, check=True)
        source = FunctionSource(read, size=SIZE)
        async with aiouffd.serve.listen(path, source=source, readahead=1 << 20) as server:
            client = await asyncio.create_subprocess_exec(
                program, path, stdout=asyncio.subprocess.PIPE
            )
            said, _ = await client.communicate()
            stats = server.stats
    expected = sum(sum(page(number)) for number in range(SIZE // PAGE))
    print(f"the C program says {int(said)}, {'as' if int(said) == expected else 'NOT'} expected")
    print(f"{stats.faults} faults, {stats.installed_bytes >> 20} MiB in {SIZE // PAGE} pages")
    if int(said) != expected:
        sys.exit(1)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    asyncio.run(main())
