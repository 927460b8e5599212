"""``aiouffd pager``: the command, with clients that are processes of their own."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, content, environment, word

PAGE = 4096
PAGES = 256
DATA = content(PAGES * PAGE)
ENVIRONMENT = environment(PYTHONPATH=str(ROOT))

#: Attaches to argv[1], answers each number on standard input with the word at that page.
CLIENT = """
import sys, aiouffd
with aiouffd.attach(sys.argv[1], timeout=20) as memory:
    print(len(memory), flush=True)
    for line in sys.stdin:
        at = int(line) * 4096
        print(int.from_bytes(memory[at : at + 8], "little"), flush=True)
"""


@contextlib.contextmanager
def running(*command: object, **options: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def pager(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command, once it listens."""
    with running("-m", "aiouffd", "pager", *arguments) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            pytest.fail(process.communicate()[1])
        yield process


def ended(process: subprocess.Popen[str]) -> str:
    """End it as a person would; what it said of itself."""
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    return said


def ask(client: subprocess.Popen[str], page: int) -> int:
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(f"{page}\n")
    client.stdin.flush()
    return int(client.stdout.readline())


@contextlib.contextmanager
def attached(path: Path) -> Iterator[subprocess.Popen[str]]:
    with running("-c", CLIENT, path) as client:
        assert client.stdout is not None
        size = client.stdout.readline()
        assert size == f"{len(DATA)}\n", client.communicate()
        yield client


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(DATA)
    return path


def test_native(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    with pager("native", "--socket", path, image) as server, attached(path) as client:
        assert path.stat().st_mode & 0o777 == 0o600
        assert [ask(client, page) for page in (7, 200)] == [word(7 * PAGE), word(200 * PAGE)]
        said = ended(server)
        assert "0 errors" in said
        assert not path.exists()


def test_the_next_pager_goes_on(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    with pager("native", "--socket", path, image) as server, attached(path) as client:
        assert ask(client, 7) == word(7 * PAGE)
        server.kill()
        server.wait()
        with pager("native", "--socket", path, image):
            assert ask(client, 99) == word(99 * PAGE)


def test_take_over(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    arguments = ("native", "--socket", path, image)
    with pager(*arguments) as server, attached(path) as client:
        assert ask(client, 7) == word(7 * PAGE)
        with pager(*arguments, "--take-over"):
            server.communicate(timeout=20)
            assert server.returncode == 0
            assert ask(client, 99) == word(99 * PAGE)


def test_take_over_with_another_object(tmp_path: Path, image: Path) -> None:
    """A mistake of the second one's does not cost the first one its clients."""
    path = tmp_path / "s"
    (tmp_path / "other").write_bytes(bytes(len(DATA)))
    with pager("native", "--socket", path, image) as server, attached(path) as client:
        assert ask(client, 7) == word(7 * PAGE)
        arguments = ("native", "--socket", path, tmp_path / "other", "--take-over")
        with running("-m", "aiouffd", "pager", *arguments) as other:
            _, said = other.communicate(timeout=20)
            assert other.returncode == 1
            assert "the clients' memory is of version" in said
        assert ask(client, 99) == word(99 * PAGE)
        ended(server)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_signals(tmp_path: Path, image: Path, number: signal.Signals) -> None:
    path = tmp_path / "s"
    with pager("native", "--socket", path, image) as server:
        server.send_signal(number)
        _, said = server.communicate(timeout=20)
        assert server.returncode == 0, said
        assert "0 faults" in said
        assert not path.exists()


def test_nohup(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    arguments = ("-m", "aiouffd", "pager", "native", "--socket", str(path), str(image))
    program = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    program += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    with running("-c", program, *arguments) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        server.send_signal(signal.SIGHUP)
        with attached(path) as client:
            assert ask(client, 7) == word(7 * PAGE)
        ended(server)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--socket", "nowhere/s"), "nowhere/s"),
        (("--socket", "s" * 200), "shorter path"),
        (("--socket", "image"), "image"),
        (("--socket", "s", "--record", "nowhere/set"), "nowhere"),
    ],
)
def test_what_cannot_be_said_at_once(
    tmp_path: Path, image: Path, arguments: tuple[str, ...], named: str
) -> None:
    made = [str(tmp_path / item) if item[0] != "-" else item for item in arguments]
    with running("-m", "aiouffd", "pager", "native", *made, image) as server:
        _, said = server.communicate(timeout=20)
        assert server.returncode in (1, 2)
        assert named in said
        assert "Traceback" not in said


def test_record_and_prefetch(tmp_path: Path, image: Path) -> None:
    path, used = tmp_path / "s", tmp_path / "used.ws"
    arguments = ("native", "--socket", path, image, "--block-size", "4K")
    with pager(*arguments, "--record", used) as server, attached(path) as client:
        for page in (9, 3, 100):
            ask(client, page)
        ended(server)
    from aiouffd import WorkingSet

    ranges = WorkingSet.load(used).ranges
    assert [offset // PAGE for offset, _ in ranges] == [9, 3, 100]
    with pager(*arguments, "--prefetch", used) as server, attached(path) as client:
        assert ask(client, 100) == word(100 * PAGE)
        assert f"{3 * PAGE // 1024} KiB installed" in ended(server)


@pytest.mark.needs_root
def test_firecracker(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    spec = {
        "socket": str(path),
        "version": "1.12",
        "page_size": PAGE,
        "regions": [[len(DATA), 0]],
        "pieces": 0,
    }
    with pager("firecracker", "--socket", path, "--memory", image) as server:
        with running(ROOT / "tests" / "firecracker_client.py", json.dumps(spec)) as client:
            assert client.stdout is not None
            assert client.stdin is not None
            assert json.loads(client.stdout.readline()) == {"ready": True}
            for command in (["touch", 50, 1, 2], ["drop", 5, 2], ["verify"]):
                client.stdin.write(json.dumps(command) + "\n")
                client.stdin.flush()
                assert json.loads(client.stdout.readline()) == []
        assert " 0 errors, 0 clients refused" in ended(server)


@pytest.mark.parametrize(
    ("arguments", "status", "what"),
    [
        (["native", "--socket", "s", "/no/such/file"], 1, "No such file"),
        (["native", "--socket", "s", "gopher://x"], 2, "gopher"),
        (["native", "--socket", "/no/such/folder/s", "IMAGE"], 1, "No such file"),
        (["native", "--socket", "s", "--mode", "999", "IMAGE"], 2, "octal"),
        (["native", "--socket", "s", "--block-size", "5000", "IMAGE"], 2, "power of two"),
        (["native", "--socket", "s", "--prefetch", "/no/such", "IMAGE"], 1, "No such file"),
        (["firecracker", "--socket", "s"], 2, "--memory"),
        (["klingon"], 2, "klingon"),
        (["criu", "--images", "/no/such/folder"], 1, ""),
    ],
)
def test_mistakes(
    tmp_path: Path, image: Path, arguments: list[str], status: int, what: str
) -> None:
    arguments = [str(image) if argument == "IMAGE" else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", "pager", *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == status, done.stderr
    assert what in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()
