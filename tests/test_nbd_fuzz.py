"""Both sides of NBD against streams that go wrong, each compared with a plain second opinion.

What is fed is built from messages that are right, which are then changed: as messages (one is
lost, comes twice, has another offset) or as bytes. It is fed in pieces of any size. What must
come of it is worked out by functions that see the whole stream at once and know no buffers; they
are written from the protocol's description, not from the code.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from aiouffd.errors import AiouffdError
from aiouffd.nbd import NbdServer, wire
from aiouffd.nbd.client_core import Export, Handshake, Replies, Request
from aiouffd.nbd.server_core import Negotiation, Offer, Requests
from aiouffd.nbd.wire import NbdProtocolError
from aiouffd.sources.memory import MemorySource
from tests.nbd_peers import GREETING_REST, Peer, request, until
from tests.support import content

CLEAN = (AiouffdError, FileNotFoundError)
#: Of each test; a server that is started for each gets a fifth.
EXAMPLES = int(os.environ.get("AIOUFFD_EXAMPLES", "150"))
# Without shrinking, which takes longer than a test may.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
fuzz = settings(max_examples=EXAMPLES, deadline=None, phases=PHASES)
slow_fuzz = settings(fuzz, max_examples=max(1, EXAMPLES // 5))


class Stream(bytes):
    """Bytes that do not fill the screen when a test fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


def damaged(draw: Callable[[Any], Any], stream: bytes) -> bytes:
    """A few bytes are others, are missing, or are too many."""
    changed = bytearray(stream)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        if not changed:
            break
        at = draw(st.integers(0, len(changed) - 1))
        match draw(st.sampled_from(["flip", "ones", "zeros", "cut", "insert", "end"])):
            case "flip":
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "ones":
                changed[at : at + 4] = b"\xff" * len(changed[at : at + 4])
            case "zeros":
                changed[at : at + 4] = bytes(len(changed[at : at + 4]))
            case "cut":
                del changed[at : at + draw(st.integers(1, 30))]
            case "insert":
                changed[at:at] = draw(st.binary(min_size=1, max_size=30))
            case "end":
                del changed[at:]
    return bytes(changed)


def rearranged(draw: Callable[[Any], Any], messages: list[Any]) -> list[Any]:
    """A message is lost, comes twice, or too early."""
    messages = list(messages)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        if not messages:
            break
        at = draw(st.integers(0, len(messages) - 1))
        match draw(st.sampled_from(["lose", "twice", "early"])):
            case "lose":
                del messages[at]
            case "twice":
                messages.insert(draw(st.integers(0, len(messages))), messages[at])
            case "early":
                messages.insert(draw(st.integers(0, at)), messages.pop(at))
    return messages


#: What messages begin with.
MAGIC = re.compile(
    b"|".join(
        [
            wire.OPTION_MAGIC,
            wire.REPLY_MAGIC.to_bytes(8, "big"),
            *(
                number.to_bytes(4, "big")
                for number in (wire.REQUEST_MAGIC, wire.SIMPLE_MAGIC, wire.STRUCTURED_MAGIC)
            ),
        ]
    )
)


def pieces(draw: Callable[[Any], Any], stream: bytes) -> Iterator[bytes]:
    """The stream in pieces: of any size, of a few bytes, or around the ends of messages."""
    how = draw(st.sampled_from(["any", "small", "messages"]))
    if how == "messages":
        # At the ends, a byte before or after them, or where headers end.
        ends = [*(found.start() for found in MAGIC.finditer(stream)), len(stream)]
        by = draw(st.sampled_from([-1, 0, 1, 16, 20, 28]))
        cuts = {end + by for end in ends}
    else:
        most = 1 + (len(stream) if how == "any" else 40)
        sizes = draw(st.lists(st.integers(1, most), max_size=16))
        cuts = set(itertools.accumulate(sizes))
    at = 0
    for cut in sorted(cuts | {len(stream)}):
        if at < cut <= len(stream):
            yield stream[at:cut]
            at = cut


# --------------------------------------------------------------- what servers answer


#: Cookie: command, offset, length.
ASKED = {
    1: (wire.CMD_READ, 1000, 70_000),
    2: (wire.CMD_READ, 0, 4096),
    3: (wire.CMD_BLOCK_STATUS, 0, 1 << 20),
    4: (wire.CMD_WRITE, 500, 3),
    5: (wire.CMD_READ, 70_000, 9),
}
BYTES = content(1 << 17)
ALLOCATION = 7


@dataclass
class Verdict:
    """What must come of a stream of replies."""

    #: Cookies of what has ended, and whether it went well.
    ended: dict[int, bool] = field(default_factory=dict)
    buffers: dict[int, bytearray] = field(default_factory=dict)
    #: How often each byte of a read was sent.
    times: dict[int, list[int]] = field(default_factory=dict)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    failed: bool = False


def verdict(stream: bytes, *, structured: bool) -> Verdict:
    found = Verdict()
    for cookie, (command, _, length) in ASKED.items():
        if command == wire.CMD_READ:
            found.buffers[cookie] = bytearray(length)
            found.times[cookie] = [0] * length
    try:
        _judge(stream, found, structured)
    except AssertionError:
        found.failed = True
    return found


