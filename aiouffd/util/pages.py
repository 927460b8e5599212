"""Page sizes, defined here only.

The system's is 4 KiB on x86, and 4, 16 or 64 KiB on arm64, depending on how the kernel was built.
"""

from __future__ import annotations

import mmap
from typing import Final

__all__ = ["PAGE_SIZE", "PAGE_SIZES"]

#: The system's page size, in bytes.
PAGE_SIZE: Final = mmap.PAGESIZE
#: Page sizes of foreign memory that can be served, in bytes: the system's, and huge pages'.
PAGE_SIZES: Final = (PAGE_SIZE, 2 << 20, 1 << 30)
