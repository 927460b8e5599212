"""Opening a userfaultfd: creating it in one of several ways, the handshake, or adopting one.

**The handshake works once.** The first UFFDIO_API enables the requested features, and there is no
second, so a program that wants to know first what is available must ask on a throw-away
descriptor. (An early failure leaves the descriptor usable.) Many features need not be requested:
`Feature` marks them "always on".

**Permissions.** Without privileges a process may create a descriptor that handles faults from user
mode only: a fault inside a system call, say write(2) from such memory, then fails with EFAULT.
Handling those too needs CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1, or permission to
open /dev/userfaultfd, or an open descriptor of that device passed on by another process. See
https://docs.kernel.org/admin-guide/mm/userfaultfd.html.

**The descriptor must be non-blocking.** poll and epoll report EPOLLERR on a blocking one
permanently, which makes an event loop spin. Everything here sets O_NONBLOCK. See
https://man7.org/linux/man-pages/man2/userfaultfd.2.html and
https://man7.org/linux/man-pages/man2/UFFDIO_API.2const.html.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import UnsupportedError, UsageError
from .abi import Feature, Ioctl
from .errnos import kernel_error, lacking_error
from .lib import ffi, lib

__all__ = [
    "Attempt",
    "CreationError",
    "CreationPermissionError",
    "Path",
    "adopt",
    "handshake",
    "kernel_features",
    "name_of",
    "open_descriptor",
    "single_bits",
]

#: Where a userfaultfd comes from: "syscall", "device", or an open descriptor of /dev/userfaultfd.
Path: TypeAlias = Literal["syscall", "device"] | int

_INITIALIZED = 1 << 31  # the kernel's own mark in fdinfo, since 5.15


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way of creating a userfaultfd that was tried, and how it failed."""

    path: str
    errno: int
    reason: str

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno, str(self.errno))
        return f"{self.path}: {name}, {self.reason}"


class CreationError(UnsupportedError):
    """No userfaultfd could be created. ``attempts`` has each way tried, and why it failed."""

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        hint: str | None = None,
        attempts: tuple[Attempt, ...] = (),
    ) -> None:
        super().__init__(message, errno=errno, hint=hint)
        self.attempts = attempts


class CreationPermissionError(CreationError, PermissionError):
    """This user may not create such a userfaultfd on this system."""


def name_of(path: Path) -> str:
    """Return the usual name of a way of creation."""
    if path == "syscall":
        return "userfaultfd(2)"
    if path == "device":
        return "/dev/userfaultfd"
    return f"descriptor {path} of /dev/userfaultfd"


def _try_open(path: Path, flags: int) -> int:
    """Return a new descriptor, or a negated errno."""
    if path == "syscall":
        return lib.au_abi_open(flags, lib.AU_VIA_SYSCALL, -1)
    if path == "device":
        return lib.au_abi_open(flags, lib.AU_VIA_DEVICE, -1)
    return lib.au_abi_open(flags, lib.AU_VIA_DEVICE_FD, path)


def _reason(path: Path, code: int, user_mode_only: bool) -> str:
    if path == "syscall":
        if code == errno.EPERM:
            if user_mode_only:
                return "a security filter (seccomp, LSM) forbids it"
            return (
                "no CAP_SYS_PTRACE in the initial user namespace and vm.unprivileged_userfaultfd"
                " is 0, or a security filter (seccomp, LSM) forbids it"
            )
        if code == errno.ENOSYS:
            return "the kernel was built without CONFIG_USERFAULTFD, or seccomp hides it"
        if code == errno.EINVAL and user_mode_only:
            return "user mode only needs Linux 5.11"
    else:
        if code == errno.ENOENT:
            return "there is no such device; it needs Linux 6.1 and devtmpfs"
        if code in (errno.EACCES, errno.EPERM):
            return "this user may not open the device"
        if code in (errno.ENOTTY, errno.EINVAL):
            return "this is not the userfaultfd device"
    return os.strerror(code)


def open_descriptor(path: Path | None, user_mode_only: bool) -> tuple[int, Path]:
    """Try the ways of creation in turn; return the descriptor and the way that worked."""
    flags = lib.AU_USER_MODE_ONLY if user_mode_only else 0
    paths: tuple[Path, ...] = ("syscall", "device") if path is None else (path,)
    attempts: list[Attempt] = []
    for each in paths:
        fd = _try_open(each, flags)
        if fd >= 0:
            return fd, each
        attempts.append(Attempt(name_of(each), -fd, _reason(each, -fd, user_mode_only)))
        if -fd in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            break
    codes = [attempt.errno for attempt in attempts]
    for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        if code in codes:
            raise CreationError(
                f"no userfaultfd could be created: {os.strerror(code)}",
                errno=code,
                hint="close descriptors, or raise RLIMIT_NOFILE" if code != errno.ENOMEM else None,
                attempts=tuple(attempts),
            )
    kind = "user-mode-only userfaultfd" if user_mode_only else "userfaultfd"
    message = f"no {kind} could be created: " + "; ".join(map(str, attempts))
    denied = next((code for code in codes if code in (errno.EPERM, errno.EACCES)), None)
    if denied is None:
        hint = "`aiouffd doctor` shows what this system offers"
        if user_mode_only and codes[0] == errno.EINVAL:
            # Before Linux 5.11 every way needs privileges.
            hint = (
                f"this is Linux {os.uname().release}: as root `sysctl -w"
                " vm.unprivileged_userfaultfd=1`, run with CAP_SYS_PTRACE, or on a newer kernel"
            )
        raise CreationError(
            message,
            errno=codes[0],
            hint=hint,
            attempts=tuple(attempts),
        )
    if user_mode_only:
        hint = "allow the system call `userfaultfd` in the container's seccomp profile"
    else:
        hint = (
            "any of these helps: `sysctl vm.unprivileged_userfaultfd=1`, permission to open"
            " /dev/userfaultfd, CAP_SYS_PTRACE, or user_mode_only=True if no system call will be"
            " given this memory"
        )
    raise CreationPermissionError(message, errno=denied, hint=hint, attempts=tuple(attempts))


