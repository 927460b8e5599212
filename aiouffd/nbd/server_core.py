"""A server's side of NBD without I/O: bytes in, requests out, replies packed.

`Negotiation` is fed what the client sends until it has chosen an export. `Requests` then takes
over: like `client_core.Replies` it says where the next bytes shall go, so that the data of a
large write is received where it stays. Everything that a client can make large has a limit.
"""

from __future__ import annotations

import errno
import mmap
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from ..errors import UsageError
from . import wire
from .fence import CONNECTION, ENDED
from .wire import NbdProtocolError

__all__ = ["Negotiation", "Offer", "Request", "Requests", "wire_error"]

#: Longest option, and how many of them, before the client counts as hostile.
OPTION_MAX, OPTIONS_MAX = 64 * 1024, 1000
#: Bytes of answers to options from which on they have to be taken before there are more.
ANSWERS_MAX = 64 * 1024
#: Bytes of the buffer for headers and the data of small writes.
HEAD = 64 * 1024
#: Data of a write that is still to come, in bytes, from which on it is received where it stays.
DIRECT = 4096
#: Longer writes get memory that is there only when it is written to: their headers alone cost
#: nothing. It is slower than memory that was there before.
LAZY = 4 << 20
#: Our id of the context base:allocation.
ALLOCATION_ID = 1
#: That of contexts without extents.
FENCE_ID = 2
#: Extents of one answer. What lies behind them the client asks for again.
EXTENTS_MAX = 4096

_KNOWN_CLIENT_FLAGS = wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES


@dataclass(frozen=True, slots=True)
class Offer:
    """An export as clients see it. Sizes in bytes."""

    size: int
    flags: int
    minimum: int = 1
    preferred: int = 65536
    maximum: int = wire.PAYLOAD_MAX
    description: str = ""


Step = Generator[int | Literal["tls"], bytes, None]


