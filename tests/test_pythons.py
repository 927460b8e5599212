"""Which Pythons there are: what is said of them in different places agrees, and others are refused
with the reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT, environment

FREE_THREADED = "does not support free-threaded builds of Python yet"


def supported() -> list[str]:
    found = re.search(r'^SUPPORTED="([0-9. ]+)"$', (ROOT / "tools/pythons.sh").read_text(), re.M)
    assert found
    return found[1].split()


def test_the_classifiers_name_what_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    named = [name.removeprefix(prefix) for name in project["classifiers"] if prefix in name]
    assert [name for name in named if name.startswith("3.")] == supported()
    assert project["requires-python"] == f">={supported()[0]}"


def test_the_documents_name_what_is_tested() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"CPython {supported()[0]} to {supported()[-1]}" in text


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_build_without_a_gil_is_refused() -> None:
    ended = python(
        "import runpy, sysconfig; get = sysconfig.get_config_var\n"
        "sysconfig.get_config_var = lambda n: 1 if n == 'Py_GIL_DISABLED' else get(n)\n"
        "runpy.run_path('native/build_ffi.py')"
    )
    assert ended.returncode == 1
    assert FREE_THREADED in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
def test_an_import_without_a_gil_is_refused(on: bool) -> None:
    """Also where the GIL has been switched on: there is no module for such a Python."""
    ended = python(
        "import sys, sysconfig\n"
        + (
            "sysconfig.get_config_var = lambda name: name == 'Py_GIL_DISABLED'\n"
            "sys.modules['aiouffd._native'] = None\n"
            if on
            else "sys._is_gil_enabled = lambda: False\n"
        )
        + "import aiouffd"
    )
    assert ended.returncode == 1
    assert f"ImportError: aiouffd {FREE_THREADED}" in ended.stderr


def test_what_counts_on_the_gil_is_marked_and_listed() -> None:
    listed = (ROOT / "CONTRIBUTING.md").read_text().partition("## Free-threading")[2]
    listed = listed.partition("\n## ")[0]
    marked = {
        str(path.relative_to(ROOT))
        for folder, pattern in (("aiouffd", "**/*.py"), ("native", "*.[ch]"), ("native", "*.py"))
        for path in (ROOT / folder).glob(pattern)
        if "FREE-THREADING" in path.read_text()
    }
    assert marked
    assert set(re.findall(r"`([a-z_/]+\.[a-z]+)`", listed)) == marked


@pytest.mark.parametrize(
    ("lacks", "said"),
    [("id", "it takes root"), ("unshare", "unshare is not allowed")],
)
def test_the_newest_are_left_out_where_they_cannot_be_had(
    tmp_path: Path, lacks: str, said: str
) -> None:
    programs = {"id": "echo 0", "unshare": "true"}
    programs[lacks] = {"id": "echo 1000", "unshare": "false"}[lacks]
    for name, code in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{code}\n")
        program.chmod(0o755)
    if not Path("/etc/debian_version").exists() or not shutil.which("apt-get"):
        pytest.skip("this is no Debian machine")
    ended = subprocess.run(
        ["tools/newest.sh"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert ended.stdout.splitlines() == [
        f"newest: left out: {said}",
        "1 skipped",
        "0 passed, 0 failed",
    ]
    code = "import run_tests, sys; print(run_tests.newest_job().read(0, sys.argv[1]))"
    read = python(f"import sys; sys.path.insert(0, 'tools'); {code}", ended.stdout)
    assert read.stdout.startswith("the newest Pythons and peers: 0 passed, 0 failed, 1 skipped")


FORKS = """
import os, sys, warnings
import aiouffd
buf = aiouffd.sync.open(sys.argv[1], fork="serve")
warnings.simplefilter("error", DeprecationWarning)
try:
    pid = os.fork()
except DeprecationWarning:
    pid = -1
if not pid:
    os._exit(0 if buf.view[0] == buf.view[1 << 20] == 120 else 1)
assert os.wait()[1] == 0
assert buf[0:1] == b"x"
buf.close()
print("raised" if pid < 0 else "returned")
"""


def test_fork_where_its_warning_is_an_error(tmp_path: Path) -> None:
    """From 3.12 on fork() warns in a process with threads, of which aiouffd makes two. As an error
    it is raised from 3.15 on, in the parent, when the child is there already."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (2 << 20))
    ended = python(FORKS, str(path))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ("raised\n" if sys.version_info >= (3, 15) else "returned\n")
