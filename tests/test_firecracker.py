"""Firecracker's dialect: what each version sends is understood, and nothing else is.

The handshakes here are built a second time, from the protocol's description; clients are
programs that share nothing with the project (`tests/firecracker_client.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import signal
import socket
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiouffd import Feature, Mode, UsageError, Userfaultfd, serve
from aiouffd.errors import PeerError
from aiouffd.kernel.uffd import address_of
from aiouffd.serve import Limits, Server
from aiouffd.serve.dialects.firecracker import FirecrackerDialect, GuestRegion, Handshake
from aiouffd.sources import FunctionSource
from tests.faulty import huge_pages
from tests.support import ROOT, Gate, content, environment, wait_until

PAGE, HUGE = 4096, 2 << 20
SIZE = 512 * PAGE
DATA = content(SIZE)
BASE = 0x7F00_0000_0000

# What the serializers of these versions write: order of fields, and no spaces.
V1_1 = b'[{"base_host_virt_addr":139882624417792,"size":134217728,"offset":0}]'
V1_7 = b'[{"base_host_virt_addr":139882624417792,"size":134217728,"offset":0,"page_size_kib":4096}]'
V1_12 = (
    b'[{"base_host_virt_addr":140195846881280,"size":3221225472,"offset":0,"page_size":4096,'
    b'"page_size_kib":4096},{"base_host_virt_addr":140192625655808,"size":1073741824,'
    b'"offset":3221225472,"page_size":4096,"page_size_kib":4096}]'
)
V1_12_HUGE = (
    b'[{"base_host_virt_addr":140195844325376,"size":1073741824,"offset":0,"page_size":2097152,'
    b'"page_size_kib":2097152}]'
)
HYPEMAN = b'{"mappings":' + V1_7 + b"}"
WRITTEN = [V1_1, V1_7, V1_12, V1_12_HUGE, HYPEMAN]


def parse(text: bytes) -> tuple[GuestRegion, ...] | None:
    return Handshake().feed(text)


def refused(text: bytes, match: str) -> None:
    with pytest.raises(PeerError, match=match):
        parse(text)


def element(**fields: Any) -> dict[str, Any]:
    """A region of one page, with other fields if given; None leaves one out."""
    found = {"base_host_virt_addr": BASE, "size": PAGE, "offset": 0, "page_size": PAGE, **fields}
    return {name: value for name, value in found.items() if value is not None}


def text_of(*elements: Any) -> bytes:
    return json.dumps(list(elements)).encode()


# --------------------------------------------------------------------- the parser


def test_every_version() -> None:
    assert parse(V1_1) == (GuestRegion(139882624417792, 128 << 20, 0, PAGE),)
    assert parse(V1_7) == parse(V1_1) == parse(HYPEMAN)
    assert parse(V1_12) == (
        GuestRegion(140192625655808, 1 << 30, 3 << 30, PAGE),
        GuestRegion(140195846881280, 3 << 30, 0, PAGE),
    )
    assert parse(V1_12_HUGE) == (GuestRegion(140195844325376, 1 << 30, 0, HUGE),)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"page_size": None}, PAGE),
        ({"page_size": 0, "page_size_kib": 0}, PAGE),
        ({"page_size": 0, "page_size_kib": HUGE}, HUGE),
        ({"page_size": None, "page_size_kib": HUGE}, HUGE),
        ({"page_size": HUGE, "page_size_kib": 2048}, HUGE),
    ],
)
def test_page_size_is_the_first_that_is_given(fields: dict[str, Any], size: int) -> None:
    (region,) = parse(text_of(element(size=HUGE, **fields))) or ()
    assert region.page_size == size


def test_null_counts_as_left_out() -> None:
    text = text_of(element(page_size_kib=1)).replace(b'"page_size": 4096', b'"page_size": null')
    refused(text, "a page size of 1 bytes")
    assert parse(text.replace(b'"page_size_kib": 1', b'"page_size_kib": null'))


@pytest.mark.parametrize("text", WRITTEN)
def test_split_at_any_byte(text: bytes) -> None:
    whole = parse(text)
    for split in range(1, len(text)):
        handshake = Handshake()
        assert handshake.feed(text[:split]) is None
        assert handshake.received == split
        assert handshake.feed(text[split:]) == whole


@pytest.mark.parametrize("text", WRITTEN)
def test_byte_by_byte(text: bytes) -> None:
    handshake = Handshake()
    for byte in text[:-1]:
        assert handshake.feed(bytes([byte])) is None
    assert handshake.feed(text[-1:]) == parse(text)


def test_unknown_fields_hide_no_end() -> None:
    strange = {
        "brackets": ']}"[{',
        'a "name" with \\ and ]': [[], {}, [{"deep": [1.5, None, True]}]],
        "escapes": '\\\\"\\"]\\',
        "text": "Füße 日本 🦊",
        "other": 1e300,
    }
    expected = parse(text_of(element()))
    for ensure_ascii in (True, False):
        text = json.dumps([element(**strange)], ensure_ascii=ensure_ascii).encode()
        handshake = Handshake()
        for byte in text[:-1]:
            assert handshake.feed(bytes([byte])) is None
        assert handshake.feed(text[-1:]) == expected


def test_white_space_around_it() -> None:
    assert parse(b"\r\n\t " + V1_1 + b" \n") == parse(V1_1)
    handshake = Handshake()
    assert handshake.feed(b" ") is None
    assert handshake.feed(b"\n") is None
    assert handshake.feed(V1_1) == parse(V1_1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"GET / HTTP/1.1\r\n", "does not begin"),
        (b"\0", "does not begin"),
        (b'"[]"', "does not begin"),
        (b"]", "does not begin"),
        (b"\xef\xbb\xbf" + V1_1, "does not begin"),
        (V1_1.decode().encode("utf-16"), "does not begin"),
        (b"[}", "not JSON"),
        (b"[{]}", "not JSON"),
        (b'[{"size" 5}]', "not JSON"),
        (b'["\xff"]', "not JSON"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b'[{"size":1,"size":2}]', "comes twice"),
        (b"[" * 17, "too deep"),
        (V1_1 + b"x", "something follows"),
        (V1_1 + V1_1, "something follows"),
        (b"[]", "no region"),
        (b"{}", "neither a list"),
        (b'{"mappings":null}', "neither a list"),
        (b'{"mappings":{}}', "neither a list"),
        (b'{"mappings":[]}', "no region"),
        (b"[1]", "but a int"),
        (b"[[]]", "but a list"),
        (b"[{}]", "lacks base_host_virt_addr"),
    ],
)
def test_what_is_no_handshake(text: bytes, match: str) -> None:
    refused(text, match)


@pytest.mark.parametrize("name", ["base_host_virt_addr", "size", "offset"])
def test_required_fields(name: str) -> None:
    refused(text_of(element(**{name: None})), f"lacks {name}")
    refused(json.dumps([{**element(), name: None}]).encode(), f"lacks {name}")


@pytest.mark.parametrize(
    "name", ["base_host_virt_addr", "size", "offset", "page_size", "page_size_kib"]
)
@pytest.mark.parametrize(
    ("literal", "match"),
    [
        ("true", "but a bool"),
        ("4096.0", "but a float"),
        ("4096e0", "but a float"),
        ("1e999", "but a float"),
        ('"4096"', "but a str"),
        ("[4096]", "but a list"),
        ("-4096", "is -4096"),
        (str(1 << 64), "not a number of 64 bits"),
        ("1" + "0" * 20, "digits"),
        ("1" + "0" * 100_000, "digits"),
    ],
    ids=lambda value: value[:24],
)
def test_numbers_are_checked(name: str, literal: str, match: str) -> None:
    text = text_of(element(page_size=0) | {name: "HERE"})
    refused(text.replace(b'"HERE"', literal.encode()), match)


@pytest.mark.parametrize(
    ("elements", "match"),
    [
        ([element(size=0)], "is empty"),
        ([element(size=PAGE + 1)], "not whole pages"),
        ([element(base_host_virt_addr=BASE + 8)], "not whole pages"),
        ([element(offset=512)], "not whole pages"),
        ([element(size=PAGE, page_size=HUGE)], "not whole pages"),
        ([element(base_host_virt_addr=BASE + PAGE, size=HUGE, page_size=HUGE)], "not whole pages"),
        ([element(offset=PAGE, size=HUGE, page_size=HUGE)], "not whole pages"),
        ([element(page_size=1)], "page size of 1 bytes"),
        ([element(page_size=16384)], "page size of 16384"),
        ([element(page_size=1 << 30)], "page size"),
        ([element(base_host_virt_addr=(1 << 64) - PAGE, size=2 * PAGE)], "beyond 64 bits"),
        ([element(offset=(1 << 64) - PAGE, size=2 * PAGE)], "beyond 64 bits"),
        ([element(), element(offset=PAGE)], "the same addresses"),
        ([element(size=3 * PAGE), element(base_host_virt_addr=BASE + PAGE)], "the same addresses"),
        ([element(size=2 * PAGE), element(base_host_virt_addr=BASE + HUGE)], "the same bytes"),
        (
            [
                element(),
                element(base_host_virt_addr=BASE + HUGE, offset=HUGE, size=HUGE, page_size=HUGE),
            ],
            "different page sizes",
        ),
    ],
)
def test_regions_that_cannot_be(elements: list[Any], match: str) -> None:
    refused(text_of(*elements), match)


def test_the_longest_text() -> None:
    padding = 1000 - len(V1_1)
    assert Handshake(1000).feed(V1_1[:-1] + b" " * padding + b"]") == parse(V1_1)
    with pytest.raises(PeerError, match="longer than 1000 bytes"):
        Handshake(1000).feed(V1_1[:-1] + b" " * (padding + 1) + b"]")
    handshake = Handshake(1000)
    assert handshake.feed(b'["' + b"x" * 998) is None
    with pytest.raises(PeerError, match="longer than 1000"):
        handshake.feed(b"x")


def test_small_pieces_cost_little() -> None:
    """Half a MiB byte by byte: whoever starts at the beginning each time needs hours."""
    text = text_of(*(element(base_host_virt_addr=BASE + n * PAGE, offset=n * PAGE)
                     for n in range(4000)))  # fmt: skip
    text = text[:-1] + b',"' + b"\\\\" * 50_000 + b'"]'
    handshake = Handshake()
    started = time.process_time()
    for at in range(len(text) - 1):
        assert handshake.feed(text[at : at + 1]) is None
    with pytest.raises(PeerError, match="but a str"):
        handshake.feed(text[-1:])
    assert handshake.received == len(text) > 450_000
    assert time.process_time() - started < 30


# Model: what is made from known regions is read as these regions.

versions = st.sampled_from([("page_size",), ("page_size_kib",), ("page_size", "page_size_kib"), ()])


@st.composite
def handshakes(draw: st.DrawFn) -> tuple[bytes, tuple[GuestRegion, ...]]:
    fields = draw(versions)
    page = draw(st.sampled_from([PAGE, HUGE])) if fields else PAGE
    regions, address, offset = [], draw(st.integers(1, 1 << 20)) * page, 0
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, 1000)) * page
        regions.append(GuestRegion(address, size, offset, page))
        address += size + draw(st.integers(0, 3)) * page
        offset += size + draw(st.integers(0, 3)) * page
    junk = st.dictionaries(
        st.text(max_size=8).filter(lambda name: name not in element()),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=2),
            max_leaves=3,
        ),
        max_size=2,
    )
    elements = [
        {
            "base_host_virt_addr": region.address,
            "size": region.size,
            "offset": region.offset,
            **dict.fromkeys(fields, page),
            **draw(junk),
        }
        for region in draw(st.permutations(regions))
    ]
    value: Any = elements
    if draw(st.booleans()):
        value = {"mappings": elements, "version": 1}
    indent, ascii_only = draw(st.sampled_from([None, 1])), draw(st.booleans())
    return json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode(), tuple(regions)


def fed(text: bytes, cuts: list[int]) -> tuple[GuestRegion, ...] | str | None:
    """What becomes of a text that is cut at these places. A peer that goes on after the end has
    said something that does not belong there, whether or not anybody reads it."""
    handshake = Handshake()
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    try:
        for start, end in pairwise(places):
            found = handshake.feed(text[start:end])
            if found is not None:
                return "refused" if text[end:].strip() else found
    except PeerError:
        return "refused"
    return None


@given(handshakes(), st.lists(st.integers(0, 10_000), max_size=8))
def test_regions_are_read_as_they_were_written(
    made: tuple[bytes, tuple[GuestRegion, ...]], cuts: list[int]
) -> None:
    text, regions = made
    assert fed(text, cuts) == regions
    assert Handshake().feed(text[:-1]) is None


@given(
    st.sampled_from(WRITTEN),
    st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=3)), min_size=1, max_size=4),
    st.lists(st.integers(0, 400), max_size=4),
)
@example(V1_1, [(0, b"")], [])
def test_damaged_text_is_refused_or_makes_sense(
    text: bytes, damage: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    for place, instead in damage:
        place %= len(text) or 1
        text = text[:place] + instead + text[place + 1 :]
    check_any(text, cuts)


@given(st.binary(max_size=200), st.lists(st.integers(0, 400), max_size=4))
def test_any_bytes(text: bytes, cuts: list[int]) -> None:
    check_any(text, cuts)
    check_any(b"[" + text + b"]", cuts)


def check_any(text: bytes, cuts: list[int]) -> None:
    """However it is cut the verdict is the same, and nothing but a PeerError is raised."""
    whole = fed(text, [])
    assert fed(text, cuts) == whole
    for region in whole or ():
        if isinstance(region, GuestRegion):
            assert region.size > 0
            assert region.page_size in (PAGE, HUGE)
            assert not (region.address | region.size | region.offset) % region.page_size
            assert region.address + region.size <= 1 << 64


# ------------------------------------------------------------------- one connection


def descriptors() -> int:
    """How many are open; but for /dev/null, which uvloop keeps after starting a process."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}") != os.devnull
    return count


