"""A microVM that is restored from a snapshot on a web server, and starts before it is here.

    python examples/microvm/run.py [--size MIB] [--elements N] [--latency MS]

The VMM (`vmm.py`, a process of its own, which knows nothing of aiouffd) makes a snapshot, whose
memory file goes to an HTTP server five milliseconds away. Then the guest is restored three
times: with memory that `aiouffd.serve` fills as the guest touches it; again, with the parts that
the first run needed brought ahead; and after a copy of the whole file. Each time the guest says
something when it has touched some hundred scattered pages, gives part of its memory away through
its balloon, and finds zeros there; and the VMM checks every page that has come.

Needs x86-64, /dev/kvm, faults of kernel mode (see `aiouffd doctor`), and aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import machine  # noqa: E402  (they stand beside this file, and one level up)
from guest import MIB  # noqa: E402
from range_server import served  # noqa: E402

import aiouffd  # noqa: E402
from aiouffd.serve import Client, listen  # noqa: E402

try:
    import aiohttp  # noqa: F401  (the HTTP source needs it)
except ImportError as error:
    print(f"skipped: this needs {error.name}; pip install aiohttp")
    sys.exit(0)


async def vmm(*arguments: object) -> dict[str, Any]:
    """Run the VMM. What it says of a restored guest."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "vmm.py"),
        *map(str, arguments),
        *(["--json"] if arguments[0] == "restore" else []),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode and not output:
        raise SystemExit(f"the VMM failed with status {process.returncode}")
    return json.loads(output) if output else {}


def show(title: str, outcome: dict[str, Any], fetched: int, size: int) -> None:
    if not outcome["right"]:
        raise SystemExit(f"WRONG: {title}: {outcome}")
    print(f"{title}:")
    for line in outcome["said"].splitlines():
        print(f"  {line}")
    print(
        f"  first output after {outcome['first_output'] * 1000:.0f} ms; {fetched:,} of {size:,}"
        f" bytes fetched ({fetched / size:.1%}), as they should be"
    )


async def lazily(
    folder: Path, url: str, prefetch: aiouffd.WorkingSet | None = None
) -> tuple[dict[str, Any], int, aiouffd.WorkingSet]:
    """Restore with a server for the guest's memory; also what was fetched, and what was needed."""
    clients: list[Client] = []

    async def connected(client: Client) -> None:
        clients.append(client)

    path = folder / "memory.sock"
    async with listen(
        path,
        source=url,
        dialect="firecracker",
        on_client=connected,
        record=prefetch is None,
        prefetch=prefetch,
    ) as server:
        assert server.store is not None
        outcome = await vmm("restore", folder, "--uffd", path)
        needed = prefetch or clients[0].working_set()
        return outcome, server.store.tally.fetched_bytes, needed


async def main() -> None:
    parser = argparse.ArgumentParser(description="Restore a microVM lazily over HTTP.")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="guest memory")
    parser.add_argument("--elements", type=int, default=256, help="pages that the guest needs")
    parser.add_argument("--latency", type=float, default=5.0, metavar="MS", help="of the server")
    arguments = parser.parse_args()
    reason = machine.unavailable()
    if reason is None and not aiouffd.probe().kernel_mode_faults:
        reason = "KVM needs faults of kernel mode; see `aiouffd doctor`"
    if reason is not None:
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory(prefix="aiouffd-microvm-") as name:
        folder = Path(name)
        options = ("--size", arguments.size, "--elements", arguments.elements)
        await vmm("snapshot", folder, *options)
        memory, size = folder / "memory", arguments.size * MIB
        print(f"a snapshot of a guest with {arguments.size} MiB of memory")
        async with served(memory, arguments.latency) as url:
            outcome, fetched, needed = await lazily(folder, url)
            show("restored lazily", outcome, fetched, size)
            outcome, fetched, _ = await lazily(folder, url, needed)
            show("restored lazily, with the working set of that", outcome, fetched, size)
            outcome = await vmm("restore", folder, "--copy", url)
            show("copied, then restored", outcome, size, size)


if __name__ == "__main__":
    asyncio.run(main())
