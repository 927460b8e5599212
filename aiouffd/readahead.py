"""Readahead: which blocks to fetch before they are touched.

Pure bookkeeping, no I/O. A *stream* is a run of touches at a constant distance: 1 for a
sequential scan, more for a strided one (a column of a matrix), negative backwards. Two
touches in a row begin a stream, and its window doubles with every touch that was foreseen.

Touches at random fall next to each other by chance, the more often the smaller the object: of two
hundred in 64 MiB some five do. So after a few touches that no stream foresaw, one that seems
to begin a stream has to be followed by another before anything is fetched for it. Random
access then costs the blocks that it touches and hardly any others.

Pages that are resident make no faults, so a reader is only seen when it reaches a block
that is missing or still in flight. That is when the window moves on; and once it has grown,
each piece that arrives is replaced by the next, up to a lead of two windows over the last
touch. So the source always has a window's worth to do, however far it is away.
"""

from __future__ import annotations

import itertools
from collections import deque

__all__ = ["Readahead", "Reads"]

#: Streams remembered at a time; the least recently used one is forgotten.
STREAMS = 16
#: Longest distance, in blocks, that counts as a stride.
LONGEST_STRIDE = 4096
#: Strided streams fetch single blocks, so their window is counted in blocks.
STRIDED_WINDOW = 16
#: After so many touches in a row that no stream foresaw, one that fits may be chance.
DOUBT = 4


class _Stream:
    __slots__ = ("doubted", "frontier", "guess", "last", "step", "window")

    def __init__(self, block: int, guess: int) -> None:
        self.last = block
        self.step = 0  # not known yet
        self.guess = guess  # distance to the touch nearest before it; believed when repeated
        self.window = 0
        self.doubted = False  # it fitted, and has to fit once more
        self.frontier = block + 1  # first block that was not asked for


class Readahead:
    """Plans for one buffer of ``blocks`` blocks; ``window`` is the longest lead in blocks.

    Once the window has grown, plans consist of whole pieces of ``piece`` blocks.
    """

    def __init__(self, blocks: int, window: int, piece: int = 1) -> None:
        self._blocks = blocks
        self._window = window
        self._piece = piece
        self._streams: deque[_Stream] = deque(maxlen=STREAMS)
        self._strangers = 0  # touches in a row that no stream foresaw

    def touch(self, block: int) -> list[tuple[int, int]]:
        """A thread needs ``block``: returns ``(first, count)`` runs worth fetching now.

        The block itself is not among them.
        """
        if self._window < 1:
            return []
        stream = self._match(block)
        if stream is None:
            self._strangers += 1
            self._streams.append(_Stream(block, self._distance(block)))
            return []
        if stream.window:
            self._strangers = 0
        elif self._strangers > DOUBT and not stream.doubted:
            stream.doubted = True
            stream.last, stream.frontier = block, block + 1
            return []
        if stream.step == 1:
            return self._sequential(stream, block)
        return self._strided(stream, block)

    def read(self, first: int, last: int) -> list[tuple[int, int]]:
        """As `touch`, for blocks that are read in one go and on their way already: how much is
        needed is known, so more is worth it only where they continue what was read before."""
        if self._window < 1:
            return []
        for stream in self._streams:
            if stream.step in (0, 1) and stream.last <= first <= stream.last + 1:
                stream.step = 1
                stream.window = max(stream.window, min(self._window, last - first + 1) // 2)
                stream.frontier = max(stream.frontier, last + 1)
                return self._sequential(stream, last)
        self._streams.append(_Stream(last, 0))
        return []

    def landed(self, first: int, count: int) -> list[tuple[int, int]]:
        """Readahead of ``count`` blocks from ``first`` on has arrived: what to fetch in its place.

        So that as much as the window stays under way while the reader works through what has
        arrived. The lead over the last touch stays below two windows: a reader that stops
        costs no more than that.
        """
        for stream in self._streams:
            if stream.step != 1 or stream.window < self._window:
                continue
            if stream.last - stream.window <= first < stream.frontier:
                start = stream.frontier
                limit = min(self._blocks, self._ahead_of(stream) + 2 * self._window)
                end = min(limit, start + max(count, self._piece))
                end = end if end == self._blocks else end - end % self._piece
                if end <= start:
                    return []
                stream.frontier = end
                return [(start, end - start)]
        return []

    def _match(self, block: int) -> _Stream | None:
        """The stream that ``block`` continues."""
        for stream in self._streams:
            if stream.step == 1:
                # Anywhere in the window: with several threads touches overtake each other.
                if stream.last - stream.window <= block <= stream.frontier:
                    return stream
            elif stream.step:
                # The steps in between were there already, so nobody told us of them.
                steps, rest = divmod(block - stream.last, stream.step)
                if not rest and 1 <= steps <= stream.window + 1:
                    return stream
            elif block == stream.last + 1:
                stream.step = 1
                stream.frontier = block + 1
                return stream
            elif stream.guess and block == stream.last + stream.guess:
                stream.step = stream.guess
                return stream
        return None

    def _distance(self, block: int) -> int:
        """From the nearest touch that has no direction yet; 0 if none is near."""
        distances = [block - stream.last for stream in self._streams if not stream.step]
        nearest = min(distances, key=abs, default=0)
        return nearest if abs(nearest) <= LONGEST_STRIDE else 0

    def _sequential(self, stream: _Stream, block: int) -> list[tuple[int, int]]:
        stream.window = min(self._window, stream.window * 2 or 2)
        stream.last = max(stream.last, block)
        start = max(stream.frontier, block + 1)
        end = min(self._blocks, self._ahead_of(stream) + stream.window)
        if end <= start:
            return []
        stream.frontier = max(stream.frontier, end)
        return [(start, end - start)]

    def _ahead_of(self, stream: _Stream) -> int:
        """Where the window begins. Once it has grown, behind the piece that the reader waits
        for: plans are whole pieces then, which end where flights and huge pages do."""
        after = stream.last + 1
        return after if stream.window < 2 * self._piece else after + -after % self._piece

    def _strided(self, stream: _Stream, block: int) -> list[tuple[int, int]]:
        stream.window = min(STRIDED_WINDOW, self._window, stream.window * 2 or 1)
        stream.last = block
        runs = []
        for index in range(1, stream.window + 1):
            target = block + index * stream.step
            if 0 <= target < self._blocks:
                runs.append((target, 1))
        return runs


class Reads:
    """Runs of blocks that threads are reading: how much is needed there is known, and touches
    within them tell nothing. Any thread; no locks, because steps of a dict are atomic."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[int, int]] = {}
        self._numbers = itertools.count()

    def begin(self, first: int, last: int) -> int:
        """A thread reads ``first`` to ``last``. Returns the number for `end`."""
        number = next(self._numbers)
        self._runs[number] = first, last
        return number

    def end(self, number: int) -> None:
        """It has read, or given up."""
        self._runs.pop(number, None)

    def __contains__(self, block: int) -> bool:
        runs = list(self._runs.values()) if self._runs else ()
        return any(first <= block <= last for first, last in runs)
