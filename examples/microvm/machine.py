"""KVM by its ioctls: a machine with one virtual CPU, in 32-bit protected mode, without devices.

What it writes to ports goes to a function; HLT stops it. Its registers can be taken out and put
into another machine, which then goes on where this one stopped.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable

# From <linux/kvm.h>, x86-64.
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5

SCRATCH = 0x7000_0000  # guest addresses that KVM may use on old Intel CPUs, not RAM
REGS, SREGS = 144, 312  # bytes of struct kvm_regs and struct kvm_sregs
EXIT_REASON = struct.Struct("<8xI")  # in struct kvm_run
EXIT_IO = struct.Struct("<32xBBHIQ")  # direction, size, port, count, data offset
SEGMENT = struct.Struct("<QIH10B")  # base, limit, selector, type, present, dpl, db, s, l, g, ...
SEGMENTS = 6  # cs, ds, es, fs, gs, ss stand first in struct kvm_sregs
CR0 = 224  # offset in struct kvm_sregs
CODE_SEGMENT, DATA_SEGMENT = 0xB, 0x3  # types: may be executed, may be written


def unavailable() -> str | None:
    """Why there can be no machine here, or None."""
    if os.uname().machine != "x86_64":
        return "the guest is x86 code"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return None


class Machine:
    """One virtual machine on ``length`` bytes of memory at ``address`` of this process.

    ``output(port, data)`` is called for what the guest writes to a port.
    """

    def __init__(self, address: int, length: int, output: Callable[[int, bytes], None]) -> None:
        self._output = output
        self._files: list[int] = []
        system = self._keep(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        if fcntl.ioctl(system, KVM_GET_API_VERSION, 0) != 12:
            raise OSError("this KVM does not speak API version 12")
        machine = self._keep(fcntl.ioctl(system, KVM_CREATE_VM, 0))
        fcntl.ioctl(machine, KVM_SET_TSS_ADDR, SCRATCH)
        region = struct.pack("<IIQQQ", 0, 0, 0, length, address)
        fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, region)
        self._cpu = self._keep(fcntl.ioctl(machine, KVM_CREATE_VCPU, 0))
        self._shared = mmap.mmap(self._cpu, fcntl.ioctl(system, KVM_GET_VCPU_MMAP_SIZE, 0))

    def _keep(self, file: int) -> int:
        self._files.append(file)
        return file

    def begin_at(self, address: int) -> None:
        """Have the CPU begin there: flat 32-bit segments, no paging, no interrupts."""
        sregs = bytearray(SREGS)
        fcntl.ioctl(self._cpu, KVM_GET_SREGS, sregs)
        for index in range(SEGMENTS):
            kind = DATA_SEGMENT if index else CODE_SEGMENT
            flat = (0, 0xFFFFFFFF, 8 * (2 if index else 1), kind, 1, 0, 1, 1, 0, 1, 0, 0, 0)
            SEGMENT.pack_into(sregs, index * SEGMENT.size, *flat)
        (cr0,) = struct.unpack_from("<Q", sregs, CR0)
        struct.pack_into("<Q", sregs, CR0, cr0 | 1)
        fcntl.ioctl(self._cpu, KVM_SET_SREGS, sregs)
        rip, rflags = address, 2
        fcntl.ioctl(self._cpu, KVM_SET_REGS, struct.pack("<18Q", *[0] * 16, rip, rflags))

    @property
    def registers(self) -> bytes:
        """The CPU's state, once `run` has returned."""
        regs, sregs = bytearray(REGS), bytearray(SREGS)
        fcntl.ioctl(self._cpu, KVM_GET_REGS, regs)
        fcntl.ioctl(self._cpu, KVM_GET_SREGS, sregs)
        return bytes(regs + sregs)

    @registers.setter
    def registers(self, state: bytes) -> None:
        fcntl.ioctl(self._cpu, KVM_SET_SREGS, state[REGS:])
        fcntl.ioctl(self._cpu, KVM_SET_REGS, state[:REGS])

    def run(self) -> None:
        """Run until the guest halts. Blocks while the guest waits for a page."""
        while True:
            try:
                fcntl.ioctl(self._cpu, KVM_RUN, 0)
            except InterruptedError:
                continue
            (reason,) = EXIT_REASON.unpack_from(self._shared)
            if reason == KVM_EXIT_HLT:
                return
            if reason != KVM_EXIT_IO:
                raise RuntimeError(f"the guest stopped with KVM exit reason {reason}")
            _, size, port, count, offset = EXIT_IO.unpack_from(self._shared)
            self._output(port, self._shared[offset : offset + size * count])

    def close(self) -> None:
        """Destroy the machine; the memory is the caller's. Idempotent."""
        if self._files:
            self._shared.close()
        for file in reversed(self._files):
            os.close(file)
        self._files.clear()
