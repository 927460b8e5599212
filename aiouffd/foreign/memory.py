"""Serving one userfaultfd of another process.

Here messages are read, events are applied and faults are answered. How pages are put there is the
`Filler`'s business, what no thread waits for the `Bringer`'s.

Facts about the kernel that shape this file (Linux 6.18; all since 4.11):

- Nothing can be filled while an event is unread, see `filling`. So: read everything, apply the
  events, then fill.
- read() hands out page faults before events, whatever came first. A fault may so be older or
  younger than a removal in the same batch; with the removal applied first both get zeros, which is
  what the process could have seen in either case.
- An event is told before it takes effect (REMOVE) or after (the others). A page that is filled
  between the two is dropped again with the rest, and its next touch is another fault.
- Who waits for a page is not woken when the page goes: after UNMAP and REMAP we wake the old range.
- What is much to note down (a madvise over terabytes) is noted in steps, between which others have
  their turn. Meanwhile nothing of this client is read or filled: it waits for what it asked for.
- A forked child has its own descriptor, which comes with the event, and its memory is a copy as of
  the fork. Nothing can be filled between the copying and our reading of the event.

What a blocked thread gets: bytes; zeros where the process dropped the page itself; SIGBUS (or the
end, see ``on_failure`` of `listen`) when the object failed for good; nothing while the object
fails for a time, or while no server runs: it waits. Where the page has no object at all it gets
SIGBUS, or zeros if that is the dialect's rule. It never gets zeros in place of bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ClosedError
from ..fetch.flights import FlightCancelledError
from ..kernel.lib import ffi, lib, pin
from ..kernel.results import unpack
from ..util.pages import PAGE_SIZE
from ..util.tasks import begin
from ..util.usercode import tell_loop
from .areas import INSTALLED, REMOVED, Area, AreaMap
from .bringing import Bringer
from .ending import make_errors, make_errors_now
from .filling import Filler
from .reactor import Reactor, Share
from .reserve import Reserve
from .stats import MemoryStats
from .steps import Steps, at_once

if TYPE_CHECKING:
    from ..kernel.calls.pointers import Bytes
    from .blocks import BlockStore

__all__ = ["Memory", "Uncovered"]

log = logging.getLogger("aiouffd")

Uncovered = Literal["poison", "zero"]

_COPY: int = lib.AU_OP_COPY
_ZERO: int = lib.AU_OP_ZERO
_POISON: int = lib.AU_OP_POISON
_CONTINUE: int = lib.AU_OP_CONTINUE
_PAGEFAULT: int = lib.AU_EVENT_PAGEFAULT
_FORK: int = lib.AU_EVENT_FORK
_REMAP: int = lib.AU_EVENT_REMAP
_REMOVE: int = lib.AU_EVENT_REMOVE
_UNMAP: int = lib.AU_EVENT_UNMAP
_FLAG_WP: int = lib.AU_PAGEFAULT_FLAG_WP
_FLAG_MINOR: int = lib.AU_PAGEFAULT_FLAG_MINOR
_FLAG_RWP: int = lib.AU_PAGEFAULT_FLAG_RWP

#: struct uffd_msg: the event, and three words whose meaning it tells.
_MESSAGE = struct.Struct("=B7xQQQ")
_BATCH = 64
#: Batches read in one go. Threads that wake each other can fault without end.
_BATCHES = 2

#: Batches in a row with nothing but faults that were heard of, and the pause after that: a thread
#: in a system call that has a signal faults over and over until its page comes.
REPEATS, REPEATS_PAUSE = 16, 0.001

#: Work of events (see `AreaMap.work`) that is done before others have their turn; some 0.2 ms.
WORK_MAX = 1 << 18
#: Areas whose threads are woken in one turn of the loop.
WAKES = 512
#: Areas with which messages are answered natively; where there are more, changes cost too much.
AT_HAND_MAX = 512
#: What is mapped again of shared memory at once, in bytes: at most, and where no store tells.
MAP_AGAIN_MAX, BLOCK = 1 << 21, 1 << 16
#: Addresses for which threads wait, or that are to become errors, before the oldest are forgotten:
#: who still waits there asks again.
WAITING_MAX = 1 << 14


class Memory:
    """One address space of another process. Made by `Client.adopt`. One loop; not thread-safe.

    `serve`, `fill`, `lost`, `poison` and `release` are what a subclass may do in a way of its own.
    """

    def __init__(
        self,
        reactor: Reactor,
        fd: int,
        areas: AreaMap,
        *,
        share: Share,
        uncovered: Uncovered = "poison",
        readahead: int = 0,
        page_size: int = PAGE_SIZE,
        name: str = "",
        forked: Callable[[Memory, int], Steps[None]] | None = None,
        gone: Callable[[Memory], None] | None = None,
        failed: Callable[[Memory, BaseException], bool] | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        self.fd = fd
        self.areas = areas
        self.name = name
        self.page_size = page_size
        self.uncovered: Uncovered = uncovered
        self.readahead = readahead
        #: Whether everything is to be brought.
        self.background = False
        self.stats = MemoryStats()
        #: Set once the process has ended or the memory was closed.
        self.ended = asyncio.Event()
        self.share = share
        #: The process has no copy of the descriptor, as forked children have none: with ours the
        #: last one goes, and what is missing would read as zeros. So it becomes errors before.
        self.sole = False
        #: Has the process itself make an error of a page (address, bytes), for kernels before Linux
        #: 6.6. False if it cannot be told now. None: nobody there would understand.
        self.tell_error: Callable[[int, int], bool] | None = None
        #: Pages that its client was charged for it.
        self.charged = 0
        #: While somebody records: (store, block) in the order of their first need.
        self.recording: dict[tuple[BlockStore, int], None] | None = None
        self._reactor = reactor
        self._loop = asyncio.get_running_loop()
        self._messages = ffi.new("struct au_uffd_msg[]", _BATCH)
        self._raw = memoryview(ffi.buffer(self._messages)).cast("B")
        self._answered = ffi.new("uint64_t[2]")
        self._at_hand: Bytes = ffi.NULL
        self._at_hand_version = -1
        self._at_hand_count = 0
        self._at_hand_window = 0
        self._keep: list[Any] = []
        self._wanted: dict[tuple[BlockStore, int], list[int]] = {}
        # Pages that are to become errors, which could not be yet, and why.
        self._owed: dict[int, str] = {}
        # Faults that were read while something was filled.
        self._overheard: dict[int, int] = {}
        self._filler = Filler(self, fd, self.stats)
        self._bringer = Bringer(self, self._filler, areas, self._wanted)
        self._repeated = self._repeats = 0
        self._forked, self._gone, self._failed = forked, gone, failed
        self._reserve = reserve
        self._closed = self._paused = self._muted = False
        # Events that are read and not applied yet, because that takes steps.
        self._backlog: deque[tuple[int, int, int, int]] = deque()
        self._applying: Steps[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._work = 0
        self._zeros: Bytes = ffi.NULL if page_size == PAGE_SIZE else ffi.new("uint8_t[]", page_size)

    # ------------------------------------------------------------------ begin

    def start(self) -> None:
        """Serve from now on. Who waited before we came is woken, and faults again."""
        os.set_blocking(self.fd, False)
        self._muted = False
        self._reactor.add(self)
        self.wake()

    def wake(self) -> None:
        """Have every thread that waits fault again, so that whoever reads next hears of it."""
        self._wake(list(self.areas), 0)

    def _wake(self, areas: list[Area], first: int) -> None:
        """A part now, the others in the next turns of the loop; once too often does no harm."""
        if self._closed:
            return
        for area in areas[first : first + WAKES]:
            lib.au_abi_wake(self.fd, area.start, area.length)
        if first + WAKES < len(areas):
            self._loop.call_soon(self._wake, areas, first + WAKES)

    def fileno(self) -> int:
        return self.fd

    @property
    def closed(self) -> bool:
        return self._closed

    # --------------------------------------------------------------- messages

    def serve_some(self) -> None:
        """Read all that there is to read, then act. Called when the descriptor is readable."""
        self._work = 0
        try:
            self._serve_some()
        except Exception as error:
            self.broken(error)

    def broken(self, error: Exception) -> None:
        """An unexpected exception drops this client, not the server."""
        tell_loop(self._loop, f"{self!r} cannot be served any more", error)
        if not self._closed:
            self._end()

    def _serve_some(self) -> None:
        if self._filler.behind:
            self._filler.press()
            if self._closed or self._off:
                return
        if self._at_hand_version != self.areas.version:
            self._find_at_hand()
        if not self._at_hand_count or self.recording is not None:
            self._serve_new(self.read())
            return
        # Whose bytes are in memory of ours is answered natively, all of a batch in one call.
        count = lib.au_foreign_pump(
            self.fd,
            self._at_hand,
            self._at_hand_count,
            self._at_hand_window,
            self._messages,
            _BATCH,
            self._answered,
            self._answered + 1,
        )
        if self._answered[0]:
            self.stats.faults += self._answered[0]
            self.stats.installed_bytes += self._answered[1]
        if count > 0:
            faults: dict[int, int] = {}
            self._take(self._raw, count, faults)
            faults.update(self.read())
            self._serve_new(faults)
        elif count < 0 and count != -errno.EAGAIN:
            self._serve_new(self.read())

    def _find_at_hand(self) -> None:
        """The areas whose object is memory of this process, for native code."""
        self._at_hand_version = self.areas.version
        self._keep.clear()
        found = []
        for area in self.areas if len(self.areas) <= AT_HAND_MAX else ():
            data = None if area.store is None else area.store.memory
            if data is None or area.offset + area.length > len(data) or area.states is None:
                continue
            piece, *kept = pin(data[area.offset : area.offset + area.length])
            states, *also = pin(area.states)
            self._keep += kept + also
            assert area.store is not None
            self._at_hand_window = area.store.block_size
            found.append((area.start, area.length, area.page_size, piece, states))
        self._at_hand_count = len(found)
        self._at_hand = ffi.new("struct au_foreign_area[]", found)

    def _serve_new(self, faults: dict[int, int]) -> None:
        """Serve, and read less often where all that comes is what was heard already."""
        self._repeated = 0
        self._serve_all(faults)
        self._repeats = self._repeats + 1 if faults and self._repeated == len(faults) else 0
        if self._repeats >= REPEATS and not self._closed and not self._muted and not self._off:
            self._repeats = 0
            self._mute()
            self._loop.call_later(REPEATS_PAUSE, self._unmute)

    def _mute(self) -> None:
        self._reactor.remove(self.fd)
        self._muted = True

    def _unmute(self) -> None:
        if self._muted and not self._closed and not self._off:
            self._muted = False
            try:
                self._reactor.add(self)
            except OSError as error:
                self.broken(error)

    def _serve_all(self, faults: dict[int, int]) -> None:
        for address, flags in faults.items():
            if self._closed or self._off:
                return
            self.serve(address, flags)

    def read(self) -> dict[int, int]:
        """Drain the descriptor and apply the events. Returns addresses of faults, and flags."""
        faults, self._overheard = self._overheard, {}
        for _ in range(_BATCHES):
            if self._closed or self._settling is not None:
                break
            count = lib.au_foreign_read(self.fd, self._messages, _BATCH)
            if count < 0:
                if -count in (errno.EMFILE, errno.ENFILE) and self._reserve is not None:
                    # The event of a fork waits for a free descriptor, and the fork for us.
                    if self._reserve.give():
                        continue
                    # It stays readable for as long as none is free: look now and then.
                    self._mute()
                    self._filler.later(0)
                break
            self._take(self._raw, count, faults)
            if count < _BATCH:
                break
        return faults

    def hear(self) -> dict[int, int]:
        """The same, and from now on whenever there is something to read."""
        self._work = 0
        self._unmute()
        return self.read()

    def overhear(self, messages: memoryview, count: int) -> None:
        """See `Filled.overhear`."""
        self._take(messages, count, self._overheard)

    def _take(self, messages: memoryview, count: int, faults: dict[int, int]) -> None:
        """Look at messages that were read: events take effect, faults are noted."""
        for event, a, b, c in _MESSAGE.iter_unpack(messages[: count * _MESSAGE.size]):
            if event == _PAGEFAULT:
                self.stats.faults += b not in faults
                faults[b] = a
            elif self._backlog or self._is_much(event, a, b, c):
                self._backlog.append((event, a, b, c))
            else:
                at_once(self._apply(event, a, b, c, faults))
        if self._backlog and self._settling is None and not self._closed:
            self._halt()
            self._settling = begin(self._settle, loop=self._loop)
            self._settling.add_done_callback(self._settled)

    def _is_much(self, event: int, a: int, b: int, c: int) -> bool:
        """Whether an event makes more work than is done in one go, with those before it."""
        areas = self.areas
        if event == _FORK:
            self._work += areas.pages + len(areas)
        elif event == _REMAP:
            self._work += areas.work(a, a + c) + areas.work(b, b + c)
        else:
            self._work += areas.work(a, b)
        return self._work > WORK_MAX

    def _apply(self, event: int, a: int, b: int, c: int, faults: dict[int, int]) -> Steps[None]:
        self.stats.events += 1
        if event == _REMOVE:
            yield from self.areas.removing(a, b)
            # Who waits there is owed zeros now, not the bytes that are under way.
            for address in self._waiting_in(a, b):
                faults.setdefault(address, 0)
            self._owe_nothing(a, b)
        elif event == _UNMAP:
            yield from self.areas.unmapping(a, b)
            self._filler.not_again(a, b)
            self._owe_nothing(a, b)
            lib.au_abi_wake(self.fd, a, b - a)
        elif event == _REMAP:
            yield from self.areas.moving(a, b, c)
            self._filler.not_again(a, a + c)
            self._filler.not_again(b, b + c)
            self._owe_nothing(a, a + c)
            self._owe_nothing(b, b + c)
            lib.au_abi_wake(self.fd, a, c)
        elif event == _FORK:
            self.stats.forks += 1
            child = a & 0xFFFFFFFF
            if self._forked is not None:
                yield from self._forked(self, child)
            else:
                os.close(child)
            if self._reserve is not None:
                self._reserve.fill()
        else:
            log.debug("%r: an unknown event %#x", self, event)

    # --------------------------------------------------------------- in steps

    async def _settle(self) -> None:
        """Apply the events of the backlog in steps, and then go on. Who waits meanwhile has been
        forgotten, is woken at the end, and asks again."""
        while not self._closed and self._step():  # noqa: ASYNC110  (nothing is waited for)
            await asyncio.sleep(0)

    def _settled(self, task: asyncio.Task[None]) -> None:
        if self._settling is task:
            self._settling = None
        if self._closed:
            return
        try:
            if task.cancelled():
                # By somebody who does not know what it is. The process waits for us.
                self.settle_now()
            else:
                task.result()
            self._go_on()
        except Exception as error:
            self.broken(error)

    def _step(self) -> bool:
        """One step of the backlog; whether there may be another one."""
        if self._applying is None:
            if not self._backlog:
                return False
            # Nobody waits whom it could owe anything.
            self._applying = self._apply(*self._backlog.popleft(), {})
        try:
            next(self._applying)
        except StopIteration:
            self._applying = None
        return True

    async def settled(self) -> None:
        """Until all events that were read have been applied."""
        while self._settling is not None and not self._closed:
            await asyncio.wait((self._settling,))

    def settle_now(self) -> None:
        """The same, however long it takes."""
        while self._step():
            pass
        self._settling = None

    @property
    def settling(self) -> bool:
        """Whether events were read that are not applied yet."""
        return self._settling is not None

    @property
    def _off(self) -> bool:
        """Nothing is read or filled now."""
        return self._paused or self._settling is not None

    def _owe_nothing(self, start: int, end: int) -> None:
        """Cancel pending errors in a range: the mapping has changed."""
        if self._owed:
            self._owed = {at: why for at, why in self._owed.items() if not start <= at < end}

    def _waiting_in(self, start: int, end: int) -> list[int]:
        return [
            address
            for addresses in self._wanted.values()
            for address in addresses
            if start <= address < end
        ]

    # ----------------------------------------------------------------- faults

    def serve(self, address: int, flags: int = 0) -> None:
        """A thread waits for ``address``, or something is to be tried again there. Gives it what it
        is owed, or has it brought."""
        if self._off:
            return
        area = self.areas.find(address)
        size = self.page_size if area is None else area.page_size
        page = address & -size
        if self._owed and page in self._owed:
            self.poison(page, size, self._owed.pop(page))
            return
        if flags & (_FLAG_WP | _FLAG_RWP):
            # Whoever protected it learns of the access in a way of its own; nobody may wait here.
            lift = lib.au_abi_writeprotect if flags & _FLAG_WP else lib.au_abi_rwprotect
            if lift(self.fd, page, size, 0) == -errno.EAGAIN:
                # Nothing can be put there, and who waits is woken by the try.
                self._filler.later(page)
            return
        if area is None:
            if self.uncovered == "zero":
                self._filler.put(_ZERO, page, self._zeros, size, size, urgent=True)
            else:
                self.poison(page, size)
            return
        if flags & _FLAG_MINOR:
            self._map_again(area, page)
            return
        store = area.store
        state = area.state_of(page)
        # Of huge pages INSTALLED may be wrong: EEXIST also means that there are none left.
        gone = state & INSTALLED and area.lasting and size == PAGE_SIZE
        if state & REMOVED or gone or store is None:
            self.stats.zero_pages += 1
            self._filler.put(_ZERO, page, self._zeros, size, size, urgent=True)
            return
        if state & INSTALLED and size > PAGE_SIZE and self._filler.pool_is_empty(page):
            return
        self._ask(area, store, page)

    def _map_again(self, area: Area, page: int) -> None:
        """The bytes of shared memory are in its page cache and the mapping went, as reclaim does
        it: map the page, and what else went around it, before that is touched."""
        filler, size, events = self._filler, area.page_size, self.stats.events
        if not filler.put(_CONTINUE, page, ffi.NULL, size, size, urgent=True):
            return
        block = BLOCK if area.store is None else min(area.store.block_size, MAP_AGAIN_MAX)
        start = max(area.start, page - (page - area.start) % max(block, size))
        for low, high in (
            (page + size, min(start + block, area.start + area.length)),
            (start, page),
        ):
            # What is not in the cache is left alone, and what cannot be done now is not missed.
            if low < high and self.stats.events == events and not self._closed:
                filler.attempt(_CONTINUE, low, ffi.NULL, high - low, size, urgent=False)

    def _ask(self, area: Area, store: BlockStore, page: int) -> None:
        """Bring the block of ``page``, for which a thread waits: at once, if it is at hand."""
        block = area.offset_of(page) // store.block_size
        if self.recording is not None:
            self.recording.setdefault((store, block))
        at_hand = store.peek(block)
        if at_hand is not None:
            self.fill(area, store, block, at_hand[0], page)
        else:
            waiting = self._wanted.setdefault((store, block), [])
            if not waiting:
                store.want(block, self)
                if len(self._wanted) > WAITING_MAX:
                    self._forget_oldest()
            if page in waiting:
                self._repeated += 1
            else:
                waiting.append(page)
        if self.readahead and self.recording is None:
            self._bringer.ahead(store, block, self.readahead)

    def _forget_oldest(self) -> None:
        """Threads that wait for so many blocks there are hardly; some are gone, by a signal."""
        for page in self._wanted.pop(next(iter(self._wanted))):
            lib.au_abi_wake(self.fd, page, self.page_size)

    def landed(self, store: BlockStore, block: int, data: memoryview | None) -> None:
        """A block has come. The map says where it belongs by now, if anywhere."""
        waiting = self._wanted.pop((store, block), ())
        liked = self._bringer.heard(store, block)
        if self._closed or self._off:
            self._bringer.missed += 1
            return
        for page in waiting:
            area = self._still(store, block, page)
            if area is not None:
                self.fill(area, store, block, data, page)
            else:
                # It is something else now. Who waits there asks again.
                lib.au_abi_wake(self.fd, page, self.page_size)
        if liked:
            self._bringer.spread(store, block, data)

    def _still(self, store: BlockStore, block: int, page: int) -> Area | None:
        """The area of a page that was to come from a block, if that is still so."""
        area = self.areas.find(page)
        if (
            area is not None
            and area.store is store
            and area.offset_of(page) // store.block_size == block
            and not area.state_of(page) & REMOVED
        ):
            return area
        return None

    def failed(self, store: BlockStore, block: int, error: BaseException) -> None:
        """A block could not be had, for good."""
        waiting = self._wanted.pop((store, block), ())
        self._bringer.heard(store, block)
        if not waiting or self._closed or self._off:
            return
        if isinstance(error, FlightCancelledError):
            for page in waiting:
                lib.au_abi_wake(self.fd, page, self.page_size)
        else:
            self.lost(store, block, error, waiting)

    def lost(
        self, store: BlockStore, block: int, error: BaseException, waiting: Sequence[int]
    ) -> None:
        """There will be no bytes for the pages ``waiting``."""
        if isinstance(error, ClosedError):
            return
        if self._failed is not None and self._failed(self, error):
            return
        for page in waiting:
            if self._closed:
                return
            if self._still(store, block, page) is not None:
                self.poison(page, self.page_size, f"its block could not be had: {error}")
            else:
                lib.au_abi_wake(self.fd, page, self.page_size)

    def fill(
        self,
        area: Area,
        store: BlockStore,
        block: int,
        data: memoryview | None,
        page: int | None = None,
    ) -> None:
        """Fill what is missing of a block's place in ``area``, and in any case ``page``, for which
        a thread waits, whatever we believe of it."""
        size, page_size = store.block_size, area.page_size
        base = area.start + block * size - area.offset  # where the block's first byte would be
        if page is not None and size == page_size:
            runs = [(page, page + page_size)]
        else:
            start, end = area.block(block, size)
            runs = area.missing(start, end)
            if page is not None and not any(low <= page < high for low, high in runs):
                runs.append((page, page + page_size))
        source = None if data is None else ffi.from_buffer("uint8_t[]", data)
        try:
            self._fill_runs(area, runs, source, base, page)
        except BaseException:
            if source is not None:
                ffi.release(source)  # the traceback would keep it: see `pin`
            raise

    def _fill_runs(
        self, area: Area, runs: list[tuple[int, int]], source: Bytes, base: int, page: int | None
    ) -> None:
        filler, page_size, events = self._filler, area.page_size, self.stats.events
        if page is not None and len(runs) > 1:
            # The one that somebody waits for first.
            runs.sort(key=lambda run: not run[0] <= page < run[1])
        for low, high in runs:
            urgent = page is not None and low <= page < high
            op, data = (_ZERO, self._zeros) if source is None else (_COPY, source + (low - base))
            done = filler.put(op, low, data, high - low, page_size, area, urgent=urgent)
            absent = filler.absent[0]
            self.stats.installed_bytes += done - absent
            if absent:
                self._bringer.saw_absent()
            if page is not None and low + done < page < high:
                # The next try begins before it, where meanwhile there may be something else.
                filler.later(page)
            if self.stats.events != events:
                # The others may be something else by now.
                return

    def poison(self, page: int, size: int, why: str = "it is in no registered area") -> None:
        """Make an error of a page that a thread waits for; later, if that cannot be now."""
        if self.tell_error is not None and not self._closed and self._left_to_it(page, size):
            self.stats.poisoned_pages += 1
            log.error("%r: poisoning page %#x: %s", self, page, why)
        elif self._filler.put(_POISON, page, ffi.NULL, size, size, urgent=True):
            self.stats.poisoned_pages += 1
            log.error("%r: poisoning page %#x: %s", self, page, why)
            lib.au_abi_wake(self.fd, page, size)
        elif not self._closed:
            self._owed[page] = why
            if len(self._owed) > WAITING_MAX:
                oldest = next(iter(self._owed))
                del self._owed[oldest]
                lib.au_abi_wake(self.fd, oldest, size)

    def _left_to_it(self, page: int, size: int) -> bool:
        """Whether it is an error now, or will be: by the process, where the kernel makes none."""
        assert self.tell_error is not None
        result = self.put_errors(page, size, size)
        if result >= 0:
            lib.au_abi_wake(self.fd, page, size)
            return True
        return unpack(result)[1] in (errno.EINVAL, errno.ENOTTY) and self.tell_error(page, size)

    def put_errors(self, start: int, length: int, page_size: int) -> int:
        """See `ending.Ending.put_errors`."""
        return self._filler.attempt(_POISON, start, ffi.NULL, length, page_size, urgent=True)

    # ------------------------------------------------------------- background

    async def prefetch(self, store: BlockStore, runs: Iterable[tuple[int, int]]) -> None:
        """Bring runs of blocks of ``store`` in this order, behind what threads wait for."""
        await self._bringer.prefetch(store, runs)

    async def complete(self) -> None:
        """Bring everything that is still missing, in the background. Returns once it is there, or
        the memory has ended. Raises SourceError when a part could not be had."""
        await self.settled()
        await self._bringer.complete()

    def caught_up(self) -> None:
        """Nothing is left that is to be tried again."""
        self._bringer.look_again()

    # -------------------------------------------------------------------- end

    def probe(self) -> bool:
        """Whether the process still lives; if not, this memory has ended."""
        if not self._closed and not lib.au_foreign_alive(self.fd):
            self.vanished()
        return not self._closed

    def vanished(self) -> None:
        """The process is gone: nothing can become an error any more, and need not."""
        self.sole = False
        self._end()

    def _end(self) -> None:
        self.close()
        if self._gone is not None:
            self._gone(self)

    def finish(self) -> bool:
        """Close the descriptor if nothing is missing: the process is on its own then, and does not
        notice. For processes that keep no copy of it. False if something is missing."""
        if not self._closed:
            # There may be events, of a fork for example. Who waits is woken by closing.
            self._serve_all(self.read())
        if not self._closed:
            if self.settling or self._bringer.may_miss():
                return False
            self._end()
        return True

    async def give_up(self) -> None:
        """Make errors (SIGBUS) of what is missing, and close the descriptor. For processes that
        keep no copy of it, and would see zeros instead."""
        await make_errors(self)
        if not self._closed:
            self._end()

    def pause(self) -> None:
        """Read nothing and fill nothing until `resume`, because somebody else may begin to. What is
        under way is forgotten: who waits is woken by whoever starts next, and asks again."""
        self._paused = True
        self._halt()

    def _halt(self) -> None:
        self._filler.rest()
        self._reactor.remove(self.fd)
        self._forget()

    def resume(self) -> None:
        """Serve again after `pause`, or for the first time."""
        if not self._closed:
            self._paused = False
            self._go_on()

    def _go_on(self) -> None:
        if self._off:
            return
        self._filler.go_on()
        try:
            self.start()
        except OSError as error:
            self.broken(error)

    def close(self) -> None:
        """Stop, and close the descriptor. Threads that wait stay blocked for as long as
        another copy of it exists; with the last one the kernel lets them see zeros. Idempotent.

        Where ours is the `sole` one, what is missing becomes errors first.
        """
        if not self._closed:
            if self.sole:
                self.sole = False
                self.settle_now()
                make_errors_now(self)
            if not self._closed:
                self.release(self._stop())

    def release(self, fd: int) -> None:
        """Close the descriptor, which is used no more."""
        os.close(fd)

    def let_go(self) -> None:
        """Close the descriptor, because somebody else has a copy and serves."""
        self.sole = False
        self.close()

    def _stop(self) -> int:
        self._closed = True
        self._drop_backlog()
        self._filler.stop()
        self._reactor.remove(self.fd)
        self._forget()
        self._bringer.stop()
        self._at_hand, self._at_hand_count = ffi.NULL, 0
        self._keep.clear()
        self.ended.set()
        fd, self.fd = self.fd, -1
        return fd

    def _drop_backlog(self) -> None:
        applying, self._applying = self._applying, None
        if applying is not None:
            with contextlib.suppress(ValueError):  # it is what ends us
                applying.close()
        for event, a, _, _ in self._backlog:
            if event == _FORK:
                os.close(a & 0xFFFFFFFF)
        self._backlog.clear()

    def _forget(self) -> None:
        self._muted = False
        self._repeats = 0
        self._owed.clear()
        self._overheard.clear()
        for store, block in [*self._bringer.forget_all(), *self._wanted]:
            store.forget(self, block)
        self._wanted.clear()

    def __repr__(self) -> str:
        return f"<Memory {self.name or self.fd}: {len(self.areas)} areas>"
