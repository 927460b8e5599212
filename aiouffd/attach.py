"""Memory of this process that another process fills: a client of ``aiouffd pager``.

::

    with aiouffd.attach("/run/weights.sock") as memory:
        weights = np.frombuffer(memory.view, dtype="f4")

The other process has the sources, the cache and the connections; here is one userfaultfd, which
it was given, and one native thread, the keeper (``include/aiouffd_client.h``). A server that
dies is a pause: threads that wait go on waiting, and the keeper hands the memory to the one that
comes next. It needs no GIL, and neither does the server need ours, so a touch that holds the GIL is
served like any other. But it holds it while it waits, and all other Python threads wait with it:
`Attachment.fetch` and ``memory[a:b]`` wait without.

What a thread gets that waits for a page when

============================  ======================================================================
the server dies               its bytes, once a server is there again
none is there in time         an error, or the end of the process: see ``lost_timeout``
the server cannot have them   an error
`Attachment.close`            an error
the interpreter exits         what it would get anyway. The interpreter waits for threads that are
                              not daemons, as ever; daemons end with the process
the process forks             goes on waiting, in the parent
============================  ======================================================================

*Error* means SIGBUS for a touch in user mode (SIGSEGV after the memory is gone), EFAULT from a
system call, and an exception from ``memory[a:b]`` and `Attachment.fetch`. Never zeros.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .buffers.byte_sequence import ByteSequence
from .errors import ClosedError, PeerError, SourceError, UnsupportedError, UsageError
from .kernel.lib import ffi, lib
from .regions import guarded
from .util.once import Once, cancelled_from_outside
from .util.places import user_id
from .util.waiting import in_thread

if TYPE_CHECKING:
    from .kernel.calls import Lib
    from .kernel.calls.attach import AttachmentPtr
    from .kernel.calls.pointers import Uint64s

__all__ = ["Attachment", "attach"]

T = TypeVar("T")
Kind = Literal["anonymous", "hugetlb"]
OnLost = Literal["poison", "abort"]

_ON_LOST: dict[str, int] = {"poison": lib.AU_ATTACH_POISON, "abort": lib.AU_ATTACH_ABORT}
_KINDS: dict[str, int] = {"anonymous": 0, "hugetlb": lib.AU_ATTACH_HUGETLB}
_TEXT = 512
#: Milliseconds have to fit into an int.
_LONGEST = 2_000_000.0


def attach(
    path: str | os.PathLike[str],
    *,
    object: str | None = None,
    offset: int = 0,
    length: int | None = None,
    writable: bool = False,
    kind: Kind = "anonymous",
    background: bool = False,
    user_mode_only: bool | None = None,
    timeout: float | None = 0.0,
    lost_timeout: float | None = None,
    on_lost: OnLost = "poison",
    server_user: int | str | None = None,
) -> Attachment:
    """Memory that the server at ``path`` fills, for ``with`` or ``async with``; or open it with
    `Attachment.open` or ``await``.

    Raises UsageError.

    Args:
        path: Of the server's Unix socket. It must belong to another process.
        object: The name of the object, if the server has several.
        offset: Where in the object to begin, in bytes, a multiple of the page size.
        length: Bytes; up to the object's end if None.
        writable: The memory may be written to. The object is never changed.
        kind: ``"hugetlb"`` for pages of 2 MiB, of which there must be free ones, and which the
            server must serve: blocks of that size, an object of whole ones.
        background: Have the server bring everything, behind what is touched.
        user_mode_only: True: system calls on missing pages fail with EFAULT; False: they wait,
            PermissionError if this user may not have that; None: the better one there is.
        timeout: Seconds to wait for a server that is not there yet; None: for ever. One that
            listens and does not answer is waited for 30 seconds (TimeoutError).
        lost_timeout: Seconds to wait for a server to come back; None: for ever. An outage of more
            than a second is told on stderr.
        on_lost: What comes then: ``"poison"``, an error for whoever touches what is missing, or
            ``"abort"``.
        server_user: Whose server may be believed besides root's and this user's own: a name, or an
            id (-1: anybody's). Whoever may write to the socket's directory can listen there, and
            who is given the userfaultfd decides what is in this process's memory.
    """
    return Attachment(
        path,
        object,
        offset,
        length,
        writable,
        kind,
        background,
        user_mode_only,
        timeout,
        lost_timeout,
        on_lost,
        server_user,
    )


class Attachment(ByteSequence):
    """Memory that another process fills. Made by `attach`. Any thread may use it.

    Views, and arrays made of them, keep the memory and the service alive, also when this object is
    gone, until `close`. After it what is there can be read through them, and the rest is an error.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str | None,
        offset: int,
        length: int | None,
        writable: bool,
        kind: Kind,
        background: bool,
        user_mode_only: bool | None,
        timeout: float | None,
        lost_timeout: float | None,
        on_lost: OnLost,
        server_user: int | str | None,
    ) -> None:
        if kind not in _KINDS:
            raise UsageError(f"kind is one of {', '.join(_KINDS)}, not {kind!r}")
        if on_lost not in _ON_LOST:
            raise UsageError(f"on_lost is one of {', '.join(_ON_LOST)}, not {on_lost!r}")
        if offset < 0 or (length is not None and length < 0):
            raise UsageError("offset and length are numbers of bytes")
        if lost_timeout is not None and lost_timeout <= 0:
            raise UsageError("lost_timeout is a positive number of seconds, or None")
        if timeout is not None and timeout < 0:
            raise UsageError("timeout is a number of seconds, or None")
        flags = _KINDS[kind]
        if writable:
            flags |= lib.AU_ATTACH_WRITABLE
        if background:
            flags |= lib.AU_ATTACH_BACKGROUND
        if user_mode_only is not None:
            flags |= lib.AU_ATTACH_USER_MODE_ONLY if user_mode_only else lib.AU_ATTACH_ALL_FAULTS
        if server_user is not None:
            flags |= lib.AU_ATTACH_SERVER_USER
        self._server_user = 0 if server_user is None else user_id(server_user) & 0xFFFFFFFF
        self._path = os.fspath(path)
        self._name = name or ""
        self._offset, self._wanted = offset, length
        self._flags: int = flags
        self._timeout = -1 if timeout is None else int(min(timeout, _LONGEST) * 1000)
        self._lost = 0 if lost_timeout is None else max(1, int(min(lost_timeout, _LONGEST) * 1000))
        self._on_lost = _ON_LOST[on_lost]
        self._writable = writable
        self._lock = threading.Lock()
        # Attempts to open that are under way, for `close` to end. Has a lock of its own.
        self._attempts: set[_Cancel] = set()
        self._opening: Once[None] = Once("attaching", abandon=True)
        self._ending: Once[None] = Once("closing an attachment", keep_failure=True)
        self._memory: _Memory | None = None
        self._buffer: Any = None
        self._view: memoryview | None = None
        # What was closed while somebody held it.
        self._left: weakref.ref[_Memory] | None = None
        self._forced = False
        self._length = self._object_size = 0
        self._user_mode_only = False
        self._closed = False
        self._pid = os.getpid()

    # ---------------------------------------------------------------- opening

    def open(self) -> Attachment:
        """Connect and map; what ``with`` does. Blocks. Idempotent; what has failed can be tried
        again.

        Raises FileNotFoundError (no such socket, or object), ConnectionRefusedError,
        PermissionError, UnsupportedError, SourceError (the server cannot have the object now),
        UsageError, PeerError, ClosedError (also when it is closed meanwhile), or another OSError.
        """
        self._open(_Cancel())
        return self

    def _open(self, cancel: _Cancel) -> None:
        self._attempts.add(cancel)
        try:
            if not self._closed:  # else `close` may not have seen this attempt
                self._open_until(cancel)
        finally:
            self._attempts.discard(cancel)
            cancel.close()
        if self._closed:
            raise ClosedError("the attachment is closed")

    def _open_until(self, cancel: _Cancel) -> None:
        with self._lock:
            if self._closed or cancel.called:
                return
            if self._memory is not None:
                return
            if self._wanted == 0:
                raise UsageError("a length of 0 bytes", hint="None is up to the end")
            code, text = ffi.new("int *"), ffi.new("char[]", _TEXT)
            while True:
                native = lib.au_attach_open(
                    os.fsencode(self._path),
                    self._name.encode(),
                    self._offset,
                    self._wanted or 0,
                    self._flags,
                    self._server_user,
                    self._timeout,
                    cancel.fd,
                    self._lost,
                    self._on_lost,
                    code,
                    text,
                    _TEXT,
                )
                # A signal came: on the way to here its handler has run, and may have raised.
                if native != ffi.NULL or code[0] != errno.EINTR:
                    break
            if native == ffi.NULL:
                if self._closed or cancel.called:
                    return
                raise self._error(code[0], ffi.string(text).decode(errors="replace"))
            self._memory = _Memory(native)
            self._length, self._object_size = native.length, native.object_size
            self._user_mode_only = bool(native.user_mode_only)
            if self._length:
                # Views keep the buffer alive, that this, and this the memory.
                start = ffi.gc(ffi.cast("uint8_t *", native.address), _Holder(self._memory))
                self._buffer = ffi.buffer(start, self._length)
                view = memoryview(self._buffer)
            else:
                view = memoryview(b"")
            self._view = view if self._writable else view.toreadonly()

    def _error(self, code: int, text: str) -> Exception:
        message = f"cannot attach to {self._path}: {text or os.strerror(code)}"
        match code:
            case errno.ENOENT:
                return FileNotFoundError(code, text, self._path)
            case errno.ECONNREFUSED:
                return ConnectionRefusedError(code, text, self._path)
            case errno.EACCES | errno.EPERM:
                return PermissionError(code, text, self._path)
            case errno.EOPNOTSUPP:
                return UnsupportedError(message, errno=code)
            case errno.EPROTO:
                return PeerError(message)
            case errno.EAGAIN | errno.ESTALE:
                return SourceError(message, errno=code, transient=code == errno.EAGAIN)
            case errno.EINVAL | errno.ERANGE | errno.ENAMETOOLONG:
                return UsageError(message)
            case errno.EDEADLK:
                return UsageError(
                    message, hint="the server has to be another process; see aiouffd.open here"
                )
        return OSError(code, text, self._path)

    async def aopen(self) -> Attachment:
        """As `open`, without blocking the loop. Cancelling it ends the attempt, unless others wait
        for it too. On one loop at a time."""
        if self._closed:
            raise ClosedError("the attachment is closed")
        try:
            await self._opening(self._aopen, self._undo)
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise
            raise ClosedError("the attachment was closed while it opened") from None
        return self

    async def _aopen(self) -> None:
        cancel = _Cancel()
        try:
            opening = in_thread(lambda: self._open(cancel), "aiouffd-attach")
        except BaseException:
            cancel.close()
            raise
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            cancel()
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                await self._undo()
            raise

    async def _undo(self) -> None:
        """Let go of what was opened for nobody. It can be opened again."""
        await in_thread(functools.partial(self._release, True), "aiouffd-attach")

    def __enter__(self) -> Attachment:
        return self.open()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __await__(self) -> Generator[Any, None, Attachment]:
        return self.aopen().__await__()

    async def __aenter__(self) -> Attachment:
        return await self.aopen()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    # ------------------------------------------------------------- the memory

    def _open_memory(self) -> _Memory:
        """The memory, or why there is none. While somebody has it, it stays."""
        if self._pid != os.getpid():
            raise ClosedError(
                "the attachment belongs to the parent process",
                hint="such memory is not inherited by fork; attach again in the child",
            )
        memory = self._memory
        if self._closed:
            raise ClosedError("the attachment is closed")
        if memory is None:
            raise UsageError(
                "the attachment is not open", hint="with aiouffd.attach(...) as memory"
            )
        return memory

    @property
    def view(self) -> memoryview:
        """The memory, a memoryview of bytes, read-only unless ``writable``. Touching it fetches."""
        self._open_memory()
        view = self._view
        assert view is not None
        # A new one each time: ours is released by `close`, theirs are theirs.
        return view[:]

    def _export(self) -> memoryview:
        """PEP 688 (Python 3.12): it can itself be given to numpy and others."""
        return self.view

    @property
    def address(self) -> int:
        """Address of the first byte, aligned to a page."""
        return int(self._open_memory().native.address)

    def __len__(self) -> int:
        return self._length

    @property
    def object_size(self) -> int:
        """Bytes of the whole object."""
        return self._object_size

    @property
    def user_mode_only(self) -> bool:
        """True if system calls on missing pages fail with EFAULT; `fetch` before them."""
        return self._user_mode_only

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def connected(self) -> bool:
        """Whether a server is there now."""
        memory = self._open_memory()
        return bool(lib.au_attach_connected(memory.native))

    @property
    def resumed(self) -> int:
        """How many times a server was lost and another one has taken over."""
        memory = self._open_memory()
        return lib.au_attach_resumed(memory.native)

    def _copy_out(self, offset: int, length: int) -> bytes:
        memory = self._open_memory()
        # Fresh, and seen by nobody else until it is filled.
        data = bytes(length)
        if length:
            self._wait_for(memory, offset, length)
            where = ffi.new("uint64_t *")
            target = ffi.from_buffer(data)
            self._check(lib.au_attach_read(memory.native, offset, target, length, where), where[0])
        return data

    @staticmethod
    def _wait_for(memory: _Memory, offset: int, length: int) -> None:
        """Let signal handlers run meanwhile."""

        def touch(where: Uint64s) -> None:
            lib.au_attach_touch(memory.native, offset, length, where)  # which keeps it

        if offset + length <= memory.native.length:
            guarded.wait_for(memory.native.address + offset, length, touch)

    def fetch(self, offset: int = 0, length: int | None = None) -> None:
        """Have bytes brought, all by default, and wait for it without the GIL.

        In a coroutine: ``await asyncio.to_thread(memory.fetch, offset, length)``. Raises
        SourceError, ClosedError, UsageError.
        """
        memory = self._open_memory()
        if length is None:
            length = self._length - offset
        if offset < 0 or length < 0 or offset + length > self._length:
            raise UsageError(f"{length} bytes at {offset} are not within {self._length} bytes")
        if length:
            self._wait_for(memory, offset, length)
            where = ffi.new("uint64_t *")
            self._check(lib.au_attach_touch(memory.native, offset, length, where), where[0])

    def discard(self, offset: int, length: int) -> None:
        """Forget whole pages: they read as zeros from now on, also for a server that comes later.

        ``offset`` and ``length`` are multiples of the page size. Waits until a server has
        heard of it. As ``madvise(MADV_DONTNEED)``, but nothing comes back if the server dies
        meanwhile. Raises UsageError, ClosedError, OSError.
        """
        memory = self._open_memory()
        if offset < 0 or length < 0:
            raise UsageError("offset and length are numbers of bytes")
        result = lib.au_attach_discard(memory.native, offset, length) if length else 0
        if result == -errno.EINVAL:
            raise UsageError(
                f"{length} bytes at {offset} are not whole pages of the {self._length} bytes"
            )
        self._check(result, offset)

    def _check(self, result: int, where: int) -> None:
        match -result:
            case 0:
                return
            case errno.EIO:
                raise SourceError(
                    f"byte {where} could not be read: the server cannot have it, or is gone",
                    transient=False,
                )
            case errno.EBADF:
                raise ClosedError("the attachment was closed while a thread waited for it")
        raise OSError(-result, os.strerror(-result))

    # --------------------------------------------------------------- the end

    def close(self, *, force: bool = False) -> None:
        """Done with the methods, and with the server when nobody holds the memory. Idempotent.

        Memory that a view, or an array made of one, still holds goes on being served, and threads
        that wait get their bytes; the last one to let go ends the rest. With ``force`` it ends now:
        what is there can be read, the rest is SIGBUS, for who waits as well; never zeros. The same,
        as a ClosedError, for calls that wait when there are no views. Blocks until the server has
        let go, if it is to: 5 seconds at most.
        """
        if self._pid != os.getpid():
            self._closed = True  # without the lock, which somebody may have held as it forked
            return
        self._closed = True
        for attempt in list(self._attempts):
            attempt()
        self._release(force)

    def _release(self, force: bool) -> None:
        """Have the server let go of the memory, unless somebody holds it. Blocks."""
        with self._lock:  # which attempts have until their end
            memory, self._memory = self._memory, None
            view, self._view = self._view, None
            buffer, self._buffer = self._buffer, None
            if memory is None:
                memory = None if self._left is None else self._left()
                if memory is None or not force:
                    return
            # Views made of ours keep the buffer; it would be missed if ours did.
            held = None if buffer is None else weakref.ref(buffer)
            if view is not None:
                with contextlib.suppress(BufferError):  # released by who uses it
                    view.release()
            del view, buffer
            if force or held is None or held() is None:
                lib.au_attach_refuse(memory.native)
            else:
                self._left = weakref.ref(memory)
            # Whoever is the last to let go of this ends the memory; without views, that is here.
            del memory

    async def aclose(self, *, force: bool = False) -> None:
        """As `close`, without blocking the loop. Ends an `aopen` that is under way."""
        self._closed = True
        self._forced = self._forced or force
        await self._ending.surely(self._aclose)
        if force:
            await self._close_elsewhere()

    async def _aclose(self) -> None:
        await self._opening.stop()
        await self._close_elsewhere()

    async def _close_elsewhere(self) -> None:
        close = functools.partial(self.close, force=self._forced)
        try:
            closing = in_thread(close, "aiouffd-attach")
        except RuntimeError:  # no thread is to be had
            close()
            return
        await asyncio.shield(closing)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "not open"
        if not self._closed and self._memory is not None:
            state = f"{self._length} bytes"
        return f"<Attachment {self._path}{' ' + self._name if self._name else ''}: {state}>"


