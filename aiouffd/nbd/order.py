"""Writes to the same place, one after the other.

NBD promises no order of requests that are under way at the same time, and neither does a source. So
whoever wants the newer one to win has to wait for the older one's end; also where nobody wants
that one any more, because its caller was cancelled or its client went away: it may still land.
"""

from __future__ import annotations

import asyncio

__all__ = ["Order", "Turn"]


class Turn:
    """A range that is being written to, until `end`."""

    __slots__ = ("_order", "_waiting", "end_offset", "offset")

    def __init__(self, order: Order, offset: int, end_offset: int) -> None:
        self._order = order
        self.offset = offset
        self.end_offset = end_offset
        self._waiting: list[asyncio.Future[None]] = []

    def end(self) -> None:
        """Nothing of it can land any more: let go on who waits. Idempotent."""
        self._order._turns.pop(self, None)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


class Order:
    """Whose turn it is, for the writes to one object. One event loop."""

    __slots__ = ("_turns",)

    def __init__(self) -> None:
        # In the order in which they came, so that none can wait for one that waits for it.
        self._turns: dict[Turn, None] = {}

    def __len__(self) -> int:
        return len(self._turns)

    async def turn(self, offset: int, length: int) -> Turn:
        """Wait for all that was asked for before and overlaps ``length`` bytes at ``offset``."""
        end = offset + length
        turns = self._turns
        mine = Turn(self, offset, end)
        before = [turn for turn in turns if turn.offset < end and offset < turn.end_offset]
        turns[mine] = None
        try:
            for turn in before:
                if turn in turns:
                    future = asyncio.get_running_loop().create_future()
                    turn._waiting.append(future)
                    await future
        except BaseException:
            mine.end()
            raise
        return mine
