"""``aiouffd doctor``: does lazy memory work here, for this user, and if not, what would help.

`examine` asks the system (`aiouffd.probe`), looks at what is installed, and then tries: a
small lazy buffer is touched in all the ways that programs touch memory. The trial runs in a forked
child with a time limit, because a process in which it goes wrong may hang for good.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.metadata
import json
import mmap
import os
import platform
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..buffers.buffer import open as open_buffer
from ..errors import BlockingTouchWarning
from ..kernel.abi import SINCE, Feature
from ..kernel.lib import lib
from ..kernel.opening import single_bits
from ..kernel.probe import Probe, probe
from ..sources import FunctionSource
from ..util.extras import install_hint
from ..version import VERSION

__all__ = ["Check", "Report", "examine"]

Status: TypeAlias = Literal["ok", "note", "warning", "problem"]

#: Seconds that the trial may take.
TRIAL_LIMIT = 20.0

#: What each optional feature of the kernel gives; since when it exists, `SINCE` tells.
_FEATURES: tuple[tuple[Feature, str], ...] = (
    (Feature.POISON, "errors in memory of other processes, and very many of our own"),
    (Feature.MINOR_SHMEM, "shared lazy memory (kind='memfd')"),
    (Feature.MISSING_HUGETLBFS, "lazy memory of huge pages (kind='hugetlb')"),
    (Feature.MINOR_HUGETLBFS, "shared lazy memory of huge pages (kind='hugetlb-memfd')"),
    (Feature.WP_HUGETLBFS_SHMEM, "write protection of shared memory and of huge pages"),
    (Feature.WP_ASYNC, "finding written pages without messages"),
    (Feature.MOVE, "moving pages without a copy"),
    (Feature.RWP, "finding out which pages are in use"),
)

_EXTRAS: tuple[tuple[str, str | None, str], ...] = (
    ("aiohttp", "http", "reading over HTTP and HTTPS"),
    ("uvloop", "uvloop", "a faster event loop"),
    ("rich", "cli", "a nicer command line"),
    ("numpy", None, "the demo, and arrays over lazy memory"),
)

_CAP_SYS_PTRACE = 19


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    section: str
    name: str
    #: "ok"; "note": nothing to do; "warning": something does not work; "problem": nothing does.
    status: Status
    detail: str
    #: What to do about it, or None.
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What `examine` found."""

    version: str
    probe: Probe
    checks: tuple[Check, ...]
    #: Lazy buffers work here, for this user.
    works: bool
    #: System calls on memory that is not there yet wait for it; else they fail with EFAULT.
    kernel_mode_faults: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON."""
        facts = asdict(self.probe)
        bits = single_bits(self.probe.features)
        facts["features"] = [feature.name or hex(feature) for feature in bits]
        return {
            "version": self.version,
            "works": self.works,
            "kernel_mode_faults": self.kernel_mode_faults,
            "checks": [asdict(check) for check in self.checks],
            "probe": facts,
        }


@dataclass(slots=True)
class _Notebook:
    """Collects checks of one section after another."""

    checks: list[Check] = field(default_factory=list)
    section: str = ""

    def add(self, name: str, status: Status, detail: str, remedy: str | None = None) -> None:
        self.checks.append(Check(self.section, name, status, detail, remedy))


def examine(*, trial: bool = True) -> Report:
    """Look at this system, as this user; changes nothing and takes about a second.

    :param trial: also try it out, in a forked child: call it before starting threads.

    Without ``trial``, ``works`` is what the system promises.
    """
    found = probe()
    notes = _Notebook()
    _system(notes, found)
    _creation(notes, found)
    _own_threads(notes)
    _features(notes, found)
    _memory(notes, found)
    _extras(notes)
    if trial:
        notes.section = "Trial"
        if found.available:
            _trial(notes)
        else:
            notes.add("lazy buffer", "problem", "not tried: no userfaultfd can be made")
    return Report(
        version=VERSION,
        probe=found,
        checks=tuple(notes.checks),
        works=not any(check.status == "problem" for check in notes.checks),
        kernel_mode_faults=found.kernel_mode_faults,
    )


# ---- what the system offers ----


def _system(notes: _Notebook, found: Probe) -> None:
    notes.section = "System"
    notes.add("kernel", "ok", f"Linux {found.kernel} on {found.machine}")
    notes.add("page size", "ok", _size(found.page_size))
    notes.add("Python", "ok", f"{platform.python_implementation()} {platform.python_version()}")
    if "t" in sys.abiflags:
        enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
        if enabled:
            notes.add("GIL", "note", "on, in a free-threaded build of Python")
        else:
            notes.add("GIL", "note", "off: free-threaded Python")
    else:
        notes.add("GIL", "ok", "on")


def _creation(notes: _Notebook, found: Probe) -> None:
    notes.section = "Permission"
    for path in found.paths:
        name = "userfaultfd(2)" if path.path == "syscall" else "/dev/userfaultfd"
        name += ", user mode only" if path.user_mode_only else ""
        if path.ok:
            notes.add(name, "ok", "works")
        else:
            code = errno.errorcode.get(path.errno, str(path.errno))
            notes.add(name, "note", f"{code}: {path.reason}")
    sysctl = found.unprivileged_sysctl
    # The same flag is refused before it is looked at who asks.
    old = any(path.errno == errno.EINVAL for path in found.paths if path.user_mode_only)
    meaning = {
        None: "there is none in this kernel",
        0: "0: nothing without privileges" if old else "0: without privileges user mode only",
        1: "1: everybody may handle all faults",
    }
    notes.add("vm.unprivileged_userfaultfd", "ok", meaning.get(sysctl, str(sysctl)))
    status = _status()
    capable = int(status.get("CapEff", "0"), 16) >> _CAP_SYS_PTRACE & 1
    notes.add("CAP_SYS_PTRACE", "ok", "yes" if capable else "no")
    filtered = status.get("Seccomp", "0") == "2"
    if filtered:
        notes.add("seccomp", "note", "a filter is active, as in most containers")
    if found.kernel_mode_faults:
        notes.add("system calls on lazy memory", "ok", "wait for their pages, as any touch does")
    elif found.available:
        notes.add(
            "system calls on lazy memory",
            "warning",
            "fail with EFAULT where pages are missing: os.write, socket.send, file.readinto,"
            " O_DIRECT, KVM. Touches by Python, NumPy and C code work",
            "make the bytes resident before (`await buf.fetch(...)`, `buf.pin(...)`), or, as"
            " root, one of: `sysctl -w vm.unprivileged_userfaultfd=1`;"
            + (f" `setfacl -m u:{os.geteuid()}:rw /dev/userfaultfd`;" if _device(found) else "")
            + " grant CAP_SYS_PTRACE to the program",
        )
    else:
        notes.add(
            "creating a userfaultfd",
            "problem",
            "no way of creating one works for this user",
            _creation_remedy(found, filtered),
        )


def _creation_remedy(found: Probe, filtered: bool) -> str:
    codes = {path.errno for path in found.paths}
    if errno.EMFILE in codes or errno.ENFILE in codes:
        return "no file descriptor is free: close some, or raise `ulimit -n`"
    if errno.ENOSYS in codes:
        return "the kernel lacks CONFIG_USERFAULTFD, or a filter hides it: use another kernel"
    if filtered:
        return (
            "allow the system call `userfaultfd` in the container's seccomp profile (Docker's"
            " default profile forbids it; `--security-opt seccomp=profile.json`), or pass"
            " /dev/userfaultfd in (`--device /dev/userfaultfd`)"
        )
    remedy = "as root: `sysctl -w vm.unprivileged_userfaultfd=1`"
    if _device(found):
        remedy += ", or permission to open /dev/userfaultfd"
    return f"{remedy}; before Linux 5.11 there is no user mode only"


def _device(found: Probe) -> bool:
    """There is a /dev/userfaultfd, whoever may open it. Linux 6.1."""
    return any(
        path.path == "device" and path.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV)
        for path in found.paths
    )


def _own_threads(notes: _Notebook) -> None:
    """The sentry reads there what a thread that waits is doing; see native/sentry.c."""
    path = f"/proc/self/task/{threading.get_native_id()}/syscall"
    name = "/proc/self/task/*/syscall"
    try:
        Path(path).read_text()
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, str(error.errno))
        detail = f"{code}: a thread that touches missing pages while it holds the GIL may hang"
        if isinstance(error, PermissionError):
            remedy = (
                "a process that changed its user is not dumpable: call prctl(PR_SET_DUMPABLE, 1)"
                " after that, or start another program by execve"
            )
        else:
            remedy = "mount /proc"
        notes.add(name, "problem", detail, remedy)
    else:
        notes.add(name, "ok", "readable")


def _features(notes: _Notebook, found: Probe) -> None:
    notes.section = "Kernel features"
    if not found.available:
        notes.add("features", "note", "unknown, as no userfaultfd can be made")
        return
    if Feature.THREAD_ID not in found.features:
        notes.add("THREAD_ID", "problem", "missing", "run Linux 4.14 or later")
    for feature, use in _FEATURES:
        name = feature.name or hex(feature)
        if feature in found.features:
            notes.add(name, "ok", use)
        else:
            notes.add(name, "note", f"missing: {use}", f"run Linux {SINCE[feature]} or later")
    if found.fork_events:
        notes.add("EVENT_FORK", "ok", "following forks of the owner of the memory")
    else:
        notes.add("EVENT_FORK", "note", "not for this user: following forks needs CAP_SYS_PTRACE")
    if found.pagemap_scan:
        notes.add("PAGEMAP_SCAN", "ok", "finding written pages fast")
    else:
        notes.add("PAGEMAP_SCAN", "note", "missing: finding written pages fast (Linux 6.7)")


def _memory(notes: _Notebook, found: Probe) -> None:
    notes.section = "Memory and limits"
    for pool in found.hugepages:
        free = pool.free - pool.reserved
        if free > 0:
            notes.add(f"huge pages of {_size(pool.size)}", "ok", f"{free} free of {pool.total}")
        else:
            default = pool is found.hugepages[0]
            notes.add(
                f"huge pages of {_size(pool.size)}",
                "note",
                f"none free of {pool.total}",
                "for kind='hugetlb', as root: `sysctl -w vm.nr_hugepages=N`" if default else None,
            )
    notes.add("transparent huge pages", "ok", found.thp or "not in this kernel")
    if found.limits.mappings is not None:
        few = found.limits.mappings < 65530
        notes.add(
            "vm.max_map_count",
            "warning" if few else "ok",
            f"{found.limits.mappings} mappings; each buffer takes one or two",
            "as root: `sysctl -w vm.max_map_count=262144`" if few else None,
        )
    soft, hard = found.limits.open_files
    few = 0 <= soft < 256
    notes.add(
        "open files",
        "warning" if few else "ok",
        f"{_limit(soft)}, at most {_limit(hard)}; connections of sources count",
        "`ulimit -n 4096`" if few else None,
    )
    if found.limits.overcommit == 2:
        notes.add(
            "vm.overcommit_memory",
            "warning",
            "2: a buffer counts as used memory from the start, whatever is fetched",
            "as root: `sysctl -w vm.overcommit_memory=0`",
        )
    elif found.limits.overcommit is not None:
        notes.add("vm.overcommit_memory", "ok", str(found.limits.overcommit))
    notes.add("/dev/kvm", "ok", "this user may open it" if found.kvm else "no, or not this user")


def _extras(notes: _Notebook) -> None:
    notes.section = "Optional packages"
    for package, extra, use in _EXTRAS:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            remedy = install_hint(extra) if extra else f"pip install {package}"
            notes.add(package, "note", f"not installed: {use}", remedy)
        else:
            notes.add(package, "ok", version)


def _status() -> dict[str, str]:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _limit(value: int) -> str:
    return "no limit" if value < 0 else str(value)


def _size(count: int) -> str:
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= factor and count % factor == 0:
            return f"{count // factor} {unit}"
    return f"{count} bytes"


# ---- the trial ----


def _trial(notes: _Notebook) -> None:
    """Run `_try_everything` in a child, and note what it says or how it ends."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Only this thread and this code exist in the child.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _run_trial(lambda *row: os.write(writer, json.dumps(row).encode() + b"\n"))
        finally:
            os._exit(0)
    os.close(writer)
    rows, late = _collect(reader, time.monotonic() + TRIAL_LIMIT)
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    last = "lazy buffer"
    for name, state, detail, remedy in rows:
        last = name
        if state is not None:
            notes.add(name, state, detail, remedy)
    hint = None if any(check.status == "problem" for check in notes.checks) else _REPORT
    if late:
        notes.add(last, "problem", f"hangs: killed after {TRIAL_LIMIT:g} s", hint)
    elif os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        notes.add(last, "problem", f"the process died of {name}", hint)
    elif last != _LAST and notes.checks[-1].status != "problem":
        notes.add(last, "problem", "the trial stopped here", hint)


