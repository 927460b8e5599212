"""Sources that raise what they should not, beneath a server's store of blocks."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest

from aiouffd.errors import SourceError
from aiouffd.foreign.blocks import BlockStore
from aiouffd.foreign.reactor import Share
from aiouffd.sources.base import as_source_error

SIZE = 8 * 4096


class Raising:
    """Raises what it is told, until that is None."""

    size = SIZE

    def __init__(self, failure: BaseException | None) -> None:
        self.failure = failure
        self.reads = 0
        self.read_twice = asyncio.Event()

    async def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        if self.reads == 2:
            self.read_twice.set()
        if self.failure is not None:
            raise self.failure
        return b"x" * length

    def clone(self) -> Any:
        return self


class Waiting:
    """Waits for one block."""

    def __init__(self) -> None:
        self.share = Share()
        self.told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def landed(self, store: BlockStore, block: int, data: memoryview | None) -> None:
        self.told.set_result(data)

    def failed(self, store: BlockStore, block: int, error: BaseException) -> None:
        self.told.set_exception(error)

    def broken(self, error: Exception) -> None:
        raise error


class OddError(BaseException):
    """Not an Exception."""


TRANSIENT = [
    ConnectionResetError("gone"),
    BrokenPipeError(),
    TimeoutError("late"),
    asyncio.IncompleteReadError(b"", 5),
]
LASTING = [
    ValueError("a bug"),
    OSError(5, "EIO"),
    KeyError("x"),
    asyncio.CancelledError(),
    concurrent.futures.CancelledError(),
    EOFError(),
    GeneratorExit(),
    OddError(),
]


@pytest.mark.parametrize("failure", TRANSIENT, ids=repr)
def test_lost_connections_are_transient(failure: BaseException) -> None:
    error = as_source_error(failure)
    assert error.transient
    assert error.__cause__ is failure


@pytest.mark.parametrize("failure", LASTING, ids=repr)
def test_everything_else_is_not(failure: BaseException) -> None:
    error = as_source_error(failure)
    assert not error.transient
    assert type(failure).__name__ in str(error)


def test_errors_of_sources_stay_what_they_are() -> None:
    error = SourceError("x", transient=False)
    assert as_source_error(error) is error


@pytest.mark.parametrize("failure", LASTING, ids=repr)
async def test_who_waits_is_told_at_once_where_there_is_a_deadline(failure: BaseException) -> None:
    source = Raising(failure)
    store = BlockStore(source, deadline=30.0)
    await store.open()
    waiting = Waiting()
    store.want(0, waiting)
    async with asyncio.timeout(5):
        with pytest.raises(SourceError, match=type(failure).__name__):
            await waiting.told
    assert source.reads == 1
    # It harms nobody but this request.
    source.failure = None
    again = Waiting()
    store.want(0, again)
    async with asyncio.timeout(5):
        assert len(await again.told) == SIZE
    await store.aclose()


@pytest.mark.parametrize(
    "failure", [asyncio.CancelledError(), TimeoutError(), GeneratorExit(), OddError()], ids=repr
)
async def test_without_a_deadline_it_is_tried_again_with_pauses(failure: BaseException) -> None:
    source = Raising(failure)
    store = BlockStore(source)
    await store.open()
    waiting = Waiting()
    store.want(0, waiting)
    async with asyncio.timeout(5):
        await source.read_twice.wait()
    assert store.tally.retries in (1, 2)
    source.failure = None
    async with asyncio.timeout(5):
        assert len(await waiting.told) == SIZE
    await store.aclose()


@pytest.mark.parametrize(
    "given", [ValueError("a bug"), b"short", asyncio.CancelledError(), OddError()], ids=repr
)
async def test_what_cannot_be_read_now_is_read(given: Any) -> None:
    class Now(Raising):
        def read_now(self, offset: int, length: int) -> bytes:
            if isinstance(given, bytes):
                return given
            raise given

    store = BlockStore(Now(None))
    await store.open()
    assert store.peek(0) is None
    waiting = Waiting()
    store.want(0, waiting)
    async with asyncio.timeout(5):
        assert bytes(await waiting.told) == b"x" * SIZE
    await store.aclose()
