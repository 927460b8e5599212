"""The fault server and the touchers of `uffd_server.c`, for Python.

All calls go through ctypes and therefore release the GIL.
"""

import ctypes
import os
from collections.abc import Sequence
from types import TracebackType

from .build import build

PAGE = 4096


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("uffd_server", shared=True)))
    u64, pointer, integer = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
    signatures: dict[str, tuple[object, list[object]]] = {
        "uffd_server_start": (
            integer,
            [u64, pointer, u64, integer, ctypes.POINTER(pointer)],
        ),
        "uffd_server_memory": (pointer, [pointer]),
        "uffd_server_faults": (u64, [pointer]),
        "uffd_server_reset": (integer, [pointer]),
        "uffd_server_stop": (None, [pointer]),
        "touch_pages": (ctypes.c_int64, [pointer, u64, u64, u64, pointer, integer]),
        "touch_threads": (ctypes.c_int64, [pointer, u64, integer, integer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_library = _load()


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


class UffdServer:
    """Memory of `length` bytes, filled on touch by a C thread from `source`, repeated."""

    def __init__(self, length: int, source: bytearray | None = None, *, cpu: int = -1) -> None:
        source = bytearray(os.urandom(PAGE) * 256) if source is None else source
        if length % PAGE or not source or len(source) % PAGE:
            raise ValueError("both lengths must be multiples of the page size")
        self._source = (ctypes.c_char * len(source)).from_buffer(source)  # keeps it alive
        self._server = ctypes.c_void_p()
        _checked(
            _library.uffd_server_start(
                length, self._source, len(source), cpu, ctypes.byref(self._server)
            )
        )
        self.length = length
        self.address: int = _library.uffd_server_memory(self._server)

    @property
    def faults(self) -> int:
        return int(_library.uffd_server_faults(self._server))

    def reset(self) -> None:
        """Make every page missing again."""
        _checked(_library.uffd_server_reset(self._server))

    def close(self) -> None:
        """Unmap the memory and stop the thread; nobody may be touching."""
        if self._server:
            _library.uffd_server_stop(self._server)
            self._server = ctypes.c_void_p()

    def __enter__(self) -> "UffdServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def touch(address: int, start: int, end: int, stride: int = 1, *, cpu: int = -1) -> list[int]:
    """Touch pages `start`, `start + stride`, ... below `end`; nanoseconds of each touch."""
    times = (ctypes.c_uint64 * max(1, -(-(end - start) // stride)))()
    count = _checked(_library.touch_pages(address, start, end, stride, times, cpu))
    return times[:count]


def touch_all(address: int, start: int, end: int, stride: int = 1, *, cpu: int = -1) -> int:
    """The same without a figure per touch; returns the number of touches."""
    return _checked(_library.touch_pages(address, start, end, stride, None, cpu))


def touch_threads(
    address: int,
    pages: int,
    threads: int,
    *,
    interleaved: bool = True,
    cpus: Sequence[int] | None = None,
) -> int:
    """`threads` threads touch every page once between them; elapsed nanoseconds.

    Interleaved, they move through the memory side by side; else each has its own part.
    """
    if cpus is not None and len(cpus) != threads:
        raise ValueError("one CPU per thread")
    numbers = None if cpus is None else (ctypes.c_int * threads)(*cpus)
    return _checked(_library.touch_threads(address, pages, threads, interleaved, numbers))
