"""What a guest runs: this interpreter, its packages, this checkout and busybox, as a cpio archive.

The kernel unpacks it into memory, so there is no disk, no file system and no module to load: the
same file boots on every kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
#: What no test of the core needs, and would make the guest large.
UNUSED = shutil.ignore_patterns(
    *("test", "idlelib", "tkinter", "lib2to3", "ensurepip", "site-packages", "config-*", "*.a"),
    *("torch*", "functorch", "pyarrow*", "polars*", "botocore*", "boto3*", "moto*"),
    *("cfnlint*", "sympy*", "mypy*", "*__mypyc.*", "networkx*", "cryptography*", "pip*", "ruff*"),
)
CHECKOUT = ("aiouffd", "tests", "examples", "tools", "native", "include", "docs", "pyproject.toml")
CHECKOUT += ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")


def make_system(folder: Path, busybox: Path) -> None:
    """The part that does not change with the checkout."""
    for name in ("proc", "sys", "dev", "run", "tmp", "root", "out", "bin", "etc"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox, folder / "bin/busybox")
    (folder / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/tmp:\n")
    (folder / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (folder / "etc/hosts").write_text("127.0.0.1 localhost guest\n::1 localhost\n")
    prefix = Path(sys.base_prefix)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    target = folder / "python"
    (target / "bin").mkdir(parents=True)
    shutil.copy2(os.path.realpath(sys.executable), target / "bin" / version)
    os.symlink(version, target / "bin/python")
    shutil.copytree(prefix / "lib" / version, target / "lib" / version, ignore=UNUSED)
    packages = target / "lib" / version / "site-packages"
    for path in sys.path:
        if path.endswith("site-packages"):
            shutil.copytree(path, packages, ignore=UNUSED, symlinks=True, dirs_exist_ok=True)
    for leftover in packages.glob("*.pth"):  # they name folders of this machine
        leftover.unlink()
    _copy_libraries(folder, [target / "bin" / version, *target.rglob("*.so")])


def _copy_libraries(folder: Path, objects: list[Path]) -> None:
    """The shared libraries of this system that ``objects`` need, to where they are found."""
    text = subprocess.run(
        ["ldd", *objects], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout
    for path in sorted(set(re.findall(r"(/\S+) \(0x", text))):
        if not path.startswith(str(folder)):
            target = folder / path[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(os.path.realpath(path), target)


def make_job(folder: Path, command: str) -> None:
    """The part that is made for each run: the checkout, and what to do with it."""
    checkout = folder / "checkout"
    checkout.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.o", "build", "*.cpython-*.so")
    for name in CHECKOUT:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, checkout / name, ignore=ignored, symlinks=True)
        else:
            shutil.copy2(path, checkout / name)
    tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}-"
    for module in (ROOT / "aiouffd").glob(f"_native.{tag}*.so"):
        shutil.copy2(module, checkout / "aiouffd")
    shutil.copy2(HERE / "init.sh", folder / "init")
    (folder / "init").chmod(0o755)
    (folder / "job.sh").write_text(command)


def pack(folder: Path, busybox: Path, out: Path) -> None:
    """``folder`` as an archive, which the kernel takes; several may follow one another."""
    with out.open("wb") as file:
        find = subprocess.Popen(["find", "."], cwd=folder, stdout=subprocess.PIPE)
        subprocess.run(
            [busybox, "cpio", "-o", "-H", "newc", "-R", "0:0"],
            cwd=folder,
            stdin=find.stdout,
            stdout=file,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        find.wait()
