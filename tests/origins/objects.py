"""An S3 endpoint in a thread, a third of whose replies are wrong somehow."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiouffd.sources.objects import ObjectSource
from tests.origins import Origin, in_thread
from tests.origins.http import server_weather
from tests.servers.http import RangeServer
from tests.servers.s3 import KEYS


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    with in_thread(RangeServer({"/bucket/a": data}, record=False)) as server:
        weather = server_weather(seed)
        source = ObjectSource.from_url(
            "s3://bucket/a",
            config={**KEYS, "endpoint": server.url("")},
            client_options={"allow_http": True, "timeout": "2s"},
        )
        yield Origin(
            source,
            foul=lambda: setattr(server, "fault", weather),
            fair=lambda: setattr(server, "fault", None),
        )
