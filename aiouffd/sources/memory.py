"""Bytes that are in memory already."""

from __future__ import annotations

from ..errors import UnsupportedError, UsageError
from .base import BaseSource, Buffer, check_range

__all__ = ["MemorySource"]


class MemorySource(BaseSource):
    """A source over an existing buffer, without copying it.

    ``data`` is bytes, a bytearray, a memoryview or any other contiguous buffer, and is kept
    alive (a bytearray cannot be resized meanwhile). Changing its contents changes what later
    reads give. Raises UsageError if it is not a contiguous buffer.

    Safe on any loop and in any thread; ``clone()`` shares the memory.
    """

    def __init__(self, data: object) -> None:
        try:
            view = memoryview(data)  # type: ignore[arg-type]
            self._data = view.cast("B") if view.nbytes else memoryview(b"")
        except TypeError as exc:
            raise UsageError(
                f"MemorySource needs a contiguous buffer, not {type(data).__name__}"
            ) from exc

    def __repr__(self) -> str:
        return f"<MemorySource of {self.size} bytes>"

    @property
    def data(self) -> memoryview:
        """The memory itself, as a flat memoryview of bytes."""
        return self._data

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._data.nbytes

    async def read(self, offset: int, length: int) -> Buffer:
        """Return a slice of the memory, uncopied. Raises UsageError for a range outside it."""
        check_range(offset, length, self.size)
        return self._data[offset : offset + length]

    def read_now(self, offset: int, length: int) -> Buffer:
        """As `read`, without a coroutine."""
        check_range(offset, length, self.size)
        return self._data[offset : offset + length]

    @property
    def writable(self) -> bool:
        """Whether the memory can be written to."""
        return not self._data.readonly

    async def write(self, offset: int, data: Buffer) -> None:
        """Copy ``data`` to byte ``offset``. Raises UnsupportedError for read-only memory."""
        if self._data.readonly:
            raise UnsupportedError(f"{self!r} is read-only", hint="give a bytearray, or the like")
        view = memoryview(data).cast("B")
        check_range(offset, view.nbytes, self.size)
        self._data[offset : offset + view.nbytes] = view

    def clone(self) -> MemorySource:
        """Return a source over the same memory."""
        return MemorySource(self._data)
