"""Sources made of sources: retried, verified, cut, joined.

Each takes whatever `aiouffd.sources.as_source` takes, owns what it wraps (opens, closes and clones
it), and passes on the optional methods that it has.
"""

from __future__ import annotations

from .checksum import ChecksumError, ChecksumSource, Manifest
from .concat import ConcatSource
from .retry import RetrySource
from .slice import SliceSource
from .wrapper import Wrapper

__all__ = [
    "ChecksumError",
    "ChecksumSource",
    "ConcatSource",
    "Manifest",
    "RetrySource",
    "SliceSource",
    "Wrapper",
]
