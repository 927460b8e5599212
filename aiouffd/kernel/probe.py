"""What this kernel offers to this user: for ``aiouffd doctor`` and for tests.

Probing changes nothing. Features are queried on a throw-away descriptor, because the handshake
works only once.
"""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass
from pathlib import Path

from ..errors import AiouffdError
from .abi import Feature
from .uffd import CreationError, Userfaultfd

__all__ = ["CreationPath", "HugePages", "Limits", "Probe", "probe"]


@dataclass(frozen=True, slots=True)
class CreationPath:
    """Whether one way of creating a userfaultfd works for this user."""

    #: "syscall" or "device", as `Userfaultfd` takes it.
    path: str
    user_mode_only: bool
    #: 0 if it works.
    errno: int
    #: Why it does not, or an empty string.
    reason: str

    @property
    def ok(self) -> bool:
        """Whether it works."""
        return self.errno == 0

    def __str__(self) -> str:
        scope = "user mode only" if self.user_mode_only else "all faults"
        if self.ok:
            return f"{self.path}, {scope}: ok"
        name = errno.errorcode.get(self.errno, str(self.errno))
        return f"{self.path}, {scope}: {name}, {self.reason}"


@dataclass(frozen=True, slots=True)
class HugePages:
    """One pool of huge pages; sizes in bytes, the rest in pages."""

    size: int
    total: int
    free: int
    reserved: int
    surplus: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that programs with much lazy memory run into. None where one is unknown."""

    #: RLIMIT_NOFILE, soft and hard; -1 is no limit.
    open_files: tuple[int, int]
    #: RLIMIT_MEMLOCK in bytes, soft and hard; -1 is no limit.
    locked_memory: tuple[int, int]
    #: sysctl vm.max_map_count: mappings in a process.
    mappings: int | None
    #: sysctl vm.overcommit_memory: 0 heuristic, 1 always, 2 never.
    overcommit: int | None


@dataclass(frozen=True, slots=True)
class Probe:
    """What `probe` found."""

    kernel: str
    machine: str
    page_size: int
    paths: tuple[CreationPath, ...]
    #: All features of the kernel; empty if no userfaultfd can be created.
    features: Feature
    #: Feature.EVENT_FORK may be requested; it needs CAP_SYS_PTRACE.
    fork_events: bool
    #: sysctl vm.unprivileged_userfaultfd; None if there is none.
    unprivileged_sysctl: int | None
    #: The default size first.
    hugepages: tuple[HugePages, ...]
    limits: Limits
    #: "always", "madvise" or "never", for anonymous memory; None without transparent huge pages.
    thp: str | None
    #: The same for shared memory, in the kernel's own words.
    thp_shmem: str | None
    #: /dev/kvm is there, and this user may open it.
    kvm: bool
    #: PAGEMAP_SCAN works, which dirty tracking needs.
    pagemap_scan: bool

    @property
    def available(self) -> bool:
        """Whether any userfaultfd can be created."""
        return any(path.ok for path in self.paths)

    @property
    def user_mode_only(self) -> bool:
        """Whether a user-mode-only userfaultfd can be created."""
        return any(path.ok for path in self.paths if path.user_mode_only)

    @property
    def kernel_mode_faults(self) -> bool:
        """Whether one can be created that also handles faults inside system calls."""
        return any(path.ok for path in self.paths if not path.user_mode_only)


def probe() -> Probe:
    """Probe what the running system offers to this process. Takes some milliseconds.

    Any thread may call it. Missing features are reported in the result and raise nothing.
    """
    paths = tuple(
        _try(path, user_mode_only)
        for user_mode_only in (False, True)
        for path in ("syscall", "device")
    )
    features = Feature(0)
    scan = False
    working = next((path for path in paths if path.ok), None)
    if working is not None:
        with _make(working.path, working.user_mode_only) as uffd:
            features = uffd.available
            scan = _can_scan(uffd)
    system = os.uname()
    return Probe(
        kernel=system.release,
        machine=system.machine,
        page_size=os.sysconf("SC_PAGE_SIZE"),
        paths=paths,
        features=features,
        fork_events=working is not None and _can_follow_forks(working),
        unprivileged_sysctl=_integer(Path("/proc/sys/vm/unprivileged_userfaultfd")),
        hugepages=_hugepages(),
        limits=Limits(
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
            locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK),
            mappings=_integer(Path("/proc/sys/vm/max_map_count")),
            overcommit=_integer(Path("/proc/sys/vm/overcommit_memory")),
        ),
        thp=_choice(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        thp_shmem=_choice(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        kvm=os.access("/dev/kvm", os.R_OK | os.W_OK),
        pagemap_scan=scan,
    )


def _make(path: str, user_mode_only: bool, features: Feature = Feature(0)) -> Userfaultfd:  # noqa: B008
    if path == "device":
        return Userfaultfd(features, user_mode_only=user_mode_only, path="device")
    return Userfaultfd(features, user_mode_only=user_mode_only, path="syscall")


def _try(path: str, user_mode_only: bool) -> CreationPath:
    try:
        _make(path, user_mode_only).close()
    except CreationError as error:
        if error.attempts:
            attempt = error.attempts[0]
            return CreationPath(path, user_mode_only, attempt.errno, attempt.reason)
        return CreationPath(path, user_mode_only, error.errno or errno.EIO, error.message)
    except (AiouffdError, OSError) as error:
        code = getattr(error, "errno", None) or errno.EIO
        return CreationPath(path, user_mode_only, code, str(error))
    return CreationPath(path, user_mode_only, 0, "")


def _can_follow_forks(working: CreationPath) -> bool:
    try:
        _make(working.path, working.user_mode_only, Feature.EVENT_FORK).close()
    except (AiouffdError, OSError):
        return False
    return True


def _can_scan(uffd: Userfaultfd) -> bool:
    try:
        uffd.scan(0, os.sysconf("SC_PAGE_SIZE"))
    except (AiouffdError, OSError):
        return False
    return True


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _integer(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _choice(path: Path) -> str | None:
    """Return the word in brackets of a sysfs choice such as "always [madvise] never"."""
    words = (_text(path) or "").split()
    return next((word[1:-1] for word in words if word[:1] == "["), None)


def _hugepages() -> tuple[HugePages, ...]:
    default = 0
    for line in (_text(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("Hugepagesize:"):
            default = int(line.split()[1]) * 1024
    pools = []
    for folder in Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB"):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        total, free, reserved, surplus = (
            _integer(folder / name) or 0
            for name in ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages")
        )
        pools.append(HugePages(size, total, free, reserved, surplus))
    return tuple(sorted(pools, key=lambda pool: (pool.size != default, pool.size)))
