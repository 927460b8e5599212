"""Where bytes come from: memory, files, functions, and whatever a URL names.

Importing this package loads no third-party library, nor the sources that need one; `HttpSource`
comes when it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import os
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..util.keywords import SETTINGS, check_keywords, meant
from .base import BaseSource, Buffer, Source, SourcePermissionError
from .file import FileSource
from .function import FunctionSource, ReadFunction
from .memory import MemorySource
from .registry import known_schemes, lookup, scheme_of

__all__ = [
    "BaseSource",
    "Buffer",
    "FileSource",
    "FunctionSource",
    "HttpSource",
    "MemorySource",
    "ReadFunction",
    "Source",
    "SourcePermissionError",
    "as_source",
    "known_schemes",
]

if TYPE_CHECKING:
    from .http import HttpSource
else:

    def __getattr__(name: str) -> Any:
        if name in ("HttpSource", "http"):
            # Not `from . import`, which would ask here again.
            http = importlib.import_module(f"{__name__}.http")
            globals()["HttpSource"] = http.HttpSource
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def as_source(obj: object, **options: Any) -> Source:
    """Return a source for ``obj``.

    ====================================  =====================================================
    bytes, bytearray, memoryview          `MemorySource`
    str with a URL scheme                 what `registry` has for it: HTTP, object stores,
                                          NBD, Redis, fsspec, files, or an entry point's
    any other str, ``os.PathLike``        `FileSource`
    an async callable                     `FunctionSource`; ``size=`` (bytes) is needed
    an object with size, read and clone   itself
    ====================================  =====================================================

    ``options`` are the keyword arguments of that class. Raises UsageError for anything else,
    for an unknown URL scheme, for options the source does not have, and for a source that is
    given options although it exists already; UnsupportedError, which names the extra, where a
    library is missing. Nothing is opened.
    """
    if isinstance(obj, str):
        return _from_string(obj, options)
    if isinstance(obj, bytes | bytearray | memoryview):
        return _make(MemorySource, obj, options)
    if _is_source(obj):
        if options:
            raise UsageError(
                f"{type(obj).__name__} is a source already and takes no options"
                f" ({', '.join(options)})",
                hint=meant(options, SETTINGS),
            )
        return obj  # type: ignore[return-value]
    if isinstance(obj, os.PathLike):
        return _make(FileSource, obj, options)
    if callable(obj) and not isinstance(obj, type):
        if options.get("size") is None:
            raise UsageError(
                "an async function is a source only together with a size",
                hint="pass size=, the length of the object in bytes",
            )
        return _make(FunctionSource, obj, options)
    hint = (
        "give a path, a URL, bytes, an async function with size=, or an object with size, read()"
        " and clone()"
    )
    if hasattr(obj, "read") and hasattr(obj, "seek"):
        hint = "it is a file: give its path, or its contents, file.read()"
    elif hasattr(obj, "__array__") or type(obj).__module__ in ("array", "mmap"):
        hint = "its bytes are memoryview(...).cast('B')"
    raise UsageError(f"cannot read from {type(obj).__name__}", hint=hint)


def _from_string(text: str, options: dict[str, Any]) -> Source:
    if not text:
        raise UsageError("the path is empty", hint="give a path or a URL")
    name = scheme_of(text)
    if name is None:
        start = text.partition(":")[0].lower()
        if text[len(start) : len(start) + 2] == ":/" and start in known_schemes():
            raise UsageError(
                f"{text!r} is no URL",
                hint=f"write {start}://; for a file of that name write ./ before it",
            )
        return _make(FileSource, text, options)
    return _make(lookup(name).load(), text, options)


def _is_source(obj: object) -> bool:
    # Statically: size may be a property that raises before open().
    def has(name: str) -> bool:
        try:
            inspect.getattr_static(obj, name)
        except AttributeError:
            return False
        return True

    return not isinstance(obj, type) and all(map(has, ("size", "read", "clone")))


def _make(factory: Any, obj: object, options: dict[str, Any]) -> Source:
    check_keywords(factory, options)
    try:
        inspect.signature(factory).bind(obj, **options)
    except TypeError as exc:
        # A class, or its from_url.
        owner = getattr(factory, "__self__", factory)
        raise UsageError(f"{getattr(owner, '__name__', factory)}: {exc}") from exc
    try:
        source: Source = factory(obj, **options)
    except TypeError:
        # A constructor that hands on what it does not know itself, maybe to its class.
        check_keywords(getattr(factory, "__self__", factory), options)
        raise
    return source
