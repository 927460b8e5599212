"""Names and places: the directory, what an object is called in it, and its last known version."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...util import places
from ...util.places import Unsafe
from ..compose import ChecksumSource, ConcatSource, RetrySource, SliceSource, Wrapper
from ..compose.checksum import ALGORITHMS
from ..names import with_user

__all__ = [
    "DATA",
    "LATEST",
    "LOCK",
    "Format",
    "Latest",
    "Unsafe",
    "check_block_size",
    "check_directory",
    "default_directory",
    "derive_key",
    "forget_older",
    "key_directory",
    "lasting_version",
    "make_directory",
    "own_file",
    "read_latest",
    "remove",
    "root_of",
    "write_latest",
]

#: Changes whenever the meaning of the files does; other versions are left alone.
VERSION = "v1"
LATEST, LOCK = "latest", "lock"
DATA = ".seg"
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Bytes that aiouffd can fetch again.\n"
_RECORD_SEAL = 8
#: Longest file of what was seen last, in bytes.
_LATEST_MAX = 1 << 16
_PAGE = 4096
#: Blocks in a segment file.
PER_SEGMENT = 256


@dataclass(frozen=True, slots=True)
class Format:
    """One version of an object, and how it lies in its segment files. Sizes in bytes."""

    key: str
    version: str
    size: int
    block_size: int
    algorithm: str

    @property
    def identity(self) -> bytes:
        """32 bytes that no other version, size or format has."""
        parts = [self.key, self.version, str(self.size), str(self.block_size), self.algorithm]
        # JSON, so that no two lists of parts give one text.
        return hashlib.sha256(json.dumps([VERSION, PER_SEGMENT, *parts]).encode()).digest()

    @property
    def name(self) -> str:
        """The entry's directory within that of its key."""
        return self.identity.hex()[:32]

    @property
    def blocks(self) -> int:
        """How many blocks the object has; the last may be short."""
        return -(-self.size // self.block_size)

    @property
    def record_size(self) -> int:
        """A flag, the digest, and a seal over both."""
        return 1 + ALGORITHMS[self.algorithm] + _RECORD_SEAL

    @property
    def data_start(self) -> int:
        """Where the first block begins in a segment file."""
        length = PER_SEGMENT * self.record_size
        return length + -length % _PAGE


@dataclass(frozen=True, slots=True)
class Latest:
    """What was last seen of an object; sizes in bytes."""

    name: str
    version: str
    size: int


def default_directory() -> Path:
    """``$XDG_CACHE_HOME/aiouffd``, else ``~/.cache/aiouffd``. Raises FileNotFoundError for a user
    without a home, as there are in containers."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification wants relative ones ignored.
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise FileNotFoundError(
            errno.ENOENT, "no home to keep a cache in; set XDG_CACHE_HOME or give a directory", base
        )
    return Path(base) / "aiouffd"


def root_of(directory: str | os.PathLike[str] | None) -> Path:
    """Where our files are within ``directory``."""
    return Path(os.path.abspath(directory or default_directory())) / VERSION


def key_directory(root: Path, key: str) -> Path:
    """What belongs to one key, all versions of it."""
    return root / hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def derive_key(source: Any) -> str | None:
    """What names the object behind ``source`` for good, or None.

    Two names for one object cost space only. One name for two objects is wrong bytes as soon as
    they have one version, which two servers may well choose. So ``cache_key`` of a source holds
    all that chooses its object (`aiouffd.sources.names.identity`), and is None if that cannot be
    written down. A source without it is taken by its ``url`` or ``path``.
    """
    if isinstance(source, RetrySource):
        return derive_key(source.inner)
    if isinstance(source, ChecksumSource):
        inner = derive_key(source.inner)
        # What was not verified when it was fetched is not taken for what was.
        return None if inner is None else f"{inner}#manifest={source.manifest.name}"
    if isinstance(source, SliceSource):
        inner = derive_key(source.inner)
        return None if inner is None else f"{inner}#slice={source.start},{source.length}"
    if isinstance(source, ConcatSource):
        keys = [derive_key(part) for part in source.parts]
        return None if None in keys else "concat:" + json.dumps(keys)
    if hasattr(source, "cache_key"):
        key = source.cache_key
        return key if isinstance(key, str) else None
    url = getattr(source, "url", None)
    if isinstance(url, str):
        return with_user(url)
    path = getattr(source, "path", None)
    return f"file://{path}" if isinstance(path, str) else None


def lasting_version(source: Any) -> str | None:
    """The version of an open source, if bytes may be kept under it for longer than it is open:
    None if there is none, if the source itself may write, or if others may unseen (``weak``)."""
    version = getattr(source, "version", None)
    if getattr(source, "writable", False) or getattr(source, "weak", False):
        return None
    parts = source.parts if isinstance(source, ConcatSource) else ()
    inner = [source.inner] if isinstance(source, Wrapper) else parts
    return None if None in map(lasting_version, inner) else version


def make_directory(root: Path) -> None:
    """Make ``root`` and what is above it, for us alone. Raises OSError, Unsafe among them."""
    parent = root.parent
    made = False
    if not parent.is_dir():
        parent.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            parent.mkdir(mode=0o700)
            made = True
    check_directory(parent)
    if made:
        with contextlib.suppress(OSError), open(parent / "CACHEDIR.TAG", "xb") as tag:
            tag.write(_TAG)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    check_directory(root)


def check_directory(path: Path) -> None:
    """Whoever else can write here, or decides what is here, could put bytes with fitting checksums
    in. Raises Unsafe."""
    places.check_directory(path)
    found = path.stat()
    if found.st_uid != os.geteuid() or (found.st_mode & stat.S_ISVTX and found.st_mode & 0o022):
        raise Unsafe("it can be written to by others", path)


def own_file(found: os.stat_result) -> bool:
    """Whether a file of the cache can be believed to be ours."""
    return (
        stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    )


def write_latest(directory: Path, latest: Latest) -> None:
    """Remember what was seen; the file appears complete or not at all. Raises OSError."""
    if read_latest(directory) == latest:
        return
    body = json.dumps(
        {"name": latest.name, "version": latest.version, "size": latest.size}
    ).encode()
    seal = _seal_latest(directory, body)
    part = directory / f".{LATEST}.{os.getpid()}.{time.monotonic_ns()}.part"
    try:
        with open(part, "xb", opener=_private) as file:
            file.write(seal + b"\n" + body + b"\n")
        try:
            part.replace(directory / LATEST)
        except IsADirectoryError:
            remove(directory / LATEST)
            part.replace(directory / LATEST)
    finally:
        part.unlink(missing_ok=True)


def _seal_latest(directory: Path, body: bytes) -> bytes:
    # The directory's name is the key's: elsewhere the same file means nothing.
    return hashlib.sha256(directory.name.encode() + b"\n" + body).hexdigest().encode()


def remove(path: Path) -> None:
    """Remove what is where a file of ours should be, as far as nothing else is lost by that."""
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        path.rmdir()


def read_latest(directory: Path) -> Latest | None:
    """What was last seen, or None if that is unknown or cannot be believed."""
    try:
        fd = os.open(directory / LATEST, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not own_file(os.fstat(fd)):
                return None
            seal, _, body = file.read(_LATEST_MAX).rstrip(b"\n").partition(b"\n")
        if _seal_latest(directory, body) != seal:
            return None
        found = json.loads(body)
        name, version, size = found["name"], found["version"], found["size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(version, str) or type(size) is not int:
        return None
    return Latest(name, version, size) if 0 <= size < 1 << 63 else None


def forget_older(directory: Path, current: str) -> None:
    """Have what is cached of other versions evicted first. It stays readable until then, for
    whoever still has such a version open."""
    # Others may be evicting them already.
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            if entry.name == current or not entry.is_dir(follow_symlinks=False):
                continue
            for segment in os.scandir(entry.path):
                os.utime(segment.path, (0, 0), follow_symlinks=False)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def check_block_size(block_size: int) -> None:
    """Raise UsageError unless it is a power of two from 4096 to 64 MiB."""
    if not 4096 <= block_size <= 64 << 20 or block_size & block_size - 1:
        raise UsageError(
            f"the block size of a cache must be a power of two from 4096 to 64 MiB,"
            f" got {block_size}"
        )
