"""Arguments, looked at before the kernel sees them: addresses, sizes, ranges and buffers.

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
    """Address of the first byte of ``buffer`` (an mmap, a memoryview, an array).

    The buffer is not kept alive and not locked: see to it that it stays. An
    mmap must not be resized while its address is in use.

    Raises:
        UsageError: If it has no contiguous memory.
    """
    with pinned(buffer) as view:
        return view_address(view)


def pinned(buffer: Buffer) -> Bytes:
    """A view that keeps the buffer where it is until it is released."""
    try:
        return ffi.from_buffer(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise UsageError(
            f"{type(buffer).__name__} has no contiguous memory: {error}",
            hint="pass bytes, bytearray, mmap or a C-contiguous memoryview or array",
        ) from error


def view_address(view: Any) -> int:
    return int(ffi.cast("uintptr_t", view))


def check_number(name: str, what: str, value: object) -> int:
    """``value`` as an argument of ``name`` that fits the kernel's 64 bits."""
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
    """(start, length) of at least one page, and of whole pages."""
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