def _judge(stream: bytes, found: Verdict, structured: bool) -> None:
    wrong: set[int] = set()

    def put(cookie: int, offset: int, data: bytes, count: int) -> None:
        command, start, length = ASKED[cookie]
        at = offset - start
        assert command == wire.CMD_READ
        assert count > 0
        assert at >= 0
        assert at + count <= length
        times = found.times[cookie]
        assert sum(times) + count <= length
        for place in range(at, at + count):
            times[place] += 1
        found.buffers[cookie][at : at + len(data)] = data

    def end(cookie: int) -> None:
        if cookie not in wrong:
            assert set(found.times.get(cookie, [1])) == {1}
            assert ASKED[cookie][0] != wire.CMD_BLOCK_STATUS or cookie in found.extents
        found.ended[cookie] = cookie not in wrong

    while len(stream) >= 4:
        magic = int.from_bytes(stream[:4], "big")
        assert magic in ((0x67446698, 0x668E33EF) if structured else (0x67446698,))
        if magic == 0x67446698:
            if len(stream) < 16:
                return
            error, cookie = struct.unpack(">IQ", stream[4:16])
            stream = stream[16:]
            assert cookie in ASKED
            assert cookie not in found.ended
            command, start, length = ASKED[cookie]
            assert error or command != wire.CMD_BLOCK_STATUS
            assert error or command != wire.CMD_READ or not structured
            assert not any(found.times.get(cookie, []))
            if error:
                wrong.add(cookie)
            elif command == wire.CMD_READ:
                put(cookie, start, stream[:length], length)
                if len(stream) < length:
                    # No more for this one, whoever else answers it.
                    return
                stream = stream[length:]
            end(cookie)
            continue
        if len(stream) < 20:
            return
        flags, kind, cookie, length = struct.unpack(">HHQI", stream[4:20])
        assert cookie in ASKED
        assert cookie not in found.ended
        body = stream[20 : 20 + length]
        if kind == 1:
            if len(stream) < 28:
                return
            offset = int.from_bytes(stream[20:28], "big")
            put(cookie, offset, body[8:], length - 8)
        else:
            assert length <= 4 << 20
        if len(stream) < 20 + length:
            return
        stream = stream[20 + length :]
        if kind == 0:
            assert not length
            assert flags & 1
        elif kind == 2:
            assert length == 12
            offset, count = struct.unpack(">QI", body)
            put(cookie, offset, bytes(min(count, 1 << 17)), count)
        elif kind == 5:
            assert ASKED[cookie][0] == wire.CMD_BLOCK_STATUS
            assert cookie not in found.extents
            assert length >= 12
            assert length % 8 == 4
            assert int.from_bytes(body[:4], "big") == ALLOCATION
            extents = list(struct.iter_unpack(">II", body[4:]))
            assert all(count for count, _ in extents)
            found.extents[cookie] = extents
        elif kind & 1 << 15:
            assert length >= 6
            assert any(body[:4])
            wrong.add(cookie)
        else:
            assert kind == 1
        if flags & 1:
            end(cookie)


def chunk(kind: int, cookie: int, payload: bytes, flags: int = 0) -> bytes:
    return wire.CHUNK.pack(wire.STRUCTURED_MAGIC, flags, kind, cookie, len(payload)) + payload


#: What goes wrong with a stream of answers; most of what can happen, happens to one request.
TROUBLES = [
    "none", "none", "error", "error and data", "shift", "length", "all of it again",
    "all after a part", "context", "extents", "bytes", "messages",
]  # fmt: skip


@st.composite
def answers(draw: Any, structured: bool) -> bytes:
    """All that was asked for, answered in some order; mostly with something wrong."""
    trouble, victim = draw(st.sampled_from(TROUBLES)), draw(st.sampled_from([*ASKED]))
    each: list[list[bytes]] = []
    for cookie, (command, offset, length) in ASKED.items():
        mine = trouble if cookie == victim else "none"
        if mine == "error":
            each.append([_error(draw, cookie, structured)])
        elif command == wire.CMD_READ:
            each.append(_read(draw, cookie, offset, length, structured, mine))
        elif command == wire.CMD_BLOCK_STATUS and structured:
            each.append(_extents(draw, cookie, trouble))
        elif command == wire.CMD_WRITE and structured and draw(st.booleans()):
            each.append([chunk(wire.CHUNK_NONE, cookie, b"", 1)])
        elif command == wire.CMD_WRITE:
            each.append([wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, cookie)])
    messages: list[bytes] = []
    while any(each):
        one = draw(st.sampled_from([parts for parts in each if parts]))
        messages.append(one.pop(0))
    if trouble == "messages":
        messages = rearranged(draw, messages)
    stream = b"".join(messages)
    return Stream(damaged(draw, stream) if trouble == "bytes" else stream)


def _error(draw: Any, cookie: int, structured: bool) -> bytes:
    number = draw(st.sampled_from([wire.EIO, wire.EPERM, 0, 4711, (1 << 32) - 1]))
    if not structured or draw(st.booleans()):
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, number or 1, cookie)
    text = draw(st.binary(max_size=20))
    payload = wire.ERROR.pack(number, len(text)) + text
    kinds = [(wire.CHUNK_ERROR, b""), (wire.CHUNK_ERROR_OFFSET, bytes(8)), (0x8077, b"x")]
    kind, more = draw(st.sampled_from(kinds))
    return chunk(kind, cookie, payload + more, 1)


def _extents(draw: Any, cookie: int, trouble: str) -> list[bytes]:
    count = draw(st.integers(1, 4))
    extents = b"".join(wire.EXTENT.pack(1 << 17, n % 4) for n in range(count))
    payload = wire.U32.pack(ALLOCATION + (trouble == "context")) + extents
    if trouble != "extents":
        return [chunk(wire.CHUNK_BLOCK_STATUS, cookie, payload, 1)]
    wrong = [b"", payload[:4], payload[:-1], payload + bytes(8), payload + b"x"]
    first = draw(st.sampled_from([*wrong, payload]))
    return [
        chunk(wire.CHUNK_BLOCK_STATUS, cookie, first),
        chunk(wire.CHUNK_BLOCK_STATUS, cookie, payload, 1),
    ]


