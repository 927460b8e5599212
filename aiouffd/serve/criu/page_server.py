"""Pages of a dump from CRIU's page server, over TCP or TLS.

``criu dump --lazy-pages`` keeps the memory of the tasks that it has dumped and serves it itself;
``criu page-server --lazy-pages`` serves images. Both take one connection in their life and end with
it, so all tasks share one here, and its end is only made good where something listens again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl as ssl_module
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import cast

from ...errors import AiouffdError, ClosedError, SourceError, SourceTimeoutError, UsageError
from ...sources.base import BaseSource, Buffer, check_range
from ...util.once import Once
from ...util.ranges import Ranges
from ...util.waiting import countdown, retrieve
from .page_server_core import HEADS, PAGE, PAGES_MAX, Exchange, PageRequest, PageServerError

__all__ = ["PageServer", "PageServerSource"]

#: Bytes that may be under way: who is in a hurry waits behind so much at most.
WINDOW = 2 << 20
#: Longest read that goes before longer ones, in bytes: a block that somebody waits for.
SHORT = 64 * 1024
#: Seconds that a server gets to answer our goodbye.
GOODBYE = 2.0


class _Connection(asyncio.BufferedProtocol):
    """A connection of a `PageServer`. On one loop."""

    def __init__(self, server: PageServer, head: int, timeout: float) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._exchange = Exchange(head)
        self._timeout = timeout
        self._transport: asyncio.Transport | None = None
        self._short: deque[PageRequest] = deque()
        self._long: deque[PageRequest] = deque()
        self._under_way = 0
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._error: BaseException | None = None
        self._closing = False
        #: Whether it has ever answered.
        self.answered = False
        self.lost = False
        self.ended = asyncio.Event()

    # ---- the protocol's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._exchange.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = time.monotonic()
        try:
            for request in self._exchange.received(nbytes):
                self.answered = True
                self._replied(request)
        except PageServerError as error:
            self.abort(error)
        if self._exchange.status is not None:
            self.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.lost:
            return
        self.lost = True
        if self._watch is not None:
            self._watch.cancel()
        asked = list(self._exchange.asked)
        suspect = asked[0] if asked and not self._exchange.began and self._error is None else None
        waiting = [*asked, *self._short, *self._long]
        self._exchange.asked.clear()
        self._short.clear()
        self._long.clear()
        error = self._error or self._server._lost(self, suspect, exc)
        for request in waiting:
            request.target = None
            request.done(error if request is suspect or self._error else _hung_up(self._server))
        self.ended.set()

    # ---- requests ----

    def submit(self, request: PageRequest, *, short: bool) -> None:
        """Ask for it, as soon as there is room. ``short``: before those that are not."""
        (self._short if short else self._long).append(request)
        self._send()

    def forget(self, requests: Iterable[PageRequest]) -> None:
        """Nobody wants these any more, and nothing is written to their targets."""
        for request in requests:
            request.target = None
        for queue in (self._short, self._long):
            kept = [request for request in queue if request.target is not None]
            queue.clear()
            queue.extend(kept)

    def _send(self) -> None:
        out = bytearray()
        while self._under_way < WINDOW and not (self._closing or self.lost):
            if not (queue := self._short or self._long):
                break
            request = queue.popleft()
            if not self._exchange.asked:
                self._heard = time.monotonic()
            self._under_way += request.size
            out += self._exchange.ask(request)
        if out and self._transport is not None:
            self._transport.write(bytes(out))
            if self._watch is None:
                self._watch = self._loop.call_later(self._timeout, self._look)

    def _replied(self, request: PageRequest) -> None:
        # What is left of it counts anew when it is asked for again.
        self._under_way = sum(asked.size for asked in self._exchange.asked)
        if request.size and request.target is not None:
            self._short.appendleft(request)
        else:
            request.done(None)
        self._send()

    def _look(self) -> None:
        """Whether the server has been silent for too long while it owes something."""
        self._watch = None
        if self.lost or not self._exchange.asked:
            return
        left = self._heard + self._timeout - time.monotonic()
        if left <= 0:
            self.abort(SourceTimeoutError(f"{self._server!r} does not answer"))
        else:
            self._watch = self._loop.call_later(left, self._look)

    # ---- the end ----

    def abort(self, error: BaseException | None = None) -> None:
        """Close at once; who waits gets ``error``."""
        self._error = self._error or error
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Say goodbye, hear the answer, and close. What is under way is not delivered any more."""
        if not self.lost and self._transport is not None:
            self._closing = True
            closed = ClosedError(f"{self._server!r} is closed")
            for request in [*self._exchange.asked, *self._short, *self._long]:
                request.target = None
                request.done(closed)
                request.done = _nothing
            self._short.clear()
            self._long.clear()
            self._transport.write(self._exchange.close())
            try:
                async with asyncio.timeout(GOODBYE):
                    await self.ended.wait()
            except TimeoutError:
                pass
            finally:
                self.abort()
        await self.ended.wait()


