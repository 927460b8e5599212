"""aiouffd's own dialect: its records, and clients that do not keep to it.

The clients here are this very process, with a userfaultfd of its own; what they touch they touch
without the GIL. `tests.test_attach` has real ones.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd import Feature, Mode, SourceError, Userfaultfd, serve
from aiouffd.foreign.areas import GONE, INSTALLED, MOVED, REMOVED
from aiouffd.foreign.steps import at_once
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.kernel.uffd import address_of
from aiouffd.serve import Area, AreaMap, Server
from aiouffd.serve.dialects import native
from aiouffd.serve.dialects.native import (
    Attach,
    Decoder,
    Handed,
    NativeDialect,
    Query,
    Refusal,
    answer,
    mapped_runs,
    tag_of,
)
from aiouffd.sources import FunctionSource
from tests.support import content, wait_until, word

PAGES = 16
SIZE = PAGES * PAGE_SIZE
DATA = content(SIZE)
TAG = bytes(range(32))

# --------------------------------------------------------------------------- records

#: As docs/serve-protocol.md has it, byte by byte.
QUERY = bytes.fromhex(
    "61756664 0100 0100 1e000000 00000000 18000000 060000006e756d626572"  # number
)
ATTACH = bytes.fromhex(
    "61756664 0100 0200 96000000 00000100 50000000 06000000 02000000 20000000"
    "0000000000000000 03000000 00000000"
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    "0010000000000000 0020000000000000 0000000000000000 00100000 00000000"
    "0000010000000000 0010000000000000 0030000000000000 00100000 01000000"
    "6e756d626572"
)
ATTACHED = Attach(
    "number",
    (Handed(0x1000, 0x2000, 0, 4096, False), Handed(0x10000, 0x1000, 0x3000, 4096, True)),
    True,
    3,
    TAG,
)


def header(kind: int, length: int, *, flags: int = 0, version: int = 1, magic: int = 0) -> bytes:
    return struct.pack("<IHHII", magic or native.MAGIC, version, kind, length, flags)


def attach_record(
    areas: list[tuple[int, int, int, int, int]],
    *,
    name: bytes = b"",
    flags: int = 0,
    resumed: int = 0,
    tag: bytes = bytes(32),
    more: bytes = b"",
    area_more: bytes = b"",
    **change: int,
) -> bytes:
    """An ATTACH; ``change`` puts other numbers into its fields."""
    fields = {
        "fixed": 80 + len(more),
        "name_length": len(name),
        "count": len(areas),
        "area_size": 32 + len(area_more),
        **change,
    }
    body = struct.pack("<IIII8xI4x32s", *(fields[name] for name in list(fields)[:4]), resumed, tag)
    body += more + b"".join(struct.pack("<QQQII", *area) + area_more for area in areas) + name
    length = change.get("length", 16 + len(body))
    return header(2, length, flags=flags) + body


def decode(data: bytes) -> Any:
    return Decoder().feed(data[:16]) or _rest(data)


def _rest(data: bytes) -> Any:
    decoder = Decoder()
    decoder.feed(data[:16])
    return decoder.feed(data[16:])


def test_the_records_of_the_document() -> None:
    assert decode(QUERY) == Query("number")
    assert decode(ATTACH) == ATTACHED
    assert ATTACHED.pages == 3
    assert answer(2, size=0x1234, tag=TAG, text="no") == bytes.fromhex(
        "61756664 0100 0300 4a000000 00000000 48000000 02000000 3412000000000000"
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
        "02000000 00000000 6e6f"
    )
    assert len(answer(1, text="ä" * 1000)) == 72 + 200
    assert tag_of(None) == bytes(32)
    assert len(tag_of("1")) == 32
    assert tag_of("1") != tag_of("2")


@pytest.mark.parametrize("record", [QUERY, ATTACH])
def test_in_pieces(record: bytes) -> None:
    """Cut at each byte, byte by byte, and two in a row; never is more wanted than there is."""
    whole = decode(record)
    for cut in range(1, len(record)):
        decoder, found, at = Decoder(), None, 0
        while at < len(record):
            assert found is None
            most = min(decoder.wanted, cut if at < cut else len(record))
            found = decoder.feed(record[at : at + most])
            at += most
            assert at <= len(record)
        assert found == whole
        assert decoder.pending == 0
    decoder, many = Decoder(), []
    for byte in record + record:
        found = decoder.feed(bytes([byte]))
        if found is not None:
            many.append(found)
    assert many == [whole, whole]


def test_what_is_unknown_is_passed_over() -> None:
    """Longer fixed parts and areas, optional flags, and something behind."""
    areas = [(0x1000, 0x1000, 0, 4096, 0xFFFF0000)]
    record = attach_record(
        areas, name=b"x", more=b"new field", area_more=b"12345678", flags=1 << 20
    )
    assert decode(record) == Attach(
        "x", (Handed(0x1000, 0x1000, 0, 4096, False),), False, 0, bytes(32)
    )
    long = attach_record(areas, name=b"x") + b"behind"
    long = long[:8] + struct.pack("<I", len(long)) + long[12:]
    assert decode(long).name == "x"
    assert not decode(record).errors
    assert decode(attach_record(areas, name=b"x", flags=native.ERRORS)).errors


def test_an_error() -> None:
    """As docs/serve-protocol.md has it."""
    assert native.error_in(0x123000, 0x1000) == bytes.fromhex(
        "61756664 0100 0400 28000000 00000000 28000000 000000000030120000000000 0010000000000000"
    )


GOOD = (0x1000, 0x1000, 0, 4096, 0)
BAD_RECORDS: list[tuple[str, bytes, int]] = [
    ("magic", header(1, 24, magic=1) + bytes(8), native.BAD_RECORD),
    ("version", header(1, 24, version=2) + bytes(8), native.UNSUPPORTED),
    ("type", header(9, 24) + bytes(8), native.UNSUPPORTED),
    ("an answer", header(3, 72) + bytes(56), native.UNSUPPORTED),
    ("flags", header(1, 24, flags=2) + bytes(8), native.UNSUPPORTED),
    ("too short", header(2, 79) + bytes(63), native.BAD_RECORD),
    ("shorter than its header", header(1, 3), native.BAD_RECORD),
    ("too long", header(2, (1 << 20) + 1), native.BAD_RECORD),
    ("all ones", b"\xff" * 16, native.BAD_RECORD),
    ("name before its place", header(1, 24) + struct.pack("<II", 23, 0), native.BAD_RECORD),
    ("name behind the end", header(1, 24) + struct.pack("<II", 24, 1), native.BAD_RECORD),
    ("name far behind", header(1, 24) + struct.pack("<II", 1 << 31, 4), native.BAD_RECORD),
    ("name too long", header(1, 2024) + struct.pack("<II", 24, 2000) + bytes(2000), 1),
    ("not UTF-8", header(1, 25) + struct.pack("<II", 24, 1) + b"\xff", native.BAD_RECORD),
    ("a zero", header(1, 26) + struct.pack("<II", 24, 2) + b"a\0", native.BAD_RECORD),
    ("areas too early", attach_record([GOOD], fixed=48), native.BAD_RECORD),
    ("areas behind", attach_record([GOOD], fixed=4000), native.BAD_RECORD),
    ("small areas", attach_record([GOOD], area_size=31), native.BAD_RECORD),
    ("large areas", attach_record([GOOD], area_size=1 << 31), native.BAD_RECORD),
    ("no area", attach_record([]), native.BAD_RECORD),
    ("too many", attach_record([GOOD] * 4097), native.BAD_RECORD),
    ("more than there are", attach_record([GOOD], count=2), native.BAD_RECORD),
    ("very many", attach_record([GOOD], count=(1 << 32) - 1), native.BAD_RECORD),
    ("name of the next", attach_record([GOOD], name_length=1), native.BAD_RECORD),
    ("page size", attach_record([(0, 8192, 0, 8192, 0)]), native.UNSUPPORTED),
    ("page size 0", attach_record([(0, 4096, 0, 0, 0)]), native.UNSUPPORTED),
    ("two page sizes", attach_record([GOOD, (0, 2 << 20, 0, 2 << 20, 0)]), native.UNSUPPORTED),
    ("address", attach_record([(5, 4096, 0, 4096, 0)]), native.BAD_RECORD),
    ("length", attach_record([(0, 100, 0, 4096, 0)]), native.BAD_RECORD),
    ("length 0", attach_record([(0, 0, 0, 4096, 0)]), native.BAD_RECORD),
    ("area flags", attach_record([(0, 4096, 0, 4096, 2)]), native.UNSUPPORTED),
]


@pytest.mark.parametrize(
    ("record", "status"), [case[1:] for case in BAD_RECORDS], ids=[case[0] for case in BAD_RECORDS]
)
def test_bad_records(record: bytes, status: int) -> None:
    with pytest.raises(Refusal) as caught:
        decode(record)
    assert caught.value.status == status


def test_feeding_more_than_wanted() -> None:
    with pytest.raises(ValueError, match="17 bytes, where 16"):
        Decoder().feed(QUERY[:17])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_bytes_are_a_record_or_refused(data: Any) -> None:
    """Records with a few bytes changed, and plain noise."""
    raw = bytearray(
        data.draw(st.sampled_from([QUERY, ATTACH]) | st.binary(min_size=16, max_size=400))
    )
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    decoder = Decoder()
    at = 0
    with contextlib.suppress(Refusal):  # and nothing else
        while at < len(raw):
            piece = bytes(raw[at : at + min(decoder.wanted, data.draw(st.integers(1, 64)))])
            found = decoder.feed(piece)
            at += len(piece)
            assert decoder.pending + decoder.wanted <= native.RECORD_MAX
            if isinstance(found, Attach):
                assert found.areas
                assert found.pages * found.page_size == sum(area.length for area in found.areas)


# ------------------------------------------------------------------------ page states


def test_what_was_unmapped_is_left_out() -> None:
    fd = os.memfd_create("states")
    try:
        os.ftruncate(fd, 3 << 20)
        assert at_once(mapped_runs(memoryview(bytes(3 << 20)), fd, 0, 3 << 20)) == [(0, 3 << 20)]
        mapping = mmap.mmap(fd, 3 << 20)
        for first, last in (
            (0, 1),
            (5, 7),
            ((1 << 20) - 2, (1 << 20) + 3),
            ((3 << 20) - 1, 3 << 20),
        ):
            mapping[first:last] = bytes([GONE | REMOVED]) * (last - first)
        mapping[9] = REMOVED | INSTALLED
        states = memoryview(mapping)
        everything = [(1, 5), (7, (1 << 20) - 2), ((1 << 20) + 3, (3 << 20) - 1)]
        assert at_once(mapped_runs(states, fd, 0, 3 << 20)) == everything
        # An area in the middle of the file, whose first page is the third of those that are gone.
        assert at_once(mapped_runs(states, fd, 1 << 20, 10)) == [(3, 10)]
        assert at_once(mapped_runs(states, fd, 5, 2)) == []
        assert at_once(mapped_runs(states, fd, 8, 4)) == [(0, 4)]
        states.release()
        mapping.close()
    finally:
        os.close(fd)


def test_the_map_notes_what_is_gone() -> None:
    states = memoryview(bytearray(8))
    areas = AreaMap([Area(0x10000, 8 * 4096, None, states=states, lasting=True)])
    areas.removed(0x11000, 0x12000)
    areas.unmapped(0x10000, 0x11000)
    areas.moved(0x12000, 0x40000, 0x2000)
    there = bytes([GONE, REMOVED, GONE | MOVED, GONE | MOVED, 0, 0, 0, 0])
    assert bytes(states) == there
    moved = areas.find(0x40000)
    assert moved is not None
    assert moved.lasting
    assert moved.missing(0x40000, 0x42000) == [(0x40000, 0x42000)]
    areas.removed(0x40000, 0x41000)
    assert bytes(states) == there


# -------------------------------------------------------------------------- clients


class Raw:
    """A client that can do everything wrong."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = address_of(self.memory)
        self.uffd = Userfaultfd(
            Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP, user_mode_only=True
        )
        self.uffd.register(self.address, SIZE, Mode.MISSING)
        self.states = states_file()
        self.area = (self.address, SIZE, 0, PAGE_SIZE, 0)

    def record(self, **more: Any) -> bytes:
        return attach_record([self.area], **more)

    def send(self, data: bytes, *fds: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)

    @property
    def fds(self) -> tuple[int, int]:
        return self.uffd.fileno(), self.states

    def receive(self) -> tuple[int, int, bytes, str]:
        """Status, size, version and text of an answer."""
        raw = b""
        while len(raw) < 16 or len(raw) < struct.unpack_from("<I", raw, 8)[0]:
            some = self.socket.recv(4096)
            if not some:
                raise EOFError(raw)
            raw += some
        assert raw[:8] == struct.pack("<IHH", native.MAGIC, 1, 3)
        fixed, status, size, tag, length = struct.unpack_from("<IIQ32sI", raw, 16)
        assert fixed == 72
        return status, size, tag, raw[72 : 72 + length].decode()

    def word(self, page: int) -> int:
        """Touched without the GIL."""
        return peek(self.address + page * PAGE_SIZE)

    def close(self) -> None:
        self.socket.close()
        # Poison, so that whoever waits gets an error, and then nobody has to be asked.
        self.uffd.unregister(self.address, SIZE)
        self.uffd.close()
        os.close(self.states)


