"""What pins the version of an object of a store: all that its replies tell of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

__all__ = ["Pin"]


@dataclass(frozen=True)
class Pin:
    """What names the version of an object, and tells it from others."""

    size: int
    etag: str | None
    modified: datetime | None
    #: That was asked for.
    version_id: str | None
    #: That the store says the object is, asked for or not.
    found_id: str | None = None

    @classmethod
    def of(cls, meta: Mapping[str, Any], version_id: str | None) -> Pin:
        modified = meta["last_modified"]
        # The first second of 1970 is what obstore says for a reply that has no date.
        modified = modified if modified.timestamp() else None
        return cls(meta["size"], meta["e_tag"], modified, version_id, _known_id(meta["version"]))

    @property
    def strong(self) -> bool:
        return self.etag is not None and not self.etag.startswith("W/")

    def conditions(self) -> dict[str, Any]:
        """Options that let a request succeed for this version only."""
        options: dict[str, Any] = {}
        if self.version_id is not None:
            options["version"] = self.version_id
        if self.strong:
            options["if_match"] = self.etag
        elif self.modified is not None:
            options["if_unmodified_since"] = self.modified
        return options

    def without_conditions(self) -> dict[str, Any]:
        """The same options for a server that refuses its own ETag or date."""
        return {} if self.version_id is None else {"version": self.version_id}

    def without_date(self) -> Pin:
        """The same for an object whose date tells nothing beside a strong ETag."""
        return replace(self, modified=None) if self.strong else self

    def difference(self, meta: Mapping[str, Any], *, proved: bool) -> str | None:
        """Say how a reply, which came with ``meta``, is of another version, or None.

        Nothing that it says may contradict what is pinned. Unless ``proved`` by a condition that
        the server has checked, it also has to repeat that.
        """
        if meta["size"] != self.size:
            return f"its size was {self.size} and now is {meta['size']} bytes"
        found = _known_id(meta["version"])
        if self.version_id is not None and meta["version"] not in (None, self.version_id):
            return f"version {self.version_id} was asked for, version {meta['version']} came"
        if None not in (self.found_id, found) and found != self.found_id:
            return f"its version was {self.found_id} and now is {found}"
        etag = meta["e_tag"]
        if self.etag is not None and etag != self.etag and not (proved and etag is None):
            return f"its ETag was {self.etag} and now is {etag}"
        modified = Pin.of(meta, None).modified
        missing = modified is None and (proved or self.strong)
        if self.modified is not None and modified != self.modified and not missing:
            stayed = ", though its ETag stayed" if self.strong else ""
            return f"it was last modified at {self.modified} and now at {modified}{stayed}"
        return None

    @property
    def lasting_id(self) -> str | None:
        """The version id, if it can never be that of other bytes."""
        return _known_id(self.version_id) or self.found_id

    @property
    def weak(self) -> bool:
        """Whether bytes may change and all this stay the same. Dates tell whole seconds, and the
        clocks are two machines'."""
        if self.lasting_id is not None or self.strong:
            return False
        return self.modified is None or time.time() - self.modified.timestamp() < 60

    @property
    def version(self) -> str | None:
        """For `Source.version`: all that tells the object from others under its name. None if
        the store names no version at all."""
        parts = [self.version_id or self.found_id, self.etag]
        if self.lasting_id is None and self.modified is not None:
            parts = [parts[0], self.etag or str(self.size), str(self.modified)]
        return " ".join(filter(None, parts)) or None


def _known_id(version: str | None) -> str | None:
    """A version id; None for ``null``, which S3 gives to all that was written while the bucket
    kept no versions, and which PUT overwrites (docs.aws.amazon.com, "Adding objects to
    versioning-suspended buckets")."""
    return None if version == "null" else version
