"""The back-off schedule: how long every retry loop of the package waits before its next try."""

from __future__ import annotations

import random

from ..errors import SourceError

__all__ = ["LONGEST_OBEYED", "Backoff"]

#: The longest wait, in seconds, that a source may ask for, as HTTP's Retry-After does
#: (https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3). A server that sends a wrong or a very
#: long value must not block a page fault for that time; one request a minute is no load.
LONGEST_OBEYED = 60.0


class Backoff:
    """Exponential back-off with jitter, from ``first`` to ``longest`` seconds.

    Each pause is drawn from 0.5 to 1.5 times its nominal value, capped at ``longest``, so that
    callers that failed together do not retry together. Not thread-safe.

    Args:
        first: The first nominal pause, in seconds; it doubles from there.
        longest: The longest pause, in seconds.
    """

    __slots__ = ("_first", "_longest", "pause")

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        #: The next pause, in seconds, before it is spread.
        self.pause = first

    def reset(self) -> None:
        """Start again from the first pause, after a success."""
        self.pause = self._first

    def next(self, error: SourceError | None = None) -> float:
        """Return the seconds to wait now, and double the pause after it.

        Args:
            error: The failure. If its ``retry_after`` is longer than the pause it is obeyed, up to
                `LONGEST_OBEYED`.
        """
        pause = self.pause
        self.pause = min(pause * 2, self._longest)
        spread = random.uniform(pause * 0.5, min(pause * 1.5, self._longest))
        asked = (error and error.retry_after) or 0.0
        return max(spread, min(asked, LONGEST_OBEYED))
