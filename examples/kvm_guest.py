"""A virtual machine whose memory is somewhere else.

The guest gets 64 MiB of RAM which nobody has loaded. Each page arrives when the guest
first reads it, from a coroutine: here one that makes the bytes up, elsewhere one that
asks a snapshot on another host. The virtual CPU sleeps in the kernel meanwhile, in a
worker thread, and the event loop stays free.

    python examples/kvm_guest.py

The guest is twenty-odd bytes of real-mode code. It reads one letter from every second
megabyte of its memory, writes each to an I/O port, and halts. Needs /dev/kvm, and a
userfaultfd that may serve the kernel's own accesses (see `aiouffd doctor`).
"""

import argparse
import asyncio
import fcntl
import mmap
import os
import struct
import sys

import aiouffd
from aiouffd.sources import FunctionSource

MEMORY = 64 << 20
MESSAGE = b"Hello from lazy memory, everyone"
STRIDE = MEMORY // len(MESSAGE)
LETTERS = 0x3000  # offset of the letter in each part of STRIDE bytes
ENTRY = 0x1000
PORT = 0xE9
SCRATCH = 0x7000_0000  # guest addresses that KVM may use on old Intel CPUs, not RAM

CODE = b"".join(
    (
        b"\x66\xbe" + struct.pack("<I", LETTERS),  #       mov esi, LETTERS
        b"\xb9" + struct.pack("<H", len(MESSAGE)),  #      mov cx, len(MESSAGE)
        b"\x67\x8a\x06",  #                          next: mov al, [esi]
        b"\xe6" + bytes([PORT]),  #                        out PORT, al
        b"\x66\x81\xc6" + struct.pack("<I", STRIDE),  #    add esi, STRIDE
        b"\x49",  #                                        dec cx
        b"\x75\xf1",  #                                    jnz next
        b"\xf4",  #                                        hlt
    )
)

# From <linux/kvm.h>, x86-64.
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
EXIT_REASON = struct.Struct("<8xI")  # in struct kvm_run
EXIT_IO = struct.Struct("<32xBBHIQ")  # direction, size, port, count, data offset
SEGMENT = struct.Struct("<QIH10B")  # base, limit, selector, type, present, dpl, db, s, l, g, ...
SEGMENTS = 6  # cs, ds, es, fs, gs, ss stand first in struct kvm_sregs


class Machine:
    """One virtual machine with one virtual CPU, on `length` bytes of memory at `address`."""

    def __init__(self, address: int, length: int) -> None:
        self._files: list[int] = []
        system = self._keep(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        if fcntl.ioctl(system, KVM_GET_API_VERSION, 0) != 12:
            raise OSError("this KVM does not speak API version 12")
        machine = self._keep(fcntl.ioctl(system, KVM_CREATE_VM, 0))
        fcntl.ioctl(machine, KVM_SET_TSS_ADDR, SCRATCH)
        region = struct.pack("<IIQQQ", 0, 0, 0, length, address)
        fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, region)
        self._cpu = self._keep(fcntl.ioctl(machine, KVM_CREATE_VCPU, 0))
        size = fcntl.ioctl(system, KVM_GET_VCPU_MMAP_SIZE, 0)
        self._shared = mmap.mmap(self._cpu, size)
        self._set_registers()

    def _keep(self, file: int) -> int:
        self._files.append(file)
        return file

    def _set_registers(self) -> None:
        sregs = bytearray(312)
        fcntl.ioctl(self._cpu, KVM_GET_SREGS, sregs)
        for index in range(SEGMENTS):
            at = index * SEGMENT.size
            fields = list(SEGMENT.unpack_from(sregs, at))
            fields[0] = fields[2] = 0  # base and selector
            if index:  # data segments reach 4 GiB, although the code is 16-bit
                fields[1], fields[9] = 0xFFFFFFFF, 1
            SEGMENT.pack_into(sregs, at, *fields)
        fcntl.ioctl(self._cpu, KVM_SET_SREGS, sregs)
        rip, rflags = ENTRY, 2
        fcntl.ioctl(self._cpu, KVM_SET_REGS, struct.pack("<18Q", *[0] * 16, rip, rflags))

    def run(self) -> bytes:
        """Run until the guest halts; what it wrote to the port.

        Blocks while the guest waits for a page. `fcntl.ioctl` lets the GIL go, so another
        thread's event loop can fetch that page.
        """
        said = bytearray()
        while True:
            try:
                fcntl.ioctl(self._cpu, KVM_RUN, 0)
            except InterruptedError:
                continue
            (reason,) = EXIT_REASON.unpack_from(self._shared)
            if reason == KVM_EXIT_HLT:
                return bytes(said)
            if reason != KVM_EXIT_IO:
                raise RuntimeError(f"the guest stopped with KVM exit reason {reason}")
            _, size, port, count, offset = EXIT_IO.unpack_from(self._shared)
            if port == PORT:
                said += self._shared[offset : offset + size * count]

    def close(self) -> None:
        self._shared.close()
        for file in reversed(self._files):
            os.close(file)
        self._files.clear()


def image(offset: int, length: int) -> bytes:
    """The guest's memory as it would be in a snapshot file: code, letters, and zeros."""
    data = bytearray(length)
    pieces = [(ENTRY, CODE)]
    pieces += [(LETTERS + i * STRIDE, MESSAGE[i : i + 1]) for i in range(len(MESSAGE))]
    for start, piece in pieces:
        begin, end = max(start, offset), min(start + len(piece), offset + length)
        if begin < end:
            data[begin - offset : end - offset] = piece[begin - start : end - start]
    return bytes(data)


def boot(address: int, length: int) -> bytes:
    """Make a machine on this memory and run it to its end."""
    machine = Machine(address, length)
    try:
        return machine.run()
    finally:
        machine.close()


async def main() -> None:
    fetched = 0

    async def read(offset: int, length: int) -> bytes:
        nonlocal fetched
        await asyncio.sleep(0.002)  # a snapshot server in the same building
        fetched += length
        return image(offset, length)

    source = FunctionSource(read, size=MEMORY)
    # Each page is touched once and far from the last: reading ahead would only fetch more.
    async with aiouffd.open(source, writable=True, readahead=0) as memory:
        if memory.user_mode_only:
            print("skipped: KVM needs faults of kernel mode; see `aiouffd doctor`")
            return
        said = await asyncio.to_thread(boot, memory.address, len(memory))
    print(f"the guest said: {said.decode()}")
    print(f"fetched {fetched:,} of {MEMORY:,} bytes ({fetched / MEMORY:.1%})")


def unavailable() -> str | None:
    """Why there can be no guest here, or None."""
    if os.uname().machine != "x86_64":
        return "the guest is x86 code"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return None


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    reason = unavailable()
    if reason is not None:
        print(f"skipped: {reason}")
        sys.exit(0)
    asyncio.run(main())