def _read(
    draw: Any, cookie: int, offset: int, length: int, structured: bool, trouble: str
) -> list[bytes]:
    if not structured:
        head = wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, cookie)
        return [head + BYTES[offset : offset + length]]
    cuts = draw(st.lists(st.integers(1, length - 1), max_size=4, unique=True))
    edges = [0, *sorted(cuts), length]
    places = [(offset + start, stop - start) for start, stop in itertools.pairwise(edges)]
    at = draw(st.integers(0, len(places) - 1))
    start, count = places[at]
    if trouble == "shift":
        places[at] = start + draw(st.sampled_from([1, -1, length])), count
    elif trouble == "length":
        places[at] = start, count + draw(st.sampled_from([1, -1]))
    made = []
    for start, count in places:
        if len(places) > 1 and draw(st.integers(0, 3)) == 0:
            made.append((wire.CHUNK_OFFSET_HOLE, wire.HOLE.pack(max(0, start), count)))
        else:
            data = BYTES[max(0, start) :][:count]
            made.append((wire.CHUNK_OFFSET_DATA, wire.OFFSET.pack(max(0, start)) + data))
    made = draw(st.permutations(made))
    error = (wire.CHUNK_ERROR, wire.ERROR.pack(wire.EIO, 0))
    whole = (wire.CHUNK_OFFSET_DATA, wire.OFFSET.pack(offset) + BYTES[offset:][:length])
    if trouble == "error and data":
        made = draw(st.sampled_from([[error, whole], [error, *made], [*made, error]]))
    elif trouble == "all of it again":
        made.insert(at, whole)
    elif trouble == "all after a part":
        made = [made[0], whole]
    elif draw(st.booleans()):
        made = [*made, (wire.CHUNK_NONE, b"")]
    last = len(made) - 1
    return [chunk(kind, cookie, data, int(at == last)) for at, (kind, data) in enumerate(made)]


class Asked:
    """The requests of `ASKED` under way, as the client has them."""

    def __init__(self, *, structured: bool) -> None:
        allocation = ALLOCATION if structured else None
        self.replies = Replies(Export(1 << 20, 1, structured=structured, allocation=allocation))
        self.ended: dict[int, bool] = {}
        self.buffers: dict[int, bytearray] = {}
        self.requests: dict[int, Request] = {}
        for cookie, (command, offset, length) in ASKED.items():
            target = None
            if command == wire.CMD_READ:
                self.buffers[cookie] = bytearray(b"\xee" * length)
                target = memoryview(self.buffers[cookie])
            done = self._done(cookie)
            self.requests[cookie] = Request(command, offset, length, done, target=target)
        self.replies.requests.update(self.requests)

    def _done(self, cookie: int) -> Callable[[BaseException | None], None]:
        def done(error: BaseException | None) -> None:
            assert cookie not in self.ended
            self.ended[cookie] = error is None

        return done


@pytest.mark.slow
@pytest.mark.parametrize("structured", [True, False])
@fuzz
@given(st.data())
def test_replies(structured: bool, data: st.DataObject) -> None:
    """Each request ends as the stream says, with the stream's bytes, or nothing is believed."""
    stream = data.draw(answers(structured))
    expected = verdict(stream, structured=structured)
    asked = Asked(structured=structured)
    gone = data.draw(st.sampled_from([None, None, *ASKED]))
    frozen: bytes | None = None
    failed = False
    try:
        for number, piece in enumerate(pieces(data.draw, stream)):
            if gone is not None and number == 1:
                asked.requests[gone].cancel()
                frozen = bytes(asked.buffers.get(gone, b""))
                gone_before = gone in asked.ended
            asked.replies.feed(piece)
    except NbdProtocolError:
        failed = True
    assert failed == expected.failed
    if gone is not None and frozen is not None:
        assert asked.buffers.get(gone, b"") == frozen
        if not gone_before:
            assert asked.ended.pop(gone, None) is None
            expected.ended.pop(gone, None)
    left = set(asked.replies.requests.values())
    left.add(asked.replies.take_unfinished())  # type: ignore[arg-type]
    for cookie, one in asked.requests.items():
        # Nobody is forgotten: whoever was not told is told when the connection is closed.
        assert one in left or cookie in asked.ended or one.cancelled
    assert asked.ended == expected.ended
    for cookie, well in asked.ended.items():
        if well and cookie in asked.buffers:
            assert asked.buffers[cookie] == expected.buffers[cookie]
        if well and cookie in expected.extents:
            assert asked.requests[cookie].extents == expected.extents[cookie]


def part_of(cookie: int, start: int, count: int, flags: int = 0) -> bytes:
    """Bytes of a read, of which ``start`` counts from where the read begins."""
    offset = ASKED[cookie][1] + start
    return chunk(1, cookie, wire.OFFSET.pack(offset) + BYTES[offset:][:count], flags)


FAILED = chunk(wire.CHUNK_ERROR, 5, wire.ERROR.pack(wire.EIO, 0))


@pytest.mark.parametrize("step", [1, 27, 1 << 20])
@pytest.mark.parametrize(
    ("stream", "ended", "failed"),
    [
        (part_of(5, 0, 9, 1), {5: True}, False),
        (part_of(5, 4, 5) + part_of(5, 0, 4, 1), {5: True}, False),
        (part_of(5, 1, 9, 1), {}, True),
        (part_of(5, -1, 9, 1), {}, True),
        (part_of(5, 0, 10, 1), {}, True),
        (part_of(5, 0, 8, 1), {}, True),
        (part_of(5, 0, 0), {}, True),
        # As many bytes as were asked for, but some of them twice.
        (part_of(5, 4, 5) + part_of(5, 5, 4, 1), {}, True),
        (part_of(5, 0, 5) + part_of(5, 0, 4, 1), {}, True),
        (part_of(5, 0, 5) + part_of(5, 0, 9, 1), {}, True),
        (FAILED + part_of(5, 0, 9, 1), {5: False}, False),
        (part_of(5, 0, 9) + FAILED + chunk(0, 5, b"", 1), {5: False}, False),
        (FAILED + FAILED + part_of(5, 0, 2, 1), {5: False}, False),
        (part_of(2, 0, 4096, 1) + part_of(5, 0, 9, 1), {2: True, 5: True}, False),
    ],
)
def test_known_replies(stream: bytes, ended: dict[int, bool], failed: bool, step: int) -> None:
    """What is rare among random ones; and the second opinion is asked about them too."""
    opinion = verdict(stream, structured=True)
    assert (opinion.ended, opinion.failed) == (ended, failed)
    asked = Asked(structured=True)
    lied = False
    try:
        for at in range(0, len(stream), step):
            asked.replies.feed(stream[at : at + step])
    except NbdProtocolError:
        lied = True
    assert (asked.ended, lied) == (ended, failed)
    for cookie, well in ended.items():
        assert not well or asked.buffers[cookie] == opinion.buffers[cookie]


