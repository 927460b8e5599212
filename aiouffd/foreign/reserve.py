"""File descriptors held in reserve, for when there are no others (EMFILE)."""

from __future__ import annotations

import os

__all__ = ["Reserve"]


class Reserve:
    """A few descriptors held back for when no others are left: a fork waits for its event to be
    read, and that needs one."""

    def __init__(self, count: int = 8) -> None:
        self._count = count
        self._held: list[int] = []
        self.fill()

    def give(self) -> bool:
        """Let go of one. False if there is none left."""
        if not self._held:
            return False
        os.close(self._held.pop())
        return True

    def fill(self) -> None:
        """Take back what was given, as far as that is possible."""
        try:
            while len(self._held) < self._count:
                self._held.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
        except OSError:
            pass

    def close(self) -> None:
        while self.give():
            pass
