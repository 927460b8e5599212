"""Which object it is: cache keys hold all that chooses it, versions all that tells it apart."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd.errors import UsageError
from aiouffd.sources import registry
from aiouffd.sources.cache import CachedSource
from aiouffd.sources.cache.layout import derive_key, lasting_version
from aiouffd.sources.file import FileSource
from aiouffd.sources.http import HttpSource
from aiouffd.sources.names import display_name, identity
from aiouffd.sources.objects import ObjectSource
from tests.servers.http import Entry, Fault, RangeServer

SIZE = 256 << 10
SECRET = {"secret_access_key": "geheim"}


@pytest.fixture
async def server() -> AsyncIterator[RangeServer]:
    async with RangeServer({"/bucket/a": b"1" * SIZE, "/a": b"1" * SIZE}) as server:
        yield server


# ------------------------------------------------------------------- names


def test_a_name_without_settings_is_itself() -> None:
    assert identity("s3://b/k", {}) == "s3://b/k"
    assert identity("s3://b/k", {"a": None, "Secret": "x"}, ["secret"]) == "s3://b/k"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": "1"}, {"a": "2"}),
        ({"a": "1"}, {"a": 1}),
        ({"a": "1"}, {"b": "1"}),
        ({"a": {1: "x"}}, {"a": {"1": "x"}}),
        ({"a": ["x"]}, {"a": {"x"}}),
        ({"a": b"x"}, {"a": "78"}),
        ({"a": Path("/x")}, {"a": "/x"}),
        ({"a": timedelta(1)}, {"a": "1 day, 0:00:00"}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}),
    ],
)
def test_other_settings_are_another_name(one: dict[str, Any], other: dict[str, Any]) -> None:
    names = [identity("s3://b/k", settings) for settings in (one, other)]
    assert None not in names
    assert len(set(names)) == 2


def test_the_order_of_settings_does_not_matter() -> None:
    assert identity("x", {"a": {"b": 1, "c": {3, 2}}, "d": 4}) == identity(
        "x", {"d": 4, "a": {"c": {2, 3}, "b": 1}}
    )


def test_what_could_mean_anything_has_no_name() -> None:
    assert identity("x", {"session": object()}) is None
    assert identity("x", {"kwargs": {"headers": [object()]}}) is None


# ----------------------------------------------------------------- objects


def _object_key(url: str = "s3://b/k", **options: Any) -> str | None:
    return ObjectSource.from_url(url, **options).cache_key


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"endpoint": "http://a"}, {"endpoint": "http://b"}),
        ({"endpoint": "http://a"}, {}),
        ({"region": "cn-north-1"}, {"region": "us-east-1"}),
        ({"access_key_id": "one", **SECRET}, {"access_key_id": "two", **SECRET}),
        ({"access_key_id": "one", **SECRET}, {"skip_signature": "true"}),
    ],
)
def test_endpoint_region_and_account_choose_an_object(
    one: dict[str, str], other: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [_object_key(config=config) for config in (one, other)]
    for config in (one, other):
        with monkeypatch.context() as patch:
            for name, value in config.items():
                patch.setenv(f"AWS_{name.upper()}", value)
            keys.append(_object_key())
    assert keys[0] != keys[1]
    assert keys[:2] == keys[2:], "those of the environment are as those that are given"
    assert None not in keys


def test_the_names_of_settings_do_not_matter() -> None:
    assert _object_key(config={"aws_endpoint_url": "http://a"}) == _object_key(
        config={"endpoint": "http://a"}
    )


def test_an_account_of_azure_chooses_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for account in ("one", "two"):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", account)
        keys.append(_object_key("az://c/k", config={"account_key": "aGVsbG8="}))
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
        config = {"account_name": account, "account_key": "YnllCg=="}
        assert _object_key("az://c/k", config=config) == keys[-1]
    assert keys[0] != keys[1]


def test_secrets_and_ways_to_ask_choose_nothing() -> None:
    plain = _object_key(config={"access_key_id": "one", **SECRET})
    for more in ("1", "2"):
        config = {"access_key_id": "one", "secret_access_key": more}
        options = {"timeout": f"{more}s", "allow_http": True}
        assert _object_key(config=config, client_options=options) == plain
    assert _object_key() == "s3://b/k"


def test_a_role_has_another_name_each_hour_and_reads_the_same() -> None:
    keys = {
        _object_key(config={"access_key_id": name, **SECRET, "session_token": f"t{name}", **more})
        for name in ("one", "two")
        for more in ({}, {"endpoint": "http://a"})
    }
    assert len(keys) == 3, "but elsewhere than at AWS the account may choose the bucket"


def test_headers_choose_an_object() -> None:
    headers = [{"X-Tenant": "a"}, {"X-Tenant": "b"}, {}]
    for url in ("s3://b/k", "obstore+http://h/k"):
        keys = [_object_key(url, client_options={"default_headers": h}) for h in headers]
        assert len({*keys, None}) == 4
    assert keys[2] == "http://h/k"
    assert _object_key("obstore+http://u:geheim@h/k?q=1") == "http://u@h/k?q=1"


def test_an_account_that_only_a_function_knows_has_no_name() -> None:
    def provider() -> dict[str, Any]:
        raise NotImplementedError

    assert _object_key(credential_provider=provider) == "s3://b/k", "there is one of it at AWS"
    config = {"endpoint": "http://a"}
    assert _object_key(config=config, credential_provider=provider) is None


async def _look(
    server: RangeServer, version: str | None, etag: str | None, url: str = "s3://bucket/a"
) -> tuple[str | None, str | None]:
    """The version of an object that is ten years old, and the one to keep it under."""
    headers = {"x-amz-version-id": version, "ETag": etag}
    server.fault = lambda _: Fault(headers=headers)
    source = ObjectSource.from_url(
        url,
        config={"endpoint": server.url(""), "skip_signature": "true"},
        client_options={"allow_http": True},
    )
    await source.open()
    try:
        return source.version, lasting_version(source)
    finally:
        await source.aclose()


async def test_versions_tell_objects_apart(server: RangeServer) -> None:
    named = "s3://bucket/a?versionId=null"
    found = {
        await _look(server, "null", '"1"', named),
        await _look(server, "null", '"2"', named),
        await _look(server, None, '"1"', "s3://bucket/a?versionId=v1"),
        await _look(server, "v1", '"1"', "s3://bucket/a?versionId=v1"),
        await _look(server, "v1", '"2"', "s3://bucket/a"),
        await _look(server, "v2", '"2"', "s3://bucket/a"),
        await _look(server, None, '"2"', "s3://bucket/a"),
    }
    assert len(found) == 6, "one of them was the same"
    assert all(version is not None and version == lasting for version, lasting in found)


async def test_a_null_version_alone_does_not_last(server: RangeServer) -> None:
    server.objects["/bucket/a"].etag, server.objects["/bucket/a"].modified = None, time.time()
    version, lasting = await _look(server, "null", None, "s3://bucket/a?versionId=null")
    assert version is not None
    assert lasting is None
    version, lasting = await _look(server, "v1", None, "s3://bucket/a?versionId=v1")
    assert version == lasting == "v1"


async def test_another_version_id_is_a_change(server: RangeServer) -> None:
    headers = {"x-amz-version-id": "v1"}
    server.fault = lambda _: Fault(headers=headers)
    options = {
        "config": {"endpoint": server.url(""), "skip_signature": "true"},
        "client_options": {"allow_http": True},
    }
    source = ObjectSource.from_url("s3://bucket/a", **options)
    await source.open()
    assert await source.read(0, 4) == b"1111"
    headers["x-amz-version-id"] = "v2"
    with pytest.raises(aiouffd.SourceChangedError):
        await source.read(0, 4)
    await source.aclose()


# -------------------------------------------------------------------- HTTP


def _http_key(url: str = "http://h/a", **options: Any) -> str | None:
    return HttpSource(url, **options).cache_key


def test_users_and_headers_choose_what_is_sent() -> None:
    keys = [
        _http_key(),
        _http_key("http://one:x@h/a"),
        _http_key(auth=("two", "x")),
        _http_key(headers={"Accept": "text/plain"}),
        _http_key(headers={"accept": "text/html"}),
        _http_key(headers={"Authorization": "Bearer 1"}),
        _http_key(headers={"Authorization": "Bearer 2"}),
    ]
    assert len({*keys, None}) == len(keys) + 1
    assert keys[0] == "http://h/a"
    assert keys[1] == "http://one@h/a"


def test_what_does_not_choose_is_in_no_key() -> None:
    assert _http_key("http://one:x@h/a") == _http_key(auth=("one", "y"))
    assert _http_key("http://one:x@h/a") == HttpSource("http://one:x@h/a").clone().cache_key
    assert _http_key(headers={"User-Agent": "x"}, timeout=1.0, proxy="http://p") == "http://h/a"
    assert _http_key("http://h/a", headers={"Authorization": "Basic ?"}) is not None


def test_keys_show_no_secrets() -> None:
    for key in (
        _http_key("http://one:geheim@h/a", headers={"Cookie": "geheim"}),
        _object_key(config={"access_key_id": "one", "secret_access_key": "geheim"}),
    ):
        assert key is not None
        assert "geheim" not in key
        assert "one" not in display_name(key)


def test_sources_around_it_keep_the_key() -> None:
    from aiouffd.sources.compose import RetrySource

    source = HttpSource("http://h/a", headers={"X": "1"})
    assert derive_key(RetrySource(source)) == source.cache_key


# ----------------------------------------------------- sources of other packages


class Other:
    """Has neither key nor URL; but whoever made it had one."""

    size = 10
    version = "1"

    def __init__(self, url: str, *, tenant: str = "", session: object = None) -> None:
        self.url_given = url

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def clone(self) -> Other:
        return self


def test_a_url_is_no_name_without_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = registry.Scheme("other", f"{__name__}:Other")
    monkeypatch.setitem(registry._OWN, "other", scheme)

    def key(url: str, **options: Any) -> str:
        return CachedSource(url, directory=tmp_path, **options)._key

    keys = [key("other://h/a"), key("other://u@h/a"), key("other://h/a", tenant="x")]
    assert len(set(keys)) == 3
    assert keys[0] == "other://h/a"
    assert key("other://u:geheim@h/a") == keys[1]
    with pytest.raises(UsageError, match="key="):
        key("other://h/a", session=object())


# ------------------------------------------------------------------- files


async def _file_version(path: Path) -> tuple[str | None, str | None]:
    source = FileSource(path)
    await source.open()
    try:
        return source.version, lasting_version(source)
    finally:
        await source.aclose()


async def test_a_remount_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1" * SIZE)
    source = FileSource(path)
    await source.open()
    version, twin = source.version, source.clone()
    await source.aclose()
    true_fstat = os.fstat

    class Moved:
        """The same file, on a device that has got another number meanwhile."""

        def __init__(self, found: os.stat_result) -> None:
            self._found = found
            self.st_dev = found.st_dev + 1

        def __getattr__(self, name: str) -> Any:
            return getattr(self._found, name)

    monkeypatch.setattr(os, "fstat", lambda fd: Moved(true_fstat(fd)))
    await twin.open()
    assert twin.version == version
    assert await twin.read(0, 4) == b"1111"
    await twin.aclose()


async def test_what_tells_files_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    versions = set()
    for data, when in ((b"1", 1.7e9), (b"2", 1.7e9 + 0.25), (b"33", 1.7e9)):
        path.write_bytes(data)
        os.utime(path, (when, when))
        versions.add(await _file_version(path))
    other = tmp_path / "other"
    other.write_bytes(b"44")
    os.utime(other, (1.7e9, 1.7e9))
    other.replace(path)
    versions.add(await _file_version(path))
    assert len(versions) == 4
    assert all(version == lasting for version, lasting in versions)


@pytest.mark.parametrize("when", [0, 1, 315532800])
async def test_a_time_that_all_files_have_does_not_last(tmp_path: Path, when: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    os.utime(path, (when, when))
    version, lasting = await _file_version(path)
    assert version is not None
    assert lasting is None


# ----------------------------------------------------------------- pickles


async def test_a_pickle_is_of_one_file_wherever_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_bytes(folder.encode())
    monkeypatch.chdir(tmp_path / "here")
    working_set = aiouffd.WorkingSet([(0, 4)], size=4)
    working_set.save("set")
    async with aiouffd.open("file", cache="cache", prefetch="set") as buf:
        pickled = pickle.dumps(buf)
    unopened = pickle.dumps(aiouffd.open("file"))
    monkeypatch.chdir(tmp_path / "there")
    for each in (pickled, unopened):
        async with pickle.loads(each) as buf:
            assert await buf.read() == b"here"
    assert not (tmp_path / "there" / "cache").exists()
    again = pickle.dumps(pickle.loads(pickled))
    (tmp_path / "here" / "file").write_bytes(b"gone")
    for each in (pickled, again):
        with pytest.raises(aiouffd.SourceChangedError):
            await pickle.loads(each)


async def test_a_pickle_is_of_one_store(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose endpoint came from the environment, which is another one where it is opened."""
    client: dict[str, Any] = {"client_options": {"allow_http": True}}
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    async with RangeServer({"/bucket/a": b"2" * SIZE}) as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url(""))
        async with aiouffd.open("s3://bucket/a", **client) as buf:
            pickled = pickle.dumps(buf)
        async with pickle.loads(pickled) as buf:
            assert await buf.read(0, 4) == b"1111"
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.url(""))
        with pytest.raises(aiouffd.SourceChangedError, match="environment"):
            await pickle.loads(pickled)
        assert not other.requests, "nobody else is asked for it"

    monkeypatch.delenv("AWS_ENDPOINT_URL")
    config = {"endpoint": server.url(""), "skip_signature": "true"}
    async with aiouffd.open("s3://bucket/a", config=config, **client) as buf:
        pickled = pickle.dumps(buf)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    async with pickle.loads(pickled) as buf:
        assert await buf.read(0, 4) == b"1111"


async def test_a_pickle_of_what_has_no_version_has_a_size(server: RangeServer) -> None:
    headers = {"ETag": None, "Last-Modified": None}
    server.fault = lambda _: Fault(headers=headers)
    options = {"unversioned": "accept"}
    async with aiouffd.open(server.url("/a"), **options) as buf:
        assert buf.source.version is None  # type: ignore[attr-defined]
        pickled = pickle.dumps(buf)
    async with pickle.loads(pickled) as buf:
        assert await buf.read(0, 4) == b"1111"
    server.objects["/a"] = Entry(memoryview(b"1" * (SIZE + 1)))
    with pytest.raises(aiouffd.SourceChangedError, match="bytes"):
        await pickle.loads(pickled)


def test_a_pickle_of_a_sync_buffer_is_of_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"here")
    monkeypatch.chdir(tmp_path)
    with aiouffd.sync.open("file") as buf:
        pickled = pickle.dumps(buf)
    monkeypatch.chdir("/")
    with pickle.loads(pickled) as buf:
        assert buf[:] == b"here"
