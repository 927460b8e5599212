"""Children of this process, and the lazy memory that fork left to them.

The native core has a child make a userfaultfd of its own and hand it to us before anything else
runs in it (``native/inherit.h``). So a child is a client like any other: a `Memory`, served on the
background loop from a clone of the source. Whatever the loop of the buffer does, waiting for
this very child included, it is not needed.

- Private memory is a copy as of the fork. What was missing then is fetched for the child; blocks
  are kept for a while, so that many children that read the same cost one fetch.
- Shared memory is one for all. What a child misses is brought into the region itself and the
  child is woken; that the region's page table is the only one there is keeps
  installs from overwriting what somebody has written.
- A child holds the memory as a view does: a buffer that is closed here is served until its last
  child has ended.
- A buffer closed by force is an error for who touches it, served by us for as long as the child has
  others. With the last one we let go of the child, whose own thread gives the errors then, as it
  does when we die.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import AiouffdError, ClosedError
from ..fetch.policy import Policy
from ..kernel.lib import PAGE_SIZE, ffi, lib
from ..kernel.results import unpack
from ..regions.rescue import service
from ..sources.base import BaseSource, Source
from .areas import INSTALLED, Area, AreaMap
from .blocks import BlockStore
from .memory import Memory
from .reactor import Reactor, Share

if TYPE_CHECKING:
    from ..fetch.tally import Tally
    from ..kernel.calls.children import ChildPtr
    from ..regions.region import Region

__all__ = ["Inheritance", "RegionBlocks", "SourceBlocks", "children"]

log = logging.getLogger("aiouffd")

#: struct au_child_region: serial, start, length, page size.
_REGION = struct.Struct("=QQQQ")
_ADDRESS = struct.Struct("@Q")
assert _REGION.size == ffi.sizeof("struct au_child_region")
_POISON: int = lib.AU_OP_POISON
#: Bytes taken from a child's socket at a time.
_READ = 1 << 16
#: A child whose socket has ended is about to exit: first and longest pause between looks, seconds.
PROBE_FIRST, PROBE_LONGEST = 0.005, 2.0
#: Seconds in which a child that was forked should have come; it is the first thing it does.
COMING = 1.0
#: Wakes of one page in a row after which the next ones are this late, in seconds.
WAKES, WAKE_PAUSE = 8, 0.02


# ---------------------------------------------------------------------- blocks


class SourceBlocks(BlockStore):
    """The blocks of a source that is opened with the first of them.

    :param source: a clone, not open yet.
    :param size: its length in bytes.
    :param readahead: bytes to bring ahead of sequential access, per child.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        tally: Tally,
        *,
        block_size: int,
        policy: Policy,
        readahead: int,
    ) -> None:
        super().__init__(source, block_size=block_size, policy=policy)
        self.tally = tally
        self.readahead = readahead
        self._size = size

    def peek(self, block: int) -> tuple[memoryview | None] | None:
        if self._life.opened or block in self._kept:
            return super().peek(block)
        return None

    async def bring(self, flight: Any) -> None:
        await self.open()
        await super().bring(flight)


class RegionBlocks(BlockStore):
    """The blocks of shared memory, which are where they belong once they are in the region.

    :param bring: makes a block of the region resident, on the background loop; follows the
        failure policy of the buffer.
    """

    def __init__(self, region: Region, bring: Callable[[int], Awaitable[None]]) -> None:
        super().__init__(BaseSource(), block_size=region.block_size, keep=0)
        self._region = region
        self._bring = bring
        self._size = region.mapped_length

    def has(self, offset: int, length: int) -> bool:
        """Whether these bytes are there."""
        return not self._region.closed and self._region.is_resident(offset, length)

    def touch(self, offset: int, length: int) -> None:
        """Fault these bytes in through our own mapping. Blocks."""
        with contextlib.suppress(AiouffdError):
            self._region.touch(offset, length)

    def peek(self, block: int) -> tuple[memoryview | None] | None:
        return None

    #: Whoever brings it does that.
    _retry = False

    async def bring(self, flight: Any) -> None:
        for block in flight.blocks:
            await self._bring(block)
        flight.data = [None] * flight.count

    def _put(self, block: int, data: memoryview | None) -> None:
        """Nothing is kept: it is in the region."""


