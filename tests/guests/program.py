"""The process in a `Guest`: memory that somebody else serves, and commands to use it."""

from __future__ import annotations

import array
import ctypes
import hashlib
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from aiouffd import Feature, Mode, Userfaultfd
from tests.guests import AREA, COUNT

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)  # its functions run without the GIL
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
lock = threading.Lock()


def check(result: int | None) -> int:
    if result is None or result in (-1, 2**64 - 1):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Program:
    def __init__(self) -> None:
        self.base = self.length = 0
        self.shared = False
        self.touching = 0
        self.page = PAGE
        self.modes = Mode(0)
        self.uffd: Any = None
        self.connection: Any = None

    def map(self, pages: int, options: dict[str, Any]) -> int:
        self.page = options.get("page_size", PAGE)
        self.shared = options.get("shared", False)
        self.length = pages * self.page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x40000 if self.page != PAGE else 0)
        flags |= 0x4000 if options.get("noreserve") else 0
        # With more room than that it can begin at a multiple of `align`.
        align = options.get("align", self.page)
        file = -1
        if self.shared:
            flags, file = mmap.MAP_SHARED, os.memfd_create("memory")
            os.ftruncate(file, self.length + align - self.page)
        base = check(libc.mmap(None, self.length + align - self.page, 3, flags, file, 0))
        self.base = -(-base // align) * align
        features = Feature(0)
        for name in options.get("features", ["EVENT_REMOVE", "EVENT_UNMAP", "EVENT_REMAP"]):
            features |= Feature[name]
        self.uffd = Userfaultfd(features, user_mode_only=None)
        for name in options.get("modes", []):
            self.modes |= Mode[name]
        for first, count in options.get("register", [(0, pages)]):
            self.register(first, count)
        self.offset = options.get("offset", 0)
        return self.base

    def register(self, page: int, count: int) -> None:
        mode = Mode.MISSING | Mode.MINOR if self.shared else Mode.MISSING
        self.uffd.register(self.base + page * self.page, count * self.page, mode | self.modes)

    def protect(self, page: int, count: int) -> None:
        """From writes, or from any access, by the mode that there is beside MISSING."""
        call = self.uffd.rwprotect if self.modes & Mode.RWP else self.uffd.writeprotect
        call(self.base + page * self.page, count * self.page, protect=True)

    def hand_over(self, path: str) -> str:
        self.connection = connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        socket.send_fds(connection, [COUNT.pack(1)], [self.uffd.fileno()])
        connection.sendall(AREA.pack(self.base, self.length, self.offset))
        return connection.recv(1).decode()

    def read(self, page: int, count: int = 1) -> str:
        """Hash of pages; touches them without the GIL."""
        target = ctypes.create_string_buffer(count * self.page)
        libc.memcpy(target, self.base + page * self.page, count * self.page)
        return hashlib.sha256(target.raw).hexdigest()

    def word(self, page: int) -> int:
        target = ctypes.c_uint64()
        libc.memcpy(ctypes.byref(target), self.base + page * self.page, 8)
        return target.value

    def words(self, pages: list[int]) -> list[int]:
        return [self.word(page) for page in pages]

    def read_through_kernel(self, page: int) -> int:
        """Touches in a system call."""
        source, sink = os.pipe()
        self.touching = threading.get_ident()
        check(libc.write(sink, ctypes.c_void_p(self.base + page * self.page), 8))
        data = os.read(source, 8)
        os.close(source)
        os.close(sink)
        return int.from_bytes(data, "little")

    def interrupt(self) -> None:
        """A signal for who touches in a system call: from then on it faults over and over."""
        signal.pthread_kill(self.touching, signal.SIGUSR1)

    def write_word(self, page: int, value: int) -> None:
        libc.memcpy(self.base + page * self.page, ctypes.byref(ctypes.c_uint64(value)), 8)

    def drop(self, page: int, count: int) -> None:
        check(libc.madvise(self.base + page * self.page, count * self.page, mmap.MADV_DONTNEED))

    def unmap(self, page: int, count: int) -> None:
        check(libc.munmap(self.base + page * self.page, count * self.page))

    def move(self, page: int, count: int) -> int:
        """Move pages elsewhere; from now on `base` is there, such that ``page`` is where it was."""
        start, length = self.base + page * self.page, count * self.page
        target = check(libc.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))
        moved = check(libc.mremap(start, length, length, 3, target))
        self.base = moved - page * self.page
        return moved

    def fork(self, pages: list[int]) -> list[int]:
        """What a child sees at ``pages``."""
        source, sink = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.write(sink, array.array("Q", self.words(pages)).tobytes())
            finally:
                os._exit(0)
        os.close(sink)
        data = b""
        while piece := os.read(source, 65536):
            data += piece
        os.close(source)
        os.waitpid(pid, 0)
        return array.array("Q", data).tolist()

    def leave_child(self, pages: list[int], name: str) -> int:
        """A child that has nothing but its memory. Once there is a file ``name`` it looks at
        ``pages``, and writes what it sees behind it. Returns its pid."""
        pid = os.fork()
        if not pid:
            try:
                os.closerange(0, 1024)
                for _ in range(30_000):
                    if os.path.exists(name):
                        break
                    time.sleep(0.001)
                seen = array.array("Q", self.words(pages)).tobytes()
                with open(name + ".part", "wb") as file:
                    file.write(seen)
                os.rename(name + ".part", name + ".seen")
            finally:
                os._exit(0)
        return pid

    def hang_up(self) -> None:
        self.connection.close()

    def make_blocking(self) -> None:
        """What whoever reads the descriptor had set is shared by all copies of it."""
        os.set_blocking(self.uffd.fileno(), True)


def main() -> None:
    program = Program()
    signal.signal(signal.SIGUSR1, lambda *_: None)

    def run(number: int, command: str, arguments: list[Any]) -> None:
        result = error = None
        try:
            result = getattr(program, command)(*arguments)
        except BaseException as failure:
            error = repr(failure)
        with lock:
            print(json.dumps([number, result, error]), flush=True)

    for line in sys.stdin:
        number, command, *arguments = json.loads(line)
        threading.Thread(target=run, args=(number, command, arguments), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
