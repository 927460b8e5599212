"""Memory that the hardware loses: what can be fetched again is, and lost writes are an error.

Real errors are made by MADV_HWPOISON, where the kernel handles them (CONFIG_MEMORY_FAILURE) and we
are root. Everywhere their effect is made otherwise: SIGBUS from a page that is there.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import mmap
from typing import Any

import numpy as np
import pytest

import aiouffd
from aiouffd import SourceError
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.sources.function import FunctionSource
from tests.support import Counters, Gate, content, wait_until

SIZE = 1 << 20
DATA = content(SIZE)
MADV_HWPOISON = 100

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def break_page(buf: Any, page: int, *, really: bool = False) -> None:
    region = buf._mapping.region
    address = region.address + page * PAGE_SIZE
    if really:
        if libc.madvise(address, PAGE_SIZE, MADV_HWPOISON):
            pytest.skip("this kernel makes no memory errors, or not for us")
        return
    assert libc.madvise(address, PAGE_SIZE, mmap.MADV_DONTNEED) == 0
    region.pager.uffd.poison(address, PAGE_SIZE)


def opened(**options: Any) -> Any:
    source = FunctionSource(Gate(DATA).read, size=SIZE)
    return aiouffd.open(source, block_size=65536, readahead=0, **options)


WAYS = {
    "index": lambda buf: buf[: 4 * PAGE_SIZE],
    "touch": lambda buf: bytes(buf.view[: 4 * PAGE_SIZE]),
    "file": lambda buf: buf.file().read(4 * PAGE_SIZE),
    "find": lambda buf: buf.find(DATA[2 * PAGE_SIZE : 2 * PAGE_SIZE + 8]),
    "copy": lambda buf: np.array(buf.array("u1", 4 * PAGE_SIZE)).tobytes(),
}


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.needs_root)])
@pytest.mark.parametrize("way", list(WAYS))
async def test_lost_memory_is_fetched_again(
    way: str, really: bool, counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "aiouffd")
    async with opened() as buf:
        await buf.fetch()
        await asyncio.to_thread(break_page, buf, 2, really=really)
        async with asyncio.timeout(20):
            found = await asyncio.to_thread(WAYS[way], buf)
        assert found == (2 * PAGE_SIZE if way == "find" else DATA[: 4 * PAGE_SIZE])
        assert counters["renewed_bytes"] == PAGE_SIZE
        await asyncio.to_thread(
            wait_until, lambda: "memory error" in caplog.text, "the log to tell of it"
        )
        assert await buf.read() == DATA


async def test_lost_writes_are_an_error_until_they_are_dropped() -> None:
    async with opened(writable=True) as buf:
        await buf.fetch()
        buf.view[2 * PAGE_SIZE] = 0x55
        break_page(buf, 2)
        for _ in range(2):
            with pytest.raises(SourceError, match="memory error") as caught:
                await asyncio.to_thread(lambda: buf[: 4 * PAGE_SIZE])
            assert caught.value.hint is not None
            assert "drop" in caught.value.hint
            with pytest.raises(SourceError, match="memory error"):
                await buf.read(2 * PAGE_SIZE, 8)
        await buf.drop(2 * PAGE_SIZE, PAGE_SIZE, writes_too=True)
        assert await buf.read() == DATA