async def turns(condition: Callable[[], Any]) -> None:
    """Until it holds, which takes a few turns of the loop."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0)


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


@asynccontextmanager
async def serving(tmp_path: Path, source: Any = DATA, **options: Any) -> AsyncIterator[Server]:
    """A server, which leaves no descriptor behind."""
    # What loops keep for subprocesses, once they have had one, is not the server's.
    await (await asyncio.create_subprocess_exec("true")).wait()
    before = descriptors()
    dialect = options.pop("dialect", "firecracker")
    async with serve.listen(tmp_path / "s", source=source, dialect=dialect, **options) as server:
        yield server
    await until(lambda: descriptors() <= before, "the descriptors to be closed")


@dataclass
class Memory:
    """Memory of this process that can be handed over: it is touched without the GIL."""

    memory: mmap.mmap
    uffd: Userfaultfd

    def text(self, **fields: Any) -> bytes:
        known = {"base_host_virt_addr": address_of(self.memory), "size": len(self.memory)}
        return text_of(element(**{**known, **fields}))

    async def is_served(self, page: int) -> bool:
        """Whether a page's bytes come, which nobody has touched before."""
        loop, found = asyncio.get_running_loop(), asyncio.Queue[bytes]()
        start, known = page * PAGE, DATA[page * PAGE : (page + 1) * PAGE]

        def touch() -> None:
            with memoryview(self.memory) as view, view[start : start + PAGE] as part:
                digest = hashlib.sha256(part).digest()
            loop.call_soon_threadsafe(found.put_nowait, digest)

        # Of the executor's threads the loop's end would wait for one that is not served.
        threading.Thread(target=touch, daemon=True).start()
        async with asyncio.timeout(10):
            return await found.get() == hashlib.sha256(known).digest()


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with Userfaultfd(Feature.EVENT_REMOVE, user_mode_only=None) as uffd:
        uffd.register(address_of(made), SIZE, Mode.MISSING)
        yield Memory(made, uffd)
    made.close()


