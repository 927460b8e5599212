"""Bytes of an object on an HTTP or HTTPS server, by range requests.

Every request names the version that was opened (If-Match, or If-Unmodified-Since where the
server has no strong ETag) and every reply is checked before its body is used, so that a changed
object is an error and never a mix of two versions. A body is never drained: a reply that
is not wanted costs its connection.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import re
import ssl as ssl_module
import warnings
from collections.abc import AsyncGenerator, Mapping
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
from ._http_reply import (
    Validator,
    check_encoding,
    check_range_reply,
    parse_content_range,
    status_error,
)
from .base import BaseSource, Buffer, check_range
from .names import identity, with_user

if TYPE_CHECKING:
    import aiohttp
    import yarl

__all__ = ["HttpSource"]

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
    """A source over one HTTP(S) object, through aiohttp (``pip install aiouffd[http]``).

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
        proxy: URL of an HTTP proxy. Environment variables are not looked at.

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
            "proxy": proxy,
        }
        self._pin: Validator | None = None
        # Where redirects led, as long as that works.
        self._resolved = self._url
        self._headers_cache: tuple[str, dict[str, str]] | None = None
        self._active: set[aiohttp.ClientResponse] = set()
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

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
        """Find size, version and range support, with one request.

        A clone of an opened source knows all this and makes no request; its first read finds out
        whether the object has changed.

        Raises FileNotFoundError (404, 410), RangeNotSupportedError, UnsupportedError when aiohttp
        is missing, UsageError when the server does not tell the size, and otherwise what
        the class describes. May be called again after a failure.
        """
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if self._session is not None:
            return
        self._session = session = _make_session(self._options)
        self._loop = asyncio.get_running_loop()
        try:
            if self._pin is None:
                self._pin = await self._probe()
            self.version = self._pin.version
        except BaseException:
            self._session = None
            self._resolved = self._url
            await session.close()
            raise

    async def aclose(self) -> None:
        """Close all connections. Reads in flight raise ClosedError. Idempotent."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            for response in list(self._active):
                response.close()  # wakes whoever waits for its body
            self._active.clear()
            await session.close()

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        chunks: list[bytes] = []
        response = await self._begin(offset, length)
        try:
            left = length
            while left:
                chunk = await self._chunk(response, left)
                chunks.append(chunk)
                left -= len(chunk)
            await self._end(response)
        finally:
            self._done(response)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` into ``buffer``, chunk by chunk."""
        length = len(buffer)
        response = await self._begin(offset, length)
        try:
            done = 0
            while done < length:
                chunk = await self._chunk(response, length - done)
                end = done + len(chunk)
                buffer[done:end] = chunk
                done = end
            await self._end(response)
        finally:
            self._done(response)

    async def stream(self, offset: int, length: int) -> AsyncGenerator[Buffer, None]:
        """Yield the range as it arrives, in the chunks of the network (up to 256 KiB).

        Closing it early closes the connection.
        """
        response = await self._begin(offset, length)
        try:
            left = length
            while left:
                chunk = await self._chunk(response, left)
                left -= len(chunk)
                if not left:
                    await self._end(response)
                yield chunk
        finally:
            self._done(response)

    def clone(self) -> HttpSource:
        """Return an unopened source over the same URL and options, pinned to this version."""
        other = HttpSource(self._url, headers=self._headers)
        other._options = self._options
        other._pin = self._pin
        other._resolved = self._resolved
        other.version = self.version
        return other

    # One range.

    async def _begin(self, offset: int, length: int) -> aiohttp.ClientResponse | None:
        """Ask for a range; return a reply whose headers are right, or None for zero bytes."""
        pin = self._checked(offset, length)
        if not length:
            return None
        extra = pin.conditions()
        extra["Range"] = f"bytes={offset}-{offset + length - 1}"
        response = await self._send("GET", extra)
        try:
            check_range_reply(self._name, response.status, response.headers, offset, length, pin)
        except BaseException:
            self._done(response)
            raise
        return response

    async def _chunk(self, response: aiohttp.ClientResponse | None, left: int) -> bytes:
        """Return the next bytes of a body, at most the ``left`` that are still to come."""
        assert response is not None
        try:
            # Unlike read() and readany() this never joins what the socket delivered.
            chunk, _ = await response.content.readchunk()
            while not chunk and not response.content.at_eof():
                chunk, _ = await response.content.readchunk()
        except Exception as exc:
            raise self._translated(exc) from exc
        if not chunk:
            raise ShortReadError(f"{self._name}: the reply ended {left} bytes early")
        if len(chunk) > left:
            raise ShortReadError(f"{self._name}: the reply is longer than what was asked for")
        return chunk

    async def _end(self, response: aiohttp.ClientResponse | None) -> None:
        """See that the body ends here, which also gives its connection back to the pool."""
        if response is None or response.content.at_eof():
            return
        try:
            chunk = await response.content.readany()
        except Exception as exc:
            raise self._translated(exc) from exc
        if chunk:
            raise ShortReadError(f"{self._name}: the reply is longer than what was asked for")

    def _done(self, response: aiohttp.ClientResponse | None) -> None:
        """Close the connection, unless the body came to its end and it is in the pool again."""
        if response is not None:
            self._active.discard(response)
            response.close()

    # Requests.

    async def _probe(self) -> Validator:
        """Find out size and validators with a request for the first byte."""
        response = await self._send("GET", {"Range": "bytes=0-0"})
        try:
            status, headers = response.status, response.headers
            got = parse_content_range(headers.get("Content-Range"))
            if status in (404, 410):
                raise FileNotFoundError(errno.ENOENT, f"no such object (HTTP {status})", self._name)
            if status == 416 and got is not None and got.total == 0:
                return Validator.of(0, headers)
            if status == 200 and headers.get("Content-Length") == "0":
                return Validator.of(0, headers)
            if status == 416:
                raise SourceError(
                    f"{self._name}: the server refused to send byte 0 (HTTP 416)", transient=False
                )
            if status != 206:
                raise status_error(self._name, status, headers)
            check_encoding(self._name, headers)
            if got is None or got.first != 0 or got.last != 0:
                raise RangeNotSupportedError(
                    f"{self._name}: asked for bytes 0-0, the server sent Content-Range"
                    f" {headers.get('Content-Range')!r}"
                )
            size = got.total
            validator = Validator.of(0 if size is None else size, headers)
            # Take the byte, so that the connection can serve the first read.
            if len(await self._chunk(response, 1)) == 1:
                await self._end(response)
        finally:
            self._done(response)
        if size is None:
            size = await self._head_size(validator)
            validator = replace(validator, size=size)
        return validator

    async def _head_size(self, validator: Validator) -> int:
        """Ask with HEAD for a size that the range reply did not tell."""
        response = await self._send("HEAD", validator.conditions())
        try:
            length = response.headers.get("Content-Length", "")
            if response.status != 200 or not length.isdigit():
                raise SourceError(
                    f"{self._name}: the server does not tell the size of the object",
                    transient=False,
                )
            check_encoding(self._name, response.headers)
            return int(length)
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
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
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
            response = await session.request(
                method,
                _encoded(url),
                headers={**self._headers_for(url), **extra},
                allow_redirects=False,
            )
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

    def _headers_for(self, url: str) -> dict[str, str]:
        """Headers for a URL: none of the private ones for an origin other than the first."""
        known = self._headers_cache
        if known is None or known[0] != url:
            headers = {
                name: value
                for name, value in self._headers.items()
                if name.lower() not in _PRIVATE_HEADERS or _origin(url) == _origin(self._url)
            }
            headers["Accept-Encoding"] = "identity"
            known = self._headers_cache = (url, headers)
        return known[1]

    def _checked(self, offset: int, length: int) -> Validator:
        if self._session is None or self._pin is None:
            if self._closed:
                raise ClosedError(f"{self!r} is closed")
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                f"{self!r} belongs to another event loop", hint="use a clone() on this one"
            )
        check_range(offset, length, self._pin.size)
        return self._pin

    def _translated(self, exc: Exception) -> Exception:
        if self._closed and not isinstance(exc, ClosedError):
            return ClosedError(f"{self!r} was closed during a request")
        if isinstance(exc, AiouffdError):
            return exc
        from ._http_session import translate

        return translate(self._name, exc)


def _make_session(options: dict[str, Any]) -> aiohttp.ClientSession:
    try:
        from ._http_session import make_session
    except ModuleNotFoundError as exc:
        raise UnsupportedError(
            f"reading over HTTP needs {exc.name}", hint="pip install aiouffd[http]"
        ) from exc
    return make_session(**options)


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