class Negotiation:
    """Newstyle negotiation, for one client.

    `feed` what the client sends; send what `take` gives. While `pending`, options wait for that
    to be sent: then `feed` nothing, and go on. When `wants_tls` turns true: send what there is,
    upgrade the connection, and call `tls_started`. It ends with `chosen` set, or with `aborted`
    (send what `take` gives, then close). Raises NbdProtocolError.

    ``name`` gives this connection a token, and ``ended`` ends that of another one: see
    `aiouffd.nbd.fence`.
    """

    def __init__(
        self,
        offers: Mapping[str, Offer],
        *,
        tls: bool = False,
        tls_required: bool = False,
        name: Callable[[], str] | None = None,
        ended: Callable[[str], bool] | None = None,
    ) -> None:
        self._offers = offers
        self._name = name
        self._ended_before = ended
        self._tls = tls
        self._tls_required = tls_required
        self._encrypted = False
        self._in = bytearray()
        self._out = bytearray()
        #: Name of the export that the client took.
        self.chosen: str | None = None
        self.aborted = False
        self.structured = False
        self.allocation = False
        self._allocation_of: str | None = None
        self._ended = False
        self._steps = self._run()
        self._need: int | Literal["tls"] = next(self._steps)

    @property
    def wants_tls(self) -> bool:
        """Whether the connection is to be upgraded now."""
        return self._need == "tls" and not self._ended

    @property
    def pending(self) -> bool:
        """Whether there is an option that was not looked at yet."""
        return not self._ended and isinstance(self._need, int) and len(self._in) >= self._need

    def take(self) -> bytes:
        """What is to be sent."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def feed(self, data: bytes) -> bytes:
        """Bytes from the client; returns those that come after the negotiation."""
        self._in += data
        # A few bytes may ask for the list of thousands of exports, again and again.
        while self.pending and len(self._out) < ANSWERS_MAX:
            assert isinstance(self._need, int)
            part = bytes(self._in[: self._need])
            del self._in[: self._need]
            self._advance(part)
        if self.wants_tls and self._in:
            # Injected by somebody in between, who hopes that it will count as encrypted.
            raise NbdProtocolError("the client sent data before TLS had started")
        if not self._ended:
            return b""
        rest = bytes(self._in)
        self._in.clear()
        return rest

    def tls_started(self) -> None:
        """The connection is encrypted now."""
        self._encrypted = True
        # Nothing of what was said in the clear counts.
        self.structured = self.allocation = False
        self._advance(b"")

    def _advance(self, data: bytes) -> None:
        try:
            self._need = self._steps.send(data)
        except StopIteration:
            self._ended = True

    # ---- the conversation ----

    def _run(self) -> Step:
        self._out += wire.GREETING.pack(
            wire.MAGIC, wire.OPTION_MAGIC, wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES
        )
        flags = wire.CLIENT_FLAGS.unpack((yield wire.CLIENT_FLAGS.size))[0]
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise NbdProtocolError("unknown client handshake flags")
        pad = not flags & wire.FLAG_NO_ZEROES
        for _ in range(OPTIONS_MAX):
            magic, option, length = wire.OPTION.unpack((yield wire.OPTION.size))
            if magic != wire.OPTION_MAGIC:
                raise NbdProtocolError("the client sent something that is no option")
            if length > OPTION_MAX:
                raise NbdProtocolError("the client sent an option that is too long")
            payload = b""
            if length:
                payload = yield length
            if option == wire.OPT_STARTTLS:
                if self._starts_tls(payload):
                    yield "tls"
            elif self._option(option, payload, pad):
                return
        raise NbdProtocolError("the client asks for options without end")

    def _reply(self, option: int, kind: int, payload: bytes = b"") -> None:
        self._out += wire.option_reply(option, kind, payload)

    def _starts_tls(self, payload: bytes) -> bool:
        option = wire.OPT_STARTTLS
        if payload or self._encrypted:
            self._reply(option, wire.REP_ERR_INVALID)
        elif not self._tls:
            self._reply(option, wire.REP_ERR_POLICY, b"there is no TLS here")
        else:
            self._reply(option, wire.REP_ACK)
            return True
        return False

    def _option(self, option: int, payload: bytes, pad: bool) -> bool:
        """Answer an option. True if the negotiation is over."""
        if option == wire.OPT_ABORT:
            self._reply(option, wire.REP_ACK)
            self.aborted = True
        elif self._tls_required and not self._encrypted:
            if option == wire.OPT_EXPORT_NAME:
                raise NbdProtocolError("the client wants an export without TLS")
            self._reply(option, wire.REP_ERR_TLS_REQD, b"this server is for TLS only")
        elif option == wire.OPT_EXPORT_NAME:
            self._export_name(payload, pad)
        elif option == wire.OPT_LIST:
            self._list(payload)
        elif option in (wire.OPT_GO, wire.OPT_INFO):
            self._go(option, payload)
        elif option == wire.OPT_STRUCTURED_REPLY:
            self.structured = self.structured or not payload
            self._reply(option, wire.REP_ERR_INVALID if payload else wire.REP_ACK)
        elif option in (wire.OPT_SET_META_CONTEXT, wire.OPT_LIST_META_CONTEXT):
            self._meta_context(option, payload)
        else:
            self._reply(option, wire.REP_ERR_UNSUP)
        return self.aborted or self.chosen is not None

    def _find(self, name: str) -> str | None:
        """The export's own name: the only export there is also answers to the empty one."""
        if name in self._offers:
            return name
        if not name and len(self._offers) == 1:
            return next(iter(self._offers))
        return None

    def _flags(self, offer: Offer) -> int:
        """Transmission flags, without what the client has not asked for."""
        return offer.flags if self.structured else offer.flags & ~wire.FLAG_SEND_DF

    def _choose(self, name: str) -> None:
        self.chosen = name
        self.allocation = self.allocation and self._allocation_of == name

    def _export_name(self, payload: bytes, pad: bool) -> None:
        name = self._find(_text(payload))
        if name is None:
            raise NbdProtocolError("the client wants an export that does not exist")
        offer = self._offers[name]
        self._out += wire.EXPORT.pack(offer.size, self._flags(offer))
        if pad:
            self._out += bytes(wire.EXPORT_PADDING)
        self._choose(name)

    def _list(self, payload: bytes) -> None:
        if payload:
            self._reply(wire.OPT_LIST, wire.REP_ERR_INVALID)
            return
        for name, offer in self._offers.items():
            described = wire.string(name) + offer.description.encode()
            self._reply(wire.OPT_LIST, wire.REP_SERVER, described)
        self._reply(wire.OPT_LIST, wire.REP_ACK)

    def _go(self, option: int, payload: bytes) -> None:
        taken = _take_string(payload)
        if taken is None or len(taken[1]) < 2:
            self._reply(option, wire.REP_ERR_INVALID)
            return
        wanted, rest = taken
        count = wire.U16.unpack_from(rest)[0]
        if len(rest) != 2 + 2 * count:
            self._reply(option, wire.REP_ERR_INVALID)
            return
        asked = {wire.U16.unpack_from(rest, 2 + 2 * at)[0] for at in range(count)}
        name = self._find(wanted)
        if name is None:
            self._reply(option, wire.REP_ERR_UNKNOWN, b"there is no such export")
            return
        offer = self._offers[name]
        info = wire.EXPORT_INFO.pack(wire.INFO_EXPORT, offer.size, self._flags(offer))
        self._reply(option, wire.REP_INFO, info)
        if wire.INFO_NAME in asked:
            text = wire.U16.pack(wire.INFO_NAME) + name.encode()
            self._reply(option, wire.REP_INFO, text)
        if wire.INFO_DESCRIPTION in asked and offer.description:
            text = wire.U16.pack(wire.INFO_DESCRIPTION) + offer.description.encode()
            self._reply(option, wire.REP_INFO, text)
        sizes = wire.BLOCK_SIZE_INFO.pack(
            wire.INFO_BLOCK_SIZE, offer.minimum, offer.preferred, offer.maximum
        )
        self._reply(option, wire.REP_INFO, sizes)
        self._reply(option, wire.REP_ACK)
        if option == wire.OPT_GO:
            self._choose(name)

    def _meta_context(self, option: int, payload: bytes) -> None:
        taken = _take_string(payload)
        queries = None if taken is None else _take_strings(taken[1])
        listing = option == wire.OPT_LIST_META_CONTEXT
        if not listing:
            # It replaces what was selected before, also when it fails.
            self.allocation = False
        if taken is None or queries is None or not self.structured:
            self._reply(option, wire.REP_ERR_INVALID)
            return
        name = self._find(taken[0])
        if name is None:
            self._reply(option, wire.REP_ERR_UNKNOWN, b"there is no such export")
            return
        wanted = {wire.BASE_ALLOCATION} | ({"base:"} if listing else set())
        found = bool(wanted.intersection(queries)) or (listing and not queries)
        if not listing:
            self.allocation, self._allocation_of = found, name
        if found:
            number = 0 if listing else ALLOCATION_ID
            context = wire.U32.pack(number) + wire.BASE_ALLOCATION.encode()
            self._reply(option, wire.REP_META_CONTEXT, context)
        if not listing and not self._offers[name].flags & wire.FLAG_READ_ONLY:
            self._fence(option, queries)
        self._reply(option, wire.REP_ACK)

    def _fence(self, option: int, queries: Sequence[str]) -> None:
        """What a client that writes asks about its connections, this one and lost ones."""
        for query in queries:
            said = None
            if query == CONNECTION and self._name is not None:
                said = f"{CONNECTION}/{self._name()}"
            elif query.startswith(ENDED) and self._ended_before is not None:
                said = query if self._ended_before(query.removeprefix(ENDED)) else None
            if said is not None:
                # Their numbers are in no answer.
                context = wire.U32.pack(FENCE_ID) + said.encode()
                self._reply(option, wire.REP_META_CONTEXT, context)


