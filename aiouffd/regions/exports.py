"""Who holds the memory of a region: counted exports.

An export is what a memoryview, and every slice, array or tensor made of it, keeps alive: a C
pointer with a destructor, which runs when the last of them is gone. As long as there is one, its
memory has to be served, whatever else was closed: a touch that nobody serves would end the
process.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ClosedError
from ..kernel.lib import ffi
from ..util.package import FOLDER

if TYPE_CHECKING:
    from ..kernel.calls.pointers import Bytes

__all__ = ["Exports"]

_Place: TypeAlias = tuple[CodeType, int]
_FOLDER = os.path.join(FOLDER, "")


class Exports:
    """The exports of one region. Any thread; no locks, because destructors run anywhere."""

    __slots__ = ("_ended", "_held", "_last")

    def __init__(self) -> None:
        # Each step of a dict is atomic, and the places are kept for messages.
        self._held: dict[int, str | _Place] = {}
        self._ended = False
        self._last: list[Callable[[], None]] = []

    @property
    def held(self) -> bool:
        """Whether anybody holds the memory."""
        return bool(self._held)

    @property
    def places(self) -> list[str]:
        """Who they are, or where they got hold of it: ``file:line``."""
        return sorted({_said(place) for place in self._held.copy().values()})

    def add(self, pointer: Bytes, length: int, memory: Any, server: Any) -> Any:
        """A cffi buffer of ``length`` bytes at ``pointer``. With it are kept alive ``memory``, and
        ``server`` until somebody has been told that it has gone.

        Raises ClosedError after `end`.
        """
        number = next(_numbers)
        self._held[number] = _caller()
        if self._ended:
            self.release(number)
            raise ClosedError("the memory is closed")
        _kept[number] = (self, memory, server)
        return ffi.buffer(ffi.gc(pointer, _Lease(number)), length)

    def hold(self, who: str) -> int:
        """Hold the memory without a pointer to it, until `release` of the number returned.

        Raises ClosedError after `end`, unless somebody else still holds it.
        """
        number = next(_numbers)
        self._held[number] = who
        if self._ended and len(self._held) == 1:
            self.release(number)
            raise ClosedError("the memory is closed")
        return number

    def release(self, number: int) -> None:
        """Undo `hold`. Idempotent."""
        self._held.pop(number, None)
        if self._ended:
            self._tell()

    def end(self, last: Callable[[], None]) -> None:
        """No more exports. ``last`` is called once, when the last one has gone: at once if there
        is none, else from any thread, in the middle of whatever it does."""
        self._last.append(last)
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        if not self._held:
            try:
                last = self._last.pop()
            except IndexError:
                return
            last()


_numbers = itertools.count()
#: What serves exported memory, by the number of the export. The export does not refer to it itself:
#: it may become garbage in a cycle, and what serves it would be part of that and finalized first.
_kept: dict[int, tuple[Exports, Any, Any]] = {}


class _Lease:
    """The destructor of one export."""

    __slots__ = ("number", "pid")

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = os.getpid()

    def __call__(
        self,
        _pointer: Bytes,
        kept: dict[int, tuple[Exports, Any, Any]] = _kept,
        getpid: Any = os.getpid,
        finalizing: Any = sys.is_finalizing,
    ) -> None:
        # A forked child does not end what its parent serves; nor does an interpreter that ends.
        if self.pid == getpid() and not finalizing():
            exports, memory, _server = kept.pop(self.number)
            # Now, for who is told of the end may go on before this returns.
            del memory
            exports.release(self.number)


def _caller() -> _Place:
    """The first frame outside this package: its code and instruction, which is all that there is
    time for with each view."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_FOLDER):
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


def _said(place: str | _Place) -> str:
    if isinstance(place, str):
        return place
    code, instruction = place
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return f"{code.co_filename}:{line}"
    return code.co_filename
