"""Processes that fill, read and evict one disk cache, and what happens to its files."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from aiouffd.errors import SourceError
from aiouffd.sources.cache import CachedSource
from tests.faulty import PlainSource

SIZE = 3_000_001
BLOCK = 4096


def data() -> bytes:
    # Some blocks of zeros in it.
    parts = bytearray(random.Random(7).randbytes(SIZE))
    parts[500_000:700_000] = bytes(200_000)
    return bytes(parts)


def source(inner: Any, directory: str | Path, **options: Any) -> CachedSource:
    settings = {"directory": directory, "key": "k", "version": "1", "block_size": BLOCK}
    return CachedSource(inner, **{**settings, **options})


class NoSource(PlainSource):
    """Knows the size, and fails every read: what is read was cached."""

    async def read(self, offset: int, length: int) -> bytes:
        raise SourceError("not cached", transient=False)

    def clone(self) -> NoSource:
        return self


async def cached_blocks(directory: str | Path, whole: bytes) -> int:
    """How many blocks are cached, after a look at each."""
    right = 0
    reader = source(NoSource(whole), directory)
    await reader.open()
    try:
        for offset in range(0, len(whole), BLOCK):
            wanted = whole[offset : offset + BLOCK]
            try:
                found = await reader.read(offset, len(wanted))
            except SourceError:
                continue
            assert found == wanted, f"wrong bytes at {offset}"
            right += 1
    finally:
        await reader.aclose()
    return right


async def read_at_random(reader: Any, whole: bytes, chance: random.Random, times: int) -> None:
    for _ in range(times):
        offset = chance.randrange(len(whole))
        length = min(chance.choice([1, 5000, 70_000, 600_000]), len(whole) - offset)
        buffer = bytearray(length)
        await reader.read_into(offset, memoryview(buffer))
        assert buffer == whole[offset : offset + length], f"wrong bytes, {length} at {offset}"


async def readers(directory: str, seed: int, size_limit: int, seconds: float) -> dict[str, int]:
    """Open, read at random, close, again and again."""
    whole = data()
    chance = random.Random(seed)
    rounds = hits = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reader = source(PlainSource(whole), directory, size_limit=size_limit)
        await reader.open()
        await asyncio.gather(*(read_at_random(reader, whole, chance, 8) for _ in range(4)))
        await reader.aclose()
        hits += reader.stats.hit_bytes
        rounds += 1
    return {"rounds": rounds, "hits": hits}


def kills(_loop: Any, directory: str, seed: int, times: int) -> list[int]:
    """How children ended that filled the cache until they were killed. Forked from a
    process without threads, which is quicker than starting each."""
    faulthandler.cancel_dump_traceback_later()  # it is one
    whole = data()
    chance = random.Random(seed)
    ends = []
    for number in range(times):
        ready, say = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                asyncio.run(_until_killed(directory, whole, number, say))
            finally:
                os._exit(3)
        os.close(say)
        os.read(ready, 1)
        time.sleep(chance.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        ends.append(os.waitpid(pid, 0)[1])
        os.close(ready)
    return ends


async def _until_killed(directory: str, whole: bytes, number: int, say: int) -> None:
    chance = random.Random(number)
    reader = source(PlainSource(whole), directory)
    await reader.open()
    os.write(say, b"x")
    while True:
        await read_at_random(reader, whole, chance, 1)


def damage(directory: Path, chance: random.Random, *, gently: bool = False) -> str:
    """Do something bad to one file of the cache."""
    try:
        return _damage(directory, chance, gently)
    except FileNotFoundError:
        return "it was evicted meanwhile"


def _damage(directory: Path, chance: random.Random, gently: bool) -> str:
    # Not through a planted link, which may lead anywhere.
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    if not files:
        return "nothing there"
    path = chance.choice(files)
    kinds = ["flip", "flip", "garbage", "cut", "zero"]
    kind = chance.choice(kinds if gently else [*kinds, "grow", "link", "folder", "open", "empty"])
    size = path.stat().st_size
    at = chance.randrange(size) if size else 0
    if chance.random() < 0.5:
        at = min(at, chance.randrange(4000))  # where the checksums are
    match kind:
        case "flip":
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 1 << chance.randrange(8)]) if byte else b"")
        case "garbage" | "zero":
            with path.open("r+b") as file:
                file.seek(at)
                length = min(chance.randrange(1, 20_000), size - at) if size else 0
                file.write(chance.randbytes(length) if kind == "garbage" else bytes(length))
        case "cut":
            os.truncate(path, at)
        case "grow":
            os.truncate(path, size + at)
        case "empty":
            os.truncate(path, 0)
        case "open":
            path.chmod(0o666)
        case "link":
            elsewhere = directory.with_name(f"{directory.name}-elsewhere")
            elsewhere.write_bytes(bytes(size))
            path.unlink()
            path.symlink_to(elsewhere)
        case _:
            path.unlink()
            path.mkdir()
    return f"{kind} at {at} of {path.name}"
