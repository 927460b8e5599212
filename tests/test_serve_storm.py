"""A guest whose balloon inflates, dropping page after page, while it goes on working."""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from aiouffd import serve
from aiouffd.foreign import filling
from aiouffd.kernel.lib import ffi, lib
from aiouffd.sources import FunctionSource
from tests.guests import PlainDialect
from tests.support import ROOT, content, wait_until

PAGE = 4096
PAGES = 4096
DATA = content(PAGES * PAGE)
#: Seconds in which a guest gets through, on any machine: it takes a fraction of one.
LIMIT = 30


@functools.cache
def balloon() -> str:
    """The guest, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = ROOT / "tests" / "guests" / "balloon.c"
    program = f"{tempfile.mkdtemp(prefix='aiouffd-balloon-')}/balloon"
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([compiler, *options, str(source), "-o", program], check=True)
    return program


async def start(path: Path, *numbers: int) -> asyncio.subprocess.Process:
    program = await asyncio.to_thread(balloon)
    return await asyncio.create_subprocess_exec(
        program, str(path), *map(str, numbers), stdout=asyncio.subprocess.PIPE
    )


async def slowly(offset: int, length: int) -> bytes:
    await asyncio.sleep(0.0005)
    return DATA[offset : offset + length]


@pytest.mark.parametrize("block", [PAGE, 65536])
@pytest.mark.parametrize(
    "source", [DATA, FunctionSource(slowly, len(DATA), portable=True)], ids=["at hand", "slow"]
)
@pytest.mark.parametrize(("batch", "gap"), [(1, 100), (256, 20)])
async def test_a_guest_goes_on(
    tmp_path: Path, source: Any, block: int, batch: int, gap: int
) -> None:
    """With right bytes, and zeros where the balloon has been."""
    options = {"source": source, "dialect": PlainDialect(), "block_size": block}
    async with serve.listen(tmp_path / "s", **options) as server:
        guest = await start(tmp_path / "s", PAGES, batch, gap, 300, 50)
        try:
            out, _ = await asyncio.wait_for(guest.communicate(), LIMIT)
        finally:
            if guest.returncode is None:
                guest.kill()
                await guest.wait()
        touches, wrong, calls, *_ = map(int, out.split())
        assert (touches, wrong) == (300, 0)
        assert calls > 0
        assert server.stats.events >= calls
        assert server.stats.poisoned_pages == 0


async def test_what_is_missing_becomes_errors_nevertheless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dialect = PlainDialect()
    async with serve.listen(tmp_path / "s", source=DATA, dialect=dialect) as server:
        guest = await start(tmp_path / "s", PAGES, 256, 20, PAGES // 2, 200)
        memory = await dialect.memories.get()
        await asyncio.to_thread(wait_until, lambda: server.stats.events > 100, "a storm")
        with caplog.at_level(logging.ERROR, "aiouffd"):
            await memory.give_up()
        await asyncio.wait_for(guest.communicate(), LIMIT)
    assert guest.returncode == -signal.SIGBUS
    assert "may read as zeros" not in caplog.text


async def test_events_that_a_fill_meets_take_effect_before_it_returns() -> None:
    """Or the next one would put bytes where zeros are owed."""
    order: list[str] = []
    tried = asyncio.Event()

    class Owner:
        def overhear(self, messages: memoryview, count: int) -> None:
            order.append(f"overhears {count}")

        def hear(self) -> dict[int, int]:
            order.append("hears")
            return {0x7000: 1}

        def serve(self, address: int, flags: int = 0) -> None:
            order.append(f"serves {address:#x}")

        def caught_up(self) -> None:
            tried.set()

        def vanished(self) -> None:
            raise AssertionError

        def broken(self, error: Exception) -> None:
            raise error

    class Native:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def au_foreign_fill(self, *arguments: Any) -> int:
            heard = arguments[-1]
            if heard == ffi.NULL:
                return PAGE
            heard.count = 3
            return PAGE

    filler = filling.Filler(Owner(), 1000, serve.MemoryStats())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "lib", Native())
        assert filler.put(lib.AU_OP_ZERO, 0x5000, ffi.NULL, PAGE, PAGE) == PAGE
        assert order == []
        assert filler.put(lib.AU_OP_ZERO, 0x5000, ffi.NULL, PAGE, PAGE, urgent=True) == PAGE
        order.append("returns")
        await tried.wait()
    assert order == ["overhears 3", "returns", "hears", "serves 0x7000"]
    filler.stop()
