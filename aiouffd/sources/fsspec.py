"""Bytes of a file in any file system that fsspec knows.

File systems that are asynchronous themselves run on our own loop, each source with an
instance of its own, because such an instance belongs to one loop. All others are made and called
in threads of this source: many connect when they are made. And most of them are not made for
several threads at a time (an FTP connection's commands would mix), so each has one.

fsspec keeps what it made for the next one who asks. For archives, which hold their file open, that
would be the contents of an archive that was replaced since, so those are made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import inspect
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

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
from ..util.extras import install_hint
from ..util.tasks import begin
from ..util.waiting import retrieve
from .base import BaseSource, Buffer, SourcePermissionError, check_length, check_range
from .coalesce import Coalescer
from .lifecycle import Life, is_failure, run_in_thread
from .names import identity, split_chain, with_user, without_password

__all__ = ["FsspecSource"]

T = TypeVar("T")

#: What file systems call that which changes with the contents, the most telling first.
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
_VERSIONS = (
    "ETag", "etag", "generation", "VersionId", "version_id", "md5Hash", "content_md5", "checksum",
    *_TIMES,
)  # fmt: skip
#: Classes that any number of threads may use at a time, and calls at a time then.
_THREADED, _THREADS = frozenset({"LocalFileSystem", "MemoryFileSystem"}), 4
#: Seconds after which a time of whole seconds may be trusted to tell a later change.
_SETTLED = 60.0
_GONE = (404, 410)
#: Archives within archives that are looked into.
_DEPTH = 8
#: Options of file systems that say how to ask, and secrets that prove who one is; neither chooses
#: what is read.
_CHOOSE_NOTHING = frozenset((
    "skip_instance_cache", "use_listings_cache", "listings_expiry_time", "max_paths",
    "asynchronous", "loop", "batch_size", "block_size", "default_block_size", "cache_type",
    "default_cache_type", "default_fill_cache", "cache_options", "max_concurrency", "timeout",
    "connect_timeout", "read_timeout", "retries", "auto_mkdir", "cache_storage", "cache_check",
    "expiry_time", "check_files", "cache_storage_mode", "same_names", "trust_env",
    "secret", "password", "passwd", "passphrase",
))  # fmt: skip
#: Variables of the environment in which libraries below look for an endpoint or account.
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID",
    "FSSPEC_S3_ENDPOINT_URL", "STORAGE_EMULATOR_HOST", "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_CONNECTION_STRING", "HF_ENDPOINT",
)  # fmt: skip
#: A file system without a path of its own at the beginning of a chain.
_BARE = re.compile(r"[A-Za-z0-9]+::")
#: Packages whose errors are those of a network, unless they carry a status that tells more.
_NETWORK = frozenset({"aiohttp", "botocore", "aiobotocore", "requests", "urllib3", "paramiko"})


class FsspecSource(BaseSource):
    """A source over one file of a file system of fsspec (needs the extra ``fsspec``).

    Arguments:
        fs: a file system. One that is asynchronous is not used itself: a fresh one with the same
            settings runs on the loop that opens the source.
        path: of the file in it.
        max_threads: calls at a time, of file systems that are not asynchronous. None is 4 for
            local files and memory, and else 1, shared by all sources over one ``fs``. More is
            your word that it can be used by so many threads.
        timeout: seconds for one call of an asynchronous file system.
        recheck: seconds for which the version counts as looked at. 0 has it looked at after each
            read (once for all that ended in the meantime), and no byte of another version gets
            through; more saves requests, and lets so much time pass until a change is seen. (So
            nothing is kept by a disk cache then.)
        coalesce: as for object stores: bytes between two reads that are made as one; None joins
            none.
        name: what messages call the file.

    The version is what `info` says of ETag, generation, modification time or the like. If it
    says nothing of the kind, ``version`` is None and only a change of the size can be seen. That of
    a member of an archive is the archive's, and what the archive says of the member: members
    of two archives may well be equally old.

    ``open()`` raises FileNotFoundError, PermissionError, IsADirectoryError, UsageError for a file
    whose size nobody knows, and what `from_url` could not know yet. Retries are the file system's
    own, and the failure policy's of the buffer.
    """

    def __init__(
        self,
        fs: Any,
        path: str,
        *,
        max_threads: int | None = None,
        timeout: float = 60.0,
        recheck: float = 0.0,
        coalesce: int | None = 0,
        name: str | None = None,
    ) -> None:
        if (max_threads is not None and max_threads < 1) or timeout <= 0 or recheck < 0:
            raise UsageError("max_threads is at least 1, timeout positive, recheck not negative")
        #: The file system, and the path in it.
        self._make: Callable[[], tuple[Any, str]] = lambda: (fs, path)
        #: What the archive that it lies in is like just before it is opened; None for others.
        self._before: Callable[[], str | None] | None = None
        if getattr(fs, "async_impl", False):
            kind, arguments = type(fs), getattr(fs, "storage_args", ())
            options = dict(getattr(fs, "storage_options", {}))
            self._make = lambda: (_own(kind, arguments, options), path)
        self._asynchronous = bool(getattr(fs, "async_impl", False))
        self._threaded = type(fs).__name__ in _THREADED
        self._key = _key_of_given(fs, path)
        self._path = path
        self._settings: dict[str, Any] = {
            "max_threads": max_threads,
            "timeout": timeout,
            "recheck": recheck,
            "coalesce": coalesce,
        }
        self._given = fs
        self._name = name or (_shown(path) if "://" in path else path)
        self._timeout = timeout
        self._recheck = recheck
        self._fs: Any = None
        self._session: Any = None
        self._executor: ThreadPoolExecutor | None = None
        self._coalescer = None if coalesce is None else Coalescer(self._get, gap=coalesce)
        self._size: int | None = None
        self._checks = _Shared(self._check)
        self._last_check = float("-inf")
        self._turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self._weak = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._life = Life(f"<FsspecSource {self._name}>")

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        max_threads: int | None = None,
        timeout: float = 60.0,
        recheck: float = 0.0,
        coalesce: int | None = 0,
        **options: Any,
    ) -> FsspecSource:
        """The source for ``fsspec+PROTOCOL://...``; ``options`` are those of the file system.

        fsspec's chains (``fsspec+simplecache::s3://...``) work too, in threads. Raises UsageError
        for an unknown protocol, UnsupportedError when fsspec or what it needs for the protocol is
        missing. Options that do not fit are a UsageError too, of ``open()`` if the file
        system is not asynchronous: it is made there, in a thread.
        """
        core = _import("fsspec.core")
        plain = url.removeprefix("fsspec+")
        chain = split_chain(plain)
        with _explained(plain):
            names = [re.split("://|::", part)[0] for part in chain]
            kinds = [_import("fsspec").get_filesystem_class(name) for name in names]
        fs, path = None, ""
        alone = len(chain) == 1 and not _BARE.match(plain)
        if alone and kinds[0].async_impl:
            with _explained(plain):
                fs, path = core.url_to_fs(plain, **options)
        source = cls(
            fs,
            path,
            max_threads=max_threads,
            timeout=timeout,
            recheck=recheck,
            coalesce=coalesce,
            name=_shown(plain),
        )
        source._key = _key_of(plain, kinds, options)
        if fs is None:
            source._threaded = alone and kinds[0].__name__ in _THREADED
            fresh = dict(options)
            if not alone or _is_archive(kinds[0]):
                fresh.setdefault("skip_instance_cache", True)
                for name in names[1:]:
                    # Theirs; those of the first are not under its name.
                    fresh[name] = {"skip_instance_cache": True, **fresh.get(name, {})}

            def make() -> tuple[Any, str]:
                with _explained(plain):
                    found: tuple[Any, str] = core.url_to_fs(plain, **_copied(fresh))
                    return found

            source._make = make
            if _is_archive(kinds[0]):
                source._before = _archive_of(plain, chain, names, options)
        return source

    def __repr__(self) -> str:
        return f"<FsspecSource {self._name}>"

    def __del__(self) -> None:
        if getattr(self, "_fs", None) is not None and not self._life.closed:
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

    @property
    def cache_key(self) -> str | None:
        """What names the file for a disk cache; None for a path in a file system that was given."""
        return self._key

    @property
    def weak(self) -> bool:
        """Whether the file may change and its ``version`` stay: a weak ETag, a time of whole
        seconds that was just now when it was opened, and with ``recheck``."""
        return self._weak or self._recheck > 0

    async def open(self) -> None:
        """Ask for size and version. Shared by all who call it at a time."""
        await self._life.open(self._open, self._let_go)

    async def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        done = False
        try:
            before = None
            if self._asynchronous:
                self._fs, self._path = self._make()
                if hasattr(self._fs, "set_session"):
                    self._session = await self._fs.set_session()
            else:
                threads = self._settings["max_threads"] or (_THREADS if self._threaded else 1)
                executor = self._executor = ThreadPoolExecutor(threads, "aiouffd-fsspec")
                if self._before is not None:
                    before = await run_in_thread(executor, self._before)
                self._fs, self._path = await run_in_thread(executor, self._make)
                if threads == 1:
                    self._turn = _turn_of(self._fs)
            size, version = await self._ask(before)
            if self._size is not None and (size, version) != (self._size, self.version):
                raise self._changed()
            self._size, self.version = size, version
            done = True
        except BaseException as error:
            if not is_failure(error):
                raise
            error = _reason(error)
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such file", self._name) from None
            if isinstance(error, IsADirectoryError | AiouffdError):
                raise
            raise self._translated(error) from error
        finally:
            if not done:
                await self._let_go()

    async def aclose(self) -> None:
        """Close it. Reads in flight finish, or raise ClosedError. Idempotent, and shared by all
        who call it at a time."""
        await self._life.close(self._close)

    async def _close(self) -> None:
        try:
            await self._checks.aclose()
            if self._coalescer is not None:
                await self._coalescer.aclose()
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        fs, self._fs = self._fs, None
        session, self._session = self._session, None
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
        if session is None and self._asynchronous:
            session = getattr(fs, "_session", None)  # made, and cancelled before it was ours
        close = getattr(session, "close", None)
        if close is not None:
            closing = close()
            if inspect.isawaitable(closing):
                await closing

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        self._life.check()
        if self._fs is None or not self._life.opened:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                f"{self!r} belongs to another event loop", hint="use a clone() on this one"
            )
        check_range(offset, length, self.size)
        if not length:
            return b""
        try:
            if self._coalescer is None:
                return await self._get(offset, length)
            return await self._coalescer.read(offset, length)
        except asyncio.CancelledError as error:
            # aclose() cancels what we wait for, but not our task.
            if not is_failure(error):
                raise
            raise self._translated(error) from error

    def clone(self) -> FsspecSource:
        """Another source for the same file, pinned to this version."""
        other = FsspecSource(self._given, self._path, name=self._name, **self._settings)
        other._make, other._key, other._before = self._make, self._key, self._before
        fs, path = self._fs, self._path
        if fs is not None and not self._asynchronous:
            # The same one: what it was made of, or has copied, may be something else by now.
            other._make, other._before = lambda: (fs, path), None
        other._asynchronous, other._threaded = self._asynchronous, self._threaded
        other._size, other.version = self._size, self.version
        return other

    async def _get(self, offset: int, length: int) -> memoryview:
        """A whole range: one call, unless it gives less. What stands behind a file system may do
        so (HTTP servers: RFC 9110, 15.3.7), and then the rest is asked for."""
        data = await self._begin(offset, length)
        if not 0 < data.nbytes < length:
            return check_length(data, length, offset=offset)
        parts, done = [data], data.nbytes
        while done < length:
            data = await self._begin(offset + done, length - done)
            if not 0 < data.nbytes <= length - done:
                return check_length(data, length - done, offset=offset + done)
            parts.append(data)
            done += data.nbytes
        return memoryview(b"".join(parts))

    async def _begin(self, offset: int, length: int) -> memoryview:
        """What one call gives of a range, of the version that was opened."""
        try:
            data = await self._call("cat_file", self._path, start=offset, end=offset + length)
            size = memoryview(data).nbytes
        except BaseException as error:
            if not is_failure(error):
                raise
            raise self._translated(error) from error
        loop = asyncio.get_running_loop()
        if loop.time() - self._last_check >= self._recheck:
            await self._checks.run()
        if size == self._size != length:
            raise RangeNotSupportedError(f"{self._name}: whoever serves it does not serve parts")
        return check_length(data, size, offset=offset)

    async def _check(self) -> None:
        """See whether it is still the version that was opened."""
        started = asyncio.get_running_loop().time()
        try:
            found = await self._ask()
        except BaseException as error:
            if not is_failure(error):
                raise
            raise self._translated(error) from error
        if found != (self._size, self.version):
            raise self._changed()
        self._last_check = started

    async def _ask(self, before: str | None = None) -> tuple[int, str | None]:
        """Size and version at present. ``before`` is the version of its archive a moment ago."""
        if self._asynchronous:
            fs = self._fs
            if fs is None:
                raise ClosedError(f"{self!r} is closed")
            # What was listed a while ago is no answer.
            fs.invalidate_cache(self._path)
            found = _Look(await self._call("info", self._path))
        else:
            found = await self._in_thread(_look, self._path)
        if found.directory:
            raise IsADirectoryError(errno.EISDIR, "is a directory", self._name)
        if found.size is None:
            raise UsageError(f"the size of {self._name} cannot be found out")
        if before is not None and found.archive != before:
            raise SourceError(f"{self._name}: its archive was replaced while it was opened")
        self._weak = found.weak
        return found.size, found.version

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        fs = self._fs
        if fs is None:
            raise ClosedError(f"{self!r} is closed")
        if self._asynchronous:
            async with asyncio.timeout(self._timeout):
                return await getattr(fs, f"_{method}")(*arguments, **options)
        return await self._in_thread(lambda fs: getattr(fs, method)(*arguments, **options))

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call ``function`` with the file system, when it is our turn with that."""
        fs, turn, executor = self._fs, self._turn, self._executor
        if fs is None or executor is None:
            raise ClosedError(f"{self!r} is closed")

        def job() -> T:
            with turn:
                return function(fs, *arguments)

        return await run_in_thread(executor, job)

    def _changed(self) -> SourceChangedError:
        return SourceChangedError(f"{self._name} has changed since it was opened")

    def _translated(self, error: BaseException) -> AiouffdError:
        error = _reason(error)
        if isinstance(error, AiouffdError):
            return error
        if self._life.closed:
            return ClosedError(f"{self!r} was closed during a read")
        name = self._name
        # aiohttp tells it here, and others in a response.
        status = getattr(error, "status", None)
        if isinstance(error, PermissionError) or status in (401, 403, 407):
            return SourcePermissionError(
                f"{name}: access denied", transient=False, errno=errno.EACCES
            )
        if isinstance(error, FileNotFoundError) or status in _GONE:
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


