"""What native calls that do a part of their work return: how much, and why not all."""

from __future__ import annotations

__all__ = ["unpack"]


def unpack(result: int) -> tuple[int, int]:
    """The bytes done, and an errno, 0 if that is all of them.

    ``result`` is the count, or ``-1 - (done << 8 | errno)``: see ``au_region_put`` and
    ``au_foreign_fill``.
    """
    return (result, 0) if result >= 0 else (~result >> 8, ~result & 0xFF)
