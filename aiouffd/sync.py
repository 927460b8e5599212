"""Lazy buffers without an event loop in user code: ``with aiouffd.sync.open(url) as buf``.

The loop that serves them is the background one of `aiouffd.rescue`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .buffer import BufferStats, LazyBuffer
from .buffer import _reopen as _reopen_lazy
from .buffer import open as _open
from .errors import UsageError
from .exporter import Exporter
from .rescue import service
from .workingset import Recording, WorkingSet

__all__ = ["SyncBuffer", "open"]


def open(source: Any, **settings: Any) -> SyncBuffer:
    """Open a lazy buffer; blocks until its size is known. Arguments as `aiouffd.open`.

    Any thread without a running event loop; with one, use `aiouffd.open`.
    """
    return SyncBuffer(_open(source, **settings))


class SyncBuffer(Exporter):
    """A `LazyBuffer` with blocking methods. All of them from any thread."""

    def __init__(self, buffer: LazyBuffer) -> None:
        if service.is_current_thread:
            raise UsageError("sync buffers cannot be used on aiouffd's own background thread")
        self._buffer = buffer
        self._run(buffer.aopen())

    def _run(self, coroutine: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return service.submit(coroutine).result()
        coroutine.close()
        raise UsageError(
            "aiouffd.sync blocks, and this thread runs an event loop", hint="use aiouffd.open"
        )

    def __enter__(self) -> SyncBuffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def view(self) -> memoryview:
        """See `LazyBuffer.view`."""
        return self._buffer.view

    def _export(self) -> memoryview:
        return self._buffer.view

    @property
    def address(self) -> int:
        """Address of the first byte, aligned to a page."""
        return self._buffer.address

    @property
    def closed(self) -> bool:
        return self._buffer.closed

    @property
    def stats(self) -> BufferStats:
        """See `LazyBuffer.stats`."""
        return self._buffer.stats

    def __len__(self) -> int:
        return len(self._buffer)

    def __getitem__(self, key: int | slice) -> Any:
        return self._buffer[key]

    def find(self, sub: bytes, start: int = 0, end: int | None = None) -> int:
        """See `LazyBuffer.find`."""
        return self._buffer.find(sub, start, end)

    def resident(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """See `LazyBuffer.resident`."""
        return self._buffer.resident(offset, length)

    def fetch(self, offset: int = 0, length: int | None = None) -> None:
        """See `LazyBuffer.fetch`; blocks."""
        self._run(self._buffer.fetch(offset, length))

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """See `LazyBuffer.read`; blocks."""
        data: bytes = self._run(self._buffer.read(offset, length))
        return data

    def readinto(self, offset: int, buffer: Any) -> int:
        """See `LazyBuffer.readinto`; blocks."""
        count: int = self._run(self._buffer.readinto(offset, buffer))
        return count

    @contextmanager
    def pin(self, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
        """See `LazyBuffer.pin`."""
        if length is None:
            length = len(self) - offset
        self.fetch(offset, length)
        with self.view[offset : offset + length] as view:
            yield view

    def prefetch(self, working_set: WorkingSet) -> bool:
        """See `LazyBuffer.prefetch`."""
        return bool(self._run(self._buffer.prefetch(working_set)))

    def record(self) -> Recording:
        """See `LazyBuffer.record`."""
        return self._buffer.record()

    def close(self) -> None:
        """See `LazyBuffer.aclose`; blocks. Idempotent."""
        if not self._buffer.closed:
            self._run(self._buffer.aclose())

    def __reduce__(self) -> Any:
        function, arguments = self._buffer.__reduce__()
        assert function is _reopen_lazy
        return _reopen, arguments

    def __repr__(self) -> str:
        return repr(self._buffer).replace("LazyBuffer", "SyncBuffer")


def _reopen(*arguments: Any) -> SyncBuffer:
    return SyncBuffer(_reopen_lazy(*arguments))
