"""The userfaultfd ABI: features, modes, ioctls and messages, complete up to Linux 7.3.

Plain values without behaviour. The numbers are the kernel's; tests compare them with the compiled
ones. A bit that a newer kernel knows and this module does not is kept. See
https://man7.org/linux/man-pages/man2/ioctl_userfaultfd.2.html and
https://docs.kernel.org/admin-guide/mm/userfaultfd.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TypeAlias

__all__ = [
    "CATEGORY_SINCE",
    "SINCE",
    "Event",
    "FaultFlag",
    "Feature",
    "Fork",
    "Ioctl",
    "Message",
    "Mode",
    "PageCategory",
    "PageFault",
    "PageRegion",
    "Remap",
    "Remove",
    "Unmap",
]


class Feature(IntFlag):
    """What a userfaultfd can do. Some features must be requested at creation.

    The comment gives the first kernel with the feature. Those marked "always on" need not be
    requested; requesting one that the kernel lacks fails. See
    https://man7.org/linux/man-pages/man2/UFFDIO_API.2const.html.
    """

    PAGEFAULT_FLAG_WP = 1 << 0  #: Write protection of anonymous memory. 5.7, always on.
    EVENT_FORK = 1 << 1  #: `Fork` messages; needs CAP_SYS_PTRACE. 4.11.
    EVENT_REMAP = 1 << 2  #: `Remap` messages, and mremap keeps the registration. 4.11.
    EVENT_REMOVE = 1 << 3  #: `Remove` messages. 4.11.
    MISSING_HUGETLBFS = 1 << 4  #: `Mode.MISSING` on huge pages. 4.11, always on.
    MISSING_SHMEM = 1 << 5  #: `Mode.MISSING` on shared memory. 4.11, always on.
    EVENT_UNMAP = 1 << 6  #: `Unmap` messages. 4.11.
    SIGBUS = 1 << 7  #: A fault raises SIGBUS in place of a message. 4.14.
    THREAD_ID = 1 << 8  #: `PageFault.thread_id` is filled. 4.14.
    MINOR_HUGETLBFS = 1 << 9  #: `Mode.MINOR` on huge pages. 5.13, always on.
    MINOR_SHMEM = 1 << 10  #: `Mode.MINOR` on shared memory. 5.14, always on.
    EXACT_ADDRESS = 1 << 11  #: `PageFault.address` is not rounded to its page. 5.18.
    WP_HUGETLBFS_SHMEM = 1 << 12  #: `Mode.WP` on huge pages and shared memory. 5.19, always on.
    WP_UNPOPULATED = 1 << 13  #: Untouched anonymous pages can be write-protected too. 6.4.
    POISON = 1 << 14  #: `Userfaultfd.poison`. 6.6, always on.
    WP_ASYNC = 1 << 15  #: Writes only mark pages, without messages. Brings WP_UNPOPULATED. 6.7.
    MOVE = 1 << 16  #: `Userfaultfd.move`. 6.8, always on.
    RWP = 1 << 17  #: `Mode.RWP` and `Userfaultfd.rwprotect`. 7.3.
    RWP_ASYNC = 1 << 18  #: Accesses only mark pages, without messages. Brings RWP. 7.3.


#: The first kernel with each feature, as its version.
SINCE: dict[Feature, str] = {
    Feature.PAGEFAULT_FLAG_WP: "5.7",
    Feature.EVENT_FORK: "4.11",
    Feature.EVENT_REMAP: "4.11",
    Feature.EVENT_REMOVE: "4.11",
    Feature.MISSING_HUGETLBFS: "4.11",
    Feature.MISSING_SHMEM: "4.11",
    Feature.EVENT_UNMAP: "4.11",
    Feature.SIGBUS: "4.14",
    Feature.THREAD_ID: "4.14",
    Feature.MINOR_HUGETLBFS: "5.13",
    Feature.MINOR_SHMEM: "5.14",
    Feature.EXACT_ADDRESS: "5.18",
    Feature.WP_HUGETLBFS_SHMEM: "5.19",
    Feature.WP_UNPOPULATED: "6.4",
    Feature.POISON: "6.6",
    Feature.WP_ASYNC: "6.7",
    Feature.MOVE: "6.8",
    Feature.RWP: "7.3",
    Feature.RWP_ASYNC: "7.3",
}


class Mode(IntFlag):
    """Which faults of a registered range are reported."""

    MISSING = 1 << 0  #: There is no page. 4.3.
    WP = 1 << 1  #: A write to a page that `Userfaultfd.writeprotect` covers. 5.7.
    MINOR = 1 << 2  #: The page is in the page cache but not mapped here. 5.13.
    RWP = 1 << 3  #: Any access to a page that `Userfaultfd.rwprotect` covers; not with WP. 7.3.


class Ioctl(IntFlag):
    """The ioctls that a descriptor or a range supports, as masks."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    RWPROTECT = 1 << 0x09
    SET_MODE = 1 << 0x0A
    API = 1 << 0x3F


