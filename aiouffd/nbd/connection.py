"""One connection to an NBD server: from the handshake to the last reply.

What a client asks for becomes a task, or nothing at all if the source has the bytes at hand. It is
read from only as long as there is room for what it asks for, and what it got counts until it has
taken it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import ssl as ssl_module
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from struct import Struct
from typing import Any, Protocol, cast

from ..sources.base import Source, check_length, holes_in_source, own_method
from ..util.tasks import begin
from . import wire
from .exports import CHANGING, Export
from .fence import Fences
from .server_core import (
    OPTION_MAX,
    Negotiation,
    Request,
    Requests,
    data_head,
    error_reply,
    hole_chunk,
    parts,
    status_reply,
    wire_error,
)
from .wire import NbdProtocolError

__all__ = ["Connection", "Host", "NbdServerStats"]

log = logging.getLogger("aiouffd")

#: Bytes asked of the kernel for a socket's send buffer, and of replies waiting in ours.
SOCKET_BUFFER = 4 << 20
#: A reply of up to so many bytes is sent in one piece with its header, at the price of a copy.
JOINED = 16 * 1024
#: What a request costs beside its bytes.
OVERHEAD = 512
#: Bytes per second that a client has to send or to take, when it is its turn, in order to stay.
SLOWEST = 16 * 1024
#: Seconds between two looks whether a client that has to leave has got everything.
LEAVING = 0.01
_INT = Struct("i")
_READING = (wire.CMD_READ, wire.CMD_BLOCK_STATUS)


@dataclass(slots=True)
class NbdServerStats:
    """Counters of a server; bytes are of the exports' contents."""

    clients: int = 0
    clients_total: int = 0
    refused: int = 0
    requests: int = 0
    failed: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_outstanding: int = 0


class Host(Protocol):
    """What a connection needs of its server."""

    exports: Mapping[str, Export]
    fences: Fences
    tls: ssl_module.SSLContext | None
    tls_required: bool
    handshake_timeout: float
    max_requests: int
    loop: asyncio.AbstractEventLoop
    stats: NbdServerStats

    def joined(self, client: Connection) -> bool:
        """A client has connected. Whether it may stay."""

    def left(self, client: Connection) -> None:
        """It is gone, and so is all that it had asked for."""

    def has_room(self, client: Connection, cost: int) -> bool:
        """Whether it may have ``cost`` bytes more; if not its `pump` is called when it may."""

    def freed(self) -> None:
        """Bytes that counted do not any more."""

    def complain(self, error: BaseException) -> None:
        """A source has failed a request."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a client has come whose turn it is."""

    time: float
    reason: str
    bytes: int
    requests: int

    def moved_since(self, before: Mark) -> bool:
        """Whether it has done something else since, or has been fast enough."""
        if self.reason != before.reason or self.requests != before.requests:
            return True
        return self.bytes - before.bytes >= max(1, SLOWEST * (self.time - before.time))


