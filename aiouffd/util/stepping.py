"""The first step of a coroutine, run without a task.

A coroutine whose data is already in memory never suspends, and a task for it would cost more than
all the rest: two iterations of the event loop. So where coroutines have been seen to finish in
their first step, the caller runs that step directly; one that suspends after all continues in a
task. If it fails because it found no current task, that says nothing about its real outcome: it
has to be called again in a task.
"""

from __future__ import annotations

import types
from collections.abc import Generator
from typing import Any

__all__ = ["Eagerness", "resume"]

#: After this many in a row that finished in their first step, the next one is run without a task.
AFTER = 8
#: The same, after one that suspended when it was run without a task.
SETBACK = 256
#: After one that suspended, this many are not observed, for that costs a little too.
UNSEEN = 16


class Eagerness:
    """Predicts whether the next coroutine of one kind finishes in its first step."""

    __slots__ = ("_streak", "_unseen")

    def __init__(self) -> None:
        self._streak = -AFTER
        self._unseen = 0

    def __bool__(self) -> bool:
        return self._streak >= 0

    def look(self) -> bool:
        """Return whether to observe the next one: run its first step directly inside its task."""
        if self._unseen:
            self._unseen -= 1
            return False
        return True

    def finished(self) -> None:
        """Note one that finished in its first step, inside a task."""
        self._streak += 1

    def waited(self) -> None:
        """Note one that suspended, inside a task."""
        self._streak = min(self._streak, -AFTER)
        self._unseen = UNSEEN

    def disappointed(self) -> None:
        """Note one that suspended although it was run without a task."""
        self._streak = -SETBACK


@types.coroutine
def resume(coroutine: Any, future: Any) -> Generator[Any, Any, None]:
    """Continue a coroutine whose last step yielded ``future``."""
    while True:
        try:
            value = yield future
        except BaseException as error:
            step, argument = coroutine.throw, error
        else:
            step, argument = coroutine.send, value
        try:
            future = step(argument)
        except StopIteration:
            return
