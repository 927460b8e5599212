"""The native module and the page size: what calls C takes ``ffi`` and ``lib`` from here."""

from __future__ import annotations

import importlib
import mmap
from typing import Any

try:
    _native = importlib.import_module("aiouffd._native")
except ImportError as error:
    raise ImportError(
        f"aiouffd's native module could not be loaded: {error}. It needs Linux and CPython, and is"
        " compiled when aiouffd is installed: `pip install aiouffd`, or in a checkout"
        " `python setup.py build_ext --inplace`, with a C compiler at hand"
    ) from error

__all__ = ["PAGE_SIZE", "ffi", "lib", "pin"]

#: cffi's view of the C declarations in ``native/cdef``. Each call releases the GIL.
ffi: Any = _native.ffi
lib: Any = _native.lib

#: Bytes in a base page: the unit and the alignment of nearly every argument.
PAGE_SIZE: int = mmap.PAGESIZE


def pin(data: Any) -> tuple[Any, memoryview]:
    """A pointer to the bytes of ``data``, and a view that keeps them in place for as long as it is
    referred to and not released.

    For pointers that stay. What ``ffi.from_buffer`` returns is a user of a memoryview, and CPython
    before 3.12.7 crashes when it collects both as parts of one cycle, the view first
    (python/cpython#77894). So it must not outlive the call that it is made for, be it in an
    attribute or in the traceback of an exception. The view here has no user.
    """
    view = memoryview(data)
    with ffi.from_buffer("uint8_t[]", view) as lent:
        return ffi.cast("uint8_t *", lent), view