def test_the_second_opinion_on_replies() -> None:
    """It knows right from wrong: it is what everything else is measured by."""
    read = chunk(wire.CHUNK_OFFSET_DATA, 5, wire.OFFSET.pack(70_000) + bytes(range(9)), 1)
    good = verdict(read, structured=True)
    assert good.ended == {5: True}
    assert good.buffers[5] == bytes(range(9))
    assert not good.failed
    assert verdict(read, structured=False).failed
    assert verdict(read + read, structured=True).failed
    assert verdict(chunk(wire.CHUNK_NONE, 5, b"", 1), structured=True).failed
    assert verdict(read[:-1], structured=True).ended == {}


# ----------------------------------------------------- what servers say in the handshake


def offered(stream: bytes, tls: bool) -> tuple[int, int, int, bool, int | None] | str | None:
    """Size, flags, smallest block, structured, context that a client finds, or "tls"; None while
    it finds nothing, AssertionError if it should not."""

    def take(count: int) -> bytes | None:
        nonlocal stream
        if len(stream) < count:
            return None
        part, stream = stream[:count], stream[count:]
        return part

    head = take(18)
    if head is None:
        return None
    assert head[:16] == b"NBDMAGICIHAVEOPT"
    fixed, no_zeroes = head[17] & 1, head[17] & 2
    structured, context = False, None

    def by_name() -> tuple[int, int, int, bool, int | None] | None:
        found = take(10)
        if found is None or (not no_zeroes and take(124) is None):
            return None
        size, flags = struct.unpack(">QH", found)
        assert size < 1 << 63
        return size, flags, 1, structured, context

    if not fixed:
        assert not tls
        return by_name()

    def reply(option: int) -> tuple[int, bytes] | None:
        found = take(20)
        if found is None:
            return None
        magic, number, kind, length = struct.unpack(">QIII", found)
        assert magic == 0x3E889045565A9
        assert number == option
        assert length <= 65536
        payload = take(length)
        if payload is None:
            return None
        assert kind not in (1 << 31 | 5, 1 << 31 | 6, 1 << 31 | 7)
        return kind, payload

    if tls:
        answer = reply(5)
        if answer is None:
            return None
        assert answer[0] == 1
        assert not stream
        return "tls"
    answer = reply(8)
    if answer is None:
        return None
    structured = answer[0] == 1
    if structured:
        while (answer := reply(10)) is not None and answer[0] == 4:
            assert len(answer[1]) >= 4
            if answer[1][4:] == b"base:allocation":
                context = int.from_bytes(answer[1][:4], "big")
        if answer is None:
            return None
        if answer[0] != 1:
            context = None
    size = flags = None
    blocks = (1, 4096, 1 << 25)
    first = True
    while (answer := reply(7)) is not None and answer[0] == 3:
        first = False
        payload = answer[1]
        assert len(payload) >= 2
        what = int.from_bytes(payload[:2], "big")
        if what == 0:
            assert len(payload) == 12
            size, flags = struct.unpack(">QH", payload[2:])
        elif what == 3:
            assert len(payload) == 14
            blocks = struct.unpack(">III", payload[2:])
    if answer is None:
        return None
    if first and answer[0] in (1 << 31 | 1, 1 << 31 | 4):
        return by_name()
    assert answer[0] == 1
    assert size is not None
    assert flags is not None
    assert size < 1 << 63
    assert blocks[0] in [1 << n for n in range(17)]
    assert blocks[2] >= blocks[0]
    return size, flags, blocks[0], structured, context


@st.composite
def offers(draw: Any, tls: bool) -> bytes:
    reply = wire.option_reply
    refused = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]).map(lambda number: 1 << 31 | number)
    flags = draw(st.sampled_from([3, 3, 3, 1, 2, 0, 0xFFFF]))
    messages = [wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, flags)]
    if tls:
        messages.append(reply(wire.OPT_STARTTLS, draw(st.one_of(st.just(wire.REP_ACK), refused))))
        if draw(st.booleans()):
            return Stream(damaged(draw, b"".join(messages)))
    structured = draw(st.integers(0, 3)) > 0
    kind = wire.REP_ACK if structured else draw(refused)
    messages.append(reply(wire.OPT_STRUCTURED_REPLY, kind))
    if structured:
        for _ in range(draw(st.integers(0, 2))):
            name = draw(st.sampled_from([b"base:allocation", b"x-other:thing", b""]))
            number = wire.U32.pack(draw(st.integers(0, 9)))
            messages.append(reply(wire.OPT_SET_META_CONTEXT, wire.REP_META_CONTEXT, number + name))
        kind = draw(st.sampled_from([wire.REP_ACK] * 3 + [wire.REP_ERR_UNSUP]))
        messages.append(reply(wire.OPT_SET_META_CONTEXT, kind))
    size = draw(st.sampled_from([1 << 20, 1 << 20, 0, (1 << 63) - 1, 1 << 63]))
    export = wire.EXPORT.pack(size, 1)
    if draw(st.integers(0, 3)):
        smallest = draw(st.sampled_from([1, 512, 512, 65536, 3, 0, 1 << 17]))
        blocks = wire.BLOCK_SIZE_INFO.pack(3, smallest, 4096, draw(st.sampled_from([1 << 20, 256])))
        info = [wire.U16.pack(wire.INFO_EXPORT) + export]
        info += draw(st.lists(st.sampled_from([blocks, b"\0\1name", b"\0\0"]), max_size=2))
        messages += [reply(wire.OPT_GO, wire.REP_INFO, part) for part in info]
        messages.append(reply(wire.OPT_GO, wire.REP_ACK))
    else:
        messages.append(reply(wire.OPT_GO, draw(refused), b"why"))
        messages.append(export)
    return Stream(damaged(draw, b"".join(rearranged(draw, messages))))


