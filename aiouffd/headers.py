"""Where the header for C programs is: ``aiouffd_client.h``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["include_dir"]


def include_dir() -> Path:
    """Return the folder of ``aiouffd_client.h``, for a compiler's ``-I``.

    Below it, ``pkgconfig`` has ``aiouffd-client.pc`` for ``PKG_CONFIG_PATH``.

    Raises FileNotFoundError if the package was installed without it.
    """
    package = Path(__file__).resolve().parent
    # Installed inside the package; in a checkout beside it.
    for folder in (package / "include", package.parent / "include"):
        if (folder / "aiouffd_client.h").exists():
            return folder
    raise FileNotFoundError("aiouffd_client.h is not part of this installation")
