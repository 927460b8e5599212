"""What a source is: the contract, defaults for its optional parts, and checks on its answers.

A source is where the bytes of a lazily filled buffer come from. Two methods and a size are enough::

    class Zeros:
        size = 1 << 30
        async def read(self, offset: int, length: int) -> bytes:
            return bytes(length)
        def clone(self) -> "Zeros":
            return Zeros()

Everything else is optional. The functions at the end of this module call the optional
methods where they exist and do the plain thing where they do not.
"""

from __future__ import annotations

import asyncio
import inspect
import operator
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from ..errors import KernelError, ShortReadError, SourceError, UsageError
from ..util.unwatched import Unwatched
from ..util.usercode import describe, ends_the_program, is_ours

__all__ = [
    "BaseSource",
    "Buffer",
    "Source",
    "SourcePermissionError",
    "aclose_source",
    "as_source_error",
    "check_holes",
    "check_length",
    "check_range",
    "clone_source",
    "holes_in_source",
    "open_source",
    "own_method",
    "read_into_source",
    "size_of_source",
    "stream_source",
]

T = TypeVar("T")

# ``collections.abc.Buffer`` came with Python 3.12. A source may also return any
# other object with a contiguous buffer (an array, an ``obstore.Bytes``).
Buffer: TypeAlias = bytes | bytearray | memoryview

#: Chunks without a byte in a row, after which a stream counts as broken.
EMPTY_CHUNKS = 100


class SourcePermissionError(SourceError, PermissionError):
    """The source refused access (HTTP 401, 403, 407). Also a PermissionError. Not transient."""