def peek(address: int) -> int:
    target = ctypes.create_string_buffer(8)
    ctypes.CDLL(None).memcpy(target, ctypes.c_void_p(address), ctypes.c_size_t(8))
    return int.from_bytes(target.raw, "little")


def states_file(
    size: int = PAGES, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, flags: int = 0
) -> int:
    fd = os.memfd_create("states", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@asynccontextmanager
async def serving(path: Path, source: Any = DATA, objects: Any = None) -> AsyncIterator[Server]:
    """A server that must be as fit as before when the block ends."""
    before = descriptors()
    async with serve.listen(path, source=source, dialect=NativeDialect(objects)) as server:
        yield server
        with connected(path) as one:
            one.send(one.record(), *one.fds)
            status = (await asyncio.to_thread(one.receive))[0]
            if source is DATA:
                assert status == native.OK
                assert await asyncio.to_thread(one.word, 3) == word(3 * PAGE_SIZE)
        await until(lambda: not server.clients, "the clients to be let go")
    assert descriptors() == before


def descriptors() -> list[str]:
    found = []
    for item in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(item).split(":")[0])
    return sorted(found)


@contextlib.contextmanager
def connected(path: Path) -> Iterator[Raw]:
    client = Raw(path)
    try:
        yield client
    finally:
        client.close()


