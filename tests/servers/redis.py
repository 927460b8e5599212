"""A real redis-server on a Unix socket."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.servers.nbd import need, running


@contextlib.contextmanager
def redis_server(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Listens on ``folder/redis``; nothing is kept on disk."""
    need("redis-server")
    path = folder / "redis"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "",
               "--appendonly", "no", "--dir", str(folder)]  # fmt: skip
    with running([*command, *arguments], path) as server:
        yield server