@runtime_checkable
class Source(Protocol):
    """Where bytes come from. Required: ``size``, ``read`` and ``clone``.

    **Loops and threads.** An instance belongs to the event loop on which it was opened (or
    first read), and all its coroutines run there. Many reads are in flight at a time, in any
    order and overlapping. ``clone()`` alone may be called from any thread. A source must not
    use the loop's default executor: its threads may all be waiting for pages of the very
    buffer which this source fills. Nor may it touch that buffer.

    **Version.** All bytes of an open source are of one version of the object. A source that
    can see a change raises ``SourceChangedError``, and never mixes two versions.

    **Errors.** ``SourceError`` with ``transient=True`` when asking again may help (connection
    lost, timeout, 503), with ``retry_after`` in seconds if the source was told; with
    ``transient=False`` when it cannot (access denied, object gone). ``SourceChangedError``
    when the object is another version, ``ShortReadError`` for a wrong number of bytes,
    ``RangeNotSupportedError`` when parts cannot be read, ``UsageError`` for a range outside
    the object, ``ClosedError`` after ``aclose()``. Sources do not retry; the failure policy
    of the buffer does. Of other exceptions those of connections (``ConnectionError``,
    ``TimeoutError``, ``asyncio.IncompleteReadError``) count as transient and all others as not:
    also a ``CancelledError``, if nobody has cancelled the read. See `as_source_error`.
    ``KeyboardInterrupt`` and ``SystemExit`` end the program on its main thread, and are errors
    like any other elsewhere.

    **Cancellation.** Every coroutine may be cancelled at any await. After that the source
    must be usable for other reads, and nothing may write to a buffer given to ``read_into``.

    **Optional methods**, looked for by name:

    ``async open() -> None``
        Called once, before anything else, on the loop that will read. Sets ``size`` and
        ``version``. Raises ``FileNotFoundError`` or ``PermissionError`` (or a SourceError)
        as fits; after a failure it may be called again and needs no ``aclose()``.
    ``async aclose() -> None``
        Frees everything. Reads still in flight finish or raise ``ClosedError``. Idempotent.
    ``version: str | None``
        Names the version that is pinned, for people and for comparison; None if unknown.
    ``async read_into(offset, buffer) -> None``
        As ``read`` of ``len(buffer)`` bytes, straight into ``buffer`` (a writable,
        contiguous memoryview of bytes). After an exception its contents are undefined. A number
        that it returns nevertheless is the count of bytes, and has to be all of them.
    ``stream(offset, length) -> AsyncIterator[Buffer]``
        Yields the range in order, in chunks of any size above zero, so that a large range
        can be installed while it arrives. ``length`` bytes in all, or an exception; chunks
        yielded before the exception are right. Close it (``contextlib.aclosing``) when
        leaving early.
    ``async holes(offset, length) -> Sequence[tuple[int, int]]``
        ``(offset, length)`` of ranges within the given one that are known to read as zeros, in
        order and apart. They are then not read at all. A hint: what is not named may be zeros
        too, and a source that would have to ask for long names nothing.
    ``begin_read(offset, buffer, done) -> Request | None``
        As ``read_into``, for small reads without a task or a future: starts it, and calls
        ``done(None)`` or ``done(error)`` from the loop later, once, and never before it has
        returned. ``Request.cancel()``: ``done`` is not called and nothing is written to ``buffer``
        any more. None if this one needs ``read_into``, or may be a hole.
    ``read_now(offset, length) -> Buffer | None``
        As ``read`` if the bytes are at hand, None if they would have to be waited for.
    ``async write(offset, data) -> None`` and ``async flush() -> None``
        For write-back: ``write`` takes a copy or finishes with ``data`` before it returns. One
        that was cancelled never lands after a newer one to the same place.
        ``flush``: what was written and acknowledged before the call is as durable as the source
        can make it, or FlushError. A flush that failed is never tried again into success, nor is
        one believed whose server is not the one that acknowledged: later flushes fail too, until
        what is in doubt was written again (`aiouffd.sources.durability` keeps the account).
        ``writable``, if there is such an attribute, says whether it was opened for that.
    ``async write_zeros(offset, length, *, hole) -> None``
        As ``write`` of zeros; with ``hole`` the space may be given back.
    ``async trim(offset, length) -> None``
        What is read there is undefined from now on, and the space may be given back.
    ``minimum_block: int``
        Bytes, a power of two: writes of whole blocks are one step for other writers too.
    """

    @property
    def size(self) -> int:
        """Length of the object in bytes; constant, and known once ``open()`` has returned."""
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """Return the ``length`` bytes at byte ``offset``.

        Exactly ``length`` bytes; a caller never asks past ``size``. The caller does not
        change the result, and the source does not change it after returning it.
        """
        ...

    def clone(self) -> Source:
        """Return an equal source, unopened, for another event loop.

        If this one was opened, the clone is pinned to the same version, and raises
        ``SourceChangedError`` from ``open()`` or from its reads if the object is another
        one by then. The clone shares no loop-bound state and outlives the original.
        Raises ``UnsupportedError`` when the source cannot work on a second loop.
        """
        ...


