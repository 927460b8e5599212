"""fallocate(2) with its modes, which ``os.posix_fallocate`` lacks."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

__all__ = ["fallocate_zeros"]

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


@functools.cache
def _function() -> Any:
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


def fallocate_zeros(fd: int, offset: int, length: int, *, hole: bool) -> bool:
    """Have a range of a file read as zeros, as a ``hole`` or allocated. False if this file system
    cannot, or anything else is wrong that writing would tell."""
    mode = _KEEP_SIZE | (_PUNCH_HOLE if hole else _ZERO_RANGE)
    return length == 0 or _function()(fd, mode, offset, length) == 0
