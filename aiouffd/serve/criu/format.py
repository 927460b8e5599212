"""What CRIU's image files hold: bytes in, numbers out.

An image begins with a magic number that all have in common (not in images of version 1, and not
in ``inventory.img``) and one of its kind. Then come records: a length of four bytes and a message
(see `messages`). ``pages-N.img`` alone has neither: it is pages, one after the other.

Whatever is wrong with a file is an `ImageError` that names it. Nothing that a file says is used to
reserve memory before it was compared with the file's length.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final, NamedTuple

from ...errors import SourceError
from ...util.pages import PAGE_SIZE
from .messages import message_class

__all__ = [
    "PAGE",
    "Entry",
    "ImageError",
    "Pagemap",
    "Vma",
    "parse_inventory",
    "parse_pagemap",
    "parse_pstree",
    "parse_vmas",
]

#: Images and requests count in pages of the system.
PAGE: Final = PAGE_SIZE

_COMMON: Final = 0x54564319
_INVENTORY: Final = 0x58313116
_PSTREE: Final = 0x50273030
_PAGEMAP: Final = 0x56084025
_MM: Final = 0x57492820

#: Versions of inventory.img that there are: without and with the common magic number.
_VERSIONS: Final = (1, 2)
#: ``flags`` of a pagemap entry.
PARENT, LAZY, PRESENT = 1, 2, 4
#: Status of a VMA that stands for guard pages within others, and is no mapping itself.
_GUARD: Final = 1 << 16
#: No address is as high, on any processor.
_ADDRESSES: Final = 1 << 63

_WORD: Final = struct.Struct("<I")


class ImageError(SourceError):
    """An image is broken, or one that is needed is missing. Not transient."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, transient=False, hint=hint)


class Entry(NamedTuple):
    """A range of pages. Addresses and offset in bytes.

    ``offset``: in the pages file, for what is present there; -1 for what is not.
    """

    start: int
    end: int
    flags: int
    offset: int

    @property
    def lazy(self) -> bool:
        """Whether it is left to whoever serves faults."""
        return bool(self.flags & LAZY)

    @property
    def in_parent(self) -> bool:
        """Whether the pages are those of the parent images."""
        return bool(self.flags & PARENT)


class Vma(NamedTuple):
    """A mapping of the dumped process."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Pagemap:
    """Which pages a task had: by address, apart from each other. ``bytes`` are those present."""

    name: str
    pages_id: int
    entries: tuple[Entry, ...]
    bytes: int


class _Image:
    """A file's records, one after the other."""

    def __init__(self, name: str, data: bytes, magic: int) -> None:
        self.name = name
        #: Number of the next record, for messages.
        self.number = 0
        self._data = data
        self._at = 0
        found = self._word()
        if found == _COMMON:
            found = self._word()
        if found != magic:
            raise ImageError(
                f"{name} begins with {found:#010x}, not with {magic:#010x}",
                hint="is it an image of CRIU?",
            )

    def _word(self) -> int:
        at = self._at
        if at + 4 > len(self._data):
            raise ImageError(f"{self.name} ends within its first bytes: it has {len(self._data)}")
        self._at += 4
        return int.from_bytes(self._data[at : at + 4], "little")

    def messages(self, kind: str) -> Iterator[Any]:
        """The records from here on, each a message of the class ``kind``."""
        name, data, size = self.name, self._data, len(self._data)
        decode = message_class(kind).FromString
        wrong: type[Exception] = importlib.import_module("google.protobuf.message").DecodeError
        while self._at < size:
            at = self._at + 4
            if at > size:
                raise ImageError(f"{name} ends within the length of record {self.number}")
            (length,) = _WORD.unpack_from(data, self._at)
            if at + length > size:
                raise ImageError(
                    f"{name} ends within record {self.number}, after {size - at} of {length} bytes"
                )
            try:
                message = decode(data[at : at + length])
            except wrong as error:
                raise ImageError(f"record {self.number} of {name} is no {kind}: {error}") from error
            self._at = at + length
            yield message
            self.number += 1

    def first(self, kind: str, *fields: str) -> Any:
        """The next record, which must be there, with all of ``fields``."""
        for message in self.messages(kind):
            self.check(message, *fields)
            self.number += 1
            return message
        raise ImageError(f"{self.name} has no {kind}")

    def check(self, message: Any, *fields: str) -> None:
        """Raise ImageError unless all of ``fields`` are there."""
        for field in fields:
            if not message.HasField(field):
                raise ImageError(f"record {self.number} of {self.name} has no {field}")


