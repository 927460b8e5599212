"""An object on a server of its own process, on loopback, for several benchmarks.

The server is tests/servers/http.py, on uvloop. The object is a mapped file that stays in the page
cache, so what is measured is never a disk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from .baseline.build import OUTPUT

if TYPE_CHECKING:
    from tests.servers.http import ServerProcess

#: Every so often the object holds a number.
MARK = 64 * 1024

_NUMBER = struct.Struct("<Q")
_PAGE = 4096
_PIECE = 1 << 20


def mark(offset: int) -> bytes:
    """What the object holds at ``offset``, another number for each page."""
    return _NUMBER.pack((offset // _PAGE + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)


def wrong(memory: memoryview, step: int = MARK, start: int = 0) -> list[int]:
    """Offsets of numbers that are not what they should be, in bytes from ``start`` on."""
    return [
        start + offset
        for offset in range(0, len(memory), step)
        if memory[offset : offset + _NUMBER.size] != mark(start + offset)
    ]


@contextmanager
def marked_file(size: int, step: int = MARK, *, sparse: bool = True) -> Iterator[Path]:
    """A file with the object, a number every ``step`` bytes; holes between them, or noise."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=OUTPUT, prefix="object-") as file:
        file.truncate(size)
        if not sparse:
            noise = os.urandom(_PIECE)
            for _ in range(0, size, _PIECE):
                file.write(noise)
        for offset in range(0, size, step):
            file.seek(offset)
            file.write(mark(offset))
        file.flush()
        yield Path(file.name)


@contextmanager
def serving(
    size: int, *, path: str = "/object", step: int = MARK, latency: float = 0.0
) -> Iterator[ServerProcess]:
    """A server that has the object at ``path``, and answers ``latency`` seconds late."""
    from tests.servers.http import start_in_process

    with (
        marked_file(size, step) as file,
        start_in_process({path: file}, latency=latency, record=False) as server,
    ):
        yield server
