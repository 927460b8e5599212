"""Readahead: which blocks to fetch before they are touched.

Pure bookkeeping, no I/O. A *stream* is a sequence of touches at a constant distance: 1 for a
sequential scan, -1 for one backwards (both are *runs*), more for a strided one (a column of a
matrix). Two touches in a row begin a run forwards, three another stream.

Touches at random fall next to each other by chance, the more often the smaller the object: of two
hundred in 64 MiB some five do. So after a few touches that no stream foresaw, one that seems
to begin a stream has to be followed by another before anything is fetched for it. Random
access then costs the blocks that it touches and hardly any others.

How far a run is trusted to go on depends on what it has read, and on what was seen before.
Whoever begins with the first block reads all of the object more often than not: four times
as much. Any other run gets as much again, up to a window; a lead of two windows, and as
much under way, it has to earn, by a length of seven.

Columns of a table, and tensors among others, are runs that end, and many have the same length.
Where a run has ended is not seen: behind its last touch, and before the first block that was not
asked for. Those that have ended tell a new one how far it may go: at once up to where they did
for certain, and from there on with care. So the place is known better with each. Where three of
them began at the same distance the fourth is known by its first touch. Who touches what
comes behind everything that was asked for, and has not read the last of that, since it
has not arrived, has not come there by reading: another column begins where the lead over one ended.

Pages that are resident make no faults, so a reader is only seen when it reaches a block
that is missing or still in flight. That is when the window moves on; and once it has grown,
each piece that arrives is replaced by the next, up to the lead over the last
touch. So the source always has a window's worth to do, however far it is away.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from .advice import Advice

__all__ = ["Readahead", "Reads"]

#: Streams remembered at a time; the least recently used one is forgotten.
STREAMS = 16
#: Longest distance, in blocks, that counts as a stride.
LONGEST_STRIDE = 4096
#: Strided streams fetch single blocks, so their window is counted in blocks.
STRIDED_WINDOW = 16
#: After so many touches in a row that no stream foresaw, one that fits may be chance.
DOUBT = 4
#: Runs of which less was asked for may be chance, and say nothing of where others begin.
SHORT = 8
#: Runs that say how long another one will be: the last ones that ended.
EXAMPLES = 8
#: Ends of runs that are known to one in so many blocks are known well enough.
SHARP = 16
#: Lead of a run up to an end that is known, and of one that begins with the first block, in times
#: of what it has read.
KNOWN, WHOLE = 8, 4
#: Any other one gets as many blocks as it has read, less one in so many; twice as many up to HEAD.
LESS, HEAD = 16, 16
#: Lead of a long run, in times of what it has read, if that is more than a window: a column of four
#: windows costs 1.3 times its size at most.
EARNED = 2 / 7


class _Stream:
    __slots__ = (
        "back",
        "born",
        "doubted",
        "frontier",
        "guess",
        "last",
        "regular",
        "seen",
        "start",
        "step",
        "whole",
        "window",
    )

    def __init__(self, block: int, guess: int, now: int) -> None:
        self.start = self.last = block
        self.step = 0  # not known yet
        self.back = False  # places are counted from the end of the object
        self.guess = guess  # distance to the touch nearest before it; believed when repeated
        self.window = 0  # the longest lead that it has had
        self.doubted = False  # it fitted, and has to fit once more
        self.frontier = block + 1  # first block that was not asked for
        self.regular = False  # began where it was expected
        self.whole = now == 1 and block == 0  # perhaps all of the object will be read
        self.born = self.seen = now  # numbers of its first touch and its last one

    @property
    def done(self) -> int:
        """Blocks of it that were read at least; there are less than up to its frontier."""
        return self.last + 1 - self.start


class Readahead:
    """Plans for one buffer of ``blocks`` blocks; ``window`` is how much to keep under way, in
    blocks. The lead over the last touch stays below two windows.

    Once the window has grown, plans consist of whole pieces of ``piece`` blocks. ``advice`` is what
    the program knows: it goes before what was seen. ``there`` tells whether a block has arrived.
    """

    def __init__(
        self,
        blocks: int,
        window: int,
        piece: int = 1,
        advice: Advice | None = None,
        there: Callable[[int], bool] | None = None,
    ) -> None:
        self._advice = advice or Advice()
        self._there = there
        self._several = False  # whether there was a run yet
        self._blocks = blocks
        self._window = window
        self._piece = piece
        # Backwards, block ``n`` has the place ``top - 1 - n``, where pieces begin and end too.
        self._top = blocks + -blocks % piece
        self._streams: deque[_Stream] = deque(maxlen=STREAMS)
        self._strangers = 0  # touches in a row that no stream foresaw
        self._now = 0  # touches so far

    def touch(self, block: int) -> list[tuple[int, int]]:
        """A thread needs ``block``: returns ``(first, count)`` runs worth fetching now, what is
        needed first before the rest.

        The block itself is not among them.
        """
        hint, _ = self._advice.at(block)
        if self._window < 1 or hint == "random":
            return []
        self._now += 1
        stream = self._match(block)
        if stream is None:
            stream = _Stream(block, self._distance(block), self._now)
            self._streams.append(stream)
            stream.regular = self._is_regular(block)
            if hint != "sequential" and not stream.regular:
                self._strangers += 1
                return []
            stream.step = 1
        self._use(stream)
        if stream.window or stream.regular or hint == "sequential":
            self._strangers = 0
        elif self._strangers > DOUBT and not stream.doubted:
            stream.doubted = True
            place = self._place(stream, block)
            stream.last, stream.frontier = place, place + 1
            return []
        if stream.step == 1:
            runs = self._sequential(stream, self._place(stream, block))
        else:
            runs = self._strided(stream, block)
        return self._advice.without_random(runs)

    def read(self, first: int, last: int) -> list[tuple[int, int]]:
        """As `touch`, for blocks that are read in one go and on their way already: how much is
        needed is known, so more is worth it only where they continue what was read before."""
        hint, _ = self._advice.at(last)
        if self._window < 1 or hint == "random":
            return []
        self._now += 1
        for stream in self._streams:
            if stream.back or stream.step not in (0, 1):
                continue
            if stream.last <= first <= stream.last + 1:
                stream.step = 1
                stream.frontier = max(stream.frontier, last + 1)
                self._use(stream)
                # One more of the kind; small ones are like touches.
                length = last - first + 1
                most = length if length > self._piece and hint != "sequential" else None
                return self._advice.without_random(self._sequential(stream, last, most))
        stream = _Stream(first, 0, self._now)
        stream.last, stream.frontier = last, last + 1
        self._streams.append(stream)
        if hint != "sequential":
            return []
        stream.step = 1
        return self._advice.without_random(self._sequential(stream, last))

    def landed(self, first: int, count: int) -> list[tuple[int, int]]:
        """Readahead of ``count`` blocks from ``first`` on has arrived: what to fetch in its place.

        So that as much as the window stays under way while the reader works through what has
        arrived. The lead over the last touch is bounded: a reader that stops costs no more than
        that.
        """
        for stream in self._streams:
            if stream.step != 1 or stream.window < self._window:
                continue
            place = self._top - first - count if stream.back else first
            if stream.last - stream.window <= place < stream.frontier:
                start = stream.frontier
                end = min(self._limit(stream, replacing=True), start + max(count, self._piece))
                return self._advice.without_random(self._move_on(stream, start, end))
        return []

    # ------------------------------------------------------------------- streams

    def _match(self, block: int) -> _Stream | None:
        """The stream that ``block`` continues."""
        for stream in self._streams:
            if stream.step == 1:
                # Anywhere in the window: with several threads touches overtake each other.
                place = self._place(stream, block)
                if stream.last - stream.window <= place <= stream.frontier:
                    if self._skips(stream, place):
                        continue
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
                if stream.guess == -1:
                    self._turn(stream)
                else:
                    stream.step = stream.guess
                return stream
        return None

    def _skips(self, stream: _Stream, place: int) -> bool:
        """Whether somebody has come to the end of what was asked for without having read it: what
        is before has not arrived. Columns of a length lie where the lead over others ends."""
        if place < stream.frontier or place == stream.last + 1 or self._there is None:
            return False
        return not self._there(self._top - place if stream.back else place - 1)

    def _is_regular(self, block: int) -> bool:
        """Whether three runs began at a distance, and this is the beginning of the next."""
        if not self._several:
            return False
        starts = [
            stream.start
            for stream in self._streams
            if stream.step == 1 and not stream.back and stream.frontier - stream.start > SHORT
        ]
        for start in starts:
            distance = block - start
            # Pieces of a column are of the same number of bytes, and not quite of blocks.
            if distance > 1 and all(
                any(abs(start - back * distance - other) <= back for other in starts)
                for back in (1, 2)
            ):
                return True
        return False

    def _use(self, stream: _Stream) -> None:
        stream.seen = self._now
        if self._streams[-1] is not stream:
            self._streams.remove(stream)
            self._streams.append(stream)

    def _distance(self, block: int) -> int:
        """From the nearest touch that has no direction yet; 0 if none is near."""
        distances = [block - stream.last for stream in self._streams if not stream.step]
        nearest = min(distances, key=abs, default=0)
        return nearest if abs(nearest) <= LONGEST_STRIDE else 0

    def _turn(self, stream: _Stream) -> None:
        """It is a run backwards, which began a block before what was taken for its start."""
        stream.step, stream.back = 1, True
        stream.last = self._top - 1 - stream.last
        stream.start, stream.frontier = stream.last - 1, stream.last + 1

    def _place(self, stream: _Stream, block: int) -> int:
        return self._top - 1 - block if stream.back else block

    # ---------------------------------------------------------------------- runs

    def _sequential(
        self, stream: _Stream, place: int, most: int | None = None
    ) -> list[tuple[int, int]]:
        self._several = True
        stream.last = max(stream.last, place)
        start = max(stream.frontier, stream.last + 1)
        limit = self._limit(stream)
        if most is not None:
            limit = min(limit, stream.last + 1 + most)
        return self._move_on(stream, start, limit)

    def _move_on(self, stream: _Stream, start: int, end: int) -> list[tuple[int, int]]:
        if end <= start:
            return []
        stream.frontier = end
        if not stream.back:
            return [(start, end - start)]
        # Piece by piece, for what is nearest is needed first.
        cuts = [start, *range(start + self._piece - start % self._piece, end, self._piece), end]
        return [(self._top - b, b - a) for a, b in itertools.pairwise(cuts)]

    def _limit(self, stream: _Stream, *, replacing: bool = False) -> int:
        """The first block that is not to be asked for yet: after a touch, or with ``replacing``
        when something has arrived and its reader is still busy with it."""
        end = self._top if stream.back else self._blocks
        after = stream.last + 1
        lead, sure = self._lead(stream)
        stream.window = min(self._window, max(stream.window, lead))
        limit = after + lead
        grown = stream.window >= 2 * self._piece
        if grown:
            # Whole pieces, behind that which the reader waits for: they end where flights and huge
            # pages do.
            after += -after % self._piece
            if not sure:
                limit -= limit % self._piece
        double = replacing or stream.done * EARNED >= 2 * self._window
        most = self._window * 2 if double else self._window + (self._piece if grown else 0)
        return min(end, limit, after + most)

    def _lead(self, stream: _Stream) -> tuple[int, bool]:
        """How far the run is trusted to go on, in blocks, and whether its end is known there."""
        if not stream.back:
            hint, end = self._advice.at(stream.last)
            if hint == "sequential":
                return end - stream.last - 1, True
        done, known = stream.done, self._lengths(stream)
        for least, most in known:
            if done < most:
                near = least + max(2, least // SHARP)
                further = done + max(2, least // SHARP, done - least)
                lead = min(most, max(near, further)) - done
                return lead if stream.regular else min(KNOWN * done, lead), True
        if stream.whole:
            return min(WHOLE * done, 2 * self._window), False
        lead = max(min(2 * done, HEAD), done - done // LESS)
        lead = min(lead, max(self._window, int(done * EARNED)), 2 * self._window)
        if known:
            longest = known[-1][1]
            lead = min(lead, max(2, longest // SHARP, 2 * (done - longest)))
        return lead, False

    def _lengths(self, stream: _Stream) -> list[tuple[int, int]]:
        """Of the runs that ended before this one began: at least, at most; shortest first. Those
        that may have the same length are one."""
        runs = [
            (other.done, other.frontier - other.start)
            for other in self._streams
            if other.step == 1 and other.seen < stream.born
        ]
        found: list[tuple[int, int]] = []
        for least, most in sorted(runs[-EXAMPLES:], key=lambda run: run[1]):
            if found and least < found[-1][1]:
                found[-1] = max(least, found[-1][0]), found[-1][1]
            else:
                found.append((least, most))
        return found

    # ------------------------------------------------------------------- strides

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