async def until(condition: Any, what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


async def test_a_good_client(path: Path) -> None:
    async with serving(path) as server:
        with connected(path) as one:
            one.send(QUERY)
            status, _, _, text = await asyncio.to_thread(one.receive)
            assert (status, text) == (native.NOT_FOUND, "the server has no such object")
            one.send(header(1, 24) + struct.pack("<II", 24, 0))
            assert await asyncio.to_thread(one.receive) == (0, SIZE, bytes(32), "")
            one.send(one.record(), *one.fds)
            assert (await asyncio.to_thread(one.receive))[:2] == (0, SIZE)
            for page in range(PAGES):
                assert await asyncio.to_thread(one.word, page) == word(page * PAGE_SIZE)
            assert len(server.clients) == 1
        await until(lambda: not server.clients, "its leaving to be noticed")
        assert server.refused == 0


async def test_byte_by_byte(path: Path) -> None:
    """With the descriptors at any of them."""
    async with serving(path):
        for at in range(0, 112, 37):
            with connected(path) as one:
                for index, byte in enumerate(one.record()):
                    one.send(bytes([byte]), *(one.fds if index == at else ()))
                    if index % 10 == 0:
                        await asyncio.sleep(0)
                assert (await asyncio.to_thread(one.receive))[0] == native.OK
                assert await asyncio.to_thread(one.word, 1) == word(PAGE_SIZE)


async def test_descriptors_one_by_one(path: Path) -> None:
    async with serving(path):
        with connected(path) as one:
            record = one.record()
            one.send(record[:50], one.fds[0])
            one.send(record[50:], one.fds[1])
            assert (await asyncio.to_thread(one.receive))[0] == native.OK


async def test_hanging_up_at_any_byte(path: Path) -> None:
    async with serving(path) as server:
        with connected(path) as one:
            length = len(one.record())
        for end in range(length):
            with connected(path) as one:
                if end:
                    one.send(one.record()[:end], *one.fds[: end % 3])
        # One that says nothing breaks nothing.
        await until(lambda: server.refused == length - 1, "all of them to be let go")


async def test_hanging_up_instead_of_listening(path: Path) -> None:
    async with serving(path) as server:
        for _ in range(20):
            with connected(path) as one:
                one.send(one.record(), *one.fds)
        await until(lambda: not server.clients, "all of them to be let go")


async def test_talking_on(path: Path) -> None:
    async with serving(path) as server:
        with connected(path) as one:
            one.send(one.record() + b"more", *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.OK
            await until(lambda: not server.clients, "it to be dropped")


@pytest.mark.parametrize("count", [0, 1, 3, 8, 200])
async def test_wrong_numbers_of_descriptors(path: Path, count: int) -> None:
    async with serving(path) as server:
        with connected(path) as one:
            one.send(one.record(), *(one.fds * 100)[:count])
            if count < 2:
                status, _, _, text = await asyncio.to_thread(one.receive)
                assert (status, f"{count} descriptors" in text) == (native.BAD_RECORD, True)
            with pytest.raises((EOFError, ConnectionResetError)):
                await asyncio.to_thread(one.receive)
        assert server.refused == 1


async def test_descriptors_with_a_question(path: Path) -> None:
    async with serving(path):
        with connected(path) as one:
            one.send(header(1, 24) + struct.pack("<II", 24, 0), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.BAD_RECORD


async def refused(path: Path, uffd: int | None, states: int | None, match: str) -> int:
    """What is answered when one of the two is another."""
    async with serving(path) as server:
        with connected(path) as one:
            fds = [one.fds[0] if uffd is None else uffd, one.fds[1] if states is None else states]
            one.send(one.record(), *fds)
            status, _, _, text = await asyncio.to_thread(one.receive)
            assert match in text
            assert await asyncio.to_thread(one.socket.recv, 1) == b""
        assert server.refused == 1
    return status


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"seals": 0}, "not sealed"),
        ({"seals": fcntl.F_SEAL_SHRINK}, "not sealed"),
        ({"seals": fcntl.F_SEAL_GROW}, "not sealed"),
        ({"seals": 15}, "against writing"),
        ({"seals": 7 | 16}, "against writing"),
        ({"size": PAGES - 1}, "15 bytes, not 16"),
        ({"size": PAGES + 1}, "17 bytes, not 16"),
        ({"size": 0}, "0 bytes, not 16"),
        ({"size": 1 << 40}, "bytes, not 16"),
    ],
)
async def test_wrong_files_of_states(path: Path, arguments: Any, match: str) -> None:
    states = states_file(**arguments)
    try:
        assert await refused(path, None, states, match) == native.BAD_RECORD
    finally:
        os.close(states)


