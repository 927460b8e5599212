"""``aiouffd info``: what a source says of itself."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..sources.base import Source, own_method
from .common import add_source_arguments, human, opened, run, source_of

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add this command to the parser's ``commands``."""
    info = commands.add_parser("info", help="size and version of an object")
    add_source_arguments(info)
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)


def _info(parsed: argparse.Namespace) -> int:
    facts = {"source": parsed.source, **run(_facts(source_of(parsed), parsed.patience))}
    if parsed.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"source   {facts['source']}")
    print(f"kind     {facts['kind']}")
    print(f"size     {facts['size']:,} bytes ({human(facts['size'])})")
    print(f"version  {facts['version'] or 'unknown: a change cannot be seen'}")
    print("ranges   yes: it can be read lazily")
    print(f"zeros    {'told: they are not transferred' if facts['holes'] else 'not told'}")
    print(f"writes   {'yes' if facts['writable'] else 'no'}")
    return 0


async def _facts(source: Source, patience: float) -> dict[str, Any]:
    kind = type(source).__name__
    async with opened(source, patience):
        return {
            "kind": kind,
            "size": source.size,
            "version": getattr(source, "version", None),
            "ranges": True,
            "holes": own_method(source, "holes") is not None,
            "writable": bool(getattr(source, "writable", False)),
        }
