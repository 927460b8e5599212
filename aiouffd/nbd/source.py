"""Bytes of an export of an NBD server.

Reads go straight into the caller's buffer, over as many connections as the server allows. What a
lost connection had under way is sent again on another one, so a server's restart is a pause.
Extents that the server knows to be zeros are not read at all.

What is remembered is only what stays true. That there are data in a place is learnt once per
gigabyte; at worst zeros are read there later. That there are zeros is asked for at every read,
because somebody may have written meanwhile: we, our clone, or any other client.
"""

from __future__ import annotations

import asyncio
import ssl as ssl_module
import warnings
from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import SourceError, UnsupportedError, UsageError
from ..sources.base import BaseSource, Buffer, check_range
from ..sources.durability import Flusher
from ..util.places import user_id
from ..util.tasks import begin
from ..util.waiting import Done, countdown
from . import wire
from .client import Connection
from .client_core import Export, Request
from .extents import ZeroMap
from .order import Turn
from .pool import Pool
from .uri import NbdAddress, parse
from .writes import Content, Writes

__all__ = ["NbdSource"]

#: Bytes whose extents are asked for at a time, and how often for one such area.
AREA, ASKS = 1 << 30, 64
#: How often one range of zeros is asked for, where the server answers in parts.
PARTS = 16
#: Longest requests of those that carry no bytes: so much a server may have to do at a time.
STATUS_MOST, ZEROS_MOST = 1 << 30, 128 << 20


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
        writable: allow `write`, `write_zeros`, `trim` and `flush`, if the server does.
        holes: ask which parts are zeros.
        server_user: whose server on a Unix socket may be believed besides root's and this user's
            own: a name, or an id (-1: anybody's). Whoever may write to the socket's directory can
            listen there.

    NBD has no versions: ``version`` is None, and a change of the export's contents cannot
    be seen. If size or block sizes are others after a reconnect, reads raise SourceChangedError.

    **Writes.** Those to the same place are made one after the other. One that loses its
    connection is sent again; what that means for later ones is in `aiouffd.nbd.writes`. `flush`
    speaks for the connections that acknowledged: what one of them had acknowledged and not
    flushed when it was lost is in doubt, and `flush` raises FlushError until it was written
    again.

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
        server_user: int | str | None = None,
    ) -> None:
        self._address = parse(address) if isinstance(address, str) else address
        if server_user is not None:
            self._address = replace(self._address, user=user_id(server_user))
        if connections < 1:
            raise UsageError(f"connections must be at least 1, got {connections}")
        if connect_timeout <= 0 or timeout <= 0 or reconnect < 0:
            raise UsageError("timeouts are positive numbers of seconds")
        if tls is not None and not self._address.tls:
            raise UsageError("tls goes with an nbds:// URI")
        self._options: dict[str, Any] = {
            "connections": connections,
            "tls": tls,
            "connect_timeout": connect_timeout,
            "timeout": timeout,
            "reconnect": reconnect,
            "writable": writable,
            "holes": holes,
        }
        self._writable = writable
        self._ask_holes = holes
        self._writes = Writes(str(self._address))
        self._flusher = Flusher(self._writes.promises)
        self._pool = Pool(
            self._address,
            self._writes,
            most=connections,
            tls=tls,
            connect_timeout=connect_timeout,
            silence=timeout,
            reconnect=reconnect,
            writable=writable,
        )
        self._map = ZeroMap()
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._asked: dict[int, int] = {}

    @classmethod
    def from_url(cls, url: str, **options: Any) -> NbdSource:
        """The source for an NBD URI."""
        return cls(url, **options)

    def __repr__(self) -> str:
        return f"<NbdSource {self._address}>"

    def __del__(self) -> None:
        pool: Pool | None = getattr(self, "_pool", None)
        if pool is not None and pool.live:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        if pool is not None:
            pool.abandon()

    @property
    def size(self) -> int:
        """Length of the export in bytes. Raises UsageError before ``open()``."""
        export = self._pool.export or self._pool.expected
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
    def minimum_block(self) -> int:
        """The server's smallest block, in bytes; 1 where it does not divide the size."""
        export = self._pool.export or self._pool.expected
        if export is None or export.size % export.minimum:
            return 1
        return export.minimum

    @property
    def export(self) -> Export:
        """What the server said of the export. Raises UsageError before ``open()``."""
        if self._pool.export is None:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        return self._pool.export

    @property
    def _live(self) -> list[Connection]:
        return self._pool.live

    @property
    def connected(self) -> int:
        """Connections that were made after the first one."""
        return self._pool.connected

    @property
    def replayed(self) -> int:
        """Requests that were sent again, because their connection was lost."""
        return self._pool.replayed

    async def open(self) -> None:
        """Connect and negotiate."""
        await self._pool.open()

    async def aclose(self) -> None:
        """Say goodbye and close. Requests under way raise ClosedError.

        Idempotent; when cancelled it goes on, and a second call waits for its end.
        """
        await self._pool.aclose()
        await self._flusher.settled()
        if self._asking:
            await asyncio.wait(list(self._asking.values()))

    def clone(self) -> NbdSource:
        """Another source for the same export, pinned to its size and block sizes."""
        other = NbdSource(self._address, **self._options)
        other._pool.expected = self._pool.export or self._pool.expected
        return other

    # ------------------------------------------------------------------- reads

    def begin_read(self, offset: int, buffer: memoryview, done: Done) -> Request | None:
        """Start reading ``len(buffer)`` bytes at ``offset``; ``done(error)`` tells the end.

        For callers who want neither a task nor a future per read. Called on the loop, as is
        ``done``. Returns what can be cancelled (``cancel()``: ``done`` is not called and
        nothing is written any more), or None if it cannot be one request now, or may be a hole:
        `holes` and `read_into` can.
        """
        length = len(buffer)
        pool = self._pool
        export = pool.export
        if (
            export is None
            or not pool.live
            or pool.closed
            or not 0 < length <= export.maximum
            or offset % export.minimum
            or length % export.minimum
            or offset + length > export.size
            or self.known_holes(offset, length) is None
        ):
            return None
        request = Request(wire.CMD_READ, offset, length, done, target=buffer)
        pool.send(request)
        return request

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` straight into ``buffer``."""
        self._pool.check()
        length = len(buffer)
        check_range(offset, length, self.export.size)
        if not length:
            return
        start, end = self._whole_blocks(offset, length)
        if start != offset or end != offset + length:
            wider = memoryview(bytearray(end - start))
            await self._read_blocks(start, wider)
            buffer[:] = wider[offset - start :][:length]
        else:
            await self._read_blocks(offset, buffer)

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        """Start and end of the server's smallest blocks that hold this; the last may be short."""
        unit = self.export.minimum
        end = offset + length
        return offset - offset % unit, min(self.export.size, end + -end % unit)

    async def _read_blocks(self, offset: int, buffer: memoryview) -> None:
        most = self.export.maximum
        requests = [
            Request(
                wire.CMD_READ,
                offset + at,
                min(most, len(buffer) - at),
                _ignored,
                target=buffer[at : at + most],
            )
            for at in range(0, len(buffer), most)
        ]
        try:
            await self._all(requests)
        except SourceError as error:
            self._explain(error, offset, len(buffer))
            raise

    def _explain(self, error: SourceError, offset: int, length: int) -> None:
        """Add the reason that a server has for refusing its export's last bytes."""
        export = self.export
        rest = export.size % export.minimum
        if error.errno == wire.EINVAL and rest and offset + length == export.size:
            error.hint = (
                f"the export's {export.size} bytes are no multiple of the server's smallest block"
                f" of {export.minimum}, and it does not let its last {rest} bytes be used"
            )

    async def _all(self, requests: list[Request]) -> None:
        """Send them and wait for the last answer; when cancelled, nothing is written any more."""
        self._pool.check()
        future, done = countdown(len(requests))
        for request in requests:
            request.done = done
            self._pool.send(request)
        try:
            await future
        except BaseException:
            for request in requests:
                request.target = None
            raise

    # ------------------------------------------------------------------- holes

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Ranges that the server says are zeros now. Where there are no data for all that is
        known, it is asked; nothing is named when that fails."""
        self._pool.check()
        if self.known_holes(offset, length) is not None:
            return []
        try:
            if not self._map.knows(offset, offset + length):
                await self._learn(offset)
                if self.known_holes(offset, length) is not None:
                    return []
            return await self._zeros_now(offset, length)
        except SourceError:
            return []

    def known_holes(self, offset: int, length: int) -> list[tuple[int, int]] | None:
        """What `holes` would say without asking: nothing, because there are data or no zeros are
        ever told. None if the server has to be asked."""
        export = self._pool.export
        if export is None or export.allocation is None or not self._ask_holes:
            return []
        end = offset + length
        return None if not self._map.knows(offset, end) or self._map.zeros(offset, end) else []

    async def _learn(self, offset: int) -> None:
        """Where there are data, in all of the area around ``offset``; asked for once at a time."""
        area = offset // AREA
        asking = self._asking.get(area)
        if asking is None or asking.done():
            asking = begin(partial(self._ask, area, offset), partial(self._asking.pop, area, None))
            self._asking[area] = asking
        await asyncio.shield(asking)

    async def _ask(self, area: int, offset: int) -> None:
        """Learn about an area: all of it the first time, from ``offset`` on if that fell short."""
        export = self.export
        first, end = area * AREA, min((area + 1) * AREA, export.size)
        asked = self._asked.get(area, 0)
        self._asked[area] = asked + 1
        start = first if not asked else offset - offset % max(export.minimum, 65536)
        try:
            if asked >= ASKS:
                self._map.assume_data(first, end)
                return
            reached = self._map.add(start, await self._extents(start, end))
            # What lies in the last block, if that is short, cannot be asked for.
            whole = end - end % export.minimum
            if reached >= whole:
                self._map.assume_data(whole, end)
            elif reached <= offset and asked:
                self._map.assume_data(offset, end)
        except SourceError as error:
            if not error.transient:
                self._map.assume_data(first, end)
        finally:
            self._asking.pop(area, None)

    async def _extents(self, start: int, end: int) -> list[tuple[int, bool]]:
        """Lengths from ``start`` on, a multiple of the smallest block, and whether they are zeros
        now. They may end before ``end``, and behind it."""
        unit = self.export.minimum
        # A server may know no blocks beyond its last whole one.
        length = min(end + -end % unit, self.export.size - self.export.size % unit) - start
        if length <= 0:
            return []
        request = Request(wire.CMD_BLOCK_STATUS, start, min(length, STATUS_MOST), _ignored)
        await self._all([request])
        extents = request.extents or []
        return [(count, bool(flags & wire.STATE_ZERO)) for count, flags in extents]

    async def _zeros_now(self, offset: int, length: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = offset + length
        at = offset - offset % self.export.minimum
        for _ in range(PARTS):
            extents = await self._extents(at, end)
            self._map.add(at, extents)
            for count, zero in extents:
                start, stop = max(at, offset), min(at + count, end)
                if zero and start < stop:
                    if found and sum(found[-1]) == start:
                        start = found.pop()[0]
                    found.append((start, stop - start))
                at += count
            if not extents or at >= end:
                break
        return found

    # ------------------------------------------------------------------ writes

    async def write(self, offset: int, data: Buffer) -> None:
        """Write ``data`` at byte ``offset``.

        What is no multiple of the server's smallest block is read, completed, and written: that
        is one step for this source, and two for other clients of the server. If cancelled it may
        still be written, but before anything that is written to the same place later.

        Raises SourceError, not transient, where a write of a lost connection may still land.
        """
        view = memoryview(data).cast("B")
        self._check_change(offset, view.nbytes)
        if not view.nbytes:
            return
        start, end = self._whole_blocks(offset, view.nbytes)
        turn = await self._writes.order.turn(start, end - start)
        try:
            if start != offset or end != offset + view.nbytes:
                whole = memoryview(bytearray(end - start))
                await self._edges(whole, start, offset, offset + view.nbytes)
                whole[offset - start : offset - start + view.nbytes] = view
                view = whole
            else:
                view = memoryview(bytes(view))
        except BaseException:
            turn.end()
            raise
        await self._change(turn, wire.CMD_WRITE, view, self.export.maximum)

    async def _edges(self, whole: memoryview, start: int, first: int, last: int) -> None:
        """Read the smallest blocks of ``whole`` (at ``start``) that ``first`` to ``last`` covers in
        part only."""
        unit, end = self.export.minimum, start + len(whole)
        head = (start, min(start + unit, end)) if first != start else None
        tail = (end - (end % unit or unit), end) if last != end else None
        for edge in {head, tail} - {None}:
            assert edge is not None
            await self._read_blocks(edge[0], whole[edge[0] - start : edge[1] - start])

    async def write_zeros(self, offset: int, length: int, *, hole: bool) -> None:
        """As `write` of zeros, without sending them if the server can; with ``hole`` it may give
        the space back."""
        if not await self._without_bytes(
            wire.FLAG_SEND_WRITE_ZEROES,
            wire.CMD_WRITE_ZEROES,
            offset,
            length,
            0 if hole else wire.CMD_FLAG_NO_HOLE,
        ):
            zeros = memoryview(bytes(min(length, self.export.maximum)))
            for at in range(0, length, self.export.maximum):
                await self.write(offset + at, zeros[: length - at])

    async def trim(self, offset: int, length: int) -> None:
        """Say that nobody needs these bytes: what is read there afterwards is undefined. Nothing
        if the server does not want to know."""
        await self._without_bytes(wire.FLAG_SEND_TRIM, wire.CMD_TRIM, offset, length, 0)

    async def _without_bytes(
        self, flag: int, command: int, offset: int, length: int, flags: int
    ) -> bool:
        """Have whole blocks changed by a command; False if the server has none such."""
        self._check_change(offset, length)
        export = self.export
        if not export.has(flag):
            return False
        unit = export.minimum
        start = offset + -offset % unit
        end = offset + length
        end -= end % unit
        if command == wire.CMD_WRITE_ZEROES:
            # What is no whole block.
            edge = min(start, offset + length)
            if edge > offset:
                await self.write(offset, bytes(edge - offset))
            if offset + length > max(end, edge):
                await self.write(max(end, edge), bytes(offset + length - max(end, edge)))
        if start < end:
            turn = await self._writes.order.turn(start, end - start)
            content = None if command == wire.CMD_WRITE_ZEROES else False
            await self._change(turn, command, content, ZEROS_MOST, flags)
        return True

    def _check_change(self, offset: int, length: int) -> None:
        self._pool.check()
        if not self._writable:
            raise UnsupportedError(f"{self!r} was not opened with writable=True")
        check_range(offset, length, self.export.size)

    async def _change(
        self, turn: Turn, command: int, content: Content, most: int, flags: int = 0
    ) -> None:
        """Send what ``turn`` is for, in requests of at most ``most`` bytes, and wait for the last
        answer. The turn ends then, whoever waits."""
        offset, length = turn.offset, turn.end_offset - turn.offset
        try:
            if self._writes.haunted:
                await self._lay(offset, length, content)
            self._pool.check()
            if command == wire.CMD_WRITE:
                self._map.assume_data(offset, offset + length)
            else:
                self._map.forget(offset, offset + length)
            requests = [
                Request(
                    command,
                    offset + at,
                    min(most, length - at),
                    _ignored,
                    data=content[at : at + most] if isinstance(content, memoryview) else None,
                    flags=flags,
                )
                for at in range(0, length, most)
            ]
            future, done = countdown(len(requests))
            self._writes.track(turn, requests, done)
        except BaseException:
            turn.end()
            raise
        for request in requests:
            self._pool.send(request)
        try:
            await future
        except SourceError as error:
            self._explain(error, offset, length)
            raise

    async def _lay(self, offset: int, length: int, content: Content) -> None:
        """See that no older write of a lost connection can land after this one, or raise."""
        ghosts = self._writes.in_the_way(offset, length, content)
        if ghosts and all(ghost.token is not None for ghost in ghosts):
            await self._pool.fence()
            ghosts = self._writes.in_the_way(offset, length, content)
        if ghosts:
            raise self._writes.refusal(ghosts)

    async def flush(self) -> None:
        """Have the server make durable what was written. Nothing if it has no flush.

        Raises FlushError when that fails, and for writes that were acknowledged by a connection
        which was lost before they were flushed: the server may have lost them. It goes on raising
        that until those ranges were written again, whatever the server says.
        """
        self._pool.check()
        await self._flusher(self._flush)

    async def _flush(self) -> None:
        pool = self._pool
        if not self.export.has(wire.FLAG_SEND_FLUSH):
            return
        holders: set[Hashable] = self._writes.promises.holders()
        asked: list[Connection | None] = [each for each in pool.live if each in holders]
        future, done = countdown(max(1, len(asked)))
        for connection in asked or [None]:
            request = Request(wire.CMD_FLUSH, 0, 0, done, pinned=connection is not None)
            if connection is not None:
                pool.send_on(connection, request)
            else:
                # Nothing of ours; but who asks may mean what others have written.
                pool.send(request)
        await future


def _ignored(_error: BaseException | None) -> None:
    """A place holder until somebody waits."""
