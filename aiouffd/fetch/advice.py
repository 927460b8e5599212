"""Advice: what a program has said about the ways in which it will read ranges of a buffer."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Literal, TypeAlias, get_args

__all__ = ["HINTS", "Advice", "Hint"]

Hint: TypeAlias = Literal["normal", "sequential", "random"]
HINTS: tuple[Hint, ...] = get_args(Hint)


class Advice:
    """Hints for ranges of blocks; what was said last counts. Any thread may say something while
    others look, which see all of it or nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (first, end, hint), in order, apart from each other; replaced as a whole.
        self._ranges: tuple[tuple[int, int, Hint], ...] = ()

    def say(self, hint: Hint, first: int, end: int) -> None:
        """That blocks from ``first`` to before ``end`` will be read like this."""
        with self._lock:
            ranges: list[tuple[int, int, Hint]] = []
            if hint != "normal" and first < end:
                ranges.append((first, end, hint))
            for start, stop, other in self._ranges:
                if start < first:
                    ranges.append((start, min(stop, first), other))
                if stop > end:
                    ranges.append((max(start, end), stop, other))
            self._ranges = tuple(sorted(ranges))

    def at(self, block: int) -> tuple[Hint, int]:
        """The hint for a block, and the end of its range."""
        ranges = self._ranges
        if ranges:
            index = bisect_right(ranges, block, key=lambda each: each[0]) - 1
            if index >= 0 and block < ranges[index][1]:
                return ranges[index][2], ranges[index][1]
        return "normal", block + 1

    def without_random(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What is left of ``(first, count)`` runs that might be read ahead, in their order."""
        for start, stop, hint in self._ranges:
            if hint == "random":
                runs = [
                    (a, b - a)
                    for first, count in runs
                    for a, b in (
                        (first, min(first + count, start)),
                        (max(first, stop), first + count),
                    )
                    if a < b
                ]
        return runs
