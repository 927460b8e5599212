"""How far one fault walks through the package: calls, files, and ways back.

    python -m benchmarks.walk                      the table
    python -m benchmarks.walk --steps buffer       each step of one path as well
    python -m benchmarks.walk --package FOLDER     the same for the package of another checkout

`sys.setprofile` on the loop's thread notes each call of a function of the package, a coroutine that
goes on included, and each call of the native module. A move is a step into another file than the
last one was in; a return is a move to a file that had been left before. What asyncio and aiohttp do
themselves is left out. The object is on an HTTP server of its own process, and is walked to when
all is warm: several times, of which the shortest is shown, with an answer that came in one piece.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from .served import serving

PIECE = 64 * 1024
WARM_UP, WALKS = 12, 7
#: Touches one byte for each number that it reads, in a process of its own.
CLIENT = """
import sys
sys.path.insert(0, sys.argv[1])
import aiouffd
if sys.argv[2] == "attach":
    memory = aiouffd.attach(sys.argv[3])
else:
    memory = aiouffd.sync.open(sys.argv[3], block_size=65536, readahead=0)
with memory:
    print(flush=True)
    for line in sys.stdin:
        memory.view[int(line)]
        print(flush=True)
"""

#: Makes the piece with a number be needed; in a thread.
Touch = Callable[[int], None]


class Walk:
    """What one thread calls of the package, while it is noted."""

    def __init__(self, package: Path) -> None:
        self._root = f"{package}/"
        self.steps: list[tuple[str, str]] = []  # file, function
        self.native: list[str] = []

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            path = frame.f_code.co_filename
            if path.startswith(self._root):
                self.steps.append((path.removeprefix(self._root), frame.f_code.co_qualname))
        elif event == "c_call":
            name = getattr(argument, "__qualname__", "")
            if name.startswith("Lib."):
                self.native.append(name)
                self.steps.append(("", name))

    @contextmanager
    def noted(self) -> Iterator[None]:
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)

    @property
    def files(self) -> list[str]:
        """Where it was, one entry for each move."""
        found: list[str] = []
        for file, _ in self.steps:
            if file and (not found or found[-1] != file):
                found.append(file)
        return found

    @property
    def calls(self) -> int:
        return len(self.steps) - len(self.native)

    def row(self) -> str:
        files = self.files
        apart = len(set(files))
        numbers = (self.calls, len(self.native), apart, len(files), len(files) - apart)
        return " | ".join(map(str, numbers))


def _start_client(package: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(package.parent), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@asynccontextmanager
async def _client(package: Path, *arguments: str) -> AsyncIterator[Touch]:
    process = _start_client(package, *arguments)
    assert process.stdin is not None
    assert process.stdout is not None
    pipe, answers = process.stdin, process.stdout

    def touch(number: int) -> None:
        print(number * PIECE, file=pipe, flush=True)
        answers.readline()

    try:
        await asyncio.to_thread(answers.readline)
        yield touch
    finally:
        await asyncio.to_thread(process.communicate)


@asynccontextmanager
async def _buffer(package: Path, url: str) -> AsyncIterator[Touch]:
    import aiouffd

    async with aiouffd.open(url, readahead=0) as buffer:
        view = buffer.view
        try:
            yield lambda number: (view[number * PIECE], None)[1]
        finally:
            view.release()


@asynccontextmanager
async def _serve(package: Path, url: str) -> AsyncIterator[Touch]:
    import aiouffd.serve

    with tempfile.TemporaryDirectory(prefix="aiouffd-walk-") as folder:
        path = f"{folder}/socket"
        async with (
            aiouffd.serve.listen(path, source=url, handover=False),
            _client(package, "attach", path) as touch,
        ):
            yield touch


@asynccontextmanager
async def _nbd(package: Path, url: str) -> AsyncIterator[Touch]:
    from aiouffd.nbd import NbdServer
    from aiouffd.sources import HttpSource

    with tempfile.TemporaryDirectory(prefix="aiouffd-walk-") as folder:
        path = f"{folder}/socket"
        source = HttpSource(url)
        await source.open()
        try:
            async with NbdServer({"": source}) as server:
                await server.listen_unix(path)
                async with _client(package, "open", f"nbd+unix:///?socket={path}") as touch:
                    yield touch
        finally:
            await source.aclose()


PATHS = {
    "buffer": ("a fault of a lazy buffer over HTTP, readahead off", _buffer),
    "serve": ("a fault of a foreign client over HTTP", _serve),
    "nbd": ("an NBD read of 64 KiB over HTTP", _nbd),
}


async def _walk(package: Path, name: str, url: str) -> Walk:
    walks = []
    async with PATHS[name][1](package, url) as touch:
        for number in range(WARM_UP):
            await asyncio.to_thread(touch, number)
        for number in range(WARM_UP, WARM_UP + WALKS):
            walk = Walk(package)
            with walk.noted():
                await asyncio.to_thread(touch, number)
            walks.append(walk)
    return min(walks, key=lambda walk: walk.calls)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.walk", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--steps", choices=PATHS, metavar="|".join(PATHS), help="list them too")
    parser.add_argument("--package", type=Path, help="the folder that has another `aiouffd`")
    arguments = parser.parse_args()
    if arguments.package:
        sys.path.insert(0, str(arguments.package))
    import aiouffd

    package = Path(aiouffd.__file__).parent
    print("| one of | Python calls | native calls | files | moves | returns |")
    print("|---|---|---|---|---|---|", flush=True)
    with serving((WARM_UP + WALKS) * PIECE) as server:
        for name, (what, _) in PATHS.items():
            walk = asyncio.run(_walk(package, name, server.url("/object")))
            print(f"| {what} | {walk.row()} |", flush=True)
            if name == arguments.steps:
                for file, function in walk.steps:
                    print(f"    {file or 'C':28} {function}")


if __name__ == "__main__":
    main()