def _handshake(fd: int, features: int) -> tuple[int, int, int]:
    """Run UFFDIO_API; return 0 or an errno, the features offered, and the ioctls."""
    offered = ffi.new("uint64_t *")
    ioctls = ffi.new("uint64_t *")
    rc = lib.au_abi_api(fd, features, offered, ioctls)
    return -rc, int(offered[0]), int(ioctls[0])


def kernel_features(path: Path | None = None) -> Feature:
    """Return all features of this kernel, queried on a throw-away descriptor.

    A user-mode-only descriptor suffices, so this needs no privileges on Linux 5.11 or later. Any
    thread may call it.

    Args:
        path: As in `Userfaultfd`.

    Raises:
        CreationError: If no userfaultfd can be created at all.
    """
    try:
        fd, _ = open_descriptor(path, user_mode_only=True)
    except CreationPermissionError:
        raise
    except CreationError:
        fd, _ = open_descriptor(path, user_mode_only=False)  # before 5.11 there is no such flag
    try:
        code, offered, _ = _handshake(fd, 0)
    finally:
        os.close(fd)
    if code:
        raise kernel_error("handshake", code, "a new userfaultfd")
    return Feature(offered)


def handshake(fd: int, wanted: Feature, path: Path | None) -> tuple[Feature, Ioctl]:
    """Enable the features ``wanted``; return all that the kernel offers, and its ioctls.

    Args:
        fd: A new userfaultfd.
        wanted: The features.
        path: How the descriptor was created, for another one that finds out what is missing.

    Raises:
        CreationPermissionError: If Feature.EVENT_FORK is not allowed.
        UnsupportedError: If the kernel lacks a feature.
        KernelError: For other errnos.
    """
    code, offered, ioctls = _handshake(fd, wanted)
    if code:
        raise _handshake_error(code, wanted, path)
    return Feature(offered), Ioctl(ioctls)


def _handshake_error(code: int, wanted: Feature, path: Path | None) -> Exception:
    if code == errno.EPERM and wanted & Feature.EVENT_FORK:
        return CreationPermissionError(
            "Feature.EVENT_FORK is not allowed to this user",
            errno=code,
            hint="it needs CAP_SYS_PTRACE; leave the feature out, or run with that capability",
        )
    if code == errno.EINVAL:
        lacking = lacking_error("handshake", wanted, kernel_features(path))
        if lacking is not None:
            return lacking
    return kernel_error("handshake", code, "a new userfaultfd")


def adopt(number: int) -> tuple[Feature, Ioctl]:
    """Prepare a userfaultfd from elsewhere for a loop; return its enabled features and ioctls.

    Sets O_NONBLOCK and FD_CLOEXEC. Features come from /proc/self/fdinfo.

    Raises:
        UsageError: If it is not a userfaultfd, or its handshake was not done.
    """
    try:
        target = os.readlink(f"/proc/self/fd/{number}")
        info = _fdinfo(number)
    except OSError as error:
        raise UsageError(f"{number} is not an open descriptor: {error}") from error
    if target != "anon_inode:[userfaultfd]" and "API" not in info:
        raise UsageError(f"descriptor {number} is {target}, not a userfaultfd")
    os.set_blocking(number, False)
    fcntl.fcntl(number, fcntl.F_SETFD, fcntl.fcntl(number, fcntl.F_GETFD) | fcntl.FD_CLOEXEC)
    poller = select.poll()
    poller.register(number, select.POLLIN)
    if any(events & select.POLLERR for _, events in poller.poll(0)):
        raise UsageError(
            f"userfaultfd {number} has not been initialised",
            hint="its creator must complete the UFFDIO_API handshake before sharing it",
        )
    _, enabled, ioctls = (int(part, 16) for part in info["API"].split(":"))
    return Feature(enabled & ~_INITIALIZED), Ioctl(ioctls)


def single_bits(features: Feature) -> list[Feature]:
    """Return the bits of ``features`` one by one, also those without a name."""
    return [Feature(1 << bit) for bit in range(64) if features & (1 << bit)]


def _fdinfo(fd: int) -> dict[str, str]:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        lines = [line.partition(":") for line in file]
    return {key: value.strip() for key, _, value in lines}
