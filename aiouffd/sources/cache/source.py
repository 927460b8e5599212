"""A source whose blocks are kept on disk; see the package for how."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ClosedError, SourceChangedError, SourceError, UsageError
from ...util.once import cancelled_from_outside
from .. import as_source
from ..base import (
    BaseSource,
    Buffer,
    Source,
    aclose_source,
    check_range,
    holes_in_source,
    open_source,
    own_method,
    read_into_source,
)
from ..compose.checksum import digest_function
from ..compose.concat import together
from ..compose.wrapper import fresh
from ..file import _settle
from ..lifecycle import Life, contained, give_back, submitted
from ..names import display_name, identity, with_user
from . import layout
from .entry import TRIES, Entry
from .evict import FULL, make_room
from .layout import Format, Latest
from .writer import Settings, Writer

__all__ = ["CacheStats", "CachedSource", "cached"]

log = logging.getLogger("aiouffd")

_INLINE_MAX = 256 << 10  # largest read tried on the loop's thread, bytes
_FETCH = 16 << 20  # most that is asked of the inner source at a time, bytes
_HOLES = 4096  # most blocks that are looked at for zeros at a time


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Bytes, of whole blocks: read from the cache, fetched from the source, stored, and not
    stored because the disk was too slow or refused."""

    hit_bytes: int
    fetched_bytes: int
    written_bytes: int
    dropped_bytes: int


