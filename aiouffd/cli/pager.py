"""``aiouffd pager``: serve the memory of other processes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .common import (
    add_cache_argument,
    add_limit_argument,
    add_option_argument,
    human,
    limits_of,
    run,
    size_argument,
)

if TYPE_CHECKING:
    from ..serve import Client, MemoryStats
    from ..serve.dialects import Dialect

__all__ = ["add_to"]

#: As `aiouffd.serve.Limits` has them, which is not light to import; a test compares.
LIMITS: dict[str, float] = {
    "memories": 1024,
    "areas": 65536,
    "bytes": 1 << 44,
    "pages": 1 << 28,
    "all_pages": 1 << 32,
    "user_pages": 1 << 31,
    "user_clients": 512,
    "handshake": 10.0,
    "max_clients": 1024,
}


def add_to(commands: Any) -> None:
    """Add this command and its dialects to the parser's ``commands``."""
    pager = commands.add_parser(
        "pager",
        help="serve the page faults of other processes: microVMs, CRIU, our own clients",
        description="Serve other processes' memory until SIGINT or SIGTERM. Clients that keep a"
        " copy of their descriptor (all but CRIU's) then wait for the next pager.",
    )
    dialects = pager.add_subparsers(title="dialects", required=True, metavar="DIALECT")

    firecracker = dialects.add_parser(
        "firecracker",
        help="the handshake of Firecracker and its relatives",
        description="Serve microVMs that are restored with the memory backend 'Uffd'. Start it"
        " before the microVM; the jailed process has to be able to write to the socket.",
    )
    _add_socket(firecracker)
    firecracker.add_argument(
        "--memory", metavar="SOURCE", required=True, help="the guest's memory: a path or a URL"
    )
    firecracker.add_argument(
        "--ack", action="store_true", help="answer with one byte, as StratoVirt expects"
    )
    firecracker.add_argument(
        "--on-failure",
        choices=("kill", "poison"),
        default="kill",
        help="what becomes of a microVM that waits for a page that cannot be had: its end (the"
        " default), or an error, which a guest may take for a device's answer",
    )
    _add_serving(firecracker)
    firecracker.set_defaults(run=_firecracker)

    native = dialects.add_parser(
        "native",
        help="aiouffd.attach, and C programs with aiouffd_client.h",
        description="Serve SOURCE to clients of aiouffd's own protocol.",
    )
    _add_socket(native)
    native.add_argument("memory", metavar="SOURCE", help="a path or a URL")
    _add_serving(native)
    native.set_defaults(run=_native, on_failure="poison")

    criu = dialects.add_parser(
        "criu",
        help="criu restore --lazy-pages",
        description="Serve restored processes from the images of a dump. Ends when the restore is"
        " complete, unless --keep is given.",
    )
    criu.add_argument("--images", metavar="DIR", required=True, help="the images: a path or a URL")
    criu.add_argument(
        "--work-dir", metavar="DIR", help="where lazy-pages.socket is made (default: the images)"
    )
    criu.add_argument("--keep", action="store_true", help="serve one restore after the other")
    criu.add_argument(
        "--block-size", type=size_argument, help="bytes fetched at a time (default: 64K)"
    )
    criu.add_argument(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help="give up on a page after that (default: wait for as long as the source may recover)",
    )
    criu.add_argument(
        "--parent",
        metavar="DIR",
        action="append",
        default=[],
        help="images of the dump before, where 'parent' does not lead there (may be repeated)",
    )
    criu.add_argument(
        "--page-server",
        metavar="HOST:PORT",
        help="where the pages are that criu dump --lazy-pages has not written",
    )
    criu.add_argument(
        "--page-server-head",
        type=int,
        choices=(24, 32),
        default=32,
        help="bytes in the page server's structures: 32 since CRIU 4.2, 24 before",
    )
    add_option_argument(criu, "the images' sources")
    criu.set_defaults(run=_criu)


def _add_socket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", metavar="PATH", required=True, help="where clients connect")
    parser.add_argument(
        "--mode", type=_mode, default=0o600, help="permissions of the socket (default: 600)"
    )
    parser.add_argument(
        "--any-user",
        action="store_true",
        help="serve other users too, as far as the mode lets them",
    )
    parser.add_argument(
        "--take-over", action="store_true", help="continue what another pager there serves"
    )
    parser.add_argument(
        "--handover",
        metavar="PATH",
        help="where a successor takes over, if others can write to the socket's directory (default:"
        " the socket's path and '.handover')",
    )