def connected(tmp_path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(tmp_path / "s"))
    return connection


async def hung_up(connection: socket.socket) -> bool:
    """Waits until the server closes the connection; False if it said something."""
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        try:
            return not await loop.sock_recv(connection, 100)
        except ConnectionResetError:  # it had not read everything
            return True


async def test_a_handshake_is_served(tmp_path: Path, memory: Memory) -> None:
    async with serving(tmp_path) as server:
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [memory.text()], [memory.uffd.fileno()])
            assert await memory.is_served(3)
            (client,) = server.clients
            (served,) = client.memories
            assert [(area.length, area.offset) for area in served.areas] == [(SIZE, 0)]
            # Nobody reads an answer, so there is none.
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
        assert await memory.is_served(400)
        assert server.refused == 0


async def test_split_anywhere_with_the_descriptor_anywhere(tmp_path: Path, memory: Memory) -> None:
    """Each split of the text, and the descriptor with either part."""
    text, fds = memory.text(page_size=None), [memory.uffd.fileno()]
    async with serving(tmp_path) as server, AsyncExitStack() as stack:
        for split in range(1, len(text)):
            for first in (True, False):
                connection = stack.enter_context(connected(tmp_path))
                before = served(server)
                parts = text[:split], text[split:]
                socket.send_fds(connection, [parts[0]], fds if first else [])
                # So that these are two reads and not one.
                await turns(lambda connection=connection: not _unread(connection))
                socket.send_fds(connection, [parts[1]], [] if first else fds)
                await turns(lambda before=before: served(server) > before or server.refused)
                assert not server.refused
        assert await memory.is_served(7)


