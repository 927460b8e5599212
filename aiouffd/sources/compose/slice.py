"""A part of a source, as a source."""

from __future__ import annotations

from typing import Any

from ...errors import FlushError, UsageError
from ..base import Buffer, check_range
from .wrapper import Wrapper

__all__ = ["SliceSource"]


class SliceSource(Wrapper):
    """Bytes ``offset`` to ``offset + length`` of ``source``; without ``length`` all that follow.

    Whether the range lies within the source shows when it is opened (UsageError).
    """

    def __init__(self, source: Any, offset: int, length: int | None = None, **options: Any) -> None:
        if offset < 0 or (length is not None and length < 0):
            raise UsageError(f"a slice of {length} bytes at {offset} cannot be")
        super().__init__(source, **options)
        self._offset = offset
        self._length = length

    @property
    def start(self) -> int:
        """Where the part begins, in bytes."""
        return self._offset

    @property
    def length(self) -> int | None:
        """The length that was given, in bytes; None for all that follows."""
        return self._length

    @property
    def size(self) -> int:
        """Length of the part in bytes."""
        return self._length if self._length is not None else self._inner.size - self._offset

    @property
    def version(self) -> str | None:
        """That of the whole."""
        return getattr(self._inner, "version", None)

    async def _open(self) -> None:
        await super()._open()
        length = 0 if self._length is None else self._length
        if self._offset + length > self._inner.size:
            size = self._inner.size
            await self._take_back()
            raise UsageError(f"a slice of {length} bytes at {self._offset} is not within {size}")

    def clone(self) -> SliceSource:
        """The same part of a clone."""
        return SliceSource(self._inner.clone(), self._offset, self._length)

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset`` of the part."""
        check_range(offset, length, self.size)
        return await super().read(self._offset + offset, length)

    async def _read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(offset, len(buffer), self.size)
        await super()._read_into(self._offset + offset, buffer)

    def _stream(self, offset: int, length: int) -> Any:
        check_range(offset, length, self.size)
        return super()._stream(self._offset + offset, length)

    async def _holes(self, offset: int, length: int) -> Any:
        check_range(offset, length, self.size)
        found = await super()._holes(self._offset + offset, length)
        return [(start - self._offset, count) for start, count in found]

    async def _write(self, offset: int, data: Buffer) -> None:
        check_range(offset, memoryview(data).nbytes, self.size)
        await super()._write(self._offset + offset, data)

    async def _write_zeros(self, offset: int, length: int, *, hole: bool) -> None:
        check_range(offset, length, self.size)
        await super()._write_zeros(self._offset + offset, length, hole=hole)

    async def _trim(self, offset: int, length: int) -> None:
        check_range(offset, length, self.size)
        await super()._trim(self._offset + offset, length)

    async def _flush(self) -> None:
        """Flush all of what is inside. Of what is in doubt this names what lies in the part."""
        try:
            await super()._flush()
        except FlushError as error:
            error.ranges = moved(error.ranges, -self._offset, self.size)
            raise

    @property
    def minimum_block(self) -> int:
        """That inside, if the part begins at such a block."""
        unit = super().minimum_block
        return 1 if self._offset % unit else unit


def moved(ranges: list[tuple[int, int]], by: int, size: int) -> list[tuple[int, int]]:
    """Offsets and lengths, ``by`` bytes further on, as far as they lie within ``size``."""
    found = []
    for at, count in ranges:
        start, end = max(at + by, 0), min(at + by + count, size)
        if start < end:
            found.append((start, end - start))
    return found
