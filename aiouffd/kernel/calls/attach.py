"""What ``native/cdef/attach.h`` declares. Made by ``make calls``."""

from __future__ import annotations

from typing import Protocol

from .pointers import Bytes, Ints, Text, Uint64s

__all__ = ["AttachCalls", "AttachmentPtr"]


class AttachmentPtr(Protocol):
    address: int
    length: int
    object_size: int
    user_mode_only: int


class AttachCalls(Protocol):
    AU_ATTACH_WRITABLE: int
    AU_ATTACH_HUGETLB: int
    AU_ATTACH_USER_MODE_ONLY: int
    AU_ATTACH_ALL_FAULTS: int
    AU_ATTACH_BACKGROUND: int
    AU_ATTACH_SERVER_USER: int
    AU_ATTACH_POISON: int
    AU_ATTACH_ABORT: int

    def au_attach_open(
        self,
        path: Text,
        object: Text,
        offset: int,
        length: int,
        flags: int,
        server_user: int,
        timeout_ms: int,
        cancel_fd: int,
        lost_ms: int,
        on_lost: int,
        error: Ints,
        text: Text,
        text_size: int,
        /,
    ) -> AttachmentPtr: ...
    def au_attach_read(
        self,
        attachment: AttachmentPtr,
        offset: int,
        destination: Bytes,
        length: int,
        where: Uint64s,
        /,
    ) -> int: ...
    def au_attach_touch(
        self, attachment: AttachmentPtr, offset: int, length: int, where: Uint64s, /
    ) -> int: ...
    def au_attach_discard(self, attachment: AttachmentPtr, offset: int, length: int, /) -> int: ...
    def au_attach_refuse(self, attachment: AttachmentPtr, /) -> None: ...
    def au_attach_free(self, attachment: AttachmentPtr, /) -> None: ...
    def au_attach_forked(self, attachment: AttachmentPtr, /) -> None: ...
    def au_attach_connected(self, attachment: AttachmentPtr, /) -> int: ...
    def au_attach_resumed(self, attachment: AttachmentPtr, /) -> int: ...
