"""What is in the source distribution and in the wheel: the header for C programs among it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import aiouffd
from tests.support import ROOT

PROGRAM = '#include "aiouffd_client.h"\nint main(void) { return aiouffd_error() == NULL; }\n'
#: What a checkout has and no distribution: what git does not track.
BUILT = (".git", ".venv*", ".newest", "build", "dist", "*.egg-info", "*.so", "__pycache__")
BUILT += (".*_cache",)


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_header(include: Path, folder: Path) -> None:
    """A program compiles with this folder's header, by itself and as pkg-config says."""
    program = folder / "program.c"
    program.write_text(PROGRAM)
    run("cc", "-std=c11", "-pthread", "-I", include, program, "-o", folder / "plain")
    run(folder / "plain")
    described = (include / "pkgconfig" / "aiouffd-client.pc").read_text()
    assert f"Version: {aiouffd.__version__}\n" in described
    if shutil.which("pkg-config") is None:
        return
    found = subprocess.run(
        ["pkg-config", "--cflags", "aiouffd-client"],
        env={"PATH": "/usr/bin:/bin", "PKG_CONFIG_PATH": str(include / "pkgconfig")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    run("cc", *found, program, "-o", folder / "described")
    run(folder / "described")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_header_of_a_checkout(tmp_path: Path) -> None:
    check_header(aiouffd.include_dir(), tmp_path)


def test_an_installation_without_the_header(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("aiouffd.headers.__file__", str(tmp_path / "aiouffd" / "headers.py"))
    with pytest.raises(FileNotFoundError, match="aiouffd_client"):
        aiouffd.include_dir()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_source_distribution_and_wheel(tmp_path: Path) -> None:
    """A wheel of the source distribution has all modules, the C core and the header."""
    checkout, dist = tmp_path / "checkout", tmp_path / "dist"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*BUILT), symlinks=True)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", dist, cwd=checkout)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for part in ("include/aiouffd_client.h", "native/engine.h", "tests/conftest.py", "README.md"):
        assert (unpacked / part).exists(), part

    run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", dist, cwd=unpacked)
    (wheel,) = dist.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as files:
        files.extractall(installed)
    modules = {path.relative_to(ROOT) for path in (ROOT / "aiouffd").rglob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} >= modules
    assert not any(path.name.startswith("test") for path in installed.rglob("*"))
    check_header(installed / "aiouffd" / "include", tmp_path)
    code = "import aiouffd; print(aiouffd.__file__); print(aiouffd.include_dir())"
    said = run(
        sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"
    ).split()
    assert said == [f"{installed}/aiouffd/__init__.py", f"{installed}/aiouffd/include"]
