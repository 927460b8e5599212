"""The sizes of pages: the one place that knows them.

The system's are 4 KiB on x86, and 4, 16 or 64 KiB on arm64, as its kernel was built.
"""

from __future__ import annotations

import mmap
from typing import Final

__all__ = ["PAGE_SIZE", "PAGE_SIZES"]

#: Of the system, in bytes.
PAGE_SIZE: Final = mmap.PAGESIZE
#: Which pages memory of others may have that is served: the system's, and huge ones.
PAGE_SIZES: Final = (PAGE_SIZE, 2 << 20, 1 << 30)