# ---------------------------------------------------------------------- memory


class _ChildMemory(Memory):
    """The address space of a child. Its areas have a store, or None once that was closed."""

    def __init__(self, child: _Child, areas: AreaMap, reactor: Reactor) -> None:
        page_size = max((area.page_size for area in areas), default=PAGE_SIZE)
        super().__init__(
            reactor,
            child.uffd,
            areas,
            share=Share(),
            page_size=page_size,
            name=f"of {child!r}",
        )
        self._child = child
        self._woken, self._wakes = 0, 0

    def serve(self, address: int, flags: int = 0) -> None:
        area = self.areas.find(address)
        size = PAGE_SIZE if area is None else area.page_size
        page = address & -size
        store = None if area is None else area.store
        if area is None or store is None or page in self._owed:
            self.poison(page, size, self._owed.pop(page, ""))
            return
        if isinstance(store, RegionBlocks) and store.has(area.offset_of(page), size):
            self._wake_page(page, size)
            return
        if (
            size > PAGE_SIZE
            and area.state_of(page) & INSTALLED
            and self._filler.pool_is_empty(page)
        ):
            return
        self.readahead = store.readahead if isinstance(store, SourceBlocks) else 0
        self._ask(area, store, page)

    def _wake_page(self, page: int, size: int) -> None:
        """Have the child look again, but not all the time: somebody may have made a hole in the
        file below the memory."""
        self._wakes = self._wakes + 1 if page == self._woken else 0
        self._woken = page
        if self._wakes < WAKES:
            lib.au_abi_wake(self.fd, page, size)
        else:
            if self._wakes % WAKES == 0:
                self._heal(page, size)
            self._loop.call_later(WAKE_PAUSE, self._wake_late, page, size)

    def _heal(self, page: int, size: int) -> None:
        """Touch it here: that brings what is missing, whatever is believed of it."""
        area = self.areas.find(page)
        if area is not None and isinstance(area.store, RegionBlocks):
            touch = functools.partial(area.store.touch, area.offset_of(page), size)
            self._loop.run_in_executor(None, touch)

    def _wake_late(self, page: int, size: int) -> None:
        if not self._closed:
            lib.au_abi_wake(self.fd, page, size)

    def fill(
        self,
        area: Area,
        store: BlockStore,
        block: int,
        data: memoryview | None,
        page: int | None = None,
    ) -> None:
        if isinstance(store, RegionBlocks):
            if page is not None and not self._closed:
                lib.au_abi_wake(self.fd, page, area.page_size)
            return
        start, end = area.block(block, store.block_size)
        if data is not None and len(data) < end - start:
            # The end of the object, within a huge page.
            data = memoryview(bytes(data) + bytes(end - start - len(data)))
        super().fill(area, store, block, data, page)

    def lost(
        self, store: BlockStore, block: int, error: BaseException, waiting: Sequence[int]
    ) -> None:
        if not isinstance(error, ClosedError):
            log.error("%r gets an error for block %d: %s", self._child, block, error)
        for page in waiting:
            area = self.areas.find(page)
            self.poison(page, PAGE_SIZE if area is None else area.page_size)

    def poison(self, page: int, size: int, why: str = "") -> None:
        if self._closed:
            return
        _, code = unpack(self.put_errors(page, size, size))
        if self._closed:
            return
        if code == errno.EAGAIN:
            self.stats.retries += 1
            self._owed[page] = why
            self._filler.later(page)
        elif code in (errno.EINVAL, errno.ENOTTY):
            # Before Linux 6.6. The child itself can make it an error of another kind.
            if self._child.tell_error(page):
                self.stats.poisoned_pages += 1
            elif not self._closed:
                self.stats.retries += 1
                self._owed[page] = why
                self._filler.later(page)
        elif code:
            self._end()
        else:
            self.stats.poisoned_pages += 1
            lib.au_abi_wake(self.fd, page, size)

    def refuse(self, start: int, end: int) -> None:
        """The buffer here was closed: errors from now on, for who waits as well."""
        for area in self.areas.unmapped(start, end):
            store = area.store
            self.areas.add(Area(area.start, area.length, None, page_size=area.page_size))
            if store is None:
                continue
            for block in self._bringer.forget(store):
                store.forget(self, block)
            for key in [key for key in self._wanted if key[0] is store]:
                store.forget(self, key[1])
                # An error may be the end of this child, and then nothing is wanted any more.
                for page in self._wanted.pop(key, ()):
                    self.poison(page, area.page_size)

    def release(self, fd: int) -> None:
        """The native core closes it."""
        self._child.release()


