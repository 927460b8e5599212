"""The kernel's userfaultfd, typed: one method for each ioctl, and messages on an event loop.

Some facts about userfaultfd
============================

This is why the code below, and any code that uses it, must be the way it is. All of it was tried
on Linux 6.18; where an older kernel differs in a documented way, that is said.

**What it is.** A descriptor that stands for an address space: that of the process which created
it, whoever holds it now. A range is registered with it; a thread that touches a page there for
which the kernel has no answer sleeps, and a message is queued on the descriptor. Somebody reads
the message, gives the kernel a page with an ioctl, and the thread goes on. The ioctl names the
page by its address in the owner's memory; the bytes come from the caller's memory.

**The descriptor must be non-blocking.** poll and epoll on a blocking one report an error for
ever, which makes an event loop spin. Everything here sets O_NONBLOCK. Readable does not mean that
a read will find something: the fault may have been resolved in between, and the read says EAGAIN.

**The handshake works once.** The features wanted are switched on by the first UFFDIO_API, and
there is no second, so a program that wants to know first what there is must ask on another
descriptor and throw that away. (An early failure leaves the descriptor usable.) Many features
need not be asked for: `Feature` marks them "told".

**Who may.** Without privileges a process may create a descriptor that handles faults from user
mode only: a fault inside a system call, say write(2) from such memory, then fails with EFAULT.
Handling those too needs CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1, or permission to
open /dev/userfaultfd, or an open descriptor of that device that somebody passed on.

**Messages are not one per fault.** N threads on one page are N messages. A thread that a signal
interrupts while it waits goes back to its instruction and sends another. In system calls a
pending signal makes the thread repeat the fault as fast as it is read. Fold them by page, and
pause when a whole batch is about pages already being fetched. Page faults are given out before
events, even before older ones.

**EAGAIN means two things.** With bytes done above 0: that part is in place and its waiters are
awake, and only the next call, for the rest, tells what was in the way. With nothing done:
mappings are changing, because a fork, mremap, munmap or madvise waits for its event to be read,
or has been let go and not yet run. Read all messages, then try again after a pause; spinning
keeps the other thread from running.

**EEXIST does not wake.** A page that is already there is no error in most programs, but a thread
may sleep on it still, if whoever installed it said not to wake. After EEXIST, call ``wake``. On
hugetlb the same number also means that the pool of huge pages is empty; look before waking.

**Waking.** COPY, ZEROPAGE, CONTINUE, MOVE, POISON and unprotecting wake those who wait in the
range, also those whose message is not read yet. UNREGISTER wakes only where missing pages were
registered; munmap, mremap and madvise wake nobody. So ``unregister`` here wakes afterwards. A
wake without a page is harmless: the thread faults again.

**Events block their maker.** With the EVENT features, fork, munmap, mremap and madvise sleep
until their message is read. A thread must not make those calls if it is the one that reads, nor
hold anything the reader needs: CPython holds the GIL in ``os.fork``, ``mmap.madvise`` and
``mmap.resize``, and fork holds malloc's locks, so that until its event is read other threads must
not allocate: ``read`` and ``receive`` do not, as far as it is in their hands.

**A thread that touches a missing page from Python holds the GIL**, and no Python code can then
answer. With this class alone, touch from calls that release it (``os.write``, ctypes, NumPy's
larger copies), or from another process.

**Close means zeros.** When the last copy of the descriptor closes, everything is unregistered and
all waiters go on as if nothing had been: missing pages read as zeros, protected ones become
writable. "Last" counts dup()s, children made by fork, and a thread that sits in poll() on it.
Poison stays. So before ``close``: resolve or poison what is missing, or unmap it.

**Fork.** Without Feature.EVENT_FORK the child has the memory without the registration and reads
zeros for what was missing; with shared memory it even writes them for everybody. Use
MADV_DONTFORK. The child also inherits the descriptor, and what it does with it happens to the
parent; `Userfaultfd` closes it there.

**Death is silent.** When the owner of the memory exits or execs, the descriptor never becomes
readable. COPY and its like say ESRCH; WAKE still succeeds. Watch a pidfd.

**Sources of COPY** must be plain memory of one's own. If it is memory that faults to oneself, the
call waits for itself.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import operator
import os
import select
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, cast

from aiouffd import _lib
from aiouffd._lib import PAGE_SIZE, ffi
from aiouffd.abi import (
    Event,
    FaultFlag,
    Feature,
    Fork,
    Ioctl,
    Message,
    Mode,
    PageCategory,
    PageFault,
    PageRegion,
    Remap,
    Remove,
    Unmap,
)
from aiouffd.errors import ClosedError, KernelError, UnsupportedError, UsageError

if sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    Buffer: TypeAlias = Any

__all__ = [
    "Attempt",
    "CreationError",
    "CreationPermissionError",
    "Userfaultfd",
    "address_of",
    "kernel_features",
]

logger = logging.getLogger("aiouffd")

#: Where a userfaultfd comes from: "syscall", "device", or an open descriptor of /dev/userfaultfd.
Path: TypeAlias = Literal["syscall", "device"] | int

_INITIALIZED = 1 << 31  # the kernel's own mark in fdinfo, since 5.15
_READ_MESSAGES = 64  # in one system call
_SCAN_REGIONS = 1024


class _Lib(Protocol):
    """The part of the native module that this file calls; see native/abi.h."""

    AU_USER_MODE_ONLY: int
    AU_VIA_SYSCALL: int
    AU_VIA_DEVICE: int
    AU_VIA_DEVICE_FD: int
    AU_COPY_MODE_DONTWAKE: int
    AU_COPY_MODE_WP: int
    AU_ZEROPAGE_MODE_DONTWAKE: int
    AU_MOVE_MODE_DONTWAKE: int
    AU_MOVE_MODE_ALLOW_SRC_HOLES: int
    AU_WRITEPROTECT_MODE_WP: int
    AU_WRITEPROTECT_MODE_DONTWAKE: int
    AU_CONTINUE_MODE_DONTWAKE: int
    AU_CONTINUE_MODE_WP: int
    AU_POISON_MODE_DONTWAKE: int
    AU_PM_SCAN_WP_MATCHING: int
    AU_PM_SCAN_CHECK_WPASYNC: int
    AU_ENGINE_RAW: int
    AU_ENGINE_OWN: int
    AU_ENGINE_YIELD: int
    AU_DRAIN_LOOP: int
    AU_OP_COPY: int
    AU_OP_ZERO: int
    AU_OP_CONTINUE: int
    AU_OP_MOVE: int
    AU_OP_WRITEPROTECT: int
    AU_OP_POISON: int
    AU_OP_WAKE: int
    au_shared: Any

    def au_engine_create(self, fd: int, options: int, error: Any, /) -> Any: ...
    def au_engine_close(self, engine: Any, /) -> None: ...
    def au_engine_free(self, engine: Any, /) -> None: ...
    def au_engine_set_loop(self, engine: Any, tid: int, /) -> None: ...
    def au_engine_drain(self, engine: Any, out: Any, max: int, role: int, /) -> int: ...
    def au_engine_resolve(
        self, engine: Any, op: int, start: int, source: int, length: int, mode: int, done: Any, /
    ) -> int: ...

    def au_abi_open(self, flags: int, via: int, device: int, /) -> int: ...
    def au_abi_api(self, fd: int, features: int, offered: Any, ioctls: Any, /) -> int: ...
    def au_abi_register(self, fd: int, start: int, len: int, mode: int, ioctls: Any, /) -> int: ...
    def au_abi_unregister(self, fd: int, start: int, len: int, /) -> int: ...
    def au_abi_wake(self, fd: int, start: int, len: int, /) -> int: ...
    def au_abi_copy(
        self, fd: int, dst: int, src: int, len: int, mode: int, done: Any, /
    ) -> int: ...
    def au_abi_zeropage(self, fd: int, start: int, len: int, mode: int, done: Any, /) -> int: ...
    def au_abi_continue(self, fd: int, start: int, len: int, mode: int, done: Any, /) -> int: ...
    def au_abi_poison(self, fd: int, start: int, len: int, mode: int, done: Any, /) -> int: ...
    def au_abi_move(
        self, fd: int, dst: int, src: int, len: int, mode: int, done: Any, /
    ) -> int: ...
    def au_abi_writeprotect(self, fd: int, start: int, len: int, mode: int, /) -> int: ...
    def au_abi_read(self, fd: int, msgs: Any, max: int, /) -> int: ...
    def au_abi_pagemap_scan(self, fd: int, arg: Any, /) -> int: ...


lib = cast(_Lib, _lib.lib)

_ENGINE_OPS: dict[str, int] = {
    "copy": lib.AU_OP_COPY,
    "zeropage": lib.AU_OP_ZERO,
    "continue_": lib.AU_OP_CONTINUE,
    "move": lib.AU_OP_MOVE,
    "writeprotect": lib.AU_OP_WRITEPROTECT,
    "poison": lib.AU_OP_POISON,
    "wake": lib.AU_OP_WAKE,
}


# ---- errors ----


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
    """No userfaultfd could be made. ``attempts`` tells what was tried and why each failed."""

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
    """This user may not make such a userfaultfd on this system."""


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
    " MISSING and WP need anonymous, shared or hugetlb memory, MINOR shared or hugetlb memory",
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
    ("read", errno.EMFILE): "a fork waits for a free descriptor: close some, or raise"
    " RLIMIT_NOFILE",
    ("scan", errno.EPERM): "protect=True needs the range registered with Mode.WP alone, on a"
    " userfaultfd with Feature.WP_ASYNC",
}


def _kernel_error(name: str, code: int, what: str, done: int = 0) -> KernelError:
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


# ---- helpers ----


def address_of(buffer: Buffer) -> int:
    """Address of the first byte of ``buffer`` (an mmap, a memoryview, an array).

    The buffer is not kept alive and not locked: see to it that it stays. An
    mmap must not be resized while its address is in use.

    :raises UsageError: if it has no contiguous memory.
    """
    with _pinned(buffer) as view:
        return _address(view)


def _pinned(buffer: Buffer) -> Any:
    try:
        return ffi.from_buffer(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise UsageError(
            f"{type(buffer).__name__} has no contiguous memory: {error}",
            hint="pass bytes, bytearray, mmap or a C-contiguous memoryview or array",
        ) from error


def _address(view: Any) -> int:
    return int(ffi.cast("uintptr_t", view))


def _number(name: str, what: str, value: object) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(
            f"{name}: {what} must be an integer, not {type(value).__name__}",
            hint="address_of(buffer) gives the address of a buffer",
        ) from None
    if not 0 <= number < 1 << 64:
        raise UsageError(f"{name}: {what} {number:#x} is not an address or a size")
    return number


def _check_range(name: str, start: object, length: object) -> tuple[int, int]:
    first = _number(name, "start", start)
    size = _number(name, "length", length)
    if first % PAGE_SIZE:
        raise UsageError(
            f"{name}: start {first:#x} is not aligned to the page",
            hint=f"round down to a multiple of {PAGE_SIZE}",
        )
    if size == 0 or size % PAGE_SIZE:
        raise UsageError(
            f"{name}: length {size:#x} is not a positive number of pages",
            hint=f"use a multiple of {PAGE_SIZE}; pad the last page of shorter data",
        )
    if first + size >= 1 << 64:
        raise UsageError(f"{name}: {first:#x} + {size:#x} is past the end of memory")
    return first, size


def _describe(start: int, length: int) -> str:
    return f"[{start:#x}, {start + length:#x})"


def _writeprotect(fd: int, start: int, length: int, mode: int, _done: Any) -> int:
    """UFFDIO_WRITEPROTECT, which counts nothing, in the shape of its sisters."""
    return lib.au_abi_writeprotect(fd, start, length, mode)


# ---- creation ----


def _name_of(path: Path) -> str:
    if path == "syscall":
        return "userfaultfd(2)"
    if path == "device":
        return "/dev/userfaultfd"
    return f"descriptor {path} of /dev/userfaultfd"


def _try_open(path: Path, flags: int) -> int:
    """A new descriptor, or a negated errno."""
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


def _open(path: Path | None, user_mode_only: bool) -> tuple[int, Path]:
    """Tries the creation paths in turn: the descriptor and the path that gave it."""
    flags = lib.AU_USER_MODE_ONLY if user_mode_only else 0
    paths: tuple[Path, ...] = ("syscall", "device") if path is None else (path,)
    attempts: list[Attempt] = []
    for each in paths:
        fd = _try_open(each, flags)
        if fd >= 0:
            return fd, each
        attempts.append(Attempt(_name_of(each), -fd, _reason(each, -fd, user_mode_only)))
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
        raise CreationError(
            message,
            errno=codes[0],
            hint="`aiouffd doctor` tells what this system offers",
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
    """(0 or errno, features offered, ioctls)."""
    offered = ffi.new("uint64_t *")
    ioctls = ffi.new("uint64_t *")
    rc = lib.au_abi_api(fd, features, offered, ioctls)
    return -rc, int(offered[0]), int(ioctls[0])


def kernel_features(path: Path | None = None) -> Feature:
    """All features of this kernel, asked on a throw-away descriptor.

    ``path`` is as in `Userfaultfd`. A descriptor for user mode suffices, so this
    needs no privileges on Linux 5.11 or later. Any thread may call it.

    :raises CreationError: if no userfaultfd can be made at all.
    """
    try:
        fd, _ = _open(path, user_mode_only=True)
    except CreationPermissionError:
        raise
    except CreationError:
        fd, _ = _open(path, user_mode_only=False)  # before 5.11 there is no such flag
    try:
        code, offered, _ = _handshake(fd, 0)
    finally:
        os.close(fd)
    if code:
        raise _kernel_error("handshake", code, "a new userfaultfd")
    return Feature(offered)


# ---- the class ----


class Userfaultfd:
    """A userfaultfd: registers ranges of memory, receives their faults, and resolves them.

    Every number is in bytes. Addresses are those of the process that owns the
    memory, which is the one that created the descriptor. Ranges start at a page
    and hold whole pages (whole huge pages on hugetlb).

    Nothing is retried here, and nothing is remembered about pages: that is the
    work of `Pager`. Read the essay at the top of this module first.

    Threads: every method may be called by any thread, also ``close`` while others
    are inside calls; the descriptor is released when the last of them has
    returned. Loops: ``receive`` and ``async for`` belong to one running event loop at a
    time; different loops may take turns.
    """

    #: Those of this process's own memory, to be dropped in a forked child.
    _own_memory: ClassVar[weakref.WeakSet[Userfaultfd]] = weakref.WeakSet()

    def __init__(
        self,
        features: Feature = Feature(0),  # noqa: B008
        *,
        user_mode_only: bool | None = False,
        path: Path | None = None,
    ) -> None:
        """Creates one for the memory of this process, O_CLOEXEC and O_NONBLOCK.

        ``features`` are those to switch on. ``user_mode_only=True`` makes faults
        inside system calls fail with EFAULT and needs no privileges; None means
        False if this user may, else True. ``path`` forces one way of creation:
        "syscall", "device" (/dev/userfaultfd), or an open descriptor of that device,
        which stays the caller's; None tries the first two in turn.

        :raises CreationPermissionError: if this user may not; it is a PermissionError,
            and ``attempts`` tells what was tried.
        :raises CreationError: if it fails for another reason.
        :raises UnsupportedError: if the kernel lacks a feature asked for.

        Linux 4.11 at least; 5.11 for user_mode_only, 6.1 for the device.
        """
        self._fd = -1
        self._closed = True
        if path is not None and path not in ("syscall", "device"):
            if isinstance(path, (bool, str)):
                raise UsageError(
                    f"path={path!r} is not a way to create a userfaultfd",
                    hint='use "syscall", "device" or an open descriptor of /dev/userfaultfd',
                )
            path = cast("Path", _number("Userfaultfd", "path", path))
        # The engine has to know who waits; without it nobody who holds the GIL can be served.
        wanted = Feature(_number("Userfaultfd", "features", features)) | Feature.THREAD_ID
        if user_mode_only is None:
            try:
                fd, via = _open(path, False)
                user_mode_only = False
            except CreationPermissionError:
                fd, via = _open(path, True)
                user_mode_only = True
        else:
            fd, via = _open(path, user_mode_only)
        try:
            code, offered, ioctls = _handshake(fd, wanted)
            if code:
                raise self._handshake_error(code, wanted, path)
        except BaseException:
            os.close(fd)
            raise
        if wanted & Feature.WP_ASYNC:
            wanted |= Feature.WP_UNPOPULATED
        self._setup(fd, own=True, features=wanted, ioctls=Ioctl(ioctls))
        self._available: Feature | None = Feature(offered)
        self._user_mode_only: bool | None = user_mode_only
        self._via = _name_of(via)
        self._own_memory.add(self)

    @staticmethod
    def _handshake_error(code: int, wanted: Feature, path: Path | None) -> Exception:
        if code == errno.EPERM and wanted & Feature.EVENT_FORK:
            return CreationPermissionError(
                "Feature.EVENT_FORK is not allowed to this user",
                errno=code,
                hint="it needs CAP_SYS_PTRACE; leave the feature out, or run with that capability",
            )
        if code == errno.EINVAL:
            # As numbers, because inverting a flag forgets the bits that it has no name for.
            lacking = Feature(int(wanted) & ~int(kernel_features(path)))
            if lacking:
                names = ", ".join(feature.name or hex(feature) for feature in _single_bits(lacking))
                return UnsupportedError(
                    f"Linux {os.uname().release} does not have: {names}",
                    errno=code,
                    hint="leave them out, or run a newer kernel; kernel_features() tells which"
                    " there are",
                )
        return _kernel_error("handshake", code, "a new userfaultfd")

    def _setup(self, fd: int, *, own: bool, features: Feature, ioctls: Ioctl) -> None:
        self._fd = fd
        self._own = own
        self._features = features
        self._ioctls = ioctls
        self._registered = False  # something may be: closing would make zeros
        # Who may be using the descriptor: calls under way, and the loop's reader.
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._pagemap = -1
        # Made with the first `receive`: reads without the GIL, and asks touchers for theirs.
        self._engine: Any = None
        self._fork_handled = False
        self._read_lock = threading.Lock()
        self._read_buffer = ffi.new("struct au_uffd_msg[]", _READ_MESSAGES)
        # Messages that were read and not yet given out.
        self._pending: deque[Message] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()

    @classmethod
    def from_fd(cls, fd: int, *, own: bool = True) -> Userfaultfd:
        """Adopts a userfaultfd that came from elsewhere: another process, or a `Fork` message.

        It is set O_NONBLOCK, which all its copies share, and CLOEXEC. With
        ``own=False`` it is not closed by ``close``. Features are read from the
        kernel; ``user_mode_only`` cannot be known, and is None.

        :raises UsageError: if it is not a userfaultfd, or has not shaken hands. The
            descriptor then stays the caller's.

        Any thread may call it. Linux 4.3 at least.
        """
        number = _number("from_fd", "fd", fd)
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
        self = cls.__new__(cls)
        self._setup(
            number, own=own, features=Feature(enabled & ~_INITIALIZED), ioctls=Ioctl(ioctls)
        )
        self._available = None
        self._user_mode_only = None
        self._via = "from_fd"
        self._registered = True
        return self

    # -- what it is --

    @property
    def features(self) -> Feature:
        """The features that are switched on."""
        return self._features

    @property
    def available(self) -> Feature:
        """All features of this kernel, those marked "told" among them.

        For a descriptor from elsewhere they are asked on a throw-away one.

        :raises CreationError: if that cannot be made.
        """
        if self._available is None:
            self._available = kernel_features()
        return self._available

    @property
    def ioctls(self) -> Ioctl:
        """What the handshake said. Which ioctls a range supports, ``register`` tells."""
        return self._ioctls

    @property
    def user_mode_only(self) -> bool | None:
        """Whether faults inside system calls fail with EFAULT; None if it is not known."""
        return self._user_mode_only

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return self._closed

    def fileno(self) -> int:
        """The descriptor.

        :raises ClosedError: after ``close``.
        """
        if self._closed:
            raise self._closed_error("fileno")
        return self._fd

    def __repr__(self) -> str:
        if self._closed:
            return f"<{type(self).__name__} closed>"
        features = "|".join(f.name or hex(f) for f in _single_bits(self._features)) or "no features"
        mode = " user mode only" if self._user_mode_only else ""
        return f"<{type(self).__name__} fd={self._fd} {features}{mode} by {self._via}>"

    # -- lifetime --

    def close(self) -> None:
        """Closes the descriptor. Closing twice is fine.

        If it is the last copy, every range is unregistered, **missing pages become
        zeros** and whoever waits for them goes on with those: resolve, poison or
        unmap them before. An iteration that waits for messages ends, ``receive`` raises
        ClosedError, messages not yet given out are dropped (a `Fork` is closed). Calls
        under way in other threads finish first; the last of them releases the descriptor.

        Never raises. Any thread may call it.
        """
        if self._closed:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._users += 1
            loop = self._loop
        self._own_memory.discard(self)
        if loop is not None:
            if loop.is_closed():
                self._detached()
            elif not loop.is_running() or loop is _running_loop():
                self._end_waiting(loop)
            else:
                try:
                    loop.call_soon_threadsafe(self._end_waiting, loop)
                except RuntimeError:  # closed in between
                    self._detached()
        self._leave()

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._closed:
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        finally:
            # Zeros in place of data are worse than a lost descriptor.
            if not self._registered:
                self.close()

    def _closed_error(self, name: str) -> ClosedError:
        return ClosedError(f"cannot call {name}(): this {type(self).__name__} is closed")

    def _enter(self, name: str) -> int:
        """The descriptor, which will not be released before ``_leave``."""
        with self._lock:
            if self._closed:
                raise self._closed_error(name)
            self._users += 1
            return self._fd

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or not self._closed:
                return
            fd, self._fd = self._fd, -1
            pagemap, self._pagemap = self._pagemap, -1
            engine, self._engine = self._engine, None
        if engine is not None:
            lib.au_engine_close(engine)
        if fd >= 0 and self._own:
            os.close(fd)
        if pagemap >= 0:
            os.close(pagemap)
        while self._pending:
            message = self._pending.popleft()
            if isinstance(message, Fork):
                os.close(message.fd)

    def _abandon_in_child(self) -> None:
        """In a forked child: an ioctl on this descriptor would change the parent's memory."""
        self._lock = threading.Lock()
        if self._closed:
            return
        self._closed = True
        fd, self._fd = self._fd, -1
        pagemap, self._pagemap = self._pagemap, -1
        for each in (-1 if self._fork_handled else fd, pagemap):
            if each >= 0:
                try:
                    os.close(each)
                except OSError:  # somebody else's hook was faster
                    pass

    # -- ranges --

    def register(self, start: int, length: int, mode: Mode) -> Ioctl:
        """Reports faults of [start, start + length) from now on; pages there stay.

        Gives the ioctls for the range, of which the kernel promises more than every
        kind of memory has. Holes in the range are skipped. Registering again sets the
        new mode unless it is a part of the present one, which changes nothing: to
        take modes away, unregister first. Anonymous, shared and hugetlb memory can be
        registered; ordinary files only for Mode.WP with Feature.WP_ASYNC. For shared memory use
        MISSING and MINOR together.

        :raises UsageError: if the range is not whole pages, or ``mode`` is empty or unknown.
        :raises KernelError: EINVAL for memory that cannot be registered so, EBUSY if another
            userfaultfd has it, EPERM for a shared mapping of an unwritable file,
            ENOMEM if the owner is gone.

        Linux 4.3; WP 5.7, MINOR 5.13.
        """
        start, length = _check_range("register", start, length)
        bits = _number("register", "mode", mode)
        if not bits or bits & ~int(Mode.MISSING | Mode.WP | Mode.MINOR):
            raise UsageError(
                f"register: mode {mode!r} is not a combination of MISSING, WP and MINOR"
            )
        ioctls = ffi.new("uint64_t *")
        fd = self._enter("register")
        try:
            rc = lib.au_abi_register(fd, start, length, bits, ioctls)
            if rc == 0:
                self._registered = True
        finally:
            self._leave()
        if rc:
            raise _kernel_error("register", -rc, _describe(start, length))
        return Ioctl(int(ioctls[0]))

    def unregister(self, start: int, length: int) -> None:
        """Reports nothing more of [start, start + length), and wakes all who wait there.

        Missing pages become ordinary ones: **zeros**, or what the page cache has.
        Write protection is lifted. On hugetlb the range is whole huge pages.

        :raises UsageError: if the range is not whole pages.
        :raises KernelError: EINVAL if nothing is mapped there or another userfaultfd
            has it, ENOMEM if the owner is gone.

        Linux 4.3.
        """
        start, length = _check_range("unregister", start, length)
        fd = self._enter("unregister")
        try:
            rc = lib.au_abi_unregister(fd, start, length)
            if rc == 0:
                # The kernel itself wakes only those who wait for missing pages.
                lib.au_abi_wake(fd, start, length)
        finally:
            self._leave()
        if rc:
            raise _kernel_error("unregister", -rc, _describe(start, length))

    # -- resolving --

    def _resolve(
        self,
        name: str,
        fn: Callable[..., int],
        start: int,
        length: int,
        *args: int,
        partial: bool = False,
    ) -> int:
        """Calls ``fn(fd, *args, done)``, the ioctl that resolves [start, start + length).

        Everything that gives the kernel pages comes through here, so that a variant
        which also tells the native engine can replace it.
        """
        done = ffi.new("int64_t *")
        fd = self._enter(name)
        engine = self._engine
        try:
            if engine is None:
                rc = fn(fd, *args, done)
            else:
                # One native call for the ioctl and for those who gave the GIL away for it.
                op = _ENGINE_OPS[name]
                source = args[1] if name in ("copy", "move") else 0
                rc = lib.au_engine_resolve(engine, op, start, source, length, args[-1], done)
        finally:
            self._leave()
        if rc == 0:
            return length
        count = int(done[0])
        if partial and count and rc == -errno.EAGAIN:
            return count
        raise _kernel_error(name, -rc, _describe(start, length), count)

    def copy(
        self,
        start: int,
        source: Buffer | int,
        length: int | None = None,
        *,
        wp: bool = False,
        wake: bool = True,
        partial: bool = False,
    ) -> int:
        """Installs a copy of ``source`` at ``start``, atomically for each page, and wakes waiters.

        ``source`` is a buffer, from whose beginning ``length`` bytes are taken (default: all), or
        an address, aligned or not, in the memory of this process. It must not be
        memory whose faults wait for this thread. ``wp=True`` installs the pages
        write-protected. ``wake=False`` leaves waiters asleep until ``wake``.

        Gives the bytes installed: ``length``, or with ``partial=True`` possibly less,
        where it would else raise EAGAIN with ``done`` > 0. Protection is ignored; poison
        and guard regions are overwritten.

        :raises UsageError: if the range is not whole pages or longer than the source.
        :raises KernelError: EEXIST if a page is there already, EAGAIN if it stopped
            midway or mappings are changing, ENOENT if the range is not inside one registered
            mapping, ESRCH if the owner is gone, EFAULT if the source is
            unreadable, EINVAL for ``wp`` without Mode.WP, ENOMEM. ``done`` tells how many
            bytes are in place.

        Linux 4.3; wp 5.7.
        """
        mode = (lib.AU_COPY_MODE_WP if wp else 0) | (0 if wake else lib.AU_COPY_MODE_DONTWAKE)
        view: Any = None
        if isinstance(source, int):
            if length is None:
                raise UsageError("copy: an address as source needs a length")
            start, size = _check_range("copy", start, length)
            address = _number("copy", "source", source)
        else:
            view = _pinned(source)
            start, size = _check_range("copy", start, len(view) if length is None else length)
            if size > len(view):
                raise UsageError(
                    f"copy: {size} bytes were asked for, and the source has {len(view)}"
                )
            address = _address(view)
        try:
            return self._resolve(
                "copy", lib.au_abi_copy, start, size, start, address, size, mode, partial=partial
            )
        finally:
            if view is not None:
                ffi.release(view)

    def zeropage(self, start: int, length: int, *, wake: bool = True, partial: bool = False) -> int:
        """Installs zeros in [start, start + length), and wakes waiters.

        ``wake``, ``partial`` and the result are as in ``copy``. Not for hugetlb.

        :raises UsageError: if the range is not whole pages.
        :raises KernelError: as ``copy``; EEXIST also over poison; EINVAL on hugetlb.

        Linux 4.3.
        """
        start, length = _check_range("zeropage", start, length)
        mode = 0 if wake else lib.AU_ZEROPAGE_MODE_DONTWAKE
        return self._resolve(
            "zeropage", lib.au_abi_zeropage, start, length, start, length, mode, partial=partial
        )

    def continue_(
        self,
        start: int,
        length: int,
        *,
        wp: bool = False,
        wake: bool = True,
        partial: bool = False,
    ) -> int:
        """Maps the pages that the page cache has for [start, start + length), and wakes waiters.

        The answer to a minor fault, and to a missing one once the page was written
        through another mapping or pwrite(2). Shared memory and hugetlb only.
        ``wp``, ``wake``, ``partial`` and the result are as in ``copy``.

        :raises UsageError: if the range is not whole pages.
        :raises KernelError: EFAULT if the page cache has no page, EEXIST if it is mapped
            already, EINVAL on anonymous memory; others as ``copy``.

        Linux 5.13; wp 6.4.
        """
        start, length = _check_range("continue_", start, length)
        mode = (lib.AU_CONTINUE_MODE_WP if wp else 0) | (
            0 if wake else lib.AU_CONTINUE_MODE_DONTWAKE
        )
        return self._resolve(
            "continue_", lib.au_abi_continue, start, length, start, length, mode, partial=partial
        )

    def move(
        self,
        start: int,
        source: int,
        length: int,
        *,
        allow_holes: bool = False,
        wake: bool = True,
        partial: bool = False,
    ) -> int:
        """Moves the pages at address ``source`` to ``start`` without copying, and wakes waiters.

        The source is left as a hole. Both are private anonymous memory of this process, writable,
        page-aligned, with the same protection. A hole in the source is an error unless
        ``allow_holes``, which counts it as moved and leaves its destination missing.
        ``wake``, ``partial`` and the result are as in ``copy``.

        :raises UsageError: if a range is not whole pages.
        :raises KernelError: ENOENT for a hole, EEXIST if a destination is there already,
            EBUSY if a page is shared with a forked child or pinned, EINVAL for
            other kinds of memory or another process; others as ``copy``.

        Linux 6.8.
        """
        start, length = _check_range("move", start, length)
        source, _ = _check_range("move", source, length)
        mode = (lib.AU_MOVE_MODE_ALLOW_SRC_HOLES if allow_holes else 0) | (
            0 if wake else lib.AU_MOVE_MODE_DONTWAKE
        )
        return self._resolve(
            "move", lib.au_abi_move, start, length, start, source, length, mode, partial=partial
        )

    def writeprotect(self, start: int, length: int, *, protect: bool, wake: bool = True) -> None:
        """Protects the pages of [start, start + length) from writes, or lets them be written.

        ``protect=False`` is the answer to a write-protect fault, and wakes waiters
        unless ``wake=False``; protecting wakes nobody. Untouched anonymous pages are
        skipped unless Feature.WP_UNPOPULATED is on. The range may span several mappings.

        :raises UsageError: if the range is not whole pages.
        :raises KernelError: ENOENT if part is not registered with Mode.WP (what came before it
            is done), EAGAIN if mappings are changing, ESRCH if the owner is gone.

        Linux 5.7; shared memory and hugetlb 5.19.
        """
        start, length = _check_range("writeprotect", start, length)
        if protect:
            mode = lib.AU_WRITEPROTECT_MODE_WP
        else:
            mode = 0 if wake else lib.AU_WRITEPROTECT_MODE_DONTWAKE
        self._resolve("writeprotect", _writeprotect, start, length, start, length, mode)

    def poison(self, start: int, length: int, *, wake: bool = True, partial: bool = False) -> int:
        """Makes the missing pages of [start, start + length) unusable, and wakes waiters.

        Touching them raises SIGBUS; system calls given them fail with EFAULT. ``copy`` over
        them or madvise(MADV_DONTNEED) heals them; ``close`` does not.
        ``wake``, ``partial`` and the result are as in ``copy``.

        :raises UsageError: if the range is not whole pages.
        :raises KernelError: EEXIST if a page is there or poisoned already; others as ``copy``.

        Linux 6.6.
        """
        start, length = _check_range("poison", start, length)
        mode = 0 if wake else lib.AU_POISON_MODE_DONTWAKE
        return self._resolve(
            "poison", lib.au_abi_poison, start, length, start, length, mode, partial=partial
        )

    def wake(self, start: int, length: int) -> None:
        """Wakes all who wait in [start, start + length); without a page they fault again.

        Needed after ``wake=False``, after EEXIST, and after the range was unmapped.

        :raises UsageError: if the range is not whole pages.
        :raises KernelError: hardly ever; it succeeds on unmapped ranges too.

        Linux 4.3.
        """
        start, length = _check_range("wake", start, length)
        fd = self._enter("wake")
        try:
            engine = self._engine
            if engine is None:
                rc = lib.au_abi_wake(fd, start, length)
            else:
                # Who waits asks again, and that is to be told again.
                done = ffi.new("int64_t *")
                rc = lib.au_engine_resolve(engine, lib.AU_OP_WAKE, start, 0, length, 0, done)
        finally:
            self._leave()
        if rc:
            raise _kernel_error("wake", -rc, _describe(start, length))

    # -- messages --

    def read(self, max: int = 64) -> list[Message]:
        """Up to ``max`` messages that are waiting, without blocking; possibly none.

        Page faults come before events. A `Fork` carries a descriptor which is the caller's from
        now on. Any thread may call it; it takes messages that ``receive`` would
        have given.

        :raises UsageError: if ``max`` is not positive.
        :raises KernelError: EMFILE if there is no descriptor free for a `Fork`, which
            stays in the queue.
        :raises ClosedError: after ``close``.
        """
        limit = _number("read", "max", max)
        if limit == 0:
            raise UsageError("read: max must be positive")
        messages: list[Message] = []
        while len(messages) < limit:
            try:
                messages.append(self._pending.popleft())
            except IndexError:
                break
        if messages:
            return messages
        while len(messages) < limit:
            want = min(limit - len(messages), _READ_MESSAGES)
            try:
                got = self._read_kernel(want)
            except KernelError:
                if messages:
                    break  # it will be said by the next call, and nothing is lost
                raise
            messages += got
            if len(got) < want:
                break
        return messages

    def _read_kernel(self, limit: int) -> list[Message]:
        # Between here and the read nothing may be allocated from malloc, whose locks a
        # thread holds that waits in fork for its event to be read.
        fd = self._enter("read")
        try:
            engine = self._engine
            with self._read_lock:
                if engine is None:
                    count = lib.au_abi_read(fd, self._read_buffer, limit)
                    decoded = [_decode(self._read_buffer[i]) for i in range(count)]
                else:
                    count = lib.au_engine_drain(engine, self._entries, limit, lib.AU_DRAIN_LOOP)
                    # Who waits since before does not hold the GIL: we do.
                    lib.au_shared.proof = lib.au_shared.sequence
                    decoded = [_decode(self._entries[i].message) for i in range(count)]
        finally:
            self._leave()
        if count < 0 and count != -errno.EAGAIN:
            raise _kernel_error("read", -count, "messages")
        return [message for message in decoded if message is not None]

    async def receive(self) -> Message:
        """The next message, waiting for it on the running event loop.

        A cancelled call takes no message. Several tasks of one loop may wait; each
        message goes to one of them.

        :raises ClosedError: if it is closed, before or meanwhile.
        :raises UsageError: if a task on another loop waits already.
        :raises KernelError: as ``read``.
        """
        while True:
            if self._closed:
                raise self._closed_error("receive")
            try:
                return self._pending.popleft()
            except IndexError:
                pass
            await self._readable()

    def __aiter__(self) -> Userfaultfd:
        """All messages from now on, until it is closed; otherwise as ``receive``."""
        return self

    async def __anext__(self) -> Message:
        try:
            return await self.receive()
        except ClosedError:
            raise StopAsyncIteration from None

    async def _readable(self) -> None:
        """Waits until the loop has read messages. It does not say for whom they are."""
        loop = asyncio.get_running_loop()
        self._attach(loop)
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:  # cancelled
                self._waiters.remove(waiter)
                if not self._waiters and self._loop is loop:
                    self._detach(loop)

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Lets ``loop`` watch the descriptor.

        It goes on watching while messages are given out one by one, and stops when one
        comes that nobody waits for.
        """
        old = self._loop
        if old is loop:
            return
        if old is not None:
            if self._waiters and not old.is_closed():
                raise UsageError(
                    "a task on another event loop waits for messages of this userfaultfd",
                    hint="receive on one loop, or use read()",
                )
            if old.is_closed():
                self._waiters.clear()
                self._detached()
            elif not old.is_running():
                self._detach(old)
            else:
                self._loop = None
                old.call_soon_threadsafe(self._hand_over, old)
        with self._lock:  # together, so that close() sees the loop as soon as it counts
            if self._closed:
                raise self._closed_error("receive")
            self._users += 1
            self._loop = loop
            fd = self._fd
        try:
            # The loop must not keep an object alive that everybody else has dropped.
            self._start_engine()
            loop.add_reader(fd, _on_readable, weakref.ref(self), loop, fd)
            if self._engine is not None:
                lib.au_engine_set_loop(self._engine, threading.get_native_id())
                notify = self._engine.notify_fd
                loop.add_reader(notify, _on_readable, weakref.ref(self), loop, notify)
        except BaseException:
            self._detached()
            raise

    def _start_engine(self) -> None:
        """A native reader beside the loop, for memory of this process.

        It reads messages when the loop cannot (somebody waits for a page or an event and holds
        the GIL), and makes threads that wait release the GIL.
        """
        if self._engine is not None or not self._own or Feature.THREAD_ID not in self._features:
            return
        if self not in self._own_memory:
            return
        error = ffi.new("int *")
        options = lib.AU_ENGINE_RAW | lib.AU_ENGINE_OWN | lib.AU_ENGINE_YIELD
        engine = lib.au_engine_create(self._fd, options, error)
        if engine == ffi.NULL:
            raise OSError(error[0], f"cannot start the native reader: {os.strerror(error[0])}")
        self._entries = ffi.new("struct au_entry[]", _READ_MESSAGES)
        self._fork_handled = True
        self._engine = ffi.gc(engine, _EngineEnd())

    def _remove_readers(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._fd >= 0:  # else this is a forked child
            loop.remove_reader(self._fd)
            if self._engine is not None:
                loop.remove_reader(self._engine.notify_fd)
                lib.au_engine_set_loop(self._engine, 0)

    def _detach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._remove_readers(loop)
        self._loop = None
        self._leave()

    def _hand_over(self, old: asyncio.AbstractEventLoop) -> None:
        """Runs in ``old``, from which another loop has taken over."""
        if self._loop is not old:  # else it has taken it back already
            self._remove_readers(old)
        self._leave()

    def _detached(self) -> None:
        """The loop was closed, and the reader has gone with it."""
        self._loop = None
        self._leave()

    def _end_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is loop:
            self._detach(loop)
            self._wake_waiters(None)

    def _wake_waiters(self, error: Exception | None) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

    def _read_for_waiters(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not loop:
            return
        if not self._waiters:
            self._detach(loop)
            return
        if not self._pending:
            try:
                self._pending.extend(self._read_kernel(_READ_MESSAGES))
            except ClosedError:
                return  # close() has called us off already
            except Exception as error:
                self._wake_waiters(error)
                return
        if self._pending:
            self._wake_waiters(None)

    # -- dirty pages --

    def scan(
        self,
        start: int,
        length: int,
        *,
        all_of: PageCategory = PageCategory.WRITTEN,
        any_of: PageCategory = PageCategory(0),  # noqa: B008
        none_of: PageCategory = PageCategory(0),  # noqa: B008
        report: PageCategory | None = None,
        protect: bool = False,
        pagemap: int | None = None,
    ) -> list[PageRegion]:
        """Pages of [start, start + length) in certain categories; by default those written.

        A page is in the result if it has every category of ``all_of``, one of ``any_of``
        (unless that is empty) and none of ``none_of``. ``report`` are the categories told
        in the result (default: those asked for). Regions are in ascending order;
        neighbours with equal categories are one.

        ``protect=True`` write-protects the found pages in the same step, so that no
        write between two scans is lost: with Feature.WP_ASYNC and a range registered with
        Mode.WP alone, that is dirty tracking. The first such scan finds everything, for what was
        never protected counts as written. Writes through another mapping or the file are
        not seen.

        The pages are this process's, unless ``pagemap`` is an open descriptor of another
        one's /proc/PID/pagemap.

        :raises UsageError: if the range is not whole pages.
        :raises KernelError: EPERM if ``protect`` and part of the range does not track writes so.
        :raises UnsupportedError: before Linux 6.7.

        Any thread may call it. Works for unprivileged users.
        """
        start, length = _check_range("scan", start, length)
        end = start + length
        regions: list[PageRegion] = []
        vector = ffi.new("struct au_page_region[]", _SCAN_REGIONS)
        arg = ffi.new("struct au_pm_scan_arg *")
        arg.vec = _address(vector)
        arg.vec_len = _SCAN_REGIONS
        arg.end = end
        arg.category_mask = all_of | none_of
        arg.category_inverted = none_of
        arg.category_anyof_mask = any_of
        arg.return_mask = (all_of | any_of) if report is None else report
        if protect:
            arg.flags = lib.AU_PM_SCAN_WP_MATCHING | lib.AU_PM_SCAN_CHECK_WPASYNC
        position = start
        self._enter("scan")
        try:
            target = self._own_pagemap() if pagemap is None else pagemap
            while position < end:
                arg.start = position
                count = lib.au_abi_pagemap_scan(target, arg)
                if count == -errno.ENOTTY:
                    raise UnsupportedError(
                        "this kernel has no PAGEMAP_SCAN",
                        errno=errno.ENOTTY,
                        hint="scan() needs Linux 6.7",
                    )
                if count < 0:
                    raise _kernel_error("scan", -count, _describe(start, length), position - start)
                for i in range(count):
                    _append_region(regions, vector[i])
                if arg.walk_end <= position:
                    raise _kernel_error("scan", errno.EIO, _describe(position, end - position))
                position = arg.walk_end
        finally:
            self._leave()
        return regions

    def _own_pagemap(self) -> int:
        with self._lock:
            if self._pagemap < 0:
                self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            return self._pagemap


def _on_readable(
    reference: weakref.ref[Userfaultfd], loop: asyncio.AbstractEventLoop, fd: int
) -> None:
    """What the loop calls when the descriptor is readable."""
    self = reference()
    if self is None:
        loop.remove_reader(fd)
    else:
        self._read_for_waiters(loop)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _decode(raw: Any) -> Message | None:
    arg = raw.arg
    match raw.event:
        case Event.PAGEFAULT:
            fault = arg.pagefault
            return PageFault(FaultFlag(fault.flags), fault.address, fault.ptid)
        case Event.FORK:
            return Fork(arg.fork.ufd)
        case Event.REMAP:
            return Remap(getattr(arg.remap, "from"), arg.remap.to, arg.remap.len)
        case Event.REMOVE:
            return Remove(arg.remove.start, arg.remove.end)
        case Event.UNMAP:
            return Unmap(arg.remove.start, arg.remove.end)
        case unknown:
            logger.warning("a userfaultfd message of the unknown kind %#x was ignored", unknown)
            return None


def _append_region(regions: list[PageRegion], raw: Any) -> None:
    start, end, categories = raw.start, raw.end, PageCategory(raw.categories)
    if regions:
        last = regions[-1]
        if last.end == start and last.categories == categories:
            regions[-1] = PageRegion(last.start, end, categories)
            return
    regions.append(PageRegion(start, end, categories))


class _EngineEnd:
    """Destructor of a native engine; not in a forked child, where it does not exist."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __call__(self, engine: Any, lib: Any = lib, getpid: Any = os.getpid) -> None:
        if getpid() == self._pid:
            lib.au_engine_free(engine)


def _single_bits(features: Feature) -> list[Feature]:
    return [Feature(1 << bit) for bit in range(64) if features & (1 << bit)]


def _fdinfo(fd: int) -> dict[str, str]:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        lines = [line.partition(":") for line in file]
    return {key: value.strip() for key, _, value in lines}


def _after_fork_in_child() -> None:
    for uffd in list(Userfaultfd._own_memory):
        uffd._abandon_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
