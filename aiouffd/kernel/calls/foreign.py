"""What ``native/cdef/foreign.h`` declares. Made by ``make calls``."""

from __future__ import annotations

from typing import Protocol

from .abi import UffdMsgPtr
from .pointers import Bytes, Uint64s

__all__ = ["ForeignAreaPtr", "ForeignCalls", "ForeignHeardPtr"]


class ForeignHeardPtr(Protocol):
    patience: int
    messages: UffdMsgPtr
    room: int
    count: int


class ForeignAreaPtr(Protocol):
    start: int
    length: int
    page_size: int
    bytes: Bytes
    states: Bytes


class ForeignCalls(Protocol):
    def au_foreign_fill(
        self,
        fd: int,
        op: int,
        start: int,
        src: Bytes,
        length: int,
        page_size: int,
        states: Bytes,
        absent: Uint64s,
        heard: ForeignHeardPtr,
        /,
    ) -> int: ...
    def au_foreign_read(self, fd: int, messages: UffdMsgPtr, max: int, /) -> int: ...
    def au_foreign_alive(self, fd: int, /) -> int: ...
    def au_foreign_pump(
        self,
        fd: int,
        areas: ForeignAreaPtr,
        count: int,
        window: int,
        out: UffdMsgPtr,
        max: int,
        faults: Uint64s,
        installed: Uint64s,
        /,
    ) -> int: ...
