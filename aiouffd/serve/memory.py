"""Serving one userfaultfd of another process.

Facts about the kernel that shape this file (Linux 6.18; all but the last since 4.11):

- While a REMOVE, UNMAP, REMAP or FORK event is unread, every ioctl that fills pages answers EAGAIN,
  and for a moment after, until the thread that caused it has run. So: read everything, apply the
  events, then fill; and what got EAGAIN is tried again on a timer.
- read() hands out page faults before events, whatever came first. A fault may so be older or
  younger than a removal in the same batch; with the removal applied first both get zeros, which is
  what the process could have seen in either case.
- An event is told before it takes effect (REMOVE) or after (the others). A page that is filled
  between the two is dropped again with the rest, and its next touch is another fault.
- Who waits for a page is not woken when the page goes: after UNMAP and REMAP we wake the old range.
- EEXIST does not wake anybody either.
- A forked child has its own descriptor, which comes with the event, and its memory is a copy as of
  the fork. Nothing can be filled between the copying and our reading of the event.
- The process's end is not told at all: ioctls answer ESRCH from then on.

What a blocked thread gets: bytes; zeros where the process dropped the page itself; SIGBUS (or the
end, see ``on_failure`` of `listen`) when the object failed for good; nothing while the object
fails for a time, or while no server runs: it waits. Where the page has no object at all it gets
SIGBUS, or zeros if that is the dialect's rule. It never gets zeros in place of bytes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .._lib import ffi, lib
from ..errors import ClosedError, SourceError
from ..readahead import Readahead
from .areas import INSTALLED, REMOVED, Area, AreaMap
from .reactor import Reactor, Share

if TYPE_CHECKING:
    from .blocks import BlockStore

__all__ = ["Memory", "MemoryStats", "Uncovered"]

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

#: struct uffd_msg: the event, and three words whose meaning it tells.
_MESSAGE = struct.Struct("=B7xQQQ")
_BATCH = 64
#: Batches read in one go. Threads that wake each other can fault without end.
_BATCHES = 2

#: Pauses between tries of what got EAGAIN, in seconds: first and longest.
AGAIN_FIRST, AGAIN_LONGEST = 0.0002, 0.02
#: Seconds that making errors of all pages may take, if a stopped thread is in the way; and where
#: the loop has to wait for it.
GIVE_UP, GIVE_UP_NOW = 2.0, 0.01
#: Pause after an error that is none of the known ones, which may last, and between two lines in the
#: log of it, in seconds. How long one turn of trying again may take.
TROUBLE_PAUSE, COMPLAINTS, TRY_TURN = 0.5, 30.0, 0.003
#: Batches in a row with nothing but faults that were heard of, and the pause after that: a thread
#: in a system call that has a signal faults over and over until its page comes.
REPEATS, REPEATS_PAUSE = 16, 0.001
#: Areas of one block that are filled in one turn of the loop; and how many areas are many.
PLACES, MANY = 64, 1024
#: Tries of a huge page that "exists" and does not, before the pool counts as empty.
HUGE_TRIES = 100
#: Blocks that `complete` and `prefetch` ask for at a time.
WINDOW = 64


@dataclass(slots=True)
class MemoryStats:
    """What was done for one address space, or with ``+=`` for several."""

    faults: int = 0
    events: int = 0
    installed_bytes: int = 0
    zero_pages: int = 0
    poisoned_pages: int = 0
    retries: int = 0
    forks: int = 0

    def __iadd__(self, other: MemoryStats) -> MemoryStats:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class Memory:
    """One address space of another process. Made by `Client.adopt`. One loop; not thread-safe."""

    def __init__(
        self,
        reactor: Reactor,
        fd: int,
        areas: AreaMap,
        *,
        share: Share,
        uncovered: Uncovered = "poison",
        readahead: int = 0,
        page_size: int = 4096,
        name: str = "",
        forked: Callable[[Memory, int], None] | None = None,
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
        #: While somebody records: (store, block) in the order of their first need.
        self.recording: dict[tuple[BlockStore, int], None] | None = None
        self._reactor = reactor
        self._loop = asyncio.get_running_loop()
        self._messages = ffi.new("struct au_uffd_msg[]", _BATCH)
        self._raw = memoryview(ffi.buffer(self._messages)).cast("B")
        self._answered = ffi.new("uint64_t[2]")
        self._at_hand: Any = ffi.NULL
        self._at_hand_version = -1
        self._at_hand_count = 0
        self._at_hand_window = 0
        self._keep: list[Any] = []
        self._wanted: dict[tuple[BlockStore, int], list[int]] = {}
        self._liked: dict[tuple[BlockStore, int], None] = {}
        self._room: asyncio.Event = asyncio.Event()
        self._ahead: dict[BlockStore, Readahead] = {}
        self._again: dict[int, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._pause = AGAIN_FIRST
        self._huge_tries: dict[int, int] = {}
        self._next_complaint = 0.0
        self._repeated = self._repeats = self._spreading = 0
        self._absent = ffi.new("uint64_t *")
        # Pages were found not to be mapped, before `complete` looked for them; perhaps by who had
        # this memory before.
        self._was_absent = True
        self._completing = 0
        self._forked, self._gone, self._failed = forked, gone, failed
        self._reserve = reserve
        self._closed = self._paused = self._muted = False
        self._zeros: Any = ffi.NULL if page_size == 4096 else ffi.new("uint8_t[]", page_size)

    # ------------------------------------------------------------------ begin

    def start(self) -> None:
        """Serve from now on. Who waited before we came is woken, and faults again."""
        os.set_blocking(self.fd, False)
        self._reactor.add(self)
        self.wake()

    def wake(self) -> None:
        """Have every thread that waits fault again, so that whoever reads next hears of it."""
        for area in self.areas:
            lib.au_abi_wake(self.fd, area.start, area.length)

    def fileno(self) -> int:
        return self.fd

    @property
    def closed(self) -> bool:
        return self._closed

    # --------------------------------------------------------------- messages

    def serve_some(self) -> None:
        """Read all that there is to read, then act. Called when the descriptor is readable."""
        try:
            self._serve_some()
        except Exception as error:
            self.broken(error)

    def broken(self, error: Exception) -> None:
        """A bug of ours is this client's end, and must not become everybody's."""
        self._loop.call_exception_handler(
            {"message": f"{self!r} cannot be served any more", "exception": error}
        )
        if not self._closed:
            self._end()

    def _serve_some(self) -> None:
        if self._at_hand_version != self.areas.version:
            self._find_at_hand()
        if not self._at_hand_count or self.recording is not None:
            self._serve_new(self._read())
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
            self._take(count, faults)
            faults.update(self._read())
            self._serve_new(faults)
        elif count < 0 and count != -errno.EAGAIN:
            self._serve_new(self._read())

    def _find_at_hand(self) -> None:
        """The areas whose object is memory of this process, for native code."""
        self._at_hand_version = self.areas.version
        self._keep.clear()
        found = []
        for area in self.areas:
            data = None if area.store is None else area.store.memory
            if data is None or area.offset + area.length > len(data) or area.states is None:
                continue
            piece = ffi.from_buffer("uint8_t[]", data[area.offset : area.offset + area.length])
            states = ffi.from_buffer("uint8_t[]", area.states)
            self._keep += piece, states
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
        if self._repeats >= REPEATS and not self._closed and not self._muted:
            self._repeats = 0
            self._mute()
            self._loop.call_later(REPEATS_PAUSE, self._unmute)

    def _mute(self) -> None:
        self._reactor.remove(self.fd)
        self._muted = True

    def _unmute(self) -> None:
        if self._muted and not self._closed and not self._paused:
            self._muted = False
            try:
                self._reactor.add(self)
            except OSError as error:
                self.broken(error)

    def _serve_all(self, faults: dict[int, int]) -> None:
        for address, flags in faults.items():
            if self._closed:
                return
            self._serve(address, flags)

    def _read(self) -> dict[int, int]:
        """Drain the descriptor and apply the events. Returns addresses of faults, and flags."""
        faults: dict[int, int] = {}
        for _ in range(_BATCHES):
            if self._closed:
                break
            count = lib.au_foreign_read(self.fd, self._messages, _BATCH)
            if count < 0:
                if -count in (errno.EMFILE, errno.ENFILE) and self._reserve is not None:
                    # The event of a fork waits for a free descriptor, and the fork for us.
                    if self._reserve.give():
                        continue
                    # It stays readable for as long as none is free: look now and then.
                    self._mute()
                    self._later(0)
                break
            self._take(count, faults)
            if count < _BATCH:
                break
        return faults

    def _take(self, count: int, faults: dict[int, int]) -> None:
        """Look at messages that were read: events take effect, faults are noted."""
        for event, a, b, c in _MESSAGE.iter_unpack(self._raw[: count * _MESSAGE.size]):
            if event == _PAGEFAULT:
                self.stats.faults += b not in faults
                faults[b] = a
            else:
                self._apply(event, a, b, c, faults)

    def _apply(self, event: int, a: int, b: int, c: int, faults: dict[int, int]) -> None:
        self.stats.events += 1
        if event == _REMOVE:
            self.areas.removed(a, b)
            # Who waits there is owed zeros now, not the bytes that are under way.
            for address in self._waiting_in(a, b):
                faults.setdefault(address, 0)
        elif event == _UNMAP:
            self.areas.unmapped(a, b)
            self._not_again(a, b)
            lib.au_abi_wake(self.fd, a, b - a)
        elif event == _REMAP:
            self.areas.moved(a, b, c)
            self._not_again(a, a + c)
            self._not_again(b, b + c)
            lib.au_abi_wake(self.fd, a, c)
        elif event == _FORK:
            self.stats.forks += 1
            child = a & 0xFFFFFFFF
            if self._forked is not None:
                self._forked(self, child)
            else:
                os.close(child)
            if self._reserve is not None:
                self._reserve.fill()
        else:
            log.debug("%r: an unknown event %#x", self, event)

    def _not_again(self, start: int, end: int) -> None:
        """Nothing is to be tried again where something else may be now; who waits asks anew."""
        if self._again:
            self._again = {at: None for at in self._again if not start <= at < end}

    def _waiting_in(self, start: int, end: int) -> list[int]:
        return [
            address
            for addresses in self._wanted.values()
            for address in addresses
            if start <= address < end
        ]

    # ----------------------------------------------------------------- faults

    def _serve(self, address: int, flags: int = 0) -> None:
        """A thread waits for ``address``."""
        area = self.areas.find(address)
        size = self.page_size if area is None else area.page_size
        page = address & -size
        if flags & _FLAG_WP:
            if lib.au_abi_writeprotect(self.fd, page, size, 0) == -errno.EAGAIN:
                # Nothing can be put there, and who waits is woken by the try.
                self._later(page)
            return
        if area is None:
            if self.uncovered == "zero":
                self._put(_ZERO, page, self._zeros, size, size)
            else:
                self._poison(page, size)
            return
        if flags & _FLAG_MINOR:
            self._put(_CONTINUE, page, ffi.NULL, size, size)
            return
        store = area.store
        state = area.state_of(page)
        # Of huge pages INSTALLED may be wrong: EEXIST also means that there are none left.
        gone = state & INSTALLED and area.lasting and size == 4096
        if state & REMOVED or gone or store is None:
            self.stats.zero_pages += 1
            self._put(_ZERO, page, self._zeros, size, size)
            return
        if state & INSTALLED and size > 4096 and self._pool_is_empty(page):
            return
        self._ask(area, store, page)

    def _ask(self, area: Area, store: BlockStore, page: int) -> None:
        """Bring the block of ``page``, for which a thread waits: at once, if it is at hand."""
        block = area.offset_of(page) // store.block_size
        if self.recording is not None:
            self.recording.setdefault((store, block))
        at_hand = store.peek(block)
        if at_hand is not None:
            self._fill(area, store, block, at_hand[0], page)
        else:
            waiting = self._wanted.setdefault((store, block), [])
            if not waiting:
                store.want(block, self)
            if page in waiting:
                self._repeated += 1
            else:
                waiting.append(page)
        if self.readahead and self.recording is None:
            self._read_ahead(store, block)

    def _read_ahead(self, store: BlockStore, block: int) -> None:
        ahead = self._ahead.get(store)
        if ahead is None:
            window = max(1, self.readahead // store.block_size)
            ahead = self._ahead[store] = Readahead(store.blocks, window, max(1, window // 4))
        for first, count in ahead.touch(block):
            self._like(store, first, count)

    def _like(self, store: BlockStore, first: int, count: int) -> None:
        """Ask for blocks in the background, but those that nothing of is missing."""
        run = 0
        for block in range(first, first + count + 1):
            if block < first + count and self._misses(store, block):
                self._liked[store, block] = None
                run += 1
            elif run:
                store.like(block - run, run, self)
                run = 0

    def _misses(self, store: BlockStore, block: int) -> bool:
        if (store, block) in self._liked or (store, block) in self._wanted:
            return False
        if not any(
            area.missing(start, end) for area, start, end in self.areas.of_block(store, block)
        ):
            return False
        at_hand = store.peek(block)
        if at_hand is not None:
            self._spread(store, block, at_hand[0])
        return at_hand is None

    def _spread(
        self,
        store: BlockStore,
        block: int,
        data: memoryview | None,
        first: int = 0,
        version: int = -1,
    ) -> None:
        """Fill all places of a block, a few in one turn of the loop: areas may show the same bytes
        over and over."""
        if self._closed or self._paused:
            return
        if version != self.areas.version:
            first = 0
        places = self.areas.of_block(store, block)
        try:
            for area, start, end in places[first : first + PLACES]:
                if area.missing(start, end):
                    self._fill(area, store, block, data)
        except Exception as error:
            self.broken(error)
            return
        if first + PLACES < len(places):
            # It is lent to us until we return.
            kept = data if data is None or isinstance(data.obj, bytes) else memoryview(bytes(data))
            self._spreading += 1
            rest = (store, block, kept, first + PLACES, self.areas.version)
            self._loop.call_soon(self._spread_on, *rest)

    def _spread_on(self, *rest: Any) -> None:
        self._spreading -= 1
        self._spread(*rest)

    def landed(self, store: BlockStore, block: int, data: memoryview | None) -> None:
        """A block has come. The map says where it belongs by now, if anywhere."""
        waiting = self._wanted.pop((store, block), ())
        liked = (store, block) in self._liked
        if liked:
            del self._liked[store, block]
        self._room.set()
        if self._closed or self._paused:
            return
        for page in waiting:
            area = self._still(store, block, page)
            if area is not None:
                self._fill(area, store, block, data, page)
            else:
                # It is something else now. Who waits there asks again.
                lib.au_abi_wake(self.fd, page, self.page_size)
        if liked:
            self._spread(store, block, data)

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
        self._liked.pop((store, block), None)
        self._room.set()
        if self._closed or self._paused or isinstance(error, ClosedError) or not waiting:
            return
        if self._failed is not None and self._failed(self, error):
            return
        for page in waiting:
            if self._still(store, block, page) is not None:
                self._poison(page, self.page_size)
            else:
                lib.au_abi_wake(self.fd, page, self.page_size)

    def _fill(
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
        source = ffi.NULL if data is None else ffi.from_buffer("uint8_t[]", data)
        for low, high in runs:
            if data is None:
                done = self._put(_ZERO, low, self._zeros, high - low, page_size, area)
            else:
                done = self._put(_COPY, low, source + (low - base), high - low, page_size, area)
            absent = self._absent[0]
            self.stats.installed_bytes += done - absent
            if absent and not self._completing:
                self._was_absent = True
            if page is not None and low + done < page < high:
                # The next try begins before it, where meanwhile there may be something else.
                self._later(page)

    # ---------------------------------------------------------------- filling

    def _put(
        self,
        op: int,
        start: int,
        source: Any,
        length: int,
        page_size: int,
        area: Area | None = None,
    ) -> int:
        """One native call, which notes what has become of the pages in ``area``. Returns the bytes
        done; what could not be done now is tried again."""
        absent = self._absent
        absent[0] = 0
        if self._closed or self._paused:
            return 0
        states = ffi.NULL
        if area is not None and area.states is not None:
            states = ffi.from_buffer("uint8_t[]", area.states[area.page_of(start) :])
        result: int = lib.au_foreign_fill(
            self.fd, op, start, source, length, page_size, states, absent
        )
        if result >= 0:
            self._pause = AGAIN_FIRST
            return result
        code, done = ~result & 0xFF, ~result >> 8
        if code in (errno.ESRCH, errno.EBADF):
            self._vanished()
            return done
        self.stats.retries += 1
        if code != errno.EAGAIN:
            self._pause = TROUBLE_PAUSE
            now = self._loop.time()
            if now >= self._next_complaint:
                self._next_complaint = now + COMPLAINTS
                log.error(
                    "%r: filling %d bytes at %#x fails, and is tried again: %s",
                    self, length - done, start + done, os.strerror(code),
                )  # fmt: skip
        self._later(start + done)
        return done

    def _poison(self, page: int, size: int) -> None:
        self.stats.poisoned_pages += 1
        log.error("%r: nothing is known of the page at %#x; it gets an error", self, page)
        self._put(_POISON, page, ffi.NULL, size, size)
        lib.au_abi_wake(self.fd, page, size)

    def _pool_is_empty(self, page: int) -> bool:
        """EEXIST for a huge page can mean that there is none to be had."""
        tries = self._huge_tries[page] = self._huge_tries.get(page, 0) + 1
        if tries % HUGE_TRIES:
            return False
        log.error("%r: no huge pages are left for it; see vm.nr_hugepages", self)
        self._later(page)
        self._pause = AGAIN_LONGEST
        return True

    def _later(self, address: int) -> None:
        """Serve ``address`` again in a while (0: only read)."""
        if address:
            self._again[address] = None
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(self._pause, self._try_again)
            self._pause = min(self._pause * 2, AGAIN_LONGEST)

    def _try_again(self) -> None:
        self._timer = None
        if self._closed:
            return
        try:
            self._unmute()
            faults = self._read()
            again, self._again = self._again, {}
            for address in again:
                faults.setdefault(address, 0)
            self._serve_in_turn(list(faults.items()))
            if not self._again:
                self._room.set()
        except Exception as error:
            self.broken(error)

    def _serve_in_turn(self, faults: list[tuple[int, int]]) -> None:
        """As many as can be served and as there is time for; the rest later."""
        limit = time.perf_counter() + TRY_TURN
        for number, (address, flags) in enumerate(faults, 1):
            if self._closed:
                return
            before = self.stats.retries
            self._serve(address, flags)
            if self.stats.retries > before or time.perf_counter() > limit:
                # What is in the way of one is most often in the way of all; but the next to be
                # tried is another one.
                if rest := faults[number:]:
                    self._again = {**dict.fromkeys(address for address, _ in rest), **self._again}
                    self._later(0)
                return

    # ------------------------------------------------------------- background

    async def prefetch(self, store: BlockStore, runs: Iterable[tuple[int, int]]) -> None:
        """Bring runs of blocks of ``store`` in this order, behind what threads wait for."""
        piece = max(1, (1 << 20) // store.block_size) if len(self.areas) < MANY else 1
        for first, count in runs:
            for block in range(first, first + count, piece):
                await self._have_room()
                if self._closed:
                    return
                self._like(store, block, min(piece, first + count - block))
                await asyncio.sleep(0)

    async def complete(self) -> None:
        """Bring everything that is still missing, in the background. Returns once it is there, or
        the memory has ended. Raises SourceError when a part could not be had."""
        self._completing += 1
        try:
            if self._was_absent:
                self._was_absent = False
                for area in self.areas:
                    area.forget_absent()
            await self._complete()
        finally:
            self._completing -= 1

    async def _complete(self) -> None:
        while not self._closed:
            before = self._missing_bytes()
            if not before:
                return
            retries, version = self.stats.retries, self.areas.version
            for store, runs in self._blocks_of_areas().items():
                await self.prefetch(store, runs)
            while self._liked and not self._closed:
                self._room.clear()
                await self._room.wait()
            if self._missing_bytes() >= before:
                if self._wanted:
                    # What threads wait for is on its way without us.
                    self._room.clear()
                    await self._room.wait()
                elif (
                    self._again
                    or self._timer is not None
                    or self._spreading
                    or (retries, version) != (self.stats.retries, self.areas.version)
                ):
                    # Something was in the way, or is elsewhere now.
                    await asyncio.sleep(AGAIN_LONGEST)
                elif not self._closed:
                    raise SourceError(f"{self!r}: some of it could not be brought")

    def _blocks_of_areas(self) -> dict[BlockStore, list[tuple[int, int]]]:
        """Runs of blocks that anything shows, by object. Small areas may share blocks."""
        found: dict[BlockStore, list[tuple[int, int]]] = {}
        for area in self.areas:
            if area.store is not None:
                size = area.store.block_size
                first, end = area.offset // size, -(-(area.offset + area.length) // size)
                runs = found.setdefault(area.store, [])
                if runs and runs[-1][0] <= first <= sum(runs[-1]):
                    before, count = runs.pop()
                    first, end = before, max(end, before + count)
                runs.append((first, end - first))
        return found

    def _missing_bytes(self) -> int:
        return sum(area.missing_bytes() for area in self.areas if area.store is not None)

    async def _have_room(self) -> None:
        while (len(self._liked) >= WINDOW or self._again) and not self._closed:
            self._room.clear()
            await self._room.wait()

    # -------------------------------------------------------------------- end

    def probe(self) -> bool:
        """Whether the process still lives; if not, this memory has ended."""
        if not self._closed and not lib.au_foreign_alive(self.fd):
            self._vanished()
        return not self._closed

    def _vanished(self) -> None:
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
            self._serve_all(self._read())
        if not self._closed:
            if self._was_absent or self._missing_bytes():
                return False
            self._end()
        return True

    async def give_up(self) -> None:
        """Make errors (SIGBUS) of what is missing, and close the descriptor. For processes that
        keep no copy of it, and would see zeros instead."""
        limit = self._loop.time() + GIVE_UP
        while not self._closed:
            again = self._make_errors()
            if again and self._loop.time() > limit:
                log.error("%r: it is stopped, and what it lacks may read as zeros later", self)
                again = False
            if not again:
                self._end()
                return
            await asyncio.sleep(AGAIN_FIRST)

    def _make_errors(self) -> bool:
        """Errors where something is missing. True if that cannot be yet."""
        self._read()
        again = False
        for area in list(self.areas) if not self._closed else ():
            if area.store is None:
                continue
            area.forget_absent()
            size = area.page_size
            for low, high in area.missing(area.start, area.end):
                result = lib.au_foreign_put(self.fd, _POISON, low, ffi.NULL, high - low, size)
                done = high - low if result >= 0 else ~result >> 8
                area.mark_installed(low, low + done)
                self.stats.poisoned_pages += done // size
                again = again or (result < 0 and ~result & 0xFF == errno.EAGAIN)
        return again

    def _errors_now(self) -> None:
        limit = time.monotonic() + GIVE_UP_NOW
        while self._make_errors():
            if time.monotonic() > limit:
                log.error("%r: it is stopped, and what it lacks may read as zeros later", self)
                return
            time.sleep(20e-6)  # for the thread that is in the way: microseconds

    def pause(self) -> None:
        """Read nothing and fill nothing until `resume`, because somebody else may begin to. What is
        under way is forgotten: who waits is woken by whoever starts next, and asks again."""
        self._paused = True
        self._reactor.remove(self.fd)
        self._forget()

    def resume(self) -> None:
        """Serve again after `pause`, or for the first time."""
        if not self._closed:
            self._paused = False
            self.start()

    def close(self) -> None:
        """Stop, and close the descriptor. Threads that wait stay blocked for as long as
        another copy of it exists; with the last one the kernel lets them see zeros. Idempotent.

        Where ours is the `sole` one, what is missing becomes errors first.
        """
        if not self._closed:
            if self.sole:
                self.sole = False
                self._errors_now()
            if not self._closed:
                os.close(self._stop())

    def let_go(self) -> None:
        """Close the descriptor, because somebody else has a copy and serves."""
        self.sole = False
        self.close()

    def _stop(self) -> int:
        self._closed = True
        self._reactor.remove(self.fd)
        self._forget()
        self._at_hand, self._at_hand_count = ffi.NULL, 0
        self._keep.clear()
        self.ended.set()
        fd, self.fd = self.fd, -1
        return fd

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._muted = False
        self._again.clear()
        self._repeats = 0
        stores = {store for store, _ in (*self._wanted, *self._liked)}
        self._wanted.clear()
        self._liked.clear()
        for store in stores:
            store.forget(self)
        self._room.set()

    def __repr__(self) -> str:
        return f"<Memory {self.name or self.fd}: {len(self.areas)} areas>"


class Reserve:
    """A few descriptors held back for when no others are left: a fork waits for its event to be
    read, and that needs one."""

    def __init__(self, count: int = 8) -> None:
        self._count = count
        self._held: list[int] = []
        self.fill()

    def give(self) -> bool:
        """Let go of one. False if there is none left."""
        if not self._held:
            return False
        os.close(self._held.pop())
        return True

    def fill(self) -> None:
        """Take back what was given, as far as that is possible."""
        try:
            while len(self._held) < self._count:
                self._held.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
        except OSError:
            pass

    def close(self) -> None:
        while self.give():
            pass
