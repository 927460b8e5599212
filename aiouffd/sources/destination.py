"""Files and devices as destinations: what a copy becomes, and when.

As cp(1), but for one thing: a file appears, or is replaced, when all of it is there and durable,
and not before. A destination that exists keeps its mode, its owner, its extended attributes, and
the symbolic links that lead to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UsageError
from ._fallocate import fallocate_zeros
from .base import Buffer
from .copying import STEP, PipeSink, Sink

__all__ = ["file_sink"]

#: Seconds between two looks whether somebody reads a named pipe.
READER = 0.02
#: Symbolic links that are followed; as many as the kernel follows.
LINKS = 40


async def file_sink(path: str, size: int, *, source: str | None = None) -> Sink:
    """A sink for ``size`` bytes at ``path``; ``source`` is the path of the file they come from, if
    they do: a new file gets its mode.

    Raises OSError, and UsageError for a device that is too small, or the source itself. Waits for
    somebody to read a named pipe.
    """
    if not path:
        raise UsageError("the path is empty")
    sink = _sink(path, size, source)
    if sink is None:
        fd = await _open_stream(path)
        sink = PipeSink(os.fdopen(fd, "wb", buffering=0), close=True)
    return sink


def _sink(path: str, size: int, source: str | None) -> Sink | None:
    """None for what takes one byte after the other."""
    own = _own_descriptor(path)
    if own is not None:
        # Where it stands, and whether it appends, is for whoever opened it to say.
        return PipeSink(os.fdopen(os.dup(own), "wb", buffering=0), close=True)
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return _Replacing(os.path.realpath(path), size, None, source)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if source is not None and _same(source, found):
        raise UsageError(f"{path} and {source} are the same file")
    regular = stat.S_ISREG(found.st_mode)
    if regular:
        # cp without -f: what may not be written is not replaced either.
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        real = os.path.realpath(path)
        if _same(real, found) and _replaceable(real, found):
            return _Replacing(real, size, found, source)
    elif not stat.S_ISBLK(found.st_mode):
        return None
    return _InPlace(path, size, regular=regular)


def _own_descriptor(path: str) -> int | None:
    """The descriptor of ours that /dev/stdout, /dev/fd/N and the like stand for."""
    for _ in range(LINKS):
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder)
        if folder == f"/proc/{os.getpid()}/fd" and name.isdecimal():
            return int(name)
        try:
            path = os.path.join(folder, os.readlink(path))
        except OSError:
            break
    return None


def _same(path: str, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), found)
    except OSError:
        # A descriptor of somebody else, say, whose name in /proc is none that can be opened.
        return False


def _replaceable(path: str, found: os.stat_result) -> bool:
    """Whether another file can take its place, and be like it."""
    user = os.geteuid()
    mine = user == 0 or (found.st_uid == user and found.st_gid in (os.getegid(), *os.getgroups()))
    return mine and os.access(os.path.dirname(path), os.W_OK | os.X_OK)


async def _open_stream(path: str) -> int:
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            # Nobody reads this pipe yet.
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(path).st_mode):
                raise
            await asyncio.sleep(READER)
        else:
            os.set_blocking(fd, True)
            return fd


class _File:
    """What both have in common: a descriptor, and a thread that uses it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._executor = ThreadPoolExecutor(1, "aiouffd-file")

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _put(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    async def write(self, offset: int, data: Buffer) -> None:
        await self._run(self._put, offset, data)

    def _end(self) -> None:
        """Once the thread is through with what it has begun."""
        self._executor.shutdown(cancel_futures=True)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _InPlace(_File):
    """A block device, or a file that cannot be replaced: written where it is."""

    def __init__(self, path: str, size: int, *, regular: bool) -> None:
        super().__init__(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        try:
            if regular:
                # What is not written are zeros then.
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, size)
            else:
                room = os.lseek(self._fd, 0, os.SEEK_END)
                if room < size:
                    raise UsageError(
                        f"{path} has {room} bytes, which is less than the {size} to copy"
                    )
        except BaseException:
            self._end()
            raise
        self._regular = regular

    async def zeros(self, offset: int, length: int) -> None:
        if not self._regular:
            await self._run(self._put_zeros, offset, length)

    def _put_zeros(self, offset: int, length: int) -> None:
        if not fallocate_zeros(self._fd, offset, length, hole=True):
            chunk = memoryview(bytes(min(length, STEP)))
            for start in range(0, length, STEP):
                self._put(offset + start, chunk[: length - start])

    async def finish(self) -> None:
        await self._run(os.fsync, self._fd)
        self._end()

    async def abandon(self) -> None:
        self._end()


class _Replacing(_File):
    """A file that appears, or is replaced, when all is there; zeros stay holes.

    Until then it has no name (O_TMPFILE, open(2)), so that whatever ends us leaves nothing behind;
    where the file system cannot do that, it is called ``.NAME.XXXXXXXX.part``.
    """

    def __init__(
        self, path: str, size: int, before: os.stat_result | None, source: str | None
    ) -> None:
        self._path = path
        self._before = before
        self._source = source
        self._folder, name = os.path.split(path)
        self._part = os.path.join(self._folder, f".{name[:200]}.{secrets.token_hex(4)}.part")
        super().__init__(self._unnamed())
        self._named = self._fd < 0
        self._done = False
        if self._named:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._part, flags, 0o600)
        try:
            os.ftruncate(self._fd, size)
        except BaseException:
            self._leave()
            raise

    def _unnamed(self) -> int:
        try:
            fd = os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                return -1
            raise
        if os.path.exists(f"/proc/self/fd/{fd}"):
            return fd
        os.close(fd)  # it could be given no name
        return -1

    async def zeros(self, offset: int, length: int) -> None:
        """They are there."""

    async def finish(self) -> None:
        await self._run(self._appear)
        self._end()

    def _appear(self) -> None:
        self._resemble()
        os.fsync(self._fd)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not self._named:
                # With a folder given Python calls linkat(2), which follows the link.
                os.link(f"/proc/self/fd/{self._fd}", self._part, src_dir_fd=folder)
                self._named = True
            os.replace(self._part, self._path)
            self._done = True
            # The name is durable with its folder.
            os.fsync(folder)
        finally:
            os.close(folder)

    def _resemble(self) -> None:
        """Mode, owner and attributes: of what is replaced, or as a new file's."""
        before = self._before
        if before is None:
            umask = os.umask(0)
            os.umask(umask)
            mode = 0o666
            with contextlib.suppress(OSError):
                found = os.stat(self._source) if self._source is not None else None
                if found is not None and stat.S_ISREG(found.st_mode):
                    mode = found.st_mode & 0o777
            os.fchmod(self._fd, mode & ~umask)
            return
        own = os.fstat(self._fd)
        if (own.st_uid, own.st_gid) != (before.st_uid, before.st_gid):
            os.fchown(self._fd, before.st_uid, before.st_gid)
        os.fchmod(self._fd, stat.S_IMODE(before.st_mode))
        with contextlib.suppress(OSError):  # a file system without any
            for name in os.listxattr(self._path):
                with contextlib.suppress(OSError):  # one that is not ours to set
                    os.setxattr(self._fd, name, os.getxattr(self._path, name))

    async def abandon(self) -> None:
        self._leave()

    def _leave(self) -> None:
        self._end()
        if self._named and not self._done:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._part)
