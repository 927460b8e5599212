"""A server of aiouffd's own dialect that shares nothing with `aiouffd.serve`.

    python tests/servers/native_peer.py SOCKET SIZE [MODE...]

Written after docs/serve-protocol.md, with threads and plain system calls: what two programs that
were written apart agree on is the protocol. Serves the numbers from 1 on, as words of 8 bytes (the
tests' `content`), SIZE bytes of them, under the names "" and "numbers". Prints ``ready`` once it
listens. Modes: ``mute`` never reads of a fault, ``swallow`` reads and does nothing, ``poison``
answers all with errors, ``tell`` has the client make these, ``silent`` does not answer questions,
``tag=TEXT`` is the version, ``serve`` is as without.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import sys
import threading
from dataclasses import dataclass

MAGIC = 0x64667561
QUERY, ATTACH, ANSWER, ERROR = 1, 2, 3, 4
ERRORS = 1 << 17
OK, BAD, NOT_FOUND, CHANGED = 0, 1, 2, 3
HEADER = struct.Struct("<IHHII")
ATTACH_FIXED = struct.Struct("<4I8xI4x32s")
AREA = struct.Struct("<QQQII")
REMOVED, INSTALLED, GONE, MOVED = 1, 2, 4, 16

UFFDIO_WAKE, UFFDIO_COPY = 0x8010AA02, 0xC028AA03
UFFDIO_ZEROPAGE, UFFDIO_POISON = 0xC020AA04, 0xC020AA08
PAGEFAULT, FORK, REMAP, REMOVE, UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16


@dataclass
class Area:
    start: int
    length: int
    offset: int
    page: int
    flags: int
    states: int  # where its states begin


class Rude(Exception):
    """The client does not keep to the protocol."""


class Served:
    """One client."""

    def __init__(self, connection: socket.socket, data: bytes, modes: set[str], tag: bytes) -> None:
        self.connection, self.data, self.modes, self.tag = connection, data, modes, tag
        # COPY reads from memory that stays where it is; whole pages at the end.
        self.bytes = ctypes.create_string_buffer(data + bytes(-len(data) % (2 << 20)))
        self.base = ctypes.addressof(self.bytes)
        self._zeros = ctypes.create_string_buffer(2 << 20)
        self.zeros = ctypes.addressof(self._zeros)
        self.fds: list[int] = []
        self.areas: list[Area] = []
        self.states: mmap.mmap | None = None
        self.understands_errors = False

    # -------------------------------------------------------------------- records

    def receive(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            data, ancillary, _, _ = self.connection.recvmsg(count - len(parts), 1024)
            for _, _, raw in ancillary:
                fds = array.array("i")
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                self.fds += fds
            if not data:
                raise EOFError
            parts += data
        return parts

    def answer(self, status: int, text: str = "") -> None:
        fixed = struct.pack("<IIQ32sII", 72, status, len(self.data), self.tag, len(text), 0)
        raw = fixed + text.encode()
        self.connection.sendall(HEADER.pack(MAGIC, 1, ANSWER, 16 + len(raw), 0) + raw)

    def talk(self) -> None:
        """Until the client has handed something over."""
        while not self.areas:
            magic, _version, kind, length, flags = HEADER.unpack(self.receive(HEADER.size))
            if magic != MAGIC or kind not in (QUERY, ATTACH):
                raise Rude
            record = bytes(HEADER.size) + self.receive(length - HEADER.size)
            fixed, name_length = struct.unpack_from("<II", record, 16)
            at = fixed
            if kind == ATTACH:
                fixed, _, count, size, _resumed, tag = ATTACH_FIXED.unpack_from(record, 16)
                at += count * size
            name = record[at : at + name_length].decode()
            if name not in ("", "numbers"):
                self.answer(NOT_FOUND, f"no object {name!r}")
                continue
            if kind == QUERY and "silent" in self.modes:
                continue
            if kind == QUERY:
                self.answer(OK)
                continue
            if any(tag) and tag != self.tag:
                self.answer(CHANGED, "it is another one now")
                return
            states = 0
            for number in range(count):
                area = Area(*AREA.unpack_from(record, fixed + number * size), states=states)
                states += area.length // area.page
                self.areas.append(area)
            self.states = mmap.mmap(self.fds[1], states)
            self.understands_errors = bool(flags & ERRORS)
            self.answer(OK)

    # --------------------------------------------------------------------- faults

    def ioctl(self, request: int, *words: int) -> tuple[int, int]:
        """errno and what the kernel stored in the last word."""
        argument = bytearray(struct.pack(f"={len(words)}Q", *words))
        try:
            fcntl.ioctl(self.fds[0], request, argument)
        except OSError as error:
            return error.errno or -1, struct.unpack_from("=q", argument, len(argument) - 8)[0]
        return 0, struct.unpack_from("=q", argument, len(argument) - 8)[0]

    def read(self) -> set[int]:
        """All messages; the pages that were touched."""
        faults = set()
        while True:
            try:
                raw = os.read(self.fds[0], 32 * 64)
            except BlockingIOError:
                return faults
            for event, a, b, c in struct.iter_unpack("=B7xQQQ", raw):
                if event == PAGEFAULT:
                    faults.add(b)
                elif event == REMOVE:
                    self.mark(a, b, REMOVED)
                elif event == FORK:
                    self.follow(a & 0xFFFFFFFF)
                elif event == UNMAP:
                    self.mark(a, b, GONE)
                elif event == REMAP:
                    self.move(a, b, c)

    def follow(self, fd: int) -> None:
        """A forked child, whose memory is as ours at this moment; served until the end."""
        assert self.states is not None
        child = Served(self.connection, self.data, self.modes, self.tag)
        child.fds, child.areas = [fd], list(self.areas)
        # Its own: what it drops is dropped for nobody else.
        child.states = mmap.mmap(-1, len(self.states))
        child.states[:] = self.states[:]
        threading.Thread(target=child.serve, args=(fd,), daemon=True).start()

    def move(self, source: int, target: int, length: int) -> None:
        self.mark(source, source + length, GONE | MOVED)
        area = self.area_of(source)
        if area is not None:
            states = area.states + (source - area.start) // area.page
            offset = area.offset + source - area.start
            self.areas.append(Area(target, length, offset, area.page, area.flags, states))

    def area_of(self, address: int) -> Area | None:
        # What was moved last may lie in what was unmapped before.
        areas = reversed(self.areas)
        found = (area for area in areas if area.start <= address < area.start + area.length)
        return next(found, None)

    def mark(self, start: int, end: int, bit: int) -> None:
        assert self.states is not None
        for area in self.areas:
            low, high = max(start, area.start), min(end, area.start + area.length)
            for address in range(low, high, area.page):
                self.states[area.states + (address - area.start) // area.page] |= bit

    def tell(self, page: int, size: int) -> bool:
        """Have the client make an error. With a field more than there is today."""
        assert self.understands_errors
        raw = struct.pack("<I4xQQ8x", 48, page, size)
        self.connection.sendall(HEADER.pack(MAGIC, 1, ERROR, 16 + len(raw), 0) + raw)
        return True

    def resolve(self, address: int) -> bool:
        """False if it has to be tried again."""
        area = self.area_of(address)
        if area is None:
            return self.ioctl(UFFDIO_POISON, address, mmap.PAGESIZE, 0, 0)[0] != errno.EAGAIN
        page = address - address % area.page
        assert self.states is not None
        state = self.states[area.states + (page - area.start) // area.page]
        if "poison" in self.modes:
            code, _ = self.ioctl(UFFDIO_POISON, page, area.page, 0, 0)
            if code == errno.EINVAL:
                return self.tell(page, area.page)
        elif "tell" in self.modes:
            return self.tell(page, area.page)
        elif state & (REMOVED | INSTALLED) or area.flags & 1:
            # What was there and is not any more has been removed.
            if area.page == mmap.PAGESIZE:
                code, _ = self.ioctl(UFFDIO_ZEROPAGE, page, area.page, 0, 0)
            else:  # for huge pages there is no such thing
                code, _ = self.ioctl(UFFDIO_COPY, page, self.zeros, area.page, 0, 0)
        else:
            source = self.base + area.offset + page - area.start
            code, _ = self.ioctl(UFFDIO_COPY, page, source, area.page, 0, 0)
            if not code:
                self.mark(page, page + area.page, INSTALLED)
        if code == errno.EAGAIN:
            return False
        self.ioctl(UFFDIO_WAKE, page, area.page)
        return True

    def serve(self, child: int = -1) -> None:
        for area in self.areas:
            self.ioctl(UFFDIO_WAKE, area.start, area.length)
        poll = select.poll()
        if child < 0:
            poll.register(self.connection, select.POLLIN)
        if "mute" not in self.modes:
            poll.register(self.fds[0], select.POLLIN)
        again: set[int] = set()
        while True:
            ready = dict(poll.poll(1 if again else None))
            if child < 0 and self.connection.fileno() in ready and not self.connection.recv(100):
                return
            if "mute" in self.modes or ("swallow" in self.modes and self.read() is not None):
                continue
            again = {page for page in self.read() | again if not self.resolve(page)}

    def run(self) -> None:
        try:
            self.talk()
            if self.areas:
                self.serve()
        except (EOFError, Rude, ConnectionError):
            pass
        # The connection last: it tells the client that nothing is filled any more.
        for fd in self.fds:
            os.close(fd)
        self.connection.close()


def main() -> None:
    path, size, *modes = sys.argv[1:]
    data = array.array("Q", range(1, int(size) // 8 + 1)).tobytes()
    tag = (
        next((mode[4:] for mode in modes if mode.startswith("tag=")), "").encode().ljust(32, b"\0")
    )
    listening = socket.socket(socket.AF_UNIX)
    if os.path.exists(path):
        os.unlink(path)
    listening.bind(path)
    listening.listen(64)
    print("ready", flush=True)
    while True:
        connection, _ = listening.accept()
        served = Served(connection, data, set(modes), tag)
        threading.Thread(target=served.run, daemon=True).start()


if __name__ == "__main__":
    main()
