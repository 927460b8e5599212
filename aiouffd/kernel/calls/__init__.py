"""The native module as a type: a Protocol for each header in ``native/cdef``.

For type checkers alone: nothing here is imported when the program runs. A pointer to a struct is
known by its fields (``RegionPtr``), others by what they point to (`pointers`). `Lib` has it all;
``make calls`` makes the other modules from the headers.
"""

from __future__ import annotations

from typing import Protocol

from .abi import AbiCalls
from .attach import AttachCalls
from .children import ChildrenCalls
from .engine import EngineCalls
from .foreign import ForeignCalls

__all__ = ["Lib"]


class Lib(AbiCalls, AttachCalls, ChildrenCalls, EngineCalls, ForeignCalls, Protocol):
    """All that Python may call. Each call releases the GIL."""
