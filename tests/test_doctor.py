"""The doctor, on this system, as another user, and on systems that are worse off."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from aiouffd import cli
from aiouffd.cli import examine as doctor
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.probe import CreationPath, Probe, probe
from tests.support import ROOT, environment

PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

# Everything is imported before the change of user, who may not be able to read the interpreter's
# files. The change makes a process "not dumpable", which execve, or this prctl, undoes.
AS_NOBODY = """
import ctypes, os, sys
from aiouffd import cli
from aiouffd.cli import examine as doctor
doctor.examine(trial=False)
dumpable, *arguments = sys.argv[1:]
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
if dumpable == "yes":
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
doctor.TRIAL_LIMIT = 5.0
sys.exit(cli.main(arguments))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=PYTHONPATH),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def as_nobody(*arguments: str, dumpable: bool = True) -> subprocess.CompletedProcess[str]:
    return run("-W", "error", "-c", AS_NOBODY, "yes" if dumpable else "no", *arguments)


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in found["checks"]}


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


# ----------------------------------------------------------------- this system


def test_it_works_here() -> None:
    done = run("-W", "error", "-m", "aiouffd", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("Lazy buffers work here")
    for section in ("System", "Permission", "Kernel features", "Optional packages", "Trial"):
        assert f"\n{section}\n" in done.stdout


def test_json() -> None:
    done = run("-m", "aiouffd", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["works"] is True
    assert found["kernel_mode_faults"] is probe().kernel_mode_faults
    assert found["probe"]["kernel"] == os.uname().release
    assert "THREAD_ID" in found["probe"]["features"]
    here = statuses(found)
    assert here["touch by a thread that holds the GIL"] == "ok"
    assert here["touch by the loop's own thread"] == "ok"
    assert here["system call on fetched bytes"] == "ok"
    assert here["closing"] == "ok"


def test_wrong_usage() -> None:
    done = run("-m", "aiouffd", "doctor", "--no-such-option")
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_it_leaves_no_child_and_no_descriptor() -> None:
    code = (
        "import os\n"
        "from aiouffd.cli import examine as doctor\n"
        "doctor.examine()\n"
        "before = os.listdir('/proc/self/fd')\n"
        "assert doctor.examine().works\n"
        "assert os.listdir('/proc/self/fd') == before\n"
        "try: os.wait()\n"
        "except ChildProcessError: print('alone')\n"
    )
    done = run("-W", "error", "-c", code)
    assert done.stdout == "alone\n", done.stderr


# ------------------------------------------------------------ without privileges


@only_root
def test_without_privileges() -> None:
    done = as_nobody("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    here = statuses(found)
    assert found["works"] is True
    if found["kernel_mode_faults"]:
        return  # everybody may, on this system
    assert here["userfaultfd(2), user mode only"] == "ok"
    assert here["system calls on lazy memory"] == "warning"
    assert here["system call (os.write) on missing bytes"] == "note"
    assert here["system call on fetched bytes"] == "ok"
    assert "EFAULT" in done.stdout
    assert "vm.unprivileged_userfaultfd=1" in done.stdout


@only_root
def test_a_process_that_is_not_dumpable_is_told_what_to_do() -> None:
    done = as_nobody("doctor", dumpable=False)
    assert "PR_SET_DUMPABLE" in done.stdout


# --------------------------------------------------------------- other systems


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the doctor see another system; `examine` without the trial."""

    def examine(**changes: Any) -> doctor.Report:
        limits = dataclasses.replace(probe().limits, **changes.pop("limits", {}))
        other: Probe = dataclasses.replace(probe(), limits=limits, **changes)
        monkeypatch.setattr(doctor, "probe", lambda: other)
        return doctor.examine(trial=False)

    return examine


def refused(code: int) -> tuple[CreationPath, ...]:
    return tuple(
        CreationPath(path, only, code, os.strerror(code))
        for only in (False, True)
        for path in ("syscall", "device")
    )


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSYS, "CONFIG_USERFAULTFD"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EPERM, "unprivileged_userfaultfd=1"),
    ],
)
def test_no_userfaultfd(elsewhere: Any, code: int, remedy: str) -> None:
    report = elsewhere(paths=refused(code), features=Feature(0))
    (problem,) = [check for check in report.checks if check.status == "problem"]
    assert remedy in problem.remedy or "seccomp" in problem.remedy
    assert not report.works


def test_exit_status_if_it_does_not_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(probe(), paths=refused(errno.EPERM), features=Feature(0))
    monkeypatch.setattr(doctor, "probe", lambda: other)
    assert cli.main(["doctor"]) == 1
    assert "Lazy buffers do not work here" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["works"] is False


def test_a_kernel_without_poison(elsewhere: Any) -> None:
    report = elsewhere(features=Feature(int(probe().features) & ~int(Feature.POISON)))
    (check,) = [check for check in report.checks if check.name == "POISON"]
    assert check.status == "note"  # lazy buffers do without
    assert "6.6" in check.remedy
    assert report.works


def test_before_user_mode_only_everything_takes_privileges(elsewhere: Any) -> None:
    def paths(user_mode: int, device: int) -> tuple[CreationPath, ...]:
        return (
            CreationPath("syscall", False, errno.EPERM, "no CAP_SYS_PTRACE"),
            CreationPath("device", False, device, ""),
            CreationPath("syscall", True, user_mode, "user mode only needs Linux 5.11"),
            CreationPath("device", True, device, ""),
        )

    def detail(report: doctor.Report, name: str) -> doctor.Check:
        (check,) = [check for check in report.checks if check.name == name]
        return check

    old = elsewhere(paths=paths(errno.EINVAL, errno.ENOENT), unprivileged_sysctl=0)
    assert "nothing without privileges" in detail(old, "vm.unprivileged_userfaultfd").detail
    remedy = detail(old, "creating a userfaultfd").remedy
    assert "5.11" in remedy
    assert "/dev/userfaultfd" not in remedy  # it came with 6.1
    newer = elsewhere(paths=paths(errno.EPERM, errno.EACCES), unprivileged_sysctl=0)
    assert "user mode only" in detail(newer, "vm.unprivileged_userfaultfd").detail
    limited = elsewhere(paths=paths(0, errno.ENOENT), unprivileged_sysctl=0)
    assert "setfacl" not in detail(limited, "system calls on lazy memory").remedy
    limited = elsewhere(paths=paths(0, errno.EACCES), unprivileged_sysctl=0)
    assert "setfacl" in detail(limited, "system calls on lazy memory").remedy


def test_features_of_a_newer_kernel_are_told(elsewhere: Any) -> None:
    report = elsewhere(features=Feature(int(probe().features) | 1 << 41))
    assert hex(1 << 41) in report.as_dict()["probe"]["features"]
    assert "THREAD_ID" in report.as_dict()["probe"]["features"]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"mappings": 1000}, "vm.max_map_count"),
        ({"open_files": (64, 64)}, "open files"),
        ({"overcommit": 2}, "vm.overcommit_memory"),
    ],
)
def test_low_limits(elsewhere: Any, limits: dict[str, Any], name: str) -> None:
    (check,) = [check for check in elsewhere(limits=limits).checks if check.name == name]
    assert check.status == "warning"
    assert check.remedy


# -------------------------------------------------------- a trial that goes wrong


def trial(monkeypatch: pytest.MonkeyPatch, how: Any) -> doctor.Check:
    """The last check after a trial that does ``how`` in its child."""

    def run_trial(tell: Any) -> None:
        tell("first", "ok", "fine", None)
        tell("second", None, "", None)
        how()

    monkeypatch.setattr(doctor, "_run_trial", run_trial)
    report = doctor.examine()
    assert not report.works
    return report.checks[-1]


def test_a_trial_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TRIAL_LIMIT", 0.2)
    check = trial(monkeypatch, lambda: time.sleep(60))
    assert check.name == "second"
    assert "hangs" in check.detail


def test_a_trial_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    check = trial(monkeypatch, lambda: os.kill(os.getpid(), 9))
    assert (check.name, check.detail) == ("second", "the process died of SIGKILL")


def test_a_trial_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    check = trial(monkeypatch, lambda: None)
    assert (check.name, check.detail) == ("second", "the trial stopped here")


# ------------------------------------------------------------------- with colours


def test_rich_output_says_the_same(elsewhere: Any) -> None:
    console = pytest.importorskip("rich.console")
    out = io.StringIO()
    report = elsewhere()
    cli.doctor._print_rich(report, console.Console(file=out, width=300, force_terminal=False))
    for check in report.checks:
        assert check.name in out.getvalue()
        assert check.detail in out.getvalue()
