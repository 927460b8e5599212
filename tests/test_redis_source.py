"""Redis as a source, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import (
    ClosedError,
    ShortReadError,
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
    UsageError,
)
from aiouffd.sources import SourcePermissionError, as_source
from tests.cancelling import Cut, Way, cancel_everywhere
from tests.scenarios import torture
from tests.servers.redis import redis_server
from tests.support import content, result_of

pytest.importorskip("redis")

import redis

from aiouffd.sources.redis import RedisSource

SIZE = 1_000_000
DATA = content(SIZE)
BLOCK = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("redis")
    with redis_server(folder):
        yield folder


@pytest.fixture
def client(folder: Path) -> Iterator[Any]:
    """The oracle's own connection; an empty database."""
    with redis.Redis(unix_socket_path=str(folder / "redis")) as client:
        client.flushall()
        yield client


def blocks(data: bytes = DATA, block: int = BLOCK) -> dict[str, bytes]:
    return {str(at // block): data[at : at + block] for at in range(0, len(data), block)}


def fill(client: Any, layout: str, version: str | None = "v1") -> None:
    meta = {"size": SIZE, "block_size": BLOCK}
    if version is not None:
        meta["version"] = version  # type: ignore[assignment]
    if layout == "string":
        client.set("a", DATA)
    elif layout == "hash":
        client.hset("a", mapping={**blocks(), **meta})
    else:
        client.mset({f"a:{number}": data for number, data in blocks().items()})
        client.hset("a:meta", mapping=meta)


def key_of(layout: str) -> str:
    return "a:{block}" if layout == "keys" else "a"


@contextlib.asynccontextmanager
async def opened(
    folder: Path, layout: str = "string", **options: Any
) -> AsyncIterator[RedisSource]:
    source = RedisSource(
        f"unix://{folder}/redis",
        key_of(layout),
        layout=layout,
        **options,  # type: ignore[arg-type]
    )
    await source.open()
    try:
        yield source
    finally:
        await source.aclose()


LAYOUTS = pytest.mark.parametrize("layout", ["string", "hash", "keys"])


@LAYOUTS
async def test_reads(folder: Path, client: Any, layout: str) -> None:
    fill(client, layout)
    async with opened(folder, layout) as source:
        assert source.size == SIZE
        assert source.version == (None if layout == "string" else "v1")
        for offset, length in ((0, 1), (SIZE - 1, 1), (4095, 70_000), (0, SIZE), (7, 0)):
            assert bytes(await source.read(offset, length)) == DATA[offset : offset + length]
        places = [(at * 9000, 12_000) for at in range(100)]
        found = await asyncio.gather(*(source.read(*place) for place in places))
        assert [bytes(data) for data in found] == [DATA[at : at + n] for at, n in places]
        with pytest.raises(UsageError):
            await source.read(SIZE, 1)
        clone = source.clone()
        await clone.open()
        assert bytes(await clone.read(5, 5)) == DATA[5:10]
        await clone.aclose()
    with pytest.raises(ClosedError):
        await source.read(0, 1)


async def test_one_turn_is_one_transaction(folder: Path, client: Any) -> None:
    fill(client, "hash")
    async with opened(folder, "hash") as source:
        before = client.info("stats")["total_commands_processed"]
        await asyncio.gather(*(source.read(at * BLOCK, BLOCK) for at in range(50)))
        # MULTI, HMGET, HMGET, EXEC, and our INFO.
        assert client.info("stats")["total_commands_processed"] - before <= 6


@LAYOUTS
async def test_a_buffer_by_url(folder: Path, client: Any, layout: str) -> None:
    fill(client, layout)
    url = f"redis+unix://{folder}/redis?db=0&key={key_of(layout)}"
    options = {} if layout == "string" else {"layout": layout}
    async with aiouffd.open(url, **options) as buf:
        assert await asyncio.to_thread(bytes, buf.view) == DATA


async def test_a_disk_cache(folder: Path, client: Any, tmp_path: Path) -> None:
    fill(client, "hash")
    url = f"redis+unix://{folder}/redis?db=0&key=a"
    for _ in range(2):
        async with aiouffd.open(url, layout="hash", cache=tmp_path) as buf:
            assert await asyncio.to_thread(bytes, buf.view) == DATA
            cached: Any = buf.source
    assert cached.stats.hit_bytes == SIZE
    keys = {
        RedisSource(server, key, **options).cache_key  # type: ignore[arg-type]
        for server in ("redis://h/0", "redis://h/1", "redis://h:1", "unix:///s?db=0")
        for key in ("a", "b#hash", "b?")
        for options in ({}, {"layout": "hash"}, {"layout": "hash", "missing": "zeros"})
    }
    assert len(keys) == 36
    secret = RedisSource("unix:///s?password=geheim&db=2", "a").cache_key
    assert secret == "unix:///s/2/a#string"
    assert RedisSource("redis://u:geheim@h/2", "a").cache_key == "redis://u@h/2/a#string"


def test_users_and_options_choose_an_object() -> None:
    def key(url: str = "redis://h/0", **options: Any) -> str | None:
        return RedisSource(url, "a", **options).cache_key

    keys = [
        key(),
        key("redis://one@h/0"),
        key("redis://two@h/0"),
        key(db=3),
        key(username="one"),
        key("redis://h/0?protocol=3&x=1"),
    ]
    assert len({*keys, None}) == len(keys) + 1
    assert key("redis://h/0?socket_timeout=3", password="x", timeout=1.0, connections=2) == keys[0]
    assert key("unix:///s?username=one") == key("unix:///s?username=one&password=x")
    assert key("unix:///s?username=one") != key("unix:///s?username=two")
    assert key(credential_provider=object()) is None, "who knows whom it names"
    steps = [key(layout="hash", block_size=size) for size in (4096, 8192)]
    assert steps[0] != steps[1], "the same fields are other bytes"


@LAYOUTS
async def test_a_change_is_an_error(folder: Path, client: Any, layout: str) -> None:
    fill(client, layout)
    async with opened(folder, layout) as source:
        await source.read(0, 10)
        clone = source.clone()
        if layout == "string":
            client.set("a", DATA + b"x")
        else:
            client.hset("a" if layout == "hash" else "a:meta", "version", "v2")
        for _ in range(2):
            with pytest.raises(SourceChangedError):
                await source.read(0, 10)
        with pytest.raises(SourceChangedError):
            await clone.open()


@pytest.mark.parametrize("layout", ["hash", "keys"])
async def test_cut_into_other_blocks(folder: Path, client: Any, layout: str) -> None:
    """The same bytes, size and version, but block 1 begins elsewhere now."""
    fill(client, layout)
    async with opened(folder, layout) as source:
        clone = source.clone()
        if layout == "hash":
            client.hset("a", mapping={**blocks(block=2 * BLOCK), "block_size": 2 * BLOCK})
        else:
            client.mset({f"a:{n}": data for n, data in blocks(block=2 * BLOCK).items()})
            client.hset("a:meta", "block_size", 2 * BLOCK)
        last = SIZE // (2 * BLOCK)  # short, and in the middle of what was opened
        for block in (1, last):
            with pytest.raises(SourceChangedError):
                await source.read(block * BLOCK, 10)
        with pytest.raises(SourceChangedError):
            await clone.open()


@pytest.mark.parametrize("layout", ["hash", "keys"])
async def test_what_vanishes_is_not_zeros(folder: Path, client: Any, layout: str) -> None:
    """Evicted or expired, and no version that would tell."""
    fill(client, layout, version=None)
    async with opened(folder, layout, missing="zeros") as source:
        assert await source.read(0, 10) == DATA[:10]
        client.flushall()
        with pytest.raises(SourceChangedError):
            await source.read(0, 10)


@pytest.mark.parametrize("layout", ["hash", "keys"])
async def test_missing_and_wrong_blocks(folder: Path, client: Any, layout: str) -> None:
    fill(client, layout)
    if layout == "hash":
        client.hdel("a", "3")
        client.hset("a", "5", b"short")
    else:
        client.delete("a:3")
        client.set("a:5", b"short")
    async with opened(folder, layout) as source:
        good, missing, short = await asyncio.gather(
            *(source.read(block * BLOCK, BLOCK) for block in (2, 3, 5)), return_exceptions=True
        )
        assert good == DATA[2 * BLOCK : 3 * BLOCK]
        assert isinstance(missing, SourceError)
        assert not missing.transient
        assert "block 3" in str(missing)
        assert isinstance(short, ShortReadError)
    async with opened(folder, layout, missing="zeros") as source:
        assert not any(await source.read(3 * BLOCK, BLOCK))


async def test_size_by_the_caller(folder: Path, client: Any) -> None:
    client.hset("a", mapping=blocks())
    async with opened(folder, "hash", size=SIZE, block_size=BLOCK) as source:
        assert bytes(await source.read(0, SIZE)) == DATA
    with pytest.raises(UsageError, match="block_size"):
        await RedisSource(f"unix://{folder}/redis", "a", layout="hash").open()
    client.hset("a", mapping={"size": SIZE, "block_size": BLOCK})
    for wrong in ({"size": SIZE - 1}, {"block_size": 2 * BLOCK}):
        with pytest.raises(UsageError, match="not"):
            await RedisSource(f"unix://{folder}/redis", "a", layout="hash", **wrong).open()
    client.hset("a", "size", "many")
    with pytest.raises(UsageError, match="number"):
        await RedisSource(f"unix://{folder}/redis", "a", layout="hash").open()


async def test_what_cannot_be_opened(folder: Path, client: Any, tmp_path: Path) -> None:
    server = f"unix://{folder}/redis"
    for key, layout in (("no", "string"), ("no", "hash"), ("no:{block}", "keys")):
        with pytest.raises(FileNotFoundError):
            await RedisSource(server, key, layout=layout).open()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no_such_option"):
        await RedisSource(server, "a", no_such_option=1).open()
    client.lpush("list", "x")
    with pytest.raises(UsageError):
        await RedisSource(server, "list").open()
    with pytest.raises(SourceError) as caught:
        await RedisSource(f"unix://{tmp_path}/nobody", "a").open()
    assert caught.value.transient


async def test_passwords(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--requirepass", "geheim"):
        for password in ("", "password=wrong&"):
            source = RedisSource(f"unix://{tmp_path}/redis?{password}db=0", "a")
            with pytest.raises(SourcePermissionError) as caught:
                await source.open()
            assert "wrong" not in str(caught.value) + repr(source)
        with redis.Redis(unix_socket_path=str(tmp_path / "redis"), password="geheim") as client:
            client.set("a", b"found")
        source = RedisSource(f"unix://{tmp_path}/redis?password=geheim&db=0", "a")
        await source.open()
        assert await source.read(0, 5) == b"found"
        assert "geheim" not in repr(source)
        await source.aclose()


async def test_restart_and_silence(tmp_path: Path) -> None:
    def start() -> Any:
        return redis_server(tmp_path)

    def put() -> None:
        with redis.Redis(unix_socket_path=str(tmp_path / "redis")) as client:
            client.set("a", DATA)

    with start():
        put()
        source = RedisSource(f"unix://{tmp_path}/redis", "a", timeout=0.3)
        await source.open()
        with redis.Redis(unix_socket_path=str(tmp_path / "redis")) as client:
            client.client_pause(60_000, all=True)
        with pytest.raises(SourceTimeoutError) as late:
            await source.read(0, 10)
        assert late.value.transient
    with pytest.raises(SourceError) as caught:
        await source.read(0, 10)
    assert caught.value.transient
    with start():
        put()
        assert await source.read(0, 10) == DATA[:10]
    await source.aclose()


async def test_cancelled_and_closed(folder: Path, client: Any) -> None:
    fill(client, "string")
    async with opened(folder) as source:
        first, second = (asyncio.ensure_future(source.read(at, 10)) for at in (0, 20))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == DATA[20:30]
        assert first.cancelled()
        third = asyncio.ensure_future(source.read(0, 10))
        await asyncio.sleep(0)
        await source.aclose()
        with pytest.raises(ClosedError):
            await third


@pytest.mark.parametrize(
    "url",
    ["redis://", "redis://host/0", "redis://host/0/", "redis://host/x/key", "redis:///0/key",
     "redis+unix:///path", "redis+unix:///path?key=", "redis+unix:///path?key=a&db=x"],
)  # fmt: skip
def test_bad_urls(url: str) -> None:
    with pytest.raises(UsageError):
        as_source(url)


def test_urls_and_wrong_use() -> None:
    source = as_source("valkey://user:secret@host:1/3/a%20b/c")
    assert isinstance(source, RedisSource)
    assert repr(source) == "<RedisSource redis://host:1 a b/c>"
    for options in ({"layout": "x"}, {"missing": "x"}, {"timeout": 0}, {"layout": "keys"},
                    {"size": -1}):  # fmt: skip
        with pytest.raises(UsageError):
            RedisSource("redis://host", "a", **options)  # type: ignore[arg-type]


async def test_unclosed(folder: Path, client: Any) -> None:
    fill(client, "string")
    source = RedisSource(f"unix://{folder}/redis", "a")
    await source.open()
    inner = source._client
    with pytest.warns(ResourceWarning):  # noqa: PT031
        del source
        gc.collect()
    await inner.aclose()
    await inner.connection_pool.disconnect()


@pytest.mark.parametrize(
    ("size", "step"), [(10**30, 4096), (-1, 4096), (1 << 20, 1), (10, 0), (10, 10**30)]
)
async def test_what_a_server_says_has_bounds(
    folder: Path, client: Any, size: int, step: int
) -> None:
    client.hset("a", mapping={"size": size, "block_size": step})
    with pytest.raises(UsageError, match="cannot have"):
        await RedisSource(f"unix://{folder}/redis", "a", layout="hash").open()


# ------------------------------------------------------- once, and cut off anywhere


def _connections(client: Any) -> Any:
    """Counts those at the server, as it needs a moment to hear of an end."""
    return lambda: {"connections": int(client.info("clients")["connected_clients"])}


@LAYOUTS
async def test_opening_may_be_cut_off_anywhere(folder: Path, client: Any, layout: str) -> None:
    fill(client, layout)

    async def run(cut: Cut) -> None:
        source = RedisSource(f"unix://{folder}/redis", key_of(layout), layout=layout)  # type: ignore[arg-type]
        await cut(source.open())
        await source.open()
        assert bytes(await source.read(9, 9)) == DATA[9:18]
        await source.aclose()

    await cancel_everywhere(run, also=_connections(client))


@LAYOUTS
async def test_reading_may_be_cut_off_anywhere(folder: Path, client: Any, layout: str) -> None:
    fill(client, layout)

    async def run(cut: Cut) -> None:
        async with opened(folder, layout, connections=2) as source:
            together = asyncio.ensure_future(source.read(18, 9))
            await cut(source.read(9, 9))
            assert bytes(await together) == DATA[18:27]
            found = await asyncio.gather(*(source.read(at, 9) for at in range(5)))
            assert [bytes(data) for data in found] == [DATA[at : at + 9] for at in range(5)]

    await cancel_everywhere(run, also=_connections(client))


async def test_closing_may_be_cut_off_anywhere(folder: Path, client: Any) -> None:
    fill(client, "string")

    async def run(cut: Cut) -> None:
        source = RedisSource(f"unix://{folder}/redis", "a")
        await source.open()
        read = asyncio.ensure_future(source.read(9, 9))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await cut(source.aclose())
        await source.aclose()
        found = await asyncio.gather(read, return_exceptions=True)
        assert found == [DATA[9:18]] or isinstance(found[0], ClosedError)

    await cancel_everywhere(run, also=_connections(client))


async def test_the_end_of_a_loop_may_come_anywhere(folder: Path, client: Any) -> None:
    fill(client, "hash")

    async def run(cut: Cut) -> None:
        source = RedisSource(f"unix://{folder}/redis", "a", layout="hash")

        async def whole() -> None:
            try:
                await source.open()
                await source.read(9, 9)
            finally:
                await source.aclose()

        await cut.quiet(whole())
        await source.aclose()

    await cancel_everywhere(run, ways=[Way.TASK, Way.ALL], also=_connections(client))


async def test_opened_and_closed_by_many_at_a_time(folder: Path, client: Any) -> None:
    fill(client, "string")
    source = RedisSource(f"unix://{folder}/redis", "a", connections=1)
    await asyncio.gather(*(source.open() for _ in range(5)))
    assert await source.read(0, 9) == DATA[:9]
    await asyncio.gather(*(source.aclose() for _ in range(5)))

    source = RedisSource(f"unix://{folder}/redis", "a")
    opening = asyncio.ensure_future(source.open())
    await asyncio.sleep(0)
    await source.aclose()
    with pytest.raises(ClosedError):
        await opening
    with pytest.raises(ClosedError):
        await source.open()


@pytest.mark.parametrize(
    "error",
    [asyncio.CancelledError(), BaseException("odd"), StopIteration(), KeyError("x")],
    ids=repr,
)
async def test_code_of_others_may_raise_anything(
    folder: Path, client: Any, error: BaseException
) -> None:
    """And a connection that was being made then is not used half-made, without its database."""
    fill(client, "string")
    client.swapdb(0, 3)
    client.set("a", DATA[::-1])
    raising = True

    class Credentials(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            if raising:
                raise error
            return ("default",)

        async def get_credentials_async(self) -> tuple[str]:
            return self.get_credentials()

    client.config_set("requirepass", "default")
    client.auth("default")
    try:
        source = RedisSource(
            f"unix://{folder}/redis?db=3", "a", connections=2, credential_provider=Credentials()
        )
        with pytest.raises(SourceError):
            await source.open()
        raising = False
        await source.open()
        assert await source.read(0, 9) == DATA[:9]
        raising = True
        client.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(SourceError):
            await source.read(0, 9)
        raising = False
        assert await source.read(0, 9) == DATA[:9]
        await source.aclose()
    finally:
        client.config_set("requirepass", "")


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_torture(loop_name: str, errors: str) -> None:
    found = result_of(torture.torture, loop_name, "redis", "anonymous", errors, 300, 8, limit=60.0)
    assert found["retries"] > 0
    if errors == "hard":
        assert found["refused"] == 0
