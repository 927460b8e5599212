"""Bytes in Redis or Valkey: one string, a hash of blocks, or a key for each block.

URLs are ``redis://[user:password@]host[:port]/DB/KEY`` (``rediss://`` with TLS, ``valkey://`` is
the same) and ``redis+unix:///path/of/the/socket?db=DB&key=KEY``; the key is percent-encoded, and
may have slashes. What lies under the key:

``layout="string"``
    One string with all the bytes (at most 512 MiB: Redis has no longer ones).
``layout="hash"``
    A hash whose field ``0`` has the first ``block_size`` bytes, field ``1`` the next, and so on.
    Its fields ``size``, ``block_size`` and, if there is one, ``version`` tell the rest.
``layout="keys"``
    KEY has ``{block}`` in it: ``model:{block}`` stands for ``model:0``, ``model:1``, ... Size,
    block size and version are fields of the hash ``model:meta``.

The last block may be short. Reads that are made in one turn of the loop go out together, as one
transaction (MULTI/EXEC) that also asks for size, block size and version, so that what is delivered
is of the version that was opened.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import warnings
from functools import partial
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

from ..errors import (
    AiouffdError,
    ClosedError,
    ShortReadError,
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
    UnsupportedError,
    UsageError,
)
from ..util.extras import install_hint
from ..util.tasks import begin
from .base import BaseSource, Buffer, SourcePermissionError, check_range
from .lifecycle import Life, is_failure
from .names import identity

__all__ = ["RedisSource"]

Layout = Literal["string", "hash", "keys"]

#: What metadata say, as the server has it; None for fields that are not there.
_Meta = tuple[bytes | None, bytes | None, bytes | None]
_FIELDS = ("size", "block_size", "version")

#: Bytes of one transaction, if more is asked for at a time.
_BATCH = 4 << 20
#: Longest object, and shortest block of one that has many, in bytes: a server says what it likes.
_SIZE_MAX, _BLOCK_MIN, _SMALL = (1 << 63) - 1, 64, 1 << 16
#: Options of connections that say how to ask, and secrets; neither chooses what is read.
_CHOOSE_NOTHING = (
    "password", "max_connections", "timeout", "retry", "retry_on_timeout", "retry_on_error",
    "socket_timeout", "socket_connect_timeout", "socket_keepalive", "socket_keepalive_options",
    "socket_read_size", "socket_type", "health_check_interval", "client_name", "lib_name",
    "lib_version", "driver_info", "encoding", "encoding_errors", "protocol", "event_dispatcher",
    "ssl_keyfile", "ssl_certfile", "ssl_cert_reqs", "ssl_include_verify_flags",
    "ssl_exclude_verify_flags", "ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_check_hostname",
    "ssl_password", "ssl_min_version", "ssl_ciphers",
)  # fmt: skip
#: In what servers say to those who have no or a wrong password.
_DENIED = ("NOAUTH", "NOPERM", "WRONGPASS", "already authenticated")


class _Read:
    """A read that waits for its turn."""

    __slots__ = ("answer", "length", "offset")

    def __init__(self, offset: int, length: int, answer: asyncio.Future[Buffer]) -> None:
        self.offset = offset
        self.length = length
        self.answer = answer


class RedisSource(BaseSource):
    """A source over what lies under a key of a Redis or Valkey server (needs the extra ``redis``).

    Arguments:
        url: of the server, as redis-py takes it (``redis://host:6379/0``, ``unix://path``).
        key: see the module; for ``layout="keys"`` with ``{block}`` in it.
        layout: how the bytes lie there.
        size: in bytes, if the server has no metadata.
        block_size: in bytes, likewise.
        missing: what a block is that is not there: an ``"error"``, or ``"zeros"``.
        connections: to the server, at most.
        timeout: seconds for connecting, and for each answer.
        options: more for redis-py's connections (``ssl_ca_certs=``, ...).

    A string whose length changes, and metadata that change or vanish, raise SourceChangedError. A
    string that is overwritten by one of the same length is not noticed: use a hash with a
    ``version``.

    ``open()`` raises FileNotFoundError when there is nothing under the key, UsageError when it
    is of another type, its metadata are missing or are not what was given here, and for
    ``options`` that redis-py does not have.
    """

    def __init__(
        self,
        url: str,
        key: str | bytes,
        *,
        layout: Layout = "string",
        size: int | None = None,
        block_size: int | None = None,
        missing: Literal["error", "zeros"] = "error",
        connections: int = 4,
        timeout: float = 10.0,
        **options: Any,
    ) -> None:
        if layout not in ("string", "hash", "keys"):
            raise UsageError(f"layout is 'string', 'hash' or 'keys', not {layout!r}")
        if missing not in ("error", "zeros"):
            raise UsageError(f"missing is 'error' or 'zeros', not {missing!r}")
        if connections < 1 or timeout <= 0:
            raise UsageError("connections is at least 1, and timeout positive")
        if (size is not None and size < 0) or (block_size is not None and block_size < 1):
            raise UsageError("size and block_size are numbers of bytes")
        self._key = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
        if layout == "keys" and b"{block}" not in self._key:
            raise UsageError(
                "the key of layout='keys' has {block} where the block's number goes",
                hint="'model:{block}' for model:0, model:1, ...",
            )
        self._module = _import_redis()
        self._url = url
        self._layout: Layout = layout
        self._given = (size, block_size)
        self._settings: dict[str, Any] = {
            "layout": layout,
            "size": size,
            "block_size": block_size,
            "missing": missing,
            "connections": connections,
            "timeout": timeout,
            **options,
        }
        self._zeros = missing == "zeros"
        self._connections = connections
        self._timeout = timeout
        self._options = options
        self._meta = self._key if layout == "hash" else self._key.replace(b"{block}", b"meta")
        self._size: int | None = None
        self._block_size = block_size or 0
        #: As found when it was opened.
        self._pin: _Meta | None = None
        self._client: Any = None
        self._waiting: list[_Read] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._life = Life(f"<RedisSource {self._name}>")

    @classmethod
    def from_url(cls, url: str, **options: Any) -> RedisSource:
        """The source for a URL, see the module; ``options`` are those of the class."""
        parts = urlsplit(url)
        scheme = parts.scheme.replace("valkey", "redis")
        query = parse_qs(parts.query)
        unknown = query.keys() - ({"db", "key"} if scheme == "redis+unix" else ())
        if unknown:
            raise UsageError(
                f"a {parts.scheme}:// URL has no parameter {', '.join(sorted(unknown))}",
                hint="give settings of the connection as keywords; a ? in a key is written %3F",
            )
        if scheme == "redis+unix":
            keys = query.get("key", [])
            if parts.netloc or not parts.path or len(keys) != 1:
                raise UsageError(
                    "a Redis URL for a Unix socket has its path and a key",
                    hint="write redis+unix:///path/of/the/socket?db=0&key=name",
                )
            database = query.get("db", ["0"])[0]
            server, key = f"unix://{parts.path}?db={quote(database)}", keys[0]
        else:
            database, _, key = parts.path.removeprefix("/").partition("/")
            server, key = f"{scheme}://{parts.netloc}/{database}", unquote(key)
            if scheme not in ("redis", "rediss") or not parts.hostname or not key:
                raise UsageError(
                    "a Redis URL has a server, a number of a database and a key",
                    hint="write redis://host:6379/0/key",
                )
        if not database.isdecimal():
            raise UsageError(f"{database!r} is no number of a database")
        return cls(server, key, **options)

    @property
    def _name(self) -> str:
        parts = urlsplit(self._url)
        host = parts.netloc.rpartition("@")[2] or parts.path
        return f"{parts.scheme}://{host} {self._key.decode('utf-8', 'backslashreplace')}"

    def __repr__(self) -> str:
        return f"<RedisSource {self._name}>"

    def __del__(self) -> None:
        if getattr(self, "_client", None) is not None and not self._life.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    @property
    def cache_key(self) -> str | None:
        """What names these bytes for a disk cache: server, user, database, key, layout, and what
        connections are told beside that. None if that cannot be written down."""
        parts = urlsplit(self._url)
        query = parse_qs(parts.query)
        database = query.pop("db", [parts.path.strip("/") if parts.netloc else ""])[0]
        user, _, host = parts.netloc.rpartition("@")
        name = user.partition(":")[0] or query.pop("username", [""])[0]
        place = (f"{name}@" if name else "") + (host or parts.path)
        key = quote(self._key, safe="")
        # Zeros that stand for what is missing are bytes of these settings only.
        zeros = "#zeros" if self._zeros else ""
        step = self._given[1] if self._layout != "string" else None
        return identity(
            f"{parts.scheme}://{place}/{database or 0}/{key}#{self._layout}{zeros}",
            {**query, **self._options, "block_size": step},
            _CHOOSE_NOTHING,
        )

    @property
    def size(self) -> int:
        """Length in bytes. Raises UsageError before ``open()``."""
        if self._size is None:
            raise UsageError(f"the size of {self!r} is not known yet", hint="await open() first")
        return self._size

    # ------------------------------------------------------------ open and close

    async def open(self) -> None:
        """Connect, and ask for size, block size and version. Shared by all who call it at a
        time."""
        await self._life.open(self._open, self._let_go)

    async def _open(self) -> None:
        asyncio_redis = importlib.import_module("redis.asyncio")
        settings = {
            "max_connections": self._connections,
            "timeout": None,
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            **self._options,
            "decode_responses": False,
        }
        try:
            pool = asyncio_redis.BlockingConnectionPool.from_url(self._url, **settings)
            pool.connection_class = _all_or_nothing(pool.connection_class)
            # Retrying is the failure policy's.
            self._client = client = asyncio_redis.Redis(connection_pool=pool)
            size, block_size, pin = await self._describe(client)
            if self._size is not None and (size, pin) != (self._size, self._pin):
                raise self._changed()
        except BaseException as error:
            await self._let_go()
            if not is_failure(error) or isinstance(error, FileNotFoundError):
                raise
            if isinstance(error, TypeError) and self._options:
                # Said by the connection's class, which is made no sooner.
                raise UsageError(f"redis-py: {error}") from error
            raise self._translated(error) from error
        self._size, self._block_size, self._pin = size, block_size, pin
        self.version = _text(pin[2])
        self._loop = asyncio.get_running_loop()

    async def _describe(self, client: Any) -> tuple[int, int, _Meta]:
        if self._layout == "string":
            async with client.pipeline(transaction=True) as pipe:
                pipe.exists(self._key)
                pipe.strlen(self._key)
                exists, length = await pipe.execute()
            if not exists:
                raise FileNotFoundError(errno.ENOENT, "there is no such key", self._name)
            if self._given[0] not in (None, length):
                raise UsageError(f"{self._name} has {length} bytes, not {self._given[0]}")
            return length, 0, (None, None, None)
        found = await client.hmget(self._meta, *_FIELDS)
        if not any(found) and None in self._given:
            if not await client.exists(self._meta):
                raise FileNotFoundError(errno.ENOENT, "there is no such key", self._name)
            raise UsageError(
                f"{self._name} does not tell its size and block size",
                hint="pass size= and block_size=, or set these fields",
            )
        numbers: list[int] = []
        for name, field, given in zip(_FIELDS, found, self._given, strict=False):
            try:
                number = given if field is None else int(field)
            except ValueError as error:
                raise UsageError(f"{name} of {self._name} is not a number") from error
            if number is None:
                raise UsageError(f"{self._name} does not tell its {name}", hint=f"pass {name}=")
            if given not in (None, number):
                raise UsageError(f"{name} of {self._name} is {number}, not {given}")
            numbers.append(number)
        size, step = numbers
        tiny = step < _BLOCK_MIN and size > _SMALL
        if not 0 <= size <= _SIZE_MAX or not 0 < step <= _SIZE_MAX or tiny:
            raise UsageError(
                f"{self._name} cannot have {size} bytes in blocks of {step}",
                hint=f"cut it into blocks of at least {_BLOCK_MIN} bytes" if tiny else None,
            )
        return numbers[0], numbers[1], tuple(found)

    async def aclose(self) -> None:
        """Disconnect. Reads in flight raise ClosedError. Idempotent, and shared by all who call
        it at a time."""
        await self._life.close(self._close)

    async def _close(self) -> None:
        try:
            waiting, self._waiting = self._waiting, []
            self._fail(waiting, ClosedError(f"{self!r} is closed"))
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        pool = client.connection_pool
        # Of redis-py's own, for what is left if we are cancelled here: a socket can be closed
        # without waiting.
        kept = ("_available_connections", "_in_use_connections")
        connections = [each for name in kept for each in getattr(pool, name, ())]
        try:
            await _disconnect(client, pool)
        finally:
            for connection in connections:
                close = getattr(connection, "_close", None)
                if close is not None:
                    close()

    def clone(self) -> RedisSource:
        """Another source for the same key, pinned to this version."""
        other = RedisSource(self._url, self._key, **self._settings)
        other._size, other.version, other._pin = self._size, self.version, self._pin
        return other

    # ------------------------------------------------------------------- reading

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        self._life.check()
        if self._client is None or not self._life.opened:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            raise UsageError(
                f"{self!r} belongs to another event loop", hint="use a clone() on this one"
            )
        check_range(offset, length, self.size)
        if not length:
            return b""
        if not self._waiting:
            # After those who are ready to run with us have asked too.
            loop.call_soon(self._send)
        read = _Read(offset, length, loop.create_future())
        self._waiting.append(read)
        return await read.answer

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        assert self._loop is not None
        while waiting and not self._life.closed:
            batch: list[_Read] = []
            total = 0
            while waiting and (not batch or total + waiting[0].length <= _BATCH):
                total += waiting[0].length
                batch.append(waiting.pop(0))
            closed = ClosedError(f"{self!r} is closed")
            task = begin(partial(self._bring, batch), partial(self._fail, batch, closed))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._fail(waiting, ClosedError(f"{self!r} is closed"))

    async def _bring(self, batch: list[_Read]) -> None:
        try:
            bring = self._bring_string if self._layout == "string" else self._bring_blocks
            batch = [read for read in batch if not read.answer.done()]
            if batch:
                await bring(batch)
        except BaseException as error:
            if is_failure(error):
                failure = self._translated(error)
                if failure is not error:
                    failure.__cause__ = error
                self._fail(batch, failure)
                return
            self._fail(batch, ClosedError(f"{self!r} is closed"))
            raise

    @staticmethod
    def _fail(reads: list[_Read], error: BaseException) -> None:
        for read in reads:
            if not read.answer.done():
                read.answer.set_exception(error)

    async def _bring_string(self, batch: list[_Read]) -> None:
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.strlen(self._key)
            for read in batch:
                pipe.getrange(self._key, read.offset, read.offset + read.length - 1)
            length, *answers = await pipe.execute()
        if length != self._size:
            raise self._changed()
        for read, data in zip(batch, answers, strict=True):
            self._answer(read, data)

    async def _bring_blocks(self, batch: list[_Read]) -> None:
        step = self._block_size
        blocks = sorted(
            {
                block
                for read in batch
                for block in range(read.offset // step, (read.offset + read.length - 1) // step + 1)
            }
        )
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.hmget(self._meta, *_FIELDS)
            if self._layout == "hash":
                pipe.hmget(self._key, [str(block) for block in blocks])
            else:
                pipe.mget([self._key.replace(b"{block}", b"%d" % block) for block in blocks])
            meta, values = await pipe.execute()
        if tuple(meta) != self._pin:
            raise self._changed()
        found = dict(zip(blocks, values, strict=True))
        for read in batch:
            try:
                data = self._gather(read, found)
            except SourceError as error:
                self._fail([read], error)
            else:
                self._answer(read, data)

    def _gather(self, read: _Read, found: dict[int, bytes | None]) -> Buffer:
        step, end = self._block_size, read.offset + read.length
        parts: list[Any] = []
        at = read.offset
        while at < end:
            block, start = divmod(at, step)
            whole = min(step, self.size - block * step)
            stop = min(whole, end - block * step)
            data = found[block]
            if data is None:
                if not self._zeros:
                    raise SourceError(
                        f"{self._name}: block {block} is missing",
                        transient=False,
                        hint="missing='zeros' takes it for zeros",
                    )
                data = bytes(whole)
            if len(data) != whole:
                raise ShortReadError(
                    f"{self._name}: block {block} has {len(data)} bytes instead of {whole}"
                )
            parts.append(memoryview(data)[start:stop])
            at = block * step + stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _answer(self, read: _Read, data: Buffer) -> None:
        if read.answer.done():
            return
        if len(data) != read.length:
            self._fail([read], self._changed())
        else:
            read.answer.set_result(data)

    # -------------------------------------------------------------------- errors

    def _changed(self) -> SourceChangedError:
        return SourceChangedError(f"{self._name} has changed since it was opened")

    def _translated(self, error: BaseException) -> AiouffdError:
        if isinstance(error, AiouffdError):
            return error
        if self._life.closed:
            return ClosedError(f"{self!r} was closed during a request")
        kinds = self._module.exceptions
        name = self._name
        text = str(error)
        # The connection's setting-up wraps what the server said to it.
        denied = kinds.AuthenticationError | kinds.NoPermissionError
        if (
            isinstance(error, denied)
            or isinstance(error.__cause__, denied)
            or (any(word in text for word in _DENIED))
        ):
            return SourcePermissionError(
                f"{name}: access denied", transient=False, errno=errno.EACCES
            )
        if isinstance(error, kinds.TimeoutError | TimeoutError):
            return SourceTimeoutError(f"{name}: no answer within {self._timeout} s")
        if isinstance(error, kinds.ConnectionError | OSError):
            return SourceError(f"{name}: the connection failed", errno=errno.ECONNRESET)
        if isinstance(error, kinds.ResponseError | kinds.ExecAbortError):
            if "WRONGTYPE" in text:
                return UsageError(f"{name} is not a {self._layout}", hint="see layout=")
            again = text.startswith(("LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN"))
            return SourceError(f"{name}: {text[:200]}", transient=again)
        return SourceError(f"{name}: {type(error).__name__}", transient=False)


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "replace")


async def _disconnect(client: Any, pool: Any) -> None:
    await client.aclose()
    await pool.disconnect()


def _all_or_nothing(kind: Any) -> Any:
    """A class of connections that are set up, or closed.

    redis-py (8.1) leaves one open whose setting-up ended in anything but an error of its own, and
    uses it later without AUTH and SELECT: another database's bytes.
    """

    class Connection(kind):  # type: ignore[misc]
        async def connect(self, *arguments: Any, **options: Any) -> None:
            try:
                await super().connect(*arguments, **options)
            except BaseException:
                await self.disconnect(nowait=True)
                raise

    return Connection


def _import_redis() -> Any:
    try:
        return importlib.import_module("redis")
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "reading from Redis needs redis", hint=install_hint("redis")
        ) from error
