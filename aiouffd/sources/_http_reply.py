"""What a reply to a range request says: parsing and judging headers, no sockets.

Kept apart from the client so that each rule can be read, and tested, by itself.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC

from ..errors import RangeNotSupportedError, ShortReadError, SourceChangedError, SourceError
from .base import SourcePermissionError

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)\s*", re.I)
_FINAL_5XX = frozenset({501, 505})  # not implemented, version not supported
#: Bytes of an object that is small enough to be taken whole where a server sends no parts of it:
#: about what one request for a part would bring.
WHOLE = 64 * 1024
#: Seconds after which an object may be trusted not to change without a change of its date: dates
#: tell whole seconds, and two machines' clocks may have made them (RFC 9110, 8.8.2.2).
_SETTLED = 60.0


@dataclass(frozen=True)
class ContentRange:
    """A Content-Range header: byte positions, ``last`` inclusive; None where it has ``*``."""

    first: int | None
    last: int | None
    total: int | None


def parse_content_range(value: str | None) -> ContentRange | None:
    """Parse a Content-Range header; None if it is missing or malformed."""
    match = _CONTENT_RANGE.fullmatch(value or "")
    if match is None:
        return None
    first, last, total = match.groups()
    if first is not None and int(last) < int(first):
        return None
    return ContentRange(
        None if first is None else int(first),
        None if last is None else int(last),
        None if total == "*" else int(total),
    )


@dataclass(frozen=True)
class _Bounds:
    """A Content-Range that has bytes, first to ``last`` inclusive."""

    first: int
    last: int
    total: int | None


@dataclass(frozen=True)
class Validator:
    """What pins the version of an object: its size and the server's validators.

    All that a reply has must agree: servers are known to keep a strong ETag for a file that has
    been replaced, and then the date alone tells (tornadoweb/tornado #892).
    """

    size: int
    etag: str | None
    last_modified: str | None
    #: Whether the date was old enough for a later change to show in it.
    settled: bool = False

    @classmethod
    def of(cls, size: int, headers: Mapping[str, str]) -> Validator:
        """Take the validators out of the headers of a reply."""
        modified = headers.get("Last-Modified") or None
        since, now = _timestamp(modified or ""), _timestamp(headers.get("Date", ""))
        settled = since is not None and (time.time() if now is None else now) - since >= _SETTLED
        return cls(size, headers.get("ETag") or None, modified, settled)

    @property
    def strong(self) -> bool:
        """Whether the ETag is one that If-Match may carry."""
        etag = self.etag
        return etag is not None and etag.startswith('"') and etag.endswith('"') and len(etag) > 1

    @property
    def weak(self) -> bool:
        """Whether bytes may change and all this stay the same."""
        return not self.strong and not self.settled

    @property
    def version(self) -> str | None:
        """For `Source.version`; None if the server names no version at all."""
        return " ".join(filter(None, (self.etag, self.last_modified))) or None

    def conditions(self) -> dict[str, str]:
        """Request headers that make the server refuse another version (412)."""
        if self.strong and self.etag is not None:
            return {"If-Match": self.etag}
        if self.last_modified is not None:
            return {"If-Unmodified-Since": self.last_modified}
        return {}

    def without_date(self) -> Validator:
        """The same for an object whose date tells nothing beside a strong ETag."""
        return replace(self, last_modified=None) if self.strong else self

    def check(self, name: str, headers: Mapping[str, str]) -> None:
        """Raise SourceChangedError if the validators in ``headers`` are not these. What is pinned
        has to be there, but for a date beside a strong ETag. The size is not looked at."""
        etag = headers.get("ETag") or None
        if self.etag is not None and etag != self.etag:
            raise SourceChangedError(
                f"{name} has changed: its ETag was {self.etag} and now is {etag}"
            )
        modified = headers.get("Last-Modified") or None
        if self.last_modified is None or _same_date(modified, self.last_modified):
            return
        if modified is None and self.strong:
            return
        raise SourceChangedError(
            f"{name} has changed: it was last modified at {self.last_modified} and now at"
            f" {modified}" + (", though its ETag stayed" if self.strong else ""),
            hint="open the source again to read its present version; if copies on several machines"
            " have the same ETag and bytes, but not the same date, use ignore_dates=True"
            if self.strong
            else None,
        )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds asked for by Retry-After (a number or a date), not negative; None if it is absent.

    A date is taken relative to the reply's own Date, so that a wrong clock does not matter.
    """
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    until = _timestamp(value)
    if until is None:
        return None
    now = _timestamp(headers.get("Date", ""))
    return max(0.0, until - (time.time() if now is None else now))


def _timestamp(value: str) -> float | None:
    # Not at the top: only replies of some servers need it, and importing it takes long.
    from email.utils import parsedate_to_datetime

    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        return date.timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def _same_date(one: str | None, other: str | None) -> bool:
    """Whether two dates in headers are the same second; they may be written in three ways."""
    if one == other:
        return True
    since = _timestamp(one or "")
    return since is not None and since == _timestamp(other or "")


@dataclass(frozen=True)
class Part:
    """Where in a reply's body the bytes are that were asked for: after ``skip`` others come
    ``length`` of them, then ``rest`` others. The first ones at least; there may be more to ask for.
    """

    skip: int
    length: int
    rest: int


def asked_range(offset: int, length: int, size: int) -> tuple[int, int]:
    """Offset and length of the range to ask for. Never a single byte, if there are two: servers get
    that wrong, of the first one most (they test whether the last position is true, or greater than
    the first one)."""
    if length > 1 or size < 2:
        return offset, length
    return min(offset, size - 2), 2


def check_range_reply(
    name: str, status: int, headers: Mapping[str, str], offset: int, length: int, pin: Validator
) -> Part:
    """Say where the reply's body will have bytes at ``offset`` of the pinned version.

    That may be less than the ``length`` bytes that were asked for (RFC 9110, 15.3.7): then the rest
    has to be asked for. It may also be the whole object, if that is small, or was all asked for:
    a server need not heed a Range (14.2).

    ``name`` is the object's, for messages. Raises what `status_error` gives for other statuses than
    206 and 200, SourceChangedError for another version, ShortReadError for more bytes than were
    asked for or than were announced, and SourceError (not transient) for a reply that makes no
    sense, RangeNotSupportedError for a whole object that is not wanted.
    """
    if status == 416:
        raise _unsatisfied(name, headers, offset, length, pin)
    if status not in (200, 206):
        raise status_error(name, status, headers)
    check_encoding(name, headers)
    pin.check(name, headers)
    declared = content_length(headers)
    if status == 200:
        if declared is not None and declared != pin.size:
            raise _resized(name, pin.size, declared)
        if declared is None or (declared > WHOLE and length != pin.size):
            raise status_error(name, status, headers)
        return Part(offset, length, pin.size - offset - length)
    got = usable_range(name, headers)
    if got.total is not None and got.total != pin.size:
        raise _resized(name, pin.size, got.total)
    if got.total is not None and got.total != pin.size:
        raise SourceChangedError(
            f"{name} has changed: its size was {pin.size} and now is {got.total} bytes"
        )
    if got.first != offset:
        raise SourceError(
            f"{name}: asked for byte {offset} on, the reply begins at byte {got.first}",
            transient=False,
        )
    size = got.last - got.first + 1
    if size > length:
        raise ShortReadError(
            f"{name}: asked for {length} bytes at {offset}, the reply announces {size}"
        )
    if declared is not None and declared != size:
        raise ShortReadError(
            f"{name}: the reply to bytes {offset}-{offset + length - 1} announces"
            f" {headers.get('Content-Range')!r}, but {declared} bytes: not what it says, or longer"
        )
    return Part(0, size, 0)


def usable_range(name: str, headers: Mapping[str, str]) -> _Bounds:
    """The Content-Range of a partial reply. Raises SourceError (not transient) without a usable
    one: a reply of several parts (multipart/byteranges) has none."""
    text = headers.get("Content-Range")
    got = parse_content_range(text)
    if got is None or got.first is None or got.last is None:
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        several = kind == "multipart/byteranges"
        raise SourceError(
            f"{name}: a partial reply came without a usable Content-Range ({text!r})"
            + (": the server sent several parts where one was asked for" if several else ""),
            transient=False,
        )
    return _Bounds(got.first, got.last, got.total)


def content_length(headers: Mapping[str, str]) -> int | None:
    """Content-Length in bytes, or None."""
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _resized(name: str, before: int, now: int) -> SourceChangedError:
    return SourceChangedError(f"{name} has changed: its size was {before} and now is {now} bytes")


def _unsatisfied(
    name: str, headers: Mapping[str, str], offset: int, length: int, pin: Validator
) -> SourceError:
    """The error for 416: the range lies within the size that was found when opening."""
    got = parse_content_range(headers.get("Content-Range"))
    if got is None or got.total is None:
        return SourceChangedError(f"{name} has changed: the server answered 416")
    if got.total != pin.size:
        return SourceChangedError(
            f"{name} has changed: the server answered 416, its size was {pin.size} and now is"
            f" {got.total} bytes"
        )
    return SourceError(
        f"{name}: the server refused to send bytes {offset}-{offset + length - 1} of"
        f" {pin.size} (HTTP 416)",
        transient=False,
    )


def check_encoding(name: str, headers: Mapping[str, str]) -> None:
    """Raise SourceError (not transient) if the body is compressed: its offsets are not ours."""
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise SourceError(
            f"{name}: the server sent Content-Encoding {encoding!r} though identity was asked for",
            transient=False,
            hint="serve the object without compression, or decompress it elsewhere first",
        )


def status_error(name: str, status: int, headers: Mapping[str, str]) -> SourceError:
    """Return the error for a reply that is not 206."""
    if status == 200:
        return RangeNotSupportedError(
            f"{name}: the server ignored the Range header and sent the whole object",
            hint="a server with range support is needed; download the object, or use a mirror",
        )
    if status in (401, 403, 407):
        return SourcePermissionError(
            f"{name}: access denied (HTTP {status})",
            transient=False,
            errno=errno.EACCES,
            hint="check headers=, auth= and, for a signed URL, its expiry",
        )
    if status in (404, 410):
        return SourceError(f"{name} is gone (HTTP {status})", transient=False, errno=errno.ENOENT)
    transient = status in (408, 425, 429) or (500 <= status <= 599 and status not in _FINAL_5XX)
    return SourceError(
        f"{name}: the server answered HTTP {status}",
        transient=transient,
        retry_after=retry_after(headers) if transient else None,
        errno=errno.EAGAIN if transient else errno.EIO,
    )
