"""The pager: one userfaultfd on one event loop, and the regions that it serves.

Per wake-up of the loop there is one native call, `au_engine_drain`, which reads every
message, folds duplicates and returns only blocks that nobody fetches yet.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import struct
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ClosedError, UsageError
from ..kernel.abi import Feature
from ..kernel.lib import ffi, lib
from ..kernel.messages import EngineEnd
from ..kernel.uffd import Userfaultfd
from ..util.keywords import seconds, size_in_bytes
from ..util.usercode import tell_loop
from ..util.waiting import call_soon_at
from .fault import Errors, Kind
from .region import Region
from .rescue import service

if TYPE_CHECKING:
    from ..kernel.calls.engine import EnginePtr

__all__ = ["Pager"]

log = logging.getLogger("aiouffd")

_MISS: int = lib.AU_ENTRY_MISS
_HIT: int = lib.AU_ENTRY_HIT
_LOOP: int = lib.AU_DRAIN_LOOP
_RESCUE: int = lib.AU_DRAIN_RESCUE
#: Messages that are taken at a time. Threads beyond that are served in the kernel's order, which is
#: not fair.
_BATCH = 512

#: Moved mappings are told of so that they stay registered: so do error pages heal.
_FEATURES = Feature.THREAD_ID | Feature.EVENT_REMAP

#: After so many batches of duplicates in a row the loop leaves the descriptor to the sentry...
FLOOD_BATCHES = 4
#: ...for so many seconds.
FLOOD_PAUSE = 0.005

# struct au_entry with a page fault in it: one call instead of one per field.
_ENTRY = struct.Struct("@IIQII8xQQ8x")
_ENTRY_SIZE: int = ffi.sizeof("struct au_entry")
assert _ENTRY.size == _ENTRY_SIZE

_shared = lib.au_shared


class Pager:
    """Serves page faults of this process on the running event loop.

    ::

        async with aiouffd.Pager() as pager:
            region = pager.map(1 << 20)

            @region.on_missing
            async def serve(fault: aiouffd.Fault) -> None:
                fault.copy(await fetch(fault.offset, fault.length))

    Not thread-safe but for `Region` methods that say so. One loop; several pagers per loop and
    several loops per process are fine.

    Args:
        user_mode_only: True makes a descriptor that sees faults of user mode only, which needs no
            privilege; system calls on missing pages then fail with EFAULT. None (the default) tries
            to see all faults and falls back to that. See `user_mode_only`.
        max_in_flight: Handlers that run at a time, per region.
        grace: Seconds that the sentry leaves a waiting thread alone.
        patience: Seconds without an answer after which a loop counts as stuck, and its faults go to
            the rescue loop.
        stall: Seconds without any progress after which a toucher gets an error.
        rescue_deadline: Seconds after which a touch that only a stuck loop could serve gets an
            error.
        strict: A touch from the loop's own thread ends the process with a traceback instead of
            being served by the rescue loop.
    """

    def __init__(
        self,
        *,
        user_mode_only: bool | None = None,
        max_in_flight: int = 256,
        grace: float = 50e-6,
        patience: float = 0.05,
        stall: float = 10.0,
        rescue_deadline: float = 5.0,
        strict: bool = False,
    ) -> None:
        if max_in_flight < 1:
            raise UsageError("max_in_flight is at least 1")
        if min(grace, patience, stall, rescue_deadline) < 0:
            raise UsageError("grace, patience, stall and rescue_deadline are seconds, not negative")
        self.max_in_flight = max_in_flight
        self.rescue_deadline = rescue_deadline
        self.strict = strict
        self._wanted_mode = user_mode_only
        self._times = (int(grace * 1e9), int(patience * 1e9), int(stall * 1e9))
        self._uffd: Userfaultfd | None = None
        self._engine: EnginePtr | None = None
        self._pid = os.getpid()
        # `aclose` was called; and then, when nobody held a region any more, it ended.
        self._closed = self._ended = False
        # Whether its own loop is gone, and the rescue loop has taken its place.
        self._orphan = False
        self._drained: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]
        # The loop that it was opened on.
        self._home: asyncio.AbstractEventLoop = None  # type: ignore[assignment]
        self._thread = self._native_thread = 0
        # Where the loop's thread was when it last touched a missing page itself.
        self._rescue_stack: list[tuple[str, int, str]] = []
        self._regions: dict[int, Region] = {}
        self._entries = ffi.new("struct au_entry[]", _BATCH)
        self._entries_view = memoryview(ffi.buffer(self._entries))
        self._rescue_entries: Any = None
        self._paused: asyncio.TimerHandle | None = None
        self._reading = False

    # ----------------------------------------------------------------- opening

    def open(self) -> Pager:
        """Make the descriptor and register it with the running loop. Idempotent.

        Raises UnsupportedError (also a PermissionError where that is the reason), saying what
        was tried.
        """
        if self._closed:
            raise ClosedError("the pager is closed")
        if self._uffd is not None:
            return self
        self._loop = self._home = asyncio.get_running_loop()
        uffd = self._make_uffd()
        error = ffi.new("int *")
        options = lib.AU_ENGINE_OWN | lib.AU_ENGINE_YIELD | lib.AU_ENGINE_REMAPS
        engine = lib.au_engine_create(uffd.fileno(), options, error)
        if engine == ffi.NULL:
            uffd.close()
            raise OSError(error[0], f"cannot start the engine: {os.strerror(error[0])}")
        lib.au_engine_set_times(engine, *self._times)
        self._thread, self._native_thread = threading.get_ident(), threading.get_native_id()
        lib.au_engine_set_loop(engine, self._native_thread)
        uffd._descriptor.fork_handled = uffd._owned = True
        self._uffd, self._engine = uffd, ffi.gc(engine, EngineEnd())
        if not lib.au_sentry_sees():
            warnings.warn(
                "threads that wait for a page cannot be observed, because this process is not "
                "dumpable; a touch with the GIL held ends in an error after a while. After "
                "changing the user call prctl(PR_SET_DUMPABLE, 1), or start the program anew",
                RuntimeWarning,
                stacklevel=3,
            )
        try:
            self._read(True)
            self._loop.add_reader(engine.notify_fd, self._on_readable)
            service.adopt(self)
        except BaseException:
            self._unopen()
            raise
        return self

    def _unopen(self) -> None:
        """Opening failed at its end: as if it had not been begun."""
        uffd, engine = self._uffd, self._engine
        assert uffd is not None
        assert engine is not None
        service.release(self)
        self._loop.remove_reader(engine.notify_fd)
        self._read(False)
        self._uffd = self._engine = None
        lib.au_engine_close(engine)
        uffd.close()

    def _make_uffd(self) -> Userfaultfd:
        if self._wanted_mode is not None:
            return Userfaultfd(_FEATURES, user_mode_only=self._wanted_mode)
        try:
            return Userfaultfd(_FEATURES)
        except PermissionError:
            return Userfaultfd(_FEATURES, user_mode_only=True)

    async def __aenter__(self) -> Pager:
        return self.open()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called. What is held of its regions is served nevertheless."""
        return self._closed

    @property
    def on_its_thread(self) -> bool:
        """Whether this is the thread of its loop."""
        return threading.get_ident() == self._thread

    @property
    def user_mode_only(self) -> bool:
        """True if system calls on missing pages fail with EFAULT instead of waiting for them."""
        return bool(self._open_uffd().user_mode_only)

    @property
    def uffd(self) -> Userfaultfd:
        """The descriptor below; leave registering and resolving to the regions."""
        return self._open_uffd()

    def _open_uffd(self) -> Userfaultfd:
        if self._closed:
            raise ClosedError("the pager is closed")
        if self._pid != os.getpid():
            raise ClosedError(
                "the pager belongs to the parent process",
                hint="lazy memory is not inherited by fork; open it again in the child",
            )
        if self._uffd is None:
            raise UsageError("the pager is not open", hint="async with aiouffd.Pager() as pager")
        return self._uffd

    # ----------------------------------------------------------------- regions

    def map(
        self,
        length: int | str,
        *,
        kind: Kind = "anonymous",
        block_size: int | str | None = None,
        writable: bool = True,
        errors: Errors = "hard",
        deadline: float | None = None,
    ) -> Region:
        """A new region of ``length`` bytes whose pages are missing. Sizes may be text: "1 GiB".

        Raises UsageError, KernelError (ENOMEM: no huge pages), ClosedError. Loop thread.

        Args:
            kind: "anonymous" (private), "memfd" (shared memory with a descriptor), "hugetlb" or
                "hugetlb-memfd" (2 MiB pages, which must be reserved).
            block_size: Bytes per fault, a power of two and at least a page (the default).
            writable: Whether the program may write; what it writes stays in this memory.
            errors: "hard": a handler that fails is called again, for ever; "soft": the block is
                poisoned.
            deadline: Seconds that a handler may take.
        """
        self._open_uffd()
        if errors not in ("hard", "soft"):
            raise UsageError(f"errors is 'hard' or 'soft', not {errors!r}")
        if deadline is not None:
            seconds("deadline", deadline)
        length = size_in_bytes("length", length)
        if block_size is not None:
            block_size = size_in_bytes("block_size", block_size)
        region = self._map(length, kind=kind, block_size=block_size, writable=writable)
        region.errors, region.deadline = errors, deadline
        return region

    def _map(
        self,
        length: int,
        *,
        kind: Kind = "anonymous",
        block_size: int | None = None,
        writable: bool = True,
        report_hits: bool = False,
        serve_children: bool = False,
    ) -> Region:
        region = Region(
            self,
            length,
            kind=kind,
            block_size=block_size,
            writable=writable,
            report_hits=report_hits,
            serve_children=serve_children,
        )
        self._regions[region.id] = region
        self._native_only()
        return region

    def _forget(self, region: Region) -> None:
        self._regions.pop(region.id, None)
        if self._closed and not self._regions:
            self._end()

    def _read(self, wanted: bool) -> None:
        """Have the loop watch the descriptor, or not."""
        assert self._uffd is not None
        if wanted and not self._reading:
            self._loop.add_reader(self._uffd.fileno(), self._on_readable)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._uffd.fileno())
        self._reading = wanted

    def _native_only(self) -> None:
        """Where all bytes are at hand the sentry serves alone, and the loop sleeps on."""
        if self._paused is None and not self._ended:
            self._read(not self._regions or any(r._keep is None for r in self._regions.values()))

    # ---------------------------------------------------------------- dispatch

    def _on_readable(self) -> None:
        """The loop's reader callback: everything that a fault costs in Python begins here."""
        entries, entries_view = self._entries, self._entries_view
        engine = self._engine
        if engine is None:
            return
        count = lib.au_engine_drain(engine, entries, _BATCH, _LOOP)
        # We hold the GIL, so whoever waits since before does not. (FREE-THREADING)
        _shared.proof = _shared.sequence
        for index in range(count):
            kind, number, block, generation, thread, flags, address = _ENTRY.unpack_from(
                entries_view, index * _ENTRY_SIZE
            )
            self._dispatch(kind, number, block, address, flags, thread, generation)
        if count == _BATCH:
            # Who was served may have faulted again: the loop has other things to do in between.
            self._loop.call_soon(self._read_on)
        if engine.flood > FLOOD_BATCHES and self._paused is None:
            self._pause()

    def _read_on(self) -> None:
        if self._paused is None and not self._ended:
            self._on_readable()

    def _dispatch(
        self,
        kind: int,
        number: int,
        block: int,
        address: int,
        flags: int,
        thread: int,
        generation: int,
    ) -> None:
        if kind != _MISS and kind != _HIT:
            log.debug("an event at %#x on %r", address, self)
            return
        region = self._regions.get(number)
        if region is None or region._closed:
            return  # closing: the native side poisons
        if self._orphan:
            self._rescue_block(region, block)
            return
        sink = region._sink
        try:
            if sink is None:
                raise UsageError(
                    f"{region!r} was touched before it had a handler",
                    hint="set region.on_missing before anybody touches it",
                )
            if kind == _HIT:
                sink.hit(block)
            else:
                sink.miss(block, address, flags, thread, generation)
        except Exception as error:
            # The toucher is never lost: it is woken and asks again, a little later.
            tell_loop(self._loop, f"dispatching a fault of {region!r} failed", error)
            self._loop.call_later(0.05, self._hand_back, region, block)

    def _hand_back(self, region: Region, block: int) -> None:
        if not region._closed:
            region.end(block, 1)

    def _pause(self) -> None:
        """A flood of duplicates: let the sentry read them at its pace for a while."""
        self._read(False)
        self._paused = self._loop.call_later(FLOOD_PAUSE, self._resume)

    def _resume(self) -> None:
        self._paused = None
        if not self._ended:
            self._native_only()
            self._on_readable()

    def who_waits(self, region: Region) -> list[tuple[str, int]]:
        """Names of the threads that wait for a page of ``region`` now, and its offset in bytes."""
        engine = self._engine  # which may be gone at the next look
        if engine is None:
            return []
        pages, tids = ffi.new("uint64_t[256]"), ffi.new("uint32_t[256]")
        count = lib.au_engine_blocked(engine, pages, tids, 256)
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        return [
            (names.get(tids[i], str(tids[i])), pages[i] - region.address)
            for i in range(count)
            if region.address <= pages[i] < region.address + region.mapped_length
        ]

    # ------------------------------------------------------------------ rescue

    def _rescue(self) -> list[str]:
        """On the rescue loop: serve what the pager's own loop does not come for.

        Returns what could not be served, for the log.
        """
        engine = self._engine
        if engine is None or self._ended:
            return []
        if self._loop.is_closed():
            self._move(engine)
        if self._rescue_entries is None:
            self._rescue_entries = ffi.new("struct au_entry[]", _BATCH)
            self._rescue_pages = ffi.new("uint64_t[]", 1024)
            self._rescue_tids = ffi.new("uint32_t[]", 1024)
        wanted: dict[tuple[int, int], Region] = {}
        while True:
            count = lib.au_engine_drain(engine, self._rescue_entries, _BATCH, _RESCUE)
            _shared.proof = _shared.sequence
            for index in range(count):
                entry = self._rescue_entries[index]
                region = self._regions.get(entry.region)
                if entry.kind == _MISS and region is not None:
                    wanted[region.id, entry.block] = region
            if count < _BATCH:
                break
        count = lib.au_engine_blocked(engine, self._rescue_pages, self._rescue_tids, 1024)
        for index in range(count):
            page = self._rescue_pages[index]
            for region in list(self._regions.values()):
                if region.address <= page < region.address + region.mapped_length:
                    block = (page - region.address) // region.block_size
                    wanted[region.id, block] = region
        return [
            f"block {block} of {region!r}"
            for (_, block), region in wanted.items()
            if not self._rescue_block(region, block)
        ]

    def _rescue_block(self, region: Region, block: int) -> bool:
        """Whether the rescue loop can serve this."""
        if region._closed:
            return True
        try:
            if region._sink is not None and region._sink.rescue(block):
                return True
        except Exception:
            # Of one block or source; the others are not to wait for it.
            log.debug("rescuing block %d of %r failed", block, region, exc_info=True)
        self._leave_to_loop(region, block)
        return False

    def _move(self, engine: EnginePtr) -> None:
        """On the rescue loop: its own is closed, so this one watches the descriptor from now on.
        Otherwise each fault would have to wait for the patience to pass."""
        self._loop = asyncio.get_running_loop()
        self._thread, self._native_thread = threading.get_ident(), threading.get_native_id()
        self._orphan, self._reading, self._paused = True, False, None
        lib.au_engine_set_loop(engine, self._native_thread)
        self._native_only()
        self._loop.add_reader(engine.notify_fd, self._on_readable)
        if self._ended:
            # By another thread, which has taken leave of the loop that was closed.
            self._leave_loop(engine.notify_fd)

    def _leave_to_loop(self, region: Region, block: int) -> None:
        """Only the pager's loop can serve this: tell it, and set the toucher a deadline."""
        came = threading.Event()
        if not self._orphan:
            call_soon_at(self._loop, self._late_miss, region, block, came)
        asyncio.get_running_loop().call_later(
            self.rescue_deadline, self._rescue_expired, region, block, came
        )

    def _late_miss(self, region: Region, block: int, came: threading.Event) -> None:
        came.set()
        if region._closed or self._settled(region, block):
            return
        if region._sink is None:
            self._hand_back(region, block)  # asked again, and reported then
        else:
            region._sink.late(block)

    def _rescue_expired(self, region: Region, block: int, came: threading.Event) -> None:
        # A loop that came late has it in hand, however long its source takes.
        if region._closed or came.is_set() or self._settled(region, block):
            return
        places = ", ".join(region.held_at) or "nobody, but a thread waits"
        log.error(
            "block %d of %r could not be served in %s s because only the loop of its pager can, "
            "which %s; whoever waits gets an error. The memory is held by: %s. Use a source that "
            "can be cloned (portable=True for an async function). Declare the handler portable, or "
            "do not touch from the loop's thread.",
            block,
            region,
            self.rescue_deadline,
            "is closed" if self._orphan else "does not come",
            places,
        )
        try:
            region.poison(block * region.block_size, self._block_length(region, block))
        except Exception:
            log.exception("poisoning failed")

    @staticmethod
    def _block_length(region: Region, block: int) -> int:
        return min(region.block_size, region.mapped_length - block * region.block_size)

    def _settled(self, region: Region, block: int) -> bool:
        return region._settled(block * region.block_size, self._block_length(region, block))

    # ------------------------------------------------------------------- close

    async def aclose(self, *, force: bool = False) -> None:
        """Done with the pager and all its regions: see `Region.close`. Idempotent.

        Returns at once. Regions that somebody holds are served on, by their handlers on this
        loop while it runs, and the last one to go closes the descriptor; `drained` waits for
        that. With ``force`` all ends now, and threads that wait get SIGBUS.
        """
        self.close(force=force)

    def close(self, *, force: bool = False) -> None:
        """As `aclose`; from the loop's thread."""
        if self._ended:
            return
        self._closed = True
        if self._uffd is None or self._pid != os.getpid():
            self._end()
            return
        for region in list(self._regions.values()):
            region.close(force=force)
        if not self._regions:
            self._end()

    async def drained(self) -> None:
        """Wait until it was closed and nobody holds memory of its regions any more."""
        await asyncio.shield(asyncio.wrap_future(self._drained))

    def _end(self) -> None:
        """There are no regions any more: close the descriptor. Idempotent."""
        if self._ended:
            return
        self._ended = True
        engine, self._engine = self._engine, None
        try:
            if self._uffd is not None:
                assert engine is not None
                service.release(self)
                if self._pid == os.getpid():
                    self._leave_loop(engine.notify_fd)
                    lib.au_engine_close(engine)
                    self._uffd.close()
        finally:
            if not self._drained.done():
                self._drained.set_result(None)

    def _leave_loop(self, notify: int) -> None:
        if not self._loop.is_closed():
            self._read(False)
            self._loop.remove_reader(notify)
            if self._paused is not None:
                self._paused.cancel()

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the end of the interpreter threads that wait are left alone, and end with it.
        if getattr(self, "_uffd", None) is None or self._closed or _finalizing():
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
        finally:  # a filter may make it an error
            self.close(force=True)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._uffd is not None else "not open"
        return f"<Pager {state}, {len(self._regions)} regions>"


class _Shared:
    """The pager that lazy buffers of one loop share: one descriptor, however many buffers."""

    def __init__(self) -> None:
        self._pagers: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[tuple[Any, ...], tuple[Pager, int]]
        ] = weakref.WeakKeyDictionary()

    def acquire(self, user_mode_only: bool | None, strict: bool, native: bool) -> Pager:
        """The pager for buffers with these settings; ``native`` ones have bytes at hand."""
        loop = asyncio.get_running_loop()
        pagers = self._pagers.setdefault(loop, {})
        key = (user_mode_only, strict, native, os.getpid())
        pager, users = pagers.get(key) or (
            Pager(user_mode_only=user_mode_only, strict=strict).open(),
            0,
        )
        pagers[key] = (pager, users + 1)
        return pager

    def release(self, pager: Pager) -> None:
        pagers = self._pagers.get(pager._home, {})
        for key, (candidate, users) in list(pagers.items()):
            if candidate is pager:
                if users > 1:
                    pagers[key] = (pager, users - 1)
                else:
                    del pagers[key]
                    pager.close()


shared_pagers = _Shared()
