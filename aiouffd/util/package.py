"""The location of this package, to tell its code from the user's in tracebacks."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDER"]

#: The folder ``aiouffd``, as it is spelled in tracebacks.
FOLDER = Path(__file__).parent.parent
