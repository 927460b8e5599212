"""``aiouffd serve``: any source as an NBD export."""

from __future__ import annotations

import argparse
import asyncio
import signal
import ssl
import sys
from typing import Any

from ..errors import UsageError
from .common import add_source_arguments, human, opened, run, source_of

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add this command to the parser's ``commands``."""
    serve = commands.add_parser(
        "serve",
        help="offer an object to NBD clients (qemu, nbdcopy, the kernel's nbd, ...)",
        description="Serve SOURCE as an NBD export until SIGINT or SIGTERM; requests under way"
        " are answered before it ends. The first line of output is the export's URL.",
    )
    add_source_arguments(serve)
    serve.add_argument("--nbd", action="store_true", required=True, help="the protocol")
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, help="TCP port (default: 10809; 0: any free one)")
    serve.add_argument("--socket", metavar="PATH", help="a Unix socket instead, of mode 0600")
    serve.add_argument("--export", default="", metavar="NAME", help="name of the export")
    serve.add_argument("--writable", action="store_true", help="let clients write")
    serve.add_argument("--cert", metavar="FILE", help="certificate (PEM): TLS for all clients")
    serve.add_argument("--key", metavar="FILE", help="private key, if not in the same file")
    serve.add_argument("--client-ca", metavar="FILE", help="ask clients for certificates of it")
    serve.add_argument(
        "--drain", type=float, default=10.0, metavar="SECONDS", help="time to finish (default: 10)"
    )
    serve.set_defaults(run=_serve)


def _tls(parsed: argparse.Namespace) -> ssl.SSLContext | None:
    if parsed.cert is None:
        if parsed.key or parsed.client_ca:
            raise UsageError("--key and --client-ca go with --cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=parsed.client_ca)
    context.load_cert_chain(parsed.cert, parsed.key)
    if parsed.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _serve(parsed: argparse.Namespace) -> int:
    if parsed.socket and (parsed.host or parsed.port is not None):
        raise UsageError("--socket is instead of --host and --port")
    run(_main(parsed, _tls(parsed)))
    return 0


async def _main(parsed: argparse.Namespace, tls: ssl.SSLContext | None) -> None:
    from ..nbd.server import NbdServer

    options = {"writable": True} if parsed.writable else {}
    async with opened(source_of(parsed, **options), parsed.patience) as source:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        server = NbdServer(
            {parsed.export: source}, writable=parsed.writable, tls=tls, tls_required=tls is not None
        )
        try:
            if parsed.socket:
                url = await server.listen_unix(parsed.socket)
            else:
                port = 10809 if parsed.port is None else parsed.port
                url = await server.listen(parsed.host or "127.0.0.1", port)
            print(url, flush=True)
            await stop.wait()
        finally:
            await server.aclose(drain=parsed.drain)
            stats = server.stats
            print(
                f"{stats.clients_total} clients, {stats.requests} requests,"
                f" {human(stats.bytes_read)} read, {human(stats.bytes_written)} written",
                file=sys.stderr,
            )
