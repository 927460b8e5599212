"""Where this package is: for what tells our own code from others'."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDER"]

#: The folder ``aiouffd``, as it is spelled in tracebacks.
FOLDER = Path(__file__).parent.parent
