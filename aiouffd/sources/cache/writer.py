"""The thread that writes to the cache, behind the readers' backs.

What it has not got to yet is kept in a queue of so many bytes; what does not fit is not cached.
Every failure means the same: no cache for a while.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .entry import Entry
from .evict import shrink

__all__ = ["Settings", "Writer"]

log = logging.getLogger("aiouffd")

#: Seconds without writing after a failure.
PAUSE = 30.0
#: Looked after the directory's size each time this share of its limit was written.
SHARE = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes in bytes: of the directory, and of what may wait to be written."""

    size_limit: int
    queue: int
    sync: bool


class Writer:
    """Stores blocks of ``entry``. Its methods are called on the loop's thread only."""

    def __init__(self, root: Path, entry: Entry, settings: Settings) -> None:
        self._root = root
        self._entry = entry
        self._settings = settings
        self._executor = ThreadPoolExecutor(1, "aiouffd-cache-write")
        self._lock = threading.Lock()
        self._waiting = 0
        #: Blocks that are not on disk yet.
        self._pending: dict[int, memoryview] = {}
        self._paused = 0.0
        self._since_look = 0
        self._last: Future[None] | None = None
        self.written = 0
        self.dropped = 0
        self._submit(self._look)

    def _submit(self, job: object, *arguments: object) -> None:
        self._last = self._executor.submit(job, *arguments)  # type: ignore[arg-type]

    def blocks(self, first: int, count: int) -> dict[int, memoryview]:
        """Those of ``count`` blocks from ``first`` on that wait to be written, by number."""
        if not self._pending:
            return {}
        found = ((block, self._pending.get(block)) for block in range(first, first + count))
        return {block: data for block, data in found if data is not None}

    def has_room(self, length: int) -> bool:
        """Whether `put` would take so many bytes; counts them as dropped if not."""
        room = self._waiting + length <= self._settings.queue and time.monotonic() >= self._paused
        if not room:
            self.dropped += length
        return room

    def put(self, first: int, data: bytes) -> None:
        """Have whole blocks from ``first`` on written."""
        view = memoryview(data)
        step = self._entry.form.block_size
        blocks = {
            first + number: view[start : start + step]
            for number, start in enumerate(range(0, len(view), step))
        }
        with self._lock:
            self._waiting += len(view)
        self._pending.update(blocks)
        self._submit(self._write, first, view, len(blocks))

    def put_zeros(self, first: int, count: int) -> None:
        """Have noted that ``count`` blocks are zeros."""
        if time.monotonic() >= self._paused:
            self._submit(self._write, first, None, count)

    async def close(self, limit: float) -> None:
        """Write what waits, for at most ``limit`` seconds; the rest is given up."""
        try:
            if self._last is not None and limit > 0:
                await asyncio.wait([asyncio.wrap_future(self._last)], timeout=limit)
        finally:
            self.stop()

    def stop(self) -> None:
        """Give up what waits. Idempotent."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()

    # ------------------------------------------------------ in the own thread

    def _write(self, first: int, data: memoryview | None, count: int) -> None:
        try:
            if time.monotonic() >= self._paused:
                taken = self._entry.write(first, data, count, sync=self._settings.sync)
                self.written += taken
                self._since_look += taken
        except OSError as error:
            self._failed(error)
        finally:
            for block in range(first, first + count):
                self._pending.pop(block, None)
            with self._lock:
                self._waiting -= len(data) if data is not None else 0
        if self._since_look > self._settings.size_limit // SHARE:
            self._look()

    def _look(self) -> None:
        self._since_look = 0
        try:
            shrink(self._root, self._settings.size_limit)
        except FileNotFoundError:
            pass  # all of it was removed: it is small enough
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        log.warning("the cache in %s cannot be written: %s", self._root.parent, error)
        self._paused = time.monotonic() + PAUSE
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            try:
                # A full disk is everybody's, and what is here can be had again.
                shrink(self._root, shrink(self._root, self._settings.size_limit) * 3 // 4)
            except OSError:
                pass
