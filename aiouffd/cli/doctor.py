"""``aiouffd doctor``: whether lazy memory works here, for people and for programs."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import Any

from ..util.terminal import console_for
from .examine import Report, Status, examine

__all__ = ["add_to"]

_SIGNS: dict[Status, str] = {"ok": "ok", "note": "--", "warning": "!!", "problem": "XX"}
_STYLES: dict[Status, str] = {
    "ok": "green",
    "note": "dim",
    "warning": "bold yellow",
    "problem": "bold red",
}


def add_to(commands: Any) -> None:
    """Add this command to the parser's ``commands``."""
    doctor = commands.add_parser(
        "doctor",
        help="whether lazy memory works here, and what to do if not",
        description="Look at this system as this user, and try lazy memory out.",
        epilog="Exit status: 0 lazy buffers work here, 1 they do not, 2 wrong usage.",
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    report = examine()
    if parsed.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        console = console_for(sys.stdout)
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
