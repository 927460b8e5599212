"""fsspec's HTTP file system, over a server a third of whose replies are wrong somehow."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiouffd.sources.fsspec import FsspecSource
from tests.origins import Origin, in_thread
from tests.origins.http import server_weather
from tests.servers.http import Fault, RangeServer, Request


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    logging.getLogger("fsspec").setLevel(logging.CRITICAL)
    with in_thread(RangeServer({"/a": data}, record=False)) as server:
        replies = server_weather(seed)

        def weather(request: Request) -> Fault | None:
            fault = replies(request)
            # To lie about the length of the whole is to be another version.
            lie = fault is not None and (fault.short_by or fault.extra)
            return None if lie and not request.range else fault

        yield Origin(
            FsspecSource.from_url(f"fsspec+{server.url('/a')}"),
            foul=lambda: setattr(server, "fault", weather),
            fair=lambda: setattr(server, "fault", None),
        )
