"""A small HTTP server that can send parts of files: what the other examples fetch from.

    python examples/range_server.py FILE [--port N] [--latency MS]

It prints the URL of the file as its first line and serves until Ctrl-C or SIGTERM. With --until-eof
it serves until its standard input ends, so that a program which starts it cannot leave it behind;
`served` is how the other examples do that. GET and HEAD, one range per request, ETag, If-Match,
keep-alive; the bytes go from the page cache to the socket by sendfile. For loopback only: it knows
one file and no security.
"""

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class RangeServer:
    """Serves the file at `path`, whatever the URL says; waits `latency` seconds before a reply."""

    def __init__(self, path: Path, latency: float = 0.0) -> None:
        self._latency = latency
        self._name = path.name
        self._file = path.open("rb", buffering=0)
        status = os.fstat(self._file.fileno())
        self._size = status.st_size
        self._etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        self._modified = formatdate(status.st_mtime, usegmt=True)

        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> str:
        """Listen on loopback; the file's URL."""

        # Tasks of our own: one that asyncio makes of a coroutine function complains, before
        # Python 3.12, when the loop's end cancels it with a client still connected.
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._serve(reader, writer))
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)

        self._server = await asyncio.start_server(connected, "127.0.0.1", port)
        port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/{self._name}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = request.split("\r\n")
                fields = (line.partition(":") for line in lines if line)
                headers = {name.lower(): value.strip() for name, _, value in fields}
                await self._answer(first.split(" ")[0], headers, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client has gone, or is none
        finally:
            writer.close()

    async def _answer(
        self, method: str, headers: dict[str, str], writer: asyncio.StreamWriter
    ) -> None:
        if self._latency:
            await asyncio.sleep(self._latency)
        reply = [f"ETag: {self._etag}", f"Last-Modified: {self._modified}", "Accept-Ranges: bytes"]
        start, length = 0, self._size
        part = self._part(headers.get("range"))
        if method not in ("GET", "HEAD"):
            status, length = "405 Method Not Allowed", 0
        elif headers.get("if-match", self._etag) not in (self._etag, "*"):
            status, length = "412 Precondition Failed", 0
        elif part is None:
            status = "200 OK"
        elif part[0] >= part[1]:
            status, length = "416 Range Not Satisfiable", 0
            reply.append(f"Content-Range: bytes */{self._size}")
        else:
            status = "206 Partial Content"
            start, length = part[0], part[1] - part[0]
            reply.append(f"Content-Range: bytes {start}-{part[1] - 1}/{self._size}")
        head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {length}", *reply, "", ""])
        writer.write(head.encode("latin-1"))
        if length and method == "GET" and not writer.is_closing():
            loop = asyncio.get_running_loop()
            await loop.sendfile(writer.transport, self._file, start, length)
        else:
            await writer.drain()

    def _part(self, text: str | None) -> tuple[int, int] | None:
        """First byte and end of what a Range header asks for; None for the whole file."""
        match = RANGE.fullmatch(text or "")
        if match is None or match[0] == "bytes=-":
            return None
        if not match[1]:
            return max(0, self._size - int(match[2])), self._size
        return int(match[1]), min(self._size, int(match[2] or self._size) + 1)


@asynccontextmanager
async def served(path: Path, latency: float = 0.0) -> AsyncIterator[str]:
    """Serve a file from another process, after `latency` milliseconds each time; gives the URL."""
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        str(path),
        f"--latency={latency}",
        "--until-eof",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        url = (await server.stdout.readline()).decode().strip()
        if not url:
            raise RuntimeError("the server did not start")
        yield url
    finally:
        server.stdin.close()
        await server.wait()


async def main() -> None:
    parser = argparse.ArgumentParser(description="Serve one file over HTTP, with ranges.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0: any free one (the default)")
    parser.add_argument("--latency", type=float, default=0, metavar="MS", help="before each reply")
    parser.add_argument(
        "--until-eof", action="store_true", help="end when standard input, a pipe, does"
    )
    arguments = parser.parse_args()
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        server = RangeServer(arguments.file, arguments.latency / 1000)
        url = await server.start(arguments.port)
    except (OSError, OverflowError) as error:
        parser.exit(1, f"range_server.py: {error}\n")
    print(url, flush=True)

    def on_input() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            ended.set()

    if arguments.until_eof:
        loop.add_reader(sys.stdin.fileno(), on_input)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(main())
