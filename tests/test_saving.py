"""Saving a buffer's bytes, and giving its memory back."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

import aiouffd
from aiouffd import ClosedError, SourceError, UsageError
from aiouffd.kernel.lib import PAGE_SIZE
from tests.faulty import FailingSource, PlainSource, final
from tests.support import Gate, content

BLOCK = 65536
SIZE = 5 * BLOCK + PAGE_SIZE + 120


@pytest.fixture
def data() -> bytes:
    return content(SIZE + 8)[:SIZE]


class TestSave:
    async def test_all_of_it(self, data: bytes, tmp_path: Path) -> None:
        source = PlainSource(data)
        async with aiouffd.open(source) as buf:
            assert await buf.save(tmp_path / "copy") == SIZE
            assert source.bytes_read == SIZE
            await buf.save(str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == data
        assert os.listdir(tmp_path) == ["copy"]

    async def test_without_privileges(self, data: bytes, tmp_path: Path) -> None:
        """Where write(2) from the memory itself is EFAULT."""
        async with aiouffd.open(PlainSource(data), user_mode_only=True) as buf:
            descriptor = os.open(tmp_path / "raw", os.O_WRONLY | os.O_CREAT)
            with pytest.raises(OSError, match="Bad address"):
                await asyncio.to_thread(os.write, descriptor, buf.view)
            os.close(descriptor)
            await buf.save(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data

    async def test_a_part(self, data: bytes, tmp_path: Path) -> None:
        source = PlainSource(data)
        async with aiouffd.open(source) as buf:
            assert await buf.save(tmp_path / "part", BLOCK + 5, 1000) == 1000
            assert source.bytes_read == BLOCK
            await buf.save(tmp_path / "nothing", 5, 0)
            with pytest.raises(UsageError):
                await buf.save(tmp_path / "wrong", 5, SIZE)
        assert (tmp_path / "part").read_bytes() == data[BLOCK + 5 :][:1000]
        assert (tmp_path / "nothing").read_bytes() == b""
        assert not (tmp_path / "wrong").exists()

    def test_sync(self, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with aiouffd.sync.open(PlainSource(data)) as buf:
            assert buf.save("copy") == SIZE
        assert (tmp_path / "copy").read_bytes() == data
        with aiouffd.sync.open(b"") as empty:
            empty.save("empty")
        assert (tmp_path / "empty").read_bytes() == b""

    async def test_what_was_written(self, data: bytes, tmp_path: Path) -> None:
        async with aiouffd.open(PlainSource(data), writable=True) as buf:
            await buf.fetch(0, BLOCK)
            buf.view[10:13] = b"new"
            await buf.save(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data[:10] + b"new" + data[13:]

    async def test_what_it_replaces(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "old").write_bytes(b"old")
        (tmp_path / "old").chmod(0o640)
        (tmp_path / "link").symlink_to("old")
        async with aiouffd.open(PlainSource(data)) as buf:
            await buf.save(tmp_path / "link")
            with pytest.raises(IsADirectoryError):
                await buf.save(tmp_path)
            with pytest.raises(FileNotFoundError):
                await buf.save(tmp_path / "none" / "copy")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "old").read_bytes() == data
        assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640

    async def test_a_failure_leaves_what_was_there(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"old")
        async with aiouffd.open(FailingSource(data, 9, final), errors="soft") as buf:
            with pytest.raises(SourceError, match="disk is gone"):
                await buf.save(tmp_path / "file")
        with pytest.raises(ClosedError):
            await buf.save(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]

    async def test_cancelling_leaves_what_was_there(self, data: bytes, tmp_path: Path) -> None:
        gate = Gate(data, is_open=False)
        async with aiouffd.open(gate.read, size=SIZE) as buf:
            saving = asyncio.create_task(buf.save(tmp_path / "file"))
            await asyncio.to_thread(gate.wait)
            assert not (tmp_path / "file").exists()
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            gate.open()
        assert os.listdir(tmp_path) == []


class TestDrop:
    async def test_a_touch_fetches_anew(self, data: bytes) -> None:
        source = PlainSource(data)
        async with aiouffd.open(source) as buf:
            array = np.frombuffer(buf.view, "u1")
            await buf.fetch()
            source.data = data = bytes(SIZE - 1) + b"x"
            assert await buf.drop() >= SIZE
            assert buf.resident() == []
            assert buf.stats.resident_bytes == 0
            assert await asyncio.to_thread(array.tobytes) == data
            del array

    async def test_whole_pages_of_a_range(self, data: bytes) -> None:
        async with aiouffd.open(PlainSource(data)) as buf:
            await buf.fetch()
            assert await buf.drop(100, 2 * PAGE_SIZE) == PAGE_SIZE
            assert buf.resident() == [(0, PAGE_SIZE), (2 * PAGE_SIZE, SIZE)]
            assert await buf.drop(5, 10) == 0
            assert await buf.drop(SIZE, 0) == 0
            assert await buf.drop(SIZE - 121) == PAGE_SIZE
            assert await buf.read() == data
            with pytest.raises(UsageError):
                await buf.drop(0, SIZE + 1)

    async def test_what_is_pinned_stays(self, data: bytes) -> None:
        async with aiouffd.open(PlainSource(data)) as buf:
            await buf.fetch()
            async with buf.pin(PAGE_SIZE + 5, PAGE_SIZE) as view:
                await buf.drop()
                assert buf.resident() == [(PAGE_SIZE, 3 * PAGE_SIZE)]
                assert view == data[PAGE_SIZE + 5 :][:PAGE_SIZE]
            await buf.drop()
            assert buf.resident() == []

    async def test_writes_are_not_lost_unasked(self, data: bytes) -> None:
        async with aiouffd.open(PlainSource(data), writable=True) as buf:
            await buf.fetch()
            buf.view[0] = 99
            with pytest.raises(UsageError, match="would be lost"):
                await buf.drop()
            assert buf[0] == 99
            await buf.drop(writes_too=True)
            assert await buf.read(0, 1) == data[:1]

    def test_sync_and_native(self, data: bytes) -> None:
        with aiouffd.sync.open(data) as buf:
            assert buf[:] == data
            assert buf.drop() >= SIZE
            with buf.pin(0, 10):
                buf.drop()
                assert buf.resident() == [(0, PAGE_SIZE)]
            assert buf[:] == data

    async def test_while_others_read(self, data: bytes) -> None:
        """Bytes are right whatever is dropped meanwhile."""
        wrong: list[int] = []
        async with aiouffd.open(PlainSource(data), readahead=0) as buf:
            stop = threading.Event()

            def read() -> None:
                while not stop.is_set():
                    if buf[BLOCK - 50 : 3 * BLOCK] != data[BLOCK - 50 : 3 * BLOCK]:
                        wrong.append(1)

            readers = [asyncio.create_task(asyncio.to_thread(read)) for _ in range(2)]
            for _ in range(60):
                await buf.drop()
                assert await buf.read() == data
            stop.set()
            await asyncio.gather(*readers)
        assert not wrong


def test_an_empty_path_is_no_folder() -> None:
    with aiouffd.sync.open(b"abc") as buf, pytest.raises(aiouffd.UsageError, match="is a path"):
        buf.save("")


async def test_an_empty_path_is_no_folder_async() -> None:
    async with aiouffd.open(b"abc") as buf:
        with pytest.raises(aiouffd.UsageError, match="the path is empty"):
            await buf.save("")