def _nothing(_error: BaseException | None) -> None:
    """Nobody waits any more."""


def _hung_up(server: PageServer) -> SourceError:
    return SourceError(f"{server!r} hung up", errno=errno.ECONNRESET)


class PageServer:
    """A page server, and the connection with it that all of a dump's tasks share.

    :param address: ``host:port``; an IPv6 address is in brackets.
    :param head: length of the protocol's structures, in bytes: 32 since CRIU 4.2, 24 before.
        Both ends have to be told, and one that is told wrongly hangs up, or is silent.
    :param tls: an ssl.SSLContext, as for ``criu --tls``, whose servers want a certificate from
        their clients too. ``server_hostname`` is what its certificate is for, by default the host.
    :param connect_timeout: seconds for connecting.
    :param timeout: seconds of silence, while an answer is owed, until a connection is given up.

    Made and closed on one loop. It connects when it is first read from, and again after a
    connection was lost; what was under way then fails (transient).
    """

    def __init__(
        self,
        address: str,
        *,
        head: int = 32,
        tls: ssl_module.SSLContext | None = None,
        server_hostname: str | None = None,
        connect_timeout: float = 10.0,
        timeout: float = 60.0,
    ) -> None:
        host, _, port = address.rpartition(":")
        self._host = host.removeprefix("[").removesuffix("]")
        if not self._host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UsageError(f"a page server's address is host:port, not {address!r}")
        if head not in HEADS:
            raise UsageError(f"the page server's structures have 32 or 24 bytes, not {head}")
        if connect_timeout <= 0 or timeout <= 0:
            raise UsageError("timeouts are positive numbers of seconds")
        self._port = int(port)
        self._address = address
        self._head = head
        self._tls = tls
        self._server_hostname = server_hostname
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._suspect: tuple[int, int] | None = None
        self._users = 0
        self._closed = False
        self._ending: Once[None] = Once("closing the page server", keep_failure=True)
        #: Connections made so far.
        self.connected = 0

    def __repr__(self) -> str:
        return f"<PageServer {self._address}>"

    def clone(self) -> PageServer:
        """The same with a connection of its own, which not every page server takes."""
        return PageServer(
            self._address,
            head=self._head,
            tls=self._tls,
            server_hostname=self._server_hostname,
            connect_timeout=self._connect_timeout,
            timeout=self._timeout,
        )

    # -------------------------------------------------------------- connecting

    async def connect(self) -> None:
        """Be connected. Raises SourceError (transient) when that fails, ClosedError."""
        await self._connected()

    async def _connected(self) -> _Connection:
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if self._connection is not None and not self._connection.lost:
            return self._connection
        if self._connecting is None or self._connecting.done():
            # One attempt for all, which outlives any one of them.
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(retrieve)
        connecting = self._connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if connecting.cancelled() and self._closed:
                raise ClosedError(f"{self!r} is closed") from None
            raise

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        name = (self._server_hostname or self._host) if self._tls is not None else None
        connection = _Connection(self, self._head, self._timeout)
        try:
            async with asyncio.timeout(self._connect_timeout):
                await loop.create_connection(
                    lambda: connection, self._host, self._port, ssl=self._tls, server_hostname=name
                )
        except TimeoutError as error:
            connection.abort()
            raise SourceTimeoutError(f"{self!r}: connecting took too long") from error
        except ssl_module.SSLCertVerificationError as error:
            raise SourceError(
                f"{self!r}: its certificate is not valid: {error.verify_message}",
                transient=False,
                hint="give tls= an ssl.SSLContext that trusts its authority",
            ) from error
        except ssl_module.SSLError as error:
            raise SourceError(f"{self!r}: TLS failed: {error.reason or error}") from error
        except OSError as error:
            number = error.errno if error.errno in errno.errorcode else None
            reason = os.strerror(number) if number else error.strerror or type(error).__name__
            raise SourceError(f"{self!r}: cannot connect: {reason}", errno=number) from error
        except BaseException:
            connection.abort()
            raise
        self.connected += 1
        self._connection = connection
        return connection

    def _lost(
        self, connection: _Connection, suspect: PageRequest | None, exc: BaseException | None
    ) -> AiouffdError:
        """The error for who was about to be answered when a connection was lost."""
        if self._closed:
            return ClosedError(f"{self!r} is closed")
        if suspect is None:
            return _hung_up(self)
        # A server that lacks a page hangs up. So does one that dies, but not twice at one place.
        key = (suspect.pid, suspect.address)
        again, self._suspect = self._suspect == key, key
        hint = "it may not have these pages"
        if not connection.answered:
            hint += (
                f", or its CRIU has structures of another length than {self._head} bytes"
                " (32 since version 4.2, 24 before)"
            )
        return SourceError(
            f"{self!r} hung up when it was asked for {suspect!r}",
            transient=not again,
            errno=errno.ECONNRESET,
            hint=hint,
        )

    # ------------------------------------------------------------------- pages

    async def read_into(self, pid: int, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Fill buffers with the memory of the task ``pid`` at the addresses before them.

        Whole pages, and only such as the dump has left to the page server. Raises SourceError and
        ClosedError. When cancelled, nothing is written to the buffers any more.
        """
        connection = await self._connected()
        step = PAGES_MAX * PAGE
        pieces = [
            (address + at, buffer[at : at + step])
            for address, buffer in parts
            for at in range(0, len(buffer), step)
        ]
        if not pieces:
            return
        future, done = countdown(len(pieces))
        requests = [PageRequest(pid, address, buffer, done) for address, buffer in pieces]
        short = sum(request.size for request in requests) <= SHORT
        for request in requests:
            connection.submit(request, short=short)
        try:
            await future
        except BaseException:
            connection.forget(requests)
            raise

    # ------------------------------------------------------------------- ends

    def _acquire(self) -> None:
        self._users += 1

    async def _release(self) -> None:
        self._users -= 1
        if not self._users:
            await self.aclose()

    async def aclose(self) -> None:
        """Say goodbye and close: a dump that serves its memory then ends. Idempotent."""
        self._closed = True
        await self._ending.surely(self._aclose)

    async def _aclose(self) -> None:
        connecting = self._connecting
        try:
            if connecting is not None:
                connecting.cancel()
                await asyncio.wait((connecting,))
        finally:
            if self._connection is not None:
                await self._connection.close()


class PageServerSource(BaseSource):
    """The memory of one task at a page server: its offsets are the task's addresses.

    :param server: is closed with the last of its sources.
    :param pid: the task, as in the images.
    :param ranges: addresses and lengths, whole pages, of what the page server has of it. What is
        outside of them reads as zeros, and is not asked for.

    A clone has a connection of its own.
    """

    def __init__(self, server: PageServer, pid: int, ranges: Iterable[tuple[int, int]]) -> None:
        self._server = server
        self._pid = pid
        self._ranges = Ranges()
        self._size = 0
        for start, length in ranges:
            if start % PAGE or length % PAGE or start < 0 or length <= 0:
                raise UsageError(f"a page server has whole pages, not {length} bytes at {start:#x}")
            self._ranges.add(start, start + length)
            self._size = max(self._size, start + length)
        self._opened = self._closed = False

    def __repr__(self) -> str:
        return f"<PageServerSource task {self._pid} at {self._server!r}>"

    @property
    def size(self) -> int:
        """The address behind the last page."""
        return self._size

    async def open(self) -> None:
        """Connect, if that never was. Raises SourceError."""
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if not self._opened:
            if not self._server.connected:
                await self._server.connect()
            self._server._acquire()
            self._opened = True

    async def aclose(self) -> None:
        """Let go of the server. Idempotent."""
        self._closed = True
        if self._opened:
            self._opened = False
            await self._server._release()

    async def read(self, offset: int, length: int) -> Buffer:
        """``length`` bytes at the address ``offset``."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at the address ``offset``."""
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        length = len(buffer)
        check_range(offset, length, self._size)
        start, end = offset - offset % PAGE, offset + length + -(offset + length) % PAGE
        if (start, end) != (offset, offset + length):
            wider = memoryview(bytearray(end - start))
            await self.read_into(start, wider)
            buffer[:] = wider[offset - start :][:length]
            return
        parts = self._ranges.within(offset, offset + length)
        at = offset
        for low, size in [*parts, (offset + length, 0)]:
            buffer[at - offset : low - offset] = bytes(low - at)
            at = low + size
        await self._server.read_into(
            self._pid, [(low, buffer[low - offset :][:size]) for low, size in parts]
        )

    async def holes(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """What is outside of the ranges."""
        found, at, end = [], offset, offset + length
        for low, size in [*self._ranges.within(offset, end), (end, 0)]:
            if at < low:
                found.append((at, low - at))
            at = low + size
        return found

    def clone(self) -> PageServerSource:
        """The same task, over a connection of its own."""
        found = self._ranges.within(0, self._size)
        return PageServerSource(self._server.clone(), self._pid, found)
