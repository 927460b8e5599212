"""The native module and the page size: code that calls C takes ``ffi`` and ``lib`` from here."""

from __future__ import annotations

import _thread
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..util import pages
from ..util.package import FOLDER

if TYPE_CHECKING:
    from .calls import Lib
    from .calls.pointers import Bytes


def in_main_interpreter() -> bool:
    """Return whether this is the main interpreter of the process."""
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


def _why(error: ImportError) -> str:
    """Return why the native module cannot be loaded, and what to do."""
    package = FOLDER.resolve()
    text = f"aiouffd's native module could not be loaded: {error}. "
    if sys.platform != "linux" or sys.implementation.name != "cpython":
        return text + "It needs Linux and CPython"
    if not (package.parent / "setup.py").exists():
        return text + "Install aiouffd again: `pip install .` in its source folder compiles it"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    text += (
        f"Python found the sources in {package.parent}, where it has not been compiled for Python"
        f" {version}: `pip install -e .` there does that; it needs a C compiler"
    )
    for place in map(Path, sys.path):
        other = (place / "aiouffd").resolve()
        if other != package and any(other.glob("_native*.so")):
            return f"{text}; or run this in another folder: aiouffd is installed in {place}"
    return text


# FREE-THREADING: CONTRIBUTING.md lists what else has to change.
if not getattr(sys, "_is_gil_enabled", lambda: True)():
    # Loading the module would switch the GIL on for the whole process.
    raise ImportError(_NO_GIL)
try:
    _native = importlib.import_module("aiouffd._native")
except ImportError as error:
    # Slow to import, so only after a failure.
    import sysconfig

    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise ImportError(_NO_GIL) from error
    if not in_main_interpreter():
        raise ImportError(
            f"aiouffd cannot be imported in this sub-interpreter: {error}. Open the buffer in the"
            " main interpreter and hand its memory over (`concurrent.interpreters` passes a"
            " memoryview on as it is), or use another process"
        ) from error
    raise ImportError(_why(error)) from error

__all__ = ["PAGE_SIZE", "ffi", "in_main_interpreter", "lib", "pin"]

#: cffi's view of the C declarations in ``native/cdef``. Each call releases the GIL.
ffi: Any = _native.ffi
lib: Lib = _native.lib

#: Bytes in a base page: the unit and the alignment of nearly every argument.
PAGE_SIZE: int = pages.PAGE_SIZE


def pin(data: Any) -> tuple[Bytes, memoryview]:
    """Return a pointer to the bytes of ``data``, and a view that keeps them in place.

    The pointer is valid while the view is referenced and not released.

    For pointers that are stored. What ``ffi.from_buffer`` returns exports a memoryview, and CPython
    before 3.12.7 crashes when it collects both as parts of one cycle, the view first
    (https://github.com/python/cpython/issues/77894). So it must not outlive the call that it is
    made for, be it in an attribute or in the traceback of an exception. The view here has no
    exports.
    """
    view = memoryview(data)
    with ffi.from_buffer("uint8_t[]", view) as lent:
        return ffi.cast("uint8_t *", lent), view
