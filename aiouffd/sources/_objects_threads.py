"""obstore's threads: what they must not outlive, and what does not outlive a fork.

obstore answers from threads of its own, which take the GIL to do so. One that asks for it while
the interpreter is torn down ends the process with SIGABRT, after all work was done. So at exit
the requests that are still under way are given up, and the threads get a moment to come to rest.

A child of fork() has none of these threads, and its requests would wait for ever.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import time
from collections.abc import Awaitable
from typing import Any

from ..errors import UnsupportedError

#: Longest time for the threads to come to rest at exit, and how often they are looked at, seconds.
PATIENCE, LOOK = 1.0, 0.002
#: They rest when so many looks in a row have seen none of them run. Together longer than the five
#: milliseconds after which a thread that waits for the GIL looks for it again.
LOOKS = 4

_pending: set[asyncio.Future[Any]] = set()
_used = False
_forked = False


async def answer(request: Awaitable[Any], mine: set[asyncio.Future[Any]] | None = None) -> Any:
    """Await what obstore gave. The future is in ``mine`` meanwhile, for who wants to cancel it."""
    global _used
    _used = True
    future = asyncio.ensure_future(request)
    _pending.add(future)
    if mine is not None:
        mine.add(future)
    try:
        return await future
    finally:
        _pending.discard(future)
        if mine is not None:
            mine.discard(future)
        if not future.done():  # the coroutine was thrown away, perhaps with its loop
            _give_up(future)
        # Cancelled when the answer has come, it would live on with the traceback: a reply, and its
        # connection.
        del future, request


def check_process() -> None:
    """Raise UnsupportedError in a child of a process that had used obstore before the fork."""
    if _forked:
        raise UnsupportedError(
            "obstore was used before the fork, and its threads did not come along",
            hint="use the start method spawn or forkserver, or open object stores only in"
            " the children",
        )


def _give_up(future: asyncio.Future[Any]) -> None:
    """Cancel a future, and have obstore know of it although the loop may never run again."""
    listeners = [entry[0] for entry in getattr(future, "_callbacks", None) or ()]
    with contextlib.suppress(RuntimeError):  # the loop is closed
        future.cancel()
    for listener in listeners:
        if type(listener).__name__ == "PyDoneCallback" and future.cancelled():
            with contextlib.suppress(Exception):
                listener(future)


def _at_exit() -> None:
    if not _used:
        return
    for future in list(_pending):
        loop = future.get_loop()
        with contextlib.suppress(RuntimeError):
            if loop.is_running():
                loop.call_soon_threadsafe(future.cancel)
                continue
        _give_up(future)
    limit = time.monotonic() + PATIENCE
    seen, calm = None, 0
    while calm < LOOKS and time.monotonic() < limit:
        time.sleep(LOOK)
        now = _how_often_they_ran()
        calm = calm + 1 if now == seen else 0
        seen = now


def _how_often_they_ran() -> dict[str, str]:
    """Run time and number of time slices of obstore's threads, by thread id."""
    found = {}
    for tid in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            with open(f"/proc/self/task/{tid}/comm") as file:
                ours = file.read().startswith("tokio")
            if ours:
                with open(f"/proc/self/task/{tid}/status") as file:
                    found[tid] = file.read().partition("voluntary_ctxt_switches")[2]
    return found


def _after_fork() -> None:
    global _used, _forked
    _forked = _forked or _used
    _used = False
    _pending.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