async def test_other_things_for_states(path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.write_bytes(bytes(PAGES))
    reader, writer = os.pipe()
    with plain.open("r+b") as file:
        assert await refused(path, None, file.fileno(), "") == native.BAD_RECORD
    assert await refused(path, None, reader, "not a memfd") == native.BAD_RECORD
    assert await refused(path, None, os.pidfd_open(os.getpid()), "") == native.BAD_RECORD
    os.close(reader)
    os.close(writer)


async def test_states_of_huge_pages(path: Path) -> None:
    """They may run out, and then whoever touches them gets SIGBUS."""
    try:
        states = os.memfd_create("states", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError:
        pytest.skip("there are no huge pages at all")
    try:
        os.ftruncate(states, 2 << 20)
        fcntl.fcntl(states, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        assert await refused(path, None, states, "ordinary pages") == native.BAD_RECORD
    finally:
        os.close(states)


async def test_other_things_for_the_userfaultfd(path: Path) -> None:
    reader, writer = os.pipe()
    assert await refused(path, reader, None, "something else") == native.REFUSED
    assert await refused(path, writer, None, "something else") == native.REFUSED
    os.close(reader)
    os.close(writer)
    # The other way round.
    async with serving(path):
        with connected(path) as one:
            one.send(one.record(), *reversed(one.fds))
            assert (await asyncio.to_thread(one.receive))[0] == native.BAD_RECORD


BAD_AREAS = [
    ("twice", [(0x10000, 4096, 0, 4096, 0)] * 2, "overlap"),
    ("overlapping", [(0x10000, 8192, 0, 4096, 0), (0x11000, 4096, 0, 4096, 0)], "overlap"),
    ("behind the object", [(0x10000, 4096, SIZE, 4096, 0)], "behind its object"),
    ("beyond the object", [(0x10000, SIZE + 4096, 0, 4096, 0)], "behind its object"),
    ("far beyond", [(0x10000, 4096, (1 << 64) - 4096, 4096, 0)], "behind its object"),
    ("inside of a page of it", [(0x10000, 4096, 100, 4096, 0)], "begin at a page"),
    ("wrapping around", [((1 << 64) - 4096, 8192, 0, 4096, 0)], "past the user address space"),
    ("the kernel's", [(1 << 63, 4096, 0, 4096, 0)], "past the user address space"),
    ("huge", [(0, 1 << 46, 0, 4096, 1)], ""),
]


@pytest.mark.parametrize(
    ("areas", "match"), [case[1:] for case in BAD_AREAS], ids=[case[0] for case in BAD_AREAS]
)
async def test_bad_areas(path: Path, areas: list[Any], match: str) -> None:
    async with serving(path) as server:
        with connected(path) as one:
            states = states_file(sum(area[1] for area in areas) // 4096)
            one.send(attach_record(areas), one.fds[0], states)
            os.close(states)
            status, _, _, text = await asyncio.to_thread(one.receive)
            assert (status, match in text) == (native.REFUSED, True), text
        assert server.refused == 1


@pytest.mark.parametrize(
    ("record", "status"), [case[1:] for case in BAD_RECORDS], ids=[case[0] for case in BAD_RECORDS]
)
async def test_bad_records_are_answered(path: Path, record: bytes, status: int) -> None:
    async with serving(path):
        with connected(path) as one:
            one.send(record, *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == status
            with pytest.raises((EOFError, ConnectionResetError)):
                await asyncio.to_thread(one.receive)


# -------------------------------------------------------------------------- objects


async def test_several_objects(path: Path) -> None:
    def query(name: str) -> bytes:
        raw = name.encode()
        return header(1, 24 + len(raw)) + struct.pack("<II", 24, len(raw)) + raw

    async def broken(offset: int, length: int) -> bytes:
        raise AssertionError

    class Broken(FunctionSource):
        async def open(self) -> None:
            raise SourceError("secret", transient=True)

    class Missing(FunctionSource):
        async def open(self) -> None:
            raise FileNotFoundError("nothing there")

    objects = {
        "one": DATA[:PAGE_SIZE],
        "größe": DATA[PAGE_SIZE : 3 * PAGE_SIZE],
        "broken": Broken(broken, 4096),
        "missing": Missing(broken, 4096),
    }
    async with serving(path, None, objects):
        for name, expected in {
            "one": (0, PAGE_SIZE, ""),
            "größe": (0, 2 * PAGE_SIZE, ""),
            "two": (native.NOT_FOUND, 0, "the server has no such object"),
            "missing": (native.NOT_FOUND, 0, "the server has no such object"),
            "": (native.NOT_FOUND, 0, "the server has no such object"),
        }.items():
            with connected(path) as one:
                one.send(query(name))
                status, size, _, text = await asyncio.to_thread(one.receive)
                assert (status, size, text) == expected
        with connected(path) as one:
            one.send(query("broken"))
            status, _, _, text = await asyncio.to_thread(one.receive)
            assert status == native.UNAVAILABLE
            assert "SourceError" in text
            assert "secret" not in text
        with connected(path) as one:
            one.area = (one.address, 2 * PAGE_SIZE, 0, PAGE_SIZE, 0)
            states = states_file(2)
            one.send(one.record(name="größe".encode()), one.fds[0], states)
            os.close(states)
            assert (await asyncio.to_thread(one.receive))[0] == native.OK
            assert await asyncio.to_thread(one.word, 1) == word(2 * PAGE_SIZE)
        with connected(path) as one:
            one.send(one.record(name=b"two"), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.NOT_FOUND
        # Zeros need no object.
        with connected(path) as one:
            one.area = (*one.area[:4], 1)
            one.send(one.record(), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.OK
            assert await asyncio.to_thread(one.word, 1) == 0


async def test_the_only_object_needs_no_name(path: Path) -> None:
    async with serving(path, None, {"one": DATA}):
        with connected(path) as one:
            one.send(one.record(), *one.fds)
            assert (await asyncio.to_thread(one.receive))[:2] == (native.OK, SIZE)
            assert await asyncio.to_thread(one.word, 2) == word(2 * PAGE_SIZE)


async def test_objects_by_a_function(path: Path) -> None:
    asked = []

    def find(name: str) -> bytes | None:
        asked.append(name)
        return DATA if name == "number" else None

    async with serving(path, None, find):
        with connected(path) as one:
            one.send(QUERY)
            assert (await asyncio.to_thread(one.receive))[:2] == (native.OK, SIZE)
    assert asked == ["number", ""]


async def test_the_default_of_an_unknown_name_is_none(path: Path) -> None:
    async with serving(path, DATA, {"one": DATA}):
        with connected(path) as one:
            one.send(QUERY)
            assert (await asyncio.to_thread(one.receive))[0] == native.NOT_FOUND


async def test_versions(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "object"
    file.write_bytes(DATA)
    async with serving(path, file):
        with connected(path) as one:
            one.send(header(1, 24) + struct.pack("<II", 24, 0))
            _, _, tag, _ = await asyncio.to_thread(one.receive)
            assert any(tag)
            one.send(one.record(tag=tag), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.OK
        with connected(path) as one:
            one.send(one.record(tag=TAG), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.CHANGED
    # Who does not know takes what there is.
    async with serving(path):
        with connected(path) as one:
            one.send(one.record(tag=TAG), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.OK


# ------------------------------------------------------------------------ taking over


async def test_states_of_a_server_that_died(path: Path) -> None:
    """What it has noted counts: removed, gone, and once there but not any more."""
    async with serving(path) as server:
        with connected(path) as one:
            os.pwrite(one.states, bytes([REMOVED, INSTALLED, GONE, 0]), 0)
            one.send(one.record(resumed=1, flags=native.BACKGROUND), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.OK
            assert await asyncio.to_thread(one.word, 0) == 0
            assert await asyncio.to_thread(one.word, 1) == 0
            assert await asyncio.to_thread(one.word, 3) == word(3 * PAGE_SIZE)
            (client,) = server.clients
            assert client.reconnects
            await client.complete()
            assert sum(area.length for area in client.memories[0].areas) == SIZE - PAGE_SIZE
            assert os.pread(one.states, PAGES, 0)[2] == GONE
            assert not is_there(one.address + 2 * PAGE_SIZE)
            assert is_there(one.address + 4 * PAGE_SIZE)


def is_there(address: int) -> bool:
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // PAGE_SIZE * 8)
        return int.from_bytes(pagemap.read(8), "little") >> 62 != 0


async def test_states_are_noted(path: Path) -> None:
    async with serving(path):
        with connected(path) as one:
            one.send(one.record(), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.OK
            assert await asyncio.to_thread(one.word, 1) == word(PAGE_SIZE)
            libc = ctypes.CDLL(None, use_errno=True)
            for page in (1, 9):
                address = ctypes.c_void_p(one.address + page * PAGE_SIZE)
                done = await asyncio.to_thread(
                    libc.madvise, address, ctypes.c_size_t(PAGE_SIZE), mmap.MADV_DONTNEED
                )
                assert done == 0
            await until(lambda: os.pread(one.states, 1, 9)[0] & REMOVED, "it to be noted")
            assert os.pread(one.states, 1, 1)[0] & REMOVED
            assert os.pread(one.states, 1, 2)[0] == INSTALLED  # of the same block
            assert await asyncio.to_thread(one.word, 1) == 0
            assert await asyncio.to_thread(one.word, 9) == 0


async def test_the_connection_ends_after_the_memory(path: Path) -> None:
    """A client that has been let go may use its addresses again at once."""
    async with serving(path) as server:
        with connected(path) as one:
            one.send(one.record(), *one.fds)
            assert (await asyncio.to_thread(one.receive))[0] == native.OK
            found = note_the_order(server)
            one.socket.shutdown(socket.SHUT_WR)
            assert await asyncio.to_thread(one.socket.recv, 1) == b""
            assert found == [True]


def note_the_order(server: Server) -> list[bool]:
    """Whether the memory is closed by the time that the connection is."""
    (client,) = server.clients
    (memory,) = client.memories
    fd, close, found = memory.fd, client.channel.close, list[bool]()

    def note() -> None:
        found.append(not os.path.exists(f"/proc/self/fd/{fd}"))
        close()

    client.channel.close = note  # type: ignore[method-assign]
    return found


def test_aiouffd_listens_natively_by_default(tmp_path: Path) -> None:
    assert aiouffd.serve.listen(tmp_path / "s", source=b"x").dialect.name == "native"