class _Look:
    """What ``info`` says of a file."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        size = info.get("size")
        self.directory = info.get("type") == "directory"
        self.size = size if type(size) is int and size >= 0 else None
        self.version: str | None = None
        #: The version of the archive that it lies in.
        self.archive: str | None = None
        #: Whether a later change may leave the same version.
        self.weak = False
        for key in _VERSIONS:
            value = info.get(key)
            if value not in (None, ""):
                self.weak = _is_weak(key, value)
                text = value.isoformat() if isinstance(value, datetime) else str(value)
                # A file that took another's place may be as old.
                self.version = text if "ino" not in info else f"{info['ino']}-{text}"
                break
        # A server may keep the ETag of a file that has been replaced; then the date tells.
        date = info.get("Last-Modified")
        if date and self.version is not None and str(date) not in self.version:
            self.version += f" {date}"


def _look(fs: Any, path: str, depth: int = 0) -> _Look:
    """Look at a file, and at the archives that it lies in."""
    fs.invalidate_cache(path)
    found = _Look(fs.info(path))
    archive, copies = False, False
    while True:
        kind = type(fs)
        if _is_a(kind, "CachingFileSystem"):
            copies = True  # and may go on reading a copy that is older than what it tells of
            fs = fs.fs
        elif _is_a(kind, "DirFileSystem"):
            fs = fs.fs
        else:
            archive = _is_archive(kind)
            break
    found.weak = found.weak or copies
    if archive:
        below = getattr(fs, "of", None)
        target, place = getattr(below, "fs", None), getattr(below, "path", None)
        if target is None or place is None or depth >= _DEPTH:
            found.version = None
        else:
            outer = _look(target, place, depth + 1)
            found.archive, found.weak = outer.version, outer.weak or copies
            member = f"{found.version} in " if found.version is not None else ""
            found.version = None if outer.version is None else member + outer.version
    return found


def _is_a(kind: type, name: str) -> bool:
    """Whether a class is one of fsspec's, which are not imported for that."""
    return any(
        base.__name__ == name and base.__module__.startswith("fsspec.") for base in kind.__mro__
    )


