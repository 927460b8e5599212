"""An NBD server over any sources, on asyncio.

Each client is a `Connection`. What all of them have under way together is counted here, so that
neither a greedy nor a stuck one makes the server grow, and who does not move is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl as ssl_module
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from ..errors import AiouffdError, ClosedError, UsageError
from ..sources.base import Source
from ..util.once import Once
from ..util.unix_sockets import Identity, bind_at, unlink_own
from .connection import Connection, NbdServerStats
from .exports import Account, Export, check_name
from .fence import Fences
from .uri import PORT, NbdAddress

__all__ = ["NbdServer", "NbdServerStats"]

log = logging.getLogger("aiouffd")

#: Seconds between two lines in the log about a source that fails.
COMPLAINTS = 10.0
#: Clients that the kernel keeps until we have accepted them.
BACKLOG = 100


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
            check_name(name)
        # One for each source, under however many names.
        of = {id(source): Account(source) for source in exports.values()}
        self.exports: Mapping[str, Export] = {
            name: Export(source, of[id(source)], writable=writable)
            for name, source in exports.items()
        }
        self.fences = Fences(self._supersede)
        self._numbers = 0
        self.tls = tls
        self.tls_required = tls_required
        self._max_clients = max_clients
        self.max_requests = max_requests
        self._memory = memory
        self.handshake_timeout = handshake_timeout
        self._stall_timeout = stall_timeout
        self.loop = asyncio.get_running_loop()
        self._listeners: list[asyncio.Server] = []
        self._paths: list[tuple[str, Identity]] = []
        self._clients: set[Connection] = set()
        self._starved: dict[Connection, None] = {}
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
        listener = await self.loop.create_server(
            lambda: Connection(self), host, port, start_serving=False
        )
        number = listener.sockets[0].getsockname()[1]
        await self._listens(listener)
        name = next(iter(self.exports))
        return str(NbdAddress(name, host, number, None, self.tls_required))

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
            listener = await self.loop.create_unix_server(
                lambda: Connection(self), sock=sock, start_serving=False
            )
            await self._listens(listener)
        except BaseException:
            sock.close()
            unlink_own(name, identity)
            raise
        self._paths.append((name, identity))
        export = next(iter(self.exports))
        return str(NbdAddress(export, socket=name, tls=self.tls_required))

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
        deadline = self.loop.time() + max(drain, 0)
        if deadline < self._deadline:
            self._deadline = deadline
            if self._hurry is not None:
                self._hurry.cancel()
                self._hurry = self.loop.call_at(deadline, self._give_up)
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
        self._hurry = self.loop.call_at(self._deadline, self._give_up)
        try:
            await self._idle.wait()
            for export in self.exports.values():
                await export.account.flusher.settled()
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
        for export in self.exports.values():
            export.account.flusher.cancel()

    def _supersede(self, number: int) -> None:
        """A client says that its connection ``number`` is lost: see `aiouffd.nbd.fence`."""
        for client in list(self._clients):
            if client.number == number:
                client.abort()

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("the NBD server is closed")

    # ---- what connections ask of us: see `Host` ----

    def joined(self, client: Connection) -> bool:
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

    def left(self, client: Connection) -> None:
        self._clients.discard(client)
        self._starved.pop(client, None)
        self.stats.clients = len(self._clients)
        if not self._clients:
            self._idle.set()

    def has_room(self, client: Connection, cost: int) -> bool:
        """Whether ``client`` may have ``cost`` bytes more; if not it is told when to ask again."""
        if client.outstanding and self.stats.bytes_outstanding + cost > self._memory:
            self._starved[client] = None
            return False
        return True

    def freed(self) -> None:
        while self._starved and self.stats.bytes_outstanding < self._memory:
            client = next(iter(self._starved))
            del self._starved[client]
            client.pump()
            if client in self._starved:
                return

    def complain(self, error: BaseException) -> None:
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
        pause = min(self.handshake_timeout, self._stall_timeout) / 4
        self._watch = self.loop.call_later(max(pause, 0.01), self._look)

    def _look(self) -> None:
        """Drop who does not move. Runs while there are clients."""
        self._watch = None
        now = time.monotonic()
        for client in list(self._clients):
            reason = client.stalled(now, self.handshake_timeout, self._stall_timeout)
            if reason:
                log.info("NBD: dropped a client that %s", reason)
                client.abort()
        if self._clients:
            self._look_later()


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.fspath(path))
