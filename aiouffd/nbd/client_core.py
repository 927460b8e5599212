"""A client's side of NBD without I/O: bytes in, bytes out, requests answered.

`Handshake` is fed what the server sends until it has an `Export`. `Replies` then takes over. It
says itself where the next bytes shall go (`Replies.get_buffer`), so that the payload of a
large read is received where it belongs, while many small replies come in one receive.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..errors import SourceError, UnsupportedError
from ..sources.base import SourcePermissionError
from . import wire
from .fence import CONNECTION, ENDED
from .wire import NbdProtocolError

__all__ = ["Export", "Handshake", "Replies", "Request"]

#: Longest reply to an option, and how many of them, before the server counts as hostile.
REPLY_MAX, REPLIES_MAX = 64 * 1024, 1000
#: Bytes of the buffer for headers and small payloads.
HEAD = 64 * 1024
#: Payload that is still to come, in bytes, from which on it is received where it belongs. Less
#: is copied there, so that many small replies are one receive.
DIRECT = 32 * 1024
#: Longest chunk that is neither data nor a hole: block status, in bytes.
STATUS_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class Export:
    """What the handshake found out. Sizes in bytes."""

    size: int
    flags: int
    minimum: int = 1
    preferred: int = 4096
    maximum: int = wire.PAYLOAD_MAX
    structured: bool = False
    #: Id of the context base:allocation, None without it.
    allocation: int | None = None

    def has(self, flag: int) -> bool:
        """Whether a transmission flag is set."""
        return bool(self.flags & flag)


Step = Generator[int | Literal["tls"], bytes, Any]


class Handshake:
    """Newstyle negotiation for one export.

    `feed` what the server sends; send what `take` gives. When `wants_tls` turns true: send what
    there is, upgrade the connection, and call `tls_started`. At the end `export` is set. Raises
    NbdProtocolError, FileNotFoundError (no such export), SourcePermissionError, UnsupportedError.
    ``identify`` and ``ended`` (tokens) are for clients that write: see `aiouffd.nbd.fence`.
    """

    def __init__(
        self, name: str, *, tls: bool = False, identify: bool = False, ended: Sequence[str] = ()
    ) -> None:
        self._name = name
        self._tls = tls
        #: Metadata contexts to ask for beside base:allocation.
        self._asks = [CONNECTION] if identify else []
        self._asks += [ENDED + token for token in ended]
        #: What the server calls this connection, if it does; and which of ``ended`` have ended.
        self.token: str | None = None
        self.laid: list[str] = []
        self._out = bytearray()
        self._in = bytearray()
        self._steps = self._run()
        self._need: int | Literal["tls"] = next(self._steps)
        self.export: Export | None = None
        self._replies = 0

    @property
    def wants_tls(self) -> bool:
        """Whether the connection is to be upgraded now."""
        return self._need == "tls"

    def take(self) -> bytes:
        """What is to be sent."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def feed(self, data: bytes) -> bytes:
        """Bytes from the server; returns those that come after the handshake."""
        self._in += data
        while self.export is None and isinstance(self._need, int) and len(self._in) >= self._need:
            part = bytes(self._in[: self._need])
            del self._in[: self._need]
            self._advance(part)
        if self._need == "tls" and self._in:
            # Injected by somebody in between, who hopes that it will count as encrypted.
            raise NbdProtocolError("the server sent data before TLS had started")
        if self.export is None:
            return b""
        rest = bytes(self._in)
        self._in.clear()
        return rest

    def tls_started(self) -> None:
        """The connection is encrypted now."""
        self._advance(b"")

    def _advance(self, data: bytes) -> None:
        try:
            self._need = self._steps.send(data)
        except StopIteration as end:
            self.export = end.value

    # ---- the conversation ----

    def _run(self) -> Step:
        greeting = yield wire.GREETING.size
        magic, second, flags = wire.GREETING.unpack(greeting)
        if magic != wire.MAGIC:
            raise NbdProtocolError("this is not an NBD server")
        if second != wire.OPTION_MAGIC:
            old = second.startswith(wire.OLDSTYLE_MAGIC) or second[1:] == wire.OLDSTYLE_MAGIC
            raise NbdProtocolError(
                "the server speaks the oldstyle handshake, which is obsolete"
                if old
                else "the server's greeting is not NBD's",
                hint="nbdkit: without -o" if old else None,
            )
        mine = flags & (wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)
        self._out += wire.CLIENT_FLAGS.pack(mine)
        if not mine & wire.FLAG_FIXED_NEWSTYLE:
            if self._tls:
                raise NbdProtocolError("the server is too old for TLS")
            return (yield from self._export_name(mine))
        if self._tls:
            kind, _ = yield from self._ask(wire.OPT_STARTTLS)
            if kind != wire.REP_ACK:
                raise UnsupportedError("the server offers no TLS", hint="nbd:// is without TLS")
            yield "tls"
        kind, _ = yield from self._ask(wire.OPT_STRUCTURED_REPLY)
        structured = kind == wire.REP_ACK
        allocation = None
        if structured:
            allocation = yield from self._meta_context()
        return (yield from self._go(mine, structured, allocation))

    def _reply(self, option: int) -> Generator[int, bytes, tuple[int, bytes]]:
        """The next reply to ``option``."""
        head = yield wire.OPTION_REPLY.size
        magic, number, kind, length = wire.OPTION_REPLY.unpack(head)
        self._replies += 1
        if magic != wire.REPLY_MAGIC or number != option:
            raise NbdProtocolError("the server answered an option that nobody asked for")
        if length > REPLY_MAX or self._replies > REPLIES_MAX:
            raise NbdProtocolError("the server answers options without end")
        payload = b""
        if length:
            payload = yield length
        self._refused(kind, payload)
        return kind, payload

    def _refused(self, kind: int, payload: bytes) -> None:
        """Raise what the errors mean that no other option would mend."""
        said = payload.decode("utf-8", "replace")[:200]
        text = f": {said}" if said else ""
        if kind == wire.REP_ERR_TLS_REQD:
            raise SourcePermissionError(
                f"the server wants TLS{text}", transient=False, hint="write nbds:// in the URL"
            )
        if kind == wire.REP_ERR_UNKNOWN:
            raise FileNotFoundError(errno.ENOENT, f"no such export{text}", self._name)
        if kind == wire.REP_ERR_SHUTDOWN:
            raise SourceError(f"the server is shutting down{text}")

    def _ask(self, option: int, payload: bytes = b"") -> Generator[int, bytes, tuple[int, bytes]]:
        """Send an option that has one reply."""
        self._out += wire.option(option, payload)
        return (yield from self._reply(option))

    def _meta_context(self) -> Generator[int, bytes, int | None]:
        queries = [wire.BASE_ALLOCATION, *self._asks]
        payload = wire.string(self._name) + wire.U32.pack(len(queries))
        payload += b"".join(map(wire.string, queries))
        kind, data = yield from self._ask(wire.OPT_SET_META_CONTEXT, payload)
        found = None
        while kind == wire.REP_META_CONTEXT:
            if len(data) < 4:
                raise NbdProtocolError("the server's metadata context is too short")
            if data[4:] == wire.BASE_ALLOCATION.encode():
                found = int(wire.U32.unpack_from(data)[0])
            else:
                self._identity(data[4:].decode("utf-8", "replace"))
            kind, data = yield from self._reply(wire.OPT_SET_META_CONTEXT)
        return found if kind == wire.REP_ACK else None

    def _identity(self, name: str) -> None:
        if self._asks and name.startswith(CONNECTION + "/"):
            self.token = name.removeprefix(CONNECTION + "/")
        elif name in self._asks and name.startswith(ENDED):
            self.laid.append(name.removeprefix(ENDED))

    def _go(
        self, mine: int, structured: bool, allocation: int | None
    ) -> Generator[int, bytes, Export]:
        payload = wire.string(self._name) + wire.U16.pack(1) + wire.U16.pack(wire.INFO_BLOCK_SIZE)
        kind, data = yield from self._ask(wire.OPT_GO, payload)
        if kind in (wire.REP_ERR_UNSUP, wire.REP_ERR_PLATFORM):
            return (yield from self._export_name(mine, structured, allocation))
        size = flags = None
        blocks = (1, 4096, wire.PAYLOAD_MAX)
        while kind == wire.REP_INFO:
            if len(data) < 2:
                raise NbdProtocolError("the server's information is too short")
            what = wire.U16.unpack_from(data)[0]
            if what == wire.INFO_EXPORT:
                if len(data) != wire.EXPORT_INFO.size:
                    raise NbdProtocolError("the server's information on the export is malformed")
                _, size, flags = wire.EXPORT_INFO.unpack(data)
            elif what == wire.INFO_BLOCK_SIZE:
                if len(data) != wire.BLOCK_SIZE_INFO.size:
                    raise NbdProtocolError("the server's block sizes are malformed")
                blocks = wire.BLOCK_SIZE_INFO.unpack(data)[1:]
            kind, data = yield from self._reply(wire.OPT_GO)
        if kind == wire.REP_ERR_POLICY:
            raise SourcePermissionError(
                f"the server refused the export: {data.decode('utf-8', 'replace')[:200]}",
                transient=False,
            )
        if kind != wire.REP_ACK:
            raise NbdProtocolError(
                f"the server refused the export (error {kind & ~wire.REP_FLAG_ERROR}):"
                f" {data.decode('utf-8', 'replace')[:200]}"
            )
        if size is None or flags is None:
            raise NbdProtocolError("the server did not tell the export's size")
        return self._export(size, flags, blocks, structured, allocation)

    def _export_name(
        self, mine: int, structured: bool = False, allocation: int | None = None
    ) -> Generator[int, bytes, Export]:
        """The option that has no refusal: a server that knows no such export hangs up."""
        self._out += wire.option(wire.OPT_EXPORT_NAME, self._name.encode())
        data = yield wire.EXPORT.size
        size, flags = wire.EXPORT.unpack(data)
        if not mine & wire.FLAG_NO_ZEROES:
            yield wire.EXPORT_PADDING
        return self._export(size, flags, (1, 4096, wire.PAYLOAD_MAX), structured, allocation)

    @staticmethod
    def _export(
        size: int,
        flags: int,
        blocks: tuple[int, ...],
        structured: bool,
        allocation: int | None,
    ) -> Export:
        minimum, preferred, maximum = blocks
        power = minimum > 0 and not minimum & (minimum - 1)
        if not power or minimum > 65536 or maximum < minimum or size >= 1 << 63:
            raise NbdProtocolError("the server sent impossible sizes")
        largest = min(maximum, wire.PAYLOAD_MAX)
        largest -= largest % minimum
        return Export(size, flags, minimum, preferred, largest, structured, allocation)


