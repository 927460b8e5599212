"""Pages by category, from /proc/PID/pagemap: which were written, which are present.

PAGEMAP_SCAN (https://man7.org/linux/man-pages/man2/PAGEMAP_SCAN.2const.html,
https://docs.kernel.org/admin-guide/mm/pagemap.html) is an ioctl of that file, and scanning needs
no userfaultfd. Protecting in the same step does: the pages must be registered with one that has
Feature.WP_ASYNC, because only there a write lifts the protection without a message and shows up in
the next scan.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from .abi import CATEGORY_SINCE, PageCategory, PageRegion
from .arguments import view_address
from .errnos import describe, kernel_error, unsupported
from .lib import PAGE_SIZE, ffi, lib

if TYPE_CHECKING:
    from .calls.abi import PageRegionPtr, PmScanArgPtr

__all__ = ["scan_pages"]

_SCAN_REGIONS = 1024  # in one system call


def scan_pages(
    pagemap: int,
    start: int,
    length: int,
    *,
    all_of: PageCategory,
    any_of: PageCategory,
    none_of: PageCategory,
    report: PageCategory | None,
    protect: bool,
) -> list[PageRegion]:
    """Do `Userfaultfd.scan` on the process whose open ``/proc/PID/pagemap`` is ``pagemap``."""
    end = start + length
    regions: list[PageRegion] = []
    vector = ffi.new("struct au_page_region[]", _SCAN_REGIONS)
    arg = ffi.new("struct au_pm_scan_arg *")
    arg.vec = view_address(vector)
    arg.vec_len = _SCAN_REGIONS
    arg.end = end
    arg.category_mask = all_of | none_of
    arg.category_inverted = none_of
    arg.category_anyof_mask = any_of
    arg.return_mask = (all_of | any_of) if report is None else report
    if protect:
        arg.flags = lib.AU_PM_SCAN_WP_MATCHING | lib.AU_PM_SCAN_CHECK_WPASYNC
    position = start
    while position < end:
        arg.start = position
        count = lib.au_abi_pagemap_scan(pagemap, arg)
        if count == -errno.ENOTTY:
            raise UnsupportedError(
                "this kernel has no PAGEMAP_SCAN",
                errno=errno.ENOTTY,
                hint="scan() needs Linux 6.7",
            )
        if count == -errno.EINVAL and (lacking := _unknown_categories(pagemap, arg)):
            raise unsupported("scan", lacking)
        if count < 0:
            raise kernel_error("scan", -count, describe(start, length), position - start)
        for i in range(count):
            _append_region(regions, vector[i])
        if arg.walk_end <= position:
            raise kernel_error("scan", errno.EIO, describe(position, end - position))
        position = arg.walk_end
    return regions


def _unknown_categories(pagemap: int, failed: PmScanArgPtr) -> str:
    """Return the categories of a failed scan that this kernel does not know, and their versions."""
    used = failed.category_mask | failed.category_anyof_mask | failed.return_mask
    unknown = []
    for category, since in CATEGORY_SINCE.items():
        if used & category:
            arg = ffi.new("struct au_pm_scan_arg *")
            arg.end, arg.category_mask = PAGE_SIZE, category
            if lib.au_abi_pagemap_scan(pagemap, arg) == -errno.EINVAL:
                unknown.append(f"PageCategory.{category.name} (Linux {since})")
    return ", ".join(unknown)


def _append_region(regions: list[PageRegion], raw: PageRegionPtr) -> None:
    start, end, categories = raw.start, raw.end, PageCategory(raw.categories)
    if regions:
        last = regions[-1]
        if last.end == start and last.categories == categories:
            regions[-1] = PageRegion(last.start, end, categories)
            return
    regions.append(PageRegion(start, end, categories))
