"""nbdkit over a file: it fails a fifth of the requests while the weather is foul."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from tests.origins import Origin
from tests.servers import nbd


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    with served(data) as found:
        yield found


@contextmanager
def served(data: bytes) -> Iterator[Origin]:
    with tempfile.TemporaryDirectory() as folder:
        path, storm = Path(folder, "data"), Path(folder, "storm")
        path.write_bytes(data)
        server = nbd.nbdkit(
            Path(folder, "sock"),
            "file",
            str(path),
            "error-pread=EIO",
            "error-pread-rate=20%",
            f"error-pread-file={storm}",
            filters=["error"],
        )
        with server:
            yield Origin(nbd.url(Path(folder, "sock")), foul=storm.touch, fair=storm.unlink)
