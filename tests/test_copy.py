"""``aiouffd copy``: every kind of destination, and what is left when it is cut short."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd.cli import main
from aiouffd.errors import UsageError
from aiouffd.nbd import NbdServer
from aiouffd.sources import destination
from aiouffd.sources.file import FileSource, path_of_url
from aiouffd.sources.memory import MemorySource
from tests.nbd_peers import opened, until
from tests.servers import nbd
from tests.support import ROOT, content, environment
from tests.test_nbd_promises import Disk

MIB = 1 << 20
SYSFS = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DATA = content(3 * MIB + 8)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "aiouffd", "copy", "--quiet", *map(str, arguments)]


def copy(*arguments: str | Path, expected: int = 0) -> None:
    """In this process, which is quicker."""
    assert main(["copy", "--quiet", *map(str, arguments)]) == expected


def run(
    *arguments: str | Path, expected: int = 0, **options: object
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        timeout=60,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},  # type: ignore[call-overload]
    )
    assert done.returncode == expected, done.stderr
    if expected in (1, 2):
        assert b"Traceback" not in done.stderr
        assert done.stderr
    return done  # type: ignore[no-any-return]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a copy goes: nothing but what is asked for may be in it afterwards."""
    path = tmp_path / "folder"
    path.mkdir()
    yield path
    assert not [name for name in os.listdir(path) if name.endswith(".part")]


def inode(path: Path) -> int:
    return path.stat().st_ino


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------------------- files


def test_a_new_file_has_the_mode_of_the_one_it_is_copied_from(source: Path, folder: Path) -> None:
    umask = os.umask(0o022)
    try:
        source.chmod(0o640)
        copy(source, folder / "a")
        os.umask(0o027)
        source.chmod(0o666)
        copy(source, folder / "b")
    finally:
        os.umask(umask)
    assert mode_of(folder / "a") == 0o640
    assert mode_of(folder / "b") == 0o640
    assert (folder / "b").read_bytes() == DATA


def test_a_file_that_is_replaced_stays_what_it_was_but_for_its_bytes(
    source: Path, folder: Path
) -> None:
    target, link = folder / "target", folder / "link"
    target.write_bytes(b"before")
    target.chmod(0o604)
    link.symlink_to("target")
    attributes = True
    try:
        os.setxattr(target, "user.note", b"mine")
    except OSError:
        attributes = False
    if os.geteuid() == 0:
        os.chown(target, 1234, 4321)
    before = target.stat()
    copy(source, link)
    after = target.stat()
    assert link.is_symlink()
    assert target.read_bytes() == DATA
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert not attributes or os.getxattr(target, "user.note") == b"mine"


def test_a_link_that_leads_nowhere_leads_to_the_copy(source: Path, folder: Path) -> None:
    (folder / "link").symlink_to("target")
    copy(source, folder / "link")
    assert (folder / "link").is_symlink()
    assert (folder / "target").read_bytes() == DATA


