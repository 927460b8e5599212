"""Which addresses of a task come from which bytes of which file. No I/O.

Images of an incremental dump say of many pages only that the dump before has them, and that one
may say the same: `plan` follows each page to the generation that holds it. Ranges are cut where a
mapping ends, because no call of the kernel fills two mappings, and put together where a dump has
cut them for reasons of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Final, NamedTuple

from .format import PRESENT, ImageError, Pagemap, Vma

__all__ = ["ELSEWHERE", "Piece", "plan"]

#: The generation of pages that no image holds.
ELSEWHERE: Final = -1


class Piece(NamedTuple):
    """Memory of a task within one mapping, and where its bytes are. All in bytes.

    ``generation`` 0 is the images themselves, 1 their parent, and so on. `ELSEWHERE`: the dump left
    them to a page server, and ``offset`` is the address.
    """

    start: int
    length: int
    generation: int
    offset: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.length


def plan(
    generations: Sequence[Pagemap], vmas: Sequence[Vma], *, everything: bool = False
) -> list[Piece]:
    """What a lazy restore leaves to whoever serves faults, by address.

    ``generations`` are the task's pagemap and those of its parent images, in this order, as many as
    are needed; ``vmas`` its mappings, by address. With ``everything`` also what CRIU restores
    itself, at once. Raises ImageError where they contradict each other.
    """
    starts = [[entry.start for entry in pagemap.entries] for pagemap in generations]
    pieces: list[Piece] = []
    for piece in _inside(generations[0].name, _followed(generations, starts, everything), vmas):
        if pieces and _continues(pieces[-1], piece) and not _begins_vma(vmas, piece.start):
            last = pieces[-1]
            pieces[-1] = last._replace(length=last.length + piece.length)
        else:
            pieces.append(piece)
    return pieces


def _continues(before: Piece, after: Piece) -> bool:
    return (
        before.end == after.start
        and before.generation == after.generation
        and before.offset + before.length == after.offset
    )


def _begins_vma(vmas: Sequence[Vma], address: int) -> bool:
    at = bisect_right(vmas, address, key=attrgetter("start")) - 1
    return at >= 0 and vmas[at].start == address


def _followed(
    generations: Sequence[Pagemap], starts: Sequence[Sequence[int]], everything: bool
) -> Iterator[Piece]:
    for entry in generations[0].entries:
        if entry.lazy or everything:
            yield from _follow(generations, starts, 0, entry.start, entry.end)


def _follow(
    generations: Sequence[Pagemap],
    starts: Sequence[Sequence[int]],
    generation: int,
    start: int,
    end: int,
) -> Iterator[Piece]:
    """Where the pages of ``start`` to ``end`` are, asked of ``generation``."""
    if generation == len(generations):
        raise ImageError(
            f"{generations[-1].name} says that the pages at {start:#x} are in the parent images,"
            " and there are none",
            hint="give the images of the dumps before with parents=",
        )
    pagemap = generations[generation]
    at = max(0, bisect_right(starts[generation], start) - 1)
    while start < end:
        entry = pagemap.entries[at] if at < len(pagemap.entries) else None
        if entry is None or not entry.start <= start < entry.end:
            raise ImageError(
                f"{pagemap.name}, of a dump before, lacks the page at {start:#x}, which"
                f" {generations[generation - 1].name} leaves to it"
            )
        stop = min(end, entry.end)
        if entry.in_parent:
            yield from _follow(generations, starts, generation + 1, start, stop)
        elif entry.flags & PRESENT:
            offset = entry.offset + start - entry.start
            yield Piece(start, stop - start, generation, offset)
        elif generation:
            raise ImageError(f"{pagemap.name}, of a dump before, does not hold {start:#x} itself")
        elif entry.lazy:
            yield Piece(start, stop - start, ELSEWHERE, start)
        start, at = stop, at + 1


def _inside(name: str, pieces: Iterator[Piece], vmas: Sequence[Vma]) -> Iterator[Piece]:
    """The pieces, cut where mappings end. ImageError for pages that are in none."""
    at = 0
    for piece in pieces:
        start, end, generation, offset = piece.start, piece.end, piece.generation, piece.offset
        while start < end:
            while at < len(vmas) and vmas[at].end <= start:
                at += 1
            if at == len(vmas) or start < vmas[at].start:
                raise ImageError(f"{name} has the page at {start:#x}, where nothing is mapped")
            stop = min(end, vmas[at].end)
            yield Piece(start, stop - start, generation, offset)
            offset += stop - start
            start = stop