def served(server: Server) -> int:
    return sum(len(client.memories) for client in server.clients)


def _unread(connection: socket.socket) -> int:
    """Bytes that we sent and the server has not read (SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


async def test_hanging_up_at_each_byte(tmp_path: Path, memory: Memory) -> None:
    text = memory.text()
    async with serving(tmp_path) as server:
        before = descriptors()
        for length in range(len(text)):
            with connected(tmp_path) as connection:
                if length:
                    socket.send_fds(connection, [text[:length]], [memory.uffd.fileno()])
            await turns(lambda length=length: server.refused > length)
            assert not server.clients
            assert descriptors() == before


@pytest.mark.parametrize("version", ["1.1", "1.12"])
async def test_the_connection_may_end_or_not(tmp_path: Path, memory: Memory, version: str) -> None:
    """Up to 1.11 the VMM closes it at once, perhaps before we have read anything."""
    async with serving(tmp_path) as server:
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [memory.text()], [memory.uffd.fileno()])
            if version == "1.1":
                connection.close()
            assert await memory.is_served(5)
            connection.close()
            assert await memory.is_served(300)
            assert len(server.clients) == 1


@pytest.mark.parametrize(
    ("kinds", "match"),
    [
        ("", "none"),
        ("pipe", "something else; one has"),
        ("memfd", "memfd; one has"),
        ("pipe pipe", "2 descriptors"),
        ("uffd memfd", "2 descriptors"),
        ("uffd uffd", "2 descriptors"),
        ("pipe " * 253, "253 descriptors"),
    ],
    ids=lambda value: value[:20].strip(),
)
async def test_wrong_descriptors(
    tmp_path: Path, memory: Memory, caplog: pytest.LogCaptureFixture, kinds: str, match: str
) -> None:
    await _refused_descriptors(tmp_path, memory, caplog, kinds, match, "firecracker")


@pytest.mark.parametrize(
    ("kinds", "match"),
    [
        ("memfd", "memfd; one has"),
        ("uffd uffd", "userfaultfd, userfaultfd; one has"),
        ("uffd pipe", "no memfd: userfaultfd, something else"),
        ("memfd memfd", "memfd, memfd; one has"),
        ("uffd memfd memfd", "3 descriptors"),
    ],
)
async def test_wrong_descriptors_with_a_memfd(
    tmp_path: Path, memory: Memory, caplog: pytest.LogCaptureFixture, kinds: str, match: str
) -> None:
    dialect = FirecrackerDialect(memfd=True)
    await _refused_descriptors(tmp_path, memory, caplog, kinds, match, dialect)


async def _refused_descriptors(
    tmp_path: Path,
    memory: Memory,
    caplog: pytest.LogCaptureFixture,
    kinds: str,
    match: str,
    dialect: Any,
) -> None:
    async with serving(tmp_path, dialect=dialect) as server:
        with opened(memory, kinds) as fds, connected(tmp_path) as connection:
            before = descriptors()
            socket.send_fds(connection, [memory.text()], fds)
            assert await hung_up(connection)
            assert descriptors() <= before
        assert server.refused == 1
        assert match in caplog.text


@pytest.mark.parametrize("memfd", [False, True])
async def test_a_descriptor_with_each_piece(
    tmp_path: Path, memory: Memory, caplog: pytest.LogCaptureFixture, memfd: bool
) -> None:
    """They are counted over all pieces; nobody waits for the end of the text."""
    text, fds = memory.text(), [memory.uffd.fileno()]
    async with serving(tmp_path, dialect=FirecrackerDialect(memfd=memfd)):
        with connected(tmp_path) as connection:
            for at in range(2 + memfd):
                await turns(lambda: not _unread(connection))
                socket.send_fds(connection, [text[at : at + 1]], fds)
            assert await hung_up(connection)
        assert "sent 1 descriptors, where none can be" in caplog.text


@contextlib.contextmanager
def opened(memory: Memory, kinds: str) -> Iterator[list[int]]:
    pipe = os.pipe()
    memfd = os.memfd_create("guest")
    known = {"pipe": pipe[0], "memfd": memfd, "uffd": memory.uffd.fileno()}
    yield [known[kind] for kind in kinds.split()]
    for fd in (*pipe, memfd):
        os.close(fd)


@pytest.mark.parametrize("kinds", ["uffd", "uffd memfd", "memfd uffd"])
async def test_a_memfd_beside_it(tmp_path: Path, memory: Memory, kinds: str) -> None:
    async with serving(tmp_path, dialect=FirecrackerDialect(memfd=True)):
        with opened(memory, kinds) as fds, connected(tmp_path) as connection:
            before = descriptors()
            socket.send_fds(connection, [memory.text()], fds)
            assert await memory.is_served(1)
            # What the server keeps: connection, pidfd, userfaultfd.
            assert descriptors() == before + 3


async def test_an_acknowledgement(tmp_path: Path, memory: Memory) -> None:
    async with serving(tmp_path, dialect=FirecrackerDialect(ack=True)) as server:
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [memory.text()], [memory.uffd.fileno()])
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(10):
                assert await loop.sock_recv(connection, 100) == b"\x01"
            (client,) = server.clients
            assert len(client.memories) == 1
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [memory.text(size=SIZE + PAGE)], [memory.uffd.fileno()])
            assert await hung_up(connection)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"offset": PAGE}, "ends behind its object"),
        ({"size": SIZE + PAGE}, "ends behind its object"),
        ({"offset": (1 << 63)}, "ends behind its object"),
        ({"size": 1 << 46}, "bytes of areas"),
        ({"size": 1 << 62}, "past the user address space"),
        ({"base_host_virt_addr": (1 << 47) - PAGE}, "past the user address space"),
        ({"base_host_virt_addr": (1 << 64) - PAGE}, "beyond 64 bits"),
        ({"page_size": HUGE, "base_host_virt_addr": HUGE, "size": HUGE}, "page of its object"),
    ],
    ids=str,
)
async def test_memory_that_cannot_be_served(
    tmp_path: Path,
    memory: Memory,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, int],
    match: str,
) -> None:
    text = text_of(element(**{"base_host_virt_addr": 1 << 30, "size": SIZE, **fields}))
    async with serving(tmp_path) as server:
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [text], [memory.uffd.fileno()])
            assert await hung_up(connection)
        assert server.refused == 1
        assert match in caplog.text


async def test_a_memory_file_that_lacks_a_byte(
    tmp_path: Path, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """What the guest had there is not known: zeros would be a guess."""
    (tmp_path / "short").write_bytes(DATA[:-1])
    async with serving(tmp_path, source=str(tmp_path / "short")) as server:
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [memory.text()], [memory.uffd.fileno()])
            assert await hung_up(connection)
        assert server.refused == 1
        assert "ends behind its object" in caplog.text


async def test_text_without_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is read up to the limit, and not kept longer than the connection."""
    async with serving(tmp_path) as server:
        with connected(tmp_path) as connection:
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(20):
                with pytest.raises(ConnectionError):
                    await loop.sock_sendall(connection, b"[" + b" " * (2 << 20))
        assert server.refused == 1
        assert f"longer than {1 << 20} bytes" in caplog.text


