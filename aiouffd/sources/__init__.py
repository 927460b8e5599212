"""Where bytes come from: memory, files, functions and HTTP servers.

Importing this package loads no third-party library; an HTTP source imports aiohttp when opened.
"""

from __future__ import annotations

import inspect
import os
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import UsageError
from .base import BaseSource, Buffer, Source, SourcePermissionError
from .file import FileSource
from .function import FunctionSource, ReadFunction
from .http import HttpSource
from .memory import MemorySource

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
]

_SCHEMES = ("file", "http", "https")


def as_source(obj: object, **options: Any) -> Source:
    """Return a source for ``obj``.

    ====================================  =====================================================
    bytes, bytearray, memoryview          `MemorySource`
    str with ``http://``, ``https://``    `HttpSource`
    str with ``file://``, a path (str,    `FileSource`
    ``os.PathLike``)
    an async callable                     `FunctionSource`; ``size=`` (bytes) is needed
    an object with size, read and clone   itself
    ====================================  =====================================================

    ``options`` are the keyword arguments of that class. Raises UsageError for anything else,
    for an unknown URL scheme, for options the source does not have, and for a source that is
    given options although it exists already. Nothing is opened.
    """
    if isinstance(obj, str):
        return _from_string(obj, options)
    if isinstance(obj, bytes | bytearray | memoryview):
        return _make(MemorySource, obj, options)
    if _is_source(obj):
        if options:
            raise UsageError(
                f"{type(obj).__name__} is a source already and takes no options"
                f" ({', '.join(options)})"
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
    raise UsageError(
        f"cannot read from {type(obj).__name__}",
        hint="give a path, a URL, bytes, an async function with size=, or an object with size,"
        " read() and clone()",
    )


def _from_string(text: str, options: dict[str, Any]) -> Source:
    scheme, separator, _ = text.partition("://")
    if not separator or not scheme.replace("+", "").replace("-", "").replace(".", "").isalnum():
        return _make(FileSource, text, options)
    scheme = scheme.lower()
    if scheme in ("http", "https"):
        return _make(HttpSource, text, options)
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UsageError(
                f"{text!r} does not name a file of this machine",
                hint="write file:///absolute/path",
            )
        return _make(FileSource, unquote(parts.path), options)
    raise UsageError(
        f"unknown URL scheme {scheme!r}; known are {', '.join(_SCHEMES)}",
        hint="for a file of that name write ./ before it; other stores can be given as a Source",
    )


def _is_source(obj: object) -> bool:
    # Statically: size may be a property that raises before open().
    def has(name: str) -> bool:
        try:
            inspect.getattr_static(obj, name)
        except AttributeError:
            return False
        return True

    return not isinstance(obj, type) and all(map(has, ("size", "read", "clone")))


def _make(cls: Any, obj: object, options: dict[str, Any]) -> Source:
    try:
        inspect.signature(cls).bind(obj, **options)
    except TypeError as exc:
        raise UsageError(f"{cls.__name__}: {exc}") from exc
    source: Source = cls(obj, **options)
    return source
