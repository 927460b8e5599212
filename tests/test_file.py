"""Lazy buffers as files: what a file promises, who waits how, what libraries fetch by it."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import http.client
import io
import itertools
import json
import lzma
import mmap
import pickle
import random
import shutil
import tarfile
import threading
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiouffd
from aiouffd import ClosedError, SourceError, UsageError
from tests.faulty import FailingSource, PlainSource, final
from tests.support import Gate, content

BLOCK = 65536
SIZE = 5 * BLOCK + 12_345


@pytest.fixture
def data() -> bytes:
    return content(SIZE + 8 - SIZE % 8)[:SIZE]


@pytest.fixture
def file(data: bytes) -> Iterator[aiouffd.BufferFile]:
    with aiouffd.open_file(PlainSource(data)) as file:
        yield file


class TestFile:
    def test_it_is_a_binary_file(self, file: aiouffd.BufferFile) -> None:
        assert isinstance(file, io.RawIOBase)
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        assert (file.mode, file.size, file.name) == ("rb", SIZE, "PlainSource")
        assert "at 0 of" in repr(file)
        for call in (file.fileno, file.truncate, lambda: file.write(b"x")):
            with pytest.raises(io.UnsupportedOperation):
                call()
        with pytest.raises(TypeError, match="pickle the lazy buffer"):
            pickle.dumps(file)

    def test_it_does_what_bytesio_does(self, file: aiouffd.BufferFile, data: bytes) -> None:
        model, chance = io.BytesIO(data), random.Random(3)
        for _ in range(1500):
            place, count = chance.randrange(-5, SIZE + 99), chance.choice([0, 1, 77, BLOCK, SIZE])
            match chance.randrange(6):
                case 0:
                    arguments: tuple[Any, ...] = (max(0, place),)
                case 1:
                    arguments = (chance.choice([0, -1, -place, SIZE + 5]), 2)
                case 2:
                    arguments = (chance.randrange(-99, 99), 1)
                case 3:
                    assert file.read(count) == model.read(count)
                    continue
                case 4:
                    into = bytearray(b"x" * count), bytearray(b"x" * count)
                    assert file.readinto(into[0]) == model.readinto(into[1])
                    assert into[0] == into[1]
                    continue
                case _:
                    assert file.read() == model.read()
                    continue
            position = (0, model.tell(), SIZE)[arguments[1] if len(arguments) > 1 else 0]
            if position + arguments[0] < 0:  # BytesIO is more generous
                with pytest.raises(OSError, match="before the start"):
                    file.seek(*arguments)
                continue
            assert file.seek(*arguments) == model.seek(*arguments)
            assert file.tell() == model.tell()

    def test_what_is_no_position(self, file: aiouffd.BufferFile) -> None:
        for arguments in ((-1,), (-1, 1), (-SIZE - 1, 2)):
            with pytest.raises(OSError, match="before the start"):
                file.seek(*arguments)
        with pytest.raises(ValueError, match="whence"):
            file.seek(0, 7)
        with pytest.raises(OverflowError):
            file.seek(1 << 63)
        for numbers in ((1.5, 0), (1, 1.5)):
            with pytest.raises(TypeError, match="integer"):
                file.pread(*numbers)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            file.seek(1.5)  # type: ignore[arg-type]
        for size, offset in ((-1, 0), (1, -1)):
            with pytest.raises(UsageError):
                file.pread(size, offset)
        assert file.tell() == 0

    def test_what_needs_a_descriptor(self, file: aiouffd.BufferFile) -> None:
        for call in (
            lambda: mmap.mmap(file.fileno(), 0),
            lambda: np.fromfile(file),  # type: ignore[call-overload]
            lambda: np.memmap(file, mode="r"),  # type: ignore[call-overload]
        ):
            with pytest.raises(io.UnsupportedOperation, match=r"buf\.view.*buf\.save"):
                call()

    def test_pread_leaves_the_position(self, file: aiouffd.BufferFile, data: bytes) -> None:
        file.seek(7)
        assert file.pread(100, BLOCK - 50) == data[BLOCK - 50 :][:100]
        assert file.pread(100, SIZE - 10) == data[-10:]
        assert file.pread(100, SIZE + 10) == b""
        assert file.tell() == 7

    def test_lines(self) -> None:
        text = b"one\ntwo two\n\n" + b"x" * (2 * BLOCK) + b"\nlast"
        source = PlainSource(text + b"\n" + bytes(50 * BLOCK))
        with aiouffd.open_file(source, readahead=0) as file:
            lines = io.BytesIO(text).readlines()
            assert [file.readline() for _ in lines] == [*lines[:-1], b"last\n"]
            file.seek(4)
            assert (file.readline(3), file.readline(0), file.readline()) == (b"two", b"", b" two\n")
            assert source.bytes_read == 3 * BLOCK
        with aiouffd.open_file(text) as file:
            assert list(file) == lines
            file.seek(0)
            assert io.TextIOWrapper(io.BufferedReader(file)).readlines()[1] == "two two\n"

    def test_closing(self, data: bytes) -> None:
        file = aiouffd.open_file(data)
        with file as same:
            assert same is file
        assert file.closed
        file.close()
        for call in (file.read, file.tell, file.readline, file.readable, file.readall):
            with pytest.raises(ValueError, match="closed file"):
                call()
        for call in (lambda: file.seek(0), lambda: file.pread(1, 0), lambda: file.readinto(b"")):
            with pytest.raises(ValueError, match="closed file"):
                call()

    def test_an_empty_object(self) -> None:
        with aiouffd.open_file(b"") as file:
            assert (file.read(), file.read(5), file.readline(), file.seek(0, 2)) == (b"",) * 3 + (
                0,
            )

    def test_one_that_nobody_closed(self, data: bytes) -> None:
        with pytest.warns(ResourceWarning, match="unclosed file"):
            aiouffd.open_file(data)

    def test_a_file_that_cannot_be_opened(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            aiouffd.open_file(tmp_path / "nothing")
        with pytest.raises(UsageError, match="not open"):
            aiouffd.open(b"abc").file()


class TestOverBuffers:
    async def test_each_file_has_a_position_of_its_own(self, data: bytes) -> None:
        async with aiouffd.open(PlainSource(data)) as buf:
            with buf.file() as one, buf.file() as two:
                assert await asyncio.to_thread(one.read, 10) == data[:10]
                assert two.tell() == 0
                assert await asyncio.to_thread(two.read) == data

    async def test_an_open_file_holds_the_memory(self, data: bytes) -> None:
        buf = await aiouffd.open(PlainSource(data))
        file = buf.file()
        await buf.aclose()
        assert await asyncio.to_thread(file.read) == data
        drained = asyncio.create_task(buf.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        file.close()
        await drained

    async def test_a_file_of_a_buffer_closed_by_force(self, data: bytes) -> None:
        buf = await aiouffd.open(PlainSource(data))
        with buf.file() as file:
            await buf.aclose(force=True)
            with pytest.raises(ClosedError):
                file.read(1)
            assert file.tell() == 0

    def test_it_outlives_its_loop(self, data: bytes) -> None:
        async def main() -> aiouffd.BufferFile:
            async with aiouffd.open(PlainSource(data)) as buf:
                return buf.file()

        with asyncio.run(main()) as file:
            assert file.read() == data

    def test_the_buffer_ends_before_the_file(self, data: bytes) -> None:
        with aiouffd.sync.open(PlainSource(data)) as buf:
            file = buf.file()
        with file:
            assert file.read(100) == data[:100]

    async def test_a_read_on_the_loops_own_thread(self, data: bytes, loop_errors: Any) -> None:
        """It waits as a touch does, is served by the rescue loop, and warned of."""
        async with aiouffd.open(PlainSource(data)) as buf:
            with buf.file() as file:
                assert file.read(3 * BLOCK) == data[: 3 * BLOCK]


class TestThreads:
    def test_threads_share_out_a_file(self, data: bytes) -> None:
        found: list[bytes] = []
        with aiouffd.open_file(PlainSource(data)) as file:

            def work() -> None:
                while piece := file.read(1000):
                    found.append(piece)

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        pieces = [data[at : at + 1000] for at in range(0, SIZE, 1000)]
        assert sorted(found) == sorted(pieces)

    def test_they_wait_at_the_same_time(self, data: bytes) -> None:
        gate = Gate(data, is_open=False)
        with aiouffd.open_file(gate.read, size=SIZE, readahead=0) as file:
            threads = [
                threading.Thread(target=file.pread, args=(10, number * BLOCK))
                for number in range(5)
            ]
            for thread in threads:
                thread.start()
            gate.wait(5)
            gate.open()
            for thread in threads:
                thread.join()

    def test_a_long_read_asks_for_all_at_once(self, data: bytes) -> None:
        gate = Gate(data, is_open=False)
        with aiouffd.open_file(gate.read, size=SIZE, readahead=0, block_size=4096) as file:
            thread = threading.Thread(target=file.read)
            thread.start()
            while not file._buffer.stats.in_flight:
                gate.wait()
            gate.open()
            thread.join()
            assert file._buffer.stats.flights <= 3  # the first block may be touched before


class TestFailure:
    def test_the_position_stays_and_a_read_tries_again(self, data: bytes) -> None:
        with aiouffd.open_file(FailingSource(data, 2, final), errors="soft") as file:
            file.seek(100)
            with pytest.raises(SourceError) as caught:
                file.read(10)
            assert isinstance(caught.value, OSError)
            assert file.tell() == 100
            with pytest.raises(SourceError, match="disk is gone"):
                file.readinto(bytearray(10))
            assert file.tell() == 100
            assert file.read(10) == data[100:110]

    def test_a_line_that_cannot_be_had(self, data: bytes) -> None:
        with aiouffd.open_file(FailingSource(data, 1, final), errors="soft") as file:
            with pytest.raises(SourceError):
                file.readline()
            assert file.tell() == 0

    async def test_a_buffer_heals_by_fetch(self, data: bytes) -> None:
        async with aiouffd.open(FailingSource(data, 1, final), errors="soft") as buf:
            with buf.file() as file:
                with pytest.raises(SourceError, match="fetch"):
                    await asyncio.to_thread(file.read, 10)
                await buf.fetch(0, 10)
                assert await asyncio.to_thread(file.read, 10) == data[:10]


class TestWhatIsFetched:
    """Bytes asked of the source, in a large object."""

    LARGE = 64 << 20

    @pytest.fixture
    def source(self) -> PlainSource:
        return PlainSource(bytes(self.LARGE))

    def test_a_long_read_fetches_what_it_reads(self, source: PlainSource) -> None:
        with aiouffd.open_file(source) as file:
            for at, length in ((50 << 20, 3 << 20), (1 << 20, 5 << 20), (10 << 20, 33 << 20)):
                file.seek(at)
                assert len(file.read(length)) == length
        assert source.bytes_read == 41 << 20

    def test_all_of_it_is_fetched_once(self, source: PlainSource) -> None:
        with aiouffd.open_file(source) as file:
            assert len(file.read()) == self.LARGE
        assert source.bytes_read == self.LARGE

    @pytest.mark.parametrize("step", [4096, BLOCK, 1 << 20])
    def test_reads_in_a_row_are_read_ahead(self, source: PlainSource, step: int) -> None:
        with aiouffd.open_file(source) as file:
            while file.read(step):
                pass
            faulted = file._buffer.stats.faulted_blocks
        assert source.bytes_read == self.LARGE
        assert faulted < 300  # of 1024 blocks

    def test_a_zip_archive(self, tmp_path: Path) -> None:
        noise = random.Random(5).randbytes
        path = tmp_path / "archive.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(64):
                archive.writestr(f"member{number}", noise(1 << 20))
        source = PlainSource(path.read_bytes())
        with (
            aiouffd.open_file(source) as file,
            zipfile.ZipFile(file) as archive,
            zipfile.ZipFile(path) as known,
        ):
            assert archive.namelist() == known.namelist()
            assert source.bytes_read <= 2 * BLOCK
            assert archive.read("member40") == known.read("member40")
            assert source.bytes_read <= 4 << 20
            assert archive.testzip() is None

    def test_a_tar_archive(self, tmp_path: Path) -> None:
        noise = random.Random(6).randbytes(1 << 20)
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for number in range(32):
                member = tarfile.TarInfo(f"member{number}")
                member.size = len(noise)
                archive.addfile(member, io.BytesIO(noise))
        source = PlainSource((tmp_path / "a.tar").read_bytes())
        with aiouffd.open_file(source) as file, tarfile.open(fileobj=file) as archive:
            assert len(archive.getnames()) == 32  # a header before each member
            found = archive.extractfile("member20")
            assert found is not None
            assert found.read() == noise
        assert source.bytes_read <= (4 << 20) + 33 * BLOCK

    def test_what_readers_above_it_fetch(self) -> None:
        """One block of what they are asked for, whatever the size of their own buffer."""
        lines = b"".join(b"%099d\n" % number for number in range(100_000))
        source = PlainSource(lines)
        with aiouffd.open_file(source) as file:
            reader = io.BufferedReader(file)
            assert reader.readline() == lines[:100]
            assert source.bytes_read == BLOCK
            reader.seek(-100, io.SEEK_END)
            assert io.TextIOWrapper(reader).readlines() == [f"{99_999:099d}\n"]
            assert source.bytes_read <= 2 * BLOCK


class TestLibraries:
    """They take the file as any other."""

    @pytest.mark.parametrize("data", [b"", b"abc", bytes(30)])
    def test_what_is_no_archive(self, data: bytes) -> None:
        """zipfile knows it by the OSError of a position before the start."""
        with aiouffd.open_file(data) as file:
            assert not zipfile.is_zipfile(file)
            with pytest.raises(zipfile.BadZipFile):
                zipfile.ZipFile(file)
            file.seek(0)
            with pytest.raises(tarfile.ReadError):
                tarfile.open(fileobj=file)  # noqa: SIM115

    def test_the_standard_library(self, data: bytes) -> None:
        known = {"numbers": list(range(50_000)), "text": "t" * 100_000}
        with aiouffd.open_file(PlainSource(pickle.dumps(known, 5))) as file:
            assert pickle.load(file) == known
        with aiouffd.open_file(PlainSource(json.dumps(known).encode())) as file:
            assert json.load(file) == known
        for packer in (gzip, bz2, lzma):
            with (
                aiouffd.open_file(PlainSource(packer.compress(data))) as file,
                packer.open(file) as unpacked,
            ):
                assert unpacked.read() == data
        with aiouffd.open_file(PlainSource(data)) as file:
            shutil.copyfileobj(file, copied := io.BytesIO())
            assert copied.getvalue() == data

    async def test_an_upload(self, data: bytes) -> None:
        """aiohttp and http.client send it in pieces that they read."""
        aiohttp = pytest.importorskip("aiohttp")
        web = pytest.importorskip("aiohttp.web")

        async def take(request: Any) -> Any:
            return web.Response(body=b"same" if await request.read() == data else b"other")

        def send(file: aiouffd.BufferFile) -> bytes:
            connection = http.client.HTTPConnection(*address)
            connection.request("PUT", "/", file, {"Content-Length": str(file.size)})
            with connection.getresponse() as response:
                answer = response.read()
            connection.close()
            return answer

        application = web.Application()
        application.router.add_route("PUT", "/", take)
        async with aiouffd.open(PlainSource(data)) as buf:
            runner = web.AppRunner(application)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            address = runner.addresses[0]
            with buf.file() as file:
                assert await asyncio.to_thread(send, file) == b"same"
            async with aiohttp.ClientSession() as session:
                url = f"http://{address[0]}:{address[1]}/"
                async with session.put(url, data=buf.file()) as response:
                    assert await response.read() == b"same"
            await runner.cleanup()

    def test_soundfile(self, tmp_path: Path) -> None:
        soundfile = pytest.importorskip("soundfile")
        samples = np.random.default_rng(11).random(1_000_000) - 0.5
        soundfile.write(tmp_path / "t.wav", samples, 48_000, subtype="DOUBLE")
        source = PlainSource((tmp_path / "t.wav").read_bytes())
        with aiouffd.open_file(source) as file, soundfile.SoundFile(file) as sound:
            sound.seek(800_000)
            assert np.array_equal(sound.read(1000), samples[800_000:][:1000])
        assert source.bytes_read <= 4 * BLOCK

    def test_torch(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        tensors = {"a": torch.arange(100_000), "b": torch.ones(7)}
        torch.save(tensors, tmp_path / "t.pt")
        with aiouffd.open_file(tmp_path / "t.pt") as file:
            found = torch.load(file, mmap=False, weights_only=True)
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    def test_numpy(self, tmp_path: Path) -> None:
        array = np.arange(300_000.0).reshape(300, 1000)
        np.save(tmp_path / "a.npy", array)
        np.savez_compressed(tmp_path / "b.npz", a=array, b=array[:3])
        with aiouffd.open_file(tmp_path / "a.npy") as file:
            assert np.array_equal(np.load(file), array)
        with aiouffd.open_file(tmp_path / "b.npz") as file, np.load(file) as found:
            assert np.array_equal(found["b"], array[:3])

    def test_pyarrow(self, tmp_path: Path) -> None:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        noise = np.random.default_rng(6)
        table = pa.table({f"c{n}": noise.random(500_000) for n in range(10)})
        pq.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
        source = PlainSource((tmp_path / "t.parquet").read_bytes())
        for pre_buffer in (False, True):
            del source.reads[:]
            with (
                aiouffd.open_file(source) as file,
                pq.ParquetFile(file, pre_buffer=pre_buffer) as parquet,
            ):
                found = parquet.read(columns=["c4"])
                assert found.column("c4").equals(table.column("c4"))
            assert source.bytes_read <= 1.3 * table.column("c4").nbytes

    def test_arrow_ipc(self, tmp_path: Path) -> None:
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"a": np.arange(100_000), "b": np.arange(100_000) / 3})
        with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
            writer.write_table(table)
        with aiouffd.open_file(tmp_path / "t.arrow") as file:
            assert pa.ipc.open_file(file).read_all().equals(table)

    def test_pandas(self, tmp_path: Path) -> None:
        pd = pytest.importorskip("pandas")
        frame = pd.DataFrame({"a": range(5000), "b": [f"text {n}" for n in range(5000)]})
        frame.to_csv(tmp_path / "t.csv", index=False)
        frame.to_parquet(tmp_path / "t.parquet")
        with aiouffd.open_file(tmp_path / "t.csv") as file:
            assert pd.read_csv(file).equals(frame)
        with aiouffd.open_file(tmp_path / "t.parquet") as file:
            assert pd.read_parquet(file).equals(frame)

    def test_h5py(self, tmp_path: Path) -> None:
        h5py = pytest.importorskip("h5py")
        noise = np.random.default_rng(7).random((1000, 2000))
        with h5py.File(tmp_path / "t.h5", "w") as made:
            made["plain"] = noise
            made.create_dataset("chunked", data=noise, chunks=(10, 200), compression="gzip")
        source = PlainSource((tmp_path / "t.h5").read_bytes())
        with aiouffd.open_file(source) as file, h5py.File(file, "r") as found:
            assert np.array_equal(found["plain"][500], noise[500])
            assert np.array_equal(found["chunked"][7:9, 90:400], noise[7:9, 90:400])
            assert source.bytes_read < source.size // 4

    def test_pillow(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        pixels = np.random.default_rng(8).integers(0, 255, (400, 300, 3), dtype="u1")
        for kind in ("png", "tiff", "bmp"):
            image.fromarray(pixels).save(tmp_path / f"t.{kind}")
            with aiouffd.open_file(tmp_path / f"t.{kind}") as file, image.open(file) as found:
                assert np.array_equal(np.asarray(found), pixels)

    def test_tifffile(self, tmp_path: Path) -> None:
        tifffile = pytest.importorskip("tifffile")
        pixels = np.random.default_rng(9).integers(0, 255, (20, 256, 256), dtype="u2")
        tifffile.imwrite(tmp_path / "t.tif", pixels)
        with aiouffd.open_file(tmp_path / "t.tif") as file, tifffile.TiffFile(file) as found:
            assert np.array_equal(found.pages[11].asarray(), pixels[11])

    def test_fsspec(self, tmp_path: Path) -> None:
        """A file system over our file."""
        zipped = pytest.importorskip("fsspec.implementations.zip")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("folder/name", b"text")
        with aiouffd.open_file(tmp_path / "a.zip") as file:
            system = zipped.ZipFileSystem(file)
            assert system.find("") == ["folder/name"]
            assert system.cat("folder/name") == b"text"


class TestABufferIsNoFile:
    """Whoever takes it for one is told what is."""

    async def test_a_task_of_a_read_has_a_name(self, data: bytes) -> None:
        """asyncio formats what it runs: in messages, and whenever `asyncio.run` is on its way."""
        async with aiouffd.open(data) as buf:
            task = asyncio.create_task(buf.read(0, 5))
            assert "LazyBuffer._read" in repr(task)
            assert await task == data[:5]

    # np.load asks for "seek" while it holds what it took for bytes, and never awaits that.
    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    async def test_a_lazy_buffer(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.arange(100_000))
        async with aiouffd.open(tmp_path / "a.npy") as buf:
            with pytest.raises((AttributeError, TypeError), match=r"buf\.file\(\)"):
                np.load(buf)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"buf\.file\(\)"):
                len(buf.read(6))  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"buf\.file\(\)"):
                buf.read(6)[:2]  # type: ignore[index]
            with pytest.raises(TypeError, match=r"buf\.file\(\)"):
                buf.read().decode()  # type: ignore[attr-defined]
            with pytest.raises(AttributeError, match=r"buf\.file\(\)"):
                buf.seek(0)  # type: ignore[attr-defined]
            assert not hasattr(buf, "something")
            assert buf.stats.fetched_bytes == 0

    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    @pytest.mark.parametrize(
        "take",
        [
            zipfile.ZipFile,
            zipfile.is_zipfile,
            lambda buf: tarfile.TarFile(fileobj=buf),
            wave.Wave_read,
            lambda buf: io.BufferedReader(buf),
            lambda buf: io.TextIOWrapper(buf),
            lambda buf: shutil.copyfileobj(buf, io.BytesIO()),
            lambda buf: io.BytesIO(buf.read()),  # Pillow, after asking for `seek`
            lambda buf: bytes(buf.read(5)),
            lambda buf: pytest.importorskip("pyarrow.parquet").read_table(buf),
        ],
    )
    async def test_what_libraries_do_with_a_lazy_buffer(self, take: Any) -> None:
        source = PlainSource(bytes(4 * BLOCK))
        async with aiouffd.open(source) as buf:
            with pytest.raises((AttributeError, TypeError), match=r"buf\.file\(\)"):
                take(buf)
        assert not source.reads

    # Those look at what they get themselves: an error at once, though in words of their own.
    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    @pytest.mark.parametrize(
        "take", [json.load, pickle.load, lambda buf: gzip.GzipFile(fileobj=buf).read()]
    )
    async def test_who_words_the_error_itself(self, take: Any) -> None:
        source = PlainSource(bytes(4 * BLOCK))
        async with aiouffd.open(source) as buf:
            with pytest.raises(TypeError, match=r"Reading|readline"):
                take(buf)
        assert not source.reads

    async def test_reading_is_a_coroutine_all_the_same(self, data: bytes) -> None:
        async with aiouffd.open(PlainSource(data)) as buf:
            assert asyncio.iscoroutine(reading := buf.read(0, 8))
            assert await reading == data[:8]
            assert await asyncio.create_task(buf.read(8, 8)) == data[8:16]
            assert await asyncio.gather(buf.read(0, 1), buf.read(1, 2)) == [data[:1], data[1:3]]
            assert await asyncio.wait_for(buf.read(SIZE - 2), 10) == data[-2:]
            loop = asyncio.get_running_loop()
            future = asyncio.run_coroutine_threadsafe(buf.read(3, 4), loop)
            assert await asyncio.wrap_future(future) == data[3:7]
            with pytest.warns(RuntimeWarning, match="never awaited"):
                buf.read(0, 8)

    def test_a_sync_buffer(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.arange(100_000))
        with aiouffd.sync.open(tmp_path / "a.npy") as buf:
            with pytest.raises(UsageError, match=r"buf\.file\(\)"):
                np.load(buf)  # type: ignore[call-overload]
            with pytest.raises(AttributeError, match=r"buf\.file\(\)"):
                buf.tell()  # type: ignore[attr-defined]
            assert buf.stats.fetched_bytes == 0
            assert len(buf.read()) == len(buf)


def test_random_reads_do_not_lead_to_readahead() -> None:
    source, chance = PlainSource(bytes(64 << 20)), random.Random(10)
    with aiouffd.open_file(source) as file:
        for at in chance.sample(range(1000), 60):
            file.pread(100, at * BLOCK)
    extra = source.bytes_read - 60 * BLOCK
    assert extra <= 8 * BLOCK
    assert all(a != b for a, b in itertools.pairwise(source.reads))
