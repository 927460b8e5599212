"""Our own NBD server in a thread, over bytes a fifth of whose reads fail in foul weather."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiouffd.errors import SourceError
from aiouffd.nbd import NbdServer
from aiouffd.sources.base import BaseSource, Buffer
from tests.origins import Origin, in_thread


class Weather(BaseSource):
    """Bytes that sometimes do not come."""

    def __init__(self, data: bytes, seed: int) -> None:
        self.data = data
        self.chance = random.Random(seed)
        self.foul = False

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> Buffer:
        if self.foul and self.chance.random() < 0.2:
            raise SourceError("not in this weather")
        return self.data[offset : offset + length]

    def clone(self) -> Weather:
        raise NotImplementedError


@asynccontextmanager
async def served(source: Weather, path: Path) -> AsyncIterator[str]:
    async with NbdServer({"": source}) as server:
        yield await server.listen_unix(path)


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    source = Weather(data, seed)
    # It tells of failures, as it should.
    logging.getLogger("aiouffd").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory() as folder,
        in_thread(served(source, Path(folder, "sock"))) as url,
    ):
        yield Origin(
            url,
            foul=lambda: setattr(source, "foul", True),
            fair=lambda: setattr(source, "foul", False),
        )
