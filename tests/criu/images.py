"""Writes CRIU's images by hand: varints, tags and magic numbers, without protobuf.

With all the fields that CRIU writes, so that a reader is seen to skip what it does not need.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
COMMON, INVENTORY, PSTREE = 0x54564319, 0x58313116, 0x50273030
PAGEMAP, MM = 0x56084025, 0x57492820
PARENT, LAZY, PRESENT = 1, 2, 4


def page_bytes(tag: int, address: int) -> bytes:
    """A page of which every word tells whose it is and where it was."""
    first = tag << 48 | address
    return array.array("Q", range(first, first + PAGE // 8)).tobytes()


def pages_bytes(tag: int, address: int, count: int) -> bytes:
    return b"".join(page_bytes(tag, address + at * PAGE) for at in range(count))


# ----------------------------------------------------------------------- wire


def varint(value: int) -> bytes:
    """As protobuf writes a number; negative ones as 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(of: int, value: int) -> bytes:
    return varint(of << 3) + varint(value)


def nested(of: int, data: bytes) -> bytes:
    return varint(of << 3 | 2) + varint(len(data)) + data


def record(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


def image(magic: int, *messages: bytes, common: bool = True) -> bytes:
    head = struct.pack("<II", COMMON, magic) if common else struct.pack("<I", magic)
    return head + b"".join(map(record, messages))


# ------------------------------------------------------------------- messages


def inventory(version: int = 2) -> bytes:
    return image(INVENTORY, number(1, version) + number(2, 1) + number(4, 1), common=False)


def pstree(pids: Iterable[int], *, common: bool = True) -> bytes:
    tasks = [
        number(1, pid) + number(2, 0) + number(3, pid) + number(4, pid) + number(5, pid)
        for pid in pids
    ]
    return image(PSTREE, *tasks, common=common)


def vma(start: int, end: int, *, flags: int = 0x22, status: int = 0x201) -> bytes:
    fields = (start, end, 0, 0, 3, flags, status, 1)  # the last is -1 as a zigzag number
    return b"".join(number(of, value) for of, value in enumerate(fields, 1)) + number(9, 0)


def mm(vmas: Iterable[bytes], *, common: bool = True) -> bytes:
    message = b"".join(number(of, 0x400000 + of) for of in range(1, 13))
    message += b"".join(number(13, value) for value in (33, 0x7FFF0000, 0))
    message += b"".join(nested(14, entry) for entry in vmas)
    return image(MM, message + number(15, 1) + number(17, 0), common=common)


def entry_42(address: int, pages: int, flags: int) -> bytes:
    """As CRIU 4.2 writes it: the field that was the number of pages is there, and 0."""
    return number(1, address) + number(2, 0) + number(4, flags) + number(5, pages)


def entry_41(address: int, pages: int, flags: int) -> bytes:
    return number(1, address) + number(2, pages) + number(4, flags)


def entry_20(address: int, pages: int, flags: int) -> bytes:
    """As CRIU 2 does: no flags yet."""
    parent = number(3, 1) if flags & PARENT else b""
    return number(1, address) + number(2, pages) + parent


def pagemap(pages_id: int, entries: Iterable[bytes], *, common: bool = True) -> bytes:
    return image(PAGEMAP, number(1, pages_id), *entries, common=common)


# ------------------------------------------------------------------------ dump


@dataclass
class Pages:
    """A run of pages of a task. ``tag`` makes their bytes."""

    address: int
    count: int
    flags: int = PRESENT | LAZY
    tag: int = 1

    @property
    def data(self) -> bytes:
        return pages_bytes(self.tag, self.address, self.count)


@dataclass
class Task:
    """A task of a dump. ``vmas`` are pairs of start and end."""

    pid: int
    vmas: list[tuple[int, int]] = field(default_factory=list)
    pages: list[Pages] = field(default_factory=list)
    dead: bool = False


def dump(tasks: Iterable[Task], *, entry=entry_42, version: int = 2) -> dict[str, bytes]:
    """The images of a dump, by name."""
    tasks = list(tasks)
    common = version > 1
    files = {
        "inventory.img": inventory(version),
        "pstree.img": pstree((task.pid for task in tasks), common=common),
    }
    for pages_id, task in enumerate(tasks, 1):
        if task.dead:
            continue
        entries = [entry(pages.address, pages.count, pages.flags) for pages in task.pages]
        files[f"pagemap-{task.pid}.img"] = pagemap(pages_id, entries, common=common)
        files[f"mm-{task.pid}.img"] = mm((vma(*ends) for ends in task.vmas), common=common)
        files[f"pages-{pages_id}.img"] = b"".join(
            pages.data for pages in task.pages if pages.flags & PRESENT
        )
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
