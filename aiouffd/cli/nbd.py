"""``aiouffd nbd``: any source as an NBD export."""

from __future__ import annotations

import argparse
import asyncio
import signal
import ssl
import sys
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .common import (
    add_limit_argument,
    add_source_arguments,
    human,
    limits_of,
    opened,
    run,
    source_of,
)

if TYPE_CHECKING:
    from ..nbd.server import NbdServer

__all__ = ["add_to"]

#: As `NbdServer` has them, which is not light to import; a test compares.
LIMITS: dict[str, float] = {
    "max_clients": 64,
    "max_requests": 64,
    "memory": 256 << 20,
    "handshake_timeout": 10.0,
    "stall_timeout": 60.0,
}
#: What ends it.
STOP = (signal.SIGINT, signal.SIGTERM)


def add_to(commands: Any) -> None:
    """Add this command to the parser's ``commands``, also by its former name."""
    parser = commands.add_parser(
        "nbd",
        help="offer an object to NBD clients (qemu, nbdcopy, the kernel's nbd, ...)",
        description="Serve SOURCE as an NBD export until SIGINT or SIGTERM; requests under way"
        " are answered before it ends, unless a second signal comes. The first line of output is"
        " the export's URL.",
    )
    _add_arguments(parser)
    parser.set_defaults(run=_serve)
    former = commands.add_parser("serve", help="the former name of `aiouffd nbd`")
    _add_arguments(former)
    former.add_argument("--nbd", action="store_true", help="the protocol: there is no other one")
    former.set_defaults(run=_serve_by_former_name)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="TCP port (default: 10809; 0: any free one)")
    parser.add_argument("--socket", metavar="PATH", help="a Unix socket instead, of mode 0600")
    parser.add_argument("--export", default="", metavar="NAME", help="name of the export")
    parser.add_argument("--writable", action="store_true", help="let clients write")
    parser.add_argument("--cert", metavar="FILE", help="certificate (PEM): TLS for all clients")
    parser.add_argument("--key", metavar="FILE", help="private key, if not in the same file")
    parser.add_argument("--client-ca", metavar="FILE", help="ask clients for certificates of it")
    parser.add_argument(
        "--drain", type=float, default=10.0, metavar="SECONDS", help="time to finish (default: 10)"
    )
    add_limit_argument(parser, LIMITS)


def _tls(parsed: argparse.Namespace) -> ssl.SSLContext | None:
    if parsed.cert is None:
        if parsed.key or parsed.client_ca:
            raise UsageError("--key and --client-ca go with --cert")
        return None
    for path in filter(None, (parsed.cert, parsed.key, parsed.client_ca)):
        with open(path, "rb"):  # whose error has its name
            pass
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=parsed.client_ca)
    context.load_cert_chain(parsed.cert, parsed.key)
    if parsed.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _serve_by_former_name(parsed: argparse.Namespace) -> int:
    print("aiouffd: `aiouffd serve` is called `aiouffd nbd` now", file=sys.stderr)
    return _serve(parsed)


def _serve(parsed: argparse.Namespace) -> int:
    if parsed.socket is not None and (parsed.host is not None or parsed.port is not None):
        raise UsageError("--socket is instead of --host and --port")
    if parsed.socket == "" or parsed.host == "":
        raise UsageError("--socket and --host are not empty")
    run(_main(parsed, _tls(parsed)))
    return 0


async def _main(parsed: argparse.Namespace, tls: ssl.SSLContext | None) -> None:
    from ..nbd.server import NbdServer

    options = {"writable": True} if parsed.writable else {}
    async with opened(source_of(parsed, **options), parsed.patience) as source:
        stop, now = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def stopped() -> None:
            if stop.is_set():
                now.set()
                # The third one ends us, whatever the source is waiting for.
                for number in STOP:
                    loop.remove_signal_handler(number)
            stop.set()

        for number in STOP:
            loop.add_signal_handler(number, stopped)
        server = NbdServer(
            {parsed.export: source},
            writable=parsed.writable,
            tls=tls,
            tls_required=tls is not None,
            **limits_of(parsed, LIMITS),
        )
        try:
            if parsed.socket is not None:
                url = await server.listen_unix(parsed.socket)
            else:
                port = 10809 if parsed.port is None else parsed.port
                url = await server.listen(parsed.host or "127.0.0.1", port)
            print(url, flush=True)
            await stop.wait()
        finally:
            await _close(server, parsed.drain, now)
        stats = server.stats
        print(
            f"{stats.clients_total} clients, {stats.requests} requests,"
            f" {human(stats.bytes_read)} read, {human(stats.bytes_written)} written",
            file=sys.stderr,
        )


async def _close(server: NbdServer, drain: float, now: asyncio.Event) -> None:
    """Close within ``drain`` seconds, or ``now``."""
    hurry = asyncio.ensure_future(now.wait())
    closing = asyncio.ensure_future(server.aclose(drain))
    try:
        await asyncio.wait((hurry, closing), return_when=asyncio.FIRST_COMPLETED)
        if not closing.done():
            await server.aclose(0)
        await closing
    finally:
        hurry.cancel()
