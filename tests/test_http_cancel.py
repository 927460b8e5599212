"""HTTP and object sources, cancelled wherever they wait, opened twice, and closed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import ClosedError, SourceError
from aiouffd.sources import HttpSource
from tests.cancelling import EVERY_WAY, Cut, cancel_everywhere, settle
from tests.servers.http import Fault, RangeServer, Request, pattern
from tests.servers.s3 import KEYS

SIZE = 300_000
DATA = pattern(SIZE)


@pytest.fixture
async def server() -> AsyncIterator[RangeServer]:
    async with RangeServer({"/bucket/a": DATA, "/bucket/empty": b""}) as server:
        yield server


def http(server: RangeServer, name: str = "a") -> Any:
    return HttpSource(server.url(f"/bucket/{name}"))


def named(server: RangeServer, name: str = "a") -> Any:
    """By a name, which has to be looked up."""
    return HttpSource(server.url(f"/bucket/{name}", host="localhost"))


def objects(server: RangeServer, name: str = "a") -> Any:
    module = pytest.importorskip("aiouffd.sources.objects")
    return module.ObjectSource.from_url(
        f"s3://bucket/{name}",
        config={**KEYS, "endpoint": server.url("")},
        client_options={"allow_http": True},
    )


Make = Callable[..., Any]
MAKERS = [http, named, objects]


def connections(server: RangeServer) -> Callable[[], Mapping[str, int]]:
    """And threads but those of obstore, which come and go as it likes."""

    def count() -> dict[str, int]:
        threads = 0
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                threads += not (task / "comm").read_text().startswith("tokio")
        return {"connections": len(server._connections), "threads": threads}

    return count


async def read(source: Any) -> None:
    assert bytes(await source.read(5, 100_000)) == DATA[5:100_005]


async def read_into(source: Any) -> None:
    buffer = bytearray(100_000)
    await source.read_into(5, memoryview(buffer))
    assert buffer == DATA[5:100_005]


async def stream(source: Any) -> None:
    async with contextlib.aclosing(source.stream(5, 100_000)) as chunks:
        assert b"".join([bytes(chunk) async for chunk in chunks]) == DATA[5:100_005]


async def together(source: Any) -> None:
    """Neighbours, which an object source joins."""
    parts = await asyncio.gather(*(source.read(at * 4096, 4096) for at in range(3)))
    assert b"".join(map(bytes, parts)) == DATA[: 3 * 4096]


def in_pieces(request: Request) -> Fault:
    return Fault(most=40_000)


def refused(request: Request) -> Fault | None:
    return Fault(status=412) if "if-match" in request.headers else None


def refused_range(request: Request) -> Fault | None:
    return Fault(status=416) if "range" in request.headers else None


@pytest.mark.parametrize("make", MAKERS)
async def test_opening(server: RangeServer, make: Make) -> None:
    async def run(cut: Cut) -> None:
        source = make(server)
        try:
            await cut.quiet(source.open())
            # Not open, or open: in any case it can be opened, and reads.
            await source.open()
            await read(source)
        finally:
            await source.aclose()

    await cancel_everywhere(run, ways=EVERY_WAY, also=connections(server))


@pytest.mark.parametrize("make", [http, objects])
async def test_opening_what_takes_two_requests(server: RangeServer, make: Make) -> None:
    server.fault = refused_range

    async def run(cut: Cut) -> None:
        source = make(server, "empty")
        try:
            await cut.quiet(source.open())
            await source.open()
            assert source.size == 0
        finally:
            await source.aclose()

    await cancel_everywhere(run, ways=EVERY_WAY, also=connections(server))


OPERATIONS = [read, read_into, stream, together]


@pytest.mark.parametrize("make", [http, objects])
@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        *((operation, None) for operation in OPERATIONS),
        *((read, fault) for fault in (in_pieces, refused)),
        (stream, in_pieces),
    ],
)
async def test_reading(
    server: RangeServer, make: Make, operation: Callable[[Any], Any], fault: Any
) -> None:
    async def run(cut: Cut) -> None:
        source = make(server)
        try:
            await source.open()
            server.fault = fault
            await cut.quiet(operation(source))
            await operation(source)
        finally:
            server.fault = None
            await source.aclose()

    await cancel_everywhere(run, ways=EVERY_WAY, also=connections(server))


@pytest.mark.parametrize("make", MAKERS)
async def test_closing(server: RangeServer, make: Make) -> None:
    async def run(cut: Cut) -> None:
        source = make(server)
        await source.open()
        reads = [asyncio.ensure_future(source.read(at * 9000, 5000)) for at in range(3)]
        await read(source)
        await cut.quiet(source.aclose())
        await source.aclose()
        for result in await asyncio.gather(*reads, return_exceptions=True):
            assert isinstance(result, ClosedError) or len(result) == 5000
        with pytest.raises(ClosedError):
            await source.open()

    await cancel_everywhere(run, ways=EVERY_WAY, also=connections(server))


@pytest.mark.parametrize("make", MAKERS)
async def test_closing_while_it_is_opened(server: RangeServer, make: Make) -> None:
    async def run(cut: Cut) -> None:
        source = make(server)
        gate = asyncio.Event()
        before = server.counts.requests
        server.faults.append(Fault(gate=gate))
        opening = asyncio.ensure_future(source.open())
        await server.wait_for(lambda counts: counts.requests > before)
        await cut.quiet(source.aclose())
        with pytest.raises(ClosedError):
            await opening
        await source.aclose()
        gate.set()

    await cancel_everywhere(run, ways=EVERY_WAY, also=connections(server))


@pytest.mark.parametrize("make", [http, objects])
async def test_one_opening_is_shared(server: RangeServer, make: Make) -> None:
    source = make(server)
    gate = asyncio.Event()
    server.faults.append(Fault(gate=gate))
    opening = [asyncio.ensure_future(source.open()) for _ in range(3)]
    await server.wait_for(lambda counts: counts.requests == 1)
    opening[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening[0]
    assert not opening[1].done()
    gate.set()
    await asyncio.gather(*opening[1:])
    await read(source)
    assert server.counts.requests == 2
    await asyncio.gather(*(source.aclose() for _ in range(3)))


@pytest.mark.parametrize("make", [http, objects])
async def test_a_failure_to_open_is_everybodys_and_can_be_repeated(
    server: RangeServer, make: Make
) -> None:
    source = make(server)
    gate = asyncio.Event()
    server.faults.append(Fault(gate=gate, status=503))
    opening = [asyncio.ensure_future(source.open()) for _ in range(3)]
    await server.wait_for(lambda counts: counts.requests == 1)
    gate.set()
    for error in await asyncio.gather(*opening, return_exceptions=True):
        assert isinstance(error, SourceError)
    await source.open()
    await read(source)
    await source.aclose()


@pytest.mark.parametrize("make", [http, objects])
async def test_what_was_never_opened_can_be_closed(server: RangeServer, make: Make) -> None:
    source = make(server)
    await source.aclose()
    await source.aclose()
    with pytest.raises(ClosedError):
        await source.open()


async def test_connecting_to_a_server_that_does_not_answer() -> None:
    """A listener with a full queue leaves the client waiting for its connection."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(address)

            async def run(cut: Cut) -> None:
                source = HttpSource(f"http://127.0.0.1:{address[1]}/a", connect_timeout=0.05)
                try:
                    with contextlib.suppress(SourceError):
                        await cut.quiet(source.open())
                finally:
                    await source.aclose()

            await cancel_everywhere(run, ways=EVERY_WAY)
        finally:
            for one in waiting:
                one.close()
    await settle({}, dict, "at the end")
