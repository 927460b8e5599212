"""An NBD server over any sources, on asyncio.

Each client is one protocol object; what it asks for becomes a task, or nothing at all if the
source has the bytes at hand. A client is read from only as long as there is room for what it
asks for, and what it got counts until it has taken it, so neither a greedy nor a stuck one
makes the server grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import ssl as ssl_module
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from types import TracebackType
from typing import Any, Self, cast

from ..errors import AiouffdError, ClosedError, FlushError, UsageError
from ..once import Once
from ..sources.base import Source, check_length, holes_in_source, own_method, size_of_source
from ..sources.durability import Flusher, Promises
from ..unix_sockets import Identity, bind_at, unlink_own
from . import wire
from .fence import Fences
from .order import Order
from .server_core import (
    OPTION_MAX,
    Negotiation,
    Offer,
    Request,
    Requests,
    data_head,
    error_reply,
    hole_chunk,
    parts,
    status_reply,
    wire_error,
)
from .uri import PORT, NbdAddress
from .wire import NbdProtocolError

__all__ = ["NbdServer", "NbdServerStats"]

log = logging.getLogger("aiouffd")

#: Bytes asked of the kernel for a socket's send buffer, and of replies waiting in ours.
SOCKET_BUFFER = 4 << 20
#: A reply of up to so many bytes is sent in one piece with its header, at the price of a copy.
JOINED = 16 * 1024
#: Zeros are written in pieces of so many bytes where the source knows no better.
ZEROS = bytes(1 << 20)
#: Seconds between two lines in the log about a source that fails.
COMPLAINTS = 10.0
#: Block size that clients are told to prefer, in bytes.
PREFERRED = 65536
#: What a request costs beside its bytes.
OVERHEAD = 512
#: Bytes per second that a client has to send or to take, when it is its turn, in order to stay.
SLOWEST = 16 * 1024
#: Seconds between two looks whether a client that has to leave has got everything.
LEAVING = 0.01
#: Clients that the kernel keeps until we have accepted them.
BACKLOG = 100
#: Sizes are signed in most clients.
SIZE_MAX = (1 << 63) - 1
_INT = Struct("i")


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


class NbdServer:
    """Serves sources as NBD exports: ``async with NbdServer({"": source}) as server``.

    Arguments:
        exports: sources by their names on the wire; they are open, and stay the caller's.
            A client that names none gets the only one there is.
        writable: let clients write; the sources need ``write``.
        tls: an ssl.SSLContext for servers; clients may then ask for TLS.
        tls_required: refuse clients that do not.
        max_clients: connections at a time; more are closed at once.
        max_requests: requests of one client that are worked on at a time.
        memory: bytes of all clients' requests under way, and of replies that were not taken. Beside
            it each client may always have one request, of at most 32 MiB, and 4 MiB of replies.
        handshake_timeout: seconds that a client has to choose an export.
        stall_timeout: seconds after which a client is dropped that does not take its replies, or
            does not finish what it sends, or does so by less than 16 KiB/s. One that wants nothing
            may stay for ever.

    Belongs to the event loop on which it was made.
    """

    def __init__(
        self,
        exports: Mapping[str, Source],
        *,
        writable: bool = False,
        tls: ssl_module.SSLContext | None = None,
        tls_required: bool = False,
        max_clients: int = 64,
        max_requests: int = 64,
        memory: int = 256 << 20,
        handshake_timeout: float = 10.0,
        stall_timeout: float = 60.0,
    ) -> None:
        if not exports:
            raise UsageError("a server without exports has nothing to serve")
        if tls_required and tls is None:
            raise UsageError("tls_required goes with tls", hint="pass tls=, an ssl.SSLContext")
        if max_clients < 1 or max_requests < 1 or memory < 1:
            raise UsageError("max_clients, max_requests and memory are at least 1")
        if handshake_timeout <= 0 or stall_timeout <= 0:
            raise UsageError("timeouts are positive numbers of seconds")
        for name in exports:
            _check_name(name)
        self._sources = dict(exports)
        # One for each source, under however many names.
        of = {id(source): _Writing(source) for source in exports.values()}
        self._writing = {name: of[id(source)] for name, source in exports.items()}
        self._fences = Fences(self._supersede)
        self._numbers = 0
        self._offers = {name: _offer(source, writable) for name, source in exports.items()}
        self._tls = tls
        self._tls_required = tls_required
        self._max_clients = max_clients
        self._max_requests = max_requests
        self._memory = memory
        self._handshake_timeout = handshake_timeout
        self._stall_timeout = stall_timeout
        self._loop = asyncio.get_running_loop()
        self._listeners: list[asyncio.Server] = []
        self._paths: list[tuple[str, Identity]] = []
        self._clients: set[_Client] = set()
        self._starved: dict[_Client, None] = {}
        self._watch: asyncio.TimerHandle | None = None
        self._closing = False
        self._closes = Once[None]("closing the NBD server", keep_failure=True)
        #: When closing stops waiting for clients, on the loop's clock, and what does it then.
        self._deadline = float("inf")
        self._hurry: asyncio.TimerHandle | None = None
        self._complained = -COMPLAINTS
        self._idle = asyncio.Event()
        self._idle.set()
        self.stats = NbdServerStats()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def listen(self, host: str = "127.0.0.1", port: int = PORT) -> str:
        """Accept clients on a TCP port (0: any free one); returns the URL of the first export.

        Raises OSError. May be called several times.
        """
        self._check_open()
        if not 0 <= port <= 65535:
            raise UsageError(f"{port} is no TCP port")
        # Begun by hand: cancelled in between, asyncio would forget a listener that listens.
        listener = await self._loop.create_server(
            lambda: _Client(self), host, port, start_serving=False
        )
        number = listener.sockets[0].getsockname()[1]
        await self._listens(listener)
        name = next(iter(self._sources))
        return str(NbdAddress(name, host, number, None, self._tls_required))

    async def listen_unix(self, path: str | os.PathLike[str], mode: int = 0o600) -> str:
        """Accept clients on a Unix socket; returns the URL of the first export.

        ``mode`` says who may connect. A socket of that name that nobody listens on is replaced.
        Raises OSError. May be called several times.
        """
        self._check_open()
        name = _absolute(path)
        sock, identity = bind_at(name, mode)
        try:
            sock.listen(BACKLOG)  # at once: until then others take it for a dead one
            listener = await self._loop.create_unix_server(
                lambda: _Client(self), sock=sock, start_serving=False
            )
            await self._listens(listener)
        except BaseException:
            sock.close()
            unlink_own(name, identity)
            raise
        self._paths.append((name, identity))
        export = next(iter(self._sources))
        return str(NbdAddress(export, socket=name, tls=self._tls_required))

    async def _listens(self, listener: asyncio.Server) -> None:
        try:
            await listener.start_serving()
            self._check_open()  # it may have been closed meanwhile
        except BaseException:
            listener.close()
            raise
        self._listeners.append(listener)

    async def aclose(self, drain: float = 10.0) -> None:
        """Stop: nobody new gets in, requests under way are answered, then clients are closed.

        After ``drain`` seconds what is left is dropped; a second call may shorten that. Returns
        when the last call of a source has ended. Idempotent; when cancelled it goes on, and a
        second call waits for its end.
        """
        self._closing = True
        deadline = self._loop.time() + max(drain, 0)
        if deadline < self._deadline:
            self._deadline = deadline
            if self._hurry is not None:
                self._hurry.cancel()
                self._hurry = self._loop.call_at(deadline, self._give_up)
        # At once: what is asked for after this call is not under way.
        self._turn_away()
        await self._closes(self._close)
        # Where closing itself was cancelled, clients were dropped, and end now.
        await self._idle.wait()

    def _turn_away(self) -> None:
        """Nobody new gets in, and nothing new is begun. Idempotent."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for name, identity in self._paths:
            unlink_own(name, identity)
        self._paths.clear()
        for client in list(self._clients):
            client.drain()

    async def _close(self) -> None:
        self._hurry = self._loop.call_at(self._deadline, self._give_up)
        try:
            await self._idle.wait()
            for writing in self._writing.values():
                await writing.flusher.settled()
        finally:
            self._abort()
            for handle in (self._watch, self._hurry):
                if handle is not None:
                    handle.cancel()
            self._watch = self._hurry = None

    def _give_up(self) -> None:
        """The time for answering what was under way is over."""
        if self._clients:
            log.warning("NBD: %d clients did not finish in time", len(self._clients))
        self._abort()

    def _abort(self) -> None:
        for client in list(self._clients):
            client.abort(writes_too=True)
        for writing in self._writing.values():
            writing.flusher.cancel()

    def _supersede(self, number: int) -> None:
        """A client says that its connection ``number`` is lost: see `aiouffd.nbd.fence`."""
        for client in list(self._clients):
            if client.number == number:
                client.abort()

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("the NBD server is closed")

    # ---- what clients tell ----

    def _joined(self, client: _Client) -> bool:
        if self._closing or len(self._clients) >= self._max_clients:
            self.stats.refused += 1
            return False
        self._clients.add(client)
        self._numbers += 1
        client.number = self._numbers
        self._idle.clear()
        self.stats.clients = len(self._clients)
        self.stats.clients_total += 1
        if self._watch is None:
            self._look_later()
        return True

    def _left(self, client: _Client) -> None:
        self._clients.discard(client)
        self._starved.pop(client, None)
        self.stats.clients = len(self._clients)
        if not self._clients:
            self._idle.set()

    def _room(self, client: _Client, cost: int) -> bool:
        """Whether ``client`` may have ``cost`` bytes more; if not it is told when to ask again."""
        if client.outstanding and self.stats.bytes_outstanding + cost > self._memory:
            self._starved[client] = None
            return False
        return True

    def _freed(self) -> None:
        while self._starved and self.stats.bytes_outstanding < self._memory:
            client = next(iter(self._starved))
            del self._starved[client]
            client.pump()
            if client in self._starved:
                return

    def _complain(self, error: BaseException) -> None:
        # A source that is away fails every request; once in a while is enough.
        now = time.monotonic()
        if now - self._complained <= COMPLAINTS:
            return
        self._complained = now
        if isinstance(error, AiouffdError | OSError):
            log.warning("NBD: a request failed: %s (%d so far)", error, self.stats.failed + 1)
        else:
            log.error("NBD: a request failed (%d so far)", self.stats.failed + 1, exc_info=error)

    def _look_later(self) -> None:
        pause = min(self._handshake_timeout, self._stall_timeout) / 4
        self._watch = self._loop.call_later(max(pause, 0.01), self._look)

    def _look(self) -> None:
        """Drop who does not move. Runs while there are clients."""
        self._watch = None
        now = time.monotonic()
        for client in list(self._clients):
            reason = client.stalled(now, self._handshake_timeout, self._stall_timeout)
            if reason:
                log.info("NBD: dropped a client that %s", reason)
                client.abort()
        if self._clients:
            self._look_later()