@pytest.mark.parametrize("tls", [False, True])
@fuzz
@given(st.data())
def test_handshakes(tls: bool, data: st.DataObject) -> None:
    """It finds the export that the stream offers, or a clean error, or waits for more."""
    stream = data.draw(offers(tls))
    expected: Any = None
    failed = wrong = False
    try:
        expected = offered(stream, tls)
    except AssertionError:
        wrong = True
    handshake = Handshake("name", tls=tls)
    try:
        for piece in pieces(data.draw, stream):
            handshake.feed(piece)
    except CLEAN:
        failed = True
    assert failed == wrong
    export = handshake.export
    found = export and (
        export.size, export.flags, export.minimum, export.structured, export.allocation
    )  # fmt: skip
    if not failed:
        assert handshake.wants_tls == (expected == "tls")
        assert handshake.wants_tls or found == expected
    assert len(handshake.take()) < 1000


def test_a_context_that_is_taken_back() -> None:
    reply = wire.option_reply
    name = wire.U32.pack(3) + b"base:allocation"
    stream = b"".join(
        [
            wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3),
            reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK),
            reply(wire.OPT_SET_META_CONTEXT, wire.REP_META_CONTEXT, name),
            reply(wire.OPT_SET_META_CONTEXT, wire.REP_ERR_POLICY),
            reply(wire.OPT_GO, wire.REP_INFO, wire.EXPORT_INFO.pack(0, 5, 1)),
            reply(wire.OPT_GO, wire.REP_ACK),
        ]
    )
    assert offered(stream, False) == (5, 1, 1, True, None)
    handshake = Handshake("name")
    handshake.feed(stream)
    assert handshake.export is not None
    assert handshake.export.allocation is None


# ------------------------------------------------------------- what clients ask for


NAMES = {"one": Offer(1 << 20, 0x83, description="the first"), "two": Offer(5, 0x83)}


@dataclass
class Agreed:
    """What must come of a client's handshake."""

    #: Option and kind of each reply, and what an EXPORT_NAME got.
    said: list[tuple[int, int]] = field(default_factory=list)
    chosen: str | None = None
    structured: bool = False
    context: str | None = None
    over: bool = False
    tls: bool = False
    failed: bool = False
    rest: bytes = b""


def agreed(stream: bytes, *, tls: bool, required: bool) -> Agreed:
    found = Agreed()
    try:
        _agree(stream, found, tls, required)
    except AssertionError:
        found.failed = True
    return found


def _texts(payload: bytes, counted: bool) -> list[bytes] | None:
    """The strings that a payload is made of: one, and with ``counted`` a list of more."""
    texts = []
    left = 1
    while left:
        if len(payload) < 4:
            return None
        length = int.from_bytes(payload[:4], "big")
        if length > 4096 or len(payload) < 4 + length:
            return None
        texts.append(payload[4 : 4 + length])
        payload = payload[4 + length :]
        left -= 1
        if len(texts) == 1 and counted:
            if len(payload) < 4:
                return None
            left = int.from_bytes(payload[:4], "big")
            payload = payload[4:]
            if left > 65536:
                return None
    return [*texts, payload]


def _agree(stream: bytes, found: Agreed, tls: bool, required: bool) -> None:
    bad = 1 << 31
    if len(stream) < 4:
        return
    flags = int.from_bytes(stream[:4], "big")
    assert flags < 4
    stream = stream[4:]
    for _ in range(1000):
        if len(stream) < 16:
            return
        magic, option, length = struct.unpack(">8sII", stream[:16])
        assert magic == b"IHAVEOPT"
        assert length <= 65536
        if len(stream) < 16 + length:
            return
        payload, stream = stream[16 : 16 + length], stream[16 + length :]
        kinds: list[int] = []
        if option == 5:
            if tls and not payload:
                found.said.append((5, 1))
                found.tls = True
                assert not stream
                return
            kinds = [bad | 3] if payload else [bad | 2]
        elif option == 2:
            found.said.append((2, 1))
            found.over, found.rest = True, stream
            return
        elif required:
            assert option != 1
            kinds = [bad | 5]
        elif option == 1:
            assert payload in (b"one", b"two")
            found.chosen = payload.decode()
        elif option == 3:
            kinds = [bad | 3] if payload else [2, 2, 1]
        elif option in (6, 7):
            texts = _texts(payload, False)
            asked = texts and texts[1]
            if (
                not asked
                or len(asked) < 2
                or len(asked) != 2 + 2 * int.from_bytes(asked[:2], "big")
            ):
                kinds = [bad | 3]
            elif texts is not None and texts[0] not in (b"one", b"two"):
                kinds = [bad | 6]
            else:
                assert texts is not None
                infos = {asked[at : at + 2] for at in range(2, len(asked), 2)}
                more = (b"\0\1" in infos) + (b"\0\2" in infos and texts[0] == b"one")
                kinds = [3] * (2 + more) + [1]
                if option == 7:
                    found.chosen = texts[0].decode()
        elif option == 8:
            kinds = [bad | 3 if payload else 1]
            found.structured |= not payload
        elif option in (9, 10):
            texts = _texts(payload, True)
            if option == 10:
                found.context = None
            if texts is None or texts[-1] or not found.structured:
                kinds = [bad | 3]
            elif texts[0] not in (b"one", b"two"):
                kinds = [bad | 6]
            else:
                queries = texts[1:-1]
                hit = b"base:allocation" in queries
                if option == 9:
                    hit = hit or not queries or b"base:" in queries
                elif hit:
                    found.context = texts[0].decode()
                kinds = [4, 1] if hit else [1]
        else:
            kinds = [bad | 1]
        found.said += [(option, kind) for kind in kinds]
        if found.chosen is not None:
            found.rest = stream
            return
    raise AssertionError("options without end")


