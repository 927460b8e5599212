"""A client's side of CRIU's page server protocol, without I/O.

A request and the head of a reply are the same structure, in the byte order of the machine: what,
how many pages, at which address, of which task. There are two layouts, of 32 bytes since CRIU 4.2
and of 24 before, and nothing on the wire tells which: both ends have to be told. Replies come in
the order of the requests. A reply may have fewer pages than were asked for, never none: a server
that lacks the first page hangs up.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Final

from ...errors import SourceError, UsageError
from ...util.pages import PAGE_SIZE
from ...util.waiting import Done

__all__ = ["HEADS", "PAGES_MAX", "Exchange", "PageRequest", "PageServerError"]

#: Images and requests count in pages of the system.
PAGE: Final = PAGE_SIZE
#: Pages in one request. A server cannot do more than 1024 at once; less keeps others waiting less.
PAGES_MAX: Final = 64

#: The layouts, by their length: command, number of pages, address, task.
HEADS: Final = {32: struct.Struct("=I4xQQQ"), 24: struct.Struct("=IIQQ")}

_GET: Final = 7
_ADD: Final = 6
_CLOSE: Final = 0x1023
#: A command has 16 bits, its flags the 16 above.
_COMMAND: Final = 0xFFFF
_PRESENT: Final = 4 << 16
_STATUS: Final = struct.Struct("=i")


class PageServerError(SourceError):
    """The page server broke the protocol: its connection is of no use any more. Not transient."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, transient=False, hint=hint)


class PageRequest:
    """``len(target)`` bytes at ``address`` of the task ``pid``: whole pages.

    ``target`` None: nobody wants them any more. ``done`` is called once, with None or an error.
    """

    __slots__ = ("address", "done", "pid", "size", "target")

    def __init__(self, pid: int, address: int, target: memoryview, done: Done) -> None:
        self.pid = pid
        self.address = address
        self.size = len(target)
        self.target: memoryview | None = target
        self.done = done

    def advance(self, size: int) -> None:
        """``size`` bytes of it have come."""
        self.address += size
        self.size -= size
        if self.target is not None:
            self.target = self.target[size:]

    def __repr__(self) -> str:
        return f"{self.size // PAGE} pages at {self.address:#x} of task {self.pid}"


class Exchange:
    """One connection: requests become bytes (`ask`), and bytes that were received answers.

    The next bytes are received into `get_buffer`, and `received` told how many there were. It gives
    the requests that have got a reply; those that got a part of it are to be asked again.
    ``head`` is the layout's length in bytes. Raises UsageError for one that there is not.
    """

    def __init__(self, head: int = 32) -> None:
        if head not in HEADS:
            raise UsageError(f"the page server's structures have 32 or 24 bytes, not {head}")
        self._struct = HEADS[head]
        self._head = memoryview(bytearray(head))
        self._waste = memoryview(bytearray(64 * 1024))
        #: Bytes of the head that have come, and of the pages after it that are to come.
        self._have = 0
        self._left = 0
        self._size = 0
        #: What was asked and not answered, oldest first.
        self.asked: deque[PageRequest] = deque()
        #: What the server answered to our goodbye, None before.
        self.status: int | None = None
        self._closing = False

    @property
    def began(self) -> bool:
        """Whether part of an answer has come, of which there is more."""
        return bool(self._have)

    def ask(self, request: PageRequest) -> bytes:
        """The bytes that ask for ``request``, which has 1 to `PAGES_MAX` pages."""
        self.asked.append(request)
        return self._struct.pack(_GET, request.size // PAGE, request.address, request.pid)

    def close(self) -> bytes:
        """The bytes that say goodbye. What was asked is still answered, then `status`."""
        self._closing = True
        return self._struct.pack(_CLOSE, 0, 0, 0)

    def get_buffer(self) -> memoryview:
        """Where the next bytes go."""
        if not self._left:
            end = len(self._head)
            if self._closing and not self.asked:
                end = _STATUS.size
            return self._head[self._have : end]
        target = self.asked[0].target
        if target is None:
            return self._waste[: self._left]
        done = self._size - self._left
        return target[done : self._size]

    def received(self, count: int) -> list[PageRequest]:
        """``count`` bytes have come. Raises PageServerError; nothing can be received after it."""
        if self._left:
            self._left -= count
            if self._left:
                return []
            request = self.asked.popleft()
            request.advance(self._size)
            self._have = 0
            return [request]
        self._have += count
        if self._closing and not self.asked:
            if self._have == _STATUS.size:
                (self.status,) = _STATUS.unpack_from(self._head)
            return []
        if self._have == len(self._head):
            self._begin()
        return []

    def _begin(self) -> None:
        command, pages, address, pid = self._struct.unpack(self._head)
        if not self.asked:
            raise PageServerError("the page server sends pages that nobody has asked for")
        request = self.asked[0]
        if command & _COMMAND != _ADD or not command & _PRESENT:
            raise PageServerError(
                f"the page server answers with command {command:#x}",
                hint=f"does its CRIU have structures of {len(self._head)} bytes? It is 32 since"
                " version 4.2, 24 before",
            )
        if address != request.address or pid != request.pid:
            raise PageServerError(
                f"the page server sends pages at {address:#x} of task {pid} for {request!r}"
            )
        if not 0 < pages <= request.size // PAGE:
            raise PageServerError(f"the page server sends {pages} pages for {request!r}")
        self._size = self._left = pages * PAGE
