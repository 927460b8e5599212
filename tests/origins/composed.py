"""Retried, verified, cut and joined: a stack of sources over two that fail in every way.

What the weather does to single blocks the retry hides; what it does to bytes (other lengths) the
length checks find, and the checksums would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiouffd.sources.compose import ChecksumSource, ConcatSource, Manifest, RetrySource, SliceSource
from aiouffd.sources.memory import MemorySource
from tests.faulty import FullSource, PlainSource, Weather
from tests.origins import Origin


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    cut = len(data) // 3 + 17
    left, right = b"before" + data[:cut], data[cut:] + b"after"
    weathers = [Weather(left, seed), Weather(right, seed + 1)]
    for weather in weathers:
        weather.fair = True
    joined = ConcatSource(
        [
            SliceSource(FullSource(left, weathers[0]), 6),
            SliceSource(PlainSource(right, weathers[1]), 0, len(data) - cut),
        ]
    )
    manifest = await Manifest.make(MemorySource(data), block_size=4096, algorithm="crc32")
    checked = ChecksumSource(joined, manifest)

    def turn(fair: bool) -> None:
        for weather in weathers:
            weather.fair = fair

    yield Origin(
        RetrySource(checked, budget=0.01, first=0.001, longest=0.002),
        foul=lambda: turn(False),
        fair=lambda: turn(True),
    )
