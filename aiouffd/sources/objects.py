"""Bytes of an object in S3, Google Cloud Storage, Azure and the like, through obstore.

Every request names the version that was opened, by ETag or version id, and every reply is
checked. What obstore received is handed on as it is, in obstore's own memory.

There is no ``stream``: each chunk of one costs two switches of threads, and a copy of the whole
into a huge page, which is then moved to where it belongs, is twice as fast.
"""

from __future__ import annotations

import asyncio
import errno
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
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
from ._objects_threads import answer, check_process
from .base import BaseSource, Buffer, check_length, check_range
from .coalesce import Coalescer

__all__ = ["ObjectSource"]


@dataclass(frozen=True)
class _Pin:
    """What names the version of an object, and tells it from others."""

    size: int
    etag: str | None
    modified: datetime | None
    #: That was asked for.
    version_id: str | None
    #: That the store says the object is, asked for or not.
    found_id: str | None = None

    @classmethod
    def of(cls, meta: Mapping[str, Any], version_id: str | None) -> _Pin:
        modified = meta["last_modified"]
        # The first second of 1970 is what obstore says for a reply that has no date.
        modified = modified if modified.timestamp() else None
        return cls(meta["size"], meta["e_tag"], modified, version_id, _known_id(meta["version"]))

    @property
    def strong(self) -> bool:
        return self.etag is not None and not self.etag.startswith("W/")

    def conditions(self) -> dict[str, Any]:
        """Options that let a request succeed for this version only."""
        options: dict[str, Any] = {}
        if self.version_id is not None:
            options["version"] = self.version_id
        if self.strong:
            options["if_match"] = self.etag
        elif self.modified is not None:
            options["if_unmodified_since"] = self.modified
        return options

    def differs(self, meta: Mapping[str, Any]) -> bool:
        """Whether a reply, to which the server added ``meta``, is of another version."""
        if meta["size"] != self.size:
            return True
        if self.version_id is not None and meta["version"] not in (None, self.version_id):
            return True
        if None not in (ids := {self.found_id, _known_id(meta["version"])}) and len(ids) > 1:
            return True
        if self.etag is not None and meta["e_tag"] is not None:
            if meta["e_tag"] != self.etag:
                return True
            if self.strong:
                return False
        other = _Pin.of(meta, None).modified
        return None not in (self.modified, other) and self.modified != other

    @property
    def lasting_id(self) -> str | None:
        """The version id, if it can never be that of other bytes."""
        return _known_id(self.version_id) or self.found_id

    @property
    def weak(self) -> bool:
        """Whether bytes may change and all this stay the same. Dates tell whole seconds, and the
        clocks are two machines'."""
        if self.lasting_id is not None or self.strong:
            return False
        return self.modified is None or time.time() - self.modified.timestamp() < 60

    @property
    def version(self) -> str | None:
        """For `Source.version`: all that tells the object from others under its name. None if
        the store names no version at all."""
        parts = [self.version_id or self.found_id, self.etag]
        if self.lasting_id is None and not self.strong and self.modified is not None:
            parts = [parts[0], self.etag or str(self.size), str(self.modified)]
        return " ".join(filter(None, parts)) or None


def _known_id(version: str | None) -> str | None:
    """A version id; None for ``null``, which S3 gives to all that was written while the bucket
    kept no versions, and which PUT overwrites (docs.aws.amazon.com, "Adding objects to
    versioning-suspended buckets")."""
    return None if version == "null" else version


