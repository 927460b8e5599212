"""CRIU's page server as a source: both layouts, short answers, lost connections, lies."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from aiouffd.errors import ClosedError, SourceError, SourceTimeoutError, UsageError
from aiouffd.serve.criu import CriuServer, PageServer, PageServerError, PageServerSource
from aiouffd.serve.criu.page_server_core import Exchange, PageRequest
from aiouffd.sources.compose import RetrySource
from tests.criu import images as written
from tests.criu.driver import check_all, descriptors, restorer, task_of
from tests.criu.images import LAZY, PAGE, Pages, Task, pages_bytes
from tests.criu.page_server import FakePageServer, Trick, pack, pages_of

BASE = 0x30_0000_0000
HEADS = pytest.mark.parametrize("head", [32, 24])


def at(page: int) -> int:
    return BASE + page * PAGE


RUNS = [Pages(at(0), 40, tag=1), Pages(at(50), 10, tag=1), Pages(at(100), 600, tag=1)]
PAGES = pages_of(7, RUNS)
RANGES = [(run.address, run.count * PAGE) for run in RUNS]


def source_of(server: FakePageServer, pid: int = 7, **options: Any) -> PageServerSource:
    options.setdefault("head", server.head)
    return PageServerSource(PageServer(server.address, **options), pid, RANGES)


class Opened:
    """A source, opened, and closed at the end."""

    def __init__(self, source: PageServerSource) -> None:
        self.source = source

    async def __aenter__(self) -> PageServerSource:
        await self.source.open()
        return self.source

    async def __aexit__(self, *exc: object) -> None:
        await self.source.aclose()


# -------------------------------------------------------------------- reading


@HEADS
@pytest.mark.parametrize("short", [1 << 20, 3, 1])
@pytest.mark.parametrize("crumbs", [0, 1000])
async def test_pages_are_read(head: int, short: int, crumbs: int) -> None:
    async with FakePageServer(PAGES, head=head, short=short, crumbs=crumbs) as server:
        async with Opened(source_of(server)) as source:
            assert source.size == at(700)
            assert await source.read(at(3), PAGE) == pages_bytes(1, at(3), 1)
            assert await source.read(at(0), 16 * PAGE) == pages_bytes(1, at(0), 16)
            assert await source.read(at(3) + 5, 100) == pages_bytes(1, at(3), 1)[5:105]
            assert await source.read(at(3) + 5, PAGE) == pages_bytes(1, at(3), 2)[5 : PAGE + 5]
            assert await source.read(at(3), 0) == b""
        assert server.connections == 1
        assert server.goodbyes == 1
    assert all(ask.pid == 7 and ask.address % PAGE == 0 for ask in server.asked)


async def test_what_the_server_has_not_is_not_asked_for() -> None:
    async with FakePageServer(PAGES) as server, Opened(source_of(server)) as source:
        data = await source.read(at(30), 80 * PAGE)
        assert data == b"".join(
            [
                pages_bytes(1, at(30), 10),
                bytes(10 * PAGE),
                pages_bytes(1, at(50), 10),
                bytes(40 * PAGE),
                pages_bytes(1, at(100), 10),
            ]
        )
        asked = sorted((ask.address, ask.pages) for ask in server.asked)
        assert asked == [(at(30), 10), (at(50), 10), (at(100), 10)]
        assert await source.read(at(60), 40 * PAGE) == bytes(40 * PAGE)
        assert await source.read(at(45) + 7, 100) == bytes(100)
        assert len(server.asked) == 3
        assert await source.holes(at(30), 80 * PAGE) == [
            (at(40), 10 * PAGE),
            (at(60), 40 * PAGE),
        ]
        assert await source.holes(0, at(1)) == [(0, at(0))]
        assert await source.holes(at(1), PAGE) == []
        with pytest.raises(UsageError):
            await source.read(at(700), 1)


async def test_long_reads_are_cut_and_go_together() -> None:
    async with FakePageServer(PAGES) as server, Opened(source_of(server)) as source:
        assert await source.read(at(100), 600 * PAGE) == pages_bytes(1, at(100), 600)
        assert len(server.asked) == 10
        assert max(ask.pages for ask in server.asked) == 64


async def test_many_reads_at_a_time() -> None:
    async with FakePageServer(PAGES, short=5) as server, Opened(source_of(server)) as source:
        reads = [
            source.read(at(page), count * PAGE) for page in range(100, 180) for count in (1, 9)
        ]
        wanted = [pages_bytes(1, at(page), count) for page in range(100, 180) for count in (1, 9)]
        assert await asyncio.gather(*reads) == wanted
        assert server.connections == 1


async def test_who_is_in_a_hurry_goes_first() -> None:
    """Behind what is under way, but before what waits to be asked for."""
    async with FakePageServer(PAGES) as server, Opened(source_of(server)) as source:
        server.gate.clear()
        long = asyncio.ensure_future(source.read(at(100), 600 * PAGE))
        await server.has_asked(1)
        await asyncio.sleep(0)
        short = asyncio.ensure_future(source.read(at(5), PAGE))
        await asyncio.sleep(0)
        server.gate.set()
        assert await short == pages_bytes(1, at(5), 1)
        assert await long == pages_bytes(1, at(100), 600)
        assert [ask.address for ask in server.asked].index(at(5)) == 8


async def test_tasks_share_a_connection() -> None:
    pages = {**PAGES, **pages_of(8, [Pages(at(0), 4, tag=2)])}
    async with FakePageServer(pages, once=True) as server:
        shared = PageServer(server.address)
        one = PageServerSource(shared, 7, RANGES)
        two = PageServerSource(shared, 8, [(at(0), 4 * PAGE)])
        async with Opened(one), Opened(two):
            data = await asyncio.gather(
                *(source.read(at(0), 2 * PAGE) for source in (one, two) * 5)
            )
            assert data == [pages_bytes(1, at(0), 2), pages_bytes(2, at(0), 2)] * 5
            await one.aclose()
            with pytest.raises(ClosedError):
                await one.read(at(0), PAGE)
            assert await two.read(at(1), PAGE) == pages_bytes(2, at(1), 1)
            assert not server.goodbyes
        assert server.goodbyes == 1
        assert server.connections == 1


async def test_a_clone_has_its_own_connection() -> None:
    async with FakePageServer(PAGES) as server, Opened(source_of(server)) as source:
        async with Opened(source.clone()) as other:
            assert await other.read(at(50), PAGE) == pages_bytes(1, at(50), 1)
            assert await other.holes(at(0), 100 * PAGE) == await source.holes(at(0), 100 * PAGE)
        assert await source.read(at(50), PAGE) == pages_bytes(1, at(50), 1)
        assert server.connections == 2


async def test_reading_into_a_buffer_that_was_given_up() -> None:
    """A cancelled read: its answer comes, and goes nowhere."""
    async with FakePageServer(PAGES) as server, Opened(source_of(server)) as source:
        server.gate.clear()
        buffer = bytearray(b"x" * 8 * PAGE)
        reading = asyncio.ensure_future(source.read_into(at(0), memoryview(buffer)))
        await server.has_asked(1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        server.gate.set()
        assert await source.read(at(20), PAGE) == pages_bytes(1, at(20), 1)
        assert buffer == b"x" * 8 * PAGE
        assert server.connections == 1


async def test_tls() -> None:
    authority = trustme.CA()
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(theirs)
    authority.configure_trust(theirs)
    theirs.verify_mode = ssl.CERT_REQUIRED  # as CRIU's does
    ours = ssl.create_default_context()
    authority.configure_trust(ours)
    authority.issue_cert("client.example").configure_cert(ours)
    async with FakePageServer(PAGES, ssl=theirs, short=7, once=True) as server:
        async with Opened(source_of(server, tls=ours)) as source:
            assert await source.read(at(100), 600 * PAGE) == pages_bytes(1, at(100), 600)
        assert server.goodbyes == 1
    async with FakePageServer(PAGES, ssl=theirs) as server:
        with pytest.raises(SourceError, match="certificate is not valid") as caught:
            await source_of(server, tls=ssl.create_default_context()).open()
        assert not caught.value.transient


# ------------------------------------------------------------------ lost and found


async def test_a_lost_connection_is_made_again() -> None:
    async with FakePageServer(PAGES) as server, Opened(source_of(server)) as source:
        assert await source.read(at(0), PAGE) == pages_bytes(1, at(0), 1)
        server.gate.clear()
        reads = [asyncio.ensure_future(source.read(at(page), PAGE)) for page in range(3)]
        await server.has_asked(2)
        server.drop()
        for read in reads:
            with pytest.raises(SourceError) as caught:
                await read
            assert caught.value.transient
        server.gate.set()
        assert await source.read(at(1), PAGE) == pages_bytes(1, at(1), 1)
        assert server.connections == 2


@HEADS
@pytest.mark.parametrize("cut", [0, 1, 23, 31, 40, -1, -PAGE, -2 * PAGE - 1])
async def test_cut_off_within_an_answer(head: int, cut: int) -> None:
    """Whoever retries gets it all, over another connection."""
    async with FakePageServer(PAGES, head=head) as server:
        server.tricks = [None, Trick(cut=cut), None]
        async with Opened(source_of(server)) as source:
            again = RetrySource(source, first=0.001)
            for page in range(3):
                assert await again.read(at(page), 3 * PAGE) == pages_bytes(1, at(page), 3)
            assert again.retries == 1
        assert server.connections == 2


async def test_pages_that_the_server_lacks() -> None:
    """It hangs up; the second time at the same place that is no accident."""
    async with FakePageServer({}) as server, Opened(source_of(server)) as source:
        with pytest.raises(
            SourceError, match=r"hung up when it was asked for .*at 0x3000005000"
        ) as one:
            await source.read(at(5), PAGE)
        with pytest.raises(SourceError, match="may not have these pages") as two:
            await source.read(at(5), PAGE)
        assert [one.value.transient, two.value.transient] == [True, False]


@HEADS
async def test_the_other_layout(head: int) -> None:
    async with FakePageServer(PAGES, head=head) as server:
        source = source_of(server, head=56 - head, timeout=0.2)
        await source.open()
        with pytest.raises(SourceError) as caught:
            await source.read(at(5), PAGE)
        if head == 32:
            # It waits for more.
            assert isinstance(caught.value, SourceTimeoutError)
        else:
            assert f"another length than {56 - head} bytes" in str(caught.value)
        await source.aclose()


async def test_nobody_listens() -> None:
    async with FakePageServer(PAGES) as server:
        address = server.address
    source = PageServerSource(PageServer(address), 7, RANGES)
    with pytest.raises(SourceError, match="cannot connect") as caught:
        await source.open()
    assert caught.value.transient
    await source.aclose()


async def test_one_connection_is_all_that_criu_takes() -> None:
    async with FakePageServer(PAGES, once=True) as server, Opened(source_of(server)) as source:
        assert await source.read(at(0), PAGE)
        server.drop()
        for _ in range(2):
            with pytest.raises(SourceError) as caught:
                await source.read(at(0), PAGE)
            assert caught.value.transient


async def test_a_silent_server() -> None:
    async with FakePageServer(PAGES) as server:
        server.tricks = [Trick(silent=True)]
        async with Opened(source_of(server, timeout=0.1)) as source:
            with pytest.raises(SourceTimeoutError) as caught:
                await source.read(at(0), PAGE)
            assert caught.value.transient
            assert await source.read(at(0), PAGE) == pages_bytes(1, at(0), 1)


async def test_silence_is_no_matter_while_nothing_is_owed() -> None:
    async with FakePageServer(PAGES) as server, Opened(source_of(server, timeout=0.05)) as source:
        await source.read(at(0), PAGE)
        await asyncio.sleep(0.12)  # longer than the timeout
        await source.read(at(1), PAGE)
        assert server.connections == 1


async def test_closing_under_way() -> None:
    async with FakePageServer(PAGES) as server, Opened(source_of(server)) as source:
        server.gate.clear()
        reads = [asyncio.ensure_future(source.read(at(page), 2 * PAGE)) for page in range(100, 110)]
        await server.has_asked(1)
        closing = asyncio.ensure_future(source.aclose())
        for read in reads:
            with pytest.raises(ClosedError):
                await read
        server.gate.set()
        await closing
        assert server.goodbyes == 1
        with pytest.raises(ClosedError):
            await source.open()


async def test_closing_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiouffd.serve.criu.page_server.GOODBYE", 0.05)
    async with FakePageServer(PAGES) as server:
        server.gate.clear()
        source = source_of(server)
        await source.open()
        reading = asyncio.ensure_future(source.read(at(0), PAGE))
        await server.has_asked(1)
        async with asyncio.timeout(5):
            await source.aclose()
        with pytest.raises(ClosedError):
            await reading


async def test_closing_while_it_connects() -> None:
    async with FakePageServer(PAGES) as server:
        source = source_of(server)
        opening = asyncio.ensure_future(source.open())
        await asyncio.sleep(0)
        await source._server.aclose()
        with pytest.raises(ClosedError):
            await opening


async def test_nothing_is_left_behind() -> None:
    async with FakePageServer(PAGES) as server:
        before = descriptors()
        for _ in range(3):
            async with Opened(source_of(server)) as source:
                await source.read(at(0), PAGE)
                server.drop()
                with pytest.raises(SourceError):
                    await source.read(at(0), PAGE)
                await source.read(at(0), PAGE)
        await asyncio.sleep(0.01)  # the server's ends
        assert descriptors() == before


# ----------------------------------------------------------------------- lies

LIES = {
    "another command": (Trick(command=7 | 4 << 16), "command 0x40007"),
    "no pages": (Trick(command=6), "command 0x6"),
    "pages in the parent": (Trick(command=6 | 1 << 16), "command 0x10006"),
    "another address": (Trick(address=PAGE), "pages at 0x3000006000"),
    "another task": (Trick(pid=1), "of task 8"),
    "none": (Trick(pages=0), "0 pages"),
    "one too many": (Trick(pages=4), "4 pages"),
    "very many": (Trick(pages=(1 << 32) - 1), "4294967295 pages"),
    "noise": (Trick(instead=b"HTTP/1.1 400 Bad Request\r\n\r\n<html>"), "command 0x50545448"),
}


@HEADS
@pytest.mark.parametrize("lie", LIES)
async def test_lies(head: int, lie: str) -> None:
    trick, reason = LIES[lie]
    async with FakePageServer(PAGES, head=head) as server, Opened(source_of(server)) as source:
        server.tricks = [trick]
        with pytest.raises(PageServerError, match=reason) as caught:
            await source.read(at(5), 3 * PAGE)
        assert not caught.value.transient
        # Nothing else that such a connection says is believed; another one may be better.
        assert await source.read(at(5), 3 * PAGE) == pages_bytes(1, at(5), 3)
        assert server.connections == 2


def test_pages_that_nobody_asked_for() -> None:
    exchange = Exchange(24)
    with pytest.raises(PageServerError, match="nobody has asked"):
        feed(exchange, pack(24, 6 | 4 << 16, 1, at(0), 7))


def feed(exchange: Exchange, data: bytes, step: int = 1 << 20) -> list[PageRequest]:
    """Receive ``data``, at most ``step`` bytes at a time."""
    replied = []
    while data:
        buffer = exchange.get_buffer()
        assert len(buffer)
        count = min(len(buffer), len(data), step)
        buffer[:count] = data[:count]
        data = data[count:]
        replied += exchange.received(count)
    return replied


@given(data=st.binary(max_size=200), head=st.sampled_from([24, 32]), step=st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_noise(data: bytes, head: int, step: int) -> None:
    """A core that is fed anything asks for a buffer, or fails."""
    exchange = Exchange(head)
    request = PageRequest(7, at(0), memoryview(bytearray(PAGE)), lambda error: None)
    exchange.ask(request)
    try:
        feed(exchange, data, step)
    except PageServerError:
        return
    assert len(data) < head


@pytest.mark.parametrize("head", [24, 32])
@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
def test_the_core_with_answers_in_any_pieces(head: int, step: int) -> None:
    exchange = Exchange(head)
    buffers = [bytearray(count * PAGE) for count in (1, 3, 2)]
    asked = b""
    for number, buffer in enumerate(buffers):
        asked += exchange.ask(
            PageRequest(number, at(10 * number), memoryview(buffer), lambda error: None)
        )
    get = [pack(head, 7, len(b) // PAGE, at(10 * n), n) for n, b in enumerate(buffers)]
    assert asked == b"".join(get)
    # The second is answered in part.
    counts = [1, 2, 2]
    answers = [
        pack(head, 6 | 4 << 16, count, at(10 * n), n) + pages_bytes(n, at(10 * n), count)
        for n, count in enumerate(counts)
    ]
    replied = feed(exchange, b"".join(answers), step)
    assert [(request.pid, request.address, request.size) for request in replied] == [
        (0, at(1), 0),
        (1, at(12), PAGE),
        (2, at(22), 0),
    ]
    for n, (buffer, count) in enumerate(zip(buffers, counts, strict=True)):
        assert buffer[: count * PAGE] == pages_bytes(n, at(10 * n), count)
    assert exchange.close() == pack(head, 0x1023, 0, 0, 0)
    feed(exchange, struct.pack("<i", -5), step)
    assert exchange.status == -5


WRONG: dict[str, Callable[[], Any]] = {
    "no port": lambda: PageServer("host"),
    "no host": lambda: PageServer(":1"),
    "port 0": lambda: PageServer("host:0"),
    "port too large": lambda: PageServer("host:65536"),
    "port is no number": lambda: PageServer("host:http"),
    "layout": lambda: PageServer("host:1", head=28),
    "timeout": lambda: PageServer("host:1", timeout=0),
    "unaligned": lambda: PageServerSource(PageServer("host:1"), 1, [(5, PAGE)]),
    "half a page": lambda: PageServerSource(PageServer("host:1"), 1, [(0, 2048)]),
    "nothing": lambda: PageServerSource(PageServer("host:1"), 1, [(0, 0)]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    with pytest.raises(UsageError):
        WRONG[case]()


def test_addresses() -> None:
    assert repr(PageServer("[::1]:27")) == "<PageServer [::1]:27>"
    assert PageServer("[::1]:27")._host == "::1"


# ------------------------------------------------------------------- a whole restore


@pytest.mark.slow
@HEADS
async def test_a_restore_from_a_lazy_dump(tmp_path: Path, head: int) -> None:
    """Some pages are in the images, most are with the page server, which drops its connection."""
    tasks = [
        Task(
            101,
            [(at(0), at(256))],
            [
                Pages(at(0), 8, tag=1),
                Pages(at(8), 200, LAZY, tag=1),
                Pages(at(210), 5, LAZY, tag=1),
            ],
        ),
        Task(102, [(at(0), at(64))], [Pages(at(3), 20, LAZY, tag=2)]),
    ]
    written.write(tmp_path, written.dump(tasks))
    lazy = {
        key: data
        for task in tasks
        for key, data in pages_of(task.pid, [r for r in task.pages if r.flags == LAZY]).items()
    }
    async with FakePageServer(lazy, head=head, short=11) as fake:
        fake.tricks = [None, Trick(cut=100), None, Trick(cut=0)]
        before = descriptors()
        async with (
            CriuServer(tmp_path, page_server=fake.address, page_server_head=head) as server,
            restorer(
                tmp_path,
                [task_of(t, before=[["check", at(9), 1]], after=check_all(t)) for t in tasks],
            ) as process,
        ):
            async with asyncio.timeout(20):
                await server.over()
            await server.aclose()
            await process.end()
        assert fake.goodbyes == 1
        assert fake.connections == 3
        assert server.stats.installed_bytes == 233 * PAGE
        await asyncio.sleep(0.01)  # the page server's ends
        assert descriptors() == before
