"""Bytes of an object on an HTTP or HTTPS server, by range requests.

Every request names the version that was opened (If-Match, or If-Unmodified-Since where the
server has no strong ETag) and every reply is checked before its body is used, so that a changed
object is an error and never a mix of two versions. A body is never drained: a reply that
is not wanted costs its connection.

A server may send less than was asked for, or a small object whole. What came is used then.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import logging
import re
import ssl as ssl_module
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

from ..errors import (
    AiouffdError,
    ClosedError,
    RangeNotSupportedError,
    ShortReadError,
    SourceError,
    UnsupportedError,
    UsageError,
)
from ..util.extras import install_hint
from ..util.once import cancelled_from_outside
from ..util.unwatched import Unwatched
from ._http_proxy import checked_proxy, proxy_for
from ._http_reply import (
    WHOLE,
    Part,
    Validator,
    asked_range,
    check_encoding,
    check_range_reply,
    content_length,
    parse_content_range,
    status_error,
    usable_range,
)
from ._versions import Unversioned, check_version, check_word
from .base import BaseSource, Buffer, check_range
from .lifecycle import Life
from .names import identity, with_user

if TYPE_CHECKING:
    import aiohttp
    import yarl

    from ._http_session import Session

__all__ = ["HttpSource"]

log = logging.getLogger("aiouffd")

# What is asked for to find out about an object; see `asked_range`.
_FIRST = "bytes=0-1"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 10
# What a remembered redirect answers once its signature or its target has expired.
_EXPIRED = frozenset({400, 401, 403, 404, 410})
_OWN_HEADERS = frozenset(
    {"range", "if-match", "if-none-match", "if-unmodified-since", "if-modified-since"}
    | {"if-range", "accept-encoding", "host", "content-length", "transfer-encoding"}
)
# Characters of a URL that is quoted already.
_QUOTED = re.compile(r"[!#-;=?-\[\]_a-z~]*")
# Do not choose what is sent.
_IRRELEVANT_HEADERS = ("user-agent", "connection", "keep-alive", "proxy-authorization")
# Not sent to another origin than the one they were given for.
_PRIVATE_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization"})


class HttpSource(BaseSource):
    """A source over one HTTP(S) object, through aiohttp (needs the extra ``http``).

    Arguments:
        url: ``http://`` or ``https://``. A user and password in it are sent as Basic auth.
        headers: sent with every request to the URL's own origin; after a redirect to another
            origin without Authorization and Cookie.
        auth: ``(user, password)`` for Basic auth.
        timeout: seconds without a byte from the server; None waits for ever.
        connect_timeout: seconds for name lookup, and for TCP and TLS together.
        total_timeout: seconds for a whole request, or None (waiting for one of
            the ``max_connections`` counts, so keep it well above a busy moment).
        max_connections: connections at a time; further reads wait their turn.
        keepalive: seconds that an idle connection is kept.
        read_buffer: bytes buffered for a reply before the socket is paused.
        ssl: an ``ssl.SSLContext``, True (verify with the system's authorities) or False (do
            not verify: only for tests).
        proxy: URL of an HTTP proxy, with ``user:password@`` if it wants that. None takes what the
            environment says for the URL (http_proxy, https_proxy, all_proxy, no_proxy) when it is
            first asked; "" uses none.
        unversioned: what to do when the server sends neither ETag nor Last-Modified, so that a
            change would go unnoticed: "warn" (UnversionedSourceWarning), "accept" or "refuse".
        ignore_dates: do not look at Last-Modified where there is a strong ETag. For copies on
            several machines that agree on that and the bytes, but not on the date.

    The version is pinned by ETag and Last-Modified, of which all that the server sends must stay
    as it was. Where If-Match is answered with 412 although the ETag is the same, as some gateways
    do, it is no longer sent, and the ETag of each reply alone is compared.

    An object of at most 64 KiB that the server sends whole, or cannot send in parts, is kept from
    when it was opened. Its later fate is not looked at.

    Errors, besides those of `Source`: SourcePermissionError (401, 403, 407); SourceError, not
    transient, for 404 and 410 after opening and for replies that make no sense; transient, with
    ``retry_after``, for 408, 429 and 5xx; SourceTimeoutError, transient; ShortReadError,
    transient, for a body of the wrong length (an over-long one never passes the end of the
    caller's buffer). Messages name the URL without its query and password.

    Belongs to one loop. If cancelled, a read closes its own connection and no other.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
        timeout: float | None = 30.0,
        connect_timeout: float | None = 10.0,
        total_timeout: float | None = None,
        max_connections: int = 32,
        keepalive: float = 30.0,
        read_buffer: int = 1 << 18,
        ssl: ssl_module.SSLContext | bool = True,
        proxy: str | None = None,
        unversioned: Unversioned = "warn",
        ignore_dates: bool = False,
    ) -> None:
        parts = _split(url)
        if max_connections < 1:
            raise UsageError(f"max_connections must be at least 1, got {max_connections}")
        if read_buffer < 1 << 16:
            raise UsageError(f"read_buffer must be at least 65536 bytes, got {read_buffer}")
        self._headers = dict(headers or {})
        names = {name.lower() for name in self._headers}
        if names & _OWN_HEADERS:
            raise UsageError(
                f"headers set by the source itself: {', '.join(sorted(names & _OWN_HEADERS))}"
            )
        if auth is None and parts.username is not None:
            auth = (unquote(parts.username), unquote(parts.password or ""))
        if auth is not None and "authorization" not in names:
            token = base64.b64encode(f"{auth[0]}:{auth[1]}".encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        host = parts.netloc.rpartition("@")[2]
        self._url = urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))
        self._name = urlunsplit((parts.scheme, host, parts.path or "/", "", ""))
        self._options: dict[str, Any] = {
            "timeout": timeout,
            "connect_timeout": connect_timeout,
            "total_timeout": total_timeout,
            "max_connections": max_connections,
            "keepalive": keepalive,
            "read_buffer": read_buffer,
            "ssl": ssl,
        }
        self._proxy = checked_proxy(proxy) if proxy else proxy
        self._unversioned = check_word(unversioned)
        self._ignore_dates = ignore_dates
        self._pin: Validator | None = None
        # The bytes, if they came when it was opened.
        self._whole: bytes | None = None
        # Whether requests say which version they are for.
        self._conditional = True
        # Where redirects led, as long as that works.
        self._resolved = self._url
        # For the URL that was asked last: the headers, and the proxy.
        self._way: tuple[str, dict[str, str], str | None] | None = None
        self._active: set[aiohttp.ClientResponse] = set()
        self._session: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._life = Life(repr(self))

    def __repr__(self) -> str:
        return f"<HttpSource {self._name}>"

    def __del__(self) -> None:
        if getattr(self, "_session", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    @property
    def url(self) -> str:
        """The URL as given, without user and password."""
        return self._url

    @property
    def cache_key(self) -> str | None:
        """What names the object for a disk cache: the URL with its user but no password, and the
        headers, which may choose what is sent."""
        headers = {name.lower(): value for name, value in self._headers.items()}
        return identity(with_user(self._url, _user_of(headers)), headers, _IRRELEVANT_HEADERS)

    @property
    def weak(self) -> bool:
        """Whether the object may change and its ``version`` stay: a weak ETag, or none, and a
        date of less than a minute before it was opened."""
        return self._pin is not None and self._pin.weak

    @property
    def size(self) -> int:
        """Length of the object in bytes. Raises UsageError before ``open()``."""
        if self._pin is None:
            raise UsageError(f"the size of {self!r} is not known yet", hint="await open() first")
        return self._pin.size

    async def open(self) -> None:
        """Find size, version and range support: with one request, unless the server cannot send
        the first two bytes of the object, or does not tell its size with them.

        A clone of an opened source knows all this and makes no request; its first read finds out
        whether the object has changed.

        Raises FileNotFoundError (404, 410), RangeNotSupportedError, UnsupportedError when aiohttp
        is missing or the environment names a proxy that cannot be used, and otherwise what the
        class describes. May be called again after a failure, and by several tasks at a time; when
        all of them are cancelled it is not open.
        """
        await self._life.open(self._open, self._disconnect)

    async def _open(self) -> None:
        self._session = _make_session(self._options)
        self._loop = asyncio.get_running_loop()
        try:
            if self._pin is None:
                pin, whole = await self._probe()
                if whole is None:
                    check_version(self._name, pin.version, self._unversioned)
                self._pin = pin.without_date() if self._ignore_dates else pin
                self._whole = whole
            self.version = self._pin.version
        except BaseException:
            self._resolved = self._url
            await self._disconnect()
            raise

    async def aclose(self) -> None:
        """Close all connections. Reads in flight, and ``open()``, raise ClosedError.

        Happens once, and to its end although who asks for it is cancelled; later calls return when
        it is over.
        """
        await self._life.close(self._disconnect)

    async def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            for response in list(self._active):
                response.close()  # wakes whoever waits for its body
            self._active.clear()
            await session.aclose()

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        async with contextlib.aclosing(Unwatched(self.stream(offset, length))) as stream:
            chunks = [chunk async for chunk in stream]
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` into ``buffer``, chunk by chunk."""
        done = 0
        async with contextlib.aclosing(Unwatched(self.stream(offset, len(buffer)))) as stream:
            async for chunk in stream:
                end = done + len(chunk)
                buffer[done:end] = chunk
                done = end

    async def stream(self, offset: int, length: int) -> AsyncGenerator[Buffer, None]:
        """Yield the range as it arrives, in the chunks of the network (up to 256 KiB).

        Closing it early closes the connection.
        """
        self._checked(offset, length)
        end = offset + length
        if length and self._whole is not None:
            yield self._whole if length == self.size else self._whole[offset:end]
            return
        while offset < end:
            response, part = await self._begin(offset, end - offset)
            try:
                skip, left, rest = part.skip, part.length, part.rest
                offset += left
                while left:
                    chunk = await self._chunk(response, skip + left + rest)
                    if skip:
                        chunk, skip = chunk[skip:], max(0, skip - len(chunk))
                    if len(chunk) > left:
                        chunk, rest = chunk[:left], rest - (len(chunk) - left)
                    left -= len(chunk)
                    if not left and not rest:
                        await self._end(response)
                    if chunk:
                        yield chunk
            finally:
                self._done(response)

    def clone(self) -> HttpSource:
        """Return an unopened source over the same URL and options, pinned to this version."""
        other = HttpSource(
            self._url,
            headers=self._headers,
            proxy=self._proxy,
            unversioned=self._unversioned,
            ignore_dates=self._ignore_dates,
        )
        other._options = self._options
        other._pin = self._pin
        other._whole = self._whole
        other._conditional = self._conditional
        other._resolved = self._resolved
        other.version = self.version
        return other

    # One range.

    async def _begin(self, offset: int, length: int) -> tuple[aiohttp.ClientResponse, Part]:
        """Ask for a range; return a reply of the right version, and where in it the bytes are."""
        pin = self._checked(offset, length)
        first, count = asked_range(offset, length, pin.size)
        wanted = {"Range": f"bytes={first}-{first + count - 1}"}
        conditions = pin.conditions() if self._conditional else {}
        response = await self._send("GET", {**conditions, **wanted})
        try:
            refused = response.status == 412 and bool(conditions)
            if refused:
                # It has changed, or the server's comparison is broken: its ETag will tell.
                self._done(response)
                response = await self._send("GET", wanted)
            part = check_range_reply(
                self._name, response.status, response.headers, first, count, pin
            )
            before = offset - first
            if part.length <= before:
                raise ShortReadError(f"{self._name}: the reply ends before byte {offset}")
            if refused:
                self._conditional = False
                log.info(
                    "%s: the server refuses %s though the object is the same; it is not sent again",
                    self._name,
                    next(iter(conditions)),
                )
        except BaseException:
            self._done(response)
            raise
        usable = min(part.length - before, length)
        return response, Part(part.skip + before, usable, part.rest + part.length - before - usable)

    async def _chunk(self, response: aiohttp.ClientResponse, left: int) -> bytes:
        """Return the next bytes of a body, at most the ``left`` that are still to come."""
        chunk = await self._more(response)
        if not chunk:
            raise ShortReadError(f"{self._name}: the reply ended {left} bytes early")
        if len(chunk) > left:
            raise ShortReadError(f"{self._name}: the reply is longer than what was asked for")
        return chunk

    async def _more(self, response: aiohttp.ClientResponse) -> bytes:
        """The next bytes of a body; none at its end."""
        try:
            # Unlike read() and readany() this never joins what the socket delivered.
            chunk, _ = await response.content.readchunk()
            while not chunk and not response.content.at_eof():
                chunk, _ = await response.content.readchunk()
        except Exception as exc:
            raise self._translated(exc) from exc
        return chunk

    async def _end(self, response: aiohttp.ClientResponse) -> None:
        """See that the body ends here, which also gives its connection back to the pool."""
        if response.content.at_eof():
            return
        try:
            chunk = await response.content.readany()
        except Exception as exc:
            raise self._translated(exc) from exc
        if chunk:
            raise ShortReadError(f"{self._name}: the reply is longer than what was asked for")

    def _done(self, response: aiohttp.ClientResponse) -> None:
        """Close the connection, unless the body came to its end and it is in the pool again."""
        self._active.discard(response)
        response.close()

    # Requests.

    async def _probe(self) -> tuple[Validator, bytes | None]:
        """Find out size and validators, and the bytes if they come whole."""
        async with self._asked("GET", {"Range": _FIRST}) as response:
            status, headers = response.status, response.headers
            got = parse_content_range(headers.get("Content-Range"))
            if status in (404, 410):
                raise FileNotFoundError(errno.ENOENT, f"no such object (HTTP {status})", self._name)
            if status == 416 and got is not None and got.total == 0:
                return Validator.of(0, headers), b""
            if status == 200:
                return await self._small(response)
            if status == 206:
                first, size = await self._first_bytes(response)
                validator = Validator.of(0 if size is None else size, headers)
            elif status != 416:
                raise status_error(self._name, status, headers)
        if status == 416:
            return await self._probe_without_range()
        if size is None:
            size = await self._size(validator)
            validator = replace(validator, size=size)
        return validator, first if len(first) == size else None

    async def _first_bytes(self, response: aiohttp.ClientResponse) -> tuple[bytes, int | None]:
        """The first bytes of the object, one or two, from a partial reply, and its size."""
        check_encoding(self._name, response.headers)
        text = response.headers.get("Content-Range")
        try:
            got = usable_range(self._name, response.headers)
        except SourceError as exc:
            raise RangeNotSupportedError(exc.message) from None
        size = got.total
        if got.first != 0 or got.last > 1 or (size is not None and size <= got.last):
            raise RangeNotSupportedError(
                f"{self._name}: asked for bytes 0-1, the server sent Content-Range {text!r}"
            )
        declared = content_length(response.headers)
        if declared is not None and declared > got.last + 1:
            raise ShortReadError(f"{self._name}: the reply is longer than what was asked for")
        # Taken, so that the connection can serve the first read.
        first = b""
        while len(first) <= got.last:
            first += await self._chunk(response, got.last + 1 - len(first))
        await self._end(response)
        return first, size

    async def _probe_without_range(self) -> tuple[Validator, bytes]:
        """An object of which the first bytes cannot be had (416): most likely it has none."""
        async with self._asked("GET", {}) as response:
            try:
                return await self._small(response)
            except SourceError as exc:
                raise SourceError(
                    f"{self._name}: the server refused to send bytes 0-1 (HTTP 416)",
                    transient=exc.transient,
                ) from exc

    async def _small(self, response: aiohttp.ClientResponse) -> tuple[Validator, bytes]:
        """An object that is sent whole, if it is small. Raises what `status_error` gives if not."""
        status, headers = response.status, response.headers
        declared = content_length(headers)
        chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        # Without either, nothing would tell an object from the first part of one.
        if status == 200 and (chunked if declared is None else declared <= WHOLE):
            check_encoding(self._name, headers)
            data = bytearray()
            most = WHOLE if declared is None else declared
            while len(data) <= most and (chunk := await self._more(response)):
                data += chunk
            if declared is not None and len(data) != declared:
                raise ShortReadError(f"{self._name}: the reply is not as long as it announces")
            if len(data) <= WHOLE:
                return Validator.of(len(data), headers), bytes(data)
        raise status_error(self._name, status, headers)

    async def _size(self, validator: Validator) -> int:
        """Ask for a size that the partial reply did not tell."""
        for method in ("HEAD", "GET"):
            # Signed URLs are good for GET alone.
            async with self._asked(method, {}) as response:
                size = content_length(response.headers)
                if response.status == 200 and size is not None:
                    check_encoding(self._name, response.headers)
                    validator.check(self._name, response.headers)
                    return size
        raise SourceError(
            f"{self._name}: the server does not tell the size of the object", transient=False
        )

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, extra: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The reply to a request, whose connection is closed unless all of it was taken."""
        response = await self._send(method, extra)
        try:
            yield response
        finally:
            self._done(response)

    async def _send(self, method: str, extra: dict[str, str]) -> aiohttp.ClientResponse:
        """Send a request, follow redirects, and return the reply with its body unread.

        The place where redirects led is used again next time, and given up after any failure.
        """
        start = self._resolved
        try:
            response, url = await self._follow(method, start, extra)
            if response.status in _EXPIRED and start != self._url:
                self._done(response)
                response, url = await self._follow(method, self._url, extra)
        except asyncio.CancelledError:
            # Closing the pool cancels those who wait for a connection, but not their tasks.
            if self._life.closed and not cancelled_from_outside():
                raise ClosedError(f"{self!r} was closed during a request") from None
            raise
        except Exception as exc:
            self._resolved = self._url
            raise self._translated(exc) from exc
        self._resolved = url if response.status in (200, 206) else self._url
        return response

    async def _follow(
        self, method: str, url: str, extra: dict[str, str]
    ) -> tuple[aiohttp.ClientResponse, str]:
        for _ in range(_MAX_REDIRECTS + 1):
            session = self._session
            if session is None:
                raise ClosedError(f"{self!r} is closed")
            headers, proxy = self._way_to(url)
            response = await session.request(method, _encoded(url), {**headers, **extra}, proxy)
            self._active.add(response)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response, url
            self._done(response)
            url = self._redirected(url, location)
        raise SourceError(f"{self._name}: more than {_MAX_REDIRECTS} redirects", transient=False)

    def _redirected(self, url: str, location: str) -> str:
        try:
            parts = _split(urljoin(url, location))
        except UsageError as exc:
            raise SourceError(
                f"{self._name}: redirected to something that is not an HTTP URL", transient=False
            ) from exc
        if url.startswith("https:") and parts.scheme != "https":
            raise SourceError(
                f"{self._name}: redirected from https to {parts.scheme}, which is refused",
                transient=False,
            )
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))

    def _way_to(self, url: str) -> tuple[dict[str, str], str | None]:
        """Headers for a URL, none of the private ones for an origin other than the first, and its
        proxy."""
        known = self._way
        if known is None or known[0] != url:
            headers = {
                name: value
                for name, value in self._headers.items()
                if name.lower() not in _PRIVATE_HEADERS or _origin(url) == _origin(self._url)
            }
            headers["Accept-Encoding"] = "identity"
            # To look into the environment takes longer than all else here.
            proxy = proxy_for(url) if self._proxy is None else self._proxy or None
            known = self._way = (url, headers, proxy)
        return known[1:]

    def _checked(self, offset: int, length: int) -> Validator:
        if self._session is None or self._pin is None:
            if self._life.closed:
                raise ClosedError(f"{self!r} is closed")
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                f"{self!r} belongs to another event loop", hint="use a clone() on this one"
            )
        check_range(offset, length, self._pin.size)
        return self._pin

    def _translated(self, exc: Exception) -> Exception:
        if self._life.closed and not isinstance(exc, ClosedError):
            return ClosedError(f"{self!r} was closed during a request")
        if isinstance(exc, AiouffdError):
            return exc
        from ._http_session import translate

        return translate(self._name, exc)


def _make_session(options: dict[str, Any]) -> Session:
    try:
        from ._http_session import Session
    except ModuleNotFoundError as exc:
        raise UnsupportedError(
            f"reading over HTTP needs {exc.name}", hint=install_hint("http")
        ) from exc
    return Session(**options)


def _split(url: str) -> SplitResult:
    """Split an absolute http(s) URL; UsageError for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise UsageError(f"not a usable URL: {exc}") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(
            f"not an http:// or https:// URL: {parts.scheme or '(no scheme)'}://"
            f"{parts.hostname or '(no host)'}"
        )
    return parts


def _user_of(headers: dict[str, str]) -> str | None:
    """Take the user out of an Authorization header, whose password only proves who he is."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        user = base64.b64decode(token).decode().partition(":")[0]
    except ValueError:
        return None
    del headers["authorization"]
    return user


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


@lru_cache(maxsize=64)
def _encoded(url: str) -> yarl.URL:
    """Return the URL for aiohttp, quoted only if it must be: signatures cover the exact text."""
    from yarl import URL

    return URL(url, encoded=_QUOTED.fullmatch(url) is not None)
