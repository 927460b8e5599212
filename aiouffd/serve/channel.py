"""Bytes and descriptors over a Unix stream socket.

asyncio's streams drop descriptors, so this reads by recvmsg itself, as the socket gets readable.
Descriptors belong to the bytes they came with: the kernel never delivers those of two sendmsg in
one recvmsg, and a peer that sends more than was asked for is cut off, not served in part.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence

from ..errors import ClosedError, PeerError
from .peer import Peer

__all__ = ["Channel"]

#: Descriptors that one message can bring at all (SCM_MAX_FD).
_FDS_MAX = 253
_INT = array.array("i").itemsize
#: Bytes that are heard of a peer that is turned away.
DISMISSED_MAX = 2 << 20


class Channel:
    """A connection with a peer. Belongs to one loop; one reader and one writer at a time."""

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        connection.setblocking(False)
        self.peer = peer
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[None]] = set()
        self._closed = False

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        return self._closed

    async def recv(self, limit: int, *, max_fds: int = 0) -> tuple[bytes, list[int]]:
        """What one recvmsg of at most ``limit`` bytes gives: b"" when the peer has closed.

        Descriptors are close-on-exec and the caller's to close. Raises PeerError when more came
        than ``max_fds`` (all are closed then), ClosedError after `close`.
        """
        while True:
            self._check()
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    limit, socket.CMSG_SPACE(_FDS_MAX * _INT), socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                await self._readable()
                continue
            except ConnectionError:
                return b"", []
            fds = _descriptors(ancillary)
            if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
                for fd in fds:
                    os.close(fd)
                raise PeerError(
                    f"{self.peer!r} sent {len(fds) or 'too many'} descriptors, where"
                    f" {max_fds or 'none'} can be"
                )
            return data, fds

    async def recv_exactly(self, count: int, *, max_fds: int = 0) -> tuple[bytes, list[int]]:
        """``count`` bytes, and the descriptors that came with any of them, ``max_fds`` in all.

        Raises PeerError when the peer closes before, and as `recv`.
        """
        parts, fds = bytearray(), list[int]()
        try:
            while len(parts) < count:
                data, some = await self.recv(count - len(parts), max_fds=max_fds - len(fds))
                fds += some
                if not data:
                    raise PeerError(f"{self.peer!r} hung up after {len(parts)} of {count} bytes")
                parts += data
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return bytes(parts), fds

    async def begins(self) -> bool:
        """Wait until the peer says something, without taking it; False if it hangs up instead.

        Raises ClosedError after `close`.
        """
        while True:
            self._check()
            try:
                return bool(self._socket.recv(1, socket.MSG_PEEK))
            except (BlockingIOError, InterruptedError):
                await self._readable()
            except ConnectionError:
                return False

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of it; descriptors go with the first byte. Raises PeerError, ClosedError."""
        view = memoryview(data)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while view:
            self._check()
            try:
                sent = self._socket.sendmsg([view], ancillary, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                await self._writable()
                continue
            except ConnectionError as error:
                raise PeerError(f"{self.peer!r} hung up") from error
            view, ancillary = view[sent:], []

    def send_now(self, data: bytes) -> bool:
        """Send a few bytes, whole or not at all: False if that cannot be now, or ever."""
        if self._closed:
            return False
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL) == len(data)
        except OSError:
            return False

    async def dismiss(self, last: bytes, patience: float) -> None:
        """Say a last word to a peer that is turned away, and hear what it still says, without
        looking at it, until it hangs up; ``patience`` seconds at most. Raises nothing."""
        left = DISMISSED_MAX
        with contextlib.suppress(TimeoutError, PeerError, ClosedError, OSError):
            async with asyncio.timeout(patience):
                await self.send(last)
                while left > 0 and not self._closed:
                    try:
                        data = self._socket.recv(65536)  # and so its descriptors go unseen
                    except (BlockingIOError, InterruptedError):
                        await self._readable()
                        continue
                    if not data:
                        break
                    left -= len(data)

    def hang_up(self) -> None:
        """Let the peer see the end, whoever else has a copy of the connection; it can still be
        asked who that is."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    async def wait_eof(self) -> None:
        """Until the peer closes. Raises PeerError if it sends anything first."""
        data, _ = await self.recv(1)
        if data:
            raise PeerError(f"{self.peer!r} went on talking after its part")

    def _check(self) -> None:
        if self._closed:
            raise ClosedError(f"the connection with {self.peer!r} is closed")

    async def _readable(self) -> None:
        future = self._future()
        self._loop.add_reader(self._socket.fileno(), _set, future)
        try:
            await future
        finally:
            self._waiting.discard(future)
            if not self._closed:
                self._loop.remove_reader(self._socket.fileno())

    async def _writable(self) -> None:
        future = self._future()
        self._loop.add_writer(self._socket.fileno(), _set, future)
        try:
            await future
        finally:
            self._waiting.discard(future)
            if not self._closed:
                self._loop.remove_writer(self._socket.fileno())

    def _future(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.add(future)
        return future

    def detach(self) -> socket.socket:
        """Give the socket away; the channel is closed then."""
        connection = self._socket
        self._end()
        return connection

    def _end(self) -> None:
        if not self._closed:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._socket.fileno())
                self._loop.remove_writer(self._socket.fileno())
            self._closed = True
            for future in self._waiting:
                _set(future)

    def close(self) -> None:
        """Close the connection; who waits gets ClosedError. Idempotent."""
        if not self._closed:
            self._end()
            self._socket.close()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT])
    return fds.tolist()
