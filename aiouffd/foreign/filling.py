"""Putting pages into the memory of another process, and trying again.

Facts about the kernel that shape this file (Linux 6.18; all but the last since 4.11):

- While a REMOVE, UNMAP, REMAP or FORK event is unread, every ioctl that fills pages answers EAGAIN,
  and for a moment after, until the thread that caused it has run. So what got EAGAIN is tried again
  on a timer, and before that everything is read.
- A thread that drops page after page, as a balloon does, leaves a microsecond or two between that
  moment and its next event. Nothing that reads first and fills in its next step ever meets it. So
  pages that threads wait for are filled by native code that reads and tries in turns, and hands
  over what it has read.
- EEXIST does not wake anybody. Of a huge page it can also mean that there is none to be had.
- The process's end is not told at all: ioctls answer ESRCH from then on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Protocol

from ..kernel.lib import ffi, lib
from ..kernel.results import unpack
from .areas import Area
from .stats import MemoryStats

if TYPE_CHECKING:
    from ..kernel.calls.pointers import Bytes

__all__ = ["AGAIN_FIRST", "AGAIN_LONGEST", "Filled", "Filler"]

log = logging.getLogger("aiouffd")

#: Pauses between tries of what got EAGAIN, in seconds: first and longest.
AGAIN_FIRST, AGAIN_LONGEST = 0.0002, 0.02
#: Pause after an error that is none of the known ones, which may last, and between two lines in the
#: log of it, in seconds. How long one turn of trying again may take.
TROUBLE_PAUSE, COMPLAINTS, TRY_TURN = 0.5, 30.0, 0.003
#: How long an urgent fill waits for a moment between two events, in nanoseconds, and how many
#: messages it may read for that.
PATIENCE, HEARD = 500_000, 64
#: Tries of a huge page that "exists" and does not, before the pool counts as empty.
HUGE_TRIES = 100


class Filled(Protocol):
    """Whose memory a `Filler` fills."""

    def overhear(self, messages: memoryview, count: int) -> None:
        """So many messages were read within `Filler.put`: apply them, and keep the faults for the
        next `hear`."""

    def hear(self) -> dict[int, int]:
        """Read all there is to read, before anything is tried again. Returns addresses for which
        threads wait, and flags."""

    def serve(self, address: int, flags: int = 0) -> None:
        """Try an address again, or for the first time if it was just heard of."""

    def caught_up(self) -> None:
        """Nothing is left to be tried again."""

    def vanished(self) -> None:
        """The process is gone."""

    def broken(self, error: Exception) -> None:
        """One of the above has raised, which is a bug of ours."""


class Filler:
    """Fills pages through one descriptor, for ``owner``."""

    def __init__(self, owner: Filled, fd: int, stats: MemoryStats) -> None:
        #: -1 once it was stopped.
        self.fd = fd
        #: Nothing is put anywhere: stopped, or somebody else may do that now.
        self.resting = False
        self.stats = stats
        #: Bytes of the last `put` that were not mapped, in ``[0]``.
        self.absent = ffi.new("uint64_t *")
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._again: dict[int, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._pause = AGAIN_FIRST
        self._huge_tries: dict[int, int] = {}
        self._next_complaint = 0.0
        self._messages = ffi.new("struct au_uffd_msg[]", HEARD)
        self._overheard = memoryview(ffi.buffer(self._messages)).cast("B")
        self._heard = ffi.new(
            "struct au_foreign_heard *",
            {"patience": PATIENCE, "messages": self._messages, "room": HEARD},
        )

    def put(
        self,
        op: int,
        start: int,
        source: Bytes,
        length: int,
        page_size: int,
        area: Area | None = None,
        *,
        urgent: bool = False,
    ) -> int:
        """One native call, which notes what has become of the pages in ``area``. Returns the bytes
        done; what could not be done now is tried again.

        An ``urgent`` one, for which a thread waits, is not put off at once where events are in the
        way. The owner gets those that are read meanwhile, before this returns.
        """
        if self.resting:
            self.absent[0] = 0
            return 0
        result = self.attempt(op, start, source, length, page_size, area, urgent=urgent)
        if result >= 0:
            self._pause = AGAIN_FIRST
            return result
        done, code = unpack(result)
        if self.fd < 0:
            return done  # what was heard was the end
        if code in (errno.ESRCH, errno.EBADF):
            self._owner.vanished()
            return done
        self.stats.retries += 1
        if code != errno.EAGAIN:
            self._pause = TROUBLE_PAUSE
            now = self._loop.time()
            if now >= self._next_complaint:
                self._next_complaint = now + COMPLAINTS
                log.error(
                    "%r: filling %d bytes at %#x fails, and is tried again: %s",
                    self._owner, length - done, start + done, os.strerror(code),
                )  # fmt: skip
        self.later(start + done)
        return done

    def attempt(
        self,
        op: int,
        start: int,
        source: Bytes,
        length: int,
        page_size: int,
        area: Area | None = None,
        *,
        urgent: bool,
    ) -> int:
        """One call of ``au_foreign_fill`` with its result, and nothing else: see `put`."""
        heard = self._heard
        result = lib.au_foreign_fill(
            self.fd,
            op,
            start,
            source,
            length,
            page_size,
            # Not in a variable, which a traceback would keep: see `pin`.
            ffi.NULL
            if area is None or area.states is None
            else ffi.from_buffer("uint8_t[]", area.states[area.page_of(start) :]),
            self.absent,
            heard if urgent else ffi.NULL,
        )
        if heard.count:
            count, heard.count = heard.count, 0
            self._pause = AGAIN_FIRST
            # What it has heard of is served in a turn of its own.
            self._loop.call_soon(self._try_again)
            self._owner.overhear(self._overheard, count)
        return result

    def pool_is_empty(self, page: int) -> bool:
        """Whether a huge page that a thread waits for, though we have put it there, was tried so
        often that there can be none to be had. It is tried again then."""
        tries = self._huge_tries[page] = self._huge_tries.get(page, 0) + 1
        if tries % HUGE_TRIES:
            return False
        log.error("%r: no huge pages are left for it; see vm.nr_hugepages", self._owner)
        self.later(page)
        self._pause = AGAIN_LONGEST
        return True

    # -------------------------------------------------------------- try again

    @property
    def behind(self) -> bool:
        """Whether any address is to be tried again."""
        return bool(self._again)

    @property
    def busy(self) -> bool:
        """Whether any address is to be tried again, or messages are to be read again."""
        return bool(self._again) or self._timer is not None

    def later(self, address: int) -> None:
        """Serve ``address`` again in a while (0: only read)."""
        if address:
            self._again[address] = None
        if self._timer is None and self.fd >= 0:
            self._timer = self._loop.call_later(self._pause, self._try_again)
            self._pause = min(self._pause * 2, AGAIN_LONGEST)

    def press(self) -> None:
        """There are messages. What is to be tried again has its best chance right after one was
        read, and tries to read them itself."""
        again, self._again = self._again, {}
        self._serve_in_turn(self._owner, [(address, 0) for address in again])

    def not_again(self, start: int, end: int) -> None:
        """Nothing is to be tried again where something else may be now; who waits asks anew."""
        if self._again:
            self._again = {at: None for at in self._again if not start <= at < end}

    def _try_again(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.resting:
            return
        owner = self._owner
        try:
            faults = owner.hear()
            again, self._again = self._again, {}
            for address in again:
                faults.setdefault(address, 0)
            self._serve_in_turn(owner, list(faults.items()))
            if not self._again:
                owner.caught_up()
        except Exception as error:
            owner.broken(error)

    def _serve_in_turn(self, owner: Filled, faults: list[tuple[int, int]]) -> None:
        """As many as can be served and as there is time for; the rest later."""
        limit = time.perf_counter() + TRY_TURN
        for number, (address, flags) in enumerate(faults, 1):
            if self.fd < 0:
                return
            before = self.stats.retries
            owner.serve(address, flags)
            if self.stats.retries > before or time.perf_counter() > limit:
                # What is in the way of one is most often in the way of all; but the next to be
                # tried is another one.
                if rest := faults[number:]:
                    self._again = {**dict.fromkeys(address for address, _ in rest), **self._again}
                    self.later(0)
                return

    # -------------------------------------------------------------------- end

    def rest(self) -> None:
        """Put nothing, and forget what was to be tried again, until `go_on`."""
        self.resting = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._again.clear()

    def go_on(self) -> None:
        """Put pages again, after `rest`."""
        self.resting = False
        if self._again:
            self.later(0)

    def stop(self) -> None:
        """For good: the descriptor is about to be closed. Once."""
        self.fd = -1
        self.rest()
        # A cycle would keep the states of all pages until the collector comes.
        del self._owner
