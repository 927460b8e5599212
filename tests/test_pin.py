"""CPython before 3.12.7 crashes when it collects a memoryview together with what `ffi.from_buffer`
made of it: nothing of ours may hold on to such a thing, see `aiouffd.kernel.lib.pin`."""

from __future__ import annotations

import asyncio
import gc
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import serve
from aiouffd.kernel.lib import ffi, pin
from tests.guests import PlainDialect, guest
from tests.servers.nbd import nbdkit
from tests.support import ROOT, content, word

PAGE = 4096
PAGES = 256
DATA = content(PAGES * PAGE)


def lent() -> list[Any]:
    """Memoryviews that an object of cffi uses, among what the garbage collector can see."""
    return [
        view
        for owner in gc.get_objects()
        if issubclass(type(owner), ffi.CData)  # some answer for another class, and warn
        for view in gc.get_referents(owner)
        if isinstance(view, memoryview)
    ]


def test_the_check_sees_one() -> None:
    view = memoryview(DATA)
    made = ffi.from_buffer(view)
    assert any(found is view for found in lent())
    ffi.release(made)
    assert not lent()


def test_pin() -> None:
    data = bytearray(DATA)
    pointer, view = pin(memoryview(data)[PAGE:])
    assert ffi.buffer(pointer, 64)[:] == DATA[PAGE : PAGE + 64]
    with pytest.raises(BufferError):
        data.clear()
    del view
    data.clear()


@pytest.mark.parametrize("first", ["view", "owner"])
def test_a_cycle(first: str) -> None:
    program = f"""if True:
        import gc
        from aiouffd.kernel.lib import pin
        class Owner: pass
        gc.disable()
        pinned = pin(memoryview(bytearray(100))) if {first!r} == "view" else None
        owner = Owner()
        owner.pinned = pinned or pin(memoryview(bytearray(100)))
        owner.itself = owner
        del owner, pinned
        gc.collect()
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


async def test_buffers(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    for source in (DATA, memoryview(DATA), memoryview(mapped), str(tmp_path / "file")):
        async with aiouffd.open(source) as buf:
            assert await asyncio.to_thread(buf.__getitem__, 5) == DATA[5]
            assert await buf.read(PAGE, 3 * PAGE) == DATA[PAGE : 4 * PAGE]
            assert await asyncio.to_thread(buf.find, DATA[-20:]) == DATA.index(DATA[-20:])
            into = memoryview(bytearray(PAGE))
            await buf.readinto(PAGE, into)
            with pytest.raises(aiouffd.UsageError):
                await buf.readinto(-1, into)
            assert not lent()


async def test_blocks_without_a_task(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with nbdkit(tmp_path / "s", "file", str(tmp_path / "file")):
        async with aiouffd.open(f"nbd+unix:///?socket={tmp_path}/s", block_size=PAGE) as buf:
            for at in range(0, len(DATA), 8 * PAGE):
                assert await asyncio.to_thread(buf.__getitem__, at) == DATA[at]
            assert not lent()


async def test_region_and_userfaultfd() -> None:
    async with aiouffd.Pager() as pager:
        region = pager.map(len(DATA))
        short = bytearray(PAGE)
        with pytest.raises(aiouffd.UsageError):
            region.serve_from(short)
        short.clear()  # it is not kept
        region.serve_from(memoryview(DATA))
        assert await asyncio.to_thread(bytes, region.view) == DATA
        assert not lent()
        errors = []
        for bad in (1, len(DATA)):
            try:
                region.install(bad, memoryview(DATA[:PAGE]))
            except aiouffd.AiouffdError as error:
                errors.append(error)
        assert len(errors) == 2
        assert not lent()
        region.close()
    with aiouffd.Userfaultfd(user_mode_only=None) as uffd:
        try:
            uffd.copy(1, memoryview(DATA[:PAGE]))
        except aiouffd.AiouffdError as error:
            errors.append(error)
        assert len(errors) == 3
        assert not lent()


@pytest.mark.parametrize("kind", ["at hand", "fetched"])
async def test_serving(tmp_path: Path, kind: str) -> None:
    async def read(offset: int, length: int) -> bytes:
        return DATA[offset : offset + length]

    source = DATA if kind == "at hand" else aiouffd.sources.FunctionSource(read, size=len(DATA))
    server = serve.listen(tmp_path / "s", source=source, dialect=PlainDialect())
    async with server, guest(tmp_path / "s", PAGES) as one:
        assert await one.ask("word", 7) == word(7 * PAGE)
        assert await one.ask("word", 70) == word(70 * PAGE)
        assert not lent()
