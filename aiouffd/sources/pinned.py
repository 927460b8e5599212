"""What a source was of, to be recognised by a process that opens it anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import SourceChangedError

__all__ = ["Pinned"]


@dataclass(frozen=True, slots=True)
class Pinned:
    """Of one object: what names it (see `names.identity`; None if nothing does), and as far as it
    was opened its version, and its size in bytes."""

    key: str | None
    version: str | None
    size: int | None

    @classmethod
    def of(cls, source: Any) -> Pinned:
        """Of a source, which need not be open."""
        from .cache.layout import derive_key  # not at the top: few need the cache

        try:
            size = source.size
        except Exception:  # of others, who say so in their own way
            size = None  # it is not open
        return cls(derive_key(source), getattr(source, "version", None), size)

    def check_name(self, source: Any) -> None:
        """Raise SourceChangedError if ``source`` is of an object with another name, before anybody
        is asked for it."""
        key = Pinned.of(source).key
        if None not in (self.key, key) and key != self.key:
            raise SourceChangedError(
                "in this process the same settings name another object: an endpoint, an account, a"
                " folder or the like comes from the environment, and is not what it was",
                hint="give these as options (config= for object stores) and absolute paths, so that"
                " they come along",
            )

    def check(self, source: Any) -> None:
        """Raise SourceChangedError if ``source``, which is open, is of another version or size."""
        found = Pinned.of(source)
        if self.version is not None and found.version != self.version:
            raise SourceChangedError(
                f"the source is at version {found.version}, not {self.version}"
            )
        if self.size is not None and found.size != self.size:
            raise SourceChangedError(f"the source has {found.size} bytes, not {self.size}")
