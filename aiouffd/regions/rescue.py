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

import _signal  # type: ignore[import-not-found]  # see adopt
import _thread
import asyncio
import asyncio.selector_events
import atexit
import concurrent.futures
import concurrent.futures.thread
import contextlib
import errno
import faulthandler
import functools
import linecache  # noqa: F401  (used by traceback)
import logging
import os
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import BlockingTouchWarning, UnsupportedError, UsageError
from ..kernel.lib import ffi, in_main_interpreter, lib
from ..util.backoff import Backoff
from ..util.waiting import call_soon_at

if TYPE_CHECKING:
    from ..kernel.calls.engine import EnginePtr, NotePtr
    from .pager import Pager

__all__ = ["service"]

log = logging.getLogger("aiouffd")
T = TypeVar("T")

#: Seconds that threads which wait for a page get at interpreter exit.
EXIT_PATIENCE = 1.0
#: Seconds that calls of `aiouffd.sync` get after that, from atexit functions.
CALL_PATIENCE = 5.0
#: How often the interpreter may begin its end anew beside threads that are left behind; and the
#: status of a process that had to be ended then (its own cannot be known): Python's for a bad end.
PASSES, ENDED = 100, 120
#: First and longest pause between two tries to make the loop, in seconds.
RETRY_FIRST, RETRY_LONGEST = 0.05, 1.0
#: What an event loop takes: a selector, and a pair of sockets.
_LOOP_DESCRIPTORS = 4
#: Frames of a blocked loop thread that are kept for the report.
_DEPTH = 12


#: A sub-interpreter cannot have the rescue thread, which would keep it from ending; and its end is
#: not that of the process, with which threads that wait for pages end.
_main = in_main_interpreter()


class _Call:
    """A coroutine that is to run on the rescue loop. ``done`` is told its result or its error, on
    that loop, or on the rescue thread if there is no loop to be had."""

    __slots__ = ("_coroutine", "_done", "_task", "posted")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        done: Callable[[Any, BaseException | None], object],
    ) -> None:
        self._coroutine = coroutine
        self._done = done
        self._task: asyncio.Task[Any] | None = None
        #: Whether it is, or was, in the inbox.
        self.posted = False

    def start(self) -> None:
        try:
            self._task = asyncio.get_running_loop().create_task(self._coroutine)
        except Exception as error:
            self.fail(error)
        else:
            _running.add(self)
            self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        _running.discard(self)
        if task.cancelled():
            self._done(None, concurrent.futures.CancelledError())
        elif error := task.exception():
            self._done(None, error)
        else:
            self._done(task.result(), None)

    def cancel(self) -> None:
        """On the loop, after `start`."""
        if self._task is not None:
            self._task.cancel()

    def fail(self, error: BaseException) -> None:
        self._coroutine.close()
        self._done(None, error)


#: Calls under way: a loop has but weak references to its tasks, and nobody may wait any more.
_running: set[_Call] = set()


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, concurrent.futures.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)


def _log_error(_: Any, error: BaseException | None) -> None:
    if error is not None:
        log.debug("in the background", exc_info=error)


