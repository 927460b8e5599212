"""The kernel's interface alone, without pager or buffer: register, read messages, copy.

    python examples/raw_uffd.py

`Userfaultfd` is one method for each ioctl and an asynchronous iterator of messages. All that
the layers above add is missing here: nobody folds duplicates, and nobody helps a thread that
holds the GIL while it waits. So this one touches the memory through `os.write` only, which
lets the GIL go before the kernel reads. For programs, use `aiouffd.open` or `aiouffd.Pager`.
"""

import argparse
import asyncio
import mmap
import os

import aiouffd
from aiouffd.abi import PageFault
from aiouffd.uffd import address_of

PAGES = 8


def page(index: int) -> bytes:
    """What belongs into page `index`."""
    return f"page {index} ".encode().ljust(mmap.PAGESIZE, b".")


async def answer(uffd: aiouffd.Userfaultfd, start: int) -> None:
    """Give each thread that waits its page, until the descriptor is closed."""
    async for message in uffd:
        if isinstance(message, PageFault):
            index = (message.address - start) // mmap.PAGESIZE
            print(f"fault on page {index}")
            uffd.copy(start + index * mmap.PAGESIZE, page(index))


def send(memory: mmap.mmap, pages: list[int]) -> list[bytes]:
    """Have the kernel read the beginning of some pages; what it read."""
    reader, writer = os.pipe()
    said = []
    view = memoryview(memory)
    for index in pages:
        at = index * mmap.PAGESIZE
        os.write(writer, view[at : at + 7])
        said.append(os.read(reader, 7))
    view.release()
    os.close(reader)
    os.close(writer)
    return said


async def main() -> None:
    memory = mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A forked child would read zeros for what is missing.
    memory.madvise(mmap.MADV_DONTFORK)
    start = address_of(memory)
    with aiouffd.Userfaultfd() as uffd:
        print(f"{uffd!r} has {len(uffd.available)} features")
        uffd.register(start, len(memory), aiouffd.Mode.MISSING)
        server = asyncio.create_task(answer(uffd, start))
        said = await asyncio.to_thread(send, memory, [5, 2, 2, 7])
        print("read:", ", ".join(text.decode().strip() for text in said))
        # Closing the descriptor makes zeros of what is missing: take the memory away before.
        memory.close()
    await server


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        asyncio.run(main())
    except PermissionError as error:
        print(f"skipped: {error}")
