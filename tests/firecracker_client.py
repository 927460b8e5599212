"""A VMM as seen from the socket: hands over memory in the manner of Firecracker, any version.

A program of its own that shares nothing with the project: kernel interface, handshake and the
bytes that memory should have are written here a second time. ``python firecracker_client.py SPEC``,
where SPEC is JSON::

    socket, version ("1.1", "1.7", "1.12", "e2b", "stratovirt", "hypeman"), page_size,
    regions: [[size, offset], ...], pieces: bytes sent at a time (0: all in one sendmsg)

It says ``{"ready": true}`` when the handshake is done, then reads one command per line and answers
each with one line.

    touch    COUNT SEED THREADS   touch random pages and check them
    write    COUNT SEED           write to random pages
    drop     COUNT SEED           MADV_DONTNEED (E2B's memfd: MADV_REMOVE) of random runs
    race     COUNT SEED           touch by two threads while a third one drops
    verify                        check every page

Each answer is the list of pages (region, page) that were not what they should be.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import random
import socket
import struct
import sys
import threading
from typing import Any

SYS_USERFAULTFD = 323 if os.uname().machine == "x86_64" else 282
USER_MODE_ONLY = 1
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
EVENT_REMOVE = 1 << 3
MISSING = 1
MAP_HUGETLB_2MB = 0x40000 | 21 << 26
MADV_DONTNEED, MADV_REMOVE = 4, 9
WORD = struct.Struct("<Q")

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def checked(result: int) -> int:
    if result in (-1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def userfaultfd() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    uffd = libc.syscall(SYS_USERFAULTFD, flags)
    if uffd < 0:  # not for everybody
        uffd = checked(libc.syscall(SYS_USERFAULTFD, flags | USER_MODE_ONLY))
    return int(uffd)


def in_the_file(offset: int, length: int) -> bytes:
    """The memory file: each word of eight bytes is its number, counted from 1."""
    first = offset // WORD.size + 1
    return b"".join(map(WORD.pack, range(first, first + length // WORD.size)))


class Region:
    """A mapping, and what each of its pages should contain."""

    def __init__(self, uffd: int, size: int, offset: int, page: int, memfd: int) -> None:
        self.size, self.offset, self.page = size, offset, page
        # A shared page that is only unmapped comes back as it was.
        self._advice = MADV_DONTNEED if memfd < 0 else MADV_REMOVE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        place = 0
        if memfd >= 0:
            flags, place = mmap.MAP_SHARED, offset
        if page > 4096:
            flags |= MAP_HUGETLB_2MB
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self.address = checked(libc.mmap(None, size, protection, flags, memfd, place))
        fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("<4Q", self.address, size, MISSING, 0))
        self.pages = size // page
        self.own: dict[int, bytes] = {}  # what we dropped, or wrote

    def known(self, page: int) -> bytes:
        if page in self.own:
            return self.own[page]
        return in_the_file(self.offset + page * self.page, self.page)

    def read(self, page: int) -> bytes:
        found = ctypes.create_string_buffer(self.page)
        # Through CDLL, so without the GIL.
        libc.memcpy(found, self.address + page * self.page, self.page)
        return found.raw

    def write(self, page: int, data: bytes) -> None:
        before = self.known(page)
        libc.memcpy(self.address + page * self.page, data, len(data))
        self.own[page] = data + before[len(data) :]

    def drop(self, page: int, count: int) -> None:
        address = self.address + page * self.page
        checked(libc.madvise(address, count * self.page, self._advice))
        for number in range(page, page + count):
            self.own[number] = bytes(self.page)


def text(version: str, regions: list[Region]) -> bytes:
    """The handshake, as that version's serializer writes it."""
    found = []
    for region in regions:
        fields = [
            ("base_host_virt_addr", region.address),
            ("size", region.size),
            ("offset", region.offset),
        ]
        if version in ("1.12", "e2b"):
            fields.append(("page_size", region.page))
        if version != "1.1":
            fields.append(("page_size_kib", region.page))
        found.append("{" + ",".join(f'"{name}":{value}' for name, value in fields) + "}")
    mappings = "[" + ",".join(found) + "]"
    return (f'{{"mappings": {mappings}}}' if version == "hypeman" else mappings).encode()


class Client:
    def __init__(self, spec: dict[str, Any]) -> None:
        version, pieces = spec["version"], spec.get("pieces", 0)
        self.uffd = userfaultfd()
        # Before 1.12 Firecracker asked for it only if there was a balloon, which there is here.
        fcntl.ioctl(self.uffd, UFFDIO_API, struct.pack("<3Q", 0xAA, EVENT_REMOVE, 0))
        memfd, fds = -1, [self.uffd]
        if version == "e2b":
            memfd = os.memfd_create("guest")
            os.ftruncate(memfd, max(size + offset for size, offset in spec["regions"]))
            fds.append(memfd)
        self.regions = [
            Region(self.uffd, size, offset, spec["page_size"], memfd)
            for size, offset in spec["regions"]
        ]
        said = text(version, self.regions)
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.connect(spec["socket"])
        first = said[: pieces or len(said)]
        socket.send_fds(self.connection, [first], fds)
        for start in range(len(first), len(said), pieces or 1):
            self.connection.sendall(said[start : start + pieces])
        if version == "stratovirt" and self.connection.recv(1) != b"\x01":
            raise SystemExit("no acknowledgement came")
        if version in ("1.1", "1.7"):
            self.connection.close()

    def _some(self, count: int, seed: int) -> list[tuple[Region, int]]:
        every = [(region, page) for region in self.regions for page in range(region.pages)]
        return random.Random(seed).sample(every, min(count, len(every)))

    def _check(self, pages: list[tuple[Region, int]]) -> list[list[int]]:
        return [
            [self.regions.index(region), page]
            for region, page in pages
            if region.read(page) != region.known(page)
        ]

    def touch(self, count: int, seed: int, threads: int) -> list[list[int]]:
        bad: list[list[int]] = []

        def run(number: int) -> None:
            bad.extend(self._check(self._some(count, seed * 100 + number)))

        workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return bad

    def write(self, count: int, seed: int) -> list[list[int]]:
        pages = self._some(count, seed)
        for number, (region, page) in enumerate(pages):
            region.write(page, WORD.pack(number) * 8)
        return self._check(pages)

    def drop(self, count: int, seed: int) -> list[list[int]]:
        pages = self._some(count, seed)
        chance = random.Random(seed)
        for region, page in pages:
            region.drop(page, chance.randint(1, min(16, region.pages - page)))
        return self._check(pages)

    def race(self, count: int, seed: int) -> list[list[int]]:
        """While a page is being dropped both is right, its bytes and zeros, and where that happens
        in the midst of a copy first these and then those; never anything else."""
        before = {
            (region, page): region.known(page)
            for region in self.regions
            for page in range(region.pages)
        }
        bad: list[list[int]] = []

        def read(number: int) -> None:
            for region, page in self._some(count, seed * 100 + number):
                if not before[region, page].startswith(region.read(page).rstrip(b"\0")):
                    bad.append([self.regions.index(region), page])

        readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
        for reader in readers:
            reader.start()
        bad += self.drop(count // 4, seed)
        for reader in readers:
            reader.join()
        return bad

    def verify(self) -> list[list[int]]:
        return self._check(
            [(region, page) for region in self.regions for page in range(region.pages)]
        )


def main() -> None:
    client = Client(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(client, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