#: Name, status (None: it begins), detail and remedy.
_Row: TypeAlias = tuple[str, Status | None, str, str | None]
_Tell: TypeAlias = Callable[[str, Status | None, str, str | None], object]
_LAST = "closing"
_REPORT = "please report it, with the output of `aiouffd doctor --json`"


def _collect(reader: int, limit: float) -> tuple[list[_Row], bool]:
    """Rows from the child until it ends; and whether it did not end in time."""
    data, late = b"", False
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, limit - time.monotonic()))
        if not ready:
            late = True
            break
        chunk = os.read(reader, 65536)
        if not chunk:
            break
        data += chunk
    os.close(reader)
    whole = data[: data.rfind(b"\n") + 1]
    return [tuple(json.loads(line)) for line in whole.splitlines()], late


def _run_trial(tell: _Tell) -> None:
    # The touch from the loop's thread is on purpose.
    warnings.simplefilter("ignore", BlockingTouchWarning)
    try:
        asyncio.run(_try_everything(tell))
    except Exception as error:
        tell("lazy buffer", "problem", f"{type(error).__name__}: {error}", _REPORT)


async def _try_everything(tell: _Tell) -> None:
    """Touch a lazy buffer of a few pages in every way."""
    page = mmap.PAGESIZE
    content = b"".join(bytes([65 + index]) * page for index in range(16))

    async def read(offset: int, length: int) -> bytes:
        await asyncio.sleep(0.001)
        return content[offset : offset + length]

    async def attempt(name: str, what: Callable[[], bool], *, in_thread: bool = True) -> None:
        tell(name, None, "", None)
        start = time.perf_counter()
        right = await _in_thread(what) if in_thread else what()
        took = (time.perf_counter() - start) * 1000
        if right:
            tell(name, "ok", f"right bytes after {took:.1f} ms", None)
        else:
            tell(name, "problem", "wrong bytes", _REPORT)

    source = FunctionSource(read, len(content), portable=True)
    async with open_buffer(source, block_size=page, readahead=0) as buffer:
        view = buffer.view

        def is_right(index: int) -> bool:
            return view[index * page + 7] == content[index * page + 7]

        await attempt("copy without the GIL", lambda: buffer[page : 2 * page] == b"B" * page)
        number = lib.au_handler_signal()
        place = f"{number} (SIGRTMIN+{number - signal.SIGRTMIN})"
        tell("signal that asks for the GIL", "ok", place, None)
        await attempt("touch by a thread that holds the GIL", lambda: is_right(2))
        await attempt("touch by the loop's own thread", lambda: is_right(3), in_thread=False)
        name = "system call (os.write) on missing bytes"
        try:
            await attempt(name, lambda: _through_a_pipe(view[4 * page : 5 * page]) == b"E" * page)
        except OSError as error:
            if error.errno != errno.EFAULT or not buffer.user_mode_only:
                raise
            tell(name, "note", "EFAULT, as said above; the process goes on", None)
        await buffer.fetch(5 * page, page)
        await attempt(
            "system call on fetched bytes",
            lambda: _through_a_pipe(view[5 * page : 6 * page]) == b"F" * page,
        )
        tell(_LAST, None, "", None)
    tell(_LAST, "ok", "in order", None)


def _through_a_pipe(data: memoryview) -> bytes:
    """Have the kernel read ``data``, a page or less."""
    reader, writer = os.pipe()
    try:
        return os.read(reader, os.write(writer, data))
    finally:
        os.close(reader)
        os.close(writer)


async def _in_thread(what: Callable[[], bool]) -> bool:
    """The result of ``what``, run on a new daemon thread: one that hangs is left behind."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bool] = loop.create_future()

    def run() -> None:
        try:
            result, error = what(), None
        except Exception as caught:
            result, error = False, caught
        loop.call_soon_threadsafe(finish, result, error)

    def finish(result: bool, error: Exception | None) -> None:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="aiouffd-doctor", daemon=True).start()
    return await future