class ObjectSource(BaseSource):
    """A source over one object of a store, through obstore (``pip install aiouffd[objects]``).

    Arguments:
        store: one of obstore's stores. It may be shared by any number of sources and loops.
        path: of the object in the store.
        version_id: the version to read, where the store keeps several (S3's version id, Google's
            generation, Azure's version). By default the present one.
        coalesce: reads of one turn of the loop that lie at most so many bytes apart are made
            as one request of up to 256 KiB; 0 joins those that touch, None joins none.
        name: what messages call the object.

    `from_url` makes the store, too.

    The version is pinned by the ETag (``If-Match``), and checked in each reply. Where there is
    only a weak one or none, ``If-Unmodified-Since`` and the date stand in.

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
    ) -> None:
        self._obstore = _import_obstore()
        self._store = store
        self._path = path
        self._version_id = version_id
        self._coalesce = coalesce
        self._name = name or path
        self._coalescer = None if coalesce is None else Coalescer(self._get, gap=coalesce)
        self._make_key: Callable[[], str | None] = lambda: None
        self._pin: _Pin | None = None
        self._conditions: dict[str, Any] = {}
        self._active: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

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
            coalesce: see the class.

        Raises UsageError for a URL without object and for unknown settings, UnsupportedError
        when obstore is missing. Nothing is asked of the server.
        """
        _import_obstore()
        from ._objects_url import Settings, cache_key, environment, locate, make_store

        location = locate(url)
        if version_id is not None and location.version_id not in (None, version_id):
            raise UsageError(f"{location.name}: version_id is not the version in the URL")
        settings = Settings(config, client_options, retry_config, credential_provider)
        store = make_store(location, settings)
        source = cls(
            store,
            location.path,
            version_id=version_id or location.version_id,
            coalesce=coalesce,
            name=location.name,
        )
        # Worked out when somebody asks: it takes a while.
        source._make_key = lru_cache(1)(
            partial(cache_key, location, store, settings, environment(location))
        )
        return source

    def __repr__(self) -> str:
        return f"<ObjectSource {self._name}>"

    def __del__(self) -> None:
        if getattr(self, "_loop", None) is not None and not self._closed:
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
        """Find size, version and range support, with one request (two for an empty object).

        A clone of an opened source knows all this and makes no request; its first read finds out
        whether the object has changed.

        Raises FileNotFoundError, RangeNotSupportedError, UnsupportedError after a fork, UsageError
        for a path that obstore does not take, and otherwise what the class describes. May
        be called again after a failure.
        """
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if self._loop is not None:
            return
        check_process()
        if self._pin is None:
            self._pin = await self._probe()
        self._conditions = self._pin.conditions()
        self.version = self._pin.version
        self._loop = asyncio.get_running_loop()

    async def aclose(self) -> None:
        """End the requests in flight, whose reads raise ClosedError. Idempotent."""
        self._closed = True
        for future in list(self._active):
            future.cancel()

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        self._checked(offset, length)
        if not length:
            return b""
        if self._coalescer is None:
            return await self._get(offset, length)
        return await self._coalescer.read(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` into ``buffer``, once all have arrived."""
        buffer[:] = await self.read(offset, len(buffer))

    def clone(self) -> ObjectSource:
        """Return an unopened source over the same object, pinned to this version.

        It shares the store, which belongs to no loop.
        """
        other = ObjectSource(
            self._store,
            self._path,
            version_id=self._version_id,
            coalesce=self._coalesce,
            name=self._name,
        )
        other._make_key = self._make_key
        other._pin = self._pin
        other.version = self.version
        return other

    async def _get(self, offset: int, length: int) -> memoryview:
        """One request, for the whole of a range."""
        reply = await self._ask(offset, length)
        return check_length(await self._answer(reply.bytes_async()), length, offset=offset)

    async def _ask(self, offset: int, length: int) -> Any:
        """Ask for a range; return a reply of the right version, its body not yet received."""
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        pin = self._pin
        assert pin is not None
        options = {**self._conditions, "range": (offset, offset + length)}
        reply = await self._answer(self._request(options))
        if pin.differs(reply.meta):
            raise SourceChangedError(
                f"{self._name} has changed: the server sent another version than was asked for"
            )
        if reply.range != (offset, offset + length):
            raise ShortReadError(
                f"{self._name}: asked for bytes {offset}-{offset + length}, the server sent"
                f" {reply.range[0]}-{reply.range[1]}"
            )
        return reply

    async def _probe(self) -> _Pin:
        """Ask for the first byte: unlike HEAD this shows that ranges work, too."""
        wanted: dict[str, Any] = {}
        if self._version_id is not None:
            wanted["version"] = self._version_id
        try:
            try:
                reply = await self._answer(self._request({**wanted, "range": (0, 1)}), raw=True)
                await self._answer(reply.bytes_async())
            except Exception as first:
                # An empty object has no first byte, which each store says in its own words.
                if not _may_be_empty(first):
                    raise
                reply = await self._answer(self._request({**wanted, "head": True}), raw=True)
                if reply.meta["size"]:
                    raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object", self._name) from None
        except Exception as exc:
            error = self._translated(exc)
            raise error from error.__cause__
        return _Pin.of(reply.meta, self._version_id)

    def _request(self, options: dict[str, Any]) -> Any:
        return self._obstore.get_async(self._store, self._path, options=options)

    async def _answer(self, request: Any, *, raw: bool = False) -> Any:
        """What obstore answers; its exceptions translated, unless ``raw``."""
        try:
            return await answer(request, self._active)
        except asyncio.CancelledError:
            # aclose() cancels what we wait for, but not our task.
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise ClosedError(f"{self!r} was closed during a request") from None
            raise
        except Exception as exc:
            if raw:
                raise
            error = self._translated(exc)
            raise error from error.__cause__

    def _translated(self, exc: Exception) -> Exception:
        from ._objects_errors import translate

        return translate(self._name, exc)

    def _checked(self, offset: int, length: int) -> None:
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if self._loop is None or self._pin is None:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                f"{self!r} belongs to another event loop", hint="use a clone() on this one"
            )
        check_range(offset, length, self._pin.size)


def _may_be_empty(exc: Exception) -> bool:
    if isinstance(exc, AiouffdError | OSError):
        return False
    from ._objects_errors import status_of

    return status_of(exc) in (None, 416)


def _import_obstore() -> Any:
    try:
        import obstore
    except ModuleNotFoundError as exc:
        raise UnsupportedError(
            f"reading from object stores needs {exc.name}", hint="pip install aiouffd[objects]"
        ) from exc
    return obstore
