"""The first step of a coroutine, made without a task.

What has its answer at hand never waits, and a task for it would cost more than all the rest: two
turns of the event loop. So where coroutines have been seen to finish in their first step, that is
made by hand; one that waits after all is gone on with in a task. It may fail because it found no
current task, which says nothing about its real outcome: then it is to be called again in one.
"""

from __future__ import annotations

import types
from collections.abc import Generator
from typing import Any

__all__ = ["Eagerness", "resume"]

#: So many that never waited in a row, and the next is run by hand...
AFTER = 8
#: ...and so many are asked for after one that did wait there.
SETBACK = 256
#: After one that waited so many are not even looked at, for that costs a little too.
UNSEEN = 16


class Eagerness:
    """Whether the next coroutine of one kind is worth a step by hand."""

    __slots__ = ("_streak", "_unseen")

    def __init__(self) -> None:
        self._streak = -AFTER
        self._unseen = 0

    def __bool__(self) -> bool:
        return self._streak >= 0

    def look(self) -> bool:
        """Whether to make the first step of the next one by hand inside its task, to see."""
        if self._unseen:
            self._unseen -= 1
            return False
        return True

    def finished(self) -> None:
        """One has finished in its first step, inside a task."""
        self._streak += 1

    def waited(self) -> None:
        """One has waited, inside a task."""
        self._streak = min(self._streak, -AFTER)
        self._unseen = UNSEEN

    def disappointed(self) -> None:
        """A step by hand was for nothing."""
        self._streak = -SETBACK


@types.coroutine
def resume(coroutine: Any, future: Any) -> Generator[Any, Any, None]:
    """Go on with a coroutine whose last step yielded ``future``."""
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
