"""A lazy buffer as a binary file, for libraries that want one.

A file's reads copy out of the buffer's memory by `aiouffd.regions.guarded`: they wait without the
GIL for what is missing, never fault, and raise our errors. A read of several blocks asks for all of
them at once, and for no more than that, unless it goes on where another one ended.
"""

from __future__ import annotations

import errno
import io
import operator
import threading
import warnings
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from ..errors import ClosedError, UsageError
from ..kernel.lib import ffi
from ..regions.exporter import Exporter

if TYPE_CHECKING:
    from ..kernel.calls.pointers import Bytes
    from .buffer import LazyBuffer

__all__ = ["BufferFile", "FileHints", "Reading"]

#: What has a file and not a buffer: whoever looks for these takes it for a file.
_OF_FILES = frozenset(
    ("seek", "tell", "seekable", "readable", "readline", "readlines", "readall", "fileno")
)
_HINT = "buf.file() gives a file"
#: The last position that a file can have.
_LAST = (1 << 63) - 1


class BufferFile(io.RawIOBase):
    """A lazy buffer as a file: binary, read-only, seekable. Made by ``buf.file()`` and `open_file`.

    Reads come complete: less than was asked for means the end. They raise SourceError where the
    bytes cannot be had, ClosedError when the buffer was closed with ``force``, ValueError when the
    file is closed, and, on the main thread, what handlers of signals raise; then the position is as
    before.

    Any thread; several may read at a time, and wait for their bytes at the same time. A read and
    the move of the position are one step, but `seek` and a `read` after it are two: give each
    thread a file of its own, or use `pread`. On the loop's own thread a read of what is missing
    stops the loop, as a touch does.

    While a file is open it counts as a holder of the memory, which goes on being served after
    the buffer's ``aclose()``.
    """

    mode = "rb"
    # Where making it fails it is closed all the same.
    _view: memoryview | None = None
    _close: Callable[[], object] | None = None

    def __init__(
        self,
        buffer: LazyBuffer,
        *,
        heal: Callable[[int, int], object] | None = None,
        close: Callable[[], object] | None = None,
    ) -> None:
        """``heal(offset, length)`` makes bytes resident whose source had failed, and waits for
        that; ``close`` is called at the end of the file."""
        self._view = buffer.view
        self._buffer = buffer
        self._size = len(buffer)
        self._heal = heal
        self._close = close
        self._at = 0
        # Of the position alone, and never held while anybody waits. A handler of a signal may use
        # the file that it interrupts.
        self._lock = threading.RLock()

    # ------------------------------------------------------------------ state

    @property
    def name(self) -> str:
        """What the source is called, without secrets; no path to open."""
        return self._buffer._name

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        return self._size

    def readable(self) -> bool:
        self._check_open()
        return True

    def seekable(self) -> bool:
        self._check_open()
        return True

    def writable(self) -> bool:
        self._check_open()
        return False

    def write(self, _data: Any, /) -> NoReturn:
        """Raises io.UnsupportedOperation."""
        raise io.UnsupportedOperation("write: files over lazy buffers are read-only")

    def fileno(self) -> NoReturn:
        """Raises io.UnsupportedOperation: nothing in the kernel has these bytes under a number."""
        self._check_open()
        raise io.UnsupportedOperation(
            "fileno: a lazy buffer has no descriptor. Instead of mmap or np.memmap, use the"
            " buffer's memory (buf.view, buf.array); instead of np.fromfile,"
            " np.frombuffer(file.read(n)); for what needs a path, buf.save(path)"
        )

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    # --------------------------------------------------------------- position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to ``offset`` from the start, the position or the end; returns where that is.
        Past the end there is nothing to read. OSError (EINVAL) before the start, as of `open`:
        zipfile finds by that what is too small for an archive."""
        self._check_open()
        offset = operator.index(offset)
        with self._lock:
            if whence == io.SEEK_SET:
                target = offset
            elif whence == io.SEEK_CUR:
                target = self._at + offset
            elif whence == io.SEEK_END:
                target = self._size + offset
            else:
                raise ValueError(f"whence is 0, 1 or 2, not {whence!r}")
            if target < 0:
                raise OSError(errno.EINVAL, f"position {target} is before the start")
            if target > _LAST:
                raise OverflowError(f"position {target} is more than a file can have")
            self._at = target
        return target

    def tell(self) -> int:
        self._check_open()
        return self._at

    def _advance(self, length: int) -> tuple[int, int]:
        """Take at most ``length`` bytes: where they are, and how many."""
        with self._lock:
            start = self._at
            count = max(0, min(length, self._size - start))
            self._at = start + count
        return start, count

    def _take_back(self, start: int, count: int) -> None:
        """They were not read. What other threads took meanwhile stays taken."""
        with self._lock:
            if self._at == start + count:
                self._at = start

    # ---------------------------------------------------------------- reading

    def read(self, size: int | None = -1, /) -> bytes:
        """The next ``size`` bytes, fewer only at the end; all that follow without it."""
        self._check_open()
        if size is None or size < 0:
            return self.readall()
        start, count = self._advance(operator.index(size))
        try:
            return self._copy(start, count)
        except BaseException:
            self._take_back(start, count)
            raise

    def readall(self) -> bytes:
        """Everything from here to the end."""
        self._check_open()
        return self.read(self._size)

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer``, a writable one; returns the count, less only at the end."""
        self._check_open()
        with ffi.from_buffer(buffer, require_writable=True) as target:
            start, count = self._advance(len(target))
            try:
                self._fill(start, target, count)
            except BaseException:
                self._take_back(start, count)
                raise
        return count

    def pread(self, size: int, offset: int, /) -> bytes:
        """``size`` bytes from ``offset`` on, fewer only at the end, as `os.pread`: the position is
        neither used nor changed."""
        self._check_open()
        size, offset = operator.index(size), operator.index(offset)
        if size < 0 or offset < 0:
            raise UsageError(f"{size} bytes at {offset}: neither may be negative")
        return self._copy(offset, max(0, min(size, self._size - offset)))

    def readline(self, size: int | None = -1, /) -> bytes:
        """Up to and with the next newline, ``size`` bytes at most; what comes before is fetched."""
        self._check_open()
        while True:
            start = self._at
            end = self._size if size is None or size < 0 else min(self._size, start + size)
            if start >= end:
                return b""
            length = self._find_newline(start, end) - start
            with self._lock:
                if self._at != start:
                    continue  # another thread has read this line
                self._at = start + length
            try:
                return self._copy(start, length)
            except BaseException:
                self._take_back(start, length)
                raise

    def _find_newline(self, start: int, end: int) -> int:
        """Where the line ends that begins at ``start``, or ``end``."""
        block = self._buffer.block_size
        while start < end:
            # Block by block: a search may ask for all of its range at once.
            stop = min(end, start - start % block + block)
            found = self._buffer._search(self._region(), b"\n", start, stop)
            if found >= 0:
                return found + 1
            start = stop
        return end

    def _copy(self, offset: int, length: int) -> bytes:
        # Fresh, and seen by nobody else until it is filled.
        data = bytes(length)
        self._fill(offset, ffi.from_buffer(data), length)
        return data

    def _fill(self, offset: int, target: Bytes, length: int) -> None:
        if not length:
            return
        buffer, region = self._buffer, self._region()
        if self._heal is not None and buffer._failed:
            self._heal(offset, length)
        buffer._fill(region, offset, target, length)

    def _region(self) -> Any:
        region = self._buffer._region
        if region is None:
            raise ClosedError("the buffer is closed")
        return region

    # ------------------------------------------------------------------ close

    def close(self) -> None:
        """Let go of the memory, and end a buffer that `open_file` made. Idempotent. Threads that
        read at this moment get their bytes, or ClosedError."""
        if self.closed:
            return
        super().close()
        view, self._view = self._view, None
        if view is not None:
            view.release()
        close, self._close = self._close, None
        if close is not None:
            close()

    def __del__(self) -> None:
        if self.closed:
            return
        try:
            if self._close is not None:
                warnings.warn(f"unclosed file {self!r}", ResourceWarning, source=self, stacklevel=1)
        finally:
            self.close()

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> NoReturn:
        raise TypeError("a file cannot be pickled; pickle the lazy buffer")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"at {self._at} of {self._size} bytes"
        return f"<BufferFile {self.name} {state}>"


