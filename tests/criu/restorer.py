"""What ``criu restore --lazy-pages`` does with memory: a program without anything of aiouffd.

    python restorer.py < SPECIFICATION

It is run in the work directory, and connects to ``lazy-pages.socket`` there. The specification is
JSON:

``tasks``   pid, ``vmas`` ([start, length, flags]), ``lazy`` and ``eager`` ([address, pages, tag]),
            ``before`` and ``after`` (actions before and after the last word), or ``dead``
``dribble`` send pids and the last word byte by byte
``finish``  false: hang up before the last word
``linger``  false: end as soon as the last word is said

Each task is a process. As the restorer does, it makes a userfaultfd and sends it, maps memory
somewhere, fills in what is not lazy, moves it to its place, registers it, and closes its copy of
the descriptor. Then it acts, and compares all that it sees with what must be there by its own
reckoning.

Actions::

    ["check", address, pages]           read and compare
    ["touch", address]                  the same of one page in a thread; "join" waits for it
    ["kernel", address, pages]          the same through write(2)
    ["store", address]                  write a word into a page, and know it
    ["drop" | "free" | "unmap", address, pages]
    ["move", address, pages, target]    mremap
    ["fork", [actions]]                 a child acts; wait for it
    ["fork_on", [actions]]              a child acts; "join" waits for it
    ["join"]
    ["say", text]                       a line on stdout
    ["wait", path]                      until somebody opens the FIFO for writing

Each task says how it ended, 0 if it saw what it must; at the end comes ``failed N``.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import threading
from typing import Any

PAGE = 4096
REGISTER, API = 0xC020AA00, 0xC018AA3F
FORK, REMAP, REMOVE, UNMAP = 1 << 1, 1 << 2, 1 << 3, 1 << 6
FEATURES = FORK | REMAP | REMOVE | UNMAP
ZERO = -1
SOCKET = "lazy-pages.socket"

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def check(result: int | None, what: str) -> int:
    if result is None or result in (-1, 2**64 - 1):
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def page_of(tag: int, address: int) -> bytes:
    if tag == ZERO:
        return bytes(PAGE)
    first = tag << 48 | address
    return array.array("Q", range(first, first + PAGE // 8)).tobytes()


def new_uffd() -> int:
    for flags, features in ((0, FEATURES), (1, FEATURES & ~FORK)):  # 1: faults of user mode only
        fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | flags)
        if fd < 0:
            continue
        try:
            fcntl.ioctl(fd, API, struct.pack("QQQ", 0xAA, features, 0))
        except OSError:
            os.close(fd)
            continue
        return int(fd)
    raise OSError("no userfaultfd can be had")


class Space:
    """Memory, and what must be in it: page by page the tag and first address, or nothing."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.pages: dict[int, tuple[int, int]] = {}
        self.written: dict[int, bytes] = {}
        self.threads: list[threading.Thread] = []
        self.children: list[int] = []
        self.wrong: list[str] = []

    def restore(self, uffd: int) -> None:
        for start, length, flags in self.task["vmas"]:
            place = check(
                libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0), "mmap"
            )
            for address, count, tag in self.task["eager"]:
                for at in range(address, address + count * PAGE, PAGE):
                    if start <= at < start + length:
                        ctypes.memmove(place + at - start, page_of(tag, at), PAGE)
            check(libc.mremap(place, length, length, 3, start), "mremap")
            fcntl.ioctl(uffd, REGISTER, struct.pack("QQQQ", start, length, 1, 0))
            for at in range(start, start + length, PAGE):
                self.pages[at] = (ZERO, at)
        for address, count, tag in [*self.task["eager"], *self.task["lazy"]]:
            for at in range(address, address + count * PAGE, PAGE):
                self.pages[at] = (tag, at)
        os.close(uffd)

    # ---- actions ----

    def act(self, actions: list[list[Any]]) -> None:
        for name, *arguments in actions:
            getattr(self, f"do_{name}")(*arguments)

    def expected(self, address: int) -> bytes:
        return self.written.get(address) or page_of(*self.pages[address])

    def compare(self, address: int, data: bytes, how: str = "") -> None:
        if data != self.expected(address):
            what = "zeros" if not any(data) else f"{data[:16].hex()}..."
            self.wrong.append(
                f"{how}{address:#x} is {what}, not {self.expected(address)[:16].hex()}"
            )

    def do_check(self, address: int, pages: int) -> None:
        for at in range(address, address + pages * PAGE, PAGE):
            self.compare(at, ctypes.string_at(at, PAGE))

    def do_touch(self, address: int) -> None:
        def touch() -> None:
            # Without the GIL, so that others may go on.
            target = ctypes.create_string_buffer(PAGE)
            libc.memcpy(target, ctypes.c_void_p(address), ctypes.c_size_t(PAGE))
            self.compare(address, target.raw, "thread: ")

        thread = threading.Thread(target=touch)
        thread.start()
        self.threads.append(thread)

    def do_kernel(self, address: int, pages: int) -> None:
        source, sink = os.pipe()
        for at in range(address, address + pages * PAGE, PAGE):
            if check(libc.write(sink, ctypes.c_void_p(at), ctypes.c_size_t(PAGE)), "write") == PAGE:
                self.compare(at, os.read(source, PAGE), "kernel: ")
        os.close(source)
        os.close(sink)

    def do_store(self, address: int) -> None:
        before = bytearray(self.expected(address))
        before[:8] = struct.pack("Q", 0xF00D << 32 | os.getpid())
        ctypes.memmove(address, bytes(before[:8]), 8)
        self.written[address] = bytes(before)

    def do_drop(self, address: int, pages: int, advice: int = mmap.MADV_DONTNEED) -> None:
        check(libc.madvise(address, pages * PAGE, advice), "madvise")
        for at in range(address, address + pages * PAGE, PAGE):
            self.pages[at] = (ZERO, at)
            self.written.pop(at, None)

    def do_unmap(self, address: int, pages: int) -> None:
        check(libc.munmap(address, pages * PAGE), "munmap")
        for at in range(address, address + pages * PAGE, PAGE):
            del self.pages[at]
            self.written.pop(at, None)

    def do_move(self, address: int, pages: int, target: int) -> None:
        length = pages * PAGE
        check(libc.mremap(address, length, length, 3, target), "mremap")
        moved = {}
        for at in range(0, length, PAGE):
            moved[target + at] = self.pages.pop(address + at)
            if (data := self.written.pop(address + at, None)) is not None:
                self.written[target + at] = data
        self.pages |= moved

    def do_fork(self, actions: list[list[Any]]) -> None:
        self.do_fork_on(actions)
        self.wait_for(self.children.pop())

    def do_fork_on(self, actions: list[list[Any]]) -> None:
        pid = os.fork()
        if not pid:
            status = 3
            try:
                self.threads, self.children, self.wrong = [], [], []
                self.act(actions)
                status = self.report("child")
            finally:
                os._exit(status)
        self.children.append(pid)

    def wait_for(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        if status:
            self.wrong.append(f"a child ended with {status:#x}")

    def do_join(self) -> None:
        while self.threads:
            self.threads.pop().join()
        while self.children:
            self.wait_for(self.children.pop())

    def do_say(self, text: str) -> None:
        os.write(1, f"{text}\n".encode())

    def do_wait(self, path: str) -> None:
        with open(path, "rb") as fifo:
            fifo.read()

    def report(self, who: str) -> int:
        for line in self.wrong[:5]:
            os.write(2, f"{who} of task {self.task['pid']}: {line}\n".encode())
        return int(bool(self.wrong))


def send_all(connection: socket.socket, data: bytes, dribble: bool) -> None:
    for piece in [data[at : at + 1] for at in range(len(data))] if dribble else [data]:
        connection.sendall(piece)


def run_task(task: dict[str, Any], connection: socket.socket, lock: Any, pipes: Any) -> int:
    """In the task's own process, which has inherited the connection."""
    ready, go = pipes
    space = Space(task)
    uffd = new_uffd()
    with lock:
        send_all(connection, struct.pack("=i", task["pid"]), task["dribble"])
        socket.send_fds(connection, [b"\0"], [uffd])
    space.restore(uffd)
    space.act(task["before"])
    connection.close()
    os.write(ready, b"r")
    os.close(ready)
    os.read(go, 1)  # until all are, and the last word is said
    space.act(task["after"])
    space.do_join()
    status = space.report("task")
    space.do_say(f"task {task['pid']} ended with {status}")
    return status


class FileLock:
    """Between processes."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("lock")

    def __enter__(self) -> None:
        # A description of its own: locks belong to those.
        self.held = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR)
        fcntl.flock(self.held, fcntl.LOCK_EX)

    def __exit__(self, *exc: object) -> None:
        os.close(self.held)


def main() -> int:
    specification = json.load(sys.stdin)
    dribble = specification.get("dribble", False)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(SOCKET)
    lock = FileLock()
    processes, readies = [], []
    go, let_go = os.pipe()
    for task in specification["tasks"]:
        if task.get("dead"):
            with lock:
                send_all(connection, struct.pack("=i", -task["pid"]), dribble)
            continue
        task = {"eager": [], "lazy": [], "before": [], "after": [], "dribble": dribble, **task}
        is_ready, ready = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(let_go)
            status = 4
            try:
                status = run_task(task, connection, lock, (ready, go))
            except BaseException as error:
                os.write(2, f"task {task['pid']}: {error!r}\n".encode())
            finally:
                os._exit(status)
        os.close(ready)
        readies.append(is_ready)
        processes.append(pid)
    for fd in readies:
        os.read(fd, 1)
    if specification.get("finish", True):
        send_all(connection, struct.pack("=I", 0x52535446), dribble)
    connection.close()
    os.close(let_go)
    if not specification.get("linger", True):
        return 0
    failed = 0
    for pid in processes:
        _, status = os.waitpid(pid, 0)
        failed += bool(status)
        if os.WIFSIGNALED(status):
            print(f"killed by {os.WTERMSIG(status)}")
    print(f"failed {failed}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
