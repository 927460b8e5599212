"""Runs a command as if the kernel were older than Linux 6.6: without UFFDIO_POISON, and without
UFFDIO_MOVE and PAGEMAP_SCAN, which came with 6.8 and 6.7.

    python3 tools/run_before_6_6.py COMMAND [ARGUMENT...]

A seccomp filter gives these ioctls the errors that such a kernel gives; what the command starts
inherits it. It needs no rights: without CAP_SYS_ADMIN the command and what it starts cannot gain
any (PR_SET_NO_NEW_PRIVS). The handshake (UFFDIO_API) still offers the features, so whoever looks at
them alone is told another thing than such a kernel tells. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

#: Number of ioctl(2), and AUDIT_ARCH_*, by machine.
MACHINES = {"x86_64": (16, 0xC000003E), "aarch64": (29, 0xC00000B7)}
#: Request, and what a kernel says that has never heard of it.
MISSING = (
    (0xC020AA08, errno.EINVAL),  # UFFDIO_POISON, 6.6
    (0xC028AA05, errno.EINVAL),  # UFFDIO_MOVE, 6.8
    (0xC0606610, errno.ENOTTY),  # PAGEMAP_SCAN, 6.7
)
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
# Offsets in struct seccomp_data; of the second argument the low half, which is the request.
NUMBER, ARCH, REQUEST = 0, 4, 24


def program() -> bytes:
    """The filter, in classic BPF."""
    number, arch = MACHINES[platform.machine()]
    rest = 2 * len(MISSING)

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    steps = [step(LOAD, ARCH), step(JUMP_EQUAL, arch, no=rest + 3)]
    steps += [step(LOAD, NUMBER), step(JUMP_EQUAL, number, no=rest + 1), step(LOAD, REQUEST)]
    for request, error in MISSING:
        steps += [step(JUMP_EQUAL, request, no=1), step(RETURN, ERRNO | error)]
    return b"".join([*steps, step(RETURN, ALLOW)])


def install() -> None:
    code = program()
    space = ctypes.create_string_buffer(code)
    filter_ = struct.pack("@HP", len(code) // 8, ctypes.addressof(space))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    arguments = (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(filter_), 0, 0)
    if prctl(*arguments) and (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(*arguments)):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set")


def main() -> int:
    if len(sys.argv) < 2 or platform.machine() not in MACHINES:
        print(__doc__, file=sys.stderr)
        return 2
    install()
    os.execvp(sys.argv[1], sys.argv[1:])
    return None


if __name__ == "__main__":
    sys.exit(main())
