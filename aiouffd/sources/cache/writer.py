"""The thread that writes to the cache, behind the readers' backs.

What it has not got to yet is kept in a queue of so many bytes; what does not fit is not cached.
Every failure means the same: no cache for a while.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...errors import SourceError
from ..lifecycle import submit
from .entry import Entry
from .evict import FULL, make_room, shrink

__all__ = ["Settings", "Writer"]

log = logging.getLogger("aiouffd")

#: Seconds without writing after a failure.
PAUSE = 30.0
#: Looked after the directory's size each time this share of its limit was written.
SHARE = 32
#: And by a process that opens sources all the time, each so many seconds: others write too.
LOOK = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes in bytes: of the directory, and of what may wait to be written."""

    size_limit: int
    queue: int
    sync: bool


class _Looks:
    """When this process last looked after a directory, and how much it has written there since.

    For all its sources together: a thousand of them write a thousand times as much, and looking
    takes time for each file there is. Changed without a lock, by threads that a fork may
    end: what is lost that way are bytes of one write, or two threads look at a time.
    """

    def __init__(self) -> None:
        self._at = float("-inf")
        self._limit = 0
        #: The process in which a thread looks now.
        self._looking = 0
        self.written = 0

    def due(self, limit: int) -> bool:
        """Whether to look when a source opens."""
        late = time.monotonic() - self._at > LOOK
        return late or limit < self._limit or self.enough(limit)

    def enough(self, limit: int) -> bool:
        """Whether to look when something was written."""
        return self.written > limit // SHARE

    def look(self, root: Path, limit: int) -> None:
        """Evict what is too much, or leave that to who is at it. Raises OSError. It is due as
        before if nothing was done."""
        if self._looking == os.getpid():
            return  # and looks again if others have written meanwhile
        self._looking = os.getpid()
        try:
            while self._look(root, limit) and self.enough(limit):
                pass
        finally:
            self._looking = 0

    def _look(self, root: Path, limit: int) -> bool:
        written, self.written = self.written, 0
        done = False
        try:
            done = shrink(root, limit) is not None
        except FileNotFoundError:
            done = True  # all of it was removed: it is small enough
        finally:
            self.written += 0 if done else written
        if done:
            self._at, self._limit = time.monotonic(), limit
        return done


_looks: defaultdict[Path, _Looks] = defaultdict(_Looks)


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
        self._looks = _looks[root]
        self._last: Future[None] | None = None
        self.written = 0
        self.dropped = 0
        if self._looks.due(settings.size_limit):
            self._submit(self._look)

    def _submit(self, job: Callable[..., None], *arguments: object) -> bool:
        """Have the thread do it; False, and a pause, if there is none to be had."""
        try:
            self._last = submit(self._executor, job, *arguments)
        except SourceError as error:
            self._failed(error)
            return False
        return True

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
        if not self._submit(self._write, first, view, len(blocks)):
            self._written(first, len(blocks), len(view))
            self.dropped += len(view)

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
        enough = self._looks.enough
        try:
            if enough(self._settings.size_limit) and time.monotonic() >= self._paused:
                self._look()  # it could not the last time
            if time.monotonic() >= self._paused:
                taken = self._entry.write(first, data, count, sync=self._settings.sync)
                self.written += taken
                self._looks.written += taken
        except FileNotFoundError:
            # Who evicts was faster each time: as if this had been written, and evicted.
            self.dropped += len(data) if data is not None else 0
        except OSError as error:
            self._failed(error)
        finally:
            self._written(first, count, len(data) if data is not None else 0)
        if enough(self._settings.size_limit) and time.monotonic() >= self._paused:
            self._look()

    def _written(self, first: int, count: int, length: int) -> None:
        """These blocks wait no longer."""
        for block in range(first, first + count):
            self._pending.pop(block, None)
        with self._lock:
            self._waiting -= length

    def _look(self) -> None:
        try:
            self._looks.look(self._root, self._settings.size_limit)
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        log.warning("the cache in %s cannot be written: %s", self._root.parent, error)
        self._paused = time.monotonic() + PAUSE
        if error.errno in FULL:
            make_room(self._root, self._settings.size_limit)