class Carrier(Protocol):
    """What requests are sent on."""

    #: Bytes of reads and writes that were asked for and not answered, and a little for each.
    outstanding: int


class Request:
    """One request under way. ``done(error)`` is called once, with None if all went well; never
    if it was cancelled.

    ``target`` is where a read's bytes go; after `cancel` nothing is written there any more.
    ``extents`` are what BLOCK_STATUS found: length and flags, in order. One that is ``pinned`` is
    not sent again when its connection is lost.
    """

    __slots__ = ("_carrier", "answered_by", "cancelled", "command", "data", "done", "error",
                 "extents", "flags", "got", "length", "lost", "offset", "pinned", "spans",
                 "target")  # fmt: skip

    def __init__(
        self,
        command: int,
        offset: int,
        length: int,
        done: Callable[[BaseException | None], None],
        *,
        target: memoryview | None = None,
        data: Any = None,
        flags: int = 0,
        pinned: bool = False,
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.done = done
        self.target = target
        self.data = data
        self.flags = flags
        self.cancelled = False
        #: Whether the answer of another connection would be worth nothing.
        self.pinned = pinned
        #: How many connections ended while they owed it an answer.
        self.lost = 0
        #: Whose answer it got.
        self.answered_by: Any = None
        self._carrier: Carrier | None = None
        self.got = 0
        self.error: SourceError | None = None
        self.spans: list[tuple[int, int]] | None = None
        self.extents: list[tuple[int, int]] | None = None

    def reset(self) -> None:
        """As before anything was answered: to be sent again on another connection."""
        self._put_down()
        self.got = 0
        self.error = self.spans = self.extents = None

    def cancel(self) -> None:
        """Nobody wants the answer any more: it is thrown away when it comes."""
        self.target = None
        self.cancelled = True

    def carried_by(self, carrier: Carrier) -> None:
        """Count for ``carrier`` until it is answered."""
        self._carrier = carrier
        carrier.outstanding += self._weight

    @property
    def _weight(self) -> int:
        # The length of other commands is not what is sent.
        payload = self.command in (wire.CMD_READ, wire.CMD_WRITE)
        return (self.length if payload else 0) + 4096

    def _put_down(self) -> None:
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.outstanding -= self._weight

    def finish(self, error: BaseException | None) -> None:
        """It has been answered, or never will be."""
        self.answered_by = self._carrier
        self._put_down()
        if not self.cancelled:
            self.done(error)

    def pack(self, cookie: int) -> bytes:
        """The header to send."""
        return wire.REQUEST.pack(
            wire.REQUEST_MAGIC, self.flags, self.command, cookie, self.offset, self.length
        )


class Replies:
    """The server's side of transmission, parsed.

    Receive into `get_buffer()` and say how much came by `received`; or `feed` it bytes. Calls
    `Request.finish` for what is complete. Raises NbdProtocolError; nothing works after that.
    """

    def __init__(self, export: Export) -> None:
        self._export = export
        self.requests: dict[int, Request] = {}
        self._head = memoryview(bytearray(HEAD))
        self._start = self._end = 0
        # A payload under way: bytes to come, whose they are, and where in its target they go.
        self._left = 0
        self._request: Request | None = None
        self._at = 0
        self._finish = False

    def get_buffer(self) -> memoryview:
        """Where the next bytes go."""
        if self._left >= DIRECT and self._start == self._end:
            request = self._request
            if request is not None and request.target is not None:
                return request.target[self._at : self._at + self._left]
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._head) > HEAD:
                self._head = memoryview(bytearray(HEAD))
        elif self._end == len(self._head):
            rest = self._end - self._start
            self._head[:rest] = bytes(self._head[self._start : self._end])
            self._start, self._end = 0, rest
        return self._head[self._end :]

    def received(self, count: int) -> None:
        """``count`` bytes came into what `get_buffer` gave."""
        if self._left >= DIRECT and self._start == self._end:
            request = self._request
            if request is not None and request.target is not None:
                self._at += count
                self._left -= count
                if not self._left:
                    self._payload_ends()
                return
        self._end += count
        self._parse()

    def feed(self, data: bytes) -> None:
        """For bytes that came otherwise."""
        view = memoryview(data)
        while view:
            buffer = self.get_buffer()
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            self.received(count)
            view = view[count:]

    @property
    def busy(self) -> bool:
        """Whether the server owes anything."""
        return bool(self.requests) or self._left > 0

    def take_unfinished(self) -> Request | None:
        """The request whose last bytes were on the way when the connection ended."""
        request, self._request = self._request, None
        return request if self._finish else None

    def _parse(self) -> None:
        while True:
            if self._left:
                count = min(self._left, self._end - self._start)
                if count:
                    self._payload(count)
                if self._left:
                    return
                self._payload_ends()
                continue
            have = self._end - self._start
            if have < 4:
                return
            if have >= 28 and self._whole(have):
                continue
            magic = wire.U32.unpack_from(self._head, self._start)[0]
            if magic == wire.SIMPLE_MAGIC:
                if have < 16:
                    return
                self._simple()
            elif magic == wire.STRUCTURED_MAGIC and self._export.structured:
                if have < 20 or not self._chunk(have):
                    return
            else:
                raise NbdProtocolError("the server sent something that is no reply")

    def _whole(self, have: int) -> bool:
        """Take what nearly every small read is answered by: one chunk, with all of its bytes, that
        is here already. Whatever is not exactly that is left to `_chunk`."""
        start = self._start
        magic, flags, kind, cookie, length, offset = wire.DATA_CHUNK.unpack_from(self._head, start)
        if (
            kind != wire.CHUNK_OFFSET_DATA
            or magic != wire.STRUCTURED_MAGIC
            or not flags & wire.CHUNK_FLAG_DONE
            or have < 20 + length
            or not self._export.structured
        ):
            return False
        request = self.requests.get(cookie)
        if (
            request is None
            or request.command != wire.CMD_READ
            or request.offset != offset
            or request.length != length - 8
            or request.got
            or request.error is not None
            or request.spans is not None
        ):
            return False
        del self.requests[cookie]
        self._start = start + 20 + length
        if request.target is not None:
            request.target[:] = self._head[start + 28 : start + 20 + length]
        request.got = request.length
        request.finish(None)
        return True

    def _payload(self, count: int) -> None:
        request = self._request
        if request is not None and request.target is not None:
            request.target[self._at : self._at + count] = self._head[
                self._start : self._start + count
            ]
        self._at += count
        self._left -= count
        self._start += count

    def _payload_ends(self) -> None:
        request, self._request = self._request, None
        if request is not None and self._finish:
            self._complete(request)

    def _known(self, cookie: int) -> Request:
        request = self.requests.get(cookie)
        if request is None:
            raise NbdProtocolError("the server answered a request that nobody made")
        return request

    def _simple(self) -> None:
        _, error, cookie = wire.SIMPLE_REPLY.unpack_from(self._head, self._start)
        self._start += 16
        request = self._known(cookie)
        if request.command == wire.CMD_BLOCK_STATUS and not error:
            raise NbdProtocolError("the server answered a question for extents without any")
        if self._export.structured and request.command == wire.CMD_READ and not error:
            raise NbdProtocolError("the server sent a simple reply to a read")
        if request.got:
            raise NbdProtocolError("the server mixed two kinds of reply")
        del self.requests[cookie]
        if error:
            request.finish(_error(error, b"", request))
        elif request.command == wire.CMD_READ and request.length:
            request.got = request.length
            self._expect(request, 0, request.length, True)
        else:
            request.finish(None)

    def _expect(self, request: Request, at: int, length: int, finish: bool) -> None:
        self._request, self._at, self._left, self._finish = request, at, length, finish

    def _chunk(self, have: int) -> bool:
        """Take a chunk's header, and its payload but for data. False if it is not all here."""
        _, flags, kind, cookie, length = wire.CHUNK.unpack_from(self._head, self._start)
        request = self._known(cookie)
        last = bool(flags & wire.CHUNK_FLAG_DONE)
        if kind == wire.CHUNK_OFFSET_DATA:
            if have < 28:
                return False
            offset = wire.OFFSET.unpack_from(self._head, self._start + 20)[0]
            count = length - 8
            at = self._span(request, offset, count)
            self._start += 28
            if last:
                del self.requests[cookie]
            self._expect(request, at, count, last)
            return True
        if length > STATUS_MAX:
            raise NbdProtocolError("the server sent a chunk that is too long")
        if have < 20 + length:
            if 20 + length > len(self._head):
                self._grow(20 + length)
            return False
        payload = bytes(self._head[self._start + 20 : self._start + 20 + length])
        self._start += 20 + length
        self._small_chunk(request, kind, payload, last)
        if last:
            del self.requests[cookie]
            self._complete(request)
        return True

    def _grow(self, size: int) -> None:
        """A larger buffer, until it is empty, for a long chunk of extents."""
        rest = self._end - self._start
        head = memoryview(bytearray(size + HEAD))
        head[:rest] = self._head[self._start : self._end]
        self._head, self._start, self._end = head, 0, rest

    def _span(self, request: Request, offset: int, count: int) -> int:
        """Check a range of a read that the server answers; its place in the target."""
        at = int(offset) - request.offset
        if request.command != wire.CMD_READ or count <= 0 or at < 0 or at + count > request.length:
            raise NbdProtocolError("the server sent bytes that nobody asked for")
        if request.spans is not None:
            request.spans.append((at, count))
        elif at == request.got:
            request.got += count
            return at
        else:
            # Out of order: from now on all are noted, and compared at the end.
            request.spans = [(at, count)]
            if request.got:
                request.spans.append((0, request.got))
        request.got += count
        if request.got > request.length:
            raise NbdProtocolError("the server sent bytes twice")
        return at

    def _small_chunk(self, request: Request, kind: int, payload: bytes, last: bool) -> None:
        if kind == wire.CHUNK_NONE:
            if payload or not last:
                raise NbdProtocolError("the server sent an empty chunk with something in it")
        elif kind == wire.CHUNK_OFFSET_HOLE:
            if len(payload) != wire.HOLE.size:
                raise NbdProtocolError("the server sent a hole of the wrong size")
            offset, count = wire.HOLE.unpack(payload)
            at = self._span(request, offset, count)
            if request.target is not None:
                request.target[at : at + count] = bytes(count)
        elif kind == wire.CHUNK_BLOCK_STATUS:
            self._extents(request, payload)
        elif kind & wire.CHUNK_FLAG_ERROR:
            if len(payload) < wire.ERROR.size:
                raise NbdProtocolError("the server sent an error that is too short")
            number, length = wire.ERROR.unpack_from(payload)
            text = payload[wire.ERROR.size :][:length]
            if not number:
                raise NbdProtocolError("the server sent an error without a number")
            request.error = request.error or _error(number, text, request)
        else:
            raise NbdProtocolError(f"the server sent a chunk of an unknown kind ({kind})")

    def _extents(self, request: Request, payload: bytes) -> None:
        body = payload[4:]
        if request.command != wire.CMD_BLOCK_STATUS or len(payload) < 12 or len(body) % 8:
            raise NbdProtocolError("the server sent extents that are malformed")
        if wire.U32.unpack_from(payload)[0] != self._export.allocation:
            raise NbdProtocolError("the server sent extents of an unknown context")
        extents = list(wire.EXTENT.iter_unpack(body))
        if request.extents is not None or any(not length for length, _ in extents):
            raise NbdProtocolError("the server sent extents twice, or empty ones")
        request.extents = extents

    def _complete(self, request: Request) -> None:
        """The last of the answer was here."""
        lie = None
        if request.error is not None:
            pass
        elif request.command == wire.CMD_READ:
            if request.got != request.length or (request.spans and not _tiles(request.spans)):
                lie = "the server left out bytes of a read, or sent some twice"
        elif request.command == wire.CMD_BLOCK_STATUS and not request.extents:
            lie = "the server answered a question for extents without any"
        if lie is not None:
            # It is in nobody's hands but ours by now: `take_unfinished` gives it back.
            self._request, self._finish = request, True
            raise NbdProtocolError(lie)
        request.finish(request.error)


def _tiles(spans: list[tuple[int, int]]) -> bool:
    """Whether ranges follow each other without gaps or overlaps."""
    at = 0
    for start, count in sorted(spans):
        if start != at:
            return False
        at += count
    return True


#: Errors that may pass: those of a server that is short of something, or in the middle of it.
_TRANSIENT = {wire.EIO, wire.ENOMEM, wire.ESHUTDOWN}


def _error(number: int, text: bytes, request: Request) -> SourceError:
    said = text.decode("utf-8", "replace")[:200]
    name = errno.errorcode.get(number, number)
    if number not in errno.errorcode:
        # What the protocol does not know means this; and it may be any 32 bits.
        number = wire.EINVAL
    message = (
        f"the NBD server answered {name}"
        f" ({said or os.strerror(number)}) for {request.length} bytes at {request.offset}"
    )
    if number == wire.EPERM:
        return SourcePermissionError(message, transient=False, errno=number)
    return SourceError(message, transient=number in _TRANSIENT, errno=number)