class Connection(asyncio.BufferedProtocol):
    """One client of ``server``."""

    def __init__(self, server: Host) -> None:
        self._server = server
        self._stats = server.stats
        self._transport: asyncio.Transport | None = None
        #: Below TLS, if there is any.
        self._wire: asyncio.Transport | None = None
        self._negotiation: Negotiation | None = Negotiation(
            {name: export.offer for name, export in server.exports.items()},
            tls=server.tls is not None,
            tls_required=server.tls_required,
            name=self._token,
            ended=server.fences.ended,
        )
        #: Among all clients there ever were; 0 before it is one.
        self.number = 0
        self._scratch = memoryview(bytearray(4096))
        self._requests: Requests | None = None
        self._export: Export | None = None
        self._read_now: Any = None
        self._has_holes = False
        self._structured = False
        self._tasks: dict[asyncio.Task[None], Request] = {}
        self._upgrade: asyncio.Task[None] | None = None
        self._early = bytearray()
        self._pieces = False
        self._reading = True
        self._writing = True
        self._draining = False
        # Disconnected; aborted; only emptying the socket before it is closed.
        self._ended = self._dropped = self._leaving = False
        self._made = time.monotonic()
        self._mark: Mark | None = None
        #: Bytes given to the transport.
        self._said = 0
        #: Bytes of requests that are being worked on, or whose replies were not taken yet.
        self.outstanding = 0
        self._untaken = 0

    # ---- the protocol's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._wire = cast(asyncio.Transport, transport)
        if not self._server.joined(self):
            self._ended = True
            self._transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # these are wishes
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    # Frees the place of a peer that vanished without a FIN.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._uses(self._transport)
        self._send_negotiation()

    def _uses(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        # asyncio before 3.12 joins what it is given as a list, and after that forgets to pause us.
        self._pieces = "uvloop" in type(transport).__module__

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._requests is None or self._leaving or self._dropped:
            return self._scratch
        return self._requests.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._leaving or self._dropped:
            return
        if self._requests is None:
            self._options(bytes(self._scratch[:nbytes]))
            return
        try:
            self._requests.received(nbytes)
        except NbdProtocolError as error:
            self._hangs_up(error)
            return
        self.pump()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._writing = False

    def resume_writing(self) -> None:
        self._writing = True
        untaken, self._untaken = self._untaken, 0
        self._release(untaken)
        if self._requests is None and self._upgrade is None and not self._ended:
            self._options(b"")
        else:
            self.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended:
            return
        self._ended = True
        if self._upgrade is not None:
            self._upgrade.cancel()
        for task, request in list(self._tasks.items()):
            # What was to be written was received whole, and is written.
            if request.command in _READING:
                task.cancel()
        freed, self._untaken = self._untaken, 0
        requests = self._requests
        if requests is not None:
            if requests.receiving is not None:
                freed += requests.receiving.cost
            requests.waiting = None
            # Who said goodbye has a right to what he asked for before.
            goodbye = requests.disconnected and not self._dropped
            for request in list(requests.ready):
                if not goodbye or request.command in _READING:
                    requests.ready.remove(request)
                    freed += request.cost
        self._release(freed)
        self.pump()

    # ---- negotiation ----

    def _token(self) -> str:
        return self._server.fences.token(self.number)

    def _options(self, data: bytes) -> None:
        """The client goes on with the handshake."""
        if self._upgrade is not None:
            # Encrypted, and here before the task has heard that it may go on.
            self._early += data
            if len(self._early) > OPTION_MAX // 2:
                self.abort()
            return
        try:
            self._negotiate(data)
        except NbdProtocolError as error:
            self._hangs_up(error)
            return
        self.pump()

    def _negotiate(self, data: bytes) -> None:
        negotiation, transport = self._negotiation, self._transport
        assert negotiation is not None
        assert transport is not None
        rest = negotiation.feed(data)
        self._send_negotiation()
        while negotiation.pending and self._writing:
            rest = negotiation.feed(b"")
            self._send_negotiation()
        if negotiation.aborted:
            self._leaving = True
            transport.close()
        elif negotiation.wants_tls and self._writing:
            # Else the transport would tell the wrong one that it may write again.
            transport.pause_reading()
            self._upgrade = begin(self._start_tls, self._no_tls, loop=self._server.loop)
        elif negotiation.chosen is not None:
            self._negotiation = None
            # Only now, and above TLS if there is any: what waits shall not wait twice.
            transport.set_write_buffer_limits(high=SOCKET_BUFFER)
            self._export = export = self._server.exports[negotiation.chosen]
            source = export.source
            self._structured = negotiation.structured
            self._has_holes = own_method(source, "holes") is not None
            if not self._has_holes or not self._structured:
                self._read_now = getattr(source, "read_now", None)
            self._requests = Requests(
                export.offer, structured=self._structured, allocation=negotiation.allocation
            )
            self._requests.feed(rest)

    def _send_negotiation(self) -> None:
        assert self._negotiation is not None
        data = self._negotiation.take()
        if data:
            self._send(data)

    async def _start_tls(self) -> None:
        server, negotiation, transport = self._server, self._negotiation, self._transport
        assert server.tls is not None
        assert negotiation is not None
        assert transport is not None
        try:
            upgraded = await server.loop.start_tls(
                transport,
                self,
                server.tls,
                server_side=True,
                ssl_handshake_timeout=server.handshake_timeout,
                ssl_shutdown_timeout=server.handshake_timeout,
            )
            if upgraded is None or upgraded.is_closing():  # the client went away meanwhile
                raise ConnectionResetError
        except asyncio.CancelledError:
            self._no_tls()
            raise
        except Exception as error:
            log.info("NBD: a client's TLS handshake failed: %s", error or type(error).__name__)
            self._no_tls()
            return
        self._upgrade = None
        self._uses(upgraded)
        negotiation.tls_started()
        early, self._early = bytes(self._early), bytearray()
        self._options(early)

    def _no_tls(self) -> None:
        assert self._transport is not None
        self._transport.abort()
        self._upgrade = None
        self.connection_lost(None)

    # ---- requests ----

    def pump(self) -> None:
        """Begin what there is room for, and read on if that is all."""
        requests = self._requests
        if requests is None:
            if self._ended:
                self._server.left(self)
            elif self._upgrade is None and not self._leaving:
                # No more questions of somebody who does not take the answers.
                self._read(self._writing)
            return
        ready = requests.ready
        while ready or requests.waiting is not None:
            request = ready[0] if ready else requests.waiting
            assert request is not None
            if self._dropped or (self._ended and not ready):
                break
            if self._draining:
                if not ready:
                    break
                ready.popleft()
                self._release(request.cost)
                self._refuse(request, wire.ESHUTDOWN, "the server is shutting down")
                continue
            if not self._writing and not self._ended:
                break
            if request.error:
                ready.popleft()
                self._stats.requests += 1
                self._refuse(request, request.error, "invalid request")
                continue
            if len(self._tasks) >= self._server.max_requests or not self._claim(request):
                break
            if ready:
                ready.popleft()
                self._begin(request)
            else:
                requests.admit()
        if self._ended:
            if not self._tasks and (not ready or self._dropped):
                self._server.left(self)
        elif requests.disconnected or self._draining:
            if self._leaving:
                return
            self._read(False)
            if not self._tasks and not ready:
                self._leave()
        elif not self._dropped:
            self._read(not ready and requests.waiting is None)

    def _read(self, wanted: bool) -> None:
        if wanted == self._reading or self._transport is None:
            return
        self._reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _claim(self, request: Request) -> bool:
        """Have room for ``request``; if there is none we are told when to ask again."""
        if request.cost:
            return True
        cost = OVERHEAD
        if request.command in (wire.CMD_READ, wire.CMD_WRITE):
            cost += request.length
        if not self._server.has_room(self, cost):
            return False
        request.cost = cost
        self.outstanding += cost
        self._stats.bytes_outstanding += cost
        return True

    def _release(self, cost: int) -> None:
        if cost:
            self.outstanding -= cost
            self._stats.bytes_outstanding -= cost
            self._server.freed()

    def _replied(self, request: Request) -> None:
        """Its reply was given to the transport: it counts until that has got rid of it."""
        if self._writing or self._ended:
            self._release(request.cost)
        else:
            self._untaken += request.cost

    def _refuse(self, request: Request, number: int, text: str) -> None:
        self._stats.failed += 1
        self._send(error_reply(request, number, text, structured=self._structured))

    def _begin(self, request: Request) -> None:
        self._stats.requests += 1
        if request.command == wire.CMD_READ and self._read_now is not None:
            offset, length = request.offset, request.length
            try:
                data = self._read_now(offset, length)
                if data is not None:
                    data = check_length(data, length, offset=offset)
            except Exception as error:
                self._failed(request, error)
                self._replied(request)
                return
            if data is not None:
                self._send_data(request, offset, data, last=True)
                self._replied(request)
                return
        task = begin(partial(self._serve, request), loop=self._server.loop)
        self._tasks[task] = request
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        request = self._tasks.pop(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self._failed(request, error)
        self._replied(request)
        self.pump()

    def _failed(self, request: Request, error: BaseException) -> None:
        if self._ended or self._dropped:
            return
        self._server.complain(error)
        # The text stays here: it may tell of things that are not the client's.
        self._refuse(request, wire_error(error), "the source failed")

    async def _serve(self, request: Request) -> None:
        export = self._export
        assert export is not None
        source = export.source
        command, offset, length = request.command, request.offset, request.length
        if command == wire.CMD_READ:
            await self._serve_read(source, request)
            return
        if command == wire.CMD_BLOCK_STATUS:
            reply = status_reply(request, await holes_in_source(source, offset, length))
            self._send(reply)
            return
        if command in CHANGING:
            self._stats.bytes_written += await export.change(request)
        if command == wire.CMD_FLUSH or request.flags & wire.CMD_FLAG_FUA:
            await export.flush(request)
        self._send(error_reply(request, 0, "", structured=self._structured))

    async def _serve_read(self, source: Source, request: Request) -> None:
        offset, length = request.offset, request.length
        holes: tuple[tuple[int, int], ...] = ()
        if self._has_holes and self._structured:
            holes = tuple(await holes_in_source(source, offset, length))
        if not holes or (request.flags & wire.CMD_FLAG_DF and holes != ((offset, length),)):
            data = check_length(await source.read(offset, length), length, offset=offset)
            self._send_data(request, offset, data, last=True)
            return
        for start, count, zeros in parts(offset, length, holes):
            last = start + count == offset + length
            if zeros:
                self._send(hole_chunk(request, start, count, last=last))
                self._stats.bytes_read += count
            else:
                data = check_length(await source.read(start, count), count, offset=start)
                self._send_data(request, start, data, last=last)

    def _send(self, data: bytes) -> None:
        if self._ended or self._dropped or self._transport is None:
            return
        self._said += len(data)
        self._transport.write(data)

    def _send_data(self, request: Request, offset: int, data: memoryview, *, last: bool) -> None:
        transport = self._transport
        if self._ended or self._dropped or transport is None:
            return
        length = len(data)
        self._stats.bytes_read += length
        head = data_head(request, offset, length, structured=self._structured, last=last)
        self._said += len(head) + length
        if length <= JOINED:
            transport.write(b"".join((head, data)))
        elif self._pieces:
            transport.writelines((head, data))
        else:
            transport.write(head)
            transport.write(data)

    # ---- the end ----

    def stalled(self, now: float, handshake: float, stall: float) -> str | None:
        """Why this client should go; None if it may stay."""
        if self._ended or self._transport is None:
            return None
        requests = self._requests
        if requests is None:
            return "did not choose an export" if now - self._made > handshake else None
        unsent = self._transport.get_write_buffer_size()
        if unsent:
            mark = Mark(now, "does not take its replies", self._said - unsent, 0)
        elif requests.incomplete and self._reading and not self._leaving:
            mark = Mark(now, "does not finish what it sends", requests.bytes, requests.count)
        else:
            self._mark = None
            return None
        if self._mark is None or mark.moved_since(self._mark):
            self._mark = mark
        elif now - self._mark.time > stall:
            return mark.reason
        return None

    def drain(self) -> None:
        """Answer what is under way, and close."""
        if self._requests is None:
            self.abort()
            return
        self._draining = True
        self.pump()

    def _leave(self) -> None:
        """Everything is answered: close, when it has arrived."""
        self._leaving = True
        if self._draining:
            # A socket that is closed while the client goes on sending throws away what is in it.
            # So what comes is read, and forgotten, until everything is out.
            self._read(True)
            self._leaves()
        elif self._transport is not None:
            # Who has said goodbye sends nothing more.
            self._transport.close()

    def _leaves(self) -> None:
        transport = self._transport
        if self._ended or self._dropped or transport is None:
            return
        if self._unsent():
            self._server.loop.call_later(LEAVING, self._leaves)
        else:
            transport.close()

    def _unsent(self) -> int:
        """Bytes of ours that the client's machine has not got yet."""
        assert self._transport is not None
        assert self._wire is not None
        waiting = self._transport.get_write_buffer_size() + self._wire.get_write_buffer_size()
        sock = self._wire.get_extra_info("socket")
        # What a Unix socket has taken is the client's.
        if not waiting and sock is not None and sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError, ValueError):  # it is gone already
                answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
                waiting = _INT.unpack(answer)[0]
        return waiting

    def _hangs_up(self, error: NbdProtocolError) -> None:
        log.info("NBD: dropped a client: %s", error)
        self.abort()

    def abort(self, *, writes_too: bool = False) -> None:
        """Close at once. What is being written is written, unless it has to end too."""
        self._dropped = True
        for task, request in list(self._tasks.items()):
            if writes_too or request.command in _READING:
                task.cancel()
        if self._transport is not None:
            self._transport.abort()
