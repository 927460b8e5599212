"""The rescue loop: a second event loop for faults that their own loop does not come for.

One thread per process, started with the first pager. It waits in native code,
without the GIL and without a loop, until the sentry asks for it; only then does it
make its event loop. What brings it: a touch from a loop's own thread; a loop that waits
for a thread that waits for a page; a slow callback; a loop that is not running. One rule
covers them all: a fault that its loop has not picked up within its patience.

The thread that waits may hold locks of the logging or warnings modules, so a rescue first
serves and then reports. For the same reason everything it needs is imported at once.

The loop is also the one that `aiouffd.sync` runs on.
"""

from __future__ import annotations

import asyncio
import asyncio.selector_events
import atexit
import concurrent.futures
import concurrent.futures.thread
import faulthandler
import linecache  # noqa: F401  (used by traceback)
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from ._lib import ffi, lib
from .errors import BlockingTouchWarning

if TYPE_CHECKING:
    from .pager import Pager

__all__ = ["service"]

log = logging.getLogger("aiouffd")
T = TypeVar("T")

#: Seconds that threads which wait for a page get at interpreter exit.
EXIT_PATIENCE = 1.0
#: Frames of a blocked loop thread that are kept for the report.
_DEPTH = 12


class Service:
    """The rescue thread and its loop. `service` is the one of this process."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._start_loop = False
        # A plain dict: it is copied in one step, whatever other threads do to it.
        self._pagers: dict[int, weakref.ref[Pager]] = {}
        self._reported: set[tuple[str, int]] = set()
        self._pid = os.getpid()

    # --------------------------------------------------------------- pagers

    def adopt(self, pager: Pager) -> None:
        """Look after ``pager``; starts the thread with the first one."""
        with self._lock:
            if callable(signal.getsignal(signal.SIGINT)):
                lib.au_gil_know_handler()
            self._pagers[id(pager)] = weakref.ref(pager)
            self._start()

    def release(self, pager: Pager) -> None:
        with self._lock:
            self._pagers.pop(id(pager), None)

    def _living(self) -> list[Pager]:
        return [pager for ref in list(self._pagers.values()) if (pager := ref()) is not None]

    def _start(self) -> None:
        if self._thread is None:
            if lib.au_sentry_start():
                raise OSError("cannot start the sentry thread")
            self._thread = threading.Thread(target=self._run, name="aiouffd-rescue", daemon=True)
            self._thread.start()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        # A touch that this thread makes itself could be rescued by nobody, so it parks
        # here until there is work, holding no GIL and costing no wake-up.
        while not lib.au_rescue_wait(-1):
            pass
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.add_reader(lib.au_rescue_fd(), self._on_wanted)
        self._loop = loop
        self._ready.set()
        try:
            loop.run_forever()
        finally:
            loop.close()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The background loop, started if need be. Not from the rescue thread."""
        with self._lock:
            self._start()
        if self._loop is None:
            lib.au_rescue_wake()
            self._ready.wait()
        assert self._loop is not None
        return self._loop

    @property
    def is_current_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run ``coroutine`` on the background loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` on the background loop and wait for it, from any loop, that one too.
        It goes on when whoever waits is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(self.submit(coroutine)))

    # ------------------------------------------------------------ the rescue

    def _on_wanted(self) -> None:
        try:
            os.read(lib.au_rescue_fd(), 8)
        except BlockingIOError:
            pass
        unserved: list[str] = []
        for pager in self._living():
            engine = pager._engine
            if engine is None or not lib.au_rescue_take(engine):
                continue
            if _touches_itself(pager):
                pager._rescue_stack = _stack_of(pager._thread)
                if pager.strict:
                    _die(pager._rescue_stack)
            unserved += pager._rescue()
        asyncio.get_running_loop().call_soon(self._report, unserved)

    def _report(self, unserved: list[str]) -> None:
        """After serving: say what happened."""
        note = ffi.new("struct au_note *")
        while lib.au_sentry_take_note(note):
            self._report_note(note)
        for item in unserved:
            # Not yet a complaint: a loop may be late where many threads want the GIL.
            log.info("%s waits for a loop that does not come", item)

    def _report_note(self, note: Any) -> None:
        waited = note.waited_ns / 1e6
        if note.kind == lib.AU_NOTE_STALL_POISON:
            log.error(
                "thread %s (%d) waited %.0f ms for the page at %#x while nothing moved, and got "
                "an error: it holds the GIL inside a call that cannot give it up; see "
                "docs/gotchas.md",
                _thread_name(note.tid),
                note.tid,
                waited,
                note.address,
            )
        elif note.kind == lib.AU_NOTE_MASKED:
            log.error(
                "thread %s (%d) waits for the page at %#x with signal %d blocked, so it cannot "
                "be asked to release the GIL",
                _thread_name(note.tid),
                note.tid,
                note.address,
                lib.au_handler_signal(),
            )
        elif note.kind == lib.AU_NOTE_LOOP_STUCK:
            log.info(
                "the event loop did not answer for %.0f ms; the rescue loop serves thread %d",
                waited,
                note.tid,
            )
        elif note.kind == lib.AU_NOTE_SELF_TOUCH:
            self._report_self_touch(note.tid)

    def _report_self_touch(self, tid: int) -> None:
        for pager in self._living():
            stack = pager._rescue_stack
            if pager._native_thread != tid or not stack:
                continue
            place = stack[-1][:2]
            if place in self._reported:
                return
            self._reported.add(place)
            text = "".join(traceback.format_list([(*item, "") for item in stack]))
            message = (
                "the event loop's own thread touched a page that is not resident, which stalls the "
                "loop; use `await buf.fetch(...)`, `buf.pin(...)` or a worker thread\n" + text
            )
            if pager._loop.is_closed():
                _warn(message, place)
            else:
                # On the loop it concerns, so that a filter that makes it an error reaches
                # that loop's exception handler.
                pager._loop.call_soon_threadsafe(_warn, message, place)
            return


def _warn(message: str, place: tuple[str, int]) -> None:
    warnings.warn_explicit(
        message, BlockingTouchWarning, place[0], place[1], registry={}, module="aiouffd"
    )


def _stack_of(thread: int) -> list[tuple[str, int, str]]:
    """File, line and function of a thread's frames, outermost first; takes no locks."""
    frame = sys._current_frames().get(thread)
    stack: list[tuple[str, int, str]] = []
    while frame is not None and len(stack) < _DEPTH:
        stack.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name))
        frame = frame.f_back
    stack.reverse()
    return stack


def _touches_itself(pager: Pager) -> bool:
    """Whether the pager's loop thread waits for a page that its loop should bring."""
    pages, tids = ffi.new("uint64_t[256]"), ffi.new("uint32_t[256]")
    count = lib.au_engine_blocked(pager._engine, pages, tids, 256)
    return pager._native_thread in list(tids[0:count])


def _die(stack: list[tuple[str, int, str]]) -> None:
    """strict=True: end the process with tracebacks instead of stalling the loop."""
    lines = "".join(f'  File "{name}", line {line}, in {code}\n' for name, line, code in stack)
    text = (
        "aiouffd: fatal (strict): the event loop's own thread touched a page that is not resident\n"
        + lines
    )
    os.write(2, text.encode(errors="replace"))
    faulthandler.dump_traceback(2, all_threads=True)
    os.abort()


def _thread_name(tid: int) -> str:
    for thread in threading.enumerate():
        if thread.native_id == tid:
            return thread.name
    return "unknown"


service = Service()


def _after_fork() -> None:
    service._reset()


os.register_at_fork(after_in_child=_after_fork)


def _blocked_threads() -> list[threading.Thread]:
    """Threads of Python that wait for a page now and that the interpreter would wait for."""
    pages, tids = ffi.new("uint64_t[1024]"), ffi.new("uint32_t[1024]")
    blocked: set[int] = set()
    for pager in service._living():
        if pager._engine is not None:
            count = lib.au_engine_blocked(pager._engine, pages, tids, 1024)
            blocked.update(tids[0:count])
    return [
        thread
        for thread in threading.enumerate()
        if thread.native_id in blocked
        and not thread.daemon
        and thread is not threading.current_thread()
    ]


def _before_threads_are_joined() -> None:
    """The interpreter is about to wait for its threads: do not let it wait for a dead source.

    Threads that wait for a page get a last second; who waits then is left blocked, as a
    daemon thread is, and ends with the process.
    """
    limit = time.monotonic() + EXIT_PATIENCE
    while _blocked_threads() and time.monotonic() < limit:
        time.sleep(0.02)
    left: list[threading.Thread] = []
    for thread in _blocked_threads():
        text = f"aiouffd: thread {thread.name!r} still waits for a page at exit; left behind\n"
        os.write(2, text.encode())
        _leave_behind(thread)
        left.append(thread)
    while waiting := [thread for thread in _joining(left) if thread not in left]:
        for thread in waiting:
            _leave_behind(thread)
        left += waiting


def _joining(others: list[threading.Thread]) -> list[threading.Thread]:
    """Threads that the interpreter would wait for, and that wait for one of ``others`` to end, as
    the one that `asyncio.run` starts to shut the default executor down."""
    frames = sys._current_frames() if others else {}
    found = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        while frame is not None and not thread.daemon and thread is not threading.current_thread():
            if frame.f_code is threading.Thread.join.__code__:
                if frame.f_locals.get("self") in others:
                    found.append(thread)
                break
            frame = frame.f_back
    return found


_left_behind: list[threading.Thread] = []


def _leave_behind(thread: Any) -> None:
    """Take a thread off the lists of those that the interpreter joins (private, so guarded)."""
    workers = getattr(concurrent.futures.thread, "_threads_queues", None)
    if workers is not None:
        workers.pop(thread, None)
    locks = getattr(threading, "_shutdown_locks", None)
    if locks is not None:  # up to 3.12
        locks.discard(getattr(thread, "_tstate_lock", None))
    if hasattr(threading, "_thread_shutdown"):
        # From 3.13 the list is native and keeps each thread until it has ended: a handle that
        # is marked as done makes the interpreter spin. So the joining is done here instead.
        _left_behind.append(thread)
        threading._thread_shutdown = _join_others


def _join_others() -> None:
    current = threading.current_thread()
    while True:
        others = [
            thread
            for thread in threading.enumerate()
            if not thread.daemon and thread is not current and thread not in _left_behind
        ]
        if not others:
            return
        others[0].join()


def _at_exit() -> None:
    """All threads that are joined have ended: from here on others park instead of unwinding."""
    lib.au_gil_exit()


atexit.register(_at_exit)
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_before_threads_are_joined)