class FileHints:
    """What lazy buffers say to those who take them for files."""

    #: What else people look for, and what there is instead.
    _hints: ClassVar[dict[str, str]] = {}

    if not TYPE_CHECKING:  # which would believe in any attribute

        def __getattr__(self, name: str) -> NoReturn:
            hint = _HINT if name in _OF_FILES else type(self)._hints.get(name)
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}"
                + (f"; {hint}" if hint else ""),
                name=name,
                obj=self,
            )


class Reading(Exporter, Coroutine[Any, Any, bytes]):
    """What ``buf.read()`` returns: to be awaited, and an error for whoever takes it for bytes.

    It exports no memory, but whoever asks for some (``io.BytesIO(buf.read())``, as Pillow does) is
    told why.
    """

    __slots__ = ("__weakref__", "_coroutine")

    def __init__(self, coroutine: Coroutine[Any, Any, bytes]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def _not_bytes(self) -> NoReturn:
        self._coroutine.close()
        raise TypeError(
            "`await buf.read(offset, length)` gives bytes, buf.read() alone does not (buf.file() is"
            " a file, whose read(size) returns them)"
        )

    def _export(self) -> NoReturn:
        self._not_bytes()

    def __bool__(self) -> bool:
        return True  # asyncio asks whether a task has a coroutine

    def __len__(self) -> int:
        self._not_bytes()

    def __getitem__(self, _key: Any) -> NoReturn:
        self._not_bytes()

    def __getattr__(self, name: str) -> Any:
        # asyncio asks coroutines for names of theirs, which classes have too.
        if not name.startswith("__") and hasattr(bytes, name):
            self._not_bytes()
        return getattr(self._coroutine, name)
