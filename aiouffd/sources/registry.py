"""URL schemes: which source reads what, and what to install for it.

A scheme names a callable ``(url, **options) -> Source``. Those of this project are listed here by
the name of their module, so that nothing is imported before it is needed. Other packages add
theirs by an entry point in the group ``aiouffd.sources``, whose name is the scheme::

    [project.entry-points."aiouffd.sources"]
    ceph = "aiouffd_ceph:CephSource.from_url"

An own scheme may not be replaced that way. A scheme that ends in ``+`` stands for all that begin
with it: ``disk+`` gets ``disk+raid://host/file``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError, UsageError
from ..util.extras import install_hint
from .base import Source

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

__all__ = ["GROUP", "Scheme", "known_schemes", "lookup", "scheme_of"]

#: The group of entry points that other packages add sources to.
GROUP = "aiouffd.sources"

Factory = Callable[..., Source]

# As in RFC 3986, but for one-letter ones.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# The first file system of a chain of fsspec need not have a path: fsspec+simplecache::s3://...
_CHAINED = re.compile(r"(fsspec\+[A-Za-z0-9.-]+)::", re.I)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One scheme: its ``factory`` is ``module:attribute``; ``extra`` names what it needs."""

    name: str
    factory: str
    extra: str | None = None

    def load(self) -> Factory:
        """Import the factory. Raises UnsupportedError when its module cannot be imported."""
        module, _, attribute = self.factory.partition(":")
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"{self.name}:// needs {error.name}",
                hint=install_hint(self.extra) if self.extra else None,
            ) from error
        for name in attribute.split("."):
            found = getattr(found, name)
        factory: Factory = found
        return factory


_OWN = {
    scheme.name: scheme
    for scheme in (
        Scheme("file", "aiouffd.sources.file:FileSource.from_url"),
        Scheme("http", "aiouffd.sources.http:HttpSource", "http"),
        Scheme("https", "aiouffd.sources.http:HttpSource", "http"),
        Scheme("s3", "aiouffd.sources.objects:ObjectSource.from_url", "objects"),
        Scheme("gs", "aiouffd.sources.objects:ObjectSource.from_url", "objects"),
        Scheme("az", "aiouffd.sources.objects:ObjectSource.from_url", "objects"),
        Scheme("obstore+", "aiouffd.sources.objects:ObjectSource.from_url", "objects"),
        Scheme("nbd", "aiouffd.nbd.source:NbdSource.from_url"),
        Scheme("nbds", "aiouffd.nbd.source:NbdSource.from_url"),
        Scheme("nbd+unix", "aiouffd.nbd.source:NbdSource.from_url"),
        Scheme("nbds+unix", "aiouffd.nbd.source:NbdSource.from_url"),
        Scheme("redis", "aiouffd.sources.redis:RedisSource.from_url", "redis"),
        Scheme("rediss", "aiouffd.sources.redis:RedisSource.from_url", "redis"),
        Scheme("redis+unix", "aiouffd.sources.redis:RedisSource.from_url", "redis"),
        Scheme("valkey", "aiouffd.sources.redis:RedisSource.from_url", "redis"),
        Scheme("fsspec+", "aiouffd.sources.fsspec:FsspecSource.from_url", "fsspec"),
    )
}


#: Names that people write for schemes of ours.
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "azure": "az", "adl": "az"}


def scheme_of(text: str) -> str | None:
    """The scheme of a URL in lower case; None for what is no URL."""
    match = _SCHEME.match(text) or _CHAINED.match(text)
    return match[1].lower() if match else None


def _points() -> EntryPoints:
    # Not at the top: it takes a seventh of importing aiouffd, and few URLs need it.
    from importlib import metadata

    return metadata.entry_points(group=GROUP)


def known_schemes() -> list[str]:
    """All schemes that can be looked up, those of other packages included."""
    return sorted({*_OWN, *(point.name for point in _points())})


def lookup(name: str) -> Scheme:
    """The scheme ``name``. Raises UsageError, which says what would help, if there is none."""
    family = name.partition("+")[0] + "+"
    for known in (name, family):
        if known in _OWN:
            return _OWN[known]
    for point in _points():
        if point.name in (name, family):
            return Scheme(name, point.value)
    hint = (
        f"write fsspec+{name}://, if fsspec ({install_hint('fsspec')}) has such a file system;"
        " for a file of that name write ./ before it"
    )
    if name in _ALIASES:
        hint = f"write {_ALIASES[name]}://, which needs obstore: {install_hint('objects')}"
    raise UsageError(
        f"unknown URL scheme {name!r}; known are {', '.join(known_schemes())}", hint=hint
    )
