"""Checks of keywords, sizes and paths that users pass; errors suggest what was probably meant."""

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
    """Decorate a function of one source and keywords: UsageError for a second positional argument.

    The usual mistake is a mode as in ``open(path, "rb")``, so the hint says that there is none.
    """

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
    """Return ``value`` of the keyword ``name`` in seconds; UsageError unless it is positive."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not float(value) > 0:
        raise UsageError(f"{name} is a positive number of seconds, not {value!r}")
    return float(value)


def path_of(name: str, value: Any) -> str:
    """Return ``value`` of the keyword ``name`` as an absolute path; UsageError if it is no path."""
    try:
        path = os.fsdecode(value)
    except TypeError:
        path = ""
    if not path:
        raise UsageError(f"{name} is a path, not {value!r}")
    return os.path.abspath(path)


def size_in_bytes(name: str, value: Any) -> int:
    """Return ``value`` of the keyword ``name`` in bytes.

    Args:
        name: The keyword, for the message.
        value: An integer, or text such as "64K" or "2 MiB", whose units are powers of 1024.

    Raises:
        UsageError: If it is anything else.
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
    """Return a hint with the member of ``known`` closest to each of ``names``; None without one."""
    choices = sorted(set(known))
    near = [match for name in names for match in difflib.get_close_matches(name, choices, 1, 0.7)]
    return f"did you mean {', '.join(f'{name}=' for name in near)}?" if near else None


def check_keywords(function: Callable[..., Any], options: Iterable[str]) -> None:
    """Check that ``function`` takes all keywords in ``options``.

    Args:
        function: A class or a constructor; its first parameter is the source.
        options: Names of keywords.

    Raises:
        UsageError: If it does not take one of them; the hint says which was probably meant.
    """
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
    """Return a hint for ``unknown`` keywords of a source that takes the ``known`` ones."""
    own = f"it has {', '.join(sorted(known))}"
    if any(name in _OF_FILES for name in unknown):
        return _READING
    # Those of `aiouffd.open` have been taken out where that was called.
    buffers = [name for name in unknown if name in SETTINGS]
    if buffers:
        return f"{', '.join(buffers)} belongs to aiouffd.open(), not to the source; {own}"
    return meant(unknown, [*known, *SETTINGS]) or own
