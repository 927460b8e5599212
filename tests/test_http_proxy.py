"""Proxies: those that the environment names, as curl and requests take them, and given ones."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme

from aiouffd.errors import SourceError, UnsupportedError
from aiouffd.sources import HttpSource, SourcePermissionError
from aiouffd.sources._http_proxy import proxy_for
from tests.servers.http import Fault, RangeServer, pattern
from tests.support import ROOT, environment

DATA = pattern(100_000)
#: A server that only a proxy knows.
URL = "http://origin.invalid/a"


@pytest.fixture
async def proxy() -> AsyncIterator[RangeServer]:
    """It has been asked for the whole URL, as proxies are."""
    async with RangeServer({URL: DATA, "/a": DATA[::-1]}) as server:
        yield server


async def first(source: HttpSource) -> bytes:
    await source.open()
    try:
        clone = source.clone()
        await clone.open()
        assert await clone.read(0, 100) == await source.read(0, 100)
        await clone.aclose()
        return bytes(await source.read(0, 10))
    finally:
        await source.aclose()


async def test_the_environment_is_heeded(
    proxy: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url(""))
    assert await first(HttpSource(URL)) == DATA[:10]
    assert {request.path for request in proxy.requests} == {URL}
    # What is excepted is asked itself.
    monkeypatch.setenv("no_proxy", "example.com, 127.0.0.0/8")
    assert await first(HttpSource(proxy.url("/a"))) == DATA[::-1][:10]
    assert await first(HttpSource(URL)) == DATA[:10]
    # And so is everything, when the program says so.
    with pytest.raises(SourceError, match="connection failed"):
        await HttpSource(URL, proxy="").open()


async def test_the_environment_costs_no_thread_and_no_password(
    proxy: RangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """aiohttp's own way takes a thread of the default executor for each request, which may all be
    waiting for pages, and sends what is in ~/.netrc."""
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", proxy.url(""))
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1)
    loop.set_default_executor(executor)
    release = threading.Event()
    busy = loop.run_in_executor(None, release.wait)
    try:
        async with asyncio.timeout(10):
            assert await first(HttpSource(URL)) == DATA[:10]
    finally:
        release.set()
        await busy
    assert not any("authorization" in request.headers for request in proxy.requests)


async def test_a_given_proxy_is_used_whatever_the_environment_says(
    proxy: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    url = proxy.url("").replace("//", "//me:pa%3Ass@")
    assert await first(HttpSource(URL, proxy=url)) == DATA[:10]
    token = proxy.requests[0].headers["proxy-authorization"].removeprefix("Basic ")
    assert base64.b64decode(token) == b"me:pa:ss"


async def test_a_proxy_that_fails_is_told_from_the_server(
    proxy: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    with pytest.raises(SourceError, match=r"its proxy 127\.0\.0\.1:9 cannot be reached") as info:
        await HttpSource(URL).open()
    assert info.value.transient
    assert "secret" not in str(info.value)
    proxy.faults.append(Fault(status=407))
    with pytest.raises(SourcePermissionError, match="407"):
        await HttpSource(URL, proxy=proxy.url("")).open()


async def test_https_goes_through_a_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("origin.invalid").configure_cert(server_side)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    asked: list[bytes] = []

    async with RangeServer({"/a": DATA}, ssl=server_side) as server:

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
            writer.close()

        async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append((await reader.readuntil(b"\r\n\r\n")).split(b" HTTP")[0])
            ours, theirs = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(pump(reader, theirs), pump(ours, writer))

        async with await asyncio.start_server(tunnel, "127.0.0.1", 0) as listener:
            monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{listener.sockets[0].getsockname()[1]}")
            source = HttpSource("https://origin.invalid/a", ssl=trusting)
            assert await first(source) == DATA[:10]
            assert set(asked) == {b"CONNECT origin.invalid:443"}


async def test_a_proxy_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="speaks socks5"):
        HttpSource(URL, proxy="socks5://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "socks5h://127.0.0.1:1")
    with pytest.raises(UnsupportedError, match=r"speaks socks5h.*no_proxy"):
        await HttpSource(URL).open()


@pytest.mark.parametrize(
    ("url", "variables", "proxy"),
    [
        ("http://h/", {}, None),
        ("http://h/", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("http://h/", {"http_proxy": "p:1"}, "http://p:1"),
        ("http://h/", {"http_proxy": ""}, None),
        ("https://h/", {"http_proxy": "http://p:1"}, None),
        ("https://h/", {"https_proxy": "http://p:1"}, "http://p:1"),
        ("https://h/", {"ALL_PROXY": "http://p:1", "http_proxy": "http://q:1"}, "http://p:1"),
        ("http://h/", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        # What a client of a CGI program sent as "Proxy:".
        ("http://h/", {"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}, None),
        ("http://h/", {"http_proxy": "http://p:1", "no_proxy": "h"}, None),
        ("http://h:80/", {"http_proxy": "http://p:1", "no_proxy": "h:80"}, None),
        ("http://h:81/", {"http_proxy": "http://p:1", "no_proxy": "h:80"}, "http://p:1"),
        ("http://a.h/", {"http_proxy": "http://p:1", "no_proxy": ".h"}, None),
        ("http://a.h/", {"http_proxy": "http://p:1", "no_proxy": "h"}, None),
        ("http://ah/", {"http_proxy": "http://p:1", "no_proxy": "h"}, "http://p:1"),
        ("http://h/", {"http_proxy": "http://p:1", "no_proxy": "*"}, None),
        ("http://10.1.2.3/", {"http_proxy": "http://p:1", "no_proxy": "x,10.0.0.0/8"}, None),
        ("http://11.1.2.3/", {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}, "http://p:1"),
        ("http://[fd00::1]:5/", {"http_proxy": "http://p:1", "no_proxy": "fd00::/8"}, None),
    ],
)
def test_which_proxy(
    url: str, variables: dict[str, str], proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(url) == proxy


async def test_obstore_heeds_the_environment(proxy: RangeServer) -> None:
    """In a process of its own: it looks once."""
    pytest.importorskip("obstore")
    code = """
import asyncio, sys
from aiouffd.sources.objects import ObjectSource
async def main():
    source = ObjectSource.from_url("obstore+" + sys.argv[1])
    await source.open()
    sys.stdout.buffer.write(await source.read(0, 10))
    await source.aclose()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        URL,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT), http_proxy=proxy.url("")),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert out == DATA[:10]