def test_holes_stay_holes(folder: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(5 * MIB)
        file.write(DATA)
    copy(sparse, folder / "a")
    assert (folder / "a").read_bytes() == sparse.read_bytes()
    assert (folder / "a").stat().st_blocks * 512 <= 4 * MIB


@pytest.mark.parametrize("how", ["itself", "symbolic link", "hard link"])
def test_a_file_is_not_copied_to_itself(
    how: str, source: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with cp; with --length it would be cut short."""
    target = source
    if how == "symbolic link":
        target = folder / "link"
        target.symlink_to(source)
    elif how == "hard link":
        target = folder / "link"
        target.hardlink_to(source)
    copy("--length", "4096", source, target, expected=2)
    assert "the same file" in capsys.readouterr().err
    assert source.read_bytes() == DATA


@pytest.mark.parametrize(
    "name", ["plain", "a b", "100%", "50%25", "ä", "question?", "hash#tag", "semi;colon", "\udce4"]
)
def test_file_urls_are_read_alike_on_both_sides(name: str, source: Path, folder: Path) -> None:
    quoted = "".join(
        chr(byte) if chr(byte).isalnum() and byte < 128 else f"%{byte:02X}"
        for byte in os.fsencode(name)
    )
    copy(source, f"file://{folder}/{quoted}")
    assert os.listdir(os.fsencode(folder)) == [os.fsencode(name)]
    copy(f"file://localhost{folder}/{quoted}", folder / "again")
    assert (folder / "again").read_bytes() == DATA


def test_file_urls_that_name_no_file(source: Path, folder: Path) -> None:
    for url in (f"file://{folder}/a?b", f"file://{folder}/a#b", "file://elsewhere/a", "file://",
                f"file://{folder}/a%00b"):  # fmt: skip
        with pytest.raises(UsageError):
            path_of_url(url)
    copy(source, f"file://{folder}/a?b", expected=2)
    copy(f"file://{source}#b", folder / "c", expected=2)
    assert not os.listdir(folder)


def test_where_nothing_can_be(source: Path, folder: Path) -> None:
    assert os.fsencode(folder) in run(source, folder, expected=1).stderr
    said = run(source, folder / "no" / "file", expected=1).stderr
    assert b".part" not in said
    copy(source, folder / "a", "-O", "writable=true", expected=2)
    assert not os.listdir(folder)


async def test_what_may_not_be_written_is_not_replaced(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a").write_bytes(b"before")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError):
        await destination.file_sink(str(folder / "a"), 10)


async def test_a_file_of_somebody_else_is_written_in_place(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = folder / "a"
    target.write_bytes(b"before" * MIB)
    identity = inode(target)
    monkeypatch.setattr(destination, "_replaceable", lambda path, found: False)
    sink = await destination.file_sink(str(target), 3 * MIB, source=str(source))
    await sink.zeros(0, MIB)
    await sink.write(MIB, b"x" * 10)
    await sink.finish()
    assert inode(target) == identity
    assert target.read_bytes() == bytes(MIB) + b"x" * 10 + bytes(2 * MIB - 10)
    with pytest.raises(UsageError, match="same file"):
        await destination.file_sink(str(source), 10, source=str(source))
    assert bytes_of(source) == DATA


async def test_where_a_file_cannot_be_without_a_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_tmpfile(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_tmpfile)
    for finish in (False, True):
        sink = await destination.file_sink(str(folder / "a"), 10)
        assert len(os.listdir(folder)) == 1
        await sink.write(0, b"x" * 10)
        await (sink.finish() if finish else sink.abandon())
    assert os.listdir(folder) == ["a"]
    assert (folder / "a").read_bytes() == b"x" * 10


# ------------------------------------------------------------------ pipes and devices


def test_devices(source: Path) -> None:
    copy(source, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert b"No space" in run(source, "/dev/full", expected=1).stderr


def test_standard_output_is_written_to_where_it_stands(source: Path, folder: Path) -> None:
    assert run(source, "/dev/stdout").stdout == DATA
    with (folder / "out").open("wb") as out:
        out.write(b"before")
        out.flush()
        run(source, "/dev/fd/1", stdout=out)
        out.seek(0, os.SEEK_END)
        out.write(b"after")
    assert (folder / "out").read_bytes() == b"before" + DATA + b"after"


def test_a_named_pipe(source: Path, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((folder / "pipe").read_bytes()))
    reader.start()
    copy(source, folder / "pipe")
    reader.join(10)
    assert got == [DATA]


@pytest.mark.needs_root
def test_a_block_device(source: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4 * MIB)
    made = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True)
    if made.returncode:
        pytest.skip("no loop device can be had")
    device = made.stdout.decode().strip()
    try:
        copy(source, device)
        copy(source, device, "--length=8")
        big = tmp_path / "big"
        big.write_bytes(b"x")
        os.truncate(big, 5 * MIB)
        assert b"less than" in run(big, device, expected=2).stderr
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert image.read_bytes() == DATA + b"x" * (4 * MIB - len(DATA))


@pytest.mark.parametrize("path", ["/proc/self/status", "/dev/zero", "/dev/null", "/proc/self/mem"])
def test_what_has_no_size_is_no_source(path: str, folder: Path) -> None:
    copy(path, folder / "a", expected=2)
    assert not os.listdir(folder)


@pytest.mark.skipif(not SYSFS.exists(), reason="there is no such file here")
async def test_a_file_that_says_a_wrong_size() -> None:
    """As those of sysfs do: a page, whatever is in them."""
    path = SYSFS
    async with opened(FileSource(path)) as source:
        with pytest.raises(OSError, match="gives no more than"):
            await source.read(0, source.size)


async def test_empty_files_are_empty(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    async with opened(FileSource(tmp_path / "a")) as source:
        assert source.size == 0


# ------------------------------------------------------------------- NBD and its end


@pytest.mark.parametrize("zeros", ["filled", "written"])
def test_zeros_are_not_sent(zeros: str, tmp_path: Path) -> None:
    """Nor does the export get blocks for them, whatever was there before."""
    nbd.need("nbdkit")
    sparse, image = tmp_path / "sparse", tmp_path / "image"
    with sparse.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(20 * MIB)
        file.write(b"x" * 65536)
    with image.open("wb") as file:
        file.write(b"y" * (MIB if zeros == "filled" else 0))
        file.truncate(64 * MIB)
    statistics = tmp_path / "statistics"
    with nbd.nbdkit(
        tmp_path / "s", "file", str(image), f"statsfile={statistics}", filters=["stats"]
    ) as server:
        copy(sparse, nbd.url(tmp_path / "s"))
        server.terminate()
        server.wait()
    assert image.stat().st_blocks * 512 == 65536
    lines = dict(
        line.strip().split(":", 1) for line in statistics.read_text().splitlines() if ":" in line
    )
    assert lines["write"].split(",")[2].strip() == "64.00 KiB"
    assert int(lines["zero"].split()[0]) <= 4
    assert subprocess.run(["cmp", sparse, image]).returncode == 0


@pytest.mark.parametrize("target", ["file", "export"])
def test_zeros_are_not_fetched(target: str, tmp_path: Path) -> None:
    """From one export to a file or to another one."""
    nbd.need("nbdkit")
    sparse, copied, statistics = (tmp_path / name for name in ("sparse", "copied", "statistics"))
    with sparse.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(20 * MIB)
        file.write(b"x" * 65536)
    with nbd.nbdkit(
        tmp_path / "s", "file", str(sparse), f"statsfile={statistics}", filters=["stats"]
    ) as server:
        if target == "file":
            copy(nbd.url(tmp_path / "s"), copied)
        else:
            copied.touch()
            os.truncate(copied, 64 * MIB)
            with nbd.nbdkit(tmp_path / "t", "file", str(copied)):
                copy(nbd.url(tmp_path / "s"), nbd.url(tmp_path / "t"))
        server.terminate()
        server.wait()
    assert copied.stat().st_blocks * 512 == 65536
    assert subprocess.run(["cmp", sparse, copied]).returncode == 0
    (read,) = [line for line in statistics.read_text().splitlines() if line.startswith("read:")]
    assert read.split(",")[2].strip() == "64.00 KiB"


async def test_a_server_that_lost_its_memory_in_between(tmp_path: Path) -> None:
    """Status 0 would say that all is there and durable."""
    path = tmp_path / "source"
    path.write_bytes(os.urandom(16 * MIB))
    disk = Disk(16 * MIB)
    disk.gates = [asyncio.Event() for _ in range(3)]
    gates = list(disk.gates)
    gates[0].set()
    gates[1].set()
    server = NbdServer({"": disk}, writable=True)
    url = await server.listen_unix(tmp_path / "s")
    copying = await asyncio.create_subprocess_exec(
        *command(path, url),
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stderr=subprocess.PIPE,
    )
    await until(lambda: not disk.gates, 20)
    disk.power_failure()
    await server.aclose(drain=0)
    async with NbdServer({"": disk}, writable=True) as server:
        await server.listen_unix(tmp_path / "s")
        _, said = await asyncio.wait_for(copying.communicate(), 30)
    assert copying.returncode == 1
    assert b"in doubt" in said


async def test_an_export_that_is_too_small(source: Path, tmp_path: Path) -> None:
    async with NbdServer({"": MemorySource(bytearray(MIB))}, writable=True) as server:
        url = await server.listen_unix(tmp_path / "s")
        done = await asyncio.to_thread(run, source, url, expected=2)
        assert b"less than" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
async def test_a_copy_that_is_ended_leaves_nothing_behind(
    number: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    """And what was there before is there."""
    (folder / "a").write_bytes(b"before")

    class Stuck(Disk):
        asked = 0

        async def read(self, offset: int, length: int) -> bytes:
            self.asked += 1
            if offset:
                await asyncio.Event().wait()
            return bytes(length)

    stuck = Stuck(16 * MIB)
    async with NbdServer({"": stuck}) as server:
        url = await server.listen_unix(tmp_path / "s")
        for target in ("a", "b"):
            stuck.asked = 0
            copying = await asyncio.create_subprocess_exec(
                *command(url, folder / target), cwd=ROOT, env=environment(PYTHONPATH=str(ROOT))
            )
            await until(lambda: stuck.asked > 3, 20)
            copying.send_signal(number)
            status = await asyncio.wait_for(copying.wait(), 20)
            assert status == (130 if number == signal.SIGINT else -number)
        await server.aclose(drain=0)
    assert os.listdir(folder) == ["a"]
    assert (folder / "a").read_bytes() == b"before"
