"""The part of the HTTP source that is about aiohttp: the session, name resolution, its exceptions.

The only module that imports aiohttp; loaded when an HTTP source is opened.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from ..errors import AiouffdError, ShortReadError, SourceError, SourceTimeoutError, UsageError


class _Resolver(AbstractResolver):
    """getaddrinfo on a thread of its own, with a time limit.

    aiohttp's default uses the loop's executor, whose threads may all be waiting for
    pages that only this source can bring.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._executor = ThreadPoolExecutor(2, "aiouffd-dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        def lookup() -> list[ResolveResult]:
            found = []
            for fam, _, proto, _, address in socket.getaddrinfo(
                host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
            ):
                numeric, service = socket.getnameinfo(
                    address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
                )
                found.append(
                    ResolveResult(
                        hostname=host,
                        host=numeric,
                        port=int(service),
                        family=fam,
                        proto=proto,
                        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                    )
                )
            return found

        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                return await loop.run_in_executor(self._executor, lookup)
        except TimeoutError as exc:
            raise OSError(errno.ETIMEDOUT, f"looking up {host} took too long") from exc

    def shut_down(self) -> None:
        """Its threads end when they have found what they look for."""
        self._executor.shutdown(wait=False)

    async def close(self) -> None:
        self.shut_down()


class Session:
    """aiohttp's session, for the running loop: no cookies, no decompression, own resolver.

    Times in seconds, ``read_buffer`` in bytes.
    """

    def __init__(
        self,
        *,
        timeout: float | None,
        connect_timeout: float | None,
        total_timeout: float | None,
        max_connections: int,
        keepalive: float,
        read_buffer: int,
        ssl: ssl.SSLContext | bool,
    ) -> None:
        self._resolver = _Resolver(connect_timeout)
        connector = aiohttp.TCPConnector(
            limit=max_connections,
            keepalive_timeout=keepalive,
            ssl=ssl,
            resolver=self._resolver,
            ttl_dns_cache=60,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=total_timeout,
                sock_connect=connect_timeout,
                sock_read=timeout,
            ),
            auto_decompress=False,
            read_bufsize=read_buffer,
            skip_auto_headers=("Accept",),
        )

    async def request(
        self, method: str, url: yarl.URL, headers: dict[str, str], proxy: str | None
    ) -> aiohttp.ClientResponse:
        """Send a request and return the reply with its body unread."""
        return await self._session.request(
            method, url, headers=headers, proxy=proxy, allow_redirects=False
        )

    async def aclose(self) -> None:
        """Close all connections. They are closed when this first waits, which is only for the
        sockets to go."""
        self._resolver.shut_down()
        await self._session.close()


def translate(name: str, exc: Exception) -> AiouffdError:
    """Return our error for an exception of aiohttp, ssl, asyncio or the sockets below.

    ``name`` is the object's, for messages. Texts of aiohttp that hold the URL are not
    repeated: it may be a signed one.
    """
    if isinstance(exc, AiouffdError):
        return exc
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return SourceError(
            f"{name}: the server's certificate is not valid: {exc.certificate_error}",
            transient=False,
            hint="pass ssl= with an ssl.SSLContext that trusts its authority",
        )
    if isinstance(exc, TimeoutError):
        what = "connect" if isinstance(exc, aiohttp.ConnectionTimeoutError) else "send data"
        return SourceTimeoutError(
            f"{name}: the server took too long to {what}", errno=errno.ETIMEDOUT
        )
    if isinstance(exc, aiohttp.InvalidURL):
        return UsageError(f"{name} is not a usable URL")
    if isinstance(exc, aiohttp.ClientPayloadError):
        return ShortReadError(f"{name}: the connection ended inside a reply")
    if isinstance(exc, aiohttp.ClientHttpProxyError):
        return SourceError(f"{name}: the proxy answered HTTP {exc.status}")
    if isinstance(exc, aiohttp.ClientResponseError):
        reason = exc.message.partition("\n")[0].rstrip(":")
        return SourceError(f"{name}: the server's reply is not valid HTTP ({reason})")
    if isinstance(exc, aiohttp.ClientProxyConnectionError):
        return SourceError(
            f"{name}: its proxy {exc.host}:{exc.port} cannot be reached:"
            f" {os.strerror(exc.errno or 0) if exc.errno in errno.errorcode else exc.strerror}",
            errno=exc.errno,
            hint="the environment (http_proxy, https_proxy) or proxy= names it",
        )
    if isinstance(exc, OSError):
        # asyncio's own texts repeat the address; gaierror's numbers are no errno.
        known = exc.errno in errno.errorcode
        reason = os.strerror(exc.errno or 0) if known else exc.strerror or type(exc).__name__
        return SourceError(
            f"{name}: the connection failed: {reason}", errno=exc.errno if known else None
        )
    return SourceError(f"{name}: the connection failed: {type(exc).__name__}")
