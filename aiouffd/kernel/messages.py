"""The messages of a userfaultfd: reading them, and waiting for them on an event loop.

**Readable does not mean that a read returns a message.** The fault may have been resolved in
between, and the read fails with EAGAIN.

**There is more than one message per fault.** N threads on one page make N messages. A signal
interrupts a blocked thread, which then repeats its instruction and sends another message. In
system calls a pending signal makes the thread repeat the fault as fast as it is read. Fold them by
page, and pause when a whole batch is about pages already being fetched. The kernel returns page
faults before events, even before older ones.

**Events block their originator.** With the EVENT features, fork, munmap, mremap and madvise sleep
until their message is read. The thread that reads must not make those calls, and a thread that
makes them must not hold anything the reader needs: CPython holds the GIL in ``os.fork``,
``mmap.madvise`` and ``mmap.resize``, and fork holds malloc's locks, so until its event is read
other threads must not allocate: ``read`` and ``receive`` avoid it as far as they can.

**A thread that touches a missing page from Python holds the GIL**, and no Python code can then
resolve the fault. Until a loop has begun to ``receive``, touch from calls that release it
(``os.write``, ctypes, NumPy's larger copies), or from another process; from then on a native
reader makes threads of this process release it.

See "Reading from the userfaultfd structure" in
https://man7.org/linux/man-pages/man2/userfaultfd.2.html.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from ..errors import ClosedError, KernelError, UsageError
from ..util.waiting import call_soon_at
from .abi import Event, FaultFlag, Fork, Message, PageFault, Remap, Remove, Unmap
from .descriptor import Descriptor
from .errnos import kernel_error
from .lib import ffi, lib

if TYPE_CHECKING:
    from .calls import Lib
    from .calls.abi import UffdMsgPtr
    from .calls.engine import EnginePtr

__all__ = ["EngineEnd", "Messages"]

logger = logging.getLogger("aiouffd")

_READ_MESSAGES = 64  # in one system call


class Messages:
    """The messages of one descriptor, and the event loop that waits for them.

    The loop's reader is a user of the descriptor, as a call under way is: the descriptor stays
    open until the reader has been removed. Thread-safe; one loop at a time.
    """

    def __init__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor
        self._pending = descriptor.pending
        self._read_lock = threading.Lock()
        self._read_buffer = ffi.new("struct au_uffd_msg[]", _READ_MESSAGES)
        self._entries: Any = None  # the same, for messages of the native reader
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()
        # Guards the watching loop and its waiters, which several threads may change.
        self._lock = threading.RLock()

    def read(self, limit: int) -> list[Message]:
        """Do `Userfaultfd.read`, for a positive ``limit``."""
        messages: list[Message] = []
        while len(messages) < limit:
            try:
                messages.append(self._pending.popleft())
            except IndexError:
                break
        if messages:
            return messages
        while len(messages) < limit:
            want = min(limit - len(messages), _READ_MESSAGES)
            try:
                got = self._read_kernel(want)
            except KernelError:
                if messages:
                    break  # the next call raises it, and nothing is lost
                raise
            messages += got
            if len(got) < want:
                break
        return messages

    def _read_kernel(self, limit: int) -> list[Message]:
        # Between here and the read nothing may be allocated from malloc: a thread in fork holds
        # its locks until its event is read.
        fd = self._descriptor.enter("read")
        try:
            engine = self._descriptor.engine
            with self._read_lock:
                if engine is None:
                    count = lib.au_abi_read(fd, self._read_buffer, limit)
                    decoded = [_decode(self._read_buffer[i]) for i in range(count)]
                else:
                    count = lib.au_engine_drain(engine, self._entries, limit, lib.AU_DRAIN_LOOP)
                    # No thread blocked before this holds the GIL: we do. (FREE-THREADING)
                    lib.au_shared.proof = lib.au_shared.sequence
                    decoded = [_decode(self._entries[i].message) for i in range(count)]
        finally:
            self._descriptor.leave()
        if count < 0 and count != -errno.EAGAIN:
            raise kernel_error("read", -count, "messages")
        return [message for message in decoded if message is not None]

    async def receive(self) -> Message:
        """Do `Userfaultfd.receive`."""
        while True:
            if self._descriptor.closed:
                raise self._descriptor.closed_error("receive")
            try:
                return self._pending.popleft()
            except IndexError:
                pass
            await self._readable()

    async def _readable(self) -> None:
        """Wait until the loop has read messages, which other waiters may take first."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        with self._lock:  # another loop either sees this waiter, or was first
            self._attach(loop)
            self._waiters.append(waiter)
        try:
            await waiter
        finally:
            with self._lock:
                if waiter in self._waiters:  # cancelled
                    self._waiters.remove(waiter)
                    if not self._waiters and self._loop is loop:
                        self._detach(loop)

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let ``loop`` watch the descriptor. With the lock held.

        It goes on watching while messages are returned one by one, and stops when one arrives
        without a waiter.
        """
        old = self._loop
        if old is loop:
            return
        if old is not None:
            if self._waiters and not old.is_closed():
                raise UsageError(
                    "a task on another event loop waits for messages of this userfaultfd",
                    hint="receive on one loop, or use read()",
                )
            if old.is_closed():
                self._waiters.clear()
                self._detached()
            elif not old.is_running():
                self._detach(old)
            else:
                self._loop = None
                if not call_soon_at(old, self._hand_over, old):
                    self._waiters.clear()
                    self._detached()
        descriptor = self._descriptor
        with descriptor.lock:  # together, so that close() sees the loop as soon as it counts
            if descriptor.closed:
                raise descriptor.closed_error("receive")
            descriptor.users += 1
            self._loop = loop
            fd = descriptor.fd
        try:
            # The loop must not hold the last reference to this object.
            self._start_engine()
            loop.add_reader(fd, _on_readable, weakref.ref(self), loop, fd)
            if descriptor.engine is not None:
                lib.au_engine_set_loop(descriptor.engine, threading.get_native_id())
                notify = descriptor.engine.notify_fd
                loop.add_reader(notify, _on_readable, weakref.ref(self), loop, notify)
        except BaseException:
            self._detached()
            raise

    def _start_engine(self) -> None:
        """Start a native reader beside the loop, for memory of this process.

        It reads messages when the loop cannot (a thread blocked on a page or an event holds the
        GIL), and makes blocked threads release the GIL.
        """
        descriptor = self._descriptor
        if descriptor.engine is not None or descriptor not in Descriptor.own_memory:
            return
        error = ffi.new("int *")
        options = lib.AU_ENGINE_RAW | lib.AU_ENGINE_OWN | lib.AU_ENGINE_YIELD
        engine = lib.au_engine_create(descriptor.fd, options, error)
        if engine == ffi.NULL:
            raise OSError(error[0], f"cannot start the native reader: {os.strerror(error[0])}")
        self._entries = ffi.new("struct au_entry[]", _READ_MESSAGES)
        descriptor.fork_handled = True
        descriptor.engine = ffi.gc(engine, EngineEnd())

    def _remove_readers(self, loop: asyncio.AbstractEventLoop) -> None:
        descriptor = self._descriptor
        if descriptor.fd >= 0:  # else this is a forked child
            loop.remove_reader(descriptor.fd)
            if descriptor.engine is not None:
                loop.remove_reader(descriptor.engine.notify_fd)
                lib.au_engine_set_loop(descriptor.engine, 0)

    def _detach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._remove_readers(loop)
        self._loop = None
        self._descriptor.leave()

    def _hand_over(self, old: asyncio.AbstractEventLoop) -> None:
        """Remove the readers of ``old``, on its thread, after another loop has taken over."""
        with self._lock:
            if self._loop is not old:  # else it has taken it back already
                self._remove_readers(old)
        self._descriptor.leave()

    def _detached(self) -> None:
        """Note that the loop was closed, and its readers with it."""
        self._loop = None
        self._descriptor.leave()

    def end(self) -> None:
        """Remove the loop's readers and wake the waiters, once the descriptor is closed."""
        loop = self._loop
        if loop is None:
            return
        if loop.is_closed():
            self._detached()
        elif not loop.is_running() or loop is _running_loop():
            self._end_waiting(loop)
        else:
            try:
                loop.call_soon_threadsafe(self._end_waiting, loop)
            except RuntimeError:  # closed in between
                self._detached()

    def _end_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._loop is loop:
                self._detach(loop)
                self._wake_waiters(None)

    def _wake_waiters(self, error: Exception | None) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

    def _read_for_waiters(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._loop is loop:
                self._read_some(loop)

    def _read_some(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._waiters:
            self._detach(loop)
            return
        if not self._pending:
            try:
                self._pending.extend(self._read_kernel(_READ_MESSAGES))
            except ClosedError:
                return  # close() is removing this reader
            except Exception as error:
                self._wake_waiters(error)
                return
        if self._pending:
            self._wake_waiters(None)


def _on_readable(
    reference: weakref.ref[Messages], loop: asyncio.AbstractEventLoop, fd: int
) -> None:
    """Read messages: the loop's callback for a readable descriptor."""
    self = reference()
    if self is None:
        loop.remove_reader(fd)
    else:
        self._read_for_waiters(loop)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _decode(raw: UffdMsgPtr) -> Message | None:
    arg = raw.arg
    match raw.event:
        case Event.PAGEFAULT:
            fault = arg.pagefault
            return PageFault(FaultFlag(fault.flags), fault.address, fault.ptid)
        case Event.FORK:
            return Fork(arg.fork.ufd)
        case Event.REMAP:
            return Remap(getattr(arg.remap, "from"), arg.remap.to, arg.remap.len)
        case Event.REMOVE:
            return Remove(arg.remove.start, arg.remove.end)
        case Event.UNMAP:
            return Unmap(arg.remove.start, arg.remove.end)
        case unknown:
            logger.warning("ignored a userfaultfd message of unknown kind %#x", unknown)
            return None


class EngineEnd:
    """Destructor of a native engine, run when the last reference, a region's included, is gone.

    It does nothing in a forked child, where the engine does not exist.
    """

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __call__(self, engine: EnginePtr, lib: Lib = lib, getpid: Any = os.getpid) -> None:
        """Free ``engine``. What it needs is bound early, for calls at the interpreter's exit."""
        if getpid() == self._pid:
            lib.au_engine_free(engine)
