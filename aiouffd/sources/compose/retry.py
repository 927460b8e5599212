"""Trying again, within a budget.

For readers without a failure policy of their own (`aiouffd cat`, a copy, an NBD server); a lazy
buffer has one. The well-known retry libraries (tenacity, stamina, backoff) decide per call and
by exception class; here the server may say how long to wait, a stream goes on where it broke
off, and all calls of a source draw on one reserve, so that a dead server is not asked by
each of a hundred readers a hundred times. What is left of a library then is the exponent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from ...errors import SourceError, UsageError
from ...util.backoff import Backoff
from ...util.unwatched import Unwatched
from ..base import Buffer, stream_source
from .wrapper import Wrapper

__all__ = ["RetrySource"]

T = TypeVar("T")


class RetrySource(Wrapper):
    """``source``, whose transient errors are tried again.

    Arguments:
        source: anything that is a source.
        budget: seconds for one call, from its first try on; then its last error is raised.
        first, longest: seconds of the first pause and of the longest one; pauses double,
            with jitter. A source that says how long to wait (`SourceError.retry_after`) is obeyed,
            for at most a minute.
        reserve: retries that all calls have together; each success gives one back, and so
            does each second.

    A try that has begun is not cut short: how long it may take is the source's own timeout. A
    stream that made progress starts its budget anew, and counts as a success. ``retries`` counts
    them. A flush is never tried again: the next one would succeed without having made anything
    durable (see `aiouffd.sources.durability`).
    """

    def __init__(
        self,
        source: Any,
        *,
        budget: float = 60.0,
        first: float = 0.05,
        longest: float = 5.0,
        reserve: int = 256,
        **options: Any,
    ) -> None:
        if budget < 0 or first <= 0 or longest < first or reserve < 1:
            raise UsageError("a retry needs a budget, pauses and a reserve above zero")
        super().__init__(source, **options)
        self._budget = budget
        self._first = first
        self._longest = longest
        self._reserve = reserve
        self._left = float(reserve)
        self._counted = time.monotonic()
        self.retries = 0

    def clone(self) -> RetrySource:
        """The same policy, with a reserve of its own, around a clone."""
        return RetrySource(
            self._inner.clone(),
            budget=self._budget,
            first=self._first,
            longest=self._longest,
            reserve=self._reserve,
        )

    async def _open(self) -> None:
        await self._again(super()._open)

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at byte ``offset``."""
        return await self._again(super().read, offset, length)

    async def _read_into(self, offset: int, buffer: memoryview) -> None:
        await self._again(super()._read_into, offset, buffer)

    async def _holes(self, offset: int, length: int) -> Any:
        return await self._again(super()._holes, offset, length)

    async def _write(self, offset: int, data: Buffer) -> None:
        await self._again(super()._write, offset, data)

    async def _write_zeros(self, offset: int, length: int, *, hole: bool) -> None:
        await self._again(partial(super()._write_zeros, hole=hole), offset, length)

    async def _trim(self, offset: int, length: int) -> None:
        await self._again(super()._trim, offset, length)

    @property
    def read_now(self) -> Any:
        """``(offset, length)``, or None."""
        return getattr(self._inner, "read_now", None)

    async def _stream(self, offset: int, length: int) -> AsyncGenerator[Buffer, None]:
        end = offset + length
        attempt = _Attempt(self)
        while offset < end:
            begun = offset
            try:
                stream = Unwatched(stream_source(self._inner, offset, end - offset))
                async with aclosing(stream) as chunks:
                    async for chunk in chunks:
                        offset += chunk.nbytes
                        attempt.again()
                        yield chunk
                        # Not the time that whoever reads us takes.
                        attempt.again()
            except SourceError as error:
                if offset > begun:
                    self._succeeded()
                await attempt.failed(error)
        self._succeeded()

    async def _again(self, call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        attempt = _Attempt(self)
        while True:
            try:
                result = await call(*arguments)
            except SourceError as error:
                await attempt.failed(error)
            else:
                self._succeeded()
                return result

    def _succeeded(self) -> None:
        self._left = min(self._reserve, self._left + 1)

    def _take(self) -> bool:
        """One retry of the reserve."""
        now = time.monotonic()
        self._left = min(self._reserve, self._left + now - self._counted)
        self._counted = now
        if self._left < 1:
            return False
        self._left -= 1
        self.retries += 1
        return True


class _Attempt:
    """One call: when its time is over, and how long the next pause is."""

    __slots__ = ("_backoff", "_end", "_source")

    def __init__(self, source: RetrySource) -> None:
        self._source = source
        self.again()

    def again(self) -> None:
        """Begin anew."""
        self._end = time.monotonic() + self._source._budget
        self._backoff = Backoff(self._source._first, self._source._longest)

    async def failed(self, error: SourceError) -> None:
        """Wait before the next try, or raise ``error`` if there is none."""
        pause = self._backoff.next(error)
        late = time.monotonic() + pause > self._end
        if not error.transient or late or not self._source._take():
            raise error
        await asyncio.sleep(pause)
