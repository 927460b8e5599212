"""``aiouffd cat`` and ``aiouffd copy``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..errors import UsageError
from ..sources import as_source
from ..sources.base import Source
from ..sources.copying import PipeSink, SourceSink, transfer
from ..sources.destination import file_sink
from ..sources.file import path_of_url
from ..sources.names import display_name
from ..sources.registry import lookup, scheme_of
from ..util.terminal import progress
from .common import (
    add_source_arguments,
    human,
    opened,
    option_argument,
    run,
    size_argument,
    source_of,
)

__all__ = ["add_to"]

T = TypeVar("T")


def add_to(commands: Any) -> None:
    """Add these commands to the parser's ``commands``."""
    cat = commands.add_parser("cat", help="write an object, or a part of it, to standard output")
    copy = commands.add_parser(
        "copy",
        help="copy an object to a file, or to a source that can be written to",
        description="Copy SOURCE to a file, which appears or is replaced when it is complete"
        " (with holes where SOURCE tells them), to a device, or to a URL that can be written to"
        " and is large enough. Status 0 means that all was made durable.",
    )
    for parser in (cat, copy):
        add_source_arguments(parser)
        parser.add_argument(
            "--offset", type=size_argument, default=0, metavar="N", help="bytes to leave out"
        )
        parser.add_argument(
            "--length", type=size_argument, metavar="N", help="bytes to copy (default: the rest)"
        )
        parser.add_argument("--quiet", action="store_true", help="no progress bar")
        parser.epilog = "N may end in K, M, G or T (powers of 1024)."
    copy.add_argument("destination", metavar="DESTINATION", help="a path or a URL")
    copy.add_argument(
        "-O",
        "--destination-option",
        type=option_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a keyword of the destination",
    )
    cat.set_defaults(run=_cat)
    copy.set_defaults(run=_copy)


def _length(parsed: argparse.Namespace, source: Source) -> int:
    if parsed.length is not None:
        return int(parsed.length)
    if parsed.offset > source.size:
        raise UsageError(f"offset {parsed.offset} is past the {source.size} bytes of the source")
    return source.size - int(parsed.offset)


def _cat(parsed: argparse.Namespace) -> int:
    async def main() -> None:
        async with opened(source_of(parsed), parsed.patience) as source:
            length = _length(parsed, source)
            quiet = parsed.quiet or sys.stdout.isatty()
            with progress(parsed.source, length, quiet=quiet) as advance:
                await transfer(source, PipeSink(sys.stdout.buffer), parsed.offset, length, advance)

    _run(main)
    return 0


def _copy(parsed: argparse.Namespace) -> int:
    started = time.monotonic()

    async def main() -> int:
        async with opened(source_of(parsed), parsed.patience) as source:
            length = _length(parsed, source)
            with progress(parsed.source, length, quiet=parsed.quiet) as advance:
                path = _path(parsed.destination)
                if path is not None:
                    if parsed.destination_option:
                        raise UsageError("a file as the destination has no options")
                    sink = await file_sink(path, length, source=_path(parsed.source))
                    await transfer(source, sink, parsed.offset, length, advance)
                    return length
                _check_writable(parsed.destination)
                options = {"writable": True, **dict(parsed.destination_option)}
                target = as_source(parsed.destination, **options)
                async with opened(target) as target:
                    if target.size < length:
                        raise UsageError(
                            f"{parsed.destination} has {target.size} bytes, which is less than"
                            f" the {length} to copy"
                        )
                    sink_to = SourceSink(target)
                    await transfer(source, sink_to, parsed.offset, length, advance)
        return length

    length = _run(main)
    if not parsed.quiet:
        seconds = max(time.monotonic() - started, 1e-6)
        print(f"{human(length)} in {seconds:.2f} s, {human(length / seconds)}/s", file=sys.stderr)
    return 0


def _check_writable(url: str) -> None:
    """Raise UsageError for URLs of sources that can only be read."""
    factory = lookup(scheme_of(url) or "").load()
    owner = getattr(factory, "__self__", factory)
    # Whoever makes them by a function says so itself.
    if isinstance(owner, type) and not hasattr(owner, "write"):
        raise UsageError(
            f"{display_name(url)} cannot be written to",
            hint="a path, a device, file://, nbd:// and its relatives can",
        )


def _path(text: str) -> str | None:
    """The path that ``text`` is, or that it names as a ``file://`` URL; None for other URLs."""
    scheme = scheme_of(text)
    if scheme is None:
        return text
    return path_of_url(text) if scheme == "file" else None


def _run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main``. SIGTERM and SIGHUP end it as Ctrl-C does, so that it cleans up, and then the
    process as they do without us. The second one ends it at once."""
    ended_by: list[int] = []
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL  # and not ignored, as nohup(1) has it
    ]

    async def guarded() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            for each in numbers:
                loop.remove_signal_handler(each)
            ended_by.append(number)
            task.cancel()

        for number in numbers:
            loop.add_signal_handler(number, stop, number)
        try:
            return await main()
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    try:
        return run(guarded())
    except asyncio.CancelledError:
        if ended_by:
            os.kill(os.getpid(), ended_by[0])
        raise