@st.composite
def wishes(draw: Any) -> bytes:
    name = st.sampled_from(["one", "two", "three", ""])
    options = []
    if draw(st.booleans()):
        # What a client does that wants everything.
        contexts = wire.string(draw(name)) + wire.U32.pack(1) + wire.string("base:allocation")
        options.append(wire.option(wire.OPT_STRUCTURED_REPLY))
        options.append(wire.option(wire.OPT_SET_META_CONTEXT, contexts))
    for _ in range(draw(st.integers(0, 6))):
        option = draw(st.sampled_from([1, 2, 3, 5, 6, 7, 7, 8, 8, 9, 10, 10, 11, 99]))
        if option == 1:
            payload = draw(name).encode()
        elif option in (6, 7):
            infos = draw(st.lists(st.integers(0, 4), max_size=3))
            packed = b"".join(wire.U16.pack(n) for n in (len(infos), *infos))
            payload = wire.string(draw(name)) + packed
        elif option in (9, 10):
            known = st.sampled_from(["base:allocation", "base:", "x:y", ""])
            queries = draw(st.lists(known, max_size=3))
            count = max(0, len(queries) + draw(st.sampled_from([0, 0, 0, 1, -1])))
            payload = wire.string(draw(name)) + wire.U32.pack(count)
            payload += b"".join(map(wire.string, queries))
        else:
            payload = draw(st.sampled_from([b""] * 4 + [b"x"]))
        options.append(wire.option(option, payload))
    go = wire.string(draw(name)) + wire.U16.pack(0)
    options.append(wire.option(wire.OPT_GO, go))
    flags = wire.CLIENT_FLAGS.pack(draw(st.sampled_from([3, 3, 3, 1, 0])))
    end = draw(st.sampled_from([b"", b"rest"]))
    return Stream(damaged(draw, b"".join([flags, *rearranged(draw, options), end])))


def spoken(data: bytes, chosen: str | None, pad: bool) -> list[tuple[int, int]]:
    """Option and kind of what a server said after its greeting; it has to be all that it said."""
    found = []
    while len(data) >= 20 and data[:8] == (0x3E889045565A9).to_bytes(8, "big"):
        _, option, kind, length = struct.unpack(">QIII", data[:20])
        assert len(data) >= 20 + length
        data = data[20 + length :]
        found.append((option, kind))
    if data:
        # What EXPORT_NAME gets.
        assert chosen is not None
        assert data[:8] == NAMES[chosen].size.to_bytes(8, "big")
        assert len(data) == (134 if pad else 10)
    return found


@fuzz
@given(st.data(), st.sampled_from([(False, False), (True, False), (True, True)]))
def test_negotiations(data: st.DataObject, mode: tuple[bool, bool]) -> None:
    """Each option gets the answers that the protocol wants, and they add up to the same."""
    tls, required = mode
    stream = data.draw(wishes())
    expected = agreed(stream, tls=tls, required=required)
    negotiation = Negotiation(NAMES, tls=tls, tls_required=required)
    said = bytearray(negotiation.take()[wire.GREETING.size :])
    rest = b""
    failed = False
    try:
        for piece in pieces(data.draw, stream):
            rest += negotiation.feed(piece)
            while negotiation.pending:
                said += negotiation.take()
                rest += negotiation.feed(b"")
    except NbdProtocolError:
        failed = True
    said += negotiation.take()
    assert failed == expected.failed
    pad = not stream[3:4] or not stream[3] & 2
    assert spoken(bytes(said), negotiation.chosen, pad) == expected.said
    assert negotiation.chosen == expected.chosen
    if failed:
        return
    assert negotiation.aborted == expected.over
    assert negotiation.wants_tls == expected.tls
    assert rest == expected.rest
    if expected.chosen is not None:
        assert negotiation.structured == expected.structured
        assert negotiation.allocation == (expected.context == expected.chosen)


STRUCTURED = wire.option(wire.OPT_STRUCTURED_REPLY)
CONTEXT = wire.string("one") + wire.U32.pack(1) + wire.string("base:allocation")


@pytest.mark.parametrize(
    "options",
    [
        wire.option(wire.OPT_SET_META_CONTEXT, CONTEXT),
        STRUCTURED + wire.option(wire.OPT_SET_META_CONTEXT, CONTEXT),
        STRUCTURED + wire.option(wire.OPT_SET_META_CONTEXT, CONTEXT + b"x"),
        STRUCTURED + wire.option(wire.OPT_SET_META_CONTEXT, CONTEXT[:-1]),
        STRUCTURED
        + wire.option(wire.OPT_SET_META_CONTEXT, CONTEXT.replace(b"\0\0\0\1", b"\0\0\0\2")),
        STRUCTURED
        + wire.option(wire.OPT_LIST_META_CONTEXT, CONTEXT.replace(b"\0\0\0\1", b"\0\0\0\0")),
        wire.option(99, bytes(65536)),
        wire.option(99, bytes(65537)),
        wire.option(wire.OPT_GO, wire.string("x" * 4097) + wire.U16.pack(0)),
    ],
)
def test_known_options(options: bytes) -> None:
    stream = GREETING_REST + options + wire.option(7, wire.string("one") + wire.U16.pack(0))
    expected = agreed(stream, tls=False, required=False)
    negotiation = Negotiation(NAMES)
    negotiation.take()
    try:
        negotiation.feed(stream)
    except NbdProtocolError:
        assert expected.failed
    else:
        assert not expected.failed
        assert spoken(negotiation.take(), "one", False) == expected.said
        assert negotiation.allocation == (expected.context == "one")


LIMIT = 300_000
EXPORT = Offer(1 << 20, wire.FLAG_HAS_FLAGS | wire.FLAG_SEND_FUA, maximum=LIMIT)
READ_ONLY = Offer(1 << 20, wire.FLAG_HAS_FLAGS | wire.FLAG_READ_ONLY)
PAYLOAD = content(LIMIT + 8)


def asked_for(stream: bytes) -> tuple[list[tuple[int, ...]], list[bytes], bool, bool]:
    """Requests in a stream, data of writes, whether it ends in a goodbye, or in a mistake."""
    found: list[tuple[int, ...]] = []
    written: list[bytes] = []
    while len(stream) >= 28:
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", stream[:28])
        stream = stream[28:]
        if magic != 0x25609513:
            return found, written, False, True
        if command == 2:
            return found, written, True, False
        if command == 1:
            if length > LIMIT:
                return found, written, False, True
            if len(stream) < length:
                break
            written.append(stream[:length])
            stream = stream[length:]
        found.append((command, flags, cookie, offset, length))
    return found, written, False, False


