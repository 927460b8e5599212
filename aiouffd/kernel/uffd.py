"""The kernel's userfaultfd, typed: one method per ioctl, and messages on an event loop.

Some facts about userfaultfd
============================

These facts determine the code below and any code that uses it. All were observed on Linux 6.18;
documented differences of older kernels are mentioned. The man page of all ioctls is
https://man7.org/linux/man-pages/man2/ioctl_userfaultfd.2.html, the kernel's own document
https://docs.kernel.org/admin-guide/mm/userfaultfd.html. There is more at the top of ``opening.py``
(handshake and permissions), ``messages.py`` (what a reading thread must not do) and
``descriptor.py`` (closing makes zeros; fork).

**What it is.** A descriptor of an address space: that of the process which created it, whichever
process holds it now. A range is registered with it; a thread that touches a page there which the
kernel cannot supply sleeps, and a message is queued on the descriptor. A reader takes the message
and supplies the page with an ioctl, and the thread continues. The ioctl names the page by its
address in the owner's memory; the bytes come from the caller's memory.

**EAGAIN means two things.** With bytes done above 0: that part is in place and its waiters are
awake, and only the next call, for the rest, reports the reason. With nothing done: mappings are
changing, because a fork, mremap, munmap or madvise waits for its event to be read, or its event
was read and it has not run yet. Read all messages, then try again after a pause; spinning keeps
the other thread from running.

**EEXIST does not wake.** A page that is already present is no error in most programs, but a thread
may still sleep on it, if it was installed without waking. After EEXIST, call ``wake``. On hugetlb
EEXIST also means that the pool of huge pages is empty; check before waking.

**Waking.** COPY, ZEROPAGE, CONTINUE, MOVE, POISON and unprotecting wake all waiters in the range,
also those whose message has not been read. UNREGISTER wakes only where missing pages were
registered; munmap, mremap and madvise wake no waiters. So ``unregister`` here wakes afterwards. A
wake without a page is harmless: the thread faults again.

**Death is silent.** When the owner of the memory exits or execs, the descriptor never becomes
readable. COPY and its like fail with ESRCH; WAKE still succeeds. Watch a pidfd.

**The source of COPY** must not be memory whose faults the calling thread has to resolve: the call
would wait for itself.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ..errors import ClosedError, KernelError, UnsupportedError, UsageError
from .abi import Feature, Ioctl, Message, Mode, PageCategory, PageRegion
from .arguments import Buffer, address_of, check_number, check_range, pinned, view_address
from .descriptor import Descriptor
from .errnos import describe, kernel_error, lacking_error
from .lib import ffi, lib
from .messages import Messages
from .opening import (
    Attempt,
    CreationError,
    CreationPermissionError,
    Path,
    adopt,
    handshake,
    kernel_features,
    name_of,
    open_descriptor,
    single_bits,
)
from .pagemap import scan_pages

if TYPE_CHECKING:
    from .calls.pointers import Int64s

__all__ = [
    "Attempt",
    "CreationError",
    "CreationPermissionError",
    "Userfaultfd",
    "address_of",
    "kernel_features",
]

_ENGINE_OPS: dict[str, int] = {
    "copy": lib.AU_OP_COPY,
    "zeropage": lib.AU_OP_ZERO,
    "continue_": lib.AU_OP_CONTINUE,
    "move": lib.AU_OP_MOVE,
    "writeprotect": lib.AU_OP_WRITEPROTECT,
    "rwprotect": lib.AU_OP_RWPROTECT,
    "poison": lib.AU_OP_POISON,
    "wake": lib.AU_OP_WAKE,
}


def _writeprotect(fd: int, start: int, length: int, mode: int, _done: Int64s) -> int:
    """Adapt UFFDIO_WRITEPROTECT, which has no byte count, to the signature of the other ioctls."""
    return lib.au_abi_writeprotect(fd, start, length, mode)


def _rwprotect(fd: int, start: int, length: int, mode: int, _done: Int64s) -> int:
    """Adapt UFFDIO_RWPROTECT, which has no byte count either."""
    return lib.au_abi_rwprotect(fd, start, length, mode)


#: The features without which a call, or a mode of ``register``, may be refused: all that any kind
#: of memory needs, because the kernel does not report which was missing.
_NEEDED: dict[str, Feature] = {
    "continue_": Feature.MINOR_HUGETLBFS | Feature.MINOR_SHMEM,
    "move": Feature.MOVE,
    "writeprotect": Feature.PAGEFAULT_FLAG_WP,
    "rwprotect": Feature.RWP,
    "set_mode": Feature.RWP_ASYNC,
    "poison": Feature.POISON,
}
_NEEDED_BY_MODE: dict[Mode, Feature] = {
    Mode.WP: Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
    Mode.MINOR: Feature.MINOR_HUGETLBFS | Feature.MINOR_SHMEM,
    Mode.RWP: Feature.RWP,
}


class Userfaultfd:
    """A userfaultfd: registers ranges of memory, receives their faults, and resolves them.

    Every number is in bytes. Addresses are those of the process that owns the
    memory, which is the one that created the descriptor. Ranges start at a page
    and hold whole pages (whole huge pages on hugetlb).

    It retries nothing and keeps no state of pages: that is the work of `Pager`. Read the essay at
    the top of this module first.

    Threads: every method may be called by any thread, also ``close`` while others
    are inside calls; the descriptor is released when the last of them has
    returned. Loops: ``receive`` and ``async for`` belong to one running event loop at a
    time; different loops may take turns.
    """

    def __init__(
        self,
        features: Feature = Feature(0),  # noqa: B008
        *,
        user_mode_only: bool | None = False,
        path: Path | None = None,
    ) -> None:
        """Create one for the memory of this process, O_CLOEXEC and O_NONBLOCK.

        Linux 4.11 at least; 5.11 for user_mode_only, 6.1 for the device. See
        https://man7.org/linux/man-pages/man2/userfaultfd.2.html.

        Args:
            features: The features to enable.
            user_mode_only: True makes faults inside system calls fail with EFAULT and needs no
                privileges; None means False if this user may, else True.
            path: The way of creation: "syscall", "device" (/dev/userfaultfd), or an open descriptor
                of that device, which the caller still owns; None tries the first two in turn.

        Raises:
            CreationPermissionError: If this user may not; it is a PermissionError, and ``attempts``
                has what was tried.
            CreationError: If it fails for another reason.
            UnsupportedError: If the kernel lacks a feature asked for.
        """
        self._descriptor = Descriptor(type(self).__name__)  # closed, should this fail
        if path is not None and path not in ("syscall", "device"):
            if isinstance(path, (bool, str)):
                raise UsageError(
                    f"path={path!r} is not a way to create a userfaultfd",
                    hint='use "syscall", "device" or an open descriptor of /dev/userfaultfd',
                )
            path = cast("Path", check_number("Userfaultfd", "path", path))
        # The engine needs the ids of blocked threads; without them it cannot make a thread that
        # holds the GIL release it.
        wanted = Feature(check_number("Userfaultfd", "features", features)) | Feature.THREAD_ID
        if wanted & Feature.WP_ASYNC:
            wanted |= Feature.WP_UNPOPULATED
        if wanted & Feature.RWP_ASYNC:
            wanted |= Feature.RWP
        if user_mode_only is None:
            try:
                fd, via = open_descriptor(path, False)
                user_mode_only = False
            except CreationPermissionError:
                fd, via = open_descriptor(path, True)
                user_mode_only = True
        else:
            fd, via = open_descriptor(path, user_mode_only)
        try:
            offered, ioctls = handshake(fd, wanted, path)
            self._setup(fd, own=True, features=wanted, ioctls=ioctls)
        except BaseException:
            os.close(fd)
            raise
        self._available: Feature | None = offered
        self._user_mode_only: bool | None = user_mode_only
        self._via = name_of(via)
        Descriptor.own_memory.add(self._descriptor)

    def _setup(self, fd: int, *, own: bool, features: Feature, ioctls: Ioctl) -> None:
        self._features = features
        self._ioctls = ioctls
        self._registered = False  # something may be: closing would make zeros
        descriptor = Descriptor(type(self).__name__, fd, own=own)
        self._messages = Messages(descriptor)
        self._descriptor = descriptor  # last: what fails before leaves `fd` to the caller

    @classmethod
    def from_fd(cls, fd: int, *, own: bool = True) -> Userfaultfd:
        """Adopt a userfaultfd that came from elsewhere: another process, or a `Fork` message.

        It is set O_NONBLOCK, which all its copies share, and FD_CLOEXEC. Features are read from the
        kernel; ``user_mode_only`` is unknown, and None. Any thread may call it. Linux 4.3 at least.

        Args:
            fd: The descriptor.
            own: Whether ``close`` closes it.

        Raises:
            UsageError: If it is not a userfaultfd, or its handshake was not done. The caller then
                still owns the descriptor.
        """
        number = check_number("from_fd", "fd", fd)
        features, ioctls = adopt(number)
        self = cls.__new__(cls)
        self._descriptor = Descriptor(cls.__name__)  # closed, should this fail
        self._setup(number, own=own, features=features, ioctls=ioctls)
        self._available = None
        self._user_mode_only = None
        self._via = "from_fd"
        self._registered = True
        return self

    # -- what it is --

    @property
    def features(self) -> Feature:
        """The features that are enabled."""
        return self._features

    @property
    def available(self) -> Feature:
        """All features of this kernel, including those that are always on.

        For a descriptor from elsewhere they are queried on a throw-away one.

        Raises:
            CreationError: If that cannot be created.
        """
        if self._available is None:
            self._available = kernel_features()
        return self._available

    @property
    def ioctls(self) -> Ioctl:
        """The ioctls that the handshake reported. ``register`` returns those of a range."""
        return self._ioctls

    @property
    def user_mode_only(self) -> bool | None:
        """Whether faults inside system calls fail with EFAULT; None if unknown."""
        return self._user_mode_only

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return self._descriptor.closed

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            ClosedError: After ``close``.
        """
        if self._descriptor.closed:
            raise self._descriptor.closed_error("fileno")
        return self._descriptor.fd

    def __repr__(self) -> str:
        if self.closed:
            return f"<{type(self).__name__} closed>"
        features = "|".join(f.name or hex(f) for f in single_bits(self._features)) or "no features"
        mode = " user mode only" if self._user_mode_only else ""
        return f"<{type(self).__name__} fd={self._descriptor.fd} {features}{mode} by {self._via}>"

    # -- lifetime --

    def close(self) -> None:
        """Close the descriptor. Closing twice is fine.

        If it is the last copy, every range is unregistered, **missing pages become zeros** and
        their waiters continue with those: resolve, poison or unmap them before. An iteration that
        waits for messages ends, ``receive`` raises ClosedError, and messages not yet returned are
        dropped (a `Fork` is closed). Calls under way in other threads finish first; the last of
        them releases the descriptor.

        Never raises. Any thread may call it.
        """
        if self._descriptor.close():
            self._messages.end()
            self._descriptor.leave()

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    #: Whether another object closes it, and warns if it was not closed.
    _owned = False

    def __del__(self) -> None:
        if self.closed or self._owned:
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        finally:
            # Zeros in place of data are worse than a lost descriptor.
            if not self._registered:
                self.close()

    # -- ranges --

    def register(self, start: int, length: int, mode: Mode) -> Ioctl:
        """Report faults of [start, start + length) from now on; pages there stay.

        Holes in the range are skipped. Registering again sets the new mode unless it is a subset of
        the present one, which changes nothing: to remove modes, unregister first. Anonymous, shared
        and hugetlb memory can be registered; ordinary files only for Mode.WP with Feature.WP_ASYNC.
        For shared memory use MISSING and MINOR together.

        Linux 4.3; WP 5.7 (shared memory and hugetlb 5.19), MINOR 5.13 (shared memory 5.14), RWP
        7.3. See https://man7.org/linux/man-pages/man2/UFFDIO_REGISTER.2const.html.

        Args:
            start: The address, a multiple of the page size.
            length: In bytes, one or more whole pages.
            mode: The kinds of faults. `Mode.RWP` needs Feature.RWP at creation, and no WP.

        Returns:
            The ioctls that the kernel reports; some fail on some kinds of memory.

        Raises:
            UsageError: If the range is not whole pages, or ``mode`` is empty, unknown, or RWP
                without its feature.
            UnsupportedError: If this kernel lacks what the mode may need.
            KernelError: EINVAL for memory that cannot be registered so, EBUSY if another
                userfaultfd has it, EPERM for a shared mapping of an unwritable file, ENOMEM if the
                owner is gone.
        """
        start, length = check_range("register", start, length)
        bits = check_number("register", "mode", mode)
        if not bits or bits & ~int(Mode.MISSING | Mode.WP | Mode.MINOR | Mode.RWP):
            raise UsageError(
                f"register: mode {mode!r} is not a combination of MISSING, WP, MINOR and RWP"
            )
        if bits & Mode.RWP and not self._features & Feature.RWP:
            if error := lacking_error("register", Feature.RWP, self.available):
                raise error
            raise UsageError(
                "register: Mode.RWP needs a userfaultfd with Feature.RWP",
                hint="create it with Userfaultfd(Feature.RWP), or with Feature.RWP_ASYNC",
            )
        ioctls = ffi.new("uint64_t *")
        fd = self._descriptor.enter("register")
        try:
            rc = lib.au_abi_register(fd, start, length, bits, ioctls)
            if rc == 0:
                self._registered = True
        finally:
            self._descriptor.leave()
        if rc:
            needed = Feature(0)
            for each, features in _NEEDED_BY_MODE.items():
                needed |= features if bits & each else Feature(0)
            raise self._error("register", -rc, needed, describe(start, length))
        return Ioctl(int(ioctls[0]))

    def _error(
        self, name: str, code: int, needed: Feature, what: str, done: int = 0
    ) -> KernelError | UnsupportedError:
        """Make the error of an ioctl that may need the features ``needed``."""
        lacking = None
        if code == errno.EINVAL and needed:
            lacking = lacking_error(name, needed, self.available)
        return lacking or kernel_error(name, code, what, done)

    def unregister(self, start: int, length: int) -> None:
        """Stop reporting faults of [start, start + length), and wake all waiters there.

        Missing pages become ordinary ones: **zeros**, or what the page cache has. Write protection
        is lifted. On hugetlb the range is whole huge pages.

        Linux 4.3. See https://man7.org/linux/man-pages/man2/UFFDIO_UNREGISTER.2const.html.

        Raises:
            UsageError: If the range is not whole pages.
            KernelError: EINVAL if nothing is mapped there or another userfaultfd has it, ENOMEM if
                the owner is gone.
        """
        start, length = check_range("unregister", start, length)
        fd = self._descriptor.enter("unregister")
        try:
            rc = lib.au_abi_unregister(fd, start, length)
            if rc == 0:
                # The kernel itself wakes only waiters for missing pages.
                lib.au_abi_wake(fd, start, length)
        finally:
            self._descriptor.leave()
        if rc:
            raise kernel_error("unregister", -rc, describe(start, length))

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
        """Call ``fn(fd, *args, done)``, the ioctl that resolves [start, start + length).

        All calls that supply pages go through here, so that the native engine, if there is one,
        learns of each.
        """
        done = ffi.new("int64_t *")
        fd = self._descriptor.enter(name)
        engine = self._descriptor.engine
        try:
            if engine is None:
                rc = fn(fd, *args, done)
            else:
                # One native call for the ioctl and for the threads that yielded the GIL for it.
                op = _ENGINE_OPS[name]
                source = args[1] if name in ("copy", "move") else 0
                rc = lib.au_engine_resolve(engine, op, start, source, length, args[-1], done)
        finally:
            self._descriptor.leave()
        if rc == 0:
            return length
        count = int(done[0])
        if partial and count and rc == -errno.EAGAIN:
            return count
        needed = _NEEDED.get(name, Feature(0))
        raise self._error(name, -rc, needed, describe(start, length), count)

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
        """Install a copy of ``source`` at ``start``, atomically for each page, and wake waiters.

        Protection is ignored; poison and guard regions are overwritten.

        Linux 4.3; wp 5.7. See https://man7.org/linux/man-pages/man2/UFFDIO_COPY.2const.html.

        Args:
            start: The address, a multiple of the page size.
            source: A buffer, or an address, aligned or not, in the memory of this process. It must
                not be memory whose faults wait for this thread.
            length: In bytes, whole pages, from the beginning of ``source``; default: all of it.
            wp: Install the pages write-protected.
            wake: False leaves waiters asleep until ``wake``.
            partial: Return less than ``length`` where it would otherwise raise EAGAIN with
                ``done`` > 0.

        Returns:
            The bytes installed.

        Raises:
            UsageError: If the range is not whole pages or longer than the source.
            KernelError: EEXIST if a page is there already, EAGAIN if it stopped midway or mappings
                are changing, ENOENT if the range is not inside one registered mapping, ESRCH if the
                owner is gone, EFAULT if the source is unreadable, EINVAL for ``wp`` without
                Mode.WP, ENOMEM. ``done`` is the number of bytes in place.
        """
        mode = (lib.AU_COPY_MODE_WP if wp else 0) | (0 if wake else lib.AU_COPY_MODE_DONTWAKE)
        if isinstance(source, int):
            if length is None:
                raise UsageError("copy: an address as source needs a length")
            return self._copy(start, length, check_number("copy", "source", source), mode, partial)
        with pinned(source) as view:
            if length is None:
                length = len(view)
            elif check_number("copy", "length", length) > len(view):
                raise UsageError(
                    f"copy: {length} bytes were requested, and the source has {len(view)}"
                )
            return self._copy(start, length, view_address(view), mode, partial)

    def _copy(self, start: int, length: int, source: int, mode: int, partial: bool) -> int:
        start, length = check_range("copy", start, length)
        return self._resolve(
            "copy",
            lib.au_abi_copy,
            start,
            length,
            start,
            source,
            length,
            mode,
            partial=partial,
        )

    def zeropage(self, start: int, length: int, *, wake: bool = True, partial: bool = False) -> int:
        """Install zeros in [start, start + length), and wake waiters.

        ``wake``, ``partial`` and the result are as in ``copy``. Not for hugetlb.

        Linux 4.3. See https://man7.org/linux/man-pages/man2/UFFDIO_ZEROPAGE.2const.html.

        Raises:
            UsageError: If the range is not whole pages.
            KernelError: As ``copy``; EEXIST also over poison; EINVAL on hugetlb.
        """
        start, length = check_range("zeropage", start, length)
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
        """Map the pages that the page cache has for [start, start + length), and wake waiters.

        The answer to a minor fault, and to a missing one once the page was written
        through another mapping or pwrite(2). Shared memory and hugetlb only.
        ``wp``, ``wake``, ``partial`` and the result are as in ``copy``.

        Linux 5.13; wp 6.4. See https://man7.org/linux/man-pages/man2/UFFDIO_CONTINUE.2const.html.

        Raises:
            UsageError: If the range is not whole pages.
            KernelError: EFAULT if the page cache has no page, EEXIST if it is mapped already,
                EINVAL on anonymous memory; others as ``copy``.
        """
        start, length = check_range("continue_", start, length)
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
        """Move the pages at address ``source`` to ``start`` without copying, and wake waiters.

        The source is left as a hole. Both are private anonymous memory of this process, writable,
        page-aligned, with the same protection. A hole in the source is an error unless
        ``allow_holes``, which counts it as moved and leaves its destination missing.
        ``wake``, ``partial`` and the result are as in ``copy``.

        Linux 6.8. See https://man7.org/linux/man-pages/man2/UFFDIO_MOVE.2const.html.

        Raises:
            UsageError: If a range is not whole pages.
            KernelError: ENOENT for a hole, EEXIST if a destination is there already, EBUSY if a
                page is shared with a forked child or pinned, EINVAL for other kinds of memory or
                another process; others as ``copy``.
        """
        start, length = check_range("move", start, length)
        source, _ = check_range("move", source, length)
        mode = (lib.AU_MOVE_MODE_ALLOW_SRC_HOLES if allow_holes else 0) | (
            0 if wake else lib.AU_MOVE_MODE_DONTWAKE
        )
        return self._resolve(
            "move", lib.au_abi_move, start, length, start, source, length, mode, partial=partial
        )

    def writeprotect(self, start: int, length: int, *, protect: bool, wake: bool = True) -> None:
        """Protect the pages of [start, start + length) from writes, or lift the protection.

        ``protect=False`` resolves a write-protect fault, and wakes waiters unless ``wake=False``;
        protecting wakes no waiters. Untouched anonymous pages are skipped unless
        Feature.WP_UNPOPULATED is on. The range may span several mappings.

        Linux 5.7; shared memory and hugetlb 5.19. See
        https://man7.org/linux/man-pages/man2/UFFDIO_WRITEPROTECT.2const.html.

        Raises:
            UsageError: If the range is not whole pages.
            KernelError: ENOENT if part is not registered with Mode.WP (what came before it is
                done), EAGAIN if mappings are changing, ESRCH if the owner is gone.
        """
        start, length = check_range("writeprotect", start, length)
        if protect:
            mode = lib.AU_WRITEPROTECT_MODE_WP
        else:
            mode = 0 if wake else lib.AU_WRITEPROTECT_MODE_DONTWAKE
        self._resolve("writeprotect", _writeprotect, start, length, start, length, mode)

    def rwprotect(self, start: int, length: int, *, protect: bool, wake: bool = True) -> None:
        """Protect the pages of [start, start + length) from any access, or lift the protection.

        An access to a protected page is a fault with `PageFault.is_rwp`; with Feature.RWP_ASYNC it
        only makes the page `PageCategory.ACCESSED` for ``scan``, which shows the pages in use.
        ``protect=False`` resolves such a fault, and wakes waiters unless ``wake=False``; protecting
        wakes no waiters. A huge page is protected and accessed as a whole.

        Linux 7.3. See https://docs.kernel.org/admin-guide/mm/userfaultfd.html.

        Raises:
            UsageError: If the range is not whole pages.
            UnsupportedError: Before Linux 7.3.
            KernelError: ENOENT if part is not registered with Mode.RWP, EAGAIN if mappings are
                changing, ESRCH if the owner is gone.
        """
        start, length = check_range("rwprotect", start, length)
        if protect:
            mode = lib.AU_RWPROTECT_MODE_RWP
        else:
            mode = 0 if wake else lib.AU_RWPROTECT_MODE_DONTWAKE
        self._resolve("rwprotect", _rwprotect, start, length, start, length, mode)

    def set_mode(
        self,
        *,
        enable: Feature = Feature(0),  # noqa: B008
        disable: Feature = Feature(0),  # noqa: B008
    ) -> None:
        """Enable and disable features while the descriptor is in use: only Feature.RWP_ASYNC.

        ``features`` has the new state. While it is disabled, accesses to protected pages are
        reported by messages.

        Any thread may call it. Linux 7.3.

        Raises:
            UsageError: If a feature is in both.
            UnsupportedError: Before Linux 7.3.
            KernelError: EINVAL for any other feature, or without Feature.RWP.
        """
        on = check_number("set_mode", "enable", enable)
        off = check_number("set_mode", "disable", disable)
        if on & off:
            raise UsageError(f"set_mode: {Feature(on & off)!r} is to be enabled and disabled")
        fd = self._descriptor.enter("set_mode")
        try:
            rc = lib.au_abi_set_mode(fd, on, off)
            if rc == 0:
                self._features = Feature((int(self._features) | on) & ~off)
        finally:
            self._descriptor.leave()
        if rc:
            what = f"enable {Feature(on)!r}, disable {Feature(off)!r}"
            raise self._error("set_mode", -rc, _NEEDED["set_mode"], what)

    def poison(self, start: int, length: int, *, wake: bool = True, partial: bool = False) -> int:
        """Make the missing pages of [start, start + length) error pages, and wake waiters.

        Touching them raises SIGBUS; system calls given them fail with EFAULT. ``copy`` over
        them or madvise(MADV_DONTNEED) heals them; ``close`` does not.
        ``wake``, ``partial`` and the result are as in ``copy``.

        Linux 6.6. See https://man7.org/linux/man-pages/man2/UFFDIO_POISON.2const.html.

        Raises:
            UsageError: If the range is not whole pages.
            KernelError: EEXIST if a page is there or poisoned already; others as ``copy``.
        """
        start, length = check_range("poison", start, length)
        mode = 0 if wake else lib.AU_POISON_MODE_DONTWAKE
        return self._resolve(
            "poison", lib.au_abi_poison, start, length, start, length, mode, partial=partial
        )

    def wake(self, start: int, length: int) -> None:
        """Wake all waiters in [start, start + length); without a page they fault again.

        Needed after ``wake=False``, after EEXIST, and after the range was unmapped. It succeeds on
        unmapped ranges too.

        Linux 4.3. See https://man7.org/linux/man-pages/man2/UFFDIO_WAKE.2const.html.

        Raises:
            UsageError: If the range is not whole pages.
            KernelError: For other errnos, which are not expected.
        """
        start, length = check_range("wake", start, length)
        fd = self._descriptor.enter("wake")
        try:
            engine = self._descriptor.engine
            if engine is None:
                rc = lib.au_abi_wake(fd, start, length)
            else:
                # Waiters fault again, and the engine must report that again.
                done = ffi.new("int64_t *")
                rc = lib.au_engine_resolve(engine, lib.AU_OP_WAKE, start, 0, length, 0, done)
        finally:
            self._descriptor.leave()
        if rc:
            raise kernel_error("wake", -rc, describe(start, length))

    # -- messages --

    def read(self, max: int = 64) -> list[Message]:
        """Return up to ``max`` queued messages, without blocking; possibly none.

        Page faults come before events. The caller owns the descriptor that a `Fork` carries. Any
        thread may call it; it takes messages that ``receive`` would have returned.

        Raises:
            UsageError: If ``max`` is not positive.
            KernelError: EMFILE if there is no descriptor free for a `Fork`, which stays in the
                queue.
            ClosedError: After ``close``.
        """
        limit = check_number("read", "max", max)
        if limit == 0:
            raise UsageError("read: max must be positive")
        return self._messages.read(limit)

    async def receive(self) -> Message:
        """Wait on the running event loop for the next message, and return it.

        A cancelled call takes no message. Several tasks of one loop may wait; each message goes to
        one of them.

        Raises:
            ClosedError: If it is closed, before or meanwhile.
            UsageError: If a task on another loop is waiting.
            KernelError: As ``read``.
        """
        return await self._messages.receive()

    def __aiter__(self) -> Userfaultfd:
        """Iterate over all messages from now on, until it is closed; otherwise as ``receive``."""
        return self

    async def __anext__(self) -> Message:
        try:
            return await self.receive()
        except ClosedError:
            raise StopAsyncIteration from None

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
        """Find pages of [start, start + length) by category; by default those written.

        A page matches if it has every category of ``all_of``, one of ``any_of`` (unless that is
        empty) and none of ``none_of``.

        With ``protect`` on a range registered with Mode.WP alone, on a userfaultfd with
        Feature.WP_ASYNC, this is dirty tracking. The first such scan finds everything, because a
        page that was never protected counts as written. Writes through another mapping or the file
        are not seen.

        Any thread may call it. Works for unprivileged users. See
        https://man7.org/linux/man-pages/man2/PAGEMAP_SCAN.2const.html.

        Args:
            start: The address, a multiple of the page size.
            length: In bytes, one or more whole pages.
            all_of: Categories that a page must have.
            any_of: Categories of which a page must have one.
            none_of: Categories that a page must not have.
            report: The categories in the result; default: those of ``all_of`` and ``any_of``.
            protect: Write-protect the matching pages in the same step, so that no write between two
                scans is missed.
            pagemap: An open descriptor of another process's /proc/PID/pagemap, to scan that one.

        Returns:
            Regions in ascending order; neighbours with equal categories are merged.

        Raises:
            UsageError: If the range is not whole pages.
            KernelError: EPERM if ``protect`` and part of the range does not track writes so.
            UnsupportedError: Before Linux 6.7.
        """
        start, length = check_range("scan", start, length)
        self._descriptor.enter("scan")
        try:
            return scan_pages(
                self._descriptor.own_pagemap() if pagemap is None else pagemap,
                start,
                length,
                all_of=all_of,
                any_of=any_of,
                none_of=none_of,
                report=report,
                protect=protect,
            )
        finally:
            self._descriptor.leave()
