"""What obstore's exceptions mean.

Most of them are of one class, so that the status and the kind of failure have to be read from
their text. That text names URLs whole, with signatures in their queries; nothing of it is passed
on before it went through `redacted`.
"""

from __future__ import annotations

import errno
import re

from obstore import exceptions as obstore_errors

from ..errors import (
    AiouffdError,
    RangeNotSupportedError,
    ShortReadError,
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
    UsageError,
)
from .base import SourcePermissionError

__all__ = ["ignores_range", "is_refused", "redacted", "status_of", "translate", "unexpected_range"]

_STATUS = re.compile(r"status code: (\d{3})")
_RANGES = re.compile(r"Requested (\d+)\.\.(\d+), got (\d+)\.\.(\d+)")
_PASSWORD = re.compile(r"(?<=://)[^\s/@]*@")
_QUERY = re.compile(r"(://[^\s?]*)\?\S*")
_LONGEST = 300
# Connections that failed or broke, of which object_store says no more than this.
_BROKEN = re.compile(
    r"HTTP error: (?!builder error)|error decoding response body|kind: Interrupted"
)
_LATE = re.compile(r"kind: Timeout|TimedOut|timed out")
_FINAL_5XX = frozenset({501, 505})


def redacted(text: str) -> str:
    """The first line of a message, without passwords, queries of URLs and bodies of replies."""
    line = text.partition("\n")[0]
    status = _STATUS.search(line)
    line = line[: status.end()] if status else line
    return _QUERY.sub(r"\1", _PASSWORD.sub("", line))[:_LONGEST].strip()


def status_of(exc: BaseException) -> int | None:
    """The HTTP status that an exception of obstore is about, or None."""
    match = _STATUS.search(str(exc))
    return int(match[1]) if match else None


def is_refused(exc: BaseException) -> bool:
    """Whether the server says that a condition is not met (412)."""
    return isinstance(exc, obstore_errors.PreconditionError) or status_of(exc) == 412


def ignores_range(exc: BaseException) -> bool:
    """Whether a whole object came where a part of it was asked for."""
    return isinstance(exc, obstore_errors.NotSupportedError) or "non-partial response" in str(exc)


def unexpected_range(exc: BaseException) -> tuple[int, int] | None:
    """The first byte and the end of a partial reply that was not what was asked for, or None."""
    match = _RANGES.search(str(exc))
    return (int(match[3]), int(match[4])) if match else None


def translate(name: str, exc: Exception) -> Exception:
    """The error to raise for ``exc``; ``name`` is what people call the object.

    A missing object is a SourceError here: when opening, the caller knows better.
    """
    if isinstance(exc, AiouffdError):
        return exc
    text, status = str(exc), status_of(exc)
    error: Exception
    if is_refused(exc) or status == 416:
        error = SourceChangedError(f"{name} has changed: the server answered {status or 412}")
    elif isinstance(exc, FileNotFoundError) or status == 410:
        error = SourceError(f"{name} is gone", transient=False, errno=errno.ENOENT)
    elif isinstance(
        exc, obstore_errors.PermissionDeniedError | obstore_errors.UnauthenticatedError
    ) or status in (401, 403, 407):
        error = SourcePermissionError(
            f"{name}: access denied" + (f" (HTTP {status})" if status else ""),
            transient=False,
            errno=errno.EACCES,
            hint="check the credentials in the environment, or give config= or"
            " credential_provider=; for public objects config={'skip_signature': 'true'}",
        )
    elif ignores_range(exc):
        error = RangeNotSupportedError(
            f"{name}: the server ignored the Range header and sent the whole object",
            hint="a server with range support is needed; download the object, or use a mirror",
        )
    elif status is not None:
        transient = status in (408, 425, 429) or (500 <= status <= 599 and status not in _FINAL_5XX)
        error = SourceError(
            f"{name}: the server answered HTTP {status}",
            transient=transient,
            errno=errno.EAGAIN if transient else errno.EIO,
        )
    elif "builder error" in text:
        error = SourceError(
            f"{name}: {redacted(text)}",
            transient=False,
            hint="http:// without TLS has to be allowed: AWS_ALLOW_HTTP=true, or"
            " client_options={'allow_http': True}",
        )
    elif _LATE.search(text):
        error = SourceTimeoutError(
            f"{name}: nothing came in time: {redacted(text)}", errno=errno.ETIMEDOUT
        )
    elif _BROKEN.search(text):
        error = SourceError(f"{name}: {redacted(text)}", errno=errno.ECONNRESET)
    elif (match := _RANGES.search(text)) is not None:
        asked, got = tuple(match.groups()[:2]), tuple(match.groups()[2:])
        message = f"{name}: asked for bytes {'-'.join(asked)}, the server sent {'-'.join(got)}"
        # More than that may be a fault of the moment; another place is one of the server.
        error = ShortReadError(message) if asked[0] == got[0] else SourceError(message)
        error.transient = asked[0] == got[0]
    elif isinstance(exc, ValueError | obstore_errors.InvalidPathError):
        error = UsageError(f"{name}: {redacted(text)}")
    else:
        error = SourceError(f"{name}: {type(exc).__name__}: {redacted(text)}", transient=False)
    error.__cause__ = _cause(exc)
    return error


def _cause(exc: Exception) -> Exception:
    """``exc`` with a text that may be shown."""
    try:
        return type(exc)(redacted(str(exc)))
    except Exception:
        return SourceError(redacted(str(exc)))
