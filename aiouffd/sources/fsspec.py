"""Bytes of a file in any file system that fsspec knows.

File systems that are asynchronous themselves run on our own loop, each source with an
instance of its own, because such an instance belongs to one loop. All others are called in
threads of this source.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import inspect
import warnings
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from ..errors import (
    AiouffdError,
    ClosedError,
    RangeNotSupportedError,
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
    UnsupportedError,
    UsageError,
)
from .base import BaseSource, Buffer, SourcePermissionError, check_length, check_range
from .coalesce import Coalescer

__all__ = ["FsspecSource"]

#: What file systems call that which changes with the contents, the most telling first.
_VERSIONS = (
    "ETag", "etag", "generation", "VersionId", "version_id", "md5Hash", "content_md5", "checksum",
    "LastModified", "last_modified", "updated", "mtime", "modified", "created",
)  # fmt: skip
#: Packages whose errors are those of a network, unless they carry a status that tells more.
_NETWORK = frozenset({"aiohttp", "botocore", "aiobotocore", "requests", "urllib3", "paramiko"})


class FsspecSource(BaseSource):
    """A source over one file of a file system of fsspec (``pip install aiouffd[fsspec]``).

    Arguments:
        fs: a file system. One that is asynchronous is not used itself: a fresh one with the same
            settings runs on the loop that opens the source.
        path: of the file in it.
        max_threads: calls at a time, of file systems that are not asynchronous.
        timeout: seconds for one call of an asynchronous file system.
        recheck: seconds for which the version counts as looked at. 0 has it looked at after each
            read (once for all that ended in the meantime), and no byte of another version gets
            through; more saves requests, and lets so much time pass until a change is seen.
        coalesce: as for object stores: bytes between two reads that are made as one; None joins
            none.
        name: what messages call the file.

    The version is what `info` says of ETag, generation, modification time or the like. If it
    says nothing of the kind, ``version`` is None and only a change of the size can be seen.

    ``open()`` raises FileNotFoundError, PermissionError, IsADirectoryError, and UsageError
    for a file whose size nobody knows. Retries are the file system's own, and the failure
    policy's of the buffer.
    """

    def __init__(
        self,
        fs: Any,
        path: str,
        *,
        max_threads: int = 4,
        timeout: float = 60.0,
        recheck: float = 0.0,
        coalesce: int | None = 0,
        name: str | None = None,
    ) -> None:
        if max_threads < 1 or timeout <= 0 or recheck < 0:
            raise UsageError("max_threads is at least 1, timeout positive, recheck not negative")
        self._make: Callable[[], Any] = lambda: fs
        if getattr(fs, "async_impl", False):
            kind, arguments = type(fs), getattr(fs, "storage_args", ())
            options = dict(getattr(fs, "storage_options", {}))
            self._make = lambda: _own(kind, arguments, options)
        self._asynchronous = bool(getattr(fs, "async_impl", False))
        self._path = path
        self._settings: dict[str, Any] = {
            "max_threads": max_threads,
            "timeout": timeout,
            "recheck": recheck,
            "coalesce": coalesce,
        }
        self._given = fs
        self._name = name or path
        self._timeout = timeout
        self._recheck = recheck
        self._fs: Any = None
        self._session: Any = None
        self._executor: ThreadPoolExecutor | None = None
        self._coalescer = None if coalesce is None else Coalescer(self._get, gap=coalesce)
        self._size: int | None = None
        self._checks = _Shared(self._check)
        self._last_check = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        max_threads: int = 4,
        timeout: float = 60.0,
        recheck: float = 0.0,
        coalesce: int | None = 0,
        **options: Any,
    ) -> FsspecSource:
        """The source for ``fsspec+PROTOCOL://...``; ``options`` are those of the file system.

        fsspec's chains (``fsspec+simplecache::s3://...``) work too, in threads. Raises UsageError
        for an unknown protocol or options that do not fit, UnsupportedError when fsspec or what
        it needs for the protocol is missing.
        """
        core = _import("fsspec.core")
        plain = url.removeprefix("fsspec+")
        try:
            fs, path = core.url_to_fs(plain, **options)
        except ImportError as error:
            raise UnsupportedError(f"fsspec cannot open {_shown(url)}: {error}") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"{_shown(url)}: {error}") from error
        return cls(
            fs,
            path,
            max_threads=max_threads,
            timeout=timeout,
            recheck=recheck,
            coalesce=coalesce,
            name=_shown(plain),
        )

    def __repr__(self) -> str:
        return f"<FsspecSource {self._name}>"

    def __del__(self) -> None:
        if getattr(self, "_fs", None) is not None and not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            if self._executor is not None:
                self._executor.shutdown(wait=False)

    @property
    def size(self) -> int:
        """Length in bytes. Raises UsageError before ``open()``."""
        if self._size is None:
            raise UsageError(f"the size of {self!r} is not known yet", hint="await open() first")
        return self._size

    @property
    def url(self) -> str | None:
        """The URL that it was made from, without a query; None for a file system that was given."""
        return self._name if "://" in self._name else None

    async def open(self) -> None:
        """Ask for size and version."""
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if self._fs is not None:
            return
        self._loop = asyncio.get_running_loop()
        if not self._asynchronous:
            self._executor = ThreadPoolExecutor(self._settings["max_threads"], "aiouffd-fsspec")
        try:
            self._fs = self._make()
            if self._asynchronous and hasattr(self._fs, "set_session"):
                self._session = await self._fs.set_session()
            size, version = await self._ask()
        except BaseException as error:
            await self._let_go()
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such file", self._name) from None
            if isinstance(error, IsADirectoryError) or not isinstance(error, Exception):
                raise
            raise self._translated(error) from error
        if self._size is not None and (size, version) != (self._size, self.version):
            await self._let_go()
            raise self._changed()
        self._size, self.version = size, version

    async def aclose(self) -> None:
        """Close it. Reads in flight finish, or raise ClosedError. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._checks.aclose()
        if self._coalescer is not None:
            await self._coalescer.aclose()
        await self._let_go()

    async def _let_go(self) -> None:
        self._fs = None
        session, self._session = self._session, None
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)
        close = getattr(session, "close", None)
        if close is not None:
            closing = close()
            if inspect.isawaitable(closing):
                await closing

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        if self._fs is None:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                f"{self!r} belongs to another event loop", hint="use a clone() on this one"
            )
        check_range(offset, length, self.size)
        if not length:
            return b""
        if self._coalescer is None:
            return await self._get(offset, length)
        return await self._coalescer.read(offset, length)

    def clone(self) -> FsspecSource:
        """Another source for the same file, pinned to this version."""
        other = FsspecSource(self._given, self._path, name=self._name, **self._settings)
        other._size, other.version = self._size, self.version
        return other

    async def _get(self, offset: int, length: int) -> memoryview:
        try:
            data = await self._call("cat_file", self._path, start=offset, end=offset + length)
        except Exception as error:
            raise self._translated(error) from error
        loop = asyncio.get_running_loop()
        if loop.time() - self._last_check >= self._recheck:
            await self._checks.run()
        if len(data) == self._size != length:
            raise RangeNotSupportedError(f"{self._name}: whoever serves it does not serve parts")
        return check_length(data, length, offset=offset)

    async def _check(self) -> None:
        """See whether it is still the version that was opened."""
        started = asyncio.get_running_loop().time()
        try:
            found = await self._ask()
        except Exception as error:
            raise self._translated(error) from error
        if found != (self._size, self.version):
            raise self._changed()
        self._last_check = started

    async def _ask(self) -> tuple[int, str | None]:
        """Size and version at present."""
        # What was listed a while ago is no answer.
        self._fs.invalidate_cache(self._path)
        info = await self._call("info", self._path)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a directory", self._name)
        size = info.get("size")
        if not isinstance(size, int):
            raise UsageError(f"the size of {self._name} cannot be found out")
        for key in _VERSIONS:
            value = info.get(key)
            if value not in (None, ""):
                text = value.isoformat() if isinstance(value, datetime) else str(value)
                # A file that took another's place may be as old.
                return size, text if "ino" not in info else f"{info['ino']}-{text}"
        return size, None

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        fs = self._fs
        if fs is None:
            raise ClosedError(f"{self!r} is closed")
        if self._asynchronous:
            async with asyncio.timeout(self._timeout):
                return await getattr(fs, f"_{method}")(*arguments, **options)
        assert self._executor is not None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: getattr(fs, method)(*arguments, **options)
        )

    def _changed(self) -> SourceChangedError:
        return SourceChangedError(f"{self._name} has changed since it was opened")

    def _translated(self, error: BaseException) -> BaseException:
        if isinstance(error, AiouffdError) or not isinstance(error, Exception):
            return error
        name = self._name
        # aiohttp tells it here, and others in a response.
        status = getattr(error, "status", None)
        if isinstance(error, PermissionError) or status in (401, 403, 407):
            return SourcePermissionError(
                f"{name}: access denied", transient=False, errno=errno.EACCES
            )
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return SourceError(f"{name} is gone", transient=False, errno=errno.ENOENT)
        if status in (412, 416):
            return self._changed()
        text = f"{name}: {type(error).__name__}"
        if isinstance(status, int):
            again = status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
            return SourceError(f"{name}: HTTP {status}", transient=again)
        if isinstance(error, TimeoutError):
            return SourceTimeoutError(f"{text}: nothing came in time")
        network = type(error).__module__.partition(".")[0] in _NETWORK
        # The error's own text may have URLs with secrets in it; it is in __cause__.
        return SourceError(text, transient=network or isinstance(error, OSError | EOFError))


class _Shared:
    """Runs a coroutine function for many who want it: who comes while it runs gets the next run,
    for what that one looks at is later than what he did before."""

    def __init__(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._function = function
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def run(self) -> None:
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._after(self._running))
            self._next.add_done_callback(_retrieve)
        await asyncio.shield(self._next)

    async def _after(self, running: asyncio.Task[None] | None) -> None:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None
        await self._function()

    async def aclose(self) -> None:
        tasks = [task for task in (self._running, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _retrieve(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()


def _own(kind: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """A file system for the running loop alone."""
    settings = {**options, "asynchronous": True, "skip_instance_cache": True}
    settings.pop("loop", None)
    return kind(*arguments, **settings)


def _shown(url: str) -> str:
    """The URL without password and query."""
    from .names import without_password

    if "::" in url:
        return url.partition("?")[0].rpartition("@")[2]
    return without_password(url).partition("?")[0]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this needs {error.name}", hint="pip install aiouffd[fsspec]"
        ) from error
