"""The command line: ``aiouffd doctor``, ``info`` and ``cat``.

Exit status: 0 it went well, 1 it did not, 2 the command line is wrong. Needs the
standard library only; with rich installed the output for people has colours.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from . import __version__
from .doctor import Report, Status, examine
from .errors import AiouffdError, UsageError
from .sources import as_source
from .sources.base import Source, aclose_source, open_source, stream_source

__all__ = ["main"]

_SIGNS: dict[Status, str] = {"ok": "ok", "note": "--", "warning": "!!", "problem": "XX"}
_STYLES: dict[Status, str] = {
    "ok": "green",
    "note": "dim",
    "warning": "bold yellow",
    "problem": "bold red",
}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

#: Bytes asked for at a time by ``cat``.
_STEP = 8 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. SystemExit for ``--help`` and wrong usage."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        print(f"aiouffd: {error}", file=sys.stderr)
        return 2
    except (AiouffdError, OSError) as error:
        print(f"aiouffd: {_text(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aiouffd", description="Memory that fills itself: userfaultfd for asyncio."
    )
    parser.add_argument("--version", action="version", version=f"aiouffd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="whether lazy memory works here, and what to do if not",
        description="Look at this system as this user, and try lazy memory out.",
        epilog="Exit status: 0 lazy buffers work here, 1 they do not, 2 wrong usage.",
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)

    info = commands.add_parser("info", help="size and version of an object")
    info.add_argument("source", help="a URL or a path")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)

    cat = commands.add_parser("cat", help="write an object, or a part of it, to standard output")
    cat.add_argument("source", help="a URL or a path")
    cat.add_argument("--offset", type=_size, default=0, metavar="N", help="bytes to leave out")
    cat.add_argument("--length", type=_size, metavar="N", help="bytes to write (default: the rest)")
    cat.epilog = "N may end in K, M, G or T (powers of 1024)."
    cat.set_defaults(run=_cat)
    return parser


def _size(text: str) -> int:
    """'64K' -> 65536."""
    number = text.rstrip("KMGTkmgt")
    unit = text[len(number) :].upper()
    if not number.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 4096 or 64K")
    return int(number) * _UNITS[unit]


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, AiouffdError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


# ---- doctor ----


def _doctor(parsed: argparse.Namespace) -> int:
    report = examine()
    if parsed.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        console = _console()
        if console is None:
            _print_plain(report)
        else:
            _print_rich(report, console)
    return 0 if report.works else 1


def _verdict(report: Report) -> tuple[Status, str]:
    if not report.works:
        return "problem", "Lazy buffers do not work here. What is marked XX says why."
    if not report.kernel_mode_faults:
        return "warning", (
            "Lazy buffers work here, but for system calls on memory that is not there yet."
        )
    return "ok", "Lazy buffers work here."


def _print_plain(report: Report) -> None:
    print(f"aiouffd {report.version}")
    section = ""
    for check in report.checks:
        if check.section != section:
            section = check.section
            print(f"\n{section}")
        _print_wrapped(f"  {_SIGNS[check.status]}  {check.name}: ", check.detail)
        if check.remedy:
            _print_wrapped("        -> ", check.remedy)
    print(f"\n{_verdict(report)[1]}")


def _print_wrapped(start: str, text: str) -> None:
    print(
        textwrap.fill(
            text,
            width=100,
            initial_indent=start,
            subsequent_indent=" " * 11,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _console() -> Any:
    """A rich console, or None if rich is missing or nobody would see its colours."""
    if not sys.stdout.isatty():
        return None
    try:
        return importlib.import_module("rich.console").Console(highlight=False)
    except ImportError:
        return None


def _print_rich(report: Report, console: Any) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    signs = {"ok": "✓", "note": "·", "warning": "!", "problem": "✗"}
    longest = max(len(check.name) for check in report.checks)
    console.print(f"aiouffd {report.version}", style="bold")
    for section in dict.fromkeys(check.section for check in report.checks):
        console.print(f"\n{section}", style="bold")
        table = Table.grid(padding=(0, 2))
        table.add_column(width=1)
        table.add_column(width=longest)
        table.add_column()
        for check in report.checks:
            if check.section == section:
                style = _STYLES[check.status]
                detail = Text(check.detail, style="dim" if check.status == "note" else "")
                if check.remedy:
                    detail.append(f"\n→ {check.remedy}", style="cyan")
                table.add_row(Text(signs[check.status], style=style), Text(check.name), detail)
        console.print(Padding(table, (0, 0, 0, 2)))
    status, verdict = _verdict(report)
    console.print(f"\n{verdict.replace('XX', signs['problem'])}", style=_STYLES[status])


# ---- info and cat ----


def _info(parsed: argparse.Namespace) -> int:
    facts = asyncio.run(_facts(as_source(parsed.source)))
    facts = {"source": parsed.source, **facts}
    if parsed.json:
        print(json.dumps(facts, indent=2))
    else:
        print(f"source   {parsed.source}")
        print(f"size     {facts['size']:,} bytes")
        print(f"version  {facts['version'] or 'unknown'}")
        print("ranges   yes: it can be read lazily")
    return 0


async def _facts(source: Source) -> dict[str, Any]:
    await open_source(source)
    try:
        version = getattr(source, "version", None)
        return {"size": source.size, "version": version, "ranges": True}
    finally:
        await aclose_source(source)


def _cat(parsed: argparse.Namespace) -> int:
    asyncio.run(_copy_out(as_source(parsed.source), parsed.offset, parsed.length))
    return 0


async def _copy_out(source: Source, offset: int, length: int | None) -> None:
    await open_source(source)
    try:
        end = source.size if length is None else offset + length
        if not offset <= end <= source.size:
            raise UsageError(
                f"bytes {offset} to {end} are not within the {source.size} bytes of the source"
            )
        while offset < end:
            step = min(_STEP, end - offset)
            async with aclosing(stream_source(source, offset, step)) as chunks:
                async for chunk in chunks:
                    # Blocks, and may: nothing else runs on this loop.
                    sys.stdout.buffer.write(chunk)
            offset += step
    finally:
        await aclose_source(source)
