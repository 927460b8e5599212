"""Memory of another machine, page by page over TCP: the framework below lazy buffers.

    python examples/tcp_pager.py

A server (here on loopback, on the same event loop) holds 4 MiB. A region of the same size
begins empty; its handler, a coroutine, asks the server for each block that a thread touches,
and installs the answer. The worker thread just reads memory.

The protocol: the client sends offset and length as two little-endian 64-bit numbers, the
server answers with the bytes. Requests are pipelined on one connection: answers come in the
order of the requests.
"""

import argparse
import asyncio
import hashlib
import random
import struct
from collections import deque

import aiouffd

SIZE = 4 << 20
BLOCK = 16 * 1024
TOUCHES = 40
REQUEST = struct.Struct("<QQ")
DATA = random.Random(2015).randbytes(SIZE)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One client of the memory server."""
    try:
        while True:
            offset, length = REQUEST.unpack(await reader.readexactly(REQUEST.size))
            writer.write(DATA[offset : offset + length])
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the client has gone
    finally:
        writer.close()


class Client:
    """Asks a memory server, with many requests under way at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: deque[tuple[int, asyncio.Future[bytes]]] = deque()
        self._task = asyncio.create_task(self._receive())
        self.requests = 0

    async def read(self, offset: int, length: int) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((length, answer))
        self._writer.write(REQUEST.pack(offset, length))
        self.requests += 1
        return await answer

    async def _receive(self) -> None:
        try:
            while True:
                # A byte of an answer, or the end; then everything that belongs to it.
                first = await self._reader.readexactly(1)
                length, answer = self._waiting.popleft()
                data = first + await self._reader.readexactly(length - 1)
                if not answer.cancelled():
                    answer.set_result(data)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            for _, answer in self._waiting:
                if not answer.done():
                    answer.set_exception(ConnectionError(f"the server has gone: {error}"))

    async def close(self) -> None:
        self._writer.write_eof()
        await self._task  # the server closes its side when it has seen the end of ours
        self._writer.close()


def use(memory: memoryview) -> int:
    """What a program does with memory: here, touch it in some places. Counts wrong bytes."""
    places = random.Random(7).sample(range(SIZE), TOUCHES)
    return sum(memory[place] != DATA[place] for place in places)


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client(*await asyncio.open_connection(*server.sockets[0].getsockname()))
    async with aiouffd.Pager() as pager:
        region = pager.map(SIZE, block_size=BLOCK, writable=False)

        @region.on_missing
        async def fetch(fault: aiouffd.Fault) -> None:
            fault.copy(await client.read(fault.offset, fault.length))

        wrong = await asyncio.to_thread(use, region.view)
        print(f"{TOUCHES} bytes read, {wrong} of them wrong")
        print(
            f"{client.requests} blocks of {BLOCK // 1024} KiB fetched:"
            f" {region.resident_bytes / SIZE:.0%} of {SIZE >> 20} MiB"
        )
        # hashlib reads without the GIL, so it needs no help from the GIL yield.
        digest = await asyncio.to_thread(lambda: hashlib.sha256(region.view).hexdigest())
        same = digest == hashlib.sha256(DATA).hexdigest()
        print(f"all of it hashed: {'the same' if same else 'DIFFERENT'}, {client.requests} blocks")
    await client.close()
    server.close()
    if wrong or not same:
        raise SystemExit("the memory has the wrong contents")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    asyncio.run(main())
