"""A cache on disk, for sources that are slow or cost money.

::

    DIRECTORY/                          $XDG_CACHE_HOME/aiouffd; 0700
        CACHEDIR.TAG                    for backup programs
        v1/                             0700, as all below; another format gets another name
            lock                        flock: one process evicts at a time
            <hash of the key>/          all versions of one object
                latest                  version and size last seen, sealed, replaced by rename
                <hash of everything>/   one version: key, version, size, block size, checksum
                    0000002a.seg        256 blocks from block 42 * 256 on

A segment file is a table of 256 records and then, from the next page boundary on, the blocks, each
at its place; what was not cached is a hole. A record is a flag (1: bytes, 2: all zeros, which are
not stored), the block's checksum, and a seal: eight bytes of BLAKE2b over both and the block's
number, under the hash of everything as its key.

**Why no byte is ever wrong.** Every block is verified at every read, after its bytes are in the
reader's memory, against a record whose seal ties it to this block of this version of this object.
Whatever a killed process, a power failure, a full disk, a flipped bit or an eviction leaves
behind does not fit, and what does not fit is fetched again. So writes need no order, readers
need no locks, and any number of processes may fill, read and evict at a time: who writes the
same block of the same version writes the same bytes. ``fsync=True`` has blocks on the disk before
their records; without it a power failure costs blocks and leans on the checksum alone, which
for CRC-32C misses one torn block in four billion (``checksum="blake3"``: none).

CRC-32C by the library ``crc32c`` takes a small share of the time that the kernel takes to copy the
same bytes, so verifying once and remembering that would gain little, and lose the guarantee.
Without that library it is zlib's CRC-32, four to seven times slower.

**Which version.** What is kept longer than a source is open needs a version that equals no
other one's: see `layout.lasting_version`.

**Eviction** unlinks whole segment files, those longest unused first; a reader keeps what it has
open. The limit holds for the directory, is looked at when a source opens (once a minute is enough
for a process) and each time a process has written a thirty-second of it, and may be exceeded by
that much, and one write, by each process that writes.

**Whose bytes.** A directory that others own or can write to is not used, nor are such files in it.
"""

from __future__ import annotations

from .evict import CachedObject, Usage, clear, usage
from .layout import default_directory
from .source import CachedSource, CacheStats, cached

__all__ = [
    "CacheStats",
    "CachedObject",
    "CachedSource",
    "Usage",
    "cached",
    "clear",
    "default_directory",
    "usage",
]
