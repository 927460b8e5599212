"""What a userfaultfd holds open, kept as long as anybody uses it.

**Close means zeros.** When the last copy of the descriptor closes, everything is unregistered and
all waiters go on as if nothing had been: missing pages read as zeros, protected ones become
writable. "Last" counts dup()s, children made by fork, and a thread that sits in poll() on it.
Poison stays. So before ``close``: resolve or poison what is missing, or unmap it.

**Fork.** Without Feature.EVENT_FORK the child has the memory without the registration and reads
zeros for what was missing; with shared memory it even writes them for everybody. Use
MADV_DONTFORK. The child also inherits the descriptor, and what it does with it happens to the
parent; it is closed there.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, ClassVar

from ..errors import ClosedError
from .abi import Fork, Message
from .lib import lib

if TYPE_CHECKING:
    from .calls.engine import EnginePtr

__all__ = ["Descriptor"]


class Descriptor:
    """A userfaultfd and what belongs to it, released together by the last who uses them.

    Users are calls under way, in any thread, and the reader of an event loop. Only between
    ``enter`` and ``leave`` are ``fd`` and ``engine`` sure to stay.
    """

    #: Those for this process's own memory, to be dropped in a forked child.
    own_memory: ClassVar[weakref.WeakSet[Descriptor]] = weakref.WeakSet()

    def __init__(self, owner: str, fd: int = -1, *, own: bool = True) -> None:
        """``owner`` is the name of the class that errors speak of. Without ``fd``: closed."""
        self._owner = owner
        self._own = own
        self.fd = fd
        self.closed = fd < 0
        self.lock = threading.Lock()
        self.users = 0
        self._pagemap = -1
        #: Made with the first `receive`: reads without the GIL, and asks touchers for theirs.
        self.engine: EnginePtr | None = None
        #: A native engine closes the descriptor in a forked child.
        self.fork_handled = False
        #: Messages that were read and not yet given out.
        self.pending: deque[Message] = deque()

    def closed_error(self, name: str) -> ClosedError:
        return ClosedError(f"cannot call {name}(): this {self._owner} is closed")

    def enter(self, name: str) -> int:
        """The descriptor, which will not be released before ``leave``."""
        with self.lock:
            if self.closed:
                raise self.closed_error(name)
            self.users += 1
            return self.fd

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users or not self.closed:
                return
            fd, self.fd = self.fd, -1
            pagemap, self._pagemap = self._pagemap, -1
            engine, self.engine = self.engine, None
        if engine is not None:
            lib.au_engine_close(engine)
        if fd >= 0 and self._own:
            os.close(fd)
        if pagemap >= 0:
            os.close(pagemap)
        while self.pending:
            message = self.pending.popleft()
            if isinstance(message, Fork):
                os.close(message.fd)

    def close(self) -> bool:
        """Lets nobody in any more. True the first time; the caller is then a user itself."""
        if self.closed:
            return False
        with self.lock:
            if self.closed:
                return False
            self.closed = True
            self.users += 1
        self.own_memory.discard(self)
        return True

    def own_pagemap(self) -> int:
        """/proc/self/pagemap, opened when it is first asked for."""
        with self.lock:
            if self._pagemap < 0:
                self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            return self._pagemap

    def _abandon_in_child(self) -> None:
        """In a forked child: an ioctl on this descriptor would change the parent's memory."""
        self.lock = threading.Lock()
        if self.closed:
            return
        self.closed = True
        fd, self.fd = self.fd, -1
        pagemap, self._pagemap = self._pagemap, -1
        for each in (-1 if self.fork_handled else fd, pagemap):
            if each >= 0:
                try:
                    os.close(each)
                except OSError:  # somebody else's hook was faster
                    pass


def _after_fork_in_child() -> None:
    for descriptor in list(Descriptor.own_memory):
        descriptor._abandon_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
