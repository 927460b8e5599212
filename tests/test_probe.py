"""What `probe` says, against what can be found out otherwise."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from aiouffd.kernel.abi import Feature
from aiouffd.kernel.probe import CreationPath, probe
from aiouffd.kernel.uffd import CreationError, Userfaultfd, kernel_features

# Everything is imported before the change of user, who may not be able to read the interpreter's
# files. The change makes a process "not dumpable", which execve would undo.
UNPRIVILEGED = """
import ctypes, os
from aiouffd.kernel.probe import probe
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
found = probe()
print(found.available, found.user_mode_only, found.kernel_mode_faults, found.fork_events)
for path in found.paths:
    print(path)
"""


def test_it_describes_this_system() -> None:
    found = probe()
    assert found.kernel == os.uname().release
    assert found.page_size == os.sysconf("SC_PAGE_SIZE")
    assert len(found.paths) == 4
    assert found.limits.open_files[0] != 0
    assert found.limits.mappings is None or found.limits.mappings > 0
    assert all(pool.size > found.page_size for pool in found.hugepages)
    assert found.thp in (None, "always", "madvise", "never")


def test_it_agrees_with_what_can_be_created() -> None:
    found = probe()
    for path in found.paths:
        forced = "syscall" if path.path == "syscall" else "device"
        try:
            Userfaultfd(user_mode_only=path.user_mode_only, path=forced).close()
        except CreationError:
            assert not path.ok
        else:
            assert path.ok
            assert path.reason == ""
    if found.available:
        assert found.features == kernel_features()


def test_it_leaves_no_descriptor_open() -> None:
    probe()
    before = os.listdir("/proc/self/fd")
    probe()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_it_is_frozen_and_plain() -> None:
    found = probe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.kernel = "x"  # type: ignore[misc]
    assert dataclasses.asdict(found)["kernel"] == found.kernel


def test_a_path_says_why_it_failed() -> None:
    assert str(CreationPath("syscall", True, 0, "")) == "syscall, user mode only: ok"
    assert str(CreationPath("device", False, 13, "no")) == "device, all faults: EACCES, no"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_privileges_it_says_user_mode_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary, *paths = done.stdout.splitlines()
    found = probe()
    if found.unprivileged_sysctl == 0 and os.stat("/dev/userfaultfd").st_mode & 0o077 == 0:
        assert summary == "True True False False"
        assert "EPERM" in paths[0]
        assert "vm.unprivileged_userfaultfd" in paths[0]
        assert "EACCES" in paths[1]
        assert paths[2] == "syscall, user mode only: ok"
    assert Feature.EVENT_FORK in found.features