async def test_a_limit_of_ones_own(
    tmp_path: Path, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError):
        FirecrackerDialect(limit=1)
    text = memory.text()
    async with serving(tmp_path, dialect=FirecrackerDialect(limit=len(text))) as server:
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [b" " + text], [memory.uffd.fileno()])
            assert await hung_up(connection)
        assert f"longer than {len(text)} bytes" in caplog.text
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [text], [memory.uffd.fileno()])
            assert await memory.is_served(0)
        assert server.refused == 1


async def test_a_long_text_does_not_stop_the_loop(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MiB of brackets takes a second or so to be understood, of which others notice nothing."""
    feed, longest = Handshake.feed, 0

    def watched(self: Handshake, data: bytes) -> tuple[GuestRegion, ...] | None:
        nonlocal longest
        if threading.current_thread() is threading.main_thread():
            longest = max(longest, self.received + len(data))
        return feed(self, data)

    monkeypatch.setattr(Handshake, "feed", watched)
    text = b"[" + b"[[[[[[[[[[]]]]]]]]]]," * 49_000
    fields = ",".join(f'"{n}":{n}' for n in range(50_000))
    long = memory.text().replace(b'"offset"', fields.encode() + b',"offset"')
    async with serving(tmp_path) as server:
        with connected(tmp_path) as hostile, connected(tmp_path) as good:
            hostile.setblocking(False)
            good.setblocking(False)
            loop = asyncio.get_running_loop()
            sending = asyncio.create_task(loop.sock_sendall(hostile, text + b"1]"))
            socket.send_fds(good, [long[:10]], [memory.uffd.fileno()])
            await loop.sock_sendall(good, long[10:])  # long, but right
            assert await memory.is_served(44)
            await asyncio.gather(sending, return_exceptions=True)
            assert await hung_up(hostile)
        assert server.refused == 1
        assert 0 < longest <= 64 * 1024


async def test_slow_senders_are_dropped(
    tmp_path: Path, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, limits=Limits(handshake=0.3)) as server:
        before = descriptors()
        text, fds = memory.text(), [memory.uffd.fileno()]
        silent, stuck, drop_by_drop = (connected(tmp_path) for _ in range(3))
        with silent, stuck, drop_by_drop, connected(tmp_path) as good:
            socket.send_fds(stuck, [text[:-1]], fds)
            socket.send_fds(good, [text], fds)
            socket.send_fds(drop_by_drop, [b" "], fds)

            async def dribble() -> None:
                drop_by_drop.setblocking(False)
                with contextlib.suppress(ConnectionError):
                    while True:
                        await asyncio.get_running_loop().sock_sendall(drop_by_drop, b" ")
                        await asyncio.sleep(0.01)

            dribbling = asyncio.create_task(dribble())
            assert await memory.is_served(11)  # others do not wait for them
            assert await asyncio.gather(hung_up(silent), hung_up(stuck)) == [True, True]
            async with asyncio.timeout(10):
                await dribbling
            assert await memory.is_served(211)
            assert len(server.clients) == 1
        assert server.refused == 3
        assert caplog.text.count("took too long") == 3
        assert descriptors() == before + 3


async def test_no_source(tmp_path: Path, memory: Memory, loop_errors: list[dict[str, Any]]) -> None:
    """A server that was not told what it serves says so, and serves nobody zeros."""
    async with serving(tmp_path, None) as server:
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [memory.text()], [memory.uffd.fileno()])
            assert await hung_up(connection)
        assert server.refused == 1
    (context,) = loop_errors
    assert isinstance(context["exception"], UsageError)
    assert "which memory file" in str(context["exception"])


async def test_a_source_for_each_client(tmp_path: Path, memory: Memory) -> None:
    async def choose(client: serve.Client) -> None:
        client.source = await client.store_for(DATA)

    async with serving(tmp_path, None, on_client=choose):
        with connected(tmp_path) as connection:
            socket.send_fds(connection, [memory.text()], [memory.uffd.fileno()])
            assert await memory.is_served(12)


# ------------------------------------------------------------- clients as programs


class Vmm:
    """`tests/firecracker_client.py`, running."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def tell(self, *command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    async def answer(self) -> Any:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            return json.loads(await self.process.stdout.readline())

    async def ask(self, *command: Any) -> Any:
        """Pages that were not as they should be."""
        self.tell(*command)
        return await self.answer()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()  # uvloop does not


@asynccontextmanager
async def vmm(
    tmp_path: Path,
    version: str = "1.12",
    regions: Sequence[tuple[int, int]] = ((SIZE, 0),),
    *,
    page_size: int = PAGE,
    pieces: int = 0,
) -> AsyncIterator[Vmm]:
    spec = {
        "socket": str(tmp_path / "s"),
        "version": version,
        "regions": regions,
        "page_size": page_size,
        "pieces": pieces,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "tests" / "firecracker_client.py"),
        json.dumps(spec),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment(),
    )
    made = Vmm(process)
    try:
        assert await made.answer() == {"ready": True}
        yield made
    finally:
        await made.kill()


