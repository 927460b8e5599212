"""The connections of a client to one export: made, lost, made again, and what is sent on which.

What a lost connection owes is sent again on another one, or waits for the next, so a server's
restart is a pause. Not all of it: see `Request.pinned`, and `aiouffd.nbd.writes` for writes.
"""

from __future__ import annotations

import asyncio
import logging
import ssl as ssl_module
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from ..errors import ClosedError, SourceChangedError, SourceError, UnsupportedError, UsageError
from ..sources.lifecycle import Life
from ..util.backoff import Backoff
from ..util.once import Once, cancelled_from_outside
from ..util.tasks import begin
from ..util.waiting import retrieve
from . import wire
from .client import Connection, connect
from .client_core import Export, Request
from .uri import NbdAddress
from .writes import Writes

__all__ = ["Pool"]

log = logging.getLogger("aiouffd")

#: Bytes up to which a request is small, and how many connections such ones use.
SMALL, FEW = 16 * 1024, 2
#: Connections that one request may lose before it has failed (transient).
LOSSES = 4
#: First and longest pause between two tries to connect, in seconds.
PAUSE_FIRST, PAUSE_LONGEST = 0.02, 1.0
#: Seconds that a server has to take our goodbye.
GOODBYE = 5.0


class Pool:
    """Connections to ``address``, at most ``most``; only one if the server does not say that
    several see the same bytes.

    ``writes`` is told of every connection that is lost (before its requests are), and asked what
    has to be told a new one. ``expected`` is the export that has to be there when it is opened.
    Times in seconds. Belongs to the loop on which it was opened.

    It is not for users to hold: its connections refer to it, and the loop to them. `abandon` it
    when its owner is collected.
    """

    def __init__(
        self,
        address: NbdAddress,
        writes: Writes,
        *,
        most: int,
        tls: ssl_module.SSLContext | None,
        connect_timeout: float,
        silence: float,
        reconnect: float,
        writable: bool,
    ) -> None:
        self._address = address
        self._writes = writes
        self._most = most
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._silence = silence
        self._reconnect = reconnect
        self._writable = writable
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orphans: deque[Request] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connecting: asyncio.Task[None] | None = None
        self._changed: SourceChangedError | None = None
        self._life = Life(f"the source of {address}")
        self._fencing = Once[None](f"asking {address} about lost connections", abandon=True)
        #: What the handshake found; None before `open`.
        self.export: Export | None = None
        self.expected: Export | None = None
        #: Those that work.
        self.live: list[Connection] = []
        #: Connections made after the first one, and requests that were sent again.
        self.connected = self.replayed = 0

    def __repr__(self) -> str:
        return f"<NBD connections to {self._address}>"

    # ------------------------------------------------------------ opening, closing

    async def open(self) -> None:
        """Connect and negotiate, once. May be tried again after a failure."""
        await self._life.open(self._open, self._undo)

    async def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        connection = await self._connect()
        export = connection.export
        try:
            if self.expected is not None and export != self.expected:
                raise SourceChangedError(f"{self._address} is not the export that was opened")
            if self._writable and export.has(wire.FLAG_READ_ONLY):
                raise UnsupportedError(f"{self._address} cannot be written to")
        except BaseException:
            await _ended(connection)
            raise
        self.export = export
        self._joins(connection)
        self._grow(self._most - 1)

    async def _undo(self) -> None:
        """Nobody waits for the pool that was just opened."""
        self.export = None
        await self._end()

    async def aclose(self) -> None:
        """Say goodbye and close. Requests under way raise ClosedError. Returns when no
        connection and no task is left; who calls again, or is cancelled, loses nothing."""
        await self._life.close(self._close)

    async def _close(self) -> None:
        try:
            await self._fencing.stop()
            await self._end()
        finally:
            self.drop()

    async def _end(self) -> None:
        """Close what there is, and wait for the end of it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        live = list(self.live)
        try:
            if tasks:
                await asyncio.wait(tasks)
            for connection in live:
                connection.close()
            try:
                async with asyncio.timeout(GOODBYE):
                    for connection in live:
                        await connection.wait_closed()
            except TimeoutError:
                log.info("%s: the server does not take our goodbye", self._address)
        finally:
            for connection in live:
                connection.abort()
        for connection in live:
            await connection.wait_closed()

    @property
    def closed(self) -> bool:
        """Whether closing has begun."""
        return self._life.closed

    def drop(self) -> None:
        """Close at once, without goodbye; on the pool's loop."""
        self._life.closed = True
        for task in self._tasks:
            task.cancel()
        for connection in list(self.live):
            connection.abort()
        self._fail(ClosedError(f"the source of {self._address} was closed during a request"))

    def abandon(self) -> None:
        """`drop`, from any thread; nothing if the loop is closed, and its sockets with it."""
        loop = self._loop
        if loop is not None and not loop.is_closed() and (self.live or self._tasks):
            try:
                loop.call_soon_threadsafe(self.drop)
            except RuntimeError:
                pass  # closed meanwhile

    def check(self) -> None:
        """Raise why nothing can be asked for now: closed, changed, unopened, another loop's."""
        if self._changed is not None:
            raise self._changed
        self._life.check()
        if self.export is None:
            raise UsageError(
                f"the source of {self._address} is not open", hint="await open() first"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                f"the source of {self._address} belongs to another event loop",
                hint="use a clone() on this one",
            )

    # ----------------------------------------------------------------- connections

    async def _connect(self) -> Connection:
        """One that works, and has asked about the lost ones."""
        tls = self._tls
        if self._address.tls and tls is None:
            tls = ssl_module.create_default_context()
        connection = await connect(
            self._address,
            tls=tls,
            connect_timeout=self._connect_timeout,
            silence=self._silence,
            on_lost=self._lost,
            identify=self._writable,
            ended=self._writes.tokens() if self._writable else (),
        )
        if connection.lost:
            raise SourceError(f"{self._address}: the server hung up after the handshake")
        self._writes.laid(connection.laid)
        return connection

    def _joins(self, connection: Connection) -> None:
        self.live.append(connection)
        self._adopt()

    async def _another(self) -> None:
        """One more connection to the same export."""
        connection = await self._connect()
        if self._life.closed or connection.export != self.export:
            await _ended(connection)
            raise SourceChangedError(f"{self._address} is not the export that was opened")
        self.connected += 1
        self._joins(connection)

    def _grow(self, more: int) -> None:
        """More connections, in the background; whoever refuses them is left with what there is."""

        async def grow() -> None:
            try:
                for _ in range(more):
                    await self._another()
            except (SourceError, OSError):
                pass

        assert self.export is not None
        if more > 0 and self.export.has(wire.FLAG_CAN_MULTI_CONN):
            self._start(grow)

    def _start(
        self,
        function: Callable[[], Coroutine[Any, Any, None]],
        lost: Callable[[], object] | None = None,
    ) -> asyncio.Task[None]:
        assert self._loop is not None
        task = begin(function, lost, loop=self._loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Its failure reaches the requests; nobody else may be waiting for the task.
        task.add_done_callback(retrieve)
        return task

    async def fence(self) -> None:
        """Have a new connection ask the server about the lost ones: see `Writes.laid`. Raises
        SourceError when there is none to be had."""
        if not self.live:
            await self._connected()  # which asks
            return
        await self._fencing(self._asking)

    async def _asking(self) -> None:
        connection = await self._connect()
        assert self.export is not None
        if connection.export == self.export and self.export.has(wire.FLAG_CAN_MULTI_CONN):
            self._joins(connection)
        else:
            connection.close()
            await connection.wait_closed()

    def _lost(
        self, connection: Connection, requests: list[Request], error: Exception | None
    ) -> None:
        if connection not in self.live:
            return  # never got so far
        self.live.remove(connection)
        self._writes.lost(connection, requests)
        if self._life.closed:
            for request in requests:
                request.finish(
                    ClosedError(f"the source of {self._address} was closed during a request")
                )
            return
        if error is not None:
            log.warning("%s: %s", self._address, error)
            for request in requests:
                request.finish(error)
            return
        for request in requests:
            request.reset()
            request.lost += 1
            if request.pinned or request.lost > LOSSES:
                # It may be the reason. Whoever asks again does so after a pause.
                request.finish(
                    SourceError(f"{self._address}: connections end instead of an answer")
                )
            else:
                self._orphans.append(request)
        log.info("%s: lost a connection, %d requests under way", self._address, len(requests))
        if self.live:
            self._adopt()
        elif self._orphans:
            self._connect_again()

    def _adopt(self) -> None:
        """Send what lost its connection, or never had one, on one that works."""
        while self._orphans and self.live:
            request = self._orphans.popleft()
            if request.lost:
                self.replayed += 1
            self._submit(request)

    def _connect_again(self) -> asyncio.Task[None]:
        if self._connecting is None:
            self._connecting = self._start(self._come_back, self._stay_away)
        return self._connecting

    def _stay_away(self) -> None:
        self._connecting = None
        self._fail(ClosedError(f"the source of {self._address} was closed during a request"))

    async def _come_back(self) -> None:
        """Connect within the budget, and go on; or fail what waits for it."""
        limit = time.monotonic() + self._reconnect
        backoff = Backoff(PAUSE_FIRST, PAUSE_LONGEST)
        try:
            while True:
                try:
                    connection = await self._connect()
                    break
                except (SourceError, OSError) as error:
                    pause = backoff.next()
                    if time.monotonic() + pause > limit:
                        raise SourceError(
                            f"{self._address}: no connection: {error}", transient=True
                        ) from error
                await asyncio.sleep(pause)
            if connection.export != self.export:
                connection.abort()
                self._changed = SourceChangedError(
                    f"{self._address} is not the export that was opened"
                )
                raise self._changed
            self.connected += 1
            self._connecting = None
            self._joins(connection)
            self._grow(self._most - 1)
        except asyncio.CancelledError:
            self._stay_away()
            raise
        except BaseException as error:
            self._connecting = None
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """What waits for a connection gets none."""
        while self._orphans:
            self._orphans.popleft().finish(error)

    async def _connected(self) -> None:
        """Have a connection, or raise why there is none."""
        while not self.live:
            self.check()
            try:
                await asyncio.shield(self._connect_again())
            except asyncio.CancelledError:
                if self._life.closed and not cancelled_from_outside():
                    raise ClosedError(f"the source of {self._address} is closed") from None
                raise

    # -------------------------------------------------------------------- requests

    def send(self, request: Request) -> None:
        """On a connection, or the next one there is; ``done`` tells the end. After `check`."""
        if self.live:
            self._submit(request)
        else:
            self._orphans.append(request)
            self._connect_again()

    def send_on(self, connection: Connection, request: Request) -> None:
        """On this one, which is live."""
        request.carried_by(connection)
        connection.submit(request)

    def _submit(self, request: Request) -> None:
        """On the connection that has least to do. What is small keeps to a few of them: the faults
        of one wake-up are then few sends, and their answers few receives."""
        live = self.live
        best = live[0]
        for connection in live[:FEW] if request.length <= SMALL else live:
            if connection.outstanding < best.outstanding:
                best = connection
        self.send_on(best, request)


async def _ended(connection: Connection) -> None:
    """Close at once, and wait for the end of it."""
    connection.abort()
    await connection.wait_closed()
