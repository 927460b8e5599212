"""What a reply to a range request says: parsing and judging headers, no sockets.

Kept apart from the client so that each rule can be read, and tested, by itself.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC

from ..errors import (
    RangeNotSupportedError,
    ShortReadError,
    SourceChangedError,
    SourceError,
)
from .base import SourcePermissionError

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)\s*", re.I)
_FINAL_5XX = frozenset({501, 505})  # not implemented, version not supported
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
class Validator:
    """What pins the version of an object: its size and the server's validators.

    A strong ETag alone decides: equal tags mean equal bytes, whatever else differs (mirrors
    often disagree on Last-Modified). With a weak ETag, or none, Last-Modified counts too.
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
        if self.strong:
            return self.etag
        return " ".join(filter(None, (self.etag, self.last_modified))) or None

    def conditions(self) -> dict[str, str]:
        """Request headers that make the server refuse another version (412)."""
        if self.strong and self.etag is not None:
            return {"If-Match": self.etag}
        if self.last_modified is not None:
            return {"If-Unmodified-Since": self.last_modified}
        return {}

    def difference(self, headers: Mapping[str, str]) -> str | None:
        """Say how the validators in ``headers`` differ, or None. The size is not looked at."""
        if self.etag is not None:
            etag = headers.get("ETag")
            if etag != self.etag:
                return f"its ETag was {self.etag} and now is {etag}"
        if not self.strong and self.last_modified is not None:
            modified = headers.get("Last-Modified")
            if modified != self.last_modified:
                return f"it was last modified at {self.last_modified} and now at {modified}"
        return None


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


def check_range_reply(
    name: str, status: int, headers: Mapping[str, str], offset: int, length: int, pin: Validator
) -> None:
    """Return if the reply's body will be ``length`` bytes at ``offset`` of the pinned version.

    ``name`` is the object's, for messages. Raises what `status_error` gives for a status other
    than 206, SourceChangedError for another version, ShortReadError for another length, and
    SourceError (not transient) for a reply that makes no sense.
    """
    if status != 206:
        raise status_error(name, status, headers)
    check_encoding(name, headers)
    difference = pin.difference(headers)
    if difference is not None:
        raise SourceChangedError(f"{name} has changed: {difference}")
    got = parse_content_range(headers.get("Content-Range"))
    if got is None or got.first is None or got.last is None:
        raise SourceError(
            f"{name}: a partial reply came without a usable Content-Range"
            f" ({headers.get('Content-Range')!r})",
            transient=False,
        )
    if got.total is not None and got.total != pin.size:
        raise SourceChangedError(
            f"{name} has changed: its size was {pin.size} and now is {got.total} bytes"
        )
    if got.first != offset:
        raise SourceError(
            f"{name}: asked for byte {offset} on, the reply begins at byte {got.first}",
            transient=False,
        )
    sizes = [got.last - got.first + 1]
    declared = headers.get("Content-Length")
    if declared is not None and declared.isdigit():
        sizes.append(int(declared))
    for size in sizes:
        if size != length:
            raise ShortReadError(
                f"{name}: asked for {length} bytes at {offset}, the reply announces {size}"
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
    if status in (412, 416):
        return SourceChangedError(f"{name} has changed: the server answered {status}")
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
