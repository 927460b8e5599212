"""Regions and faults: a mapping that fills itself, seen from Python.

A `Region` is made by `Pager.map`. Who brings its bytes is either a handler
(`Region.on_missing`, one `Fault` at a time) or, one layer up, a lazy buffer.
Everything that installs goes through `Region.install`: one native call that marks
the pages, issues the ioctl, settles the pages and wakes (see ``native/install.c``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ClosedError, KernelError, UsageError
from ..kernel.abi import Feature
from ..kernel.errnos import lacking_error
from ..kernel.lib import ffi, lib, pin
from ..kernel.results import unpack
from .exports import Exports
from .fault import BlockSink, Errors, Handler, Kind
from .handlers import HandlerSink

if TYPE_CHECKING:
    from ..kernel.calls import Lib
    from ..kernel.calls.engine import EnginePtr, RegionPtr
    from ..kernel.calls.pointers import Bytes
    from .pager import Pager

__all__ = ["Region"]

KINDS: dict[str, int] = {
    "anonymous": lib.AU_KIND_ANONYMOUS,
    "memfd": lib.AU_KIND_MEMFD,
    "hugetlb": lib.AU_KIND_HUGETLB,
    "hugetlb-memfd": lib.AU_KIND_HUGETLB_MEMFD,
}
#: What the kernel must have for kinds that not all have, see `register_memory` in native/region.c.
_NEEDED: dict[str, Feature] = {
    "memfd": Feature.MISSING_SHMEM | Feature.MINOR_SHMEM,
    "hugetlb": Feature.MISSING_HUGETLBFS,
    "hugetlb-memfd": Feature.MISSING_HUGETLBFS | Feature.MINOR_HUGETLBFS,
}

_COPY: int = lib.AU_OP_COPY
_ZERO: int = lib.AU_OP_ZERO
_POISON: int = lib.AU_OP_POISON
_CONTINUE: int = lib.AU_OP_CONTINUE
_MOVE: int = lib.AU_OP_MOVE
_ANY_GENERATION = 2**64 - 1

_HINTS = {
    errno.EAGAIN: "mappings keep changing; try again",
    errno.ESTALE: "the page was removed after the fault; the toucher asks again if it still waits",
    errno.EINVAL: "whole pages inside the region, from memory that is not lazy itself",
    errno.ENOMEM: "out of memory; for huge pages see vm.nr_hugepages",
    errno.ENOSPC: "too many errors amid other pages, for a kernel before Linux 6.6; they wait",
    errno.ENOENT: "the memory was unmapped or unregistered behind the region",
}


class Region:
    """A mapping that fills itself. Made by `Pager.map`; usable from any thread where it says so.

    ``address``, ``length`` and ``page_size``, ``block_size`` are in bytes; ``length`` is what was
    asked for, the mapping is rounded up to whole pages.
    """

    def __init__(
        self,
        pager: Pager,
        length: int,
        *,
        kind: Kind,
        block_size: int | None,
        writable: bool,
        report_hits: bool,
        serve_children: bool = False,
    ) -> None:
        if kind not in KINDS:
            raise UsageError(f"unknown kind of memory {kind!r}", hint=f"one of {', '.join(KINDS)}")
        if length <= 0:
            raise UsageError(f"a region needs a length of at least one byte, not {length}")
        options = lib.AU_REGION_WRITABLE if writable else 0
        options |= lib.AU_REGION_REPORT_HITS if report_hits else 0
        if serve_children:
            options |= lib.AU_REGION_SERVE
            options |= lib.AU_REGION_USER_MODE if pager.user_mode_only else 0
        error = ffi.new("int *")
        engine = pager._engine
        assert engine is not None  # of an open pager
        native = lib.au_region_create(engine, length, KINDS[kind], options, block_size or 0, error)
        if native == ffi.NULL:
            if error[0] == errno.EINVAL:
                hint = "use kind='anonymous', or run a newer kernel"
                needed = _NEEDED.get(kind, Feature(0))
                if lacking := lacking_error(f"{kind} memory", needed, pager.uffd.available, hint):
                    raise lacking
                raise UsageError(
                    f"cannot map {length} bytes of {kind} memory in blocks of {block_size}",
                    hint="the block size is a power of two and at least one page",
                )
            raise KernelError(
                f"cannot map {length} bytes of {kind} memory: {os.strerror(error[0])}",
                errno=error[0],
                hint="reserve huge pages with vm.nr_hugepages" if "huge" in kind else None,
            )
        # Weak, so that a pager nobody holds is noticed; its regions are closed with it.
        self._pager = weakref.ref(pager)
        self._pid = os.getpid()
        self._writable = writable
        # The export that `view` gives out, as long as anybody has it.
        self._exported: weakref.ref[Any] | None = None
        self._exports = Exports()
        # `close` was called; and then, when nobody held the memory any more, it was closed.
        self._released = self._closed = False
        self._keep: Any = None
        self._sink: BlockSink | None = None
        #: What becomes of a block whose handler fails, and its time limit in seconds.
        self.errors: Errors = "hard"
        self.deadline: float | None = None
        self.id: int = native.id
        #: With ``serve_children`` a number that no other region of the process ever has.
        self.serial: int = native.serial
        self.kind: Kind = kind
        self.address: int = native.start
        self.length = length
        self.page_size: int = native.page_size
        self.block_size: int = native.block_size
        self.blocks: int = native.blocks
        self.mapped_length: int = native.length
        self._where = ffi.new("uint64_t *")
        # The struct and the mapping are freed when nobody refers to them any more: this
        # region while it is open, calls under way in other threads, and exports.
        self._native: RegionPtr | None = ffi.gc(native, _Unmapper(self._pid, engine))

    def call(self, name: str) -> None:
        """How to call its contents where a thread that waits for them is spoken of."""
        lib.au_engine_name(self._open_native(), name.encode(errors="replace"))

    # ------------------------------------------------------------------ views

    @property
    def pager(self) -> Pager:
        """The pager that serves the region. ClosedError when it is gone."""
        pager = self._pager()
        if pager is None:
            raise ClosedError("the pager of this region is gone")
        return pager

    @property
    def closed(self) -> bool:
        """Whether `close` was called. Memory that somebody holds is served nevertheless."""
        return self._closed or self._released

    def _check_open(self) -> None:
        if self._closed or self._released:
            raise ClosedError("the region is closed")

    @property
    def view(self) -> memoryview:
        """The memory, as one memoryview of bytes; touching it is what makes faults.

        Views, and slices and arrays made of them, keep the memory alive and served after
        `close`. Read-only unless the region is writable. Any thread.
        """
        view = self._export()
        return view if self._writable else view.toreadonly()

    def _export(self) -> memoryview:
        """As `view`, but it calls itself writable, whatever the memory is."""
        exported = None if self._exported is None else self._exported()
        self._check_open()
        native = self.check_touchable()
        if exported is None:
            # While somebody holds the memory its pager has to be there to serve it.
            exported = self._exports.add(
                ffi.cast("char *", self.address), self.length, native, self._pager()
            )
            self._exported = weakref.ref(exported)
        return memoryview(exported)

    @property
    def held_at(self) -> list[str]:
        """Where the views that still exist were taken: ``file:line``. Any thread."""
        return self._exports.places

    def fileno(self) -> int:
        """The descriptor of a memfd region, for filling its page cache before `continue_`."""
        descriptor: int = self._open_native().memfd
        if descriptor < 0:
            raise UsageError(f"{self.kind} memory has no descriptor", hint="map kind='memfd'")
        return descriptor

    # -------------------------------------------------------------- resolving

    def install(
        self, offset: int, data: Any, *, heal: bool = False, generation: int | None = None
    ) -> int:
        """Install ``data`` at byte ``offset`` (a multiple of the page size); wakes who waits.

        ``data`` is any contiguous buffer that is not lazy memory; it ends at a page boundary
        or at the region's end, where the rest of the last page becomes zero. Pages that are
        there already are skipped; ``heal`` replaces poisoned ones. With ``generation`` (from
        `Fault.generation`) nothing is done if the block's pages changed since. One native
        call without the GIL; any thread. Returns the bytes settled, all of them.
        Raises UsageError, ClosedError, or KernelError with ``done`` when less was possible.
        """
        # bytes go as they are; from_buffer costs as much as the rest of the call.
        source = data if type(data) is bytes else ffi.from_buffer("uint8_t[]", data)
        try:
            return self._apply(_COPY, offset, source, len(source), heal, generation)
        except BaseException:
            # The traceback would keep it: see `pin`.
            if source is not data:
                ffi.release(source)
            raise

    def install_from(self, offset: int, pointer: Bytes, length: int) -> int:
        """As `install` with ``heal``, of ``length`` bytes at a cffi pointer to memory that is not
        lazy; for callers that keep one to a buffer of theirs."""
        return self._apply(_COPY, offset, pointer, length, True, None)

    def move_in(self, offset: int, address: int, length: int) -> int:
        """As `install`, from private anonymous memory at ``address`` that is given away.

        Huge pages that match are moved instead of copied (UFFDIO_MOVE, 6.8), which leaves a
        hole at ``address``; else its bytes are copied. ``length`` in whole pages.
        """
        return self._apply(_MOVE, offset, ffi.cast("uint8_t *", address), length, True, None)

    def zero(self, offset: int, length: int, *, heal: bool = False) -> int:
        """Fill whole pages with zeros. Arguments and errors as `install`."""
        return self._apply(_ZERO, offset, ffi.NULL, length, heal, None)

    def poison(self, offset: int, length: int) -> int:
        """Make touches of the pages that are missing fail. `install` with ``heal`` undoes it."""
        return self._apply(_POISON, offset, ffi.NULL, length, False, None)

    def continue_(self, offset: int, length: int) -> int:
        """Map pages that are in the page cache of a memfd region."""
        return self._apply(_CONTINUE, offset, ffi.NULL, length, False, None)

    def _apply(
        self, op: int, offset: int, source: Bytes, length: int, heal: bool, generation: int | None
    ) -> int:
        native = self._native
        if native is None:
            raise ClosedError("the region is closed")
        done = lib.au_region_put(
            native,
            op,
            offset,
            source,
            length,
            heal,
            _ANY_GENERATION if generation is None else generation,
        )
        if done < 0:
            done, code = unpack(done)
            self._raise(code, done, offset, length)
        return done

    def _raise(self, code: int, done: int, offset: int, length: int) -> None:
        message = f"cannot install {length} bytes at offset {offset} of {self!r}"
        if code == errno.EBADF:
            raise ClosedError("the region is closed")
        if code == errno.EINVAL:
            raise UsageError(message, hint=_HINTS[code])
        raise KernelError(message, errno=code, done=done, hint=_HINTS.get(code))

    async def install_async(
        self, offset: int, data: Any, *, heal: bool = False, patience: float | None = None
    ) -> None:
        """As `install`, but waits and tries again while mappings change (EAGAIN): for ``patience``
        seconds at most, or as long as it takes."""
        view = memoryview(data)
        pause = 0.001
        limit = None if patience is None else time.monotonic() + patience
        while True:
            try:
                self.install(offset, view, heal=heal)
                return
            except KernelError as error:
                late = limit is not None and time.monotonic() > limit
                if error.errno != errno.EAGAIN or late:
                    raise
                offset += error.done
                view = view[error.done :]
                if not view.nbytes:
                    return
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)

    def drop(self, offset: int, length: int) -> None:
        """Forget whole pages: the next touch brings them anew. Any thread but the loop's."""
        result = lib.au_region_drop(self._open_native(), offset, length)
        if result:
            self._raise(-result, 0, offset, length)

    # ------------------------------------------------------------ page states

    def _open_native(self) -> RegionPtr:
        native = self._native
        if native is None:
            raise ClosedError("the region is closed")
        self._check_process()
        return native

    def check_touchable(self) -> RegionPtr:
        """The native region, if this process may touch the memory: the one that made it, and
        children that it was left to. Raises ClosedError."""
        native = self._native
        if native is None:
            raise ClosedError("the region is closed")
        if self._pid != os.getpid():
            inherited = lib.au_region_inherited(native)
            if inherited < 0 and self.serial:
                raise ClosedError(
                    "this process has no access to the region of its parent",
                    hint="it was closed, or handing it over failed, which stderr tells",
                )
            if inherited <= 0:
                self._check_process()
        return native

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ClosedError(
                "the region belongs to the parent process",
                hint="lazy memory is not inherited by fork; open it again in the child",
            )

    def _settled(self, offset: int, length: int) -> bool:
        native = self._native
        if native is None:
            return True
        result = lib.au_region_check(native, offset, length, self._where)
        if result == -errno.EIO:
            # The first page that is not there is poisoned; of the others this says nothing.
            length = min(length, self.mapped_length - offset)
            return all(state != "missing" for _, _, state in self.runs(offset, length))
        return bool(result)

    def is_resident(self, offset: int, length: int) -> bool:
        """Whether every page of the range is there."""
        where = ffi.new("uint64_t *")
        return lib.au_region_check(self._open_native(), offset, length, where) == 1

    def touch(self, offset: int, length: int) -> bool:
        """Touch every page of the range, and wait for it without the GIL. False if one of them is
        an error. Any thread; not the one that has to serve it."""
        where = ffi.new("uint64_t *")
        return lib.au_region_touch(self._open_native(), offset, length, where) == 0

    @property
    def resident_bytes(self) -> int:
        return lib.au_region_present(self._open_native()) * self.page_size

    @property
    def poisoned_bytes(self) -> int:
        return lib.au_region_poisoned(self._open_native()) * self.page_size

    @property
    def touched_blocks(self) -> int:
        """Blocks that a thread had to wait for at least once."""
        return lib.au_region_touched(self._open_native())

    def runs(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int, str]]:
        """``(offset, length, state)`` of runs of pages: "missing", "resident" or "poisoned"."""
        end = self.mapped_length if length is None else offset + length
        if not 0 <= offset <= end <= self.mapped_length:
            raise UsageError(f"range {offset}..{end} is not within the region")
        starts, lengths = ffi.new("uint64_t[512]"), ffi.new("uint64_t[512]")
        states, after = ffi.new("uint8_t[512]"), ffi.new("uint64_t *")
        found: list[tuple[int, int, str]] = []
        names = {lib.AU_PAGE_PRESENT: "resident", lib.AU_PAGE_POISONED: "poisoned"}
        native = self._open_native()
        while offset < end:
            count = lib.au_region_runs(
                native, offset, end - offset, starts, lengths, states, 512, after
            )
            for i in range(count):
                name = names.get(states[i], "missing")
                if found and found[-1][2] == name:
                    found[-1] = (found[-1][0], found[-1][1] + lengths[i], name)
                else:
                    found.append((starts[i], lengths[i], name))
            offset = after[0]
        return found

    def begin(self, first: int, count: int, *, heal: bool = False) -> list[int]:
        """Take over the fetch of those of ``count`` blocks that are neither there nor under way."""
        taken = ffi.new("uint8_t[]", count)
        if lib.au_region_begin(self._open_native(), first, count, heal, taken) <= 0:
            return []
        flags = bytes(ffi.buffer(taken))
        return [first + i for i in range(count) if flags[i]]

    def end(self, first: int, count: int, *, keep_wanted: bool = False) -> list[int]:
        """Give up the fetch of blocks; returns those that threads wait for.

        They are woken and will fault again, or stay yours with ``keep_wanted``.
        """
        wanted = ffi.new("uint8_t[]", count)
        if lib.au_region_end(self._open_native(), first, count, keep_wanted, wanted) <= 0:
            return []
        flags = bytes(ffi.buffer(wanted))
        return [first + i for i in range(count) if flags[i]]

    # --------------------------------------------------------------- handlers

    def on_missing(self, handler: Handler | None = None, *, portable: bool = False) -> Any:
        """Serve the region with ``handler``, a coroutine function of one `Fault`; a decorator.

        It runs on the pager's loop, many at a time. ``portable=True`` says that it uses
        nothing bound to that loop, so that it may also run on the rescue loop when the
        pager's cannot come; without, a touch from the loop's own thread ends in an error
        (SIGBUS) after the pager's ``rescue_deadline``.

        When it raises, returns with the fault unresolved, or takes longer than the region's
        deadline: the loop's exception handler is told, and then ``errors="hard"`` calls it
        again after a growing pause, ``errors="soft"`` poisons the block.
        """
        if handler is None:
            return lambda function: self.on_missing(function, portable=portable)
        if self._sink is not None:
            raise UsageError("the region has a handler already")
        self._sink = HandlerSink(self, handler, portable)
        return handler

    def serve_from(self, data: Any) -> None:
        """Serve the region from memory of this process, without Python: ``data`` holds it all.

        Faults are resolved in the native core, also when no loop can run.
        """
        native = self._open_native()
        pointer, view = pin(data)
        if lib.au_region_set_backing(native, pointer, view.nbytes):
            view.release()  # the traceback would keep it
            raise UsageError(
                "cannot serve from this memory", hint="as long as the region, and not lazy itself"
            )
        self._keep = view
        self.pager._native_only()

    # ------------------------------------------------------------------ close

    def close(self, *, force: bool = False) -> None:
        """Done with the region. Idempotent; from the loop's thread.

        Memory that nobody holds is unmapped at once. As long as a view, or an array made of one,
        exists, its memory goes on being served, and threads that wait get their pages; the
        last one to go ends it. With ``force`` it ends now: what is missing raises SIGBUS
        (EFAULT in system calls), for threads that wait as well; never zeros.
        """
        if self._closed:
            return
        if force or self._pid != os.getpid():
            self._shut()
        elif not self._released:
            self._released = True
            self._exports.end(self._let_go)

    def _let_go(self) -> None:
        """The last export has gone, in whatever thread."""
        pager = self._pager()
        if pager is None or pager.on_its_thread:
            self._shut()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            pager._loop.call_soon_threadsafe(_Errand(self._shut))

    def _shut(self) -> None:
        """Stop serving, whoever holds the memory: see `close`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._pid != os.getpid():
            return
        if self._sink is not None:
            self._sink.close()
        self._exports.end(_nothing)
        # What is held stays mapped until its exports are gone.
        native, self._native = self._native, None
        assert native is not None
        lib.au_region_close(native, not self._exports.held)
        self._sink = self._keep = None
        pager = self._pager()
        if pager is not None:
            pager._forget(self)

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<Region {self.id}: {self.length} bytes of {self.kind} at {self.address:#x}{state}>"


def _nothing() -> None:
    pass


class _Errand:
    """A callback for a loop. A loop that is closed, now or before it comes to that, lets go of it,
    and then it is called all the same."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()

    __del__ = __call__


class _Unmapper:
    """Destructor of a native region. Must not refer to the Region."""

    __slots__ = ("engine", "pid")

    def __init__(self, pid: int, engine: EnginePtr) -> None:
        self.pid = pid
        self.engine = engine  # has to outlive its regions

    def __call__(self, native: RegionPtr, lib: Lib = lib, getpid: Any = os.getpid) -> None:
        # A forked child has no such mapping, but may have another one at its address.
        if self.pid == getpid():
            lib.au_region_close(native, 1)
            lib.au_region_free(native)
