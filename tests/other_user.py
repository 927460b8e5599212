"""Doing things as another user, in a forked child: for tests that run as root."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["NOBODY", "Listener", "as_nobody", "listening", "shared_folder"]

#: The other user, and its group.
NOBODY = 65534


def _become() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _fork(work: Callable[[], Any]) -> tuple[int, int]:
    """A child that is nobody, and a pipe with what ``work`` returns, or the exception."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid:
        os.close(sink)
        return pid, source
    try:
        os.close(source)
        signal.alarm(60)
        try:
            _become()
            result: Any = (work(), None)
        except Exception as error:
            result = (None, repr(error))
        with open(sink, "wb") as pipe:
            pickle.dump(result, pipe)
    finally:
        os._exit(0)


def as_nobody(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, done by another user. Blocks."""
    pid, source = _fork(work)
    with open(source, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    result, error = pickle.loads(data)
    assert error is None, error
    return result


@contextmanager
def shared_folder(mode: int = 0o1777, owner: int = 0, group: int = 0) -> Iterator[Path]:
    """A directory that others can come to, which pytest's are not."""
    outer = tempfile.mkdtemp(prefix="aiouffd-other-")
    try:
        os.chmod(outer, 0o755)
        folder = Path(outer) / "shared"
        folder.mkdir()
        os.chown(folder, owner, group)
        folder.chmod(mode)
        yield folder
    finally:
        shutil.rmtree(outer)


class Listener:
    """What somebody else heard on a socket."""

    def __init__(self, pid: int, source: int, ready: int) -> None:
        self._pid, self._source, self._ready = pid, source, ready

    def wait(self) -> None:
        """Until somebody connects."""
        assert os.read(self._ready, 1)

    def heard(self) -> list[bytes]:
        """What each connection has said until it hung up; ends the listener."""
        os.kill(self._pid, signal.SIGTERM)
        with open(self._source, "rb") as pipe:
            data = pipe.read()
        os.waitpid(self._pid, 0)
        result, error = pickle.loads(data)
        assert error is None, error
        return list(result)


@contextmanager
def listening(path: Path, answer: bytes = b"") -> Iterator[Listener]:
    """Another user listens at ``path``, and notes what it is told."""
    ready, told = os.pipe()

    def work() -> list[bytes]:
        os.close(ready)
        found: list[bytes] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind(str(path))
            path.chmod(0o666)
            sock.listen(8)
            signal.signal(signal.SIGTERM, lambda *_: sock.shutdown(socket.SHUT_RDWR))
            os.write(told, b"x")
            while True:
                try:
                    connection, _ = sock.accept()
                except OSError:
                    return found
                os.write(told, b"x")
                with connection:
                    connection.settimeout(10)
                    heard = b""
                    with suppress(ConnectionError):  # hung up already
                        if answer:
                            connection.sendall(answer)
                        while data := connection.recv(4096):
                            heard += data
                    found.append(heard)

    pid, source = _fork(work)
    os.close(told)
    listener = Listener(pid, source, ready)
    listener.wait()
    try:
        yield listener
    finally:
        os.close(ready)
        # Unless it was heard.
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(source)
