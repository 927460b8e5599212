"""What a buffer counts while it works."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Tally"]


@dataclass(slots=True)
class Tally:
    """Counters of one buffer, shared by its fetchers."""

    faults: int = 0
    flights: int = 0
    fetched_bytes: int = 0
    readahead_bytes: int = 0
    retries: int = 0
    failures: int = 0
    rescued: int = 0
    last_error: str | None = None
    #: Finished flights by duration: item i counts those under 2**i milliseconds.
    seconds: list[int] = field(default_factory=lambda: [0] * 20)

    def landed(self, duration: float) -> None:
        self.seconds[min(19, max(0, int(duration * 1000)).bit_length())] += 1
