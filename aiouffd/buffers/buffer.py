"""Lazy buffers: an object somewhere else, as memory.

The layers meet here: a `Region` of the loop's shared pager, a source, and a `BufferSink` that
brings blocks from one to the other.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import operator
import os
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeAlias, get_args

from ..errors import ClosedError, SourceChangedError, SourceError, UnsupportedError, UsageError
from ..fetch.advice import HINTS, Hint
from ..fetch.fetcher import FlightEvent
from ..fetch.policy import Policy
from ..fetch.tally import Tally
from ..fetch.workingset import Recording, WorkingSet
from ..kernel.lib import ffi, lib
from ..regions import guarded
from ..regions.fault import Errors, Kind
from ..regions.pager import shared_pagers
from ..regions.region import Region
from ..sources import MemorySource, as_source
from ..sources.base import Source, aclose_source, clone_source, open_source, size_of_source
from ..sources.names import display_name
from ..sources.pinned import Pinned
from ..sources.registry import scheme_of
from ..util.keywords import one_source, path_of, seconds, size_in_bytes
from ..util.once import Once, cancelled_from_outside
from ..util.terminal import Progress, reporting
from .arrays import Shape, tensor_over
from .blocks import BufferSink
from .byte_sequence import ByteSequence, check_bytes
from .efault import explain
from .file import BufferFile, FileHints, Reading
from .mapping import Mapping
from .notebook import html_of
from .recording import observe

if TYPE_CHECKING:
    from torch import Tensor

    from ..kernel.calls.pointers import Bytes


__all__ = ["BufferStats", "LazyBuffer", "open"]

Fork: TypeAlias = Literal["drop", "serve"]

log = logging.getLogger("aiouffd")

#: Bytes of one fetch when access is random. 64 KiB: a 4 KiB touch costs at most 16 times itself.
BLOCK_SIZE = 64 * 1024
#: Bytes that readahead keeps under way; its lead over the reader is at most twice that.
READAHEAD = 8 * 1024 * 1024
#: Bytes that one step of `read` copies, for the sake of the loop's latency.
COPY_STEP = 1024 * 1024
#: Bytes of a long read that are asked for at a time; twice as much is under way.
READ_STEP = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class BufferStats:
    """A snapshot of what a buffer did. Bytes and counts are since it was opened."""

    size: int
    block_size: int
    resident_bytes: int
    poisoned_bytes: int
    #: Bytes that the source delivered; more than were touched, by block size and readahead.
    fetched_bytes: int
    #: Blocks that a thread had to wait for.
    faulted_blocks: int
    #: Requests made to the source, and how many are under way.
    flights: int
    in_flight: int
    retries: int
    failures: int
    #: Blocks that the rescue loop had to serve.
    rescued: int
    #: Forked processes that have the buffer now (``fork="serve"``).
    children: int
    last_error: str | None
    #: Finished flights by duration: item i counts those under ``2**i`` milliseconds.
    latency: tuple[int, ...]


@one_source
def open(
    source: Any,
    *,
    block_size: int | str | None = None,
    readahead: int | str | None = None,
    errors: Errors = "hard",
    deadline: float | None = None,
    strict: bool = False,
    writable: bool = False,
    kind: Kind = "anonymous",
    fork: Fork = "drop",
    user_mode_only: bool | None = None,
    cache: bool | str | os.PathLike[str] | None = None,
    prefetch: WorkingSet | str | os.PathLike[str] | None = None,
    prefetch_version: Literal["same", "any"] = "same",
    trace: Callable[[FlightEvent], None] | None = None,
    **options: Any,
) -> LazyBuffer:
    """A lazy buffer over ``source``; use it with ``async with``, or ``await`` it and `aclose`.

    Raises UsageError for arguments that cannot be; everything else shows when it is opened.

    Args:
        source: A URL (``http://``, ``s3://``, ``nbd://``, ...), a path, bytes, or a `Source`.
        block_size: Bytes fetched at a time when access is random: a power of two, at least one page
            (64 KiB by default; 2 MiB for huge pages). Sizes may be text: "64K".
        readahead: How much to keep under way ahead of sequential or strided access, in bytes (8 MiB
            by default); 0 switches it off.
        errors: When the source fails: ``"hard"`` retries for ever while touchers wait; ``"soft"``
            gives up after ``deadline`` or an error that is not transient: SIGBUS for raw touches,
            `SourceError` from the methods.
        deadline: Seconds for ``errors="soft"``, from the touch on. Without one, errors that may
            pass (a server that cannot be reached) are retried for ever, as with ``"hard"``; the log
            says after 10 seconds that somebody waits.
        strict: A touch from the event loop's own thread ends the process with a traceback instead
            of a `BlockingTouchWarning`.
        writable: Allow the program to write. What it writes stays in this memory.
        kind: The memory: see `Pager.map`.
        fork: What forked children have of it: ``"drop"``, nothing; ``"serve"``, the same memory,
            which this process goes on to fill. They have a copy as of the fork, or with
            ``kind="memfd"`` and ``"hugetlb-memfd"`` share it. The source has to be one that can be
            cloned. In a child `view`, ``buf[...]`` and `find` work, coroutines do not.
        user_mode_only: See `Pager`.
        cache: Keep what is fetched on disk, for the next time: in this directory, or in the usual
            one if True. More settings: `aiouffd.sources.cache.CachedSource`.
        prefetch: A working set, or the file of one, that is brought in the background from the
            start on. It is left alone, with a warning in the log, if it is of another version.
        prefetch_version: ``"any"`` takes it for a copy of the object too, which has another version
            elsewhere; the size has to be the same.
        trace: Called on the loop with a `FlightEvent` for each finished fetch.
        options: The rest goes to the source (``headers=`` for HTTP, ...).
    """
    return LazyBuffer(
        source,
        block_size=block_size,
        readahead=readahead,
        errors=errors,
        deadline=deadline,
        strict=strict,
        writable=writable,
        kind=kind,
        fork=fork,
        user_mode_only=user_mode_only,
        cache=cache,
        prefetch=prefetch,
        prefetch_version=prefetch_version,
        trace=trace,
        options=options,
    )


class LazyBuffer(FileHints, ByteSequence):
    """Memory with the contents of a source, fetched where it is touched. Made by `open`.

    Touch `view` from any thread. The coroutines belong to the loop that opened the buffer;
    indexing (``buf[...]``), `find`, `resident` and `stats` work from any thread.
    """

    #: What it is called, and what hints say: a `SyncBuffer` says otherwise.
    _called = "LazyBuffer"
    _end_with = "`async with` or `await buf.aclose()`"
    _fetch_again = "await buf.fetch()"
    _hints: ClassVar = {"close": "`await buf.aclose()` closes it"}

    def __init__(
        self,
        source: Any,
        *,
        block_size: int | str | None,
        readahead: int | str | None,
        errors: Errors,
        deadline: float | None,
        strict: bool,
        writable: bool,
        kind: Kind,
        fork: Fork,
        user_mode_only: bool | None,
        cache: bool | str | os.PathLike[str] | None,
        prefetch: WorkingSet | str | os.PathLike[str] | None,
        prefetch_version: Literal["same", "any"],
        trace: Callable[[FlightEvent], None] | None,
        options: dict[str, Any],
    ) -> None:
        if errors not in ("hard", "soft"):
            raise UsageError(f"errors is 'hard' or 'soft', not {errors!r}")
        if deadline is not None:
            seconds("deadline", deadline)
            if errors == "hard":
                raise UsageError(
                    "deadline goes with errors='soft'",
                    hint="errors='hard' waits for ever by definition",
                )
        if kind not in get_args(Kind):
            raise UsageError(f"kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
        if trace is not None and not callable(trace):
            raise UsageError(f"trace is a function that takes a FlightEvent, not {trace!r}")
        if block_size is not None:
            block_size = size_in_bytes("block_size", block_size)
        if readahead is not None:
            readahead = size_in_bytes("readahead", readahead)
        if readahead is not None and readahead < 0:
            raise UsageError("readahead is a number of bytes; 0 switches it off")
        if block_size is not None and (block_size < 1 or block_size & (block_size - 1)):
            raise UsageError(
                f"the block size {block_size} is not a power of two",
                hint=f"{1 << block_size.bit_length()} is the next" if block_size > 0 else None,
            )
        if fork not in ("drop", "serve"):
            raise UsageError(f"fork is 'drop' or 'serve', not {fork!r}")
        if prefetch_version not in ("same", "any"):
            raise UsageError(f"prefetch_version is 'same' or 'any', not {prefetch_version!r}")
        huge = kind.startswith("hugetlb")
        self._given = source
        # Absolute now: whoever opens it anew may do so elsewhere.
        self._place = _absolute(source)
        if cache is not None and not isinstance(cache, bool):
            cache = path_of("cache", cache)
        self._settings: dict[str, Any] = {
            "block_size": block_size,
            "readahead": readahead,
            "errors": errors,
            "deadline": deadline,
            "strict": strict,
            "writable": writable,
            "kind": kind,
            "fork": fork,
            "user_mode_only": user_mode_only,
            "cache": cache,
            **options,
        }
        self._options = options
        self._make_source(as_source(source, **options))
        if prefetch is not None and not isinstance(prefetch, WorkingSet):
            prefetch = WorkingSet.load(path_of("prefetch", prefetch))
        if prefetch is not None and prefetch_version == "any":
            prefetch = prefetch.for_copies()
        self._prefetch = prefetch
        self._block_size = block_size or (BLOCK_SIZE if not huge else 2 << 20)
        self._readahead = READAHEAD if readahead is None else readahead
        self._policy = Policy(errors, deadline)
        self._strict = strict
        self._writable = writable
        self._kind: Kind = kind
        self._fork: Fork = fork
        self._user_mode_only = user_mode_only
        self._trace = trace
        self._expected: Pinned | None = None
        self._tally = Tally()
        self._pins: dict[object, tuple[int, int]] = {}
        self._mapping: Mapping | None = None
        self._opening = Once[None]("opening a lazy buffer", abandon=True)
        self._closing = Once[None]("closing a lazy buffer", keep_failure=True)
        self._open = self._closed = self._forced = False
        self._size = 0
        self._pid = os.getpid()

    def _make_source(self, source: Source) -> None:
        self._object = self._source = source
        cache = self._settings["cache"]
        if cache is not None and cache is not False:
            from ..sources.cache import cached

            self._source = cached(source, cache)
        # Whether it was closed because opening the buffer failed.
        self._spent = False

    # ----------------------------------------------------------------- opening

    async def aopen(self) -> LazyBuffer:
        """Open the source and map the memory. Idempotent; what ``async with`` and ``await`` do.

        One operation for all who ask; cancelling the last of them takes it back, and after a
        failure it may be asked for again. Raises what the source raises (FileNotFoundError,
        PermissionError, SourceError, ...), UnsupportedError when userfaultfd cannot be had, or with
        ``fork="serve"`` when the source cannot be cloned, SourceChangedError when an unpickled
        buffer finds another version than the pickled one had, ClosedError after `aclose`.
        """
        if self._closed:
            raise ClosedError("the buffer is closed")
        if self._open:
            return self
        try:
            await self._opening(self._open_all, self._undo)
        except asyncio.CancelledError:
            if self._closed and not cancelled_from_outside():
                raise ClosedError("the buffer was closed while it was opened") from None
            raise
        return self

    async def _open_all(self) -> None:
        if self._spent:
            self._make_source(self._another_source())
        if self._expected is not None:
            self._expected.check_name(self._object)
        await open_source(self._source)
        mapping = None
        try:
            if self._expected is not None:
                self._expected.check(self._source)
            self._size = size_of_source(self._source)
            mapping = self._map() if self._size else Mapping(self._source, self._name)
            await mapping.start()
            self._mapping, self._open = mapping, True
            if self._prefetch is not None:
                self._start_prefetch(self._prefetch)
            observe(self._given, self)
        except BaseException:
            self._mapping, self._open, self._spent = None, False, True
            if mapping is None:
                await aclose_source(self._source)
            else:
                await mapping.finish()
            raise

    async def _undo(self) -> None:
        """It was opened, but whoever asked was cancelled before they heard of it."""
        mapping, self._mapping, self._open = self._mapping, None, False
        self._spent = True
        if mapping is not None:
            await mapping.finish()

    def _another_source(self) -> Source:
        """One to open instead of a source that is closed, which is for good."""
        source = as_source(self._given, **self._options)
        if source is self._given:
            with suppress(UnsupportedError):  # perhaps it can be opened once more
                return clone_source(source)
        return source

    def _map(self) -> Mapping:
        native = isinstance(self._source, MemorySource)
        clone = clone_source(self._source) if self._fork == "serve" else None
        pager = shared_pagers.acquire(self._user_mode_only, self._strict, native)
        region = None
        try:
            region = pager._map(
                self._size,
                kind=self._kind,
                block_size=self._block_size,
                writable=self._writable,
                report_hits=self._readahead > 0,
                serve_children=clone is not None,
            )
            sink = BufferSink(
                region, self._source, self._policy, self._tally, self._readahead, self._trace
            )
            region._sink = sink
            if clone is not None:
                sink.leave_to_children(clone)
            if isinstance(self._source, MemorySource):
                region.serve_from(self._source.data)
            region.call(self._name)
            mapping = Mapping(self._source, self._name, region, pager, sink)
        except BaseException:
            if region is not None:
                region._shut()
            shared_pagers.release(pager)
            raise
        return mapping

    @property
    def _region(self) -> Region | None:
        return None if self._mapping is None else self._mapping.region

    @property
    def _sink(self) -> BufferSink | None:
        return None if self._mapping is None else self._mapping.sink

    def __await__(self) -> Generator[Any, None, LazyBuffer]:
        return self.aopen().__await__()

    async def __aenter__(self) -> LazyBuffer:
        return await self.aopen()

    async def __aexit__(self, *exc_info: object) -> None:
        """`aclose`: memory that somebody still holds is served on. EFAULT gets a note that says
        why it may be ours."""
        self._explain(exc_info[1])
        await self.aclose()

    def _explain(self, error: object) -> None:
        region = self._region
        if error is not None and region is not None and not self._closed and not region.closed:
            explain(
                error,
                repr(self._name),
                user_mode_only=region.pager.user_mode_only,
                failed=(self._tally.last_error or "?") if region.poisoned_bytes else None,
                fetch=self._fetch_again,
                save=self._fetch_again.replace("fetch()", "save(path)"),
            )

    if not TYPE_CHECKING:  # which knows better

        def __enter__(self) -> NoReturn:
            raise TypeError(
                "a lazy buffer is opened by `async with`; for plain `with` there is"
                " aiouffd.sync.open(...)"
            )

        def __exit__(self, *exc_info: object) -> None:
            """For `with` to ask __enter__ at all."""

    def _check(self) -> Region:
        """The region, or why there is none."""
        if self._closed:
            raise ClosedError("the buffer is closed")
        if self._pid != os.getpid():
            raise ClosedError(
                "the buffer belongs to the parent process",
                hint="lazy memory is not inherited by fork; open it again in the child, or with"
                ' fork="serve" in the parent'
                if self._fork == "drop"
                else "in a forked child `view`, buf[...] and find() work; for the rest open it"
                " again in the child",
            )
        region = self._region
        if region is None:
            raise UsageError(
                "the buffer is empty" if self._open else "the buffer is not open",
                hint=None if self._open else "async with aiouffd.open(...) as buf",
            )
        return region

    @property
    def _inherited(self) -> bool:
        """Whether this is a forked child, and the buffer was left to it."""
        return self._fork == "serve" and self._pid != os.getpid()

    def _touchable(self) -> Region:
        """As `_check`, for what forked children may do as well: touching."""
        if self._fork == "drop":
            return self._check()
        region = self._region
        if not self._inherited or self._closed or region is None:
            return self._check()
        region.check_touchable()
        return region

    # ------------------------------------------------------------- the memory

    @property
    def view(self) -> memoryview:
        """The memory itself, a memoryview of bytes: hand it to numpy, struct, os.write, ...

        Touching it fetches. As long as a view, or a slice, array or tensor made of one, exists, its
        memory is there and is served, after `aclose` too. (What was made from `address` alone
        does not count.)
        """
        if self._open and not self._size:
            return memoryview(b"")
        return self._touchable().view

    def _export(self) -> memoryview:
        """The buffer itself can be given to numpy and others, as `view`."""
        return self.view

    @property
    def address(self) -> int:
        """Address of the first byte, aligned to a page."""
        return self._touchable().address

    def __len__(self) -> int:
        if not self._open and not self._closed:
            raise UsageError(
                "the buffer is not open, and has no size yet",
                hint="async with aiouffd.open(...) as buf",
            )
        return self._size

    @property
    def block_size(self) -> int:
        """Bytes fetched at a time when access is random."""
        return self._block_size

    @property
    def source(self) -> Source:
        """Where the bytes come from."""
        return self._source

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def user_mode_only(self) -> bool:
        """True if system calls on missing pages fail with EFAULT; `fetch` before them."""
        if self._inherited:
            native = self._touchable().check_touchable()
            return bool(lib.au_region_inherited(native) == lib.AU_INHERITED_USER_MODE)
        return self._check().pager.user_mode_only

    def _copy_out(self, offset: int, length: int) -> bytes:
        if not length:
            return b""
        region = self._touchable()
        # Fresh, and seen by nobody else until it is filled.
        data = bytes(length)
        self._fill(region, offset, ffi.from_buffer(data), length)
        return data

    def _fill(self, region: Region, offset: int, target: Bytes, length: int) -> None:
        """Copy to ``target``, a cffi ``char *``, waiting for what is missing. Any thread."""
        asked, end = offset, offset + length
        if offset // self._block_size == (end - 1) // self._block_size:
            # Any touch asks for that much, and small reads are many.
            self._guarded(region, offset, target, length)
            return
        with self._reading(offset, length) as ask:
            for start in range(offset, end, READ_STEP):
                while asked < min(end, start + 2 * READ_STEP):
                    ask(asked, min(READ_STEP, end - asked))
                    asked += READ_STEP
                step = min(READ_STEP, end - start)
                self._guarded(region, start, ffi.addressof(target, start - offset), step)

    def _guarded(self, region: Region, offset: int, target: Bytes, length: int) -> None:
        result, where = guarded.copy(region.check_touchable(), offset, target, length)
        if result:
            self._raise_guarded(result, where)

    def _raise_guarded(self, result: int, where: int) -> None:
        if result == -errno.EBADF:
            raise ClosedError("the buffer was closed while a thread waited for it")
        if self._inherited:
            raise SourceError(
                f"byte {where} could not be read: its source failed, or the process that serves it"
                " has closed it or is gone",
                transient=False,
            )
        if result == -lib.AU_EHWPOISON:
            raise SourceError(
                f"byte {where} is lost, and what was written to its page: the hardware has a"
                " memory error there",
                transient=False,
                hint="`await buf.drop(offset, length, writes_too=True)` has it fetched again",
            )
        assert self._sink is not None
        cause = self._sink.failures.get(where // self._block_size)
        raise SourceError(
            f"byte {where} could not be read",
            transient=False,
            hint=f"`{self._fetch_again}` tries again",
        ) from cause

    def find(self, sub: bytes, start: int = 0, end: int | None = None) -> int:
        """The lowest index where ``sub`` is found in ``buf[start:end]``, or -1; as mmap.find.

        Fetches what it searches. Without the GIL; any thread; raises SourceError, and what signal
        handlers raise, as ``buf[...]`` does.
        """
        check_bytes(sub)
        start, stop, _ = slice(start, end).indices(len(self))
        if stop - start < len(sub):
            return -1
        if not sub:
            return start
        return self._search(self._touchable(), sub, start, stop)

    def _search(self, region: Region, sub: bytes, start: int, stop: int) -> int:
        # Not in a variable: the traceback of an error would keep the memory mapped.
        result, where, found = guarded.find(region.check_touchable(), start, stop - start, sub)
        if result:
            self._raise_guarded(result, where)
        return found

    def tensor(self, dtype: Any = "uint8", shape: Shape = None, offset: int = 0) -> Tensor:
        """A tensor of torch over the memory, as `array`. ``dtype`` is one of torch's or its name.

        torch knows no read-only memory. Unless the buffer is writable, an operation in place on the
        tensor, or on a view of it, ends the process by SIGSEGV: ``clone()`` first. So does a write
        into what ``tensor.numpy()`` gives; `array` gives one that refuses.
        """
        memory = self._touchable()._export() if self._size else self.view
        return tensor_over(memory, dtype, shape, offset)

    def file(self) -> BufferFile:
        """The buffer as a file: binary, read-only, seekable, at its start. Any thread.

        For libraries that want one (zipfile, Pillow, h5py, pandas, ...). Each call makes another,
        with a position of its own. An open file holds the memory, as a view does.
        """
        return BufferFile(self)

    @property
    def _failed(self) -> bool:
        """Whether there are pages whose source had failed, which `fetch` may heal."""
        region = self._region
        if region is None or region.closed or self._closed or self._pid != os.getpid():
            return False
        return region.poisoned_bytes > 0

    @contextmanager
    def _reading(self, offset: int, length: int) -> Iterator[Callable[[int, int], None]]:
        """Somebody reads this range in one go, and waits for it as a touch does. Gives a function
        that has a part of it brought, an offset and a length: all blocks at once instead of one
        after the other. It does not wait. Any thread."""
        mapping, size = self._mapping, self._block_size
        first, last = offset // size, (offset + length - 1) // size
        if (
            first == last  # as any touch
            or mapping is None
            or mapping.sink is None
            or isinstance(self._source, MemorySource)
        ):
            yield lambda offset, length: None
            return
        reads = mapping.sink.reads
        number = reads.begin(first, last)
        try:
            yield lambda offset, length: mapping.ask(
                offset // size, (offset + length - 1) // size, (first, last)
            )
        finally:
            reads.end(number)

    # ------------------------------------------------------------- coroutines

    def _range(self, offset: int, length: int | None) -> tuple[int, int]:
        size = len(self)
        offset = operator.index(offset)
        length = size - offset if length is None else operator.index(length)
        if offset < 0 or length < 0 or offset + length > size:
            raise UsageError(
                f"{length} bytes at {offset} are not within the {size} bytes of the buffer"
            )
        return offset, length

    async def fetch(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        progress: Progress = None,
    ) -> None:
        """Make bytes resident, so that touching them waits for nothing. All by default.

        ``progress(done, total)`` is called on the loop with numbers of bytes, at the end too; what
        it raises comes out of this call. True: a bar, where standard error is a terminal.
        Also heals pages whose source had failed. Raises SourceError (soft mode, or the source
        changed), UsageError, ClosedError. Cancelling it does not stop what is under way.
        """
        offset, length = self._range(offset, length)
        with reporting(progress, self._name, length) as report:
            if length:
                await self._fetch(offset, length, report)
            if report is not None:
                report(length, length)

    async def _fetch(
        self, offset: int, length: int, progress: Callable[[int, int], object] | None
    ) -> None:
        region = self._check()
        assert self._sink is not None
        if region.is_resident(offset, length):
            return
        size = self._block_size
        first, last = offset // size, (offset + length - 1) // size
        done = 0

        def landed(block: int) -> None:
            nonlocal done
            before, done = done, max(done, min(block * size - offset, length))
            if progress is not None and before < done < length:
                progress(done, length)

        while True:
            await self._sink.fetcher.fetch(first, last - first + 1, landed)
            if self._closed:
                raise ClosedError("the buffer is closed")
            if region.is_resident(offset, length):
                return
            # The rescue loop brings the rest.
            await asyncio.sleep(0.002)

    def read(self, offset: int = 0, length: int | None = None) -> Coroutine[Any, Any, bytes]:
        """Bytes, without ever faulting. To be awaited. Raises as `fetch`."""
        return Reading(self._read(offset, length))

    async def _read(self, offset: int, length: int | None) -> bytes:
        offset, length = self._range(offset, length)
        await self.fetch(offset, length)
        if length <= COPY_STEP:
            return self._copy_out(offset, length)
        data = bytes(length)
        await self._copy_steps(offset, ffi.from_buffer(data), length)
        return data

    async def readinto(self, offset: int, buffer: Any) -> int:
        """Fill a writable ``buffer`` from byte ``offset`` on; returns the count, less only at
        the end. Never faults. Raises as `fetch`."""
        with self._into(offset, buffer) as (target, length):
            await self.fetch(offset, length)
            await self._copy_steps(offset, target, length)
        return length

    @contextmanager
    def _into(self, offset: int, buffer: Any) -> Iterator[tuple[Bytes, int]]:
        """Where `readinto` writes, a cffi ``char *``, and how much."""
        if not 0 <= offset <= self._size:
            raise UsageError(f"offset {offset} is not within the {self._size} bytes of the buffer")
        # Released on the way out of an exception too: see `pin`.
        with ffi.from_buffer(buffer, require_writable=True) as target:
            yield target, min(len(target), self._size - offset)

    async def _copy_steps(self, offset: int, target: Bytes, length: int) -> None:
        for start in range(0, length, COPY_STEP):
            if start:
                await asyncio.sleep(0)
            step = min(COPY_STEP, length - start)
            self._guarded(self._check(), offset + start, ffi.addressof(target, start), step)

    async def prefetch(self, working_set: WorkingSet) -> bool:
        """Bring what a working set names, in its order, behind what threads wait for.

        Returns False if the source failed too often; a touch asks again for the rest. Raises
        SourceChangedError when the working set is of another version or size.
        """
        self._check()
        assert self._sink is not None
        why_not = working_set.difference(getattr(self._source, "version", None), self._size)
        if why_not is not None:
            raise SourceChangedError(why_not)
        return await self._sink.fetcher.prefetch(working_set.blocks(self._block_size))

    def _start_prefetch(self, working_set: WorkingSet) -> None:
        if self._sink is None or isinstance(self._source, MemorySource):
            return
        why_not = working_set.difference(getattr(self._source, "version", None), self._size)
        if why_not is not None:
            log.warning("%r: nothing is brought ahead: %s", self, why_not)
            return
        self._sink.prefetch(working_set.blocks(self._block_size))

    def advise(self, hint: Hint, offset: int = 0, length: int | None = None) -> None:
        """Say how bytes will be read, all by default, as posix_fadvise(2) does. Any thread.

        ``"sequential"``: in order, so that a window's worth is brought ahead from the first touch
        on, and nothing beyond the range. ``"random"``: nothing is brought ahead there.
        ``"normal"``: whatever touches look like. What is said last counts. For all whose
        blocks are in the range, at least in part; nothing is fetched yet (`fetch` does that), and
        ``readahead=0`` stays what it is. Raises UsageError, ClosedError.
        """
        if hint not in HINTS:
            raise UsageError(f"hint is one of {', '.join(map(repr, HINTS))}, not {hint!r}")
        offset, length = self._range(offset, length)
        if length:
            self._check()
            assert self._sink is not None
            size = self._block_size
            self._sink.advice.say(hint, offset // size, -(-(offset + length) // size))

    def record(self) -> Recording:
        """``with buf.record() as recording``: note which blocks are needed, in which order.

        Blocks that are resident already are not seen, so begin right after opening. Meanwhile
        there is no readahead, which would bring blocks unseen. `Recording.working_set` has the
        result, at any time. On the buffer's loop. Raises UsageError for a buffer over memory,
        whose blocks are served without anybody hearing of it, and while another one records.
        """
        self._check()
        assert self._sink is not None
        if isinstance(self._source, MemorySource):
            raise UsageError("cannot record a buffer over bytes in memory: nothing is ever fetched")
        blocks: dict[int, None] = {}
        recording = Recording(
            blocks,
            self._block_size,
            source=self._name,
            version=getattr(self._source, "version", None),
            size=self._size,
            stop=self._sink.stop_recording,
        )
        self._sink.record(blocks)
        return recording

    @property
    def _name(self) -> str:
        """What working sets call the source."""
        if isinstance(self._given, (str, Path)):
            return display_name(str(self._given))
        return type(self._source).__name__

    @asynccontextmanager
    async def pin(self, offset: int = 0, length: int | None = None) -> AsyncIterator[memoryview]:
        """``async with buf.pin(offset, length) as view``: resident, and stays so inside."""
        offset, length = self._range(offset, length)
        with self._pinned(offset, length):
            await self.fetch(offset, length)
            with self.view[offset : offset + length] as view:
                yield view

    @contextmanager
    def _pinned(self, offset: int, length: int) -> Iterator[None]:
        """Let nobody `drop` this range. Any thread."""
        key = object()
        self._pins[key] = offset, offset + length
        try:
            yield
        finally:
            del self._pins[key]

    async def save(
        self, path: str | os.PathLike[str], offset: int = 0, length: int | None = None
    ) -> int:
        """Write bytes to a file, all by default; returns how many.

        The file appears, or replaces another one, when it is complete and durable, and not before;
        an error or a cancellation leaves what was there. A symbolic link is followed; a device or a
        pipe is written to. Fetches what is missing, and holds at most some 16 MiB besides. Unlike
        ``file.write(buf.view)`` it needs no privileges. What the program wrote into the buffer is
        saved too.

        Raises as `fetch`, and OSError for the file.
        """
        from .saving import save

        offset, length = self._range(offset, length)
        if not self._open or self._size:
            self._check()
        await save(self, path, offset, length)
        return length

    async def drop(
        self, offset: int = 0, length: int | None = None, *, writes_too: bool = False
    ) -> int:
        """Give memory back, all by default: the next touch fetches anew. Returns its bytes.

        Only whole pages within the range, and none that is pinned. Views and arrays stay right,
        and wait again. UsageError for a writable buffer, unless ``writes_too`` says that what was
        written may be lost, and with ``fork="serve"``.
        """
        from .saving import check_droppable, drop

        offset, length = self._range(offset, length)
        if not length:
            return 0
        region = self._check()
        check_droppable(self, writes_too=writes_too)
        return await drop(region, offset, length, list(self._pins.values()))

    # ------------------------------------------------------------- looking at it

    def resident(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """``(start, stop)`` byte ranges that are resident, in order, merged. Any thread."""
        offset, length = self._range(offset, length)
        if not length:
            return []
        region = self._check()
        first = offset - offset % region.page_size
        return [
            (max(start, offset), min(start + count, offset + length))
            for start, count, state in region.runs(
                first, min(offset + length, region.mapped_length) - first
            )
            if state == "resident"
        ]

    @property
    def stats(self) -> BufferStats:
        """What the buffer did so far. Any thread."""
        tally, region, sink = self._tally, self._region, self._sink
        alive = region is not None and not region.closed and self._pid == os.getpid()
        return BufferStats(
            size=self._size,
            block_size=self._block_size,
            resident_bytes=min(self._size, region.resident_bytes) if alive and region else 0,
            poisoned_bytes=region.poisoned_bytes if alive and region else 0,
            fetched_bytes=tally.fetched_bytes,
            faulted_blocks=region.touched_blocks if alive and region else tally.faults,
            flights=tally.flights,
            in_flight=sink.fetcher.flights.in_flight if sink else 0,
            retries=tally.retries,
            failures=tally.failures,
            rescued=tally.rescued,
            children=sink.inheritance.children if alive and sink and sink.inheritance else 0,
            last_error=tally.last_error,
            latency=tuple(tally.seconds),
        )

    # ------------------------------------------------------------------- close

    async def aclose(self, *, force: bool = False) -> None:
        """Done with the methods: coroutines and calls that wait raise ClosedError. Idempotent.

        Ends what nobody needs, and waits for that: fetches are cancelled, the source is closed, the
        memory is unmapped. Memory that a view or an array still holds goes on being served, by this
        loop or after it by the rescue loop, and threads that wait get their bytes; then this
        returns at once, the last one to let go ends the rest, and `drained` waits for it. With
        ``force`` all ends now: what is missing raises SIGBUS (EFAULT in system calls), for threads
        that wait as well; never zeros.

        One operation for all who ask, which goes on when they are cancelled. On the loop that
        opened the buffer, or any if that is closed. Raises what closing the source raises, when
        everything else is done, and UsageError on a wrong loop.
        """
        if self._pid == os.getpid() and self._mapping is not None:
            self._mapping.check_loop()
        self._closed = True
        self._forced = self._forced or force
        if self._pid != os.getpid():
            return
        await self._closing(self._close)
        if force and self._mapping is not None:
            await self._mapping.finish()

    async def _close(self) -> None:
        try:
            await self._opening.stop()
            mapping = self._mapping
            if mapping is None:
                return
            if not self._forced and mapping.sink is not None:
                await mapping.sink.settle()
            if self._forced or not mapping.held:
                await mapping.finish()
        finally:
            # Also when all tasks were cancelled, that of `finish` before its first step too.
            if self._mapping is not None:
                self._mapping.close(force=self._forced)
                self._mapping.dismiss()

    async def drained(self) -> None:
        """Wait until the buffer was closed and nobody holds its memory any more. Any loop."""
        if self._mapping is not None:
            await self._mapping.ended()

    def __del__(self) -> None:
        mapping = getattr(self, "_mapping", None)
        if mapping is None or self._closed or self._pid != os.getpid():
            return
        try:
            warnings.warn(
                f"unclosed {self!r}; use {self._end_with}",
                ResourceWarning,
                source=self,
                stacklevel=1,
            )
        finally:  # a filter may make it an error
            self._closed = True
            mapping.close()

    def __reduce__(self) -> Any:
        """Pickles as URL or path and settings. The copy is opened anew: the very same object, or
        SourceChangedError. TypeError for what has neither URL nor path."""
        if self._place is None:
            raise TypeError(
                f"a lazy buffer over {type(self._given).__name__} cannot be pickled; "
                "open it by URL or path"
            )
        named, seen = Pinned.of(self._object), Pinned.of(self._source)
        pinned = Pinned(named.key, seen.version, seen.size)
        if self._expected is not None and not self._open:
            pinned = self._expected  # it was unpickled and never opened
        return _reopen, (self._place, {**self._settings, "prefetch": self._prefetch}, pinned)

    @property
    def _state(self) -> str:
        return "closed" if self._closed else "open" if self._region is not None else "not open"

    def __repr__(self) -> str:
        return f"<{self._called} {self._name} {self._size} bytes, {self._state}>"

    def _repr_html_(self) -> str:
        """For notebooks: which parts are resident. Touches nothing."""
        resident: list[tuple[int, int]] = []
        with suppress(ClosedError, UsageError):
            resident = self.resident()
        return html_of(self._called, self._name, self._size, self._state, resident)


def _absolute(source: Any) -> Any:
    """A URL, or the absolute path of a file; None for anything else."""
    if isinstance(source, str) and scheme_of(source) is not None:
        return source
    return os.path.abspath(source) if isinstance(source, (str, os.PathLike)) else None


def _reopen(given: Any, settings: dict[str, Any], pinned: Pinned) -> LazyBuffer:
    buffer = open(given, **settings)
    buffer._expected = pinned
    return buffer
