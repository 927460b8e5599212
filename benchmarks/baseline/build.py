"""Compiles the C programs of this folder on first use, into build/benchmarks/.

The name of the result holds a hash of source and flags, so a change is noticed and
nothing has to be cleaned.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent.parent / "build" / "benchmarks"
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-pthread"]


def compiler() -> str:
    """The C compiler's path; a RuntimeError says what to install when there is none."""
    for name in (os.environ.get("CC"), "gcc", "cc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise RuntimeError("no C compiler found: install gcc or set CC")


def build(name: str, *, shared: bool) -> Path:
    """Compile `name`.c to a shared library or to a program, and return its path."""
    source = HERE / f"{name}.c"
    flags = [*FLAGS, *(["-shared", "-fPIC"] if shared else [])]
    digest = hashlib.sha256(source.read_bytes() + " ".join(flags).encode()).hexdigest()[:12]
    target = OUTPUT / f"{name}-{digest}{'.so' if shared else ''}"
    if target.exists():
        return target
    OUTPUT.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    subprocess.run([compiler(), *flags, str(source), "-o", str(part)], check=True)
    part.replace(target)  # in one step: two benchmarks may start together
    return target


if __name__ == "__main__":
    print(build("uffd_server", shared=True))
    print(build("tcp_server", shared=False))
