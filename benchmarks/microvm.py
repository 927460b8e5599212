"""A microVM restored from a snapshot of 1 GiB, over HTTP with 5 ms of latency: time to its first
output.

Lazily (`aiouffd.serve`) against a copy of the memory file to a local disk, which is then mapped,
and with a recorded working set against without. The VMM is `examples/microvm/vmm.py`, a process
of its own which takes the time from the beginning of the restoration; that of its interpreter to
start is in neither figure. The guest touches 256 pages before its first output, in 32 places.
Each server is new and has nothing cached; it has opened the object when the VMM connects.

Copying takes as long as the link takes for 1 GiB, so the ratio says as much about the link as about
us: it is given for 2.5 Gbit/s, and, without a bar, for loopback at its full speed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiouffd
from aiouffd.serve import Client, listen

from .baseline.build import OUTPUT
from .common import Report, warm_memory

ROOT = Path(__file__).resolve().parent.parent
VMM = ROOT / "examples" / "microvm" / "vmm.py"
SIZE = 1 << 30
ELEMENTS = 256
#: Seconds before each reply, and bytes per second of all replies together: 2.5 Gbit/s.
LATENCY, LINK = 0.005, 2.5e9 / 8
REPEATS = 5


def why_not() -> str | None:
    """Why a microVM cannot be restored here, or None."""
    found = aiouffd.probe()
    if found.machine != "x86_64" or not found.kvm:
        return "needs x86-64 and /dev/kvm"
    return None if found.kernel_mode_faults else "needs faults of kernel mode"


async def _restore(folder: Path, *way: str) -> dict[str, Any]:
    """The VMM's account of a guest that has run to its end, with the memory it should have."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(VMM), "restore", str(folder), *way, "--json", stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    outcome: dict[str, Any] = json.loads(output)
    if not outcome["right"]:
        raise AssertionError(f"the guest's memory is wrong: {outcome}")
    return outcome


def copied(folder: Path, url: str) -> Callable[[], Awaitable[float]]:
    """Milliseconds to the first output of a guest whose memory was copied to a file first."""

    async def run() -> float:
        warm_memory(SIZE + SIZE // 4)
        return (await _restore(folder, "--copy", url))["first_output"] * 1000

    return run


def lazily(
    folder: Path, url: str, prefetch: aiouffd.WorkingSet | None = None
) -> Callable[[], Awaitable[float]]:
    """Milliseconds to the first output of one whose memory comes as it is touched."""

    async def run() -> float:
        path = folder / "memory.sock"
        async with listen(path, source=url, dialect="firecracker", prefetch=prefetch):
            return (await _restore(folder, "--uffd", str(path)))["first_output"] * 1000

    return run


async def needed(folder: Path, url: str) -> aiouffd.WorkingSet:
    """The working set of one run."""
    clients: list[Client] = []

    async def connected(client: Client) -> None:
        clients.append(client)

    path = folder / "memory.sock"
    async with listen(path, source=url, dialect="firecracker", on_client=connected, record=True):
        await _restore(folder, "--uffd", str(path))
        return clients[0].working_set()


def run(report: Report, loop: str, runner=asyncio.run) -> None:
    from tests.servers.http import start_in_process

    if (reason := why_not()) is not None:
        report.skip(f"microVM, {loop}", reason)
        return
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT, prefix="microvm-") as name:
        folder = Path(name)
        command = [sys.executable, str(VMM), "snapshot", name]
        command += ["--size", str(SIZE >> 20), "--elements", str(ELEMENTS)]
        subprocess.run(command, check=True)
        for rate in (LINK, 0.0):
            objects = {"/memory": folder / "memory"}
            with start_in_process(objects, latency=LATENCY, rate=rate, record=False) as server:
                runner(_compare(report, loop, folder, server.url("/memory"), rate))


async def _compare(report: Report, loop: str, folder: Path, url: str, rate: float) -> None:
    link = f"{rate * 8 / 1e9:g} Gbit/s" if rate else "no limit of the rate"
    await report.compare_async(
        f"microVM of 1 GiB over HTTP, 5 ms, {link}: first output, lazily / copied first, {loop}",
        ("lazily", lazily(folder, url)),
        ("copied first", copied(folder, url)),
        unit="ms",
        repeats=REPEATS if rate else 3,
        at_most=0.1 if rate else None,
    )
    if rate:
        await report.compare_async(
            f"the same with its recorded working set / without, {loop}",
            ("with", lazily(folder, url, await needed(folder, url))),
            ("without", lazily(folder, url)),
            unit="ms",
            at_most=0.5,
        )