def _is_archive(kind: type) -> bool:
    return _is_a(kind, "AbstractArchiveFileSystem")


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """fsspec takes apart what it is given."""
    return {key: dict(value) if type(value) is dict else value for key, value in options.items()}


def _archive_of(
    url: str, chain: list[str], names: list[str], options: Mapping[str, Any]
) -> Callable[[], str | None] | None:
    """What looks up the version of an archive; None if it is not told by a URL."""
    if len(chain) > 1:
        target, inner = (
            "::".join(chain[1:]),
            {name: options[name] for name in names[1:] if name in options},
        )
    elif isinstance(options.get("fo"), str):
        target, inner = options["fo"], dict(options.get("target_options") or {})
        if options.get("target_protocol"):
            inner["protocol"] = options["target_protocol"]
    else:
        return None

    def look() -> str | None:
        with _explained(url):
            fs, path = _import("fsspec.core").url_to_fs(target, **_copied(inner))
        return _look(fs, path).version

    return look


class _Shared:
    """Runs a coroutine function for many who want it: who comes while it runs gets the next run,
    for what that one looks at is later than what he did before."""

    def __init__(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._function = function
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def run(self) -> None:
        if self._next is None:
            self._next = begin(partial(self._after, self._running), self._not_next)
            self._next.add_done_callback(retrieve)
        await asyncio.shield(self._next)

    def _not_next(self) -> None:
        self._next = None

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


def _reason(error: BaseException) -> BaseException:
    """fsspec's HTTP calls every failure to describe a file a file that is not there."""
    while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        if getattr(error.__cause__, "status", None) in _GONE:
            break
        error = error.__cause__
    return error


def _own(kind: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """A file system for the running loop alone."""
    settings = {**options, "asynchronous": True, "skip_instance_cache": True}
    settings.pop("loop", None)
    return kind(*arguments, **settings)


#: For each file system the lock of who calls it.
_turns: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()


def _turn_of(fs: Any) -> threading.Lock:
    try:
        return _turns.setdefault(fs, threading.Lock())
    except TypeError:  # not one of fsspec's own kind
        return threading.Lock()


def _is_weak(key: str, value: Any) -> bool:
    """Whether a later change may leave the same."""
    if isinstance(value, str):
        return value.startswith("W/")
    if key not in _TIMES:
        return False
    stamp = value.timestamp() if isinstance(value, datetime) else value
    return stamp == int(stamp) and time.time() - stamp < _SETTLED


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """What fsspec says to URLs and options, as errors of ours."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(f"fsspec cannot open {_shown(url)}: {error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{_shown(url)}: {error}") from error


def _shown(url: str) -> str:
    """The URL without passwords and queries."""
    return "::".join(map(_plain, split_chain(url)))


def _plain(url: str) -> str:
    try:
        return without_password(url).partition("?")[0]
    except ValueError:
        return url.partition("?")[0].rpartition("@")[2]


def _key_of(url: str, kinds: list[Any], options: Mapping[str, Any]) -> str | None:
    """What names the file for a cache: its URL without passwords, and the options that choose
    something (a server, an account, an archive). A query may do so too, and what looks like a user
    may be the beginning of a path."""
    parts = []
    for part, kind in zip(split_chain(url), kinds, strict=True):
        if kind.__name__ == "LocalFileSystem" and "://" in part:
            part = f"file://{kind._strip_protocol(part)}"  # absolute
        parts.append(with_user(part))
    chosen = _choosing(options)
    config = _import("fsspec.config")
    for number, kind in enumerate(kinds):
        protocols = [kind.protocol] if isinstance(kind.protocol, str) else [*kind.protocol]
        defaults = [_choosing(config.conf.get(protocol, {})) for protocol in protocols]
        chosen[f"{number} defaults"] = [given for given in defaults if given] or None
        if not {"file", "local", "http", "https", "memory", "zip", "tar"}.issuperset(protocols):
            found = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            chosen[f"{number} environment"] = found or None
    return identity("::".join(parts), chosen)


def _key_of_given(fs: Any, path: str) -> str | None:
    """The same for a file system that was given. A path that is no URL means nothing elsewhere."""
    if "://" not in path:
        return None
    arguments = list(getattr(fs, "storage_args", ())) or None
    options = _choosing(getattr(fs, "storage_options", {}))
    return identity(with_user(path), {**options, "arguments": arguments})


def _choosing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that may choose something else."""
    chosen: dict[str, Any] = {}
    for key, value in options.items():
        if key == "fo" and isinstance(value, str) and "://" not in value:
            value = os.path.abspath(value)
        if isinstance(value, Mapping):
            value = _choosing(value) or None
        if key not in _CHOOSE_NOTHING and value is not None:
            chosen[key] = value
    return chosen


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"this needs {error.name}", hint=install_hint("fsspec")) from error
