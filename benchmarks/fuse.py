"""(b) A cold scan of remote bytes as memory: userfaultfd against FUSE, both in Python.

The same bytes from the same server, touched by the same native loop: through a lazy buffer
here, through an mmap of a file of pyfuse3 there (see fuse_passthrough.py).
"""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import Callable

from aiouffd.kernel.lib import ffi

from .baseline.tcp import TcpServer, expected
from .baseline.uffd import PAGE, touch_all
from .common import Report, warm_memory
from .fuse_passthrough import mounted, unavailable
from .scan import GIB, TcpSource, lazy_scan


def fuse_scan(server: TcpServer, size: int) -> float:
    """GiB/s of touching every page of the file. Mounts afresh: the kernel keeps pages."""
    with (
        mounted("tcp", server.host, str(server.port), str(size)) as path,
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory,
    ):
        memory.madvise(mmap.MADV_SEQUENTIAL)
        view = ffi.from_buffer(memory)
        started = time.perf_counter()
        touch_all(int(ffi.cast("uintptr_t", view)), 0, size // PAGE)
        elapsed = time.perf_counter() - started
        ffi.release(view)
        if memory[size - PAGE :] != expected(size - PAGE, PAGE):
            raise AssertionError("wrong bytes through FUSE")
    return size / elapsed / GIB


def _lazy(server: TcpServer, size: int, runner) -> Callable[[], float]:
    async def scan() -> float:
        return await lazy_scan(TcpSource(server.host, server.port, size), size)

    def rate() -> float:
        warm_memory(size + size // 4)
        return size / runner(scan()) / GIB

    return rate


def _warm_fuse_scan(server: TcpServer, size: int) -> float:
    warm_memory(size + size // 4)
    return fuse_scan(server, size)


def run(report: Report, loop: str, runner=asyncio.run) -> None:
    name = f"cold scan of 1 GiB over TCP, against FUSE, {loop}"
    if reason := unavailable():
        report.skip(name, reason)
        return
    size = GIB
    with TcpServer() as server:
        report.compare(
            name,
            ("aiouffd", _lazy(server, size, runner)),
            ("pyfuse3 and mmap", lambda: _warm_fuse_scan(server, size)),
            unit="GiB/s",
            at_least=1.2,
        )
