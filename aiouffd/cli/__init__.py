"""The command line: ``aiouffd doctor``, ``info``, ``cat``, ``copy``, ``nbd``, ``pager`` and
``record``.

Exit status: 0 it went well, 1 it did not, 2 the command line is wrong, 130 interrupted. Needs the
standard library only; with rich installed the output for people has colours and progress bars.
One module for each command (``cat`` and ``copy`` share one).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import AiouffdError, UsageError
from ..version import VERSION
from . import copy, doctor, info, nbd, pager, record
from .common import error_text

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. SystemExit for ``--help`` and wrong usage."""
    try:
        parsed = _parser().parse_args(arguments)
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
        print(f"aiouffd: {error_text(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aiouffd", description="Memory that fills itself: userfaultfd for asyncio."
    )
    parser.add_argument("--version", action="version", version=f"aiouffd {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (doctor, info, copy, nbd, pager, record):
        module.add_to(commands)
    return parser
