"""Keywords and sizes as people write them: what is wrong is told with what was probably meant."""

from __future__ import annotations

import difflib
import inspect
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

from .errors import UsageError

__all__ = ["check_keywords", "meant", "size_in_bytes"]

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
#: Keywords of `aiouffd.open`, which hands all others to the source.
SETTINGS = (
    "block_size",
    "cache",
    "deadline",
    "errors",
    "fork",
    "kind",
    "prefetch",
    "prefetch_version",
    "readahead",
    "strict",
    "trace",
    "user_mode_only",
    "writable",
)


def size_in_bytes(name: str, value: Any) -> int:
    """``value`` of the keyword ``name``: a number of bytes, or "64K", "2 MiB", in powers of 1024.

    Raises UsageError for anything else.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match:
            return int(match[1]) << _UNITS[match[2].lower()]
    elif not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise UsageError(
        f"{name} is a number of bytes, not {value!r}", hint="65536, '64K' and '2 MiB' are some"
    )


def meant(names: Iterable[str], known: Iterable[str]) -> str | None:
    """A hint: which of ``known`` each of ``names`` was probably meant to be; None if none is."""
    choices = sorted(set(known))
    near = [match for name in names for match in difflib.get_close_matches(name, choices, 1, 0.7)]
    return f"did you mean {', '.join(f'{name}=' for name in near)}?" if near else None


def check_keywords(function: Callable[..., Any], options: Iterable[str]) -> None:
    """Raise UsageError for those of ``options`` that ``function`` does not take: a class, or a
    constructor of one."""
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return
    positional = inspect.Parameter.POSITIONAL_ONLY
    known = [each.name for each in parameters if each.kind is not positional]
    unknown = [name for name in options if name not in known]
    if unknown:
        owner = getattr(function, "__self__", function)
        raise UsageError(
            f"{getattr(owner, '__name__', owner)} has no keyword {', '.join(unknown)}",
            hint=meant(unknown, [*known, *SETTINGS]) or f"it has {', '.join(sorted(known[1:]))}",
        )
