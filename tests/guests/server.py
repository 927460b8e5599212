"""A server of the plain dialect as a process of its own.

    python -m tests.guests.server PATH SIZE [--delay SECONDS] [--block BYTES] [--loop NAME]

Its object has the word n / 8 + 1 at byte n. Prints a line when it listens, and one of counters when
it ends, at the end of its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import resource
import sys
from typing import Any

from aiouffd import serve
from aiouffd.sources import FunctionSource
from tests.guests import PlainDialect
from tests.support import content


async def main(parsed: argparse.Namespace) -> None:
    source: Any = content(parsed.size)
    if parsed.delay:
        data = source

        async def read(offset: int, length: int) -> bytes:
            await asyncio.sleep(parsed.delay)
            return data[offset : offset + length]

        source = FunctionSource(read, size=parsed.size)
    server = serve.listen(
        parsed.path, source=source, dialect=PlainDialect(), block_size=parsed.block, keep=0
    )
    async with server:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        stats = server.stats
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(stats.faults, server.refused, used.ru_utime + used.ru_stime, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("size", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--block", type=int, default=4096)
    parser.add_argument("--loop", default="asyncio")
    arguments = parser.parse_args()
    factory = (
        importlib.import_module("uvloop").new_event_loop
        if arguments.loop == "uvloop"
        else asyncio.new_event_loop
    )
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(arguments))
