"""Working sets: which parts of an object a program needs, in which order.

Recorded once (`LazyBuffer.record`, ``aiouffd record``), they are brought ahead the next time
(``aiouffd.open(..., prefetch=)``), so that the program finds them there and waits for none.

A file of one begins with two lines of text::

    aiouffd working set 1
    {"source": ..., "version": ..., "size": ..., "ranges": ..., "bytes": ..., "crc32": ...}

``source`` is what people call the object, without password and query; ``version`` is the source's
(null if it knows none) and ``size`` its length in bytes: of another object the working set is
stale. Then follow, compressed by zlib, ``ranges`` pairs of integers: the distance from the
end of the range before (from 0 for the first) to the beginning of this one, and its length, both
in bytes. They are in the order in which they were first needed, and apart. Each integer
is seven bits per byte, the lowest first, with the highest bit set in all bytes but the last;
distances are stored as ``2 * n``, or ``-2 * n - 1`` if they are negative. ``bytes`` is the sum of
all lengths, and ``crc32`` is that of the pairs before compression.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import islice, pairwise
from typing import Any, Self

from ..errors import UsageError
from ..util.places import replace_file
from ..util.ranges import Ranges

__all__ = ["Recording", "WorkingSet"]

_MAGIC = b"aiouffd working set 1\n"
#: Longest header of a file, in bytes; most ranges (a recording of more is kept in larger pieces);
#: longest pair of integers as it is stored.
_HEAD_MAX, RANGES_MAX, _PAIR_MAX = 64 * 1024, 1 << 18, 20
#: Bytes of ranges that are decompressed at a time.
_PIECE = 64 * 1024
#: Largest object, in bytes.
_SIZE_MAX = (1 << 63) - 1
#: Ranges that count as needed at the same time.
_TOGETHER = 64


class WorkingSet:
    """Ranges of bytes of one version of an object, in the order of their first use.

    Immutable. ``ranges`` are pairs of offset and length in bytes; what is named twice counts once,
    where it came first. Raises UsageError for ranges outside of ``size``, and for more than
    262,144 ranges that are apart.
    """

    def __init__(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        size: int,
        version: str | None = None,
        source: str = "",
    ) -> None:
        self._ranges = tuple(_apart(ranges, size))
        if len(self._ranges) > RANGES_MAX:
            raise UsageError(
                f"a working set has at most {RANGES_MAX} ranges, and this has {len(self._ranges)}",
                hint="join ranges that are close together: what is brought in vain costs little",
            )
        self._size = size
        self._version = version
        self._source = source

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Offsets and lengths in bytes, apart, in order of first use."""
        return self._ranges

    @property
    def total(self) -> int:
        """Total length of all ranges, in bytes."""
        return sum(length for _, length in self._ranges)

    @property
    def size(self) -> int:
        """Length of the object in bytes."""
        return self._size

    @property
    def version(self) -> str | None:
        """The version of the object, None if the source knew none."""
        return self._version

    @property
    def source(self) -> str:
        """Display name: without credentials and query."""
        return self._source

    def __repr__(self) -> str:
        return f"<WorkingSet of {self.total} bytes in {len(self._ranges)} ranges of {self._source}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkingSet) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self._ranges, self._size, self._version

    def is_stale(self, version: str | None, size: int) -> bool:
        """Whether this is of another version of the object. Without versions the size tells."""
        if size != self._size:
            return True
        return None not in (version, self._version) and version != self._version

    def difference(self, version: str | None, size: int) -> str | None:
        """Why this is of no use for an object of that version and ``size`` bytes, for people; None
        if it is of use."""
        if not self.is_stale(version, size):
            return None
        ours = f"version {self._version} with {self._size} bytes"
        theirs = f"version {version} with {size} bytes"
        text = f"the working set was recorded of {ours}, and the source is at {theirs}"
        if size == self._size:
            text += (
                '; if that is a copy with the same contents, say so: prefetch_version="any",'
                " --prefetch-any-version, or WorkingSet.for_copies()"
            )
        return text

    def for_copies(self) -> WorkingSet:
        """The same for every object of this size, whatever its version: for copies of the object
        in other places, where versions have other names. Only what is brought ahead depends on
        it; an object with other contents is read right, with other parts of it brought in vain.
        """
        return WorkingSet._of(self._ranges, size=self._size, version=None, source=self._source)

    @classmethod
    def _of(
        cls,
        ranges: tuple[tuple[int, int], ...],
        *,
        size: int,
        version: str | None,
        source: str,
    ) -> Self:
        """Of ranges that are known to be apart."""
        found = cls((), size=size, version=version, source=source)
        found._ranges = ranges
        return found

    def blocks(self, block_size: int) -> Iterator[tuple[int, int]]:
        """First and count of blocks of ``block_size`` bytes, in an order to fetch them in; some
        may come twice.

        That of first use, but for neighbours that were needed at about the same time: these come
        together, because one request for both costs the source's latency once.
        """
        left = iter(self._ranges)
        while ranges := list(islice(left, _TOGETHER)):
            runs: list[tuple[int, int]] = []
            for offset, length in sorted(ranges):
                first, end = offset // block_size, -(-(offset + length) // block_size)
                if runs and sum(runs[-1]) >= first:
                    runs[-1] = (runs[-1][0], max(sum(runs[-1]), end) - runs[-1][0])
                else:
                    runs.append((first, end - first))
            yield from runs

    # ------------------------------------------------------------- set operations

    def union(self, other: WorkingSet) -> WorkingSet:
        """What is in either: first this one's in its order, then what the other adds."""
        self._check_same(other)
        return self._with([*self._ranges, *other._ranges], other)

    def intersection(self, other: WorkingSet) -> WorkingSet:
        """What is in both, in the order of this one."""
        self._check_same(other)
        others = Ranges()
        for offset, length in sorted(other._ranges):
            others.add(offset, offset + length)
        parts = (
            part
            for offset, length in self._ranges
            for part in others.within(offset, offset + length)
        )
        return self._with(parts, other)

    __or__ = union
    __and__ = intersection

    def _with(self, ranges: Iterable[tuple[int, int]], other: WorkingSet) -> WorkingSet:
        # If only one of them knows the version, what comes of both is not to be taken for any.
        version = other._version if self._version is None else self._version
        return WorkingSet(ranges, size=self._size, version=version, source=self._source)

    def _check_same(self, other: WorkingSet) -> None:
        if self.is_stale(other._version, other._size):
            raise UsageError(
                f"these working sets are of different versions: {self._version} with"
                f" {self._size} bytes, and {other._version} with {other._size}"
            )

    # ---------------------------------------------------------------------- files

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        body = bytearray()
        end = 0
        for offset, length in self._ranges:
            distance = offset - end
            _put(body, 2 * distance if distance >= 0 else -2 * distance - 1)
            _put(body, length)
            end = offset + length
        head = {
            "source": self._source,
            "version": self._version,
            "size": self._size,
            "ranges": len(self._ranges),
            "bytes": self.total,
            "crc32": zlib.crc32(body),
        }
        return _MAGIC + json.dumps(head).encode() + b"\n" + zlib.compress(body, 6)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` gave. Raises UsageError for anything else."""
        if not data.startswith(_MAGIC):
            raise UsageError("this is not a working set")
        line = data[len(_MAGIC) : len(_MAGIC) + _HEAD_MAX].partition(b"\n")[0]
        try:
            head = json.loads(line)
            size, count, version = head["size"], head["ranges"], head["version"]
            numbers = (size, count, head["bytes"], head["crc32"])
            if not all(type(number) is int and 0 <= number <= _SIZE_MAX for number in numbers):
                raise ValueError("a number is not one")
            if count > RANGES_MAX:
                raise ValueError(f"it has {count} ranges, of which {RANGES_MAX} are allowed")
            if version is not None and not isinstance(version, str):
                raise ValueError("the version is not text")
            body = memoryview(data)[len(_MAGIC) + len(line) + 1 :]
            ranges = _decode(body, count, size, head["crc32"])
            if sum(length for _, length in ranges) != head["bytes"]:
                raise ValueError("its ranges are others")
            return cls._of(ranges, size=size, version=version, source=str(head["source"]))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, zlib.error) as error:
            raise UsageError(f"this is no usable working set: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; it appears complete or not at all. Raises OSError."""
        replace_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file. Raises OSError, and UsageError if it is not a working set."""
        most = len(_MAGIC) + _HEAD_MAX + RANGES_MAX * _PAIR_MAX + _PIECE
        with open(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise UsageError(f"a working set has at most {most} bytes, and {path} has more")
        return cls.from_bytes(data)


def _decode(data: memoryview, count: int, size: int, crc: int) -> tuple[tuple[int, int], ...]:
    """The ranges of a file. A small one can hold very many, so it is read piece by piece, to no
    more than it says that there are. Raises ValueError unless they are apart."""
    inflate = zlib.decompressobj()
    ranges: list[tuple[int, int]] = []
    left, end, rest, found = bytes(data), 0, b"", 0
    while not inflate.eof:
        piece = inflate.decompress(left, _PIECE)
        if not piece and not inflate.eof:
            raise ValueError("it was cut short")
        left, found = inflate.unconsumed_tail, zlib.crc32(piece, found)
        rest = _take_pairs(rest + piece, ranges, end)
        if len(ranges) > count:
            raise ValueError("it has more ranges than it says")
        end = sum(ranges[-1]) if ranges else 0
    if rest or inflate.unused_data or len(ranges) != count or found != crc:
        raise ValueError("it is damaged")
    # In the order of use neighbours would be one, and in that of place none may overlap.
    touching = any(sum(one) == other[0] for one, other in pairwise(ranges))
    overlapping = any(sum(one) > other[0] for one, other in pairwise(sorted(ranges)))
    if touching or overlapping:
        raise ValueError("its ranges are not apart")
    if any(offset < 0 or offset + length > size for offset, length in ranges):
        raise ValueError(f"its ranges are not within {size} bytes")
    return tuple(ranges)


def _apart(ranges: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The same bytes in the same order, none of them twice."""
    given = []
    for number, (offset, length) in enumerate(ranges):
        if offset < 0 or length < 0 or offset + length > size:
            raise UsageError(f"{length} bytes at {offset} are not within an object of {size} bytes")
        given.append((offset, offset + length, number))
    # From left to right: each byte is the first range's of those that have it. (There may be
    # millions of ranges, so looking each up among those before is too slow.)
    given.sort()
    having: list[tuple[int, int]] = []
    pieces: list[tuple[int, int, int]] = []
    at = 0
    for start, end, number in [*given, (size, size, -1)]:
        while having and at < start:
            first, stop = having[0]
            if stop > at:
                pieces.append((first, at, min(stop, start)))
                at = min(stop, start)
            else:
                heappop(having)
        at = start
        heappush(having, (number, end))
    pieces.sort()
    found: list[tuple[int, int]] = []
    for _, start, end in pieces:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, end - start))
    return found


def _put(target: bytearray, number: int) -> None:
    while number > 127:
        target.append(number & 127 | 128)
        number >>= 7
    target.append(number)


def _take_pairs(data: bytes, ranges: list[tuple[int, int]], end: int) -> bytes:
    """Append the ranges in ``data``, of which the one before ended at byte ``end``; returns what
    is left of an incomplete pair."""
    at = 0
    while True:
        start = at
        pair = [0, 0]
        for number in (0, 1):
            shift = 0
            while True:
                if at == len(data):
                    return data[start:]
                byte = data[at]
                at += 1
                pair[number] |= (byte & 127) << shift
                if byte < 128:
                    break
                shift += 7
                if shift > 63:
                    raise ValueError("a number is too long")
        distance, length = pair
        if not length:
            raise ValueError("a range is empty")
        offset = end + (-(distance + 1) // 2 if distance & 1 else distance // 2)
        end = offset + length
        ranges.append((offset, length))


class Recording:
    """What was needed since `LazyBuffer.record`; a context manager that stops at its end."""

    def __init__(
        self,
        blocks: dict[int, None],
        block_size: int,
        *,
        source: str,
        version: str | None,
        size: int,
        stop: Callable[[], None],
    ) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._source, self._version, self._size = source, version, size
        self._stop: Callable[[], None] | None = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Record nothing more. Idempotent."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    def working_set(self) -> WorkingSet:
        """What was recorded so far, in whole blocks, or if those are too many in larger pieces.
        Any thread."""
        size = self._block_size
        # One step for other threads, as far as the interpreter is concerned.
        blocks = list(self._blocks)
        while len(blocks) > RANGES_MAX and _pieces(blocks) > RANGES_MAX:
            size *= 2
            blocks = list(dict.fromkeys(block // 2 for block in blocks))
        return WorkingSet(
            ((block * size, min(size, self._size - block * size)) for block in blocks),
            size=self._size,
            version=self._version,
            source=self._source,
        )


def _pieces(blocks: list[int]) -> int:
    """How many ranges they make, in their order."""
    return 1 + sum(other != one + 1 for one, other in pairwise(blocks))
