"""``aiouffd nbd``: whole images to the programs of others, many at once, and how it ends."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import FlushError, SourceError
from aiouffd.nbd import NbdServer, wire
from aiouffd.nbd.source import NbdSource
from aiouffd.nbd.uri import parse
from aiouffd.sources.memory import MemorySource
from tests.nbd_peers import Peer, opened, run, serve, serving, until
from tests.servers.nbd import need
from tests.support import ROOT, content, environment, wait_until

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture(autouse=True)
async def _nobody_stays() -> AsyncIterator[None]:
    yield
    await Peer.hang_up()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def mixed(path: Path, size: int) -> str:
    """A file of random bytes with holes in it; its digest."""
    chance = random.Random(size)
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, 4 * MIB):
            if chance.random() < 0.75:
                file.seek(at)
                file.write(chance.randbytes(min(4 * MIB, size - at)))
    return digest(path)


# ------------------------------------------------------------- images, as a whole


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A file of that size, and its digest."""
    path = tmp_path_factory.mktemp("nbd") / "image"
    yield path, mixed(path, GIB)
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["unix", "tcp"])
def test_a_gigabyte(where: str, gigabyte: tuple[Path, str], tmp_path: Path) -> None:
    need("nbdcopy", "qemu-img")
    image, expected = gigabyte
    copy = tmp_path / "copy"
    option = ["--socket", str(tmp_path / "s")] if where == "unix" else ["--port", "0"]
    with serving(str(image), *option) as (_, url):
        subprocess.run(["nbdcopy", url, str(copy)], check=True, timeout=100)
        assert digest(copy) == expected
        compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", url]
        said = subprocess.run([*compare, str(image)], check=True, timeout=100, capture_output=True)
        assert b"identical" in said.stdout
        # It is a comparison that can fail.
        with copy.open("r+b") as file:
            file.seek(GIB - 4097)
            byte = file.read(1)
            file.seek(GIB - 4097)
            file.write(bytes([byte[0] ^ 1]))
        different = subprocess.run([*compare, str(copy)], timeout=100, capture_output=True)
        assert different.returncode == 1
        assert b"mismatch" in different.stdout
    copy.unlink()


@pytest.mark.slow
def test_eight_clients_at_once(tmp_path: Path) -> None:
    """Of three kinds, and each of them gets the right bytes while the others do."""
    need("nbdcopy", "qemu-img")
    size = 64 * MIB + 4096
    image = tmp_path / "image"
    expected = mixed(image, size)
    copies = [tmp_path / f"copy{number}" for number in range(8)]
    with (
        ExitStack() as stack,
        serving(str(image), "--socket", str(tmp_path / "s")) as (process, url),
    ):
        clients = []
        for number, copy in enumerate(copies):
            command = [
                ["nbdcopy", "--connections=4", url, str(copy)],
                ["qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(copy)],
                [sys.executable, "-m", "aiouffd", "copy", url, str(copy)],
            ][number % 3]
            clients.append(
                stack.enter_context(
                    subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
                )
            )
        for client in clients:
            _, said = client.communicate(timeout=100)
            assert client.returncode == 0, said
        for copy in copies:
            assert digest(copy) == expected
            copy.unlink()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0
        assert int(said.split()[0]) >= 8 + 3 * 3, said


async def test_eight_clients_that_write(tmp_path: Path) -> None:
    """Each its own part, with several connections, and everything is there after a flush."""
    size = MIB
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 * size)
    parts = [random.Random(number).randbytes(size) for number in range(8)]
    with serving(str(image), "--writable", "--socket", str(tmp_path / "s")) as (_, url):

        async def client(number: int) -> None:
            async with opened(NbdSource(url, writable=True)) as source:
                step = 50_000
                await asyncio.gather(
                    *(
                        source.write(number * size + at, parts[number][at : at + step])
                        for at in range(0, size, step)
                    )
                )
                await source.flush()
                assert await source.read(number * size, size) == parts[number]

        await asyncio.gather(*map(client, range(8)))
        assert image.read_bytes() == b"".join(parts)


@pytest.mark.parametrize("size", [0, 1, 511, 513, 4097, 1_000_003])
async def test_sizes_that_are_no_whole_blocks(size: int, tmp_path: Path) -> None:
    need("nbdcopy", "nbdinfo", "qemu-img", "qemu-io")
    image, copy = tmp_path / "image", tmp_path / "copy"
    data = content(1_000_008)[:size]
    image.write_bytes(data)
    memory = bytearray(size)
    async with NbdServer({"": MemorySource(data)}) as server:
        url = await server.listen_unix(tmp_path / "s")
        assert (await run("nbdinfo", "--size", url)).strip() == str(size)
        await run("nbdcopy", url, str(copy))
        assert copy.read_bytes() == data
        await run("nbdinfo", "--map", url)
        said = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", url, str(image))
        assert "identical" in said
    if not size:
        return  # nothing can be written there
    async with NbdServer({"": MemorySource(memory)}, writable=True) as server:
        url = await server.listen_unix(tmp_path / "s")
        await run("nbdcopy", str(image), url)
        assert memory == data


