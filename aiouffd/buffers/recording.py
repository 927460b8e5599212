"""Recording what a program needs of a source, whoever in it opens buffers over that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from ..fetch.workingset import Recording, WorkingSet

__all__ = ["observe", "record_opens"]


class _Opened(Protocol):
    """A buffer."""

    def __len__(self) -> int: ...

    def record(self) -> Recording: ...


_observers: list[Callable[[str, _Opened], None]] = []


def observe(given: object, buffer: _Opened) -> None:
    """A buffer was opened, from what `aiouffd.open` was ``given``."""
    for observer in list(_observers):
        observer(str(given), buffer)


@contextlib.contextmanager
def record_opens(source: str) -> Iterator[Callable[[], WorkingSet | None]]:
    """Record every buffer that this process opens over ``source``, which is the text that
    `aiouffd.open` is given. The function that it gives returns the union, None if there were none.

    Of buffers over different versions only those count that are of the first one's.
    """
    recordings: list[Recording] = []

    def opened(given: str, buffer: _Opened) -> None:
        if given == source and len(buffer):
            recordings.append(buffer.record())

    def union() -> WorkingSet | None:
        found: WorkingSet | None = None
        for recording in recordings:
            other = recording.working_set()
            if found is None:
                found = other
            elif not found.is_stale(other.version, other.size):
                found = found | other
        return found

    _observers.append(opened)
    try:
        yield union
    finally:
        _observers.remove(opened)
        for recording in recordings:
            recording.stop()
