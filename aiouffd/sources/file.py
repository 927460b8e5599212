"""Bytes of a file, read with preadv(2).

Small reads are first tried on the loop's thread with RWF_NOWAIT, which the kernel answers only
from the page cache. Everything else goes to this module's own threads, so that it does not
depend on the loop's default executor: that one may be full of threads that wait for our pages.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
import warnings
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

from ..errors import SourceChangedError, SourceError, UnsupportedError, UsageError
from ._fallocate import fallocate_zeros
from .base import BaseSource, Buffer, check_range
from .durability import Promises
from .lifecycle import Life, submit, submitted

__all__ = ["FileSource", "path_of_url"]

T = TypeVar("T")

_INLINE_MAX = 256 << 10  # largest read tried on the loop's thread, bytes
_PIECE = 4 << 20  # one preadv; between two a cancelled read stops, bytes
_STREAM_CHUNK = 1 << 20  # bytes
_HOLES_MAX = 4096
#: Before the second day of 1980: builders of images give all files the beginning of an epoch.
_SAME_FOR_ALL = 315_619_200
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


class _Identity(NamedTuple):
    """What tells one version of a file from another. Not the device's number, which the kernel
    gives anew at every mount."""

    inode: int
    size: int
    mtime_ns: int | None  # None where we write ourselves

    @classmethod
    def of(cls, st: os.stat_result, *, timed: bool) -> _Identity:
        return cls(st.st_ino, st.st_size, st.st_mtime_ns if timed else None)


def _may_stay(st: os.stat_result) -> bool:
    """Whether inode, size and time may stay when the bytes change: of a device, which has no time
    of its contents, and with the time that builders of images give to all files."""
    return not stat.S_ISREG(st.st_mode) or st.st_mtime < _SAME_FOR_ALL


class _SharedFile:
    """An open descriptor that a source and its clones use together (preadv has no position).

    Clones so keep reading the same file after its name was given to another one.
    """

    def __init__(self, path: str, writable: bool) -> None:
        # O_NONBLOCK: opening a pipe by mistake must not wait for a writer.
        access = os.O_RDWR if writable else os.O_RDONLY
        self.fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
        self.writable = writable
        self.nowait = bool(_NOWAIT)
        # Whether it may change unseen; found out when it is opened by somebody.
        self.weak = False
        # Whether SEEK_HOLE may find anything.
        self.sparse = False
        # One account for all users: fsync(2) tells each descriptor once that a write was lost.
        self.promises = Promises(path)
        self._flushing = threading.Lock()
        self._users = 1
        self._lock = threading.Lock()

    def acquire(self) -> bool:
        """Add a user; False if the last one has closed the file."""
        with self._lock:
            if not self._users:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                os.close(self.fd)
                self.fd = -1

    def flush(self) -> None:
        """fdatasync(2). Raises FlushError, and again until what was lost was written again."""
        with self._flushing:
            self.promises.begin()
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                self.promises.broken()
                self.promises.check(error)
            self.promises.kept()
        self.promises.check()

    def identity(self) -> _Identity:
        return _Identity.of(os.fstat(self.fd), timed=not self.writable)


class FileSource(BaseSource):
    """A source over a file.

    Arguments:
        path: the file, or a block device. Opened by ``open()``.
        max_threads: how many blocking calls run at a time.
        writable: open it for `write` too. Its modification time is no part of the version then.

    ``version`` is made of inode, size and modification time; it is checked after every
    read, so a file that is written to raises SourceChangedError. A file *replaced* by a
    rename stays readable, in its old version, for this source and its clones. (A change within
    the resolution of the file system's clock, some milliseconds on older kernels, and writes
    through a shared mapping before their writeback cannot be seen by anybody.)

    ``open()`` raises the OSError of open(2) as it is: FileNotFoundError, PermissionError,
    IsADirectoryError. Reads raise SourceChangedError for a changed or truncated file, and a
    SourceError that is not transient for an I/O error.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_threads: int = 4, writable: bool = False
    ) -> None:
        if max_threads < 1:
            raise UsageError(f"max_threads must be at least 1, got {max_threads}")
        # Absolute now: the working directory may be another one when a clone opens.
        self._path = os.path.abspath(os.fspath(path))
        self._max_threads = max_threads
        self._writable = writable
        self._identity: _Identity | None = None
        self._weak = False
        self._size = 0
        self._file: _SharedFile | None = None
        self._parent: _SharedFile | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._life = Life(repr(self))

    @classmethod
    def from_url(cls, url: str, **options: Any) -> FileSource:
        """The source for a ``file://`` URL, which may be percent-encoded."""
        return cls(path_of_url(url), **options)

    def __repr__(self) -> str:
        return f"<FileSource {self._path!r}>"

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._close()

    @property
    def path(self) -> str:
        """Absolute path of the file."""
        return self._path

    @property
    def weak(self) -> bool:
        """Whether the file may change and its ``version`` stay: a device, or a file with the
        time that builders of images give to all of theirs."""
        return self._weak

    @property
    def size(self) -> int:
        """Length in bytes. Raises UsageError before ``open()``."""
        if self._identity is None:
            raise UsageError(f"the size of {self!r} is not known yet", hint="await open() first")
        return self._size

    async def open(self) -> None:
        """Open the file and pin its version.

        Raises the OSError of open(2), SourceChangedError if a clone finds another version than
        the original had, and UsageError for what has no size (a pipe, a terminal, a file of /proc).
        """
        await self._life.open(self._open, self._finish)

    async def _open(self) -> None:
        executor = ThreadPoolExecutor(self._max_threads, "aiouffd-file")
        # Not a method: its thread must not be what keeps this object alive.
        try:
            opening = submitted(
                executor, _open, self._path, self._writable, self._parent, self._identity
            )
        except BaseException:
            executor.shutdown(wait=False)
            raise
        try:
            file, identity, size = await _settle(opening)
        except BaseException:
            executor.shutdown(wait=False)
            if not opening.cancelled() and opening.exception() is None:
                opening.result()[0].release()
            raise
        self._file = file
        self._executor = executor
        self._identity = identity
        self._size = size
        self._parent = None
        self._weak = file.weak
        self.version = f"{identity.inode}-{size}"
        if identity.mtime_ns is not None:
            self.version += f"-{identity.mtime_ns}"

    async def aclose(self) -> None:
        """Close the file. Reads in flight still finish, and the last closes it. Idempotent."""
        await self._life.close(self._finish)

    async def _finish(self) -> None:
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        executor, self._executor = self._executor, None
        if file is not None:
            file.release()
        if executor is not None:
            executor.shutdown(wait=False)

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        file = self._checked(offset, length)
        if length <= _INLINE_MAX and file.nowait:
            buffer = bytearray(length)
            if self._read_cached(file, memoryview(buffer), offset):
                return buffer
        # The worker's buffer is its own: a cancelled read need not wait for it.
        return await self._submit(file, lambda: self._read(file, offset, length))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` straight into ``buffer``.

        If cancelled, waits until the thread has left ``buffer`` (at most one preadv of 4 MiB).
        """
        file = self._checked(offset, len(buffer))
        if len(buffer) <= _INLINE_MAX and file.nowait and self._read_cached(file, buffer, offset):
            return
        stop = threading.Event()
        await _settle(self._submit(file, lambda: self._fill(file, offset, buffer, stop)), stop)

    async def stream(self, offset: int, length: int) -> AsyncGenerator[Buffer, None]:
        """Yield the range in chunks of 1 MiB; the next is read while one is being used."""
        self._checked(offset, length)
        end = offset + length
        ahead: asyncio.Task[Buffer] | None = None
        try:
            while offset < end:
                count = min(_STREAM_CHUNK, end - offset)
                chunk = await ahead if ahead is not None else await self.read(offset, count)
                ahead = None
                offset += count
                if offset < end:
                    following = self.read(offset, min(_STREAM_CHUNK, end - offset))
                    ahead = asyncio.get_running_loop().create_task(following)
                yield chunk
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.wait([ahead])
                if not ahead.cancelled():
                    ahead.exception()

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Holes of the file (lseek(2), SEEK_HOLE), at most 4,096 of them."""
        file = self._checked(offset, length)
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while file.sparse and at < end and len(found) < _HOLES_MAX:
            try:
                hole = os.lseek(file.fd, at, os.SEEK_HOLE)
                if hole >= end:
                    break
                at = min(_next_data(file.fd, hole), end)
            except OSError:  # a file system that cannot tell
                file.sparse = False
                return []
            found.append((hole, at - hole))
        if found:
            self._check_unchanged(file)
        return found

    @property
    def writable(self) -> bool:
        """Whether it was opened to be written to."""
        return self._writable

    async def write(self, offset: int, data: Buffer) -> None:
        """Write ``data`` at byte ``offset``, within the size that the file has.

        Raises UnsupportedError without ``writable=True``; if cancelled, what has begun is written.
        """
        view = memoryview(data).cast("B")
        file = self._checked_to_write(offset, view.nbytes)

        def put() -> None:
            self._put(file, offset, view)
            file.promises.wrote(offset, view.nbytes)

        await _settle(self._submit(file, put))

    async def write_zeros(self, offset: int, length: int, *, hole: bool) -> None:
        """Have zeros there (fallocate(2)): with ``hole`` without any space for them."""
        file = self._checked_to_write(offset, length)

        def put() -> None:
            self._put_zeros(file, offset, length, hole)
            file.promises.wrote(offset, length)

        await _settle(self._submit(file, put))

    async def trim(self, offset: int, length: int) -> None:
        """Give the space back, if the file system can; zeros are read there then."""
        file = self._checked_to_write(offset, length)

        def punch() -> None:
            if fallocate_zeros(file.fd, offset, length, hole=True):
                file.promises.wrote(offset, length)

        await _settle(self._submit(file, punch))

    async def flush(self) -> None:
        """Have what was written survive a crash of the machine (fdatasync(2)).

        Raises FlushError when that fails, by this source or one of its clones; from then on until
        the ranges were written again, since the kernel reports a write that it lost once only.
        """
        file = self._checked_to_write(0, 0)
        await _settle(self._submit(file, file.flush))

    def clone(self) -> FileSource:
        """Return an unopened source over the same file, pinned to the version of this one.

        It reads through this one's descriptor as long as that is open when the clone opens,
        else through the path.
        """
        other = FileSource(self._path, max_threads=self._max_threads, writable=self._writable)
        other._identity = self._identity
        other._size = self._size
        other.version = self.version
        other._parent = self._file or self._parent
        return other

    def _checked(self, offset: int, length: int) -> _SharedFile:
        if self._file is None:
            self._life.check()
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        check_range(offset, length, self._size)
        return self._file

    def _checked_to_write(self, offset: int, length: int) -> _SharedFile:
        file = self._checked(offset, length)
        if not file.writable:
            raise UnsupportedError(
                f"{self!r} is open for reading only", hint="pass writable=True when making it"
            )
        return file

    def _put(self, file: _SharedFile, offset: int, data: memoryview) -> None:
        try:
            while data:
                done = os.pwrite(file.fd, data[:_PIECE], offset)
                data, offset = data[done:], offset + done
        except OSError as exc:
            raise self._failed(exc, offset, "writing") from exc

    def _put_zeros(self, file: _SharedFile, offset: int, length: int, hole: bool) -> None:
        if fallocate_zeros(file.fd, offset, length, hole=hole):
            return
        zeros = memoryview(bytes(min(length, _PIECE)))
        for at in range(0, length, _PIECE):
            self._put(file, offset + at, zeros[: length - at])

    def _submit(self, file: _SharedFile, func: Callable[[], T]) -> asyncio.Future[T]:
        """Run ``func`` on an own thread, with the file held open."""
        assert self._executor is not None
        file.acquire()
        try:
            running = submit(self._executor, func)
        except BaseException:
            file.release()
            raise
        # Also if it is cancelled before a thread has come to it.
        running.add_done_callback(lambda _: file.release())
        return asyncio.wrap_future(running)

    def _read_cached(self, file: _SharedFile, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` from the page cache if all of it is there, without blocking."""
        try:
            done = os.preadv(file.fd, [buffer], offset, _NOWAIT)
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise self._failed(exc, offset) from exc
            file.nowait = False  # network file systems; fstat could block there too
            return False
        if done < len(buffer):
            return False
        self._check_unchanged(file)
        return True

    def _read(self, file: _SharedFile, offset: int, length: int) -> bytes:
        try:
            # pread allocates without zeroing; it is short only at EOF or past 2 GiB.
            data = os.pread(file.fd, length, offset)
            while len(data) < length:
                more = os.pread(file.fd, length - len(data), offset + len(data))
                if not more:
                    raise self._truncated(file, offset + len(data))
                data += more
        except OSError as exc:
            raise self._failed(exc, offset) from exc
        self._check_unchanged(file)
        return data

    def _fill(
        self, file: _SharedFile, offset: int, buffer: memoryview, stop: threading.Event
    ) -> None:
        done = 0
        try:
            while done < len(buffer) and not stop.is_set():
                count = os.preadv(file.fd, [buffer[done : done + _PIECE]], offset + done)
                if not count:
                    raise self._truncated(file, offset + done)
                done += count
        except OSError as exc:
            raise self._failed(exc, offset + done) from exc
        self._check_unchanged(file)

    def _check_unchanged(self, file: _SharedFile) -> None:
        # After the read: a write that came before its end has changed the time by now.
        if file.identity() != self._identity:
            raise SourceChangedError(f"{self._path} was written to after it was opened")

    def _truncated(self, file: _SharedFile, offset: int) -> SourceError:
        if os.fstat(file.fd).st_size == self._size:
            return SourceError(
                f"{self._path} gives no more than {offset} bytes, though its size is {self._size}",
                transient=False,
                hint="it is none of a file system's files (of sysfs?): cat it to one, and use that",
            )
        return SourceChangedError(f"{self._path} ends at byte {offset}: it was truncated")

    def _failed(self, exc: OSError, offset: int, what: str = "reading") -> SourceError:
        if isinstance(exc, SourceError):
            return exc
        return SourceError(
            f"{what} {self._path} at byte {offset} failed: {exc.strerror}",
            transient=exc.errno in (errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.ETIMEDOUT),
            errno=exc.errno,
        )


def _open(
    path: str, writable: bool, parent: _SharedFile | None, expected: _Identity | None
) -> tuple[_SharedFile, _Identity, int]:
    """Open ``path``, or share ``parent``; return it with its identity and size in bytes."""
    file = parent if parent is not None and parent.acquire() else _SharedFile(path, writable)
    try:
        st = os.fstat(file.fd)
        if stat.S_ISDIR(st.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        identity = _Identity.of(st, timed=not writable)
        file.weak = _may_stay(st)
        if expected is not None and identity != expected:
            raise SourceChangedError(f"{path} is not the file that was opened")
        return file, identity, _size_of(path, file, st)
    except BaseException:
        file.release()
        raise


def _size_of(path: str, file: _SharedFile, st: os.stat_result) -> int:
    """Length in bytes. Raises UsageError for what has none."""
    hint = "copy what it gives to a file, and use that"
    if stat.S_ISREG(st.st_mode):
        file.sparse = file.writable or st.st_blocks * 512 < st.st_size
        if st.st_size:
            return st.st_size
        # Files of /proc are empty, says stat(2), and have contents all the same.
        try:
            empty = not os.pread(file.fd, 1, 0)
        except OSError:
            empty = False
        if empty:
            return 0
        raise UsageError(f"{path} has no size: it is made up while it is read", hint=hint)
    try:
        # Only seeking tells the size of a block device; a pipe fails here.
        size = os.lseek(file.fd, 0, os.SEEK_END)
    except OSError as exc:
        raise UsageError(f"{path} cannot be read at an offset", hint=hint) from exc
    if not size and stat.S_ISCHR(st.st_mode):
        raise UsageError(f"{path} is a device without a size", hint=hint)
    return size


def path_of_url(url: str) -> str:
    """The path that a ``file://`` URL names, percent-decoded (RFC 8089). Raises UsageError."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise UsageError(
            f"{url!r} does not name a file of this machine", hint="write file:///absolute/path"
        )
    if "?" in url or "#" in url:
        raise UsageError(
            f"{url!r} has a query or a fragment, and files have none",
            hint="a ? in a file's name is written %3F, and a # %23",
        )
    path = unquote_to_bytes(parts.path)
    if b"\0" in path:
        raise UsageError(f"{url!r} has a zero byte in it")
    return os.fsdecode(path)


def _next_data(fd: int, hole: int) -> int:
    try:
        return os.lseek(fd, hole, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        return 1 << 62  # holes up to the end


async def _settle(future: asyncio.Future[T], stop: threading.Event | None = None) -> T:
    """Await ``future``, and when cancelled set ``stop`` and still wait for its end."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as exc:
            cancelled = exc
            if stop is not None:
                stop.set()
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # retrieved, so that nobody is told it was not
        raise cancelled
    return future.result()
