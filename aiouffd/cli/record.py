"""``aiouffd record``: which parts of an object a program touches, as a working set."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from typing import Any

from ..errors import UsageError
from .common import human

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add this command to the parser's ``commands``."""
    record = commands.add_parser(
        "record",
        help="run a Python program and write down which parts of an object it touches",
        description="Run PROGRAM.py in this process and record what it touches of the lazy"
        " buffers that it opens over SOURCE (the same text that it gives to aiouffd.open)."
        " Later, aiouffd.open(SOURCE, prefetch=FILE) brings that first.",
    )
    record.add_argument("source", metavar="SOURCE", help="a path or a URL")
    record.add_argument("file", metavar="FILE", help="where the working set goes")
    record.add_argument("program", metavar="PROGRAM.py")
    record.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT")
    record.set_defaults(run=_record)


def _record(parsed: argparse.Namespace) -> int:
    from ..buffers.recording import record_opens

    if not os.path.isfile(parsed.program):
        raise UsageError(f"there is no program {parsed.program}")
    status = 0
    argv, path = sys.argv, sys.path[:]
    with record_opens(parsed.source) as recorded:
        sys.argv = [parsed.program, *parsed.arguments]
        sys.path[0] = os.path.dirname(os.path.abspath(parsed.program))
        try:
            runpy.run_path(parsed.program, run_name="__main__")
        except SystemExit as end:
            code = end.code
            status = code if isinstance(code, int) else int(code is not None)
            if isinstance(code, str):
                print(code, file=sys.stderr)
        finally:
            sys.argv, sys.path[:] = argv, path
    working_set = recorded()
    if working_set is None:
        raise UsageError(
            f"{parsed.program} opened no lazy buffer over {parsed.source}",
            hint="give SOURCE as the program gives it to aiouffd.open",
        )
    working_set.save(parsed.file)
    print(
        f"{parsed.file}: {human(working_set.total)} of {human(working_set.size)}", file=sys.stderr
    )
    return status