def _text(data: bytes) -> str:
    """A name, of which what is no UTF-8 finds no export."""
    return data.decode("utf-8", "surrogateescape")


def _take_string(data: bytes) -> tuple[str, bytes] | None:
    """A string and what follows it."""
    if len(data) < 4:
        return None
    length = wire.U32.unpack_from(data)[0]
    if length > wire.STRING_MAX or len(data) < 4 + length:
        return None
    return _text(data[4 : 4 + length]), data[4 + length :]


def _take_strings(data: bytes) -> list[str] | None:
    """A counted list of strings that is all there is."""
    if len(data) < 4:
        return None
    count = wire.U32.unpack_from(data)[0]
    rest, found = data[4:], []
    for _ in range(min(count, OPTION_MAX)):
        taken = _take_string(rest)
        if taken is None:
            return None
        text, rest = taken
        found.append(text)
    return None if rest or len(found) != count else found


# ---- transmission ----


class Request:
    """What a client asks for. ``data`` is what it wants written; ``error`` the number that it gets
    without being tried, or 0; ``cost`` is for whoever counts what it takes."""

    __slots__ = ("command", "cookie", "cost", "data", "error", "flags", "length", "offset")

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.data: bytearray | memoryview | None = None
        self.error = 0
        self.cost = 0