def _offer(source: Source, writable: bool) -> Offer:
    flags = wire.FLAG_HAS_FLAGS | wire.FLAG_SEND_DF | wire.FLAG_CAN_MULTI_CONN
    if writable:
        if own_method(source, "write") is None or not getattr(source, "writable", True):
            raise UsageError(f"{source!r} cannot be written to")
        flags |= wire.FLAG_SEND_FLUSH | wire.FLAG_SEND_FUA | wire.FLAG_SEND_WRITE_ZEROES
        if own_method(source, "trim") or own_method(source, "write_zeros"):
            flags |= wire.FLAG_SEND_TRIM
    else:
        flags |= wire.FLAG_READ_ONLY
    size = size_of_source(source)
    if size > SIZE_MAX:
        raise UsageError(f"NBD cannot serve {size} bytes")
    return Offer(size, flags, *_block_sizes(source, size))


def _block_sizes(source: Source, size: int) -> tuple[int, int]:
    """Smallest and preferred block. What a client asks for in smaller blocks is done too, by the
    source; but for the client that is not one step (it is read, completed, and written)."""
    minimum = int(getattr(source, "minimum_block", 1))
    # As the protocol wants it: a power of two up to 64 KiB, which the size is a multiple of.
    if not 0 < minimum <= 65536 or minimum & (minimum - 1) or size % minimum:
        minimum = 1
    return minimum, max(PREFERRED, minimum)


