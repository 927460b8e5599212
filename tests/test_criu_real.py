"""CRIU itself, where there is one that works: a dump, and a lazy restore from its images.

`make test` does not install it: no distribution's version starts on every kernel. Put ``criu`` on
PATH to have this run.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.serve.criu import CriuServer
from tests.support import wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.slow]

# A process and its child; each has memory that it knows, and looks at it when it is told.
PROGRAM = """
import array, os, sys, time
folder = sys.argv[1]
memory = array.array("Q", range(1 << 20))
child = os.fork()
name = "parent" if child else "child"
with open(f"{folder}/{name}.part", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"{folder}/{name}.part", f"{folder}/{name}.ready")
while not os.path.exists(f"{folder}/go"):
    time.sleep(0.01)
right = all(memory[at] == at for at in range(0, len(memory), 64))
with open(f"{folder}/{name}.part", "w") as file:
    file.write("right" if right else "wrong")
os.rename(f"{folder}/{name}.part", f"{folder}/{name}.result")
if child:
    os.waitpid(child, 0)
"""


def criu(*arguments: str) -> None:
    done = subprocess.run(
        ["criu", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def _criu_works() -> None:
    if shutil.which("criu") is None:
        pytest.skip("there is no criu")
    done = subprocess.run(["criu", "check"], capture_output=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip("criu does not work here: criu check")


@pytest.mark.parametrize("touch_first", [False, True])
async def test_a_dump_is_restored_lazily(tmp_path: Path, touch_first: bool) -> None:
    images = tmp_path / "images"
    images.mkdir()
    process = subprocess.Popen(  # noqa: ASYNC220 (it is waited for in the same way)
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=tmp_path,
    )
    try:
        both = [tmp_path / f"{name}.ready" for name in ("parent", "child")]
        await asyncio.to_thread(wait_until, lambda: all(map(Path.exists, both)), "both to be there")
        pid = str(process.pid)
        await asyncio.to_thread(criu, "dump", "-t", pid, "-D", str(images), "-o", "dump.log")
        process.wait(10)  # CRIU has killed it
        gone = Path("/proc", both[1].read_text())
        await asyncio.to_thread(wait_until, lambda: not gone.exists(), "the child's number")
        if touch_first:
            (tmp_path / "go").touch()
        async with CriuServer(images) as server:
            await asyncio.to_thread(
                criu, "restore", "--lazy-pages", "-d", "-D", str(images), "-o", "restore.log"
            )
            async with asyncio.timeout(30):
                await server.over()
        assert server.stats.installed_bytes > 16 << 20
        (tmp_path / "go").touch()
        results = [tmp_path / f"{name}.result" for name in ("parent", "child")]
        await asyncio.to_thread(wait_until, lambda: all(map(Path.exists, results)), "their results")
        assert [path.read_text() for path in results] == ["right", "right"]
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(10)
