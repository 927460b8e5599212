"""Runs pytest as a user without any rights; has to be started by root.

    python tools/run_unprivileged.py REPORT.xml [PYTEST_ARGUMENT...]

Such a user gets user-mode-only userfaultfds, which is what most containers give. A checkout,
and even the interpreter, may lie where that user cannot read, so everything that is needed is
copied to a temporary folder first, what was compiled included: the tests start many interpreters.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
COPIED = ("aiouffd", "tests", "examples", "benchmarks", "tools", "native", "docs", "README.md")
COPIED += (
    "include",
    "aiouffd_command.py",
    "setup.py",
    "MANIFEST.in",
    "Makefile",
    "pyproject.toml",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
# Tools that no test imports, and torch: a gigabyte for one test, which can do without.
UNUSED = shutil.ignore_patterns(
    *("aiouffd.pth", "mypy*", "ruff*", "pip*", "torch", "torch-*", "*.a", "*.o")
)


def works(python: str, environment: dict[str, str]) -> bool:
    """Whether the user can run this interpreter and import from its libraries."""
    try:
        done = subprocess.run(
            [python, "-c", "import asyncio, ctypes, ssl"],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    except OSError:
        return False
    return done.returncode == 0


def copy_interpreter(folder: Path, environment: dict[str, str]) -> str:
    """A copy of the interpreter and its standard library, for this user to read."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    base = Path(sys.base_prefix)
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(os.path.realpath(sys.executable), folder / "bin" / version)
    shutil.copytree(
        base / "lib" / version,
        folder / "lib" / version,
        ignore=shutil.ignore_patterns("site-packages", "test", "idlelib", "*.a"),
    )
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(library, folder / "lib" / library.name)
    environment["LD_LIBRARY_PATH"] = str(folder / "lib")
    return str(folder / "bin" / version)


def make_environment(base: str, venv: Path, project: Path, environment: dict[str, str]) -> str:
    """A virtual environment with the packages of this one and the copied project."""
    subprocess.run([base, "-m", "venv", "--without-pip", venv], env=environment, check=True)
    packages = venv / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    shutil.copytree(
        sysconfig.get_path("purelib"), packages, ignore=UNUSED, symlinks=True, dirs_exist_ok=True
    )
    (packages / "aiouffd.pth").write_text(f"{project}\n")
    return str(venv / "bin" / "python")


def main() -> int:
    report, arguments = sys.argv[1], sys.argv[2:]
    if os.geteuid() != 0:
        print("only root can become somebody else", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="aiouffd-user-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        project, home = folder / "project", folder / "home"
        project.mkdir()
        for name in COPIED:
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(path, project / name, ignore=shutil.ignore_patterns("*.o"))
            elif path.exists():
                shutil.copy2(path, project / name)
        home.mkdir()
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        base = os.path.realpath(sys.executable)
        if not works(base, environment):
            base = copy_interpreter(folder / "python", environment)
        if not works(base, environment):
            print(f"{base} does not run as user {NOBODY}", file=sys.stderr)
            return 1
        python = make_environment(base, folder / "venv", project, environment)
        for path in (folder, *folder.rglob("*")):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
        for path in (home, project):
            os.chown(path, NOBODY, NOBODY)
        command = [python, "-m", "pytest", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"--junitxml={home}/report.xml", *arguments],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            env=environment,
            cwd=project,
            stdin=subprocess.DEVNULL,
        )
        if (home / "report.xml").exists():
            shutil.copy(home / "report.xml", report)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
