"""Names to arrays over lazy buffers: what the files of several formats are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from ..buffers.buffer import LazyBuffer
from ..buffers.sync import SyncBuffer
from ..kernel.lib import PAGE_SIZE

__all__ = ["Fetching", "Named", "Place", "SyncFetching"]


class Place(Protocol):
    """Where an array's bytes are in its buffer."""

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...


#: What there is by name, and what is known of each.
T = TypeVar("T")
P = TypeVar("P", bound=Place)


class Named(Mapping[str, T], Generic[T, P]):
    """A mapping that makes its values of a buffer's memory. Immutable; any thread."""

    def __init__(self, info: Mapping[str, P], buffers: Mapping[str, Any]) -> None:
        """``buffers`` has the buffer of each name in ``info``."""
        self._info = MappingProxyType(dict(info))
        self._buffers = buffers

    @property
    def info(self) -> Mapping[str, P]:
        """What the file says of each, by name: kind, shape, place."""
        return self._info

    def __iter__(self) -> Iterator[str]:
        return iter(self._info)

    def __len__(self) -> int:
        return len(self._info)

    def __contains__(self, name: object) -> bool:
        return name in self._info

    # Those of Mapping would compare the arrays, and fetch everything for it.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        total = sum(place.length for place in self._info.values())
        return f"<{type(self).__name__}: {len(self)} {self._what}, {total} bytes>"

    _what = "arrays"

    def _runs(self, names: tuple[str, ...]) -> list[tuple[Any, int, int]]:
        """Buffer, offset and length of what holds them: neighbours together."""
        places = sorted(
            ((self._buffers[name], self._info[name]) for name in set(names)),
            key=lambda place: (id(place[0]), place[1].offset, place[1].length),
        )
        runs: list[tuple[Any, int, int]] = []
        for buffer, info in places:
            last = runs[-1] if runs else (None, 0, 0)
            # Or nearly: padding lies in a page that is fetched anyway.
            if last[0] is buffer and info.offset - sum(last[1:]) < PAGE_SIZE:
                end = max(sum(last[1:]), info.offset + info.length)
                runs[-1] = (buffer, last[1], end - last[1])
            else:
                runs.append((buffer, info.offset, info.length))
        return runs


class Fetching(Named[T, P]):
    """Over buffers of `aiouffd.open`."""

    def buffer(self, name: str) -> LazyBuffer:
        """The buffer that it lies in, for `LazyBuffer.pin` and such. Raises KeyError."""
        buffer: LazyBuffer = self._buffers[name]
        return buffer

    async def fetch(self, *names: str) -> None:
        """Make arrays resident, so that touching them waits for nothing; all at once.

        On the buffer's loop. Raises KeyError for unknown names before anything is fetched, and
        what `LazyBuffer.fetch` raises.
        """
        await _fetch(self._runs(names))


class SyncFetching(Named[T, P]):
    """Over buffers of `aiouffd.sync`."""

    def buffer(self, name: str) -> SyncBuffer:
        """See `Fetching.buffer`."""
        buffer: SyncBuffer = self._buffers[name]
        return buffer

    def fetch(self, *names: str) -> None:
        """See `Fetching.fetch`; blocks."""
        runs = self._runs(names)
        if runs:
            runs[0][0]._run(_fetch([(buffer._buffer, *place) for buffer, *place in runs]))


async def _fetch(runs: list[tuple[LazyBuffer, int, int]]) -> None:
    await asyncio.gather(*(buffer.fetch(offset, length) for buffer, offset, length in runs))
