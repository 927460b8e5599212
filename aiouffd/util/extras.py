"""Optional dependencies, by the names of the extras.

Hints name the packages and not ``aiouffd[extra]``: that would be looked up in the package index,
which need not be where aiouffd came from.
"""

from __future__ import annotations

__all__ = ["EXTRAS", "install_hint"]

#: As in pyproject.toml; a test compares them.
EXTRAS: dict[str, tuple[str, ...]] = {
    "checksum": ("crc32c>=2.7", "blake3>=1.0"),
    "cli": ("rich>=13",),
    "criu": ("protobuf>=4.22",),
    "fsspec": ("fsspec>=2024.6",),
    "gguf": ("gguf>=0.17", "ml-dtypes>=0.5"),
    "http": ("aiohttp>=3.9",),
    "objects": ("obstore>=0.8",),
    "redis": ("redis>=5.1",),
    "safetensors": ("numpy>=1.26", "ml-dtypes>=0.5"),
    "uvloop": ("uvloop>=0.19",),
}


def install_hint(extra: str) -> str:
    """Return the pip command that installs the packages of ``extra``."""
    return "pip install " + " ".join(f"'{each}'" for each in EXTRAS[extra])