async def exercise(one: Vmm, seed: int = 1) -> None:
    """Everything that a guest does to its memory, each page checked by the client."""
    assert await one.ask("touch", 60, seed, 3) == []
    assert await one.ask("write", 20, seed + 1) == []
    assert await one.ask("drop", 12, seed + 2) == []
    assert await one.ask("touch", 60, seed + 3, 2) == []
    assert await one.ask("race", 120, seed + 4) == []
    assert await one.ask("verify") == []


#: Two regions, swapped in the file, and a gap between them there.
REGIONS = ((SIZE // 2 - 8 * PAGE, SIZE // 2 + 8 * PAGE), (SIZE // 2, 0))
VERSIONS = ["1.1", "1.7", "1.12", "e2b", "stratovirt", "hypeman"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_each_version(tmp_path: Path, version: str) -> None:
    dialect = FirecrackerDialect(ack=version == "stratovirt", memfd=version == "e2b")
    async with serving(tmp_path, dialect=dialect) as server:
        async with vmm(tmp_path, version, REGIONS) as one:
            await exercise(one)
            stats = server.stats
            assert stats.events > 0
            assert stats.zero_pages > 0
            assert stats.poisoned_pages == 0
            assert stats.installed_bytes <= SIZE + 200 * PAGE
        await until(lambda: not server.clients, "the end to be noticed")
        assert server.refused == 0


async def test_a_source_that_takes_its_time(tmp_path: Path) -> None:
    """So that bytes are under way when pages are dropped."""

    async def read(offset: int, length: int) -> bytes:
        await asyncio.sleep(0.002)
        return DATA[offset : offset + length]

    source = FunctionSource(read, size=SIZE)
    async with (
        serving(tmp_path, source, block_size=PAGE, keep=0, readahead=64 * PAGE),
        vmm(tmp_path, regions=REGIONS) as one,
    ):
        await exercise(one)


@pytest.mark.parametrize("pieces", [1, 7])
async def test_a_client_that_sends_pieces(tmp_path: Path, pieces: int) -> None:
    async with serving(tmp_path), vmm(tmp_path, pieces=pieces) as one:
        assert await one.ask("touch", 50, 1, 2) == []
        assert await one.ask("verify") == []


@pytest.mark.hugetlb
@pytest.mark.parametrize("version", ["1.7", "1.12"])
async def test_huge_pages(tmp_path: Path, version: str) -> None:
    size = 6 * HUGE
    with huge_pages(8):
        async with serving(tmp_path, content(size), block_size=HUGE) as server:
            regions = ((4 * HUGE, 2 * HUGE), (2 * HUGE, 0))
            async with vmm(tmp_path, version, regions, page_size=HUGE) as one:
                assert await one.ask("touch", 3, 1, 2) == []
                assert await one.ask("drop", 1, 2) == []
                assert await one.ask("write", 2, 3) == []
                assert await one.ask("verify") == []
                assert server.stats.events == 1
                assert server.stats.poisoned_pages == 0
            await until(lambda: not server.clients, "the end to be noticed")


async def test_many_clients_of_one_snapshot(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, AsyncExitStack() as stack:
        several = [
            await stack.enter_async_context(vmm(tmp_path, version))
            for version in ("1.1", "1.7", "1.12", "hypeman")
        ]
        await asyncio.gather(*(exercise(one, 10 * n) for n, one in enumerate(several)))
        assert len(server.clients) == 4
        await several[0].kill()
        await until(lambda: len(server.clients) == 3, "one end to be noticed")
        assert await several[1].ask("verify") == []


async def test_strangers_disturb_nobody(tmp_path: Path, memory: Memory) -> None:
    """While a client works, others send whatever is wrong."""
    text, fds = memory.text(), [memory.uffd.fileno()]
    wrong: list[tuple[bytes, list[int]]] = [
        (text, []),
        (text, [0]),
        (text, fds * 2),
        (text, fds * 200),
        (text[:20], fds),
        (b"", []),
        (b"\0" * 5000, fds),
        (b"[" * 5000, fds),
        (text.replace(b"4096", b"4095"), fds),
        (text + text, fds),
    ]
    async with serving(tmp_path) as server, vmm(tmp_path) as one:
        before, working = descriptors(), asyncio.create_task(exercise(one))
        count = 0
        while not working.done() or count < 100:
            data, some = wrong[count % len(wrong)]
            with connected(tmp_path) as connection:
                if data:
                    with contextlib.suppress(ConnectionError):
                        socket.send_fds(connection, [data], some)
            count += 1
            await asyncio.sleep(0)
        await working
        await until(lambda: server.refused == count, "all strangers to be turned away")
        assert len(server.clients) == 1
        assert descriptors() == before


async def test_killed_while_it_waits(tmp_path: Path) -> None:
    gate = Gate(DATA, is_open=False)
    source = FunctionSource(gate.read, size=SIZE)
    async with serving(tmp_path, source) as server:
        before = descriptors()
        async with vmm(tmp_path) as one:
            one.tell("touch", 1, 1, 1)
            await asyncio.to_thread(gate.wait)
        await until(lambda: not server.clients, "the end to be noticed")
        gate.open()
        assert descriptors() == before
        async with vmm(tmp_path, "1.1") as another:
            assert await another.ask("touch", 30, 1, 1) == []


async def test_a_failing_source_kills(tmp_path: Path) -> None:
    """What Firecracker's documents ask of a handler that cannot go on: SIGKILL is reliable."""

    async def read(offset: int, length: int) -> bytes:
        raise FileNotFoundError("the snapshot is gone")

    source = FunctionSource(read, size=SIZE)
    async with (
        serving(tmp_path, source, deadline=0.05, on_failure="kill"),
        vmm(tmp_path) as one,
    ):
        one.tell("touch", 1, 1, 1)
        async with asyncio.timeout(10):
            assert await one.process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("version", ["1.1", "1.12"])
async def test_a_new_server_takes_over(tmp_path: Path, version: str) -> None:
    """A microVM cannot connect again, so all that is known of it goes to the next server."""
    path = tmp_path / "s"
    async with serving(tmp_path) as old, AsyncExitStack() as stack:
        one = await stack.enter_async_context(vmm(tmp_path, version, REGIONS))
        assert await one.ask("touch", 60, 1, 2) == []
        assert await one.ask("drop", 12, 2) == []
        new = serve.listen(path, source=DATA, dialect="firecracker", take_over=True)
        async with new:
            await old.aclose()
            assert await one.ask("race", 120, 3) == []
            assert await one.ask("verify") == []
            assert len(new.clients) == 1
            await one.kill()
            await until(lambda: not new.clients, "the end to be noticed")