class Requests:
    """The client's side of transmission, parsed.

    Receive into `get_buffer()` and say how much came by `received`; or `feed` it bytes. Complete
    requests collect in `ready`, at most as many as one buffer holds. Data of a write that is not
    in order is thrown away. When a write is `waiting`, it is longer than the buffer: receive
    nothing more until there is room for its data, and `admit` it. `disconnected` is set when
    the client said goodbye. Raises NbdProtocolError; nothing works after that.
    """

    def __init__(
        self,
        offer: Offer,
        *,
        structured: bool = False,
        allocation: bool = False,
        largest_write: int = wire.PAYLOAD_MAX,
    ) -> None:
        self._offer = offer
        self._structured = structured
        self._allocation = allocation
        self._largest = largest_write
        self.ready: deque[Request] = deque()
        self.waiting: Request | None = None
        self.disconnected = False
        #: How many bytes came, and requests with all that belongs to them.
        self.bytes = self.count = 0
        self._head = memoryview(bytearray(HEAD))
        self._start = self._end = 0
        # Data under way: whose it is, bytes to come, and where they go (nowhere: empty).
        self._request: Request | None = None
        self._left = 0
        self._target = memoryview(b"")

    @property
    def receiving(self) -> Request | None:
        """The write whose data is under way."""
        return self._request

    @property
    def incomplete(self) -> bool:
        """Whether it is the client's turn to send the rest of something."""
        return self.waiting is None and (self._request is not None or self._start != self._end)

    def get_buffer(self) -> memoryview:
        """Where the next bytes go."""
        if len(self._target) >= DIRECT and self._start == self._end:
            return self._target
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == HEAD:
            rest = self._end - self._start
            self._head[:rest] = bytes(self._head[self._start : self._end])
            self._start, self._end = 0, rest
        return self._head[self._end :]

    def received(self, count: int) -> None:
        """``count`` bytes came into what `get_buffer` gave."""
        self.bytes += count
        if len(self._target) >= DIRECT and self._start == self._end:
            self._target = self._target[count:]
            self._left -= count
            if not self._left:
                self._completed()
            return
        self._end += count
        self._parse()

    def feed(self, data: bytes) -> None:
        """For bytes that came otherwise; fewer than a buffer if any may be `waiting`."""
        view = memoryview(data)
        while view and not self.disconnected:
            buffer = self.get_buffer()
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            self.received(count)
            view = view[count:]

    def admit(self) -> None:
        """Receive the data of the write that is `waiting`."""
        request = self.waiting
        assert request is not None
        self.waiting = None
        self._expect(request, store=True)
        self._parse()

    def _parse(self) -> None:
        while self.waiting is None:
            if self.disconnected:
                # There should be nothing, and nobody looks at it.
                self._start = self._end = 0
                return
            have = self._end - self._start
            if self._request is not None:
                count = min(self._left, have)
                if self._target:
                    self._target[:count] = self._head[self._start : self._start + count]
                    self._target = self._target[count:]
                self._start += count
                self._left -= count
                if self._left:
                    return
                self._completed()
                continue
            if have < wire.REQUEST.size:
                return
            magic, *fields = wire.REQUEST.unpack_from(self._head, self._start)
            self._start += wire.REQUEST.size
            if magic != wire.REQUEST_MAGIC:
                raise NbdProtocolError("the client sent something that is no request")
            flags, command, cookie, offset, length = fields
            self._asked(Request(command, flags, cookie, offset, length))

    def _asked(self, request: Request) -> None:
        """The header of a request has come."""
        if request.command == wire.CMD_DISC:
            self.disconnected = True
            return
        request.error = refusal(
            request, self._offer, structured=self._structured, allocation=self._allocation
        )
        if request.command != wire.CMD_WRITE:
            self._request = request
            self._completed()
        elif request.length > self._largest:
            raise NbdProtocolError("the client writes more at a time than is allowed")
        elif request.error:
            self._expect(request, store=False)
        elif request.length > HEAD:
            self.waiting = request
        else:
            self._expect(request, store=True)

    def _expect(self, request: Request, *, store: bool) -> None:
        self._request, self._left = request, request.length
        if store:
            request.data = _space(request.length)
            self._target = memoryview(request.data)

    def _completed(self) -> None:
        assert self._request is not None
        self.count += 1
        self.ready.append(self._request)
        self._request, self._target = None, memoryview(b"")


