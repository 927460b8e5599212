"""``aiouffd info``, ``cat`` and ``--version``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import aiouffd
from aiouffd import cli
from aiouffd.cli.common import limits_of
from aiouffd.nbd import NbdServer
from aiouffd.serve import Limits, listen
from tests.support import ROOT, environment

PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
DATA = bytes(range(256)) * 1000


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "object"
    path.write_bytes(DATA)
    return str(path)


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "aiouffd", *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=PYTHONPATH),
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_version() -> None:
    assert run("--version").stdout.decode() == f"aiouffd {aiouffd.__version__}\n"


def test_no_command_is_wrong_usage() -> None:
    assert run().returncode == 2


def test_info(path: str) -> None:
    done = run("info", path)
    assert done.returncode == 0, done.stderr
    assert b"256,000 bytes" in done.stdout
    facts = json.loads(run("info", "--json", path).stdout)
    assert facts["size"] == len(DATA)
    assert facts["version"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), DATA),
        (("--offset=10",), DATA[10:]),
        (("--offset=1K", "--length=3"), DATA[1024:1027]),
        (("--length=0",), b""),
        ((f"--offset={len(DATA)}",), b""),
    ],
)
def test_cat(path: str, arguments: tuple[str, ...], expected: bytes) -> None:
    done = run("cat", path, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
    assert not done.stderr


@pytest.mark.parametrize("arguments", [("--offset=1G",), ("--length=256001",), ("--offset=x",)])
def test_cat_of_what_is_not_there(path: str, arguments: tuple[str, ...]) -> None:
    done = run("cat", path, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr


def test_a_missing_file_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    done = run("info", str(tmp_path / "missing"))
    assert done.returncode == 1
    assert b"missing" in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_unknown_scheme_is_wrong_usage() -> None:
    done = run("cat", "gopher://host/x")
    assert done.returncode == 2
    assert b"gopher" in done.stderr


def test_a_reader_that_has_seen_enough(path: str) -> None:
    command = f"{sys.executable} -m aiouffd cat {path} | head -c 5"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=ROOT,
        env=environment(PYTHONPATH=PYTHONPATH),
        capture_output=True,
        timeout=60,
    )
    assert done.stdout == DATA[:5]
    assert not done.stderr


def test_cache(path: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        done = run("cat", f"--cache={cache}", path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == DATA
    assert sum(file.stat().st_size for file in cache.rglob("*.seg")) > len(DATA)


def test_copy(path: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = run("copy", path, str(target))
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == DATA
    assert b"250 KiB in" in done.stderr
    done = run("copy", "--quiet", "--offset=1K", "--length=10", path, str(target))
    assert target.read_bytes() == DATA[1024:1034]
    assert not done.stderr
    done = run("copy", path, str(tmp_path / "no" / "folder"))
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "s3://bucket/key", "redis://h/0/k"])
def test_copy_to_what_can_only_be_read(path: str, url: str) -> None:
    done = run("copy", path, url)
    assert done.returncode == 2
    said = done.stderr.decode()
    if "pip install" not in said:  # the package is there
        assert f"{url} cannot be written to (a path, a device, file://, nbd://" in said


@pytest.mark.parametrize("arguments", [("copy", "PATH", ""), ("copy", "", "x"), ("info", "")])
def test_empty_paths(path: str, arguments: tuple[str, ...]) -> None:
    done = run(*(path if each == "PATH" else each for each in arguments))
    assert done.returncode == 2
    assert b"the path is empty" in done.stderr


def test_an_option_that_is_nonsense() -> None:
    pytest.importorskip("aiohttp")
    done = run("info", "-o", "headers=x", "http://127.0.0.1:1/x")
    assert done.returncode == 2
    assert done.stderr.startswith(b"aiouffd: -o headers: ")


def test_an_option_of_buffers_is_none_of_sources(path: str) -> None:
    done = run("cat", "-o", "block_size=64K", path)
    assert done.returncode == 2
    assert b"block_size belongs to aiouffd.open(), not to the source; it has max_threads" in (
        done.stderr
    )


def test_info_says_whether_a_file_could_be_written_to(path: str) -> None:
    assert b"writes   no; writable=True would let you" in run("info", path).stdout
    assert b"writes   yes" in run("info", "-o", "writable=true", path).stdout


def test_info_of_a_working_set(path: str, tmp_path: Path) -> None:
    saved = tmp_path / "start.ws"
    aiouffd.WorkingSet([(0, 4096), (65536, 10)], size=len(DATA), source="name").save(saved)
    done = run("info", str(saved))
    assert b"this is a working set of name\ncovers   4.01 KiB of 250 KiB\nparts    2" in done.stdout
    assert json.loads(run("info", "--json", str(saved)).stdout)["working_set"]["source"] == "name"
    saved.write_bytes(saved.read_bytes()[:-1])
    assert b"working set of" not in run("info", str(saved)).stdout


def test_a_certificate_that_is_not_there_is_named(path: str) -> None:
    done = run("nbd", path, "--cert", "/nowhere/cert.pem")
    assert done.returncode == 1
    assert b"/nowhere/cert.pem" in done.stderr


def test_limits_are_those_of_the_servers() -> None:
    limits = {field.name: field.default for field in dataclasses.fields(Limits)}
    most = inspect.signature(listen).parameters["max_clients"].default
    assert {**limits, "max_clients": most} == cli.pager.LIMITS
    parameters = inspect.signature(NbdServer).parameters
    for name, value in cli.nbd.LIMITS.items():
        assert parameters[name].default == value


@pytest.mark.parametrize("command", [("nbd",), ("pager", "native", "--socket=x.sock")])
@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("none=3", "there is no limit none (there are "),
        ("max_clients=0", "max_clients is a positive number, not 0"),
        ("max_clients=1.5", "max_clients is a positive number, not 1.5"),
        ("max_clients", "'max_clients' is not NAME=NUMBER"),
        ("max_clients=x", "'max_clients=x' is not NAME=NUMBER"),
    ],
)
def test_limits_that_cannot_be(path: str, command: tuple[str, ...], limit: str, said: str) -> None:
    done = run(*command, path, "--limit", limit)
    assert done.returncode == 2
    assert said in done.stderr.decode()


def test_limits_are_heeded(path: str) -> None:
    parsed = cli._parser().parse_args(["nbd", path, "--limit=memory=64M"])
    assert limits_of(parsed, cli.nbd.LIMITS) == {"memory": 64 << 20}
    parsed = cli._parser().parse_args(
        ["pager", "native", "--socket=s", path, "--limit=pages=1M", "--limit=handshake=0.5"]
    )
    assert limits_of(parsed, cli.pager.LIMITS) == {"pages": 1 << 20, "handshake": 0.5}


INTERRUPTED = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)

MODULE = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupt())
from aiouffd_command import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "status"),
    [
        ("aiouffd", -signal.SIGINT),
        ("aiouffd.buffers.buffer", -signal.SIGINT),
        ("aiouffd.cli.doctor", -signal.SIGINT),
        ("uvloop", 130),  # the command runs
        ("nothing", 0),
    ],
)
def test_an_impatient_interrupt_shows_no_traceback(path: str, module: str, status: int) -> None:
    if module == "uvloop":
        pytest.importorskip("uvloop")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, "info", path],
        cwd=ROOT,
        env=environment(PYTHONPATH=PYTHONPATH),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, b"")
