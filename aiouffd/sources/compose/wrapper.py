"""What sources around one other source have in common."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError
from .. import as_source
from ..base import Buffer, Source, aclose_source, check_length, open_source, own_method
from ..lifecycle import Life, contained, give_back

__all__ = ["Wrapper", "fresh"]


def fresh(source: Source) -> Source:
    """What is to be opened after ``source`` was closed, which cannot be opened again: a clone, if
    there can be one."""
    try:
        return source.clone()
    except UnsupportedError:
        return source


class Wrapper:
    """A source that is another one, so far: a base for those that change something about it.

    Optional methods exist if the inner source has them: a subclass says what it does about
    each by the underscored name (``_stream`` for ``stream``). Not a `BaseSource`, whose
    defaults would hide what the inner source cannot do.
    """

    def __init__(self, source: Any, **options: Any) -> None:
        self._inner: Source = as_source(source, **options)
        self._life = Life(f"the {type(self).__name__}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._inner!r}>"

    @property
    def inner(self) -> Source:
        """What this is around."""
        return self._inner

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._inner.size

    @property
    def version(self) -> str | None:
        """The version that is pinned, None if unknown."""
        return getattr(self._inner, "version", None)

    @property
    def writable(self) -> bool:
        """Whether ``write`` may work."""
        return bool(getattr(self._inner, "writable", False))

    async def open(self) -> None:
        """Open what is inside. Raises what that raises; shared by all who call it at a time."""
        await self._life.open(self._open, self._take_back)

    async def aclose(self) -> None:
        """Close what is inside. Idempotent, and shared by all who call it at a time."""
        await self._life.close(self._close)

    async def _open(self) -> None:
        await contained(open_source, self._inner)

    async def _close(self) -> None:
        await contained(aclose_source, self._inner)

    async def _take_back(self) -> None:
        """Close what was opened, so that all can be opened again."""
        inner, self._inner = self._inner, fresh(self._inner)
        await give_back(inner)

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``."""
        data = await contained(self._inner.read, offset, length)
        return check_length(data, length, offset=offset)

    def clone(self) -> Source:
        """The same around a clone of what is inside."""
        raise NotImplementedError

    def _if_inside(self, name: str) -> Any:
        if own_method(self._inner, name) is None:
            return None
        return getattr(self, f"_{name}")

    @property
    def read_into(self) -> Any:
        """``async (offset, buffer)``, or None."""
        return self._if_inside("read_into")

    @property
    def stream(self) -> Any:
        """``(offset, length)``, an async iterator, or None."""
        return self._if_inside("stream")

    @property
    def holes(self) -> Any:
        """``async (offset, length)``, or None."""
        return self._if_inside("holes")

    @property
    def write(self) -> Any:
        """``async (offset, data)``, or None."""
        return self._if_inside("write")

    @property
    def flush(self) -> Any:
        """``async ()``, or None."""
        return self._if_inside("flush")

    @property
    def write_zeros(self) -> Any:
        """``async (offset, length, *, hole)``, or None."""
        return self._if_inside("write_zeros")

    @property
    def trim(self) -> Any:
        """``async (offset, length)``, or None."""
        return self._if_inside("trim")

    @property
    def minimum_block(self) -> int:
        """That inside, 1 if it has none."""
        return int(getattr(self._inner, "minimum_block", 1))

    async def _read_into(self, offset: int, buffer: memoryview) -> None:
        await contained(own_method(self._inner, "read_into"), offset, buffer)

    def _stream(self, offset: int, length: int) -> Any:
        return own_method(self._inner, "stream")(offset, length)

    async def _holes(self, offset: int, length: int) -> Any:
        return await contained(own_method(self._inner, "holes"), offset, length)

    async def _write(self, offset: int, data: Buffer) -> None:
        await contained(own_method(self._inner, "write"), offset, data)

    async def _flush(self) -> None:
        await contained(own_method(self._inner, "flush"))

    async def _write_zeros(self, offset: int, length: int, *, hole: bool) -> None:
        await contained(own_method(self._inner, "write_zeros"), offset, length, hole=hole)

    async def _trim(self, offset: int, length: int) -> None:
        await contained(own_method(self._inner, "trim"), offset, length)
