"""What people see on a terminal, and nobody elsewhere: colours and progress bars, by rich."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeAlias

__all__ = ["Progress", "console_for", "progress", "reporting"]

#: Who is told of progress: a function of the bytes done and of all, a bar (True), or nobody.
Progress: TypeAlias = Callable[[int, int], object] | bool | None


def console_for(stream: TextIO) -> Any:
    """A rich console on ``stream``; None if rich is missing or nobody would see its colours."""
    if not stream.isatty():
        return None
    try:
        console = importlib.import_module("rich.console").Console
    except ImportError:
        return None
    return console(file=stream, highlight=False)


@contextmanager
def progress(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error for somebody who watches; gives a function that takes the
    number of bytes that were added."""
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
    """Turn what a caller gave as ``progress=`` into a function of the bytes done and of all.

    True is a bar for ``what`` with its rate and the time left, where standard error is a terminal
    and rich is installed, and nothing elsewhere.
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
