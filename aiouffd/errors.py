"""The exception hierarchy, by who is at fault.

::

    AiouffdError
     ├─ UsageError (also ValueError)        the call is wrong; nothing was changed
     │   └─ FormatError                     a file is not of the format, or damaged, or cut short
     ├─ ClosedError                         you used something after closing it
     ├─ UnsupportedError (also OSError)     this kernel, user or build cannot do it
     ├─ KernelError (also OSError)          an ioctl failed; errno and bytes done are kept
     ├─ SourceError (also OSError)          where the bytes come from failed
     │   ├─ SourceChangedError              the object is not the one that was opened
     │   ├─ RangeNotSupportedError          the server cannot send parts of the object
     │   ├─ ShortReadError                  fewer or more bytes than asked for
     │   ├─ FlushError                      writes that were acknowledged may be lost
     │   └─ SourceTimeoutError (also TimeoutError)   the deadline passed
     ├─ PeerError                           a process that we serve broke the protocol
     ├─ StalledError (also TimeoutError)    nothing moved; the toucher was released with an error
     └─ InternalError                       our own mistake: please report it

Where Python has the right class already it is used: ``PermissionError`` for
missing privileges, ``FileNotFoundError`` for missing objects, ``IndexError``
past the end of a buffer.

Every message says what happened; ``hint`` says what to do about it, and is part of ``str(error)``.
"""

from __future__ import annotations

import errno as _errno
import os as _os
from collections.abc import Sequence

__all__ = [
    "AiouffdError",
    "BlockingTouchWarning",
    "ClosedError",
    "FlushError",
    "FormatError",
    "InternalError",
    "KernelError",
    "PeerError",
    "RangeNotSupportedError",
    "ShortReadError",
    "SourceChangedError",
    "SourceError",
    "SourceTimeoutError",
    "StalledError",
    "UnsupportedError",
    "UnversionedSourceWarning",
    "UsageError",
]


class AiouffdError(Exception):
    """Root of all errors raised by aiouffd.

    ``hint`` is one sentence saying what to do next, or None.
    """

    hint: str | None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.hint = hint
        self.message = message
        super().__init__(message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(AiouffdError, ValueError):
    """An argument is out of range, unaligned, or of the wrong kind. Nothing was changed."""


class FormatError(UsageError):
    """The file is not one of the format, or a damaged one, or cut short."""


class ClosedError(AiouffdError):
    """The object was closed by you before this call."""


class _OsError(AiouffdError, OSError):
    """An OSError with ``errno`` and ``strerror`` set, and our own message."""

    def __init__(self, message: str, *, errno: int | None = None, hint: str | None = None) -> None:
        AiouffdError.__init__(self, message, hint=hint)
        self.errno = errno
        self.strerror = _os.strerror(errno) if errno else None


class UnsupportedError(_OsError):
    """This kernel, this user or this build cannot do what was asked."""


class KernelError(_OsError):
    """An ioctl of userfaultfd failed.

    ``done`` is the number of bytes that it had completed (and woken) before.
    """

    def __init__(
        self, message: str, *, errno: int | None = None, done: int = 0, hint: str | None = None
    ) -> None:
        super().__init__(message, errno=errno, hint=hint)
        self.done = done

    def __str__(self) -> str:
        text = AiouffdError.__str__(self)
        name = _errno.errorcode.get(self.errno or 0)
        return f"[{name}] {text}" if name else text


class SourceError(_OsError):
    """The place where the bytes come from failed; ``__cause__`` has the reason.

    ``transient`` tells whether asking again may help; the failure policy of a
    buffer retries only those.
    """

    def __init__(
        self,
        message: str,
        *,
        transient: bool = True,
        retry_after: float | None = None,
        errno: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, errno=errno or _errno.EIO, hint=hint)
        self.transient = transient
        #: Seconds that the source asked to wait before the next try, or None.
        self.retry_after = retry_after


class SourceChangedError(SourceError):
    """The object behind the source is no longer the version that was opened. Never transient."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(
            message,
            transient=False,
            errno=_errno.ESTALE,
            hint=hint or "open the source again to read its present version",
        )


class RangeNotSupportedError(SourceError):
    """The server does not serve parts of this object, so it cannot be read lazily."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, transient=False, errno=_errno.EOPNOTSUPP, hint=hint)


class ShortReadError(SourceError):
    """A source gave fewer or more bytes than it was asked for."""


class FlushError(SourceError):
    """Writes that were acknowledged are not durable, and may be lost.

    ``ranges`` has their offsets and lengths in bytes; empty if they are not known. Never transient:
    a flush that failed once says nothing by succeeding later, because what it was to make durable
    may have been dropped by then (see fsync(2), EIO). So later flushes fail too, until these ranges
    were written again.
    """

    def __init__(
        self,
        message: str,
        *,
        ranges: Sequence[tuple[int, int]] = (),
        errno: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(
            message,
            transient=False,
            errno=errno,
            hint=hint or "write these ranges again, then flush",
        )
        self.ranges = list(ranges)


class SourceTimeoutError(SourceError, TimeoutError):
    """The deadline passed before the source had delivered."""


class PeerError(AiouffdError):
    """Another process that wanted to be served broke the protocol, or asked for too much.

    It is dropped; others are not affected.
    """


class StalledError(AiouffdError, TimeoutError):
    """A touch could not be served because nothing in the process moved."""


class InternalError(AiouffdError):
    """A broken invariant inside aiouffd. Please report it, with the text."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="this is a bug in aiouffd; please report it")


class BlockingTouchWarning(RuntimeWarning):
    """The event loop's own thread touched a page that was not resident.

    The touch was served by the rescue loop and is correct, but it stalled the
    loop as any blocking read would. Use ``await buf.fetch(...)`` before.
    """


class UnversionedSourceWarning(RuntimeWarning):
    """The object has no version to compare, so bytes of two versions could be mixed unnoticed.

    Shown once per object. A source's ``unversioned`` argument makes it an error, or silences it.
    """
