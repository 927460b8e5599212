"""Bytes of an object in S3, Google Cloud Storage, Azure and the like, through obstore.

Every request names the version that was opened, by ETag or version id, and every reply is
checked. A server may send less than was asked for, or a small object whole: what came is used. It
is handed on as it is, in obstore's own memory.

There is no ``stream``: each chunk of one costs two switches of threads, and a copy of the whole
into a huge page, which is then moved to where it belongs, is twice as fast.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from ..errors import (
    AiouffdError,
    ClosedError,
    ShortReadError,
    SourceChangedError,
    UnsupportedError,
    UsageError,
)
from ..util.extras import install_hint
from ..util.once import cancelled_from_outside
from ._http_reply import WHOLE, asked_range, check_encoding
from ._objects_pin import Pin
from ._objects_threads import answer, check_process
from ._versions import Unversioned, check_version, check_word
from .base import BaseSource, Buffer, check_length, check_range
from .coalesce import Coalescer
from .lifecycle import Life

__all__ = ["ObjectSource"]

log = logging.getLogger("aiouffd")

#: Bytes from which on it is believed that a server sends no more at a time, after two replies of
#: just that length.
_LEAST_LIMIT = 4096


class ObjectSource(BaseSource):
    """A source over one object of a store, through obstore (needs the extra ``objects``).

    Arguments:
        store: one of obstore's stores. It may be shared by any number of sources and loops.
        path: of the object in the store.
        version_id: the version to read, where the store keeps several (S3's version id, Google's
            generation, Azure's version). By default the present one.
        coalesce: reads of one turn of the loop that lie at most so many bytes apart are made
            as one request of up to 256 KiB; 0 joins those that touch, None joins none.
        name: what messages call the object.
        unversioned: what to do when the store names neither version, ETag nor date, so that a
            change would go unnoticed: "warn" (UnversionedSourceWarning), "accept" or "refuse".
        ignore_dates: do not look at the date where there is a strong ETag. For copies that agree
            on that and the bytes, but not on the date.

    `from_url` makes the store, too.

    The version is pinned by ETag and date, of which all that the server tells must stay as it was,
    and which each request repeats (``If-Match``, or ``If-Unmodified-Since`` where there is no
    strong ETag). Where that is answered with 412 although the ETag is the same, as some gateways
    do, it is no longer sent, and the replies alone are compared.

    An object of at most 64 KiB that the server sends whole, or cannot send in parts, is kept from
    when it was opened. Its later fate is not looked at.

    Errors, besides those of `Source`: SourcePermissionError (401, 403); SourceError, not
    transient, for an object that is gone and for replies that make no sense; transient for 408,
    429, 5xx and connections that fail or break; SourceTimeoutError, transient. A server's
    Retry-After is not known: obstore does not tell. Messages have no queries of URLs.

    Belongs to one loop. The threads that receive are obstore's own; the loop's executor is
    not used. A cancelled read ends its request. A process that has used obstore must not fork
    and go on with it in the child: ``open()`` raises UnsupportedError there.
    """

    def __init__(
        self,
        store: Any,
        path: str,
        *,
        version_id: str | None = None,
        coalesce: int | None = 0,
        name: str | None = None,
        unversioned: Unversioned = "warn",
        ignore_dates: bool = False,
    ) -> None:
        self._obstore = _import_obstore()
        self._store = store
        self._path = path
        self._version_id = version_id
        self._coalesce = coalesce
        self._name = name or path
        self._coalescer = None if coalesce is None else Coalescer(self._get, gap=coalesce)
        self._make_key: Callable[[], str | None] = lambda: None
        # For a store of our own, which is given up when the source is closed.
        self._make_store: Callable[[], Any] | None = None
        self._unversioned = check_word(unversioned)
        self._ignore_dates = ignore_dates
        self._pin: Pin | None = None
        # The bytes, if they came when it was opened.
        self._whole: memoryview | None = None
        self._conditions: dict[str, Any] | None = None
        # The most that the server sends at a time, and the last reply that was shorter than asked.
        self._most: int | None = None
        self._shorter = 0
        self._active: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._life = Life(repr(self))

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        version_id: str | None = None,
        config: Mapping[str, Any] | None = None,
        client_options: Mapping[str, Any] | None = None,
        retry_config: Mapping[str, Any] | None = None,
        credential_provider: Any = None,
        coalesce: int | None = 0,
        unversioned: Unversioned = "warn",
        ignore_dates: bool = False,
    ) -> ObjectSource:
        """The source for ``s3://bucket/key``, ``gs://bucket/key`` or ``az://container/key``.

        Also ``obstore+http(s)://host/path`` and ``obstore+file:///path``. Keys are not
        percent-decoded. A version may be at the end of the URL: ``?versionId=`` for S3,
        ``?generation=`` for Google, ``?versionid=`` for Azure.

        Arguments:
            version_id: see the class.
            config: settings of obstore's `S3Config`, `GCSConfig` or `AzureConfig`: region,
                endpoint, keys, ``skip_signature`` for public objects. What is not in it comes
                from the environment: AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL,
                AWS_ALLOW_HTTP, GOOGLE_..., AZURE_..., or from the machine's own role.
            client_options: obstore's `ClientConfig`. By default a request ends after 10 s without
                a connection, 30 s without a byte, or 10 minutes.
            retry_config: obstore's `RetryConfig`. By default obstore does not retry, because the
                failure policy of a buffer does, and errors should come to it at once.
            credential_provider: of obstore: called when credentials are needed. A plain function
                is called on obstore's threads, and a coroutine function on any loop that reads.
            coalesce, unversioned, ignore_dates: see the class.

        Proxies are obstore's matter: ``proxy_url`` in client_options, or those that the
        environment names (http_proxy, https_proxy, no_proxy) when the process first uses it.

        Raises UsageError for a URL without object and for unknown settings, UnsupportedError
        when obstore is missing. Nothing is asked of the server.
        """
        _import_obstore()
        from ._objects_url import Settings, cache_key, environment, locate, make_store

        location = locate(url)
        if version_id is not None and location.version_id not in (None, version_id):
            raise UsageError(f"{location.name}: version_id is not the version in the URL")
        settings = Settings(config, client_options, retry_config, credential_provider)
        make = partial(make_store, location, settings)
        store = make()
        source = cls(
            store,
            location.path,
            version_id=version_id or location.version_id,
            coalesce=coalesce,
            name=location.name,
            unversioned=unversioned,
            ignore_dates=ignore_dates,
        )
        source._make_store = make
        # Worked out when somebody asks: it takes a while. Without the store, which ends with us.
        own = dict(getattr(store, "config", None) or {})
        source._make_key = lru_cache(1)(
            partial(cache_key, location, own, settings, environment(location))
        )
        return source

    def __repr__(self) -> str:
        return f"<ObjectSource {self._name}>"

    def __del__(self) -> None:
        if getattr(self, "_loop", None) is not None and not self._life.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    @property
    def url(self) -> str | None:
        """The URL that it was made from, without a query; None for a store that was given."""
        return self._name if "://" in self._name else None

    @property
    def cache_key(self) -> str | None:
        """What names the object for a disk cache: its URL, endpoint, region, account and headers;
        None for a store that was given, and for an account that only a function knows."""
        return self._make_key()

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
        """Find size, version and range support, with one request; with two if the first two bytes
        of the object cannot be had.

        A clone of an opened source knows all this and makes no request; its first read finds out
        whether the object has changed.

        Raises FileNotFoundError, RangeNotSupportedError, UnsupportedError after a fork, UsageError
        for a path that obstore does not take, and otherwise what the class describes. May
        be called again after a failure, and by several tasks at a time; when all of them are
        cancelled it is not open.
        """
        await self._life.open(self._open, self._not_open)

    async def _open(self) -> None:
        check_process()
        if self._pin is None:
            pin, whole = await self._probe()
            if whole is None:
                check_version(self._name, pin.version, self._unversioned)
            self._pin = pin.without_date() if self._ignore_dates else pin
            self._whole = whole
        if self._conditions is None:
            self._conditions = self._pin.conditions()
        self.version = self._pin.version
        self._loop = asyncio.get_running_loop()

    async def _not_open(self) -> None:
        self._loop = None

    async def aclose(self) -> None:
        """End the requests in flight, whose reads raise ClosedError, as does ``open()``.

        Happens once, and to its end although who asks for it is cancelled; later calls return when
        it is over.
        """
        await self._life.close(self._close)

    async def _close(self) -> None:
        for future in list(self._active):
            future.cancel()
        if self._make_store is not None:
            # obstore closes idle connections when nobody has their store any more.
            self._store = None
        if self._coalescer is not None:
            await self._coalescer.aclose()

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        self._checked(offset, length)
        if self._whole is not None:
            return self._whole[offset : offset + length]
        if not length:
            return b""
        if self._coalescer is None:
            return await self._get(offset, length)
        try:
            return await self._coalescer.read(offset, length)
        except asyncio.CancelledError:
            # Closing ends requests that were joined, whose readers are not cancelled.
            if self._life.closed and not cancelled_from_outside():
                raise ClosedError(f"{self!r} was closed during a request") from None
            raise

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` into ``buffer``, once all have arrived."""
        buffer[:] = await self.read(offset, len(buffer))

    def clone(self) -> ObjectSource:
        """Return an unopened source over the same object, pinned to this version.

        It shares the store, which belongs to no loop.
        """
        store = self._store
        if store is None and self._make_store is not None:
            store = self._make_store()
        other = ObjectSource(
            store,
            self._path,
            version_id=self._version_id,
            coalesce=self._coalesce,
            name=self._name,
            unversioned=self._unversioned,
            ignore_dates=self._ignore_dates,
        )
        other._make_store = self._make_store
        other._make_key = self._make_key
        other._pin = self._pin
        other._whole = self._whole
        other._conditions = self._conditions
        other._most = self._most
        other.version = self.version
        return other

    async def _get(self, offset: int, length: int) -> memoryview:
        """A whole range: one request, unless the server sends it in pieces."""
        parts: list[memoryview] = []
        end = offset + length
        while offset < end:
            wanted = min(end - offset, self._most or length)
            reply = await self._ask(*asked_range(offset, wanted, self.size))
            first, last = reply.range
            data = await self._answer(reply.bytes_async())
            view = check_length(data, last - first, offset=offset)
            if last <= offset:
                raise ShortReadError(f"{self._name}: the reply ends before byte {offset}")
            parts.append(view[offset - first : end - first])
            offset = min(last, end)
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    async def _ask(self, offset: int, length: int) -> Any:
        """Ask for a range; return a reply of the right version, its body not yet received.

        It may be of less than ``length`` bytes, or of the whole object.
        """
        pin, conditions = self._pin, self._conditions
        assert pin is not None
        assert conditions is not None
        plain = pin.without_conditions()
        ranged, refused = True, False
        while True:
            if self._life.closed:
                raise ClosedError(f"{self!r} is closed")
            options = {**conditions, "range": (offset, offset + length)} if ranged else conditions
            try:
                reply = await self._answer(self._request(options), raw=True)
                break
            except Exception as exc:
                if (shorter := self._shorter_reply(exc, offset, length)) is not None:
                    length = shorter
                elif conditions != plain and _is_refused(exc):
                    # It has changed, or the server's comparison is broken: its ETag will tell.
                    conditions, refused = plain, True
                elif refused and self._broken(exc):
                    # nginx says keep-alive in such a refusal, and closes the connection.
                    refused = False
                elif ranged and (pin.size <= WHOLE or length == pin.size) and _ignores_range(exc):
                    ranged = False
                else:
                    error = self._translated(exc)
                    raise error from error.__cause__
        self._check(reply)
        difference = pin.difference(reply.meta, proved=conditions != plain)
        if difference is not None:
            raise SourceChangedError(f"{self._name} has changed: {difference}")
        if ranged and reply.range != (offset, offset + length):
            raise ShortReadError(
                f"{self._name}: asked for bytes {offset}-{offset + length}, the server sent"
                f" {reply.range[0]}-{reply.range[1]}"
            )
        if conditions is not self._conditions:
            log.info(
                "%s: the server refuses its own ETag or date in a condition; none is sent again",
                self._name,
            )
            self._conditions = conditions
        return reply

    def _shorter_reply(self, exc: Exception, offset: int, length: int) -> int | None:
        """How many bytes a server sent, which may be fewer than it was asked for (RFC 9110,
        15.3.7). obstore throws them away, so that they have to be asked for again."""
        from ._objects_errors import unexpected_range

        found = unexpected_range(exc)
        if found is None or found[0] != offset or not 0 < (some := found[1] - offset) < length:
            return None
        if some == self._shorter and some >= _LEAST_LIMIT:
            self._most = some
        self._shorter = some
        return some

    def _check(self, reply: Any) -> None:
        """Raise SourceError for a body whose offsets are not those of the object. Stores keep what
        they were given with a Content-Encoding as it is; web servers compress when asked."""
        if type(self._store).__name__ == "HTTPStore":
            check_encoding(self._name, reply.attributes)

    async def _probe(self) -> tuple[Pin, memoryview | None]:
        """Ask for the first two bytes: unlike HEAD this shows that ranges work, too, and unlike
        a single one it is a range that servers get right. All bytes, if they come whole."""
        wanted: dict[str, Any] = {}
        if self._version_id is not None:
            wanted["version"] = self._version_id
        try:
            try:
                reply = await self._first_bytes(wanted)
                data = await self._answer(reply.bytes_async())
            except Exception as first:
                # An empty object has no first byte, which each store says in its own words.
                if not self._may_be_small(first):
                    raise
                try:
                    reply = await self._answer(self._request(wanted), raw=True)
                except Exception as second:
                    raise (first if self._is_final(second) else second) from None
                if reply.meta["size"] > WHOLE:
                    raise
                self._check(reply)
                data = await self._answer(reply.bytes_async())
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object", self._name) from None
        except Exception as exc:
            error = self._translated(exc)
            raise error from error.__cause__
        begin, end = reply.range
        view = check_length(data, end - begin)
        return Pin.of(reply.meta, self._version_id), view if end == reply.meta["size"] else None

    async def _first_bytes(self, wanted: dict[str, Any]) -> Any:
        length = 2
        while True:
            try:
                return await self._answer(self._request({**wanted, "range": (0, length)}), raw=True)
            except Exception as exc:
                shorter = self._shorter_reply(exc, 0, length)
                if shorter is None:
                    raise
                length = shorter

    def _broken(self, exc: Exception) -> bool:
        """Whether a connection failed or broke."""
        return getattr(self._translated(exc), "errno", None) == errno.ECONNRESET

    def _is_final(self, exc: Exception) -> bool:
        return not getattr(self._translated(exc), "transient", True)

    def _may_be_small(self, exc: Exception) -> bool:
        """Whether a request for the first bytes failed in a way that another one, for all of them,
        may not."""
        from ._objects_errors import status_of

        if isinstance(exc, AiouffdError | OSError):
            return False
        return status_of(exc) == 416 or (status_of(exc) is None and self._is_final(exc))

    def _request(self, options: dict[str, Any]) -> Any:
        return self._obstore.get_async(self._store, self._path, options=options)

    async def _answer(self, request: Any, *, raw: bool = False) -> Any:
        """What obstore answers; its exceptions translated, unless ``raw``."""
        try:
            return await answer(request, self._active)
        except asyncio.CancelledError:
            # aclose() cancels what we wait for, but not our task.
            if self._life.closed and not cancelled_from_outside():
                raise ClosedError(f"{self!r} was closed during a request") from None
            raise
        except Exception as exc:
            if raw:
                raise
            error = self._translated(exc)
            raise error from error.__cause__
        finally:
            del request  # as in `answer`

    def _translated(self, exc: Exception) -> Exception:
        from ._objects_errors import translate

        return translate(self._name, exc)

    def _checked(self, offset: int, length: int) -> None:
        if self._life.closed:
            raise ClosedError(f"{self!r} is closed")
        if self._loop is None or self._pin is None:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                f"{self!r} belongs to another event loop", hint="use a clone() on this one"
            )
        check_range(offset, length, self._pin.size)


def _is_refused(exc: Exception) -> bool:
    """Whether a condition was not met, as the server says."""
    from ._objects_errors import is_refused

    return is_refused(exc)


def _ignores_range(exc: Exception) -> bool:
    """Whether the server sent the whole object (RFC 9110, 14.2, allows that)."""
    from ._objects_errors import ignores_range

    return ignores_range(exc)


def _import_obstore() -> Any:
    try:
        import obstore
    except ModuleNotFoundError as exc:
        raise UnsupportedError(
            f"reading from object stores needs {exc.name}", hint=install_hint("objects")
        ) from exc
    return obstore