@pytest.mark.parametrize(
    "name", ["disk", "with spaces/and slashes", "Öl & Feuer?#%41", "日本" * 600, "x" * 4096]
)
async def test_names(name: str, tmp_path: Path) -> None:
    need("nbdinfo")
    async with NbdServer({name: MemorySource(b"named"), "": MemorySource(b"other!")}) as server:
        url = await server.listen_unix(tmp_path / "s")
        assert parse(url).export == name
        assert (await run("nbdinfo", "--size", url)).strip() == "5"
        said = json.loads(
            await run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={tmp_path}/s")
        )
        assert {one["export-name"] for one in said["exports"]} == {name, ""}
        async with opened(NbdSource(url)) as source:
            assert await source.read(0, 5) == b"named"


# ------------------------------------------------------------------- ends and restarts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_in_the_middle_of_a_scan(number: int, tmp_path: Path) -> None:
    """With ``errors="hard"`` it is a pause, and then the right bytes."""
    size = 96 * MIB
    image, path = tmp_path / "image", tmp_path / "s"
    mixed(image, size)
    arguments = (str(image), "--socket", str(path))
    with serving(*arguments) as (process, url):
        async with aiouffd.open(url, errors="hard", block_size=MIB, readahead=4 * MIB) as buf:
            scan = asyncio.ensure_future(asyncio.to_thread(bytes, buf.view))
            await asyncio.to_thread(
                wait_until, lambda: buf.stats.fetched_bytes > 4 * MIB, "the scan to begin"
            )
            process.send_signal(number)
            await asyncio.to_thread(process.communicate)
            assert not scan.done()
            before = buf.resident()
            assert before != [(0, size)]
            # Nobody is there: the scan waits, for as long as that takes.
            with pytest.raises(OSError):  # noqa: PT011
                await Peer.connect(path)
            assert not scan.done()
            with serving(*arguments):
                assert await scan == image.read_bytes()
            assert buf.stats.failures == 0


async def test_writes_go_on_after_a_restart(tmp_path: Path) -> None:
    """What a lost connection had under way is sent again. What the old server had answered, and
    nobody had flushed, is in doubt until it is written again."""
    image, path = tmp_path / "image", tmp_path / "s"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    chance = random.Random(5)
    data = chance.randbytes(8 * MIB)
    arguments = (str(image), "--writable", "--socket", str(path))
    with serving(*arguments) as (process, url):
        async with opened(NbdSource(url, writable=True)) as source:
            step = 64 * 1024
            count = 0

            async def part(at: int) -> None:
                nonlocal count
                await source.write(at, data[at : at + step])
                count += 1

            writes = [asyncio.ensure_future(part(at)) for at in range(0, 8 * MIB, step)]
            await until(lambda: count > 0)
            process.kill()
            await asyncio.to_thread(process.communicate)
            with serving(*arguments):
                await asyncio.gather(*writes)
                for _ in range(2):
                    with pytest.raises(FlushError) as caught:
                        await source.flush()
                    assert 0 < sum(length for _, length in caught.value.ranges) < 8 * MIB
                for at, length in caught.value.ranges:
                    await source.write(at, data[at : at + length])
                await source.flush()
                assert bytes(await source.read(0, 8 * MIB)) == data
    assert image.read_bytes() == data


