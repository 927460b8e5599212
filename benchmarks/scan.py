"""(b, c, d) Cold sequential scans: how much of a raw transfer's speed is left."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time

import aiouffd
from aiouffd.buffers.buffer import READAHEAD
from aiouffd.sources.base import BaseSource

from .baseline.tcp import TcpServer, eager_receive, raw_receive
from .baseline.uffd import PAGE, touch_all
from .common import Report, in_thread, warm_memory

MIB = 1 << 20
GIB = 1 << 30


class TcpSource(BaseSource):
    """The server of baseline/tcp_server.c: a request of two numbers, an answer of bytes."""

    def __init__(self, host: str, port: int, size: int) -> None:
        self._address = (host, port)
        self._size = size
        self._idle: list[socket.socket] = []

    @property
    def size(self) -> int:
        return self._size

    def clone(self) -> TcpSource:
        return TcpSource(*self._address, self._size)

    @contextlib.asynccontextmanager
    async def _connection(self):
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = socket.create_connection(self._address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)

    async def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return data

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        loop = asyncio.get_running_loop()
        async with self._connection() as connection:
            await loop.sock_sendall(connection, struct.pack("<QQ", offset, len(buffer)))
            await self._receive(connection, buffer)

    async def _receive(self, connection: socket.socket, buffer: memoryview) -> None:
        loop = asyncio.get_running_loop()
        got = 0
        while got < len(buffer):
            # What is there already costs no trip through the loop.
            try:
                count = connection.recv_into(buffer[got:])
            except BlockingIOError:
                count = await loop.sock_recv_into(connection, buffer[got:])
            if not count:
                raise ConnectionResetError("the server closed the connection")
            got += count

    async def aclose(self) -> None:
        for connection in self._idle:
            connection.close()


async def lazy_scan(source, size: int, **settings) -> float:
    """Seconds to touch every page of a fresh lazy buffer, in order, from one thread."""
    async with aiouffd.open(source, **settings) as buf:
        started = time.perf_counter()
        await in_thread(touch_all, buf.address, 0, -(-size // PAGE))
        return time.perf_counter() - started


def _rate(size: int, seconds: float) -> float:
    return size / seconds / GIB


def _lazily(server: TcpServer, size: int, **settings):
    async def run() -> float:
        warm_memory(size + size // 4)
        return _rate(
            size, await lazy_scan(TcpSource(server.host, server.port, size), size, **settings)
        )

    return run


def _blocking(function, *arguments):
    async def run() -> float:
        warm_memory(arguments[1] + arguments[1] // 4)
        return _rate(arguments[1], await in_thread(function, *arguments))

    return run


async def _scans(report: Report, loop: str, size: int) -> None:
    with TcpServer() as server:
        await report.compare_async(
            f"cold scan of {size // MIB} MiB over TCP / raw recv_into, {loop}",
            ("aiouffd", _lazily(server, size)),
            ("raw", _blocking(raw_receive, server, size)),
            unit="GiB/s",
            at_least=0.65,
        )
        await report.compare_async(
            f"cold scan of {size // MIB} MiB over TCP / eager download, {loop}",
            ("aiouffd", _lazily(server, size)),
            ("eager", _blocking(eager_receive, server, size)),
            unit="GiB/s",
            at_least=1.2,
        )
    with TcpServer(latency_ms=5) as server, TcpServer() as quick:
        # What the window allows at this latency, or what the wire gives.
        ceiling = READAHEAD / 0.005 / GIB

        async def least() -> float:
            return min(ceiling, await _blocking(raw_receive, quick, size)())

        await report.compare_async(
            f"the same with 5 ms of latency / min(raw, window/latency), {loop}",
            ("aiouffd", _lazily(server, size)),
            ("min", least),
            unit="GiB/s",
            at_least=0.85,
        )


def run(report: Report, loop: str, runner, size: int = GIB) -> None:
    runner(_scans(report, loop, size))