class BaseSource:
    """Defaults for the optional methods of `Source`; ``size``, ``read`` and ``clone`` are yours."""

    version: str | None = None

    @property
    def size(self) -> int:
        raise NotImplementedError

    async def open(self) -> None:
        """Nothing to open."""

    async def aclose(self) -> None:
        """Nothing to close."""

    async def read(self, offset: int, length: int) -> Buffer:
        raise NotImplementedError

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read ``len(buffer)`` bytes at byte ``offset`` into ``buffer``."""
        buffer[:] = check_length(await self.read(offset, len(buffer)), len(buffer), offset=offset)

    async def stream(self, offset: int, length: int) -> AsyncGenerator[Buffer, None]:
        """Yield ``length`` bytes at byte ``offset`` in order."""
        if length:
            yield await self.read(offset, length)

    async def holes(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """Ranges of ``length`` bytes at byte ``offset`` that read as zeros; none are known."""
        return ()

    def clone(self) -> Source:
        raise NotImplementedError


def as_source_error(failure: BaseException) -> SourceError:
    """What a source has raised, as a SourceError; ``failure`` itself if it is one.

    Transient where a connection was lost or silent: ConnectionError, TimeoutError (which is what
    socket.timeout and asyncio.TimeoutError are), asyncio.IncompleteReadError; and KernelError,
    which comes from putting the bytes where they belong. A BaseException is to be passed only if
    it is not for whoever awaits: see `usercode.is_ours`. Never raises, whatever it is given.
    """
    if isinstance(failure, SourceError) and _is_whole(failure):
        return failure
    error = SourceError(
        f"the source failed: {describe(failure)}",
        transient=isinstance(failure, _TRANSIENT),
        errno=getattr(failure, "errno", None) if isinstance(failure, OSError) else None,
    )
    error.__cause__ = failure
    return error


_TRANSIENT = (ConnectionError, TimeoutError, asyncio.IncompleteReadError, KernelError)


def _is_whole(error: SourceError) -> bool:
    """Whether it can be used as one: classes derived from it may have forgotten ours."""
    try:
        str(error)
        return isinstance(error.transient, bool) and (
            error.retry_after is None or isinstance(error.retry_after, float | int)
        )
    except Exception:
        return False


async def _answer(awaitable: Awaitable[T]) -> T:
    """Await what a source has given. What is no Exception, and is not for us, becomes one."""
    task = asyncio.current_task()
    try:
        return await awaitable
    except Exception:
        raise
    except BaseException as failure:
        if is_ours(failure, task):
            raise
        raise as_source_error(failure) from failure


def check_range(offset: int, length: int, size: int) -> None:
    """Raise UsageError unless ``offset`` and ``length`` (bytes) lie within ``size``."""
    if offset < 0 or length < 0 or offset + length > size:
        raise UsageError(
            f"range of {length} bytes at offset {offset} is not within the {size} bytes"
            " of this source"
        )


def check_length(data: object, length: int, *, offset: int = 0) -> memoryview:
    """Return what a source's ``read`` gave as a flat memoryview of ``length`` bytes, uncopied.

    ``offset`` (bytes) is for the message only. Raises ShortReadError (transient) when ``data``
    has another length, and UsageError when it is not a contiguous buffer.
    """
    view = _flat(data)
    if view.nbytes != length:
        raise ShortReadError(
            f"a source returned {view.nbytes} bytes where {length} bytes at offset {offset}"
            " were asked for"
        )
    return view


def _flat(data: object) -> memoryview:
    try:
        view = memoryview(data)  # type: ignore[arg-type]
        if not view.c_contiguous:
            raise TypeError
        return view if view.format == "B" and view.ndim == 1 else view.cast("B")
    except TypeError as exc:
        raise UsageError(
            f"a source returned {type(data).__name__}, which is not a contiguous buffer",
            hint="return bytes, a bytearray or a memoryview from read()",
        ) from exc


def check_holes(found: object, offset: int, length: int) -> tuple[tuple[int, int], ...]:
    """What a source's ``holes`` gave for ``length`` bytes at ``offset``, cut to these.

    Raises UsageError for what is no series of ranges in order and apart.
    """
    holes: list[tuple[int, int]] = []
    end = offset + length
    after = 0
    try:
        for first, count in found:  # type: ignore[attr-defined]
            start, stop = operator.index(first), operator.index(first) + operator.index(count)
            if start < after or stop <= start:
                raise ValueError(f"{count} bytes at {first} after byte {after}")
            after = stop
            if start >= end:
                break  # it may be endless
            if stop > offset:
                holes.append((max(start, offset), min(stop, end) - max(start, offset)))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"holes() of a source gave {type(found).__name__}, which is no series of ranges in"
            f" order: {error}",
            hint="return pairs of offset and length in bytes, in order and apart",
        ) from error
    return tuple(holes)


async def open_source(source: Source) -> None:
    """Call ``source.open()`` if it has one. Raises what that raises."""
    method = getattr(source, "open", None)
    if method is not None:
        await _answer(method())


async def aclose_source(source: Source) -> None:
    """Call ``source.aclose()`` if it has one. Raises what that raises."""
    method = getattr(source, "aclose", None)
    if method is not None:
        await _answer(method())


def size_of_source(source: Source) -> int:
    """The length of an open source in bytes. UsageError if it has no usable one."""
    size: object = source.size
    try:
        number = operator.index(size)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(
            f"the size of {type(source).__name__} is {size!r}",
            hint="a source has its length in bytes as `size`, from the end of open() on",
        )
    return number


def clone_source(source: Source) -> Source:
    """``source.clone()``. Raises what that raises, and UsageError if it gave no source."""
    try:
        clone: object = source.clone()
    except Exception:
        raise
    except BaseException as failure:
        if ends_the_program(failure):
            raise
        raise as_source_error(failure) from failure
    # Not the protocol: asking that for the size of what is not open yet may raise.
    if not callable(getattr(clone, "read", None)) or not callable(getattr(clone, "clone", None)):
        raise UsageError(
            f"clone() of {type(source).__name__} gave {type(clone).__name__}, which is no source",
            hint="return an equal source that another event loop may open",
        )
    return clone  # type: ignore[return-value]


def own_method(source: Source, name: str) -> Any:
    """An optional method that does more than the default of `BaseSource`, or None."""
    if getattr(type(source), name, None) is getattr(BaseSource, name, None):
        return None
    return getattr(source, name, None)


async def holes_in_source(source: Source, offset: int, length: int) -> Sequence[tuple[int, int]]:
    """Call ``source.holes()`` if it has one: ranges known to read as zeros."""
    method = own_method(source, "holes")
    if method is None:
        return ()
    return check_holes(await _answer(method(offset, length)), offset, length)


async def read_into_source(source: Source, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with the bytes at ``offset``: by ``read_into``, else ``read`` and a copy."""
    method = getattr(source, "read_into", None)
    length = len(buffer)
    if method is not None:
        count = await _answer(method(offset, buffer))
        if isinstance(count, int) and not isinstance(count, bool) and count != length:
            raise ShortReadError(
                f"a source read {count} bytes where {length} bytes at offset {offset}"
                " were asked for"
            )
    else:
        data = await _answer(source.read(offset, length))
        buffer[:] = check_length(data, length, offset=offset)


