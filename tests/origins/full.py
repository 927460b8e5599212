"""A source with all optional methods, failing in every way that a source can."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.faulty import FullSource, Weather
from tests.origins import Origin


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    weather = Weather(data, seed)
    yield Origin(FullSource(data, weather), fair=lambda: setattr(weather, "fair", True))
