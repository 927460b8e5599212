"""Reads the descriptors of many clients, fairly.

The event loop watches one epoll descriptor, behind which are all the others. So one turn of the
loop is one call, however many clients fault; and we, not the order of registration, decide who
is served first: who has had least of our time. A client that faults now and then so passes those
that fault all the time, and among these nobody starves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from typing import Protocol

__all__ = ["Reactor", "Served", "Share"]

#: Seconds of work after which the loop gets its turn, and who is ready is looked at anew.
TURN = 0.0003
#: How far behind the others a client that was idle may begin, in seconds of service.
CREDIT = 0.002


class Share:
    """What one client has had of the reactor's time."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = 0.0


class Served(Protocol):
    """What a `Reactor` looks after."""

    share: Share

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to do."""

    def serve_some(self) -> None:
        """Do a little of it."""


class Reactor:
    """On the running loop; not thread-safe."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._turn)
        self._served: dict[int, Served] = {}
        # How much those have had who are served just now.
        self._level = 0.0
        self._last = 0.0
        self._turning = False

    def add(self, served: Served) -> None:
        """Look after ``served`` from now on. Raises OSError."""
        fd = served.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        self._served[fd] = served

    def remove(self, fd: int) -> None:
        """Before ``fd`` is closed. Nothing if it is not looked after."""
        if self._served.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def give_way(self) -> None:
        """Serve who waits, if it has been a while: before work on which no thread waits.

        Many clients that come at once are taken in within one turn of the loop; without this,
        those that are there already would wait for all of them.
        """
        if self._turning or self._epoll.closed:
            return
        if time.perf_counter() - self._last > TURN:
            self._turn()

    def _turn(self) -> None:
        self._turning = True
        try:
            self._serve_ready()
        finally:
            self._turning = False
            self._last = time.perf_counter()

    def _serve_ready(self) -> None:
        ready = self._epoll.poll(0)
        if len(ready) <= 1:
            for fd, events in ready:
                if events & select.EPOLLERR:
                    _unblock(fd)
                alone = self._served.get(fd)
                if alone is not None:
                    before = time.perf_counter()
                    alone.serve_some()
                    alone.share.used += time.perf_counter() - before
            return
        for fd, events in ready:
            if events & select.EPOLLERR:
                _unblock(fd)
        served = [self._served[fd] for fd, _ in ready if fd in self._served]
        floor = self._level - CREDIT
        for one in served:
            if one.share.used < floor:
                one.share.used = floor
        served.sort(key=_used)
        now = start = time.perf_counter()
        for one in served:
            if self._served.get(one.fileno()) is not one:
                continue  # an earlier one has ended it
            self._level = max(self._level, one.share.used)
            one.serve_some()
            before, now = now, time.perf_counter()
            one.share.used += now - before
            if now - start > TURN:
                return  # they stay readable

    def close(self) -> None:
        """Look after nobody any more. Idempotent."""
        if not self._epoll.closed:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._epoll.fileno())
            self._served.clear()
            self._epoll.close()


def _unblock(fd: int) -> None:
    """A descriptor that would block is always in error. Its other owner has made it so."""
    with contextlib.suppress(OSError):
        os.set_blocking(fd, False)


def _used(served: Served) -> float:
    return served.share.used