def parse_inventory(name: str, data: bytes) -> int:
    """The version of the images. Raises ImageError for one that nobody knows."""
    version = int(
        _Image(name, data, _INVENTORY).first("inventory_entry", "img_version").img_version
    )
    if version not in _VERSIONS:
        raise ImageError(f"{name} says that these are images of version {version}: unknown")
    return version


def parse_pstree(name: str, data: bytes) -> list[int]:
    """The pids of the dumped tasks, dead ones too, as they were in their namespace."""
    image = _Image(name, data, _PSTREE)
    pids: dict[int, None] = {}
    for message in image.messages("pstree_entry"):
        image.check(message, "pid")
        pid = int(message.pid)
        if not 0 < pid < 1 << 31:
            raise ImageError(f"record {image.number} of {name} has the pid {pid}")
        if pid in pids:
            raise ImageError(f"{name} has the pid {pid} twice")
        pids[pid] = None
    if not pids:
        raise ImageError(f"{name} has no task")
    return list(pids)


def parse_pagemap(name: str, data: bytes) -> Pagemap:
    """A task's pages. Raises ImageError for any that overlap or cannot be where they are."""
    image = _Image(name, data, _PAGEMAP)
    pages_id = int(image.first("pagemap_head", "pages_id").pages_id)
    entries: list[Entry] = []
    offset = 0
    in_order = True
    for message in image.messages("pagemap_entry"):
        image.check(message, "vaddr")
        start = int(message.vaddr)
        if message.HasField("nr_pages"):
            pages = int(message.nr_pages)
        else:
            image.check(message, "compat_nr_pages")
            pages = int(message.compat_nr_pages)
        length = pages * PAGE
        if start % PAGE or start + length > _ADDRESSES:
            raise ImageError(
                f"record {image.number} of {name} has {pages} pages at {start:#x}, which cannot be"
            )
        if not length:
            continue
        # Before there were flags, pages were here unless they were said to be in the parent.
        flags = int(message.flags) if message.HasField("flags") else 0
        if message.in_parent:
            flags |= PARENT
        elif not message.HasField("flags"):
            flags = PRESENT
        entry = Entry(start, start + length, flags, offset if flags & PRESENT else -1)
        if flags & PRESENT:
            offset += length
        in_order = in_order and (not entries or entries[-1].end <= start)
        entries.append(entry)
    if not in_order:
        # Offsets go by the order in the file, everything else by address.
        entries.sort(key=attrgetter("start"))
        for before, after in pairwise(entries):
            if before.end > after.start:
                raise ImageError(f"{name} has the page at {after.start:#x} twice")
    return Pagemap(name, pages_id, tuple(entries), offset)


def parse_vmas(name: str, data: bytes) -> list[Vma]:
    """The mappings of a task, by address. Raises ImageError for any that overlap."""
    image = _Image(name, data, _MM)
    vmas: list[Vma] = []
    for entry in image.first("mm_entry").vmas:
        if not (entry.HasField("start") and entry.HasField("end")):
            raise ImageError(f"{name} has a mapping without start or end")
        if entry.status & _GUARD:
            continue
        vma = Vma(int(entry.start), int(entry.end))
        if vma.start % PAGE or vma.end % PAGE or vma.start >= vma.end:
            raise ImageError(f"{name} has the mapping {vma.start:#x}-{vma.end:#x}")
        vmas.append(vma)
    vmas.sort()
    for before, after in pairwise(vmas):
        if before.end > after.start:
            raise ImageError(f"{name} has two mappings at {after.start:#x}")
    return vmas