SLOW_PACKAGE = '''
"""A source that answers reads when a file is there, and may not want to be cancelled."""
import asyncio, os
from aiouffd.sources.base import BaseSource

class Waits(BaseSource):
    size = 1 << 20

    def __init__(self, folder, stubborn):
        self.folder, self.stubborn = folder, stubborn

    @classmethod
    def from_url(cls, url, **options):
        return cls(url.removeprefix("waits://").rstrip("!"), url.endswith("!"))

    async def read(self, offset, length):
        open(f"{self.folder}/asked", "a").close()
        while not os.path.exists(f"{self.folder}/go"):
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
        return b"z" * length
'''
PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import waits
from aiouffd.sources import registry
from aiouffd.cli import main
import aiouffd.cli.common as common
common.as_source = lambda text, **options: waits.Waits.from_url(text, **options)
sys.exit(main())
"""


def waiting(folder: Path, *arguments: str, stubborn: bool = False) -> subprocess.Popen[str]:
    (folder / "waits.py").write_text(SLOW_PACKAGE)
    url = f"waits://{folder}" + "!" * stubborn
    command = [sys.executable, "-c", PROGRAM, str(folder), "nbd", url, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def asked(folder: Path, process: subprocess.Popen[str]) -> Peer:
    """A client with a request under way."""
    assert process.stdout is not None
    url = await asyncio.to_thread(process.stdout.readline)
    peer = await Peer.transmitting(parse(url.strip()).port)
    peer.ask(wire.CMD_READ, 0, 8)
    await until(lambda: (folder / "asked").exists())
    return peer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_waits_for_what_is_under_way(number: int, tmp_path: Path) -> None:
    with waiting(tmp_path, "--port", "0", "--drain", "100") as process:
        peer = await asked(tmp_path, process)
        process.send_signal(number)
        # It listens no more, and is still there.
        port = peer.writer.get_extra_info("peername")[1]
        await until(lambda: not listening(port))
        assert process.poll() is None
        (tmp_path / "go").touch()
        assert await peer.answer() == (0, 1)
        assert await peer.reader.readexactly(8) == b"z" * 8
        await peer.ended()
        _, said = await asyncio.to_thread(process.communicate)
        assert process.returncode == 0, said
        assert "1 clients, 1 requests" in said


@pytest.mark.parametrize(
    ("stubborn", "signals", "status"), [(False, 2, 0), (True, 3, -signal.SIGTERM)]
)
async def test_a_second_signal_waits_for_nothing(
    stubborn: bool, signals: int, status: int, tmp_path: Path
) -> None:
    """And a third one not even for a source that cannot be stopped."""
    with waiting(tmp_path, "--port", "0", "--drain", "1000", stubborn=stubborn) as process:
        peer = await asked(tmp_path, process)
        port = peer.writer.get_extra_info("peername")[1]
        process.send_signal(signal.SIGTERM)
        await until(lambda: not listening(port))
        process.send_signal(signal.SIGTERM)
        await peer.ended()
        if signals == 3:
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        _, said = await asyncio.to_thread(process.communicate)
        assert process.returncode == status, said
        assert "Traceback" not in said


def listening(port: int) -> bool:
    """Whether somebody accepts connections; does not connect."""
    text = f"0100007F:{port:04X} 00000000:0000 0A"
    return text in Path("/proc/net/tcp").read_text()


async def test_sigterm_under_load(tmp_path: Path) -> None:
    """Nobody gets wrong bytes, everybody hears that it is over, and the socket is gone."""
    image, path = tmp_path / "image", tmp_path / "s"
    data = content(16 * MIB)
    image.write_bytes(data)
    with serving(str(image), "--socket", str(path)) as (process, url):
        reads = 0
        ends: list[SourceError] = []

        async def client(seed: int) -> None:
            nonlocal reads
            chance = random.Random(seed)
            async with opened(NbdSource(url, reconnect=0)) as source:
                while True:
                    at, count = chance.randrange(15 * MIB), chance.randrange(1, MIB)
                    try:
                        assert await source.read(at, count) == data[at : at + count]
                    except SourceError as error:
                        ends.append(error)
                        return
                    reads += 1

        clients = [asyncio.ensure_future(client(seed)) for seed in range(8)]
        await until(lambda: reads > 50)
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*clients)
        assert len(ends) == 8
        assert all(error.transient for error in ends)
        _, said = await asyncio.to_thread(process.communicate)
        assert process.returncode == 0, said
        assert "Traceback" not in said
    assert not path.exists()


def test_a_socket_of_the_dead(tmp_path: Path) -> None:
    """It is replaced; that of the living, and what is no socket, is not."""
    image, path = tmp_path / "image", tmp_path / "s"
    image.write_bytes(b"x")
    arguments = (str(image), "--socket", str(path))
    with serving(*arguments) as (process, _):
        process.kill()
        process.wait()
        assert path.is_socket()
    with serving(*arguments) as (process, _):
        assert os.stat(path).st_mode & 0o777 == 0o600
        other = serve(*arguments)
        out, said = other.communicate(timeout=20)
        assert (other.returncode, out) == (1, "")
        assert "in use" in said
        assert str(path) in said
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert not path.exists()
    path.write_text("precious")
    other = serve(*arguments)
    other.communicate(timeout=20)
    assert other.returncode == 1
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--socket", ""],
        ["--host", "", "--port", "0"],
        ["--port", "99999"],
        ["--port", "-1"],
        ["--export", "\udcff"],
        ["--socket", "/nothing/like/that/s"],
        ["--socket", "x" * 200],
    ],
)
def test_where_it_cannot_listen(arguments: list[Any], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x")
    process = serve(str(image), *arguments)
    out, said = process.communicate(timeout=20)
    assert process.returncode in (1, 2)
    assert not out
    assert said.startswith("aiouffd: ")
    assert "None" not in said
    assert len(said.splitlines()) == 1
