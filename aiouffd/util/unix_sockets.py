"""Unix sockets by name: listening at a path, and knowing who listens there.

Whoever connects to a path meets whoever has put a socket there. The kernel says which user that is
(SO_PEERCRED: the one who called listen(2), see unix(7)), and that is asked before a word is said.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from typing import TypeAlias

from .places import Unsafe, check_directory, is_trusted

__all__ = [
    "Identity",
    "bind_at",
    "check_server",
    "connect_to_own",
    "credentials",
    "identity_of",
    "unlink_own",
]

#: Device and inode of a socket's name.
Identity: TypeAlias = tuple[int, int]

_CREDENTIALS = struct.Struct("3i")


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Pid, uid and gid of the other end of a connected Unix socket: those that it had when it
    connected, or began to listen. Raises OSError."""
    size = _CREDENTIALS.size
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def check_server(connection: socket.socket, path: str, user: int | None = None) -> None:
    """Raise Unsafe unless who listens at ``path`` is root, this user, or the user ``user`` (-1:
    anybody)."""
    _, uid, _ = credentials(connection)
    if not is_trusted(uid) and user not in (uid, -1):
        raise Unsafe(f"the user {uid} listens on this socket, who may be anybody", path)


# ------------------------------------------------------------------ listening


def identity_of(path: str | os.PathLike[str]) -> Identity:
    """Of whatever has that name, a symbolic link itself. Raises OSError."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def bind_at(path: str | os.PathLike[str], mode: int) -> tuple[socket.socket, Identity]:
    """A socket with the name ``path`` and exactly these permissions, which never had wider ones.
    It does not listen yet; until it does others take it for one that was left behind.

    A socket of that name that nobody listens on is replaced. Raises OSError with the path.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The name gets the mode of the socket, less the umask.
        os.fchmod(sock.fileno(), mode)
        try:
            sock.bind(os.fspath(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _remove_dead(path):
                raise
            sock.bind(os.fspath(path))
        return sock, _set_mode(path, mode)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)  # which bind(2) does not tell
        raise


def _set_mode(path: str | os.PathLike[str], mode: int) -> Identity:
    """Give back what the umask took, to our socket and to nothing that was put in its place."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        ours = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
        if not ours:
            raise Unsafe("somebody has put something else in the place of the socket", path)
        if stat.S_IMODE(found.st_mode) != mode:
            os.chmod(f"/proc/self/fd/{fd}", mode)
        return found.st_dev, found.st_ino
    finally:
        os.close(fd)


def unlink_own(path: str | os.PathLike[str], identity: Identity | None) -> None:
    """Remove the name of a socket, unless it is somebody else's by now."""
    with contextlib.suppress(OSError):
        if identity_of(path) == identity:
            os.unlink(path)


def _remove_dead(path: str | os.PathLike[str]) -> bool:
    """Remove a socket that a dead server has left; anything else stays. Whether it is gone."""
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
            return False
        except ConnectionRefusedError:
            pass
        except OSError:
            return False
    unlink_own(path, (found.st_dev, found.st_ino))
    return True


# ----------------------------------------------------------------- connecting


def connect_to_own(path: str | os.PathLike[str]) -> tuple[socket.socket, Identity]:
    """A connection (non-blocking) with whoever listens at ``path``, who is root or this user for
    certain: they have put the socket there themselves, in a directory that is theirs alone.

    Raises FileNotFoundError, ConnectionRefusedError, BlockingIOError if too many wait there,
    Unsafe, and other OSErrors. Nothing was sent yet.
    """
    name = os.fspath(path)
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        check_directory(os.path.dirname(os.path.abspath(name)))
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode):
            raise Unsafe("this is not a socket", name)
        if not is_trusted(found.st_uid):
            raise Unsafe(f"this socket belongs to the user {found.st_uid}", name)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # What was looked at, whatever its name means by now.
            connection.connect(f"/proc/self/fd/{fd}")
            check_server(connection, name)
        except BaseException:
            connection.close()
            raise
        return connection, (found.st_dev, found.st_ino)
    finally:
        os.close(fd)
