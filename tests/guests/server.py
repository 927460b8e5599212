"""A server of the plain dialect as a process of its own.

    python -m tests.guests.server PATH SIZE [--delay SECONDS] [--block BYTES] [--loop NAME]
        [--take-over] [--die-at FUNCTION:COUNT]

Its object has the word n / 8 + 1 at byte n. Prints a line when it listens, and one of counters when
it ends: at the end of its standard input, or when a successor has taken over. With ``--die-at`` it
kills itself as a function of the hand-over is called for the given time, from 1.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import os
import resource
import signal
import sys
from typing import Any

from aiouffd import serve
from aiouffd.serve import handover
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
        parsed.path,
        source=source,
        dialect=PlainDialect(),
        block_size=parsed.block,
        keep=0,
        take_over=parsed.take_over,
    )
    async with server:
        print("ready", flush=True)
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), server.taken_over.set)
        await server.taken_over.wait()
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stats = server.stats
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(stats.faults, server.refused, used.ru_utime + used.ru_stime, flush=True)


def die_at(name: str, count: int) -> None:
    whole = getattr(handover, name)
    calls = itertools.count(1)

    def dying(*arguments: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    setattr(handover, name, dying)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("size", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--block", type=int, default=4096)
    parser.add_argument("--loop", default="asyncio")
    parser.add_argument("--take-over", action="store_true")
    parser.add_argument("--die-at")
    arguments = parser.parse_args()
    if arguments.die_at:
        function, _, times = arguments.die_at.partition(":")
        die_at(function, int(times))
    factory = (
        importlib.import_module("uvloop").new_event_loop
        if arguments.loop == "uvloop"
        else asyncio.new_event_loop
    )
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(arguments))