class CachedSource(BaseSource):
    """``source``, whose blocks are read from disk if they were read before.

    Arguments:
        source: whatever `as_source` takes; ``options`` are passed on to it.
        directory: where the cache is; None for ``$XDG_CACHE_HOME/aiouffd`` or
            ``~/.cache/aiouffd``. Made if it is not there, with mode 0700.
        key: what names the object, for ever. None takes the URL without password, or the path,
            and all settings that may choose another object (endpoint, region, account, headers).
            Give one for URLs, headers and tokens that differ each time, and to have users
            share what is the same for all of them.
        version: of the object, if the source cannot tell. Your word that its bytes never
            change under that name: without any version nothing is cached, nor with a weak one,
            which may stay when the bytes change (see `layout.lasting_version`).
        size_limit: bytes on disk that the whole directory may take, by all that use it with
            this limit; what was longest unused goes first.
        block_size: bytes, a power of two. Reads of other sources are widened to it.
        checksum: algorithm of `aiouffd.sources.compose`; None for ``crc32c``, or the slower
            ``crc32`` where the library for that is missing (the extra ``checksum``).
        fsync: wait, in the background, for the disk: blocks are durable before they count.
        stale_ok: when the source cannot be reached, open the version that was last seen; what is
            not cached of it is asked for when it is read.
        queue: bytes that may wait to be written; what comes while it is full is not cached.
        close_timeout: seconds that ``aclose()`` gives to what waits to be written.

    ``open()`` opens the source, and so asks for the object's version each time. Reads raise what
    the source raises, SourceChangedError among it when the object was replaced after it was
    opened; what is cached of the version that was opened can still be read. Trouble with the
    cache itself is logged (logger ``aiouffd``) and never raised: the source is read then.

    Raises UsageError if no key can be derived. Belongs to one loop; has threads of its own.
    Cancelled, a read waits for the thread that writes to its buffer (at most 4 MiB).

    It has no ``stream``: from the page cache to a huge page in one go is twice as fast.
    """

    def __init__(
        self,
        source: Any,
        *,
        directory: str | os.PathLike[str] | None = None,
        key: str | None = None,
        version: str | None = None,
        size_limit: int = 16 << 30,
        block_size: int = 64 << 10,
        checksum: str | None = None,
        fsync: bool = False,
        stale_ok: bool = False,
        queue: int = 64 << 20,
        close_timeout: float = 10.0,
        **options: Any,
    ) -> None:
        layout.check_block_size(block_size)
        if size_limit < 0 or queue < 0 or close_timeout < 0:
            raise UsageError("a cache needs a size limit, a queue and a timeout of zero or more")
        if checksum is None:
            checksum = "crc32c" if importlib.util.find_spec("crc32c") else "crc32"
        digest_function(checksum)
        self._inner: Source = as_source(source, **options)
        if key is None:
            key = layout.derive_key(self._inner)
        if key is None and isinstance(source, str) and not hasattr(self._inner, "cache_key"):
            key = identity(with_user(source), options)
        if key is None:
            raise UsageError(
                f"{self._inner!r} has no name to keep its bytes under: none at all, or a setting"
                " that cannot be written down chooses them",
                hint="pass key=, a name that this object alone has",
            )
        self._key = key
        # Absolute now: the working directory may be another one when a clone opens.
        self._directory = None if directory is None else os.path.abspath(directory)
        self._given = version
        self._block_size = block_size
        self._checksum = checksum
        self._settings = Settings(size_limit, queue, fsync)
        self._stale_ok = stale_ok
        self._close_timeout = close_timeout
        #: Size and version that all bytes are of, once known.
        self._pin: tuple[int, str | None] | None = None
        #: Whether bytes can be kept under that version.
        self._lasting = False
        self._reached = False
        self._reaching: asyncio.Lock | None = None
        self._changed: SourceChangedError | None = None
        self._life = Life(f"the cache of {self._inner!r}")
        self._entry: Entry | None = None
        self._writer: Writer | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._edges: dict[int, asyncio.Task[memoryview]] = {}
        self._hits = self._fetched = 0

    def __repr__(self) -> str:
        return f"<CachedSource of {self._inner!r}>"

    def __del__(self) -> None:
        life = getattr(self, "_life", None)
        if life is not None and life.opened:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._let_go()

    @property
    def inner(self) -> Source:
        """What this is around."""
        return self._inner

    @property
    def size(self) -> int:
        """Length of the object in bytes. Raises UsageError before ``open()``."""
        if self._pin is None:
            raise UsageError(f"the size of {self!r} is not known yet", hint="await open() first")
        return self._pin[0]

    @property
    def caching(self) -> bool:
        """Whether there is a cache: it is open, knows a version and can use the directory."""
        return self._entry is not None

    @property
    def offline(self) -> bool:
        """Whether it was opened without the source, which has not been reached since."""
        return self._life.opened and not self._reached

    @property
    def stats(self) -> CacheStats:
        """What was read from where, so far."""
        writer = self._writer
        return CacheStats(
            self._hits,
            self._fetched,
            writer.written if writer else 0,
            writer.dropped if writer else 0,
        )

    # --------------------------------------------------------- open and close

    async def open(self) -> None:
        """Open the source, and what is cached of its version. Shared by all who call it at a time.

        Raises what opening the source raises, unless ``stale_ok`` and it cannot be reached;
        SourceChangedError if a clone finds another version.
        """
        pin = self._pin, self._lasting
        await self._life.open(partial(self._open, pin), partial(self._take_back, pin))

    async def _open(self, before: tuple[tuple[int, str | None] | None, bool]) -> None:
        executor = self._executor = ThreadPoolExecutor(4, "aiouffd-cache")
        pin = self._pin
        try:
            try:
                await self._reach()
            except (SourceError, ConnectionError, TimeoutError) as error:
                if not self._stale_ok or not getattr(error, "transient", True):
                    raise
                await self._open_stale(executor, error)
            # What a clone is pinned to may no longer be the last.
            await self._open_cache(executor, news=pin is None and self._reached)
        except BaseException:
            await self._take_back(before)
            raise

    async def _take_back(self, before: tuple[tuple[int, str | None] | None, bool]) -> None:
        """As it was before it was opened, so that it can be opened again."""
        self._let_go()
        self._writer = None
        self._pin, self._lasting = before
        if self._reached:
            self._reached = False
            inner, self._inner = self._inner, fresh(self._inner)
            await give_back(inner)

    async def _reach(self) -> None:
        """Open the inner source, if it is not, and see that it is the version we have."""
        if self._changed is not None:
            raise self._changed
        if self._reached:
            return
        if self._reaching is None:
            self._reaching = asyncio.Lock()
        async with self._reaching:
            if self._reached:
                return
            await contained(open_source, self._inner)
            version = getattr(self._inner, "version", None)
            lasting = layout.lasting_version(self._inner) is not None
            if not lasting and self._given is not None:
                version, lasting = self._given, True
            found = (self._inner.size, version)
            if self._pin is not None and self._pin != found:
                self._changed = SourceChangedError(
                    f"{self!r} was {self._pin[0]} bytes of version {self._pin[1]}"
                    f" and is {found[0]} bytes of version {found[1]}"
                )
                await give_back(self._inner)
                raise self._changed
            if self._life.closed:
                await give_back(self._inner)
                self._life.check()
            self._pin, self._lasting = found, lasting
            self.version = version
            self._reached = True

    async def _open_stale(self, executor: ThreadPoolExecutor, error: Exception) -> None:
        if self._pin is None:
            try:
                directory = layout.key_directory(layout.root_of(self._directory), self._key)
            except OSError:
                raise error from None
            latest = await submitted(executor, layout.read_latest, directory)
            if latest is None:
                raise error
            self._pin, self._lasting = (latest.size, latest.version), True
            self.version = latest.version
        log.warning("%r cannot be reached, its version %s is used: %s", self, self.version, error)

    async def _open_cache(self, executor: ThreadPoolExecutor, *, news: bool) -> None:
        assert self._pin is not None
        size, version = self._pin
        if version is None or not self._lasting:
            log.info("%r tells no version that lasts and is not cached; pass version=", self)
            return
        form = Format(self._key, version, size, self._block_size, self._checksum)
        try:
            root = layout.root_of(self._directory)
            opening = submitted(executor, _prepare, root, form, self._settings.size_limit, news)
            entry, writable = await _settle(opening)
        except OSError as error:
            where = self._directory or "the usual directory"
            log.warning("%s is no cache for %r: %s", where, self, error)
            return
        self._entry = entry
        if writable:
            self._writer = Writer(root, entry, self._settings)

    async def aclose(self) -> None:
        """Close the source, once what waits is written or ``close_timeout`` has passed. Reads in
        flight finish or raise ClosedError. Idempotent, and shared by all who call it at a time."""
        await self._life.close(self._close)

    async def _close(self) -> None:
        try:
            edges = [*self._edges.values()]
            for task in edges:
                task.cancel()
            await asyncio.gather(*edges, return_exceptions=True)
            if self._writer is not None:
                await self._writer.close(self._close_timeout)
        finally:
            self._let_go()
            if self._reached:
                await contained(aclose_source, self._inner)

    def _let_go(self) -> None:
        entry, self._entry = self._entry, None
        executor, self._executor = self._executor, None
        if self._writer is not None:
            self._writer.stop()
        if executor is not None:
            executor.shutdown(wait=False)
        if entry is not None:
            entry.forget()

    def clone(self) -> CachedSource:
        """The same around a clone, pinned to the version of this one, on the same directory."""
        settings = self._settings
        other = CachedSource(
            self._inner.clone(),
            directory=self._directory,
            key=self._key,
            version=self._given,
            size_limit=settings.size_limit,
            block_size=self._block_size,
            checksum=self._checksum,
            fsync=settings.sync,
            stale_ok=self._stale_ok,
            queue=settings.queue,
            close_timeout=self._close_timeout,
        )
        other._pin, other._lasting = self._pin, self._lasting
        other.version = self.version
        return other

    # --------------------------------------------------------------- reading

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        self._check(offset, length)
        if self._entry is None:
            await self._reach()
            return await contained(self._inner.read, offset, length)
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return data

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` into ``buffer``, verified."""
        self._check(offset, len(buffer))
        if self._entry is None:
            await self._reach()
            await contained(read_into_source, self._inner, offset, buffer)
            return
        calls = list(self._calls(offset, buffer))
        if len(calls) == 1:
            await calls[0]
        elif calls:
            await together(calls)

    def _check(self, offset: int, length: int) -> None:
        self._life.check()
        if not self._life.opened:
            raise UsageError(f"{self!r} is not open", hint="await open() first")
        check_range(offset, length, self.size)

    def _calls(self, offset: int, buffer: memoryview) -> list[Coroutine[Any, Any, None]]:
        """Whole blocks straight into the buffer; those at the edges by themselves."""
        step, size = self._block_size, self.size
        calls: list[Coroutine[Any, Any, None]] = []
        at, end = offset, offset + len(buffer)
        while at < end:
            block = at // step
            if at % step or min(end, size) < min((block + 1) * step, size):
                stop = min(end, (block + 1) * step)
                calls.append(
                    self._edge(block, at - block * step, buffer[at - offset : stop - offset])
                )
            else:
                stop = end if end == size else end - end % step
                calls.append(self._whole(block, buffer[at - offset : stop - offset]))
            at = stop
        return calls

    async def _whole(self, first: int, view: memoryview) -> None:
        """Fill ``view`` with whole blocks from ``first`` on."""
        step = self._block_size
        missing = await self._from_cache(first, view)
        self._hits += len(view) - sum(
            min(step, len(view) - (block - first) * step) for block in missing
        )
        calls = []
        for start, stop in _runs(missing, max(1, _FETCH // step)):
            calls.append(self._fetch(start, view[(start - first) * step : (stop - first) * step]))
        if len(calls) == 1:
            await calls[0]
        elif calls:
            await self._in_turn(calls)

    async def _in_turn(self, calls: list[Coroutine[Any, Any, None]]) -> None:
        """A few at a time, so that a large read of a patchy cache is no flood of requests."""
        left = iter(calls)

        async def worker() -> None:
            for call in left:
                await call

        try:
            await together(worker() for _ in range(min(4, len(calls))))
        finally:
            for call in calls:
                call.close()

    async def _from_cache(self, first: int, view: memoryview) -> list[int]:
        """Fill ``view`` as far as it is cached; the blocks that are not."""
        entry, executor = self._entry, self._executor
        if entry is None or executor is None:
            raise ClosedError(f"{self!r} is closed")
        if len(view) <= _INLINE_MAX and entry.read_now(first, view):
            return []
        step = self._block_size
        # Before the files are read: what is not waiting any more by then is in them.
        waiting = self._writer.blocks(first, -(-len(view) // step)) if self._writer else {}
        stop = threading.Event()
        try:
            reading = submitted(executor, entry.read_into, first, view, stop)
        except SourceError:  # there is no thread to be had: as if nothing were cached
            missing = list(range(first, first + -(-len(view) // step)))
        else:
            missing = await _settle(reading, stop)
        for block in [block for block in missing if block in waiting]:
            start = (block - first) * step
            view[start : start + len(waiting[block])] = waiting[block]
            missing.remove(block)
        return missing

    async def _fetch(self, first: int, view: memoryview) -> None:
        """Fill ``view`` with whole blocks from the source, and have them stored."""
        await self._reach()
        await contained(read_into_source, self._inner, first * self._block_size, view)
        self._fetched += len(view)
        if self._writer is not None and not self._life.closed and self._writer.has_room(len(view)):
            # A copy: the buffer is the caller's again in a moment.
            self._writer.put(first, bytes(view))

    async def _edge(self, block: int, start: int, part: memoryview) -> None:
        """Fill ``part`` from byte ``start`` of a block on. All who want parts of one block at a
        time share one read of it."""
        task = self._edges.get(block)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._block(block))
            self._edges[block] = task
            task.add_done_callback(lambda done: self._edge_done(block, done))
        try:
            # It goes on if we are cancelled, for the others.
            data = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not cancelled_from_outside():
                self._life.check()
            raise
        part[:] = data[start : start + len(part)]

    async def _block(self, block: int) -> memoryview:
        step = self._block_size
        view = memoryview(bytearray(min(step, self.size - block * step)))
        await self._whole(block, view)
        return view

    def _edge_done(self, block: int, task: asyncio.Task[memoryview]) -> None:
        del self._edges[block]
        if not task.cancelled():
            task.exception()  # retrieved, also if nobody waits any more

    async def holes(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """Ranges known to be zeros: by the cache, and by the source where nothing is cached. Of a
        long range only the first 4096 blocks are looked at."""
        self._check(offset, length)
        entry, step = self._entry, self._block_size
        if not length:
            return ()
        end = min(offset + length, (offset // step + _HOLES) * step)
        ask = self._reached and own_method(self._inner, "holes") is not None
        if ask and entry is not None and self._executor is not None:
            # Reading a table is cheaper than a question that it would have spared.
            first, count = offset // step, (end - 1) // step + 1 - offset // step
            if not entry.loaded(first, count):
                with contextlib.suppress(SourceError):
                    await submitted(self._executor, entry.load, first, count)
        zeros: list[tuple[int, int]] = []
        asked: list[tuple[int, int]] = []
        for block in range(offset // step, (end - 1) // step + 1):
            start, stop = max(offset, block * step), min(end, (block + 1) * step)
            known = entry.zeros(block) if entry is not None else None
            if known is not False:
                _append(zeros if known else asked, start, stop - start)
        if not ask:
            return zeros
        for start, count in asked:
            found = await contained(holes_in_source, self._inner, start, count)
            zeros += found
            for hole, extent in found:
                first, last = -(-hole // step), (hole + extent) // step
                if self._writer is not None and not self._life.closed and first < last:
                    self._writer.put_zeros(first, last - first)
        zeros.sort()
        return zeros


def _append(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    if ranges and sum(ranges[-1]) == start:
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
    else:
        ranges.append((start, length))


def _runs(blocks: list[int], most: int) -> list[tuple[int, int]]:
    """First and end of runs of consecutive numbers, ``most`` in each."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block and block - runs[-1][0] < most:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def _prepare(root: Path, form: Format, size_limit: int, news: bool) -> tuple[Entry, bool]:
    """What is cached, and whether more can be; with ``news`` this is the version that was seen
    last. Raises OSError if the directory is unusable."""
    entry = Entry(root, form)
    if news:
        entry.latest = Latest(display_name(form.key), form.version, form.size)
    tries = TRIES
    while True:
        tries -= 1
        try:
            layout.make_directory(root)
            with contextlib.suppress(FileExistsError):
                entry.directory.parent.mkdir(mode=0o700)
            if entry.latest is not None:
                layout.write_latest(entry.directory.parent, entry.latest)
        except FileNotFoundError:
            # Whoever evicts removes empty directories.
            if not tries:
                raise
        except layout.Unsafe:
            raise
        except OSError as error:
            if tries > TRIES - 3 and error.errno in FULL:
                make_room(root, size_limit)
                continue
            # Read-only, or full: what is there can still be read.
            if not entry.directory.is_dir():
                raise
            layout.check_directory(root)
            log.warning("the cache in %s cannot be written: %s", root.parent, error)
            return entry, False
        else:
            if news:
                layout.forget_older(entry.directory.parent, form.name)
            return entry, True


def cached(source: Any, cache: bool | str | os.PathLike[str] | None, **options: Any) -> Any:
    """``source`` with a disk cache: in the directory ``cache``, or in the usual one if True. False
    or None: ``source`` as it is. For the keyword ``cache`` of `aiouffd.open`.

    ``options`` are those of `CachedSource`. A CachedSource is returned unchanged.
    """
    if cache is None or cache is False or isinstance(source, CachedSource):
        return source
    return CachedSource(source, directory=None if cache is True else cache, **options)
