"""What ``native/cdef/children.h`` declares. Made by ``make calls``."""

from __future__ import annotations

from typing import Protocol

__all__ = ["ChildPtr", "ChildRegionPtr", "ChildrenCalls"]


class ChildPtr(Protocol):
    uffd: int
    socket: int
    pid: int
    regions: int


class ChildRegionPtr(Protocol):
    serial: int
    start: int
    length: int
    page_size: int


class ChildrenCalls(Protocol):
    AU_INHERITED_ALL_FAULTS: int
    AU_INHERITED_USER_MODE: int

    def au_children_fd(self) -> int: ...
    def au_children_receive(self, child: ChildPtr, /) -> int: ...
    def au_children_release(self, uffd: int, socket: int, /) -> None: ...