class Event(IntEnum):
    """The first byte of a message."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class FaultFlag(IntFlag):
    """Why a `PageFault` happened. None of them: a read of a missing page."""

    WRITE = 1 << 0  #: The access was a write.
    WP = 1 << 1  #: The page is there but write-protected.
    MINOR = 1 << 2  #: The page is in the page cache; `Userfaultfd.continue_` maps it.
    RWP = 1 << 3  #: The page is there but protected from reads and writes. 7.3.


class PageCategory(IntFlag):
    """What `Userfaultfd.scan` reports about a page. 6.7."""

    WPALLOWED = 1 << 0  #: Its range tracks writes asynchronously.
    WRITTEN = 1 << 1  #: Written since it was last protected, or never protected.
    FILE = 1 << 2  #: Backed by a file or by shared memory.
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5  #: The kernel's one page of zeros.
    HUGE = 1 << 6  #: Part of a huge page, transparent or not.
    SOFT_DIRTY = 1 << 7  #: 6.8.
    GUARD = 1 << 8  #: Made by MADV_GUARD_INSTALL. 6.15.
    ACCESSED = 1 << 9  #: Read or written since it was last protected by ``rwprotect``. 7.3.


#: The first kernel with the categories that came after `Userfaultfd.scan` itself.
CATEGORY_SINCE: dict[PageCategory, str] = {
    PageCategory.SOFT_DIRTY: "6.8",
    PageCategory.GUARD: "6.15",
    PageCategory.ACCESSED: "7.3",
}


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread is blocked on a page.

    There is one message per thread, and another one if a signal interrupted it: fold them by page.
    """

    flags: FaultFlag
    #: In the memory of the process that owns the range; the start of its page
    #: (huge page for hugetlb) unless Feature.EXACT_ADDRESS is on.
    address: int
    #: With Feature.THREAD_ID, the waiting thread as numbered in its own pid
    #: namespace: a hint. Without, 0.
    thread_id: int

    @property
    def is_write(self) -> bool:
        """Whether the access was a write."""
        return bool(self.flags & FaultFlag.WRITE)

    @property
    def is_wp(self) -> bool:
        """Whether the page is write-protected: resolve with ``writeprotect(protect=False)``."""
        return bool(self.flags & FaultFlag.WP)

    @property
    def is_minor(self) -> bool:
        """Whether the page is in the page cache and not mapped: resolve with ``continue_``."""
        return bool(self.flags & FaultFlag.MINOR)

    @property
    def is_rwp(self) -> bool:
        """Whether the page is protected from all access: use ``rwprotect(protect=False)``."""
        return bool(self.flags & FaultFlag.RWP)

    @property
    def is_missing(self) -> bool:
        """Whether there is no page: resolve with ``copy``, ``zeropage``, ``move`` or ``poison``.

        False with a flag that has no name here: all but WRITE have been reasons so far, and a
        descriptor gets none that it did not request.
        """
        return not int(self.flags) & ~int(FaultFlag.WRITE)


@dataclass(frozen=True, slots=True)
class Fork:
    """The owner of the memory forked. The child's faults come to ``fd``, and only there.

    The receiver of the message owns the descriptor: pass it to ``Userfaultfd.from_fd``, or close
    it, after which the child reads zeros.
    """

    fd: int


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap moved ``length`` bytes (the old length) from ``from_`` to ``to``."""

    from_: int
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """madvise is about to drop the pages of [start, end): they will be missing again."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """[start, end) was unmapped and is no longer registered."""

    start: int
    end: int


#: What `Userfaultfd.read` returns.
Message: TypeAlias = PageFault | Fork | Remap | Remove | Unmap


@dataclass(frozen=True, slots=True)
class PageRegion:
    """Neighbouring pages in [start, end) with the same categories, found by `Userfaultfd.scan`."""

    start: int
    end: int
    categories: PageCategory
