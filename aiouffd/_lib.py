"""The native module and the page size: what calls C takes ``ffi`` and ``lib`` from here."""

from __future__ import annotations

import _thread
import importlib
import mmap
import sys
from typing import Any


def in_main_interpreter() -> bool:
    """Whether this is the interpreter that the process began with."""
    known = getattr(_thread, "_is_main_interpreter", None)  # from 3.13 on
    if known is not None:
        return bool(known())
    try:
        interpreters = importlib.import_module("_xxsubinterpreters")
    except ImportError:
        return True
    return bool(interpreters.get_current() == interpreters.get_main())


_NO_GIL = (
    "aiouffd does not support free-threaded builds of Python yet: its way of serving a thread that"
    " holds the GIL has not been proved where there is none. Use the usual build of this version"
)

# FREE-THREADING: CONTRIBUTING.md lists what else has to change.
if not getattr(sys, "_is_gil_enabled", lambda: True)():
    # Loading the module would switch the GIL on for the whole process.
    raise ImportError(_NO_GIL)
try:
    _native = importlib.import_module("aiouffd._native")
except ImportError as error:
    # Not light, and only asked where something is wrong already.
    import sysconfig

    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise ImportError(_NO_GIL) from error
    if not in_main_interpreter():
        raise ImportError(
            f"aiouffd cannot be imported in this sub-interpreter: {error}. Open the buffer in the"
            " main interpreter and hand its memory over (`concurrent.interpreters` passes a"
            " memoryview on as it is), or use another process"
        ) from error
    raise ImportError(
        f"aiouffd's native module could not be loaded: {error}. It needs Linux and CPython, and is"
        " compiled when aiouffd is installed: `pip install aiouffd`, or in a checkout"
        " `python setup.py build_ext --inplace`, with a C compiler at hand"
    ) from error

__all__ = ["PAGE_SIZE", "ffi", "in_main_interpreter", "lib", "pin"]

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