@st.composite
def questions(draw: Any) -> bytes:
    messages = []
    for cookie in range(draw(st.integers(0, 12))):
        command = draw(st.sampled_from([0, 1, 1, 1, 3, 4, 6, 7, 99] + [2] * (cookie > 8)))
        small = st.integers(0, 9000)
        length = draw(st.one_of(small, st.sampled_from([65536, 65537, 70_000, LIMIT, LIMIT + 1])))
        head = request(command, 5, length, cookie=cookie, flags=draw(st.integers(0, 1)))
        messages.append(head + (PAYLOAD[:length] if command == 1 else b""))
    return Stream(damaged(draw, b"".join(rearranged(draw, messages))))


@pytest.mark.parametrize("offer", [EXPORT, READ_ONLY])
@fuzz
@given(st.data())
def test_requests(offer: Offer, data: st.DataObject) -> None:
    """What is asked for comes out, in order, however it comes in; data of what will be refused
    is not kept."""
    stream = data.draw(questions())
    requests = Requests(offer, largest_write=LIMIT)
    failed = False
    try:
        for piece in pieces(data.draw, stream):
            while piece and not requests.disconnected:
                buffer = requests.get_buffer()
                count = min(len(buffer), len(piece))
                assert count
                buffer[:count] = piece[:count]
                requests.received(count)
                piece = piece[count:]
                if requests.waiting is not None:
                    assert requests.waiting.data is None
                    requests.admit()
    except NbdProtocolError:
        failed = True
    expected, written, goodbye, wrong = asked_for(stream)
    assert failed == wrong
    assert requests.disconnected == goodbye
    found = [(r.command, r.flags, r.cookie, r.offset, r.length) for r in requests.ready]
    assert found == expected
    assert requests.count == len(found)
    writes = [r for r in requests.ready if r.command == 1]
    for one, data_of_it in zip(writes, written, strict=True):
        if one.error:
            assert one.data is None
        else:
            assert one.data == data_of_it
    if offer is READ_ONLY:
        assert all(one.error == wire.EPERM for one in writes)


@pytest.mark.parametrize("step", [1, 27, 29, 1000, 4099, 65535])
def test_small_ones_without_end(step: int) -> None:
    """Buffers are used from one end to the other and then again, with something left each time."""
    stream = b"".join(request(0, at, 8, cookie=at) for at in range(8000))
    requests = Requests(EXPORT)
    for at in range(0, len(stream), step):
        requests.feed(stream[at : at + step])
    assert [one.cookie for one in requests.ready] == list(range(8000))
    replies = Replies(Export(1 << 20, 1, structured=True))
    found = bytearray(64_000)
    stream = b""
    for cookie in range(8000):
        part = memoryview(found)[cookie * 8 :][:8]
        replies.requests[cookie] = Request(wire.CMD_READ, 5, 8, lambda _: None, target=part)
        data = wire.OFFSET.pack(5) + BYTES[cookie * 8 :][:8]
        stream += chunk(wire.CHUNK_OFFSET_DATA, cookie, data, 1)
    for at in range(0, len(stream), step):
        replies.feed(stream[at : at + step])
    assert found == BYTES[:64_000]
    assert not replies.busy


def test_there_is_always_room_after_a_goodbye() -> None:
    requests = Requests(EXPORT)
    requests.feed(request(wire.CMD_READ, 0, 8) + request(wire.CMD_DISC))
    assert requests.disconnected
    for _ in range(5):
        room = len(requests.get_buffer())
        assert room
        requests.received(room)
    assert len(requests.ready) == 1


# -------------------------------------------------------------------- a whole server

ROOM = 1 << 16


class Holey(MemorySource):
    """Memory that tells which of its blocks are zeros."""

    async def holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        found = []
        for start in range(offset - offset % 4096, offset + length, 4096):
            if not any(self.data[start : start + 4096]):
                first, last = max(start, offset), min(start + 4096, offset + length)
                found.append((first, last - first))
        return found


