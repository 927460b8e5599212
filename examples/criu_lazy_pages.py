"""A lazy restore of CRIU: a process runs before its memory is there.

    python examples/criu_lazy_pages.py

`criu restore --lazy-pages` leaves a process's memory to whoever listens on lazy-pages.socket; here
that is `aiouffd.serve.criu`, with the images of the dump in a directory. They could as well be on a
server: CriuServer("s3://bucket/dump/"). CRIU itself is not needed: its part is played by this
program, started a second time, with images of two megabytes that it writes first.
"""

import argparse
import asyncio
import hashlib
import mmap
import os
import socket
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from aiouffd import Feature, Mode, UnsupportedError, Userfaultfd
from aiouffd.kernel.probe import probe
from aiouffd.serve.criu import CriuServer
from aiouffd.serve.criu.messages import message_class
from aiouffd.uffd import address_of

PAGE = mmap.PAGESIZE
PAGES = 512
TOUCHED = (7, 8, 300)


# ------------------------------------------------------------------- the images


def image(magic: int, *messages: Any, common: bool = True) -> bytes:
    """An image: magic numbers, then messages, each after its length."""
    head = struct.pack("<II", 0x54564319, magic) if common else struct.pack("<I", magic)
    data = [message.SerializeToString() for message in messages]
    return head + b"".join(struct.pack("<I", len(piece)) + piece for piece in data)


def write_dump(folder: Path, pid: int, address: int, contents: bytes) -> None:
    """What `criu dump` would have left of one process, as far as its memory goes."""
    version, task = message_class("inventory_entry"), message_class("pstree_entry")
    head, entry = message_class("pagemap_head"), message_class("pagemap_entry")
    lazy = entry(vaddr=address, nr_pages=PAGES, flags=2 | 4)  # lazy, and present in pages-1.img
    memory = message_class("mm_entry")()
    memory.vmas.add(start=address, end=address + PAGES * PAGE)
    images = {
        "inventory.img": image(0x58313116, version(img_version=2), common=False),
        "pstree.img": image(0x50273030, task(pid=pid)),
        f"pagemap-{pid}.img": image(0x56084025, head(pages_id=1), lazy),
        f"mm-{pid}.img": image(0x57492820, memory),
        "pages-1.img": contents,
    }
    for name, data in images.items():
        (folder / name).write_bytes(data)


# ----------------------------------------------------------------- the restored one


def restored() -> None:
    """Plays the restorer, and then the process that it has restored."""
    memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    print(os.getpid(), address_of(memory), flush=True)
    sys.stdin.readline()  # until there are images, and somebody who serves them

    events = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP
    uffd = Userfaultfd(events, user_mode_only=None)
    uffd.register(address_of(memory), len(memory), Mode.MISSING)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect("lazy-pages.socket")
        server.send(struct.pack("=i", os.getpid()))
        socket.send_fds(server, [b"\0"], [uffd.fileno()])
        uffd.close()  # as the restorer does: nobody but the server has one now
        print(*(memory[page * PAGE] for page in TOUCHED), flush=True)
        sys.stdin.readline()
        server.send(struct.pack("=I", 0x52535446))  # restore finished

    sys.stdin.readline()  # until nobody serves it any more
    print(hashlib.sha256(memory).hexdigest(), flush=True)


# ---------------------------------------------------------------------- the server


async def main(folder: Path) -> None:
    contents = b"".join(bytes([page % 251]) * PAGE for page in range(PAGES))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "restored"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=folder,
    )

    assert process.stdin is not None
    assert process.stdout is not None

    async def answer() -> list[bytes]:
        return (await process.stdout.readline()).split()

    pid, address = map(int, await answer())
    write_dump(folder, pid, address, contents)
    async with CriuServer(folder) as server:
        print(f"images of {len(contents):,} bytes, served at {server.path.name}")
        process.stdin.write(b"go\n")
        found = [int(word) for word in await answer()]
        assert found == [page % 251 for page in TOUCHED]
        stats = server.stats
        print(
            f"it runs: {len(TOUCHED)} pages touched, {stats.faults} faults,"
            f" {stats.installed_bytes:,} of {len(contents):,} bytes fetched"
        )
        process.stdin.write(b"finish\n")
        await server.over()
        print(
            f"restored: {server.stats.installed_bytes:,} bytes fetched, nobody is served any more"
        )
    process.stdin.write(b"look\n")
    (digest,) = await answer()
    right = digest.decode() == hashlib.sha256(contents).hexdigest()
    print(f"its memory is {'as it was' if right else 'WRONG'}")
    await process.wait()


def reason_to_skip() -> str | None:
    if not probe().available:
        return "no userfaultfd can be had; see `aiouffd doctor`"
    try:
        message_class("pstree_entry")
    except UnsupportedError as error:
        return str(error)
    return None


if __name__ == "__main__":
    if sys.argv[1:] == ["restored"]:
        restored()
        sys.exit()
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if reason := reason_to_skip():
        print(f"skipped: {reason}")
    else:
        with tempfile.TemporaryDirectory() as name:
            asyncio.run(main(Path(name)))
