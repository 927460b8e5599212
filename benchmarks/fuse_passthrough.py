"""The other way to make memory out of remote bytes: mmap a file of a Python FUSE server.

    python -m benchmarks.fuse_passthrough                      measure a scan over it
    python -m benchmarks.fuse_passthrough serve DIR file PATH
    python -m benchmarks.fuse_passthrough serve DIR tcp HOST PORT SIZE

`serve` mounts one read-only file, DIR/data, until it is told to end by SIGTERM. Its bytes
come from a local file or from the byte server of `baseline/tcp_server.c`. `mounted` does
that in a child process, for benchmarks that compare with it.

The comparison is meant to be fair: pyfuse3 is the quickest FUSE binding for Python, the
kernel's readahead is raised (root only), pages stay cached, reads run concurrently on a
pool of connections, and received bytes are handed on without a copy in Python.
"""

from __future__ import annotations

import errno
import importlib.util
import mmap
import os
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import trio

FILE = "data"
READAHEAD_KIB = 4096  # the default of 128 would hold a sequential scan back


def unavailable() -> str | None:
    """Why this cannot run here, or None when it can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is absent or not permitted"
    if importlib.util.find_spec("pyfuse3") is None:
        return "pyfuse3 is not installed (needs libfuse3-dev and pkg-config)"
    return None


# --- where the bytes come from -------------------------------------------------------------


class Source(Protocol):
    size: int

    async def read(self, offset: int, length: int) -> bytes | bytearray: ...


class FileSource:
    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._file).st_size

    async def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file, length, offset)


class TcpSource:
    """A pool of connections to the byte server, one read on each at a time."""

    def __init__(self, host: str, port: int, size: int) -> None:
        self._address = (host, port)
        self._idle: list[trio.socket.SocketType] = []
        self.size = size

    async def read(self, offset: int, length: int) -> bytearray:
        from .baseline.tcp import request

        connection = self._idle.pop() if self._idle else await self._connect()
        length = max(0, min(length, self.size - offset))
        data = bytearray(length)
        await connection.send(request(offset, length))
        with memoryview(data) as rest:
            done = 0
            while done < length:
                got = await connection.recv_into(rest[done:])
                if not got:
                    raise ConnectionError("the byte server has closed the connection")
                done += got
        self._idle.append(connection)
        return data

    async def _connect(self) -> trio.socket.SocketType:
        import trio

        connection = trio.socket.socket()
        await connection.connect(self._address)
        connection.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
        return connection


def source_named(kind: str, *arguments: str) -> Source:
    """`file PATH` or `tcp HOST PORT SIZE`."""
    if kind == "file" and len(arguments) == 1:
        return FileSource(arguments[0])
    if kind == "tcp" and len(arguments) == 3:
        return TcpSource(arguments[0], int(arguments[1]), int(arguments[2]))
    raise ValueError("a source is: file PATH, or tcp HOST PORT SIZE")


# --- the server ----------------------------------------------------------------------------


def _operations(source: Source) -> Any:
    import pyfuse3

    inode = pyfuse3.ROOT_INODE + 1

    class OneFile(pyfuse3.Operations):  # type: ignore[misc, unused-ignore]
        async def getattr(self, number: int, ctx: object = None) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = number
            entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
            entry.entry_timeout = entry.attr_timeout = 3600
            if number == inode:
                entry.st_mode, entry.st_size = stat.S_IFREG | 0o444, source.size
            else:
                entry.st_mode, entry.st_size = stat.S_IFDIR | 0o555, 0
            return entry

        async def lookup(
            self, parent: int, name: bytes, ctx: object = None
        ) -> pyfuse3.EntryAttributes:
            if parent != pyfuse3.ROOT_INODE or name != FILE.encode():
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(inode)

        async def open(self, number: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise pyfuse3.FUSEError(errno.EACCES)
            return pyfuse3.FileInfo(fh=number, keep_cache=True)

        async def read(self, handle: int, offset: int, length: int) -> bytes:
            # A bytearray will do, whatever the annotation of the base class says.
            return cast(bytes, await source.read(offset, length))

    return OneFile()


def serve(directory: str, source: Source) -> None:
    """Mount and answer until SIGTERM."""
    import pyfuse3
    import trio

    options = set(pyfuse3.default_options) | {"fsname=passthrough", "ro"}
    pyfuse3.init(_operations(source), directory, options)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                nursery.start_soon(pyfuse3.main)
                print("mounted", flush=True)
                async for _ in signals:
                    break
            nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    finally:
        pyfuse3.close(unmount=True)


def _raise_readahead(directory: str) -> None:
    device = os.stat(directory).st_dev
    knob = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        Path(knob).write_text(str(READAHEAD_KIB))
    except OSError as error:
        print(f"note: {knob} cannot be raised: {error.strerror}", file=sys.stderr)


@contextmanager
def mounted(*source: str) -> Iterator[Path]:
    """Serve a source in a child process; gives the path of the file."""
    with tempfile.TemporaryDirectory(prefix="fuse-passthrough-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuse_passthrough", "serve", directory, *source],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
        )
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise RuntimeError("the FUSE server did not start")
            _raise_readahead(directory)
            yield Path(directory) / FILE
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


# --- the scan ------------------------------------------------------------------------------


def scan(path: Path, *, step: int = 1 << 20) -> float:
    """Seconds to read every byte of the mapped file once, in order."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            memory.madvise(mmap.MADV_SEQUENTIAL)
            buffer = bytearray(step)
            begun = time.perf_counter()
            with memoryview(memory) as view:
                for offset in range(0, size, step):
                    part = view[offset : offset + step]
                    buffer[: len(part)] = part
                    part.release()
            return time.perf_counter() - begun


def main(arguments: list[str]) -> int:
    reason = unavailable()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    if arguments[:1] == ["serve"] and len(arguments) > 2:
        serve(arguments[1], source_named(*arguments[2:]))
        return 0
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2

    from .baseline.tcp import TcpServer, expected, raw_receive
    from .common import REPEATS, environment

    size = 256 << 20
    rates = []
    with TcpServer() as server:
        for _ in range(REPEATS):
            # A fresh mount each time: the kernel keeps the pages of the last one.
            with mounted("tcp", server.host, str(server.port), str(size)) as path:
                with path.open("rb") as file:
                    file.seek(size - 4096)
                    if file.read() != expected(size - 4096, 4096):
                        raise AssertionError("wrong bytes through FUSE")
                rates.append(size / scan(path) / (1 << 20))
        raw = statistics.median(size / raw_receive(server, size) for _ in range(REPEATS))
    print(environment("trio"))
    print(f"mmap scan over FUSE: {statistics.median(rates):.0f} MiB/s, ", end="")
    print(f"{min(rates):.0f} to {max(rates):.0f}; raw receive: {raw / (1 << 20):.0f} MiB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
