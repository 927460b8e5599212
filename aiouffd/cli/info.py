"""``aiouffd info``: what a source says of itself."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from ..errors import UsageError
from ..sources.base import Source, own_method
from .common import add_source_arguments, human, opened, run, source_of

__all__ = ["add_to"]

#: How working sets begin, and the most bytes that are looked at for one.
START, MOST = b"aiouffd working set", 64 << 20


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
    print(f"writes   {_writes(facts)}")
    for name, value in facts.get("working_set", {}).items():
        print(f"{name:9}{value}" if name != "source" else f"this is a working set of {value}")
    return 0


def _writes(facts: dict[str, Any]) -> str:
    if facts["writable"]:
        return "yes"
    return "no; writable=True would let you" if facts["can_be_writable"] else "no"


async def _working_set(source: Source) -> dict[str, Any]:
    """What `aiouffd record` wrote into a file, if it is one of those."""
    if not len(START) < source.size <= MOST or bytes(await source.read(0, len(START))) != START:
        return {}
    from ..fetch.workingset import WorkingSet

    try:
        found = WorkingSet.from_bytes(bytes(await source.read(0, source.size)))
    except UsageError:
        return {}
    facts = {"source": found.source, "covers": f"{human(found.total)} of {human(found.size)}"}
    facts |= {"parts": str(len(found.ranges)), "of": found.version or "an unknown version"}
    return {"working_set": facts}


async def _facts(source: Source, patience: float) -> dict[str, Any]:
    kind = type(source).__name__
    can_be_writable = "writable" in inspect.signature(type(source)).parameters
    async with opened(source, patience):
        return {
            "kind": kind,
            "size": source.size,
            "version": getattr(source, "version", None),
            "ranges": True,
            "holes": own_method(source, "holes") is not None,
            "writable": bool(getattr(source, "writable", False)),
            "can_be_writable": can_be_writable,
            **await _working_set(source),
        }
