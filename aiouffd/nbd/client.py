"""One connection to an NBD server, on asyncio.

Requests made in one iteration of the loop are one send; replies are parsed where they are received
(see `client_core`). No task per request, and no future unless somebody awaits one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl as ssl_module
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

from ..errors import AiouffdError, SourceError, SourceTimeoutError
from ..sources.base import SourcePermissionError
from ..util.places import Unsafe
from ..util.unix_sockets import check_server
from . import wire
from .client_core import Export, Handshake, Replies, Request
from .uri import NbdAddress

__all__ = ["Connection", "connect"]

OnLost: TypeAlias = "Callable[[Connection, list[Request], Exception | None], None]"

#: Bytes asked of the kernel for the socket's buffers: a large read arrives in few receives.
SOCKET_BUFFER = 4 << 20


async def connect(
    address: NbdAddress,
    *,
    tls: ssl_module.SSLContext | None,
    connect_timeout: float,
    silence: float,
    on_lost: OnLost,
    identify: bool = False,
    ended: Sequence[str] = (),
) -> Connection:
    """Connect and negotiate. Times in seconds: for all of that, and for silence of the server
    while it owes answers. ``on_lost`` gets the connection, the requests that were not answered,
    and the protocol's error if that was the reason. ``identify`` and ``ended`` are those of
    `Handshake`.

    Raises FileNotFoundError (no such export or socket), SourceError and its kin.
    """
    connection = Connection(silence, on_lost)
    handshake = Handshake(address.export, tls=tls is not None, identify=identify, ended=ended)
    try:
        async with asyncio.timeout(connect_timeout):
            await connection._connect(address, tls, handshake)
    except BaseException as error:
        connection.abort()
        if connection._created:
            await connection.wait_closed()
        raise _translated(address, error) from error
    return connection


def _translated(address: NbdAddress, error: BaseException) -> BaseException:
    if isinstance(error, AiouffdError | asyncio.CancelledError) or not isinstance(error, Exception):
        return error
    if isinstance(error, FileNotFoundError):
        if address.socket is not None and error.filename is None:
            return FileNotFoundError(errno.ENOENT, "no such socket", address.socket)
        return error
    if isinstance(error, Unsafe):
        return SourcePermissionError(
            f"{address}: {error.strerror}",
            transient=False,
            errno=errno.EACCES,
            hint="name the user whose server may be believed: server_user=",
        )
    if isinstance(error, PermissionError):
        return SourcePermissionError(
            f"{address}: cannot connect: {error.strerror}",
            transient=False,
            errno=error.errno,
            hint="who may connect is decided by the mode of the socket and of its folder",
        )
    if isinstance(error, TimeoutError):
        return SourceTimeoutError(f"{address}: the server took too long to answer")
    if isinstance(error, ssl_module.SSLCertVerificationError):
        return SourceError(
            f"{address}: the server's certificate is not valid: {error.verify_message}",
            transient=False,
            hint="pass tls= with an ssl.SSLContext that trusts its authority",
        )
    if isinstance(error, ssl_module.SSLError):
        # Its number is OpenSSL's, not the system's.
        return SourceError(f"{address}: TLS failed: {error.reason or error}")
    if isinstance(error, OSError):
        number = error.errno if error.errno in errno.errorcode else None
        reason = os.strerror(number) if number else error.strerror or type(error).__name__
        return SourceError(f"{address}: cannot connect: {reason}", errno=number)
    return SourceError(f"{address}: cannot connect: {error}", transient=False)


def _nobody(_connection: Connection, _requests: list[Request], _error: Exception | None) -> None:
    """There is nobody any more to be told."""


class Connection(asyncio.BufferedProtocol):
    """Made by `connect`. Belongs to one loop."""

    export: Export
    #: What the server calls this connection; those that it said have ended (`aiouffd.nbd.fence`).
    token: str | None = None
    laid: Sequence[str] = ()

    def __init__(
        self,
        timeout: float,
        on_lost: OnLost,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._handshake: Handshake | None = None
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._scratch = memoryview(bytearray(4096))
        self._replies: Replies | None = None
        self._error: Exception | None = None
        self._cookie = 0
        self._out: list[Any] = []
        self._flushing = False
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None
        # Bytes given to the transport, and what it had got rid of, and not, when we looked.
        self._said = self._taken = self._unsent = 0
        #: Bytes of reads and writes that were asked for and not answered.
        self.outstanding = 0
        self.lost = False
        self._ended = asyncio.Event()
        self._created = False

    async def wait_closed(self) -> None:
        """Until the connection has ended, and its descriptor is closed."""
        await self._ended.wait()
        # On both loops the socket is closed after the protocol was told.
        await asyncio.sleep(0)

    async def _connect(
        self, address: NbdAddress, tls: ssl_module.SSLContext | None, handshake: Handshake
    ) -> None:
        self._handshake = handshake
        if address.socket is not None:
            # Who listens there is asked of the kernel, before a word is said.
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                await self._loop.sock_connect(sock, address.socket)
                check_server(sock, address.socket, address.user)
                await self._loop.create_unix_connection(lambda: self, sock=sock)
            except BaseException:
                sock.close()
                raise
        else:
            await self._loop.create_connection(lambda: self, address.host or "", address.port)
        # Before, a cancelled attempt is cleaned up by the loop, which on uvloop tells nobody.
        self._created = True
        if tls is not None:
            await self._ready
            transport = self._transport
            assert transport is not None
            self._ready = self._loop.create_future()
            name = address.host or ("localhost" if tls.check_hostname else None)
            try:
                upgraded = await self._loop.start_tls(transport, self, tls, server_hostname=name)
                if upgraded is None or upgraded.is_closing():
                    raise ConnectionResetError("the server hung up during the TLS handshake")
            except BaseException:
                # Of a connection that ends in the middle of that, we may not be told.
                transport.abort()
                self.connection_lost(None)
                raise
            self._transport = upgraded
            handshake.tls_started()
            self._send_handshake()
        await self._ready
        self.token, self.laid = handshake.token, handshake.laid
        self._handshake = None

    # ---- the protocol's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                pass  # it was a wish

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._scratch if self._replies is None else self._replies.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            if self._replies is not None:
                self._heard = time.monotonic()
                self._replies.received(nbytes)
            else:
                self._negotiate(bytes(self._scratch[:nbytes]))
        except Exception as error:
            self._fail(error)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self.lost:
            return
        self.lost = True
        if self._watch is not None:
            self._watch.cancel()
        if not self._ready.done():
            self._ready.set_exception(
                self._error or exc or SourceError("the NBD server hung up during the handshake")
            )
            self._ready.exception()  # retrieved: nobody may be waiting any more
        requests: list[Request] = []
        if self._replies is not None:
            requests = list(self._replies.requests.values())
            under_way = self._replies.take_unfinished()
            if under_way is not None and under_way not in requests:
                requests.append(under_way)
            self._replies.requests.clear()
        self._out.clear()
        # Whoever made us is told once, and not kept alive by what may keep us.
        on_lost, self._on_lost = self._on_lost, _nobody
        on_lost(self, requests, self._error)
        self._ended.set()

    def _negotiate(self, data: bytes) -> None:
        handshake = self._handshake
        assert handshake is not None
        rest = handshake.feed(data)
        self._send_handshake()
        if handshake.export is not None:
            self.export = handshake.export
            self._replies = Replies(self.export)
            self._replies.feed(rest)
        if (handshake.export is not None or handshake.wants_tls) and not self._ready.done():
            self._ready.set_result(None)

    def _send_handshake(self) -> None:
        assert self._handshake is not None
        assert self._transport is not None
        data = self._handshake.take()
        if data:
            self._transport.write(data)

    def _fail(self, error: Exception) -> None:
        """The peer cannot be talked to any more."""
        self._error = error
        if not self._ready.done():
            self._ready.set_exception(error)
        self.abort()

    # ---- requests ----

    def submit(self, request: Request) -> None:
        """Send it, together with what else is submitted before the loop turns."""
        replies = self._replies
        assert replies is not None
        self._cookie = cookie = self._cookie + 1
        if not replies.requests:
            self._heard = time.monotonic()
        replies.requests[cookie] = request
        self._out.append(request.pack(cookie))
        if request.data is not None:
            self._out.append(request.data)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look)

    def _flush(self) -> None:
        self._flushing = False
        out, self._out = self._out, []
        if self.lost or self._transport is None or not out:
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        self._said += len(data)
        self._transport.write(data)

    def _look(self) -> None:
        """Whether the server has been silent for too long while it owes something."""
        self._watch = None
        replies = self._replies
        if self.lost or replies is None or not replies.busy:
            return
        assert self._transport is not None
        unsent = self._transport.get_write_buffer_size()
        taken = self._said - unsent
        if (unsent or self._unsent) and taken != self._taken:
            # It had not got yet what it is to write, and is busy with that.
            self._heard = time.monotonic()
        self._taken, self._unsent = taken, unsent
        left = self._heard + self._timeout - time.monotonic()
        if left <= 0:
            # Not `_error`: the requests may do better on another connection.
            self.abort()
        else:
            self._watch = self._loop.call_later(left, self._look)

    # ---- the end ----

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Say goodbye and close. What is under way is not answered any more."""
        if self._transport is None or self.lost:
            return
        if self._replies is not None:
            self._transport.write(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_DISC, 0, 0, 0))
        self._transport.close()
