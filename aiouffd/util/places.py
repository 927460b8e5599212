"""Paths that only root and this user can redirect.

A path is not an identity. Any user with write access to a directory on the way can replace what it
names at any moment: by a file or a socket of their own, or by a symbolic link. Where that matters,
these functions check that only root and this user have such access. Resolution follows
https://man7.org/linux/man-pages/man7/path_resolution.7.html.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import stat
from collections import deque
from pathlib import Path

from ..errors import UsageError

__all__ = ["Unsafe", "check_directory", "is_trusted", "replace_file", "user_id"]

_LINKS_MAX = 40  # as path_resolution(7)
_EVERY_USER = 0xFFFFFFFF


class Unsafe(PermissionError):
    """A user other than root and this one could have replaced what the path names."""

    def __init__(self, text: str, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(errno.EACCES, text, None if path is None else os.fspath(path))


def is_trusted(uid: int) -> bool:
    """Return whether ``uid`` is root or the effective user of this process."""
    return uid in (0, os.geteuid())


def user_id(user: int | str) -> int:
    """Return the id of a user given by number or by name; -1 stands for any user.

    Raises:
        UsageError: If there is no such user.
    """
    if isinstance(user, int):
        if not -1 <= user < _EVERY_USER:
            raise UsageError(f"{user} is no user's id")
        return user
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"there is no user {user!r}") from None


def check_directory(path: str | os.PathLike[str]) -> None:
    """Check that only root and this user can replace ``path`` and the existing names in it.

    Every directory and symbolic link on the way is checked. A directory with the sticky bit may be
    writable by all users: only owners can replace names there. Any user can still create *new*
    names in it, so check the owner of what is found.

    Raises:
        Unsafe: If another user can.
        OSError: If part of the path does not exist.
    """
    at = "/"
    _check_one(at, os.stat(at))
    left = deque(Path(os.path.abspath(path)).parts[1:])
    links = 0
    while left:
        name = left.popleft()
        if name == "..":
            at = os.path.dirname(at)
            continue
        here = os.path.join(at, name)
        found = os.lstat(here)
        if not stat.S_ISLNK(found.st_mode):
            _check_one(here, found)
            at = here
            continue
        links += 1
        if links > _LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
        _check_owner(here, found)
        target = Path(os.readlink(here))
        if target.is_absolute():
            at = "/"
        left.extendleft(part for part in reversed(target.parts) if part != "/")


def _check_one(path: str, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    _check_owner(path, found)
    if found.st_mode & stat.S_ISVTX:
        return
    if found.st_mode & stat.S_IWOTH:
        raise Unsafe("every user can write to this directory", path)
    if found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        raise Unsafe(f"the group {found.st_gid} can write to this directory", path)


def _check_owner(path: str, found: os.stat_result) -> None:
    if not is_trusted(found.st_uid) and not _is_outside(found.st_uid):
        raise Unsafe(f"this belongs to the user {found.st_uid}", path)


def _is_private(gid: int) -> bool:
    """Return whether this user is the only member of a group.

    Distributions create such a group for each user; mode 775 then protects as well as 755.
    """
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    alone = set(group.gr_mem) <= {user.pw_name}
    return alone and user.pw_gid == gid and group.gr_name == user.pw_name


def _is_outside(uid: int) -> bool:
    """Return whether a user is not mapped in this user namespace, so no process here can be it.

    In a sandbox the directories of the system belong to such a user: see
    https://man7.org/linux/man-pages/man7/user_namespaces.7.html on unmapped user IDs.
    """
    try:
        with open("/proc/sys/kernel/overflowuid") as file:
            if uid != int(file.read()):
                return False
        with open("/proc/self/uid_map") as file:
            lines = [[int(field) for field in line.split()] for line in file]
    except (OSError, ValueError):
        return False
    return all(first > uid or uid >= first + count for first, _, count in lines) and not any(
        count == _EVERY_USER for _, _, count in lines
    )


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: it appears complete or not at all.

    Replaces what was there, a symbolic link too. Its mode is 0666 less the umask. Safe in
    directories that other users can write to: no existing file is opened. Raises OSError.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(part, flags, 0o666)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
