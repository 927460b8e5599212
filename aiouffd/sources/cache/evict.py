"""How much there is, and making it less: whole segment files, those longest unused first.

A file that is unlinked stays readable for whoever has it open, and what it holds was right when it
was written, so readers need not be asked. Its space is free when the last of them closes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .layout import DATA, LATEST, LOCK, read_latest, remove, root_of

__all__ = ["CachedObject", "Usage", "clear", "shrink", "usage"]

#: Seconds after which the temporary file of a process that died is one.
_STALE = 3600.0
#: Shrinking goes on to this share of the limit, so that it is not always going on.
_ENOUGH = 0.9


@dataclass(frozen=True, slots=True)
class CachedObject:
    """One version of one object: its name without secrets (None if unknown), and in bytes what it
    takes on disk; ``used`` is when it was last read or written, in seconds since the epoch."""

    name: str | None
    version: str | None
    size: int | None
    bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What a cache directory holds: bytes on disk in all, and each object, last used first."""

    bytes: int
    objects: tuple[CachedObject, ...]


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    bytes: int
    used: float


def _entries(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(path))
    except OSError:
        return []


def _folders(path: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    for entry in _entries(path):
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                yield entry


def _segments(path: str | os.PathLike[str]) -> Iterator[_File]:
    for entry in _entries(path):
        if entry.name.endswith(DATA):
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                yield _File(entry.path, found.st_blocks * 512, found.st_mtime)


def usage(directory: str | os.PathLike[str] | None = None) -> Usage:
    """What the cache in ``directory`` (None: the usual one) holds. Blocks for file operations;
    any thread. A directory that is not there or cannot be read holds nothing."""
    objects: list[CachedObject] = []
    for key in _folders(root_of(directory)):
        latest = read_latest(Path(key.path))
        folders = list(_folders(key.path))
        newest = max(
            folders,
            key=lambda folder: max((f.used for f in _segments(folder)), default=0.0),
            default=None,
        )
        for folder in folders:
            files = list(_segments(folder))
            # The name is the key's; version and size are only those of what was seen last.
            known = latest if folder is newest else None
            objects.append(
                CachedObject(
                    latest.name if latest else None,
                    known.version if known else None,
                    known.size if known else None,
                    sum(file.bytes for file in files),
                    max((file.used for file in files), default=0.0),
                )
            )
    objects.sort(key=lambda found: found.used, reverse=True)
    return Usage(sum(found.bytes for found in objects), tuple(objects))


def clear(directory: str | os.PathLike[str] | None = None) -> int:
    """Throw away all that the cache in ``directory`` (None: the usual one) holds; returns how
    many bytes that were. Sources that use it go on, and begin to fill it again. Blocks for file
    operations; any thread. Waits for another process that evicts. Raises OSError when
    files cannot be removed; a directory that is not there is empty."""
    root = root_of(directory)
    if not root.is_dir():
        return 0
    with _locked(root, wait=True):
        freed = 0
        for key in _folders(root):
            for folder in _folders(key.path):
                for file in _segments(folder):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(file.path)
                        freed += file.bytes
            _tidy(key.path)
        return freed


def shrink(root: Path, limit: int) -> int:
    """Unlink segments, the longest unused first, until at most ``limit`` bytes are taken; returns
    how many are left. Does nothing while another process does it. Raises OSError."""
    with _locked(root, wait=False) as ours:
        files = [
            file
            for key in _folders(root)
            for folder in _folders(key.path)
            for file in _segments(folder)
        ]
        total = sum(file.bytes for file in files)
        if total <= limit or not ours:
            return total
        for file in sorted(files, key=lambda file: file.used):
            if total <= limit * _ENOUGH:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.path)
            total -= file.bytes
        for key in _folders(root):
            _tidy(key.path)
        return total


def _tidy(key: str) -> None:
    """Remove what is empty, and what a process that died has left behind."""
    for folder in _folders(key):
        with contextlib.suppress(OSError):
            os.rmdir(folder.path)
    for entry in _entries(key):
        with contextlib.suppress(OSError):
            if entry.name.endswith(".part") and entry.stat().st_mtime < time.time() - _STALE:
                os.unlink(entry.path)
    names = [entry.name for entry in _entries(key)]
    with contextlib.suppress(OSError):
        if names == [LATEST]:
            os.unlink(os.path.join(key, LATEST))
        if names in ([], [LATEST]):
            os.rmdir(key)


@contextlib.contextmanager
def _locked(root: Path, *, wait: bool) -> Iterator[bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(root / LOCK, flags, 0o600)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
        remove(root / LOCK)
        fd = os.open(root / LOCK, flags, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            # File systems without locks: then two may evict at a time, which costs too many files.
            if error.errno == errno.EWOULDBLOCK:
                yield False
                return
        yield True
    finally:
        os.close(fd)