async def stream_source(
    source: Source, offset: int, length: int
) -> AsyncGenerator[memoryview, None]:
    """Yield ``length`` bytes at byte ``offset`` in order, as flat memoryviews, none of them empty.

    Uses the source's ``stream`` if it has one, else one ``read``. Raises ShortReadError when
    the source ends early, and before it would yield more than ``length`` bytes. Close it
    (``contextlib.aclosing``) when leaving early; the source's own stream is closed with it.
    """
    method = getattr(source, "stream", None)
    if method is None:
        if length:
            data = await _answer(source.read(offset, length))
            yield check_length(data, length, offset=offset)
        return
    done = empty = 0
    chunks = method(offset, length)
    if inspect.iscoroutine(chunks):
        chunks.close()
        raise UsageError(
            f"stream() of {type(source).__name__} is a coroutine",
            hint="`yield` its chunks, or return an async iterator from a plain function",
        )
    chunks = Unwatched(chunks)
    try:
        async for chunk in chunks:
            view = _flat(chunk)
            if not view.nbytes:
                empty += 1
                if empty > EMPTY_CHUNKS:
                    raise ShortReadError(
                        "a source streamed chunks without a byte, one after another"
                    )
                continue
            empty = 0
            done += view.nbytes
            if done > length:
                raise ShortReadError(f"a source streamed more than the {length} bytes asked for")
            yield view
        if done != length:
            raise ShortReadError(
                f"a source streamed {done} bytes where {length} bytes at offset {offset}"
                " were asked for"
            )
    finally:
        await chunks.aclose()
