"""Counts of what was done."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MemoryStats"]


@dataclass(slots=True)
class MemoryStats:
    """What was done for one address space, or with ``+=`` for several."""

    faults: int = 0
    events: int = 0
    installed_bytes: int = 0
    zero_pages: int = 0
    poisoned_pages: int = 0
    retries: int = 0
    forks: int = 0

    def __iadd__(self, other: MemoryStats) -> MemoryStats:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self
