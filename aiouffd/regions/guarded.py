"""Copies out of lazy memory, and searches in it, that wait for what is missing and can be
interrupted.

A raw touch that waits for its page runs no Python. On the main thread, where Python runs the
handlers of signals, the pages are asked for instead (``native/demand.h``), and between two looks
handlers run: KeyboardInterrupt comes out of the call, or whatever else a handler raises. Other
threads run none, and simply touch.
"""

from __future__ import annotations

import asyncio
import errno
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ClosedError
from ..kernel.lib import ffi, lib

if TYPE_CHECKING:
    from ..kernel.calls.engine import RegionPtr
    from ..kernel.calls.pointers import Bytes

__all__ = ["copy", "find", "wait_for"]

_INTERRUPTED, _NOBODY_TO_ASK = -errno.EINTR, -errno.EOPNOTSUPP


def copy(region: RegionPtr, offset: int, target: Bytes, length: int) -> tuple[int, int]:
    """Copy ``length`` bytes at ``offset`` of a native region to ``target``, a cffi ``char *``.

    Returns 0 or a negated errno (EIO: the page has an error, EHWPOISON: its memory
    is broken and could have been written to, EBADF: the region is closed), and
    the offset that it is about. Whatever a signal handler raises comes out, and then nothing is
    written to ``target`` any more.
    """
    if _runs_handlers():
        result, at = _copy_patiently(region, offset, target, length)
        if result != _NOBODY_TO_ASK:
            return result, at
        _touch_elsewhere(region, offset, length)
    where = ffi.new("uint64_t *")
    return lib.au_region_read(region, offset, target, length, where), where[0]


def find(region: RegionPtr, offset: int, length: int, sub: bytes) -> tuple[int, int, int]:
    """Search ``length`` bytes at ``offset``: as `copy`, and where ``sub`` is, or -1."""
    needle = ffi.from_buffer(sub)
    if _runs_handlers():
        result, at, index = _find_patiently(region, offset, length, needle)
        if result != _NOBODY_TO_ASK:
            return result, at, index
        _touch_elsewhere(region, offset, length)
    where, found = ffi.new("uint64_t *"), ffi.new("int64_t *")
    result = lib.au_region_find(region, offset, length, needle, len(needle), where, found)
    return result, where[0], found[0]


def _runs_handlers() -> bool:
    return threading.current_thread() is threading.main_thread()


def _copy_patiently(region: RegionPtr, offset: int, target: Bytes, length: int) -> tuple[int, int]:
    wait = ffi.new("struct au_wait *")
    before = _cancellations()
    start, end = offset, offset + length
    try:
        while True:
            result = lib.au_wait_read(region, offset, target + (offset - start), end - offset, wait)
            if result != _INTERRUPTED:
                return result, wait.at
            offset = wait.at
            _check_alive(before)
    except BaseException:
        lib.au_wait_end(wait)
        raise


def _find_patiently(
    region: RegionPtr, offset: int, length: int, needle: Bytes
) -> tuple[int, int, int]:
    wait = ffi.new("struct au_wait *")
    before = _cancellations()
    end = offset + length
    try:
        while True:
            result = lib.au_wait_find(region, offset, end - offset, needle, len(needle), wait)
            if result != _INTERRUPTED:
                return result, wait.at, wait.found
            offset = wait.at
            _check_alive(before)
    except BaseException:
        lib.au_wait_end(wait)
        raise


def _cancellations() -> tuple[asyncio.Task[Any] | None, int]:
    """The task that is about to block its own loop, and how often it has been cancelled."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return task, 0 if task is None else task.cancelling()


def _check_alive(before: tuple[asyncio.Task[Any] | None, int]) -> None:
    if sys.is_finalizing():
        raise ClosedError("the interpreter ends, and nobody is left who could bring these bytes")
    task, cancelled = before
    # Whoever cancels a task that blocks its loop is a signal handler: that of asyncio.run makes
    # KeyboardInterrupt of it, which would not come out before the bytes are there.
    if task is not None and task.cancelling() > cancelled:
        raise asyncio.CancelledError


def _touch_elsewhere(region: RegionPtr, offset: int, length: int) -> None:
    """In a forked child there is no engine to ask."""
    wait_for(region.start + offset, length, lib.au_region_touch, region, offset, length)


def wait_for(address: int, length: int, touch: Callable[..., object], *args: Any) -> None:
    """Wait until memory is there that another process serves, so that nobody here can be asked.

    On the main thread, if some of it is missing, ``touch(*args, where)`` is called by another
    thread, and this one runs signal handlers meanwhile. Whatever ``touch`` returns, the caller will
    see by a touch of its own. That thread is left behind when a handler raises.
    """
    if not length or not _runs_handlers() or lib.au_mapped(address, length):
        return
    where = ffi.new("uint64_t *")
    thread = threading.Thread(target=touch, args=(*args, where), daemon=True)
    thread.start()
    thread.join()
