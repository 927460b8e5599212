"""Servers of aiouffd's own dialect as processes, which can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tests.support import ROOT, content, environment, wait_until

#: ``pager`` is the command; ``peer`` shares no code with it.
Kind = Literal["pager", "peer"]
PEER = ROOT / "tests" / "servers" / "native_peer.py"


class PagerProcess:
    """Serves ``content(size)`` at ``path``; killed at the end of the ``with`` block."""

    def __init__(self, kind: Kind, folder: Path, size: int, *arguments: str) -> None:
        self.kind, self.size = kind, size
        self.path = str(folder / "s")
        self.arguments = arguments
        self._file = folder / "object"
        self._file.write_bytes(content(size))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        """Returns once it listens. ``arguments`` take the place of the first ones."""
        arguments = arguments or self.arguments
        if self.kind == "peer":
            command = [str(PEER), self.path, str(self.size), *arguments]
        else:
            fixed = ["-m", "aiouffd", "pager", "native", "--socket", self.path]
            command = [*fixed, *arguments, str(self._file)]
        before = self._identity()
        self._process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        wait_until(lambda: self._listens(before), "the server to listen", 30)

    def _identity(self) -> Any:
        with contextlib.suppress(OSError):
            status = os.stat(self.path)
            return status.st_ino, status.st_ctime_ns
        return None

    def _listens(self, before: Any) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the server has ended"
        return self._identity() not in (None, before) and _is_listening(self.path)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)
        self._process = None

    def suspend(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self.pid}/status")
        wait_until(lambda: "State:\tT" in status.read_text(), "the server to stop")

    def resume(self) -> None:
        """After `suspend`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self, *arguments: str) -> None:
        self.kill()
        self.start(*arguments)


def _is_listening(path: str) -> bool:
    # A connection would be a client; the kernel's list is none. The flag is __SO_ACCEPTCON.
    for line in Path("/proc/net/unix").read_text().splitlines():
        fields = line.split()
        if fields[-1] == path and int(fields[3], 16) & 0x10000:
            return True
    return False


@contextlib.contextmanager
def serving(kind: Kind, folder: Path, size: int, *arguments: str) -> Iterator[PagerProcess]:
    """A server that listens."""
    server = PagerProcess(kind, folder, size, *arguments)
    try:
        server.start()
        yield server
    finally:
        server.kill()
