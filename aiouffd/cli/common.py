"""What the commands share: arguments that name a source, sizes, progress, and the loop."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from ..errors import AiouffdError, UsageError
from ..sources import as_source
from ..sources.base import Source, aclose_source, open_source
from ..sources.compose import RetrySource

__all__ = [
    "add_cache_argument",
    "add_limit_argument",
    "add_option_argument",
    "add_source_arguments",
    "error_text",
    "human",
    "limits_of",
    "opened",
    "run",
    "size_argument",
    "source_of",
]

T = TypeVar("T")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on uvloop's loop if it is installed: it receives and sends faster."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None
    try:
        try:
            factory = importlib.import_module("uvloop").new_event_loop
        except ImportError:
            factory = None
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(coroutine)
    finally:
        coroutine.close()  # if it was interrupted before it began


# ---- arguments ----


def size_argument(text: str) -> int:
    """'64K' -> 65536."""
    number = text.rstrip("KMGTkmgt")
    unit = text[len(number) :].upper()
    if not number.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 4096 or 64K")
    return int(number) * _UNITS[unit]


def option_argument(text: str) -> tuple[str, Any]:
    """'name=value' -> the pair; a value that reads as JSON is that, any other is text."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def limit_argument(text: str) -> tuple[str, float]:
    """'pages=1M' -> the pair; a number as `size_argument` reads them, or one of seconds."""
    name, separator, value = text.partition("=")
    if separator:
        try:
            return name, size_argument(value)
        except argparse.ArgumentTypeError:
            with suppress(ValueError):
                return name, float(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER")


def add_limit_argument(parser: argparse.ArgumentParser, limits: dict[str, float]) -> None:
    """``--limit NAME=NUMBER``; ``limits`` has the names and what they are by default."""
    known = ", ".join(f"{name} ({value})" for name, value in limits.items())
    parser.add_argument(
        "--limit",
        type=limit_argument,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help=f"what clients may ask for, may be repeated: {known}",
    )


def limits_of(parsed: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """What was given by ``--limit``, of the types of ``limits``. UsageError for other names."""
    given: dict[str, Any] = {}
    for name, value in parsed.limit:
        if name not in limits:
            raise UsageError(
                f"--limit: there is no limit {name}", hint=f"there are {', '.join(limits)}"
            )
        kind = type(limits[name])
        if value <= 0 or kind(value) != value:
            raise UsageError(f"--limit: {name} is a positive number, not {value:g}")
        given[name] = kind(value)
    return given


def add_option_argument(parser: argparse.ArgumentParser, what: str = "the source") -> None:
    """``-o NAME=VALUE``: keywords of ``what``."""
    parser.add_argument(
        "-o",
        "--option",
        type=option_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"a keyword of {what}; VALUE is JSON or text (may be repeated)",
    )


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """``--cache``: on disk, in a folder or in the usual one."""
    parser.add_argument(
        "--cache",
        nargs="?",
        const=True,
        metavar="DIRECTORY",
        help="keep what is read on disk, and read from there what is (default: the user's cache)",
    )


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE and the options that say how to read it."""
    parser.add_argument("source", metavar="SOURCE", help="a path or a URL")
    add_option_argument(parser)
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to try again when the source fails for a while (default: 60)",
    )
    add_cache_argument(parser)


def source_of(parsed: argparse.Namespace, **options: Any) -> Source:
    """The source that the command line names, unopened."""
    try:
        source = as_source(parsed.source, **{**options, **dict(parsed.option)})
    except AiouffdError:
        raise
    except (TypeError, ValueError) as error:
        names = ", ".join(name for name, _ in parsed.option)
        raise UsageError(f"-o {names}: {error}" if names else str(error)) from error
    if parsed.cache is None:
        return source
    from ..sources.cache import cached

    wrapped: Source = cached(source, parsed.cache)
    return wrapped


@asynccontextmanager
async def opened(source: Source, patience: float | None = None) -> AsyncIterator[Source]:
    """``source`` opened; with ``patience`` (seconds) it tries again after transient errors."""
    if patience:
        source = RetrySource(source, budget=patience)
    await open_source(source)
    try:
        yield source
    finally:
        await aclose_source(source)


# ---- output ----


def human(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.4g} {unit}"


def error_text(error: Exception) -> str:
    """An exception for the person at the terminal."""
    if isinstance(error, OSError) and not isinstance(error, AiouffdError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
