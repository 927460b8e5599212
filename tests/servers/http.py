"""An HTTP/1.1 server for ranges, with faults to order and counters to assert on.

In a test::

    async with RangeServer({"/a": data}) as server:
        server.faults.append(Fault(status=503, retry_after="2"))     # for the next request
        server.fault = lambda request: Fault(delay=0.01)             # for the others
        ... server.url("/a") ...
        assert server.counts.requests == 2

In a process of its own (for throughput, and for tests that block their own process)::

    with start_in_process({"/a": Path("file"), "/p": 1 << 30}) as server:
        server.url("/p"); server.counts(); server.order(Fault(cut_after=10))

or ``python -m tests.servers.http --pattern p=1073741824``, which prints its URL.

Bodies are memoryviews of bytes or of a mapped file, handed to the transport as they are. On
uvloop, and on asyncio from 3.12, that copies nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gzip
import json
import mmap
import re
import ssl as ssl_module
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

MODIFIED = 1_700_000_000.0
#: With a limited rate: bytes sent at a time, and seconds that may be made up for.
PIECE, LATE = 64 * 1024, 0.005
_REASONS = {200: "OK", 206: "Partial Content", 302: "Found", 503: "Service Unavailable"}
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


def pattern(size: int, seed: int = 0) -> bytes:
    """Deterministic bytes in which every aligned 8-byte word is another one."""
    words = range(seed, seed + (size + 7) // 8)
    return b"".join((w * 0x9E3779B97F4A7C15 & (1 << 64) - 1).to_bytes(8, "little") for w in words)[
        :size
    ]


@dataclass
class Fault:
    """What to do differently in one reply. Times in seconds, sizes in bytes."""

    delay: float = 0.0  # before the reply
    gate: asyncio.Event | None = None  # waited for before the reply
    body_gate: asyncio.Event | None = None  # waited for after ``body_gate_at`` bytes of body
    body_gate_at: int = 0
    status: int | None = None  # an error reply with no body
    retry_after: str | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)  # set, or None to leave out
    cut_after: int | None = None  # close the connection after so many bytes of body
    reset: bool = False  # close it with RST
    no_reply: bool = False  # close it at once
    garbage: bytes | None = None  # send this and close
    short_by: int = 0  # a shorter body, with headers that agree on it
    extra: bytes = b""  # a longer body, with a Content-Length that agrees
    most: int | None = None  # send at most so much of the range, and say so
    ignore_range: bool = False
    redirect: str | None = None
    gzip: bool = False  # compress the range
    chunked: int | None = None  # chunk size


@dataclass
class Request:
    """A request as the server saw it."""

    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte asked for; -1 where the last is left open."""
        match = _RANGE.fullmatch(self.headers.get("range", ""))
        return (int(match[1]), int(match[2] or -1)) if match else None


@dataclass
class Counts:
    """What happened so far. ``bytes`` are of bodies."""

    connections: int = 0
    requests: int = 0
    bytes: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)
    aborted: int = 0  # connections the client closed inside a reply


@dataclass
class Entry:
    """An object being served."""

    data: memoryview
    etag: str | None = '"v1"'
    modified: float | None = MODIFIED


