"""Lazy memory as a sequence of bytes: what ``bytes`` can do, and arrays.

Nothing here holds more than a few megabytes that nobody asked for.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from ..regions.exporter import Exporter
from .arrays import Order, Shape, array_over

if TYPE_CHECKING:
    from .arrays import Array

__all__ = ["STEP", "ByteSequence"]

#: Bytes that are copied at a time by what looks at many.
STEP = 8 * 1024 * 1024


def check_bytes(what: object) -> None:
    """Raise TypeError unless ``what`` can be looked for among bytes."""
    try:
        memoryview(what).release()  # type: ignore[arg-type]
    except TypeError:
        hint = "; text.encode() makes bytes of it" if isinstance(what, str) else ""
        raise TypeError(
            f"a bytes-like object is looked for, not {type(what).__name__}{hint}"
        ) from None


class ByteSequence(Exporter):
    """``len``, indexing, iteration, ``in`` and arrays for what can copy out of its memory.

    A subclass has a length, a `view` and `_copy_out`; `find` may do better than copying.
    """

    #: Bytes that are fetched at a time, as far as that is known.
    _block_size = 64 * 1024

    @property
    @abstractmethod
    def view(self) -> memoryview:
        """The memory itself."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _copy_out(self, offset: int, length: int) -> bytes:
        """Bytes that are within the memory. Waits for them; raises for what cannot be had."""

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, key: slice) -> bytes: ...

    def __getitem__(self, key: SupportsIndex | slice) -> int | bytes:
        """``buf[i]`` is an int, ``buf[a:b]`` bytes. Waits as any touch; any thread.

        Copies without the GIL, and asks for all blocks of a slice at once; of a slice with a step
        it fetches only blocks that have some of its bytes. Unlike a raw touch of `view`, a page
        whose source failed raises SourceError, and signal handlers run while it waits (on the main
        thread): Ctrl-C is a KeyboardInterrupt out of it. IndexError past the end.
        """
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._copy_out(start, max(0, stop - start))
            return self._strided(range(start, stop, step))
        index = operator.index(key)
        size = len(self)
        if index < 0:
            index += size
        if not 0 <= index < size:
            raise IndexError(f"index {key} is past the end of {size} bytes")
        return self._copy_out(index, 1)[0]

    def _strided(self, places: range) -> bytes:
        stride = abs(places.step)
        # Not the bytes between them where those are whole blocks.
        count = max(1, STEP // stride) if stride < self._block_size else 1
        found = bytearray(len(places))
        for first in range(0, len(places), count):
            some = places[first : first + count]
            low, high = min(some[0], some[-1]), max(some[0], some[-1])
            part = self._copy_out(low, high + 1 - low)
            found[first : first + len(some)] = part[:: places.step]
        return bytes(found)

    def __bytes__(self) -> bytes:
        """All of it, as ``buf[:]``."""
        return self._copy_out(0, len(self))

    def __iter__(self) -> Iterator[int]:
        """Its bytes as numbers. Waits for them a block at a time, as ``buf[...]``."""
        for start in range(0, len(self), self._block_size):
            yield from self[start : start + self._block_size]

    def __reversed__(self) -> Iterator[int]:
        for start in reversed(range(0, len(self), self._block_size)):
            yield from reversed(self[start : start + self._block_size])

    def __contains__(self, what: object) -> bool:
        """Whether these bytes, or the byte of this value, are somewhere in it. As `find`."""
        if isinstance(what, int):
            what = bytes((what,))
        return self.find(what) >= 0  # type: ignore[arg-type]

    def find(self, sub: bytes, start: int = 0, end: int | None = None) -> int:
        """The lowest index where ``sub`` is found in ``buf[start:end]``, or -1; as mmap.find.

        Fetches what it searches. Any thread; raises as ``buf[...]`` does.
        """
        check_bytes(sub)
        sub = memoryview(sub).tobytes()
        at, stop, _ = slice(start, end).indices(len(self))
        while stop - at >= len(sub):
            # One that begins in this step may end in the next.
            part = self._copy_out(at, min(STEP + len(sub), stop - at))
            found = part.find(sub)
            if found >= 0:
                return at + found
            at += STEP
        return -1

    def array(
        self,
        dtype: Any = "u1",
        shape: Shape = None,
        offset: int = 0,
        *,
        order: Order = "C",
        strides: Iterable[int] | None = None,
    ) -> Array:
        """A NumPy array over the memory, from byte ``offset`` on. Fetches nothing.

        It holds the memory, as a view does; it is read-only unless the memory is writable, and need
        not be aligned. Any thread.

        Raises UsageError for what does not fit, UnsupportedError without NumPy.

        Args:
            dtype: A dtype or its name, those of ml_dtypes as well ("bfloat16"); in any byte order
                (">f4"), structured ones too.
            shape: A length or lengths; all that there is by default.
            order: Which axis is the quickest to walk along: the last ("C") or the first ("F").
            strides: Instead of that, the bytes from one element to the next along each axis; 0 and
                negative ones too.
        """
        return array_over(self.view, dtype, shape, offset, order, strides)