# -------------------------------------------------------------------- children


class _Child:
    """One child, from its first word to its end."""

    def __init__(self, family: Children, native: ChildPtr, number: int) -> None:
        self.number = number
        self.pid: int = native.pid
        self.uffd: int = native.uffd
        self._socket: int = native.socket
        self._rest: int = native.regions * _REGION.size
        self._family = family
        self._loop = asyncio.get_running_loop()
        self._heard = bytearray()
        self._memory: _ChildMemory | None = None
        self._kept: dict[int, Inheritance] = {}
        self._reading = True
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        os.set_blocking(self._socket, False)
        self._loop.add_reader(self._socket, self._readable)

    def _readable(self) -> None:
        """What it has of us; later on, its end."""
        try:
            data = os.read(self._socket, _READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._stop_reading()
            self._look(PROBE_FIRST)
        elif self._memory is None:
            self._heard += data
            if len(self._heard) >= self._rest:
                try:
                    self._begin()
                except Exception as error:
                    log.error("%r cannot be served: %s", self, error)
                    self.close()

    def _begin(self) -> None:
        areas = AreaMap()
        for serial, start, length, page_size in _REGION.iter_unpack(self._heard[: self._rest]):
            kept = self._family.of(serial)
            if kept is not None:
                self._kept[start] = kept
            with contextlib.suppress(ValueError):
                store = None if kept is None else kept.store
                areas.add(Area(start, length, store, page_size=page_size))
        self._heard.clear()
        if not self._kept:
            self.close()  # all of it was closed meanwhile
            return
        for kept in self._kept.values():
            kept.arrived()
        self._memory = _ChildMemory(self, areas, self._family.reactor)
        try:
            self._memory.start()
        except OSError as error:
            log.error("%r cannot be served: %s", self, error)
            self.close()

    @property
    def is_new(self) -> bool:
        """Whether it has not yet said what it has of us."""
        return self._memory is None and not self._closed

    def _look(self, pause: float) -> None:
        """The socket has ended, with the program that had the other end: is the memory gone?
        If not, the descriptor has to stay: without it the rest might read as zeros."""
        self._timer = None
        if self._memory is None or not lib.au_foreign_alive(self.uffd):
            self.close()
        else:
            self._timer = self._loop.call_later(pause, self._look, min(pause * 2, PROBE_LONGEST))

    def tell_error(self, page: int) -> bool:
        """Have the child make an error of the page. False: not now, or it is gone."""
        try:
            return os.write(self._socket, _ADDRESS.pack(page)) == _ADDRESS.size
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self.close()
            return False

    def refuse(self, kept: Inheritance) -> None:
        """A buffer was closed."""
        if self._kept.get(kept.start) is not kept:
            return
        del self._kept[kept.start]
        kept.departed()
        if self._memory is not None:
            self._memory.refuse(kept.start, kept.start + kept.length)
        if not self._kept:
            self.close()

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket)

    def close(self) -> None:
        """Let go of it. If it lives, its touches are errors from now on. Idempotent."""
        if self._memory is not None:
            self._memory.close()
        self.release()

    def release(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._stop_reading()
        if self._timer is not None:
            self._timer.cancel()
        kept_ones, self._kept = list(self._kept.values()), {}
        for kept in kept_ones:
            kept.departed()
        lib.au_children_release(self.uffd, self._socket)
        self._family.forget(self)

    def __repr__(self) -> str:
        return f"<child {self.pid}>"


class Inheritance:
    """A region that is left to children, as long as it is not closed. Made by `Children.leave`."""

    def __init__(self, family: Children, region: Region, store: BlockStore) -> None:
        self.serial, self.start, self.length = region.serial, region.address, region.mapped_length
        self.store = store
        #: How many children have it now.
        self.children = 0
        self._family = family
        self._closed = False
        # A child holds the memory as a view does.
        self._exports = region._exports
        self._hold: int | None = None

    def arrived(self) -> None:
        """One more child has it."""
        self.children += 1
        if self._hold is None:
            with contextlib.suppress(ClosedError):
                self._hold = self._exports.hold("forked children")

    def departed(self) -> None:
        """One child less has it."""
        self.children -= 1
        if not self.children and self._hold is not None:
            hold, self._hold = self._hold, None
            self._exports.release(hold)

    def close(self) -> None:
        """What is missing in children is an error, soon. From any thread. Idempotent."""
        if not self._closed:
            # Too late for that, the interpreter ends; and so do we for the children.
            with contextlib.suppress(RuntimeError):
                service.call_soon(self._family.disown_soon, self)

    async def settle(self) -> None:
        """Until all children that were forked are counted. On the background loop."""
        await self._family.settle()

    async def aclose(self) -> None:
        """As `close`, and done with the source. On any loop."""
        if not self._closed:
            await service.run(self._family.disown(self))


class Children:
    """The children of this process that have lazy memory of ours. `children` is the one.

    All of it but `leave` runs on the background loop.
    """

    reactor: Reactor

    def __init__(self) -> None:
        self._past: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self._kept: dict[int, Inheritance] = {}
        self._children: set[_Child] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = False
        self._number = 0
        # Forks while there was something to leave, when the last one was, and how many have come.
        self._forks = self._came = 0
        self._forked_at = 0.0

    def _forked(self) -> None:
        """In the parent, after a fork."""
        if self._kept:
            self._forks += 1
            self._forked_at = time.monotonic()

    async def settle(self) -> None:
        """On the background loop: until all children that were forked have come, or will not."""
        while self._coming and time.monotonic() < self._forked_at + COMING:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self._came = self._forks

    @property
    def _coming(self) -> bool:
        return self._came < self._forks or any(child.is_new for child in self._children)

    def _after_fork(self) -> None:
        # They go on in the parent. To collect them here might end connections that both share.
        self._past.append((self._kept, self._children, self._tasks))
        self._reset()

    def leave(self, region: Region, store: BlockStore) -> Inheritance:
        """Serve children that are forked from now on with what ``store`` has. Any thread.

        Raises OSError when there are no descriptors left for it.
        """
        if service.is_current_thread:
            self._start()
        elif not self._started:
            service.block_on(self._start_there())
        kept = Inheritance(self, region, store)
        self._kept[kept.serial] = kept
        return kept

    def of(self, serial: int) -> Inheritance | None:
        return self._kept.get(serial)

    def forget(self, child: _Child) -> None:
        self._children.discard(child)

    def _start(self) -> None:
        if not self._started:
            self.reactor = Reactor()
            asyncio.get_running_loop().add_reader(lib.au_children_fd(), self._arrived)
            self._started = True

    async def _start_there(self) -> None:
        self._start()

    def _arrived(self) -> None:
        native = ffi.new("struct au_child *")
        while True:
            result = lib.au_children_receive(native)
            if result > 0:
                self._number += 1
                self._came += 1
                try:
                    self._children.add(_Child(self, native, self._number))
                except Exception as error:
                    log.error("a forked child cannot be served: %s", error)
                    lib.au_children_release(native.uffd, native.socket)
                continue
            if result == -errno.EMFILE:
                self._came += 1
                log.error("no descriptor is free for a forked child; what it misses is an error")
                continue
            if result:
                log.error("a forked child could not be received: %s", os.strerror(-result))
            if result == -errno.EPIPE:
                asyncio.get_running_loop().remove_reader(lib.au_children_fd())
            return

    def disown_soon(self, kept: Inheritance) -> None:
        task = asyncio.get_running_loop().create_task(self.disown(kept))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def disown(self, kept: Inheritance) -> None:
        """A buffer is closed."""
        if kept._closed:
            return
        kept._closed = True
        self._kept.pop(kept.serial, None)
        for child in list(self._children):
            try:
                child.refuse(kept)
            except Exception as error:
                log.error("%r could not be told that a buffer was closed: %s", child, error)
                child.close()
        with contextlib.suppress(AiouffdError):
            await kept.store.aclose()


children = Children()
os.register_at_fork(after_in_parent=children._forked, after_in_child=children._after_fork)
