"""Sources that misbehave on order, and memory that has to be reserved first."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import NoReturn, TypeAlias

from aiouffd.errors import SourceError
from aiouffd.sources.base import BaseSource, Buffer, check_length

HUGE = 2 << 20
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

#: Called before a read is answered: it may wait, raise, or return other bytes.
Script: TypeAlias = Callable[[int, int], Awaitable[Buffer | None]]


class PlainSource:
    """The least that a source can be: two methods and a size. Counts what it is asked for."""

    def __init__(self, data: bytes, script: Script | None = None) -> None:
        self.data = data
        self.script = script
        #: Offset and length of each read, those of clones included.
        self.reads: list[tuple[int, int]] = []
        #: Reads under way now, and the most there ever were.
        self.running = self.most = 0

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> Buffer:
        self.reads.append((offset, length))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            answer = await self.script(offset, length) if self.script is not None else None
        finally:
            self.running -= 1
        return self.data[offset : offset + length] if answer is None else answer

    def clone(self) -> PlainSource:
        return self

    @property
    def bytes_read(self) -> int:
        return sum(length for _, length in self.reads)


class FullSource(PlainSource, BaseSource):
    """The same with all optional methods; large ranges are streamed in uneven pieces.

    A stream may end early or go on too long, but no piece of it is in the wrong place.
    """

    piece = 50_001

    async def stream(self, offset, length):  # type: ignore[no-untyped-def]
        end = offset + length
        while offset < end:
            count = min(self.piece, end - offset)
            piece = await self.read(offset, count)
            offset += count
            yield piece if offset == end else check_length(piece, count)


class FailingSource(FullSource):
    """Fails the first ``times`` reads with ``error``, then never again."""

    def __init__(self, data: bytes, times: int, error: Callable[[], Exception]) -> None:
        super().__init__(data, self._fail)
        self.left = times
        self._error = error

    async def _fail(self, offset: int, length: int) -> None:
        if self.left > 0:
            self.left -= 1
            raise self._error()


def transient() -> SourceError:
    return SourceError("the line is noisy", transient=True)


def final() -> SourceError:
    return SourceError("the disk is gone", transient=False)


class Weather:
    """A script in which anything may happen, by a seed: errors, wrong lengths, delays.

    ``fair`` stops all that. Usable from several loops.
    """

    def __init__(self, data: bytes, seed: int, chance: float = 0.25) -> None:
        self._data = data
        self._random = Random(seed)
        self._lock = threading.Lock()
        self._chance = chance
        self.fair = False
        self.troubles = 0

    async def __call__(self, offset: int, length: int) -> Buffer | None:
        with self._lock:
            trouble = not self.fair and self._random.random() < self._chance
            kind, amount = self._random.randrange(7), self._random.random()
            self.troubles += trouble
        if not trouble:
            if amount < 0.1:
                await asyncio.sleep(0)
            return None
        part = self._data[offset : offset + length]
        match kind:
            case 0:
                raise transient()
            case 1:
                raise ConnectionResetError("reset by peer")
            case 2:
                return part[: int(amount * length)]
            case 3:
                return part + b"\xee" * (1 + int(amount * 5000))
            case 4:
                return b""
            case 5:
                await asyncio.sleep(amount * 0.004)
                return None
            case _:
                await asyncio.sleep(amount * 0.002)
                raise TimeoutError("no answer")


def _skip(reason: str) -> NoReturn:
    import pytest  # not at the top: programs that are no tests use this module as well

    pytest.skip(reason)


def free_huge_pages() -> int | None:
    """Huge pages of 2 MiB that nobody uses; None where there can be none."""
    try:
        return int((POOL / "free_hugepages").read_text())
    except OSError:
        return None


@contextlib.contextmanager
def huge_page_pool() -> Iterator[Path]:
    """The file that says how many huge pages of 2 MiB there are, for us alone: the tests of
    several Pythons run at a time."""
    control = POOL / "nr_hugepages"
    try:
        file = control.open()
    except OSError as error:
        _skip(f"cannot reserve huge pages: {error}")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield control


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Reserve ``count`` free huge pages of 2 MiB and give them back; skips where it cannot."""
    with huge_page_pool() as control:
        try:
            before = int(control.read_text())
            free = free_huge_pages() or 0
            if free < count:
                control.write_text(str(before + count - free))
        except OSError as error:
            _skip(f"cannot reserve huge pages: {error}")
        try:
            if (free_huge_pages() or 0) < count:
                _skip("not enough free memory for huge pages")
            yield
        finally:
            control.write_text(str(before))
