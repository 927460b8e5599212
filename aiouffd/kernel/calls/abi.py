"""What ``native/cdef/abi.h`` declares. Made by ``make calls``."""

from __future__ import annotations

from typing import Protocol

from .pointers import Int64s, Uint64s

__all__ = [
    "AbiCalls",
    "PageRegionPtr",
    "PmScanArgPtr",
    "UffdMsgArgForkPtr",
    "UffdMsgArgPagefaultPtr",
    "UffdMsgArgPtr",
    "UffdMsgArgRemapPtr",
    "UffdMsgArgRemovePtr",
    "UffdMsgArgReservedPtr",
    "UffdMsgPtr",
]


class UffdMsgArgPagefaultPtr(Protocol):
    flags: int
    address: int
    ptid: int


class UffdMsgArgForkPtr(Protocol):
    ufd: int


class UffdMsgArgRemapPtr(Protocol):
    to: int
    len: int


class UffdMsgArgRemovePtr(Protocol):
    start: int
    end: int


class UffdMsgArgReservedPtr(Protocol):
    reserved1: int
    reserved2: int
    reserved3: int


class UffdMsgArgPtr(Protocol):
    pagefault: UffdMsgArgPagefaultPtr
    fork: UffdMsgArgForkPtr
    remap: UffdMsgArgRemapPtr
    remove: UffdMsgArgRemovePtr
    reserved: UffdMsgArgReservedPtr


class UffdMsgPtr(Protocol):
    event: int
    reserved1: int
    reserved2: int
    reserved3: int
    arg: UffdMsgArgPtr


class PageRegionPtr(Protocol):
    start: int
    end: int
    categories: int


class PmScanArgPtr(Protocol):
    size: int
    flags: int
    start: int
    end: int
    walk_end: int
    vec: int
    vec_len: int
    max_pages: int
    category_inverted: int
    category_mask: int
    category_anyof_mask: int
    return_mask: int


class AbiCalls(Protocol):
    AU_USER_MODE_ONLY: int
    AU_USERFAULTFD_IOC_NEW: int
    AU_UFFD_API: int
    AU_FEATURE_PAGEFAULT_FLAG_WP: int
    AU_FEATURE_EVENT_FORK: int
    AU_FEATURE_EVENT_REMAP: int
    AU_FEATURE_EVENT_REMOVE: int
    AU_FEATURE_MISSING_HUGETLBFS: int
    AU_FEATURE_MISSING_SHMEM: int
    AU_FEATURE_EVENT_UNMAP: int
    AU_FEATURE_SIGBUS: int
    AU_FEATURE_THREAD_ID: int
    AU_FEATURE_MINOR_HUGETLBFS: int
    AU_FEATURE_MINOR_SHMEM: int
    AU_FEATURE_EXACT_ADDRESS: int
    AU_FEATURE_WP_HUGETLBFS_SHMEM: int
    AU_FEATURE_WP_UNPOPULATED: int
    AU_FEATURE_POISON: int
    AU_FEATURE_WP_ASYNC: int
    AU_FEATURE_MOVE: int
    AU_FEATURE_RWP: int
    AU_FEATURE_RWP_ASYNC: int
    AU_UFFDIO_NR_REGISTER: int
    AU_UFFDIO_NR_UNREGISTER: int
    AU_UFFDIO_NR_WAKE: int
    AU_UFFDIO_NR_COPY: int
    AU_UFFDIO_NR_ZEROPAGE: int
    AU_UFFDIO_NR_MOVE: int
    AU_UFFDIO_NR_WRITEPROTECT: int
    AU_UFFDIO_NR_CONTINUE: int
    AU_UFFDIO_NR_POISON: int
    AU_UFFDIO_NR_RWPROTECT: int
    AU_UFFDIO_NR_SET_MODE: int
    AU_UFFDIO_NR_API: int
    AU_REGISTER_MODE_MISSING: int
    AU_REGISTER_MODE_WP: int
    AU_REGISTER_MODE_MINOR: int
    AU_REGISTER_MODE_RWP: int
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
    AU_RWPROTECT_MODE_RWP: int
    AU_RWPROTECT_MODE_DONTWAKE: int
    AU_EVENT_PAGEFAULT: int
    AU_EVENT_FORK: int
    AU_EVENT_REMAP: int
    AU_EVENT_REMOVE: int
    AU_EVENT_UNMAP: int
    AU_PAGEFAULT_FLAG_WRITE: int
    AU_PAGEFAULT_FLAG_WP: int
    AU_PAGEFAULT_FLAG_MINOR: int
    AU_PAGEFAULT_FLAG_RWP: int
    AU_PAGE_IS_WPALLOWED: int
    AU_PAGE_IS_WRITTEN: int
    AU_PAGE_IS_FILE: int
    AU_PAGE_IS_PRESENT: int
    AU_PAGE_IS_SWAPPED: int
    AU_PAGE_IS_PFNZERO: int
    AU_PAGE_IS_HUGE: int
    AU_PAGE_IS_SOFT_DIRTY: int
    AU_PAGE_IS_GUARD: int
    AU_PAGE_IS_ACCESSED: int
    AU_PM_SCAN_WP_MATCHING: int
    AU_PM_SCAN_CHECK_WPASYNC: int
    AU_VIA_SYSCALL: int
    AU_VIA_DEVICE: int
    AU_VIA_DEVICE_FD: int

    def au_abi_open(self, flags: int, via: int, device: int, /) -> int: ...
    def au_abi_api(self, fd: int, features: int, offered: Uint64s, ioctls: Uint64s, /) -> int: ...
    def au_abi_register(
        self, fd: int, start: int, len: int, mode: int, ioctls: Uint64s, /
    ) -> int: ...
    def au_abi_unregister(self, fd: int, start: int, len: int, /) -> int: ...
    def au_abi_wake(self, fd: int, start: int, len: int, /) -> int: ...
    def au_abi_copy(
        self, fd: int, dst: int, src: int, len: int, mode: int, done: Int64s, /
    ) -> int: ...
    def au_abi_zeropage(self, fd: int, start: int, len: int, mode: int, done: Int64s, /) -> int: ...
    def au_abi_continue(self, fd: int, start: int, len: int, mode: int, done: Int64s, /) -> int: ...
    def au_abi_poison(self, fd: int, start: int, len: int, mode: int, done: Int64s, /) -> int: ...
    def au_abi_move(
        self, fd: int, dst: int, src: int, len: int, mode: int, done: Int64s, /
    ) -> int: ...
    def au_abi_writeprotect(self, fd: int, start: int, len: int, mode: int, /) -> int: ...
    def au_abi_rwprotect(self, fd: int, start: int, len: int, mode: int, /) -> int: ...
    def au_abi_set_mode(self, fd: int, enable: int, disable: int, /) -> int: ...
    def au_abi_read(self, fd: int, msgs: UffdMsgPtr, max: int, /) -> int: ...
    def au_abi_pagemap_scan(self, fd: int, arg: PmScanArgPtr, /) -> int: ...
