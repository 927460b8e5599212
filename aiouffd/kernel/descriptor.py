"""Reference-counted lifetime of a userfaultfd and what belongs to it.

**Closing makes zeros.** When the last copy of the descriptor is closed, all ranges are unregistered
and all waiters continue: missing pages read as zeros, protected ones become writable. Copies are
dup()s, those of forked children, and a thread that is in poll() on it. Poison stays. So before
``close``: resolve or poison missing pages, or unmap them.

**Fork.** Without Feature.EVENT_FORK the child has the memory without the registration and reads
zeros for missing pages; in shared memory it even installs them for all processes. Use
MADV_DONTFORK (https://man7.org/linux/man-pages/man2/madvise.2.html). The child also inherits the
descriptor, whose ioctls change the parent's memory; it is closed in the child.
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
    """A userfaultfd and its native engine, released together by their last user.

    Users are calls under way, in any thread, and the reader of an event loop. ``fd`` and ``engine``
    are valid only between ``enter`` and ``leave``. Thread-safe.

    Args:
        owner: The class name for error messages.
        fd: The descriptor; negative for a closed one.
        own: Whether the last user closes ``fd``.
    """

    #: Those for this process's own memory, to be dropped in a forked child.
    own_memory: ClassVar[weakref.WeakSet[Descriptor]] = weakref.WeakSet()

    def __init__(self, owner: str, fd: int = -1, *, own: bool = True) -> None:
        self._owner = owner
        self._own = own
        self.fd = fd
        self.closed = fd < 0
        self.lock = threading.Lock()
        self.users = 0
        self._pagemap = -1
        #: Created by the first `receive`: reads without the GIL, and makes touchers release it.
        self.engine: EnginePtr | None = None
        #: A native engine closes the descriptor in a forked child.
        self.fork_handled = False
        #: Messages that were read and not yet returned.
        self.pending: deque[Message] = deque()

    def closed_error(self, name: str) -> ClosedError:
        """Make the error of calling ``name`` after ``close``."""
        return ClosedError(f"cannot call {name}(): this {self._owner} is closed")

    def enter(self, name: str) -> int:
        """Return the descriptor, which stays open until ``leave``.

        Args:
            name: The calling method, for the message.

        Raises:
            ClosedError: After ``close``.
        """
        with self.lock:
            if self.closed:
                raise self.closed_error(name)
            self.users += 1
            return self.fd

    def leave(self) -> None:
        """End a use; the last one after ``close`` releases everything."""
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
        """Refuse further users; return True the first time, when the caller becomes a user."""
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
        """Return a descriptor of /proc/self/pagemap, opened at the first call."""
        with self.lock:
            if self._pagemap < 0:
                self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            return self._pagemap

    def _abandon_in_child(self) -> None:
        """Close in a forked child, where ioctls would change the parent's memory."""
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
                except OSError:  # another at-fork hook has closed it
                    pass


def _after_fork_in_child() -> None:
    for descriptor in list(Descriptor.own_memory):
        descriptor._abandon_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