class _Writing:
    """What is known of the writes to a source, by all its clients."""

    def __init__(self, source: Source) -> None:
        # A client that is gone may have left a write behind, and come back with a newer one.
        self.order = Order()
        self.promises = Promises(f"NBD export of {source!r}")
        self.flusher = Flusher(self.promises)


def _check_name(name: str) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise UsageError(f"an export's name is UTF-8, which {name!r} is not") from None
    if length > wire.STRING_MAX or "\0" in name:
        raise UsageError(f"an export's name has at most {wire.STRING_MAX} bytes, none of them zero")


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.fspath(path))


class _Client(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, server: NbdServer) -> None:
        self._server = server
        self._stats = server.stats
        self._transport: asyncio.Transport | None = None
        #: Below TLS, if there is any.
        self._wire: asyncio.Transport | None = None
        self._negotiation: Negotiation | None = Negotiation(
            server._offers,
            tls=server._tls is not None,
            tls_required=server._tls_required,
            name=self._token,
            ended=server._fences.ended,
        )
        #: Among all clients there ever were; 0 before it is one.
        self.number = 0
        self._account: _Writing | None = None
        self._scratch = memoryview(bytearray(4096))
        self._requests: Requests | None = None
        self._source: Source | None = None
        self._read_now: Any = None
        self._has_holes = False
        self._offer = next(iter(server._offers.values()))
        self._structured = False
        self._tasks: dict[asyncio.Task[None], Request] = {}
        self._upgrade: asyncio.Task[None] | None = None
        self._early = bytearray()
        self._pieces = False
        self._reading = True
        self._writing = True
        self._draining = False
        # Nobody hears us any more; nothing is said any more; nothing is listened to any more.
        self._ended = self._dropped = self._leaving = False
        self._made = time.monotonic()
        self._mark: _Mark | None = None
        #: Bytes given to the transport.
        self._said = 0
        #: Bytes of requests that are being worked on, or whose replies were not taken yet.
        self.outstanding = 0
        self._untaken = 0

    # ---- the protocol's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._wire = cast(asyncio.Transport, transport)
        if not self._server._joined(self):
            self._ended = True
            self._transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # these are wishes
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    # Who has vanished without a word does not keep his place for ever.
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
        return self._server._fences.token(self.number)

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
            self._upgrade = self._server._loop.create_task(self._start_tls())
        elif negotiation.chosen is not None:
            self._negotiation = None
            # Only now, and above TLS if there is any: what waits shall not wait twice.
            transport.set_write_buffer_limits(high=SOCKET_BUFFER)
            self._source = source = self._server._sources[negotiation.chosen]
            self._account = self._server._writing[negotiation.chosen]
            self._offer = self._server._offers[negotiation.chosen]
            self._structured = negotiation.structured
            self._has_holes = own_method(source, "holes") is not None
            if not self._has_holes or not self._structured:
                self._read_now = getattr(source, "read_now", None)
            self._requests = Requests(
                self._offer, structured=self._structured, allocation=negotiation.allocation
            )
            self._requests.feed(rest)

    def _send_negotiation(self) -> None:
        assert self._negotiation is not None
        data = self._negotiation.take()
        if data:
            self._send(data)

    async def _start_tls(self) -> None:
        server, negotiation, transport = self._server, self._negotiation, self._transport
        assert server._tls is not None
        assert negotiation is not None
        assert transport is not None
        try:
            upgraded = await server._loop.start_tls(
                transport,
                self,
                server._tls,
                server_side=True,
                ssl_handshake_timeout=server._handshake_timeout,
                ssl_shutdown_timeout=server._handshake_timeout,
            )
            if upgraded is None or upgraded.is_closing():  # the client went away meanwhile
                raise ConnectionResetError
        except Exception as error:
            log.info("NBD: a client's TLS handshake failed: %s", error or type(error).__name__)
            transport.abort()
            self._upgrade = None
            self.connection_lost(None)
            return
        self._upgrade = None
        self._uses(upgraded)
        negotiation.tls_started()
        early, self._early = bytes(self._early), bytearray()
        self._options(early)

    # ---- requests ----

    def pump(self) -> None:
        """Begin what there is room for, and read on if that is all."""
        requests = self._requests
        if requests is None:
            if self._ended:
                self._server._left(self)
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
                self._refuse(request, request.error, "the request is not in order")
                continue
            if len(self._tasks) >= self._server._max_requests or not self._claim(request):
                break
            if ready:
                ready.popleft()
                self._begin(request)
            else:
                requests.admit()
        if self._ended:
            if not self._tasks and (not ready or self._dropped):
                self._server._left(self)
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
        if not self._server._room(self, cost):
            return False
        request.cost = cost
        self.outstanding += cost
        self._stats.bytes_outstanding += cost
        return True

    def _release(self, cost: int) -> None:
        if cost:
            self.outstanding -= cost
            self._stats.bytes_outstanding -= cost
            self._server._freed()

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
        task = self._server._loop.create_task(self._serve(request))
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
        self._server._complain(error)
        # The text stays here: it may tell of things that are not the client's.
        self._refuse(request, wire_error(error), "the source failed")

    async def _serve(self, request: Request) -> None:
        source = self._source
        assert source is not None
        command, offset, length = request.command, request.offset, request.length
        if command == wire.CMD_READ:
            await self._serve_read(source, request)
            return
        if command == wire.CMD_BLOCK_STATUS:
            reply = status_reply(request, await holes_in_source(source, offset, length))
            self._send(reply)
            return
        if command in CHANGING:
            await self._change(source, request)
        if command == wire.CMD_FLUSH or request.flags & wire.CMD_FLAG_FUA:
            await self._flush(source, request)
        self._send(error_reply(request, 0, "", structured=self._structured))

    async def _change(self, source: Source, request: Request) -> None:
        """A write, after all that came before it for the same place."""
        assert self._account is not None
        offset, length = request.offset, request.length
        turn = await self._account.order.turn(offset, length)
        try:
            if request.command == wire.CMD_WRITE:
                assert request.data is not None
                await source.write(offset, request.data)  # type: ignore[attr-defined]
            elif request.command == wire.CMD_WRITE_ZEROES:
                await _write_zeros(source, request)
            else:
                await _trim(source, request)
        finally:
            turn.end()
        self._account.promises.wrote(offset, length)
        if request.command != wire.CMD_TRIM:
            self._stats.bytes_written += length

    async def _flush(self, source: Source, request: Request) -> None:
        """Have what was answered made durable, or for FUA at least this."""
        flush = own_method(source, "flush")
        # Where nothing can be written there is nothing to flush, though some ask.
        if flush is None or self._offer.flags & wire.FLAG_READ_ONLY:
            return
        assert self._account is not None
        try:
            await self._account.flusher(flush)
        except FlushError as error:
            end = request.offset + request.length
            if request.command == wire.CMD_FLUSH or not error.ranges:
                raise
            if any(at < end and request.offset < at + count for at, count in error.ranges):
                raise

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
            mark = _Mark(now, "does not take its replies", self._said - unsent, 0)
        elif requests.incomplete and self._reading and not self._leaving:
            mark = _Mark(now, "does not finish what it sends", requests.bytes, requests.count)
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
            self._server._loop.call_later(LEAVING, self._leaves)
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


