"""``aiouffd info``, ``cat`` and ``--version``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aiouffd
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