def _space(length: int) -> bytearray | memoryview:
    """Memory for the data of a write."""
    if length <= LAZY:
        return bytearray(length)
    return memoryview(mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


_WRITING = (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES)
_CHANGING = (*_WRITING, wire.CMD_TRIM)
_FLAGS_OF = {
    wire.CMD_READ: wire.CMD_FLAG_DF,
    wire.CMD_WRITE: wire.CMD_FLAG_FUA,
    wire.CMD_FLUSH: 0,
    wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE,
    wire.CMD_TRIM: wire.CMD_FLAG_FUA,
    wire.CMD_BLOCK_STATUS: wire.CMD_FLAG_REQ_ONE,
}


def refusal(request: Request, offer: Offer, *, structured: bool, allocation: bool) -> int:
    """The error that a request gets without being tried; 0 if it is in order."""
    command, length = request.command, request.length
    if command in _CHANGING and offer.flags & wire.FLAG_READ_ONLY:
        return wire.EPERM
    allowed = _FLAGS_OF.get(command)
    if allowed is None or (command == wire.CMD_TRIM and not offer.flags & wire.FLAG_SEND_TRIM):
        return wire.EINVAL
    if offer.flags & wire.FLAG_SEND_FUA:
        # With every command, though it means nothing for most.
        allowed |= wire.CMD_FLAG_FUA
    if request.flags & ~allowed:
        return wire.EINVAL
    if command == wire.CMD_FLUSH:
        return 0
    if command == wire.CMD_BLOCK_STATUS and not allocation:
        return wire.EINVAL
    if command == wire.CMD_READ:
        if request.flags & wire.CMD_FLAG_DF and not structured:
            return wire.EINVAL
        if length > offer.maximum:
            return wire.EINVAL
    if not length or request.offset + length > offer.size:
        return wire.ENOSPC if command in _WRITING and length else wire.EINVAL
    return 0


def error_reply(request: Request, number: int, text: str, *, structured: bool) -> bytes:
    """A reply that says that it went wrong; 0 that it went well, with nothing to tell."""
    if not structured or request.command not in (wire.CMD_READ, wire.CMD_BLOCK_STATUS):
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, number, request.cookie)
    said = text.encode()[:500]
    payload = wire.ERROR.pack(number, len(said)) + said
    return _chunk(request, wire.CHUNK_ERROR, len(payload), last=True) + payload


def data_head(
    request: Request, offset: int, length: int, *, structured: bool, last: bool = True
) -> bytes:
    """What stands before the bytes of a read, or of a part of it."""
    if not structured:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, request.cookie)
    head = _chunk(request, wire.CHUNK_OFFSET_DATA, 8 + length, last=last)
    return head + wire.OFFSET.pack(offset)


def hole_chunk(request: Request, offset: int, length: int, *, last: bool) -> bytes:
    """A part of a read that is zeros, which are not sent."""
    head = _chunk(request, wire.CHUNK_OFFSET_HOLE, wire.HOLE.size, last=last)
    return head + wire.HOLE.pack(offset, length)


def status_reply(request: Request, holes: Sequence[tuple[int, int]]) -> bytes:
    """The extents of a range, of which ``holes`` (offset and length, in order) are zeros."""
    most = 1 if request.flags & wire.CMD_FLAG_REQ_ONE else EXTENTS_MAX
    packed = wire.U32.pack(ALLOCATION_ID)
    for _, length, zeros in islice(parts(request.offset, request.length, holes), most):
        packed += wire.EXTENT.pack(length, wire.STATE_HOLE | wire.STATE_ZERO if zeros else 0)
    return _chunk(request, wire.CHUNK_BLOCK_STATUS, len(packed), last=True) + packed


def parts(
    offset: int, length: int, holes: Sequence[tuple[int, int]]
) -> Generator[tuple[int, int, bool], None, None]:
    """Offset and length of what follows each other in a range, and whether it is zeros."""
    end = offset + length
    for start, count in holes:
        start, stop = max(start, offset), min(start + count, end)
        if start >= stop:
            continue
        if start > offset:
            yield offset, start - offset, False
        yield start, stop - start, True
        offset = stop
    if offset < end:
        yield offset, end - offset, False


def _chunk(request: Request, kind: int, length: int, *, last: bool) -> bytes:
    flags = wire.CHUNK_FLAG_DONE if last else 0
    return wire.CHUNK.pack(wire.STRUCTURED_MAGIC, flags, kind, request.cookie, length)


# Not ESHUTDOWN, at which a client has to leave: where the source's bytes come from may go away
# while we stay.
_SAME = {number: number for number in (wire.EPERM, wire.EIO, wire.ENOMEM, wire.EINVAL, wire.ENOSPC)}
_OTHERS = {errno.EDQUOT: wire.ENOSPC, errno.EFBIG: wire.ENOSPC, errno.EROFS: wire.EPERM}


def wire_error(error: BaseException) -> int:
    """The protocol's number for an exception."""
    if isinstance(error, PermissionError):
        return wire.EPERM
    if isinstance(error, UsageError):
        return wire.EINVAL
    number: Any = getattr(error, "errno", None)
    return _SAME.get(number) or _OTHERS.get(number) or wire.EIO
