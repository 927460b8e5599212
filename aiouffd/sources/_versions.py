"""What to do about an object of which nothing tells one version from another."""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias, get_args

from ..errors import SourceError, UnversionedSourceWarning, UsageError

__all__ = ["Unversioned", "check_version", "check_word"]

#: For an object without version: warn once and go on, go on, or do not open it.
Unversioned: TypeAlias = Literal["warn", "accept", "refuse"]


def check_word(unversioned: str) -> Unversioned:
    """Return the argument as it is. Raises UsageError for a word that means nothing."""
    for word in get_args(Unversioned):
        if word == unversioned:
            found: Unversioned = word
            return found
    raise UsageError(f"unversioned must be one of {get_args(Unversioned)}, got {unversioned!r}")


def check_version(name: str, version: str | None, unversioned: Unversioned) -> None:
    """See to an object ``name`` (as people call it) that has no ``version``.

    Raises SourceError, not transient, if that is to be refused. The warning comes once for each
    name, as Python's default filter has it.
    """
    if version is not None or unversioned == "accept":
        return
    message = f"{name} has no version: the server sends neither an ETag nor a Last-Modified date"
    if unversioned == "refuse":
        raise SourceError(
            message,
            transient=False,
            hint="have the server send one, or take the risk with unversioned='accept'",
        )
    warnings.warn(
        f"{message}, so that a change of its bytes will not be noticed unless its size changes;"
        " unversioned='accept' if it never changes, 'refuse' to have an error",
        UnversionedSourceWarning,
        stacklevel=2,
    )