# ------------------------------------------------------------------------- lifetime

_ends: list[bool] = []
#: Everything that is mapped, for a forked child to let go of.
_living: weakref.WeakSet[_Memory] = weakref.WeakSet()


class _Cancel:
    """Ends an attempt, from another thread. The attempt closes the descriptor at its end."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.called = False
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.called = True
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        with self._lock:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


class _Memory:
    """The native side; ends with the last who needs it."""

    __slots__ = ("__weakref__", "native", "pid")

    def __init__(self, native: AttachmentPtr) -> None:
        self.native = native
        self.pid = os.getpid()
        _living.add(self)

    def __del__(
        self,
        lib: Lib = lib,
        getpid: Callable[[], int] = os.getpid,
        ends: list[bool] = _ends,
        finalizing: Callable[[], bool] = sys.is_finalizing,
    ) -> None:
        # At the end threads may still wait for pages: they are left in peace, and end with the
        # process. A forked child has let go of it already.
        if not ends and not finalizing() and self.pid == getpid():
            lib.au_attach_free(self.native)


class _Holder:
    """Keeps the memory for as long as views refer to it; called when there are no more."""

    __slots__ = ("memory",)

    def __init__(self, memory: _Memory) -> None:
        self.memory: _Memory | None = memory

    def __call__(self, _start: Any) -> None:
        self.memory = None


def _after_fork_in_child() -> None:
    # The memory is not here (MADV_DONTFORK), but descriptors are, which act on the parent.
    for memory in list(_living):
        lib.au_attach_forked(memory.native)


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_ends.append, True)
