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

__all__ = ["FULL", "CachedObject", "Usage", "clear", "make_room", "shrink", "usage"]

#: Of errors: those that less files would help against.
FULL = (errno.ENOSPC, errno.EDQUOT)

#: Seconds after which the temporary file of a process that died is one.
_STALE = 3600.0
#: Shrinking goes on to this share of the limit, so that it is not always going on.
_ENOUGH = 0.9
#: Seconds that the time of a file may be ahead of the clock.
_AHEAD = 60.0


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


@dataclass(slots=True)
class _Folder:
    """A directory, of a version or of a key: what itself takes, and what is left in it."""

    path: str
    bytes: int
    left: int = 0


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    bytes: int
    used: float
    folder: _Folder
    key: _Folder


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


def _blocks(path: str | os.PathLike[str]) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path, follow_symlinks=False).st_blocks * 512
    return 0


def _key(path: str) -> _Folder:
    return _Folder(path, _blocks(path) + _blocks(os.path.join(path, LATEST)))


def _segments(folder: _Folder, key: _Folder) -> Iterator[_File]:
    now = time.time()
    for entry in _entries(folder.path):
        if entry.name.endswith(DATA):
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                used = found.st_mtime
                if used > now + _AHEAD:
                    # The clock was wrong then. From now on it grows old as others do.
                    used = now
                    with contextlib.suppress(OSError):
                        os.utime(entry.path, (now, now), follow_symlinks=False)
                yield _File(entry.path, found.st_blocks * 512, used, folder, key)


def _all(root: Path) -> tuple[int, int, list[_File]]:
    """Bytes that everything takes, small files and directories too; how many of these are of
    what has no segments; and the segments."""
    total, idle = 0, 0
    files: list[_File] = []
    for entry in _folders(root):
        key = _key(entry.path)
        total += key.bytes
        for inner in _folders(key.path):
            folder = _Folder(inner.path, _blocks(inner.path))
            found = list(_segments(folder, key))
            folder.left = len(found)
            key.left += bool(found)
            total += folder.bytes + sum(file.bytes for file in found)
            idle += 0 if found else folder.bytes
            files += found
        idle += 0 if key.left else key.bytes
    return total, idle, files


def usage(directory: str | os.PathLike[str] | None = None) -> Usage:
    """What the cache in ``directory`` (None: the usual one) holds. Blocks for file operations;
    any thread. A directory that is not there or cannot be read holds nothing."""
    objects: list[CachedObject] = []
    total = 0
    for entry in _folders(root_of(directory)):
        key = _key(entry.path)
        total += key.bytes
        latest = read_latest(Path(key.path))
        folders = [_Folder(inner.path, _blocks(inner.path)) for inner in _folders(key.path)]
        files = [list(_segments(folder, key)) for folder in folders]
        used = [max((file.used for file in found), default=0.0) for found in files]
        newest = used.index(max(used)) if used else -1
        for number, (folder, found) in enumerate(zip(folders, files, strict=True)):
            # The name is the key's; version and size are only those of what was seen last.
            known = latest if number == newest else None
            taken = folder.bytes + sum(file.bytes for file in found)
            total += taken
            objects.append(
                CachedObject(
                    latest.name if latest else None,
                    known.version if known else None,
                    known.size if known else None,
                    taken,
                    used[number],
                )
            )
    objects.sort(key=lambda found: found.used, reverse=True)
    return Usage(total, tuple(objects))


def clear(directory: str | os.PathLike[str] | None = None) -> int:
    """Throw away all that the cache in ``directory`` (None: the usual one) holds; returns how
    many bytes that were. Sources that use it go on, and begin to fill it again. Blocks for file
    operations; any thread. Waits for another process that evicts. Raises OSError when
    files cannot be removed; a directory that is not there is empty."""
    root = root_of(directory)
    if not root.is_dir():
        return 0
    with _locked(root, wait=True):
        before, idle, files = _all(root)
        return before - _evict(root, files, before - idle, -1)


def shrink(root: Path, limit: int) -> int | None:
    """Unlink segments, the longest unused first, until at most ``limit`` bytes are taken; returns
    how many are left. None, and nothing is done, while somebody else does it. Raises OSError if
    files that would have to go cannot be removed."""
    with _locked(root, wait=False) as ours:
        if not ours:
            return None
        total, idle, files = _all(root)
        if total <= limit:
            return total
        return _evict(root, files, total - idle, int(limit * _ENOUGH))


def make_room(root: Path, limit: int) -> None:
    """A full disk is everybody's, and what is here can be had again: give up a quarter."""
    with contextlib.suppress(OSError):
        left = shrink(root, limit)
        if left is not None:
            shrink(root, left * 3 // 4)


def _evict(root: Path, files: list[_File], total: int, limit: int) -> int:
    failure: OSError | None = None
    for file in sorted(files, key=lambda file: file.used):
        if total <= limit:
            break
        try:
            os.unlink(file.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            # The others may still be enough.
            failure = failure or error
            continue
        total -= file.bytes
        file.folder.left -= 1
        if not file.folder.left:
            total -= file.folder.bytes
            file.key.left -= 1
            if not file.key.left:
                total -= file.key.bytes
    for key in _folders(root):
        _tidy(key.path)
    if failure is not None and total > limit:
        raise failure
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
    """Whether we may evict. Where nothing can be locked we may: two that evict at a time cost
    too many files, and none costs the disk."""
    fd = _open_lock(root / LOCK)
    if fd is None:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            yield error.errno != errno.EWOULDBLOCK
            return
        try:
            yield True
        finally:
            # Closing is not enough: a process forked meanwhile has the descriptor too.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _open_lock(path: Path) -> int | None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
                raise
            remove(path)
            return os.open(path, flags, 0o600)
    except FileNotFoundError:
        raise
    except OSError:
        return None
