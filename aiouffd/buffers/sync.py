"""Lazy buffers without an event loop in user code: ``with aiouffd.sync.open(url) as buf``.

The loop that serves them is the background one of `aiouffd.regions.rescue`.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, ParamSpec, TypeVar

from ..errors import ClosedError, UsageError
from ..fetch.advice import Hint
from ..fetch.workingset import Recording, WorkingSet
from ..regions.rescue import service
from ..util.keywords import one_source, path_of
from ..util.terminal import Progress, reporting
from .buffer import BufferStats, LazyBuffer
from .buffer import _reopen as _reopen_lazy
from .buffer import open as _open
from .byte_sequence import ByteSequence
from .file import BufferFile, FileHints

if TYPE_CHECKING:
    from torch import Tensor

    from .arrays import Shape

__all__ = ["SyncBuffer", "open", "open_file"]

log = logging.getLogger("aiouffd")
#: Bytes that are fetched between two reports of progress.
PROGRESS_STEP = 16 * 1024 * 1024

T = TypeVar("T")
P = ParamSpec("P")


def _as(_like: Callable[P, object], /) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """For functions that take what another one takes: its arguments, for type checkers and help."""

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        signature = inspect.signature(_like)
        result = inspect.signature(function).return_annotation
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            return_annotation=result
        )
        return function

    return decorate


@_as(_open)
@one_source
def open(source: Any, **settings: Any) -> SyncBuffer:
    """Open a lazy buffer; blocks until its size is known. Arguments as `aiouffd.open`.

    Any thread, also one that runs an event loop (a notebook's cell): that loop stands still
    meanwhile, as with any blocking call, so the source must not need it.
    """
    return SyncBuffer(_open(source, **settings))


@_as(_open)
@one_source
def open_file(source: Any, **settings: Any) -> BufferFile:
    """Open an object as a file: binary, read-only, seekable, and fetched where it is read.

    For libraries that want a file (zipfile, Pillow, h5py, pandas, ...). Blocks until the size is
    known; arguments and errors as `open`. Closing the file ends all.
    """
    buffer = open(source, **settings)

    def close() -> None:
        if service.is_current_thread:
            buffer._abandon()  # collected there, where nobody may wait
        else:
            buffer.close()

    return BufferFile(buffer._buffer, heal=buffer.fetch, close=close)


class SyncBuffer(FileHints, ByteSequence):
    """A `LazyBuffer` with blocking methods, for any thread, and inside signal handlers.

    Handlers of signals run while a call waits, on the main thread, and what they raise (Ctrl-C is
    KeyboardInterrupt) comes out of the call at once.
    """

    # Methods may run when the modules' names are gone already.
    _interpreter_ends = staticmethod(sys.is_finalizing)

    _hints: ClassVar = {
        "aclose": "close() closes it, or `with`",
        "aopen": "it is open from the start",
        "drained": "aiouffd.open(...) has that",
    }

    def __init__(self, buffer: LazyBuffer) -> None:
        buffer._called, buffer._end_with = "SyncBuffer", "`with` or buf.close()"
        buffer._fetch_again = "buf.fetch()"
        self._buffer = buffer
        self._closed = False
        try:
            self._run(buffer.aopen())
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Opening failed or was interrupted: whatever of it is still under way ends unseen."""
        self._closed = True
        with suppress(RuntimeError, OSError):
            service.submit(self._buffer.aclose())

    def _run(self, coroutine: Coroutine[Any, Any, T], *, cancel: bool = True) -> T:
        if self._interpreter_ends():
            coroutine.close()
            raise ClosedError("the interpreter ends, and nobody is left who could do this")
        return service.block_on(coroutine, cancel=cancel)

    def __enter__(self) -> SyncBuffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """`close`; as `LazyBuffer` does, EFAULT gets a note."""
        self._buffer._explain(exc_info[1])
        self.close()

    if not TYPE_CHECKING:  # which knows better

        async def __aenter__(self) -> NoReturn:
            self.close()
            raise TypeError(
                "aiouffd.sync.open(...) goes with plain `with`; for `async with` there is"
                " aiouffd.open(...)"
            )

        async def __aexit__(self, *exc_info: object) -> None:
            """For `async with` to ask __aenter__ at all."""

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

    def _copy_out(self, offset: int, length: int) -> bytes:
        return self._buffer._copy_out(offset, length)

    @property
    def _block_size(self) -> int:  # type: ignore[override]
        return self._buffer._block_size

    def tensor(self, dtype: Any = "uint8", shape: Shape = None, offset: int = 0) -> Tensor:
        """See `LazyBuffer.tensor`."""
        return self._buffer.tensor(dtype, shape, offset)

    def find(self, sub: bytes, start: int = 0, end: int | None = None) -> int:
        """See `LazyBuffer.find`."""
        return self._buffer.find(sub, start, end)

    def file(self) -> BufferFile:
        """See `LazyBuffer.file`. A read of what the source had failed to bring tries again."""
        return BufferFile(self._buffer, heal=self.fetch)

    def resident(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """See `LazyBuffer.resident`."""
        return self._buffer.resident(offset, length)

    def fetch(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        progress: Progress = None,
    ) -> None:
        """See `LazyBuffer.fetch`; blocks. ``progress`` is called by this thread."""
        offset, length = self._buffer._range(offset, length)
        with reporting(progress, self._buffer._name, length) as report:
            if report is None:
                self._run(self._buffer.fetch(offset, length))
            else:
                self._fetch_in_steps(offset, length, report)

    def _fetch_in_steps(
        self, offset: int, length: int, report: Callable[[int, int], object]
    ) -> None:
        end = offset + length
        while True:
            # Step by step: on the background loop it would hold up all that is served there.
            step = min(PROGRESS_STEP, end - offset)
            self._run(self._buffer.fetch(offset, step))
            offset += step
            report(length - (end - offset), length)
            if offset == end:
                return

    def read(self, offset: int | None = None, length: int | None = None) -> bytes:
        """See `LazyBuffer.read`; blocks. All without arguments. UsageError for an offset alone,
        which would be the length for a file."""
        if offset is not None and length is None:
            raise UsageError(
                "a buffer's read() takes an offset and a length, unlike a file's",
                hint="buf.file() gives a file; buf[offset:] is the rest",
            )
        offset, length = self._buffer._range(offset or 0, length)
        self.fetch(offset, length)
        return self._buffer[offset : offset + length]

    def readinto(self, offset: int, buffer: Any) -> int:
        """See `LazyBuffer.readinto`; blocks. After an exception nothing is written any more."""
        # This thread writes itself. On the background loop it would go on when this call has been
        # interrupted; and lazy memory could not be written there: that loop would wait for itself.
        whole = self._buffer
        with whole._into(offset, buffer) as (target, length):
            self.fetch(offset, length)
            if length:
                whole._guarded(whole._check(), offset, target, length)
        return length

    @contextmanager
    def pin(self, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
        """See `LazyBuffer.pin`."""
        offset, length = self._buffer._range(offset, length)
        with self._buffer._pinned(offset, length):
            self.fetch(offset, length)
            with self.view[offset : offset + length] as view:
                yield view

    def save(self, path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> int:
        """See `LazyBuffer.save`; blocks."""
        return self._run(self._buffer.save(path_of("path", path), offset, length))

    def drop(self, offset: int = 0, length: int | None = None, *, writes_too: bool = False) -> int:
        """See `LazyBuffer.drop`; blocks."""
        return self._run(self._buffer.drop(offset, length, writes_too=writes_too))

    def prefetch(self, working_set: WorkingSet) -> bool:
        """See `LazyBuffer.prefetch`."""
        return bool(self._run(self._buffer.prefetch(working_set)))

    def advise(self, hint: Hint, offset: int = 0, length: int | None = None) -> None:
        """See `LazyBuffer.advise`."""
        self._buffer.advise(hint, offset, length)

    def record(self) -> Recording:
        """See `LazyBuffer.record`."""
        return self._buffer.record()

    def close(self, *, force: bool = False) -> None:
        """See `LazyBuffer.aclose`; blocks. Idempotent. When it is interrupted the closing goes on.

        At the interpreter's end, from ``__del__`` say, it does nothing: all ends with the process.
        """
        if (self._closed and not force) or self._interpreter_ends():
            return
        try:
            self._run(self._buffer.aclose(force=force), cancel=False)
        except TimeoutError:
            if not service.exiting:
                raise
            log.warning("closing %r takes too long at exit, and is left behind", self)
        self._closed = True

    def __reduce__(self) -> Any:
        function, arguments = self._buffer.__reduce__()
        assert function is _reopen_lazy
        return _reopen, arguments

    def __repr__(self) -> str:
        return repr(self._buffer)

    def _repr_html_(self) -> str:
        return self._buffer._repr_html_()


def _reopen(*arguments: Any) -> SyncBuffer:
    return SyncBuffer(_reopen_lazy(*arguments))
