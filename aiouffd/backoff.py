"""How long to wait before a source is asked again: decided here for all who try again."""

from __future__ import annotations

from .errors import SourceError

__all__ = ["LONGEST_OBEYED", "pause_after"]

#: The longest wait, in seconds, that a source may ask for (HTTP's Retry-After, RFC 9110, 10.2.3).
#: A server that is wrong about it, or wants to be left alone until tomorrow, must not stop for good
#: a thread that waits for a page: asking once a minute is a burden to nobody.
LONGEST_OBEYED = 60.0


def pause_after(error: SourceError, pause: float) -> float:
    """Seconds to wait after ``error``: ``pause``, or longer if the source has asked for that."""
    return max(pause, min(error.retry_after or 0.0, LONGEST_OBEYED))
