"""Python takes `aiouffd` from the folder that it stands in: what if that is one of sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment

#: What it is built from, besides folders.
NAMES = ["setup.py", "aiouffd_command.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
IMPORT = "import aiouffd; print(aiouffd.__file__)"


def python(program: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A source folder in which nothing has been compiled."""
    folder = tmp_path / "sources"
    shutil.copytree(
        ROOT / "aiouffd",
        folder / "aiouffd",
        ignore=shutil.ignore_patterns("*.so", "_native.c", "__pycache__"),
    )
    for name in (
        "setup.py",
        "aiouffd_command.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
    ):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "include", folder / "include")
    shutil.copytree(
        ROOT / "native", folder / "native", ignore=shutil.ignore_patterns("build", "__pycache__")
    )
    return folder


def test_sources_that_are_not_compiled(sources: Path) -> None:
    done = python(IMPORT, sources, PYTHONPATH="")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert f"Python found the sources in {sources}," in said
    assert "`pip install -e .` there" in said


def test_sources_that_hide_what_is_installed(sources: Path) -> None:
    done = python(IMPORT, sources, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert f"aiouffd is installed in {ROOT}" in done.stderr.splitlines()[-1]


def test_an_installation_that_is_broken(sources: Path) -> None:
    (sources / "setup.py").unlink()
    done = python(IMPORT, sources, PYTHONPATH="")
    assert done.returncode == 1
    assert "Install aiouffd again" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_installing_leaves_the_sources_usable(sources: Path, tmp_path: Path) -> None:
    """What `pip install .` builds with: afterwards programs in this folder work too."""
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=sources,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    done = python(IMPORT, sources, PYTHONPATH="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(sources / "aiouffd" / "__init__.py")
