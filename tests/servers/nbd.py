"""NBD servers of others, on Unix sockets."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

LIMIT = 20.0


def need(*programs: str) -> None:
    """Skip where one of them is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def wait_for(path: Path, server: subprocess.Popen[bytes]) -> None:
    """Until somebody listens on the socket: there is no event to wait for."""
    limit = time.monotonic() + LIMIT
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return
            except OSError:
                if server.poll() is not None or time.monotonic() > limit:
                    raise
        time.sleep(0.005)


@contextlib.contextmanager
def running(command: Sequence[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on ``path``, until the end of the block."""
    path.unlink(missing_ok=True)
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(path, server)
        yield server
    finally:
        server.kill()
        server.wait()


def nbdkit(
    path: Path, plugin: str, *arguments: str, filters: Sequence[str] = ()
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """nbdkit on the socket ``path``."""
    need("nbdkit")
    names = [f"--filter={name}" for name in filters]
    command = ["nbdkit", "--foreground", "--unix", str(path), *names, plugin, *arguments]
    return running(command, path)


def qemu_nbd(
    path: Path, image: Path, *arguments: str
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """qemu-nbd on the socket ``path``, for any number of clients."""
    need("qemu-nbd")
    options = ["--persistent", "--shared=16", "--format=raw", f"--socket={path}"]
    return running(["qemu-nbd", *options, *arguments, str(image)], path)


def url(path: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"