class Service:
    """The rescue thread and its loop. `service` is the one of this process.

    A signal handler that uses lazy memory may interrupt the main thread between any two lines of
    this, and then waits for the rescue thread. So that thread never waits for what another one may
    hold: nothing here takes a lock, nor do Thread and Future, which have some, have a part in it.

    What cannot be had at the moment (a thread, descriptors for the loop) is an OSError for those
    who need it now, and is tried again for the next.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        # Whoever gets the seat is the thread; a second one that was started leaves again.
        self._seat: dict[str, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: deque[_Call | Callable[[], object]] = deque()
        # A plain dict: it is copied in one step, whatever other threads do to it.
        # (FREE-THREADING: it is not.)
        self._pagers: dict[int, weakref.ref[Pager]] = {}
        self._reported: set[tuple[str, int]] = set()
        self._pid = os.getpid()
        #: The kernel's id of the rescue thread; 0 before it runs.
        self.thread = 0
        #: Set when the interpreter begins to exit.
        self.exiting = False

    # --------------------------------------------------------------- pagers

    def adopt(self, pager: Pager) -> None:
        """Look after ``pager``; starts the thread with the first one. Raises OSError if there is no
        thread to be had."""
        self._start()
        # signal.getsignal makes a repr of the handler, and of all that belongs to it.
        if callable(_signal.getsignal(_signal.SIGINT)):
            lib.au_gil_know_handler()
        self._pagers[id(pager)] = weakref.ref(pager)

    def release(self, pager: Pager) -> None:
        self._pagers.pop(id(pager), None)

    def _living(self) -> list[Pager]:
        return [pager for ref in list(self._pagers.values()) if (pager := ref()) is not None]

    def _start(self) -> None:
        if self._seat:
            return
        if sys.is_finalizing():
            raise RuntimeError("the interpreter ends")
        if not _main:
            raise UnsupportedError(
                "this is a sub-interpreter, and what serves faults lives as long as the process",
                hint="open the buffer in the main interpreter, or use another process",
            )
        error = lib.au_sentry_start()
        if error:
            raise OSError(-error, f"cannot start the sentry thread: {os.strerror(-error)}")
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError as failure:
            raise OSError(errno.EAGAIN, f"cannot start the rescue thread: {failure}") from failure
        # It counts as watched from here on: a touch with the GIL held may come before the thread
        # has run at all, and the sentry has to notice that it never will.
        lib.au_rescue_fd()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        if self._seat.setdefault("taken", _thread.get_ident()) != _thread.get_ident():
            return
        self.thread = _thread.get_native_id()
        try:
            loop = self._when_needed()
            loop.call_soon(self._take_inbox)
            self._loop = loop
        except BaseException:
            # Never seen; but then the next one who needs it starts another.
            self._seat.clear()
            raise
        while True:
            try:
                loop.run_forever()
            except BaseException:
                # Somebody else's code raised SystemExit, say, in a task. Others are still here.
                log.exception("the rescue loop was interrupted and goes on")

    def _when_needed(self) -> asyncio.AbstractEventLoop:
        """The loop, made when it is first needed and can be."""
        backoff = Backoff(RETRY_FIRST, RETRY_LONGEST)
        while True:
            # A touch that this thread makes itself could be rescued by nobody, so it parks
            # here until there is work, holding no GIL and costing no wake-up.
            while not lib.au_rescue_wait(-1):
                pass
            try:
                return self._make_loop()
            except Exception as error:
                # Whoever can be told is. Threads that wait for pages cannot, and go on waiting.
                while self._inbox:
                    call = self._inbox.popleft()
                    if isinstance(call, _Call):
                        call.fail(error)
            time.sleep(backoff.next())

    def _make_loop(self) -> asyncio.AbstractEventLoop:
        # asyncio leaves half a loop behind, and complains about it, where these are lacking.
        spare: list[int] = []
        try:
            for _ in range(_LOOP_DESCRIPTORS):
                spare.append(os.dup(lib.au_rescue_fd()))
        finally:
            for number in spare:
                os.close(number)
        loop = asyncio.new_event_loop()
        try:
            loop.add_reader(lib.au_rescue_fd(), self._on_wanted)
        except BaseException:
            loop.close()
            raise
        asyncio.set_event_loop(loop)
        return loop

    def _take_inbox(self) -> None:
        while self._inbox:
            call = self._inbox.popleft()
            if isinstance(call, _Call):
                call.start()
            else:
                asyncio.get_running_loop().call_soon(call)

    def _post(self, call: _Call | Callable[[], object]) -> None:
        if sys.is_finalizing():
            raise RuntimeError("the interpreter ends")
        self._start()
        if isinstance(call, _Call):
            call.posted = True
        self._inbox.append(call)
        loop = self._loop
        if loop is None:
            # Where it has been made meanwhile, it takes the inbox after that.
            lib.au_rescue_wake()
        else:
            loop.call_soon_threadsafe(self._take_inbox)

    def _launch(
        self,
        coroutine: Coroutine[Any, Any, Any],
        done: Callable[[Any, BaseException | None], object],
    ) -> _Call:
        call = _Call(coroutine, done)
        try:
            self._post(call)
        except BaseException:
            # A signal handler may raise after it was posted too, and then it may be running.
            try:
                self._inbox.remove(call)
            except ValueError:
                under_way = call.posted
            else:
                under_way = False
            if under_way:
                with contextlib.suppress(RuntimeError, OSError):
                    self.call_soon(call.cancel)
            else:
                coroutine.close()
            raise
        return call

    @property
    def is_current_thread(self) -> bool:
        return self._seat.get("taken") == _thread.get_ident()

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call ``callback`` on the background loop, from any thread, and do not wait for it.

        Raises RuntimeError when the interpreter ends, and OSError when there is no thread to be
        had. While no loop is to be had the callback is dropped."""
        self._post(functools.partial(callback, *args))

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run ``coroutine`` on the background loop. As `call_soon`; its error goes to the log."""
        self._launch(coroutine, _log_error)

    def block_on(self, coroutine: Coroutine[Any, Any, T], *, cancel: bool = True) -> T:
        """Run ``coroutine`` on the background loop and wait for its result, in any other thread, or
        inside a signal handler; other handlers run meanwhile (on the main thread).

        When one of them raises, the coroutine is cancelled if ``cancel`` says so, and nobody waits
        for its end. Once the interpreter exits the wait is limited, and ends in TimeoutError.
        Raises as `call_soon`; OSError also if the loop cannot be made at the moment.
        """
        if self.is_current_thread:
            coroutine.close()
            raise UsageError("aiouffd's own background thread cannot wait for itself")
        answer: list[tuple[Any, BaseException | None]] = []
        lock = _thread.allocate_lock()
        lock.acquire()

        def done(result: Any, error: BaseException | None) -> None:
            answer.append((result, error))
            lock.release()

        call = self._launch(coroutine, done)
        try:
            if not lock.acquire(timeout=CALL_PATIENCE if self.exiting else -1):
                raise TimeoutError("the interpreter exits, and cannot wait for that")
        except BaseException:
            if cancel:
                with contextlib.suppress(RuntimeError, OSError):
                    self.call_soon(call.cancel)
            raise
        result, error = answer.pop()
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame
        value: T = result
        return value

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` on the background loop and wait for it, from any loop, that one too.
        It goes on when whoever waits is cancelled. Raises as `block_on`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def done(result: Any, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed by now
                loop.call_soon_threadsafe(_settle, future, result, error)

        self._launch(coroutine, done)
        return await future

    # ------------------------------------------------------------ the rescue

    def _on_wanted(self) -> None:
        try:
            os.read(lib.au_rescue_fd(), 8)
        except BlockingIOError:
            pass
        unserved: list[str] = []
        failures: list[Exception] = []
        for pager in self._living():
            try:
                unserved += self._look_after(pager)
            except Exception as error:
                # The others are to be served all the same.
                failures.append(error)
        asyncio.get_running_loop().call_soon(self._report, unserved, failures)

    def _look_after(self, pager: Pager) -> list[str]:
        engine = pager._engine  # which may be gone at the next look
        if engine is None or not lib.au_rescue_take(engine):
            return []
        if pager._native_thread in _waiting_threads(engine, 256):
            pager._rescue_stack = _stack_of(pager._thread)
            if pager.strict:
                _die(pager._rescue_stack)
        return pager._rescue()

    def _report(self, unserved: list[str], failures: list[Exception]) -> None:
        """After serving: say what happened."""
        note = ffi.new("struct au_note *")
        while lib.au_sentry_take_note(note):
            self._report_note(note)
        for item in unserved:
            # Not yet a complaint: a loop may be late where many threads want the GIL.
            log.info("%s: its event loop does not respond", item)
        for error in failures:
            log.error("a rescue failed, and is tried again", exc_info=error)

    def _report_note(self, note: NotePtr) -> None:
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
        elif note.kind == lib.AU_NOTE_RENEWED:
            log.error(
                "the hardware has lost the page at %#x (a memory error); it is fetched again",
                note.address,
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
            # On the loop it concerns, so that a filter that makes it an error reaches that loop's
            # exception handler.
            if not call_soon_at(pager._loop, _warn, message, place):
                _warn(message, place)
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


def _waiting_threads(engine: EnginePtr, most: int) -> list[int]:
    """Kernel ids of threads that wait for pages of an engine now."""
    pages, tids = ffi.new("uint64_t[]", most), ffi.new("uint32_t[]", most)
    count = lib.au_engine_blocked(engine, pages, tids, most)
    return list(tids[0:count])


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


#: What the parent had to do: it goes on there, and is not to be taken for forgotten here.
_parents: list[Any] = []


def _after_fork() -> None:
    _parents.append((service._inbox, service._loop))
    service._reset()


os.register_at_fork(after_in_child=_after_fork)


def _blocked_threads() -> list[threading.Thread]:
    """Threads of Python that wait for a page now and that the interpreter would wait for."""
    blocked: set[int] = set()
    for pager in service._living():
        engine = pager._engine
        if engine is not None:
            blocked.update(_waiting_threads(engine, 1024))
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
    service.exiting = True
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
        _take_for_daemon(thread)


def _take_for_daemon(thread: threading.Thread) -> None:
    """From 3.15 the interpreter looks for threads that are no daemons by itself too. Should this
    not convince it, `_join_others` gets to know."""
    lib.au_gil_leave_behind(thread.native_id or 0, service.thread)


#: How often `_join_others` was called.
_joined = 0


def _join_others() -> None:
    """What `threading` calls to join all threads. From 3.15 on it is called again for as long as
    the interpreter finds something left to do; so for ever, should that be a thread left behind.
    """
    global _joined
    _joined += 1
    if _joined > PASSES:
        os.write(
            2, b"aiouffd: this Python does not end beside threads that are left behind; ended\n"
        )
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(ENDED)
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
    loop = service._loop
    if loop is not None:
        # What is under way on the background loop ends with the process, which is no news.
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]


if _main:
    atexit.register(_at_exit)
if _main and hasattr(threading, "_register_atexit"):
    threading._register_atexit(_before_threads_are_joined)