CHANGING = (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES, wire.CMD_TRIM)
_READING = (wire.CMD_READ, wire.CMD_BLOCK_STATUS)


@dataclass(frozen=True, slots=True)
class _Mark:
    """How far a client has come whose turn it is."""

    time: float
    reason: str
    bytes: int
    requests: int

    def moved_since(self, before: _Mark) -> bool:
        """Whether it has done something else since, or has been fast enough."""
        if self.reason != before.reason or self.requests != before.requests:
            return True
        return self.bytes - before.bytes >= max(1, SLOWEST * (self.time - before.time))


async def _write_zeros(source: Source, request: Request) -> None:
    offset, end = request.offset, request.offset + request.length
    own = own_method(source, "write_zeros")
    if own is not None:
        await own(offset, request.length, hole=not request.flags & wire.CMD_FLAG_NO_HOLE)
        return
    while offset < end:
        count = min(len(ZEROS), end - offset)
        await source.write(offset, memoryview(ZEROS)[:count])  # type: ignore[attr-defined]
        offset += count


async def _trim(source: Source, request: Request) -> None:
    """What is read there afterwards is undefined: nothing has to be done."""
    trim = own_method(source, "trim")
    zeros = own_method(source, "write_zeros")
    if trim is not None:
        await trim(request.offset, request.length)
    elif zeros is not None:
        await zeros(request.offset, request.length, hole=True)
