"""Checks of arguments before the kernel sees them: addresses, sizes, ranges and buffers.

The kernel answers EINVAL without saying which argument was wrong.
"""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import UsageError
from .lib import PAGE_SIZE, ffi

if TYPE_CHECKING:
    from .calls.pointers import Bytes

if sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    Buffer: TypeAlias = Any

__all__ = ["Buffer", "address_of", "check_number", "check_range", "pinned", "view_address"]


def address_of(buffer: Buffer) -> int:
    """Return the address of the first byte of ``buffer`` (an mmap, a memoryview, an array).

    The caller has to keep the buffer alive and in place: an mmap must not be resized while its
    address is in use.

    Raises:
        UsageError: If it has no contiguous memory.
    """
    with pinned(buffer) as view:
        return view_address(view)


def pinned(buffer: Buffer) -> Bytes:
    """Return a view that keeps ``buffer`` in place until it is released.

    Raises:
        UsageError: If it has no contiguous memory.
    """
    try:
        return ffi.from_buffer(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise UsageError(
            f"{type(buffer).__name__} has no contiguous memory: {error}",
            hint="pass bytes, bytearray, mmap or a C-contiguous memoryview or array",
        ) from error


def view_address(view: Any) -> int:
    """Return the address that a cffi view or array starts at."""
    return int(ffi.cast("uintptr_t", view))


def check_number(name: str, what: str, value: object) -> int:
    """Return ``value`` as an integer of 64 bits; UsageError for anything else.

    Args:
        name: The method, for the message.
        what: The argument, for the message.
        value: The value.
    """
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


def check_range(name: str, start: object, length: object) -> tuple[int, int]:
    """Return start and length in bytes; UsageError unless they are one or more whole pages."""
    first = check_number(name, "start", start)
    size = check_number(name, "length", length)
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
