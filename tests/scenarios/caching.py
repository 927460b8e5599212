"""Processes that fill, read and evict one disk cache, and what happens to its files."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiouffd.errors import SourceError
from aiouffd.sources.cache import CachedSource, evict, layout
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


async def cached_blocks(directory: str | Path, whole: bytes, **options: Any) -> int:
    """How many blocks are cached, after a look at each."""
    right = 0
    reader = source(NoSource(whole), directory, **options)
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


class Counted:
    """Kills this process at a chosen call to the file system, before, in the middle of, or
    after it; and counts the calls if none is chosen."""

    CHANGES = ("mkdir", "open", "pwrite", "replace", "unlink", "rmdir", "utime", "fdatasync")

    def __init__(self, at: int | None, kind: str) -> None:
        self.count = 0
        self._at, self._kind = at, kind
        for name in self.CHANGES:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            mine = self.count == self._at
            self.count += 1
            if mine and self._kind == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if mine and self._kind == "within" and call.__name__ == "pwrite":
                fd, data, position = arguments
                call(fd, data[: len(data) // 3 + 7], position)
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted


#: Of the steps that are killed: a small object with zeros and a short last block.
STEPPED = random.Random(8).randbytes(20_000) + bytes(9000) + random.Random(9).randbytes(7001)


async def _steps(directory: str, version: str) -> None:
    """Fill the cache with two objects of a version, of which there is room for little more than
    one; so that something is replaced, and something evicted."""
    for key in ("other", "k"):
        inner = PlainSource(STEPPED if version == "1" else STEPPED[::-1])
        settings = {"version": version, "key": key, "size_limit": 90_000, "fsync": True}
        reader = source(inner, directory, **settings)
        await reader.open()
        # Backwards, so that what is not written yet is a hole, and not the end of a file.
        for offset in reversed(range(0, len(STEPPED), 3 * BLOCK)):
            await reader.read(offset, min(3 * BLOCK, len(STEPPED) - offset))
        await reader.aclose()


def kill_at_each_step(_loop: Any, directory: str) -> dict[str, int]:
    """Kill a process that fills the cache at each of its calls, and look at what it left behind:
    in an empty directory, and in one with another version."""
    faulthandler.cancel_dump_traceback_later()
    place, before = Path(directory, "cache"), Path(directory, "before")
    killed = cached = 0
    for filled in (False, True):
        if filled:
            _in_child(lambda: asyncio.run(_steps(str(before), "1")))
        for kind in ("before", "within", "after"):
            for at in range(10_000):
                shutil.rmtree(place, ignore_errors=True)
                if filled:
                    shutil.copytree(before, place)
                end = _in_child(lambda: _stepped(str(place), at, kind))  # noqa: B023
                for version, whole in (("1", STEPPED), ("2", STEPPED[::-1])):
                    for key in ("other", "k"):
                        looking = cached_blocks(place, whole, version=version, key=key)
                        cached += asyncio.run(looking)
                if not end:
                    break
                assert end == signal.SIGKILL, f"status {end} at {kind} {at}"
                killed += 1
    return {"killed": killed, "cached": cached}


def _stepped(directory: str, at: int, kind: str) -> None:
    Counted(at, kind)
    asyncio.run(_steps(directory, "2"))


def _in_child(call: Callable[[], None]) -> int:
    """How a child ended that calls this."""
    pid = os.fork()
    if not pid:
        try:
            call()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def forked_while_evicting(_loop: Any, directory: str) -> int:
    """What is left of the cache when a process forks while it evicts, and its child lives on."""
    faulthandler.cancel_dump_traceback_later()
    root = layout.root_of(directory)
    stay, go = os.pipe()
    with evict._locked(root, wait=False):
        child = os.fork()
        if not child:
            os.close(go)
            os.read(stay, 1)
            os._exit(0)
    left = evict.shrink(root, 0)
    os.close(go)
    os.waitpid(child, 0)
    return left


def out_of_descriptors(_loop: Any, directory: str) -> list[bool]:
    """Read everything while no file can be opened; say which segments are still there."""
    segments = sorted(Path(directory).rglob("*.seg"))
    asyncio.run(_read_without_descriptors(directory))
    return [segment.exists() for segment in segments]


async def _read_without_descriptors(directory: str) -> None:
    whole = data()
    reader = source(PlainSource(whole), directory)
    await reader.open()
    assert reader._entry is not None
    for _ in range(20):  # all threads and what they import
        await asyncio.gather(*(reader.read(0, BLOCK) for _ in range(8)))
    reader._entry.forget()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        with contextlib.suppress(OSError):
            while True:
                used.append(os.open("/dev/null", os.O_RDONLY))
        assert await reader.read(0, SIZE) == whole
        await reader.aclose()  # which waits for what was to be written
    finally:
        for fd in used:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
