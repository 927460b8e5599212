"""Keywords and sizes as people write them: what is wrong is told with what was probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import operator
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from ..errors import UsageError

__all__ = ["check_keywords", "meant", "one_source", "path_of", "seconds", "size_in_bytes"]

P = ParamSpec("P")
T = TypeVar("T")

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
#: What the built-in open() takes besides; bytes for reading is all that there is here.
_OF_FILES = ("mode", "encoding", "buffering", "newline")
_READING = (
    "nothing says how it is opened: for reading, as bytes; aiouffd.open_file(source) is a binary"
    " file, and io.TextIOWrapper(file) decodes text"
)


def one_source(function: Callable[P, T]) -> Callable[P, T]:
    """For functions that take a source and keywords: UsageError for a second argument, which says
    that a mode is not needed."""

    @functools.wraps(function)
    def opened(*arguments: P.args, **settings: P.kwargs) -> T:
        if len(arguments) > 1:
            wrong = arguments[1]
            raise UsageError(
                f"after the source come keywords, not {wrong!r}",
                hint=_READING if isinstance(wrong, str) else f"they are {', '.join(SETTINGS)}",
            )
        return function(*arguments, **settings)

    return opened


def seconds(name: str, value: Any) -> float:
    """``value`` of the keyword ``name``: a positive number of seconds, or UsageError."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not float(value) > 0:
        raise UsageError(f"{name} is a positive number of seconds, not {value!r}")
    return float(value)


def path_of(name: str, value: Any) -> str:
    """``value`` of the keyword ``name`` as an absolute path, or UsageError for what is none."""
    try:
        path = os.fsdecode(value)
    except TypeError:
        path = ""
    if not path:
        raise UsageError(f"{name} is a path, not {value!r}")
    return os.path.abspath(path)


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
            hint=_instead(unknown, known[1:]),
        )


def _instead(unknown: list[str], known: list[str]) -> str:
    """What to do about keywords that a source with the ``known`` ones does not have."""
    own = f"it has {', '.join(sorted(known))}"
    if any(name in _OF_FILES for name in unknown):
        return _READING
    # Those of `aiouffd.open` have been taken out where that was called.
    buffers = [name for name in unknown if name in SETTINGS]
    if buffers:
        return f"{', '.join(buffers)} belongs to aiouffd.open(), not to the source; {own}"
    return meant(unknown, [*known, *SETTINGS]) or own
