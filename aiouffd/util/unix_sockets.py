"""Unix sockets by path: binding them, and authenticating the user that listens on one.

Any user who can create a socket at a path receives the connections to it. The kernel reports which
user that is (SO_PEERCRED: the one that called listen(2), see
https://man7.org/linux/man-pages/man7/unix.7.html), and it is checked before anything is sent.
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
    """Return pid, uid and gid of the peer of a connected Unix socket.

    They are those of the time when the peer called connect(2) or listen(2). Raises OSError.
    """
    size = _CREDENTIALS.size
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def check_server(connection: socket.socket, path: str, user: int | None = None) -> None:
    """Check which user listens at the other end of ``connection``.

    Args:
        connection: A connected Unix socket.
        path: Its path, for the message.
        user: The id of a user to accept besides root and this user; -1 accepts any.

    Raises:
        Unsafe: If it is another user.
    """
    _, uid, _ = credentials(connection)
    if not is_trusted(uid) and user not in (uid, -1):
        raise Unsafe(f"the user {uid} listens on this socket, who is not trusted", path)


# ------------------------------------------------------------------ listening


def identity_of(path: str | os.PathLike[str]) -> Identity:
    """Return the identity of what ``path`` names, without following a symbolic link.

    Raises OSError.
    """
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def bind_at(path: str | os.PathLike[str], mode: int) -> tuple[socket.socket, Identity]:
    """Bind a stream socket to ``path`` with exactly these permissions, and never with wider ones.

    A socket at ``path`` that no process listens on is replaced. The new one does not listen yet;
    until it does, another call takes it for a stale one in the same way.

    Args:
        path: The path.
        mode: The permissions, such as 0o600.

    Raises:
        OSError: With the path as its ``filename``.
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
    """Set the permission bits that the umask cleared, on our socket and not on a replacement."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        ours = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
        if not ours:
            raise Unsafe("the socket was replaced by another user", path)
        if stat.S_IMODE(found.st_mode) != mode:
            os.chmod(f"/proc/self/fd/{fd}", mode)
        return found.st_dev, found.st_ino
    finally:
        os.close(fd)


def unlink_own(path: str | os.PathLike[str], identity: Identity | None) -> None:
    """Remove the path of a socket, unless it names something else by now."""
    with contextlib.suppress(OSError):
        if identity_of(path) == identity:
            os.unlink(path)


def _remove_dead(path: str | os.PathLike[str]) -> bool:
    """Remove a socket that no process listens on, nothing else; return whether it is gone."""
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
    """Connect, non-blocking, to a socket that only root or this user can have created.

    The directory, the socket's owner and the listening process are checked; nothing is sent.

    Raises:
        Unsafe: If another user could have created the socket.
        FileNotFoundError: If there is none.
        ConnectionRefusedError: If no process listens on it.
        BlockingIOError: If its backlog is full.
        OSError: For other reasons.
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
