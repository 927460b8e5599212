"""Bringing what no thread waits for: ahead of its faults, in a given order, or all that is missing.

It goes behind what is waited for, in the store and here: little of it is on its way at a time, and
none while something has to be tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Protocol

from ..errors import SourceError
from ..fetch.readahead import Readahead
from .areas import Area, AreaMap
from .blocks import BlockStore, Wanter
from .filling import AGAIN_LONGEST, Filler
from .steps import in_steps

__all__ = ["PLACES", "Bringer", "Brought"]

#: Areas of one block that are filled in one turn of the loop; and how many areas are many.
PLACES, MANY = 64, 1024
#: Blocks that `complete` and `prefetch` ask for at a time.
WINDOW = 64


class Brought(Wanter, Protocol):
    """Owner on whose behalf a `Bringer` requests blocks. It is told of every block first, see
    `Bringer.heard`."""

    def fill(self, area: Area, store: BlockStore, block: int, data: memoryview | None) -> None:
        """Fill what is missing of a block's place in ``area``."""


class Bringer:
    """Brings blocks for ``owner``, whose memory shows ``areas``.

    :param wanted: blocks that threads wait for; these come without us.
    """

    def __init__(
        self,
        owner: Brought,
        filler: Filler,
        areas: AreaMap,
        wanted: dict[tuple[BlockStore, int], list[int]],
    ) -> None:
        self._owner = owner
        self._filler = filler
        self._areas = areas
        self._wanted = wanted
        self._liked: dict[tuple[BlockStore, int], None] = {}
        self._room = asyncio.Event()
        self._ahead: dict[BlockStore, Readahead] = {}
        self._loop = asyncio.get_running_loop()
        self._spreading = 0
        # Pages were found not to be mapped, before `complete` looked for them; perhaps by who had
        # this memory before.
        self._was_absent = True
        self._completing = 0
        #: How often blocks came, or were forgotten, while nothing could be filled.
        self.missed = 0

    # ----------------------------------------------------------------- orders

    async def prefetch(self, store: BlockStore, runs: Iterable[tuple[int, int]]) -> None:
        """See `Memory.prefetch`."""
        piece = max(1, (1 << 20) // store.block_size) if len(self._areas) < MANY else 1
        for first, count in runs:
            for block in range(first, first + count, piece):
                await self._have_room()
                if self._stopped:
                    return
                self._like(store, block, min(piece, first + count - block))
                await asyncio.sleep(0)

    async def complete(self) -> None:
        """See `Memory.complete`."""
        self._completing += 1
        try:
            if self._was_absent:
                self._was_absent = False
                for area in list(self._areas):
                    await in_steps(area.forgetting_absent())
            await self._complete()
        finally:
            self._completing -= 1

    async def _complete(self) -> None:
        stats, areas = self._filler.stats, self._areas
        while not self._stopped:
            before = await self._missing_bytes()
            if not before:
                return
            state = (stats.retries, areas.version, self.missed)
            for store, runs in self._blocks_of_areas().items():
                await self.prefetch(store, runs)
            while self._liked and not self._stopped:
                self._room.clear()
                await self._room.wait()
            if await self._missing_bytes() >= before:
                if self._wanted:
                    # What threads wait for is on its way without us.
                    self._room.clear()
                    await self._room.wait()
                elif (
                    self._filler.resting
                    or self._filler.busy
                    or self._spreading
                    or state != (stats.retries, areas.version, self.missed)
                ):
                    # Something was in the way, or is elsewhere now.
                    await asyncio.sleep(AGAIN_LONGEST)
                elif not self._stopped:
                    raise SourceError(f"{self._owner!r}: some of it could not be brought")

    def ahead(self, store: BlockStore, block: int, length: int) -> None:
        """A thread has needed ``block``: bring up to ``length`` bytes that it may need next."""
        ahead = self._ahead.get(store)
        if ahead is None:
            window = max(1, length // store.block_size)
            ahead = self._ahead[store] = Readahead(store.blocks, window, max(1, window // 4))
        for first, count in ahead.touch(block):
            self._like(store, first, count)

    # ---------------------------------------------------------------- missing

    def may_miss(self) -> bool:
        """Whether something is missing, or was not mapped as it was to be filled."""
        return self._was_absent or any(
            area.misses_any() for area in self._areas if area.store is not None
        )

    def saw_absent(self) -> None:
        """A page was not mapped as it was to be filled. It may be later."""
        if not self._completing:
            self._was_absent = True

    async def _missing_bytes(self) -> int:
        found = 0
        for area in list(self._areas):
            if area.store is not None:
                found += await in_steps(area.missing_bytes())
        return found

    def _blocks_of_areas(self) -> dict[BlockStore, list[tuple[int, int]]]:
        """Runs of blocks that anything shows, by object. Small areas may share blocks."""
        found: dict[BlockStore, list[tuple[int, int]]] = {}
        for area in self._areas:
            if area.store is not None:
                size = area.store.block_size
                first, end = area.offset // size, -(-(area.offset + area.length) // size)
                runs = found.setdefault(area.store, [])
                if runs and runs[-1][0] <= first <= sum(runs[-1]):
                    before, count = runs.pop()
                    first, end = before, max(end, before + count)
                runs.append((first, end - first))
        return found

    def _misses(self, store: BlockStore, block: int) -> bool:
        if (store, block) in self._liked or (store, block) in self._wanted:
            return False
        if not any(
            area.missing(start, end) for area, start, end in self._areas.of_block(store, block)
        ):
            return False
        at_hand = store.peek(block)
        if at_hand is not None:
            self.spread(store, block, at_hand[0])
        return at_hand is None

    # ------------------------------------------------------------------ blocks

    def _like(self, store: BlockStore, first: int, count: int) -> None:
        """Ask for blocks in the background, but those that nothing of is missing."""
        run = 0
        for block in range(first, first + count + 1):
            misses = block < first + count and self._misses(store, block)
            if self._stopped:
                return  # filling what was at hand has shown that the process is gone
            if misses:
                self._liked[store, block] = None
                run += 1
            elif run:
                store.like(block - run, run, self._owner)
                run = 0

    def heard(self, store: BlockStore, block: int) -> bool:
        """A block has come, or failed. Whether it was asked for here; `spread` it then."""
        liked = (store, block) in self._liked
        if liked:
            del self._liked[store, block]
        self._room.set()
        return liked

    def spread(
        self,
        store: BlockStore,
        block: int,
        data: memoryview | None,
        first: int = 0,
        version: int = -1,
    ) -> None:
        """Fill all places of a block, a few in one turn of the loop: areas may show the same bytes
        over and over."""
        if self._filler.resting:
            self.missed += 1
            return
        owner = self._owner
        if version != self._areas.version:
            first = 0
        places = self._areas.of_block(store, block)
        try:
            for area, start, end in places[first : first + PLACES]:
                if area.missing(start, end):
                    owner.fill(area, store, block, data)
        except Exception as error:
            owner.broken(error)
            return
        if first + PLACES < len(places):
            # It is lent to us until we return.
            kept = data if data is None or isinstance(data.obj, bytes) else memoryview(bytes(data))
            self._spreading += 1
            rest = (store, block, kept, first + PLACES, self._areas.version)
            self._loop.call_soon(self._spread_on, *rest)

    def _spread_on(self, *rest: Any) -> None:
        self._spreading -= 1
        self.spread(*rest)

    # -------------------------------------------------------------------- room

    @property
    def _stopped(self) -> bool:
        return self._filler.fd < 0

    async def _have_room(self) -> None:
        while (len(self._liked) >= WINDOW or self._filler.behind) and not self._stopped:
            self._room.clear()
            await self._room.wait()

    def look_again(self) -> None:
        """Something that we may have waited for has come to an end."""
        self._room.set()

    def forget(self, store: BlockStore) -> list[int]:
        """Nothing of one object is wanted any more. Returns the blocks that were."""
        blocks = [block for of, block in self._liked if of is store]
        for block in blocks:
            del self._liked[store, block]
        return blocks

    def forget_all(self) -> list[tuple[BlockStore, int]]:
        """Nothing is wanted any more. Returns what was."""
        liked = list(self._liked)
        self._liked.clear()
        self.missed += 1
        self._room.set()
        return liked

    def stop(self) -> None:
        """For good, after the filler was stopped. Once."""
        del self._owner  # as there
