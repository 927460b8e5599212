"""Colours and progress bars on terminals, by rich; nothing where the stream is no terminal."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeAlias

__all__ = ["Progress", "console_for", "progress", "reporting"]

#: How to report progress: a function of the bytes done and in total, True for a bar, else not.
Progress: TypeAlias = Callable[[int, int], object] | bool | None


def console_for(stream: TextIO) -> Any:
    """Return a rich console on ``stream``; None without rich or if it is no terminal."""
    if not stream.isatty():
        return None
    try:
        console = importlib.import_module("rich.console").Console
    except ImportError:
        return None
    return console(file=stream, highlight=False)


@contextmanager
def progress(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error if that is a terminal.

    Args:
        what: The bar's label.
        total: The end of the bar, in bytes.
        quiet: Show nothing.

    Yields:
        A function that takes the number of bytes done since its last call.
    """
    console = None if quiet else console_for(sys.stderr)
    if console is None:
        yield lambda _count: None
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def reporting(
    wanted: Progress, what: str, total: int
) -> Iterator[Callable[[int, int], object] | None]:
    """Turn a ``progress=`` argument into a function of the bytes done and of the total.

    Args:
        wanted: The argument. True shows a bar with rate and time left, where standard error is a
            terminal and rich is installed, and nothing elsewhere.
        what: The bar's label.
        total: The end of the bar, in bytes.

    Yields:
        The function, or None.
    """
    if wanted is not True:
        yield wanted or None
        return
    done = 0
    with progress(what, total) as advance:

        def report(now: int, _total: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        yield report
