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

__all__ = ["PAGE_SIZE", "ffi", "lib"]

#: cffi's view of the C declarations in ``native/cdef``. Each call releases the GIL.
ffi: Any = _native.ffi
lib: Any = _native.lib

#: Bytes in a base page: the unit and the alignment of nearly every argument.
PAGE_SIZE: int = mmap.PAGESIZE