class RangeServer:
    """Serves a mapping of path to bytes, file (`Path`) or size of a pattern (int).

    Must be used on one loop. ``objects[path]`` may be changed at any time.
    """

    def __init__(
        self,
        objects: Mapping[str, bytes | Path | int | Entry] | None = None,
        *,
        ssl: ssl_module.SSLContext | None = None,
        host: str = "127.0.0.1",
        latency: float = 0.0,
        rate: float = 0.0,
        record: bool = True,
    ) -> None:
        self.objects = {path: _entry(value) for path, value in (objects or {}).items()}
        self.faults: deque[Fault | None] = deque()
        self.fault: Callable[[Request], Fault | None] | None = None
        self.counts = Counts()
        self.requests: list[Request] = []
        self.latency = latency
        #: Bytes of bodies per second, of all connections together; 0: as fast as it goes.
        self.rate = rate
        self._free_at = 0.0
        self.record = record
        self.control = False
        self.changed = asyncio.Condition()
        self._waiting = 0
        self._ssl = ssl
        self._host = host
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> RangeServer:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), self._host, 0, ssl=self._ssl, backlog=512
        )
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        lost = [connection.lost for connection in self._connections]
        for connection in list(self._connections):
            connection.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*lost)
        await self._server.wait_closed()

    def url(self, path: str, *, host: str | None = None) -> str:
        """Absolute URL of ``path``; ``host`` to use another name of the same server."""
        scheme = "https" if self._ssl else "http"
        return f"{scheme}://{host or self._host}:{self.port}{path}"

    def drop_connections(self) -> None:
        """Close every connection with RST."""
        for connection in list(self._connections):
            connection.transport.abort()

    async def wait_for(self, predicate: Callable[[Counts], bool]) -> None:
        """Return once the counters satisfy ``predicate``."""
        self._waiting += 1
        try:
            async with self.changed:
                await self.changed.wait_for(lambda: predicate(self.counts))
        finally:
            self._waiting -= 1

    def notify(self) -> None:
        if self._waiting:
            self.spawn(self._notify())

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def wait_for_link(self, length: int) -> None:
        """Return when ``length`` bytes have their turn, which `rate` says."""
        now = asyncio.get_running_loop().time()
        # A timer that came late is made up for.
        self._free_at = max(self._free_at, now - LATE) + length / self.rate
        await asyncio.sleep(max(0.0, self._free_at - now))

    def spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, server: RangeServer) -> None:
        self._server = server
        self._input = bytearray()
        self._busy = False
        self._writable = asyncio.Event()
        self._writable.set()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._server._connections.add(self)
        self._server.counts.connections += 1
        self._server.notify()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server._connections.discard(self)
        self.lost.set_result(None)
        if self._busy or not self._writable.is_set():
            self._server.counts.aborted += 1
            self._server.notify()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._input += data
        self._next()

    def _next(self) -> None:
        while not self._busy:
            end = self._input.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._input[:end].decode("latin-1")
            line, *lines = head.split("\r\n")
            method, path, _ = line.split(" ", 2)
            pairs = (header.split(":", 1) for header in lines)
            headers = {name.lower(): value.strip() for name, value in pairs}
            length = int(headers.get("content-length", 0))
            if len(self._input) < end + 4 + length:
                return
            body = bytes(self._input[end + 4 : end + 4 + length])
            del self._input[: end + 4 + length]
            self._serve(Request(method, path, headers), body)

    def _serve(self, request: Request, body: bytes) -> None:
        server = self._server
        if server.control and request.path.startswith("/-/"):
            self._control(request, body)
            return
        server.counts.requests += 1
        if server.record:
            server.requests.append(request)
            if request.range is not None and request.method == "GET":
                server.counts.ranges.append(request.range)
        fault = server.faults.popleft() if server.faults else None
        if fault is None and server.fault is not None:
            fault = server.fault(request)
        if fault is None and not server.latency and not server.rate:
            self._reply(request)
        else:
            self._busy = True
            server.spawn(self._misbehave(request, fault or Fault()))
        server.notify()

    def _control(self, request: Request, body: bytes) -> None:
        server = self._server
        if request.path == "/-/order":
            server.faults.extend(Fault(**fault) if fault else None for fault in json.loads(body))
        elif request.path == "/-/reset":
            server.counts = Counts()
        answer = json.dumps(dataclasses.asdict(server.counts)).encode()
        self._write(200, {"Content-Length": str(len(answer))}, memoryview(answer))
        server.counts.bytes -= len(answer)

    def _reply(self, request: Request) -> None:
        status, headers, body = self._answer(request, Fault())
        self._write(status, headers, body if request.method == "GET" else memoryview(b""))

    async def _misbehave(self, request: Request, fault: Fault) -> None:
        try:
            await self._misbehave_inner(request, fault)
        finally:
            self._busy = False
        if not self.transport.is_closing():
            self._next()

    async def _misbehave_inner(self, request: Request, fault: Fault) -> None:
        delay = fault.delay + self._server.latency
        if delay:
            await asyncio.sleep(delay)
        if fault.gate is not None:
            await fault.gate.wait()
        if self.transport.is_closing():
            return
        if fault.no_reply or fault.garbage is not None:
            self.transport.write(fault.garbage or b"")
            self._end(fault)
            return
        status, headers, body = self._answer(request, fault)
        if request.method != "GET":
            body = memoryview(b"")
        if fault.cut_after is not None:
            self._write(status, headers, body[: fault.cut_after])
            self._end(fault)
            return
        if fault.body_gate is not None:
            self._write(status, headers, body[: fault.body_gate_at])
            await fault.body_gate.wait()
            if not self.transport.is_closing():
                self._write(None, {}, body[fault.body_gate_at :])
            return
        if fault.chunked is None:
            if self._server.rate:
                await self._write_slowly(status, headers, body)
            else:
                self._write(status, headers, body)
            return
        headers.pop("Content-Length", None)
        headers["Transfer-Encoding"] = "chunked"
        self._write(status, headers, memoryview(b""))
        for start in range(0, len(body), fault.chunked):
            piece = body[start : start + fault.chunked]
            self.transport.write(f"{len(piece):x}\r\n".encode())
            self._write(None, {}, piece)
            self.transport.write(b"\r\n")
            await self._writable.wait()
            if self.transport.is_closing():
                return
        self.transport.write(b"0\r\n\r\n")

    def _answer(self, request: Request, fault: Fault) -> tuple[int, dict[str, str], memoryview]:
        """Return status, headers and body, with the faults that concern them."""
        status, headers, body = self._honest(request, fault)
        if fault.redirect is not None:
            status, body = 302, memoryview(b"moved")
            headers = {"Location": fault.redirect}
        if fault.status is not None:
            status, headers, body = fault.status, {}, memoryview(b"")
        if fault.retry_after is not None:
            headers["Retry-After"] = fault.retry_after
        if fault.short_by:
            body = body[: -fault.short_by]
        if fault.extra:
            body = memoryview(bytes(body) + fault.extra)
        if fault.gzip:
            body = memoryview(gzip.compress(bytes(body)))
            headers["Content-Encoding"] = "gzip"
        if request.method == "GET":
            headers["Content-Length"] = str(len(body))
        for name, value in fault.headers.items():
            headers.pop(name, None)
            if value is not None:
                headers[name] = value
        return status, headers, body

    def _honest(self, request: Request, fault: Fault) -> tuple[int, dict[str, str], memoryview]:
        nothing = memoryview(b"")
        # With its query if there is such a one.
        objects = self._server.objects
        entry = objects.get(request.path) or objects.get(request.path.partition("?")[0])
        if entry is None:
            return 404, {}, nothing
        size = len(entry.data)
        headers = {"Accept-Ranges": "bytes"}
        if entry.etag is not None:
            headers["ETag"] = entry.etag
        if entry.modified is not None:
            headers["Last-Modified"] = formatdate(entry.modified, usegmt=True)
        match = request.headers.get("if-match")
        if match is not None and (match != entry.etag or match.startswith("W/")):
            return 412, headers, nothing
        since = request.headers.get("if-unmodified-since")
        if since is not None and since != headers.get("Last-Modified"):
            return 412, headers, nothing
        wanted = request.range
        if wanted is None or fault.ignore_range or request.method == "HEAD":
            headers["Content-Length"] = str(size)
            return 200, headers, entry.data
        first, last = wanted
        last = size - 1 if last < 0 else min(last, size - 1)
        if first > last:
            headers["Content-Range"] = f"bytes */{size}"
            return 416, headers, nothing
        if fault.most is not None:
            last = min(last, first + fault.most - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return 206, headers, entry.data[first : last + 1]

    def _write(self, status: int | None, headers: dict[str, str], body: memoryview) -> None:
        if status is not None:
            lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            head = "\r\n".join([*lines, "", ""]).encode("latin-1")
            if len(body):
                self.transport.writelines([head, body])
            else:
                self.transport.write(head)
        elif len(body):
            self.transport.write(body)
        self._server.counts.bytes += len(body)

    async def _write_slowly(self, status: int, headers: dict[str, str], body: memoryview) -> None:
        self._write(status, headers, memoryview(b""))
        for start in range(0, len(body), PIECE):
            piece = body[start : start + PIECE]
            await self._server.wait_for_link(len(piece))
            await self._writable.wait()
            if self.transport.is_closing():
                return
            self._write(None, {}, piece)

    def _end(self, fault: Fault) -> None:
        if fault.reset:
            self.transport.abort()
        else:
            self.transport.close()


def _entry(value: bytes | Path | int | Entry) -> Entry:
    if isinstance(value, Entry):
        return value
    if isinstance(value, Path):
        with value.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        return Entry(memoryview(mapped), f'"{value.stat().st_mtime_ns:x}"', value.stat().st_mtime)
    if isinstance(value, int):
        block = pattern(1 << 20)
        data = bytearray(value)
        for start in range(0, value, len(block)):
            stop = min(value, start + len(block))
            data[start:stop] = block[: stop - start]
            if stop - start >= 8:
                data[start : start + 8] = start.to_bytes(8, "little")
        return Entry(memoryview(data))
    return Entry(memoryview(value))


class ServerProcess:
    """A server in a process of its own. Its methods block."""

    def __init__(self, process: subprocess.Popen[str], base: str) -> None:
        self._process = process
        self._base = base

    def url(self, path: str) -> str:
        return self._base + path

    def _post(self, path: str, body: object) -> Counts:
        request = urllib.request.Request(
            self._base + path, json.dumps(body).encode(), method="POST"
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as reply:
            counts = Counts(**json.load(reply))
        counts.ranges = [(first, last) for first, last in counts.ranges]
        return counts

    def order(self, *faults: Fault | None) -> None:
        """Queue faults for the next requests (those without gates)."""
        self._post(
            "/-/order",
            [
                {
                    f.name: getattr(fault, f.name)
                    for f in dataclasses.fields(fault)
                    if getattr(fault, f.name) != f.default and getattr(fault, f.name) != {}
                }
                if fault
                else None
                for fault in faults
            ],
        )

    def counts(self) -> Counts:
        return self._post("/-/counts", None)

    def reset(self) -> None:
        """Set the counters to zero."""
        self._post("/-/reset", None)

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def start_in_process(
    objects: Mapping[str, Path | int],
    *,
    latency: float = 0.0,
    rate: float = 0.0,
    record: bool = True,
) -> Iterator[ServerProcess]:
    """Run a server in another process: paths to files, or to sizes (bytes) of a pattern."""
    command = [sys.executable, "-m", "tests.servers.http", "--latency", str(latency)]
    command += ["--rate", str(rate)]
    for path, value in objects.items():
        option = "--pattern" if isinstance(value, int) else "--file"
        command += [option, f"{path}={value}"]
    if not record:
        command.append("--no-record")
    root = Path(__file__).resolve().parents[2]
    # Its stdin ends with us, and it with its stdin.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        try:
            assert process.stdout is not None
            base = process.stdout.readline().strip()
            if not base:
                raise RuntimeError("the server did not start")
            yield ServerProcess(process, base)
        finally:
            process.kill()


async def _main(arguments: argparse.Namespace) -> None:
    objects: dict[str, bytes | Path | int | Entry] = {}
    for text in arguments.file:
        path, _, name = text.partition("=")
        objects["/" + path.lstrip("/")] = Path(name)
    for text in arguments.pattern:
        path, _, size = text.partition("=")
        objects["/" + path.lstrip("/")] = int(size)
    async with RangeServer(
        objects,
        latency=arguments.latency,
        rate=arguments.rate,
        record=not arguments.no_record,
    ) as server:
        server.control = True
        print(server.url(""), flush=True)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait_for_end() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=wait_for_end, daemon=True).start()
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", action="append", default=[], metavar="PATH=FILE")
    parser.add_argument("--pattern", action="append", default=[], metavar="PATH=BYTES")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--rate", type=float, default=0.0, metavar="BYTES_PER_SECOND")
    parser.add_argument("--no-record", action="store_true", help="do not keep a list of ranges")
    parser.add_argument("--asyncio", action="store_true", help="use asyncio's loop, not uvloop")
    arguments = parser.parse_args()
    factory = asyncio.new_event_loop
    if not arguments.asyncio:
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_main(arguments))


if __name__ == "__main__":
    main()
