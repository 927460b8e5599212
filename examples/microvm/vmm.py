"""A small VMM, of the kind that Firecracker is: makes a snapshot of a guest, and restores it.

    python vmm.py snapshot FOLDER [--size MIB] [--elements N]
    python vmm.py restore FOLDER --uffd SOCKET
    python vmm.py restore FOLDER --copy FILE_OR_URL

A snapshot is two files, `state.json` with the CPU's registers and `memory` with all of the guest's
memory. `restore --uffd` starts the guest at once on memory that is empty: it makes a userfaultfd,
gives it to the server at SOCKET together with Firecracker's JSON, and the server fills each page
when the guest touches it. `restore --copy` copies the memory file here first. Both print what the
guest says, and when its first output came; `--json` prints both as JSON.

This is a client, and independent of aiouffd on purpose: nothing of it is imported here.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from guest import BALLOON, CODE, CONSOLE, MIB, PAGE, STACK, Guest, filler
from machine import Machine

STATE, MEMORY = "state.json", "memory"
PIECE = MIB

# From <linux/userfaultfd.h>.
SYS_USERFAULTFD = 323  # x86-64
USERFAULTFD_IOC_NEW = 0xAA00
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFD_API = 0xAA
UFFD_FEATURE_EVENT_REMOVE = 1 << 3
UFFDIO_REGISTER_MODE_MISSING = 1

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def checked(result: int) -> int:
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class GuestMemory:
    """Memory of a guest: a mapping of this process, with its address."""

    def __init__(self, memory: mmap.mmap, *, of_file: bool) -> None:
        self.memory = memory
        self.size = len(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._of_file = of_file

    def give_away(self, start: int, length: int) -> None:
        """What a balloon does: the pages go back to the host, and are zeros if touched again."""
        if self._of_file:  # which would only be read again
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
            flags |= mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
            checked(libc.mmap(self.address + start, length, protection, flags, -1, 0))
        else:
            # With a userfaultfd this waits until the server has read of it.
            checked(libc.madvise(self.address + start, length, mmap.MADV_DONTNEED))

    def resident(self) -> list[int]:
        """Numbers of the pages that are there."""
        states = (ctypes.c_char * (self.size // PAGE))()
        checked(libc.mincore(self.address, self.size, states))
        return [page for page, state in enumerate(states.raw) if state & 1]

    def wrong(self, guest: Guest) -> tuple[int, int]:
        """How many pages are there after the guest's end, and how many of them have not the
        contents that they should have."""
        pages = self.resident()
        known = guest.memory_at_end()
        bad = sum(
            self.memory[page * PAGE : (page + 1) * PAGE] != (known.get(page) or filler(page))
            for page in pages
            if page != STACK // PAGE - 1
        )
        return len(pages), bad


# ------------------------------------------------------------------ snapshot


def make_snapshot(folder: Path, size: int, elements: int) -> None:
    """Run a new guest up to the point from which it is to be restored, and write it down."""
    guest = Guest(size, elements)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / MEMORY).open("w+b") as file:
        for start in range(0, size, PIECE):
            pages = range(start // PAGE, (start + PIECE) // PAGE)
            file.write(b"".join(map(filler, pages)))
        file.flush()
        # The file is the guest's memory, so nothing is left to be written at the end.
        memory = GuestMemory(mmap.mmap(file.fileno(), size), of_file=True)
    for address, data in guest.image().items():
        memory.memory[address : address + len(data)] = data
    machine = Machine(memory.address, size, lambda port, data: None)
    machine.begin_at(CODE)
    machine.run()
    memory.memory.flush()
    state = {"size": size, "elements": elements, "registers": machine.registers.hex()}
    (folder / STATE).write_text(json.dumps(state))
    machine.close()


# ------------------------------------------------------------------- restore


@dataclass(frozen=True)
class Outcome:
    """What came of a restored guest. Seconds count from the beginning of the restoration."""

    said: str
    first_output: float
    end: float
    resident: int  # bytes of memory that are there at the end
    right: bool  # it said what it should, and all of that memory is as it should be


def lazy_memory(size: int, path: str) -> tuple[GuestMemory, list[object]]:
    """Memory that the server at ``path`` fills; and what is to be kept open as long."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = GuestMemory(mmap.mmap(-1, size, flags=flags), of_file=False)
    # KVM reads guest memory from inside the kernel: no UFFD_USER_MODE_ONLY.
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        uffd = checked(libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
    else:
        uffd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(device)
    # Without EVENT_REMOVE the server would fill again what the balloon has given away.
    fcntl.ioctl(uffd, UFFDIO_API, struct.pack("<3Q", UFFD_API, UFFD_FEATURE_EVENT_REMOVE, 0))
    region = struct.pack("<4Q", memory.address, size, UFFDIO_REGISTER_MODE_MISSING, 0)
    fcntl.ioctl(uffd, UFFDIO_REGISTER, region)
    mapping = {
        "base_host_virt_addr": memory.address,
        "size": size,
        "offset": 0,
        "page_size": PAGE,
        "page_size_kib": PAGE,
    }
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    socket.send_fds(connection, [json.dumps([mapping]).encode()], [uffd])
    # Our own copy of the userfaultfd: if the server ends we wait, instead of seeing zeros. The
    # connection is kept too, as Firecracker has done since 1.12.
    return memory, [uffd, connection]


def copied_memory(size: int, folder: Path, origin: str) -> GuestMemory:
    """The memory file from ``origin``, a path or URL, copied to here and mapped privately."""
    remote = "://" in origin
    buffer = memoryview(bytearray(PIECE))
    with (
        urllib.request.urlopen(origin) if remote else open(origin, "rb", buffering=0) as source,
        tempfile.TemporaryFile(dir=folder, buffering=0) as copy,
    ):
        while count := source.readinto(buffer):
            copy.write(buffer[:count])
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        memory = mmap.mmap(copy.fileno(), size, flags=mmap.MAP_PRIVATE, prot=protection)
    return GuestMemory(memory, of_file=True)


def restore(folder: Path, *, uffd: str = "", copy: str = "", echo: bool = False) -> Outcome:
    """Have the guest of the snapshot in ``folder`` go on, to its end."""
    started = time.perf_counter()
    state = json.loads((folder / STATE).read_text())
    size, guest = state["size"], Guest(state["size"], state["elements"])
    if uffd:
        memory, _kept = lazy_memory(size, uffd)
    else:
        memory, _kept = copied_memory(size, folder, copy), []
    said, taken, first = bytearray(), list[int](), 0.0

    def output(port: int, data: bytes) -> None:
        nonlocal first
        if port == CONSOLE:
            first = first or time.perf_counter() - started
            said.extend(data)
            if echo:
                os.write(1, data)
        elif port == BALLOON:
            taken.append(int.from_bytes(data, "little"))
            if len(taken) == 2:
                memory.give_away(*taken)
                taken.clear()

    machine = Machine(memory.address, size, output)
    machine.registers = bytes.fromhex(state["registers"])
    machine.run()
    end = time.perf_counter() - started
    machine.close()
    pages, wrong = memory.wrong(guest)
    text = said.decode(errors="replace")
    return Outcome(text, first, end, pages * PAGE, not wrong and text == guest.said())


# -------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(description="A small VMM with snapshots.")
    commands = parser.add_subparsers(dest="command", required=True)
    snapshot = commands.add_parser("snapshot", help="make a snapshot of a guest")
    snapshot.add_argument("folder", type=Path)
    snapshot.add_argument("--size", type=int, default=64, metavar="MIB", help="guest memory")
    snapshot.add_argument("--elements", type=int, default=256, help="pages the guest will need")
    command = commands.add_parser("restore", help="have the guest go on")
    command.add_argument("folder", type=Path)
    way = command.add_mutually_exclusive_group(required=True)
    way.add_argument("--uffd", metavar="SOCKET", default="", help="of the server for its memory")
    way.add_argument("--copy", metavar="FILE_OR_URL", default="", help="copy the memory first")
    command.add_argument("--json", action="store_true", help="print the outcome as JSON")
    arguments = parser.parse_args()
    if arguments.command == "snapshot":
        make_snapshot(arguments.folder, arguments.size * MIB, arguments.elements)
        return
    outcome = restore(
        arguments.folder, uffd=arguments.uffd, copy=arguments.copy, echo=not arguments.json
    )
    if arguments.json:
        print(json.dumps(asdict(outcome)))
    else:
        pages = outcome.resident // PAGE
        print(
            f"vmm: first output after {outcome.first_output * 1000:.0f} ms; {pages} pages of memory"
            f" are here, {'all as they should be' if outcome.right else 'SOME OF THEM WRONG'}"
        )
    sys.exit(not outcome.right)


if __name__ == "__main__":
    main()