@st.composite
def steps(draw: Any) -> list[list[tuple[int, int, int, int, bytes]]]:
    """Batches of requests: one that writes, or some that do not."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        batch = []
        writes = draw(st.booleans())
        for _ in range(1 if writes else draw(st.integers(1, 8))):
            command = draw(st.sampled_from([1, 6] if writes else [0, 0, 0, 7, 3, 5, 42]))
            offset = draw(st.one_of(st.integers(0, ROOM), st.sampled_from([ROOM - 1, 1 << 63])))
            length = draw(st.one_of(st.integers(0, 9000), st.integers(0, ROOM + 1)))
            flags = draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 1 << 12]))
            some = draw(st.binary(min_size=1, max_size=8))
            data = Stream((some * (length // len(some) + 1))[:length])
            batch.append((command, flags, offset, length, data))
        found.append(batch)
    return found


class Session:
    """One conversation with a real server, and what it should say, by an own copy of the bytes."""

    def __init__(self, peer: Peer, model: bytearray, structured: bool) -> None:
        self.peer, self.model, self.structured = peer, model, structured

    async def batch(self, data: Any, batch: list[tuple[int, int, int, int, bytes]]) -> None:
        stream = b""
        for cookie, (command, flags, offset, length, written) in enumerate(batch):
            stream += request(command, offset, length, cookie=cookie, flags=flags)
            stream += written if command == 1 else b""
        for piece in pieces(data.draw, stream):
            self.peer.writer.write(piece)
            await asyncio.sleep(0)
        owed = set(range(len(batch)))
        got: dict[int, dict[int, bytes]] = {}
        while owed:
            magic = await self.peer.reader.readexactly(4)
            if magic == wire.SIMPLE_MAGIC.to_bytes(4, "big"):
                error, cookie = struct.unpack(">IQ", await self.peer.reader.readexactly(12))
                owed.remove(cookie)
                command, _, offset, length, _ = batch[cookie]
                assert error == self.error(batch[cookie])
                assert not self.structured or command not in (0, 7)
                if command == 0 and not error:
                    found = await self.peer.reader.readexactly(length)
                    assert found == self.model[offset : offset + length]
                continue
            assert self.structured
            assert magic == wire.STRUCTURED_MAGIC.to_bytes(4, "big")
            head = await self.peer.reader.readexactly(16)
            flags, kind, cookie, length = struct.unpack(">HHQI", head)
            payload = await self.peer.reader.readexactly(length)
            assert cookie in owed
            self.chunk(batch[cookie], kind, payload, got.setdefault(cookie, {}))
            if flags & 1:
                owed.remove(cookie)
                self.last(batch[cookie], got[cookie])
        for one in batch:
            self.apply(one)

    def error(self, one: tuple[int, int, int, int, bytes]) -> int:
        """What the protocol wants for a request on a writable export."""
        command, flags, offset, length, _ = one
        known = {0: 4, 1: 0, 3: 0, 6: 2, 7: 8}
        if command not in known or flags & ~(known[command] | 1):
            return wire.EINVAL
        if command == 3:
            return 0
        if command == 7 and not self.structured:
            return wire.EINVAL
        if command == 0 and flags & 4 and not self.structured:
            return wire.EINVAL
        if not length:
            return wire.EINVAL
        if offset + length > ROOM:
            return wire.ENOSPC if command in (1, 6) else wire.EINVAL
        return 0

    def chunk(
        self,
        one: tuple[int, int, int, int, bytes],
        kind: int,
        payload: bytes,
        got: dict[int, bytes],
    ) -> None:
        command, flags, offset, length, _ = one
        if kind & 1 << 15:
            number, text = struct.unpack(">IH", payload[:6])
            assert number == self.error(one) != 0
            assert text == len(payload) - 6
        elif kind == 1:
            at = int.from_bytes(payload[:8], "big")
            assert at not in got
            got[at] = payload[8:]
        elif kind == 2:
            at, count = struct.unpack(">QI", payload)
            assert at not in got
            assert not flags & 4 or count == length
            got[at] = bytes(count)
        else:
            assert (kind, command) == (5, 7)
            assert int.from_bytes(payload[:4], "big") == 1
            at = offset
            extents = list(struct.iter_unpack(">II", payload[4:]))
            assert len(extents) == 1 or not flags & 8
            for count, state in extents:
                assert count
                assert state in (0, 3)
                assert not state or not any(self.model[at : at + count])
                at += count
            assert at <= offset + length
            assert at == offset + length or flags & 8

    def last(self, one: tuple[int, int, int, int, bytes], got: dict[int, bytes]) -> None:
        command, flags, offset, length, _ = one
        if command != 0 or self.error(one):
            assert not got
            return
        assert len(got) == 1 or not flags & 4
        at = offset
        for start, part in sorted(got.items()):
            assert start == at
            assert part == self.model[at : at + len(part)]
            at += len(part)
        assert at == offset + length

    def apply(self, one: tuple[int, int, int, int, bytes]) -> None:
        command, _, offset, length, written = one
        if command in (1, 6) and not self.error(one):
            self.model[offset : offset + length] = written if command == 1 else bytes(length)


def on(loop: str, main: Callable[[], Any]) -> None:
    """Run ``main()`` on a loop of its own, whose exception handler must not be called."""
    errors: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with asyncio.timeout(5):
            await main()

    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(watched())
    assert not errors


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@slow_fuzz
@given(st.data(), steps(), st.booleans())
def test_conversations(
    loop: str, data: st.DataObject, batches: list[Any], structured: bool
) -> None:
    """A real server's replies to requests that are right and wrong, against a model."""

    async def main() -> None:
        memory = bytearray(ROOM)
        memory[8192:20_000] = PAYLOAD[:11_808]
        model = bytearray(memory)
        with tempfile.TemporaryDirectory() as folder:
            async with NbdServer({"": Holey(memory)}, writable=True) as server:
                path = Path(folder, "s")
                await server.listen_unix(path)
                connect = Peer.structured if structured else Peer.transmitting
                session = Session(await connect(path), model, structured)
                try:
                    for batch in batches:
                        await session.batch(data, batch)
                    assert memory == model
                    session.peer.ask(wire.CMD_DISC)
                    await session.peer.ended()
                finally:
                    await session.peer.close()
                assert server.stats.bytes_outstanding == 0

    on(loop, main)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@slow_fuzz
@given(st.data())
def test_a_server_survives(loop: str, data: st.DataObject) -> None:
    """Whatever a client sends, it costs itself its connection at most, and leaves nothing."""
    go = wire.option(wire.OPT_GO, wire.string("one") + wire.U16.pack(0))
    begin = GREETING_REST + wire.option(wire.OPT_STRUCTURED_REPLY) + go
    stream = data.draw(wishes()) if data.draw(st.booleans()) else begin
    stream = damaged(data.draw, stream + data.draw(questions()))
    parts = list(pieces(data.draw, stream))
    abrupt = data.draw(st.booleans())

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "s")
            exports = {"one": Holey(bytearray(1 << 20)), "two": Holey(bytearray(5))}
            async with NbdServer(exports, writable=True, memory=1 << 18) as server:
                await server.listen_unix(path)
                bystander = await Peer.structured(path, "two")
                peer = await Peer.connect(path)
                try:
                    for part in parts:
                        if peer.writer.is_closing():
                            break
                        peer.writer.write(part)
                        await asyncio.sleep(0)
                    if abrupt:
                        peer.writer.transport.abort()
                    elif not peer.writer.is_closing():
                        peer.writer.write_eof()
                    await peer.ended()
                    bystander.ask(wire.CMD_READ, 0, 5)
                    assert (await bystander.chunk())[0] == 1
                    bystander.ask(wire.CMD_DISC)
                    await bystander.ended()
                finally:
                    await peer.close()
                    await bystander.close()
                await until(lambda: not server.stats.clients)
                assert server.stats.bytes_outstanding == 0

    on(loop, main)
