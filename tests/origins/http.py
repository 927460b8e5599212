"""An HTTP server in a thread, a third of whose replies are wrong somehow."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.origins import Origin, in_thread
from tests.scenarios.torture import BLOCK
from tests.servers.http import Fault, RangeServer, Request


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    with in_thread(RangeServer({"/a": data}, record=False)) as server:
        weather = server_weather(seed)
        yield Origin(
            server.url("/a"),
            foul=lambda: setattr(server, "fault", weather),
            fair=lambda: setattr(server, "fault", None),
        )


def server_weather(seed: int) -> Any:
    """Faults for `RangeServer`, a third of the replies; none for the question of the size."""
    chance = random.Random(seed)

    def fault(request: Request) -> Fault | None:
        if request.range == (0, 1) or chance.random() > 0.33:
            return None
        return chance.choice(
            [
                Fault(status=503),
                Fault(status=500),
                Fault(status=429, retry_after="0"),
                Fault(cut_after=chance.randrange(BLOCK)),
                Fault(cut_after=chance.randrange(BLOCK), reset=True),
                Fault(no_reply=True),
                Fault(no_reply=True, reset=True),
                Fault(short_by=chance.randrange(1, 4000)),
                Fault(extra=bytes(chance.randrange(1, 4000))),
                Fault(garbage=b"HTTP/1.1 200 OK\r\nContent-"),
                Fault(delay=chance.random() * 0.01),
                Fault(chunked=chance.randrange(100, 9000)),
                Fault(ignore_range=True),
            ]
        )

    return fault
