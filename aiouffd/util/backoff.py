"""How long to wait before something is tried again: decided here for all who try again."""

from __future__ import annotations

import random

from ..errors import SourceError

__all__ = ["LONGEST_OBEYED", "Backoff"]

#: The longest wait, in seconds, that a source may ask for (HTTP's Retry-After, RFC 9110, 10.2.3).
#: A server that is wrong about it, or wants to be left alone until tomorrow, must not stop for good
#: a thread that waits for a page: asking once a minute is a burden to nobody.
LONGEST_OBEYED = 60.0


class Backoff:
    """Pauses that double, from ``first`` to ``longest`` seconds. Each is spread over a half to one
    and a half times itself, but never longer than ``longest``: those who failed together must not
    come back together."""

    __slots__ = ("_first", "_longest", "pause")

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        #: The next pause, in seconds, before it is spread.
        self.pause = first

    def reset(self) -> None:
        """Something went well meanwhile."""
        self.pause = self._first

    def next(self, error: SourceError | None = None) -> float:
        """Seconds to wait now; longer if ``error`` says that its source has asked for that."""
        pause = self.pause
        self.pause = min(pause * 2, self._longest)
        spread = random.uniform(pause * 0.5, min(pause * 1.5, self._longest))
        asked = (error and error.retry_after) or 0.0
        return max(spread, min(asked, LONGEST_OBEYED))
