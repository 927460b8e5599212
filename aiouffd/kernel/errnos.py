"""Errnos of userfaultfd's ioctls as `KernelError` with a hint what to do.

What each errno means is in the ERRORS sections of the man pages that
https://man7.org/linux/man-pages/man2/ioctl_userfaultfd.2.html lists.
"""

from __future__ import annotations

import errno
import os

from ..errors import KernelError, UnsupportedError
from .abi import SINCE, Feature

__all__ = ["describe", "kernel_error", "lacking_error", "unsupported"]

_HINTS: dict[int, str] = {
    errno.EAGAIN: "mappings are changing: read all messages, pause, try again",
    errno.EEXIST: "a page of the range is present already: wake() the range;"
    " on hugetlb it may also mean that no huge page is free",
    errno.ENOENT: "part of the range is not mapped, not registered, or in another mapping:"
    " stay inside one mapping, and wake() the range if it was unmapped",
    errno.ESRCH: "the process that owned this memory has exited or called execve",
    errno.ENOSYS: "this kernel does not have the call",
    errno.ENOTTY: "this kernel does not have the ioctl",
    errno.EFAULT: "an address is not readable or lies past the end of its file",
    errno.EINVAL: "the kernel does not allow this here: on hugetlb all must be aligned to the huge"
    " page, the range must be registered in the mode that the call needs, and the kernel must be"
    " new enough",
    errno.ENOMEM: "no memory is left, or the process that owned this memory is gone",
}

_HINTS_OF: dict[tuple[str, int], str] = {
    ("register", errno.EBUSY): "another userfaultfd has registered part of the range",
    ("register", errno.EPERM): "a shared mapping of a file that was opened read-only or sealed"
    " against writes cannot be registered",
    ("register", errno.EINVAL): "this kind of memory cannot be registered in this mode:"
    " MISSING, WP and RWP need anonymous, shared or hugetlb memory, MINOR shared or hugetlb memory,"
    " and RWP does not go with WP",
    ("unregister", errno.EINVAL): "nothing is mapped there, another userfaultfd has it, or the"
    " range is not aligned to the huge page",
    ("copy", errno.EINVAL): "wp=True needs a range registered with Mode.WP, and on hugetlb all must"
    " be aligned to the huge page",
    ("continue_", errno.EFAULT): "the page cache has no such page: write it there first",
    ("continue_", errno.EINVAL): "continue_ is for shared memory and hugetlb; wp=True needs"
    " Mode.WP and Linux 6.4",
    ("zeropage", errno.EINVAL): "hugetlb has no zero page: copy() zeros there",
    ("move", errno.EINVAL): "both mappings must be private anonymous memory of this process,"
    " writable, with the same protection; move needs Linux 6.8",
    ("move", errno.ENOENT): "the source has a hole (allow_holes=True), or the destination is not"
    " registered",
    ("move", errno.EBUSY): "the page is shared with a forked child, or pinned: write to it again"
    " to own it alone, or use copy()",
    ("poison", errno.EINVAL): "poison needs Linux 6.6; on hugetlb all must be aligned to the huge"
    " page",
    ("writeprotect", errno.ENOENT): "part of the range is not registered with Mode.WP; what came"
    " before that part is done",
    ("rwprotect", errno.ENOENT): "part of the range is not registered with Mode.RWP; what came"
    " before that part is done",
    ("read", errno.EMFILE): "a fork waits for a free descriptor: close some, or raise"
    " RLIMIT_NOFILE",
    ("scan", errno.EPERM): "protect=True needs the range registered with Mode.WP alone, on a"
    " userfaultfd with Feature.WP_ASYNC",
}


def kernel_error(name: str, code: int, what: str, done: int = 0) -> KernelError:
    """Make the error of calling ``name`` on ``what``, which had completed ``done`` bytes."""
    if code == errno.EAGAIN and done:
        hint = "that part is in place: call again for the rest to learn the reason"
    else:
        hint = _HINTS_OF.get((name, code)) or _HINTS.get(code, "")
    progress = f" after {done} bytes" if done else ""
    return KernelError(
        f"{name} of {what} failed{progress}: {os.strerror(code)}",
        errno=code,
        done=done,
        hint=hint or None,
    )


def lacking_error(
    name: str, needed: Feature, available: Feature, hint: str | None = None
) -> UnsupportedError | None:
    """Make the error of calling ``name`` if this kernel lacks a feature it needs, else None.

    The kernel answers EINVAL to a call that it does not know, as it does to a wrong argument.
    """
    # As numbers, because inverting a flag forgets the bits that it has no name for.
    bits = [1 << bit for bit in range(64) if int(needed) & ~int(available) & 1 << bit]
    if not bits:
        return None
    return unsupported(name, ", ".join(_with_version(Feature(bit)) for bit in bits), hint)


def _with_version(feature: Feature) -> str:
    since = SINCE.get(feature)
    return f"{feature.name} (Linux {since})" if since else hex(feature)


def unsupported(name: str, what: str, hint: str | None = None) -> UnsupportedError:
    """Make the error of calling ``name`` for ``what``, which this kernel does not have."""
    return UnsupportedError(
        f"{name}: Linux {os.uname().release} does not have: {what}",
        errno=errno.EINVAL,
        hint=hint
        or "leave it out, or run a newer kernel; `aiouffd doctor` shows what this one offers",
    )


def describe(start: int, length: int) -> str:
    """Format a range of addresses for an error message."""
    return f"[{start:#x}, {start + length:#x})"
