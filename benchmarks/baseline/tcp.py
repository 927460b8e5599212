"""The byte server of `tcp_server.c` as a child process, and the plainest way to read from it."""

import socket
import struct
import subprocess
import time
from functools import cache
from types import TracebackType

from .build import build

OBJECT = 64 << 20
_FACTOR = 0x9E3779B97F4A7C15


class TcpServer:
    """A running server; `latency_ms` delays every reply without limiting the stream."""

    def __init__(self, latency_ms: float = 0) -> None:
        self.latency_ms = latency_ms
        self.host = "127.0.0.1"
        self._process = subprocess.Popen(
            [build("tcp_server", shared=False), "0", str(latency_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        if len(line) != 2:
            self._process.kill()
            raise RuntimeError("the byte server did not start")
        self.port = int(line[1])

    @property
    def pid(self) -> int:
        return self._process.pid

    def connect(self) -> socket.socket:
        connection = socket.create_connection((self.host, self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def close(self) -> None:
        self._process.communicate()  # closes its standard input, which ends it

    def __enter__(self) -> "TcpServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def request(offset: int, length: int) -> bytes:
    """What to send for `length` bytes at `offset`; many may be sent before the first reply."""
    return struct.pack("<QQ", offset, length)


@cache
def _object() -> bytes:
    try:
        import numpy as np
    except ImportError:
        mask = (1 << 64) - 1
        words = ((word * _FACTOR) & mask for word in range(1, OBJECT // 8 + 1))
        return b"".join(word.to_bytes(8, "little") for word in words)
    with np.errstate(over="ignore"):
        pattern = np.arange(1, OBJECT // 8 + 1, dtype="<u8") * np.uint64(_FACTOR)
    return bytes(pattern.tobytes())


def expected(offset: int, length: int) -> bytes:
    """The bytes that the server sends for a request, to check results with."""
    start = offset % OBJECT
    first = _object()[start : start + length]
    return first if len(first) == length else first + expected(0, length - len(first))


def receive_exactly(connection: socket.socket, buffer: memoryview) -> None:
    """Fill `buffer` from the connection."""
    done = 0
    while done < len(buffer):
        got = connection.recv_into(buffer[done:])
        if not got:
            raise ConnectionError("the byte server has closed the connection")
        done += got


def raw_receive(server: TcpServer, length: int, buffer_size: int = 1 << 20) -> float:
    """Seconds that `length` bytes take into one small buffer, over and over the same.

    One request, no fresh memory, nothing done with the bytes: the most that a Python
    program can get over this connection, which a lazy scan is compared with.
    """
    buffer = memoryview(bytearray(buffer_size))
    with server.connect() as connection:
        begun = time.perf_counter()
        connection.sendall(request(0, length))
        left = length
        while left:
            got = connection.recv_into(buffer[: min(left, buffer_size)])
            if not got:
                raise ConnectionError("the byte server has closed the connection")
            left -= got
        return time.perf_counter() - begun


def eager_receive(server: TcpServer, length: int) -> float:
    """Seconds that `length` bytes take into fresh memory: the download before the use."""
    with server.connect() as connection:
        begun = time.perf_counter()
        memory = memoryview(bytearray(length))
        connection.sendall(request(0, length))
        receive_exactly(connection, memory)
        return time.perf_counter() - begun
