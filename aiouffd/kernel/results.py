"""Packed results of native calls that may complete partly: bytes done, and an errno."""

from __future__ import annotations

__all__ = ["unpack"]


def unpack(result: int) -> tuple[int, int]:
    """Return the bytes done, and an errno that is 0 if that was all.

    Args:
        result: The count, or ``-1 - (done << 8 | errno)``: see ``au_region_put`` and
            ``au_foreign_fill``.
    """
    return (result, 0) if result >= 0 else (~result >> 8, ~result & 0xFF)
