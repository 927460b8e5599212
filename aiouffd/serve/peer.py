"""Who is at the other end of a Unix socket, whether it lives, and who is let in.

Identity comes from the kernel: SO_PEERCRED (who connected), and a pidfd, which names the process
and not a number that may be used again: SO_PEERPIDFD (6.5), or pidfd_open at once after accepting.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable
from typing import TypeAlias

from ..util.places import is_trusted
from ..util.unix_sockets import credentials

__all__ = ["Peer", "Policy", "anybody", "same_user"]

_SO_PEERPIDFD = 77


class Peer:
    """A process that has connected. ``pid``, ``uid`` and ``gid`` are those it had then."""

    def __init__(self, pid: int, uid: int, gid: int, pidfd: int) -> None:
        self.pid, self.uid, self.gid = pid, uid, gid
        #: Descriptor that is readable once the process has ended, or -1 if there is none.
        self.pidfd = pidfd
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of(cls, connection: socket.socket, noted: int | None = None) -> Peer:
        """Who connected ``connection``, a Unix socket that was accepted just now. Raises OSError.

        :param noted: where that is longer ago: the pidfd that was noted then, or -1, which is used
            where the kernel does not know by itself. Taken over, also when this fails.
        """
        try:
            pid, uid, gid = credentials(connection)
            pidfd = -1
            try:
                pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
            except OSError as error:
                # Where the kernel knows the option, a process that it does not find has ended, and
                # its number may be somebody else's by now.
                if pid and error.errno == errno.ENOPROTOOPT:
                    if noted is None:
                        with contextlib.suppress(OSError):
                            pidfd = os.pidfd_open(pid)
                    elif _pid_of(noted) == pid:
                        pidfd, noted = noted, -1
            return cls(pid, uid, gid, pidfd)
        finally:
            if noted is not None and noted >= 0:
                os.close(noted)

    @property
    def alive(self) -> bool | None:
        """Whether the process still runs; None if that cannot be known."""
        if self.pidfd < 0:
            return None
        try:
            signal.pidfd_send_signal(self.pidfd, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # not ours to signal, or not even of a namespace that we see (EINVAL)
        return True

    def kill(self) -> bool:
        """End the process (SIGKILL). False if it is gone, or may not or cannot be killed."""
        if self.pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except OSError:
            return False
        return True

    def watch(self, ended: Callable[[], None]) -> None:
        """Call ``ended`` once the process has ended, on the running loop."""
        if self.pidfd < 0 or self._loop is not None:
            return
        self._loop = loop = asyncio.get_running_loop()

        def readable() -> None:
            loop.remove_reader(self.pidfd)
            self._loop = None
            ended()

        loop.add_reader(self.pidfd, readable)

    def close(self) -> None:
        """Let go of the descriptor. Idempotent."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(pidfd)
            os.close(pidfd)

    def __repr__(self) -> str:
        return f"<Peer process {self.pid}, user {self.uid}>"


def _pid_of(pidfd: int) -> int:
    """Whose pidfd it is, by the kernel's word; -1 if it is none, or its process has ended."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name == "Pid":
                    return int(value)
    except (OSError, ValueError):
        pass
    return -1


#: Says whether a process may be served.
Policy: TypeAlias = Callable[[Peer], bool]


def same_user(peer: Peer) -> bool:
    """This process's own user, and root: what the socket's mode 0600 says as well."""
    return is_trusted(peer.uid)


def anybody(peer: Peer) -> bool:
    """Whoever can connect. The socket's mode then is all there is: set it."""
    return True
