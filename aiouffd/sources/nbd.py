"""Bytes of an export of an NBD server.

Reads go straight into the caller's buffer, over as many connections as the server allows. What a
lost connection had under way is sent again on another one, so a server's restart is a pause.
Extents that the server knows to be zeros are learnt once per gigabyte and not read at all.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl as ssl_module
import time
import warnings
from collections import deque
from typing import Any

from ..errors import ClosedError, SourceChangedError, SourceError, UnsupportedError, UsageError
from ..nbd import wire
from ..nbd.client import Connection, connect
from ..nbd.client_core import Export, Request
from ..nbd.extents import ZeroMap
from ..nbd.uri import NbdAddress, parse
from ..waiting import Done, countdown, retrieve
from .base import BaseSource, Buffer, check_range

__all__ = ["NbdSource"]

log = logging.getLogger("aiouffd")

#: Bytes whose extents are asked for at a time, and how often for one such area.
AREA, ASKS = 1 << 30, 64
#: Bytes up to which a request is small, and how many connections such ones use.
SMALL, FEW = 16 * 1024, 2
#: Connections that one request may lose before it has failed (transient).
LOSSES = 4
#: First and longest pause between two tries to connect, in seconds.
PAUSE_FIRST, PAUSE_LONGEST = 0.02, 1.0


class NbdSource(BaseSource):
    """A source over an NBD export.

    Arguments:
        address: an NBD URI (``nbd://host:port/export``, ``nbd+unix:///export?socket=PATH``;
            ``nbds`` for TLS), or an `NbdAddress`.
        connections: how many connections to use at most; only one if the server does not
            say that several see the same bytes.
        tls: for ``nbds``: an ssl.SSLContext; by default certificates are verified against the
            system's authorities.
        connect_timeout: seconds for connecting and negotiating.
        timeout: seconds of silence, while the server owes answers, until its connection is
            given up.
        reconnect: seconds for which a lost connection is tried again before what was under way
            fails (transient).
        writable: allow `write` and `flush`, if the server does.
        holes: ask which parts are zeros.

    NBD has no versions: ``version`` is None, and a change of the export's contents cannot
    be seen. If size or block sizes are others after a reconnect, reads raise SourceChangedError.

    ``open()`` raises FileNotFoundError when there is no such export or socket,
    SourcePermissionError when the server refuses (or wants TLS), SourceError otherwise.
    """

    def __init__(
        self,
        address: str | NbdAddress,
        *,
        connections: int = 4,
        tls: ssl_module.SSLContext | None = None,
        connect_timeout: float = 10.0,
        timeout: float = 60.0,
        reconnect: float = 30.0,
        writable: bool = False,
        holes: bool = True,
    ) -> None:
        self._address = parse(address) if isinstance(address, str) else address
        if connections < 1:
            raise UsageError(f"connections must be at least 1, got {connections}")
        if connect_timeout <= 0 or timeout <= 0 or reconnect < 0:
            raise UsageError("timeouts are positive numbers of seconds")
        if tls is not None and not self._address.tls:
            raise UsageError("tls goes with an nbds:// URI")
        self._most = connections
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._reconnect = reconnect
        self._writable = writable
        self._ask_holes = holes
        self._export: Export | None = None
        self._expected: Export | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: list[Connection] = []
        self._orphans: deque[Request] = deque()
        self._connecting: asyncio.Task[None] | None = None
        self._growing: asyncio.Task[None] | None = None
        self._changed: SourceChangedError | None = None
        self._closed = False
        self._map = ZeroMap()
        self._asking: dict[int, asyncio.Future[None]] = {}
        self._asked: dict[int, int] = {}
        #: Connections that were made, and requests that were sent again.
        self.connected = self.replayed = 0

    @classmethod
    def from_url(cls, url: str, **options: Any) -> NbdSource:
        """The source for an NBD URI."""
        return cls(url, **options)

    def __repr__(self) -> str:
        return f"<NbdSource {self._address}>"

    def __del__(self) -> None:
        if getattr(self, "_live", None):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            for connection in self._live:
                if self._loop is not None and not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(connection.abort)

    @property
    def size(self) -> int:
        """Length of the export in bytes. Raises UsageError before ``open()``."""
        export = self._export or self._expected
        if export is None:
            raise UsageError(f"the size of {self!r} is not known yet", hint="await open() first")
        return export.size

    @property
    def cache_key(self) -> str:
        """What names the export for a cache on disk; its version is for the user to vouch for."""
        return str(self._address)

    @property
    def writable(self) -> bool:
        """Whether `write` works."""
        return self._writable

    @property
    def export(self) -> Export:
        """What the server said of the export. Raises UsageError before ``open()``."""
        if self._export is None:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        return self._export

    # ------------------------------------------------------------- connections

    async def open(self) -> None:
        """Connect and negotiate."""
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if self._export is not None:
            return
        self._loop = asyncio.get_running_loop()
        connection = await self._connect_one()
        export = connection.export
        if self._expected is not None and export != self._expected:
            connection.abort()
            raise SourceChangedError(f"{self._address} is not the export that was opened")
        if self._writable and export.has(wire.FLAG_READ_ONLY):
            connection.abort()
            raise UnsupportedError(f"{self._address} cannot be written to")
        self._export = export
        self._live.append(connection)
        if export.has(wire.FLAG_CAN_MULTI_CONN) and self._most > 1:
            self._growing = self._loop.create_task(self._grow(self._most - 1))

    async def _connect_one(self) -> Connection:
        tls = self._tls
        if self._address.tls and tls is None:
            tls = ssl_module.create_default_context()
        return await connect(
            self._address,
            tls=tls,
            connect_timeout=self._connect_timeout,
            silence=self._timeout,
            on_lost=self._lost,
        )

    async def _grow(self, more: int) -> None:
        """More connections, in the background; whoever refuses them is left with what there is."""
        for _ in range(more):
            try:
                connection = await self._connect_one()
            except (SourceError, OSError):
                return
            if self._closed or connection.export != self._export:
                connection.abort()
                return
            self.connected += 1
            self._live.append(connection)

    def _lost(
        self, connection: Connection, requests: list[Request], error: Exception | None
    ) -> None:
        if connection not in self._live:
            return  # never got so far
        self._live.remove(connection)
        if self._closed:
            for request in requests:
                request.finish(ClosedError(f"{self!r} was closed during a request"))
            return
        if error is not None:
            log.warning("%s: %s", self._address, error)
            for request in requests:
                request.finish(error)
            return
        for request in requests:
            request.reset()
            request.lost += 1
            if request.lost > LOSSES:
                # It may be the reason. Whoever asks again does so after a pause.
                request.finish(
                    SourceError(f"{self._address}: connections end instead of an answer")
                )
            else:
                self._orphans.append(request)
        log.info("%s: lost a connection, %d requests under way", self._address, len(requests))
        if self._live:
            self._adopt()
        elif self._orphans:
            self._connect_again()

    def _adopt(self) -> None:
        """Send what lost its connection on another one."""
        while self._orphans and self._live:
            self.replayed += 1
            self._submit(self._orphans.popleft())

    def _connect_again(self) -> asyncio.Task[None]:
        assert self._loop is not None
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._come_back())
            # Its failure reaches the requests; nobody else may be waiting for the task.
            self._connecting.add_done_callback(retrieve)
        return self._connecting

    async def _come_back(self) -> None:
        """Connect within the budget, and go on; or fail what waits for it."""
        limit = time.monotonic() + self._reconnect
        pause = PAUSE_FIRST
        failure: BaseException
        try:
            while True:
                try:
                    connection = await self._connect_one()
                    break
                except (SourceError, OSError) as error:
                    failure = error
                    if time.monotonic() + pause > limit:
                        raise SourceError(
                            f"{self._address}: no connection: {error}", transient=True
                        ) from error
                await asyncio.sleep(pause * (0.5 + random.random()))
                pause = min(pause * 2, PAUSE_LONGEST)
            if connection.export != self._export:
                connection.abort()
                self._changed = SourceChangedError(
                    f"{self._address} is not the export that was opened"
                )
                raise self._changed
            self.connected += 1
            self._live.append(connection)
            self._connecting = None
            self._adopt()
            if self._export.has(wire.FLAG_CAN_MULTI_CONN) and self._most > 1:
                self._growing = asyncio.ensure_future(self._grow(self._most - 1))
        except BaseException as error:
            self._connecting = None
            failure = error
            if isinstance(error, asyncio.CancelledError):
                failure = ClosedError(f"{self!r} was closed during a request")
            while self._orphans:
                self._orphans.popleft().finish(failure)
            raise

    async def _connected(self) -> None:
        """Have a connection, or raise why there is none."""
        self._check_open()
        if not self._live:
            try:
                await asyncio.shield(self._connect_again())
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._closed and task is not None and not task.cancelling():
                    raise ClosedError(f"{self!r} is closed") from None
                raise

    def _check_open(self) -> None:
        if self._changed is not None:
            raise self._changed
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if self._export is None:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                f"{self!r} belongs to another event loop", hint="use a clone() on this one"
            )

    async def aclose(self) -> None:
        """Say goodbye and close. Requests under way raise ClosedError. Idempotent."""
        if self._closed:
            return
        self._closed = True
        tasks = [task for task in (self._connecting, self._growing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        lost = list(self._live)
        for connection in lost:
            connection.close()
        # Nothing is left behind when we return.
        await asyncio.gather(*(connection.wait_closed() for connection in lost))

    def clone(self) -> NbdSource:
        """Another source for the same export, pinned to its size and block sizes."""
        other = NbdSource(
            self._address,
            connections=self._most,
            tls=self._tls,
            connect_timeout=self._connect_timeout,
            timeout=self._timeout,
            reconnect=self._reconnect,
            writable=self._writable,
            holes=self._ask_holes,
        )
        other._expected = self._export or self._expected
        return other

    # ------------------------------------------------------------------- reads

    def _submit(self, request: Request) -> None:
        """On the connection that has least to do. What is small keeps to a few of them: the faults
        of one wake-up are then few sends, and their answers few receives."""
        live = self._live
        best = live[0]
        for connection in live[:FEW] if request.length <= SMALL else live:
            if connection.outstanding < best.outstanding:
                best = connection
        request.carried_by(best)
        best.submit(request)

    def begin_read(self, offset: int, buffer: memoryview, done: Done) -> Request | None:
        """Start reading ``len(buffer)`` bytes at ``offset``; ``done(error)`` tells the end.

        For callers who want neither a task nor a future per read. Called on the loop, as is
        ``done``. Returns what can be cancelled (``cancel()``: ``done`` is not called and
        nothing is written any more), or None if it cannot be one request now, or is a hole for
        all that is known: `holes` and `read_into` can.
        """
        length = len(buffer)
        export = self._export
        if (
            export is None
            or not self._live
            or self._closed
            or not 0 < length <= export.maximum
            or offset % export.minimum
            or length % export.minimum
            or offset + length > export.size
            or self.known_holes(offset, length) != []
        ):
            return None
        request = Request(wire.CMD_READ, offset, length, done, target=buffer)
        self._submit(request)
        return request

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` straight into ``buffer``."""
        self._check_open()
        export = self.export
        length = len(buffer)
        check_range(offset, length, export.size)
        if not length:
            return
        unit = export.minimum
        start = offset - offset % unit
        end = min(export.size, offset + length + -(offset + length) % unit)
        if start != offset or end != offset + length:
            wider = memoryview(bytearray(end - start))
            await self.read_into(start, wider)
            buffer[:] = wider[offset - start :][:length]
            return
        pieces = [
            Request(
                wire.CMD_READ,
                offset + at,
                min(export.maximum, length - at),
                _ignored,
                target=buffer[at : at + export.maximum],
            )
            for at in range(0, length, export.maximum)
        ]
        await self._all(pieces)

    async def _all(self, requests: list[Request]) -> None:
        """Send them and wait for the last answer; when cancelled, nothing is written any more."""
        if not self._live:
            await self._connected()
        future, done = countdown(len(requests))
        for request in requests:
            request.done = done
            self._submit(request)
        try:
            await future
        except BaseException:
            for request in requests:
                request.target = None
            raise

    # ------------------------------------------------------------------- holes

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Ranges that the server says are zeros. Asks it at most once per call."""
        known = self.known_holes(offset, length)
        if known is not None:
            return known
        self._check_open()
        area = offset // AREA
        asking = self._asking.get(area)
        if asking is None:
            asking = asyncio.ensure_future(self._ask(area, offset))
            self._asking[area] = asking
        await asyncio.shield(asking)
        return self._map.zeros(offset, offset + length)

    def known_holes(self, offset: int, length: int) -> list[tuple[int, int]] | None:
        """What `holes` would say, or None if the server has to be asked."""
        export = self._export
        if export is None or export.allocation is None or not self._ask_holes:
            return []
        if self._map.knows(offset, offset + length):
            return self._map.zeros(offset, offset + length)
        return None

    async def _ask(self, area: int, offset: int) -> None:
        """Learn about an area: all of it the first time, from ``offset`` on if that fell short."""
        export = self.export
        first, end = area * AREA, min((area + 1) * AREA, export.size)
        asked = self._asked.get(area, 0)
        self._asked[area] = asked + 1
        start = first if not asked else offset - offset % max(export.minimum, 65536)
        try:
            if asked >= ASKS or (end - start) % export.minimum:
                self._map.assume_data(first, end)
                return
            request = Request(wire.CMD_BLOCK_STATUS, start, end - start, _ignored)
            await self._all([request])
            extents = request.extents or []
            pairs = [(length, bool(flags & wire.STATE_ZERO)) for length, flags in extents]
            # The last one may reach beyond what was asked for.
            reached = self._map.add(start, pairs)
            if reached <= offset and asked:
                self._map.assume_data(offset, end)
        except SourceError as error:
            if not error.transient:
                self._map.assume_data(first, end)
        finally:
            self._asking.pop(area, None)

    # ------------------------------------------------------------------ writes

    async def write(self, offset: int, data: Buffer) -> None:
        """Write ``data`` at byte ``offset``, both multiples of the server's smallest block."""
        self._check_open()
        if not self._writable:
            raise UnsupportedError(f"{self!r} was not opened with writable=True")
        export = self.export
        view = memoryview(data).cast("B")
        length = view.nbytes
        check_range(offset, length, export.size)
        if offset % export.minimum or (length % export.minimum and offset + length < export.size):
            raise UsageError(f"the server writes whole blocks of {export.minimum} bytes")
        self._map.assume_data(offset, offset + length)
        pieces = [
            Request(
                wire.CMD_WRITE,
                offset + at,
                min(export.maximum, length - at),
                _ignored,
                data=bytes(view[at : at + export.maximum]),
            )
            for at in range(0, length, export.maximum)
        ]
        if pieces:
            await self._all(pieces)

    async def flush(self) -> None:
        """Have the server make durable what was written. Nothing if it has no flush."""
        self._check_open()
        if self.export.has(wire.FLAG_SEND_FLUSH):
            await self._all([Request(wire.CMD_FLUSH, 0, 0, _ignored)])


def _ignored(_error: BaseException | None) -> None:
    """A place holder until somebody waits."""