def _add_serving(parser: argparse.ArgumentParser) -> None:
    add_option_argument(parser)
    parser.add_argument(
        "--block-size", type=size_argument, help="bytes fetched at a time (default: 64K)"
    )
    parser.add_argument(
        "--readahead", type=size_argument, default=0, help="bytes ahead of sequential access"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help="give up on a page after that (default: wait for as long as the source may recover)",
    )
    parser.add_argument("--prefetch", metavar="FILE", help="bring a working set ahead of faults")
    parser.add_argument(
        "--prefetch-any-version",
        action="store_true",
        help="use the working set for a copy of the object that it was recorded of, too",
    )
    parser.add_argument(
        "--record", metavar="FILE", help="save what the first client needs as a working set"
    )
    add_cache_argument(parser)
    add_limit_argument(parser, LIMITS)


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal mode such as 660")
    return mode


def _firecracker(parsed: argparse.Namespace) -> int:
    from ..serve.dialects.firecracker import FirecrackerDialect

    return _serve(parsed, FirecrackerDialect(ack=parsed.ack))


def _native(parsed: argparse.Namespace) -> int:
    from ..serve.dialects.native import NativeDialect

    return _serve(parsed, NativeDialect())


def _criu(parsed: argparse.Namespace) -> int:
    from ..serve.criu import serve_images

    async def main() -> int:
        # The first signal lets a restore that has begun come to its end, the second one does not.
        signals = 0

        def stop() -> None:
            nonlocal signals
            signals += 1
            # Two at once would be one cancellation.
            asyncio.get_running_loop().call_later(0.05 * (signals - 1), task.cancel)

        task = asyncio.ensure_future(
            serve_images(
                parsed.images,
                work_dir=parsed.work_dir,
                keep=parsed.keep,
                parents=parsed.parent,
                page_server=parsed.page_server,
                page_server_head=parsed.page_server_head,
                options=dict(parsed.option),
                block_size=parsed.block_size,
                deadline=parsed.deadline,
                ready=lambda server: print(server.path, flush=True),
            )
        )
        _on_signals(stop)
        try:
            stats = await task
        except asyncio.CancelledError:
            if signals > 1:
                print("aiouffd: given up; what was missing are errors now", file=sys.stderr)
            return int(signals > 1)
        print(_figures(stats), file=sys.stderr)
        return 0

    return run(main())


def _all_descriptors() -> None:
    """Clients take descriptors, so use as many as this user may have at all."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _on_signals(stop: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    # A terminal that is closed must not be the sudden end of who serves processes that keep no copy
    # of their descriptor: they would see zeros. But nohup is heeded.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, stop)


def _serve(parsed: argparse.Namespace, dialect: Dialect) -> int:
    if (
        parsed.record
        and parsed.prefetch
        and os.path.abspath(parsed.record) == os.path.abspath(parsed.prefetch)
    ):
        raise UsageError("--record would overwrite what --prefetch reads")
    if parsed.record:
        folder = os.path.dirname(os.path.abspath(parsed.record))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise UsageError(f"--record: {folder} is not a folder that can be written to")
    _all_descriptors()
    run(_main(parsed, dialect))
    return 0


async def _main(parsed: argparse.Namespace, dialect: Dialect) -> None:
    from ..fetch.workingset import WorkingSet
    from ..serve import Limits, anybody, listen, same_user

    prefetch = WorkingSet.load(parsed.prefetch) if parsed.prefetch else None
    if prefetch is not None and parsed.prefetch_any_version:
        prefetch = prefetch.for_copies()
    first: list[Client] = []

    async def on_client(client: Client) -> None:
        if parsed.record and not first:
            first.append(client)
            client.record = True

    limits = limits_of(parsed, LIMITS)
    server = listen(
        parsed.socket,
        max_clients=limits.pop("max_clients", LIMITS["max_clients"]),
        limits=Limits(**limits),
        source=_source(parsed),
        dialect=dialect,
        on_client=on_client,
        allow=anybody if parsed.any_user else same_user,
        mode=parsed.mode,
        block_size=parsed.block_size,
        readahead=parsed.readahead,
        deadline=parsed.deadline,
        on_failure=parsed.on_failure,
        prefetch=prefetch,
        handover=parsed.handover or True,
        take_over=parsed.take_over,
    )
    stop = asyncio.Event()
    _on_signals(stop.set)
    async with server:
        print(server.path, flush=True)
        await _any(stop.wait(), server.taken_over.wait())
        if first:
            first[0].working_set().save(parsed.record)
        print(f"{_figures(server.stats)}, {server.refused} clients refused", file=sys.stderr)


def _source(parsed: argparse.Namespace) -> Any:
    options = dict(parsed.option)
    if parsed.cache is None and not options:
        return parsed.memory
    from ..sources import as_source

    source = as_source(parsed.memory, **options)
    if parsed.cache is not None:
        from ..sources.cache import cached

        source = cached(source, parsed.cache)
    return source


async def _any(*coroutines: Any) -> None:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _figures(stats: MemoryStats) -> str:
    return (
        f"{stats.faults} faults, {human(stats.installed_bytes)} installed,"
        f" {stats.zero_pages} pages of zeros, {stats.poisoned_pages} errors"
    )
