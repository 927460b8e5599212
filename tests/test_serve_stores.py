"""The objects of a server: opened once for all, looked up anew, closed after the last client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import ClosedError
from aiouffd.foreign.blocks import BlockStore
from aiouffd.serve import stores as stores_module
from aiouffd.serve.stores import Stores
from aiouffd.sources import MemorySource
from aiouffd.sources.base import BaseSource

OLD, NEW = b"old " * 4096, b"new!" * 4096


@pytest.fixture
async def stores() -> AsyncIterator[Stores]:
    made = Stores(block_size=4096, keep=1 << 20, deadline=None)
    yield made
    await made.aclose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "object"
    path.write_bytes(OLD)
    return path


def remove(file: Path) -> None:
    file.unlink()


def replace(file: Path, data: bytes) -> None:
    other = file.with_name("other")
    other.write_bytes(data)
    other.rename(file)


async def bytes_of(store: BlockStore) -> bytes:
    return bytes(await store.source.read(0, 16))


async def test_one_for_all(stores: Stores, file: Path) -> None:
    found = await asyncio.gather(*(stores.get(str(file), {}, user) for user in range(8)))
    assert len(set(found)) == 1
    assert await stores.get(str(file), {}, 9) is found[0]
    assert await stores.get(file, {}, 9) is not found[0]
    assert stores.name_of(found[0]) == str(file)


async def test_a_file_that_was_replaced(stores: Stores, file: Path) -> None:
    """Who has the old one keeps it; who comes gets the new one."""
    old = await stores.get(str(file), {}, "one")
    replace(file, NEW)
    new = await stores.get(str(file), {}, "two")
    assert (await bytes_of(old), await bytes_of(new)) == (OLD[:16], NEW[:16])
    assert await stores.get(str(file), {}, "one") is new
    closed = asyncio.Event()
    real = old.source.aclose

    async def aclose() -> None:
        await real()
        closed.set()

    old.source.aclose = aclose
    stores.release("one")
    async with asyncio.timeout(10):
        await closed.wait()
    with pytest.raises(ClosedError):
        await bytes_of(old)
    assert await bytes_of(new) == NEW[:16]
    assert stores.given(old) is None


async def test_it_is_closed_after_the_last(
    stores: Stores, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await stores.get(str(file), {}, "one")
    assert await stores.get(str(file), {}, "two") is one
    stores.release("one")
    stores.release("two")
    assert await stores.get(str(file), {}, "three") is one  # it had lingered
    monkeypatch.setattr(stores_module, "LINGER", 0)
    closed = asyncio.Event()
    real = BlockStore.aclose

    async def aclose(store: BlockStore) -> None:
        await real(store)
        closed.set()

    monkeypatch.setattr(BlockStore, "aclose", aclose)
    stores.release("three")
    async with asyncio.timeout(10):
        await closed.wait()
    assert await stores.get(str(file), {}, "four") is not one


async def test_a_file_that_is_gone(stores: Stores, file: Path) -> None:
    one = await stores.get(str(file), {}, "one")
    remove(file)
    with pytest.raises(FileNotFoundError):
        await stores.get(str(file), {}, "two")
    assert await bytes_of(one) == OLD[:16]
    replace(file, NEW)
    assert await bytes_of(await stores.get(str(file), {}, "two")) == NEW[:16]


async def test_what_cannot_be_opened_is_tried_again(stores: Stores, file: Path) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            await stores.get(str(file) + "x", {}, "one")


async def test_sources_stay_open(stores: Stores) -> None:
    source = MemorySource(OLD)
    one = await stores.get(source, {}, "one")
    stores.release("one")
    assert await stores.get(source, {}, "two") is one


async def test_giving_up_while_it_opens(stores: Stores) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(BaseSource):
        size = 4096

        async def open(self) -> None:
            begun.set()
            await go_on.wait()

        async def read(self, offset: int, length: int) -> Any:
            return bytes(length)

        async def aclose(self) -> None:
            pass

    source = Slow()
    first = asyncio.ensure_future(stores.get(source, {}, "one"))
    second = asyncio.ensure_future(stores.get(source, {}, "two"))
    await begun.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    go_on.set()
    assert (await second).size == 4096


async def test_options_choose_an_object_too(stores: Stores, file: Path) -> None:
    """Also those that cannot be hashed, as the accounts of two tenants."""

    def source_of(given: Any, **options: Any) -> Any:
        return MemorySource(OLD)

    url = "s3://bucket/key"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores_module, "as_source", source_of)
        one = await stores.get(url, {"config": {"access_key_id": "one"}}, 1)
        two = await stores.get(url, {"config": {"access_key_id": "two"}}, 2)
        again = await stores.get(url, {"config": {"access_key_id": "one"}}, 3)
        odd = [await stores.get(url, {"session": object()}, user) for user in (4, 5)]
    assert one is again
    assert len({one, two, *odd}) == 4
