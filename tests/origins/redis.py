"""A hash of blocks in a real redis-server, behind a proxy that cuts connections in foul weather."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from redis import Redis

from aiouffd.sources.redis import RedisSource
from tests.origins import Origin, in_thread
from tests.servers.redis import redis_server

BLOCK = 3000


class Weather:
    """Passes bytes on, and now and then hangs up instead."""

    def __init__(self, seed: int) -> None:
        self.foul = False
        self.chance = random.Random(seed)

    @asynccontextmanager
    async def proxy(self, path: Path, target: Path) -> AsyncIterator[None]:
        tasks: set[asyncio.Task[None]] = set()
        over = False

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if over:
                writer.close()
                return
            task = asyncio.get_running_loop().create_task(self._serve(reader, writer, target))
            tasks.add(task)
            # Also for a task that is cancelled before its first step.
            task.add_done_callback(lambda _: writer.close())
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_unix_server(connected, path)
        try:
            yield
        finally:
            over = True
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Who was accepted already reaches `connected` some turns of the loop later.
            for _ in range(5):
                await asyncio.sleep(0)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Path
    ) -> None:
        # Not to be cancelled half-way: the connection would be nobody's.
        inner = asyncio.ensure_future(asyncio.open_unix_connection(target))
        try:
            inner_reader, inner_writer = await asyncio.shield(inner)
        except asyncio.CancelledError:
            (await inner)[1].close()
            raise
        ways = [
            asyncio.ensure_future(self._pass_on(reader, inner_writer)),
            asyncio.ensure_future(self._pass_on(inner_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            inner_writer.close()  # first, for we may be cancelled while we wait
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.foul and self.chance.random() < 0.1:
                writer.write(data[: self.chance.randrange(len(data))])
                return
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def origin(data: bytes, seed: int) -> AsyncIterator[Origin]:
    weather = Weather(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with redis_server(folder):
            with Redis(unix_socket_path=str(folder / "redis")) as client:
                fields = {
                    str(at // BLOCK): data[at : at + BLOCK] for at in range(0, len(data), BLOCK)
                }
                client.hset("a", mapping={**fields, "size": len(data), "block_size": BLOCK})
            with in_thread(weather.proxy(folder / "proxy", folder / "redis")):
                yield Origin(
                    RedisSource(f"unix://{folder}/proxy", "a", layout="hash", timeout=2.0),
                    foul=lambda: setattr(weather, "foul", True),
                    fair=lambda: setattr(weather, "foul", False),
                )
