"""Who waits for long is told of, so that a source which never answers can be told from work."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from typing import TYPE_CHECKING, Any

from ..util.usercode import describe

if TYPE_CHECKING:
    from .flights import Flights

__all__ = ["Silence"]

log = logging.getLogger("aiouffd")

#: Seconds that somebody has waited for bytes before it is said.
PATIENCE = 10.0
#: Seconds between two lines of one buffer: first and longest.
AGAIN_FIRST, AGAIN_LONGEST = 30.0, 600.0


class Silence:
    """Looks now and then at the flights of one engine, while there are any, and logs a WARNING
    about the one that somebody has waited for longest. On the engine's loop."""

    __slots__ = ("_again", "_flights", "_next", "timer")

    def __init__(self, flights: Flights[Any]) -> None:
        self._flights = weakref.ref(flights)
        #: Of its next look; there is none while nothing is under way.
        self.timer: asyncio.TimerHandle | None = None
        self._next = 0.0
        self._again = AGAIN_FIRST

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Something is under way."""
        if self.timer is None:
            self.timer = loop.call_later(PATIENCE, self._look, loop)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self.timer = None
        flights = self._flights()
        if flights is None or flights.closed or not flights.of:
            self._again = AGAIN_FIRST
            return
        now = time.monotonic()
        waiting = {flight for flight in flights.of.values() if flight.wanted}
        oldest = min(waiting, key=lambda flight: flight.since, default=None)
        if oldest is not None and now - oldest.since >= PATIENCE and now >= self._next:
            self._next = now + self._again
            self._again = min(self._again * 2, AGAIN_LONGEST)
            log.warning(
                "%s: somebody has waited for %.0f s; %s%s",
                flights.describe(oldest),
                now - oldest.since,
                "the source has not answered yet"
                if oldest.error is None
                else describe(oldest.error),
                f" ({len(waiting)} fetches wait)" if len(waiting) > 1 else "",
            )
        self.watch(loop)
