"""A disk cache over a source that fails in every way, in files in which bits flip meanwhile."""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiouffd.sources.cache import CachedSource
from tests.faulty import FullSource, Weather
from tests.origins import Origin
from tests.scenarios.caching import damage


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    weather = Weather(data, seed, chance=0.4)
    weather.fair = True
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        inner = FullSource(data, weather)
        settings = {"directory": folder, "key": "torture", "version": "1", "block_size": 8192}
        half = CachedSource(inner, **settings)
        await half.open()
        await half.read(0, len(data) // 2)
        await half.aclose()

        def foul() -> None:
            weather.fair = False
            for _ in range(20):
                damage(Path(folder), chance, gently=True)

        # Smaller than the object: it evicts all the time.
        yield Origin(
            CachedSource(inner, size_limit=len(data) // 2, **settings),
            foul=foul,
            fair=lambda: setattr(weather, "fair", True),
        )
