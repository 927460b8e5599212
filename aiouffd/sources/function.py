"""Bytes that an async function makes."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import TypeAlias

from ..errors import AiouffdError, SourceError, UnsupportedError, UsageError
from ..util.usercode import describe
from .base import BaseSource, Buffer, Source, as_source_error, check_length, check_range

__all__ = ["FunctionSource", "ReadFunction"]

#: Called with (offset, length) in bytes; returns ``length`` bytes.
ReadFunction: TypeAlias = Callable[[int, int], Awaitable[Buffer]]


class FunctionSource(BaseSource):
    """A source that awaits ``func(offset, length)`` for every range.

    Arguments:
        func: async callable taking byte offset and byte length, returning exactly that
            many bytes. Runs on the loop that reads; called concurrently.
        size: length of the object in bytes.
        portable: True promises that ``func`` may be called on any event loop, also on two
            at a time (it holds no connection, lock or task of one loop).
        clone: alternative for functions bound to a loop: called without arguments, from any
            thread, it returns an equal function (or a whole `Source`) for another loop.
        version: name of the version of the object, if there is one.

    Errors of ``func``: AiouffdError as is; anything else becomes a SourceError, transient as
    `as_source_error` has it: lost connections and timeouts. The cause is kept.
    """

    def __init__(
        self,
        func: ReadFunction,
        size: int,
        *,
        portable: bool = False,
        clone: Callable[[], ReadFunction | Source] | None = None,
        version: str | None = None,
    ) -> None:
        if not callable(func):
            raise UsageError(f"func must be an async callable, not {type(func).__name__}")
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise UsageError("func must return its bytes, not yield them")
        if size < 0:
            raise UsageError(f"size must not be negative, got {size}")
        self._func = func
        self._size = size
        self._portable = portable
        self._clone = clone
        self.version = version

    def __repr__(self) -> str:
        name = getattr(self._func, "__qualname__", repr(self._func))
        return f"<FunctionSource {name} of {self._size} bytes>"

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._size

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``; errors as the class describes."""
        check_range(offset, length, self._size)
        try:
            answer = self._func(offset, length)
            if type(answer) is not CoroutineType and not inspect.isawaitable(answer):
                raise UsageError(
                    f"{self!r}: the function returned {type(answer).__name__}, not an awaitable",
                    hint="define it with 'async def'",
                )
            data = await answer
        except AiouffdError:
            raise
        except Exception as exc:
            known = as_source_error(exc)
            raise SourceError(
                f"{self!r} failed at offset {offset}: {describe(exc)}",
                transient=known.transient,
                errno=known.errno,
            ) from exc
        if type(data) is bytes and len(data) == length:
            return data
        return check_length(data, length, offset=offset)

    def clone(self) -> Source:
        """Return an equal source for another loop.

        Raises UnsupportedError unless ``portable=True`` or ``clone=`` was given.
        """
        if self._clone is not None:
            other = self._clone()
            if isinstance(other, Source):
                return other
            return FunctionSource(other, self._size, clone=self._clone, version=self.version)
        if not self._portable:
            raise UnsupportedError(
                f"{self!r} may not be used on a second event loop",
                hint="pass portable=True if the function works on any loop, or clone= with a"
                " callable that makes an equal function for another loop",
            )
        return FunctionSource(self._func, self._size, portable=True, version=self.version)
